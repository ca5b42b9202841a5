/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Judgement, held against a model that keeps everything of each page by itself, and against what it is for.
 */
#include "merge/judge.h"

#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>

static uint64_t seed;

static uint64_t next(void) {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        return seed;
}

typedef struct Fixture {
        BlockTable table;
        Space space;
        Block *block;
} Fixture;

static void begin(Fixture *f) {
        memset(f, 0, sizeof *f);
        f->space.table = &f->table;
        assert_int_equal(block_new(&f->table, &f->space, 0x40000000, &f->block), 0);
}

static void end(Fixture *f) {
        block_free(&f->table, f->block);
        block_table_done(&f->table);
}

typedef struct ModelPage {
        bool merged, alone;
        unsigned since;         /* the turn it was merged in */
        unsigned level, until;
        bool forgiven;          /* for the merge that stands */
} ModelPage;

typedef struct Model {
        ModelPage pages[BLOCK_PAGES];
        unsigned turn;
        uint32_t merges, breaks, losses;
} Model;

static void model_break(Model *m, ModelPage *p, bool judging) {
        m->breaks++;
        if (p->merged && m->turn - p->since <= 1) {
                m->losses++;
                if (judging) {
                        p->level += p->level < JUDGE_LEVEL_MAX;
                        p->until = m->turn + (1U << p->level);
                        p->alone = true;
                }
        }
        p->merged = false;
}

static void model_merge(Model *m, ModelPage *p) {
        m->merges++;
        p->merged = true;
        p->since = m->turn;
        p->forgiven = false;
}

static void model_turn(Model *m, bool judging) {
        m->turn++;
        for (unsigned i = 0; i < BLOCK_PAGES; i++) {
                ModelPage *p = &m->pages[i];

                if (p->merged && !p->forgiven && m->turn - p->since >= 2) {
                        p->level /= 2;
                        p->forgiven = true;
                }
                if (p->alone && (!judging || m->turn >= p->until))
                        p->alone = false;
        }
}

static void check_same(const Model *m, const Block *block) {
        JudgeCounts counts = { 0 };
        unsigned alone = 0;

        for (unsigned i = 0; i < BLOCK_PAGES; i++) {
                const ModelPage *p = &m->pages[i];

                alone += p->alone;
                assert_int_equal(page_set_has(block->alone, i), p->alone);
                if (!block->judge)
                        continue;
                assert_int_equal(page_set_has(block->judge->merged, i), p->merged);
                if (block->judge->has_terms)
                        assert_int_equal(block->judge->terms[i].level, p->level);
                else
                        assert_int_equal(p->level, 0);
                if (p->alone) /* nothing is known of it */
                        assert_false(page_set_has(block->hashed, i) || page_set_has(block->twin, i));
        }
        judge_count(block, (uint16_t)m->turn, &counts);
        assert_int_equal(counts.alone, alone);
        assert_int_equal(counts.merges, m->merges);
        assert_int_equal(counts.breaks, m->breaks);
        assert_int_equal(counts.losses, m->losses);
}

/* Looks, breaks between looks and turns in any order come to what each page by itself comes to. */
static void test_model(void **state) {
        for (unsigned round = 0; round < 30; round++) {
                static Model m;
                Fixture f;
                bool judging = round % 5 != 4;

                memset(&m, 0, sizeof m);
                m.turn = round % 3 == 0 ? 65000 : 7; /* turns wrap */
                seed = round + 1;
                begin(&f);
                for (unsigned step = 0; step < 400; step++) {
                        PageSet looked = { 0 }, merged = { 0 }, broken = { 0 };
                        unsigned what = (unsigned)(next() % 8);

                        memset(f.block->hashed, 0xff, sizeof f.block->hashed);
                        for (unsigned i = 0; i < BLOCK_PAGES / 64; i++)
                                f.block->hashed[i] &= ~f.block->alone[i];
                        if (what == 0) {
                                model_turn(&m, judging);
                                (void)judge_turn(f.block, (uint16_t)m.turn, judging);
                        } else if (what < 3) {
                                for (unsigned i = 0; i < BLOCK_PAGES; i++)
                                        if (m.pages[i].merged && next() % 4 == 0) {
                                                page_set_add(broken, i);
                                                model_break(&m, &m.pages[i], judging);
                                        }
                                assert_true(judge_broken(f.block, (uint16_t)m.turn, broken, judging) >= 0);
                        } else {
                                for (unsigned i = 0; i < BLOCK_PAGES; i++) {
                                        ModelPage *p = &m.pages[i];
                                        unsigned fate = (unsigned)(next() % 8);

                                        if (next() % 4 == 0)
                                                continue;
                                        page_set_add(looked, i);
                                        if (p->merged && fate == 0) {
                                                page_set_add(broken, i);
                                                model_break(&m, p, judging);
                                        } else if (p->merged && fate == 1)
                                                p->merged = false; /* it went away */
                                        else if (p->merged)
                                                page_set_add(merged, i);
                                        else if (fate < 3) {
                                                page_set_add(merged, i);
                                                model_merge(&m, p);
                                        }
                                }
                                assert_true(judge_look(f.block, (uint16_t)m.turn, looked, merged, broken, judging) >= 0);
                        }
                        check_same(&m, f.block);
                }
                end(&f);
        }
}

/* A page that is written in every turn, and merged whenever it may be, breaks ever more seldom. */
static void test_hot_page(void **state) {
        PageSet page = { 0 }, none = { 0 };
        Fixture f;
        unsigned breaks[2] = { 0 };

        page_set_add(page, 77);
        for (unsigned judging = 0; judging < 2; judging++) {
                begin(&f);
                for (unsigned turn = 1; turn <= 1000; turn++) {
                        (void)judge_turn(f.block, (uint16_t)turn, judging);
                        if (page_set_has(f.block->alone, 77))
                                continue;
                        assert_int_equal(judge_look(f.block, (uint16_t)turn, page, page, none, judging), 0);
                        assert_int_equal(judge_broken(f.block, (uint16_t)turn, page, judging), 1);
                        breaks[judging]++;
                }
                end(&f);
        }
        assert_int_equal(breaks[0], 1000);
        assert_in_range(breaks[1], 7, 7 + 1000 / 128);
}

/* Whoever stands for two turns is never left alone; what was held against it is forgotten. */
static void test_pays(void **state) {
        PageSet page = { 0 }, none = { 0 };
        Fixture f;
        unsigned turn = 1;

        page_set_add(page, 3);
        begin(&f);
        for (unsigned i = 0; i < 3; i++) { /* losses first */
                do
                        (void)judge_turn(f.block, (uint16_t)++turn, true);
                while (page_set_has(f.block->alone, 3));
                assert_int_equal(judge_look(f.block, (uint16_t)turn, page, page, none, true), 0);
                assert_int_equal(judge_broken(f.block, (uint16_t)turn, page, true), 1);
        }
        assert_int_equal(f.block->judge->terms[3].level, 3);
        for (unsigned i = 0; i < 20; i++) {
                do
                        (void)judge_turn(f.block, (uint16_t)++turn, true);
                while (page_set_has(f.block->alone, 3));
                assert_int_equal(judge_look(f.block, (uint16_t)turn, page, page, none, true), 0);
                for (unsigned k = 0; k < 2; k++)
                        (void)judge_turn(f.block, (uint16_t)++turn, true);
                assert_int_equal(judge_broken(f.block, (uint16_t)turn, page, true), 0);
                assert_false(page_set_has(f.block->alone, 3));
        }
        assert_int_equal(f.block->judge->terms[3].level, 0);
        end(&f);
}

/* Let go, a page is to be read, since nothing is known of it; switched off, everybody is let go. */
static void test_let_go(void **state) {
        PageSet page = { 0 }, none = { 0 };
        Fixture f;

        page_set_add(page, 500);
        begin(&f);
        memset(f.block->hashed, 0xff, sizeof f.block->hashed);
        memset(f.block->twin, 0xff, sizeof f.block->twin);
        assert_int_equal(judge_look(f.block, 9, page, page, none, true), 0);
        assert_int_equal(judge_broken(f.block, 9, page, true), 1);
        assert_false(page_set_has(f.block->hashed, 500) || page_set_has(f.block->twin, 500));
        assert_true(page_set_has(f.block->hashed, 499) && page_set_has(f.block->twin, 499));
        assert_int_equal(judge_turn(f.block, 10, true), 0);
        assert_false(f.block->recheck);
        assert_int_equal(judge_turn(f.block, 10, false), 1);
        assert_true(f.block->recheck && f.block->unsettled && page_set_has(f.block->changed, 500));
        assert_false(page_set_any(f.block->alone));
        end(&f);
}

static void test_memory_is_accounted(void **state) {
        PageSet page = { 0 }, none = { 0 };
        uint64_t before;
        Fixture f;

        page_set_add(page, 1);
        begin(&f);
        before = f.table.bytes;
        assert_int_equal(judge_look(f.block, 1, none, none, none, true), 0);
        assert_null(f.block->judge);
        assert_int_equal(judge_look(f.block, 1, page, page, none, true), 0);
        assert_true(f.table.bytes - before >= sizeof(JudgeRecord) && f.table.bytes - before < 512);
        assert_int_equal(judge_broken(f.block, 1, page, true), 1);
        assert_true(f.table.bytes - before >= sizeof(JudgeRecord) + BLOCK_PAGES * sizeof(JudgeTerm));
        end(&f);
}

/* The budget's share is what was noted within the last ten seconds, at its price. */
static void test_budget(void **state) {
        JudgeBudget budget = { 0 }, dear = { .break_nsec = 70000, .flush_nsec = 50000 };
        uint64_t breaks[100] = { 0 }, total = 5000;

        seed = 4711;
        for (unsigned second = 0; second < 100; second++) {
                uint64_t now = (1000 + second) * NSEC_PER_SEC + next() % NSEC_PER_SEC, sum = 0;

                judge_budget_note(&budget, now, total, 0, 10000, 100); /* what was before we began does not count */
                if (second % 7 < 4)
                        breaks[second] = next() % 5000;
                total += breaks[second];
                judge_budget_note(&budget, now, total, 0, 10000, 100);
                for (unsigned s = second < 9 ? 0 : second - 9; s <= second; s++)
                        sum += breaks[s] * JUDGE_BREAK_NSEC;
                assert_int_equal(judge_budget_share(&budget, now), sum * 10000 / (10 * NSEC_PER_SEC));
                if (second % 13 == 0)
                        assert_int_equal(judge_budget_share(&budget, now + 20 * NSEC_PER_SEC), 0);
        }
        judge_budget_note(&budget, 5000 * NSEC_PER_SEC, total, 1000000, 10000, 100);
        assert_int_equal(judge_budget_share(&budget, 5000 * NSEC_PER_SEC), 2000);

        /* At the prices of another machine. */
        judge_budget_note(&dear, NSEC_PER_SEC, 10, 20, 10000, 100);
        judge_budget_note(&dear, NSEC_PER_SEC, 10 + 1000, 20 + 100, 10000, 100);
        assert_int_equal(judge_budget_share(&dear, NSEC_PER_SEC), (1000 * 70 + 100 * 50) / 1000);

        /* Flushes cost whom they interrupt: nobody runs; half the time; three threads, taken for one. */
        judge_budget_note(&dear, 100 * NSEC_PER_SEC, 1010, 120 + 1000, 0, 100);
        assert_int_equal(judge_budget_share(&dear, 100 * NSEC_PER_SEC), 0);
        judge_budget_note(&dear, 100 * NSEC_PER_SEC, 1010, 120 + 2000, 5000, 100);
        assert_int_equal(judge_budget_share(&dear, 100 * NSEC_PER_SEC), 25);
        judge_budget_note(&dear, 100 * NSEC_PER_SEC, 1010, 120 + 3000, 30000, 100);
        assert_int_equal(judge_budget_share(&dear, 100 * NSEC_PER_SEC), 75);
}

static uint64_t wait(JudgeBudget *budget, uint64_t now, uint64_t breaks) {
        judge_budget_note(budget, now, breaks, 0, 0, 100);
        return judge_budget_wait_nsec(budget, 100);
}

/* At 1 %, and 1 ms a break: what a second gives at once, which is ten, then in portions of two as many a second, however
 * much is asked for; what was not used is kept no longer; what was broken beyond it is owed, for ten seconds. */
static void test_pace(void **state) {
        JudgeBudget budget = { .break_nsec = NSEC_PER_MSEC };
        uint64_t now = 1000 * NSEC_PER_SEC, breaks = 77, before;

        assert_int_equal(judge_budget_wait_nsec(&budget, 100), 0); /* nobody has said anything yet */
        assert_int_equal(wait(&budget, now, breaks), 0);
        assert_int_equal(wait(&budget, now, breaks += 9), 0);
        assert_in_range(wait(&budget, now, breaks += 1), 199 * NSEC_PER_MSEC, 201 * NSEC_PER_MSEC);
        /* A portion is saved up before more is spent. */
        assert_in_range(wait(&budget, now += 150 * NSEC_PER_MSEC, breaks), 49 * NSEC_PER_MSEC, 51 * NSEC_PER_MSEC);
        assert_int_equal(wait(&budget, now += 51 * NSEC_PER_MSEC, breaks), 0);

        before = breaks;
        for (uint64_t end = now + 100 * NSEC_PER_SEC; now < end; now += 2 * NSEC_PER_MSEC)
                if (wait(&budget, now, breaks) == 0)
                        breaks++;
        assert_in_range(breaks - before, 990, 1010);

        assert_int_equal(wait(&budget, now += 3600 * NSEC_PER_SEC, breaks), 0);
        assert_int_equal(wait(&budget, now, breaks += 9), 0);
        assert_in_range(wait(&budget, now, breaks += 1), 1, NSEC_PER_SEC);
        assert_in_range(wait(&budget, now, breaks += 1000000), 10 * NSEC_PER_SEC, 11 * NSEC_PER_SEC);
        assert_in_range(wait(&budget, now += 10 * NSEC_PER_SEC, breaks), 1, NSEC_PER_SEC);
        assert_int_equal(wait(&budget, now += NSEC_PER_SEC, breaks), 0);
        /* A clock that stepped back is one that stood. */
        assert_int_equal(wait(&budget, now - NSEC_PER_SEC, breaks), 0);
}

int main(void) {
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(test_model),
                cmocka_unit_test(test_hot_page),
                cmocka_unit_test(test_pays),
                cmocka_unit_test(test_let_go),
                cmocka_unit_test(test_memory_is_accounted),
                cmocka_unit_test(test_budget),
                cmocka_unit_test(test_pace),
        };
        return cmocka_run_group_tests(tests, NULL, NULL);
}
