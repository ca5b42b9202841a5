/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Which pages a pass reads: what was written is said by the test (track_written() is replaced, --wrap). Every case runs with a
 * crew of one and of two, whose threads ask at once. */
#include "scan/select.h"

#include "tests/test.h"

#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>

#define CHUNK TRACK_CHUNK_BYTES
#define BASE CHUNK

static TrackRange writes[64];   /* by address; forgotten once they were reported */
static size_t n_writes;
static uint64_t asked;          /* bytes that were looked through */
static pthread_mutex_t asking = PTHREAD_MUTEX_INITIALIZER;
static unsigned n_threads;

int __wrap_track_written(Track *track, const Target *target, uint64_t start, uint64_t end, bool protect,
                         TrackRanges *ranges);
int __wrap_track_written(Track *track, const Target *target, uint64_t start, uint64_t end, bool protect,
                         TrackRanges *ranges) {
        size_t kept = 0;

        assert_true(protect && start < end);
        pthread_mutex_lock(&asking);
        asked += end - start;
        for (size_t i = 0; i < n_writes; i++) {
                if (writes[i].start < start || writes[i].end > end) {
                        writes[kept++] = writes[i];
                        continue;
                }
                assert_int_equal(GROW(ranges->ranges, ranges->n, ranges->allocated), 0);
                ranges->ranges[ranges->n++] = writes[i];
        }
        n_writes = kept;
        pthread_mutex_unlock(&asking);
        return 0;
}

static void wrote(uint64_t addr, unsigned pages) {
        writes[n_writes++] = (TrackRange){ addr, addr + pages * PAGE_BYTES };
}

typedef struct Fixture {
        BlockTable table;
        Target target;
        Space space;
        Track track;
        TrackChunk chunks[3];
        VmaList vmas;
        Crew *crew;
        Selection selection;
        ScanBatch batch;
        uint32_t pass;
} Fixture;

static int setup(void **state) {
        Fixture *f = calloc(1, sizeof *f);

        f->target = (Target){ .pid = getpid(), .pidfd = -EBADF, .procfd = -EBADF, .memfd = -EBADF,
                              .pagemapfd = -EBADF };
        f->space = (Space){ .target = &f->target, .table = &f->table };
        for (unsigned i = 0; i < ELEMENTSOF(f->chunks); i++)
                f->chunks[i] = (TrackChunk){ .start = BASE + i * CHUNK, .end = BASE + (i + 1) * CHUNK };
        f->track = (Track){ .uffd = -EBADF, .chunks = f->chunks, .n = ELEMENTSOF(f->chunks) };
        n_writes = 0;
        assert_int_equal(crew_new(n_threads, &f->crew), 0);
        *state = f;
        return 0;
}

static int teardown(void **state) {
        Fixture *f = *state;

        selection_done(&f->selection);
        crew_free(f->crew);
        space_done(&f->space);
        block_table_done(&f->table);
        free(f);
        return 0;
}

static Block *add_block(Fixture *f, uint64_t addr) {
        assert_int_equal(space_add(&f->space, &addr, 1), 0);
        return space_find(&f->space, addr);
}

/* One pass: selects, and reads as the scanner would, all pages present; those of changed look different. How many pages
 * were selected. */
static unsigned run_pass(Fixture *f, bool tracked, SelectRules rules, Block *changes, const PageSet changed) {
        unsigned n = 0;

        rules.pass = ++f->pass;
        asked = 0;
        assert_int_equal(selection_make(&f->selection, &f->space, tracked ? &f->track : NULL, &f->vmas, f->crew, &rules), 0);
        for (;;) {
                selection_take(&f->selection, NULL, &f->target, &f->batch);
                if (f->batch.n == 0)
                        break;
                n += f->batch.n;
                for (unsigned i = 0; i < f->batch.n; i++) {
                        ScanPage *p = &f->batch.pages[i];

                        p->kind = SCAN_HASHED;
                        p->first = !page_set_has(p->block->hashed, p->page);
                        p->changed = !p->first && p->block == changes && page_set_has(changed, p->page);
                        page_set_add(p->block->hashed, p->page);
                        page_set_remove(p->block->changed, p->page);
                        if (p->changed || p->written) {
                                page_set_add(p->block->changed, p->page);
                                p->block->unsettled = true;
                        }
                        if (!p->block->pass)
                                p->block->first_pass = f->pass;
                        p->block->pass = f->pass;
                }
                select_learn(&f->batch, f->pass);
        }
        return n;
}

static const SelectRules everything = { .faults = UINT64_MAX };

static void test_untracked_is_sampled_ever_more_seldom(void **state) {
        Fixture *f = *state;
        Block *block = add_block(f, BASE);
        unsigned total = 0, last = 0;
        PageSet one = { 0 };

        assert_int_equal(run_pass(f, false, everything, NULL, NULL), BLOCK_PAGES);
        for (unsigned pass = 0; pass < 1000; pass++) {
                unsigned n = run_pass(f, false, everything, NULL, NULL);

                assert_true(n == 0 || n == BLOCK_PAGES / 32 || n == BLOCK_PAGES);
                total += n;
        }
        assert_in_range(total, 1000 / 32 * (BLOCK_PAGES / 32), 10 * BLOCK_PAGES);
        /* All its pages change: the next sample sees it, then all of it is read, then what had changed once more. */
        memset(one, 0xff, sizeof one);
        while ((last = run_pass(f, false, everything, block, one)) == 0)
                ;
        if (last < BLOCK_PAGES)
                assert_int_equal(run_pass(f, false, everything, block, one), BLOCK_PAGES);
        assert_int_equal(block->busy, 1);
        assert_int_equal(run_pass(f, false, everything, NULL, NULL), BLOCK_PAGES);
        assert_false(block->unsettled);
        /* Whoever asks for a pass has all of it looked at. */
        assert_int_equal(run_pass(f, false, (SelectRules){ .all_due = true }, NULL, NULL), BLOCK_PAGES);
}

static void test_untracked_rewritten_is_left_alone_mostly(void **state) {
        Fixture *f = *state;
        Block *block = add_block(f, BASE);
        unsigned total = 0;
        PageSet all;

        memset(all, 0xff, sizeof all);
        for (unsigned pass = 0; pass < 100; pass++)
                total += run_pass(f, false, everything, block, all);
        assert_in_range(total, 5 * BLOCK_PAGES, 40 * BLOCK_PAGES);
}

static void test_tracked_is_exact(void **state) {
        Fixture *f = *state;
        Block *first;

        wrote(BASE + 3 * PAGE_BYTES, 2);
        wrote(BASE + BLOCK_BYTES - PAGE_BYTES, 2); /* across two blocks */
        wrote(BASE + 2 * CHUNK, 1);
        assert_int_equal(run_pass(f, true, everything, NULL, NULL), 5);
        assert_int_equal(f->space.n, 3);
        first = space_find(&f->space, BASE);
        assert_true(first && first->tracked && page_set_has(first->hashed, 3) && page_set_has(first->hashed, 511));
        assert_int_equal(page_set_count(first->hashed), 3);
        assert_int_equal(run_pass(f, true, everything, NULL, NULL), 0);

        /* A page that changed waits until it is not reported, and is not read again for that. */
        wrote(BASE + 3 * PAGE_BYTES, 1);
        assert_int_equal(run_pass(f, true, everything, first, (PageSet){ 1 << 3 }), 1);
        assert_true(first->unsettled && page_set_has(first->changed, 3));
        assert_int_equal(run_pass(f, true, (SelectRules){ .faults = 0 }, NULL, NULL), 0);
        assert_true(f->selection.settled);

        /* So does one that was written and holds what it held, as long as it is written; what is first read does not. */
        wrote(BASE + 3 * PAGE_BYTES, 1);
        wrote(BASE + 2 * BLOCK_BYTES, 1);
        assert_int_equal(run_pass(f, true, everything, NULL, NULL), 2);
        assert_true(first->unsettled && page_set_has(first->changed, 3));
        assert_false(page_set_any(space_find(&f->space, BASE + 2 * BLOCK_BYTES)->changed));
        wrote(BASE + 3 * PAGE_BYTES, 1);
        assert_int_equal(run_pass(f, true, everything, NULL, NULL), 1);
        assert_true(first->unsettled && page_set_has(first->changed, 3));
        assert_int_equal(run_pass(f, true, everything, NULL, NULL), 0);
        assert_false(first->unsettled || page_set_any(first->changed));
        assert_false(first->unsettled || page_set_has(first->changed, 3));
        assert_int_equal(run_pass(f, true, everything, NULL, NULL), 0);
        assert_false(f->selection.settled);
}

static void test_quiet_chunks_are_spared(void **state) {
        Fixture *f = *state;
        uint64_t total = 0;

        for (unsigned pass = 0; pass < 64; pass++) {
                (void)run_pass(f, true, (SelectRules){ .faults = 1 }, NULL, NULL);
                total += asked;
        }
        assert_int_equal(total, 64 * 3 * CHUNK); /* a fault that nothing explains: looked for everywhere */
        total = 0;
        for (unsigned pass = 0; pass < 64; pass++) {
                wrote(BASE + 5 * PAGE_BYTES, 1);
                assert_int_equal(run_pass(f, true, (SelectRules){ .faults = 1 }, NULL, NULL), 1);
                total += asked;
        }
        /* Found where it is expected: the other two chunks are visited every 16 passes. */
        assert_in_range(total, 64 * CHUNK, 64 * CHUNK + 20 * CHUNK);
        for (unsigned pass = 0; pass < 64; pass++) {
                wrote(BASE + 5 * PAGE_BYTES, 1);
                wrote(BASE + 2 * CHUNK, 1);
                assert_int_equal(run_pass(f, true, (SelectRules){ .faults = 2 }, NULL, NULL), 2);
        }
        asked = 0;
        assert_int_equal(run_pass(f, true, (SelectRules){ .faults = 0 }, NULL, NULL), 0);
        assert_int_equal(asked, 0);
}

static void test_busy_block_is_not_protected(void **state) {
        Fixture *f = *state;
        Block *block = add_block(f, BASE + BLOCK_BYTES);
        PageSet all;
        unsigned reported = 0, read = 0;

        memset(all, 0xff, sizeof all);
        block->tracked = true;
        for (unsigned pass = 0; pass < 100; pass++) {
                n_writes = 0;
                wrote(BASE, 1);
                wrote(BASE + BLOCK_BYTES, BLOCK_PAGES);
                read += run_pass(f, true, (SelectRules){ .faults = 1 + BLOCK_PAGES }, block, all);
                reported += n_writes == 0;
        }
        assert_int_equal(space_find(&f->space, BASE)->busy, 0);
        assert_in_range(reported, 3, 30);
        assert_in_range(read, 100, 100 + 40 * BLOCK_PAGES);
        /* It stands still: samples find out, and it is tracked again. */
        n_writes = 0;
        for (unsigned pass = 0; pass < 40 && block->busy >= 3; pass++)
                (void)run_pass(f, true, (SelectRules){ .faults = 0 }, NULL, NULL);
        assert_int_equal(block->busy, 0);
}

/* Where the faults of tracking are dear fewer written pages make a block one that it does not pay for. */
static void test_dear_faults(void **state) {
        Fixture *f = *state;
        Block *block = add_block(f, BASE + BLOCK_BYTES);
        const SelectRules dear = { .faults = UINT64_MAX, .busy_pages = select_busy_pages(16000) };
        PageSet few = {};

        assert_int_equal(select_busy_pages(0), BLOCK_PAGES / 2);
        assert_int_equal(select_busy_pages(800), BLOCK_PAGES / 2);
        assert_int_equal(select_busy_pages(16000), BLOCK_PAGES / 32);
        assert_int_equal(select_busy_pages(UINT32_MAX), 8);
        block->tracked = true;
        for (unsigned i = 0; i < 20; i++)
                page_set_add(few, i);
        for (unsigned price = 0; price <= 1; price++) {
                for (unsigned pass = 0; pass < 4; pass++) {
                        n_writes = 0;
                        wrote(BASE + BLOCK_BYTES, 20);
                        (void)run_pass(f, true, (SelectRules){ .faults = UINT64_MAX, .busy_pages = select_busy_pages(price ? 16000 : 800) },
                                       block, few);
                }
                assert_int_equal(block->busy >= 3, price);
        }
        /* Far beyond that one look is enough. */
        block->busy = 0;
        block->unprotected = false;
        n_writes = 0;
        wrote(BASE + BLOCK_BYTES, 200);
        (void)run_pass(f, true, dear, block, few);
        assert_int_equal(block->busy, 3);
        /* It stands still and is tracked again: all of it is reported, as nothing was protected, and is no sign of writes. */
        n_writes = 0;
        for (unsigned pass = 0; pass < 40 && block->busy >= 3; pass++)
                (void)run_pass(f, true, (SelectRules){ .faults = 0 }, NULL, NULL);
        wrote(BASE + BLOCK_BYTES, BLOCK_PAGES);
        assert_int_equal(run_pass(f, true, dear, NULL, NULL), BLOCK_PAGES);
        assert_int_equal(block->busy, 0);
        assert_true(page_set_any(block->changed));
        n_writes = 0;
        (void)run_pass(f, true, dear, NULL, NULL);
        assert_false(page_set_any(block->changed));
        wrote(BASE + BLOCK_BYTES, 200);
        (void)run_pass(f, true, dear, NULL, NULL);
        assert_int_equal(block->busy, 3);
}

/* Where they are very dear new memory is not protected before it was seen to stand still: what is written all the time
 * never is. */
static void test_proves_quiet(void **state) {
        Fixture *f = *state;
        Block *quiet = add_block(f, BASE), *busy = add_block(f, BASE + BLOCK_BYTES);
        const SelectRules prove = { .faults = UINT64_MAX, .prove_quiet = true };
        PageSet all;

        assert_false(select_tracking_is_dear(0));
        assert_false(select_tracking_is_dear(1000));
        assert_true(select_tracking_is_dear(14000));
        memset(all, 0xff, sizeof all);
        quiet->tracked = busy->tracked = true;
        assert_int_equal(run_pass(f, true, prove, NULL, NULL), 2 * BLOCK_PAGES);
        assert_int_equal(asked, 3 * CHUNK - 2 * BLOCK_BYTES);
        assert_true(select_is_sampled(quiet) && select_is_sampled(busy));
        for (unsigned pass = 0; pass < 10; pass++)
                (void)run_pass(f, true, prove, busy, all);
        assert_true(!select_is_sampled(quiet) && select_is_sampled(busy));
        assert_int_equal(asked, 3 * CHUNK - BLOCK_BYTES);
        /* Nobody had a fault, since nothing was protected: it is asked about all the same, once. */
        for (quiet->busy = 3; select_is_sampled(quiet);)
                (void)run_pass(f, true, (SelectRules){}, busy, all);
        wrote(BASE, BLOCK_PAGES);
        assert_true(run_pass(f, true, (SelectRules){}, busy, all) >= BLOCK_PAGES);
        assert_int_equal(asked, 3 * CHUNK - BLOCK_BYTES);
        (void)run_pass(f, true, (SelectRules){}, busy, all);
        assert_int_equal(asked, 0);
        /* It is not new any more. */
        wrote(BASE, 1);
        assert_true(run_pass(f, true, prove, NULL, NULL) >= 1);
        assert_false(select_is_sampled(quiet));
}

/* A block of which half is tracked, and that is not worth it: all of it is sampled, as nobody asks what was written. */
static void test_busy_and_half_tracked(void **state) {
        Fixture *f = *state;
        Block *block = add_block(f, BASE);
        uint64_t middle = BASE + BLOCK_BYTES / 2;
        TrackMapping mapping = { .start = BASE, .end = middle };
        Vma vmas[] = { { .start = BASE, .end = middle, .anonymous_bytes = BLOCK_BYTES / 2 },
                       { .start = middle, .end = BASE + BLOCK_BYTES, .anonymous_bytes = BLOCK_BYTES / 2 } };

        f->vmas = (VmaList){ .vmas = vmas, .n = 2 };
        f->track.mappings = &mapping;
        f->track.n_mappings = 1;
        select_cover(&f->space, &f->track, &f->vmas);
        assert_false(block->tracked);
        assert_int_equal(run_pass(f, true, everything, NULL, NULL), BLOCK_PAGES);
        assert_int_equal(run_pass(f, true, (SelectRules){ .all_due = true }, NULL, NULL), BLOCK_PAGES / 2);
        block->busy = 3;
        assert_int_equal(run_pass(f, true, (SelectRules){ .all_due = true }, NULL, NULL), BLOCK_PAGES);
        f->vmas = (VmaList){};
        f->track.mappings = NULL;
        f->track.n_mappings = 0;
}

static void test_huge_page_is_sampled(void **state) {
        Fixture *f = *state;
        Block *block = add_block(f, BASE);
        unsigned total = 0;

        block->tracked = block->huge = true;
        assert_int_equal(run_pass(f, true, everything, NULL, NULL), BLOCK_PAGES);
        for (unsigned pass = 0; pass < 100; pass++)
                total += run_pass(f, true, (SelectRules){ .faults = 0 }, NULL, NULL);
        assert_in_range(total, BLOCK_PAGES / 32, 4 * BLOCK_PAGES);
}

static void test_recheck(void **state) {
        Fixture *f = *state;
        Block *block;

        wrote(BASE, 8);
        (void)run_pass(f, true, everything, NULL, NULL);
        block = space_find(&f->space, BASE);
        block->twin[0] = 0x3f;
        block->saves[0] = 0x30;
        block->merged[0] = 0x0f;
        block->forked[0] = 0xf1;
        assert_int_equal(run_pass(f, true, (SelectRules){ .recheck_forked = true }, NULL, NULL), 2);
        assert_int_equal(block->twin[0], 0x3f);
        select_recheck(&f->space);
        assert_int_equal(block->twin[0], 0x0f);
        assert_int_equal(block->saves[0], 0);
        block->twin[0] |= 0x10; /* found again by its twin's reading, before its own turn */
        assert_int_equal(run_pass(f, true, (SelectRules){}, NULL, NULL), 2);
        assert_int_equal(block->twin[0], 0x1f);
        assert_false(page_set_any(block->changed));
        assert_int_equal(run_pass(f, true, (SelectRules){}, NULL, NULL), 0);
}

static void test_batches_hold_whole_blocks(void **state) {
        Fixture *f = *state;
        const Block *last = NULL;
        unsigned n = 0, batches = 0;

        for (unsigned i = 0; i < 20; i++)
                wrote(BASE + i * BLOCK_BYTES, 100 + i);
        assert_int_equal(selection_make(&f->selection, &f->space, &f->track, &f->vmas, f->crew,
                                        &(SelectRules){ .pass = 1, .faults = UINT64_MAX }), 0);
        for (;; batches++) {
                selection_take(&f->selection, NULL, &f->target, &f->batch);
                if (f->batch.n == 0)
                        break;
                assert_true(f->batch.n <= SCAN_BATCH_PAGES && f->batch.pages[0].block != last);
                for (unsigned i = 1; i < f->batch.n; i++)
                        assert_true(f->batch.pages[i - 1].block->addr + f->batch.pages[i - 1].page * PAGE_BYTES <
                                    f->batch.pages[i].block->addr + f->batch.pages[i].page * PAGE_BYTES);
                last = f->batch.pages[f->batch.n - 1].block;
                n += f->batch.n;
        }
        assert_int_equal(n, 20 * 100 + 190);
        assert_int_equal(batches, 5);
}

/* What is left alone is not read when it is written; where that is most of a block it is not even protected. Let go, it is
 * read whether it was written or not. */
static void test_left_alone_is_not_read(void **state) {
        Fixture *f = *state;
        Block *block = add_block(f, BASE);

        block->tracked = true;
        wrote(BASE, BLOCK_PAGES);
        assert_int_equal(run_pass(f, true, everything, NULL, NULL), BLOCK_PAGES);
        for (unsigned i = 0; i < 100; i++)
                page_set_add(block->alone, 2 * i);
        wrote(BASE, BLOCK_PAGES);
        assert_int_equal(run_pass(f, true, everything, NULL, NULL), BLOCK_PAGES - 100);
        assert_int_equal(asked, 3 * CHUNK);
        for (unsigned i = 0; i < 400; i++)
                page_set_add(block->alone, i);
        assert_true(run_pass(f, true, everything, NULL, NULL) <= BLOCK_PAGES - 400);
        assert_int_equal(asked, 3 * CHUNK - BLOCK_BYTES);
        /* As judge_turn() does. */
        memset(block->alone, 0, sizeof block->alone);
        memset(block->changed, 0, sizeof block->changed);
        page_set_add(block->changed, 7);
        block->recheck = block->unsettled = true;
        assert_int_equal(run_pass(f, true, everything, NULL, NULL), 1);
        assert_int_equal(asked, 3 * CHUNK);
}

int main(void) {
        const struct CMUnitTest tests[] = {
                cmocka_unit_test_setup_teardown(test_untracked_is_sampled_ever_more_seldom, setup, teardown),
                cmocka_unit_test_setup_teardown(test_left_alone_is_not_read, setup, teardown),
                cmocka_unit_test_setup_teardown(test_untracked_rewritten_is_left_alone_mostly, setup, teardown),
                cmocka_unit_test_setup_teardown(test_tracked_is_exact, setup, teardown),
                cmocka_unit_test_setup_teardown(test_quiet_chunks_are_spared, setup, teardown),
                cmocka_unit_test_setup_teardown(test_busy_block_is_not_protected, setup, teardown),
                cmocka_unit_test_setup_teardown(test_dear_faults, setup, teardown),
                cmocka_unit_test_setup_teardown(test_proves_quiet, setup, teardown),
                cmocka_unit_test_setup_teardown(test_busy_and_half_tracked, setup, teardown),
                cmocka_unit_test_setup_teardown(test_huge_page_is_sampled, setup, teardown),
                cmocka_unit_test_setup_teardown(test_recheck, setup, teardown),
                cmocka_unit_test_setup_teardown(test_batches_hold_whole_blocks, setup, teardown),
        };
        int failed = 0;

        for (n_threads = 1; n_threads <= 2; n_threads++)
                failed += cmocka_run_group_tests(tests, NULL, NULL);
        return failed;
}
