/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "base/util.h"

/*
 * Which pages of a pool are in use, and by how many mappings: pure bookkeeping. A page number is an offset into the
 * pool's file, in pages.
 *
 * A page is free; or reserved: given out, not mapped yet, never freed behind its owner's back; or mapped: what the
 * kernel says of it decides how long.
 */
#define POOL_PAGES_MAX ((uint64_t)1 << 28)      /* 1 TiB */
#define POOL_RUN_MAX 511U                       /* pages: a run is never a whole huge page */

enum {
        POOL_E_FULL = 1,        /* one more mapping would exceed the sharing limit */
        POOL_E_MISFIT,          /* the address is congruent to the page modulo 2 MiB */
};

typedef struct PoolSpace {
        uint32_t *sharers;      /* n of them: mappings of the page (0: to be collected); POOL_FREE, POOL_RESERVED */
        uint64_t n, allocated;  /* pages below the highest ever used */
        uint64_t hint;          /* where the last search ended */
        uint64_t used;          /* pages that are not free */
        uint64_t mappings;      /* the sum of sharers */
        uint32_t max_sharing;
} PoolSpace;

#define POOL_FREE UINT32_MAX
#define POOL_RESERVED (UINT32_MAX - 1)

void pool_space_init(PoolSpace *space, uint32_t max_sharing);
void pool_space_done(PoolSpace *space);

/* So that neither khugepaged nor MADV_COLLAPSE ever finds 2 MiB of the pool lined up with 2 MiB of addresses. */
static inline bool pool_fits(uint64_t address, uint64_t page) {
        return ((address >> PAGE_SHIFT) - page) % BLOCK_PAGES != 0;
}

/* n_pages consecutive free pages (1 … POOL_RUN_MAX) become reserved, such that each of the n_addresses fits the first.
 * POOL_E_MISFIT: no page fits them all; -EINVAL; -ENOSPC: the pool is full; -ENOMEM. */
int pool_space_alloc(PoolSpace *space, uint32_t n_pages, const uint64_t *addresses, size_t n_addresses, uint64_t *ret);

/* The same at a given place. POOL_E_MISFIT, -EEXIST: not all of it is free. */
int pool_space_alloc_at(PoolSpace *space, uint64_t page, uint32_t n_pages, const uint64_t *addresses,
                        size_t n_addresses);

/* One mapping more of n_pages pages, at address: POOL_E_FULL, POOL_E_MISFIT, and nothing is changed. */
int pool_space_take(PoolSpace *space, uint64_t page, uint32_t n_pages, uint64_t address);
/* One mapping less. */
void pool_space_drop(PoolSpace *space, uint64_t page, uint32_t n_pages);
/* Mappings as the kernel counts them (forks add some, writes and exits take some); POOL_FREE, POOL_RESERVED. Room for
 * the page must be there: pool_space_grow(). */
void pool_space_set(PoolSpace *space, uint64_t page, uint32_t sharers);
int pool_space_grow(PoolSpace *space, uint64_t n); /* -ENOMEM */
