/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "base/util.h"

/*
 * The kernel's KSM knobs and counters (/sys/kernel/mm/ksm, Documentation/admin-guide/mm/ksm.rst), and the promise
 * that we leave every knob as we found it: what was found is on file before the first knob is changed, so that the
 * next start can put it back after a crash. A knob that somebody else changed meanwhile is left to him.
 */
typedef struct Ksm Ksm;

typedef struct KsmCounters {
        uint64_t pages_shared, pages_sharing, pages_unshared, pages_volatile, pages_scanned, pages_skipped;
        uint64_t full_scans, stable_node_chains, stable_node_dups, ksm_zero_pages;
        int64_t general_profit;
} KsmCounters;

typedef struct KsmKnobs {
        uint64_t run, pages_to_scan, sleep_millisecs, use_zero_pages, smart_scan, max_page_sharing, merge_across_nodes;
        bool advisor;           /* advisor_mode is not "none" */
} KsmKnobs;

/* sysfs NULL: /sys/kernel/mm/ksm; state_path: the file that remembers what was found. -ENOENT: a kernel without KSM.
 * -EROFS, -EACCES: it is there but cannot be written. */
int ksm_new(const char *sysfs, const char *state_path, Ksm **ret);
Ksm *ksm_free(Ksm *ksm);        /* does not restore */
DEFINE_CLEANUP(Ksm, ksm_free)

int ksm_counters(const Ksm *ksm, KsmCounters *ret);
int ksm_knobs(const Ksm *ksm, KsmKnobs *ret);

enum { KSM_E_BUSY = 1 };        /* the knob cannot change while pages are shared */

/* Sets one knob by its sysfs name after remembering what it held. KSM_E_BUSY; -errno as write(2) said. */
int ksm_set(Ksm *ksm, const char *knob, uint64_t value);
int ksm_set_text(Ksm *ksm, const char *knob, const char *value);
/* Puts back every knob that ksm_set() changed and that still holds our value; KSM_E_BUSY when a knob had to stay. */
int ksm_restore(Ksm *ksm);
/* true: a state file of an earlier run was there when ksm_new() ran (ksm_restore() will use it). */
bool ksm_was_left_changed(const Ksm *ksm);

/* CPU time ksmd has used, in nanoseconds (its /proc/PID/schedstat or stat); -ENOENT: no such thread is visible. */
int ksmd_cpu_nsec(Ksm *ksm, uint64_t *ret);
