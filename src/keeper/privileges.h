/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "base/util.h"

/*
 * A keeper outlives everything else of ours, reads from processes it knows nothing about, and needs nothing but what it
 * was handed: it gives up the rest for good.
 */

/* While we may: priority, locked memory, descriptors, the OOM killer's mercy. What is refused is done without. */
void privileges_prepare(void);
/* Again for each new process: locks are not inherited. */
void privileges_lock_memory(void);
/* No capability left, none to be had by execve(2), no system call but those of serving. -errno. */
int privileges_drop(void);
