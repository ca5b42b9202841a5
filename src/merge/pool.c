/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "merge/pool.h"

#include "merge/pool-count.h"
#include "merge/pool-fs.h"

#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

/*
 * A pool is one sparse file of 1 TiB in a tmpfs of its own that is mounted nowhere. Targets map pages of it privately:
 * reading shares the frame, the first write gives them a copy, as with anonymous memory.
 *
 * What always holds:
 *  - A page that anybody may map never changes: it is written while it is reserved, before the first mapping.
 *  - Targets get a descriptor that reads only, of a copy of the mount that is read-only: opening it anew for writing,
 *    fchmod(2) and a shared writable mapping fail, for root too (a memfd does not hold: its /proc/PID/fd link can be
 *    opened for writing).
 *  - The pages that are mapped are never swapped out (noswap), nor part of a huge page of ours (huge=never, and addresses
 *    that never line up with page numbers): a pte that is gone was discarded by the target, and reads as zeros.
 *  - A page is freed only when the kernel counts no mapping of it, twice. Who maps none by then cannot get it back: where
 *    a guarded mapping has no pte, the fault is answered with zeros; and a program that was about to map it finds the file
 *    longer than it was (pool_note_lost()).
 *
 * Lengths, limits and who maps what is pool-space.c's; the kernel's side is pool-fs.c's and pool-count.c's.
 */
struct Pool {
        PoolSpace space;
        PoolCounter counter;
        int mount_fd, rw_fd, target_fd;
        uint64_t cursor;        /* where pool_collect() goes on */
        uint64_t collected;
        bool lost;              /* see pool_note_lost() */
};

Pool *pool_free(Pool *pool) {
        if (!pool)
                return NULL;
        pool_space_done(&pool->space);
        pool_counter_done(&pool->counter);
        safe_close(pool->mount_fd);
        safe_close(pool->rw_fd);
        safe_close(pool->target_fd);
        free(pool);
        return NULL;
}

static Pool *allocate(uint32_t max_sharing) {
        Pool *pool = calloc(1, sizeof *pool);

        if (!pool)
                return NULL;
        pool->mount_fd = pool->rw_fd = pool->target_fd = -EBADF;
        pool->counter = (PoolCounter){ .pagemap_fd = -EBADF, .kpagecount_fd = -EBADF, .kpageflags_fd = -EBADF };
        pool_space_init(&pool->space, max_sharing);
        return pool;
}

/* What both ways to a pool end with. */
static int complete(Pool *pool, const char **ret_reason) {
        int r = pool_fs_open_readonly(pool->mount_fd, &pool->target_fd, ret_reason);

        if (r < 0)
                return r;
        r = pool_counter_init(&pool->counter, pool->rw_fd);
        if (r < 0)
                *ret_reason = "/proc/kpagecount and /proc/kpageflags";
        return r;
}

int pool_new(const char *domain, uint32_t max_sharing, Pool **ret, const char **ret_reason) {
        _cleanup_(pool_freep) Pool *pool = allocate(max_sharing);
        const char *reason = "memory";
        int r = -ENOMEM;

        if (pool)
                r = pool_fs_new(domain, &pool->mount_fd, &pool->rw_fd, &reason);
        if (r == 0)
                r = complete(pool, &reason);
        if (r < 0) {
                if (ret_reason)
                        *ret_reason = reason;
                return r;
        }
        *ret = TAKE_PTR(pool);
        return 0;
}

/* Every page that holds data is somebody's until it is counted. */
static int reserve_all(Pool *pool) {
        off_t end = 0, start;

        while ((start = lseek(pool->rw_fd, end, SEEK_DATA)) >= 0) {
                int r;

                end = lseek(pool->rw_fd, start, SEEK_HOLE);
                if (end < 0)
                        return -errno;
                r = pool_space_grow(&pool->space, DIV_ROUND_UP((uint64_t)end, PAGE_BYTES));
                if (r < 0)
                        return r;
                for (uint64_t page = (uint64_t)start / PAGE_BYTES; page < pool->space.n; page++)
                        pool_space_set(&pool->space, page, POOL_RESERVED);
        }
        return errno == ENXIO ? 0 : -errno;
}

int pool_open(const char *domain, int mount_fd, uint32_t max_sharing, Pool **ret) {
        _cleanup_(pool_freep) Pool *pool = allocate(max_sharing);
        const char *reason;
        int r;

        if (!pool)
                return -ENOMEM;
        pool->mount_fd = fcntl(mount_fd, F_DUPFD_CLOEXEC, 3);
        if (pool->mount_fd < 0)
                return -errno;
        r = pool_fs_open(domain, pool->mount_fd, &pool->rw_fd);
        if (r == 0)
                r = complete(pool, &reason);
        if (r == 0)
                r = reserve_all(pool);
        if (r < 0)
                return r;
        pool->lost = true;
        *ret = TAKE_PTR(pool);
        return 0;
}

int pool_domain(int mount_fd, char **ret) { return pool_fs_domain(mount_fd, ret); }

int pool_mount_fd(const Pool *pool) { return pool->mount_fd; }
int pool_target_fd(const Pool *pool) { return pool->target_fd; }
const PoolSpace *pool_space(const Pool *pool) { return &pool->space; }

void pool_identity(const Pool *pool, dev_t *ret_dev, ino_t *ret_ino) {
        struct stat st = {};

        (void)fstat(pool->target_fd, &st); /* of an open file it cannot fail */
        *ret_dev = st.st_dev;
        *ret_ino = st.st_ino;
}

int pool_alloc(Pool *pool, uint32_t n_pages, const uint64_t *addresses, size_t n_addresses, uint64_t *ret_page) {
        return pool_space_alloc(&pool->space, n_pages, addresses, n_addresses, ret_page);
}

int pool_alloc_at(Pool *pool, uint64_t page, uint32_t n_pages, const uint64_t *addresses, size_t n_addresses) {
        return pool_space_alloc_at(&pool->space, page, n_pages, addresses, n_addresses);
}

static bool all_reserved(const Pool *pool, uint64_t page, uint32_t n_pages) {
        if (page + n_pages > pool->space.n)
                return false;
        for (uint32_t i = 0; i < n_pages; i++)
                if (pool->space.sharers[page + i] != POOL_RESERVED)
                        return false;
        return true;
}

int pool_write(Pool *pool, uint64_t page, uint32_t n_pages, const void *data) {
        size_t bytes = n_pages * PAGE_BYTES;

        if (!all_reserved(pool, page, n_pages))
                return -EINVAL;
        for (size_t done = 0; done < bytes;) {
                ssize_t n = pwrite(pool->rw_fd, (const char *)data + done, bytes - done,
                                   (off_t)(page * PAGE_BYTES + done));
                if (n < 0 && errno != EINTR)
                        return -errno;
                if (n == 0)
                        return -ENOSPC;
                done += n > 0 ? (size_t)n : 0;
        }
        return 0;
}

int pool_read(const Pool *pool, uint64_t page, uint32_t n_pages, void *data) {
        size_t bytes = n_pages * PAGE_BYTES;

        for (size_t done = 0; done < bytes;) {
                ssize_t n = pread(pool->rw_fd, (char *)data + done, bytes - done, (off_t)(page * PAGE_BYTES + done));
                if (n < 0 && errno != EINTR)
                        return -errno;
                if (n == 0)
                        return -EINVAL;
                done += n > 0 ? (size_t)n : 0;
        }
        return 0;
}

int pool_take(Pool *pool, uint64_t page, uint32_t n_pages, uint64_t address) {
        return pool_space_take(&pool->space, page, n_pages, address);
}

void pool_set_max_sharing(Pool *pool, uint32_t max_sharing) {
        pool->space.max_sharing = MIN_OF(max_sharing, POOL_RESERVED - 1);
}

void pool_drop(Pool *pool, uint64_t page, uint32_t n_pages) { pool_space_drop(&pool->space, page, n_pages); }

static int punch(Pool *pool, uint64_t page, uint32_t n_pages) {
        if (fallocate(pool->rw_fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)(page * PAGE_BYTES),
                      (off_t)(n_pages * PAGE_BYTES)) < 0)
                return -errno;
        for (uint32_t i = 0; i < n_pages; i++)
                pool_space_set(&pool->space, page + i, POOL_FREE);
        return 0;
}

int pool_give_back(Pool *pool, uint64_t page, uint32_t n_pages) {
        return all_reserved(pool, page, n_pages) ? punch(pool, page, n_pages) : -EINVAL;
}

int pool_sharers(Pool *pool, uint64_t page, uint32_t n_pages, uint32_t *ret_sharers) {
        for (uint32_t i = 0; i < n_pages; i += BLOCK_PAGES) {
                int r = pool_counter_count(&pool->counter, page + i, MIN_OF(n_pages - i, BLOCK_PAGES), ret_sharers + i);
                if (r < 0)
                        return r;
        }
        return 0;
}

static uint32_t block_length(const Pool *pool, uint64_t start) {
        return (uint32_t)MIN_OF(pool->space.n - start, (uint64_t)BLOCK_PAGES);
}

/* Takes over what the kernel says of pages. A reserved one that cannot be counted just now is taken for somebody's:
 * pool_collect() counts it again, and left reserved it would never be. */
static void take_over(Pool *pool, uint64_t page, uint32_t n_pages, const uint32_t *counts, bool reserved_too) {
        for (uint32_t i = 0; i < n_pages; i++) {
                uint32_t word = pool->space.sharers[page + i], count = counts[i];

                if (word == POOL_FREE || (word == POOL_RESERVED && !reserved_too))
                        continue;
                if (count == POOL_COUNT_BUSY && word != POOL_RESERVED)
                        continue;
                pool_space_set(&pool->space, page + i, count == POOL_COUNT_NONE ? POOL_FREE
                                                     : count == POOL_COUNT_BUSY ? 1 : count);
        }
}

int pool_refresh(Pool *pool, uint64_t page, uint32_t n_pages, uint32_t *ret_sharers) {
        int r = page + n_pages <= pool->space.n ? pool_sharers(pool, page, n_pages, ret_sharers) : -EINVAL;

        if (r == 0)
                take_over(pool, page, n_pages, ret_sharers, false);
        return r;
}

/* A block's; those that nobody maps are noted in nobody and left at 0. */
static int count_block(Pool *pool, uint64_t start, bool reserved_too, bool nobody[static BLOCK_PAGES]) {
        uint32_t counts[BLOCK_PAGES], n_pages = block_length(pool, start);
        int r = pool_counter_count(&pool->counter, start, n_pages, counts);

        if (r < 0)
                return r;
        take_over(pool, start, n_pages, counts, reserved_too);
        for (uint32_t i = 0; i < n_pages; i++)
                nobody[i] = counts[i] == 0 && pool->space.sharers[start + i] == 0;
        return 0;
}

/* Counted once more from the beginning, with a mapping of its own: making that waits for the lock of each page, so for
 * the end of whatever the kernel was doing to its frame. */
static int collect_block(Pool *pool, uint64_t start, uint64_t *ret_freed) {
        bool first[BLOCK_PAGES], second[BLOCK_PAGES];
        uint32_t n_pages = block_length(pool, start);
        int r = count_block(pool, start, false, first);

        if (r < 0 || !memchr(first, true, n_pages))
                return r;
        r = count_block(pool, start, false, second);
        if (r < 0)
                return r;
        for (uint32_t i = 0, n; i < n_pages; i += MAX_OF(n, 1U)) {
                for (n = 0; i + n < n_pages && first[i + n] && second[i + n]; n++)
                        ;
                if (n == 0)
                        continue;
                r = punch(pool, start + i, n);
                if (r < 0)
                        return r;
                pool->collected += n;
                *ret_freed += n;
        }
        return 0;
}

void pool_note_lost(Pool *pool) { pool->lost = true; }

int pool_collect(Pool *pool, uint64_t n_pages, uint64_t *ret_freed) {
        if (pool->lost) {
                int r = pool_fs_lengthen(pool->rw_fd);

                if (r < 0)
                        return r;
                pool->lost = false;
        }
        for (uint64_t n = 0; n < MIN_OF(n_pages, pool->space.n); n += BLOCK_PAGES) {
                int r;

                if (pool->cursor >= pool->space.n)
                        pool->cursor = 0;
                r = collect_block(pool, pool->cursor, ret_freed);
                if (r < 0)
                        return r;
                pool->cursor += BLOCK_PAGES;
        }
        return 0;
}

int pool_recount(Pool *pool) {
        bool nobody[BLOCK_PAGES];

        for (uint64_t start = 0; start < pool->space.n; start += BLOCK_PAGES) {
                int r = count_block(pool, start, true, nobody);
                if (r < 0)
                        return r;
        }
        return 0;
}

int pool_stats(const Pool *pool, PoolStats *ret) {
        struct stat st;

        if (fstat(pool->rw_fd, &st) < 0)
                return -errno;
        *ret = (PoolStats){
                .pages = pool->space.used,
                .mappings = pool->space.mappings,
                .frames = (uint64_t)st.st_blocks * 512 / PAGE_BYTES,
                .collected = pool->collected,
                .highest = pool->space.n,
        };
        while (ret->highest > 0 && pool->space.sharers[ret->highest - 1] == POOL_FREE)
                ret->highest--;
        return 0;
}
