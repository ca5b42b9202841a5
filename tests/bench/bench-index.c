/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * What the trees of the index cost, in time and memory. Usage: bench-index [PAGES…], 1, 10 and 50 million by default,
 * the stable tree with 10 million at most.
 * One JSON object a line. Times are processor time of the one thread; a "pause" is the longest that 16 operations in
 * a row took, an upper bound of the longest single one. On a shared machine most of the longest ones are the
 * machine's: so the run is made twice, and of each 16 operations the shorter time counts. What does not depend on the
 * machine's mood is required: the bytes, and that a chain's length does not matter.
 */

#include "test.h"

#include "index/stable.h"
#include "index/unstable.h"

#include <inttypes.h>
#include <time.h>

#define BATCH 512U
#define GROUP 16U

static uint64_t cpu_nsec(void) {
        struct timespec t;
        clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
        return t.tv_sec * NSEC_PER_SEC + t.tv_nsec;
}

/* The i-th key: splitmix64 of i. */
static uint64_t key_of(uint64_t i) {
        uint64_t z = (i + 1) * UINT64_C(0x9e3779b97f4a7c15);
        z = (z ^ z >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
        z = (z ^ z >> 27) * UINT64_C(0x94d049bb133111eb);
        return z ^ z >> 31;
}

/* Longest of the groups' times, each the shorter of two runs. */
typedef struct Pauses {
        uint32_t *nsec;
        bool second;
} Pauses;

static void pause_note(Pauses *pauses, uint64_t group, uint64_t nsec) {
        uint32_t *p = &pauses->nsec[group];
        *p = pauses->second ? MIN_OF((uint64_t)*p, nsec) : MIN_OF((uint64_t)UINT32_MAX, nsec);
}

static double pause_longest_usec(Pauses *pauses, uint64_t groups) {
        uint32_t longest = 0;
        for (uint64_t i = 0; i < groups; i++)
                longest = MAX_OF(longest, pauses->nsec[i]);
        free(pauses->nsec);
        return longest / 1e3;
}

static void pauses_init(Pauses *pauses, uint64_t groups) {
        *pauses = (Pauses){ .nsec = calloc(groups, sizeof *pauses->nsec) };
        CHECK(pauses->nsec);
}

static Unstable *unstable_must(void) {
        Unstable *tree;
        CHECK(unstable_new(&tree) == 0);
        return tree;
}

static double see_single(Unstable *tree, uint64_t from, uint64_t n) {
        PageRef other;
        uint64_t start = cpu_nsec();
        for (uint64_t i = from; i < from + n; i++)
                CHECK(unstable_see(tree, key_of(i), i, &other) >= 0);
        return (double)(cpu_nsec() - start) / n;
}

static double see_batch(Unstable *tree, uint64_t from, uint64_t n) {
        uint64_t keys[BATCH];
        PageRef refs[BATCH], others[BATCH];
        int results[BATCH];
        uint64_t start = cpu_nsec();

        for (uint64_t i = from; i < from + n; i += BATCH) {
                uint64_t m = MIN_OF((uint64_t)BATCH, from + n - i);
                for (uint64_t j = 0; j < m; j++) {
                        keys[j] = key_of(i + j);
                        refs[j] = i + j;
                }
                unstable_see_batch(tree, keys, refs, m, results, others);
                CHECK(results[0] >= 0 && results[m - 1] >= 0);
        }
        return (double)(cpu_nsec() - start) / n;
}

static bool stale_half(void *userdata, uint32_t tag, PageRef ref) {
        return ref % 2;
}

/* The whole way up, then the last tenth at full size, then all once more, unchanged. */
static void bench_see(uint64_t n) {
        double all[2], last[2], again[2];

        for (unsigned batched = 0; batched < 2; batched++) {
                double (*see)(Unstable *, uint64_t, uint64_t) = batched ? see_batch : see_single;
                _cleanup_(unstable_freep) Unstable *tree = unstable_must();
                double first = see(tree, 0, n - n / 10);
                last[batched] = see(tree, n - n / 10, n / 10);
                all[batched] = (first * 9 + last[batched]) / 10;
                again[batched] = see(tree, 0, n);
        }
        printf("{\"bench\":\"unstable-see\",\"pages\":%" PRIu64 ",\"insert_ns\":%.1f,\"insert_batch_ns\":%.1f,"
               "\"insert_at_full_ns\":%.1f,\"insert_at_full_batch_ns\":%.1f,\"self_ns\":%.1f,\"self_batch_ns\":%.1f}\n",
               n, all[0], all[1], last[0], last[1], again[0], again[1]);
        fflush(stdout);
}

static double bytes_per_page(const Unstable *tree) {
        return (double)unstable_bytes(tree) / unstable_count(tree);
}

/* Up, half of it swept away, down to nothing. */
static void bench_memory(uint64_t n) {
        double full = 0, worst = 0, swept = 0, sweep = 0, start;
        uint64_t groups = DIV_ROUND_UP(n, GROUP), empty = 0;
        Pauses up, down;
        PageRef other;

        pauses_init(&up, groups);
        pauses_init(&down, groups);
        for (unsigned run = 0; run < 2; run++) {
                _cleanup_(unstable_freep) Unstable *tree = unstable_must();
                up.second = down.second = run;
                for (uint64_t i = 0; i < n; i += GROUP) {
                        start = cpu_nsec();
                        for (uint64_t j = i; j < MIN_OF(i + GROUP, n); j++)
                                CHECK(unstable_see(tree, key_of(j), j, &other) >= 0);
                        pause_note(&up, i / GROUP, cpu_nsec() - start);
                        if (i >= 100000)
                                worst = MAX_OF(worst, bytes_per_page(tree));
                }
                full = bytes_per_page(tree);

                start = cpu_nsec();
                unstable_sweep(tree, SIZE_MAX, stale_half, NULL);
                sweep = (cpu_nsec() - start) / n;
                swept = bytes_per_page(tree);

                for (uint64_t i = 0; i < n; i += GROUP) {
                        start = cpu_nsec();
                        for (uint64_t j = i; j < MIN_OF(i + GROUP, n); j++)
                                unstable_remove(tree, key_of(j), j);
                        pause_note(&down, i / GROUP, cpu_nsec() - start);
                }
                empty = unstable_bytes(tree);
        }

        printf("{\"bench\":\"unstable-memory\",\"pages\":%" PRIu64 ",\"bytes_per_page\":%.2f,"
               "\"bytes_per_page_worst\":%.2f,\"bytes_per_page_half_swept\":%.2f,\"bytes_when_empty\":%" PRIu64 ","
               "\"sweep_ns\":%.1f,\"insert_pause_us\":%.1f,\"remove_pause_us\":%.1f}\n",
               n, full, worst, swept, empty, sweep, pause_longest_usec(&up, groups), pause_longest_usec(&down, groups));
        fflush(stdout);
        CHECK(worst <= 14.3 && swept <= 16, "bytes a page");
}

static void bench_stable(uint64_t n) {
        uint64_t groups = DIV_ROUND_UP(n, GROUP), found = 0;
        double lookup = 0, miss = 0, insert = 0, start;
        StableCounts counts = {};
        StableHit hit;
        Pauses up, down;

        pauses_init(&up, groups);
        pauses_init(&down, groups);
        for (unsigned run = 0; run < 2; run++) {
                _cleanup_(stable_freep) Stable *tree = NULL;
                CHECK(stable_new(256, &tree) == 0);
                up.second = down.second = run;
                insert = 0;
                for (uint64_t i = 0; i < n; i += GROUP) {
                        start = cpu_nsec();
                        for (uint64_t j = i; j < MIN_OF(i + GROUP, n); j++)
                                CHECK(stable_insert(tree, key_of(j), j, 2) == 0);
                        double spent = cpu_nsec() - start;
                        pause_note(&up, i / GROUP, spent);
                        insert += spent / n;
                }
                stable_counts(tree, &counts);

                start = cpu_nsec();
                for (uint64_t i = 0; i < n; i++)
                        found += stable_lookup(tree, key_of(i), &hit);
                lookup = (cpu_nsec() - start) / n;
                start = cpu_nsec();
                for (uint64_t i = 0; i < n; i++)
                        found += stable_lookup(tree, key_of(n + i), &hit);
                miss = (cpu_nsec() - start) / n;

                for (uint64_t i = 0; i < n; i += GROUP) {
                        start = cpu_nsec();
                        for (uint64_t j = i; j < MIN_OF(i + GROUP, n); j++)
                                CHECK(stable_set_sharers(tree, j, 0) == 0);
                        pause_note(&down, i / GROUP, cpu_nsec() - start);
                }
        }
        CHECK(found == 2 * n);

        printf("{\"bench\":\"stable\",\"nodes\":%" PRIu64 ",\"insert_ns\":%.1f,\"lookup_ns\":%.1f,"
               "\"lookup_miss_ns\":%.1f,\"bytes_per_node\":%.2f,\"insert_pause_us\":%.1f,\"remove_pause_us\":%.1f}\n",
               n, insert, lookup, miss, (double)counts.bytes / n, pause_longest_usec(&up, groups),
               pause_longest_usec(&down, groups));
        fflush(stdout);
        CHECK(counts.bytes <= 48 * n, "bytes a node");
}

/* A chain with one dup that has room, the others full: what a look-up costs by the chain's length. */
static double bench_chain(uint32_t n_dups) {
        const unsigned n = 4000000;
        _cleanup_(stable_freep) Stable *tree = NULL;
        StableHit hit;

        CHECK(stable_new(256, &tree) == 0);
        for (uint32_t i = 0; i < n_dups; i++)
                CHECK(stable_insert(tree, 1, i, i == n_dups / 2 ? 1 : 256) == 0);
        uint64_t start = cpu_nsec();
        for (unsigned i = 0; i < n; i++)
                CHECK(stable_lookup(tree, 1, &hit) && hit.frame == n_dups / 2);
        double lookup = (double)(cpu_nsec() - start) / n;
        printf("{\"bench\":\"stable-chain\",\"dups\":%u,\"lookup_ns\":%.1f}\n", n_dups, lookup);
        fflush(stdout);
        return lookup;
}

int main(int argc, char **argv) {
        static char *sizes[] = { (char *)"", (char *)"1000000", (char *)"10000000", (char *)"50000000" };

        if (argc < 2) {
                argc = ELEMENTSOF(sizes);
                argv = sizes;
        }
        for (int i = 1; i < argc; i++) {
                bench_see(strtoull(argv[i], NULL, 10));
                bench_memory(strtoull(argv[i], NULL, 10));
        }
        for (int i = 1; i < argc; i++)
                if (strtoull(argv[i], NULL, 10) <= 10000000)
                        bench_stable(strtoull(argv[i], NULL, 10));

        bench_chain(1);
        double shortest = bench_chain(2);
        CHECK(bench_chain(4096) < 4 * shortest, "a look-up by the chain's length");
        return 0;
}
