/* SPDX-License-Identifier: LGPL-2.1-or-later */

/* Statistics as JSON: every name of the contract is there, and stands in the interface file, with the right number. */

#include "control/service.h"
#include "control/stats.h"

#include "test.h"

#include <setjmp.h>
#include <stdarg.h>

#include <cmocka.h>

static const char *const page_names[] = {
        "pages_shared", "pages_sharing", "pages_zero", "pages_unshared", "pages_volatile", "pages_skipped",
        "pages_scanned", "pages_hashed", "full_scans", "stable_node_chains", "stable_node_dups", "huge_pages_split",
        "huge_pages_collapsed", "pool_pages_returned", "pool_pieces_joined",
        "bytes_saved", "metadata_bytes",
};
static const char *const daemon_names[] = {
        "cpu_nsec", "ksmd_cpu_nsec", "throttled_nsec", "cow_breaks", "tlb_flushes", "tlb_flush_pages",
        "probes_rested_nsec", "max_page_sharing", "rmap_mapping_nsec", "rmap_walks", "rmap_walk_nsec", "rmap_walk_nsec_max", "stops",
        "stop_nsec_p50", "stop_nsec_p99", "stop_nsec_max",
};

static PageStats sample(uint64_t base) {
        return (PageStats){
                base + 1, base + 2, base + 3, base + 4, base + 5, base + 6, base + 7, base + 8, base + 9, base + 10,
                base + 11, base + 12, base + 13, base + 14, base + 15, base + 16, base + 17, -(int64_t)base,
                {base, base + 1, base + 2},
        };
}

static json_int_t get(const json_t *object, const char *name) {
        json_t *value = json_object_get(object, name);

        if (!json_is_integer(value))
                fail_msg("%s is no number", name);
        return json_integer_value(value);
}

static void check_pages(const json_t *object, uint64_t base) {
        json_t *failures = json_object_get(object, "merge_failures");

        for (size_t i = 0; i < ELEMENTSOF(page_names); i++)
                assert_int_equal(get(object, page_names[i]), base + 1 + i);
        assert_int_equal(get(object, "general_profit_bytes"), -(json_int_t)base);
        assert_int_equal(json_object_size(failures), _MERGE_FAILURE_MAX);
        for (unsigned i = 0; i < _MERGE_FAILURE_MAX; i++)
                assert_int_equal(get(failures, merge_failure_name(i)), i < 3 ? base + i : 0);
}

static void test_pages(void **state) {
        PageStats stats = sample(100);
        json_t *object = page_stats_json(&stats);

        check_pages(object, 100);
        assert_int_equal(json_object_size(object), ELEMENTSOF(page_names) + 2);
        json_decref(object);
}

static void test_daemon(void **state) {
        DaemonStats stats = {sample(1000), 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16};
        json_t *object = daemon_stats_json(&stats);

        check_pages(object, 1000);
        for (size_t i = 0; i < ELEMENTSOF(daemon_names); i++)
                assert_int_equal(get(object, daemon_names[i]), i + 1);
        assert_int_equal(json_object_size(object), ELEMENTSOF(page_names) + 2 + ELEMENTSOF(daemon_names));
        json_decref(object);
}

static void test_add(void **state) {
        PageStats sum = {}, a = sample(10), zero = {};
        json_t *once, *sum_json;

        page_stats_add(&sum, &a);
        once = page_stats_json(&a);
        sum_json = page_stats_json(&sum);
        assert_true(json_equal(once, sum_json));
        json_decref(sum_json);
        page_stats_add(&sum, &zero);
        sum_json = page_stats_json(&sum);
        assert_true(json_equal(once, sum_json));
        json_decref(sum_json);
        page_stats_add(&sum, &a);
        assert_int_equal(sum.pages_shared, 2 * a.pages_shared);
        assert_int_equal(sum.metadata_bytes, 2 * a.metadata_bytes);
        assert_int_equal(sum.general_profit_bytes, -20);
        assert_int_equal(sum.merge_failures[2], 24);
        json_decref(once);
}

static void test_beyond_json(void **state) {
        PageStats stats = {.bytes_saved = UINT64_MAX, .general_profit_bytes = INT64_MIN};
        json_t *object = page_stats_json(&stats);

        assert_int_equal(get(object, "bytes_saved"), INT64_MAX);
        assert_int_equal(get(object, "general_profit_bytes"), INT64_MIN);
        json_decref(object);
}

/* A number that the interface does not tell of, or the other way round, is a lie. */
static void test_interface(void **state) {
        const char *types[] = {"type DaemonStatistics (", "type DomainStatistics (", "type CgroupStatistics ("};

        for (size_t t = 0; t < ELEMENTSOF(types); t++) {
                const char *begin = strstr(service_interface_description, types[t]), *end;
                char line[128];

                assert_non_null(begin);
                end = strstr(begin, "\n)");
                for (size_t i = 0; i < ELEMENTSOF(page_names); i++) {
                        snprintf(line, sizeof line, "\n  %s: int,", page_names[i]);
                        assert_true(strstr(begin, line) && strstr(begin, line) < end);
                }
                for (size_t i = 0; t == 0 && i < ELEMENTSOF(daemon_names); i++) {
                        snprintf(line, sizeof line, "\n  %s: int", daemon_names[i]);
                        assert_true(strstr(begin, line) && strstr(begin, line) < end);
                }
        }
        for (unsigned i = 0; i < _MERGE_FAILURE_MAX; i++)
                assert_non_null(strstr(service_interface_description, merge_failure_name(i)));
}

int main(void) {
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(test_pages),
                cmocka_unit_test(test_daemon),
                cmocka_unit_test(test_add),
                cmocka_unit_test(test_beyond_json),
                cmocka_unit_test(test_interface),
        };
        return cmocka_run_group_tests(tests, NULL, NULL);
}
