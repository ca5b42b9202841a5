/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "target/target.h"

/*
 * Un-shares the pages between start and end that KSM merged, from outside: the process runs meanwhile. kpageflagsfd: of
 * /proc/kpageflags. What cannot be un-shared (no memory, a kernel before 5.19) stays as it is and is no failure:
 * madvise(MADV_UNMERGEABLE) in the process does the same, and takes the mark away as well. Pages that relatives share by
 * fork are left alone. Returns how many pages of KSM's were found.
 */
uint64_t unshare_merged(Target *target, int kpageflagsfd, uint64_t start, uint64_t end);
