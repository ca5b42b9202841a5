/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Promises: PAGEMAP_SCAN (Linux 6.7) walks only page tables that exist, faults nothing in and fills none: finding
 * 1,024 pages in 1 TiB takes milliseconds and leaves the target's VmPTE as it was. And a process with 60,000 mappings
 * is read in a time that follows their number.
 *
 * The limits on time are ten times what a quiet machine needs and more: they catch a walk over what is not there.
 */
#include "../test.h"

#include "base/io.h"
#include "scan/block.h"

#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>

#define SPARSE_BYTES ((uint64_t)1 << 40)
#define SPARSE_PAGES 1024
#define MAPPINGS 60000
#define FULL_BYTES ((uint64_t)256 << 20)

static char *memory;
static int to_child[2], from_child[2];

/* A child that makes its memory, then waits and touches more of it when told. */
static pid_t spawn(void (*make)(void), void (*more)(void)) {
        pid_t pid;
        char c;

        CHECK(pipe2(to_child, O_CLOEXEC) == 0 && pipe2(from_child, O_CLOEXEC) == 0);
        pid = fork();
        CHECK(pid >= 0);
        if (pid == 0) {
                prctl(PR_SET_PDEATHSIG, SIGKILL);
                make();
                CHECK(write(from_child[1], &memory, sizeof memory) == sizeof memory);
                CHECK(read(to_child[0], &c, 1) == 1);
                more();
                CHECK(write(from_child[1], "x", 1) == 1);
                for (;;)
                        pause();
        }
        CHECK(read(from_child[0], &memory, sizeof memory) == sizeof memory);
        return pid;
}

static void tell(void) {
        char c;

        CHECK(write(to_child[1], "x", 1) == 1 && read(from_child[0], &c, 1) == 1);
}

static void end(pid_t pid) {
        kill(pid, SIGKILL);
        CHECK(waitpid(pid, NULL, 0) == pid);
}

/* Page tables, and what is present, in kB. */
static void read_status(const Target *target, unsigned long *ret_pte, unsigned long *ret_rss) {
        _cleanup_free_ char *status = NULL;

        CHECK(read_file(target->procfd, "status", &status, NULL) == 0);
        CHECK(sscanf(strstr(status, "\nVmPTE:"), " VmPTE: %lu", ret_pte) == 1);
        CHECK(sscanf(strstr(status, "\nRssAnon:"), " RssAnon: %lu", ret_rss) == 1);
}

static uint64_t refresh(Space *space, size_t *ret_vmas) {
        uint64_t start = now_nsec(), listed, done;
        VmaList vmas;

        CHECK(target_read_vmas(space->target, false, &vmas) == 0);
        listed = now_nsec();
        CHECK(space_refresh(space, &vmas) == 0);
        done = now_nsec();
        printf("%zu mappings listed in %.2f ms, %zu blocks found in %.2f ms\n", vmas.n,
               (double)(listed - start) / 1e6, space->n, (double)(done - listed) / 1e6);
        *ret_vmas = vmas.n;
        vma_list_done(&vmas);
        return done - start;
}

static void make_sparse(void) {
        memory = mmap(NULL, SPARSE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        CHECK(memory != MAP_FAILED && madvise(memory, SPARSE_BYTES, MADV_NOHUGEPAGE) == 0);
        for (uint64_t i = 0; i < SPARSE_PAGES; i++)
                memory[i * (SPARSE_BYTES / SPARSE_PAGES)] = 1;
}

static void touch_more(void) {
        for (uint64_t i = 0; i < SPARSE_PAGES; i++)
                memory[i * (SPARSE_BYTES / SPARSE_PAGES) + SPARSE_BYTES / SPARSE_PAGES / 2] = 1;
}

static void test_sparse(void) {
        BlockTable table = {};
        Space space = { .table = &table };
        pid_t pid = spawn(make_sparse, touch_more);
        unsigned long pte, rss, pte_after, rss_after;
        uint64_t nsec = UINT64_MAX;
        size_t vmas;

        CHECK(target_new(pid, &space.target) == 0 && target_open_memory(space.target) == 0);
        read_status(space.target, &pte, &rss);
        for (int pass = 0; pass < 3; pass++)
                nsec = MIN_OF(nsec, refresh(&space, &vmas));
        if (space.plain_pagemap)
                TEST_SKIP("no PAGEMAP_SCAN");
        for (uint64_t i = 0; i < SPARSE_PAGES; i++) {
                uint64_t address = (uintptr_t)memory + i * (SPARSE_BYTES / SPARSE_PAGES);

                CHECK(space_find(&space, address));
                CHECK(!space_find(&space, address + 2 * BLOCK_BYTES));
        }
        CHECK(space.n < SPARSE_PAGES + 100, "%zu", space.n);
        CHECK(table.bytes < (SPARSE_PAGES + 100) * 2 * sizeof(Block), "%lu bytes", table.bytes);
        read_status(space.target, &pte_after, &rss_after);
        printf("1 TiB: VmPTE %lu kB before, %lu after; RssAnon %lu, %lu kB\n", pte, pte_after, rss, rss_after);
        CHECK(pte_after == pte && rss_after == rss);
        CHECK(nsec < 300 * NSEC_PER_MSEC, "%.1f ms", (double)nsec / 1e6);

        /* The control: had something been filled in, it would show. */
        tell();
        read_status(space.target, &pte_after, &rss_after);
        CHECK(pte_after > pte && rss_after > rss);
        refresh(&space, &vmas);
        CHECK(space.n >= 2 * SPARSE_PAGES && space.n < 2 * SPARSE_PAGES + 100, "%zu", space.n);
        end(pid);
        target_free(space.target);
        space_done(&space);
        block_table_done(&table);
}

static void make_many(void) {
        memory = mmap(NULL, MAPPINGS * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        CHECK(memory != MAP_FAILED);
        memset(memory, 1, MAPPINGS * PAGE_BYTES);
        for (uint64_t i = 0; i < MAPPINGS; i += 2)
                CHECK(mprotect(memory + i * PAGE_BYTES, PAGE_BYTES, PROT_READ) == 0);
}

static void keep_few(void) {
        CHECK(munmap(memory + BLOCK_BYTES, MAPPINGS * PAGE_BYTES - BLOCK_BYTES) == 0);
}

static void test_many(void) {
        _cleanup_free_ char *smaps = NULL;
        BlockTable table = {};
        Space space = { .table = &table };
        uint64_t max_map_count = 0, nsec, best = UINT64_MAX;
        size_t size, vmas, few;
        VmaList list;
        pid_t pid;

        if (read_u64(AT_FDCWD, "/proc/sys/vm/max_map_count", &max_map_count) < 0 || max_map_count < MAPPINGS + 1000)
                TEST_SKIP("vm.max_map_count is %lu", (unsigned long)max_map_count);
        pid = spawn(make_many, keep_few);
        CHECK(target_new(pid, &space.target) == 0 && target_open_memory(space.target) == 0);
        nsec = refresh(&space, &vmas);
        nsec = MIN_OF(nsec, refresh(&space, &vmas));
        CHECK(vmas >= MAPPINGS && vmas < MAPPINGS + 500, "%zu", vmas);
        CHECK(space.n <= DIV_ROUND_UP(MAPPINGS, BLOCK_PAGES) + 100, "%zu", space.n);
        for (uint64_t i = 0; i < MAPPINGS; i++)
                CHECK(space_find(&space, (uintptr_t)memory + i * PAGE_BYTES));

        CHECK(read_file(space.target->procfd, "smaps", &smaps, &size) == 0);
        for (int i = 0; i < 5; i++) {
                uint64_t start = now_nsec();

                CHECK(vma_list_parse(smaps, false, &list) == 0);
                best = MIN_OF(best, now_nsec() - start);
                CHECK(list.n == vmas);
                vma_list_done(&list);
        }
        printf("parsing alone: %.0f ns a mapping, %.2f GB/s\n", (double)best / (double)vmas,
               (double)size / (double)best);
        CHECK(nsec < 10 * NSEC_PER_SEC, "%.1f ms", (double)nsec / 1e6);

        tell();
        refresh(&space, &few);
        CHECK(few < vmas / 50);
        end(pid);
        target_free(space.target);
        space_done(&space);
        block_table_done(&table);
}

/* What the list costs when it is the pages that are many: the kernel counts them for smaps. */
static void make_full(void) {
        memory = mmap(NULL, FULL_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        CHECK(memory != MAP_FAILED && madvise(memory, FULL_BYTES, MADV_NOHUGEPAGE) == 0);
        for (size_t i = 0; i < FULL_BYTES; i += PAGE_BYTES)
                memory[i] = 1;
}

static void give_back(void) { CHECK(madvise(memory, FULL_BYTES, MADV_DONTNEED) == 0); }

static void test_full(void) {
        BlockTable table = {};
        Space space = { .table = &table };
        pid_t pid = spawn(make_full, give_back);
        size_t vmas;

        CHECK(target_new(pid, &space.target) == 0 && target_open_memory(space.target) == 0);
        printf("256 MiB present:\n");
        refresh(&space, &vmas);
        refresh(&space, &vmas);
        for (uint64_t i = 0; i < FULL_BYTES; i += BLOCK_BYTES)
                CHECK(space_find(&space, (uintptr_t)memory + i));
        tell();
        for (int pass = 0; pass < 10; pass++)
                refresh(&space, &vmas);
        for (uint64_t i = BLOCK_BYTES; i < FULL_BYTES - BLOCK_BYTES; i += BLOCK_BYTES)
                CHECK(!space_find(&space, (uintptr_t)memory + i));
        end(pid);
        target_free(space.target);
        space_done(&space);
        block_table_done(&table);
}

int main(void) {
        test_need_root();
        setvbuf(stdout, NULL, _IOLBF, 0);
        test_sparse();
        test_many();
        test_full();
        return 0;
}
