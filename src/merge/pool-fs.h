/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "base/util.h"

/* The file system of a pool (pool.c): made, opened again, and asked about its pages. For pool.c alone. */

/* A detached tmpfs with the pool's file and the domain's name in it; *ret_reason as in pool_new(). */
int pool_fs_new(const char *domain, int *ret_mount_fd, int *ret_rw_fd, const char **ret_reason);
/* The domain's name in such a mount; the caller's to free. -EBADMSG: it is none of ours. */
int pool_fs_domain(int mount_fd, char **ret);
/* The pool's file of such a mount, for reading and writing. -EBADMSG: it is another domain's, or none of ours. */
int pool_fs_open(const char *domain, int mount_fd, int *ret_rw_fd);
/* The pool's file for reading, through a copy of the mount that is read-only. */
int pool_fs_open_readonly(int mount_fd, int *ret_fd, const char **ret_reason);

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
