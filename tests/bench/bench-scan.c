/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What the scanner and the estimate cost above the bare floor: process_vm_readv(2) and the hash over the same memory in
 * the batch size that is best here, nothing else. One run, CPU time. A round measures the floor, the scanner, the
 * estimate and the floor again, because the machine's speed moves; a ratio is the median of the rounds' ratios.
 *
 * Required: an estimate costs at most 1.3 times the floor.
 */
#include "test.h"

#include "scan/estimate.h"
#include "scan/scan.h"

#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/uio.h>

#define AREA ((uint8_t *)0x200000000000)
#define AREA_BYTES ((size_t)512 << 20)
#define AREA_PAGES (AREA_BYTES / PAGE_BYTES)
#define ROUNDS 9
#define RATIO_MAX 1.3

static uint64_t mix(uint64_t x) {
        x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9U;
        x = (x ^ x >> 27) * 0x94d049bb133111ebU;
        return x ^ x >> 31;
}

/* 30 % duplicates of 10,000 contents, 10 % zeros, the rest unique; in runs of 8 pages. */
static void fill(int advice) {
        CHECK(mmap(AREA, AREA_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == AREA);
        CHECK(madvise(AREA, AREA_BYTES, advice) == 0);
        for (size_t page = 0; page < AREA_PAGES; page++) {
                uint64_t *words = (uint64_t *)(void *)(AREA + page * PAGE_BYTES), kind = mix(page / 8 + 1) % 100;

                for (size_t i = 0; i < PAGE_BYTES / 8; i++)
                        words[i] = kind < 10 ? 0 : mix((kind < 40 ? page % 10000 : page + 1000000) << 9 | i);
        }
}

static double floor_nsec(pid_t pid, const HashSecret *secret, unsigned batch, uint8_t *buffer) {
        uint64_t start = process_cpu_nsec();
        volatile uint64_t sum = 0;

        for (size_t page = 0; page < AREA_PAGES; page += batch) {
                struct iovec local = { buffer, batch * PAGE_BYTES }, remote = { AREA + page * PAGE_BYTES, batch * PAGE_BYTES };

                CHECK(process_vm_readv(pid, &local, 1, &remote, 1, 0) == (ssize_t)(batch * PAGE_BYTES));
                for (unsigned i = 0; i < batch; i++)
                        sum += hash_page(secret, buffer + i * PAGE_BYTES);
        }
        (void)sum;
        return (double)(process_cpu_nsec() - start) / (double)AREA_PAGES;
}

/* Everything a pass does: the blocks, then each of them. */
static double scan_nsec(Scanner *scanner, Target *target, const VmaList *vmas) {
        uint64_t start = process_cpu_nsec();
        _cleanup_(block_table_done) BlockTable table = {};
        _cleanup_(space_done) Space space = { .target = target, .table = &table };
        static ScanBatch batch;

        batch.target = target;
        batch.vmas = vmas;
        scanner_begin_pass(scanner, 1);
        CHECK(space_refresh(&space, vmas) == 0);
        for (size_t b = 0; b < space.n; b++) {
                scan_batch_whole(&batch, space.blocks[b]);
                CHECK(scan_batch(scanner, 0, &batch) == 0);
        }
        return (double)(process_cpu_nsec() - start) / (double)AREA_PAGES;
}

static double estimate_nsec(Target *target, EstimateCounts *ret) {
        uint64_t start = process_cpu_nsec();
        _cleanup_(estimate_freep) Estimate *estimate = NULL;
        unsigned process;

        CHECK(estimate_new(&estimate) == 0);
        CHECK(estimate_add(estimate, target, false, 0, &process) == 0);
        CHECK(estimate_finish(estimate) == 0);
        estimate_total(estimate, ret);
        return (double)(process_cpu_nsec() - start) / (double)AREA_PAGES;
}

static int compare_doubles(const void *a, const void *b) {
        double x = *(const double *)a, y = *(const double *)b;
        return x < y ? -1 : x > y;
}

static double median(double *values) {
        qsort(values, ROUNDS, sizeof *values, compare_doubles);
        return values[ROUNDS / 2];
}

static unsigned best_batch(pid_t pid, const HashSecret *secret, uint8_t *buffer) {
        static const unsigned batches[] = { 16, 32, 64, 128, 256, 512 };
        unsigned best = 0;
        double least = 1e9;

        for (size_t i = 0; i < 3 * ELEMENTSOF(batches); i++) {
                double nsec = floor_nsec(pid, secret, batches[i % ELEMENTSOF(batches)], buffer);

                if (nsec < least) {
                        least = nsec;
                        best = batches[i % ELEMENTSOF(batches)];
                }
        }
        return best;
}

/* Returns whether what is required holds. */
static bool measure(const char *name, int advice) {
        _cleanup_(hash_secret_freep) HashSecret *secret = NULL;
        _cleanup_(scanner_freep) Scanner *scanner = NULL;
        _cleanup_(target_freep) Target *target = NULL;
        _cleanup_(vma_list_done) VmaList vmas = {};
        _cleanup_free_ uint8_t *buffer = aligned_alloc(PAGE_BYTES, BLOCK_BYTES);
        double floors[ROUNDS], scans[ROUNDS], estimates[ROUNDS], scan_ratios[ROUNDS], ratios[ROUNDS], ratio;
        unsigned batch;
        EstimateCounts counts;
        int ready[2];
        char c;
        pid_t pid;

        CHECK(buffer && pipe2(ready, O_CLOEXEC) == 0);
        pid = fork();
        CHECK(pid >= 0);
        if (pid == 0) {
                prctl(PR_SET_PDEATHSIG, SIGKILL);
                fill(advice);
                CHECK(write(ready[1], "", 1) == 1);
                for (;;)
                        pause();
        }
        CHECK(read(ready[0], &c, 1) == 1);
        close(ready[0]);
        close(ready[1]);
        CHECK(hash_secret_new(&secret) == 0 && scanner_new(secret, 1, &scanner) == 0);
        CHECK(target_new(pid, &target) == 0);
        batch = best_batch(pid, secret, buffer);
        for (int i = 0; i < ROUNDS; i++) {
                floors[i] = floor_nsec(pid, secret, batch, buffer);
                CHECK(target_open_memory(target) == 0);
                CHECK(target_read_vmas(target, false, &vmas) == 0);
                scans[i] = scan_nsec(scanner, target, &vmas);
                vma_list_done(&vmas);
                target_close_memory(target);
                estimates[i] = estimate_nsec(target, &counts);
                floors[i] = (floors[i] + floor_nsec(pid, secret, batch, buffer)) / 2;
                scan_ratios[i] = scans[i] / floors[i];
                ratios[i] = estimates[i] / floors[i];
        }
        kill(pid, SIGKILL);
        CHECK(counts.pages >= AREA_PAGES && counts.huge_pages >= (advice == MADV_HUGEPAGE ? AREA_PAGES / BLOCK_PAGES : 0));
        ratio = median(ratios);
        printf("{\"bench\": \"scan\", \"memory\": \"%s\", \"pages\": %zu, \"floor_nsec_page\": %.1f, \"floor_batch_pages\": %u, "
               "\"scan_nsec_page\": %.1f, \"estimate_nsec_page\": %.1f, \"scan_ratio\": %.3f, \"estimate_ratio\": %.3f}\n",
               name, AREA_PAGES, median(floors), batch, median(scans), median(estimates), median(scan_ratios), ratio);
        return ratio <= RATIO_MAX;
}

int main(void) {
        bool ok;

        test_need_root();
        ok = measure("small", MADV_NOHUGEPAGE);
        ok &= measure("huge", MADV_HUGEPAGE);
        CHECK(ok, "an estimate costs more than %.1f times the floor", RATIO_MAX);
        return 0;
}
