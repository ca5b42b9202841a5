/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "base/crew.h"
#include "host/numa.h"
#include "index/stable.h"
#include "index/unstable.h"
#include "scan/scan.h"

/*
 * A domain: the set of cgroups whose pages may meet. It owns everything that could let two pages meet or be compared
 * (the trees, the block ids they refer to, the secret of the hash), so that pages of two domains cannot.
 *
 * Matching is incremental. domain_see() takes in the pages that were just read, whichever they are, and brings the twin
 * and saves bits of their blocks, and of the blocks they match, up to date; everything else stands as it was. What that
 * cannot find out by itself, that the last partner of a page went away, is put right by a recheck: the caller has
 * everything that is wanted and did not get merged forgotten (select.h) and read again.
 */
typedef struct DomainStats {
        uint64_t stale;                 /* unstable entries that a match proved wrong */
        uint64_t pruned;                /* stable dups whose frame is gone */
} DomainStats;

/* A part of the unstable tree, for one thread at a time. */
typedef struct DomainShard {
        Unstable *tree;
        uint32_t *items;                /* what of the batches at hand falls to it: batch * SCAN_BATCH_PAGES + page */
        size_t n, allocated;
        uint64_t swept;                 /* how far the sweep had come when this round of it began (unstable_swept()) */
        uint64_t stale, left_out;       /* counted by its thread */
        bool fork_twin;
        int error;
} DomainShard;

typedef struct Domain {
        HashSecret *secret;
        Scanner *scanner;
        Stable *stable;
        BlockTable blocks;
        const Numa *numa;               /* borrowed; pages of different nodes do not meet. NULL: they do */
        DomainStats stats;
        uint32_t pass;
        uint64_t changed;               /* pages taken in by this pass that were something else before */
        size_t quarantined;             /* block ids that were in quarantine when this round of the sweep began */
        unsigned sample_bits;           /* only one content in 2^sample_bits is remembered: memory is short */
        size_t shrinking;               /* entries to be swept until all others are forgotten */
        uint64_t pages_left_out;        /* pages seen whose content was not remembered for that */
        bool pooled;                    /* merged contents are pages of a pool: the stable tree's frames are its page numbers */
        bool zeros_only;                /* contents are not remembered: nothing but zero pages is looked for */
        bool expecting;                 /* the unstable trees were told of pages that are to come */
        bool fork_twin;                 /* a page on a frame that others map too got a twin: they have to learn of it */
        DomainShard shards[UNSTABLE_SHARDS];
} Domain;

/* n_threads: of the crew that will serve it, at most. numa: pages of different nodes are kept apart; borrowed, and may
 * be read anew between passes. NULL: they are not. */
int domain_new(uint32_t max_page_sharing, unsigned n_threads, const Numa *numa, Domain **ret);
/* The same from now on: what is known is to be read again (select_all()), to be found under its new name. */
static inline void domain_set_numa(Domain *domain, const Numa *numa) { domain->numa = numa; }
Domain *domain_free(Domain *domain); /* every Space on its blocks must be done */
DEFINE_CLEANUP(Domain, domain_free)

/* Contents are merged into a pool from now on, by ourselves (route remap): what KSM merged is nobody's business here.
 * Nodes must not be kept apart. */
void domain_use_pool(Domain *domain);
/* What a page with these bytes is called in the trees of such a domain; 0 for one that is all zero. */
uint64_t domain_key(const Domain *domain, const void *page);

void domain_begin_pass(Domain *domain);

/* About so many pages that were never read before are going to be, in this pass. */
void domain_expect(Domain *domain, uint64_t pages);

/* Takes in n batches that scan_batch() has read. -ENOMEM: some pages were not matched, nothing else is harmed. */
int domain_see(Domain *domain, Crew *crew, ScanBatch *batches, size_t n);

/* The block was read for the first time and holds candidates: reads a sample again; when a page of the sample
 * changed, the whole block waits for the next pass. TARGET_E_GONE. */
int domain_confirm_block(Domain *domain, Block *block, const VmaList *vmas);

/* Looks for pages of the space that moved to another node since they were read, or that would be merged or given back by
 * us if they had not been shared by a fork, and are not any more; in its next budget blocks (once around at most). They
 * are read again. Costs nothing where nodes are not kept apart and no fork is in the way. */
void domain_find_outdated(const Domain *domain, Space *space, size_t budget);

/* Tidies the trees, in proportion to what the pass took in. */
void domain_end_pass(Domain *domain);

/* How often each merged frame is mapped was counted just now: the callback tells (StableCheck). */
void domain_count_sharers(Domain *domain, StableCheck mappings, void *userdata);

/* Keeps the domain's memory below so many bytes: where it is above, ever fewer contents are remembered, the same ones
 * of every process, so that what is remembered still finds its twins; where it is well below, more again. */
void domain_limit_memory(Domain *domain, uint64_t bytes_max);

/* false: only a sample of the contents is remembered, of the merged ones too. */
static inline bool domain_knows_all(const Domain *domain) { return domain->sample_bits == 0; }

/* All the memory that the domain's trees and blocks hold. */
uint64_t domain_bytes(const Domain *domain);
