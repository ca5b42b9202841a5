/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * Bursts on the real KSM: what is marked gets merged (by page frames, not by counters), what is not marked does not,
 * and every file of /sys/kernel/mm/ksm that can be written reads as before: when the burst is done, stopped, freed,
 * and, after a SIGKILL in the middle, when the next daemon has begun.
 */

#include "base/io.h"
#include "merge/burst.h"
#include "tests/test.h"

#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>

#define SYSFS "/sys/kernel/mm/ksm/"
#define N_CHILDREN 3
#define PAGES_TWIN 512
#define PAGES_ZERO 128
#define PAGES_UNIQUE 384
#define PAGES (PAGES_TWIN + PAGES_ZERO + PAGES_UNIQUE)
#define EXPECTED (PAGES_TWIN * (N_CHILDREN - 1) + PAGES_ZERO * N_CHILDREN)
#define MARKED ((PAGES_TWIN + PAGES_ZERO) * N_CHILDREN)
#define KPF_KSM 21
#define KPF_ZERO_PAGE 24

static const char *const knobs[] = { "advisor_mode", "pages_to_scan", "sleep_millisecs", "smart_scan", "use_zero_pages",
                                     "max_page_sharing", "merge_across_nodes", "run" };
static char *found[ELEMENTSOF(knobs)]; /* but for run, which is 0 between the tests */
static char state[] = "/tmp/ksm-burst.XXXXXX", state_file[64];
static pid_t children[N_CHILDREN], daemon_pid;

static char *knob(const char *name) {
        char path[64], *text = NULL;

        snprintf(path, sizeof path, SYSFS "%s", name);
        if (read_file(AT_FDCWD, path, &text, NULL) < 0)
                return NULL;
        return text;
}

static void knob_set(const char *name, const char *value) {
        char path[64];

        snprintf(path, sizeof path, SYSFS "%s", name);
        CHECK(write_text(AT_FDCWD, path, value) == 0, "%s = %s", name, value);
}

static void children_end(void) {
        for (int i = 0; i < N_CHILDREN; i++)
                if (children[i] > 0) {
                        kill(children[i], SIGKILL);
                        waitpid(children[i], NULL, 0);
                        children[i] = 0;
                }
}

static void daemon_kill(void) {
        if (daemon_pid > 0) {
                kill(daemon_pid, SIGKILL);
                waitpid(daemon_pid, NULL, 0);
                daemon_pid = 0;
        }
}

static void clean_up(void) {
        daemon_kill();
        children_end();
        test_remove_directory(state);
}

static void knobs_are(char *const expected[static ELEMENTSOF(knobs)], const char *when) {
        for (size_t i = 0; i < ELEMENTSOF(knobs); i++) {
                _cleanup_free_ char *now = knob(knobs[i]);
                CHECK(!now == !expected[i] && (!now || strcmp(now, expected[i]) == 0), "%s %s: %s, was %s", when,
                      knobs[i], now, expected[i]);
        }
        CHECK(access(state_file, F_OK) < 0, "%s: the state file is still there", when);
}

static void fill(uint64_t *page, uint64_t seed) {
        for (size_t i = 0; i < 512; i++) {
                seed ^= seed << 13;
                seed ^= seed >> 7;
                seed ^= seed << 17;
                page[i] = seed;
        }
}

static uint64_t address; /* the same in all of them: mapped before the fork */

static void children_start(void) {
        int ready[2];

        CHECK(pipe(ready) == 0);
        for (int c = 0; c < N_CHILDREN; c++) {
                children[c] = fork();
                CHECK(children[c] >= 0);
                if (children[c] == 0) {
                        uint64_t *memory = (uint64_t *)address;

                        prctl(PR_SET_PDEATHSIG, SIGKILL);
                        for (uint64_t i = 0; i < PAGES; i++)
                                if (i < PAGES_TWIN)
                                        fill(memory + i * 512, i + 1);
                                else if (i < PAGES_TWIN + PAGES_ZERO)
                                        memset(memory + i * 512, 0, PAGE_BYTES);
                                else
                                        fill(memory + i * 512, i * 10 + (uint64_t)c + 100000);
                        CHECK(madvise(memory, (PAGES_TWIN + PAGES_ZERO) * PAGE_BYTES, MADV_MERGEABLE) == 0);
                        CHECK(write(ready[1], "r", 1) == 1);
                        for (;;)
                                pause();
                }
        }
        for (int c = 0; c < N_CHILDREN; c++) {
                char byte;
                CHECK(read(ready[0], &byte, 1) == 1);
        }
        close(ready[0]);
        close(ready[1]);
}

static void frames(pid_t pid, uint64_t pfns[static PAGES], uint64_t flags[static PAGES]) {
        char path[64];
        int pagemap, kpageflags = open("/proc/kpageflags", O_RDONLY | O_CLOEXEC);

        snprintf(path, sizeof path, "/proc/%d/pagemap", (int)pid);
        pagemap = open(path, O_RDONLY | O_CLOEXEC);
        CHECK(pagemap >= 0 && kpageflags >= 0);
        CHECK(pread(pagemap, pfns, PAGES * 8, (off_t)(address / PAGE_BYTES * 8)) == PAGES * 8);
        for (size_t i = 0; i < PAGES; i++) {
                pfns[i] &= ((uint64_t)1 << 55) - 1;
                CHECK(pfns[i] != 0, "page %zu is not present, or pagemap shows no frames", i);
                CHECK(pread(kpageflags, flags + i, 8, (off_t)(pfns[i] * 8)) == 8);
        }
        close(pagemap);
        close(kpageflags);
}

/* How many of the pages that should be merged are, by their frames. */
static size_t merged_frames(void) {
        static uint64_t pfns[N_CHILDREN][PAGES], flags[N_CHILDREN][PAGES];
        size_t n = 0;

        for (int c = 0; c < N_CHILDREN; c++)
                frames(children[c], pfns[c], flags[c]);
        for (size_t i = 0; i < PAGES; i++)
                for (int c = 0; c < N_CHILDREN; c++) {
                        bool ksm = flags[c][i] >> KPF_KSM & 1, zero = flags[c][i] >> KPF_ZERO_PAGE & 1;

                        if (i < PAGES_TWIN)
                                n += c > 0 && ksm && pfns[c][i] == pfns[0][i];
                        else if (i < PAGES_TWIN + PAGES_ZERO)
                                n += zero;
                        else
                                CHECK(!ksm && !zero, "page %zu was not marked, but merged", i);
                }
        return n;
}

static BurstState burst_to_end(Burst *burst) {
        uint64_t begin = now_nsec();
        BurstState s;

        while ((s = burst_step(burst)) == BURST_RUNNING) {
                struct timespec pause = { .tv_nsec = (long)burst_interval_nsec(burst) };
                nanosleep(&pause, NULL);
                CHECK(now_nsec() - begin < 60 * NSEC_PER_SEC, "the burst does not end");
        }
        return s;
}

static BurstState run_burst(Burst *burst, uint64_t expected) {
        CHECK(burst_start(burst, expected, MARKED) == 0);
        return burst_to_end(burst);
}

static void test_done(Ksm *ksm) {
        _cleanup_(burst_freep) Burst *burst = NULL;
        BurstStats stats;
        KsmCounters before, after;

        knob_set("run", "2"); /* forget the pages of earlier tests, which would still be counted */
        knob_set("run", "0");
        children_start();
        CHECK(burst_new(ksm, &burst) == 0);
        CHECK(merged_frames() == 0, "merged before any burst");
        CHECK(run_burst(burst, EXPECTED) == BURST_DONE);
        CHECK(merged_frames() == EXPECTED, "%zu frames", merged_frames());
        knobs_are(found, "after a burst");
        burst_stats(burst, &stats);
        CHECK(stats.bursts == 1 && stats.pages_merged == EXPECTED, "%llu", (unsigned long long)stats.pages_merged);
        printf("merged %d pages: %.1f ms, ksmd %.1f ms, %llu full scans\n", EXPECTED, (double)stats.wall_nsec / 1e6,
               (double)stats.ksmd_cpu_nsec / 1e6, (unsigned long long)stats.full_scans);

        /* At rest. */
        CHECK(ksm_counters(ksm, &before) == 0);
        usleep(200000);
        CHECK(ksm_counters(ksm, &after) == 0);
        CHECK(before.pages_scanned == after.pages_scanned, "ksmd goes on scanning");

        /* What is shared cannot be shared differently. */
        CHECK(ksm_set(ksm, "max_page_sharing", 1000) == KSM_E_BUSY);
        knobs_are(found, "after EBUSY");

        /* More is expected than there is: it ends because ksmd went round often enough. */
        CHECK(run_burst(burst, 1000) == BURST_DONE);
        burst_stats(burst, &stats);
        CHECK(stats.pages_merged == EXPECTED);
        knobs_are(found, "after a vain burst");
        children_end();
}

/* Also: what the children before left in the counters must not end a burst too early. */
static void test_expecting_too_much(Ksm *ksm) {
        _cleanup_(burst_freep) Burst *burst = NULL;

        children_start();
        CHECK(burst_new(ksm, &burst) == 0);
        CHECK(run_burst(burst, EXPECTED + 1000) == BURST_DONE);
        CHECK(merged_frames() == EXPECTED, "%zu frames", merged_frames());
        knobs_are(found, "after a burst that expected too much");
        children_end();
}

static void test_stop(Ksm *ksm) {
        _cleanup_(burst_freep) Burst *burst = NULL;

        children_start();
        CHECK(burst_new(ksm, &burst) == 0);
        CHECK(burst_start(burst, 1000000, 1000000) == 0);
        CHECK(burst_start(burst, 1, 1) == -EALREADY);
        CHECK(burst_step(burst) == BURST_RUNNING);
        burst_stop(burst);
        CHECK(burst_step(burst) == BURST_IDLE);
        knobs_are(found, "after a stop");
        CHECK(burst_start(burst, 1000000, 1000000) == 0);
        burst = burst_free(burst);
        knobs_are(found, "after a free");
        children_end();
}

static void test_killed(void) {
        _cleanup_(ksm_freep) Ksm *next = NULL;
        _cleanup_free_ char *run = NULL;
        int ready[2];
        char byte;

        children_start();
        CHECK(pipe(ready) == 0);
        daemon_pid = fork();
        if (daemon_pid == 0) {
                Ksm *ksm;
                Burst *burst;

                prctl(PR_SET_PDEATHSIG, SIGKILL);
                CHECK(ksm_new(NULL, state_file, &ksm) == 0 && burst_new(ksm, &burst) == 0);
                CHECK(burst_start(burst, 1000000, 1000000) == 0);
                CHECK(write(ready[1], "r", 1) == 1);
                for (;;)
                        pause();
        }
        CHECK(read(ready[0], &byte, 1) == 1);
        daemon_kill();
        run = knob("run");
        CHECK(run && strcmp(run, "1\n") == 0, "the control: nobody has put it back yet");
        CHECK(ksm_new(NULL, state_file, &next) == 0);
        CHECK(ksm_was_left_changed(next));
        CHECK(ksm_restore(next) == 0);
        knobs_are(found, "after SIGKILL and the next start");
        close(ready[0]);
        close(ready[1]);
        children_end();
}

/* The same at thirty instants nobody chose, of a daemon that starts and stops bursts all the time. */
static void test_killed_anywhere(void) {
        int changed = 0;

        children_start();
        srandom((unsigned)getpid());
        for (int i = 0; i < 30; i++) {
                _cleanup_(ksm_freep) Ksm *next = NULL;

                daemon_pid = fork();
                if (daemon_pid == 0) {
                        Ksm *ksm;
                        Burst *burst;

                        prctl(PR_SET_PDEATHSIG, SIGKILL);
                        CHECK(ksm_new(NULL, state_file, &ksm) == 0 && burst_new(ksm, &burst) == 0);
                        for (;;) {
                                CHECK(burst_start(burst, 1000000, 1000000) == 0);
                                CHECK(burst_step(burst) == BURST_RUNNING);
                                burst_stop(burst);
                        }
                }
                usleep((useconds_t)(1000 + random() % 5000));
                daemon_kill();
                CHECK(ksm_new(NULL, state_file, &next) == 0);
                changed += ksm_was_left_changed(next);
                CHECK(ksm_restore(next) == 0);
                knobs_are(found, "after SIGKILL anywhere");
        }
        printf("killed 30 times, %d of them with knobs changed\n", changed);
        CHECK(changed > 0, "the control: no kill came while a knob was changed");
        children_end();
}

static void test_administrator(Ksm *ksm) {
        _cleanup_(burst_freep) Burst *burst = NULL;
        char *his[ELEMENTSOF(knobs)];

        CHECK(burst_new(ksm, &burst) == 0);
        for (int run = 1; run <= 2; run++) {
                knob_set("run", run == 1 ? "1" : "2");
                for (size_t i = 0; i < ELEMENTSOF(knobs); i++)
                        his[i] = knob(knobs[i]);
                CHECK(run_burst(burst, EXPECTED) == BURST_FOREIGN);
                knobs_are(his, "while the administrator runs it");
                for (size_t i = 0; i < ELEMENTSOF(knobs); i++)
                        free(his[i]);
                knob_set("run", "0");
        }
        /* He stops it in mid-burst. */
        children_start();
        CHECK(burst_start(burst, 1000000, 1000000) == 0);
        knob_set("run", "0");
        CHECK(burst_step(burst) == BURST_FOREIGN);
        knobs_are(found, "after the administrator stopped it");
        children_end();
}

static void test_advisor(Ksm *ksm) {
        _cleanup_(burst_freep) Burst *burst = NULL;
        _cleanup_free_ char *before = knob("advisor_mode"), *during = NULL, *after = NULL;

        if (!before)
                return; /* before Linux 6.8 */
        knob_set("advisor_mode", "scan-time");
        children_start();
        CHECK(burst_new(ksm, &burst) == 0);
        CHECK(burst_start(burst, EXPECTED, MARKED) == 0);
        during = knob("advisor_mode");
        CHECK(strstr(during, "[none]"));
        CHECK(burst_to_end(burst) == BURST_DONE);
        CHECK(merged_frames() == EXPECTED);
        after = knob("advisor_mode");
        CHECK(strstr(after, "[scan-time]"));
        CHECK(access(state_file, F_OK) < 0);
        children_end();
        knob_set("advisor_mode", "none");
        knob_set("pages_to_scan", found[1]);
        knobs_are(found, "after the advisor");
}

int main(void) {
        _cleanup_(ksm_freep) Ksm *ksm = NULL;
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
        for (size_t i = 0; i < ELEMENTSOF(knobs); i++)
                found[i] = knob(knobs[i]);
        test_at_end(clean_up);
        free(found[ELEMENTSOF(knobs) - 1]);
        CHECK((found[ELEMENTSOF(knobs) - 1] = strdup("0\n")));
        knob_set("run", "0");
        memory = mmap(NULL, PAGES * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        CHECK(memory != MAP_FAILED);
        CHECK(madvise(memory, PAGES * PAGE_BYTES, MADV_NOHUGEPAGE) == 0 || errno == EINVAL);
        address = (uint64_t)memory;

        test_done(ksm);
        test_expecting_too_much(ksm);
        test_stop(ksm);
        test_killed();
        test_killed_anywhere();
        test_administrator(ksm);
        test_advisor(ksm);
        return 0;
}
