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
 * A userfaultfd that a call made in the target: brought over to us while the stub holds it, closed there in the same
 * stop. It belongs to the address space it was made in, so it cannot be made anywhere else.
 *
 * What always holds: nothing but what that call made is closed. Other threads of the target run on meanwhile; should
 * one of them close our number and open something of its own under it, the stub notices by the inode (each userfaultfd
 * has one of its own since Linux 5.12): it looks right behind the call and right before the close, and we look whether
 * what it saw is a userfaultfd at all. That leaves a gap of one system call. What is looked at from outside is
 * /proc/PID/task/TID/fd, whose numbers cannot be anybody else's while the thread is our tracee.
 */
static bool is_userfaultfd(const char *path) {
        char link[32];
        ssize_t n = readlink(path, link, sizeof link);
        return n > 0 && (size_t)n == strlen(REMOTE_UFFD_LINK) && memcmp(link, REMOTE_UFFD_LINK, (size_t)n) == 0;
}

static bool is_userfaultfd_of(pid_t pid, pid_t tid, uint64_t fd) {
        char path[96];
        snprintf(path, sizeof path, "/proc/%d/task/%d/fd/%lu", pid, tid, fd);
        return is_userfaultfd(path);
}

bool remote_held_is_fresh(pid_t pid, uint64_t fd) {
        char path[96];
        _cleanup_free_ char *text = NULL;
        if (!is_userfaultfd_of(pid, pid, fd))
                return false;
        snprintf(path, sizeof path, "/proc/%d/fdinfo/%lu", pid, fd);
        /* API:	version:features in use:features known. Whoever uses one has said which features it wants. */
        return read_file(AT_FDCWD, path, &text, NULL) == 0 && strstr(text, "\nAPI:\taa:0:");
}

static off_t made_at(const RemoteThread *thread) { return (off_t)(thread->region + REMOTE_REGION_MADE_OFFSET); }
static off_t held_at(const RemoteThread *thread) {
        return (off_t)(thread->region + REMOTE_REGION_RESULTS_OFFSET + offsetof(RemoteResults, held));
}

/* What the stub saw right behind the call, if that is what we got: a number may be another file's by now, and the
 * table that pidfd_getfd(2) looks into is the first thread's, while this thread may have its own. -ENOTTY: what the
 * stub saw was another's already. */
static int copy(const RemoteThread *thread, uint64_t fd) {
        struct stat made, st;
        char path[32];
        _cleanup_close_ int pidfd = (int)syscall(SYS_pidfd_open, thread->pid, 0), ours = -EBADF;
        if (pidfd < 0)
                return -errno;
        ours = (int)syscall(SYS_pidfd_getfd, pidfd, (int)fd, 0);
        if (ours < 0)
                return -errno;
        if (pread(thread->memfd, &made, sizeof made, made_at(thread)) != sizeof made || fstat(ours, &st) < 0 ||
            st.st_dev != made.st_dev || st.st_ino != made.st_ino)
                return -EBADF;
        snprintf(path, sizeof path, "/proc/self/fd/%d", ours);
        return is_userfaultfd(path) ? TAKE_FD(ours) : -ENOTTY;
}

/* Tests only: as if what is there now had been there from the start. */
static void forge(const RemoteThread *thread, uint64_t fd) {
        char path[96];
        struct stat st;
        snprintf(path, sizeof path, "/proc/%d/task/%d/fd/%lu", thread->pid, thread->tid, fd);
        if (stat(path, &st) == 0)
                (void)pwrite(thread->memfd, &st, sizeof st, made_at(thread));
}

static int await_release(RemoteThread *thread) {
        uint64_t until = now_nsec() + REMOTE_STEP_NSEC, held;
        for (uint64_t pause = 4 * NSEC_PER_USEC;; pause = MIN_OF(2 * pause, 100 * NSEC_PER_USEC)) {
                remote_nap(pause); /* ever longer: it may be our CPU that it needs */
                if (pread(thread->memfd, &held, sizeof held, held_at(thread)) != sizeof held)
                        return REMOTE_E_LOST;
                if (!held)
                        return 0;
                if (now_nsec() >= until)
                        return REMOTE_E_LOST;
        }
}

int remote_take(RemoteThread *thread, uint64_t fd, int *ret) {
        const uint64_t yes = 1, none = 0;
        _cleanup_close_ int ours = copy(thread, fd);
        remote_step(REMOTE_STEP_TAKEN);
        if (!remote_guards(REMOTE_GUARD_SAME))
                forge(thread, fd);
        if (remote_guards(REMOTE_GUARD_CLOSE)) {
                const off_t release = (off_t)(thread->region + offsetof(RemoteHead, release));
                ssize_t told = ours == -ENOTTY ? pwrite(thread->memfd, &none, sizeof none, held_at(thread))
                                               : pwrite(thread->memfd, &yes, sizeof yes, release);
                if (told != sizeof yes)
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
        uint64_t at, held;
        RemoteDescriptor descriptor;
        if (remote_arch_stub_made(regs, thread->region, &at)) {
                /* Right behind a call, and what came of it not yet taken down: a freezer stops threads there. */
                if (pread(thread->memfd, &descriptor, sizeof descriptor, (off_t)at) != sizeof descriptor ||
                    !descriptor.hold)
                        return false;
                held = (uint64_t)remote_arch_result(regs) + 1;
        } else if (pread(thread->memfd, &held, sizeof held, held_at(thread)) != sizeof held)
                return false;
        if (held == 0 || held > INT_MAX || !is_userfaultfd_of(thread->pid, thread->tid, held - 1))
                return false;
        *ret = held - 1;
        return true;
}
