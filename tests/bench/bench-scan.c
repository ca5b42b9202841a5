/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What the scanner and the estimate cost above the bare floor: process_vm_readv(2) and the hash over the same pages in
 * the batch size that is best here, nothing else. One run, CPU time. A round measures the floor, the scanner, the
 * estimate and the floor again, because the machine's speed moves; a ratio is the median of the rounds' ratios. And
 * what several threads bring: the least time, by the clock on the wall, of one thread and of all.
 *
 * "small" and "huge" are 512 MiB read whole, as by a first pass: finding the blocks is part of it. "sparse" is one page
 * in each of 32,768 blocks, as tracking would name them.
 *
 * bench-scan [--threads N] [--memory NAME] [--profile floor|scan]. The last does the one thing over and over for 10
 * seconds, for perf(1) to look at.
 *
 * Required: an estimate costs at most 1.3 times the floor.
 */
#include "test.h"

#include "base/crew.h"
#include "scan/estimate.h"
#include "scan/scan.h"

#include <getopt.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/uio.h>

#define AREA ((uint8_t *)0x200000000000)
#define ROUNDS 9
#define RATIO_MAX 1.3
#define THREADS_MAX 64
#define PROFILE_NSEC (10 * NSEC_PER_SEC)

typedef struct Memory {
        const char *name;
        int advice;
        size_t pages;
        uint64_t stride;        /* bytes from a page to the next */
} Memory;

static const Memory memories[] = {
        { "small", MADV_NOHUGEPAGE, 131072, PAGE_BYTES },
        { "huge", MADV_HUGEPAGE, 131072, PAGE_BYTES },
        { "sparse", MADV_NOHUGEPAGE, 32768, BLOCK_BYTES + PAGE_BYTES },
};

typedef struct Bench {
        const Memory *memory;
        HashSecret *secret;
        Scanner *scanner;
        Target *target;
        VmaList vmas;
        BlockTable table;
        Space space;
        Crew *alone, *crew;
        ScanBatch *batches;     /* one a thread */
        uint8_t *buffer;
        unsigned floor_batch;   /* pages */
        double blocks_nsec;     /* of the last scan: what finding the blocks took of it, a page */
} Bench;

static uint64_t mix(uint64_t x) {
        x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9U;
        x = (x ^ x >> 27) * 0x94d049bb133111ebU;
        return x ^ x >> 31;
}

static bool is_dense(const Memory *memory) { return memory->stride == PAGE_BYTES; }

/* 30 % duplicates of 10,000 contents, 10 % zeros, the rest unique; in runs of 8 pages. */
static void fill(const Memory *memory) {
        size_t bytes = memory->pages * memory->stride;

        CHECK(mmap(AREA, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1,
                   0) == AREA);
        CHECK(madvise(AREA, bytes, memory->advice) == 0);
        for (size_t page = 0; page < memory->pages; page++) {
                volatile uint64_t *words = (volatile uint64_t *)(void *)(AREA + page * memory->stride);
                uint64_t kind = mix(page / 8 + 1) % 100;

                for (size_t i = 0; i < PAGE_BYTES / 8; i++)
                        words[i] = kind < 10 ? 0 : mix((kind < 40 ? page % 10000 : page + 1000000) << 9 | i);
        }
}

static double floor_nsec(Bench *b, unsigned batch) {
        const Memory *memory = b->memory;
        uint64_t start = process_cpu_nsec();
        volatile uint64_t sum = 0;

        for (size_t page = 0; page < memory->pages; page += batch) {
                struct iovec local = { b->buffer, batch * PAGE_BYTES }, remote[BLOCK_PAGES];
                unsigned n = 0;

                if (is_dense(memory))
                        remote[n++] = (struct iovec) { AREA + page * PAGE_BYTES, batch * PAGE_BYTES };
                else
                        for (; n < batch; n++)
                                remote[n] = (struct iovec) { AREA + (page + n) * memory->stride, PAGE_BYTES };
                CHECK(process_vm_readv(b->target->pid, &local, 1, remote, n, 0) == (ssize_t)(batch * PAGE_BYTES));
                for (unsigned i = 0; i < batch; i++)
                        sum += hash_page(b->secret, b->buffer + i * PAGE_BYTES);
        }
        (void)sum;
        return (double)(process_cpu_nsec() - start) / (double)memory->pages;
}

static void open_space(Bench *b) {
        CHECK(target_open_memory(b->target) == 0);
        CHECK(target_read_vmas(b->target, false, &b->vmas) == 0);
        b->table = (BlockTable) {};
        b->space = (Space) { .target = b->target, .table = &b->table };
}

static void close_space(Bench *b) {
        space_done(&b->space);
        block_table_done(&b->table);
        vma_list_done(&b->vmas);
        target_close_memory(b->target);
}

static void scan_whole(void *userdata, unsigned thread, size_t item) {
        Bench *b = userdata;
        ScanBatch *batch = &b->batches[thread];

        batch->target = b->target;
        batch->vmas = &b->vmas;
        scan_batch_whole(batch, b->space.blocks[item]);
        CHECK(scan_batch(b->scanner, thread, batch) == 0);
}

static void scan_scattered(void *userdata, unsigned thread, size_t item) {
        Bench *b = userdata;
        ScanBatch *batch = &b->batches[thread];
        uint64_t addr = (uintptr_t)AREA + item * SCAN_BATCH_PAGES * b->memory->stride;

        batch->target = b->target;
        batch->vmas = &b->vmas;
        for (batch->n = 0; batch->n < SCAN_BATCH_PAGES; batch->n++, addr += b->memory->stride) {
                batch->pages[batch->n].block = space_find(&b->space, addr);
                batch->pages[batch->n].page = (uint16_t)(addr / PAGE_BYTES % BLOCK_PAGES);
        }
        CHECK(scan_batch(b->scanner, thread, batch) == 0);
}

/* Everything a pass does to read this memory. CPU time a page; *ret_wall: by the clock. */
static double scan_nsec(Bench *b, Crew *crew, double *ret_wall) {
        uint64_t cpu, wall;

        open_space(b);
        if (!is_dense(b->memory))
                CHECK(space_refresh(&b->space, &b->vmas) == 0);
        scanner_begin_pass(b->scanner, 1);
        cpu = process_cpu_nsec();
        wall = now_nsec();
        if (is_dense(b->memory)) {
                CHECK(space_refresh(&b->space, &b->vmas) == 0);
                b->blocks_nsec = (double)(process_cpu_nsec() - cpu) / (double)b->memory->pages;
                crew_run(crew, b->space.n, scan_whole, b);
        } else
                crew_run(crew, b->memory->pages / SCAN_BATCH_PAGES, scan_scattered, b);
        cpu = process_cpu_nsec() - cpu;
        *ret_wall = (double)(now_nsec() - wall) / (double)b->memory->pages;
        close_space(b);
        return (double)cpu / (double)b->memory->pages;
}

static double estimate_nsec(Bench *b, EstimateCounts *ret) {
        uint64_t start = process_cpu_nsec();
        _cleanup_(estimate_freep) Estimate *estimate = NULL;
        unsigned process;

        CHECK(estimate_new(&estimate) == 0);
        CHECK(estimate_add(estimate, b->target, false, 0, &process) == 0);
        CHECK(estimate_finish(estimate) == 0);
        estimate_total(estimate, ret);
        return (double)(process_cpu_nsec() - start) / (double)b->memory->pages;
}

static int compare_doubles(const void *a, const void *b) {
        double x = *(const double *)a, y = *(const double *)b;
        return x < y ? -1 : x > y;
}

static double median(double *values) {
        qsort(values, ROUNDS, sizeof *values, compare_doubles);
        return values[ROUNDS / 2];
}

static unsigned best_batch(Bench *b) {
        static const unsigned batches[] = { 16, 32, 64, 128, 256, 512 };
        unsigned best = 0;
        double least = 1e9;

        for (size_t i = 0; i < 3 * ELEMENTSOF(batches); i++) {
                double nsec = floor_nsec(b, batches[i % ELEMENTSOF(batches)]);

                if (nsec < least) {
                        least = nsec;
                        best = batches[i % ELEMENTSOF(batches)];
                }
        }
        return best;
}

static pid_t start_victim(const Memory *memory) {
        int ready[2];
        pid_t pid;
        char c;

        CHECK(pipe2(ready, O_CLOEXEC) == 0);
        pid = fork();
        CHECK(pid >= 0);
        if (pid == 0) {
                prctl(PR_SET_PDEATHSIG, SIGKILL);
                fill(memory);
                CHECK(write(ready[1], "", 1) == 1);
                for (;;)
                        pause();
        }
        CHECK(read(ready[0], &c, 1) == 1);
        close(ready[0]);
        close(ready[1]);
        return pid;
}

static void profile(Bench *b, const char *what) {
        uint64_t end = now_nsec() + PROFILE_NSEC;
        double wall;

        while (now_nsec() < end)
                if (strcmp(what, "floor") == 0)
                        floor_nsec(b, b->floor_batch);
                else
                        scan_nsec(b, b->alone, &wall);
}

/* Returns whether what is required holds. */
static bool measure(Bench *b) {
        double floors[ROUNDS], scans[ROUNDS], blocks[ROUNDS], estimates[ROUNDS], scan_ratios[ROUNDS], ratios[ROUNDS];
        double one = 1e9, all = 1e9, cpu_one = 1e9, cpu_all = 1e9, ratio = 0, wall;
        EstimateCounts counts;

        for (int i = 0; i < ROUNDS; i++) {
                floors[i] = floor_nsec(b, b->floor_batch);
                scans[i] = scan_nsec(b, b->alone, &wall);
                blocks[i] = b->blocks_nsec;
                estimates[i] = is_dense(b->memory) ? estimate_nsec(b, &counts) : 0;
                floors[i] = (floors[i] + floor_nsec(b, b->floor_batch)) / 2;
                scan_ratios[i] = scans[i] / floors[i];
                ratios[i] = estimates[i] / floors[i];
        }
        for (int i = 0; i < ROUNDS; i++) {
                cpu_all = MIN_OF(cpu_all, scan_nsec(b, b->crew, &wall));
                all = MIN_OF(all, wall);
                cpu_one = MIN_OF(cpu_one, scan_nsec(b, b->alone, &wall));
                one = MIN_OF(one, wall);
        }
        printf("{\"bench\": \"scan\", \"memory\": \"%s\", \"pages\": %zu, ", b->memory->name, b->memory->pages);
        printf("\"floor_nsec_page\": %.1f, \"floor_batch_pages\": %u, ", median(floors), b->floor_batch);
        printf("\"scan_nsec_page\": %.1f, \"blocks_nsec_page\": %.1f, \"scan_ratio\": %.3f", median(scans), median(blocks),
               median(scan_ratios));
        if (is_dense(b->memory)) {
                CHECK(counts.pages >= b->memory->pages);
                CHECK(b->memory->advice != MADV_HUGEPAGE || counts.huge_pages >= b->memory->pages / BLOCK_PAGES);
                ratio = median(ratios);
                printf(", \"estimate_nsec_page\": %.1f, \"estimate_ratio\": %.3f", median(estimates), ratio);
        }
        printf(", \"threads\": %u, \"wall_nsec_page_1\": %.1f, \"wall_nsec_page\": %.1f, \"speedup\": %.2f, "
               "\"cpu_ratio\": %.3f}\n", crew_size(b->crew), one, all, one / all, cpu_all / cpu_one);
        fflush(stdout);
        return ratio <= RATIO_MAX;
}

static bool run(const Memory *memory, unsigned threads, const char *what) {
        Bench b = { .memory = memory };
        pid_t pid = start_victim(memory);
        bool ok = true;

        b.buffer = aligned_alloc(PAGE_BYTES, BLOCK_BYTES);
        b.batches = calloc(threads, sizeof *b.batches);
        CHECK(b.buffer && b.batches);
        CHECK(hash_secret_new(&b.secret) == 0 && scanner_new(b.secret, threads, &b.scanner) == 0);
        CHECK(crew_new(1, &b.alone) == 0 && crew_new(threads, &b.crew) == 0);
        CHECK(target_new(pid, &b.target) == 0);
        b.floor_batch = best_batch(&b);
        if (what)
                profile(&b, what);
        else
                ok = measure(&b);
        kill(pid, SIGKILL);
        target_free(b.target);
        crew_free(b.crew);
        crew_free(b.alone);
        scanner_free(b.scanner);
        hash_secret_free(b.secret);
        free(b.batches);
        free(b.buffer);
        return ok;
}

int main(int argc, char **argv) {
        static const struct option options[] = {
                { "threads", required_argument, NULL, 't' },
                { "memory", required_argument, NULL, 'm' },
                { "profile", required_argument, NULL, 'p' },
                {},
        };
        const char *only = NULL, *what = NULL;
        unsigned threads = 2;
        bool ok = true;
        int c;

        while ((c = getopt_long(argc, argv, "", options, NULL)) >= 0)
                switch (c) {
                case 't':
                        threads = (unsigned)strtoul(optarg, NULL, 10);
                        CHECK(threads >= 1 && threads <= THREADS_MAX);
                        break;
                case 'm':
                        only = optarg;
                        break;
                case 'p':
                        what = optarg;
                        break;
                default:
                        return 2;
                }
        test_need_root();
        for (size_t i = 0; i < ELEMENTSOF(memories); i++)
                if (!only || strcmp(only, memories[i].name) == 0)
                        ok &= run(&memories[i], threads, what);
        CHECK(ok, "an estimate costs more than %.1f times the floor", RATIO_MAX);
        return 0;
}
