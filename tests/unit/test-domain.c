/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Matching, on batches made by hand: what becomes a twin, and above all what does not. */
#include "merge/domain.h"

#include "tests/test.h"

#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>

typedef struct Fixture {
        Domain *domain;
        Target target;
        Space space;
} Fixture;

static int setup(void **state) {
        Fixture *f = calloc(1, sizeof *f);
        int r = domain_new("test", 256, &f->domain);

        if (r == -EACCES || r == -EPERM || r == -ENOENT)
                TEST_SKIP("needs /proc/kpageflags: %s", strerror(-r));
        assert_int_equal(r, 0);
        f->target = (Target){ .pid = getpid(), .pidfd = -EBADF, .procfd = -EBADF, .memfd = -EBADF,
                              .pagemapfd = -EBADF };
        f->space = (Space){ .target = &f->target, .table = &f->domain->blocks };
        *state = f;
        return 0;
}

static int teardown(void **state) {
        Fixture *f = *state;

        space_done(&f->space);
        domain_free(f->domain);
        free(f);
        return 0;
}

static Block *add_block(Fixture *f, uint64_t addr) {
        Block *block;

        assert_int_equal(block_new(&f->domain->blocks, &f->space, addr, &block), 0);
        f->space.blocks = reallocarray(f->space.blocks, f->space.n + 1, sizeof(Block *));
        f->space.blocks[f->space.n++] = block;
        return block;
}

static Block *current;          /* that the batch is of */

/* As the scanner would: one page read with this content. */
static void put(Fixture *f, ScanBatch *batch, unsigned page, ScanKind kind, uint64_t key, uint64_t pfn) {
        Block *block = current;
        ScanPage *p = &batch->pages[batch->n++];

        *p = (ScanPage){ .block = block, .page = (uint16_t)page, .key = key, .pfn = pfn, .kind = (uint8_t)kind,
                         .key_known = kind == SCAN_KSM };
        p->first = !page_set_has(block->hashed, page);
        p->changed = !p->first && block->check[page] != (uint8_t)key;
        page_set_remove(block->merged, page);
        page_set_remove(block->zero, page);
        if (kind == SCAN_KSM)
                page_set_add(block->merged, page);
        if (kind == SCAN_ZERO)
                page_set_add(block->zero, page);
        page_set_add(block->hashed, page);
        block->check[page] = (uint8_t)key;
}

static ScanBatch *begin(Fixture *f, Block *block) {
        static ScanBatch batch;

        memset(&batch, 0, sizeof batch);
        current = block;
        if (!block->first_pass)
                block->first_pass = f->domain->pass;
        block->pass = f->domain->pass;
        return &batch;
}

static void end(Fixture *f) {
        Space *spaces[] = { &f->space };

        domain_end_pass(f->domain, spaces, 1);
}

static void test_twins(void **state) {
        Fixture *f = *state;
        Block *a = add_block(f, BLOCK_BYTES), *b = add_block(f, 2 * BLOCK_BYTES);
        ScanBatch *batch;

        domain_begin_pass(f->domain);
        batch = begin(f, a);
        put(f, batch, 0, SCAN_HASHED, 0x1111111111111101, 10);
        put(f, batch, 1, SCAN_HASHED, 0x2222222222222202, 11);
        put(f, batch, 7, SCAN_HASHED, 0x1111111111111101, 12); /* a twin in the same batch */
        put(f, batch, 9, SCAN_ZERO, 0, 13);
        assert_int_equal(domain_see(f->domain, batch), 0);
        batch = begin(f, b);
        put(f, batch, 3, SCAN_HASHED, 0x2222222222222202, 14);
        put(f, batch, 4, SCAN_HASHED, 0x3333333333333303, 15);
        assert_int_equal(domain_see(f->domain, batch), 0);
        assert_int_equal(page_set_count(a->twin), 0); /* nothing counts before the pass is whole */
        end(f);
        assert_true(page_set_has(a->twin, 0) && page_set_has(a->twin, 1) && page_set_has(a->twin, 7));
        assert_int_equal(page_set_count(a->twin), 3);
        assert_true(page_set_has(b->twin, 3));
        assert_int_equal(page_set_count(b->twin), 1);
        assert_true(page_set_has(a->zero, 9));
        assert_int_equal(f->domain->stats.expected, 3); /* frames that go: one of each pair, the zero page */
}

static void test_changed_page_waits(void **state) {
        Fixture *f = *state;
        Block *a = add_block(f, BLOCK_BYTES);
        ScanBatch *batch;

        domain_begin_pass(f->domain);
        batch = begin(f, a);
        put(f, batch, 0, SCAN_HASHED, 0x1111111111111101, 10);
        put(f, batch, 1, SCAN_HASHED, 0x2222222222222202, 11);
        assert_int_equal(domain_see(f->domain, batch), 0);
        end(f);
        for (unsigned pass = 0; pass < 2; pass++) {
                domain_begin_pass(f->domain);
                batch = begin(f, a);
                put(f, batch, 0, SCAN_HASHED, 0x1111111111111101, 10);
                put(f, batch, 1, SCAN_HASHED, 0x1111111111111101, 11); /* changed in the first round, stands since */
                put(f, batch, 2, SCAN_HASHED, 0x1111111111111101, 12); /* came to a block that was known */
                assert_int_equal(domain_see(f->domain, batch), 0);
                end(f);
                assert_int_equal(page_set_has(a->twin, 1), pass == 1);
                assert_int_equal(page_set_has(a->twin, 2), pass == 1);
                assert_int_equal(f->domain->stats.pages_volatile, pass == 1 ? 0 : 2);
        }
}

static void test_stale_hint(void **state) {
        Fixture *f = *state;
        Block *a = add_block(f, BLOCK_BYTES), *b = add_block(f, 2 * BLOCK_BYTES);
        ScanBatch *batch;

        domain_begin_pass(f->domain);
        batch = begin(f, a);
        put(f, batch, 0, SCAN_HASHED, 0x1111111111111101, 10);
        assert_int_equal(domain_see(f->domain, batch), 0);
        end(f);
        /* The page changes; who has its old content now must not be paired with it. */
        domain_begin_pass(f->domain);
        batch = begin(f, a);
        put(f, batch, 0, SCAN_HASHED, 0x9999999999999909, 10);
        assert_int_equal(domain_see(f->domain, batch), 0);
        batch = begin(f, b);
        put(f, batch, 0, SCAN_HASHED, 0x1111111111111101, 11);
        assert_int_equal(domain_see(f->domain, batch), 0);
        end(f);
        assert_int_equal(page_set_count(a->twin) + page_set_count(b->twin), 0);
        assert_true(f->domain->stats.stale >= 1);
        /* And the entry now names the page that does hold it. */
        domain_begin_pass(f->domain);
        batch = begin(f, b);
        put(f, batch, 0, SCAN_HASHED, 0x1111111111111101, 11);
        put(f, batch, 5, SCAN_HASHED, 0x1111111111111101, 12);
        assert_int_equal(domain_see(f->domain, batch), 0);
        end(f);
        assert_true(page_set_has(b->twin, 0));
}

static void test_fork_shared_frame_is_one(void **state) {
        Fixture *f = *state;
        Block *parent = add_block(f, BLOCK_BYTES), *child = add_block(f, 2 * BLOCK_BYTES);
        ScanBatch *batch;

        for (unsigned pass = 0; pass < 3; pass++) {
                domain_begin_pass(f->domain);
                batch = begin(f, parent);
                put(f, batch, 0, SCAN_HASHED, 0x1111111111111101, 10);
                put(f, batch, 1, SCAN_HASHED, 0x2222222222222202, 11);
                assert_int_equal(domain_see(f->domain, batch), 0);
                batch = begin(f, child);
                put(f, batch, 0, SCAN_SHARED, 0x1111111111111101, 10);
                put(f, batch, 1, SCAN_SHARED, 0x2222222222222202, 11);
                if (pass > 0) /* another frame with the second content turns up */
                        put(f, batch, 2, SCAN_HASHED, 0x2222222222222202, 12);
                assert_int_equal(domain_see(f->domain, batch), 0);
                end(f);
                assert_false(page_set_has(parent->twin, 0) || page_set_has(child->twin, 0));
        }
        assert_true(page_set_has(parent->twin, 1) && page_set_has(child->twin, 1) && page_set_has(child->twin, 2));
        assert_int_equal(f->domain->stats.expected, 1);
}

static void test_joins_merged_content(void **state) {
        Fixture *f = *state;
        Block *a = add_block(f, BLOCK_BYTES), *b = add_block(f, 2 * BLOCK_BYTES);
        ScanBatch *batch;
        StableCounts counts;

        domain_begin_pass(f->domain);
        batch = begin(f, a);
        put(f, batch, 0, SCAN_KSM, 0x1111111111111101, 10);
        put(f, batch, 1, SCAN_KSM, 0x1111111111111101, 10);
        assert_int_equal(domain_see(f->domain, batch), 0);
        batch = begin(f, b);
        put(f, batch, 0, SCAN_HASHED, 0x1111111111111101, 11);
        assert_int_equal(domain_see(f->domain, batch), 0);
        end(f);
        assert_true(page_set_has(b->twin, 0));
        assert_int_equal(f->domain->stats.expected, 1);
        stable_counts(f->domain->stable, &counts);
        assert_int_equal(counts.pages_shared, 1);
        assert_int_equal(counts.pages_sharing, 1);
        /* The frame is gone: pruned, and its content unknown again. */
        domain_begin_pass(f->domain);
        batch = begin(f, b);
        put(f, batch, 0, SCAN_HASHED, 0x1111111111111101, 11);
        assert_int_equal(domain_see(f->domain, batch), 0);
        end(f);
        stable_counts(f->domain->stable, &counts);
        assert_int_equal(counts.pages_shared, 0);
        assert_int_equal(f->domain->stats.pruned, 1);
}

static void test_abort_keeps_the_last_result(void **state) {
        Fixture *f = *state;
        Block *a = add_block(f, BLOCK_BYTES);
        Space *spaces[] = { &f->space };
        ScanBatch *batch;

        domain_begin_pass(f->domain);
        batch = begin(f, a);
        put(f, batch, 0, SCAN_HASHED, 0x1111111111111101, 10);
        put(f, batch, 1, SCAN_HASHED, 0x1111111111111101, 11);
        assert_int_equal(domain_see(f->domain, batch), 0);
        end(f);
        domain_begin_pass(f->domain);
        batch = begin(f, a);
        put(f, batch, 2, SCAN_HASHED, 0x1111111111111101, 12);
        assert_int_equal(domain_see(f->domain, batch), 0);
        domain_abort_pass(f->domain, spaces, 1);
        assert_int_equal(page_set_count(a->twin), 2);
        assert_int_equal(page_set_count(a->twin_next), 0);
}

static void test_domains_do_not_meet(void **state) {
        Fixture *f = *state;
        void *other_state;
        Fixture *other;
        ScanBatch *batch;
        uint8_t page[PAGE_BYTES];

        setup(&other_state);
        other = other_state;
        memset(page, 'x', sizeof page);
        assert_true(hash_page(f->domain->secret, page) != hash_page(other->domain->secret, page));
        for (unsigned i = 0; i < 2; i++) {
                Fixture *which = i ? other : f;
                Block *block = add_block(which, BLOCK_BYTES);

                domain_begin_pass(which->domain);
                batch = begin(which, block);
                put(which, batch, 0, SCAN_HASHED, 0x1111111111111101, 10 + i);
                assert_int_equal(domain_see(which->domain, batch), 0);
                end(which);
                assert_int_equal(page_set_count(block->twin), 0);
        }
        teardown(&other_state);
}

int main(void) {
        const struct CMUnitTest tests[] = {
                cmocka_unit_test_setup_teardown(test_twins, setup, teardown),
                cmocka_unit_test_setup_teardown(test_changed_page_waits, setup, teardown),
                cmocka_unit_test_setup_teardown(test_stale_hint, setup, teardown),
                cmocka_unit_test_setup_teardown(test_fork_shared_frame_is_one, setup, teardown),
                cmocka_unit_test_setup_teardown(test_joins_merged_content, setup, teardown),
                cmocka_unit_test_setup_teardown(test_abort_keeps_the_last_result, setup, teardown),
                cmocka_unit_test_setup_teardown(test_domains_do_not_meet, setup, teardown),
        };
        return cmocka_run_group_tests(tests, NULL, NULL);
}
