/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "base/util.h"

/* How often the pages of a pool are mapped, asked of the kernel. For pool.c alone. */

#define POOL_COUNT_NONE UINT32_MAX              /* a hole: no memory */
#define POOL_COUNT_BUSY (UINT32_MAX - 1)        /* the kernel was moving the frame just then */

typedef struct PoolCounter {
        int rw_fd;              /* borrowed */
        int pagemap_fd, kpagecount_fd, kpageflags_fd;
} PoolCounter;
int pool_counter_init(PoolCounter *counter, int rw_fd); /* -EPERM, -ENOENT: not for us to know */
void pool_counter_done(PoolCounter *counter);
/* How often each of n_pages (at most BLOCK_PAGES) is mapped into processes; POOL_COUNT_*. */
int pool_counter_count(PoolCounter *counter, uint64_t page, uint32_t n_pages, uint32_t *ret);
