/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Un-sharing from outside: of two processes whose pages KSM merged one gets pages of its own, the other keeps its frames,
 * and what was shared by fork stays so. Then, for a while, of two that verify each page and write to it while ksmd
 * merges as fast as it can: not one wrong byte, no lost write.
 *
 * --control: every frame is said to be KSM's. What was shared by fork comes apart, so the test must fail: it can.
 */
#include "test.h"

#include "merge/unshare.h"
#include "pairs.h"

#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>

#define HAMMER_PAGES 512U
#define HAMMER_NSEC (4 * NSEC_PER_SEC)
#define FRAMES_MAX ((uint64_t)1 << 26) /* 256 GiB */

static Ksm *ksm;
static Pair *forked, *merged;
static pid_t hammered[2];

static void clean_up(void) {
        for (int i = 0; i < 2; i++)
                if (hammered[i] > 0)
                        kill(hammered[i], SIGKILL);
}

/* As /proc/kpageflags would be if all of memory were KSM's. */
static int all_flags(void) {
        static uint64_t flags[65536];
        int fd = memfd_create("kpageflags", MFD_CLOEXEC);

        CHECK(fd >= 0);
        memset(flags, 0xff, sizeof flags);
        for (uint64_t frame = 0; frame < MIN_OF((uint64_t)sysconf(_SC_PHYS_PAGES) * 2, FRAMES_MAX); frame += ELEMENTSOF(flags))
                CHECK(write(fd, flags, sizeof flags) == (ssize_t)sizeof flags);
        return fd;
}

static uint64_t unshare(pid_t pid, int flagsfd, uint64_t start, uint64_t end) {
        _cleanup_(target_freep) Target *target = NULL;

        CHECK(target_new(pid, &target) == 0);
        return unshare_merged(target, flagsfd, start, end);
}

static void test_pairs(int flagsfd) {
        uint64_t start = (uintptr_t)pair_area(), end = start + PAIR_BYTES, n;
        unsigned moved;

        pair_remember(forked);
        pair_remember(merged);
        CHECK(unshare(merged->pids[0], flagsfd, start, start) == 0);
        CHECK(pair_count_moved(merged) == 0);
        (void)unshare(forked->pids[1], flagsfd, start, end);
        moved = pair_count_moved(forked);
        CHECK_HARMLESS(moved == 0, "%u of the pages shared by fork were copied", moved);
        n = unshare(merged->pids[0], flagsfd, start, end);
        moved = pair_count_moved(merged);
        printf("%lu pages were merged, %u have frames of their own now\n", n, moved);
        CHECK(n == PAIR_PAGES && moved == PAIR_PAGES);
        CHECK(unshare(merged->pids[0], flagsfd, start, end) == 0, "nothing is merged any more");
}

static uint64_t *words_of(unsigned page) { return (uint64_t *)(void *)(pair_area() + page * PAGE_BYTES); }

/* Its pages are those of the other while their first word is 0. */
static _Noreturn void be_hammered(unsigned seed) {
        static uint64_t written[HAMMER_PAGES];
        uint64_t until = now_nsec() + HAMMER_NSEC, verified = 0;

        prctl(PR_SET_PDEATHSIG, SIGKILL);
        srandom(seed);
        CHECK(mmap(pair_area(), HAMMER_PAGES * PAGE_BYTES, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == pair_area());
        for (unsigned page = 0; page < HAMMER_PAGES; page++)
                for (unsigned i = 1; i < PAGE_BYTES / 8; i++)
                        words_of(page)[i] = page * 4099 + i;
        CHECK(madvise(pair_area(), HAMMER_PAGES * PAGE_BYTES, MADV_MERGEABLE) == 0);
        for (; now_nsec() < until; verified++) {
                unsigned page = (unsigned)random() % HAMMER_PAGES;
                uint64_t *words = words_of(page);

                CHECK_HARMLESS(words[0] == written[page], "page %u lost a write: %lu in place of %lu", page,
                               words[0], written[page]);
                for (unsigned i = 1; i < PAGE_BYTES / 8; i++)
                        CHECK_HARMLESS(words[i] == page * 4099 + i, "page %u, word %u: %lx", page, i, words[i]);
                if (random() % 4 == 0)
                        words[0] = written[page] = written[page] ? 0 : (uint64_t)random() + 1;
                if (verified % 64 == 0)
                        usleep(1000); /* for ksmd to find some */
        }
        _exit(verified > 1000 ? 0 : 2); /* what is to be cleaned up is not its own */
}

static void test_hammer(int flagsfd) {
        uint64_t start = (uintptr_t)pair_area(), end = start + HAMMER_PAGES * PAGE_BYTES, sum = 0;
        unsigned running = 2;
        int status;

        CHECK(ksm_set(ksm, "pages_to_scan", 20000) == 0);
        CHECK(ksm_set(ksm, "sleep_millisecs", 1) == 0);
        CHECK(ksm_set(ksm, "smart_scan", 0) == 0);
        CHECK(ksm_set(ksm, "run", 1) == 0);
        for (unsigned i = 0; i < 2; i++)
                if ((hammered[i] = fork()) == 0)
                        be_hammered(i + 1);
        while (running > 0)
                for (unsigned i = 0; i < 2; i++) {
                        if (hammered[i] == 0)
                                continue;
                        sum += unshare(hammered[i], flagsfd, start, end);
                        if (waitpid(hammered[i], &status, WNOHANG) != hammered[i])
                                continue;
                        CHECK_AS(WIFEXITED(status) ? WEXITSTATUS(status) : TEST_NOTICED, status == 0,
                                 "one that was hammered ended with %x", status);
                        hammered[i] = 0;
                        running--;
                }
        printf("hammered: %lu times a merged page was met\n", sum);
        CHECK(sum > 1000, "hardly anything was merged, so this proves nothing");
}

int main(int argc, char **argv) {
        _cleanup_close_ int flagsfd = -EBADF;

        ksm = pairs_ksm("unshare");
        test_at_end(clean_up);
        flagsfd = argc > 1 && strcmp(argv[1], "--control") == 0 ? all_flags() :
                                                                  open("/proc/kpageflags", O_RDONLY | O_CLOEXEC);
        CHECK(flagsfd >= 0);
        pairs_start(ksm, &forked, &merged);
        test_pairs(flagsfd);
        test_hammer(flagsfd);
        return 0;
}
