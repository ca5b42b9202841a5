/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Which mappings count as cold, and what of a block is put back: never a part of what one huge page may map. */
#include "scan/cold.h"

#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>

#define AT(blocks) ((uint64_t)0x7f0000000000 + (uint64_t)((blocks) * (double)BLOCK_BYTES))

static void test_before(void **state) {
        static const struct {
                uint64_t rss, referenced;
                bool cold;
        } cases[] = {
                { 0, 0, false }, /* nothing is there: nothing to tell by */
                { PAGE_BYTES, 0, true },
                { PAGE_BYTES, PAGE_BYTES, false },
                { 15 * PAGE_BYTES, PAGE_BYTES, false },
                { 16 * PAGE_BYTES, PAGE_BYTES, true },
                { 16 * PAGE_BYTES, 2 * PAGE_BYTES, false },
                { (uint64_t)1 << 45, (uint64_t)1 << 41, true },
                { (uint64_t)1 << 45, ((uint64_t)1 << 41) + PAGE_BYTES, false },
        };

        for (size_t i = 0; i < ELEMENTSOF(cases); i++) {
                Vma vma = { .rss_bytes = cases[i].rss, .referenced_bytes = cases[i].referenced };
                assert_int_equal(cold_before(&vma), cases[i].cold);
        }
}

static void test_collect(void **state) {
        Vma mappings[] = {
                { .start = AT(0.5), .end = AT(3), .rss_bytes = PAGE_BYTES },
                { .start = AT(3), .end = AT(3.5), .rss_bytes = PAGE_BYTES },
                { .start = AT(3.5), .end = AT(3.75), .rss_bytes = PAGE_BYTES, .referenced_bytes = PAGE_BYTES },
                { .start = AT(3.75), .end = AT(4), .rss_bytes = PAGE_BYTES, .skip = VMA_SKIP_LOCKED },
                { .start = AT(4.25), .end = AT(4.5), .rss_bytes = PAGE_BYTES },
                { .start = AT(4.75), .end = AT(9), .rss_bytes = PAGE_BYTES },
        };
        VmaList vmas = { .vmas = mappings, .n = ELEMENTSOF(mappings) };
        static const ColdRange expected[] = {
                { AT(0.5), AT(1) },     /* cut by its mapping only; block 1 was not asked for */
                { AT(2), AT(3.5) },     /* blocks and mappings that touch are one */
                { AT(4.25), AT(4.5) }, { AT(4.75), AT(5) }, { AT(8), AT(9) },
        };
        static const unsigned blocks[] = { 0, 2, 3, 4, 8, 9, 20 };
        ColdList list = {};

        for (size_t i = 0; i < ELEMENTSOF(blocks); i++)
                assert_int_equal(cold_collect(&list, &vmas, AT(blocks[i])), 0);
        assert_int_equal(list.n, ELEMENTSOF(expected));
        assert_memory_equal(list.ranges, expected, sizeof expected);
        cold_list_done(&list);
        assert_null(list.ranges);
        assert_int_equal(list.n, 0);
}

int main(void) {
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(test_before),
                cmocka_unit_test(test_collect),
        };

        return cmocka_run_group_tests(tests, NULL, NULL);
}
