/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "base/util.h"

/*
 * How much of the host's CPU time everybody else leaves: what was idle, and half of what we used ourselves: it would
 * have been idle without us, or was taken from somebody who wanted it, and the counters do not say. Whether we may use
 * more is a question of what is left, not of how busy the host is: of 64 CPUs nine tenths may be busy, and nobody
 * misses one.
 */
typedef struct CpuLeft {
        uint64_t now_nsec, idle_nsec, own_nsec; /* at the last look; now_nsec 0: there was none */
} CpuLeft;

/* Since the last look, in 1/10,000 of one CPU, of all CPUs together. stat: NULL for /proc/stat (proc_stat(5): the first
 * line's idle and iowait, in ticks; what a hypervisor took is not left). own_nsec: the CPU time we used so far. *ret is
 * UINT32_MAX at the first look. -errno, -EBADMSG: nothing is known of what went before either. */
int cpu_left_look(CpuLeft *left, const char *stat, uint64_t now, uint64_t own_nsec, uint32_t *ret);
