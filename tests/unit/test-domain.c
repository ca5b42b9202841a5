/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Matching, on batches made by hand: what becomes a twin, and above all what does not. Every case runs with a crew of
 * one and of three. Frames are what the batch last said of a page: scan_page_frame() is replaced (--wrap).
 */
#include "merge/domain.h"
#include "scan/select.h"

#include "tests/test.h"

#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>

#define BLOCKS 16U

typedef struct Fixture {
        Domain *domain;
        Crew *crew;
        Target target;
        Space space;
        ScanBatch *batch;
} Fixture;

static uint64_t frames[BLOCKS][BLOCK_PAGES]; /* by block id */
static PageSet unshared[BLOCKS]; /* not shared any more when looked at again */
static unsigned n_threads;
/* Frames below 1000 are on node 0, up to 2000 on node 1; kept apart by the tests that say so. */
static NumaRange nodes[] = { { 0, 1000, 0 }, { 1000, 2000, 1 } };
static Numa numa = { .ranges = nodes, .n = 2, .n_nodes = 1 };

int __wrap_scan_page_frame(const Block *block, unsigned page, uint64_t *ret_pfn);
int __wrap_scan_block_frames(const Block *block, uint64_t ret_pfns[static BLOCK_PAGES], PageSet ret_alone);
int __wrap_scan_page_frame(const Block *block, unsigned page, uint64_t *ret_pfn) {
        *ret_pfn = frames[block->id][page];
        return 0;
}

int __wrap_scan_block_frames(const Block *block, uint64_t ret_pfns[static BLOCK_PAGES], PageSet ret_alone) {
        memcpy(ret_pfns, frames[block->id], sizeof frames[block->id]);
        memcpy(ret_alone, unshared[block->id], sizeof unshared[block->id]);
        return 0;
}

static int setup(void **state) {
        Fixture *f = calloc(1, sizeof *f);
        int r = domain_new(256, n_threads, &numa, &f->domain);

        if (r == -EACCES || r == -EPERM || r == -ENOENT)
                TEST_SKIP("needs /proc/kpageflags: %s", strerror(-r));
        assert_int_equal(r, 0);
        assert_int_equal(crew_new(n_threads, &f->crew), 0);
        f->batch = calloc(1, sizeof *f->batch);
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
        numa.n_nodes = 1;
        crew_free(f->crew);
        free(f->batch);
        free(f);
        return 0;
}

static Block *add_block(Fixture *f, unsigned number) {
        uint64_t addr = number * BLOCK_BYTES;

        assert_int_equal(space_add(&f->space, &addr, 1), 0);
        return space_find(&f->space, addr);
}

/* As the scanner would: one page read with this content, on this frame. */
static void put_page(Fixture *f, Block *block, unsigned page, ScanKind kind, uint64_t key, uint64_t pfn, bool alone) {
        ScanPage *p = &f->batch->pages[f->batch->n++];
        bool content = kind == SCAN_HASHED || kind == SCAN_ZERO || kind == SCAN_KSM || kind == SCAN_SHARED;

        *p = (ScanPage){ .block = block, .page = (uint16_t)page, .key = key, .pfn = pfn, .kind = (uint8_t)kind,
                         .key_known = content, .writable_alone = alone };
        p->first = content && !page_set_has(block->hashed, page);
        p->changed = content && !p->first && block->check[page] != (uint8_t)key;
        page_set_remove(block->hashed, page);
        page_set_remove(block->merged, page);
        page_set_remove(block->zero, page);
        page_set_remove(block->forked, page);
        if (content)
                page_set_add(block->hashed, page);
        if (kind == SCAN_KSM)
                page_set_add(block->merged, page);
        if (kind == SCAN_ZERO)
                page_set_add(block->zero, page);
        if (content && !alone && kind != SCAN_KSM)
                page_set_add(block->forked, page);
        block->check[page] = (uint8_t)key;
        frames[block->id][page] = content ? pfn : 0;
        if (!block->pass)
                block->first_pass = f->domain->pass;
        block->pass = f->domain->pass;
}

static void put(Fixture *f, Block *block, unsigned page, uint64_t key, uint64_t pfn) {
        put_page(f, block, page, SCAN_HASHED, key, pfn, true);
}

static void see(Fixture *f) {
        assert_int_equal(domain_see(f->domain, f->crew, f->batch, 1), 0);
        f->batch->n = 0;
}

static unsigned wanted(const Block *block) {
        PageSet set;

        for (unsigned i = 0; i < ELEMENTSOF(set); i++)
                set[i] = block->twin[i] & ~block->changed[i];
        return page_set_count(set);
}

#define KEY(n) (UINT64_C(0x0101010101010101) * (n))

static void test_twins(void **state) {
        Fixture *f = *state;
        Block *a = add_block(f, 1), *b = add_block(f, 2);

        domain_begin_pass(f->domain);
        put(f, a, 0, KEY(1), 10);
        put(f, a, 1, KEY(2), 11);
        put(f, a, 7, KEY(1), 12); /* a twin in the same batch */
        put_page(f, a, 9, SCAN_ZERO, 0, 13, true);
        put(f, b, 3, KEY(2), 14);
        put(f, b, 4, KEY(3), 15);
        see(f);
        domain_end_pass(f->domain);
        assert_true(page_set_has(a->twin, 0) && page_set_has(a->twin, 1) && page_set_has(a->twin, 7));
        assert_int_equal(wanted(a), 3);
        assert_true(page_set_has(b->twin, 3));
        assert_int_equal(wanted(b), 1);
        assert_int_equal(page_set_count(a->saves), 1); /* of each pair one */
        assert_true(page_set_has(b->saves, 3));

        /* Much later, and nothing else is read: a third one. */
        domain_begin_pass(f->domain);
        put(f, b, 100, KEY(3), 16);
        see(f);
        assert_true(page_set_has(b->twin, 4) && page_set_has(b->twin, 100));
        assert_true(page_set_has(b->changed, 100) && b->unsettled); /* it came to a block that was known */
        assert_int_equal(wanted(b), 2);
        assert_int_equal(wanted(a), 3);
}

static void test_changed_page_waits(void **state) {
        Fixture *f = *state;
        Block *a = add_block(f, 1);

        domain_begin_pass(f->domain);
        put(f, a, 0, KEY(1), 10);
        put(f, a, 1, KEY(2), 11);
        put(f, a, 3, KEY(2), 13);
        see(f);
        assert_int_equal(wanted(a), 2);
        for (unsigned pass = 0; pass < 2; pass++) {
                domain_begin_pass(f->domain);
                put(f, a, 1, KEY(1), 11); /* changed in the first round, stands since */
                put(f, a, 2, KEY(1), 12); /* came to a block that was known */
                see(f);
                assert_int_equal(page_set_has(a->changed, 1), pass == 0);
                assert_int_equal(page_set_has(a->changed, 2), pass == 0);
                assert_true(page_set_has(a->twin, 0) && page_set_has(a->twin, 1) && page_set_has(a->twin, 2));
        }
        /* What it was a twin of before is not known to have lost it: a recheck finds out. */
        domain_begin_pass(f->domain);
        memset(a->twin, 0, sizeof a->twin);
        memset(a->saves, 0, sizeof a->saves);
        for (unsigned page = 0; page < 4; page++)
                put(f, a, page, page < 3 ? KEY(1) : KEY(2), 10 + page);
        see(f);
        assert_int_equal(wanted(a), 3);
        assert_false(page_set_has(a->twin, 3));
        /* Written, and holds what it held: it would break again. */
        for (unsigned pass = 0; pass < 2; pass++) {
                domain_begin_pass(f->domain);
                put(f, a, 2, KEY(1), 12);
                f->batch->pages[0].written = pass == 0;
                see(f);
                assert_int_equal(page_set_has(a->changed, 2), pass == 0);
                assert_int_equal(wanted(a), pass == 0 ? 2 : 3);
        }
}

static void test_gone_page_is_no_twin(void **state) {
        Fixture *f = *state;
        Block *a = add_block(f, 1), *b = add_block(f, 2);

        domain_begin_pass(f->domain);
        put(f, a, 0, KEY(1), 10);
        put(f, a, 1, KEY(2), 11);
        put(f, a, 2, KEY(2), 12);
        see(f);
        domain_begin_pass(f->domain);
        put_page(f, a, 0, SCAN_NOTHING, 0, 0, false);
        put_page(f, a, 1, SCAN_NOTHING, 0, 0, false);
        put(f, b, 0, KEY(1), 20);
        see(f);
        assert_int_equal(wanted(b), 0);
        assert_false(page_set_has(a->twin, 1) || page_set_has(a->saves, 1));
        assert_true(f->domain->stats.stale >= 1);
        /* And the entry now names the page that does hold it. */
        domain_begin_pass(f->domain);
        put(f, b, 5, KEY(1), 21);
        see(f);
        assert_true(page_set_has(b->twin, 0) && page_set_has(b->twin, 5));
}

static void test_fork_shared_frame_is_one(void **state) {
        Fixture *f = *state;
        Block *parent = add_block(f, 1), *child = add_block(f, 2);

        domain_begin_pass(f->domain);
        put_page(f, parent, 0, SCAN_HASHED, KEY(1), 10, false);
        put_page(f, parent, 1, SCAN_HASHED, KEY(2), 11, false);
        put_page(f, child, 0, SCAN_SHARED, KEY(1), 10, false);
        see(f);
        /* The child's other page is met by a later pass, which does not know the frame. */
        domain_begin_pass(f->domain);
        put_page(f, child, 1, SCAN_HASHED, KEY(2), 11, false);
        see(f);
        assert_int_equal(wanted(parent) + wanted(child), 0);
        assert_false(f->domain->fork_twin);
        /* Another frame with the second content turns up: both mappings of the first frame are to be told. */
        domain_begin_pass(f->domain);
        put(f, child, 2, KEY(2), 12);
        see(f);
        assert_true(page_set_has(parent->twin, 1) && page_set_has(child->twin, 2));
        assert_true(f->domain->fork_twin);
        domain_begin_pass(f->domain);
        put_page(f, child, 1, SCAN_HASHED, KEY(2), 11, false);
        see(f);
        assert_true(page_set_has(child->twin, 1));
        assert_int_equal(page_set_count(child->saves) + page_set_count(parent->saves), 2); /* of three that map it */
        assert_false(page_set_has(parent->twin, 0) || page_set_has(child->twin, 0));
}

static uint32_t gone(void *userdata, uint64_t key, uint64_t frame) { return 0; }

static void test_joins_merged_content(void **state) {
        Fixture *f = *state;
        Block *a = add_block(f, 1), *b = add_block(f, 2);
        StableCounts counts;

        domain_begin_pass(f->domain);
        put_page(f, a, 0, SCAN_KSM, KEY(1), 10, false);
        put_page(f, a, 1, SCAN_KSM, KEY(1), 10, false);
        see(f);
        put(f, b, 0, KEY(1), 11);
        see(f);
        assert_true(page_set_has(b->twin, 0) && page_set_has(b->saves, 0));
        stable_counts(f->domain->stable, &counts);
        assert_int_equal(counts.pages_shared, 1);
        /* The frame is gone: pruned, and its content unknown again. */
        domain_count_sharers(f->domain, gone, NULL);
        stable_counts(f->domain->stable, &counts);
        assert_int_equal(counts.pages_shared, 0);
        assert_int_equal(f->domain->stats.pruned, 1);
}

/* Of those that were found to be alike one could not be merged, and all are read again: that one first. It is to join the
 * others however long ago it was read, and whoever plans for its process is told. */
static void test_merged_content_is_joined(void **state) {
        Fixture *f = *state;
        Block *a = add_block(f, 1), *b = add_block(f, 2);

        domain_begin_pass(f->domain);
        put(f, a, 0, KEY(1), 10);
        put(f, a, 1, KEY(2), 11);
        see(f);
        assert_false(f->space.found);
        domain_begin_pass(f->domain);
        put_page(f, b, 0, SCAN_KSM, KEY(1), 12, false);
        put_page(f, b, 1, SCAN_KSM, KEY(3), 13, false);
        see(f);
        assert_true(f->space.found && page_set_has(a->twin, 0) && page_set_has(a->saves, 0));
        assert_false(page_set_has(a->twin, 1));
        /* What has changed meanwhile is none. */
        f->space.found = false;
        a->check[1] ^= 1;
        put_page(f, b, 2, SCAN_KSM, KEY(2), 14, false);
        see(f);
        assert_false(f->space.found || page_set_has(a->twin, 1));
}

/* It goes for a twin that is not merged, too. */
static void test_twin_read_long_ago(void **state) {
        Fixture *f = *state;
        Block *a = add_block(f, 1), *b = add_block(f, 2);

        domain_begin_pass(f->domain);
        put(f, a, 0, KEY(1), 10);
        see(f);
        domain_begin_pass(f->domain);
        put(f, b, 0, KEY(1), 11);
        see(f);
        assert_true(f->space.found && page_set_has(a->twin, 0) && !page_set_has(a->saves, 0));
}

static void test_domains_do_not_meet(void **state) {
        Fixture *f = *state, *other;
        void *other_state;
        uint8_t page[PAGE_BYTES];

        setup(&other_state);
        other = other_state;
        memset(page, 'x', sizeof page);
        assert_true(hash_page(f->domain->secret, page) != hash_page(other->domain->secret, page));
        for (unsigned i = 0; i < 2; i++) {
                Fixture *which = i ? other : f;
                Block *block = add_block(which, 1);

                domain_begin_pass(which->domain);
                put(which, block, 0, KEY(1), 10 + i);
                see(which);
                assert_int_equal(wanted(block), 0);
        }
        teardown(&other_state);
}

static uint64_t moved(const Block *block) { return page_set_count(block->again); }

/* With nodes kept apart, contents meet on their own node only; what moved is found, wherever it is met, and read again. */
static void test_nodes(void **state) {
        Fixture *f = *state;
        Block *a = add_block(f, 1), *b = add_block(f, 2);

        numa.n_nodes = 2;
        domain_begin_pass(f->domain);
        put(f, a, 0, KEY(1), 10);
        put(f, a, 1, KEY(2), 11);
        put(f, b, 0, KEY(1), 1010);
        put(f, b, 1, KEY(2), 12);
        put(f, b, 2, KEY(1), 1011);
        put_page(f, b, 9, SCAN_ZERO, 0, 1019, true); /* of these it does not matter where they are */
        see(f);
        assert_false(page_set_has(a->twin, 0));
        assert_true(page_set_has(a->twin, 1) && page_set_has(b->twin, 1));
        assert_true(page_set_has(b->twin, 0) && page_set_has(b->twin, 2));

        /* a's page moves to node 1: met under its old name, it is no twin. */
        frames[a->id][0] = 1012;
        domain_begin_pass(f->domain);
        put(f, b, 3, KEY(1), 13);
        see(f);
        assert_false(page_set_has(b->twin, 3) || page_set_has(a->twin, 0));
        assert_int_equal(moved(a), 1);
        assert_true(page_set_has(a->again, 0));
        memset(a->again, 0, sizeof a->again);

        /* Looked for, it is found too; and read again it meets those of its new node. */
        domain_find_outdated(f->domain, &f->space, 1);
        assert_int_equal(moved(a) + moved(b), 1);
        domain_find_outdated(f->domain, &f->space, SIZE_MAX);
        assert_int_equal(moved(a) + moved(b), 1);
        memset(a->again, 0, sizeof a->again);
        domain_begin_pass(f->domain);
        put(f, a, 0, KEY(1), 1012);
        see(f);
        assert_true(page_set_has(a->twin, 0));
        assert_int_equal(a->nodes[0], 1);
        domain_find_outdated(f->domain, &f->space, SIZE_MAX);
        assert_int_equal(moved(a) + moved(b), 0);
}

/* Kept apart from now on: what was read before is read again, and found under its new name. */
static void test_nodes_by_reload(void **state) {
        Fixture *f = *state;
        Block *a = add_block(f, 1), *b = add_block(f, 2);

        numa.n_nodes = 2;
        domain_set_numa(f->domain, NULL);
        domain_begin_pass(f->domain);
        put(f, a, 0, KEY(1), 10);
        put(f, a, 1, KEY(2), 1011);
        put(f, a, 2, KEY(3), 12);
        put(f, b, 0, KEY(3), 1012);
        see(f);
        assert_true(page_set_has(a->twin, 2) && page_set_has(b->twin, 0));

        domain_set_numa(f->domain, &numa);
        select_all(&f->space);
        assert_int_equal(moved(a) + moved(b), 4);
        memset(a->twin, 0, sizeof a->twin);
        memset(b->twin, 0, sizeof b->twin);
        domain_begin_pass(f->domain);
        put(f, a, 0, KEY(1), 10);
        put(f, a, 1, KEY(2), 1011);
        put(f, a, 2, KEY(3), 12);
        put(f, b, 0, KEY(3), 1012);
        see(f);
        assert_false(page_set_has(a->twin, 2) || page_set_has(b->twin, 0));
        put(f, b, 1, KEY(1), 1013);
        put(f, b, 2, KEY(2), 1014);
        see(f);
        assert_false(page_set_has(a->twin, 0) || page_set_has(b->twin, 1));
        assert_true(page_set_has(a->twin, 1) && page_set_has(b->twin, 2));
}

/* A merged content is known on its node; when the kernel moved the frame, under its new number on the other. */
static void test_merged_on_nodes(void **state) {
        Fixture *f = *state;
        Block *a = add_block(f, 1), *b = add_block(f, 2);

        numa.n_nodes = 2;
        domain_begin_pass(f->domain);
        put_page(f, a, 0, SCAN_KSM, KEY(1), 10, false);
        put_page(f, a, 1, SCAN_KSM, KEY(1), 10, false);
        see(f);
        put(f, b, 0, KEY(1), 1010);
        put(f, b, 1, KEY(1), 11);
        see(f);
        assert_false(page_set_has(b->twin, 0));
        assert_true(page_set_has(b->twin, 1));
        frames[a->id][0] = frames[a->id][1] = 1020;
        domain_find_outdated(f->domain, &f->space, SIZE_MAX);
        assert_int_equal(moved(a), 2);
        domain_count_sharers(f->domain, gone, NULL);
        domain_begin_pass(f->domain);
        put_page(f, a, 0, SCAN_KSM, KEY(1), 1020, false);
        put_page(f, a, 1, SCAN_KSM, KEY(1), 1020, false);
        put(f, b, 2, KEY(1), 1011);
        put(f, b, 3, KEY(1), 14);
        see(f);
        put(f, b, 4, KEY(1), 1012);
        see(f);
        assert_true(page_set_has(b->twin, 4) && page_set_has(b->saves, 4));
}

/* What a fork shared when it was read is read again once that is over, where that alone was in the way. */
static void test_fork_is_over(void **state) {
        Fixture *f = *state;
        Block *a = add_block(f, 1), *b = add_block(f, 2);

        domain_begin_pass(f->domain);
        put_page(f, a, 0, SCAN_HASHED, KEY(1), 10, false);
        put_page(f, a, 1, SCAN_HASHED, KEY(2), 11, false);
        put_page(f, a, 2, SCAN_ZERO, KEY(3), 12, false);
        put_page(f, a, 3, SCAN_HASHED, KEY(4), 13, false);
        put(f, b, 0, KEY(1), 20);
        put(f, b, 1, KEY(2), 21);
        see(f);
        assert_true(page_set_has(a->twin, 0) && page_set_has(a->forked, 0));
        domain_find_outdated(f->domain, &f->space, SIZE_MAX);
        assert_int_equal(moved(a) + moved(b), 0);

        /* KSM takes it as it is; a zero page it need not know. Page 3 has no twin. */
        page_set_add(unshared[a->id], 0);
        page_set_add(unshared[a->id], 2);
        page_set_add(unshared[a->id], 3);
        domain_find_outdated(f->domain, &f->space, SIZE_MAX);
        assert_true(moved(a) == 1 && page_set_has(a->again, 2));
        memset(a->again, 0, sizeof a->again);
        domain_use_pool(f->domain);
        domain_find_outdated(f->domain, &f->space, SIZE_MAX);
        assert_true(moved(a) == 2 && page_set_has(a->again, 0) && page_set_has(a->again, 2));
        memset(a->again, 0, sizeof a->again);
        put(f, a, 0, KEY(1), 10);
        put_page(f, a, 2, SCAN_ZERO, KEY(3), 12, true);
        see(f);
        domain_find_outdated(f->domain, &f->space, SIZE_MAX);
        assert_int_equal(moved(a) + moved(b), 0);
        memset(unshared, 0, sizeof unshared);
}

static uint64_t key_of(unsigned content) { return (content + 1) * UINT64_C(0x9e3779b97f4a7c15); }

/* The entries of a new space of n blocks, whose pages are all different, as if they had been read. */
static void fill_space(Fixture *f, Space *space, unsigned first, unsigned n) {
        *space = (Space){ .target = &f->target, .table = &f->domain->blocks };
        for (unsigned b = first; b < first + n; b++) {
                uint64_t addr = b * BLOCK_BYTES, other;
                Block *block;

                assert_int_equal(space_add(space, &addr, 1), 0);
                block = space_find(space, addr);
                memset(block->hashed, 0xff, sizeof block->hashed);
                for (unsigned i = 0; i < BLOCK_PAGES; i++) {
                        uint64_t key = key_of(b * BLOCK_PAGES + i);

                        block->check[i] = (uint8_t)key;
                        assert_int_equal(unstable_see(f->domain->shards[unstable_shard(key)].tree, key,
                                                      BLOCK_PAGE_REF(block, i), &other), 0);
                }
        }
}

typedef struct Naming {
        const BlockTable *table;
        unsigned n;             /* entries that name a block's id that may be given out again */
} Naming;

static bool names_free_id(void *userdata, uint32_t tag, PageRef ref) {
        Naming *naming = userdata;

        for (size_t i = 0; i < naming->table->n_free; i++)
                naming->n += naming->table->free_ids[i] == ref / BLOCK_PAGES;
        return false;
}

/* Two thirds of the pages go as a round of the sweep begins: their blocks' ids are free only when no entry names them. */
static void test_freed_ids_wait(void **state) {
        Fixture *f = *state;
        Naming naming = { &f->domain->blocks, 0 };
        unsigned passes = 0;
        Space stays, goes;

        fill_space(f, &stays, 1, 50);
        fill_space(f, &goes, 100, 100);
        space_done(&goes);
        f->domain->quarantined = f->domain->blocks.n_quarantine;
        assert_int_equal(f->domain->quarantined, 100);
        for (; f->domain->blocks.n_quarantine > 0; passes++) {
                assert_true(passes < 100);
                domain_begin_pass(f->domain);
                domain_end_pass(f->domain);
        }
        assert_true(passes > 2);
        for (unsigned s = 0; s < UNSTABLE_SHARDS; s++)
                unstable_sweep(f->domain->shards[s].tree, SIZE_MAX, names_free_id, &naming);
        assert_int_equal(naming.n, 0);
        space_done(&stays);
}

/* Short of memory, a part of the contents is remembered, and that part still finds its twins. */
static void test_sample(void **state) {
        Fixture *f = *state;
        unsigned first_half = 0, second_half = 0;

        f->domain->sample_bits = 2;
        domain_begin_pass(f->domain);
        for (unsigned b = 1; b <= 8; b++) {
                Block *block = add_block(f, b);

                for (unsigned i = 0; i < BLOCK_PAGES; i++)
                        put(f, block, i, key_of((b - 1) % 4 * BLOCK_PAGES + i), b * BLOCK_PAGES + i);
                see(f);
        }
        for (unsigned b = 1; b <= 4; b++) {
                first_half += wanted(space_find(&f->space, b * BLOCK_BYTES));
                second_half += wanted(space_find(&f->space, (b + 4) * BLOCK_BYTES));
        }
        assert_int_equal(first_half, second_half);
        assert_in_range(first_half, 4 * BLOCK_PAGES / 4 - 150, 4 * BLOCK_PAGES / 4 + 150);
        assert_int_equal(f->domain->pages_left_out, 8 * BLOCK_PAGES - first_half - second_half);
}

static void test_memory_limit(void **state) {
        Fixture *f = *state;
        uint64_t before, entries = 0;

        domain_begin_pass(f->domain);
        for (unsigned b = 1; b <= 12; b++) {
                Block *block = add_block(f, b);

                for (unsigned i = 0; i < BLOCK_PAGES; i++)
                        put(f, block, i, key_of(b * BLOCK_PAGES + i), b * BLOCK_PAGES + i);
                see(f);
        }
        before = domain_bytes(f->domain);
        domain_limit_memory(f->domain, before + 1);
        assert_int_equal(f->domain->sample_bits, 0);
        domain_limit_memory(f->domain, before - 1);
        assert_int_equal(f->domain->sample_bits, 1);
        domain_limit_memory(f->domain, before / 100); /* not again before that has shown */
        assert_int_equal(f->domain->sample_bits, 1);
        domain_begin_pass(f->domain);
        domain_end_pass(f->domain);
        assert_int_equal(f->domain->shrinking, 0);
        assert_true(domain_bytes(f->domain) <= before);
        for (unsigned i = 0; i < UNSTABLE_SHARDS; i++)
                entries += unstable_count(f->domain->shards[i].tree);
        assert_in_range(entries, 12 * BLOCK_PAGES / 2 - 300, 12 * BLOCK_PAGES / 2 + 300);
        domain_limit_memory(f->domain, 5 * before);
        assert_int_equal(f->domain->sample_bits, 0);
}

int main(void) {
        const struct CMUnitTest tests[] = {
                cmocka_unit_test_setup_teardown(test_twins, setup, teardown),
                cmocka_unit_test_setup_teardown(test_changed_page_waits, setup, teardown),
                cmocka_unit_test_setup_teardown(test_gone_page_is_no_twin, setup, teardown),
                cmocka_unit_test_setup_teardown(test_fork_shared_frame_is_one, setup, teardown),
                cmocka_unit_test_setup_teardown(test_joins_merged_content, setup, teardown),
                cmocka_unit_test_setup_teardown(test_merged_content_is_joined, setup, teardown),
                cmocka_unit_test_setup_teardown(test_twin_read_long_ago, setup, teardown),
                cmocka_unit_test_setup_teardown(test_domains_do_not_meet, setup, teardown),
                cmocka_unit_test_setup_teardown(test_freed_ids_wait, setup, teardown),
                cmocka_unit_test_setup_teardown(test_nodes, setup, teardown),
                cmocka_unit_test_setup_teardown(test_nodes_by_reload, setup, teardown),
                cmocka_unit_test_setup_teardown(test_merged_on_nodes, setup, teardown),
                cmocka_unit_test_setup_teardown(test_fork_is_over, setup, teardown),
                cmocka_unit_test_setup_teardown(test_sample, setup, teardown),
                cmocka_unit_test_setup_teardown(test_memory_limit, setup, teardown),
        };
        int failed = 0;

        for (n_threads = 1; n_threads <= 3; n_threads += 2)
                failed += cmocka_run_group_tests(tests, NULL, NULL);
        return failed;
}
