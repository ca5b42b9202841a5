/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "merge/pool-space.h"

/*
 * One word a page that was ever used. Free runs are looked for by walking the words from where the last search ended:
 * runs are short, pages are given out far more often than the pool's size would make that slow, and the walk is
 * bounded; what is not found in time is put behind everything else, which costs nothing but a higher page number.
 */
#define SEARCH_PAGES_MAX 65536U

void pool_space_init(PoolSpace *space, uint32_t max_sharing) {
        *space = (PoolSpace){ .max_sharing = MIN_OF(max_sharing, POOL_RESERVED - 1) };
}

void pool_space_done(PoolSpace *space) {
        free(space->sharers);
        *space = (PoolSpace){};
}

int pool_space_grow(PoolSpace *space, uint64_t n) {
        if (n > space->allocated) {
                uint64_t twice = MAX_OF(space->allocated * 2, (uint64_t)1024), want = MAX_OF(n, twice);
                uint32_t *grown = reallocarray(space->sharers, want, sizeof *grown);

                if (!grown)
                        return -ENOMEM;
                space->sharers = grown;
                space->allocated = want;
        }
        for (; space->n < n; space->n++)
                space->sharers[space->n] = POOL_FREE;
        return 0;
}

static uint32_t sharers_of(uint32_t word) { return word < POOL_RESERVED ? word : 0; }

void pool_space_set(PoolSpace *space, uint64_t page, uint32_t sharers) {
        uint32_t *word = &space->sharers[page];

        space->used += (uint64_t)(*word == POOL_FREE) - (uint64_t)(sharers == POOL_FREE);
        space->mappings += (uint64_t)sharers_of(sharers) - sharers_of(*word);
        *word = sharers;
}

static bool fits_all(uint64_t page, const uint64_t *addresses, size_t n_addresses) {
        for (size_t i = 0; i < n_addresses; i++)
                if (!pool_fits(addresses[i], page))
                        return false;
        return true;
}

static bool is_free(const PoolSpace *space, uint64_t page) {
        return page >= space->n || space->sharers[page] == POOL_FREE;
}

/* A run of free pages that begins in [from, to) and ends within what was ever used. */
static bool find_run(const PoolSpace *space, uint64_t from, uint64_t to, uint32_t n_pages, const uint64_t *addresses,
                     size_t n_addresses, uint64_t *ret) {
        uint64_t run = 0;

        for (uint64_t page = from; page < MIN_OF(to + n_pages - 1, space->n); page++) {
                run = space->sharers[page] == POOL_FREE ? run + 1 : 0;
                if (run >= n_pages && fits_all(page + 1 - n_pages, addresses, n_addresses)) {
                        *ret = page + 1 - n_pages;
                        return true;
                }
        }
        return false;
}

static int reserve(PoolSpace *space, uint64_t page, uint32_t n_pages) {
        int r;

        if (page + n_pages > POOL_PAGES_MAX)
                return -ENOSPC;
        r = pool_space_grow(space, page + n_pages);
        if (r < 0)
                return r;
        for (uint32_t i = 0; i < n_pages; i++)
                pool_space_set(space, page + i, POOL_RESERVED);
        return 0;
}

int pool_space_alloc(PoolSpace *space, uint32_t n_pages, const uint64_t *addresses, size_t n_addresses, uint64_t *ret) {
        uint64_t page, until = MIN_OF(space->hint + SEARCH_PAGES_MAX, space->n);
        int r;

        if (n_pages == 0 || n_pages > POOL_RUN_MAX)
                return -EINVAL;
        if (!find_run(space, space->hint, until, n_pages, addresses, n_addresses, &page) &&
            !(until == space->n && find_run(space, 0, MIN_OF(space->hint, SEARCH_PAGES_MAX), n_pages, addresses,
                                            n_addresses, &page))) {
                page = space->n;
                while (page < space->n + BLOCK_PAGES && !fits_all(page, addresses, n_addresses))
                        page++;
                if (page == space->n + BLOCK_PAGES)
                        return POOL_E_MISFIT;
        }
        r = reserve(space, page, n_pages);
        if (r < 0)
                return r;
        space->hint = page + n_pages < space->n ? page + n_pages : 0;
        *ret = page;
        return 0;
}

int pool_space_alloc_at(PoolSpace *space, uint64_t page, uint32_t n_pages, const uint64_t *addresses,
                        size_t n_addresses) {
        if (n_pages == 0 || n_pages > POOL_RUN_MAX)
                return -EINVAL;
        if (!fits_all(page, addresses, n_addresses))
                return POOL_E_MISFIT;
        for (uint32_t i = 0; i < n_pages; i++)
                if (!is_free(space, page + i))
                        return -EEXIST;
        return reserve(space, page, n_pages);
}

int pool_space_take(PoolSpace *space, uint64_t page, uint32_t n_pages, uint64_t address) {
        if (n_pages == 0 || page + n_pages > space->n)
                return -EINVAL;
        if (!pool_fits(address, page))
                return POOL_E_MISFIT;
        for (uint32_t i = 0; i < n_pages; i++) {
                if (space->sharers[page + i] == POOL_FREE)
                        return -EINVAL;
                if (sharers_of(space->sharers[page + i]) >= space->max_sharing)
                        return POOL_E_FULL;
        }
        for (uint32_t i = 0; i < n_pages; i++)
                pool_space_set(space, page + i, sharers_of(space->sharers[page + i]) + 1);
        return 0;
}

void pool_space_drop(PoolSpace *space, uint64_t page, uint32_t n_pages) {
        for (uint64_t i = page; i < MIN_OF(page + n_pages, space->n); i++)
                if (sharers_of(space->sharers[i]) > 0)
                        pool_space_set(space, i, space->sharers[i] - 1);
}
