/* SPDX-License-Identifier: LGPL-2.1-or-later */

/* What is to be put in order in a pool, against a model that knows nothing but which page of which process maps which
 * page of the pool: what is planned is tried out in it, and what is not planned looked for. */

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "merge/pool-tidy.h"
#include "merge/remap-plan.h"
#include "tests/unit/random.h"

#include <string.h>

#define N_MEMBERS 4U
#define N_PAGES 120U                    /* of each process */
#define N_POOL 400U
#define MAX_SHARING 3U
#define NOWHERE UINT64_MAX

typedef struct World {
        uint64_t page[N_MEMBERS][N_PAGES];      /* of the pool; NOWHERE: it maps none */
        bool written[N_MEMBERS][N_PAGES];
        unsigned flags[N_MEMBERS][N_PAGES];     /* of the mapping */
        uint32_t unknown[N_POOL];               /* mappings of somebody who is not managed */
        PoolSpace space;
        Stable *stable;
        TidyPieces pieces;
} World;

static uint64_t address_of(unsigned page) { return (1000 + (uint64_t)page) * PAGE_BYTES; }
static unsigned page_of(uint64_t address) { return (unsigned)(address / PAGE_BYTES - 1000); }

static void world_init(World *w) {
        memset(w, 0, sizeof *w);
        memset(w->page, 0xff, sizeof w->page);
        pool_space_init(&w->space, MAX_SHARING);
        assert_int_equal(pool_space_grow(&w->space, N_POOL), 0);
        assert_int_equal(stable_new(MAX_SHARING, &w->stable), 0);
}

static void world_done(World *w) {
        tidy_pieces_done(&w->pieces);
        pool_space_done(&w->space);
        stable_free(w->stable);
}

static void map(World *w, unsigned member, unsigned at, uint64_t page, unsigned n) {
        for (unsigned i = 0; i < n; i++)
                w->page[member][at + i] = page + i;
}

/* The page and the one before are of one mapping, as the kernel would have it. */
static bool is_one(const World *w, unsigned member, unsigned at) {
        return at > 0 && w->page[member][at] != NOWHERE && w->page[member][at - 1] != NOWHERE &&
               w->page[member][at] == w->page[member][at - 1] + 1 && w->flags[member][at] == w->flags[member][at - 1];
}

static bool is_shared(const World *w, unsigned member, unsigned at) {
        return w->page[member][at] != NOWHERE && !w->written[member][at];
}

static uint32_t count(const World *w, uint64_t page) {
        uint32_t n = w->unknown[page];

        for (unsigned m = 0; m < N_MEMBERS; m++)
                for (unsigned i = 0; i < N_PAGES; i++)
                        n += is_shared(w, m, i) && w->page[m][i] == page;
        return n;
}

static unsigned mappings(const World *w) {
        unsigned n = 0;

        for (unsigned m = 0; m < N_MEMBERS; m++)
                for (unsigned i = 0; i < N_PAGES; i++)
                        n += w->page[m][i] != NOWHERE && !is_one(w, m, i);
        return n;
}

/* As the daemon tells it. */
static void world_tell(World *w) {
        tidy_pieces_done(&w->pieces);
        for (uint64_t page = 0; page < N_POOL; page++)
                pool_space_set(&w->space, page, count(w, page) ?: POOL_FREE);
        for (unsigned m = 0; m < N_MEMBERS; m++)
                for (unsigned i = 0, n; i < N_PAGES; i += MAX_OF(n, 1U)) {
                        for (n = 0; i + n < N_PAGES && is_shared(w, m, i + n) && (n == 0 || is_one(w, m, i + n)); n++)
                                ;
                        if (n == 0)
                                continue;
                        assert_int_equal(GROW(w->pieces.pieces, w->pieces.n, w->pieces.allocated), 0);
                        w->pieces.pieces[w->pieces.n++] = (TidyPiece){
                                .address = address_of(i),
                                .page = w->page[m][i],
                                .n_pages = n,
                                .member = m,
                                .first = !is_one(w, m, i),
                                .last = i + n == N_PAGES || !is_one(w, m, i + n),
                                .joins = i > 0 && is_shared(w, m, i - 1) && w->flags[m][i] == w->flags[m][i - 1],
                        };
                }
}

/* Runs that several processes have, in pieces here and there; some of it written, some with other flags. */
static void world_random(World *w) {
        uint64_t pages[N_PAGES], from = 0;

        for (unsigned i = 0; i < N_PAGES; i++) {
                if (random_below(9) == 0 || from >= N_POOL)
                        from = random_below(N_POOL);
                pages[i] = from++;
        }
        for (unsigned m = 0; m < N_MEMBERS; m++)
                for (unsigned k = 0; k < 3; k++) {
                        unsigned n = 1 + random_below(40), source = random_below(N_PAGES - n), to = random_below(3) ? source : random_below(N_PAGES - n);

                        for (unsigned i = 0; i < n; i++)
                                w->page[m][to + i] = pages[source + i];
                }
        for (unsigned k = random_below(3); k > 0; k--)
                w->written[random_below(N_MEMBERS)][random_below(N_PAGES)] = true;
        for (unsigned k = random_below(3); k > 0; k--)
                for (unsigned m = random_below(N_MEMBERS), i = random_below(N_PAGES); i < N_PAGES; i++)
                        w->flags[m][i]++;
        for (unsigned k = random_below(4); k > 0; k--)
                w->unknown[random_below(N_POOL)]++;
}

/* What becomes of the mappings when what one process maps at [at, at + n) is moved, for everybody, to new pages.
 * Negative: it cannot be, as somebody would stay. */
static int saved_by_moving(const World *w, unsigned member, unsigned at, unsigned n, unsigned *ret_places) {
        World *after = malloc(sizeof *after);
        unsigned places = 0;

        assert_non_null(after);
        memcpy(after, w, sizeof *after);
        for (unsigned i = 0; i < n; i++)
                if (!is_shared(w, member, at + i) || (i > 0 && w->flags[member][at + i] != w->flags[member][at + i - 1]))
                        goto no;
        for (unsigned m = 0; m < N_MEMBERS; m++)
                for (unsigned to = 0; to + n <= N_PAGES; to++) {
                        unsigned i;

                        for (i = 0; i < n && is_shared(w, m, to + i) && w->page[m][to + i] == w->page[member][at + i] &&
                                    (i == 0 || w->flags[m][to + i] == w->flags[m][to + i - 1]); i++)
                                ;
                        if (i < n)
                                continue;
                        places++;
                        map(after, m, to, N_POOL + 1, n);
                }
        for (unsigned i = 0; i < n; i++)
                if (count(w, w->page[member][at + i]) != places || places < 2 || places > MAX_SHARING)
                        goto no;
        int saved = (int)mappings(w) - (int)mappings(after);
        free(after);
        *ret_places = places;
        return saved;
no:
        free(after);
        return -1000;
}

/* No page of the process twice in it: that is for the pages of two places, which then is no stretch of one. */
static void check_unit(const World *w, const TidyPlan *plan, const TidyUnit *unit, bool *used) {
        const TidyPlace *first = &plan->places[unit->places];
        unsigned places, at = page_of(first->address), n = 0;

        for (size_t k = unit->parts; k < unit->parts + unit->n_parts; k++)
                for (uint32_t i = 0; i < plan->parts[k].n_pages; i++, n++) {
                        uint64_t page = plan->parts[k].page + i;

                        assert_false(used[page]);
                        used[page] = true;
                        for (size_t p = unit->places; p < unit->places + unit->n_places; p++)
                                assert_int_equal(w->page[plan->places[p].member][page_of(plan->places[p].address) + n], page);
                }
        assert_int_equal(n, unit->n_pages);
        assert_true(unit->n_parts > 1);
        assert_int_equal(saved_by_moving(w, first->member, at, n, &places), unit->saved);
        assert_true(unit->saved > 0);
        assert_int_equal(places, unit->n_places);
}

static bool anything_to_save(const World *w) {
        for (unsigned m = 0; m < N_MEMBERS; m++)
                for (unsigned at = 0; at < N_PAGES; at++)
                        for (unsigned n = 2; at + n <= N_PAGES && is_shared(w, m, at + n - 1); n++) {
                                unsigned places;

                                if (saved_by_moving(w, m, at, n, &places) > 0)
                                        return true;
                        }
        return false;
}

static void test_apart_random(void **unused) {
        unsigned planned = 0, nothing = 0;

        for (unsigned round = 0; round < 400; round++) {
                _cleanup_(tidy_plan_done) TidyPlan plan = {};
                PoolTidy tidy = {};
                bool used[N_POOL] = {};
                World w;

                world_init(&w);
                world_random(&w);
                world_tell(&w);
                assert_int_equal(pool_tidy_plan(&tidy, &w.space, &w.pieces, false, &plan), 0);
                for (size_t i = 0; i < plan.n; i++)
                        check_unit(&w, &plan, &plan.units[i], used);
                planned += plan.n > 0;
                if (plan.n == 0 && nothing < 40) { /* the model is slow */
                        assert_false(anything_to_save(&w));
                        nothing++;
                }
                world_done(&w);
        }
        assert_true(planned > 40 && nothing > 10);
}

/* Two processes, a run of which came in three pieces. */
static void three_pieces(World *w) {
        for (unsigned m = 0; m < 2; m++) {
                map(w, m, 10, 100, 16);
                map(w, m, 26, 40, 16);
                map(w, m, 42, 200, 16);
        }
        world_tell(w);
}

static void expect_units(const PoolTidy *tidy, const World *w, bool short_of_mappings, size_t n) {
        _cleanup_(tidy_plan_done) TidyPlan plan = {};

        assert_int_equal(pool_tidy_plan(tidy, &w->space, &w->pieces, short_of_mappings, &plan), 0);
        assert_int_equal(plan.n, n);
}

static void test_apart(void **unused) {
        _cleanup_(tidy_plan_done) TidyPlan plan = {};
        PoolTidy tidy = {};
        World w;

        world_init(&w);
        three_pieces(&w);
        assert_int_equal(pool_tidy_plan(&tidy, &w.space, &w.pieces, false, &plan), 0);
        assert_int_equal(plan.n, 1);
        assert_int_equal(plan.units[0].n_pages, 48);
        assert_int_equal(plan.units[0].n_parts, 3);
        assert_int_equal(plan.units[0].n_places, 2);
        assert_int_equal(plan.units[0].saved, 4);
        assert_int_equal(plan.parts[plan.units[0].parts + 1].page, 40);
        assert_int_equal(plan.places[plan.units[0].places].address, address_of(10));

        /* One more who maps a page of it, and would stay. */
        w.unknown[110] = 1;
        world_tell(&w);
        assert_int_equal(count(&w, 110), 3);
        tidy_plan_done(&plan);
        assert_int_equal(pool_tidy_plan(&tidy, &w.space, &w.pieces, false, &plan), 0);
        assert_int_equal(plan.n, 1);
        assert_int_equal(plan.units[0].n_pages, 32); /* without the piece that has it */
        w.unknown[110] = 0;

        /* A page that was written, in one of them. */
        w.written[1][30] = true;
        world_tell(&w);
        expect_units(&tidy, &w, false, 0);
        w.written[1][30] = false;

        /* Other flags in the middle: the kernel could not make one mapping of them. */
        for (unsigned i = 26; i < N_PAGES; i++)
                w.flags[0][i] = w.flags[1][i] = 1;
        world_tell(&w);
        tidy_plan_done(&plan);
        assert_int_equal(pool_tidy_plan(&tidy, &w.space, &w.pieces, false, &plan), 0);
        assert_int_equal(plan.n, 1);
        assert_int_equal(plan.units[0].n_pages, 32);
        world_done(&w);
}

/* As many processes as may share a page, one of them with a piece of its own beside it, and no more than that. */
static void test_apart_places(void **unused) {
        _cleanup_(tidy_plan_done) TidyPlan plan = {};
        PoolTidy tidy = {};
        bool used[N_POOL] = {};
        World w;

        world_init(&w);
        three_pieces(&w);
        map(&w, 2, 60, 100, 16); /* at another address */
        map(&w, 2, 76, 40, 16);
        map(&w, 2, 92, 200, 16);
        map(&w, 2, 108, 300, 8);
        world_tell(&w);
        assert_int_equal(pool_tidy_plan(&tidy, &w.space, &w.pieces, false, &plan), 0);
        assert_int_equal(plan.n, 1);
        assert_int_equal(plan.units[0].n_places, 3);
        assert_int_equal(plan.units[0].n_pages, 48);
        assert_int_equal(plan.units[0].saved, 6);
        check_unit(&w, &plan, &plan.units[0], used);

        /* One of them goes on elsewhere behind the second piece: only what all have in common is put together. */
        map(&w, 2, 92, 320, 16);
        world_tell(&w);
        tidy_plan_done(&plan);
        assert_int_equal(pool_tidy_plan(&tidy, &w.space, &w.pieces, false, &plan), 0);
        assert_int_equal(plan.n, 1);
        assert_int_equal(plan.units[0].n_places, 3);
        assert_int_equal(plan.units[0].n_pages, 32);

        /* More than MaxPageSharing= allows: children that were forked. The copy could not be mapped by all. */
        map(&w, 3, 0, 100, 16);
        map(&w, 3, 16, 40, 16);
        world_tell(&w);
        assert_int_equal(count(&w, 100), MAX_SHARING + 1);
        expect_units(&tidy, &w, false, 0);
        world_done(&w);
}

/* One process alone: it is of no use in the pool, however it lies. And twice in one process: it is two places. */
static void test_apart_alone(void **unused) {
        _cleanup_(tidy_plan_done) TidyPlan plan = {};
        PoolTidy tidy = {};
        World w;

        world_init(&w);
        map(&w, 0, 10, 100, 16);
        map(&w, 0, 26, 40, 16);
        world_tell(&w);
        expect_units(&tidy, &w, true, 0);
        map(&w, 0, 60, 100, 16);
        map(&w, 0, 76, 40, 16);
        world_tell(&w);
        assert_int_equal(pool_tidy_plan(&tidy, &w.space, &w.pieces, false, &plan), 0);
        assert_int_equal(plan.n, 1);
        assert_int_equal(plan.units[0].n_places, 2);
        assert_int_equal(plan.units[0].n_pages, 32);
        world_done(&w);
}

/* A child that was forked has everything its parent has: with it all is put together, without it nothing. */
static void test_apart_relatives(void **unused) {
        _cleanup_(tidy_plan_done) TidyPlan plan = {};
        PoolTidy tidy = {};
        World w;

        world_init(&w);
        three_pieces(&w);
        memcpy(w.page[2], w.page[1], sizeof w.page[2]);
        world_tell(&w);
        assert_int_equal(pool_tidy_plan(&tidy, &w.space, &w.pieces, false, &plan), 0);
        assert_int_equal(plan.n, 1);
        assert_int_equal(plan.units[0].n_places, 3);
        /* It is not managed yet: the kernel counts it, and nobody told of it. */
        memset(w.page[2], 0xff, sizeof w.page[2]);
        for (unsigned i = 0; i < 16; i++)
                w.unknown[100 + i] = w.unknown[40 + i] = w.unknown[200 + i] = 1;
        world_tell(&w);
        expect_units(&tidy, &w, true, 0);
        world_done(&w);
}

static void test_apart_is_worth(void **unused) {
        PoolTidy tidy = {};
        PoolSpace space;
        TidyPiece pieces[4];
        TidyPieces list = { .pieces = pieces, .n = 4 };
        _cleanup_(tidy_plan_done) TidyPlan plan = {};

        pool_space_init(&space, MAX_SHARING);
        assert_int_equal(pool_space_grow(&space, 2000), 0);
        for (unsigned m = 0; m < 2; m++) {
                pieces[2 * m] = (TidyPiece){ address_of(0), 0, 200, m, true, true, false };
                pieces[2 * m + 1] = (TidyPiece){ address_of(200), 1000, 200, m, true, true, true };
        }
        for (unsigned page = 0; page < 200; page++) {
                pool_space_set(&space, page, 2);
                pool_space_set(&space, 1000 + page, 2);
        }
        assert_int_equal(pool_tidy_plan(&tidy, &space, &list, false, &plan), 0);
        assert_int_equal(plan.n, 0);
        assert_int_equal(pool_tidy_plan(&tidy, &space, &list, true, &plan), 0);
        assert_int_equal(plan.n, 1);
        pool_space_done(&space);
}

/* So many places have so many pieces of so many pages. Returns how many pages the largest unit has. */
static uint32_t largest_unit(uint32_t n_places, uint32_t n_pieces, uint32_t n_pages) {
        _cleanup_(tidy_plan_done) TidyPlan plan = {};
        _cleanup_(tidy_pieces_done) TidyPieces list = {};
        PoolTidy tidy = {};
        PoolSpace space;
        uint32_t largest = 0;

        pool_space_init(&space, n_places);
        assert_int_equal(pool_space_grow(&space, (uint64_t)n_pieces * 1000), 0);
        for (uint32_t m = 0; m < n_places; m++)
                for (uint32_t k = 0; k < n_pieces; k++) {
                        assert_int_equal(GROW(list.pieces, list.n, list.allocated), 0);
                        list.pieces[list.n++] = (TidyPiece){
                                address_of(k * n_pages), k * 1000, n_pages, m, true, true, k > 0,
                        };
                        for (uint32_t i = 0; i < n_pages; i++)
                                pool_space_set(&space, k * 1000 + i, n_places);
                }
        assert_int_equal(pool_tidy_plan(&tidy, &space, &list, true, &plan), 0);
        for (size_t i = 0; i < plan.n; i++)
                largest = MAX_OF(largest, plan.units[i].n_pages);
        pool_space_done(&space);
        return largest;
}

static void test_short_of_mappings(void **unused) {
        assert_false(tidy_short_of_mappings(0, 16382, 0));
        assert_false(tidy_short_of_mappings(8191, 16382, 0));
        assert_true(tidy_short_of_mappings(8192, 16382, 0));
        assert_true(tidy_short_of_mappings(16382, 16382, 0));
        /* Something was left for want of them, though some were given back since. */
        assert_true(tidy_short_of_mappings(100, 16382, 1));
}

static void test_apart_is_limited(void **unused) {
        /* Never a whole huge page. */
        assert_int_equal(largest_unit(2, 2, 255), 510);
        assert_int_equal(largest_unit(2, 2, 256), 0);
        assert_int_equal(largest_unit(2, 3, 200), 400);
        /* No more than TIDY_UNIT_PAGES_MAX in all places. */
        assert_int_equal(largest_unit(32, 2, 250), 500);
        assert_int_equal(largest_unit(40, 2, 250), 0);
        assert_int_equal(largest_unit(40, 4, 130), 390);
}

/* What was moved, and is apart again, waits, and what was not does not wait for it; how long: test-tidy-pace. */
static void test_apart_again(void **unused) {
        const uint32_t looks[N_MEMBERS] = { TIDY_LOOKS_MAX, TIDY_LOOKS_MAX, TIDY_LOOKS_MAX, TIDY_LOOKS_MAX };
        PoolTidy tidy = {};
        unsigned waited = 0;
        World w;

        world_init(&w);
        three_pieces(&w);
        pool_tidy_moved(&tidy, 100, 16, false, true);
        expect_units(&tidy, &w, false, 1);
        pool_tidy_moved(&tidy, 100, 16, true, false);
        expect_units(&tidy, &w, false, 0);
        for (unsigned m = 2; m < 4; m++) {
                map(&w, m, 60, 300, 8);
                map(&w, m, 68, 330, 8);
        }
        world_tell(&w);
        expect_units(&tidy, &w, false, 1);
        for (;; waited++) {
                _cleanup_(tidy_pieces_done) TidyPieces alone = {};
                _cleanup_(tidy_plan_done) TidyPlan plan = {};

                assert_int_equal(pool_tidy_plan(&tidy, &w.space, &w.pieces, false, &plan), 0);
                if (plan.n == 2)
                        break;
                assert_int_equal(pool_tidy_look(&tidy, &w.space, w.stable, &w.pieces, looks, &alone), 0);
        }
        assert_int_equal(waited, tidy.again.looks);
        /* It is forgotten with the pages. */
        for (unsigned m = 0; m < 2; m++)
                memset(w.page[m], 0xff, sizeof w.page[m]);
        world_tell(&w);
        pool_tidy_moved(&tidy, 100, 16, true, false);
        _cleanup_(tidy_pieces_done) TidyPieces alone = {};
        assert_int_equal(pool_tidy_look(&tidy, &w.space, w.stable, &w.pieces, looks, &alone), 0);
        three_pieces(&w);
        expect_units(&tidy, &w, false, 2);
        pool_tidy_done(&tidy);
        world_done(&w);
}

/* Of the model: the page of the process has nobody else's company, and is of no use where it is. */
static bool is_alone(const World *w, unsigned member, unsigned at) {
        uint64_t page = w->page[member][at], key, other_key;
        unsigned others = 0, with_room = 0;

        if (!is_shared(w, member, at) || count(w, page) != 1)
                return false;
        if (!stable_has_frame(w->stable, page, &key))
                return true;
        for (uint64_t other = 0; other < N_POOL; other++)
                if (other != page && stable_has_frame(w->stable, other, &other_key) && other_key == key) {
                        uint32_t sharers;

                        assert_int_equal(stable_get_sharers(w->stable, other, &sharers), 0);
                        others++;
                        with_room += sharers < MAX_SHARING;
                }
        return others == 0 || with_room > 0;
}

static void expect_stretches(const World *w, const TidyPieces *got, unsigned alone[N_MEMBERS][N_PAGES],
                             const uint32_t *looks) {
        size_t at = 0;

        for (unsigned m = 0; m < N_MEMBERS; m++)
                for (unsigned i = 0, n; i < N_PAGES; i += MAX_OF(n, 1U)) {
                        bool start, end;

                        for (n = 0; i + n < N_PAGES && alone[m][i + n] >= looks[m] && (n == 0 || is_one(w, m, i + n)); n++)
                                ;
                        if (n == 0)
                                continue;
                        start = !is_one(w, m, i);
                        end = i + n == N_PAGES || !is_one(w, m, i + n);
                        if (!(start && end) && n < (start || end ? REMAP_MINIMUM_RUN : TIDY_MIDDLE_PAGES))
                                continue;
                        assert_true(at < got->n);
                        assert_int_equal(got->pieces[at].member, m);
                        assert_int_equal(got->pieces[at].address, address_of(i));
                        assert_int_equal(got->pieces[at].page, w->page[m][i]);
                        assert_int_equal(got->pieces[at].n_pages, n);
                        assert_int_equal(got->pieces[at].first, start);
                        assert_int_equal(got->pieces[at].last, end);
                        at++;
                }
        assert_int_equal(at, got->n);
}

/* Processes end, write, and share anew between the looks. */
static void test_alone_random(void **unused) {
        unsigned found = 0;

        for (unsigned round = 0; round < 60; round++) {
                unsigned alone[N_MEMBERS][N_PAGES] = {};
                PoolTidy tidy = {};
                uint32_t looks[N_MEMBERS];
                World w;

                world_init(&w);
                world_random(&w);
                for (unsigned m = 0; m < N_MEMBERS; m++)
                        looks[m] = 1 + random_below(4);
                for (uint64_t page = 0; page < N_POOL; page++)
                        if (random_below(2))
                                (void)stable_insert(w.stable, 1 + random_below(N_POOL / 2), page, 1 + random_below(MAX_SHARING));
                for (unsigned look = 0; look < 30; look++) {
                        _cleanup_(tidy_pieces_done) TidyPieces got = {};

                        if (random_below(3) == 0) {
                                unsigned m = random_below(N_MEMBERS), from = random_below(N_PAGES), n = MIN_OF(1 + random_below(60), N_PAGES - from);

                                for (unsigned i = 0; i < n; i++)
                                        switch (look % 3) {
                                        case 0: w.page[m][from + i] = NOWHERE; break;
                                        case 1: w.written[m][from + i] = i % 20 == 0; break;
                                        default: w.page[m][from + i] = w.page[(m + 1) % N_MEMBERS][from + i]; break;
                                        }
                        }
                        world_tell(&w);
                        for (uint64_t page = 0; page < N_POOL; page++)
                                if (stable_has_frame(w.stable, page, NULL))
                                        (void)stable_set_sharers(w.stable, page, MIN_OF(count(&w, page) ?: 1U, MAX_SHARING));
                        for (unsigned m = 0; m < N_MEMBERS; m++)
                                for (unsigned i = 0; i < N_PAGES; i++) {
                                        /* Of a page that moved on to another process the count goes on. */
                                        unsigned before = 0;

                                        if (is_alone(&w, m, i))
                                                before = tidy.n > w.page[m][i] ? tidy.notes[w.page[m][i]] & TIDY_LOOKS_MAX : 0;
                                        alone[m][i] = is_alone(&w, m, i) ? before + 1 : 0;
                                }
                        assert_int_equal(pool_tidy_look(&tidy, &w.space, w.stable, &w.pieces, looks, &got), 0);
                        expect_stretches(&w, &got, alone, looks);
                        found += got.n > 0;
                }
                pool_tidy_done(&tidy);
                world_done(&w);
        }
        assert_true(found > 100);
}

static void expect_alone(PoolTidy *tidy, World *w, size_t n, uint32_t n_pages) {
        const uint32_t looks[N_MEMBERS] = { 3, 3, 3, 3 };
        TidyPieces got = {};

        for (unsigned look = 0; look < 3; look++) {
                tidy_pieces_done(&got);
                world_tell(w);
                assert_int_equal(pool_tidy_look(tidy, &w->space, w->stable, &w->pieces, looks, &got), 0);
                if (look < 2)
                        assert_int_equal(got.n, 0);
        }
        assert_int_equal(got.n, n);
        if (n > 0)
                assert_int_equal(got.pieces[0].n_pages, n_pages);
        tidy_pieces_done(&got);
}

static void test_alone(void **unused) {
        PoolTidy tidy = {};
        World w;

        world_init(&w);
        map(&w, 0, 0, 20, 100);
        expect_alone(&tidy, &w, 1, 100);
        /* Somebody comes: from then on it is counted anew. */
        map(&w, 1, 0, 20, 100);
        expect_alone(&tidy, &w, 0, 0);
        memset(w.page[1], 0xff, sizeof w.page[1]);
        expect_alone(&tidy, &w, 1, 100);
        /* A part: at an end of the mapping, too short there, in its middle. */
        pool_tidy_done(&tidy);
        map(&w, 1, 0, 20, 92);
        expect_alone(&tidy, &w, 1, 8);
        pool_tidy_done(&tidy);
        map(&w, 1, 0, 20, 93);
        expect_alone(&tidy, &w, 0, 0);
        pool_tidy_done(&tidy);
        memset(w.page[1], 0xff, sizeof w.page[1]);
        map(&w, 1, 0, 20, 10);
        map(&w, 1, 74, 94, 26);
        expect_alone(&tidy, &w, 1, 64);
        pool_tidy_done(&tidy);
        map(&w, 1, 73, 93, 27);
        expect_alone(&tidy, &w, 0, 0);
        /* A copy of which there are others: it stays while they are full. */
        pool_tidy_done(&tidy);
        memset(w.page[1], 0xff, sizeof w.page[1]);
        for (unsigned i = 0; i < 100; i++) {
                assert_int_equal(stable_insert(w.stable, 1 + i, 20 + i, 1), 0);
                assert_int_equal(stable_insert(w.stable, 1 + i, 200 + i, MAX_SHARING), 0);
        }
        expect_alone(&tidy, &w, 0, 0);
        pool_tidy_done(&tidy);
        for (unsigned i = 0; i < 100; i++)
                assert_int_equal(stable_set_sharers(w.stable, 200 + i, MAX_SHARING - 1), 0);
        expect_alone(&tidy, &w, 1, 100);
        pool_tidy_done(&tidy);
        world_done(&w);
}

int main(void) {
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(test_alone),
                cmocka_unit_test(test_alone_random),
                cmocka_unit_test(test_apart),
                cmocka_unit_test(test_apart_random),
                cmocka_unit_test(test_apart_places),
                cmocka_unit_test(test_apart_alone),
                cmocka_unit_test(test_apart_relatives),
                cmocka_unit_test(test_apart_is_worth),
                cmocka_unit_test(test_apart_is_limited),
                cmocka_unit_test(test_short_of_mappings),
                cmocka_unit_test(test_apart_again),
        };
        return cmocka_run_group_tests(tests, NULL, NULL);
}
