/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * One process with memory that has no duplicates and that it writes on command. Its first word makes each page unlike
 * all others and is never written again; what is written is another word, with a number that never comes back, so
 * every write is a change and no page ever gets a twin.
 *
 *   bench-writer --mib N [--cgroup DIRECTORY] [--seed N] [--word] [--huge]
 *
 * --word: only the first word is filled in, for amounts of memory that would take long; --huge: huge pages.
 * Prints "ready PID ADDRESS", then obeys lines on its standard input, each answered by "ok" and figures:
 *   write PAGES RUN   writes one word in each of so many pages, in runs of RUN pages at random places, no page twice:
 *                     nanoseconds of CPU time
 *   busy MSEC         writes one word at random places for so long: number of writes, nanoseconds of CPU time, the time
 *                     that 99 and 99.99 % of 16 writes in a row took at most, and the longest
 *   mark, unmark      MADV_MERGEABLE, MADV_UNMERGEABLE on all of it
 * Ends with its standard input. The order of the pages is computed, not kept: it takes no memory that could be merged.
 */

#include "tests/test.h"

#include <getopt.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <time.h>

#define PAGE_WORDS (PAGE_BYTES / sizeof(uint64_t))
#define GROUP 16U
#define SLOTS 4096U             /* of the histogram: a sixteenth of an octave of nanoseconds each */

static uint64_t seed = 1, *memory, pages, written;

static uint64_t mix(uint64_t x) {
        x += 0x9E3779B97F4A7C15ULL;
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9ULL;
        x = (x ^ x >> 27) * 0x94D049BB133111EBULL;
        return x ^ x >> 31;
}

static uint64_t cpu_nsec(void) {
        struct timespec t;

        clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
        return (uint64_t)t.tv_sec * NSEC_PER_SEC + (uint64_t)t.tv_nsec;
}

/* A permutation of 0 … n - 1 that depends on the key: four Feistel rounds over the next power of four, walked until the
 * result is within n. */
static uint64_t permute(uint64_t i, uint64_t n, uint64_t key) {
        unsigned half = 1;

        while ((uint64_t)1 << 2 * half < n)
                half++;
        do {
                uint64_t mask = ((uint64_t)1 << half) - 1, left = i >> half, right = i & mask;

                for (unsigned round = 0; round < 4; round++) {
                        uint64_t next = left ^ (mix(key + round + right * 4) & mask);
                        left = right;
                        right = next;
                }
                i = left << half | right;
        } while (i >= n);
        return i;
}

static void fill(bool whole) {
        for (uint64_t page = 0; page < pages; page++) {
                uint64_t *words = memory + page * PAGE_WORDS, x = mix(seed << 40 | page) | 1;

                for (unsigned i = 0; i < (whole ? PAGE_WORDS : 1U); i++) {
                        words[i] = x;
                        x ^= x << 13;
                        x ^= x >> 7;
                        x ^= x << 17;
                }
        }
}

static void write_page(uint64_t page) {
        uint64_t value = ++written;

        memory[page * PAGE_WORDS + 1 + mix(value) % (PAGE_WORDS - 1)] = mix(seed) + value;
}

static void write_pages(uint64_t n, uint64_t run) {
        static uint64_t rounds;
        uint64_t before = cpu_nsec(), key = mix(++rounds);

        CHECK(run > 0 && n <= pages && n % run == 0 && pages % run == 0, "write %llu %llu", (unsigned long long)n,
              (unsigned long long)run);
        for (uint64_t i = 0; i < n / run; i++) {
                uint64_t first = permute(i, pages / run, key) * run;

                for (uint64_t page = first; page < first + run; page++)
                        write_page(page);
        }
        printf("ok %llu\n", (unsigned long long)(cpu_nsec() - before));
}

static unsigned slot_of(uint64_t nsec) {
        unsigned octave = nsec < 16 ? 0 : 59 - (unsigned)__builtin_clzll(nsec);

        return MIN_OF(octave * 16 + (unsigned)(nsec >> octave), SLOTS - 1);
}

/* The least time of the slot after this one. */
static uint64_t slot_nsec(unsigned slot) {
        slot++;
        return slot < 32 ? slot : (uint64_t)(16 + slot % 16) << (slot / 16 - 1);
}

static uint64_t quantile(const uint64_t *counts, uint64_t total, double share) {
        uint64_t sum = 0;

        for (unsigned slot = 0; slot < SLOTS; slot++) {
                sum += counts[slot];
                if ((double)sum >= share * (double)total)
                        return slot_nsec(slot);
        }
        return UINT64_MAX;
}

static void be_busy(uint64_t msec) {
        static uint64_t counts[SLOTS];
        uint64_t begun = now_nsec(), last = begun, cpu = cpu_nsec(), groups = 0, longest = 0;

        memset(counts, 0, sizeof counts);
        while (last < begun + msec * NSEC_PER_MSEC) {
                uint64_t now;

                for (unsigned i = 0; i < GROUP; i++)
                        write_page(mix(seed + written * 3) % pages);
                now = now_nsec();
                counts[slot_of(now - last)]++;
                longest = MAX_OF(longest, now - last);
                last = now;
                groups++;
        }
        printf("ok %llu %llu %llu %llu %llu\n", (unsigned long long)groups * GROUP,
               (unsigned long long)(cpu_nsec() - cpu), (unsigned long long)quantile(counts, groups, 0.99),
               (unsigned long long)quantile(counts, groups, 0.9999), (unsigned long long)longest);
}

static void join(const char *cgroup) {
        char path[512], pid[16];
        _cleanup_close_ int fd = -EBADF;

        snprintf(path, sizeof path, "%s/cgroup.procs", cgroup);
        fd = open(path, O_WRONLY | O_CLOEXEC);
        CHECK(fd >= 0, "%s", path);
        snprintf(pid, sizeof pid, "%d", getpid());
        CHECK(write(fd, pid, strlen(pid)) > 0, "%s", path);
}

int main(int argc, char **argv) {
        static const struct option names[] = {
                { "mib", required_argument, NULL, 'm' },  { "cgroup", required_argument, NULL, 'c' },
                { "seed", required_argument, NULL, 's' }, { "word", no_argument, NULL, 'w' },
                { "huge", no_argument, NULL, 'h' },       {},
        };
        bool whole = true, huge = false;
        unsigned long long a, b;
        char line[64];

        for (int c; (c = getopt_long(argc, argv, "", names, NULL)) != -1;)
                switch (c) {
                case 'm': pages = (strtoull(optarg, NULL, 10) << 20) / PAGE_BYTES; break;
                case 'c': join(optarg); break;
                case 's': seed = strtoull(optarg, NULL, 10); break;
                case 'w': whole = false; break;
                case 'h': huge = true; break;
                default: return 2;
                }
        CHECK(pages > 0, "usage: bench-writer --mib N [--cgroup DIRECTORY] [--seed N] [--word] [--huge]");
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        memory = mmap(NULL, pages * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        CHECK(memory != MAP_FAILED, "mmap");
        CHECK(madvise(memory, pages * PAGE_BYTES, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE) == 0, "madvise");
        fill(whole);
        printf("ready %d %p\n", getpid(), (void *)memory);
        fflush(stdout);
        while (fgets(line, sizeof line, stdin)) {
                if (sscanf(line, "write %llu %llu", &a, &b) == 2)
                        write_pages(a, b);
                else if (sscanf(line, "busy %llu", &a) == 1)
                        be_busy(a);
                else {
                        int advice = strcmp(line, "mark\n") == 0 ? MADV_MERGEABLE : MADV_UNMERGEABLE;

                        CHECK(advice == MADV_MERGEABLE || strcmp(line, "unmark\n") == 0, "%s", line);
                        CHECK(madvise(memory, pages * PAGE_BYTES, advice) == 0, "%s", line);
                        puts("ok");
                }
                fflush(stdout);
        }
        return 0;
}
