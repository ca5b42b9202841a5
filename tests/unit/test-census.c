/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What the census makes of frames, on pagemaps written by hand: above all of processes that were forked from one another.
 * A process is a file in place of its pagemap; frames from KSM on are KSM's, one is the zero page (--wrap).
 */
#include "scan/census.h"
#include "scan/pagemap.h"
#include "tests/test.h"

#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>

#include <sys/mman.h>

#define PROCESSES 5U
#define KSM 1000U
#define ZERO 999U
#define KIN 4711U
#define ADDR (8 * BLOCK_BYTES)

typedef struct Process {
        Target target;
        Space space;
} Process;

static BlockTable table;
static Process processes[PROCESSES];
static CensusNotes notes;

int __wrap_scanner_page_flags(const Scanner *scanner, uint64_t pfn, unsigned n, uint64_t *ret);
int __wrap_scanner_page_flags(const Scanner *scanner, uint64_t pfn, unsigned n, uint64_t *ret) {
        for (unsigned i = 0; i < n; i++)
                ret[i] = pfn + i == ZERO ? KPAGEFLAGS_ZERO_PAGE : pfn + i >= KSM ? KPAGEFLAGS_KSM : 0;
        return 0;
}

static int setup(void **state) {
        uint64_t addr = ADDR;

        table = (BlockTable){ 0 };
        notes = (CensusNotes){ 0 };
        for (unsigned i = 0; i < PROCESSES; i++) {
                Process *p = &processes[i];

                p->target = (Target){ .pagemapfd = memfd_create("pagemap", MFD_CLOEXEC) };
                assert_true(p->target.pagemapfd >= 0);
                assert_int_equal(ftruncate(p->target.pagemapfd, 2 * ADDR / PAGE_BYTES * 8), 0);
                p->space = (Space){ .target = &p->target, .table = &table };
                assert_int_equal(space_add(&p->space, &addr, 1), 0);
        }
        return 0;
}

static int teardown(void **state) {
        for (unsigned i = 0; i < PROCESSES; i++) {
                close(processes[i].target.pagemapfd);
                space_done(&processes[i].space);
        }
        block_table_done(&table);
        census_notes_done(&notes);
        return 0;
}

/* frame 0: nothing is there. alone: nobody else maps it. */
static void map(unsigned process, unsigned page, uint64_t frame, bool alone) {
        uint64_t entry = frame ? PAGEMAP_PRESENT | frame | (alone ? PAGEMAP_EXCLUSIVE : 0) : 0;

        assert_int_equal(pwrite(processes[process].target.pagemapfd, &entry, 8,
                                (off_t)((ADDR / PAGE_BYTES + page) * 8)), 8);
}

static CensusPart part_of(unsigned process, uint64_t kin) {
        return (CensusPart){ .target = &processes[process].target, .notes = &notes,
                             .space = &processes[process].space, .kin = kin };
}

/* All processes: related, or not. */
static Census census(unsigned n, uint64_t kin) {
        _cleanup_(census_frames_freep) CensusFrames *frames = NULL;
        Census sum = { 0 };

        assert_int_equal(census_frames_new(NULL, &frames), 0);
        for (unsigned i = 0; i < n; i++) {
                CensusPart part = part_of(i, kin);

                assert_int_equal(census_add(frames, &part, ADDR, ADDR + 64 * PAGE_BYTES, &sum, NULL, NULL), 0);
        }
        return sum;
}

/* Right before a burst. */
static void note(unsigned n) {
        _cleanup_(census_frames_freep) CensusFrames *frames = NULL;

        assert_int_equal(census_frames_new(NULL, &frames), 0);
        census_notes_begin(&notes);
        for (unsigned i = 0; i < n; i++) {
                CensusPart part = part_of(i, KIN);

                assert_int_equal(census_note(frames, &notes, &part, ADDR, ADDR + 64 * PAGE_BYTES), 0);
        }
}

/* What is reported as saved. */
static int64_t saved(const Census *c) {
        return (int64_t)(c->ksm_unmerged - c->ksm_frames + c->given_unmerged) - c->lagging;
}

static void test_strangers(void **state) {
        Census c;

        map(0, 0, KSM, false);
        map(0, 1, KSM, false);
        map(1, 0, KSM, false);
        map(1, 5, KSM + 1, true); /* nobody shares it any more */
        map(1, 6, 7, true);
        c = census(2, 0);
        assert_int_equal(c.ksm_mappings, 3);
        assert_int_equal(c.ksm_frames, 1);
        assert_int_equal(c.pages, 5);
        assert_int_equal(saved(&c), 2);
}

/* Parent and three children; one child wrote, and put it back. */
static void test_relatives(void **state) {
        Census c;

        for (unsigned i = 0; i < 3; i++)
                map(i, 0, 10, false);
        map(3, 0, 11, true);
        c = census(4, KIN);
        assert_int_equal(saved(&c), 0);
        note(4);
        for (unsigned i = 0; i < 4; i++)
                map(i, 0, KSM, false);
        c = census(4, KIN);
        assert_int_equal(c.ksm_mappings, 4);
        assert_int_equal(saved(&c), 1); /* two frames became one */

        /* One more is born with it. */
        map(4, 0, KSM, false);
        c = census(5, KIN);
        assert_int_equal(saved(&c), 1);
        /* It writes, puts it back, and is merged again. */
        map(4, 0, 12, true);
        note(5);
        map(4, 0, KSM, false);
        c = census(5, KIN);
        assert_int_equal(saved(&c), 2);
        /* Unrelated, each would have one of his own. */
        c = census(5, 0);
        assert_int_equal(saved(&c), 4);
}

/* They leave the frame one after the other: it becomes free with the last, who looks as if he had it to himself. */
static void test_one_by_one(void **state) {
        Census c;

        for (unsigned i = 0; i < 3; i++)
                map(i, 0, 10, false);
        map(3, 0, 11, true);
        note(4);
        note(4); /* a burst that did nothing */
        map(0, 0, KSM, false);
        map(3, 0, KSM, false);
        c = census(4, KIN);
        assert_int_equal(saved(&c), 0); /* 10 and 11 were, 10 and KSM are */
        note(4);
        map(1, 0, KSM, false);
        map(2, 0, 10, true);
        c = census(4, KIN);
        assert_int_equal(saved(&c), 0);
        note(4);
        map(2, 0, KSM, false);
        c = census(4, KIN);
        assert_int_equal(saved(&c), 1);
        assert_int_equal(c.lagging, 0);
}

/* Merged by an earlier daemon: nothing was noted. */
static void test_nothing_noted(void **state) {
        Census c;

        for (unsigned i = 0; i < 3; i++) {
                map(i, 0, KSM, false);
                map(i, 9, KSM, false);
                map(i, 5, KSM + 1, false); /* shared by fork alone */
        }
        c = census(3, KIN);
        assert_int_equal(c.ksm_mappings, 9);
        assert_int_equal(saved(&c), 1);
        c = census(1, 0); /* the others have ended */
        assert_int_equal(c.ksm_mappings, 3);
}

static void test_zero(void **state) {
        Block *block = processes[0].space.blocks[0];
        Census c;

        map(0, 0, 20, false);
        map(1, 0, 20, false);
        map(2, 0, 21, true);
        map(0, 1, ZERO, false); /* read and never written */
        page_set_add(block->zeropage, 1);
        note(3);
        for (unsigned i = 0; i < 3; i++)
                map(i, 0, ZERO, false);
        page_set_add(block->given, 0);
        c = census(3, KIN);
        assert_int_equal(c.zeropage, 4);
        assert_int_equal(c.given, 3);
        assert_int_equal(saved(&c), 2);
}

/* Frames that nobody was met on for long are forgotten: their numbers will mean others. */
static void test_forgotten(void **state) {
        map(0, 0, 10, false);
        map(1, 0, 10, false);
        note(2);
        map(0, 0, 0, false);
        map(1, 0, 0, false);
        assert_non_null(frame_map_find(&notes.frames, 10));
        for (unsigned i = 0; i < 200; i++)
                note(2);
        assert_null(frame_map_find(&notes.frames, 10));
}

#define TEST(f) cmocka_unit_test_setup_teardown(f, setup, teardown)

int main(void) {
        const struct CMUnitTest tests[] = {
                TEST(test_strangers),     TEST(test_relatives), TEST(test_one_by_one),
                TEST(test_nothing_noted), TEST(test_zero),      TEST(test_forgotten),
        };

        return cmocka_run_group_tests(tests, NULL, NULL);
}
