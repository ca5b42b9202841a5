/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "base/util.h"
#include "bpf/probe.h"

#include <sys/types.h>

/*
 * Probes in the kernel (bpf/): what they say is a hint or a number, never something that work depends on. Each is
 * loaded and attached by itself, in the best way that this kernel lets us; what cannot be had says why, and everything
 * that asks for it is told nothing. A build without libbpf has this interface too, and no probe.
 */
typedef enum ProbeId {
        PROBE_ROSTER,           /* who comes and goes in managed cgroups: the events */
        PROBE_FAULTS,           /* writes to merged pages */
        PROBE_FLUSHES,          /* TLB flushes */
        PROBE_KSM,              /* what ksmd did */
        PROBE_WALKS,            /* reverse-map walks over KSM pages */
        PROBE_VMAS,             /* the mappings of a process, without a look at its pages */
        _PROBE_MAX,
} ProbeId;

typedef enum ProbeWay {
        PROBE_WAY_NONE,
        PROBE_WAY_TYPED,        /* BTF tracepoints, or fentry */
        PROBE_WAY_RAW,          /* raw tracepoints, without the kernel's types: less exact */
} ProbeWay;

typedef struct ProbeState {
        ProbeWay way;
        int error;              /* with PROBE_WAY_NONE why not, as a negative errno: */
        bool resting;           /* detached for a time: what happens meanwhile is not counted */
} ProbeState;

/* "roster", …; what follows when it works and when it does not, a sentence each; why not, of an error of ours
 * (-ENOSYS: not built in; -ECANCELED: switched off; -EXDEV: in a pid namespace of our own; -EBADMSG: not understood;
 * -EOPNOTSUPP: nothing to be used with). */
const char *probe_name(ProbeId id);
const char *probe_follows(ProbeId id, bool works);
const char *probe_error_name(int error);
const char *probe_way_name(ProbeWay way);

typedef struct ProbeOptions {
        bool off;               /* Probes=no: all of them -ECANCELED */
        bool typed_only, raw_only; /* for tests */
        pid_t ksmd;             /* 0: not known */
        uint64_t memory_bytes;  /* of the host: how many blocks there may be */
} ProbeOptions;

typedef struct Probes Probes;
/* Attaches what can be attached; which, probes_state() tells. -ENOMEM only. */
int probes_new(const ProbeOptions *options, Probes **ret);
Probes *probes_free(Probes *probes);
DEFINE_CLEANUP(Probes, probes_free)

ProbeState probes_state(const Probes *probes, ProbeId id);
static inline bool probes_have(const Probes *probes, ProbeId id) {
        return probes && probes_state(probes, id).way != PROBE_WAY_NONE;
}

/* Which cgroups (by inode) and processes the probes look at: all of them, ascending. What is forgotten of a process is
 * what was said of its blocks, too: to find those that are set still, all blocks of all processes are gone through. -errno:
 * some could not be told. */
int probes_watch_cgroups(Probes *probes, const uint64_t *ids, size_t n);
int probes_watch_targets(Probes *probes, const pid_t *pids, size_t n);
/* The process runs another program. */
void probes_forget_blocks(Probes *probes, pid_t pid);
/* How many blocks of a process that is watched are set. */
size_t probes_blocks(const Probes *probes, pid_t pid);

/* Readable when there are events; -EBADF without them. Never blocks. */
int probes_event_fd(const Probes *probes);
typedef void (*ProbeHandler)(void *userdata, const struct probe_event *event);
void probes_read_events(Probes *probes, ProbeHandler handler, void *userdata);

/* Faults and flushes come in storms, and their probes cost each of them the same. Where that was more than
 * PROBE_COST_PERCENT of a CPU (bpf/probe.h) the events read say so, and the two are detached: for PROBES_REST_MIN_NSEC,
 * and twice as long each time it happens again soon after, to PROBES_REST_MAX_NSEC at most. A storm costs as much as it
 * does for a window of a fifth of a second then, once in a while.
 * Attaches them again when it is time, and returns when to call next (CLOCK_MONOTONIC, nsec), or UINT64_MAX: when
 * events were read. */
#define PROBES_REST_MIN_NSEC (2 * NSEC_PER_SEC)
#define PROBES_REST_MAX_NSEC (64 * NSEC_PER_SEC)
uint64_t probes_rest(Probes *probes, uint64_t now_nsec);
/* How long they have rested in all. */
uint64_t probes_rested(const Probes *probes, uint64_t now_nsec);

/* What is merged of the 2 MiB at addr, as last set and less what was written to since: false when nothing was set. */
bool probes_block_get(const Probes *probes, pid_t pid, uint64_t addr, struct probe_block *ret);
/* Sets it, wholly; nothing merged is forgotten. -ESRCH: the process is not watched; -ENOSPC, -errno. */
int probes_block_set(Probes *probes, pid_t pid, uint64_t addr, const struct probe_block *block);

/* Sums since the probes were attached; all zero without the probe. */
uint64_t probes_cow_breaks(const Probes *probes);
void probes_flushes(const Probes *probes, struct probe_flushes *ret);
void probes_ksm(const Probes *probes, struct probe_ksm *ret);
void probes_walks(const Probes *probes, struct probe_walks *ret);
/* What one watched process met. */
void probes_target(const Probes *probes, pid_t pid, struct probe_target *ret);
/* Opens the mappings of the process for reading, struct probe_vma by struct probe_vma. The number is looked up at each
 * read(2): whose it was is for the caller to know. The caller owns the descriptor; -ENOSYS without the probe; -errno. */
int probes_open_vmas(const Probes *probes, pid_t pid);
/* What it says was found to be of no use: from now on as if it could not be had, for this reason. */
void probes_refuse(Probes *probes, ProbeId id, int error);

/* Memory that the maps take at most for what is set now, in bytes. */
uint64_t probes_bytes(const Probes *probes);
