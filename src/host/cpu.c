/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "host/cpu.h"

#include "base/io.h"

#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>

#define SHARE_ONE 10000U

static int read_idle(const char *stat, uint64_t *ret_nsec) {
        _cleanup_free_ char *text = NULL;
        uint64_t idle, waiting;
        int r = read_file(AT_FDCWD, stat ?: "/proc/stat", &text, NULL);

        if (r < 0)
                return r;
        /* user, nice, system */
        if (sscanf(text, "cpu %*u %*u %*u %" SCNu64 " %" SCNu64, &idle, &waiting) != 2)
                return -EBADMSG;
        *ret_nsec = (idle + waiting) * (NSEC_PER_SEC / (uint64_t)sysconf(_SC_CLK_TCK));
        return 0;
}

int cpu_left_look(CpuLeft *left, const char *stat, uint64_t now, uint64_t own_nsec, uint32_t *ret) {
        CpuLeft before = *left;
        uint64_t idle, share;
        int r;

        *left = (CpuLeft){ 0 };
        r = read_idle(stat, &idle);
        if (r < 0)
                return r;
        *left = (CpuLeft){ .now_nsec = now, .idle_nsec = idle, .own_nsec = own_nsec };
        if (before.now_nsec == 0 || now <= before.now_nsec) {
                *ret = UINT32_MAX;
                return 0;
        }
        /* The idle time of a CPU that goes away goes with it. */
        share = ((idle > before.idle_nsec ? idle - before.idle_nsec : 0) +
                 (own_nsec > before.own_nsec ? (own_nsec - before.own_nsec) / 2 : 0)) /
                MAX_OF((now - before.now_nsec) / SHARE_ONE, (uint64_t)1);
        *ret = (uint32_t)MIN_OF(share, (uint64_t)UINT32_MAX - 1);
        return 0;
}
