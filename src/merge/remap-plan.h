/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "index/stable.h"
#include "merge/pool-space.h"
#include "merge/remap-target.h"
#include "scan/block.h"

/*
 * What route remap is to do, decided without touching anything: which runs of a target's pages are candidates, and
 * which consecutive pages of the pool each is to be mapped to.
 */

/* Why pages of a mapping that may be merged cannot be remapped. */
typedef enum RemapSkip {
        REMAP_OK,
        REMAP_SKIP_MAPPING,             /* it may not be merged at all: see its VmaSkip */
        REMAP_SKIP_READ_ONLY,           /* UFFDIO_MOVE takes pages of writable mappings only */
        REMAP_SKIP_EXECUTABLE,
        REMAP_SKIP_FILE,                /* private copies of a file's pages: they cannot be moved */
        REMAP_SKIP_STACK,               /* it grows, and a piece of it would not */
        REMAP_SKIP_HUGE_ADVISED,        /* MADV_HUGEPAGE: remapping would take the huge pages away for good */
        REMAP_SKIP_SEALED,
        REMAP_SKIP_KEY,                 /* protected by a key (pkey_mprotect) */
        REMAP_SKIP_NAMED,               /* PR_SET_VMA_ANON_NAME: a pool's mapping cannot bear the name */
        REMAP_SKIP_POLICY,              /* mbind(2) */
        _REMAP_SKIP_MAX,
} RemapSkip;

RemapSkip remap_vma_skip(const Vma *vma);

typedef struct RemapRules {
        uint32_t minimum_run_pages;     /* at least REMAP_MINIMUM_RUN is taken */
        uint32_t huge_page_split;       /* 1/10,000 of a huge page's pages that must be wanted */
        size_t vmas_now, vmas_max;      /* mappings the process has, and may have */
        const RemapIdentity *pool;      /* that is merged into; NULL: nothing can lie beside its mappings yet */
} RemapRules;

/* A run costs 0.4 to 0.8 KiB of kernel memory (one or two mappings) and some 15 µs: shorter ones are not worth it. */
#define REMAP_MINIMUM_RUN 8U

/* A shorter one that touches a mapping of the pool is a run all the same: what goes on there costs no mapping, and where
 * it fills a gap it spares two. */
typedef struct RemapRun {
        uint64_t start;
        uint32_t n_pages;               /* at most POOL_RUN_MAX */
        bool short_run;                 /* only for what goes on beside it: remap_segments_beside() … */
        uint64_t before, behind;        /* … as the pool pages that its first and last page would be; REMAP_FRESH: none */
} RemapRun;

typedef struct RemapRuns {
        RemapRun *runs;                 /* by address */
        size_t n, allocated;
        uint64_t pages_wanted;          /* of pages that have a twin and did not change: in runs + pages_left_… */
        uint64_t pages_left_run, pages_left_huge, pages_left_budget, pages_left_stack;
        uint64_t pages_left[_REMAP_SKIP_MAX]; /* in mappings that cannot be remapped */
} RemapRuns;

/* Most short runs do not go on, and each is read to find that out: so many in a pass, others each time. Whether it is the
 * turn of the k-th of n. */
#define REMAP_SHORT_RUNS_MAX 64U
bool remap_short_run_due(size_t k, size_t n, uint64_t pass);

void remap_runs_done(RemapRuns *runs);
/* -ENOMEM. Where there are more runs than mappings may be made, the longest are taken. */
int remap_runs_make(const Space *space, const VmaList *vmas, const RemapRules *rules, RemapRuns *ret);

/* A part of a run, and the pages of the pool it is to map. */
typedef struct RemapSegment {
        uint32_t first, n_pages;        /* of the run's pages */
        uint64_t page;                  /* of the pool; REMAP_FRESH: to be allocated, and filled from this run */
} RemapSegment;

#define REMAP_FRESH UINT64_MAX

typedef struct RemapSegments {
        RemapSegment *segments;         /* by first, disjoint */
        size_t n, allocated;
        uint64_t pages_left;            /* of the run, in no segment */
} RemapSegments;

void remap_segments_done(RemapSegments *segments);
/* keys[i] is what the run's page i held a moment ago, 0: it cannot be taken. Long stretches that stand in the pool in
 * the same order, with room for one mapping more, are mapped there; the rest becomes new pages of the pool, but only
 * where that is mostly contents which are not in it yet. -ENOMEM. */
int remap_segments_make(const Stable *stable, const PoolSpace *space, uint64_t address, const uint64_t *keys,
                        uint32_t n_pages, uint32_t minimum_run_pages, RemapSegments *ret);
/* Of a short run: what goes on in the pool as the mappings beside it do. -ENOMEM. */
int remap_segments_beside(const Stable *stable, const PoolSpace *space, const RemapRun *run, const uint64_t *keys,
                          RemapSegments *ret);
