/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * merge/burst against a directory that stands in for /sys/kernel/mm/ksm, and a clock that goes when it is told to: when
 * a burst ends, what it sets, and that it puts everything back on every way out.
 */

#include "base/io.h"
#include "merge/burst.h"
#include "tests/test.h"

#include <setjmp.h>
#include <stdarg.h>

#include <cmocka.h>
#include <ftw.h>
#include <sys/resource.h>
#include <sys/stat.h>

static char root[] = "/tmp/test-burst.XXXXXX";
static char sysfs[64], state[64];
static uint64_t clock_now = NSEC_PER_SEC;

int clock_gettime(clockid_t clock, struct timespec *ret) {
        *ret = (struct timespec){ .tv_sec = (time_t)(clock_now / NSEC_PER_SEC),
                                  .tv_nsec = (long)(clock_now % NSEC_PER_SEC) };
        return 0;
}

static void put(const char *name, uint64_t value) {
        char path[128];
        FILE *f;

        snprintf(path, sizeof path, "%s/%s", sysfs, name);
        f = fopen(path, "we");
        assert_non_null(f);
        fprintf(f, "%llu\n", (unsigned long long)value);
        fclose(f);
}

static void put_text(const char *name, const char *text) {
        char path[128];
        FILE *f;

        snprintf(path, sizeof path, "%s/%s", sysfs, name);
        f = fopen(path, "we");
        assert_non_null(f);
        fputs(text, f);
        fclose(f);
}

static void drop(const char *name) {
        char path[128];

        snprintf(path, sizeof path, "%s/%s", sysfs, name);
        assert_int_equal(unlink(path), 0);
}

static uint64_t get(const char *name) {
        char path[128];
        uint64_t value;

        snprintf(path, sizeof path, "%s/%s", sysfs, name);
        assert_int_equal(read_u64(AT_FDCWD, path, &value), 0);
        return value;
}

static void assert_as_found(void) {
        assert_int_equal(get("run"), 0);
        assert_int_equal(get("pages_to_scan"), 100);
        assert_int_equal(get("sleep_millisecs"), 20);
        assert_int_equal(get("use_zero_pages"), 0);
        assert_true(access(state, F_OK) < 0);
}

static Ksm *ksm;
static Burst *burst;

static int setup(void **unused) {
        static const char *const zero[] = { "pages_shared", "pages_sharing", "pages_unshared", "pages_volatile",
                                            "pages_scanned", "pages_skipped", "full_scans", "stable_node_chains",
                                            "stable_node_dups", "ksm_zero_pages", "use_zero_pages", "run",
                                            "general_profit" };

        snprintf(sysfs, sizeof sysfs, "%s/k", root);
        snprintf(state, sizeof state, "%s/state", root);
        mkdir(sysfs, 0755);
        (void)unlink(state);
        for (size_t i = 0; i < ELEMENTSOF(zero); i++)
                put(zero[i], 0);
        put("pages_to_scan", 100);
        put("sleep_millisecs", 20);
        put("smart_scan", 1);
        put("max_page_sharing", 256);
        put("merge_across_nodes", 1);
        put_text("advisor_mode", "[none] scan-time\n");
        assert_int_equal(ksm_new(sysfs, state, &ksm), 0);
        assert_int_equal(burst_new(ksm, &burst), 0);
        return 0;
}

static int teardown(void **unused) {
        burst = burst_free(burst);
        ksm = ksm_free(ksm);
        return 0;
}

static BurstState step_after(uint64_t nsec) {
        clock_now += nsec;
        return burst_step(burst);
}

/* The kernel miscounts the zero pages of children: the count falls below 0, and is none the less one to go by. */
static void test_zero_pages_below_zero(void **unused) {
        put_text("ksm_zero_pages", "-15\n");
        assert_int_equal(burst_start(burst, 100, 100), 0);
        put("ksm_zero_pages", 84);
        assert_int_equal(step_after(NSEC_PER_MSEC), BURST_RUNNING);
        put("ksm_zero_pages", 85);
        assert_int_equal(step_after(NSEC_PER_MSEC), BURST_DONE);
        assert_as_found();
}

static void test_ends_when_all_is_merged(void **unused) {
        BurstStats stats;

        put("pages_sharing", 5000); /* there before */
        put("pages_shared", 10);
        assert_int_equal(burst_start(burst, 1000, 2000), 0);
        assert_int_equal(get("run"), 1);
        assert_int_equal(get("sleep_millisecs"), 0);
        assert_int_equal(get("use_zero_pages"), 1);
        assert_int_equal(burst_start(burst, 1, 1), -EALREADY);
        put("pages_sharing", 5600);
        assert_int_equal(step_after(NSEC_PER_MSEC), BURST_RUNNING);
        put("ksm_zero_pages", 399);
        assert_int_equal(step_after(NSEC_PER_MSEC), BURST_RUNNING);
        put("ksm_zero_pages", 400);
        assert_int_equal(step_after(NSEC_PER_MSEC), BURST_DONE);
        assert_as_found();
        assert_int_equal(burst_step(burst), BURST_DONE);
        burst_stats(burst, &stats);
        assert_int_equal(stats.bursts, 1);
        assert_int_equal(stats.pages_expected, 1000);
        assert_int_equal(stats.pages_merged, 1000);
        assert_int_equal(stats.wall_nsec, 3 * NSEC_PER_MSEC);
}

/* A process that ends in the middle takes its shared pages out of the counters. */
static void test_counters_that_fall(void **unused) {
        put("pages_sharing", 5000);
        assert_int_equal(burst_start(burst, 1000, 2000), 0);
        put("pages_sharing", 200);
        assert_int_equal(step_after(NSEC_PER_MSEC), BURST_RUNNING);
        put("pages_sharing", 1199);
        assert_int_equal(step_after(NSEC_PER_MSEC), BURST_RUNNING);
        put("pages_sharing", 1200);
        assert_int_equal(step_after(NSEC_PER_MSEC), BURST_DONE);
}

static void test_ends_by_scans(void **unused) {
        put("full_scans", 7);
        put("pages_unshared", 1);
        assert_int_equal(burst_start(burst, 1000, 2000), 0);
        put("full_scans", 9);
        assert_int_equal(step_after(NSEC_PER_MSEC), BURST_RUNNING);
        put("full_scans", 10);
        assert_int_equal(step_after(NSEC_PER_MSEC), BURST_DONE);
        assert_as_found();
}

static void test_two_scans_from_the_start(void **unused) {
        BurstStats stats;

        assert_int_equal(burst_start(burst, 1000, 2000), 0);
        put("full_scans", 1);
        assert_int_equal(step_after(NSEC_PER_MSEC), BURST_RUNNING);
        put("full_scans", 2);
        assert_int_equal(step_after(NSEC_PER_MSEC), BURST_DONE);
        burst_stats(burst, &stats);
        assert_int_equal(stats.full_scans, 2);
}

static uint64_t scans;

/* One burst that merges so many of 1,000 pages; whether it ran with smart_scan. */
static bool smart_burst(uint64_t merged) {
        bool smart;

        put("pages_sharing", 0);
        assert_int_equal(burst_start(burst, 1000, 2000), 0);
        smart = get("smart_scan") == 1;
        put("pages_sharing", merged);
        put("full_scans", scans += 3);
        assert_int_equal(step_after(NSEC_PER_MSEC), BURST_DONE);
        assert_int_equal(get("smart_scan"), 1);
        return smart;
}

/* A burst that fell short by much is followed by one that skips no page; where that does not help, by fewer. */
static void test_smart_scan(void **unused) {
        scans = 0;
        assert_true(smart_burst(950)); /* nearly all */
        assert_true(smart_burst(930));
        assert_false(smart_burst(0));
        assert_true(smart_burst(0));
        assert_true(smart_burst(0));
        assert_false(smart_burst(0));
        for (int i = 0; i < 4; i++)
                assert_true(smart_burst(0));
        assert_false(smart_burst(1000)); /* that helped */
        assert_true(smart_burst(0));
        assert_false(smart_burst(0));
        assert_true(smart_burst(1000));
        burst_look_at_all(burst); /* once */
        assert_false(smart_burst(1000));
        assert_true(smart_burst(1000));
}

static void test_ends_when_nothing_moves(void **unused) {
        assert_int_equal(burst_start(burst, 1000, 2000), 0);
        for (int i = 0; i < 20; i++) { /* slow, but alive */
                put("pages_scanned", (uint64_t)i + 1);
                assert_int_equal(step_after(NSEC_PER_SEC), BURST_RUNNING);
        }
        assert_int_equal(step_after(4 * NSEC_PER_SEC), BURST_RUNNING);
        assert_int_equal(step_after(2 * NSEC_PER_SEC), BURST_DONE);
        assert_as_found();
}

static void test_ends_for_good(void **unused) {
        BurstState s = BURST_RUNNING;
        int seconds = 0;

        assert_int_equal(burst_start(burst, 1000, 2000), 0);
        for (; s == BURST_RUNNING && seconds < 1000; seconds++) {
                put("pages_scanned", (uint64_t)seconds + 1);
                s = step_after(NSEC_PER_SEC);
        }
        assert_int_equal(s, BURST_DONE);
        assert_as_found();
}

static void test_administrator(void **unused) {
        BurstStats stats;

        for (uint64_t run = 1; run <= 2; run++) {
                put("run", run);
                assert_int_equal(burst_start(burst, 1000, 2000), 0);
                assert_int_equal(burst_step(burst), BURST_FOREIGN);
                assert_int_equal(get("run"), run);
                assert_int_equal(get("sleep_millisecs"), 20);
                assert_true(access(state, F_OK) < 0);
        }
        put("run", 0);
        assert_int_equal(burst_start(burst, 1000, 2000), 0);
        put("run", 2);
        put("pages_to_scan", 4000);
        assert_int_equal(burst_step(burst), BURST_FOREIGN);
        assert_int_equal(get("run"), 2);
        assert_int_equal(get("pages_to_scan"), 4000);
        assert_int_equal(get("sleep_millisecs"), 20);
        burst_stats(burst, &stats);
        assert_int_equal(stats.bursts, 1);
}

/* The run = 1 of a daemon that died is not the administrator's. */
static void test_after_a_crash(void **unused) {
        _cleanup_(burst_freep) Burst *next_burst = NULL;
        _cleanup_(ksm_freep) Ksm *next = NULL;

        assert_int_equal(burst_start(burst, 1000, 2000), 0);
        assert_int_equal(ksm_new(sysfs, state, &next), 0);
        assert_int_equal(burst_new(next, &next_burst), 0);
        assert_int_equal(burst_start(next_burst, 1000, 2000), 0);
        assert_int_equal(burst_step(next_burst), BURST_RUNNING);
        burst_stop(next_burst);
        assert_as_found();
}

/* Where nothing can be opened as a burst ends ksmd goes on with our settings, which are no administrator's. */
static void test_restored_later(void **unused) {
        for (unsigned round = 0; round < 2; round++) {
                struct rlimit before;
                int next;

                assert_int_equal(burst_start(burst, 10, 10), 0);
                put("pages_sharing", get("pages_sharing") + 10);
                assert_int_equal(getrlimit(RLIMIT_NOFILE, &before), 0);
                next = dup(STDIN_FILENO);
                close(next);
                assert_int_equal(setrlimit(RLIMIT_NOFILE, &(struct rlimit){ (rlim_t)next, before.rlim_max }), 0);
                assert_int_equal(step_after(NSEC_PER_MSEC), BURST_DONE);
                assert_int_equal(setrlimit(RLIMIT_NOFILE, &before), 0);
                assert_int_equal(get("run"), 1);
        }
        burst_restore(burst);
        assert_as_found();
        put("run", 1);
        burst_restore(burst);
        assert_int_equal(get("run"), 1);
}

static void test_other_knobs_stay(void **unused) {
        assert_int_equal(ksm_set(ksm, "max_page_sharing", 64), 0);
        assert_int_equal(burst_start(burst, 1000, 2000), 0);
        burst_stop(burst);
        assert_int_equal(burst_step(burst), BURST_IDLE);
        assert_int_equal(get("max_page_sharing"), 64);
        assert_int_equal(get("run"), 0);
        assert_int_equal(ksm_restore(ksm), 0);
        assert_int_equal(get("max_page_sharing"), 256);
        assert_as_found();
}

static void test_older_kernels(void **unused) {
        drop("smart_scan");
        drop("use_zero_pages");
        drop("advisor_mode");
        assert_int_equal(burst_start(burst, 1000, 2000), 0);
        assert_int_equal(get("run"), 1);
        burst = burst_free(burst); /* stops it */
        assert_int_equal(get("run"), 0);
        assert_int_equal(get("sleep_millisecs"), 20);
}

static void test_trouble(void **unused) {
        put("sleep_millisecs", 20);
        put_text("pages_to_scan", "garbage\n");
        assert_int_equal(burst_start(burst, 1000, 2000), -EINVAL);
        put("pages_to_scan", 100);
        assert_as_found();
        assert_int_equal(burst_step(burst), BURST_IDLE);

        put_text("run", "\n");
        assert_int_equal(burst_start(burst, 1000, 2000), -EINVAL);
        put("run", 0);
        assert_int_equal(burst_start(burst, 1000, 2000), 0);
        put_text("pages_sharing", "garbage\n");
        assert_int_equal(burst_step(burst), BURST_DONE);
        assert_as_found();
        put("pages_sharing", 0);

        assert_int_equal(burst_start(burst, 0, 2000), 0); /* nothing to do */
        assert_int_equal(burst_step(burst), BURST_DONE);
        assert_as_found();
}

static void test_interval(void **unused) {
        uint64_t first;

        assert_int_equal(burst_start(burst, 1000000, 1000000), 0);
        first = burst_interval_nsec(burst);
        assert_true(first <= 50 * NSEC_PER_MSEC && first >= 10 * NSEC_PER_MSEC);
        put("pages_sharing", 999990);
        assert_int_equal(step_after(2 * NSEC_PER_MSEC), BURST_RUNNING);
        assert_true(burst_interval_nsec(burst) <= 2 * NSEC_PER_MSEC);
        assert_true(burst_interval_nsec(burst) >= NSEC_PER_MSEC / 2);
}

/* A pause stops ksmd by the knob that needs no lock, counts for none of the burst's limits, and leaves no trace. */
static void test_pause(void **unused) {
        BurstStats stats;

        assert_int_equal(burst_start(burst, 1000, 2000), 0);
        for (unsigned i = 0; i < 100; i++) {
                burst_pause(burst);
                burst_pause(burst);
                assert_true(get("sleep_millisecs") >= 60000);
                assert_int_equal(get("run"), 1);
                put("pages_scanned", i + 1); /* what was left of its batch */
                assert_int_equal(step_after(NSEC_PER_MSEC), BURST_RUNNING);
                assert_int_equal(step_after(100 * NSEC_PER_SEC), BURST_RUNNING);
                burst_resume(burst);
                burst_resume(burst);
                assert_int_equal(get("sleep_millisecs"), 0);
                assert_int_equal(step_after(NSEC_PER_MSEC), BURST_RUNNING);
        }
        assert_int_equal(step_after(4 * NSEC_PER_SEC), BURST_RUNNING);
        burst_pause(burst);
        clock_now += 50 * NSEC_PER_SEC;
        burst_resume(burst);
        assert_int_equal(burst_step(burst), BURST_RUNNING);
        assert_int_equal(step_after(2 * NSEC_PER_SEC), BURST_DONE); /* nothing moved for 5 s, the pause apart */
        assert_as_found();
        burst_stats(burst, &stats);
        assert_int_equal(stats.wall_nsec, 6 * NSEC_PER_SEC + 100 * NSEC_PER_MSEC);
        burst_pause(burst); /* nothing runs */
        burst_resume(burst);
        assert_as_found();
}

/* Every way out of a pause puts all back. */
static void test_pause_ends(void **unused) {
        assert_int_equal(burst_start(burst, 1000, 2000), 0);
        burst_pause(burst);
        burst_stop(burst);
        assert_as_found();

        assert_int_equal(burst_start(burst, 1000, 2000), 0);
        burst_pause(burst);
        put("pages_sharing", 1000); /* by the batch it finished */
        assert_int_equal(step_after(NSEC_PER_MSEC), BURST_DONE);
        assert_as_found();

        assert_int_equal(burst_start(burst, 1000, 2000), 0); /* a new one begins running */
        assert_int_equal(get("sleep_millisecs"), 0);
        burst_pause(burst);
        put("run", 0); /* the administrator's */
        assert_int_equal(step_after(NSEC_PER_MSEC), BURST_FOREIGN);
        assert_as_found();

        assert_int_equal(burst_start(burst, 1000, 2000), 0);
        put_text("sleep_millisecs", "garbage\n");
        burst_pause(burst);
        assert_int_equal(burst_step(burst), BURST_IDLE); /* what cannot be paused does not go on */
        assert_int_equal(get("run"), 0);
        put("sleep_millisecs", 20);

        assert_int_equal(burst_start(burst, 1000, 2000), 0);
        burst_pause(burst);
        put_text("sleep_millisecs", "garbage\n");
        burst_resume(burst);
        assert_int_equal(burst_step(burst), BURST_IDLE);
        assert_int_equal(get("run"), 0);
}

/* A daemon that dies in a pause leaves on record what the next one needs. */
static void test_crash_in_a_pause(void **unused) {
        _cleanup_(ksm_freep) Ksm *next = NULL;

        assert_int_equal(burst_start(burst, 1000, 2000), 0);
        burst_pause(burst);
        assert_int_equal(ksm_new(sysfs, state, &next), 0);
        assert_int_equal(ksm_restore(next), 0);
        assert_as_found();
}

static int remove_one(const char *path, const struct stat *st, int type, struct FTW *ftw) { return remove(path); }

int main(void) {
#define TEST(f) cmocka_unit_test_setup_teardown(f, setup, teardown)
        const struct CMUnitTest tests[] = {
                TEST(test_ends_when_all_is_merged),
                TEST(test_zero_pages_below_zero),
                TEST(test_counters_that_fall),
                TEST(test_ends_by_scans),
                TEST(test_two_scans_from_the_start),
                TEST(test_smart_scan),
                TEST(test_ends_when_nothing_moves),
                TEST(test_ends_for_good),
                TEST(test_administrator),
                TEST(test_after_a_crash),
                TEST(test_restored_later),
                TEST(test_other_knobs_stay),
                TEST(test_older_kernels),
                TEST(test_trouble),
                TEST(test_interval),
                TEST(test_pause),
                TEST(test_pause_ends),
                TEST(test_crash_in_a_pause),
        };
        int failed;

        if (!mkdtemp(root))
                return 1;
        failed = cmocka_run_group_tests(tests, NULL, NULL);
        nftw(root, remove_one, 8, FTW_DEPTH | FTW_PHYS);
        return failed;
}
