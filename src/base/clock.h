/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "base/util.h"

#include <time.h>

static inline uint64_t clock_nsec(clockid_t clock) {
        struct timespec ts;
        clock_gettime(clock, &ts);
        return (uint64_t)ts.tv_sec * NSEC_PER_SEC + (uint64_t)ts.tv_nsec;
}

/* Time that never steps, in nanoseconds. */
static inline uint64_t now_nsec(void) { return clock_nsec(CLOCK_MONOTONIC); }

/* CPU time this whole process has used, in nanoseconds. */
static inline uint64_t process_cpu_nsec(void) { return clock_nsec(CLOCK_PROCESS_CPUTIME_ID); }
