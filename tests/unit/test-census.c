/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What the census makes of frames, on pagemaps written by hand: above all of processes that were forked from one another.
 * A process is a file in place of its pagemap; frames from KSM on are KSM's, one is the zero page (--wrap).
 */
#include "scan/census.h"
#include "scan/kept.h"
#include "host/pagemap.h"
#include "base/io.h"
#include "target/origin.h"
#include "tests/test.h"

#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>

#include <fcntl.h>
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

/* One was merged, and had a zero page given back, before his child became known. */
static void test_relative_comes_late(void **state) {
        Census c;

        map(0, 0, KSM, false);
        map(0, 1, ZERO, false);
        c = census(1, 0);
        assert_int_equal(saved(&c), 1);
        map(1, 0, 10, true);
        map(1, 1, 11, true);
        note(2);
        map(1, 0, KSM, false);
        map(1, 1, ZERO, false);
        c = census(2, KIN);
        assert_int_equal(saved(&c), 3); /* four frames were, one is */
        map(2, 0, KSM, false); /* born with them */
        map(2, 1, ZERO, false);
        c = census(3, KIN);
        assert_int_equal(saved(&c), 3);
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

#define FILE_NAME "test-census.kept"

static KeptId id_of(unsigned process) { return (KeptId){ (uint64_t)getpid(), process, KIN }; }

/* One daemon ends, another begins: what is in blocks and notes is lost, but for what is told by the file. */
static void restart(bool told) {
        _cleanup_(kept_writer_done) KeptWriter writer = {};
        _cleanup_(kept_done) Kept kept = {};

        kept_add_notes(&writer, "domain", &notes);
        for (unsigned i = 0; i < PROCESSES; i++) {
                KeptId id = id_of(i);
                uint64_t addr = ADDR;
                Space *space = &processes[i].space;

                kept_add_space(&writer, &id, space);
                space_done(space);
                *space = (Space){ .target = &processes[i].target, .table = &table };
                assert_int_equal(space_add(space, &addr, 1), 0);
        }
        census_notes_done(&notes);
        notes = (CensusNotes){ 0 };
        assert_int_equal(kept_write(&writer, AT_FDCWD, FILE_NAME), 0);
        if (!told)
                return;
        assert_int_equal(kept_read(AT_FDCWD, FILE_NAME, &kept), 0);
        (void)kept_take_notes(&kept, "domain", &notes);
        assert_false(kept_take_notes(&kept, "domain", &notes));
        for (unsigned i = 0; i < PROCESSES; i++) {
                KeptId id = id_of(i);

                (void)kept_take_space(&kept, &id, &processes[i].space);
                assert_false(kept_take_space(&kept, &id, &processes[i].space));
        }
        unlink(FILE_NAME);
}

static void merge_drifted(void) {
        for (unsigned i = 0; i < 3; i++)
                map(i, 0, 10, false);
        map(3, 0, 11, true);
        for (unsigned i = 0; i < 4; i++)
                map(i, 1, 20 + i, true);
        note(4);
        for (unsigned i = 0; i < 4; i++)
                map(i, 1, KSM + 1, false);
}

/* The next daemon counts what this one would have gone on counting. */
static void test_restart(void **state) {
        Census c;

        merge_drifted();
        map(0, 0, KSM, false); /* some have left frame 10, some lie there still */
        map(3, 0, KSM, false);
        c = census(4, KIN);
        assert_int_equal(saved(&c), 3);
        restart(true);
        c = census(4, KIN);
        assert_int_equal(saved(&c), 3);
        note(4);
        map(1, 0, KSM, false);
        map(2, 0, KSM, false);
        c = census(4, KIN);
        assert_int_equal(saved(&c), 4);
        restart(true);
        restart(true);
        c = census(4, KIN);
        assert_int_equal(saved(&c), 4);
        restart(false); /* without the file nothing is known of four frames */
        c = census(4, KIN);
        assert_int_equal(saved(&c), 0);
        unlink(FILE_NAME);
}

/* Pages that were all zero before the burst, and what was given back without KSM. */
static void test_restart_zero(void **state) {
        Block *block = processes[0].space.blocks[0];
        Census c;

        page_set_add(block->zero, 0);
        page_set_add(block->hole, 1);
        page_set_add(block->zero, 2); /* is written before it is given back */
        for (unsigned page = 0; page < 2; page++)
                map(0, page, ZERO, false);
        map(0, 2, 7, true);
        map(0, 3, ZERO, false);
        restart(true);
        block = processes[0].space.blocks[0];
        assert_true(page_set_has(block->hole, 1));
        assert_false(page_set_has(block->given, 1));
        for (unsigned page = 0; page < 4; page++) /* as the next scan finds them */
                if (page != 2)
                        page_set_add(block->zeropage, page);
        c = census(1, 0);
        assert_int_equal(c.given, 1);
        assert_int_equal(saved(&c), 1);
}

/* Blocks that are there and blocks that were given back whole, by turns: each of these gets its block again. */
static void test_restart_holes(void **state) {
        enum { BLOCKS = 15000 };
        Space *space = &processes[0].space;
        uint64_t *addrs = calloc(BLOCKS, sizeof *addrs);

        assert_non_null(addrs);
        for (size_t i = 0; i < BLOCKS; i++)
                addrs[i] = ADDR + i * BLOCK_BYTES;
        assert_int_equal(space_add(space, addrs, BLOCKS), 0);
        for (size_t i = 0; i < BLOCKS; i++)
                page_set_add(i % 3 == 2 ? space->blocks[i]->own : space->blocks[i]->hole, i % BLOCK_PAGES);
        restart(true);
        assert_int_equal(space->n, BLOCKS / 3 * 2);
        for (size_t i = 0; i < BLOCKS; i++) {
                Block *block = space_find(space, addrs[i]);

                if (!block != (i % 3 == 2))
                        fail_msg("block %zu", i);
                if (block)
                        assert_true(page_set_has(block->hole, i % BLOCK_PAGES));
        }
        free(addrs);
}

/* Another process, another program, a damaged file: nothing is concluded. */
static void test_restart_other(void **state) {
        _cleanup_(kept_writer_done) KeptWriter writer = {};
        _cleanup_free_ char *bytes = NULL;
        KeptId id = id_of(0);
        CensusNotes none = {};
        Space *space = &processes[1].space;
        size_t size;

        page_set_add(processes[0].space.blocks[0]->own, 5);
        kept_add_space(&writer, &id, &processes[0].space);
        assert_int_equal(kept_write(&writer, AT_FDCWD, FILE_NAME), 0);
        for (unsigned i = 0; i < 4; i++) {
                _cleanup_(kept_done) Kept kept = {};
                KeptId other = id;

                other.pid += i == 1;
                other.start_ticks += i == 2;
                other.kin += i == 3;
                assert_int_equal(kept_read(AT_FDCWD, FILE_NAME, &kept), 0);
                assert_false(kept_take_notes(&kept, "domain", &none));
                assert_int_equal(kept_take_space(&kept, &other, space), i == 0);
                assert_int_equal(page_set_has(space->blocks[0]->own, 5), i == 0);
                page_set_remove(space->blocks[0]->own, 5);
        }
        assert_int_equal(read_file(AT_FDCWD, FILE_NAME, &bytes, &size), 0);
        for (size_t i = 0; i < size; i += 7) {
                Kept kept = {};

                bytes[i] ^= 4;
                assert_int_equal(write_bytes_atomic(AT_FDCWD, FILE_NAME, bytes, size), 0);
                assert_int_equal(kept_read(AT_FDCWD, FILE_NAME, &kept), -EBADMSG);
                bytes[i] ^= 4;
                assert_int_equal(write_bytes_atomic(AT_FDCWD, FILE_NAME, bytes, i), 0);
                assert_int_equal(kept_read(AT_FDCWD, FILE_NAME, &kept), -EBADMSG);
        }
        /* Nothing to tell leaves no file. */
        kept_writer_done(&writer);
        kept_add_space(&writer, &id, &processes[2].space);
        kept_add_notes(&writer, "domain", &none);
        assert_int_equal(kept_write(&writer, AT_FDCWD, FILE_NAME), 0);
        assert_int_equal(access(FILE_NAME, F_OK), -1);
}

/* Who is not met yet is passed on as long as he lives. */
static void test_restart_passed_on(void **state) {
        _cleanup_(kept_writer_done) KeptWriter first = {}, second = {}, third = {};
        KeptId here = { (uint64_t)getpid(), 0, KIN }, gone = { 1, UINT64_MAX, KIN };
        TargetOrigin origin;
        Kept kept = {};

        assert_int_equal(target_origin_of(getpid(), &origin), 0);
        here.start_ticks = origin.start_ticks;
        page_set_add(processes[0].space.blocks[0]->own, 5);
        kept_add_space(&first, &here, &processes[0].space);
        kept_add_space(&first, &gone, &processes[0].space);
        assert_int_equal(kept_write(&first, AT_FDCWD, FILE_NAME), 0);
        assert_int_equal(kept_read(AT_FDCWD, FILE_NAME, &kept), 0);
        kept_pass_on(&kept, &second);
        assert_false(kept_take_space(&kept, &gone, &processes[1].space));
        assert_true(kept_take_space(&kept, &here, &processes[1].space));
        assert_true(page_set_has(processes[1].space.blocks[0]->own, 5));
        kept_pass_on(&kept, &third);
        assert_int_equal(third.n, 0);
        assert_null(kept.words);
        assert_int_equal(kept_write(&second, AT_FDCWD, FILE_NAME), 0);
        assert_int_equal(kept_read(AT_FDCWD, FILE_NAME, &kept), 0);
        assert_false(kept_take_space(&kept, &gone, &processes[2].space));
        assert_true(kept_take_space(&kept, &here, &processes[2].space));
        kept_done(&kept);
        unlink(FILE_NAME);
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
                TEST(test_strangers),     TEST(test_relatives), TEST(test_one_by_one), TEST(test_relative_comes_late),
                TEST(test_nothing_noted), TEST(test_zero),      TEST(test_forgotten),
                TEST(test_restart),       TEST(test_restart_zero),  TEST(test_restart_holes),
                TEST(test_restart_other), TEST(test_restart_passed_on),
        };

        return cmocka_run_group_tests(tests, NULL, NULL);
}
