/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "host/ksm.h"

/*
 * ksmd in bursts: runs the kernel's merger only while something marked is unmerged, with settings sized to the work,
 * then puts every knob back. Where the administrator runs ksmd himself (run = 1 found), his settings are left alone
 * and a burst is only waiting; where he had everything unmerged (run = 2), that stays so too.
 *
 * A burst is a small machine that the caller steps, so that the daemon goes on answering meanwhile.
 */
typedef struct Burst Burst;
int burst_new(Ksm *ksm, Burst **ret);
Burst *burst_free(Burst *burst); /* stops a running burst and restores */
DEFINE_CLEANUP(Burst, burst_free)

/* expected_pages: how many pages should get shared or zero-mapped (pages_sharing + ksm_zero_pages grow by that);
 * marked_pages: how many ksmd will have to look at. 0, then step it; -EALREADY: one is running; other -errno: the
 * knobs could not be set (and were put back). */
int burst_start(Burst *burst, uint64_t expected_pages, uint64_t marked_pages);

/* Puts back what could not be put back when a burst ended, or when a daemon before this one did: ksmd may run flat out
 * until then. To be called now and then; costs nothing when there is nothing to do, or a burst runs. */
void burst_restore(Burst *burst);

typedef enum BurstState {
        BURST_IDLE,
        BURST_RUNNING,          /* step again after burst_interval_nsec() */
        BURST_DONE,             /* merged what was expected, or ksmd went round often enough; knobs are restored */
        BURST_FOREIGN,          /* run is the administrator's (1, or 2), or became so meanwhile: left to him */
} BurstState;
BurstState burst_step(Burst *burst);
uint64_t burst_interval_nsec(const Burst *burst);
void burst_stop(Burst *burst);

/* Pages that ksmd looked at in vain, and skips by now, have got a partner: the next burst looks at all. */
void burst_look_at_all(Burst *burst);

/* Lets ksmd stand for a while, with all else as the burst set it; what ends a burst for want of progress or for taking
 * too long does not count that time. Step it meanwhile as often as is convenient. Where the knob cannot be set the
 * burst ends. Without effect when it stands, or goes on, already. */
void burst_pause(Burst *burst);
void burst_resume(Burst *burst);

/* Of all bursts that ended; ksmd_cpu_nsec: and of the one that runs. Where ksmd's CPU time cannot be seen (a pid
 * namespace of our own) it is the time it was let run. wall_nsec: without pauses. */
typedef struct BurstStats {
        uint64_t bursts, pages_expected, pages_merged, ksmd_cpu_nsec, wall_nsec, full_scans;
} BurstStats;
void burst_stats(const Burst *burst, BurstStats *ret);
