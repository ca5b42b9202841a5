/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "scan/frames.h"

#include <setjmp.h>
#include <stdarg.h>

#include <cmocka.h>

#define FRAMES 100000U
#define PFN_MAX ((uint64_t)1 << 26)

/* Against a plain array: neighbours, strides that meet in the same slots, and frames nobody added. */
static void test_against_an_array(void **state) {
        _cleanup_(frame_map_done) FrameMap map = {};
        uint32_t *known = calloc(PFN_MAX, sizeof *known);
        size_t n = 0;

        assert_non_null(known);
        for (unsigned i = 1; i <= FRAMES; i++) {
                uint64_t pfn = 1 + (i % 3 == 0 ? i : i % 3 == 1 ? (uint64_t)i * 256 : (uint64_t)random()) % (PFN_MAX - 1);
                Frame *frame;

                assert_int_equal(frame_map_find(&map, pfn) != NULL, known[pfn] != 0);
                assert_int_equal(frame_map_add(&map, pfn, &frame), 0);
                assert_int_equal(frame->pfn, pfn);
                assert_int_equal(frame->value, known[pfn]);
                assert_int_equal(frame->tag, known[pfn] & 0xff);
                n += known[pfn] == 0;
                known[pfn] = i;
                frame->value = i;
                frame->tag = i & 0xff;
                assert_int_equal(map.n, n);
        }
        for (uint64_t pfn = 1; pfn < PFN_MAX; pfn++) {
                const Frame *frame = known[pfn] || pfn % 64 == 0 ? frame_map_find(&map, pfn) : NULL;
                assert_int_equal(frame ? frame->value : 0, known[pfn]);
        }
        free(known);
}

static void test_clear_forgets(void **state) {
        _cleanup_(frame_map_done) FrameMap map = {};
        Frame *frame;

        assert_null(frame_map_find(&map, 5));
        for (int few = 0; few < 2; few++) {
                for (uint64_t pfn = 1; pfn < (few ? 10 : 10000); pfn++) {
                        assert_int_equal(frame_map_add(&map, pfn, &frame), 0);
                        assert_int_equal(frame->value, 0);
                        frame->value = pfn;
                }
                frame_map_clear(&map);
                assert_int_equal(map.n, 0);
                for (uint64_t pfn = 1; pfn < 10000; pfn++)
                        assert_null(frame_map_find(&map, pfn));
        }
        /* Room that a pass did not need goes back. */
        assert_int_equal(map.allocated, 0);
}

int main(void) {
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(test_against_an_array),
                cmocka_unit_test(test_clear_forgets),
        };
        return cmocka_run_group_tests(tests, NULL, NULL);
}
