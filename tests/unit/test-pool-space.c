/* SPDX-License-Identifier: LGPL-2.1-or-later */

/* A pool's bookkeeping against a model of one word a page, and its compaction plans carried out. */

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "merge/pool-space.h"
#include "tests/test.h"
#include "tests/unit/random.h"

#define MODEL_PAGES 65536U
#define SHARING 5U

static uint32_t model[MODEL_PAGES];
static void check_model(const PoolSpace *space) {
        uint64_t used = 0, mappings = 0;

        for (uint64_t i = 0; i < MODEL_PAGES; i++) {
                assert_int_equal(i < space->n ? space->sharers[i] : POOL_FREE, model[i]);
                used += model[i] != POOL_FREE;
                mappings += model[i] < POOL_RESERVED ? model[i] : 0;
        }
        assert_int_equal(space->used, used);
        assert_int_equal(space->mappings, mappings);
}

typedef struct Run {
        uint64_t page, address;
        uint32_t n_pages;
} Run;

static void test_random(void **unused) {
        static Run runs[400];
        PoolSpace space;
        size_t n = 0;

        memset(model, 0xff, sizeof model);
        pool_space_init(&space, SHARING);
        for (unsigned step = 0; step < 40000; step++) {
                uint32_t what = random_below(10);
                Run *run = n ? &runs[random_below((uint32_t)n)] : NULL;

                if (n < ELEMENTSOF(runs) && what < 4) {
                        Run new = { .n_pages = 1 + random_below(random_below(8) == 0 ? POOL_RUN_MAX : 16) };
                        uint64_t addresses[3];
                        for (unsigned i = 0; i < 3; i++)
                                addresses[i] = (uint64_t)random_below(1 << 20) << PAGE_SHIFT;
                        assert_int_equal(pool_space_alloc(&space, new.n_pages, addresses, 3, &new.page), 0);
                        new.address = addresses[random_below(3)];
                        for (unsigned i = 0; i < 3; i++) {
                                assert_true(pool_fits(addresses[i], new.page));
                                assert_true((addresses[i] / PAGE_BYTES) % BLOCK_PAGES != new.page % BLOCK_PAGES);
                        }
                        assert_true(new.page + new.n_pages <= MODEL_PAGES);
                        for (uint32_t i = 0; i < new.n_pages; i++) {
                                assert_int_equal(model[new.page + i], POOL_FREE);
                                model[new.page + i] = POOL_RESERVED;
                        }
                        runs[n++] = new;
                } else if (run && what < 7) {
                        bool full = false, misfit = random_below(8) == 0;
                        uint64_t bad = (run->page + BLOCK_PAGES * random_below(9)) << PAGE_SHIFT;
                        int r = pool_space_take(&space, run->page, run->n_pages, misfit ? bad : run->address);
                        for (uint32_t i = 0; i < run->n_pages; i++)
                                full |= model[run->page + i] == SHARING;
                        assert_int_equal(r, misfit ? POOL_E_MISFIT : full ? POOL_E_FULL : 0);
                        for (uint64_t i = run->page; r == 0 && i < run->page + run->n_pages; i++)
                                model[i] = model[i] == POOL_RESERVED ? 1 : model[i] + 1;
                } else if (run && what < 9) {
                        pool_space_drop(&space, run->page, run->n_pages);
                        for (uint32_t i = 0; i < run->n_pages; i++)
                                if (model[run->page + i] != POOL_RESERVED && model[run->page + i] > 0)
                                        model[run->page + i]--;
                } else if (run) {
                        for (uint32_t i = 0; i < run->n_pages; i++) {
                                pool_space_set(&space, run->page + i, POOL_FREE);
                                model[run->page + i] = POOL_FREE;
                        }
                        *run = runs[--n];
                }
                if (step % 1000 == 0)
                        check_model(&space);
        }
        check_model(&space);
        /* Holes are used again: no more than twice of what was ever in use at a time, by and large. */
        assert_true(space.n < MODEL_PAGES / 2);
        pool_space_done(&space);
}

static void test_edges(void **unused) {
        uint64_t page, addresses[BLOCK_PAGES];
        PoolSpace space;

        pool_space_init(&space, 2);
        assert_int_equal(pool_space_alloc(&space, 0, NULL, 0, &page), -EINVAL);
        assert_int_equal(pool_space_alloc(&space, POOL_RUN_MAX + 1, NULL, 0, &page), -EINVAL);
        for (uint64_t i = 0; i < BLOCK_PAGES; i++)
                addresses[i] = i << PAGE_SHIFT;
        assert_int_equal(pool_space_alloc(&space, 1, addresses, BLOCK_PAGES, &page), POOL_E_MISFIT);
        assert_int_equal(space.used, 0);
        assert_int_equal(pool_space_alloc(&space, 1, addresses, BLOCK_PAGES - 1, &page), 0);
        assert_int_equal(page % BLOCK_PAGES, BLOCK_PAGES - 1);
        assert_int_equal(pool_space_alloc_at(&space, page, 1, NULL, 0), -EEXIST);
        assert_int_equal(pool_space_alloc_at(&space, page + 1, 1, &addresses[0], 1), POOL_E_MISFIT);
        assert_int_equal(pool_space_alloc_at(&space, POOL_PAGES_MAX - 1, 2, NULL, 0), -ENOSPC);
        assert_int_equal(pool_space_take(&space, page, 2, 0), -EINVAL); /* the second is free */
        assert_int_equal(pool_space_take(&space, page, 1, 0), 0);
        assert_int_equal(pool_space_take(&space, page, 1, 0), 0);
        assert_int_equal(pool_space_take(&space, page, 1, 0), POOL_E_FULL);
        assert_int_equal(space.mappings, 2);
        pool_space_drop(&space, page, 1);
        pool_space_drop(&space, page, 1);
        pool_space_drop(&space, page, 1);
        assert_int_equal(space.mappings, 0);
        assert_int_equal(space.sharers[page], 0); /* to be collected, and not free */
        pool_space_done(&space);
}

int main(void) {
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(test_random),
                cmocka_unit_test(test_edges),
        };
        return cmocka_run_group_tests(tests, NULL, NULL);
}
