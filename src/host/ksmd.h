/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "base/util.h"

#include <sys/types.h>

/* CPU time of the kernel thread ksmd, in nanoseconds. *pid remembers which it is; 0 at first. -ENOENT: none is visible
 * (no KSM, or we are in a pid namespace of our own). */
int ksmd_cpu(pid_t *pid, uint64_t *ret);
