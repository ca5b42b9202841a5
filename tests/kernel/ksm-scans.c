/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * How often ksmd has to go round until what was marked is merged, which is what ends a burst that expected too much
 * (merge/burst.c): full_scans must grow by 3 after the marking when the cursor stands in the middle, by 2 when it
 * stands at the beginning; and fewer do not do.
 *
 * ksmd is led round by round: with a pages_to_scan that no round reaches it sleeps at the end of each, and writing
 * sleep_millisecs wakes it. With --hold it stays where all knobs are turned (tests/system/killed.py ends it there).
 */

#include "base/io.h"
#include "host/ksm.h"
#include "tests/test.h"

#include <inttypes.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>

#define N_CHILDREN 2
#define PAGES_LOW 128           /* marked later */
#define PAGES_HIGH 512          /* marked first: where the cursor is left */
#define PAGES (PAGES_LOW + PAGES_HIGH)
#define FIRST_BATCH 64

static char state[] = "/tmp/ksm-scans.XXXXXX", state_file[64];
static pid_t children[N_CHILDREN];
static int go[N_CHILDREN], done;
static uint64_t address;
static Ksm *ksm;

static void children_end(void) {
        for (int c = 0; c < N_CHILDREN; c++)
                if (children[c] > 0) {
                        kill(children[c], SIGKILL);
                        waitpid(children[c], NULL, 0);
                        close(go[c]);
                        children[c] = 0;
                }
}

static void clean_up(void) {
        children_end();
        test_remove_directory(state);
}

static void wait_children(void) {
        char byte;
        for (int c = 0; c < N_CHILDREN; c++)
                CHECK(read(done, &byte, 1) == 1);
}

static void mark(uint64_t first, uint64_t n) {
        CHECK(madvise((char *)address + first * PAGE_BYTES, n * PAGE_BYTES, MADV_MERGEABLE) == 0);
}

/* In all children the same pages. The high ones are marked at once, the low ones when told. */
static void child_main(int command, int answer, bool high_first) {
        char byte;

        prctl(PR_SET_PDEATHSIG, SIGKILL);
        for (uint64_t i = 0; i < PAGES; i++) {
                uint64_t *page = (uint64_t *)(address + i * PAGE_BYTES), word = i + 1;

                for (size_t k = 0; k < PAGE_BYTES / sizeof *page; k++) {
                        word ^= word << 13;
                        word ^= word >> 7;
                        word ^= word << 17;
                        page[k] = word;
                }
        }
        if (high_first)
                mark(PAGES_LOW, PAGES_HIGH);
        CHECK(write(answer, "r", 1) == 1);
        CHECK(read(command, &byte, 1) == 1);
        mark(0, PAGES_LOW);
        CHECK(write(answer, "m", 1) == 1);
        for (;;)
                pause();
}

static void children_start(bool high_first) {
        int answer[2];

        CHECK(pipe(answer) == 0);
        for (int c = 0; c < N_CHILDREN; c++) {
                int command[2];

                CHECK(pipe(command) == 0);
                children[c] = fork();
                CHECK(children[c] >= 0);
                if (children[c] == 0)
                        child_main(command[0], answer[1], high_first);
                close(command[0]);
                go[c] = command[1];
        }
        close(answer[1]);
        done = answer[0];
        wait_children();
}

static void mark_low(void) {
        for (int c = 0; c < N_CHILDREN; c++)
                CHECK(write(go[c], "g", 1) == 1);
        wait_children();
        close(done);
}

static uint64_t frame(pid_t pid, uint64_t page) {
        _cleanup_close_ int fd = -EBADF;
        uint64_t entry;
        char path[64];

        snprintf(path, sizeof path, "/proc/%d/pagemap", (int)pid);
        fd = open(path, O_RDONLY | O_CLOEXEC);
        CHECK(fd >= 0);
        CHECK(pread(fd, &entry, 8, (off_t)((address / PAGE_BYTES + page) * 8)) == 8);
        entry &= ((uint64_t)1 << 55) - 1;
        CHECK(entry != 0, "page %" PRIu64 " shows no frame", page);
        return entry;
}

static int low_merged(void) {
        int n = 0;
        for (uint64_t i = 0; i < PAGES_LOW; i++)
                n += frame(children[0], i) == frame(children[1], i);
        return n;
}

static KsmCounters counters(void) {
        KsmCounters all;
        CHECK(ksm_counters(ksm, &all) == 0);
        return all;
}

static void knob(const char *name, uint64_t value) {
        int r = ksm_set(ksm, name, value);
        CHECK(r == 0 || r == -ENOENT, "%s: %d", name, r);
}

/* One round, or the rest of one. */
static void scan_on(void) {
        static uint64_t turn;
        uint64_t before = counters().full_scans;

        knob("sleep_millisecs", 1000000 + turn++ % 2);
        for (int i = 0; i < 2000 && counters().full_scans == before; i++)
                usleep(5000);
        CHECK(counters().full_scans == before + 1, "%" PRIu64 " rounds", counters().full_scans - before);
}

static void fresh(void) {
        knob("run", 2); /* forgets all pages, and the cursor goes to the beginning */
        knob("run", 0);
}

static void test_cursor_in_the_middle(bool hold) {
        uint64_t before;
        int merged;

        fresh();
        children_start(true);
        before = counters().pages_scanned;
        knob("pages_to_scan", FIRST_BATCH);
        knob("sleep_millisecs", 999999);
        knob("run", 1);
        for (int i = 0; i < 2000 && counters().pages_scanned - before < FIRST_BATCH; i++)
                usleep(5000);
        CHECK(counters().pages_scanned - before == FIRST_BATCH, "the cursor is not where it should be");
        while (hold)
                pause();
        knob("pages_to_scan", 1000000000);
        mark_low();
        for (int round = 1; round <= 3; round++) {
                scan_on();
                merged = low_merged();
                printf("cursor in the middle, full_scans + %d: %d of %d merged\n", round, merged, PAGES_LOW);
                CHECK(round == 3 ? merged == PAGES_LOW : merged == 0);
        }
        knob("run", 0);
        children_end();
}

static void test_cursor_at_the_beginning(void) {
        int merged;

        fresh();
        children_start(false);
        mark_low();
        knob("pages_to_scan", 1000000000);
        knob("sleep_millisecs", 999999);
        knob("run", 1);
        for (int i = 0; i < 2000 && counters().full_scans == 0; i++)
                usleep(5000);
        CHECK(low_merged() == 0);
        scan_on();
        merged = low_merged();
        printf("cursor at the beginning, full_scans + 2: %d of %d merged\n", merged, PAGES_LOW);
        CHECK(merged == PAGES_LOW);
        knob("run", 0);
        children_end();
}

int main(int argc, char **argv) {
        KsmKnobs knobs;
        void *memory;
        int r;

        test_need_root();
        test_lock_ksm();
        CHECK(mkdtemp(state));
        snprintf(state_file, sizeof state_file, "%s/ksm", state);
        r = ksm_new(NULL, state_file, &ksm);
        if (r < 0) {
                (void)rmdir(state);
                TEST_SKIP("KSM cannot be used here: %s", strerror(-r));
        }
        test_at_end(clean_up);
        CHECK(ksm_knobs(ksm, &knobs) == 0);
        if (counters().pages_scanned == 0 && knobs.smart_scan == 0)
                TEST_SKIP("this kernel does not count the pages it scans");
        if (knobs.advisor)
                CHECK(ksm_set_text(ksm, "advisor_mode", "none") == 0);
        memory = mmap(NULL, PAGES * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        CHECK(memory != MAP_FAILED);
        (void)madvise(memory, PAGES * PAGE_BYTES, MADV_NOHUGEPAGE);
        address = (uint64_t)memory;

        test_cursor_in_the_middle(argc > 1 && strcmp(argv[1], "--hold") == 0);
        test_cursor_at_the_beginning();
        return 0;
}
