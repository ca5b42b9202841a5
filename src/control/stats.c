/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * Statistics as JSON. One table says which number has which name: names are a contract with whoever reads GetStats
 * (org.ksmduser.Daemon.varlink tells what each means), so nothing is derived from them and none is left out when zero.
 */

#include "control/stats.h"

static const char *const failure_names[_MERGE_FAILURE_MAX] = {
        [MERGE_FAILURE_CHANGED] = "changed",
        [MERGE_FAILURE_GONE] = "gone",
        [MERGE_FAILURE_DENIED] = "denied",
        [MERGE_FAILURE_BUSY] = "busy",
        [MERGE_FAILURE_HOT] = "hot",
        [MERGE_FAILURE_HUGE] = "huge",
        [MERGE_FAILURE_VMA_BUDGET] = "vma_budget",
        [MERGE_FAILURE_SHORT_RUN] = "short_run",
        [MERGE_FAILURE_STACK] = "stack",
        [MERGE_FAILURE_MAPPING] = "mapping",
        [MERGE_FAILURE_METADATA] = "metadata",
        [MERGE_FAILURE_KERNEL] = "kernel",
};

const char *merge_failure_name(MergeFailure failure) {
        return failure_names[failure];
}

/* A number of a structure and the name it goes by. */
typedef struct Field {
        const char *name;
        size_t offset;
} Field;

#define PAGE_FIELD(name) { #name, offsetof(PageStats, name) }
static const Field page_fields[] = {
        PAGE_FIELD(pages_shared),
        PAGE_FIELD(pages_sharing),
        PAGE_FIELD(pages_zero),
        PAGE_FIELD(pages_unshared),
        PAGE_FIELD(pages_volatile),
        PAGE_FIELD(pages_skipped),
        PAGE_FIELD(pages_scanned),
        PAGE_FIELD(pages_hashed),
        PAGE_FIELD(full_scans),
        PAGE_FIELD(stable_node_chains),
        PAGE_FIELD(stable_node_dups),
        PAGE_FIELD(huge_pages_split),
        PAGE_FIELD(huge_pages_collapsed),
        PAGE_FIELD(pool_pages_returned),
        PAGE_FIELD(pool_pieces_joined),
        PAGE_FIELD(bytes_saved),
        PAGE_FIELD(metadata_bytes),
};

#define DAEMON_FIELD(name) { #name, offsetof(DaemonStats, name) }
static const Field daemon_fields[] = {
        DAEMON_FIELD(cpu_nsec),
        DAEMON_FIELD(ksmd_cpu_nsec),
        DAEMON_FIELD(throttled_nsec),
        DAEMON_FIELD(cow_breaks),
        DAEMON_FIELD(tlb_flushes),
        DAEMON_FIELD(tlb_flush_pages),
        DAEMON_FIELD(probes_rested_nsec),
        DAEMON_FIELD(max_page_sharing),
        DAEMON_FIELD(rmap_mapping_nsec),
        DAEMON_FIELD(rmap_walks),
        DAEMON_FIELD(rmap_walk_nsec),
        DAEMON_FIELD(rmap_walk_nsec_max),
        DAEMON_FIELD(stops),
        DAEMON_FIELD(stop_nsec_p50),
        DAEMON_FIELD(stop_nsec_p99),
        DAEMON_FIELD(stop_nsec_max),
};

static uint64_t *field_of(const void *structure, const Field *field) {
        return (uint64_t *)((uintptr_t)structure + field->offset);
}

void page_stats_add(PageStats *sum, const PageStats *add) {
        for (size_t i = 0; i < ELEMENTSOF(page_fields); i++)
                *field_of(sum, &page_fields[i]) += *field_of(add, &page_fields[i]);
        sum->general_profit_bytes += add->general_profit_bytes;
        for (size_t i = 0; i < _MERGE_FAILURE_MAX; i++)
                sum->merge_failures[i] += add->merge_failures[i];
}

/* JSON numbers are signed here: what does not fit is as large as can be told. */
static json_t *number(uint64_t value) {
        return json_integer((json_int_t)MIN_OF(value, (uint64_t)INT64_MAX));
}

static int add_fields(json_t *object, const void *structure, const Field *fields, size_t n) {
        for (size_t i = 0; i < n; i++)
                if (json_object_set_new(object, fields[i].name, number(*field_of(structure, &fields[i]))) < 0)
                        return -ENOMEM;
        return 0;
}

static int add_page_stats(json_t *object, const PageStats *stats) {
        json_t *failures = json_object();

        for (size_t i = 0; i < _MERGE_FAILURE_MAX; i++)
                if (json_object_set_new(failures, failure_names[i], number(stats->merge_failures[i])) < 0) {
                        json_decref(failures);
                        return -ENOMEM;
                }
        if (add_fields(object, stats, page_fields, ELEMENTSOF(page_fields)) < 0 ||
            json_object_set_new(object, "general_profit_bytes", json_integer(stats->general_profit_bytes)) < 0) {
                json_decref(failures);
                return -ENOMEM;
        }
        return json_object_set_new(object, "merge_failures", failures) < 0 ? -ENOMEM : 0;
}

json_t *page_stats_json(const PageStats *stats) {
        json_t *object = json_object();

        if (!object || add_page_stats(object, stats) < 0) {
                json_decref(object);
                return NULL;
        }
        return object;
}

json_t *daemon_stats_json(const DaemonStats *stats) {
        json_t *object = page_stats_json(&stats->pages);

        if (!object || add_fields(object, stats, daemon_fields, ELEMENTSOF(daemon_fields)) < 0) {
                json_decref(object);
                return NULL;
        }
        return object;
}
