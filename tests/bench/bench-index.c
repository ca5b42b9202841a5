/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * What the trees of the index cost, in time and memory. Usage: bench-index [PAGES…], 1, 10 and 50 million by default.
 * One JSON object a line. Times are processor time of the one thread; a "pause" is the longest that 16 operations in
 * a row took, an upper bound of the longest single one.
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

static void bench_unstable(uint64_t n) {
        double fresh[2], last[2], again[2], bytes_worst = 0;
        uint64_t pause_insert = 0, pause_remove = 0, start;
        PageRef other;

        /* the whole way up, then the last tenth at full size, then all once more, unchanged */
        for (unsigned batched = 0; batched < 2; batched++) {
                double (*see)(Unstable *, uint64_t, uint64_t) = batched ? see_batch : see_single;
                _cleanup_(unstable_freep) Unstable *tree = unstable_must();
                double first = see(tree, 0, n - n / 10);
                last[batched] = see(tree, n - n / 10, n / 10);
                fresh[batched] = (first * 9 + last[batched]) / 10;
                again[batched] = see(tree, 0, n);
        }

        _cleanup_(unstable_freep) Unstable *tree = unstable_must();
        for (uint64_t i = 0; i < n; i += GROUP) {
                start = cpu_nsec();
                for (uint64_t j = i; j < MIN_OF(i + GROUP, n); j++)
                        CHECK(unstable_see(tree, key_of(j), j, &other) >= 0);
                pause_insert = MAX_OF(pause_insert, cpu_nsec() - start);
                if (i >= 100000)
                        bytes_worst = MAX_OF(bytes_worst, (double)unstable_bytes(tree) / unstable_count(tree));
        }
        double bytes = (double)unstable_bytes(tree) / unstable_count(tree);

        start = cpu_nsec();
        unstable_sweep(tree, SIZE_MAX, stale_half, NULL);
        double sweep = (double)(cpu_nsec() - start) / n, bytes_swept = (double)unstable_bytes(tree) / unstable_count(tree);

        uint64_t removed = 0, remove_nsec = 0;
        for (uint64_t i = 0; i < n; i += 2 * GROUP) {
                start = cpu_nsec();
                for (uint64_t j = i; j < MIN_OF(i + 2 * GROUP, n); j += 2)
                        removed += unstable_remove(tree, key_of(j), j) == 0;
                uint64_t spent = cpu_nsec() - start;
                pause_remove = MAX_OF(pause_remove, spent);
                remove_nsec += spent;
        }

        printf("{\"bench\":\"unstable\",\"pages\":%" PRIu64 ",\"see_ns\":%.1f,\"see_batch_ns\":%.1f,\"see_at_full_ns\":%.1f,"
               "\"see_batch_at_full_ns\":%.1f,\"self_ns\":%.1f,\"self_batch_ns\":%.1f,\"bytes_per_page\":%.2f,"
               "\"bytes_per_page_worst\":%.2f,\"insert_pause_us\":%.1f,\"sweep_ns\":%.1f,\"bytes_per_page_half_swept\":%.2f,"
               "\"remove_ns\":%.1f,\"remove_pause_us\":%.1f,\"bytes_when_empty\":%zu}\n",
               n, fresh[0], fresh[1], last[0], last[1], again[0], again[1], bytes, bytes_worst, pause_insert / 1e3, sweep,
               bytes_swept, (double)remove_nsec / removed, pause_remove / 1e3, unstable_bytes(tree));
        fflush(stdout);
}

static void bench_stable(uint64_t n) {
        _cleanup_(stable_freep) Stable *tree = NULL;
        uint64_t pause_insert = 0, pause_remove = 0, found = 0, insert = 0, start;
        StableCounts counts;
        StableHit hit;

        CHECK(stable_new(256, &tree) == 0);
        for (uint64_t i = 0; i < n; i += GROUP) {
                start = cpu_nsec();
                for (uint64_t j = i; j < MIN_OF(i + GROUP, n); j++)
                        CHECK(stable_insert(tree, key_of(j), j, 2) == 0);
                uint64_t spent = cpu_nsec() - start;
                pause_insert = MAX_OF(pause_insert, spent);
                insert += spent;
        }
        stable_counts(tree, &counts);

        start = cpu_nsec();
        for (uint64_t i = 0; i < n; i++)
                found += stable_lookup(tree, key_of(i), &hit);
        double lookup = (double)(cpu_nsec() - start) / n;
        CHECK(found == n);
        start = cpu_nsec();
        for (uint64_t i = 0; i < n; i++)
                found += stable_lookup(tree, key_of(n + i), &hit);
        double miss = (double)(cpu_nsec() - start) / n;

        for (uint64_t i = 0; i < n; i += GROUP) {
                start = cpu_nsec();
                for (uint64_t j = i; j < MIN_OF(i + GROUP, n); j++)
                        CHECK(stable_set_sharers(tree, j, 0) == 0);
                pause_remove = MAX_OF(pause_remove, cpu_nsec() - start);
        }

        printf("{\"bench\":\"stable\",\"nodes\":%" PRIu64 ",\"insert_ns\":%.1f,\"lookup_ns\":%.1f,\"lookup_miss_ns\":%.1f,"
               "\"bytes_per_node\":%.2f,\"insert_pause_us\":%.1f,\"remove_pause_us\":%.1f}\n",
               n, (double)insert / n, lookup, miss, (double)counts.bytes / n, pause_insert / 1e3, pause_remove / 1e3);
        fflush(stdout);
}

/* A chain with one dup that has room, the others full: what a look-up costs by the chain's length. */
static void bench_chain(uint32_t n_dups) {
        const unsigned n = 4000000;
        _cleanup_(stable_freep) Stable *tree = NULL;
        StableHit hit;

        CHECK(stable_new(256, &tree) == 0);
        for (uint32_t i = 0; i < n_dups; i++)
                CHECK(stable_insert(tree, 1, i, i == n_dups / 2 ? 1 : 256) == 0);
        uint64_t start = cpu_nsec();
        for (unsigned i = 0; i < n; i++)
                CHECK(stable_lookup(tree, 1, &hit) && hit.frame == n_dups / 2);
        printf("{\"bench\":\"stable-chain\",\"dups\":%u,\"lookup_ns\":%.1f}\n", n_dups, (double)(cpu_nsec() - start) / n);
        fflush(stdout);
}

int main(int argc, char **argv) {
        static char *sizes[] = { (char *)"", (char *)"1000000", (char *)"10000000", (char *)"50000000" };

        if (argc < 2) {
                argc = ELEMENTSOF(sizes);
                argv = sizes;
        }
        for (int i = 1; i < argc; i++)
                bench_unstable(strtoull(argv[i], NULL, 10));
        for (int i = 1; i < argc; i++)
                bench_stable(MIN_OF(strtoull(argv[i], NULL, 10), 10000000ULL));
        bench_chain(1);
        bench_chain(2);
        bench_chain(4096);
        return 0;
}
