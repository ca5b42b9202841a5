/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The block table against a model, and a space over memory of our own whose state we know page by page: by
 * PAGEMAP_SCAN (where the kernel has it) and by plain pagemap. */
#include "scan/block.h"

#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include <cmocka.h>

#include "tests/test.h"

/* What grows beside the memory under test: our heap, and what a sanitizer keeps for each page we touch. */
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
#define OWN_GROWTH_BLOCKS 1024
#else
#define OWN_GROWTH_BLOCKS 8
#endif

static void test_page_set(void **state) {
        PageSet set = {};

        for (unsigned i = 0; i < BLOCK_PAGES; i += 7)
                page_set_add(set, i);
        assert_int_equal(page_set_count(set), (BLOCK_PAGES + 6) / 7);
        for (unsigned i = 0; i < BLOCK_PAGES; i++)
                assert_int_equal(page_set_has(set, i), i % 7 == 0);
        for (unsigned i = 0; i < BLOCK_PAGES; i++)
                page_set_remove(set, i);
        assert_int_equal(page_set_count(set), 0);
}

static void test_table(void **state) {
        enum { OPERATIONS = 200000, IDS = 1 << 16 };
        enum { UNUSED, USED, QUARANTINED, FREE } model[IDS] = {};
        Block *blocks[IDS] = {};
        BlockTable table = {};
        unsigned seed = 1;
        uint32_t used = 0, known = 0, n_free = 0;
        uint64_t bytes;

        for (unsigned i = 0; i < OPERATIONS; i++) {
                unsigned dice = (unsigned)rand_r(&seed) % 100, page;

                if (dice < 52 && used < 2000) {
                        Block *block;

                        assert_int_equal(block_new(&table, NULL, (uint64_t)i * BLOCK_BYTES, &block), 0);
                        assert_in_range(block->id, 0, IDS - 1);
                        /* Never a number that a tree may still name, and no new one while there are free ones. */
                        assert_true(model[block->id] == UNUSED || model[block->id] == FREE);
                        if (model[block->id] == UNUSED) {
                                assert_int_equal(n_free, 0);
                                assert_int_equal(block->id, known);
                                known++;
                        } else
                                n_free--;
                        model[block->id] = USED;
                        blocks[block->id] = block;
                        used++;
                        assert_ptr_equal(block_of_ref(&table, BLOCK_PAGE_REF(block, 511), &page), block);
                        assert_int_equal(page, 511);
                } else if (dice < 99 && used) {
                        uint32_t id = (uint32_t)rand_r(&seed) % known;
                        uint64_t ref;

                        if (model[id] != USED)
                                continue;
                        ref = BLOCK_PAGE_REF(blocks[id], 3);
                        block_free(&table, blocks[id]);
                        assert_null(block_of_ref(&table, ref, &page));
                        model[id] = QUARANTINED;
                        used--;
                } else if (dice == 99 && rand_r(&seed) % 16 == 0) {
                        block_table_release_quarantine(&table, SIZE_MAX);
                        for (unsigned id = 0; id < IDS; id++)
                                if (model[id] == QUARANTINED) {
                                        model[id] = FREE;
                                        n_free++;
                                }
                }
        }
        assert_null(block_of_ref(&table, (uint64_t)known << 9, &(unsigned) { 0 }));
        bytes = table.bytes;
        assert_true(bytes > used * sizeof(Block) && bytes < used * (sizeof(Block) + 64) + table.allocated * 16 + 1);
        for (uint32_t id = 0; id < known; id++)
                if (model[id] == USED)
                        block_free(&table, blocks[id]);
        assert_int_equal(table.bytes, table.allocated * 16);
        block_table_done(&table);
        assert_int_equal(table.bytes, 0);
}

/* Ourselves, seen from outside. */
typedef struct Self {
        BlockTable table;
        Space space;
        bool plain;
} Self;

static int setup(void **state, bool plain) {
        Self *self = calloc(1, sizeof *self);
        Target *target;

        assert_non_null(self);
        assert_int_equal(target_new(getpid(), &target), 0);
        assert_int_equal(target_open_memory(target), 0);
        self->plain = plain;
        self->space = (Space) { .target = target, .table = &self->table, .plain_pagemap = plain };
        *state = self;
        return 0;
}

static int setup_scan(void **state) { return setup(state, false); }
static int setup_plain(void **state) { return setup(state, true); }

static int teardown(void **state) {
        Self *self = *state;
        Target *target = self->space.target;

        space_done(&self->space);
        target_free(target);
        assert_int_equal(self->table.bytes, self->table.allocated * 16);
        block_table_done(&self->table);
        free(self);
        return 0;
}

static void refresh(Self *self) {
        VmaList vmas;

        assert_int_equal(target_read_vmas(self->space.target, false, &vmas), 0);
        assert_int_equal(space_refresh(&self->space, &vmas), 0);
        vma_list_done(&vmas);
        for (size_t i = 0; i < self->space.n; i++) {
                Block *block = self->space.blocks[i];

                assert_int_equal(block->addr % BLOCK_BYTES, 0);
                assert_true(i == 0 || self->space.blocks[i - 1]->addr < block->addr);
                assert_ptr_equal(self->table.blocks[block->id], block);
                assert_ptr_equal(space_find(&self->space, block->addr + 12345), block);
        }
}

/* Room for n whole blocks, nothing else in them. */
static char *map_blocks(size_t n, int protection) {
        char *p = mmap(NULL, (n + 1) * BLOCK_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

        assert_ptr_not_equal(p, MAP_FAILED);
        p = (char *)(((uintptr_t)p + BLOCK_BYTES - 1) & ~(BLOCK_BYTES - 1));
        assert_int_equal(mprotect(p, n * BLOCK_BYTES, protection), 0);
        assert_int_equal(madvise(p, n * BLOCK_BYTES, MADV_NOHUGEPAGE), 0);
        return p;
}

static Block *at(Self *self, const char *p) { return space_find(&self->space, (uintptr_t)p); }

static void test_sparse(void **state) {
        Self *self = *state;
        /* Plain pagemap has an entry for each mapped page: less of it. */
        size_t blocks = self->plain ? 4096 : 64 * 1024;
        char *p = map_blocks(blocks, PROT_READ | PROT_WRITE);
        size_t before, step = blocks / 64;

        refresh(self);
        before = self->space.n;
        for (size_t i = 0; i < blocks; i++)
                if (at(self, p + i * BLOCK_BYTES))
                        fail_msg("a block where nothing is");
        for (size_t i = 0; i < blocks; i += step)
                p[i * BLOCK_BYTES + i % BLOCK_PAGES * PAGE_BYTES] = 1;
        refresh(self);
        assert_in_range(self->space.n, before + 64, before + 64 + OWN_GROWTH_BLOCKS);
        for (size_t i = 0; i < blocks; i++)
                if (!at(self, p + i * BLOCK_BYTES) != (i % step != 0))
                        fail_msg("block %zu", i);
        munmap(p, blocks * BLOCK_BYTES);
}

static void test_kinds(void **state) {
        Self *self = *state;
        char *p = map_blocks(10, PROT_READ | PROT_WRITE), zero;
        FILE *file = tmpfile();

        assert_non_null(file);
        assert_int_equal(ftruncate(fileno(file), 4 * BLOCK_BYTES), 0);
        /* 0: read only: the zero page. 1: written. 2: written, then made unreadable. 3: a shared mapping.
         * 4: a file, read. 5: a file, written. 6: written, given back. 7: the last page. 8: locked. */
        zero = ((volatile char *)p)[PAGE_BYTES];
        assert_int_equal(zero, 0);
        p[BLOCK_BYTES] = 1;
        p[2 * BLOCK_BYTES] = 1;
        assert_int_equal(mprotect(p + 2 * BLOCK_BYTES, BLOCK_BYTES, PROT_NONE), 0);
        assert_ptr_not_equal(mmap(p + 3 * BLOCK_BYTES, BLOCK_BYTES, PROT_READ | PROT_WRITE,
                                  MAP_SHARED | MAP_ANONYMOUS | MAP_FIXED, -1, 0), MAP_FAILED);
        p[3 * BLOCK_BYTES] = 1;
        assert_ptr_not_equal(mmap(p + 4 * BLOCK_BYTES, 2 * BLOCK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED,
                                  fileno(file), 0), MAP_FAILED);
        zero = ((volatile char *)p)[4 * BLOCK_BYTES];
        p[5 * BLOCK_BYTES + 5 * PAGE_BYTES] = 1;
        p[6 * BLOCK_BYTES] = 1;
        assert_int_equal(madvise(p + 6 * BLOCK_BYTES, BLOCK_BYTES, MADV_DONTNEED), 0);
        p[8 * BLOCK_BYTES - 1] = 1;
        /* mlock(3) does nothing under the address sanitizer. */
        assert_int_equal(syscall(SYS_mlock, p + 8 * BLOCK_BYTES, PAGE_BYTES), 0);
        p[8 * BLOCK_BYTES] = 1;
        refresh(self);
        if (!self->space.plain_pagemap && test_has_zero_page())
                assert_null(at(self, p));
        assert_non_null(at(self, p + BLOCK_BYTES));
        assert_null(at(self, p + 2 * BLOCK_BYTES));
        assert_null(at(self, p + 3 * BLOCK_BYTES));
        assert_null(at(self, p + 4 * BLOCK_BYTES));
        assert_non_null(at(self, p + 5 * BLOCK_BYTES));
        assert_null(at(self, p + 6 * BLOCK_BYTES));
        assert_non_null(at(self, p + 7 * BLOCK_BYTES));
        assert_null(at(self, p + 8 * BLOCK_BYTES));
        assert_null(at(self, p + 9 * BLOCK_BYTES));
        fclose(file);
        munmap(p, 10 * BLOCK_BYTES);
}

/* Many mappings in one block, which make one block; a hole and a guard between them. */
static void test_small_mappings(void **state) {
        Self *self = *state;
        char *p = map_blocks(3, PROT_READ | PROT_WRITE);
        Block *block;

        for (size_t i = 0; i < 3 * BLOCK_PAGES; i += 2)
                assert_int_equal(mprotect(p + i * PAGE_BYTES, PAGE_BYTES, i % 4 ? PROT_NONE : PROT_READ), 0);
        munmap(p + BLOCK_BYTES + 100 * PAGE_BYTES, 8 * PAGE_BYTES);
        for (size_t i = 1; i < BLOCK_PAGES; i += 2)
                p[i * PAGE_BYTES] = 1;
        p[2 * BLOCK_BYTES + 511 * PAGE_BYTES] = 1;
        refresh(self);
        block = at(self, p);
        assert_non_null(block);
        assert_null(at(self, p + BLOCK_BYTES));
        assert_non_null(at(self, p + 2 * BLOCK_BYTES));
        refresh(self);
        assert_ptr_equal(at(self, p), block);
        munmap(p, 3 * BLOCK_BYTES);
}

/* As many ranges as there can be: every other page, in more than one call may look at. */
static void test_fragmented(void **state) {
        Self *self = *state;
        size_t blocks = 640, before;
        char *p = map_blocks(blocks, PROT_READ | PROT_WRITE);

        refresh(self);
        before = self->space.n;
        for (size_t i = 0; i < blocks; i += 10)
                for (size_t page = 0; page < BLOCK_PAGES; page += 2)
                        p[i * BLOCK_BYTES + page * PAGE_BYTES] = 1;
        refresh(self);
        assert_in_range(self->space.n, before + blocks / 10, before + blocks / 10 + OWN_GROWTH_BLOCKS);
        for (size_t i = 0; i < blocks; i++)
                if (!at(self, p + i * BLOCK_BYTES) != (i % 10 != 0))
                        fail_msg("block %zu", i);
        munmap(p, blocks * BLOCK_BYTES);
}

/* What is gone is kept for some passes, then its number waits. */
static void test_dying(void **state) {
        Self *self = *state;
        char *p = map_blocks(2, PROT_READ | PROT_WRITE), zero;
        unsigned passes = 0;
        uint64_t ref;

        p[0] = p[BLOCK_BYTES] = 1;
        refresh(self);
        ref = BLOCK_PAGE_REF(at(self, p), 0);
        madvise(p, 2 * BLOCK_BYTES, MADV_DONTNEED);
        zero = ((volatile char *)p)[BLOCK_BYTES];
        assert_int_equal(zero, 0);
        refresh(self);
        assert_int_equal(at(self, p)->dead_passes, 1);
        p[0] = 1;
        refresh(self);
        assert_int_equal(at(self, p)->dead_passes, 0);
        madvise(p, BLOCK_BYTES, MADV_DONTNEED);
        /* Nor is what somebody refers to dropped, however often it is looked at. */
        self->space.selected = true;
        for (unsigned i = 0; i < 10; i++) {
                refresh(self);
                assert_non_null(at(self, p));
        }
        self->space.selected = false;
        /* Nor what a probe was told of: it would count what is written there later. */
        at(self, p)->told = true;
        for (unsigned i = 0; i < 10; i++) {
                refresh(self);
                assert_non_null(at(self, p));
        }
        at(self, p)->told = false;
        while (at(self, p)) {
                refresh(self);
                assert_in_range(++passes, 1, 10);
        }
        assert_true(passes > 1);
        assert_null(block_of_ref(&self->table, ref, &(unsigned) { 0 }));
        assert_true(self->table.n_quarantine >= 1);
        /* What maps the zero page now keeps its block: KSM may have put it there for us. */
        if (!self->space.plain_pagemap)
                assert_non_null(at(self, p + BLOCK_BYTES));
        munmap(p, 2 * BLOCK_BYTES);
}

static void test_huge(void **state) {
        Self *self = *state;
        char *p = map_blocks(2, PROT_READ | PROT_WRITE);
        VmaList vmas;
        bool got;

        assert_int_equal(madvise(p, 2 * BLOCK_BYTES, MADV_HUGEPAGE), 0);
        p[0] = p[BLOCK_BYTES] = 1;
        assert_int_equal(target_read_vmas(self->space.target, false, &vmas), 0);
        got = vma_list_find(&vmas, (uintptr_t)p)->huge_bytes == 2 * BLOCK_BYTES;
        vma_list_done(&vmas);
        if (!got || (self->plain && geteuid() != 0)) { /* PFNs are for root */
                munmap(p, 2 * BLOCK_BYTES);
                skip();
        }
        /* MADV_HUGEPAGE wakes khugepaged, which would put together at once what is split here. */
        assert_int_equal(prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0), 0);
        refresh(self);
        assert_true(at(self, p)->huge);
        assert_true(at(self, p + BLOCK_BYTES)->huge);
        madvise(p + PAGE_BYTES, PAGE_BYTES, MADV_DONTNEED); /* splits the first */
        refresh(self);
        assert_false(at(self, p)->huge);
        assert_true(at(self, p + BLOCK_BYTES)->huge);
        assert_int_equal(prctl(PR_SET_THP_DISABLE, 0, 0, 0, 0), 0);
        munmap(p, 2 * BLOCK_BYTES);
}

/* A list without sums: what of them is needed comes from the look at what is present, and the blocks are the same. */
static void test_uncounted(void **state) {
        Self *self = *state;
        char *p = map_blocks(8, PROT_READ | PROT_WRITE);
        VmaList vmas;
        Vma *vma;
        size_t n;

        madvise(p + 6 * BLOCK_BYTES, 2 * BLOCK_BYTES, MADV_HUGEPAGE); /* two mappings */
        p[0] = p[5 * PAGE_BYTES] = p[3 * BLOCK_BYTES] = p[6 * BLOCK_BYTES] = 1;
        if (test_has_zero_page()) /* which is not anonymous */
                assert_int_equal(*(volatile char *)(p + 4 * BLOCK_BYTES), 0);
        refresh(self);
        n = self->space.n;
        assert_non_null(at(self, p + 6 * BLOCK_BYTES));
        assert_int_equal(target_read_vmas(self->space.target, false, &vmas), 0);
        for (unsigned i = 0; i < 2; i++) {
                uint64_t counted;

                vma = &vmas.vmas[vma_list_first(&vmas, (uintptr_t)p + i * 6 * BLOCK_BYTES)];
                counted = vma->anonymous_bytes;
                assert_int_equal(counted, i == 0 ? 3 * PAGE_BYTES : MAX_OF(vma->huge_bytes, PAGE_BYTES));
                vma->anonymous_bytes = vma->end - vma->start;
                vma->huge_bytes = vma->rss_bytes = vma->referenced_bytes = 0;
                vmas.uncounted = true;
                assert_int_equal(space_refresh(&self->space, &vmas), self->plain ? -EOPNOTSUPP : 0);
                if (!self->plain)
                        assert_int_equal(vma->anonymous_bytes, counted);
        }
        assert_int_equal(self->space.n, n);
        vma_list_done(&vmas);
        munmap(p, 8 * BLOCK_BYTES);
}

static void test_gone(void **state) {
        Self *self = *state;
        Space space = { .table = &self->table, .plain_pagemap = self->plain };
        VmaList vmas;
        size_t n;
        pid_t pid = fork();

        if (pid == 0) {
                pause();
                _exit(0);
        }
        assert_int_equal(target_new(pid, &space.target), 0);
        assert_int_equal(target_open_memory(space.target), 0);
        assert_int_equal(target_read_vmas(space.target, false, &vmas), 0);
        assert_int_equal(space_refresh(&space, &vmas), 0);
        n = space.n;
        assert_true(n > 0);
        kill(pid, SIGKILL);
        waitpid(pid, NULL, 0);
        assert_int_equal(space_refresh(&space, &vmas), TARGET_E_GONE);
        assert_int_equal(space.n, n);
        vma_list_done(&vmas);
        target_free(space.target);
        space_done(&space);
}

/* After execve(2) the process lives, and what was known of its memory is worth nothing. */
static void test_exec(void **state) {
        Self *self = *state;
        Space space = { .table = &self->table, .plain_pagemap = self->plain };
        int go[2], done[2];
        VmaList vmas;
        char c = 0;
        pid_t pid;

        assert_int_equal(pipe2(go, O_CLOEXEC), 0);
        assert_int_equal(pipe2(done, O_CLOEXEC), 0);
        pid = fork();
        if (pid == 0) {
                if (read(go[0], &c, 1) == 1)
                        execl("/bin/sleep", "sleep", "1000", NULL);
                _exit(1);
        }
        close(done[1]);
        assert_int_equal(target_new(pid, &space.target), 0);
        assert_int_equal(target_open_memory(space.target), 0);
        assert_int_equal(target_read_vmas(space.target, false, &vmas), 0);
        assert_int_equal(space_refresh(&space, &vmas), 0);
        assert_int_equal(write(go[1], "x", 1), 1);
        assert_int_equal(read(done[0], &c, 1), 0); /* closed by execve(2) */
        assert_true(target_alive(space.target));
        assert_int_equal(space_refresh(&space, &vmas), TARGET_E_GONE);
        kill(pid, SIGKILL);
        waitpid(pid, NULL, 0);
        close(go[0]);
        close(go[1]);
        close(done[0]);
        vma_list_done(&vmas);
        target_free(space.target);
        space_done(&space);
}

#define BOTH(f)                                                        \
        { #f " by PAGEMAP_SCAN", f, setup_scan, teardown, NULL },      \
        { #f " by plain pagemap", f, setup_plain, teardown, NULL }

int main(void) {
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(test_page_set), cmocka_unit_test(test_table),
                BOTH(test_sparse), BOTH(test_kinds), BOTH(test_small_mappings), BOTH(test_fragmented),
                BOTH(test_dying), BOTH(test_huge), BOTH(test_uncounted), BOTH(test_gone), BOTH(test_exec),
        };

        return cmocka_run_group_tests(tests, NULL, NULL);
}
