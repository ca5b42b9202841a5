/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "target/target.h"

/*
 * What one read of /proc/PID/stat tells of what a process did since the last one: enough to leave a process alone in
 * which nothing can have changed. A first write to a write-protected or absent page is a fault; a new or vanished
 * mapping changes the size of the address space, mostly.
 */
typedef struct TargetActivity {
        uint64_t faults;        /* minor and major, of all its threads */
        uint64_t cpu_ticks;     /* user and system */
        uint64_t mapped_bytes;
        uint64_t resident_pages;
} TargetActivity;

int target_activity(const Target *target, TargetActivity *ret); /* TARGET_E_GONE, -errno */

/* CPU time of all its threads, those that ended included; of one that runs, as of the last tick. TARGET_E_GONE. */
int target_cpu_nsec(const Target *target, uint64_t *ret);
