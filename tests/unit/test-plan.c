/* SPDX-License-Identifier: LGPL-2.1-or-later */

/* The range planner against its promises: on random bitmaps and mappings every promise is checked page by page by
 * code that shares nothing with the planner but its prices; that the check can fail is shown on wrong plans. */

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "merge/plan.c" /* the prices are its own */
#include "tests/test.h"
#include "tests/unit/random.h"

#define N_BLOCKS 6
#define N_PAGES (N_BLOCKS * BLOCK_PAGES)
#define BASE (64 * BLOCK_BYTES)

typedef struct World {
        Block blocks[N_BLOCKS];
        Block *present[N_BLOCKS];
        Vma mappings[64];
        Space space;
        VmaList vmas;
        PlanRules rules;
} World;

static void world_init(World *w) {
        *w = (World){ .rules = { .minimum_run_pages = 1, .huge_page_split = 2500, .vmas_now = 1, .vmas_max = 16000 } };
        for (unsigned i = 0; i < N_BLOCKS; i++) {
                w->blocks[i].addr = BASE + i * BLOCK_BYTES;
                w->present[i] = &w->blocks[i];
        }
        w->space = (Space){ .blocks = w->present, .n = N_BLOCKS };
        w->vmas = (VmaList){ .vmas = w->mappings };
}

static void world_map(World *w, unsigned from, unsigned to, VmaSkip skip, bool mergeable) {
        w->mappings[w->vmas.n++] = (Vma){ .start = BASE + from * PAGE_BYTES, .end = BASE + to * PAGE_BYTES,
                                          .skip = skip, .mergeable = mergeable };
}

static void world_set(World *w, unsigned from, unsigned to, bool wanted) {
        for (unsigned i = from; i < to; i++) {
                page_set_add(w->blocks[i / BLOCK_PAGES].hashed, i % BLOCK_PAGES);
                if (wanted)
                        page_set_add(w->blocks[i / BLOCK_PAGES].twin, i % BLOCK_PAGES);
        }
}

static void world_random(World *w) {
        unsigned at = 0, n = 0, density = 1 + random_below(100), present = 30 + random_below(71), longest = 1U << random_below(8);
        unsigned alone = random_below(3) ? 0 : 1 + random_below(60);

        world_init(w);
        for (unsigned i = 0; i < N_PAGES;) {
                unsigned run = 1 + random_below(longest), kind = random_below(100) < density ? 1 + random_below(3) : 0;
                bool is_alone = random_below(100) < alone;

                for (unsigned end = MIN_OF(i + run, (unsigned)N_PAGES); i < end; i++) {
                        Block *b = &w->blocks[i / BLOCK_PAGES];

                        if (kind == 1 && random_below(2))
                                page_set_add(b->saves, i % BLOCK_PAGES);
                        if (is_alone) {
                                page_set_add(b->alone, i % BLOCK_PAGES);
                                if (kind == 3)
                                        page_set_add(b->merged, i % BLOCK_PAGES);
                                continue;
                        }
                        if (kind == 1)
                                page_set_add(b->twin, i % BLOCK_PAGES);
                        else if (kind == 2)
                                page_set_add(b->zero, i % BLOCK_PAGES);
                        else if (kind == 3)
                                page_set_add(b->merged, i % BLOCK_PAGES);
                        else if (random_below(16) == 0)
                                page_set_add(b->zeropage, i % BLOCK_PAGES);
                        if (kind == 1 || (kind == 0 && random_below(100) < present))
                                page_set_add(b->hashed, i % BLOCK_PAGES);
                }
        }
        for (unsigned i = 0; i < N_BLOCKS; i++) {
                w->blocks[i].huge = random_below(4) == 0;
                if (random_below(8))
                        w->present[n++] = &w->blocks[i];
        }
        w->space.n = n;
        while (at < N_PAGES && w->vmas.n < ELEMENTSOF(w->mappings)) {
                unsigned to = MIN_OF(at + 1 + random_below(random_below(2) ? 40 : 900), (unsigned)N_PAGES);
                if (random_below(5))
                        world_map(w, at, to, random_below(6) ? VMA_OK : VMA_SKIP_LOCKED, random_below(4) == 0);
                at = to;
        }
        w->rules.minimum_run_pages = random_below(3) ? 1 : 1 + random_below(20);
        w->rules.huge_page_split = random_below(10001);
        w->rules.vmas_now = w->vmas.n + random_below(10);
        w->rules.vmas_max = random_below(2) ? 16000 : random_below(60);
}

typedef struct Page {
        const Vma *vma; /* NULL: unmapped, or one that must not be merged */
        bool wanted, frees, hashed, huge, zeropage, alone;
} Page;

static void world_pages(const World *w, Page *pages) {
        memset(pages, 0, N_PAGES * sizeof *pages);
        for (size_t i = 0; i < w->space.n; i++) {
                const Block *b = w->space.blocks[i];
                unsigned first = (unsigned)((b->addr - BASE) / PAGE_BYTES), n = 0;
                for (unsigned j = 0; j < BLOCK_PAGES; j++) {
                        Page *p = &pages[first + j];
                        p->zeropage = page_set_has(b->zeropage, j);
                        p->wanted = page_set_has(b->twin, j) || page_set_has(b->zero, j) || page_set_has(b->merged, j);
                        p->alone = page_set_has(b->alone, j);
                        p->wanted &= !p->alone;
                        p->frees = p->wanted && (page_set_has(b->saves, j) || page_set_has(b->zero, j));
                        p->hashed = page_set_has(b->hashed, j);
                        n += p->wanted;
                }
                for (unsigned j = 0; j < BLOCK_PAGES; j++)
                        pages[first + j].huge = b->huge && n * 10000 < w->rules.huge_page_split * BLOCK_PAGES;
        }
        for (size_t i = 0; i < w->vmas.n; i++) {
                const Vma *v = &w->vmas.vmas[i];
                for (uint64_t a = v->start; v->skip == VMA_OK && a < v->end; a += PAGE_BYTES) {
                        Page *p = &pages[(a - BASE) / PAGE_BYTES];
                        p->vma = v;
                        p->wanted |= v->mergeable && p->zeropage && !p->alone;
                }
        }
}

/* In mappings of any kind. */
static uint64_t wanted_in_all(const World *w) {
        uint64_t n = 0;

        for (size_t i = 0; i < w->space.n; i++)
                for (unsigned page = 0; page < BLOCK_PAGES; page++) {
                        const Block *b = w->space.blocks[i];

                        n += !page_set_has(b->alone, page) &&
                             (page_set_has(b->twin, page) || page_set_has(b->zero, page) || page_set_has(b->merged, page));
                }
        return n;
}

/* What marking these pages costs: calls, mappings, pages ksmd reads in vain. */
static uint64_t cost(const World *w, const Page *pages, const bool *marked) {
        uint64_t nsec = 0, mapping_nsec = vma_nsec(wanted_in_all(w));

        for (unsigned i = 0; i < N_PAGES; i++) {
                bool before = i > 0 && pages[i - 1].vma == pages[i].vma;
                if (!pages[i].vma)
                        continue;
                if (marked[i] && !(before && marked[i - 1]))
                        nsec += CALL_NSEC;
                if (before && marked[i] != marked[i - 1])
                        nsec += mapping_nsec;
                if (marked[i] && !pages[i].wanted)
                        nsec += pages[i].alone ? ALONE_NSEC : pages[i].hashed ? PAGE_NSEC : HOLE_NSEC;
        }
        return nsec;
}

static bool limited(const PlanRules *rules) {
        return rules->minimum_run_pages > 1 || rules->vmas_max < 16000;
}

/* What is to be unmarked: pages left alone in mergeable mappings, all of them where there are mappings for it. */
static const char *hot_broken(const World *w, const Plan *plan, const Page *pages, const bool *marked, size_t added) {
        bool hot[N_PAGES] = {};
        unsigned left_out = 0;

        for (size_t i = 0; i < plan->n_hot; i++) {
                const PlanRange *r = &plan->hot[i];

                if (r->start >= r->end || (i > 0 && r[-1].end > r->start))
                        return "hot ranges are not in order";
                for (uint64_t at = r->start; at < r->end; at += PAGE_BYTES)
                        hot[(at - BASE) / PAGE_BYTES] = true;
        }
        for (unsigned i = 0; i < N_PAGES; i++) {
                bool should = pages[i].vma && pages[i].vma->mergeable && pages[i].alone;

                if (hot[i] && (!should || marked[i]))
                        return "something is unmarked that is not to be left alone";
                left_out += should && !hot[i];
        }
        if (plan->n_hot > 0 && w->rules.vmas_now + added + 2 * plan->n_hot > w->rules.vmas_max)
                return "too many mappings for what is to be left alone";
        if (left_out > 0 && w->rules.vmas_now + added + 2 * (plan->n_hot + 1) <= w->rules.vmas_max)
                return "left marked without need";
        return NULL;
}

/* NULL, or the promise that the plan breaks. */
static const char *broken(const World *w, const Plan *plan) {
        static Page pages[N_PAGES];
        bool marked[N_PAGES] = {}, each[N_PAGES] = {}, all[N_PAGES] = {}, vma_wanted[ELEMENTSOF(w->mappings)] = {};
        uint64_t wanted = 0, left = 0, expected = 0, n = 0;
        size_t added = 0;
        const char *why;
        bool any_huge = false;

        world_pages(w, pages);
        for (size_t i = 0; i < plan->n; i++) {
                const PlanRange *r = &plan->ranges[i];
                unsigned first = (unsigned)((r->start - BASE) / PAGE_BYTES);
                unsigned end = (unsigned)((r->end - BASE) / PAGE_BYTES);
                const Vma *vma;
                bool any = false;

                if (r->start < BASE || r->start >= r->end || end > N_PAGES || (r->start | r->end) % PAGE_BYTES)
                        return "a range is malformed";
                vma = pages[first].vma;
                if (i > 0 && r[-1].end > r->start)
                        return "ranges are not in order";
                if (!vma || r->end > vma->end)
                        return "a range leaves its mapping";
                if (i > 0 && r[-1].end == r->start && r->start != vma->start)
                        return "adjacent ranges within a mapping";
                for (unsigned j = first; j < end; j++) {
                        marked[j] = true;
                        any = any || pages[j].wanted;
                        expected += pages[j].frees;
                        if (pages[j].huge && !vma->mergeable)
                                return "a huge page is touched";
                }
                if (!any)
                        return "a range without a wanted page";
                n += end - first;
                if (!vma->mergeable)
                        added += (r->start > vma->start) + (r->end < vma->end);
        }
        if (n != plan->pages_marked)
                return "pages_marked is wrong";
        if (expected != plan_count_frees(&w->space, plan->ranges, plan->n))
                return "what will leave its frame is counted wrong";
        for (unsigned i = 0; i < N_PAGES; i++) {
                if (!pages[i].vma || !pages[i].wanted)
                        continue;
                wanted++;
                left += !marked[i];
                any_huge = any_huge || (pages[i].huge && !pages[i].vma->mergeable);
                vma_wanted[pages[i].vma - w->mappings] = true;
                if (!marked[i] && pages[i].vma->mergeable)
                        return "something wanted in a mergeable mapping is left out";
        }
        if (wanted != plan->pages_wanted ||
            left != plan->pages_left_huge + plan->pages_left_budget + plan->pages_left_run +
                            plan->pages_left_stack)
                return "wanted pages are unaccounted for";
        if (added > 0 && w->rules.vmas_now + added > w->rules.vmas_max)
                return "too many mappings";
        why = hot_broken(w, plan, pages, marked, added);
        if (why)
                return why;
        if (limited(&w->rules))
                return NULL;
        if (left != plan->pages_left_huge)
                return "left out without need";
        for (unsigned i = 0; i < N_PAGES; i++) {
                if (!pages[i].vma)
                        continue;
                each[i] = pages[i].wanted && (pages[i].vma->mergeable || !pages[i].huge);
                all[i] = vma_wanted[pages[i].vma - w->mappings];
        }
        if (cost(w, pages, marked) > cost(w, pages, each))
                return "dearer than marking each run";
        if (!any_huge && cost(w, pages, marked) > cost(w, pages, all))
                return "dearer than marking everything";
        return NULL;
}

static void test_promises(void **unused) {
        static World w;
        uint64_t ranges = 0, huge = 0, budget = 0, run = 0, hot = 0;

        for (unsigned seed = 1; seed <= 4000; seed++) {
                _cleanup_(plan_done) Plan plan = {};
                const char *why;

                random_state = seed;
                world_random(&w);
                assert_int_equal(plan_make(&w.space, &w.vmas, &w.rules, &plan), 0);
                why = broken(&w, &plan);
                if (why)
                        fail_msg("seed %u: %s", seed, why);
                ranges += plan.n;
                huge += plan.pages_left_huge;
                budget += plan.pages_left_budget;
                run += plan.pages_left_run;
                hot += plan.n_hot;
        }
        /* The random worlds reach every rule. */
        assert_true(ranges > 10000 && huge > 1000 && budget > 1000 && run > 1000 && hot > 1000);
}

/* The check itself: each naive plan breaks the promise it is bound to break. */
static void test_check_can_fail(void **unused) {
        static World w;
        PlanRange two[] = { { BASE, BASE + 10 * PAGE_BYTES }, { BASE + 20 * PAGE_BYTES, BASE + 30 * PAGE_BYTES } };
        Plan plan = { .ranges = two, .n = 2, .pages_wanted = 20, .pages_marked = 20 };

        world_init(&w);
        world_map(&w, 0, 512, VMA_OK, false);
        world_set(&w, 0, 10, true);
        world_set(&w, 10, 20, false);
        world_set(&w, 20, 30, true);
        assert_null(broken(&w, &plan));

        w.rules.vmas_max = 3;
        assert_string_equal(broken(&w, &plan), "too many mappings");
        w.rules.vmas_max = 16000;

        w.blocks[0].huge = true;
        assert_string_equal(broken(&w, &plan), "a huge page is touched");
        w.blocks[0].huge = false;

        two[0].end = BASE + 20 * PAGE_BYTES;
        assert_string_equal(broken(&w, &plan), "adjacent ranges within a mapping");
        two[0].end = BASE + 9 * PAGE_BYTES;
        plan.pages_marked = 19;
        assert_string_equal(broken(&w, &plan), "wanted pages are unaccounted for");
        plan.pages_left_budget = 1;
        assert_string_equal(broken(&w, &plan), "left out without need");
        plan.pages_left_budget = 0;

        two[0].end = BASE + 30 * PAGE_BYTES;
        plan.n = 1;
        plan.pages_marked = 30;
        assert_string_equal(broken(&w, &plan), "dearer than marking each run");
        w.mappings[0].end = BASE + 15 * PAGE_BYTES;
        assert_string_equal(broken(&w, &plan), "a range leaves its mapping");
}

static void check(const World *w, size_t n, uint64_t marked) {
        _cleanup_(plan_done) Plan plan = {};

        assert_int_equal(plan_make(&w->space, &w->vmas, &w->rules, &plan), 0);
        assert_null(broken(w, &plan));
        assert_int_equal(plan.n, n);
        assert_int_equal(plan.pages_marked, marked);
}

/* Pages that are not there are bridged, a unique one is not. */
static void test_gaps(void **unused) {
        static World w;

        world_init(&w);
        world_map(&w, 0, 1024, VMA_OK, false);
        world_set(&w, 100, 110, true);
        world_set(&w, 115, 120, true);
        check(&w, 1, 20);
        world_set(&w, 112, 113, false);
        check(&w, 2, 15);
        world_set(&w, 300, 301, true);
        check(&w, 3, 16);

        world_set(&w, 302, 304, true);
        world_set(&w, 301, 302, false);
        check(&w, 4, 18);
}

/* A single unique page is bridged where a mapping more is in the way of thousands of pages, two never are. The plan stays
 * when they are merged. */
static void test_gaps_of_many(void **unused) {
        static World w;

        world_init(&w);
        world_map(&w, 0, 1024, VMA_OK, false);
        world_map(&w, 1024, N_PAGES, VMA_OK, false);
        world_set(&w, 100, 110, true);
        world_set(&w, 110, 111, false);
        world_set(&w, 111, 120, true);
        world_set(&w, 120, 122, false);
        world_set(&w, 122, 130, true);
        check(&w, 3, 27);
        world_set(&w, 1024, N_PAGES, true);
        check(&w, 3, 28 + N_PAGES - 1024);
        for (unsigned i = 0; i < N_BLOCKS; i++) {
                memcpy(w.blocks[i].merged, w.blocks[i].twin, sizeof w.blocks[i].twin);
                memset(w.blocks[i].twin, 0, sizeof w.blocks[i].twin);
        }
        check(&w, 3, 28 + N_PAGES - 1024);
}

/* Mappings that only our marks split are planned like the one they were: the marks stay, what is new joins them. */
static void test_replanning(void **unused) {
        static World w;

        world_init(&w);
        world_set(&w, 0, 512, false);
        world_set(&w, 100, 110, true);
        world_set(&w, 110, 120, true);
        world_map(&w, 0, 100, VMA_OK, false);
        world_map(&w, 100, 110, VMA_OK, true);
        world_map(&w, 110, 512, VMA_OK, false);
        w.rules.vmas_now = w.rules.vmas_max = 3;
        check(&w, 1, 10);
        w.rules.vmas_max = 4;
        check(&w, 2, 20);
        w.rules.minimum_run_pages = 15;
        check(&w, 2, 20);
        w.mappings[1].mergeable = false;
        check(&w, 0, 0);
}

/* Too few mappings: the narrow gap is bridged, the far single page is left out, a wide gap is not worth a page. */
static void test_budget(void **unused) {
        static World w;
        _cleanup_(plan_done) Plan plan = {};

        world_init(&w);
        world_map(&w, 0, 2048, VMA_OK, false);
        world_set(&w, 0, 2048, false);
        world_set(&w, 100, 150, true);
        world_set(&w, 155, 200, true);
        world_set(&w, 1000, 1001, true);
        check(&w, 3, 96);
        w.rules.vmas_max = 5;
        check(&w, 2, 101);
        w.rules.vmas_max = 3;
        assert_int_equal(plan_make(&w.space, &w.vmas, &w.rules, &plan), 0);
        assert_null(broken(&w, &plan));
        assert_int_equal(plan.n, 1);
        assert_int_equal(plan.pages_left_budget, 1);
        w.rules.vmas_max = 1; /* all of it is worth 95 pages and holds 1,952 others */
        check(&w, 0, 0);
}

/* Runs that were too short for themselves are taken when the gap they lie in is bridged. */
static void test_budget_takes_short(void **unused) {
        static World w;
        _cleanup_(plan_done) Plan plan = {};

        world_init(&w);
        world_map(&w, 0, 512, VMA_OK, false);
        world_set(&w, 0, 512, false);
        world_set(&w, 100, 150, true);
        world_set(&w, 152, 153, true);
        world_set(&w, 155, 200, true);
        w.rules.minimum_run_pages = 4;
        check(&w, 2, 95);
        w.rules.vmas_max = 3;
        assert_int_equal(plan_make(&w.space, &w.vmas, &w.rules, &plan), 0);
        assert_null(broken(&w, &plan));
        assert_int_equal(plan.n, 1);
        assert_int_equal(plan.pages_left_run, 0);
}

static void test_huge(void **unused) {
        static World w;
        _cleanup_(plan_done) Plan plan = {};

        world_init(&w);
        world_map(&w, 0, 1536, VMA_OK, false);
        world_set(&w, 0, 1536, false);
        world_set(&w, 510, 512 + 127, true);
        w.blocks[1].huge = true;
        w.rules.huge_page_split = 2500;
        assert_int_equal(plan_make(&w.space, &w.vmas, &w.rules, &plan), 0);
        assert_int_equal(plan.pages_left_huge, 127);
        assert_int_equal(plan.pages_marked, 2);
        world_set(&w, 900, 901, true);
        check(&w, 2, 130);
        w.mappings[0].mergeable = true;
        w.rules.huge_page_split = 10000;
        check(&w, 2, 130);
}

/* The main thread's stack stays in one piece, unless it is mergeable as it is. */
static void test_stack(void **unused) {
        static World w;
        _cleanup_(plan_done) Plan plan = {};

        world_init(&w);
        world_map(&w, 0, 1024, VMA_OK, false);
        world_set(&w, 0, 1024, false);
        world_set(&w, 3, 30, true);
        w.mappings[0].growsdown = true;
        assert_int_equal(plan_make(&w.space, &w.vmas, &w.rules, &plan), 0);
        assert_int_equal(plan.n, 0);
        assert_int_equal(plan.pages_wanted, 27);
        assert_int_equal(plan.pages_left_stack, 27);
        w.mappings[0].mergeable = true;
        check(&w, 1, 27);
}

/* What KSM made the zero page keeps its mark; elsewhere the zero page is nothing to merge. */
static void test_zeropage(void **unused) {
        static World w;

        world_init(&w);
        world_map(&w, 0, 512, VMA_OK, false);
        page_set_add(w.blocks[0].zeropage, 100);
        check(&w, 0, 0);
        w.mappings[0].start += 100 * PAGE_BYTES;
        w.mappings[0].end = w.mappings[0].start + PAGE_BYTES;
        check(&w, 0, 0);
        w.mappings[0].mergeable = true;
        check(&w, 1, 1);
}

static void test_nothing(void **unused) {
        static World w;

        world_init(&w);
        check(&w, 0, 0);
        world_map(&w, 0, 512, VMA_OK, false);
        check(&w, 0, 0);
        world_set(&w, 0, 512, true);
        w.mappings[0].skip = VMA_SKIP_DONTDUMP;
        check(&w, 0, 0);
        w.mappings[0].skip = VMA_OK;
        check(&w, 1, 512);
}

int main(void) {
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(test_promises), cmocka_unit_test(test_check_can_fail),
                cmocka_unit_test(test_gaps), cmocka_unit_test(test_gaps_of_many), cmocka_unit_test(test_replanning),
                cmocka_unit_test(test_budget), cmocka_unit_test(test_budget_takes_short),
                cmocka_unit_test(test_huge), cmocka_unit_test(test_stack),
                cmocka_unit_test(test_zeropage), cmocka_unit_test(test_nothing),
        };
        return cmocka_run_group_tests(tests, NULL, NULL);
}
