/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "index/stable.h"
#include "index/unstable.h"
#include "scan/scan.h"

/*
 * A domain: the set of cgroups whose pages may meet. It owns everything that could let two pages meet or be compared
 * (the trees, the block ids they refer to, the secret of the hash), so that pages of two domains cannot.
 *
 * Matching is by passes. A pass reads every block once and domain_see() turns what was read into twin_next bits; at
 * its end domain_end_pass() makes them the twin bits that the planner goes by. A pass that is given up half-way leaves
 * the previous result standing.
 */
typedef struct DomainStats {
        uint64_t stale;                 /* unstable entries that a match proved wrong */
        uint64_t pruned;                /* stable dups whose frame is gone */
        /* of the last whole pass */
        uint64_t pages_volatile, pages_unshared, pages_twin, pages_zero_found, pages_merged;
        uint64_t expected;              /* frames that merging what was found would free */
} DomainStats;

typedef struct Domain {
        char *name;
        HashSecret *secret;
        Scanner *scanner;
        Unstable *unstable;
        Stable *stable;
        BlockTable blocks;
        DomainStats stats, running;     /* running: the pass that is under way */
        uint64_t *frames;               /* the KSM frames met by this pass, once for each mapping */
        size_t n_frames, frames_allocated;
        uint32_t pass;
        size_t swept;                   /* unstable entries visited in this round of the sweep */
        size_t quarantined;             /* block ids that were in quarantine when it began */
} Domain;

int domain_new(const char *name, uint32_t max_page_sharing, Domain **ret);
Domain *domain_free(Domain *domain); /* every Space on its blocks must be done */
DEFINE_CLEANUP(Domain, domain_free)

void domain_begin_pass(Domain *domain);

/* Takes in what scan_batch() read. -ENOMEM: some pages of the batch were not matched, nothing else is harmed. */
int domain_see(Domain *domain, const ScanBatch *batch);

/* The block was read for the first time and holds candidates: reads a sample again; when a page of the sample
 * changed, the whole block waits for the next pass. TARGET_E_GONE. */
int domain_confirm_block(Domain *domain, Block *block, const VmaList *vmas);

void domain_end_pass(Domain *domain, Space *const *spaces, size_t n);
void domain_abort_pass(Domain *domain, Space *const *spaces, size_t n);

/* All the memory that the domain's trees, blocks and frame list hold. */
uint64_t domain_bytes(const Domain *domain);
