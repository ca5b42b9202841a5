/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "target/activity.h"

#include "base/io.h"

#include <stdio.h>
#include <string.h>
#include <time.h>

/* Fields as proc(5) numbers them; the name, field 2, may hold anything, parentheses too. */
int target_activity(const Target *target, TargetActivity *ret) {
        _cleanup_free_ char *text = NULL;
        unsigned long long minor, major, user, system, mapped;
        const char *rest;
        long long resident;
        int r = read_file(target->procfd, "stat", &text, NULL);

        if (r == -ESRCH || r == -ENOENT)
                return TARGET_E_GONE;
        if (r < 0)
                return r;
        rest = strrchr(text, ')');
        if (!rest || sscanf(rest + 1,
                            " %*c %*d %*d %*d %*d %*d %*u %llu %*u %llu %*u %llu %llu %*d %*d %*d %*d %*d %*d %*u %llu %lld",
                            &minor, &major, &user, &system, &mapped, &resident) != 6)
                return -EBADMSG;
        *ret = (TargetActivity){ .faults = minor + major, .cpu_ticks = user + system, .mapped_bytes = mapped,
                                 .resident_pages = resident > 0 ? (uint64_t)resident : 0 };
        return 0;
}

int target_cpu_nsec(const Target *target, uint64_t *ret) {
        struct timespec used;
        clockid_t clock;

        if (clock_getcpuclockid(target->pid, &clock) != 0 || clock_gettime(clock, &used) < 0)
                return TARGET_E_GONE;
        *ret = (uint64_t)used.tv_sec * NSEC_PER_SEC + (uint64_t)used.tv_nsec;
        return 0;
}
