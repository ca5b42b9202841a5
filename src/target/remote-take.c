/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "target/remote-internal.h"

#include "base/clock.h"
#include "base/io.h"

#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>

/*
 * A userfaultfd that a call made in the target: brought over to us while the stub holds it, closed there in the same stop.
 * It belongs to the address space it was made in, so it cannot be made anywhere else.
 *
 * What always holds: nothing but what that call made is closed. Between the call and the close other threads of the target run
 * on; should one of them close our number and open something of its own under it, that is noticed by the inode (each
 * userfaultfd has one of its own since Linux 5.12), looked at once more just before the close; then it is left alone.
 * What looks there is /proc/PID/task/TID/fd, whose numbers cannot be anybody else's while the thread is our tracee.
 */
static bool is_userfaultfd(const char *path) {
        char link[32];
        ssize_t n = readlink(path, link, sizeof link);
        return n > 0 && (size_t)n == strlen(REMOTE_UFFD_LINK) && memcmp(link, REMOTE_UFFD_LINK, (size_t)n) == 0;
}

static bool look_at(pid_t pid, pid_t tid, uint64_t fd, struct stat *ret) {
        char path[96];
        snprintf(path, sizeof path, "/proc/%d/task/%d/fd/%lu", pid, tid, fd);
        return is_userfaultfd(path) && stat(path, ret) == 0;
}

static bool is_same(const struct stat *a, const struct stat *b) { return a->st_dev == b->st_dev && a->st_ino == b->st_ino; }

bool remote_held_is_fresh(pid_t pid, uint64_t fd) {
        char path[96];
        _cleanup_free_ char *text = NULL;
        struct stat st;
        if (!look_at(pid, pid, fd, &st))
                return false;
        snprintf(path, sizeof path, "/proc/%d/fdinfo/%lu", pid, fd);
        /* API:	version:features in use:features known. Whoever uses one has said which features it wants. */
        return read_file(AT_FDCWD, path, &text, NULL) == 0 && strstr(text, "\nAPI:\taa:0:");
}

static int copy(pid_t pid, uint64_t fd, const struct stat *held) {
        struct stat st;
        _cleanup_close_ int pidfd = (int)syscall(SYS_pidfd_open, pid, 0), ours = -EBADF;
        if (pidfd < 0)
                return -errno;
        ours = (int)syscall(SYS_pidfd_getfd, pidfd, (int)fd, 0);
        if (ours < 0)
                return -errno;
        /* The first thread's table is what pidfd_getfd(2) looks into. A thread may have another one. */
        if (fstat(ours, &st) < 0 || !is_same(&st, held))
                return -EBADF;
        return TAKE_FD(ours);
}

static int await_release(RemoteThread *thread) {
        uint64_t results = thread->region + REMOTE_REGION_RESULTS_OFFSET, until = now_nsec() + REMOTE_STEP_NSEC, held;
        for (;;) {
                if (pread(thread->memfd, &held, sizeof held, (off_t)(results + offsetof(RemoteResults, held))) != sizeof held)
                        return REMOTE_E_LOST;
                if (!held)
                        return 0;
                if (now_nsec() >= until)
                        return REMOTE_E_LOST;
                remote_nap(2 * NSEC_PER_USEC);
        }
}

int remote_take(RemoteThread *thread, uint64_t fd, int *ret) {
        const uint64_t yes = 1, none = 0;
        struct stat held, still;
        _cleanup_close_ int ours = -EBADF;
        if (look_at(thread->pid, thread->tid, fd, &held))
                ours = copy(thread->pid, fd, &held);
        else
                held = (struct stat){};
        remote_step(REMOTE_STEP_TAKEN);
        if (remote_guards(REMOTE_GUARD_CLOSE)) {
                bool there = look_at(thread->pid, thread->tid, fd, &still) && is_same(&held, &still);
                uint64_t at = there ? thread->region + offsetof(RemoteHead, release)
                                    : thread->region + REMOTE_REGION_RESULTS_OFFSET + offsetof(RemoteResults, held);
                if (pwrite(thread->memfd, there ? &yes : &none, sizeof yes, (off_t)at) != sizeof yes)
                        return REMOTE_E_LOST;
                remote_step(REMOTE_STEP_RELEASED);
                int r = await_release(thread);
                if (r != 0)
                        return r;
        }
        *ret = ours >= 0 ? TAKE_FD(ours) : ours;
        return 0;
}

bool remote_still_held(const RemoteThread *thread, const RemoteRegs *regs, uint64_t *ret) {
        uint64_t at = thread->region + REMOTE_REGION_RESULTS_OFFSET + offsetof(RemoteResults, held), held;
        RemoteDescriptor descriptor;
        struct stat st;
        if (remote_arch_stub_made(regs, thread->region, &at)) {
                /* It stands right behind a call and has not taken down what came of it: a freezer stops threads there. */
                if (pread(thread->memfd, &descriptor, sizeof descriptor, (off_t)at) != sizeof descriptor || !descriptor.hold)
                        return false;
                held = (uint64_t)remote_arch_result(regs) + 1;
        } else if (pread(thread->memfd, &held, sizeof held, (off_t)at) != sizeof held)
                return false;
        if (held == 0 || held > INT_MAX || !look_at(thread->pid, thread->tid, held - 1, &st))
                return false;
        *ret = held - 1;
        return true;
}
