/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * What it costs to decide what is to be put in order in a pool, for each page that is mapped from it: the look (what is
 * mapped by one process alone), and the plan (what lies apart). Two processes that share a gibibyte, in pieces of so
 * many pages that lie side by side in both and anyhow in the pool. Not the reading of their pagemaps, which a look begins
 * with. One JSON object a line; times are processor time, the shortest of several runs. Nothing is required of it.
 * Usage: bench-pool-tidy [PIECE_PAGES…]
 */

#include "test.h"

#include "merge/pool-tidy.h"

#include <inttypes.h>
#include <time.h>

#define N_PAGES (UINT64_C(1) << 18)
#define N_MEMBERS 2U
#define MAX_SHARING 256U
#define RUNS 5U

static uint64_t cpu_nsec(void) {
        struct timespec t;

        clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
        return (uint64_t)t.tv_sec * NSEC_PER_SEC + (uint64_t)t.tv_nsec;
}

static void tell(TidyPieces *pieces, uint64_t n_pages) {
        uint64_t n = N_PAGES / n_pages;

        for (uint32_t m = 0; m < N_MEMBERS; m++)
                for (uint64_t i = 0; i < n; i++) {
                        CHECK(GROW(pieces->pieces, pieces->n, pieces->allocated) == 0, "memory");
                        pieces->pieces[pieces->n++] = (TidyPiece){
                                .address = (UINT64_C(1) << 40) + i * n_pages * PAGE_BYTES,
                                /* An odd number, and n a power of two: each once, and none beside its neighbour. */
                                .page = i * 40503 % n * n_pages,
                                .n_pages = (uint32_t)n_pages,
                                .member = m,
                                .first = true,
                                .last = true,
                                .joins = i > 0,
                        };
                }
}

static void measure(uint64_t n_pages) {
        const uint32_t looks[N_MEMBERS] = { TIDY_LOOKS_MIN, TIDY_LOOKS_MIN };
        uint64_t look_nsec = UINT64_MAX, plan_nsec = UINT64_MAX, pages = N_MEMBERS * N_PAGES;
        _cleanup_(tidy_pieces_done) TidyPieces pieces = {};
        Stable *stable;
        PoolTidy tidy = {};
        PoolSpace space;
        size_t n_units = 0;

        CHECK(n_pages > 0 && (n_pages & (n_pages - 1)) == 0 && n_pages < N_PAGES, "a power of two, please");
        pool_space_init(&space, MAX_SHARING);
        CHECK(pool_space_grow(&space, N_PAGES) == 0 && stable_new(MAX_SHARING, &stable) == 0, "memory");
        for (uint64_t page = 0; page < N_PAGES; page++) {
                pool_space_set(&space, page, N_MEMBERS);
                CHECK(stable_insert(stable, page * UINT64_C(0x9e3779b97f4a7c15) | 1, page, N_MEMBERS) >= 0, "memory");
        }
        tell(&pieces, n_pages);
        for (unsigned run = 0; run < RUNS; run++) {
                _cleanup_(tidy_pieces_done) TidyPieces alone = {};
                _cleanup_(tidy_plan_done) TidyPlan plan = {};
                uint64_t begun = cpu_nsec(), looked;

                CHECK(pool_tidy_look(&tidy, &space, stable, &pieces, looks, &alone) == 0, "look");
                looked = cpu_nsec();
                CHECK(pool_tidy_plan(&tidy, &space, &pieces, false, &plan) == 0, "plan");
                plan_nsec = MIN_OF(plan_nsec, cpu_nsec() - looked);
                look_nsec = MIN_OF(look_nsec, looked - begun);
                n_units = plan.n;
        }
        printf("{\"bench\":\"pool-tidy\",\"piece_pages\":%" PRIu64 ",\"pieces\":%zu,\"pages\":%" PRIu64
               ",\"units\":%zu,\"look_nsec_a_page\":%.2f,\"plan_nsec_a_page\":%.2f,\"plan_nsec_a_piece\":%.0f,\"ok\":true}\n",
               n_pages, pieces.n, pages, n_units, (double)look_nsec / (double)pages, (double)plan_nsec / (double)pages,
               (double)plan_nsec / (double)pieces.n);
        fflush(stdout);
        pool_tidy_done(&tidy);
        pool_space_done(&space);
        stable_free(stable);
}

int main(int argc, char **argv) {
        if (argc > 1)
                for (int i = 1; i < argc; i++)
                        measure(strtoull(argv[i], NULL, 10));
        else
                for (uint64_t n_pages = 8; n_pages <= 512; n_pages *= 8)
                        measure(n_pages);
        return 0;
}
