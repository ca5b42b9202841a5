/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What the probes cost who faults: loops that do little else, with the probes attached and without, turn about.
 *
 *   first    the first write to pages that are not there: each a fault, none a write to a merged page
 *   copied   writes to pages that a child maps too, none of them known as merged
 *   broken   the same, all of them known as merged: the probe's longest way
 *   storm first, storm copied: the same for seconds on end, with probes that rest when they take too much
 *
 * Another process holds the probes, as the daemon does: loading and unloading them leaves work for the CPU that did it. What
 * is added to a fault is the same each time, what others on the machine add is not: so stretches of BLOCK_PAGES faults are
 * timed, and of all those of a kind the tenth part from below is taken; of storms, whose stretches are not alike, the median
 * of pairs. Prints one JSON line for each, nanoseconds of CPU time a page. Fails when the probes add more than 3 % to a
 * storm.
 */
#include "probe/probe.h"
#include "tests/test.h"

#include <poll.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>

#define BLOCKS 8U
#define PAGES (BLOCKS * BLOCK_PAGES)
#define ROUNDS 15U
#define RUNS 5U
#define SETTLE_USEC 50000U
#define STORM_PAIRS 9U
#define STORM_NSEC (2 * NSEC_PER_SEC)
#define ADDED_MAX 0.03

static uint64_t cpu_nsec(void) { return clock_nsec(CLOCK_THREAD_CPUTIME_ID); }

static int compare(const void *a, const void *b) {
        double x = *(const double *)a, y = *(const double *)b;

        return x < y ? -1 : x > y;
}

static double part(double *values, size_t n, double share) {
        qsort(values, n, sizeof *values, compare);
        return values[(size_t)((double)n * share)];
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

static void write_pages(uint8_t *pages, double *ret) {
        for (unsigned b = 0; b < BLOCKS; b++, pages += BLOCK_BYTES) {
                uint64_t begun = cpu_nsec();

                for (unsigned i = 0; i < BLOCK_PAGES; i++)
                        ((volatile uint8_t *)pages)[i * PAGE_BYTES] = 2; /* reading first would be a fault more */
                ret[b] = (double)(cpu_nsec() - begun) / BLOCK_PAGES;
        }
}

/* What the holder is asked; it answers with the same. */
typedef struct Order {
        enum { ATTACH, DETACH, SET_BLOCKS } what;
        bool rests;             /* ATTACH: as in the daemon */
        uintptr_t pages;        /* SET_BLOCKS: all of them are merged */
        bool works;
} Order;

/* Waits for an order; false: there will be none. */
static bool next_order(int orders, Probes *probes, bool rests, Order *ret) {
        uint64_t wake = UINT64_MAX;

        for (;;) {
                struct pollfd fds[] = { { .fd = orders, .events = POLLIN },
                                        { .fd = rests ? probes_event_fd(probes) : -1, .events = POLLIN } };
                uint64_t now = now_nsec();
                int wait = wake == UINT64_MAX ? -1 : wake <= now ? 0 : (int)((wake - now) / NSEC_PER_MSEC) + 1;

                CHECK(poll(fds, ELEMENTSOF(fds), wait) >= 0, "poll");
                if (fds[0].revents)
                        return read(orders, ret, sizeof *ret) == sizeof *ret;
                probes_read_events(probes, NULL, NULL);
                wake = probes_rest(probes, now_nsec());
        }
}

static _Noreturn void hold(int orders, int answers, pid_t target) {
        const ProbeOptions options = { .memory_bytes = (uint64_t)4 << 30 };
        Probes *probes = NULL;
        struct probe_block block;
        bool rests = false;
        Order order;

        prctl(PR_SET_PDEATHSIG, SIGKILL);
        memset(&block, 0xff, sizeof block);
        while (next_order(orders, probes, rests, &order)) {
                rests = order.what == ATTACH && order.rests;
                if (order.what == ATTACH) {
                        CHECK(probes_new(&options, &probes) == 0, "probes");
                        CHECK(probes_watch_targets(probes, &target, 1) == 0, "watch");
                } else if (order.what == DETACH)
                        probes = probes_free(probes);
                for (unsigned b = 0; order.what == SET_BLOCKS && b < BLOCKS; b++)
                        CHECK(probes_block_set(probes, target, order.pages + b * BLOCK_BYTES, &block) == 0, "block");
                order.works = probes_have(probes, PROBE_FAULTS);
                CHECK(write(answers, &order, sizeof order) == sizeof order, "answer");
        }
        exit(0);
}

static int order_fd, answer_fd;

static bool tell(Order order) {
        CHECK(write(order_fd, &order, sizeof order) == sizeof order, "order");
        CHECK(read(answer_fd, &order, sizeof order) == sizeof order, "the holder ended");
        return order.works;
}

enum { FIRST, COPIED, BROKEN };

static void run(unsigned kind, bool probed, double *ret) {
        uint8_t *memory = map(), *pages = aligned(memory);
        pid_t child = 0;

        if (kind != FIRST) {
                memset(pages, 1, PAGES * PAGE_BYTES);
                child = fork();
                CHECK(child >= 0, "fork");
                if (child == 0) {
                        prctl(PR_SET_PDEATHSIG, SIGKILL);
                        for (;;)
                                pause();
                }
        }
        if (kind == BROKEN && probed)
                tell((Order){ .what = SET_BLOCKS, .pages = (uintptr_t)pages });
        write_pages(pages, ret);
        if (child) {
                kill(child, SIGKILL);
                waitpid(child, NULL, 0);
        }
        munmap(memory, (PAGES + BLOCK_PAGES) * PAGE_BYTES);
}

static void report(const char *what, const char *kind, unsigned pages, double plain, double added) {
        printf("{\"what\": \"%s%s\", \"pages\": %u, \"nsec_without\": %.1f, \"nsec_with\": %.1f, \"nsec_added\": %.1f, "
               "\"share_added\": %.4f}\n",
               what, kind, pages, plain, plain * (1 + added), plain * added, added);
        fflush(stdout);
}

/* The mean time of a page over a storm. */
static double storm(unsigned kind, bool probed, unsigned *pages) {
        uint64_t ends = now_nsec() + STORM_NSEC;
        double sum = 0, times[BLOCKS];
        unsigned n = 0;

        do {
                run(kind, probed, times);
                for (unsigned b = 0; b < BLOCKS; b++)
                        sum += times[b];
                n += BLOCKS;
        } while (now_nsec() < ends);
        *pages += n * BLOCK_PAGES;
        return sum / n;
}

/* What the probes add, as a share; each pair begins with probes that have not rested yet. */
static double measure_storms(unsigned kind, const char *name) {
        double plain[STORM_PAIRS], ratios[STORM_PAIRS], added;
        unsigned pages = 0, ignored = 0;

        for (unsigned i = 0; i < STORM_PAIRS; i++) {
                double times[2];

                for (unsigned k = 0; k < 2; k++) {
                        bool with = (i + k) % 2;

                        tell((Order){ .what = with ? ATTACH : DETACH, .rests = true });
                        usleep(SETTLE_USEC);
                        times[with] = storm(kind, with, with ? &pages : &ignored);
                }
                tell((Order){ .what = DETACH });
                plain[i] = times[0];
                ratios[i] = times[1] / times[0];
        }
        added = part(ratios, STORM_PAIRS, 0.5) - 1;
        report("storm ", name, pages, part(plain, STORM_PAIRS, 0.5), added);
        return added;
}

int main(void) {
        static const char *const names[] = { [FIRST] = "first", [COPIED] = "copied", [BROKEN] = "broken" };
        static double times[2][ROUNDS * RUNS * BLOCKS];
        int orders[2], answers[2];
        const pid_t self = getpid();
        bool failed = false;
        pid_t holder;

        test_need_root();
        CHECK(pipe2(orders, O_CLOEXEC) == 0 && pipe2(answers, O_CLOEXEC) == 0, "pipe");
        holder = fork();
        CHECK(holder >= 0, "fork");
        if (holder == 0)
                hold(orders[0], answers[1], self);
        order_fd = orders[1];
        answer_fd = answers[0];
        for (unsigned kind = 0; kind < ELEMENTSOF(names); kind++) {
                double plain, probed, ignored[BLOCKS];

                for (unsigned i = 0; i < 2 * ROUNDS; i++) {
                        bool with = i % 2;

                        if (tell((Order){ .what = with ? ATTACH : DETACH }) != with)
                                TEST_SKIP("no probes here");
                        usleep(SETTLE_USEC);
                        run(kind, with, ignored);
                        for (unsigned k = 0; k < RUNS; k++)
                                run(kind, with, times[with] + (i / 2 * RUNS + k) * BLOCKS);
                }
                tell((Order){ .what = DETACH });
                plain = part(times[0], ELEMENTSOF(times[0]), 0.1);
                probed = part(times[1], ELEMENTSOF(times[1]), 0.1);
                report("", names[kind], ROUNDS * RUNS * PAGES, plain, probed / plain - 1);
        }
        for (unsigned kind = FIRST; kind <= COPIED; kind++)
                failed |= measure_storms(kind, names[kind]) > ADDED_MAX;
        kill(holder, SIGKILL);
        waitpid(holder, NULL, 0);
        return failed;
}
