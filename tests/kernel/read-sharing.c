/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Reading un-shares nothing: after scanning, and after an estimate, every page of fork-shared and of KSM-merged memory
 * lies on the frame it lay on before. KSM frames that only one page maps any more are among them: they look exclusive.
 *
 * Built twice. With NAIVE_READER, which pins whatever it reads, both kinds must come apart: else this test could not
 * fail, or the kernel has changed and the careful reader is no longer needed.
 */
#include "test.h"

#include "host/ksm.h"
#include "scan/estimate.h"
#include "scan/pagemap.h"
#include "scan/scan.h"

#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>

#define PAGES 1024U             /* of each area */
#define ZEROS 100U              /* of the forked area: all zero */
#define ALONE 200U              /* of the merged area: written by one side after merging */
#define AREA ((uint8_t *)0x200000000000)
#define AREA_BYTES (PAGES * PAGE_BYTES)

typedef enum Stage { STARTING, FILLED, WRITE, WRITTEN } Stage;

typedef struct Pair {
        pid_t pids[2];
        volatile int stages[2];
        uint64_t frames[2][PAGES];
} Pair;

static Ksm *ksm;
static Pair *forked, *merged;

static void clean_up(void) {
        for (int i = 0; i < 2; i++) {
                if (forked && forked->pids[i] > 0)
                        kill(forked->pids[i], SIGKILL);
                if (merged && merged->pids[i] > 0)
                        kill(merged->pids[i], SIGKILL);
        }
        if (ksm)
                (void)ksm_restore(ksm);
        ksm = ksm_free(ksm);
}

static void wait_stage(const Pair *pair, int i, Stage stage) {
        for (int n = 0; pair->stages[i] != (int)stage; n++) {
                CHECK(n < 10000, "victim %d has come to stage %d only", i, pair->stages[i]);
                usleep(1000);
        }
}

static void fill(unsigned seed, unsigned zeros) {
        CHECK(mmap(AREA, AREA_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == AREA);
        CHECK(madvise(AREA, AREA_BYTES, MADV_NOHUGEPAGE) == 0);
        for (unsigned i = 0; i < PAGES; i++) {
                uint32_t *words = (uint32_t *)(void *)(AREA + i * PAGE_BYTES);
                words[0] = 1;
                for (unsigned k = 0; k < PAGE_BYTES / 4; k++)
                        words[k] = i < zeros ? 0 : seed + i * 4099 + k;
        }
}

static void live(Pair *pair, int i, Stage stage) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        pair->pids[i] = getpid();
        pair->stages[i] = stage;
        for (;;) {
                if (pair->stages[i] == WRITE) {
                        for (unsigned k = 0; k < ALONE; k++)
                                AREA[k * PAGE_BYTES]++;
                        pair->stages[i] = WRITTEN;
                }
                usleep(1000);
        }
}

static Pair *new_pair(void) {
        Pair *pair = mmap(NULL, sizeof *pair, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        CHECK(pair != MAP_FAILED);
        return pair;
}

static void read_entries(pid_t pid, uint64_t *entries) {
        char path[64];
        _cleanup_close_ int fd = -EBADF;

        snprintf(path, sizeof path, "/proc/%d/pagemap", pid);
        fd = open(path, O_RDONLY | O_CLOEXEC);
        CHECK(fd >= 0, "%s", path);
        CHECK(pread(fd, entries, PAGES * sizeof *entries, (off_t)((uintptr_t)AREA / PAGE_BYTES * 8)) == PAGES * 8);
}

static void read_frames(const Pair *pair, int i, uint64_t *frames) {
        read_entries(pair->pids[i], frames);
        for (unsigned k = 0; k < PAGES; k++)
                frames[k] &= PAGEMAP_PFN;
}

static unsigned n_shared(const Pair *pair) {
        uint64_t frames[2][PAGES];
        unsigned n = 0;

        for (int i = 0; i < 2; i++)
                read_frames(pair, i, frames[i]);
        for (unsigned k = 0; k < PAGES; k++)
                n += frames[0][k] && frames[0][k] == frames[1][k];
        return n;
}

static void remember(Pair *pair) {
        for (int i = 0; i < 2; i++)
                read_frames(pair, i, pair->frames[i]);
}

static unsigned n_moved(const Pair *pair) {
        uint64_t frames[PAGES];
        unsigned n = 0;

        for (int i = 0; i < 2; i++) {
                read_frames(pair, i, frames);
                for (unsigned k = 0; k < PAGES; k++)
                        n += frames[k] != pair->frames[i][k];
        }
        return n;
}

static void start_forked(void) {
        forked = new_pair();
        if (fork() == 0) {
                fill(1, ZEROS);
                if (fork() == 0)
                        live(forked, 1, FILLED);
                live(forked, 0, FILLED);
        }
        for (int i = 0; i < 2; i++)
                wait_stage(forked, i, FILLED);
        CHECK(n_shared(forked) == PAGES, "%u of %u after fork", n_shared(forked), PAGES);
}

static void start_merged(void) {
        unsigned shared = 0;
        uint64_t entries[PAGES];

        merged = new_pair();
        for (int i = 0; i < 2; i++) {
                if (fork() == 0) {
                        fill(77, 0);
                        CHECK(madvise(AREA, AREA_BYTES, MADV_MERGEABLE) == 0);
                        live(merged, i, FILLED);
                }
                wait_stage(merged, i, FILLED);
        }
        CHECK(ksm_set(ksm, "pages_to_scan", 20000) == 0);
        CHECK(ksm_set(ksm, "sleep_millisecs", 1) == 0);
        CHECK(ksm_set(ksm, "run", 1) == 0);
        for (int n = 0; n < 300 && shared < PAGES; n++) {
                usleep(100000);
                shared = n_shared(merged);
        }
        CHECK(shared == PAGES, "ksmd merged %u of %u", shared, PAGES);
        CHECK(ksm_set(ksm, "run", 0) == 0);
        merged->stages[1] = WRITE;
        wait_stage(merged, 1, WRITTEN);
        read_entries(merged->pids[0], entries);
        for (unsigned k = 0; k < ALONE; k++)
                CHECK(entries[k] & PAGEMAP_EXCLUSIVE, "page %u has a KSM frame of its own", k);
}

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
                if (block->addr < (uintptr_t)AREA || block->addr >= (uintptr_t)AREA + AREA_BYTES)
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
        unsigned of_fork = n_moved(forked), of_ksm = n_moved(merged);

        printf("%s: frames changed: %u of %u forked, %u of %u merged\n", what, of_fork, 2 * PAGES, of_ksm, 2 * PAGES);
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
                remember(forked);
                remember(merged);
                scanner_begin_pass(scanner, pass);
                for (int i = 0; i < 2; i++) {
                        scan_area(scanner, forked->pids[i], forked_counts[i]);
                        scan_area(scanner, merged->pids[i], merged_counts[i]);
                }
#ifdef NAIVE_READER
                break;
#endif
                CHECK(forked_counts[0][SCAN_HASHED] == PAGES - ZEROS);
                CHECK(forked_counts[1][SCAN_SHARED] == PAGES - ZEROS);
                CHECK(forked_counts[0][SCAN_ZERO] == ZEROS && forked_counts[1][SCAN_ZERO] == ZEROS);
                CHECK(merged_counts[0][SCAN_KSM] == PAGES, "KSM frames mapped once included: %u", merged_counts[0][SCAN_KSM]);
                CHECK(merged_counts[1][SCAN_KSM] == PAGES - ALONE);
                CHECK(merged_counts[1][SCAN_HASHED] == ALONE);
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
                CHECK(census_add(frames, target, (uintptr_t)AREA, (uintptr_t)AREA + AREA_BYTES, &census) == 0);
        }
        CHECK(census.pages == 4 * PAGES);
        CHECK(census.zeropage == 0);
        CHECK(census.ksm_mappings == 2 * (PAGES - ALONE), "%lu", census.ksm_mappings);
        CHECK(census.ksm_frames == PAGES - ALONE, "%lu", census.ksm_frames);
}

static void test_estimate(void) {
        _cleanup_(estimate_freep) Estimate *estimate = NULL;
        EstimateCounts counts;
        unsigned process;

        remember(forked);
        remember(merged);
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
        int r;

        test_need_root();
        test_lock_ksm();
        r = ksm_new(NULL, "/run/lock/ksmd-user-test-read-sharing.state", &ksm);
        if (r == -ENOENT)
                TEST_SKIP("a kernel without KSM");
        CHECK(r == 0);
        atexit(clean_up);
        start_forked();
        start_merged();
        test_census();
        test_scan();
#ifdef NAIVE_READER
        return 0; /* what the scan took apart an estimate cannot */
#endif
        test_estimate();
        return 0;
}
