/* SPDX-License-Identifier: LGPL-2.1-or-later */

/* The arrays that the index consists of: content stays where it is while they grow and shrink, what is not needed goes
 * back to the kernel, and what the kernel refuses changes nothing. */

#include "index-model.h"

#include <sys/mman.h>

#define MIB ((size_t)1 << 20)
#define STEP 61U /* every so many bytes are looked at */

/* What a byte of an array holds, so that one out of place shows. */
static uint8_t byte_of(unsigned which, size_t i) {
        return (uint8_t)(which * 31 + i / PAGE_BYTES * 7 + i + 1);
}

static void fill(Array *array, unsigned which, size_t from) {
        for (size_t i = from; i < array->used; i += STEP)
                array->data[i] = byte_of(which, i);
}

static void check(const Array *array, unsigned which) {
        for (size_t i = 0; i < array->used; i += STEP)
                assert_int_equal(array->data[i], byte_of(which, i));
        array_check(array, array->used);
}

static void test_grow_and_shrink(void **state) {
        Arrays all = {};
        Array arrays[5];

        random_state = 1;
        for (unsigned a = 0; a < ELEMENTSOF(arrays); a++)
                array_init(&arrays[a], &all);
        for (unsigned step = 0; step < 2000; step++) {
                unsigned a = random_below(ELEMENTSOF(arrays));
                size_t used = arrays[a].used, want = random_below(step % 100 < 50 ? 2 * MIB : MIB / 8) / STEP * STEP;
                if (want >= used) {
                        assert_int_equal(array_grow(&arrays[a], want), 0);
                        fill(&arrays[a], a, used);
                } else {
                        array_shrink(&arrays[a], want);
                        assert_in_range(all.held - all.used, 0, ARRAYS_SLACK_BYTES + all.held / 16);
                }
                arrays_check(&all);
                if (step % 50 == 0)
                        for (unsigned k = 0; k < ELEMENTSOF(arrays); k++)
                                check(&arrays[k], k);
        }
        for (unsigned a = 0; a < ELEMENTSOF(arrays); a++) {
                check(&arrays[a], a);
                array_shrink(&arrays[a], 0);
        }
        assert_in_range(all.held, 0, 2 * ARRAYS_SLACK_BYTES);
        for (unsigned a = 0; a < ELEMENTSOF(arrays); a++)
                array_done(&arrays[a]);
}

/* What was reserved stays so while others grow: an addition that must not fail counts on it. */
static void test_reserve(void **state) {
        Arrays all = {};
        Array a, b;

        array_init(&a, &all);
        array_init(&b, &all);
        assert_int_equal(array_grow(&b, 100), 0);
        assert_int_equal(array_reserve(&a, MIB), 0);
        assert_int_equal(a.used, 0);
        n_allocations = n_failed = fail_after = 0;
        assert_int_equal(array_grow(&b, 3000), 0);
        assert_int_equal(array_grow(&a, MIB), 0);
        assert_int_equal(n_allocations, 0);
        fail_never();
        array_done(&a);
        array_done(&b);
}

/* What a large array takes next is there before it is touched. */
static void test_pieces(void **state) {
        Arrays all = {};
        Array array;
        size_t held;
        uint8_t there[16];

        array_init(&array, &all);
        assert_int_equal(array_grow(&array, 8 * MIB), 0);
        held = array.held;
        assert_int_equal(array_grow(&array, held + 1), 0);
        assert_int_equal(array.held - held, sizeof there * PAGE_BYTES);
        assert_int_equal(mincore(array.data + held, array.held - held, there), 0);
        for (size_t i = 0; i < sizeof there; i++)
                assert_int_equal(there[i] & 1, 1);
        array_done(&array);
}

static void test_out_of_memory(void **state) {
        Arrays all = {};
        Array array;

        array_init(&array, &all);
        n_failed = n_allocations = fail_after = 0;
        assert_int_equal(array_grow(&array, 1), -ENOMEM);
        assert_null(array.data);
        arrays_check(&all);

        fail_never();
        assert_int_equal(array_grow(&array, 160 * STEP), 0);
        fill(&array, 3, 0);
        n_allocations = fail_after = 0;
        assert_int_equal(array_grow(&array, 100 * MIB), -ENOMEM);
        assert_int_equal(array.used, 160 * STEP);
        check(&array, 3);
        fail_never();
        assert_int_equal(array_grow(&array, MIB), 0);
        fill(&array, 3, 160 * STEP);
        check(&array, 3);
        array_done(&array);
}

int main(void) {
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(test_grow_and_shrink),
                cmocka_unit_test(test_reserve),
                cmocka_unit_test(test_pieces),
                cmocka_unit_test(test_out_of_memory),
        };
        return cmocka_run_group_tests(tests, NULL, NULL);
}
