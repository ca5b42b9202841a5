/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "scan/scan.h"

/*
 * What merging would save, found by reading only. Counted in frames: a frame that several processes map counts once,
 * with the first of them that was added (the rest is already_shared), the shared zero page nowhere; zero + distinct +
 * duplicate = pages. So the counts of the processes add up to those of their groups and to the total.
 */
typedef struct EstimateCounts {
        uint64_t pages;         /* anonymous frames */
        uint64_t zero;          /* of them all zero */
        uint64_t distinct;      /* the first frame of each non-zero content */
        uint64_t duplicate;     /* the others */
        uint64_t duplicate_within; /* of duplicate: the content occurs in the same process (for a group:
                                    * in the group) already: saved even if it shared with nobody else */
        uint64_t already_shared;   /* mappings beyond the first of frames met several times */
        uint64_t huge_pages;    /* 2 MiB pages mapped whole */
        uint64_t unread;        /* present anonymous pages that are left out: skipped mappings, read failures */
        uint64_t dontdump;      /* of unread: in mappings that IncludeDontDump=yes would take in */
        uint64_t runs[7];       /* pages that have a twin, the first of each content too (both get marked), by the
                                 * length of their run of adjacent ones: 1, 2-3, 4-7, 8-15, 16-63, 64-511, 512+ */
        uint64_t bytes_saveable_advise; /* net of its cost: KSM's 64 B for each marked page and each node */
        uint64_t bytes_saveable_zero;
} EstimateCounts;

typedef struct Estimate Estimate;
int estimate_new(Estimate **ret);
Estimate *estimate_free(Estimate *estimate);
DEFINE_CLEANUP(Estimate, estimate_free)

/* Reads one process. group: an index the caller gives processes that are also to be counted together (a cgroup).
 * Small numbers: there is a record for each up to the largest. TARGET_E_GONE, TARGET_E_DENIED, -errno: its pages do not
 * count. *ret_process names it from now on. */
int estimate_add(Estimate *estimate, Target *target, bool include_dontdump, unsigned group, unsigned *ret_process);

/* After the last estimate_add(): works out the counts. */
int estimate_finish(Estimate *estimate);
void estimate_process(const Estimate *estimate, unsigned process, EstimateCounts *ret);
void estimate_group(const Estimate *estimate, unsigned group, EstimateCounts *ret);
void estimate_total(const Estimate *estimate, EstimateCounts *ret);
