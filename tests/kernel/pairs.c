/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "pairs.h"

#include "test.h"

#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>

typedef enum Stage { STARTING, FILLED, WRITE, WRITTEN } Stage;

static Pair *forked, *merged;
static char state_path[96];

uint8_t *pair_area(void) {
        static uint8_t *area;

        if (!area) {
                /* Where it lies is left to the kernel: sanitizers have fixed plans. */
                area = mmap(NULL, PAIR_BYTES + BLOCK_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1,
                            0);
                CHECK(area != MAP_FAILED);
                area += BLOCK_BYTES - (uintptr_t)area % BLOCK_BYTES;
        }
        return area;
}

static void end(void) {
        for (int i = 0; i < 2; i++) {
                if (forked && forked->pids[i] > 0)
                        kill(forked->pids[i], SIGKILL);
                if (merged && merged->pids[i] > 0)
                        kill(merged->pids[i], SIGKILL);
        }
        (void)unlink(state_path);
}

Ksm *pairs_ksm(const char *test) {
        Ksm *ksm;
        int r;

        test_need_root();
        test_lock_ksm();
        snprintf(state_path, sizeof state_path, "/run/lock/ksmd-user-test-%s.state", test);
        r = ksm_new(NULL, state_path, &ksm);
        if (r == -ENOENT)
                TEST_SKIP("a kernel without KSM");
        CHECK(r == 0, "KSM");
        test_at_end(end);
        return ksm;
}

static void wait_stage(const Pair *pair, int i, Stage stage) {
        for (int n = 0; pair->stages[i] != (int)stage; n++) {
                CHECK(n < 10000, "victim %d has come to stage %d only", i, pair->stages[i]);
                usleep(1000);
        }
}

static void fill(unsigned seed, unsigned zeros) {
        uint8_t *area = pair_area();

        CHECK(mmap(area, PAIR_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == area);
        CHECK(madvise(area, PAIR_BYTES, MADV_NOHUGEPAGE) == 0);
        for (unsigned i = 0; i < PAIR_PAGES; i++) {
                uint32_t *words = (uint32_t *)(void *)(area + i * PAGE_BYTES);
                words[0] = 1;
                for (unsigned k = 0; k < PAGE_BYTES / 4; k++)
                        words[k] = i < zeros ? 0 : seed + i * 4099 + k;
        }
}

static _Noreturn void live(Pair *pair, int i, Stage stage) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        pair->pids[i] = getpid();
        pair->stages[i] = stage;
        for (;;) {
                if (pair->stages[i] == WRITE) {
                        for (unsigned k = 0; k < PAIR_ALONE; k++)
                                pair_area()[k * PAGE_BYTES]++;
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
        CHECK(pread(fd, entries, PAIR_PAGES * sizeof *entries, (off_t)((uintptr_t)pair_area() / PAGE_BYTES * 8)) ==
              PAIR_PAGES * 8);
}

static void read_frames(const Pair *pair, int i, uint64_t *frames) {
        read_entries(pair->pids[i], frames);
        for (unsigned k = 0; k < PAIR_PAGES; k++)
                frames[k] &= PAGEMAP_PFN;
}

static unsigned count_shared(const Pair *pair) {
        uint64_t frames[2][PAIR_PAGES];
        unsigned n = 0;

        for (int i = 0; i < 2; i++)
                read_frames(pair, i, frames[i]);
        for (unsigned k = 0; k < PAIR_PAGES; k++)
                n += frames[0][k] && frames[0][k] == frames[1][k];
        return n;
}

void pair_remember(Pair *pair) {
        for (int i = 0; i < 2; i++)
                read_frames(pair, i, pair->frames[i]);
}

unsigned pair_count_moved(const Pair *pair) {
        uint64_t frames[PAIR_PAGES];
        unsigned n = 0;

        for (int i = 0; i < 2; i++) {
                read_frames(pair, i, frames);
                for (unsigned k = 0; k < PAIR_PAGES; k++)
                        n += frames[k] != pair->frames[i][k];
        }
        return n;
}

static void start_forked(void) {
        forked = new_pair();
        if (fork() == 0) {
                fill(1, PAIR_ZEROS);
                if (fork() == 0)
                        live(forked, 1, FILLED);
                live(forked, 0, FILLED);
        }
        for (int i = 0; i < 2; i++)
                wait_stage(forked, i, FILLED);
        CHECK(count_shared(forked) == PAIR_PAGES, "%u of %u after fork", count_shared(forked), PAIR_PAGES);
}

static void start_merged(Ksm *ksm) {
        unsigned shared = 0;
        uint64_t entries[PAIR_PAGES];

        merged = new_pair();
        for (int i = 0; i < 2; i++) {
                if (fork() == 0) {
                        fill(77, 0);
                        CHECK(madvise(pair_area(), PAIR_BYTES, MADV_MERGEABLE) == 0);
                        live(merged, i, FILLED);
                }
                wait_stage(merged, i, FILLED);
        }
        CHECK(ksm_set(ksm, "pages_to_scan", 20000) == 0);
        CHECK(ksm_set(ksm, "sleep_millisecs", 1) == 0);
        CHECK(ksm_set(ksm, "run", 1) == 0);
        for (int n = 0; n < 300 && shared < PAIR_PAGES; n++) {
                usleep(100000);
                shared = count_shared(merged);
        }
        CHECK(shared == PAIR_PAGES, "ksmd merged %u of %u", shared, PAIR_PAGES);
        CHECK(ksm_set(ksm, "run", 0) == 0);
        merged->stages[1] = WRITE;
        wait_stage(merged, 1, WRITTEN);
        read_entries(merged->pids[0], entries);
        for (unsigned k = 0; k < PAIR_ALONE; k++)
                CHECK(entries[k] & PAGEMAP_EXCLUSIVE, "page %u has a KSM frame of its own", k);
}

void pairs_start(Ksm *ksm, Pair **ret_forked, Pair **ret_merged) {
        pair_area();
        start_forked();
        start_merged(ksm);
        *ret_forked = forked;
        *ret_merged = merged;
}
