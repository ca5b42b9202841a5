/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * scan/track on real processes: exactly what was written is reported, whoever wrote it and whatever became of the mapping;
 * huge pages and sparse mappings stay as they are; everything is given back.
 */
#include "base/io.h"
#include "scan/track.h"
#include "target/remote.h"
#include "tests/test.h"

#include <linux/userfaultfd.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>

#define MIB ((uint64_t)1 << 20)
#define GIB ((uint64_t)1 << 30)

/* A process that does what it is told. */
typedef struct Child {
        pid_t pid;
        int to, from;
        Target *target;
        Track *track;
        VmaList vmas;
} Child;

typedef struct Order {
        long (*run)(long);
        long argument;
} Order;

static Remote *remote;

static long order(const Child *child, long (*run)(long), long argument) {
        Order o = { run, argument };
        long result;

        CHECK(write(child->to, &o, sizeof o) == sizeof o && read(child->from, &result, sizeof result) == sizeof result);
        return result;
}

static Child start(void) {
        int to[2], from[2];
        Child child = {};
        Order o;

        CHECK(pipe2(to, O_CLOEXEC) == 0 && pipe2(from, O_CLOEXEC) == 0);
        child.pid = fork();
        CHECK(child.pid >= 0);
        if (child.pid == 0) {
                prctl(PR_SET_PDEATHSIG, SIGKILL);
                close(to[1]);
                close(from[0]);
                while (read(to[0], &o, sizeof o) == sizeof o) {
                        long result = o.run(o.argument);
                        CHECK(write(from[1], &result, sizeof result) == sizeof result);
                }
                _exit(0);
        }
        close(to[0]);
        close(from[1]);
        child.to = to[1];
        child.from = from[0];
        CHECK(target_new(child.pid, &child.target) == 0 && target_open_memory(child.target) == 0);
        return child;
}

static void read_vmas(Child *child) {
        vma_list_done(&child->vmas);
        CHECK(target_read_vmas(child->target, false, &child->vmas) == 0);
        track_claim(child->track, &child->vmas);
}

static void update(Child *child) {
        read_vmas(child);
        CHECK(track_update(child->track, &child->vmas) == 0);
}

static void adopt(Child *child) {
        TargetSkip skip;
        int uffd = -EBADF, r;

        for (int i = 0; (r = remote_adopt(remote, child->target, &uffd, &skip)) != 0; i++) {
                CHECK(r == REMOTE_E_BUSY && i < 100, "%s", remote_error_name(r));
                usleep(1000);
        }
        CHECK(skip == TARGET_OK && uffd >= 0);
        CHECK(!target_has_userfaultfd(child->target));
        r = track_new(uffd, &child->track);
        if (r == -EINVAL)
                TEST_SKIP("no asynchronous write protection (6.7)");
        CHECK(r == 0);
        update(child);
}

static void stop(Child *child) {
        track_free(child->track);
        vma_list_done(&child->vmas);
        target_free(child->target);
        kill(child->pid, SIGKILL);
        CHECK(waitpid(child->pid, NULL, 0) == child->pid);
        close(child->to);
        close(child->from);
}

/* What is reported of [start, end), as a set of pages. */
typedef struct Pages {
        TrackRange *ranges;
        size_t n, allocated, count;
} Pages;

static Pages written(Child *child, uint64_t start, uint64_t end, bool protect) {
        Pages pages = {};

        CHECK(track_written(child->track, child->target, start, end, protect, &pages.ranges, &pages.n,
                            &pages.allocated) == 0);
        for (size_t i = 0; i < pages.n; i++) {
                CHECK(pages.ranges[i].start < pages.ranges[i].end && pages.ranges[i].start >= start &&
                      pages.ranges[i].end <= end && (i == 0 || pages.ranges[i - 1].end < pages.ranges[i].start));
                pages.count += (pages.ranges[i].end - pages.ranges[i].start) / PAGE_BYTES;
        }
        return pages;
}

static bool has(const Pages *pages, uint64_t addr) {
        for (size_t i = 0; i < pages->n; i++)
                if (pages->ranges[i].start <= addr && addr < pages->ranges[i].end)
                        return true;
        return false;
}

static size_t count_written(Child *child, uint64_t start, uint64_t end) {
        Pages pages = written(child, start, end, true);
        free(pages.ranges);
        return pages.count;
}

static long map(long bytes) {
        void *p = mmap(NULL, (size_t)bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        CHECK(p != MAP_FAILED && madvise(p, (size_t)bytes, MADV_NOHUGEPAGE) == 0);
        return (long)p;
}

/* What parent and child both see. */
static struct Shared {
        uint64_t start, pages;
        uint64_t seed;
        unsigned permille;
} *shared;

/* One page in so many, by its number. */
static bool is_picked(uint64_t page) {
        return ((page + 1) * 0x9e3779b97f4a7c15 ^ shared->seed) % 1000 < shared->permille;
}

static long write_picked(long unused) {
        for (uint64_t i = 0; i < shared->pages; i++)
                if (is_picked(i))
                        ++*(volatile uint64_t *)(shared->start + i * PAGE_BYTES);
        return 0;
}

static void check_exact(Child *child) {
        Pages pages = written(child, shared->start, shared->start + shared->pages * PAGE_BYTES, true);
        size_t at = 0;

        for (uint64_t i = 0; i < shared->pages; i++) {
                uint64_t addr = shared->start + i * PAGE_BYTES;

                while (at < pages.n && pages.ranges[at].end <= addr)
                        at++;
                CHECK(is_picked(i) == (at < pages.n && pages.ranges[at].start <= addr), "page %lu of %lu", i, shared->pages);
        }
        free(pages.ranges);
}

static void test_exact(uint64_t bytes) {
        static const unsigned permilles[] = { 0, 1, 10, 500, 999, 1000 };
        Child child = start();

        shared->start = (uint64_t)order(&child, map, (long)bytes);
        shared->pages = bytes / PAGE_BYTES;
        shared->permille = 1000;
        order(&child, write_picked, 0);
        adopt(&child);
        check_exact(&child); /* nothing is known yet: everything */
        for (size_t i = 0; i < ELEMENTSOF(permilles); i++) {
                shared->permille = permilles[i];
                shared->seed = i * 77;
                order(&child, write_picked, 0);
                check_exact(&child);
                CHECK(count_written(&child, shared->start, shared->start + bytes) == 0);
        }
        stop(&child);
}

/* The pages of [start, end) that are reported are these, and no others. */
static void expect(Child *child, uint64_t start, uint64_t n_pages, const char *expected, int line) {
        Pages pages = written(child, start, start + n_pages * PAGE_BYTES, true);

        for (uint64_t i = 0; i < n_pages; i++)
                CHECK(has(&pages, start + i * PAGE_BYTES) == (expected[i] == 'w'), "line %d: page %lu, expected %s", line, i,
                      expected);
        free(pages.ranges);
}
#define EXPECT(child, start, expected) expect(child, start, sizeof(expected) - 1, expected, __LINE__)

static uint64_t at(uint64_t page) { return shared->start + page * PAGE_BYTES; }
static long touch(long page) { return ++*(volatile uint8_t *)at((uint64_t)page); }
static long drop(long page) { return madvise((void *)at((uint64_t)page), PAGE_BYTES, MADV_DONTNEED); }
static long renew(long page) {
        return mmap((void *)at((uint64_t)page), PAGE_BYTES, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED;
}
static long unmap(long page) { return munmap((void *)at((uint64_t)page), PAGE_BYTES); }
static long forbid(long page) { return mprotect((void *)at((uint64_t)page), PAGE_BYTES, PROT_READ); }
static long allow(long page) { return mprotect((void *)at((uint64_t)page), PAGE_BYTES, PROT_READ | PROT_WRITE); }
static long lock(long page) { return mlock((void *)at((uint64_t)page), PAGE_BYTES); }
static long unlock(long page) { return munlock((void *)at((uint64_t)page), PAGE_BYTES); }
/* Elsewhere and back: what comes back is registered no more. */
static long there_and_back(long page) {
        void *from = (void *)at((uint64_t)page), *to = (void *)(at(0) - 64 * MIB);
        if (mremap(from, PAGE_BYTES, PAGE_BYTES, MREMAP_MAYMOVE | MREMAP_FIXED, to) != to)
                return -1;
        return mremap(to, PAGE_BYTES, PAGE_BYTES, MREMAP_MAYMOVE | MREMAP_FIXED, from) != from;
}

static Child start_tracked(uint64_t pages) {
        Child child = start();

        shared->start = (uint64_t)order(&child, map, (long)(pages * PAGE_BYTES));
        shared->pages = pages;
        for (uint64_t i = 0; i < pages; i++)
                order(&child, touch, (long)i);
        adopt(&child);
        CHECK(count_written(&child, shared->start, shared->start + pages * PAGE_BYTES) == pages);
        return child;
}

/* What can become of a mapping, seen before and after the next update. */
static void test_mappings(void) {
        Child child = start_tracked(8);

        EXPECT(&child, at(0), "--------");
        order(&child, touch, 0);
        order(&child, touch, 7);
        EXPECT(&child, at(0), "w------w");
        EXPECT(&child, at(0), "--------");

        /* Dropped: not there, so not reported; what is there next is. */
        CHECK(order(&child, drop, 3) == 0);
        EXPECT(&child, at(0), "--------");
        order(&child, touch, 3);
        EXPECT(&child, at(0), "---w----");

        /* Mapped anew: all of it as long as it is not registered. */
        CHECK(order(&child, renew, 2) == 0);
        order(&child, touch, 2);
        CHECK(!child.track->stale);
        EXPECT(&child, at(0), "--w-----");
        CHECK(child.track->stale);
        EXPECT(&child, at(0), "--w-----");
        update(&child);
        CHECK(!child.track->stale);
        EXPECT(&child, at(0), "--w-----");
        EXPECT(&child, at(0), "--------");

        CHECK(order(&child, there_and_back, 5) == 0);
        EXPECT(&child, at(0), "-----w--");
        update(&child);
        EXPECT(&child, at(0), "-----w--");
        EXPECT(&child, at(0), "--------");

        /* Split by its protection: all of it stays registered, and covered. */
        order(&child, touch, 4);
        CHECK(order(&child, forbid, 4) == 0);
        order(&child, touch, 6);
        EXPECT(&child, at(0), "----w-w-");
        update(&child);
        CHECK(track_covers(child.track, at(4)));
        CHECK(order(&child, allow, 4) == 0);
        order(&child, touch, 4);
        EXPECT(&child, at(0), "----w---");

        /* Locked: given back. */
        CHECK(order(&child, lock, 1) == 0);
        update(&child);
        CHECK(!track_covers(child.track, at(1)) && track_covers(child.track, at(0)) && track_covers(child.track, at(2)));
        order(&child, touch, 1);
        EXPECT(&child, at(0), "--------");
        CHECK(order(&child, unlock, 1) == 0);
        update(&child);
        EXPECT(&child, at(0), "-w------");

        /* Gone. */
        CHECK(order(&child, unmap, 0) == 0);
        EXPECT(&child, at(0), "--------");
        update(&child);
        CHECK(!track_covers(child.track, at(0)) && track_covers(child.track, at(1)));
        stop(&child);
}

int main(void) {
        test_need_root();
        setvbuf(stdout, NULL, _IOLBF, 0);
        shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        CHECK(shared != MAP_FAILED);
        CHECK(remote_new(&remote) == 0);
        test_exact(64 * MIB + 3 * PAGE_BYTES);
        test_mappings();
        remote_free(remote);
        return 0;
}
