/* SPDX-License-Identifier: LGPL-2.1-or-later */

/* When a member is planned, and what is expected of a burst: the second half of a pass over members whose pages the test makes
 * up. Plans are real ones; the calls that would carry them out are the test's. */

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "daemon/marking.c"
#include "tests/test.h"

#define N_BLOCKS 160U
#define BASE (64 * BLOCK_BYTES)
#define EMPTY_PASSES 8U

/* Calls of the others: how often, and what they say. */
static struct {
        unsigned applied, given;
        int result;
        AdviseResult says;
} calls;

int __wrap_advise_apply(Advise *advise, Target *target, const Plan *plan, Marks *marks, StopPause pause, void *userdata,
                        AdviseResult *ret);
bool __wrap_target_image_replaced(const Target *target);

int __wrap_advise_apply(Advise *advise, Target *target, const Plan *plan, Marks *marks, StopPause pause, void *userdata,
                        AdviseResult *ret) {
        calls.applied++;
        *ret = calls.says;
        if (calls.result != 0)
                return calls.result;
        ranges_done(&marks->ours);
        for (size_t i = 0; i < plan->n; i++)
                assert_int_equal(ranges_append(&marks->ours, plan->ranges[i].start, plan->ranges[i].end), 0);
        return calls.result;
}

bool __wrap_target_image_replaced(const Target *target) { return false; }
int manager_refresh_vmas(Member *member) { return 0; }
bool manager_takes_part(Manager *m, Member *member) { return member_may_be_read(member); }
int pass_judge_huge(Pass *pass, Member *member, const PlanRules *rules) { return 0; }
void pass_open_huge(Member *member) { }
void manager_note_remote_error(Manager *m, Member *member, int error) { member->skip = TARGET_SKIP_UNCALLABLE; }
void visit_end(const Visit *visit) { }
bool visit_pause(void *visit) { return false; }
Visit visit_begin(Manager *m, Member *member) { return (Visit){ .manager = m, .member = member }; }
bool manager_breathe(Manager *m, uint64_t nsec) { return false; }
void pass_judge_trust(Pass *pass) { }
int pass_leave_others(Pass *pass, Member *member) { return 0; }
int pass_remap(Pass *pass, Member *member) { return pass_give(pass, member); }

int pass_give(Pass *pass, Member *member) {
        calls.given++;
        ranges_done(&member->marks.ours);
        return 0;
}

/* A process of 320 MiB, so that a few pages have to wait. */
typedef struct World {
        Manager manager;
        Slot slot;
        Group group;
        Target target;
        Member member, *members[1];
        Block blocks[N_BLOCKS], *present[N_BLOCKS];
        Vma mapping;
} World;

static World world;

static World *world_new(void) {
        World *w = &world;

        ranges_done(&w->member.marks.ours);
        *w = (World){ .slot = { .route = CONF_ROUTE_ADVISE }, .group = { .slot = &w->slot, .minimum_run_pages = 1,
                                                                         .huge_page_split = 2500 } };
        memset(&calls, 0, sizeof calls);
        w->manager.kernel.max_map_count = 65536;
        w->mapping = (Vma){ .start = BASE, .end = BASE + N_BLOCKS * BLOCK_BYTES };
        for (unsigned i = 0; i < N_BLOCKS; i++) {
                w->blocks[i].addr = BASE + i * BLOCK_BYTES;
                w->blocks[i].pass = 1;
                memset(w->blocks[i].hashed, 0xff, sizeof(PageSet));
                w->present[i] = &w->blocks[i];
        }
        w->member = (Member){
                .group = &w->group, .target = &w->target, .marks_loaded = true, .touched = true,
                .space = { .blocks = w->present, .n = N_BLOCKS }, .vmas = { .vmas = &w->mapping, .n = 1 },
        };
        w->members[0] = &w->member;
        return w;
}

static void twins(Block *block, unsigned from, unsigned to) {
        for (unsigned page = from; page < to; page++) {
                page_set_add(block->twin, page);
                if (page % 2)
                        page_set_add(block->saves, page);
        }
}

/* As if it had been read: what had a twin there is merged. */
static void merge(Block *block) {
        memcpy(block->merged, block->twin, sizeof(PageSet));
        memset(block->twin, 0, sizeof(PageSet));
        memset(block->saves, 0, sizeof(PageSet));
}

static void pass(World *w) {
        Pass pass = { .manager = &w->manager, .members = w->members, .n_members = 1 };

        assert_int_equal(pass_mark(&pass), 0);
}

static void learn(World *w) {
        w->member.touched = true;
        pass(w);
}

/* A huge page that is left whole holds more wanted pages than all the rest saves. */
static void test_expected(void **unused) {
        World *w = world_new();

        for (unsigned i = 0; i < 10; i++) {
                w->blocks[i].huge = true;
                twins(&w->blocks[i], 0, 100);
        }
        twins(&w->blocks[20], 100, 300);
        pass(w);
        assert_int_equal(calls.applied, 1);
        assert_int_equal(w->member.counts.left_huge, 1000);
        assert_int_equal(w->member.counts.expected, 100);
        merge(&w->blocks[20]);
        learn(w);
        assert_int_equal(w->member.counts.expected, 0);
}

/* Passes that plan nothing expect no more than the last plan has marked, and no less. */
static void test_expected_without_plan(void **unused) {
        World *w = world_new();

        w->blocks[0].huge = true;
        twins(&w->blocks[0], 0, 40);
        twins(&w->blocks[20], 100, 200);
        pass(w);
        assert_int_equal(w->member.counts.expected, 50);
        memset(w->blocks[20].saves, 0, sizeof(PageSet));
        memset(w->blocks[20].twin, 0, sizeof(PageSet));
        twins(&w->blocks[20], 100, 110); /* the others were written to */
        learn(w);
        assert_int_equal(w->member.counts.expected, 5);
        merge(&w->blocks[20]);
        for (unsigned i = 1; i < EMPTY_PASSES; i++) {
                learn(w);
                assert_int_equal(w->member.counts.expected, 0);
        }
        twins(&w->blocks[30], 0, 10); /* not marked yet */
        calls.applied = 0;
        while (calls.applied == 0) {
                assert_int_equal(w->member.counts.expected, 0);
                pass(w);
        }
        assert_int_equal(w->member.counts.expected, 5);
        pass(w);
        assert_int_equal(w->member.counts.expected, 5);
}

/* In memory that the process has marked itself, which no plan of ours has to. */
static void test_expected_of_its_own(void **unused) {
        World *w = world_new();

        twins(&w->blocks[20], 0, 100);
        w->member.marks.marks_itself = w->mapping.mergeable = true;
        calls.result = REMOTE_E_BUSY;
        pass(w);
        assert_int_equal(w->member.counts.expected, 50);
}

/* Nothing was carried out of what could not be. */
static void test_expected_of_who_is_busy(void **unused) {
        World *w = world_new();

        twins(&w->blocks[0], 0, 100);
        calls.result = REMOTE_E_BUSY;
        pass(w);
        assert_true(calls.applied == 1 && w->member.plan_again);
        assert_int_equal(w->member.counts.expected, 0);
}

/* In a process of which nothing is wanted. */
static void test_unmarked_at_once(void **unused) {
        World *w = world_new();

        assert_int_equal(ranges_append(&w->member.marks.ours, BASE, BASE + BLOCK_BYTES), 0);
        pass(w);
        assert_int_equal(calls.applied, 0);
        w->member.unmark = true;
        calls.says.unfinished = calls.says.unmark_left = true;
        pass(w);
        assert_int_equal(calls.applied, 1);
        assert_int_equal(ranges_append(&w->member.marks.ours, BASE, BASE + BLOCK_BYTES), 0);
        calls.says.unfinished = calls.says.unmark_left = false;
        pass(w); /* it was not all unmarked */
        pass(w);
        assert_int_equal(calls.applied, 2);
        /* Nor is it asked for for ever where nothing is marked. */
        w->member.unmark = true;
        ranges_done(&w->member.marks.ours);
        pass(w);
        assert_true(calls.applied == 2 && !w->member.unmark && !w->member.plan_again);
}

/* What is wanted no more is unmarked after several plans, and these come. */
static void test_idle_is_not_forgotten(void **unused) {
        World *w = world_new();

        assert_int_equal(ranges_append(&w->member.marks.ours, BASE, BASE + BLOCK_BYTES), 0);
        w->member.plan_again = true;
        for (unsigned i = 0; i < PLAN_PATIENCE; i++)
                pass(w);
        assert_int_equal(calls.applied, 1);
}

static void test_born_with_marks(void **unused) {
        World *w = world_new();

        w->slot.route = CONF_ROUTE_ZERO;
        assert_int_equal(ranges_append(&w->member.marks.ours, BASE, BASE + BLOCK_BYTES), 0);
        pass(w);
        assert_int_equal(calls.given, 1);
        learn(w);
        assert_int_equal(calls.given, 1);
}

/* What was learnt is not lost when nothing can come of it at the moment. */
static void test_not_carried_out(void **unused) {
        World *w = world_new();

        twins(&w->blocks[0], 0, 100);
        calls.result = -ENOSPC;
        pass(w);
        calls.result = 0;
        pass(w);
        assert_int_equal(calls.applied, 2);
        pass(w);
        assert_int_equal(calls.applied, 2);

        twins(&w->blocks[1], 0, 100);
        w->member.skip = TARGET_SKIP_FROZEN;
        learn(w);
        assert_int_equal(calls.applied, 2);
        assert_int_equal(w->member.counts.expected, 50); /* what was marked before is merged all the same */
        w->member.skip = TARGET_OK;
        pass(w);
        assert_int_equal(calls.applied, 3);
        assert_int_equal(w->member.counts.expected, 100);
}

int main(void) {
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(test_expected), cmocka_unit_test(test_expected_without_plan),
                cmocka_unit_test(test_expected_of_who_is_busy), cmocka_unit_test(test_expected_of_its_own), cmocka_unit_test(test_unmarked_at_once),
                cmocka_unit_test(test_idle_is_not_forgotten), cmocka_unit_test(test_born_with_marks),
                cmocka_unit_test(test_not_carried_out),
        };
        return cmocka_run_group_tests(tests, NULL, NULL);
}
