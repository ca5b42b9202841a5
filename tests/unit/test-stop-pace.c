/* SPDX-License-Identifier: LGPL-2.1-or-later */

/* How large batches become, on machines that are made up here. */

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "merge/stop-pace.h"

typedef struct Machine {
        uint64_t fixed_nsec, unit_nsec, begin_nsec;
} Machine;

static unsigned stops;

/* One batch as large as it may be; returns how long the stop was. */
static uint64_t stop(StopPace *pace, const Machine *machine, uint64_t stolen_nsec) {
        uint64_t units = stop_pace_batch(pace), ran;

        /* Now and then there is no more to do. */
        units = ++stops % 5 == 0 ? units / 3 + 1 : units;
        ran = machine->begin_nsec + units * machine->unit_nsec;

        stop_pace_learn(pace, units, machine->fixed_nsec + ran + stolen_nsec, ran);
        return machine->fixed_nsec + ran;
}

static void settle(StopPace *pace, const Machine *machine) {
        for (unsigned i = 0; i < 200; i++)
                (void)stop(pace, machine, 0);
}

/* However fast or slow it is: as much as there is time for, and no more. */
static void test_fills(void **state) {
        const Machine machines[] = { { 300000, 400, 0 },        { 500000, 1500, 0 },        { 500000, 3000, 0 },
                                     { 700000, 4000, 0 },       { 100000, 9000, 0 },        { 700000, 2500, 100000 },
                                     { 500000, 1000, 350000 } };

        for (unsigned i = 0; i < ELEMENTSOF(machines); i++)
                for (int undo = 0; undo <= 1; undo++) {
                        StopPace pace = stop_pace_first(undo ? 3000 : 1200, 8);
                        settle(&pace, &machines[i]);
                        stops = 0;
                        uint64_t nsec = stop(&pace, &machines[i], 0);
                        uint64_t fixed = machines[i].fixed_nsec + machines[i].begin_nsec;
                        uint64_t goal = MAX_OF(STOP_PACE_GOAL_NSEC, 2 * fixed);
                        assert_in_range(nsec, goal * 85 / 100, goal * 103 / 100);
                }
}

/* Where a stop takes nearly all the time by itself, or more, half of each is work all the same. */
static void test_slow_stops(void **state) {
        const Machine machines[] = { { 850000, 2500, 350000 }, { 850000, 8000, 400000 } };

        for (unsigned i = 0; i < ELEMENTSOF(machines); i++) {
                const Machine *machine = &machines[i];
                StopPace pace = stop_pace_first(3000, 8);
                settle(&pace, machine);
                stops = 0;
                uint64_t nsec = stop(&pace, machine, 0), fixed = machine->fixed_nsec + machine->begin_nsec;
                assert_in_range(nsec, fixed + fixed * 85 / 100, fixed + fixed * 103 / 100);
        }
}

/* The first batches, of which nothing is known, are not too long where it is three times as slow as thought. */
static void test_begins(void **state) {
        const Machine slow = { 500000, 5000, 0 };
        StopPace pace = stop_pace_first(3000, 8);
        unsigned long_ones = 0;

        for (unsigned i = 0; i < 100; i++)
                long_ones += stop(&pace, &slow, 0) > STOP_PACE_MAX_NSEC;
        assert_in_range(long_ones, 0, 1);
}

/* It gets slower in a moment: at most some stops are too long, then none. */
static void test_slower(void **state) {
        const Machine fast = { 400000, 1000, 0 }, slow = { 400000, 8000, 0 };
        StopPace pace = stop_pace_first(3000, 8);
        unsigned long_ones = 0;

        settle(&pace, &fast);
        for (unsigned i = 0; i < 200; i++)
                long_ones += stop(&pace, &slow, 0) > STOP_PACE_MAX_NSEC;
        assert_in_range(long_ones, 1, 4);
        assert_true(stop(&pace, &slow, 0) <= STOP_PACE_MAX_NSEC);
        settle(&pace, &fast);
        assert_true(stop(&pace, &fast, 0) >= STOP_PACE_GOAL_NSEC * 85 / 100); /* and back */
}

/* Stops that were long because nobody got a CPU, now and then: as much is done in the others as before. */
static void test_stolen(void **state) {
        const Machine machine = { 400000, 2000, 0 };
        StopPace pace = stop_pace_first(3000, 8);

        settle(&pace, &machine);
        uint64_t before = stop_pace_batch(&pace);
        for (unsigned i = 0; i < 400; i++)
                (void)stop(&pace, &machine, i % 20 == 0 ? 5 * NSEC_PER_MSEC : 0);
        assert_in_range(stop_pace_batch(&pace), before * 80 / 100, before);
}

/* Whatever is seen, a batch has some work in it, and none has no end. */
static void test_limits(void **state) {
        StopPace pace = stop_pace_first(3000, 24);

        for (unsigned i = 0; i < 100; i++)
                stop_pace_learn(&pace, 1, 100 * NSEC_PER_MSEC, 90 * NSEC_PER_MSEC);
        assert_in_range(stop_pace_batch(&pace), 1, 100);
        for (unsigned i = 0; i < 200; i++)
                stop_pace_learn(&pace, 1000, 1, 5);
        assert_in_range(stop_pace_batch(&pace), 1000, 10000);
        stop_pace_learn(&pace, 0, 1, 1); /* a batch of which nothing was begun */
        assert_int_equal(stop_pace_units(&pace, 10), 10 + pace.range_units);
        /* Room for one more range: what is left but for what its mappings cost; in an empty batch at least a piece. */
        assert_int_equal(stop_pace_room(&pace, 1000, 0), 976);
        assert_int_equal(stop_pace_room(&pace, 1000, 500), 476);
        assert_int_equal(stop_pace_room(&pace, 1000, 976), 0);
        assert_int_equal(stop_pace_room(&pace, 1000, 5000), 0);
        assert_int_equal(stop_pace_room(&pace, 30, 0), STOP_PACE_PIECE_MIN);
        assert_int_equal(stop_pace_room(&pace, 0, 0), STOP_PACE_PIECE_MIN);
}

int main(void) {
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(test_fills),  cmocka_unit_test(test_slow_stops), cmocka_unit_test(test_begins),
                cmocka_unit_test(test_slower), cmocka_unit_test(test_stolen),     cmocka_unit_test(test_limits),
        };
        return cmocka_run_group_tests(tests, NULL, NULL);
}
