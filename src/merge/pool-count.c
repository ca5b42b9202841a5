/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "merge/pool-count.h"

#include "host/pagemap.h"
#include "merge/pool-space.h"

#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>

/*
 * Counting. Whether a page of the pool may be given back to the kernel is asked of the kernel: pages of ours are mapped
 * into our own memory for a moment, and the map count of a frame, less ours, is what the targets have.
 *
 * That count is wrong while the kernel migrates the frame (compaction, NUMA balancing): the ptes are replaced by
 * migration entries then and do not count. The kernel holds the lock of the page all that time, which kpageflags shows,
 * and the frame is another afterwards, which pagemap shows: the count is believed only between two looks that agree.
 * What is left is a migration that begins and fails between the two; so nobody gives a page back on one count (pool.c).
 *
 * Each look is at a block of pages at once, at neighbouring frames in one read: a system call for each page and look
 * costs 10 us a page, this a tenth.
 */
#define KPAGEFLAGS_LOCKED ((uint64_t)1 << 0)
#define KPAGEFLAGS_HUGE ((uint64_t)1 << 22) /* KPF_THP */
#define COUNT_TRIES 3U
#define GAP_FRAMES 32U                  /* of others between two of ours: still one read */
#define WINDOW_FRAMES 512U

typedef struct Seen {
        uint64_t pfn;
        uint32_t i;                     /* of the block's pages */
} Seen;

typedef struct Look {
        PoolCounter *counter;
        const char *map;
        uint32_t n_pages;
        uint64_t before[BLOCK_PAGES], after[BLOCK_PAGES];
        Seen seen[BLOCK_PAGES];         /* by frame */
        size_t n_seen;
        uint32_t *counts;
} Look;

int pool_counter_init(PoolCounter *counter, int rw_fd) {
        *counter = (PoolCounter){
                .rw_fd = rw_fd,
                .pagemap_fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC),
                .kpagecount_fd = open("/proc/kpagecount", O_RDONLY | O_CLOEXEC),
                .kpageflags_fd = open("/proc/kpageflags", O_RDONLY | O_CLOEXEC),
        };
        if (counter->pagemap_fd < 0 || counter->kpagecount_fd < 0 || counter->kpageflags_fd < 0) {
                int r = -errno;
                pool_counter_done(counter);
                return r;
        }
        return 0;
}

void pool_counter_done(PoolCounter *counter) {
        counter->pagemap_fd = safe_close(counter->pagemap_fd);
        counter->kpagecount_fd = safe_close(counter->kpagecount_fd);
        counter->kpageflags_fd = safe_close(counter->kpageflags_fd);
}

static int read_pagemap(const Look *look, uint64_t *ret) {
        return pagemap_read_entries(look->counter->pagemap_fd, (uintptr_t)look->map / PAGE_BYTES, look->n_pages, ret);
}

static int by_frame(const void *a, const void *b) {
        uint64_t x = ((const Seen *)a)->pfn, y = ((const Seen *)b)->pfn;

        return x < y ? -1 : x > y;
}

/* Frames [first, end) of what was seen, which lie close to each other. */
static int count_window(Look *look, size_t first, size_t end) {
        uint64_t flags[WINDOW_FRAMES], flags_after[WINDOW_FRAMES], counts[WINDOW_FRAMES], pfn = look->seen[first].pfn;
        size_t n = look->seen[end - 1].pfn - pfn + 1;
        int r = pagemap_read_entries(look->counter->kpageflags_fd, pfn, n, flags);

        if (r == 0)
                r = pagemap_read_entries(look->counter->kpagecount_fd, pfn, n, counts);
        if (r == 0)
                r = pagemap_read_entries(look->counter->kpageflags_fd, pfn, n, flags_after);
        for (size_t k = first; k < end && r == 0; k++) {
                size_t at = look->seen[k].pfn - pfn;

                /* Somebody collapsed it into a huge page: counts are the huge page's. Never free such. */
                if (!((flags[at] | flags_after[at]) & (KPAGEFLAGS_LOCKED | KPAGEFLAGS_HUGE)) && counts[at] > 0)
                        look->counts[look->seen[k].i] = (uint32_t)MIN_OF(counts[at] - 1, (uint64_t)POOL_RESERVED - 1);
        }
        return r;
}

/* One look at all pages that are not counted yet, which we have mapped. */
static int count_once(Look *look) {
        int r = read_pagemap(look, look->before);

        look->n_seen = 0;
        for (uint32_t i = 0; i < look->n_pages && r == 0; i++) {
                if (look->counts[i] != POOL_COUNT_BUSY || !(look->before[i] & PAGEMAP_PRESENT))
                        continue;
                if (!(look->before[i] & PAGEMAP_PFN))
                        return -EPERM;
                look->seen[look->n_seen++] = (Seen){ look->before[i] & PAGEMAP_PFN, i };
        }
        qsort(look->seen, look->n_seen, sizeof *look->seen, by_frame);
        for (size_t first = 0, end; first < look->n_seen && r == 0; first = end) {
                const Seen *seen = look->seen;

                for (end = first + 1; end < look->n_seen && seen[end].pfn - seen[end - 1].pfn <= GAP_FRAMES &&
                                      seen[end].pfn - seen[first].pfn < WINDOW_FRAMES;
                     end++)
                        ;
                r = count_window(look, first, end);
        }
        if (r == 0 && look->n_seen > 0)
                r = read_pagemap(look, look->after);
        for (size_t k = 0; k < look->n_seen && r == 0; k++) {
                uint32_t i = look->seen[k].i;

                if ((look->before[i] ^ look->after[i]) & (PAGEMAP_PRESENT | PAGEMAP_PFN))
                        look->counts[i] = POOL_COUNT_BUSY;
        }
        return r;
}

static int count_mapped(PoolCounter *counter, char *map, uint32_t n_pages, uint32_t *ret) {
        Look look = { .counter = counter, .map = map, .n_pages = n_pages, .counts = ret };
        unsigned char resident[BLOCK_PAGES];
        uint32_t busy = n_pages;

        if (mincore(map, n_pages * PAGE_BYTES, resident) < 0)
                return -errno;
        for (uint32_t i = 0; i < n_pages; i++) /* touched, what is not there would be allocated */
                ret[i] = resident[i] & 1 ? POOL_COUNT_BUSY : POOL_COUNT_NONE;
        for (unsigned try = 0; try < COUNT_TRIES && busy > 0; try++) {
                int r;

                for (uint32_t i = 0; i < n_pages; i++)
                        if (ret[i] == POOL_COUNT_BUSY)
                                (void)*(volatile char *)(map + i * PAGE_BYTES);
                r = count_once(&look);
                if (r < 0)
                        return r;
                busy = 0;
                for (uint32_t i = 0; i < n_pages; i++)
                        busy += ret[i] == POOL_COUNT_BUSY;
        }
        return 0;
}

int pool_counter_count(PoolCounter *counter, uint64_t page, uint32_t n_pages, uint32_t *ret) {
        char *map;
        int r;

        if (n_pages > BLOCK_PAGES || page + n_pages > POOL_PAGES_MAX)
                return -EINVAL;
        map = mmap(NULL, n_pages * PAGE_BYTES, PROT_READ, MAP_SHARED, counter->rw_fd, (off_t)(page * PAGE_BYTES));
        if (map == MAP_FAILED)
                return -errno;
        r = count_mapped(counter, map, n_pages, ret);
        (void)munmap(map, n_pages * PAGE_BYTES);
        return r;
}
