/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * scan/track leaves a process as it was: huge pages huge, mappings in one piece, nothing registered or protected, be
 * it given back or left by a daemon that was killed; and nobody has to wait long for his mappings meanwhile.
 */
#include "track-child.h"

#include "scan/estimate.h"

#include <linux/userfaultfd.h>
#include <pthread.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/wait.h>

#define PAGEMAP_UFFD_WP ((uint64_t)1 << 57)

/* Pages of the area that are write-protected now, as pagemap has it. */
static size_t count_protected(const Child *child) {
        static uint64_t entries[BLOCK_PAGES];
        size_t n = 0;

        for (uint64_t i = 0; i < shared->pages; i += BLOCK_PAGES) {
                size_t bytes = MIN_OF(shared->pages - i, (uint64_t)BLOCK_PAGES) * sizeof *entries;
                CHECK(pread(child->target->pagemapfd, entries, bytes, (off_t)(area_page(i) / PAGE_BYTES * 8)) ==
                      (ssize_t)bytes);
                for (size_t k = 0; k < bytes / sizeof *entries; k++)
                        n += !!(entries[k] & PAGEMAP_UFFD_WP);
        }
        return n;
}

static size_t count_tracked(Child *child) {
        size_t n = 0;

        vma_list_done(&child->vmas);
        CHECK(target_read_vmas(child->target, false, &child->vmas) == 0);
        for (size_t i = 0; i < child->vmas.n; i++)
                n += child->vmas.vmas[i].tracked;
        return n;
}

static uint64_t huge_bytes(Child *child) {
        uint64_t bytes = 0;

        vma_list_done(&child->vmas);
        CHECK(target_read_vmas(child->target, false, &child->vmas) == 0);
        for (size_t i = 0; i < child->vmas.n; i++)
                bytes += child->vmas.vmas[i].huge_bytes;
        return bytes;
}

static long touch_each(long step) {
        for (uint64_t i = 0; i < shared->pages; i += (uint64_t)step)
                ++*(volatile uint8_t *)area_page(i);
        return 0;
}
/* Some of them small: their pages are tracked beside huge ones. */
static long split_some(long every) {
        for (uint64_t i = 0; i < shared->pages; i += BLOCK_PAGES * (uint64_t)every)
                if (madvise((void *)area_page(i + 7), PAGE_BYTES, MADV_DONTNEED) != 0)
                        return -1;
        return 0;
}

/* Ten rounds of protecting and writing; the control protects them the naive way. */
static void test_huge(bool naive) {
        const size_t blocks = 64;
        Child child = child_start();
        uint64_t before;

        child_order(&child, order_map_huge, (long)(blocks * BLOCK_BYTES));
        child_order(&child, touch_each, 1);
        CHECK(child_order(&child, split_some, 8) == 0);
        before = huge_bytes(&child);
        if (before < blocks / 2 * BLOCK_BYTES) {
                printf("no huge pages to be had\n");
                child_stop(&child);
                return;
        }
        child_adopt(&child);
        for (int round = 0; round < 10; round++) {
                size_t n;
                if (naive) {
                        struct uffdio_writeprotect all = { { shared->start, shared->pages * PAGE_BYTES },
                                                           UFFDIO_WRITEPROTECT_MODE_WP };
                        CHECK(ioctl(child.track->uffd, UFFDIO_WRITEPROTECT, &all) == 0);
                }
                n = child_count_written(&child, shared->start, area_end());
                /* 8 of the blocks are of small pages: the first page of each is written to. */
                CHECK(naive || n == (round == 0 ? shared->pages - before / PAGE_BYTES - blocks / 8 : blocks / 8),
                      "round %d: %zu", round, n);
                child_order(&child, touch_each, BLOCK_PAGES);
                CHECK(naive == (huge_bytes(&child) != before), "round %d: %lu huge, were %lu", round,
                      huge_bytes(&child), before);
        }
        child_stop(&child);
}

static long make_pieces(long n) {
        for (long i = 1; i < n; i += 2)
                if (mprotect((void *)area_page((uint64_t)i), PAGE_BYTES, PROT_READ) != 0)
                        return -1;
        return 0;
}

/* 512 MiB, and thousands of small mappings: as many afterwards as before, nothing registered, nothing protected; in one
 * go, or bit by bit. */
static void test_free(bool bit_by_bit) {
        Child child = child_start();
        size_t mappings;

        child_order(&child, order_map, (long)(512 * MIB));
        child_order(&child, touch_each, 1);
        CHECK(child_order(&child, make_pieces, 4000) == 0);
        mappings = child_count_mappings(&child);
        child_adopt(&child);
        CHECK(count_tracked(&child) > 2000);
        CHECK(child_count_written(&child, shared->start, area_end()) >= shared->pages - 4000);
        CHECK(count_protected(&child) >= shared->pages - 4000);
        if (bit_by_bit) {
                CHECK(!track_release(child.track, 0) && count_protected(&child) >= shared->pages - 4000);
                while (!track_release(child.track, now_nsec() + 10 * NSEC_PER_MSEC))
                        ;
        } else
                child.track = track_free(child.track);
        CHECK(count_tracked(&child) == 0 && count_protected(&child) == 0);
        CHECK(child_count_mappings(&child) == mappings, "%zu, were %zu", child_count_mappings(&child), mappings);
        child_order(&child, touch_each, 2);
        child_stop(&child);
}

/* Whoever tracks is killed: by the kernel alone everything is as before. */
static void test_death(void) {
        Child child = child_start();
        size_t mappings;
        int fds[2];
        char ready;
        pid_t daemon;

        child_order(&child, order_map, (long)(64 * MIB));
        child_order(&child, touch_each, 1);
        mappings = child_count_mappings(&child);
        CHECK(pipe2(fds, O_CLOEXEC) == 0);
        daemon = fork();
        if (daemon == 0) {
                child_adopt(&child);
                child_count_written(&child, shared->start, area_end());
                CHECK(write(fds[1], "r", 1) == 1);
                for (;;)
                        pause();
        }
        CHECK(read(fds[0], &ready, 1) == 1);
        CHECK(count_tracked(&child) > 0 && count_protected(&child) == shared->pages);
        CHECK(kill(daemon, SIGKILL) == 0 && waitpid(daemon, NULL, 0) == daemon);
        CHECK(count_tracked(&child) == 0 && count_protected(&child) == 0);
        CHECK(child_count_mappings(&child) == mappings);
        child_order(&child, touch_each, 1);
        child_adopt(&child); /* by the next one */
        CHECK(child_count_written(&child, shared->start, area_end()) == shared->pages);
        child_stop(&child);
        close(fds[0]);
        close(fds[1]);
}

static EstimateCounts estimate_of(const Child *child) {
        _cleanup_(estimate_freep) Estimate *estimate = NULL;
        _cleanup_(target_freep) Target *target = NULL;
        EstimateCounts counts;
        unsigned process;

        CHECK(target_new(child->pid, &target) == 0);
        CHECK(estimate_new(&estimate) == 0 && estimate_add(estimate, target, false, 0, &process) == 0 &&
              estimate_finish(estimate) == 0);
        estimate_total(estimate, &counts);
        return counts;
}

/* `ksmctl estimate` beside a daemon that tracks: the same pages are there to be counted. */
static void test_estimate(void) {
        Child child = child_start();
        EstimateCounts before, after;

        child_order(&child, order_map, (long)(16 * MIB));
        child_order(&child, touch_each, 1);
        before = estimate_of(&child);
        CHECK(before.pages + before.already_shared >= shared->pages);
        child_adopt(&child);
        after = estimate_of(&child);
        CHECK(after.pages == before.pages && after.unread == before.unread, "%lu, were %lu", after.pages, before.pages);
        CHECK(child_count_written(&child, shared->start, area_end()) == shared->pages);
        CHECK(estimate_of(&child).pages == before.pages);
        CHECK(child_count_written(&child, shared->start, area_end()) == 0); /* reading writes nothing */
        child_stop(&child);
}

static void *watch_latency(void *unused) {
        while (!__atomic_load_n(&shared->stop, __ATOMIC_ACQUIRE)) {
                uint64_t began = now_nsec(), took;
                char *p = mmap(NULL, PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
                *(volatile char *)p = 1;
                munmap(p, PAGE_BYTES);
                took = now_nsec() - began;
                if (took > __atomic_load_n(&shared->counters[0], __ATOMIC_RELAXED))
                        __atomic_store_n(&shared->counters[0], took, __ATOMIC_RELAXED);
                ++*(volatile uint64_t *)&shared->counters[1];
        }
        return NULL;
}
static pthread_t watcher;
static long begin_watch(long unused) {
        shared->stop = 0;
        shared->counters[0] = shared->counters[1] = 0;
        return pthread_create(&watcher, NULL, watch_latency, NULL);
}
static long end_watch(long unused) {
        __atomic_store_n(&shared->stop, 1, __ATOMIC_RELEASE);
        return pthread_join(watcher, NULL);
}

/* The longest that mmap, a fault and munmap took while 1 GiB was given back, in pieces and at once. Printed, and no
 * verdict: the CPU may be somebody else's. */
static void show_latency(void) {
        Child child = child_tracked(GIB / PAGE_BYTES);

        for (int at_once = 0; at_once < 2; at_once++) {
                uint64_t took = 0;
                CHECK(child_order(&child, begin_watch, 0) == 0);
                usleep(20000);
                for (int i = 0; i < 5; i++) {
                        if (!child.track)
                                child_adopt(&child);
                        child_count_written(&child, shared->start, area_end());
                        __atomic_store_n(&shared->counters[0], 0, __ATOMIC_RELAXED);
                        uint64_t began = now_nsec();
                        if (at_once) {
                                struct uffdio_range all = { shared->start, shared->pages * PAGE_BYTES };
                                CHECK(ioctl(child.track->uffd, UFFDIO_UNREGISTER, &all) == 0);
                        }
                        child.track = track_free(child.track);
                        took = now_nsec() - began;
                        usleep(2000);
                        printf("1 GiB given back %s in %.1f ms: the longest mmap, fault and munmap meanwhile %.2f ms\n",
                               at_once ? "at once " : "in pieces", (double)took / 1e6,
                               (double)__atomic_load_n(&shared->counters[0], __ATOMIC_RELAXED) / 1e6);
                }
                CHECK(child_order(&child, end_watch, 0) == 0);
        }
        child_stop(&child);
}

int main(void) {
        track_test_begin();
        test_huge(false);
        test_huge(true);
        test_free(false);
        test_free(true);
        test_death();
        test_estimate();
        show_latency();
        track_test_end();
        return 0;
}
