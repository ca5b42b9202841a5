/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * What a pool promises, and what of it the kernel keeps for us: targets cannot write to it, whoever they are; its pages are
 * neither swapped out nor collapsed while they line up with nothing; the kernel's counts say who maps them; and a page is
 * free when nobody does.
 */
#include "guard-child.h"

#include "base/io.h"
#include "merge/pool-count.h"

#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/swap.h>
#include <sys/wait.h>

#define PAGES 1536U
#define SHMEM_ENABLED "/sys/kernel/mm/transparent_hugepage/shmem_enabled"
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25 /* 6.1 */
#endif

/* As root, holding the descriptor that targets get. Each attempt that works is a bit. */
static long order_attack(long fd) {
        char path[64];
        long worked = 0;
        void *p;
        int again;

        snprintf(path, sizeof path, "/proc/self/fd/%ld", fd);
        again = open(path, O_RDWR | O_CLOEXEC);
        worked |= (again >= 0) << 0;
        safe_close(again);
        again = open(path, O_WRONLY | O_CLOEXEC | O_TRUNC);
        worked |= (again >= 0) << 1;
        safe_close(again);
        worked |= (fchmod((int)fd, 0666) == 0) << 2;
        worked |= (fchown((int)fd, 1, 1) == 0) << 3;
        p = mmap(NULL, PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, (int)fd, 0);
        worked |= (p != MAP_FAILED) << 4;
        p = mmap(NULL, PAGE_BYTES, PROT_READ, MAP_SHARED, (int)fd, 0);
        worked |= (p != MAP_FAILED && mprotect(p, PAGE_BYTES, PROT_READ | PROT_WRITE) == 0) << 5;
        worked |= (p != MAP_FAILED && madvise(p, PAGE_BYTES, MADV_REMOVE) == 0) << 6;
        worked |= (fallocate((int)fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, (off_t)PAGE_BYTES) == 0) << 7;
        worked |= (ftruncate((int)fd, 0) == 0) << 8;
        worked |= (pwrite((int)fd, "x", 1, 0) > 0) << 9;
        snprintf(path, sizeof path, "/proc/self/fd/%ld/../pool", fd);
        again = open(path, O_RDWR | O_CLOEXEC);
        worked |= (again >= 0) << 10;
        safe_close(again);
        return worked;
}

static void test_attack(void) {
        Child child = child_start();
        char page[PAGE_BYTES];
        int memfd = memfd_create("control", MFD_CLOEXEC);
        char path[64];
        int readonly;
        long worked = child_order(&child, order_attack, pool_target_fd(pool));

        CHECK(worked == 0, "attempts %lx worked", worked);
        CHECK(pool_read(pool, 0, 1, page) == 0 && page_is(page, 0));
        child_stop(&child);
        /* The same against what does not hold, so that it is known to be able to work: a memfd of mode 0400. */
        CHECK(memfd >= 0 && ftruncate(memfd, (off_t)PAGE_BYTES) == 0 && fchmod(memfd, 0400) == 0);
        snprintf(path, sizeof path, "/proc/self/fd/%d", memfd);
        readonly = open(path, O_RDONLY);
        CHECK(readonly >= 0);
        child = child_start();
        CHECK(child_order(&child, order_attack, readonly) & 1);
        child_stop(&child);
        close(readonly);
        close(memfd);
}

static void test_counts(void) {
        Guarded guarded[3];
        uint32_t sharers[64];
        uint64_t freed = 0, page;
        PoolStats stats;

        for (unsigned i = 0; i < 3; i++)
                guarded[i] = guarded_start(64, true);
        CHECK(pool_sharers(pool, pool_first, 64, sharers) == 0);
        for (unsigned i = 0; i < 64; i++)
                CHECK(sharers[i] == 3, "page %u: %u", i, sharers[i]);
        CHECK(pool_sharers(pool, 70, 1, sharers) == 0 && sharers[0] == 0);
        CHECK(pool_sharers(pool, PAGES + 100, 1, sharers) == 0 && sharers[0] == UINT32_MAX);
        CHECK(pool_stats(pool, &stats) == 0 && stats.mappings == 3 * 64 && stats.frames == PAGES);
        /* While they are mapped, and while they are reserved, none is freed. */
        CHECK(pool_collect(pool, UINT64_MAX, &freed) == 0 && freed == 0);
        CHECK(child_order(&guarded[0].child, order_discard, 5) == 0);
        CHECK(pool_collect(pool, UINT64_MAX, &freed) == 0 && freed == 0);
        CHECK(pool_space(pool)->sharers[5] == 2 && pool_space(pool)->sharers[6] == 3);
        for (unsigned i = 0; i < 3; i++)
                guarded_stop(&guarded[i]);
        CHECK(pool_collect(pool, UINT64_MAX, &freed) == 0 && freed == 64, "%lu", freed);
        CHECK(pool_stats(pool, &stats) == 0 && stats.frames == PAGES - 64 && stats.pages == PAGES - 64);
        CHECK(pool_sharers(pool, 5, 1, sharers) == 0 && sharers[0] == UINT32_MAX);
        /* A hole is used again, and given back when it is not needed. */
        CHECK(pool_alloc_at(pool, 0, 64, NULL, 0) == 0);
        for (page = 0; page < 64; page++) {
                char data[PAGE_BYTES];
                page_fill(data, page);
                CHECK(pool_write(pool, page, 1, data) == 0);
        }
        CHECK(pool_alloc(pool, 8, NULL, 0, &page) == 0 && page == PAGES);
        CHECK(pool_give_back(pool, page, 8) == 0 && pool_give_back(pool, page, 8) == -EINVAL);
        CHECK(pool_stats(pool, &stats) == 0 && stats.frames == PAGES && stats.highest == PAGES);
}

/* Everything is reclaimed that can be, with swap to go to. */
static long order_pageout(long n_pages) {
        return madvise((void *)area_page(0), (size_t)n_pages * PAGE_BYTES, MADV_PAGEOUT) == 0 ? 0 : -errno;
}

static char swap_file[] = "/var/tmp/ksmd-swap-XXXXXX";
static bool swap_made;

/* However this test ends: nobody else could remove it. */
static void end_swap(void) {
        if (!swap_made)
                return;
        swap_made = false;
        (void)swapoff(swap_file);
        (void)unlink(swap_file);
}

static void test_noswap(void) {
        static char block[1 << 20];
        char command[96];
        Guarded guarded;
        uint32_t sharers[64];
        int fd = mkstemp(swap_file);

        CHECK(fd >= 0);
        swap_made = true;
        test_at_end(end_swap);
        for (unsigned i = 0; i < 32; i++)
                CHECK(write(fd, block, sizeof block) == sizeof block);
        snprintf(command, sizeof command, "/sbin/mkswap %s > /dev/null 2>&1", swap_file);
        if (system(command) != 0 || swapon(swap_file, 0) < 0) {
                TEST_SKIP_PART("no swap to be had here: %s", strerror(errno));
                end_swap();
                close(fd);
                return;
        }
        guarded = guarded_start(64, true);
        CHECK(child_order(&guarded.child, order_pageout, 64) == 0);
        CHECK(pool_sharers(pool, pool_first, 64, sharers) == 0);
        for (unsigned i = 0; i < 64; i++)
                CHECK(sharers[i] == 1, "page %u was taken away", i);
        CHECK_HARMLESS(child_order(&guarded.child, order_check_pool, 64) == 0);
        guarded_stop(&guarded);
        CHECK(swapoff(swap_file) == 0);
        end_swap();
        close(fd);
}

static long order_collapse(long start) {
        return madvise((void *)start, BLOCK_BYTES, MADV_COLLAPSE) == 0 ? 0 : -errno;
}

static char shmem_enabled_found[16];
static void restore_shmem_enabled(void) {
        if (*shmem_enabled_found && write_text(AT_FDCWD, SHMEM_ENABLED, shmem_enabled_found) == 0)
                *shmem_enabled_found = 0;
}

/* A hostile target moves its run to where it lines up, and has it collapsed. */
static long order_line_up(long page) {
        uint64_t from = area_page(0), to = area_page(8 * BLOCK_PAGES);

        to += ((uint64_t)page * PAGE_BYTES - to) % BLOCK_BYTES; /* congruent now */
        if (mremap((void *)from, BLOCK_BYTES, BLOCK_BYTES, MREMAP_MAYMOVE | MREMAP_FIXED, (void *)to) == MAP_FAILED)
                return -errno;
        return (long)(to + (BLOCK_BYTES - to % BLOCK_BYTES) % BLOCK_BYTES);
}

/* n_pages in runs that each fit, as an executor maps them: 511 and 1. */
static Guarded start_block(void) {
        Guarded guarded = { .child = child_start() };

        guarded_map_area(&guarded.child, 2 * BLOCK_PAGES);
        guarded_guard(&guarded, true);
        guarded_remap(&guarded, 0, POOL_RUN_MAX, pool_first);
        guarded_remap(&guarded, POOL_RUN_MAX, BLOCK_PAGES - POOL_RUN_MAX + 200, pool_first + POOL_RUN_MAX);
        return guarded;
}

static void test_collapse(void) {
        Guarded guarded = start_block();
        _cleanup_free_ char *found = NULL;
        uint32_t sharers[BLOCK_PAGES];
        long r;

        /* Where we put it, it lines up nowhere. */
        for (uint64_t at = shared->start; at < area_page(200); at += PAGE_BYTES) {
                uint64_t start = at - at % BLOCK_BYTES;
                (void)child_order(&guarded.child, order_collapse, (long)MAX_OF(start, shared->start));
        }
        CHECK(pool_sharers(pool, pool_first, BLOCK_PAGES, sharers) == 0);
        for (unsigned i = 0; i < BLOCK_PAGES; i++)
                CHECK(sharers[i] == 1, "page %u: %u", i, sharers[i]);
        CHECK_HARMLESS(child_order(&guarded.child, order_check_pool, BLOCK_PAGES) == 0);
        guarded_stop(&guarded);

        /* Where the target puts it, only shmem_enabled=deny keeps it whole. */
        if (read_file(AT_FDCWD, SHMEM_ENABLED, &found, NULL) < 0 || !strchr(found, '['))
                return;
        CHECK(sscanf(strchr(found, '['), "[%15[^]]", shmem_enabled_found) == 1);
        test_at_end(restore_shmem_enabled);
        if (write_text(AT_FDCWD, SHMEM_ENABLED, "deny") < 0) {
                printf("shmem_enabled cannot be set here\n");
                return;
        }
        guarded = start_block();
        r = child_order(&guarded.child, order_line_up, (long)pool_first);
        CHECK(r > 0, "%ld", r);
        CHECK(child_order(&guarded.child, order_collapse, r) < 0, "collapsed in spite of deny");
        restore_shmem_enabled();
        CHECK(!*shmem_enabled_found);
        CHECK(pool_sharers(pool, pool_first, 200, sharers) == 0);
        for (unsigned i = 0; i < 200; i++)
                CHECK(sharers[i] == 1, "page %u: %u", i, sharers[i]);
        guarded_stop(&guarded);
}

/* What must be refused. */
static void test_refusals(void) {
        _cleanup_(pool_freep) Pool *other = NULL;
        char page[PAGE_BYTES] = { 0 };
        dev_t dev, other_dev;
        ino_t ino;

        CHECK(pool_take(pool, pool_first, 1, (pool_first + 5 * BLOCK_PAGES) << PAGE_SHIFT) == POOL_E_MISFIT);
        CHECK(pool_take(pool, PAGES + 1000, 1, PAGE_BYTES) == -EINVAL);
        CHECK(pool_take(pool, 900, 1, (uint64_t)1 << PAGE_SHIFT) == 0);
        CHECK(pool_write(pool, 900, 1, page) == -EINVAL); /* it may be mapped by now */
        CHECK(pool_give_back(pool, 900, 1) == -EINVAL);
        pool_drop(pool, 900, 1);
        CHECK(pool_open("another", pool_mount_fd(pool), 256, &other) == -EBADMSG);
        CHECK(pool_open("test", STDERR_FILENO, 256, &other) < 0);
        CHECK(pool_new("another", 256, &other, NULL) == 0);
        pool_identity(pool, &dev, &ino);
        pool_identity(other, &other_dev, &ino);
        CHECK(dev != other_dev);
}

/* pool.c's calls of it. */
int __real_pool_counter_count(PoolCounter *counter, uint64_t page, uint32_t n_pages, uint32_t *ret);
int __wrap_pool_counter_count(PoolCounter *counter, uint64_t page, uint32_t n_pages, uint32_t *ret);

static bool busy;
int __wrap_pool_counter_count(PoolCounter *counter, uint64_t page, uint32_t n_pages, uint32_t *ret) {
        int r = __real_pool_counter_count(counter, page, n_pages, ret);

        for (uint32_t i = 0; i < n_pages && busy; i++)
                ret[i] = POOL_COUNT_BUSY;
        return r;
}

/* A page that the kernel moves while a new daemon counts is counted again by a later collection. */
static void test_busy_recount(void) {
        _cleanup_(pool_freep) Pool *first = NULL, *again = NULL;
        char page[PAGE_BYTES] = { 1 };
        uint64_t number, freed = 0;
        PoolStats stats;

        CHECK(pool_new("busy", 256, &first, NULL) == 0);
        CHECK(pool_alloc(first, 1, NULL, 0, &number) == 0 && pool_write(first, number, 1, page) == 0);
        CHECK(pool_open("busy", pool_mount_fd(first), 256, &again) == 0);
        busy = true;
        CHECK(pool_recount(again) == 0);
        CHECK(pool_collect(again, PAGES, &freed) == 0 && freed == 0); /* it may be anybody's */
        busy = false;
        CHECK(pool_collect(again, PAGES, &freed) == 0 && freed == 1, "%lu", freed);
        CHECK(pool_stats(again, &stats) == 0 && stats.pages == 0 && stats.frames == 0);
}

int main(int argc, char **argv) {
        CHECK(argc == 2);
        test_need_root();
        test_lock_ksm(); /* swap and shmem_enabled are everybody's */
        guard_test_begin(PAGES, argv[1]);
        test_attack();
        test_counts();
        test_noswap();
        test_collapse();
        test_refusals();
        test_busy_recount();
        guard_test_end();
        return 0;
}
