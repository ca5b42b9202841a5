/* SPDX-License-Identifier: LGPL-2.1-or-later */

/* The planner of route remap against its promises, on random bitmaps, mappings and pools. */

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "merge/remap-plan.h"
#include "tests/unit/random.h"

#include <string.h>

#define N_BLOCKS 3
#define N_PAGES (N_BLOCKS * BLOCK_PAGES)
#define BASE (64 * BLOCK_BYTES)
#define MAX_SHARING 4U

typedef struct World {
        Block blocks[N_BLOCKS];
        Block *present[N_BLOCKS];
        Vma mappings[40];
        Space space;
        VmaList vmas;
        RemapRules rules;
} World;

static void world_init(World *w) {
        memset(w, 0, sizeof *w);
        w->rules = (RemapRules){ .minimum_run_pages = 1, .huge_page_split = 2500, .vmas_now = 1, .vmas_max = 16000 };
        for (unsigned i = 0; i < N_BLOCKS; i++) {
                w->blocks[i].addr = BASE + i * BLOCK_BYTES;
                w->present[i] = &w->blocks[i];
        }
        w->space = (Space){ .blocks = w->present, .n = N_BLOCKS };
        w->vmas = (VmaList){ .vmas = w->mappings };
}

static void world_map(World *w, unsigned from, unsigned to) {
        w->mappings[w->vmas.n++] = (Vma){ .start = BASE + from * PAGE_BYTES, .end = BASE + to * PAGE_BYTES,
                                          .write = true };
}

static void world_twins(World *w, unsigned from, unsigned to) {
        for (unsigned i = from; i < to; i++) {
                page_set_add(w->blocks[i / BLOCK_PAGES].hashed, i % BLOCK_PAGES);
                page_set_add(w->blocks[i / BLOCK_PAGES].twin, i % BLOCK_PAGES);
        }
}

static bool in_runs(const RemapRuns *runs, unsigned page) {
        for (size_t i = 0; i < runs->n; i++)
                if (runs->runs[i].start <= BASE + page * PAGE_BYTES &&
                    BASE + page * PAGE_BYTES < runs->runs[i].start + runs->runs[i].n_pages * PAGE_BYTES)
                        return true;
        return false;
}

static uint64_t left(const RemapRuns *runs) {
        uint64_t n = runs->pages_left_run + runs->pages_left_huge + runs->pages_left_budget + runs->pages_left_stack;

        for (unsigned i = 0; i < _REMAP_SKIP_MAX; i++)
                n += runs->pages_left[i];
        return n;
}

static uint64_t taken(const RemapRuns *runs) {
        uint64_t n = 0;

        for (size_t i = 0; i < runs->n; i++)
                n += runs->runs[i].n_pages;
        return n;
}

static void test_runs(void **unused) {
        _cleanup_(remap_runs_done) RemapRuns runs = {};
        World w;

        world_init(&w);
        world_map(&w, 0, 600);
        world_map(&w, 600, N_PAGES);
        world_twins(&w, 0, 7);          /* too short */
        world_twins(&w, 500, 700);      /* across blocks and mappings */
        world_twins(&w, 800, 808);
        page_set_add(w.blocks[1].changed, 560 - BLOCK_PAGES);
        page_set_add(w.blocks[1].forked, 650 - BLOCK_PAGES);
        assert_int_equal(remap_runs_make(&w.space, &w.vmas, &w.rules, &runs), 0);
        assert_int_equal(runs.n, 5);
        assert_int_equal(runs.runs[0].start, BASE + 500 * PAGE_BYTES);
        assert_int_equal(runs.runs[0].n_pages, 60);
        assert_int_equal(runs.runs[1].n_pages, 39);
        assert_int_equal(runs.runs[2].start, BASE + 600 * PAGE_BYTES);
        assert_int_equal(runs.runs[2].n_pages, 50);
        assert_int_equal(runs.runs[3].n_pages, 49);
        assert_int_equal(runs.runs[4].n_pages, 8);
        assert_int_equal(runs.pages_left_run, 7);
        assert_int_equal(runs.pages_wanted, 7 + 198 + 8);
}

static void test_runs_are_never_huge(void **unused) {
        _cleanup_(remap_runs_done) RemapRuns runs = {};
        World w;

        world_init(&w);
        world_map(&w, 0, N_PAGES);
        world_twins(&w, 0, N_PAGES);
        assert_int_equal(remap_runs_make(&w.space, &w.vmas, &w.rules, &runs), 0);
        assert_int_equal(taken(&runs) + runs.pages_left_run, N_PAGES);
        for (size_t i = 0; i < runs.n; i++)
                assert_true(runs.runs[i].n_pages <= POOL_RUN_MAX);
        assert_int_equal(runs.pages_left_run, 0); /* the last three pages borrowed what they lack */
        assert_int_equal(runs.runs[runs.n - 1].n_pages, REMAP_MINIMUM_RUN);
}

/* Only of what was cut, and only what it can spare. */
static void test_borrows(void **unused) {
        _cleanup_(remap_runs_done) RemapRuns runs = {}, other = {};
        World w;

        world_init(&w);
        world_map(&w, 0, 20);
        world_map(&w, 20, N_PAGES); /* another mapping right behind */
        world_twins(&w, 0, 24);
        assert_int_equal(remap_runs_make(&w.space, &w.vmas, &w.rules, &runs), 0);
        assert_int_equal(runs.n, 1);
        assert_int_equal(runs.runs[0].n_pages, 20);
        assert_int_equal(runs.pages_left_run, 4);
        world_init(&w);
        world_map(&w, 0, N_PAGES);
        world_twins(&w, 0, POOL_RUN_MAX + 1);
        w.rules.minimum_run_pages = 300;
        assert_int_equal(remap_runs_make(&w.space, &w.vmas, &w.rules, &other), 0);
        assert_int_equal(other.n, 1);
        assert_int_equal(other.runs[0].n_pages, POOL_RUN_MAX);
        assert_int_equal(other.pages_left_run, 1);
}

static void test_budget_keeps_the_longest(void **unused) {
        _cleanup_(remap_runs_done) RemapRuns runs = {};
        World w;

        world_init(&w);
        world_map(&w, 0, N_PAGES);
        world_twins(&w, 0, 10);
        world_twins(&w, 100, 130);
        world_twins(&w, 200, 220);
        w.rules.vmas_max = w.rules.vmas_now + 5; /* two runs */
        assert_int_equal(remap_runs_make(&w.space, &w.vmas, &w.rules, &runs), 0);
        assert_int_equal(runs.n, 2);
        assert_int_equal(runs.runs[0].n_pages, 30);
        assert_int_equal(runs.runs[1].n_pages, 20);
        assert_int_equal(runs.pages_left_budget, 10);
}

/* Every reason not to remap a mapping is met in the order given, and keeps all its pages out. */
static void test_mappings(void **unused) {
        const struct {
                Vma vma;
                RemapSkip skip;
        } cases[] = {
                { { .write = true }, REMAP_OK },
                { { .write = true, .skip = VMA_SKIP_LOCKED }, REMAP_SKIP_MAPPING },
                { { .write = false }, REMAP_SKIP_READ_ONLY },
                { { .write = true, .exec = true }, REMAP_SKIP_EXECUTABLE },
                { { .write = true, .file = true }, REMAP_SKIP_FILE },
                { { .write = true, .growsdown = true }, REMAP_SKIP_STACK },
                { { .write = true, .huge_advised = true }, REMAP_SKIP_HUGE_ADVISED },
                { { .write = true, .sealed = true }, REMAP_SKIP_SEALED },
                { { .write = true, .keyed = true }, REMAP_SKIP_KEY },
                { { .write = true, .named = true }, REMAP_SKIP_NAMED },
                { { .write = true, .policy = true }, REMAP_SKIP_POLICY },
        };

        assert_int_equal(ELEMENTSOF(cases), _REMAP_SKIP_MAX);
        for (size_t i = 0; i < ELEMENTSOF(cases); i++) {
                _cleanup_(remap_runs_done) RemapRuns runs = {};
                World w;

                world_init(&w);
                w.mappings[0] = cases[i].vma;
                w.mappings[0].start = BASE;
                w.mappings[0].end = BASE + BLOCK_BYTES;
                w.vmas.n = 1;
                world_twins(&w, 0, 100);
                assert_int_equal(remap_vma_skip(&w.mappings[0]), cases[i].skip);
                assert_int_equal(remap_runs_make(&w.space, &w.vmas, &w.rules, &runs), 0);
                assert_int_equal(runs.n, i == 0);
                assert_int_equal(runs.pages_left[cases[i].skip], i > 1 ? 100 : 0);
        }
}

static void test_random_runs(void **unused) {
        for (unsigned round = 0; round < 300; round++) {
                _cleanup_(remap_runs_done) RemapRuns runs = {};
                uint64_t wanted = 0;
                unsigned at = 0;
                World w;

                world_init(&w);
                while (at < N_PAGES && w.vmas.n < ELEMENTSOF(w.mappings)) {
                        unsigned to = MIN_OF(at + 1 + random_below(300), (unsigned)N_PAGES);

                        world_map(&w, at, to);
                        w.mappings[w.vmas.n - 1].exec = random_below(5) == 0;
                        w.mappings[w.vmas.n - 1].skip = random_below(6) ? VMA_OK : VMA_SKIP_LOCKED;
                        at = to + random_below(3);
                }
                for (unsigned i = 0; i < N_PAGES;) {
                        unsigned end = MIN_OF(i + 1 + random_below(60), (unsigned)N_PAGES);

                        if (random_below(3))
                                world_twins(&w, i, end);
                        i = end + random_below(4);
                }
                for (unsigned b = 0; b < N_BLOCKS; b++)
                        w.blocks[b].huge = random_below(3) == 0;
                w.rules.minimum_run_pages = 1 + random_below(20);
                w.rules.huge_page_split = random_below(10001);
                w.rules.vmas_max = random_below(2) ? 16000 : random_below(30);
                assert_int_equal(remap_runs_make(&w.space, &w.vmas, &w.rules, &runs), 0);
                for (unsigned i = 0; i < N_PAGES; i++) {
                        const Vma *vma = vma_list_find(&w.vmas, BASE + i * PAGE_BYTES);
                        bool twin = page_set_has(w.blocks[i / BLOCK_PAGES].twin, i % BLOCK_PAGES);

                        wanted += vma && vma->skip == VMA_OK && twin;
                        if (in_runs(&runs, i))
                                assert_true(vma && remap_vma_skip(vma) == REMAP_OK && twin);
                }
                for (size_t i = 0; i < runs.n; i++) {
                        const Vma *vma = vma_list_find(&w.vmas, runs.runs[i].start);

                        assert_true(runs.runs[i].n_pages >= MAX_OF(w.rules.minimum_run_pages, REMAP_MINIMUM_RUN));
                        assert_true(runs.runs[i].n_pages <= POOL_RUN_MAX);
                        assert_true(runs.runs[i].start + runs.runs[i].n_pages * PAGE_BYTES <= vma->end);
                        if (i > 0)
                                assert_true(runs.runs[i - 1].start + runs.runs[i - 1].n_pages * PAGE_BYTES <=
                                            runs.runs[i].start);
                }
                assert_true(runs.n * 2 <= (w.rules.vmas_max > 1 ? w.rules.vmas_max - 1 : 0));
                assert_int_equal(wanted, runs.pages_wanted);
                assert_int_equal(wanted, taken(&runs) + left(&runs));
        }
}

/* A pool whose page i holds content keys[i], mapped so often. */
typedef struct Bank {
        PoolSpace space;
        Stable *stable;
} Bank;

static void world_map_pool(World *w, unsigned from, unsigned to, uint64_t page) {
        world_map(w, from, to);
        w->mappings[w->vmas.n - 1].file = true;
        w->mappings[w->vmas.n - 1].dev = 3;
        w->mappings[w->vmas.n - 1].inode = 7;
        w->mappings[w->vmas.n - 1].offset = page * PAGE_BYTES;
}

/* What is too short by itself may go on beside a mapping of the pool. */
static void test_short_runs(void **unused) {
        const RemapIdentity pool = { .dev = 3, .inode = 7 }, other = { .dev = 3, .inode = 8 };
        World w;

        world_init(&w);
        world_map(&w, 0, 100);
        world_map_pool(&w, 100, 200, 50);
        world_map(&w, 200, 203);
        world_map_pool(&w, 203, 300, 153);
        world_map(&w, 300, 400);
        world_map_pool(&w, 400, 500, 0);
        world_twins(&w, 98, 100);
        world_twins(&w, 200, 203);
        world_twins(&w, 305, 308);      /* touches none */
        world_twins(&w, 399, 400);      /* none of the pool's pages lies before its first */
        for (unsigned i = 0; i < 3; i++) {
                _cleanup_(remap_runs_done) RemapRuns runs = {};

                w.rules.pool = i == 0 ? &pool : i == 1 ? &other : NULL;
                assert_int_equal(remap_runs_make(&w.space, &w.vmas, &w.rules, &runs), 0);
                assert_int_equal(taken(&runs) + left(&runs), 9);
                if (i > 0) {
                        assert_int_equal(runs.n, 0);
                        continue;
                }
                assert_int_equal(runs.n, 2);
                assert_true(runs.runs[0].short_run && runs.runs[0].start == BASE + 98 * PAGE_BYTES &&
                            runs.runs[0].n_pages == 2);
                assert_true(runs.runs[0].before == REMAP_FRESH && runs.runs[0].behind == 49);
                assert_true(runs.runs[1].short_run && runs.runs[1].n_pages == 3);
                assert_true(runs.runs[1].before == 150 && runs.runs[1].behind == 152);
                assert_int_equal(runs.pages_left_run, 4);
        }
}

/* All of them have their turn, only so many at a time. */
static void test_short_runs_by_turns(void **unused) {
        for (size_t n = 1; n < 1000; n += n < 200 ? 1 : 37) {
                uint64_t passes = (n + REMAP_SHORT_RUNS_MAX - 1) / REMAP_SHORT_RUNS_MAX, first = n * 7919;
                bool had[1000] = {};

                for (uint64_t pass = first; pass < first + passes; pass++) {
                        size_t due = 0;

                        for (size_t k = 0; k < n; k++)
                                if (remap_short_run_due(k, n, pass)) {
                                        had[k] = true;
                                        due++;
                                }
                        assert_int_equal(due, MIN_OF(n, (size_t)REMAP_SHORT_RUNS_MAX));
                }
                for (size_t k = 0; k < n; k++)
                        assert_true(had[k]);
        }
}

static void bank_init(Bank *bank) {
        pool_space_init(&bank->space, MAX_SHARING);
        assert_int_equal(stable_new(MAX_SHARING, &bank->stable), 0);
}

static void bank_done(Bank *bank) {
        pool_space_done(&bank->space);
        stable_free(bank->stable);
}

/* What an executor does with a segment. */
static void bank_take(Bank *bank, uint64_t address, const uint64_t *keys, RemapSegment *segment) {
        uint64_t at = address + segment->first * PAGE_BYTES;
        bool fresh = segment->page == REMAP_FRESH;

        if (fresh)
                assert_int_equal(pool_space_alloc(&bank->space, segment->n_pages, &at, 1, &segment->page), 0);
        assert_int_equal(pool_space_take(&bank->space, segment->page, segment->n_pages, at), 0);
        for (uint32_t i = 0; i < segment->n_pages; i++) {
                uint64_t page = segment->page + i;

                if (fresh)
                        assert_int_equal(stable_insert(bank->stable, keys[segment->first + i], page, 1), 0);
                else
                        assert_int_equal(stable_set_sharers(bank->stable, page, bank->space.sharers[page]), 0);
        }
}

static RemapSegments segments(Bank *bank, uint64_t address, const uint64_t *keys, uint32_t n) {
        RemapSegments s = {};

        assert_int_equal(remap_segments_make(bank->stable, &bank->space, address, keys, n, 8, &s), 0);
        return s;
}

static RemapSegments beside(Bank *bank, const uint64_t *keys, uint32_t n, uint64_t before, uint64_t behind) {
        const RemapRun run = { .start = BASE, .n_pages = n, .short_run = true, .before = before, .behind = behind };
        RemapSegments s = {};

        assert_int_equal(remap_segments_beside(bank->stable, &bank->space, &run, keys, &s), 0);
        return s;
}

static void test_beside(void **unused) {
        uint64_t keys[100], some[5];
        Bank bank;

        bank_init(&bank);
        for (unsigned i = 0; i < 100; i++)
                keys[i] = 1000 + i;
        _cleanup_(remap_segments_done) RemapSegments first = segments(&bank, BASE, keys, 100);
        bank_take(&bank, BASE, keys, &first.segments[0]);
        const uint64_t p = first.segments[0].page;

        /* A gap, filled whole. */
        _cleanup_(remap_segments_done) RemapSegments gap = beside(&bank, keys + 10, 5, p + 10, p + 14);
        assert_true(gap.n == 1 && gap.segments[0].first == 0 && gap.segments[0].n_pages == 5 &&
                    gap.segments[0].page == p + 10 && gap.pages_left == 0);
        /* From either end, as far as it goes on. */
        for (unsigned i = 0; i < 5; i++)
                some[i] = i == 2 ? 9 : keys[10 + i];
        _cleanup_(remap_segments_done) RemapSegments both = beside(&bank, some, 5, p + 10, p + 14);
        assert_true(both.n == 2 && both.segments[0].n_pages == 2 && both.segments[0].page == p + 10 &&
                    both.segments[1].first == 3 && both.segments[1].n_pages == 2 && both.segments[1].page == p + 13 &&
                    both.pages_left == 1);
        _cleanup_(remap_segments_done) RemapSegments one = beside(&bank, some, 5, REMAP_FRESH, p + 14);
        assert_true(one.n == 1 && one.segments[0].first == 3 && one.pages_left == 3);
        /* The pool's first pages have none before them. */
        _cleanup_(remap_segments_done) RemapSegments low = beside(&bank, keys, 5, REMAP_FRESH, 2);
        assert_true(low.pages_left >= 2);
        /* Another content, or one that could not be read; and a page that has no room. */
        some[0] = some[4] = 0;
        _cleanup_(remap_segments_done) RemapSegments none = beside(&bank, some, 5, p + 10, p + 14);
        assert_true(none.n == 0 && none.pages_left == 5);
        for (unsigned i = 1; i < MAX_SHARING; i++)
                bank_take(&bank, BASE + i * 1000 * PAGE_BYTES, keys + 10, &(RemapSegment){ 0, 1, p + 10 });
        _cleanup_(remap_segments_done) RemapSegments full = beside(&bank, keys + 10, 5, p + 10, p + 14);
        assert_true(full.n == 1 && full.segments[0].first == 1 && full.pages_left == 1);
        bank_done(&bank);
}

static void test_segments(void **unused) {
        Bank bank;
        uint64_t keys[100];

        bank_init(&bank);
        for (unsigned i = 0; i < 100; i++)
                keys[i] = 1000 + i;
        _cleanup_(remap_segments_done) RemapSegments first = segments(&bank, BASE, keys, 100);
        assert_int_equal(first.n, 1);
        assert_int_equal(first.segments[0].n_pages, 100);
        assert_true(first.segments[0].page == REMAP_FRESH);
        bank_take(&bank, BASE, keys, &first.segments[0]);

        /* The same elsewhere: all of it, where it stands. */
        _cleanup_(remap_segments_done) RemapSegments second = segments(&bank, BASE + 7 * PAGE_BYTES, keys, 100);
        assert_int_equal(second.n, 1);
        assert_int_equal(second.segments[0].n_pages, 100);
        assert_int_equal(second.segments[0].page, first.segments[0].page);

        /* Known in the middle, new around it; page 40 could not be read. */
        uint64_t mixed[100];
        for (unsigned i = 0; i < 100; i++)
                mixed[i] = i >= 30 && i < 60 ? keys[i + 5] : 5000 + i;
        mixed[80] = 0;
        _cleanup_(remap_segments_done) RemapSegments third = segments(&bank, BASE + 9 * PAGE_BYTES, mixed, 100);
        assert_int_equal(third.n, 4);
        assert_int_equal(third.segments[0].n_pages, 30);
        assert_true(third.segments[0].page == REMAP_FRESH);
        assert_int_equal(third.segments[1].first, 30);
        assert_int_equal(third.segments[1].n_pages, 30);
        assert_int_equal(third.segments[1].page, first.segments[0].page + 35);
        assert_int_equal(third.segments[2].n_pages, 20);
        assert_int_equal(third.segments[3].first, 81);
        assert_int_equal(third.pages_left, 1);

        /* A known page amid new ones is stored twice; known pages in no order are left. */
        for (unsigned i = 0; i < 100; i++)
                mixed[i] = 7000 + i;
        mixed[50] = keys[3];
        _cleanup_(remap_segments_done) RemapSegments fourth = segments(&bank, BASE + 11 * PAGE_BYTES, mixed, 100);
        assert_int_equal(fourth.n, 1);
        assert_int_equal(fourth.segments[0].n_pages, 100);
        for (unsigned i = 0; i < 100; i++)
                mixed[i] = keys[99 - i];
        _cleanup_(remap_segments_done) RemapSegments fifth = segments(&bank, BASE + 13 * PAGE_BYTES, mixed, 100);
        assert_int_equal(fifth.n, 0);
        assert_int_equal(fifth.pages_left, 100);
        bank_done(&bank);
}

/* However many want it, no page is given to more than may share it, and the next one gets a copy. */
static void test_sharing_is_limited(void **unused) {
        Bank bank;
        uint64_t keys[64], fresh = 0;

        bank_init(&bank);
        for (unsigned i = 0; i < 64; i++)
                keys[i] = 1 + i;
        for (unsigned round = 0; round < 10; round++) {
                uint64_t address = BASE + (1 + round) * 70 * PAGE_BYTES;
                _cleanup_(remap_segments_done) RemapSegments s = segments(&bank, address, keys, 64);

                if (s.n == 0) { /* every copy is full, and it is known: left, until … */
                        assert_int_equal(s.pages_left, 64);
                        continue;
                }
                assert_int_equal(s.n, 1);
                fresh += s.segments[0].page == REMAP_FRESH;
                bank_take(&bank, address, keys, &s.segments[0]);
        }
        for (uint64_t page = 0; page < bank.space.n; page++)
                assert_true(bank.space.sharers[page] == POOL_FREE || bank.space.sharers[page] <= MAX_SHARING);
        assert_int_equal(fresh, 3); /* 4 + 4 + 2 */
        bank_done(&bank);
}

static void test_one_content_all_over(void **unused) {
        Bank bank;
        uint64_t keys[POOL_RUN_MAX];

        bank_init(&bank);
        for (unsigned i = 0; i < POOL_RUN_MAX; i++)
                keys[i] = 42;
        for (unsigned round = 0; round < 6; round++) {
                uint64_t address = BASE + (1 + round) * 600 * PAGE_BYTES;
                _cleanup_(remap_segments_done) RemapSegments s = segments(&bank, address, keys, POOL_RUN_MAX);

                assert_true(s.n >= 1);
                for (size_t i = 0; i < s.n; i++)
                        bank_take(&bank, address, keys, &s.segments[i]);
        }
        bank_done(&bank);
}

int main(void) {
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(test_runs),
                cmocka_unit_test(test_runs_are_never_huge),
                cmocka_unit_test(test_borrows),
                cmocka_unit_test(test_budget_keeps_the_longest),
                cmocka_unit_test(test_mappings),
                cmocka_unit_test(test_random_runs),
                cmocka_unit_test(test_short_runs),
                cmocka_unit_test(test_short_runs_by_turns),
                cmocka_unit_test(test_beside),
                cmocka_unit_test(test_segments),
                cmocka_unit_test(test_sharing_is_limited),
                cmocka_unit_test(test_one_content_all_over),
        };
        return cmocka_run_group_tests(tests, NULL, NULL);
}
