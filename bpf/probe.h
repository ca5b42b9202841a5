/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

/*
 * What the probes and the daemon tell each other: maps and their elements, of fixed-width types, the same for both
 * compilers. Maps of one name are one map, whichever objects have it (src/probe/probe.c).
 */
#include <linux/types.h>

/* Map "cgroups": the cgroups whose processes are managed, by id (the inode of their directory). Value: PROBE_WATCHED. */
/* Map "targets": the processes that are managed, by tgid. What they met so far: */
struct probe_target {
        __u64 cow_breaks;       /* writes to pages that were merged */
        __u64 tlb_flushes;      /* made, or received from another CPU, while one of its threads ran */
        __u64 tlb_flush_pages;
};

#define PROBE_WATCHED 1U

/* Map "blocks": which pages are merged, by process and 2 MiB of its memory. The daemon sets bits, a write to the page
 * clears its bit. */
struct probe_block_key {
        __u64 block;            /* address / 2 MiB */
        __u32 tgid;
        __u32 zero;
};

#define PROBE_BLOCK_SHIFT 21
#define PROBE_PAGE_SHIFT 12
#define PROBE_BLOCK_WORDS 8

struct probe_block {
        __u64 merged[PROBE_BLOCK_WORDS];
};

/* Map "events", a ring: something happened that may change who is managed, or a probe costs too much. */
enum probe_event_kind {
        PROBE_EVENT_FORK,
        PROBE_EVENT_EXEC,
        PROBE_EVENT_EXIT,
        PROBE_EVENT_ATTACH,
        PROBE_EVENT_DEAR,
};

struct probe_event {
        __u64 cgroup;           /* the process is, or was, in; 0: not known */
        __u32 tgid;             /* the process; of a fork the child; 0: not known */
        __u32 kind;
};

/* Map "costs", an element a CPU: what the probes of faults and flushes, which come in storms, took of it together. In
 * units: a fault that ends at the first comparison is one, what looks something up is two. A unit is taken for 200 ns,
 * calling the program being most of it: 90 to 350 ns were measured (tests/bench/probe-cost.c). PROBE_WINDOW_UNITS in less
 * than PROBE_WINDOW_NSEC are more than PROBE_COST_PERCENT of the CPU. */
#define PROBE_UNIT_NSEC 200U
#define PROBE_COST_PERCENT 3U
#define PROBE_WINDOW_UNITS 32768U
#define PROBE_WINDOW_NSEC ((__u64)PROBE_WINDOW_UNITS * PROBE_UNIT_NSEC * 100 / PROBE_COST_PERCENT)

struct probe_cost {
        __u64 units;            /* since */
        __u64 since;            /* CLOCK_MONOTONIC, nsec: when the window began */
};

/* Map "flushes", an element a CPU: the tracepoint's reasons by who ran. */
enum probe_flush_by {
        PROBE_BY_OTHERS,
        PROBE_BY_TARGETS,
        PROBE_BY_KSMD,
        PROBE_BY_DAEMON,
        PROBE_BY_N,
};

/* enum tlb_flush_reason (linux/mm_types.h) as of Linux 6.18, and room for more. */
enum probe_flush_reason {
        PROBE_FLUSH_TASK_SWITCH,
        PROBE_FLUSH_REMOTE,
        PROBE_FLUSH_LOCAL,
        PROBE_FLUSH_LOCAL_MM,
        PROBE_FLUSH_REMOTE_SEND,        /* other CPUs were asked */
        PROBE_FLUSH_REMOTE_WRONG_CPU,
        PROBE_FLUSH_REASONS = 8
};

struct probe_flush_count {
        __u64 flushes;
        __u64 pages;            /* of flushes of single pages */
        __u64 all;              /* flushes of everything */
};

struct probe_flushes {
        struct probe_flush_count count[PROBE_BY_N][PROBE_FLUSH_REASONS];
};

/* Map "ksm", an element a CPU: what ksmd did. */
enum probe_ksm_count {
        PROBE_KSM_SCANS,
        PROBE_KSM_MERGED,       /* a page took another's frame, or became a new shared one */
        PROBE_KSM_ZERO,         /* a page became the zero page */
        PROBE_KSM_CHANGED,      /* not merged: -EFAULT: it changed, is pinned, or its mapping went away */
        PROBE_KSM_NO_MEMORY,    /* not merged: -ENOMEM */
        PROBE_KSM_OTHER_ERROR,
        PROBE_KSM_DROPPED,      /* shared frames given up: nobody maps them any more */
        PROBE_KSM_N,
};

struct probe_ksm {
        __u64 count[PROBE_KSM_N];
};

/* Map "walks", an element a CPU: reverse-map walks over KSM pages. */
struct probe_walks {
        __u64 walks;
        __u64 nsec;
        __u64 nsec_max;
};

/* What the iterator over the mappings of a process says of each, by address. */
struct probe_vma {
        __u64 start, end;       /* bytes */
        __u64 flags;            /* vm_flags: which bit means what differs between kernels (src/target/vma-bits.h) */
        __u64 anonymous;        /* it may hold pages of its own: it has an anon_vma */
        __u64 space;            /* which address space it is in, and */
        __u64 programs;         /* how many programs the process, or who forked it, had run by then (execve(2)) */
};

/* What the daemon sets before it loads. */
struct probe_settings {
        __u32 daemon_tgid;
        __u32 ksmd_tgid;        /* 0: not known */
};
