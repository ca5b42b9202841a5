/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "merge/zero-program.h"
#include "target/remote-internal.h"

#include <setjmp.h>
#include <stdarg.h>
#include <string.h>
#include <sys/syscall.h>

#include <cmocka.h>

/* Which runs of zero pages are given back, and the program that does it as far as it can be looked at. What it does is
 * shown on victims (tests/system/zero-hammer.c). */
#define BASE ((uint64_t)0x7f0000000000)

typedef struct Fixture {
        BlockTable table;
        Space space;
        Block *blocks[2];
        Vma vmas[1];
        VmaList list;
        ZeroRules rules;
        ZeroPlan plan;
} Fixture;

static void setup(Fixture *f) {
        const uint64_t addrs[] = { BASE, BASE + BLOCK_BYTES };

        *f = (Fixture){ .rules = { .minimum_run_pages = 1, .huge_page_split = 2500 } };
        f->space.table = &f->table;
        assert_int_equal(space_add(&f->space, addrs, 2), 0);
        f->blocks[0] = f->space.blocks[0];
        f->blocks[1] = f->space.blocks[1];
        f->vmas[0] = (Vma){ .start = BASE, .end = BASE + 2 * BLOCK_BYTES, .write = true };
        f->list = (VmaList){ .vmas = f->vmas, .n = 1 };
}

static void teardown(Fixture *f) {
        zero_plan_done(&f->plan);
        space_done(&f->space);
        block_table_done(&f->table);
}

static void add(PageSet set, unsigned from, unsigned to) {
        for (unsigned page = from; page < to; page++)
                page_set_add(set, page);
}

static void make(Fixture *f) { assert_int_equal(zero_plan_make(&f->space, &f->list, &f->rules, &f->plan), 0); }

static void test_runs(void **state) {
        Fixture f;

        setup(&f);
        add(f.blocks[0]->zero, 10, 20);
        add(f.blocks[0]->changed, 14, 15);     /* only just */
        add(f.blocks[0]->zero, 100, 103);      /* too short */
        add(f.blocks[0]->zero, 504, 512);      /* a run ends with its block */
        add(f.blocks[1]->zero, 0, 8);
        add(f.blocks[1]->zero, 200, 220);
        add(f.blocks[1]->forked, 200, 220);    /* somebody else maps them too */
        make(&f);
        assert_int_equal(f.plan.n, 4);
        assert_int_equal(f.plan.runs[0].start, BASE + 10 * PAGE_BYTES);
        assert_int_equal(f.plan.runs[0].end, BASE + 14 * PAGE_BYTES);
        assert_int_equal(f.plan.runs[1].start, BASE + 15 * PAGE_BYTES);
        assert_int_equal(f.plan.runs[2].end, BASE + BLOCK_BYTES);
        assert_int_equal(f.plan.runs[3].start, BASE + BLOCK_BYTES);
        assert_int_equal(f.plan.pages, 4 + 5 + 8 + 8);
        assert_int_equal(f.plan.pages_left_run, 3);
        teardown(&f);
}

static void test_minimum_run(void **state) {
        Fixture f;

        setup(&f);
        f.rules.minimum_run_pages = 16;
        add(f.blocks[0]->zero, 0, 15);
        add(f.blocks[0]->zero, 20, 36);
        make(&f);
        assert_int_equal(f.plan.n, 1);
        assert_int_equal(f.plan.pages_left_run, 15);
        teardown(&f);
}

/* A huge page is split when it pays, taken as it is when all of it is zero, and not twice. */
static void test_huge(void **state) {
        Fixture f;

        setup(&f);
        f.blocks[0]->huge = f.blocks[1]->huge = true;
        add(f.blocks[0]->zero, 0, 127);        /* a page less than a quarter */
        add(f.blocks[1]->zero, 0, 512);
        make(&f);
        assert_int_equal(f.plan.n, 1);
        assert_true(f.plan.runs[0].huge);
        assert_int_equal(f.plan.pages_left_huge, 127);
        zero_plan_done(&f.plan);
        add(f.blocks[0]->zero, 127, 128);
        make(&f);
        assert_int_equal(f.plan.n, 2);
        assert_false(f.plan.runs[0].huge);
        zero_plan_done(&f.plan);
        f.blocks[0]->refilled = true;
        make(&f);
        assert_int_equal(f.plan.n, 1);
        teardown(&f);
}

static void test_mappings(void **state) {
        const Vma unfit[] = {
                { .skip = VMA_SKIP_LOCKED, .write = true }, { .write = false }, { .write = true, .exec = true },
                { .write = true, .file = true }, { .write = true, .growsdown = true }, { .write = true, .huge_advised = true },
                { .write = true, .sealed = true }, { .write = true, .keyed = true },
        };
        Fixture f;

        setup(&f);
        for (size_t i = 0; i < ELEMENTSOF(unfit); i++)
                assert_false(zero_vma_fits(&unfit[i]));
        assert_true(zero_vma_fits(&f.vmas[0]));
        add(f.blocks[0]->zero, 0, 64);
        f.vmas[0].huge_advised = true;
        make(&f);
        assert_int_equal(f.plan.n, 0);
        assert_int_equal(f.plan.pages_left_kind, 64);
        zero_plan_done(&f.plan);
        f.vmas[0].skip = VMA_SKIP_LOCKED; /* not even looked at */
        make(&f);
        assert_int_equal(f.plan.n, 0);
        assert_int_equal(f.plan.pages_left_kind, 0);
        teardown(&f);
}

static void test_spans(void **state) {
        const ZeroRun runs[] = {
                { .start = 0, .end = 4 * PAGE_BYTES },
                { .start = (4 + ZERO_SPAN_GAP_PAGES) * PAGE_BYTES, .end = 40 * PAGE_BYTES },
                { .start = (41 + ZERO_SPAN_GAP_PAGES) * PAGE_BYTES, .end = 80 * PAGE_BYTES },
                { .start = 81 * PAGE_BYTES, .end = 90 * PAGE_BYTES, .mapping = 81 * PAGE_BYTES },
        };
        uint64_t end;

        assert_int_equal(zero_span(runs, 4, &end), 2);
        assert_int_equal(end, 40 * PAGE_BYTES);
        assert_int_equal(zero_span(runs + 2, 2, &end), 1);
        assert_int_equal(zero_span(runs + 3, 1, &end), 1);
}

/* A whole program, of as many runs as fit; each call is one that the filters of containers know. */
static void test_program(void **state) {
        ZeroRun runs[ZERO_RUNS_MAX + 1];
        ZeroBatch batch;
        RemoteCall call;

        for (size_t i = 0; i < ELEMENTSOF(runs); i++)
                runs[i] = (ZeroRun){ .start = BASE + 2 * i * BLOCK_BYTES, .end = BASE + 2 * i * BLOCK_BYTES + 8 * PAGE_BYTES };
        assert_int_equal(zero_batch_make(runs, ELEMENTSOF(runs), 0, &batch), 0);
        assert_int_equal(batch.n_runs, ZERO_RUNS_MAX);
        assert_int_equal(remote_program_finish(batch.program), 0);
        for (unsigned i = 0; i < batch.program->n_ops; i++)
                if (remote_program_call_at(batch.program, i, REMOTE_REGION_BASE, &call))
                        assert_true(call.nr == SYS_ioctl || call.nr == SYS_mmap || call.nr == SYS_munmap ||
                                    call.nr == SYS_madvise || call.nr == SYS_read || call.nr == SYS_close ||
                                    call.nr == SYS_fstat || call.nr == SYS_socketpair || call.nr == SYS_recvmsg);
        remote_program_free(batch.program);

        /* Scratch is full before the runs are. */
        for (size_t i = 0; i < 20; i++)
                runs[i] = (ZeroRun){ .start = BASE + i * BLOCK_BYTES, .end = BASE + (i + 1) * BLOCK_BYTES, .huge = true };
        assert_int_equal(zero_batch_make(runs, 20, 0, &batch), 0);
        assert_int_equal(batch.n_runs, ZERO_SCRATCH_PAGES / BLOCK_PAGES);
        remote_program_free(batch.program);
}

int main(void) {
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(test_runs),     cmocka_unit_test(test_minimum_run), cmocka_unit_test(test_huge),
                cmocka_unit_test(test_mappings), cmocka_unit_test(test_spans),       cmocka_unit_test(test_program),
        };
        return cmocka_run_group_tests(tests, NULL, NULL);
}
