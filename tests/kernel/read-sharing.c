/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Reading un-shares nothing: after scanning, and after an estimate, every page of fork-shared and of KSM-merged memory
 * lies on the frame it lay on before. KSM frames that only one page maps any more are among them: they look exclusive.
 *
 * Built twice. With NAIVE_READER, which pins whatever it reads, both kinds must come apart: else this test could not
 * fail, or the kernel has changed and the careful reader is no longer needed.
 */
#include "test.h"

#include "pairs.h"
#include "scan/census.h"
#include "scan/estimate.h"

static Ksm *ksm;
static Pair *forked, *merged;

/* Scans the area of one victim; counts[kind]. */
static void scan_area(Scanner *scanner, pid_t pid, unsigned *counts) {
        _cleanup_(target_freep) Target *target = NULL;
        _cleanup_(vma_list_done) VmaList vmas = {};
        _cleanup_(block_table_done) BlockTable table = {};
        _cleanup_(space_done) Space space = { .table = &table };
        static ScanBatch batch;

        CHECK(target_new(pid, &target) == 0);
        CHECK(target_open_memory(target) == 0);
        CHECK(target_read_vmas(target, false, &vmas) == 0);
        space.target = batch.target = target;
        batch.vmas = &vmas;
        CHECK(space_refresh(&space, &vmas) == 0);
        for (size_t b = 0; b < space.n; b++) {
                Block *block = space.blocks[b];

                scan_batch_whole(&batch, block);
                CHECK(scan_batch(scanner, 0, &batch) == 0);
                if (block->addr < (uintptr_t)pair_area() || block->addr >= (uintptr_t)pair_area() + PAIR_BYTES)
                        continue;
                for (unsigned i = 0; i < BLOCK_PAGES; i++) {
                        const ScanPage *p = &batch.pages[i];

                        counts[p->kind]++;
                        CHECK(page_set_has(block->merged, i) == (p->kind == SCAN_KSM));
                        CHECK(page_set_has(block->zero, i) == (p->kind == SCAN_ZERO));
                        CHECK(page_set_has(block->forked, i) == (!p->writable_alone && p->kind != SCAN_KSM));
                        CHECK(page_set_has(block->hashed, i) && p->key_known && block->check[i] == (uint8_t)p->key);
                }
        }
}

static void check_unmoved(const char *what) {
        unsigned of_fork = pair_count_moved(forked), of_ksm = pair_count_moved(merged);

        printf("%s: frames changed: %u of %u forked, %u of %u merged\n", what, of_fork, 2 * PAIR_PAGES, of_ksm,
               2 * PAIR_PAGES);
#ifdef NAIVE_READER
        CHECK(of_fork > 0, "a pinning reader un-shared nothing that was forked");
        CHECK(of_ksm > 0, "a pinning reader un-shared nothing that was merged");
#else
        CHECK(of_fork == 0 && of_ksm == 0, "%s moved pages", what);
#endif
}

static void test_scan(void) {
        _cleanup_(hash_secret_freep) HashSecret *secret = NULL;
        _cleanup_(scanner_freep) Scanner *scanner = NULL;
        unsigned forked_counts[2][SCAN_FAILED + 1] = {}, merged_counts[2][SCAN_FAILED + 1] = {};

        CHECK(hash_secret_new(&secret) == 0);
        CHECK(scanner_new(secret, 1, &scanner) == 0);
        for (uint32_t pass = 1; pass <= 2; pass++) {
                memset(forked_counts, 0, sizeof forked_counts);
                memset(merged_counts, 0, sizeof merged_counts);
                pair_remember(forked);
                pair_remember(merged);
                scanner_begin_pass(scanner, pass);
                for (int i = 0; i < 2; i++) {
                        scan_area(scanner, forked->pids[i], forked_counts[i]);
                        scan_area(scanner, merged->pids[i], merged_counts[i]);
                }
#ifdef NAIVE_READER
                break;
#endif
                CHECK(forked_counts[0][SCAN_HASHED] == PAIR_PAGES - PAIR_ZEROS);
                CHECK(forked_counts[1][SCAN_SHARED] == PAIR_PAGES - PAIR_ZEROS);
                CHECK(forked_counts[0][SCAN_ZERO] == PAIR_ZEROS && forked_counts[1][SCAN_ZERO] == PAIR_ZEROS);
                CHECK(merged_counts[0][SCAN_KSM] == PAIR_PAGES, "KSM frames mapped once included: %u",
                      merged_counts[0][SCAN_KSM]);
                CHECK(merged_counts[1][SCAN_KSM] == PAIR_PAGES - PAIR_ALONE);
                CHECK(merged_counts[1][SCAN_HASHED] == PAIR_ALONE);
        }
        check_unmoved("scan");
}

static void test_census(void) {
        _cleanup_(hash_secret_freep) HashSecret *secret = NULL;
        _cleanup_(scanner_freep) Scanner *scanner = NULL;
        _cleanup_(census_frames_freep) CensusFrames *frames = NULL;
        Census census = {};

        CHECK(hash_secret_new(&secret) == 0);
        CHECK(scanner_new(secret, 1, &scanner) == 0);
        CHECK(census_frames_new(scanner, &frames) == 0);
        for (int i = 0; i < 4; i++) {
                _cleanup_(target_freep) Target *target = NULL;

                CHECK(target_new((i < 2 ? merged : forked)->pids[i % 2], &target) == 0);
                CHECK(target_open_memory(target) == 0);
                CHECK(census_add(frames, &(CensusPart){ .target = target }, (uintptr_t)pair_area(),
                                 (uintptr_t)pair_area() + PAIR_BYTES, &census, NULL, NULL) == 0);
        }
        CHECK(census.pages == 4 * PAIR_PAGES);
        CHECK(census.zeropage == 0);
        CHECK(census.ksm_mappings == 2 * (PAIR_PAGES - PAIR_ALONE), "%lu", census.ksm_mappings);
        CHECK(census.ksm_unmerged == census.ksm_mappings);
        CHECK(census.ksm_frames == PAIR_PAGES - PAIR_ALONE, "%lu", census.ksm_frames);
}

static void test_estimate(void) {
        _cleanup_(estimate_freep) Estimate *estimate = NULL;
        EstimateCounts counts;
        unsigned process;

        pair_remember(forked);
        pair_remember(merged);
        CHECK(estimate_new(&estimate) == 0);
        for (int i = 0; i < 4; i++) {
                _cleanup_(target_freep) Target *target = NULL;

                CHECK(target_new((i < 2 ? merged : forked)->pids[i % 2], &target) == 0);
                CHECK(estimate_add(estimate, target, false, 0, &process) == 0);
        }
        CHECK(estimate_finish(estimate) == 0);
        estimate_total(estimate, &counts);
        CHECK(counts.pages == counts.zero + counts.distinct + counts.duplicate);
        check_unmoved("estimate");
}

int main(void) {
        ksm = pairs_ksm("read-sharing");
        pairs_start(ksm, &forked, &merged);
        test_census();
        test_scan();
#ifdef NAIVE_READER
        return 0; /* what the scan took apart an estimate cannot */
#endif
        test_estimate();
        return 0;
}
