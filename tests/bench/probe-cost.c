/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What the probes cost who faults: loops that do little else, with the probes attached and without, turn about.
 *
 *   first    the first write to pages that are not there: each a fault, none a write to a merged page
 *   copied   writes to pages that a child maps too, none of them known as merged
 *   broken   the same, all of them known as merged: the probe's longest way
 *
 * Prints one JSON line for each: nanoseconds of CPU time a page, the median of the rounds; what the probes add, as the median
 * of the differences of neighbouring rounds. Fails when they add more than 3 % to "first".
 */
#include "probe/probe.h"
#include "tests/test.h"

#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>

#define PAGES (16U * BLOCK_PAGES)
#define ROUNDS 41U
#define ADDED_MAX 0.03

static uint64_t cpu_nsec(void) { return clock_nsec(CLOCK_THREAD_CPUTIME_ID); }

static int compare(const void *a, const void *b) {
        double x = *(const double *)a, y = *(const double *)b;

        return x < y ? -1 : x > y;
}

static double median(double *values) {
        qsort(values, ROUNDS, sizeof *values, compare);
        return values[ROUNDS / 2];
}

static uint8_t *map(void) {
        uint8_t *memory = mmap(NULL, (PAGES + BLOCK_PAGES) * PAGE_BYTES, PROT_READ | PROT_WRITE,
                               MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

        CHECK(memory != MAP_FAILED, "mmap");
        CHECK(madvise(memory, (PAGES + BLOCK_PAGES) * PAGE_BYTES, MADV_NOHUGEPAGE) == 0, "NOHUGEPAGE");
        return memory;
}

static uint8_t *aligned(uint8_t *memory) {
        return (uint8_t *)(((uintptr_t)memory + BLOCK_BYTES - 1) & ~(uintptr_t)(BLOCK_BYTES - 1));
}

static double write_pages(uint8_t *pages) {
        uint64_t begun = cpu_nsec();

        for (unsigned i = 0; i < PAGES; i++)
                ((volatile uint8_t *)pages)[i * PAGE_BYTES]++;
        return (double)(cpu_nsec() - begun) / PAGES;
}

/* kind: 0 first, 1 copied, 2 broken. */
static double run(unsigned kind, Probes *probes) {
        uint8_t *memory = map(), *pages = aligned(memory);
        pid_t child = 0;
        double nsec;

        if (kind > 0) {
                memset(pages, 1, PAGES * PAGE_BYTES);
                child = fork();
                CHECK(child >= 0, "fork");
                if (child == 0) {
                        prctl(PR_SET_PDEATHSIG, SIGKILL);
                        for (;;)
                                pause();
                }
        }
        for (unsigned b = 0; kind == 2 && probes && b < PAGES / BLOCK_PAGES; b++) {
                struct probe_block block;

                memset(&block, 0xff, sizeof block);
                CHECK(probes_block_set(probes, getpid(), (uintptr_t)pages + b * BLOCK_BYTES, &block) == 0, "block");
        }
        nsec = write_pages(pages);
        if (child) {
                kill(child, SIGKILL);
                waitpid(child, NULL, 0);
        }
        munmap(memory, (PAGES + BLOCK_PAGES) * PAGE_BYTES);
        return nsec;
}

int main(void) {
        static const char *const names[] = { "first", "copied", "broken" };
        const ProbeOptions options = { .memory_bytes = (uint64_t)4 << 30 };
        const pid_t self = getpid();
        bool failed = false;

        test_need_root();
        for (unsigned kind = 0; kind < ELEMENTSOF(names); kind++) {
                double with[ROUNDS], without[ROUNDS], added[ROUNDS], share;

                for (unsigned i = 0; i < ROUNDS; i++) {
                        for (unsigned k = 0; k < 2; k++) {
                                _cleanup_(probes_freep) Probes *probes = NULL;

                                if (k != i % 2) {
                                        without[i] = run(kind, NULL);
                                        continue;
                                }
                                CHECK(probes_new(&options, &probes) == 0, "probes");
                                if (!probes_have(probes, PROBE_FAULTS))
                                        TEST_SKIP("no probes here");
                                CHECK(probes_watch_targets(probes, &self, 1) == 0, "watch");
                                with[i] = run(kind, probes);
                        }
                        added[i] = with[i] - without[i];
                }
                share = median(added) / median(without);
                printf("{\"what\": \"%s\", \"pages\": %u, \"nsec_without\": %.1f, \"nsec_with\": %.1f, \"nsec_added\": %.1f, "
                       "\"share_added\": %.4f}\n",
                       names[kind], PAGES, without[ROUNDS / 2], median(with), added[ROUNDS / 2], share);
                failed |= kind == 0 && share > ADDED_MAX;
        }
        return failed;
}
