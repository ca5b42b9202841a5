/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What changes between the scanner's look at the pagemap and its read: pages that are unmapped, a process that ends, a
 * process that replaces its memory by exec(2). The reader is wrapped (ld --wrap), so that the change comes exactly then.
 *
 * The last is the dangerous one: process_vm_readv(2) then reads other memory without any error. The test shows that
 * it did, so that only the scanner's own check stands between that and a wrong answer.
 */
#include "test.h"

#include "scan/estimate.h"
#include "scan/reader.h"
#include "scan/scan.h"

#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>

#define AREA ((uint8_t *)0x200000000000)
#define AREA_PAGES (2 * READER_PAGES)
#define HOLE 40U
#define MERGEABLE 1             /* argument of the victim: makes all reads go through /proc/PID/mem */

typedef enum Order { IDLE, UNMAP, EXEC, END } Order;

static struct {
        volatile int order, done;
} *shared;

static int shared_fd;
static Order pending;           /* given to the victim before the next read */
static int calls_before;        /* reads that are left alone first */
static pid_t victim;
static unsigned pages_read;     /* by the last read */

static void order(Order what) {
        shared->done = 0;
        shared->order = what;
        if (what == END) {
                CHECK(kill(victim, SIGKILL) == 0);
                CHECK(waitpid(victim, NULL, 0) == victim);
                return;
        }
        for (int n = 0; !shared->done; n++) {
                CHECK(n < 10000, "the victim does not do as it is told");
                usleep(1000);
        }
}

int __real_reader_read(const Target *, ReaderWay, const uint64_t *, unsigned, void *, bool *);
int __wrap_reader_read(const Target *, ReaderWay, const uint64_t *, unsigned, void *, bool *);

int __wrap_reader_read(const Target *target, ReaderWay way, const uint64_t *addrs, unsigned n, void *buffer,
                       bool *ret_read) {
        int r;

        if (target->pid == victim && pending && calls_before-- == 0) {
                order(pending);
                pending = IDLE;
        }
        r = __real_reader_read(target, way, addrs, n, buffer, ret_read);
        pages_read = 0;
        for (unsigned i = 0; i < n && r == 0; i++)
                pages_read += ret_read[i];
        return r;
}

static void fill(uint32_t seed, bool mergeable) {
        CHECK(mmap(AREA, AREA_PAGES * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) ==
              AREA);
        CHECK(madvise(AREA, AREA_PAGES * PAGE_BYTES, MADV_NOHUGEPAGE) == 0);
        for (uint32_t i = 0; i < AREA_PAGES * PAGE_BYTES / 4; i++)
                ((uint32_t *)(void *)AREA)[i] = seed + i;
        if (mergeable)
                CHECK(madvise(AREA, AREA_PAGES * PAGE_BYTES, MADV_MERGEABLE) == 0 || errno == EINVAL);
}

static _Noreturn void obey(void) {
        for (;; usleep(500)) {
                char fd[16];

                if (shared->done)
                        continue;
                switch ((Order)shared->order) {
                case UNMAP:
                        CHECK(munmap(AREA + HOLE * PAGE_BYTES, PAGE_BYTES) == 0);
                        shared->done = 1;
                        break;
                case EXEC:
                        snprintf(fd, sizeof fd, "%d", shared_fd);
                        execl("/proc/self/exe", "victim", fd, NULL);
                        CHECK(false, "exec");
                        break;
                default:
                        break;
                }
        }
}

/* The new image after exec: other bytes at the same addresses. */
static _Noreturn void live_again(const char *fd) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED, atoi(fd), 0);
        CHECK(shared != MAP_FAILED);
        fill(0x77777777, false);
        shared->order = IDLE;
        shared->done = 1;
        for (;;)
                pause();
}

static void start(bool mergeable) {
        shared->order = IDLE;
        shared->done = 0;
        victim = fork();
        CHECK(victim >= 0);
        if (victim == 0) {
                prctl(PR_SET_PDEATHSIG, SIGKILL);
                fill(1, mergeable);
                shared->done = 1;
                obey();
        }
        for (int n = 0; !shared->done; n++) {
                CHECK(n < 10000, "the victim does not start");
                usleep(1000);
        }
}

static void end(void) {
        if (kill(victim, SIGKILL) == 0)
                waitpid(victim, NULL, 0);
}

static HashSecret *secret;
static Scanner *scanner;

/* Scans the victim's area with the order given before its read number `before`; what scan_batch() said. */
static int scan(bool mergeable, Order what, int before, ScanBatch *batch) {
        _cleanup_(target_freep) Target *target = NULL;
        _cleanup_(vma_list_done) VmaList vmas = {};
        _cleanup_(block_table_done) BlockTable table = {};
        _cleanup_(space_done) Space space = { .table = &table };
        Block *block, copy;
        int r;

        start(mergeable);
        CHECK(target_new(victim, &target) == 0);
        CHECK(target_open_memory(target) == 0);
        CHECK(target_read_vmas(target, false, &vmas) == 0);
        space.target = target;
        CHECK(space_refresh(&space, &vmas) == 0);
        block = space_find(&space, (uintptr_t)AREA);
        CHECK(block);
        scanner_begin_pass(scanner, 1);
        copy = *block;
        pending = what;
        calls_before = before;
        batch->target = target;
        batch->vmas = &vmas;
        scan_batch_whole(batch, block);
        r = scan_batch(scanner, 0, batch);
        CHECK(batch->result == r);
        CHECK(pending == IDLE, "the order was never given");
        if (r != 0)
                CHECK(memcmp(block, &copy, sizeof copy) == 0, "a scan that failed changed the block");
        end();
        return r;
}

static void check_pages(const ScanBatch *batch, unsigned hole) {
        for (unsigned i = 0; i < BLOCK_PAGES; i++) {
                const ScanPage *p = &batch->pages[i];
                ScanKind want = i >= AREA_PAGES ? SCAN_NOTHING : i == hole ? SCAN_FAILED : SCAN_HASHED;
                uint32_t page[PAGE_BYTES / 4];

                CHECK(p->kind == want, "page %u is of kind %d", i, p->kind);
                for (uint32_t k = 0; k < PAGE_BYTES / 4; k++)
                        page[k] = 1 + i * (uint32_t)(PAGE_BYTES / 4) + k;
                if (want == SCAN_HASHED)
                        CHECK(p->key == hash_page(secret, page), "page %u has another page's key", i);
        }
}

static void test_scan(void) {
        static ScanBatch batch;

        for (int mergeable = 0; mergeable <= MERGEABLE; mergeable++) {
                CHECK(scan(mergeable, UNMAP, 0, &batch) == 0);
                check_pages(&batch, HOLE);
                CHECK(scan(mergeable, UNMAP, 1, &batch) == 0);
                check_pages(&batch, BLOCK_PAGES); /* it had been read already */
                CHECK(scan(mergeable, END, 0, &batch) == TARGET_E_GONE);
                CHECK(scan(mergeable, END, 1, &batch) == TARGET_E_GONE);
                CHECK(scan(mergeable, EXEC, 1, &batch) == TARGET_E_GONE);
                if (!mergeable)
                        CHECK(pages_read == READER_PAGES, "the new image was not read: what the scanner guards against is gone");
        }
}

/* A process that ends while it is read counts nowhere; what it shared with another is counted with that one. */
static void test_estimate(void) {
        _cleanup_(target_freep) Target *first = NULL, *second = NULL;
        volatile pid_t *child = mmap(NULL, PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        EstimateCounts counts[2];
        unsigned process;

        CHECK(child != MAP_FAILED);
        victim = fork();
        if (victim == 0) {
                fill(9, false);
                pid_t pid = fork();
                if (pid > 0)
                        *child = pid;
                for (;;)
                        pause();
        }
        while (!*child)
                usleep(1000);
        usleep(100000); /* both have written what they write */
        CHECK(target_new(victim, &first) == 0 && target_new(*child, &second) == 0);
        for (int alone = 0; alone < 2; alone++) {
                _cleanup_(estimate_freep) Estimate *estimate = NULL;

                CHECK(estimate_new(&estimate) == 0);
                if (!alone) {
                        pending = END;
                        calls_before = 3;
                        CHECK(estimate_add(estimate, first, false, 0, &process) == TARGET_E_GONE);
                        CHECK(pending == IDLE, "it was read in fewer steps");
                }
                CHECK(estimate_add(estimate, second, false, 0, &process) == 0);
                CHECK(estimate_finish(estimate) == 0);
                estimate_total(estimate, &counts[alone]);
        }
        kill(*child, SIGKILL);
        CHECK(counts[1].pages >= AREA_PAGES);
        CHECK(memcmp(&counts[0], &counts[1], sizeof *counts) == 0, "%lu pages with the one that died, %lu without",
              counts[0].pages, counts[1].pages);
}

int main(int argc, char **argv) {
        if (argc > 1)
                live_again(argv[1]);
        test_need_root();
        test_lock_ksm(); /* nobody's ksmd merges the mergeable victims meanwhile */
        shared_fd = memfd_create("orders", 0);
        CHECK(shared_fd >= 0 && ftruncate(shared_fd, (off_t)PAGE_BYTES) == 0);
        shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED, shared_fd, 0);
        CHECK(shared != MAP_FAILED);
        CHECK(hash_secret_new(&secret) == 0);
        CHECK(scanner_new(secret, 1, &scanner) == 0);
        test_scan();
        test_estimate();
        scanner_free(scanner);
        hash_secret_free(secret);
        return 0;
}
