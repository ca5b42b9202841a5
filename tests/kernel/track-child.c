/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "track-child.h"

#include "base/io.h"
#include "tests/confine.h"

#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>

Shared *shared;
Remote *remote;

typedef struct Order {
        long (*run)(long);
        long argument;
} Order;

void track_test_begin(void) {
        test_need_root();
        setvbuf(stdout, NULL, _IOLBF, 0);
        shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        CHECK(shared != MAP_FAILED);
        if (remote_new(&remote) < 0)
                TEST_SKIP("no remote calls on this architecture");
}

void track_test_end(void) {
        remote = remote_free(remote);
        munmap(shared, sizeof *shared);
}

static void become_who_is_asked(void) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (shared->user_namespace)
                CHECK(unshare(CLONE_NEWUSER) == 0);
        if (shared->uid) {
                CHECK(setresgid(shared->uid, shared->uid, shared->uid) == 0);
                CHECK(setresuid(shared->uid, shared->uid, shared->uid) == 0);
                CHECK(prctl(PR_SET_DUMPABLE, 1) == 0 && prctl(PR_SET_PDEATHSIG, SIGKILL) == 0);
        }
        if (shared->docker_filter)
                confine_by_filter();
}

static _Noreturn void obey(int from, int to) {
        Order order;

        become_who_is_asked();
        for (bool ready = true;; ready = false) {
                long result = ready ? 0 : order.run(order.argument);
                CHECK(write(to, &result, sizeof result) == sizeof result);
                if (read(from, &order, sizeof order) != sizeof order)
                        _exit(0);
        }
}

static long await_answer(const Child *child) {
        int status = 0;
        long result;

        if (read(child->from, &result, sizeof result) == sizeof result)
                return result;
        (void)waitpid(child->pid, &status, 0);
        CHECK_HARMLESS(WIFEXITED(status) && WEXITSTATUS(status) != TEST_NOTICED, "the child: %#x", (unsigned)status);
        CHECK(false, "the child ended itself");
        return -1;
}

void child_begin_order(const Child *child, long (*run)(long), long argument) {
        Order order = { run, argument };

        CHECK(write(child->to, &order, sizeof order) == sizeof order);
}

long child_end_order(const Child *child) { return await_answer(child); }

long child_order(const Child *child, long (*run)(long), long argument) {
        child_begin_order(child, run, argument);
        return child_end_order(child);
}

Child child_of(pid_t pid) {
        Child child = { .pid = pid, .to = -EBADF, .from = -EBADF };

        CHECK(target_new(child.pid, &child.target) == 0 && target_open_memory(child.target) == 0);
        return child;
}

Child child_start(void) {
        int to[2], from[2];
        Child child;
        pid_t pid;

        CHECK(pipe2(to, O_CLOEXEC) == 0 && pipe2(from, O_CLOEXEC) == 0);
        pid = fork();
        CHECK(pid >= 0);
        if (pid == 0) {
                close(to[1]);
                close(from[0]);
                obey(to[0], from[1]);
        }
        close(to[0]);
        close(from[1]);
        child = (Child) { .pid = pid, .from = from[0] };
        await_answer(&child); /* it is who it is to be */
        child = child_of(pid);
        child.to = to[1];
        child.from = from[0];
        return child;
}

void child_read_vmas(Child *child) {
        vma_list_done(&child->vmas);
        CHECK(target_read_vmas(child->target, false, &child->vmas) == 0);
        track_claim(child->track, &child->vmas);
}

void child_update(Child *child) {
        child_read_vmas(child);
        CHECK(track_update(child->track, child->target, &child->vmas) == 0);
}

void child_take(Child *child, int *ret_uffd, TargetSkip *ret_skip) {
        int r;

        for (int i = 0; (r = remote_adopt(remote, child->target, ret_uffd, ret_skip)) != 0; i++) {
                CHECK((r == REMOTE_E_BUSY || r == REMOTE_E_LOST) && i < 200, "%s", remote_error_name(r));
                usleep(1000);
        }
}

void child_adopt(Child *child) {
        TargetSkip skip;
        int uffd = -EBADF, r;

        child_take(child, &uffd, &skip);
        CHECK(skip == TARGET_OK && uffd >= 0);
        CHECK(!target_has_userfaultfd(child->target));
        r = track_new(uffd, &child->track);
        if (r == -EINVAL)
                TEST_SKIP("no asynchronous write protection (Linux 6.7)");
        CHECK(r == 0, "%d", r);
        child_update(child);
}

void child_stop(Child *child) {
        child->track = track_free(child->track);
        vma_list_done(&child->vmas);
        child->target = target_free(child->target);
        kill(child->pid, SIGKILL);
        (void)waitpid(child->pid, NULL, 0);
        safe_close(child->to);
        safe_close(child->from);
}

size_t child_count_mappings(const Child *child) {
        _cleanup_free_ char *text = NULL;
        size_t n = 0;

        CHECK(read_file(child->target->procfd, "maps", &text, NULL) == 0);
        for (const char *p = text; (p = strchr(p, '\n')); p++)
                n++;
        return n;
}

Pages child_written(Child *child, uint64_t start, uint64_t end, bool protect) {
        Pages pages = {};

        CHECK(track_written(child->track, child->target, start, end, protect, &pages.written) == 0);
        for (size_t i = 0; i < pages.written.n; i++) {
                const TrackRange *range = &pages.written.ranges[i];

                CHECK(range->start < range->end && range->start >= start && range->end <= end &&
                      (i == 0 || range[-1].end <= range->start));
                pages.count += (range->end - range->start) / PAGE_BYTES;
        }
        return pages;
}

size_t child_count_written(Child *child, uint64_t start, uint64_t end) {
        Pages pages = child_written(child, start, end, true);

        track_ranges_done(&pages.written);
        return pages.count;
}

bool pages_have(const Pages *pages, uint64_t addr) {
        size_t i = FIRST_BEHIND(pages->written.ranges, pages->written.n, addr);

        return i < pages->written.n && pages->written.ranges[i].start <= addr;
}

long order_map(long bytes) {
        /* The largest lie where the regions of remote calls do not. */
        char *p = mmap((uint64_t)bytes > 1024 * GIB ? (void *)(64 * 256 * GIB) : NULL, (size_t)bytes + 2 * ORDER_MAP_ROOM, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

        CHECK(p != MAP_FAILED && munmap(p, ORDER_MAP_ROOM) == 0);
        p += ORDER_MAP_ROOM;
        CHECK(munmap(p + bytes, ORDER_MAP_ROOM) == 0 && madvise(p, (size_t)bytes, MADV_NOHUGEPAGE) == 0);
        shared->start = (uint64_t)(uintptr_t)p;
        shared->pages = (uint64_t)bytes / PAGE_BYTES;
        return 0;
}

long order_map_huge(long bytes) {
        char *p = mmap(NULL, (size_t)bytes + BLOCK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

        CHECK(p != MAP_FAILED);
        p += -(uintptr_t)p % BLOCK_BYTES;
        CHECK(madvise(p, (size_t)bytes, MADV_HUGEPAGE) == 0);
        shared->start = (uint64_t)(uintptr_t)p;
        shared->pages = (uint64_t)bytes / PAGE_BYTES;
        return 0;
}

bool is_picked(uint64_t page) {
        return (((page + 1) * 0x9e3779b97f4a7c15 ^ shared->seed) >> 20) % 1000 < shared->permille;
}

long order_write_picked(long unused) {
        for (uint64_t i = 0; i < shared->pages; i++)
                if (is_picked(i))
                        ++*(volatile uint8_t *)area_page(i);
        return 0;
}

Child child_tracked(uint64_t pages) {
        Child child = child_start();

        child_order(&child, order_map, (long)(pages * PAGE_BYTES));
        shared->permille = 1000;
        child_order(&child, order_write_picked, 0);
        child_adopt(&child);
        CHECK(child_count_written(&child, shared->start, area_end()) == pages);
        CHECK(child_count_written(&child, shared->start, area_end()) == 0);
        return child;
}
