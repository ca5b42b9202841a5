/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "base/util.h"

#include <jansson.h>

/*
 * The statistics model: what GetStats returns (field names are DESIGN's contract) and how it becomes JSON. KSM's
 * terms with KSM's meanings.
 */
typedef enum MergeFailure {
        MERGE_FAILURE_CHANGED,          /* the page or its mapping changed before it could be merged */
        MERGE_FAILURE_GONE,             /* the process ended */
        MERGE_FAILURE_DENIED,
        MERGE_FAILURE_BUSY,             /* no thread could be stopped in time */
        MERGE_FAILURE_HOT,              /* left alone for a while: its merges broke too soon */
        MERGE_FAILURE_HUGE,             /* in a huge page not worth splitting */
        MERGE_FAILURE_VMA_BUDGET,       /* would take too many mappings */
        MERGE_FAILURE_SHORT_RUN,        /* shorter than MinimumRun */
        MERGE_FAILURE_STACK,            /* on the main thread's stack, which is left whole */
        MERGE_FAILURE_MAPPING,          /* zero, in a mapping or process whose pages cannot be moved out */
        MERGE_FAILURE_METADATA,         /* not remembered: MetadataMax is reached (each look at a page counts) */
        MERGE_FAILURE_KERNEL,           /* marked, but ksmd did not merge it (pinned, or still changing) */
        _MERGE_FAILURE_MAX,
} MergeFailure;
const char *merge_failure_name(MergeFailure failure); /* "changed", … */

typedef struct PageStats {
        uint64_t pages_shared, pages_sharing, pages_zero, pages_unshared, pages_volatile, pages_skipped;
        uint64_t pages_scanned, pages_hashed, full_scans, stable_node_chains, stable_node_dups;
        uint64_t huge_pages_split, huge_pages_collapsed, pool_pages_returned, pool_pieces_joined;
        uint64_t bytes_saved, metadata_bytes;
        int64_t general_profit_bytes;
        uint64_t merge_failures[_MERGE_FAILURE_MAX];
} PageStats;

typedef struct DaemonStats {
        PageStats pages;
        uint64_t cpu_nsec, ksmd_cpu_nsec, throttled_nsec, cow_breaks, tlb_flushes, tlb_flush_pages;
        uint64_t probes_rested_nsec;
        uint64_t max_page_sharing, rmap_mapping_nsec, rmap_walks, rmap_walk_nsec, rmap_walk_nsec_max;
        uint64_t stops, stop_nsec_p50, stop_nsec_p99, stop_nsec_max;
} DaemonStats;

void page_stats_add(PageStats *sum, const PageStats *add);
json_t *page_stats_json(const PageStats *stats);        /* new reference; NULL: out of memory */
json_t *daemon_stats_json(const DaemonStats *stats);
