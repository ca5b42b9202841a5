/* SPDX-License-Identifier: GPL-2.0 */
#pragma once

/*
 * What the probes know of the kernel: the few fields they read, found at load time in the kernel's own BTF (CO-RE),
 * wherever they are by then. No vmlinux.h.
 *
 * Each source is compiled twice: for tp_btf, whose arguments are typed and which the kernel checks against its BTF;
 * and, with PROBE_RAW, for plain raw tracepoints, for kernels without BTF: what needs a field is left out there.
 */
#include <linux/types.h>
#include <linux/bpf.h>
#include <stdbool.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>
#ifndef PROBE_RAW
#include <bpf/bpf_core_read.h>
#endif

#include "probe.h"

#ifdef PROBE_RAW
#define TRACEPOINT(name) SEC("raw_tp/" #name)
#else
#define TRACEPOINT(name) SEC("tp_btf/" #name)

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct kernfs_node {
        __u64 id;
};

struct cgroup {
        struct kernfs_node *kn;
};

struct css_set {
        struct cgroup *dfl_cgrp;
};

struct task_struct {
        int pid;
        int tgid;
        struct css_set *cgroups;
        __u64 self_exec_id;
};

#pragma clang attribute pop
#endif

/* The sizes are set before loading where they depend on the host. */
#define PROBE_MAP_CGROUPS                                          \
        struct {                                                   \
                __uint(type, BPF_MAP_TYPE_HASH);                   \
                __uint(map_flags, BPF_F_NO_PREALLOC);              \
                __uint(max_entries, 65536);                        \
                __type(key, __u64);                                \
                __type(value, __u32);                              \
        } cgroups SEC(".maps")

#define PROBE_MAP_TARGETS                                          \
        struct {                                                   \
                __uint(type, BPF_MAP_TYPE_HASH);                   \
                __uint(map_flags, BPF_F_NO_PREALLOC);              \
                __uint(max_entries, 65536);                        \
                __type(key, __u32);                                \
                __type(value, struct probe_target);                \
        } targets SEC(".maps")

#define PROBE_MAP_BLOCKS                                           \
        struct {                                                   \
                __uint(type, BPF_MAP_TYPE_HASH);                   \
                __uint(map_flags, BPF_F_NO_PREALLOC);              \
                __uint(max_entries, 65536);                        \
                __type(key, struct probe_block_key);               \
                __type(value, struct probe_block);                 \
        } blocks SEC(".maps")

#define PROBE_MAP_EVENTS                                           \
        struct {                                                   \
                __uint(type, BPF_MAP_TYPE_RINGBUF);                \
                __uint(max_entries, 65536);                        \
        } events SEC(".maps")

#define PROBE_MAP_COSTS                                            \
        struct {                                                   \
                __uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);           \
                __uint(max_entries, 1);                            \
                __type(key, __u32);                                \
                __type(value, struct probe_cost);                  \
        } costs SEC(".maps")

static __always_inline __u32 current_tgid(void) { return bpf_get_current_pid_tgid() >> 32; }

static __always_inline void add(__u64 *counter, __u64 n) { __sync_fetch_and_add(counter, n); }

static __always_inline int say_to(void *events, __u32 kind, __u64 cgroup, __u32 tgid) {
        struct probe_event *event = bpf_ringbuf_reserve(events, sizeof *event, 0);

        if (!event)
                return 0;
        event->cgroup = cgroup;
        event->tgid = tgid;
        event->kind = kind;
        bpf_ringbuf_submit(event, 0);
        return 0;
}

/* Says so when the window was short. An interrupt's flush in the middle may lose a unit, no more. */
static __always_inline void spend(void *costs, void *events, __u32 units) {
        __u32 zero = 0;
        struct probe_cost *cost = bpf_map_lookup_elem(costs, &zero);
        __u64 now;

        if (!cost)
                return;
        cost->units += units;
        if (cost->units < PROBE_WINDOW_UNITS)
                return;
        now = bpf_ktime_get_ns();
        if (now - cost->since < PROBE_WINDOW_NSEC)
                say_to(events, PROBE_EVENT_DEAR, 0, current_tgid());
        cost->units = 0;
        cost->since = now;
}
