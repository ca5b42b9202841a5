/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "scan/block.h"

/*
 * Which runs of zero pages to give back to the kernel (merge/zero.h). Pure: decided from what was read, before anything
 * is touched.
 */
typedef struct ZeroRules {
        uint32_t minimum_run_pages;     /* at least ZERO_MINIMUM_RUN is taken */
        uint32_t huge_page_split;       /* 1/10,000 of a huge page's pages that must be zero */
} ZeroRules;

/* A run costs some 10 us beside what its pages cost, and a page that ksmd merges 5.6 us: shorter ones do not pay. */
#define ZERO_MINIMUM_RUN 4U
/* None crosses a block, and so neither a huge page. */
typedef struct ZeroRun {
        uint64_t start, end;
        uint64_t mapping;       /* where the mapping begins that it lies in */
        bool huge;              /* all of a huge page: taken as it is, not split */
} ZeroRun;

typedef struct ZeroPlan {
        ZeroRun *runs;          /* by address */
        size_t n, allocated;
        uint64_t pages;                 /* in runs */
        uint64_t pages_left_huge;       /* of a huge page that is not worth splitting */
        uint64_t pages_left_run;        /* of a run that is too short */
        uint64_t pages_left_kind;       /* of a mapping whose pages cannot be moved */
} ZeroPlan;

void zero_plan_done(ZeroPlan *plan);
/* Whether pages of a mapping that may be merged can be moved out of it. */
bool zero_vma_fits(const Vma *vma);
/* Taken are pages that were zero, on a frame of their own and of nobody else, when they were read, and not only just.
 * -ENOMEM. */
int zero_plan_make(const Space *space, const VmaList *vmas, const ZeroRules *rules, ZeroPlan *ret);
