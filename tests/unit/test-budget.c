/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * daemon/budget in simulated time: the quota is a limit in any 60 seconds, reached while there is work, and not in the
 * way when there was little.
 */

#include "daemon/budget.h"
#include "tests/test.h"

#include <setjmp.h>
#include <stdarg.h>

#include <cmocka.h>

#define USEC NSEC_PER_USEC
#define MSEC NSEC_PER_MSEC
#define SEC NSEC_PER_SEC
#define MINUTE (60 * SEC)
#define START (12345 * SEC + 678)

/* A machine on which work goes on in steps whenever it may; the CPU time used in each millisecond is on record. */
typedef struct Machine {
        Budget budget;
        uint64_t now, cpu;
        uint64_t step_cpu, step_wall;   /* of one piece of work */
        uint64_t waits, wait_cpu;       /* and what it costs to come back from one */
        uint64_t *used;                 /* by millisecond since START */
        size_t n_used;
} Machine;

static void machine_init(Machine *m, uint32_t quota, uint64_t step_cpu, uint64_t step_wall, uint64_t length) {
        *m = (Machine){ .now = START, .step_cpu = step_cpu, .step_wall = step_wall };
        m->n_used = (length + MINUTE) / MSEC;
        m->used = calloc(m->n_used, sizeof *m->used);
        assert_non_null(m->used);
        budget_init(&m->budget, quota, START);
}

static void machine_done(Machine *m) { free(m->used); }

static void use(Machine *m, uint64_t cpu, uint64_t wall) {
        size_t i;

        m->now += wall;
        m->cpu += cpu;
        i = (m->now - START) / MSEC;
        assert_true(i < m->n_used);
        m->used[i] += cpu;
}

static void work_until(Machine *m, uint64_t end) {
        while (m->now < end) {
                uint64_t wait = budget_wait_nsec(&m->budget, m->now, m->cpu);

                assert_true(wait <= (m->budget.free_nsec > 0 ? BUDGET_WAIT_MAX_NSEC : BUDGET_WAIT_MAX_EVENLY_NSEC));
                if (wait > 0) {
                        m->waits++;
                        use(m, m->wait_cpu, wait);
                } else
                        use(m, m->step_cpu, m->step_wall);
        }
}

static uint64_t used_between(const Machine *m, uint64_t from, uint64_t to) {
        uint64_t sum = 0;

        for (size_t i = (from - START) / MSEC; i < (to - START) / MSEC; i++)
                sum += m->used[i];
        return sum;
}

/* The least and the most of all windows of 60 s that lie in [from, to), moved by a millisecond each. */
static void windows(const Machine *m, uint64_t from, uint64_t to, uint64_t *ret_least, uint64_t *ret_most) {
        size_t first = (from - START) / MSEC, n = MINUTE / MSEC;
        uint64_t sum = used_between(m, from, from + MINUTE), least = sum, most = sum;

        for (size_t i = first; i + n < (to - START) / MSEC; i++) {
                sum += m->used[i + n] - m->used[i];
                least = MIN_OF(least, sum);
                most = MAX_OF(most, sum);
        }
        *ret_least = least;
        *ret_most = most;
}

/* Saturated for ten minutes, with quotas of 0.5 % to 800 % of a CPU and pieces of work of very different sizes. */
static void test_saturated(void **unused) {
        static const struct {
                uint32_t quota;
                uint64_t cpu, wall;
        } cases[] = {
                { 1000, MSEC / 2, MSEC / 2 },   { 1000, 1 * MSEC, 1 * MSEC },   { 1000, 20 * MSEC, 21 * MSEC },
                { 2000, MSEC / 3, MSEC / 3 },   { 100, MSEC / 2, MSEC / 2 },    { 50, 2 * MSEC, 2 * MSEC },
                { 9000, MSEC / 2, MSEC / 2 },   { 15000, 2 * MSEC, 1 * MSEC },  { 80000, 16 * MSEC, 1 * MSEC },
        };

        for (size_t i = 0; i < ELEMENTSOF(cases); i++) {
                uint64_t allowance = cases[i].quota * (MINUTE / 10000), least, most;
                uint64_t point = MAX_OF(MINUTE, allowance) / 100;
                Machine m;

                machine_init(&m, cases[i].quota, cases[i].cpu, cases[i].wall, 10 * MINUTE);
                work_until(&m, START + 10 * MINUTE);
                windows(&m, START, START + 10 * MINUTE, &least, &most);
                assert_true(most <= allowance + cases[i].cpu);
                windows(&m, START + 2 * MINUTE, START + 10 * MINUTE, &least, &most);
                print_message("%g %%: %.3f to %.3f %%, %llu waits\n", cases[i].quota / 100.0, (double)least * 100 / MINUTE,
                              (double)most * 100 / MINUTE, (unsigned long long)m.waits);
                assert_true(least + point >= allowance);
                assert_true(least * 30 >= allowance * 29); /* small quotas are not lost in a point either */
                /* The first minute, too, which begins without being held back. */
                assert_true(used_between(&m, START, START + MINUTE) * 30 >= allowance * 29);
                machine_done(&m);
        }
}

/* There is work all the time, but now and then nobody to do it: the CPU is others', or a process is waited for. What the
 * quota gave meanwhile is used afterwards. */
static void test_gaps(void **unused) {
        static const uint64_t gaps[] = { 150 * MSEC, SEC, 2500 * MSEC };

        for (size_t i = 0; i < ELEMENTSOF(gaps); i++) {
                uint64_t least, most;
                Machine m;

                machine_init(&m, 2000, MSEC / 2, MSEC / 2, 10 * MINUTE);
                while (m.now < START + 10 * MINUTE - 2 * gaps[i]) {
                        work_until(&m, m.now + gaps[i]);
                        m.now += gaps[i];
                }
                windows(&m, START, START + 10 * MINUTE, &least, &most);
                assert_true(most <= 12 * SEC + MSEC / 2);
                least = used_between(&m, START + 2 * MINUTE, START + 9 * MINUTE) / 7;
                print_message("gaps of %llu ms: %.3f %%\n", (unsigned long long)(gaps[i] / MSEC),
                              (double)least * 100 / MINUTE);
                assert_true(least >= 12 * SEC - MINUTE / 100);
                machine_done(&m);
        }
}

/* Nothing is held back until half of a minute's allowance is used, and then nothing for long. */
static void test_begins_at_once(void **unused) {
        Machine m;

        machine_init(&m, 1000, MSEC / 2, MSEC / 2, 2 * MINUTE);
        work_until(&m, START + 2999 * MSEC);
        assert_int_equal(m.waits, 0);
        assert_int_equal(m.cpu, 2999 * MSEC);
        /* What is left is spread over the time until the burst falls out of the window. */
        work_until(&m, START + 3100 * MSEC);
        for (uint64_t t = 4 * SEC; t < 115 * SEC; t += SEC) {
                uint64_t before = m.cpu;

                work_until(&m, START + t + SEC);
                assert_true(m.cpu - before >= 30 * MSEC && m.cpu - before <= 130 * MSEC);
        }
        machine_done(&m);
}

/* A saturated minute, then nothing to do: what comes next is dealt with at once. */
static void test_idle_then_burst(void **unused) {
        uint64_t waits, least, most;
        Machine m;

        machine_init(&m, 1000, MSEC / 2, MSEC / 2, 7 * MINUTE);
        work_until(&m, START + 3 * MINUTE);
        for (unsigned i = 0; i < 70; i++) { /* a daemon that has nothing to do asks all the same, or does not */
                m.now += SEC;
                if (i % 2)
                        (void)budget_wait_nsec(&m.budget, m.now, m.cpu);
        }
        waits = m.waits;
        work_until(&m, m.now + 2990 * MSEC);
        assert_int_equal(m.waits, waits);
        work_until(&m, START + 7 * MINUTE);
        assert_true(m.waits > waits);
        windows(&m, START, START + 7 * MINUTE, &least, &most);
        assert_true(most <= 6 * SEC + MSEC / 2);
        machine_done(&m);
}

/* Now and then a pass that needs less than the quota is never held back, however long that goes on. */
static void test_below_the_quota(void **unused) {
        Machine m;

        machine_init(&m, 1000, 1 * MSEC, 1 * MSEC, 10 * MINUTE);
        for (uint64_t t = START; t < START + 10 * MINUTE; t += 10 * SEC) {
                m.now = MAX_OF(m.now, t);
                work_until(&m, m.now + 480 * MSEC);
        }
        assert_int_equal(m.waits, 0);
        machine_done(&m);
}

/* More than a CPU, used by one that is all there is: never in the way. */
static void test_more_than_there_is(void **unused) {
        Machine m;

        machine_init(&m, 15000, 1 * MSEC, 1 * MSEC, 5 * MINUTE);
        work_until(&m, START + 5 * MINUTE);
        assert_int_equal(m.waits, 0);
        budget_set_quota(&m.budget, UINT32_MAX, 0); /* the greatest that the configuration takes */
        assert_int_equal(budget_wait_nsec(&m.budget, m.now, m.cpu), 0);
        assert_true(budget_left_nsec(&m.budget) > 100000 * MINUTE);
        budget_set_quota(&m.budget, 1, 0); /* and the least */
        assert_int_equal(budget_wait_nsec(&m.budget, m.now, m.cpu), BUDGET_WAIT_MAX_NSEC);
        assert_int_equal(budget_left_nsec(&m.budget), 0);
        machine_done(&m);
}

/* In force at once, and what was used before counts. */
static void test_quota_changes(void **unused) {
        uint64_t before;
        Machine m;

        machine_init(&m, 1000, MSEC / 2, MSEC / 2, 12 * MINUTE);
        work_until(&m, START + 3 * MINUTE);
        budget_set_quota(&m.budget, 5000, 0);
        before = m.waits;
        work_until(&m, m.now + 8900 * MSEC); /* half of 30 s, less the 6 s used */
        assert_int_equal(m.waits, before);
        work_until(&m, START + 6 * MINUTE);
        before = m.cpu;
        work_until(&m, m.now + MINUTE);
        assert_true(m.cpu - before > 29 * SEC && m.cpu - before <= 30 * SEC + MSEC);

        budget_set_quota(&m.budget, 100, 0); /* 30 s are used: nothing for as long as 0.6 of them are in the window */
        before = m.cpu;
        work_until(&m, m.now + 58 * SEC);
        assert_int_equal(m.cpu, before);
        work_until(&m, m.now + 2 * MINUTE);
        before = m.cpu;
        work_until(&m, m.now + MINUTE);
        assert_true(m.cpu - before > 580 * MSEC && m.cpu - before <= 601 * MSEC);
        machine_done(&m);
}

/* Others want the CPU: the smaller quota is used in small portions, from the start and without anything saved up; what
 * was used before counts. When they are gone all is as it was. */
static void test_evenly(void **unused) {
        uint64_t before, least, most;
        Machine m;

        machine_init(&m, 1000, MSEC / 2, MSEC / 2, 10 * MINUTE);
        budget_set_quota(&m.budget, 1000, 300);
        for (uint64_t t = 0; t < 3 * MINUTE; t += SEC) {
                before = m.cpu;
                work_until(&m, START + t + SEC);
                assert_true(m.cpu - before >= 25 * MSEC && m.cpu - before <= 35 * MSEC);
                if (t % MINUTE == 20 * SEC)
                        for (unsigned i = 0; i < 20; i++, t += SEC) /* nothing to do, and it is asked all the same */
                                (void)budget_wait_nsec(&m.budget, m.now += SEC, m.cpu);
        }
        for (size_t i = 100; i < 3 * MINUTE / MSEC; i += 10) /* within 50 ms no more than a portion and a piece of work */
                assert_true(used_between(&m, START + i * MSEC, START + (i + 50) * MSEC) <= 3 * MSEC + MSEC / 2);

        budget_set_quota(&m.budget, 1000, 0);
        before = m.waits;
        work_until(&m, m.now + SEC);
        assert_int_equal(m.waits, before);
        budget_set_quota(&m.budget, 1000, 300);
        before = m.cpu;
        work_until(&m, m.now + 30 * SEC);
        /* What was used before is no reason to stand still. */
        assert_true(m.cpu - before >= 850 * MSEC && m.cpu - before <= 910 * MSEC);

        /* Nor for long what could not be done in portions: of a second, which is 33 of them, five are owed. */
        m.cpu += SEC;
        before = m.cpu;
        work_until(&m, m.now + 10 * SEC);
        assert_true(m.cpu - before >= 130 * MSEC && m.cpu - before <= 160 * MSEC);

        /* But the quota holds. */
        budget_set_quota(&m.budget, 1000, 0);
        work_until(&m, m.now + MINUTE);
        budget_set_quota(&m.budget, 1000, 900);
        work_until(&m, m.now + MINUTE);
        windows(&m, START, m.now, &least, &most);
        assert_true(most <= 6 * SEC + MSEC / 2);
        machine_done(&m);
}

/* A thread that waits wakes up, which costs CPU time, and asks again. Of small portions that is a part, and most is work. */
static void test_waiting_costs(void **unused) {
        static const uint32_t quotas[] = { 5, 30, 100, 300 };

        for (size_t i = 0; i < ELEMENTSOF(quotas); i++) {
                uint64_t given = quotas[i] * (MINUTE / 10000), work;
                Machine m;

                machine_init(&m, 1000, 50 * USEC, 50 * USEC, MINUTE);
                m.wait_cpu = 90 * USEC;
                budget_set_quota(&m.budget, 1000, quotas[i]);
                work_until(&m, START + MINUTE);
                work = m.cpu - m.waits * m.wait_cpu;
                print_message("%g %%: %llu waits, work is %.1f %% of what was given\n", quotas[i] / 100.0,
                              (unsigned long long)m.waits, (double)work * 100 / (double)given);
                assert_true(m.cpu <= given + given / 10 + 2 * MSEC);
                assert_true(work >= given / 2);
                machine_done(&m);
        }
}

/* A suspended machine's clock stands; that of one that was moved may jump. Back it does not go, and would do no harm. */
static void test_clock_steps(void **unused) {
        uint64_t waits;
        Machine m;

        machine_init(&m, 1000, MSEC / 2, MSEC / 2, 2 * MINUTE);
        work_until(&m, START + MINUTE);
        assert_true(budget_wait_nsec(&m.budget, m.now + 3600 * SEC, m.cpu) == 0); /* an hour on: all is forgotten */
        assert_true(budget_left_nsec(&m.budget) >= 3 * SEC);
        waits = m.waits;
        work_until(&m, m.now + SEC); /* an hour back: taken for a clock that stands */
        assert_int_equal(m.waits, waits);
        assert_true(budget_left_nsec(&m.budget) < 2100 * MSEC);
        for (unsigned i = 0; i < 10 * 1000 && budget_wait_nsec(&m.budget, m.now, m.cpu) == 0; i++)
                m.cpu += MSEC;
        assert_int_equal(budget_wait_nsec(&m.budget, m.now, m.cpu), BUDGET_WAIT_MAX_NSEC); /* used up while it stood */
        machine_done(&m);
}

/* A total that shrinks (ksmd's part could not be read) is not counted twice when it is whole again. */
static void test_total_shrinks(void **unused) {
        BudgetStats stats;
        Budget b;

        budget_init(&b, 1000, START);
        assert_int_equal(budget_wait_nsec(&b, START + SEC, SEC), 0);
        assert_int_equal(budget_wait_nsec(&b, START + 2 * SEC, SEC / 2), 0);
        assert_int_equal(budget_wait_nsec(&b, START + 3 * SEC, SEC), 0);
        budget_stats(&b, START + 3 * SEC, SEC + 1, &stats);
        assert_int_equal(stats.used_nsec, SEC + 1);
}

static void test_left(void **unused) {
        Budget b;

        budget_init(&b, 1000, START);
        assert_int_equal(budget_wait_nsec(&b, START, 0), 0);
        assert_int_equal(budget_left_nsec(&b), 3020 * MSEC); /* half, and a portion */
        assert_int_equal(budget_wait_nsec(&b, START + SEC, 1 * SEC), 0);
        assert_int_equal(budget_left_nsec(&b), 2020 * MSEC);
        assert_int_equal(budget_wait_nsec(&b, START + SEC, 3 * SEC + MSEC), 0);
        assert_true(budget_left_nsec(&b) < 20 * MSEC);
        /* Used up: a wait, then as much as was saved meanwhile. */
        assert_int_equal(budget_wait_nsec(&b, START + SEC, 3020 * MSEC), BUDGET_WAIT_MAX_NSEC);
        assert_int_equal(budget_left_nsec(&b), 0);
        assert_int_equal(budget_wait_nsec(&b, START + 2 * SEC, 3020 * MSEC), 0);
        assert_true(budget_left_nsec(&b) >= 20 * MSEC && budget_left_nsec(&b) <= 100 * MSEC);
        (void)budget_wait_nsec(&b, START + 40 * SEC, 3020 * MSEC);
        assert_int_equal(budget_left_nsec(&b), 500 * MSEC); /* no more than five seconds' worth */
        /* Beyond the whole allowance nothing helps but time. */
        assert_int_equal(budget_wait_nsec(&b, START + 43 * SEC, 6 * SEC), BUDGET_WAIT_MAX_NSEC);
        assert_int_equal(budget_wait_nsec(&b, START + 50 * SEC, 6 * SEC), BUDGET_WAIT_MAX_NSEC);
        assert_int_equal(budget_wait_nsec(&b, START + 64 * SEC, 6 * SEC), 0);
}

static void test_stats(void **unused) {
        BudgetStats stats;
        Budget b;

        budget_init(&b, 1000, START);
        budget_stats(&b, START, 500 * MSEC, &stats); /* what was used before the first question counts */
        assert_int_equal(stats.used_nsec, 500 * MSEC);
        assert_false(stats.throttled);
        assert_true(budget_wait_nsec(&b, START + SEC, 5 * SEC) > 0);
        budget_stats(&b, START + SEC + 10 * MSEC, 5 * SEC, &stats);
        assert_true(stats.throttled);
        assert_int_equal(stats.throttled_nsec, 10 * MSEC);
        /* Nobody came back after the wait: there was nothing to do any more, which is no waiting. */
        budget_stats(&b, START + 20 * SEC, 5 * SEC, &stats);
        assert_false(stats.throttled);
        assert_int_equal(stats.throttled_nsec, BUDGET_WAIT_MAX_NSEC);
        assert_int_equal(stats.used_nsec, 5 * SEC);
        budget_stats(&b, START + 62 * SEC, 5 * SEC, &stats);
        assert_int_equal(stats.used_nsec, 0);
        assert_int_equal(stats.throttled_nsec, BUDGET_WAIT_MAX_NSEC);
}

int main(void) {
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(test_saturated),
                cmocka_unit_test(test_gaps),
                cmocka_unit_test(test_begins_at_once),
                cmocka_unit_test(test_idle_then_burst),
                cmocka_unit_test(test_below_the_quota),
                cmocka_unit_test(test_more_than_there_is),
                cmocka_unit_test(test_quota_changes),
                cmocka_unit_test(test_evenly),
                cmocka_unit_test(test_waiting_costs),
                cmocka_unit_test(test_clock_steps),
                cmocka_unit_test(test_total_shrinks),
                cmocka_unit_test(test_left),
                cmocka_unit_test(test_stats),
        };
        return cmocka_run_group_tests(tests, NULL, NULL);
}
