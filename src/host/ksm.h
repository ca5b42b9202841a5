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
        uint64_t full_scans, stable_node_chains, stable_node_dups;
        int64_t ksm_zero_pages, general_profit;
} KsmCounters;

typedef struct KsmKnobs {
        uint64_t run, pages_to_scan, sleep_millisecs, use_zero_pages, smart_scan, max_page_sharing, merge_across_nodes;
        bool advisor;           /* advisor_mode is not "none" */
} KsmKnobs;

/* sysfs NULL: /sys/kernel/mm/ksm; state_path: the file that remembers what was found, below /run (knobs do not survive
 * a reboot either) in a directory only we can write to. -ENOENT: a kernel without KSM. -EROFS, -EACCES: it is there but
 * cannot be written. state_path NULL: for reading only; then neither of these two is an error and ksm_set() is
 * -EROFS. */
int ksm_new(const char *sysfs, const char *state_path, Ksm **ret);
Ksm *ksm_free(Ksm *ksm);        /* does not restore */
DEFINE_CLEANUP(Ksm, ksm_free)

int ksm_counters(const Ksm *ksm, KsmCounters *ret);
int ksm_knobs(const Ksm *ksm, KsmKnobs *ret);
/* How far ksmd is, cheap enough to be asked every millisecond: pages_sharing, ksm_zero_pages, full_scans, pages_scanned
 * (where the kernel has it, 6.6; else pages_unshared and pages_volatile), the rest 0; and the knob run. */
int ksm_progress(const Ksm *ksm, KsmCounters *ret, uint64_t *ret_run);

enum { KSM_E_BUSY = 1 };        /* the knob cannot change while pages are shared */

/* Sets one knob by its sysfs name after remembering what it held; nothing is written, and nothing is remembered, when
 * it holds the value already. KSM_E_BUSY; -ENOENT: this kernel has no such knob; -EINVAL: no knob of ours, or not a
 * value for it; otherwise -errno as the state file or write(2) said. Where it failed the knob is as it was. */
int ksm_set(Ksm *ksm, const char *knob, uint64_t value);
int ksm_set_text(Ksm *ksm, const char *knob, const char *value); /* advisor_mode: "none", "scan-time" */
/* Puts back every knob that ksm_set() changed and that still holds our value; KSM_E_BUSY when a knob had to stay (it
 * is tried again by the next call, or the next start). -EBADMSG, once: there was a state file but it was not ours or
 * not whole; it was not used and is removed. Other -errno: a knob could not be written and stays on file. */
int ksm_restore(Ksm *ksm);
/* The same for some knobs only, whatever order they are given in. */
int ksm_restore_knobs(Ksm *ksm, const char *const *knobs, size_t n);
/* true: a state file of an earlier run was there when ksm_new() ran (ksm_restore() will use it), and not all of it
 * is put back yet. */
bool ksm_was_left_changed(const Ksm *ksm);

/* What /proc tells of one process. */
typedef struct KsmProcess {
        bool offers;            /* memory of it is in KSM, or ksmd will come to it */
        uint64_t merging_pages;
} KsmProcess;

/* proc_fd: of /proc. offers is what the kernel says where ksm_tells_offers(); else what ksmd has come to already (Linux
 * 6.1; merged pages alone, 5.19). -EACCES: only root may ask (then ret says nothing). One that ended offers nothing. */
int ksm_process(int proc_fd, const char *pid, KsmProcess *ret);
/* Whether this kernel tells who has offered memory that ksmd has not come to yet (6.17). */
bool ksm_tells_offers(int proc_fd);

/* CPU time ksmd has used, in nanoseconds (its /proc/PID/schedstat or stat); -ENOENT: no such thread is visible. */
int ksmd_cpu_nsec(Ksm *ksm, uint64_t *ret);
