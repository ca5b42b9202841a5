/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * How many frames the anonymous memory of some processes takes, over time: distinct frame numbers behind their private
 * mappings as they are when the program starts, the zero page left out. The frames, because KSM's counters go on
 * claiming pages that were unshared.
 *
 *   bench-frames MSEC PID…   prints "NSEC FRAMES" (CLOCK_MONOTONIC) every so often, until its standard input ends
 *
 * A sample costs some 40 ns a page (140 in a guest of PVM): it should be seldom enough to leave CPUs free for what is
 * measured.
 */

#include "test.h"

#include <inttypes.h>
#include <poll.h>
#include <sys/mman.h>

#define PRESENT ((uint64_t)1 << 63)
#define FILE_OR_SHARED ((uint64_t)1 << 61)
#define PFN_MASK (((uint64_t)1 << 55) - 1)
#define CHUNK 65536U

typedef struct Range {
        int pagemap;
        uint64_t first, end;            /* pages */
} Range;

static Range *ranges;
static size_t n_ranges;
static uint64_t *seen, seen_words, zero_pfn;

static int open_pagemap(const char *pid) {
        char path[64];
        int fd;

        snprintf(path, sizeof path, "/proc/%s/pagemap", pid);
        fd = open(path, O_RDONLY | O_CLOEXEC);
        CHECK(fd >= 0, "%s", path);
        return fd;
}

static void add_process(const char *pid) {
        int pagemap = open_pagemap(pid);
        char path[64], line[512];
        FILE *maps;

        snprintf(path, sizeof path, "/proc/%s/maps", pid);
        maps = fopen(path, "re");
        CHECK(maps, "%s", path);
        while (fgets(line, sizeof line, maps)) {
                uint64_t start, end;
                char flags[5];

                CHECK(sscanf(line, "%" SCNx64 "-%" SCNx64 " %4s", &start, &end, flags) == 3, "%s", line);
                if (flags[3] != 'p' || start >> 63)
                        continue;
                ranges = reallocarray(ranges, n_ranges + 1, sizeof *ranges);
                CHECK(ranges);
                ranges[n_ranges++] = (Range){ pagemap, start / PAGE_BYTES, end / PAGE_BYTES };
        }
        fclose(maps);
}

/* The zero page is what a page that was read and never written maps. */
static uint64_t find_zero_pfn(void) {
        volatile char *page = mmap(NULL, PAGE_BYTES, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        _cleanup_close_ int fd = open_pagemap("self");
        uint64_t entry;

        CHECK(page != MAP_FAILED && *page == 0);
        CHECK(pread(fd, &entry, 8, (off_t)((uintptr_t)page / PAGE_BYTES * 8)) == 8 && entry & PRESENT);
        return entry & PFN_MASK;
}

static uint64_t count(void) {
        static uint64_t entries[CHUNK];
        uint64_t frames = 0;

        memset(seen, 0, seen_words * 8);
        for (size_t r = 0; r < n_ranges; r++)
                for (uint64_t page = ranges[r].first; page < ranges[r].end; page += CHUNK) {
                        size_t bytes = MIN_OF((uint64_t)CHUNK, ranges[r].end - page) * 8;
                        ssize_t n = pread(ranges[r].pagemap, entries, bytes, (off_t)(page * 8));

                        CHECK(n >= 0, "pagemap");
                        for (size_t i = 0; i < (size_t)n / 8; i++) {
                                uint64_t pfn = entries[i] & PFN_MASK;

                                if (!(entries[i] & PRESENT) || entries[i] & FILE_OR_SHARED || pfn == zero_pfn)
                                        continue;
                                if (pfn / 64 >= seen_words) {
                                        uint64_t words = pfn / 32 + 1;

                                        seen = reallocarray(seen, words, 8);
                                        CHECK(seen);
                                        memset(seen + seen_words, 0, (words - seen_words) * 8);
                                        seen_words = words;
                                }
                                frames += !(seen[pfn / 64] >> pfn % 64 & 1);
                                seen[pfn / 64] |= (uint64_t)1 << pfn % 64;
                        }
                }
        return frames;
}

int main(int argc, char **argv) {
        struct pollfd in = { .fd = 0, .events = POLLIN };
        uint64_t next = now_nsec(), interval;

        CHECK(argc > 2, "usage: bench-frames MSEC PID...");
        test_need_root();
        interval = strtoull(argv[1], NULL, 10) * NSEC_PER_MSEC;
        seen_words = 1 << 17;
        seen = calloc(seen_words, 8);
        CHECK(seen && interval > 0);
        zero_pfn = find_zero_pfn();
        for (int i = 2; i < argc; i++)
                add_process(argv[i]);
        do {
                uint64_t frames = count(), now = now_nsec();

                printf("%" PRIu64 " %" PRIu64 "\n", now, frames);
                fflush(stdout);
                next = MAX_OF(next + interval, now + 1);
                CHECK(poll(&in, 1, (int)((next - now) / NSEC_PER_MSEC)) >= 0, "poll");
        } while (!in.revents);
        return 0;
}
