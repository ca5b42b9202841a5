/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "base/util.h"

#include <sys/types.h>

/* Which thread ksmd is: it lives as long as the kernel does. */
typedef struct Ksmd {
        pid_t pid;              /* 0: not found yet */
        int schedstat;          /* of it, kept open: ksmd is looked at every few milliseconds; -EBADF */
} Ksmd;

#define KSMD_NULL ((Ksmd){ .schedstat = -EBADF })
void ksmd_done(Ksmd *ksmd);

/* Its CPU time, in nanoseconds. -ENOENT: none is visible (no KSM, or we are in a pid namespace of our own). */
int ksmd_cpu(Ksmd *ksmd, uint64_t *ret);
