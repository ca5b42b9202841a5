/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * What the trees of the index cost, in time and memory: with 1, 10 and 50 million entries (the stable tree with 1 and
 * 10), or those given; --quick: with 1 million. Usage: bench-index [--quick] [ENTRIES…].
 * One JSON object a line. Times are processor time of the one thread. A pause is the longest that one batch of 512 took
 * (unstable tree), one sweep over 4096, or 16 operations in a row (stable tree). On a shared machine most of the longest
 * ones are the machine's: so every run is made twice, and of each step the shorter time counts. "ok" says whether all
 * that is required was met; the exit status depends only on what a machine's mood does not change: the bytes, and that
 * a chain's length does not matter.
 */

#include "test.h"

#include "index/stable.h"
#include "index/unstable.h"

#include <inttypes.h>
#include <time.h>

#define BATCH 512U
#define GROUP 16U
#define SWEEP 4096U

/* What is asked of the index: the time at up to 10 million entries. A block adds 2.2 bytes for each page. */
#define INSERT_ENTRIES_REQUIRED 10000000U
#define INSERT_NSEC_REQUIRED 50.0
#define PAUSE_USEC_REQUIRED 5000.0
#define BYTES_REQUIRED 13.8

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

/* As the domain does it: the keys of a batch belong to one tree, and the trees take turns. */
typedef struct Shards {
        Unstable *trees[UNSTABLE_SHARDS];
        unsigned n;
} Shards;

static void shards_init(Shards *shards, unsigned n) {
        *shards = (Shards){ .n = n };
        for (unsigned s = 0; s < n; s++)
                CHECK(unstable_new(&shards->trees[s]) == 0);
}

static void shards_done(Shards *shards) {
        for (unsigned s = 0; s < shards->n; s++)
                unstable_free(shards->trees[s]);
}

static uint64_t shards_bytes(const Shards *shards) {
        uint64_t bytes = 0;
        for (unsigned s = 0; s < shards->n; s++)
                bytes += unstable_bytes(shards->trees[s]);
        return bytes;
}

static Unstable *shard_of_batch(const Shards *shards, uint64_t batch) {
        return shards->trees[batch % shards->n];
}

/* Looks all n up, and inserts those that are not there: ns for each. */
static double see_all(const Shards *shards, uint64_t n, Pauses *pauses, double *ret_worst_bytes) {
        uint64_t keys[BATCH], spent = 0;
        PageRef refs[BATCH], others[BATCH];
        int results[BATCH];

        for (uint64_t i = 0; i < n; i += BATCH) {
                uint64_t m = MIN_OF((uint64_t)BATCH, n - i);
                for (uint64_t j = 0; j < m; j++) {
                        keys[j] = key_of(i + j);
                        refs[j] = i + j;
                }
                uint64_t start = cpu_nsec();
                unstable_see_batch(shard_of_batch(shards, i / BATCH), keys, refs, m, results, others);
                uint64_t took = cpu_nsec() - start;
                CHECK(results[0] >= 0 && results[m - 1] >= 0);
                spent += took;
                pause_note(pauses, i / BATCH, took);
                if (ret_worst_bytes && i >= n / 2)
                        *ret_worst_bytes = MAX_OF(*ret_worst_bytes, (double)shards_bytes(shards) / (i + m));
        }
        return (double)spent / n;
}

/* The same for removing. */
static double remove_all(const Shards *shards, uint64_t n, Pauses *pauses) {
        uint64_t spent = 0;

        for (uint64_t i = 0; i < n; i += BATCH) {
                uint64_t start = cpu_nsec();
                PageRef ref;
                for (uint64_t j = i; j < MIN_OF(i + BATCH, n); j++)
                        (void)unstable_take(shard_of_batch(shards, i / BATCH), key_of(j), &ref);
                uint64_t took = cpu_nsec() - start;
                spent += took;
                pause_note(pauses, i / BATCH, took);
        }
        return (double)spent / n;
}

static bool outside_of_half(void *userdata, uint32_t tag, PageRef ref) {
        return !unstable_in_sample(tag, 1);
}

/* Drops what is not in a sample of half the keys, in steps. */
static double sweep_half(const Shards *shards, uint64_t n, Pauses *pauses) {
        uint64_t spent = 0, dropped = 0, step = 0;

        for (unsigned s = 0; s < shards->n; s++)
                for (uint64_t swept = 0; swept < n / shards->n; swept += SWEEP, step++) {
                        uint64_t start = cpu_nsec();
                        dropped += unstable_sweep(shards->trees[s], SWEEP, outside_of_half, NULL);
                        uint64_t took = cpu_nsec() - start;
                        spent += took;
                        pause_note(pauses, step, took);
                }
        CHECK(dropped > n * 4 / 10);
        return (double)spent / n;
}

/* Up from nothing, told beforehand how many there are to be. */
static double see_expected(uint64_t n, unsigned n_shards) {
        uint64_t groups = DIV_ROUND_UP(n, BATCH), start;
        double told, seen;
        Shards shards;
        Pauses up;

        shards_init(&shards, n_shards);
        pauses_init(&up, groups);
        start = cpu_nsec();
        for (unsigned s = 0; s < n_shards; s++)
                unstable_expect(shards.trees[s], n / n_shards);
        told = (double)(cpu_nsec() - start) / n;
        seen = see_all(&shards, n, &up, NULL);
        (void)pause_longest_usec(&up, groups);
        shards_done(&shards);
        return told + seen;
}

/* Up from nothing, all once more unchanged, half of it dropped, down to nothing. Twice, for the shorter pauses and
 * times. false: more bytes than may be. */
static bool bench_unstable(uint64_t n, unsigned n_shards) {
        double insert = 1e9, expected = 1e9, self = 1e9, sweep = 1e9, removal = 1e9, full = 0, worst = 0, half = 0;
        uint64_t groups = DIV_ROUND_UP(n, BATCH), empty = 0;
        Pauses up, again, sweeps, down;

        pauses_init(&up, groups);
        pauses_init(&again, groups);
        pauses_init(&sweeps, groups);
        pauses_init(&down, groups);
        for (unsigned run = 0; run < 2; run++) {
                Shards shards;

                shards_init(&shards, n_shards);
                up.second = again.second = sweeps.second = down.second = run;
                insert = MIN_OF(insert, see_all(&shards, n, &up, &worst));
                full = (double)shards_bytes(&shards) / n;
                self = MIN_OF(self, see_all(&shards, n, &again, NULL));
                sweep = MIN_OF(sweep, sweep_half(&shards, n, &sweeps));
                half = shards_bytes(&shards) * 2.0 / n;
                removal = MIN_OF(removal, remove_all(&shards, n, &down));
                empty = shards_bytes(&shards);
                shards_done(&shards);
                expected = MIN_OF(expected, see_expected(n, n_shards));
        }

        double pause = pause_longest_usec(&up, groups);
        bool bytes_ok = worst <= BYTES_REQUIRED, ok = bytes_ok && pause <= PAUSE_USEC_REQUIRED;
        if (n <= INSERT_ENTRIES_REQUIRED)
                ok = ok && insert <= INSERT_NSEC_REQUIRED;
        printf("{\"bench\":\"unstable\",\"entries\":%" PRIu64 ",\"shards\":%u,\"insert_ns\":%.1f,\"insert_expected_ns\":%.1f,"
               "\"self_ns\":%.1f,"
               "\"bytes_per_entry\":%.2f,\"bytes_per_entry_worst\":%.2f,\"pause_us\":%.0f,\"self_pause_us\":%.0f,"
               "\"sweep_ns\":%.1f,\"sweep_pause_us\":%.0f,\"bytes_per_entry_half_swept\":%.2f,\"remove_ns\":%.1f,"
               "\"remove_pause_us\":%.0f,\"bytes_when_empty\":%" PRIu64 ",\"required_ns\":%.0f,\"required_bytes\":%.1f,"
               "\"required_pause_us\":%.0f,\"ok\":%s}\n",
               n, n_shards, insert, expected, self, full, worst, pause, pause_longest_usec(&again, groups), sweep,
               pause_longest_usec(&sweeps, groups), half, removal, pause_longest_usec(&down, groups), empty,
               INSERT_NSEC_REQUIRED, BYTES_REQUIRED, PAUSE_USEC_REQUIRED, ok ? "true" : "false");
        fflush(stdout);
        return bytes_ok;
}

/* Looks up the n keys from that one on; returns ns for each. */
static double look_up_all(const Stable *tree, uint64_t from, uint64_t n, uint64_t *found) {
        uint64_t keys[BATCH], start = cpu_nsec();
        StableHit hits[BATCH];

        for (uint64_t i = from; i < from + n; i += BATCH) {
                uint64_t m = MIN_OF((uint64_t)BATCH, from + n - i);
                for (uint64_t j = 0; j < m; j++)
                        keys[j] = key_of(i + j);
                *found += stable_lookup_batch(tree, keys, m, hits);
        }
        return (double)(cpu_nsec() - start) / n;
}

static bool bench_stable(uint64_t n) {
        uint64_t groups = DIV_ROUND_UP(n, GROUP), found = 0;
        double lookup = 0, miss = 0, insert = 0, start, empty, batch = 0, batch_miss = 0;
        StableCounts counts = {};
        StableHit hit;
        Pauses up, down;

        pauses_init(&up, groups);
        pauses_init(&down, groups);
        for (unsigned run = 0; run < 2; run++) {
                _cleanup_(stable_freep) Stable *tree = NULL;
                CHECK(stable_new(256, &tree) == 0);
                up.second = down.second = run;
                empty = look_up_all(tree, 0, n, &found);
                CHECK(found == run * 2 * n);
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
                batch = look_up_all(tree, 0, n, &found);
                batch_miss = look_up_all(tree, n, n, &found);

                for (uint64_t i = 0; i < n; i += GROUP) {
                        start = cpu_nsec();
                        for (uint64_t j = i; j < MIN_OF(i + GROUP, n); j++)
                                CHECK(stable_set_sharers(tree, j, 0) == 0);
                        pause_note(&down, i / GROUP, cpu_nsec() - start);
                }
        }
        CHECK(found == 4 * n);

        bool ok = (double)counts.bytes / n <= 48;
        printf("{\"bench\":\"stable\",\"entries\":%" PRIu64 ",\"insert_ns\":%.1f,\"lookup_ns\":%.1f,"
               "\"lookup_miss_ns\":%.1f,\"lookup_batch_ns\":%.1f,\"lookup_miss_batch_ns\":%.1f,"
               "\"lookup_empty_batch_ns\":%.1f,\"bytes_per_entry\":%.2f,\"insert_pause_us\":%.1f,"
               "\"remove_pause_us\":%.1f,\"required_bytes\":48,\"ok\":%s}\n",
               n, insert, lookup, miss, batch, batch_miss, empty, (double)counts.bytes / n,
               pause_longest_usec(&up, groups), pause_longest_usec(&down, groups), ok ? "true" : "false");
        fflush(stdout);
        return ok;
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
        static const uint64_t usual[] = { 1000000, 10000000, 50000000 };
        bool quick = argc > 1 && strcmp(argv[1], "--quick") == 0, ok = true;
        uint64_t sizes[16] = {};
        size_t n = 0;

        for (int i = quick ? 2 : 1; i < argc && n < ELEMENTSOF(sizes); i++)
                sizes[n++] = strtoull(argv[i], NULL, 10);
        if (n == 0)
                for (; n < (quick ? 1 : ELEMENTSOF(usual)); n++)
                        sizes[n] = usual[n];

        for (size_t i = 0; i < n; i++) {
                CHECK(sizes[i] >= 100000, "usage: bench-index [--quick] [ENTRIES…], 100000 at least");
                ok = bench_unstable(sizes[i], 1) && ok;
                ok = bench_unstable(sizes[i], UNSTABLE_SHARDS) && ok;
                if (sizes[i] <= 10000000)
                        ok = bench_stable(sizes[i]) && ok;
        }

        bench_chain(1);
        double shortest = bench_chain(2);
        CHECK(bench_chain(4096) < 4 * shortest, "a look-up by the chain's length");
        return ok ? 0 : 1;
}
