/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "merge/pool-space.h"

#include <sys/types.h>

/*
 * A pool: the memory that holds a domain's merged pages, one copy of each. How it is made, and why targets cannot write
 * to it, stands at the top of pool.c. One a domain; two never share a page, a file or a file system.
 */
typedef struct Pool Pool;

/* *ret_reason (static; may be NULL) says what is missing when the kernel cannot have one (-EOPNOTSUPP) or refuses
 * (-EPERM, …). */
int pool_new(const char *domain, uint32_t max_sharing, Pool **ret, const char **ret_reason);

/* Takes over one that was made earlier, by its mount (borrowed, duplicated). All pages that hold data are reserved
 * until pool_recount(). -EBADMSG: it is not one of this domain's. */
int pool_open(const char *domain, int mount_fd, uint32_t max_sharing, Pool **ret);

/* Whose the pool with this mount is; the caller's to free. -EBADMSG: it is none. */
int pool_domain(int mount_fd, char **ret);

/* Closes our descriptors; contents live on while a target maps them or a keeper holds the mount. */
Pool *pool_free(Pool *pool);
DEFINE_CLEANUP(Pool, pool_free)

int pool_mount_fd(const Pool *pool);    /* for keeper_pool_add() */
/* For a target to map MAP_PRIVATE: reading only, on a mount of its own that is read-only, so that not even root can
 * open it again for writing. */
int pool_target_fd(const Pool *pool);
/* What /proc/PID/maps shows of a mapping of it. */
void pool_identity(const Pool *pool, dev_t *ret_dev, ino_t *ret_ino);

/* As pool_space_alloc(): reserved until taken or given back. Pages read as zeros until written. */
int pool_alloc(Pool *pool, uint32_t n_pages, const uint64_t *addresses, size_t n_addresses, uint64_t *ret_page);
int pool_alloc_at(Pool *pool, uint64_t page, uint32_t n_pages, const uint64_t *addresses, size_t n_addresses);
/* Only of reserved pages: what is mapped never changes. -ENOSPC, -ENOMEM: no memory. */
int pool_write(Pool *pool, uint64_t page, uint32_t n_pages, const void *data);
int pool_read(const Pool *pool, uint64_t page, uint32_t n_pages, void *data);

/* Before a mapping at address is made: POOL_E_FULL, POOL_E_MISFIT. The limit is never exceeded by us; children that a
 * target forks add mappings of their own. */
int pool_take(Pool *pool, uint64_t page, uint32_t n_pages, uint64_t address);
/* From now on; what is shared more often stays so. */
void pool_set_max_sharing(Pool *pool, uint32_t max_sharing);
/* The mapping was not made, or is gone. Pages without any are freed by pool_collect(), not here. */
void pool_drop(Pool *pool, uint64_t page, uint32_t n_pages);
/* Reserved pages that will not be mapped after all. */
int pool_give_back(Pool *pool, uint64_t page, uint32_t n_pages);

/* How often each page is mapped into processes now, as the kernel counts; or POOL_COUNT_* (pool-count.h). -errno: not
 * all of them could be counted. */
int pool_sharers(Pool *pool, uint64_t page, uint32_t n_pages, uint32_t *ret_sharers);

/* The same, and what the kernel says becomes the truth for these pages, as in pool_collect(); none is freed.
 * -EINVAL: there are no such pages. */
int pool_refresh(Pool *pool, uint64_t page, uint32_t n_pages, uint32_t *ret_sharers);

/* Asks the kernel about up to n_pages pages, going round, and frees those that nobody maps and nobody reserved. Not
 * between pool_take() and the mapping. *ret_freed grows. */
int pool_collect(Pool *pool, uint64_t n_pages, uint64_t *ret_freed);
/* A program that maps pages of it was lost sight of, and may go on at any time (its process may be frozen). The next
 * pool_collect() makes the file longer before it counts: such a program looks at the length when its pages are mapped, and
 * takes them for its own only if that is what it was (merge/remap-merge.c). So either the count shows them, or it sees that
 * it is too late. Of a pool that was opened it is taken for granted. */
void pool_note_lost(Pool *pool);
/* After pool_open(), when no merge is under way: what the kernel says becomes the truth for all pages. */
int pool_recount(Pool *pool);

const PoolSpace *pool_space(const Pool *pool);

typedef struct PoolStats {
        uint64_t pages;         /* in use: distinct contents and their dups */
        uint64_t mappings;      /* of them, as last counted */
        uint64_t frames;        /* memory the file really holds (st_blocks) */
        uint64_t collected;     /* freed so far */
        uint64_t highest;       /* the highest page in use, plus one */
} PoolStats;
int pool_stats(const Pool *pool, PoolStats *ret);
