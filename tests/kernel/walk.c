/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Measuring what a walk of the reverse map costs: it leaves nothing behind, and the limit that follows from it keeps the
 * walk it stands for below the time asked for. Judged by CPU time, which a busy machine leaves alone.
 */
#include "base/clock.h"
#include "base/io.h"
#include "host/walk.h"
#include "tests/test.h"

#include <fcntl.h>
#include <linux/falloc.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

static size_t count_mappings(void) {
        _cleanup_free_ char *text = NULL;
        size_t n = 0;

        CHECK(read_file(AT_FDCWD, "/proc/self/maps", &text, NULL) == 0);
        for (const char *p = text; (p = strchr(p, '\n')); p++)
                n++;
        return n;
}

/* The walk itself, on n mappings: the least of some. */
static uint64_t walk(unsigned n) {
        uint64_t best = UINT64_MAX;

        for (unsigned round = 0; round < 5; round++) {
                int fd = memfd_create("walk", MFD_CLOEXEC);
                uint64_t began;

                CHECK(fd >= 0 && ftruncate(fd, PAGE_BYTES) == 0);
                uint8_t *area = mmap(NULL, 2 * n * PAGE_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
                for (unsigned i = 0; i < n; i++) {
                        uint8_t *page = area + 2 * i * PAGE_BYTES;

                        CHECK(mmap(page, PAGE_BYTES, PROT_READ, MAP_SHARED | MAP_FIXED, fd, 0) == page);
                        CHECK(*(volatile uint8_t *)page == 0);
                }
                began = clock_nsec(CLOCK_THREAD_CPUTIME_ID);
                CHECK(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, (off_t)PAGE_BYTES) == 0);
                best = MIN_OF(best, clock_nsec(CLOCK_THREAD_CPUTIME_ID) - began);
                munmap(area, 2 * n * PAGE_BYTES);
                close(fd);
        }
        return best;
}

int main(void) {
        size_t before = count_mappings();
        uint64_t began = clock_nsec(CLOCK_THREAD_CPUTIME_ID), at_2, at_64, at_limit;
        WalkCost cost;
        uint32_t limit;
        int r = walk_measure(&cost);

        CHECK(r == 0, "%s", strerror(-r));
        printf("%llu ns a mapping, %s, measured in %.1f ms; 1 ms are %u mappings, in 4,000 pieces each %u\n",
               (unsigned long long)cost.mapping_nsec, cost.moved ? "moved" : "taken out",
               (double)(clock_nsec(CLOCK_THREAD_CPUTIME_ID) - began) / NSEC_PER_MSEC,
               walk_limit(&cost, NSEC_PER_MSEC, 0), walk_limit(&cost, NSEC_PER_MSEC, 4000));
        CHECK(count_mappings() <= before + 1, "mappings were left"); /* the heap */
        CHECK(cost.mapping_nsec >= 10 && cost.mapping_nsec < NSEC_PER_MSEC);
        if (cost.moved)
                return 0; /* another walk than the one below */
        limit = walk_limit(&cost, NSEC_PER_MSEC / 2, 0);
        limit = MIN_OF(limit, 16000U);
        at_2 = walk(2);
        at_64 = walk(64);
        at_limit = walk(limit);
        printf("walks: 2 mappings %llu, 64 %llu, %u %llu ns\n", (unsigned long long)at_2, (unsigned long long)at_64, limit,
               (unsigned long long)at_limit);
        CHECK(at_2 < at_64 && at_64 < at_limit, "a walk over more mappings is no longer");
        CHECK(at_limit < NSEC_PER_MSEC, "half a millisecond was asked for");

        CHECK(walk_limit(&(WalkCost){ .mapping_nsec = 1000 }, 1000000, 0) == 1000);
        CHECK(walk_limit(&(WalkCost){ .mapping_nsec = 1000 }, 1000000, 99) == 100);
        CHECK(walk_limit(&(WalkCost){ .mapping_nsec = 1000 }, 100, 0) == 2);
        CHECK(walk_limit(&(WalkCost){ .mapping_nsec = 1 }, UINT64_MAX / 2, 0) == INT32_MAX);
        return 0;
}
