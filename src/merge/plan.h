/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "merge/ranges.h"
#include "scan/block.h"

/*
 * Decides which ranges of a target to mark mergeable. Pure: no process is touched, no file read. Weighs, with costs
 * measured (see plan.c), a VMA split and a call against the unique pages that ksmd would read in vain when a gap is
 * bridged; never splits a huge page unless what it saves is worth it; never takes more VMAs than it is given.
 */
typedef struct PlanRules {
        uint32_t minimum_run_pages;
        uint32_t huge_page_split;       /* 1/10,000 of a huge page's pages that must be wanted */
        size_t vmas_now;                /* VMAs the process has */
        size_t vmas_max;                /* and may have: a quarter of vm.max_map_count */
} PlanRules;

/* A mapping that is mergeable already, whoever made it so. */
typedef struct PlanMergeable {
        PlanRange range;
        bool revoked;           /* holds secrets now (locked, DONTDUMP): a mark of ours has to go at once */
        bool withheld;          /* may not be planned now for another reason: a mark of ours stays as it is */
} PlanMergeable;

typedef struct Plan {
        PlanRange *ranges;      /* by address, disjoint, not adjacent within one mapping; none crosses a mapping */
        size_t n, allocated;
        PlanMergeable *mergeable; /* by address */
        size_t n_mergeable, mergeable_allocated;
        PlanRange *hot;         /* by address: mergeable, and to be left alone (block->alone): to be unmarked at once */
        size_t n_hot, hot_allocated;
        Ranges unread;          /* mergeable, and nothing was read of it yet: a mark of ours stays as it is */
        bool goes_on;                   /* the caller's to set: made anew only because the one before was not carried out whole */
        uint64_t pages_wanted;          /* in mappings that may be merged: those in ranges + pages_left_… */
        uint64_t pages_marked;          /* in ranges, bridged gaps included */
        uint64_t pages_left_huge;       /* of a huge page that is not worth splitting */
        uint64_t pages_left_budget;     /* would have cost more mappings than the process may have */
        uint64_t pages_left_run;        /* of a run shorter than minimum_run_pages */
        uint64_t pages_left_stack;      /* of a mapping that grows: splitting it would loosen RLIMIT_STACK */
} Plan;

/* How many pages in these ranges (by address) leave their frames, or give them back, once they are marked and ksmd has been
 * there. */
uint64_t plan_count_frees(const Space *space, const PlanRange *ranges, size_t n);

/* The block is a huge page, and by what is known of it worth splitting (were it not to be kept whole for now). */
bool plan_would_split(const PlanRules *rules, const Block *block);

void plan_done(Plan *plan);
/* Wanted are the pages of twin and zero that are not in changed, and those of merged, all without those of alone; in
 * mappings that are mergeable already also those of zeropage, which KSM may have given back. -ENOMEM. */
int plan_make(const Space *space, const VmaList *vmas, const PlanRules *rules, Plan *ret);
