/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "target/remote-internal.h"

#include "base/clock.h"

#include <fcntl.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <sys/ptrace.h>
#include <sys/wait.h>

/*
 * One thread of a target: seized, stopped, let go. ptrace(2)'s rules that this leans on: a tracee can only be detached
 * while it stands; PTRACE_INTERRUPT cannot be taken back; a stop by PTRACE_INTERRUPT happens in the kernel's
 * get_signal(), the one place from which an interrupted system call is restarted; a signal that was taken already when
 * the thread stopped goes back in with the next resume, or, while nobody has collected that stop, with our death; a
 * group-stop that begins meanwhile is taken up again by the kernel at the detach; a tracee that dies has to be waited
 * for, or its parent never hears of it; one that executes a program while it is not the first thread takes over the number of
 * that, and stays a tracee.
 *
 * So a thread that does not stop in time is not forgotten: it goes on a list, and is let go the moment it stops.
 */
#ifndef PTRACE_GET_RSEQ_CONFIGURATION
#define PTRACE_GET_RSEQ_CONFIGURATION 0x420f
#endif
#define POLL_FIRST_NSEC (5 * NSEC_PER_USEC)
#define POLL_MAX_NSEC (50 * NSEC_PER_USEC)
#define DEATH_WAIT_NSEC (2 * NSEC_PER_MSEC)

/* Its filters would judge our calls: not while we trace it. Needs CAP_SYS_ADMIN, and none of our own. */
int remote_thread_suspend_seccomp(RemoteThread *thread) {
        if (!remote_guards(REMOTE_GUARD_SECCOMP) ||
            ptrace(PTRACE_SETOPTIONS, thread->tid, 0, PTRACE_O_TRACESYSGOOD | PTRACE_O_SUSPEND_SECCOMP) == 0)
                return 0;
        return errno == ESRCH ? remote_thread_gone(thread) : !thread->seccomp ? 0 : REMOTE_E_DENIED;
}

/* EPERM is also what ptrace(2) says of a thread that is ending, or that somebody else has begun to trace meanwhile. */
static int why_refused(const Target *target, pid_t tid) {
        RemoteThreadStatus status;
        int r = remote_thread_status(target, tid, &status);
        if (r != 0)
                return r;
        return status.state == 'Z' || status.state == 'X' ? REMOTE_E_GONE
             : status.tracer ? REMOTE_E_TRACED : REMOTE_E_DENIED;
}

/* Whoever interrupts us to walk the list finds it whole. */
static void hold(RemoteThread *thread) {
        RemoteThread **first = &thread->remote->threads;

        thread->next = *first;
        thread->link = first;
        if (thread->next)
                thread->next->link = &thread->next;
        atomic_signal_fence(memory_order_seq_cst);
        *first = thread;
}

static int seize(Remote *remote, const Target *target, pid_t tid, bool suspend, bool confined) {
        unsigned long options = PTRACE_O_TRACESYSGOOD;
        int r = remote_collect_seize(remote, tid, suspend ? options | PTRACE_O_SUSPEND_SECCOMP : options);
        if (r < 0 && r != -EAGAIN && suspend && !confined)
                r = remote_collect_seize(remote, tid, options);
        return r == -ESRCH ? REMOTE_E_GONE
             : r == -EPERM ? why_refused(target, tid)
             : r == -EAGAIN ? REMOTE_E_BUSY /* it executes a program, and cannot get on with it */
             : r == -EINVAL || r == -EIO ? REMOTE_E_DENIED : r;
}

int remote_thread_seize(Remote *remote, const Target *target, pid_t tid, const RemoteThreadStatus *status, int *memfd,
                        RemoteThread **ret) {
        _cleanup_free_ RemoteThread *thread = calloc(1, sizeof *thread);
        if (!thread)
                return -ENOMEM;
        bool suspend = memfd && remote_guards(REMOTE_GUARD_SECCOMP), confined = status->seccomp > 0;
        int r = seize(remote, target, tid, suspend, confined);
        if (r == REMOTE_E_DENIED) /* or said of a first thread that had ended, while one executed a program and is it now */
                r = seize(remote, target, tid, suspend, confined);
        if (r != 0)
                return r;
        thread->remote = remote;
        thread->pid = target->pid;
        thread->tid = tid;
        thread->memfd = memfd ? TAKE_FD(*memfd) : -EBADF;
        thread->seccomp = status->seccomp > 0;
        thread->stage = REMOTE_STAGE_SEIZED;
        hold(thread);

        /* The number may have been reused between the look and the seize, or its thread have executed a program. Ours
         * stands in our process's directory. */
        char path[64];
        snprintf(path, sizeof path, "task/%d", tid);
        RemoteThread *seized = TAKE_PTR(thread);
        if (faccessat(target->procfd, path, F_OK, 0) < 0 || !target_alive(target)) {
                (void)remote_thread_interrupt(seized);
                remote_thread_free(seized);
                return REMOTE_E_GONE;
        }
        remote_step(REMOTE_STEP_SEIZED);
        *ret = seized;
        return 0;
}

void remote_nap(uint64_t nsec) {
        struct timespec ts = { .tv_sec = 0, .tv_nsec = (long)nsec };
        clock_nanosleep(CLOCK_MONOTONIC, 0, &ts, NULL);
}

/* waitpid(2) that leaves the stop of a signal on its way to a handler uncollected: collected, its number is nowhere but
 * with us (wait_task_stopped() clears exit_code), and were we to die before it goes back in, it would be lost. */
static pid_t wait_now(const RemoteThread *thread, int *ret_status) {
        siginfo_t info = {};

        if (remote_guards(REMOTE_GUARD_PEEK)) {
                if (waitid(P_PID, (id_t)thread->tid, &info, WNOHANG | WNOWAIT | WEXITED | WSTOPPED | __WALL) < 0)
                        return -1;
                if (info.si_pid == 0)
                        return 0;
                if (info.si_code == CLD_TRAPPED && info.si_status < 0x80) {
                        *ret_status = info.si_status << 8 | 0x7f;
                        return thread->tid;
                }
        }
        return waitpid(thread->tid, ret_status, WNOHANG | __WALL);
}

static bool is_ours(const Remote *remote, pid_t tid) {
        for (const RemoteThread *thread = remote->threads; thread; thread = thread->next)
                if (thread->tid == tid && !thread->dead)
                        return true;
        return false;
}

/* It is no more under its number. One that executed a program goes on under that of the process (de_thread()), and is still
 * ours: only then it can be interrupted. */
static bool follow(RemoteThread *thread) {
        if (thread->tid == thread->pid || is_ours(thread->remote, thread->pid) || !remote_guards(REMOTE_GUARD_FOLLOW) ||
            ptrace(PTRACE_INTERRUPT, thread->pid, 0, 0) < 0)
                return false;
        thread->tid = thread->pid;
        thread->stage = REMOTE_STAGE_SEIZED;
        thread->inject = 0;
        thread->executed = true;
        return true;
}

int remote_thread_wait(RemoteThread *thread, uint64_t timeout_nsec, int *ret_status) {
        uint64_t until = now_nsec() + timeout_nsec, pause = POLL_FIRST_NSEC;
        for (uint64_t now = until - timeout_nsec;;) {
                int status;
                pid_t p = wait_now(thread, &status);
                if (p == thread->tid) {
                        if (!WIFSTOPPED(status)) {
                                thread->dead = true;
                                return REMOTE_E_GONE;
                        }
                        thread->stopped = true;
                        if (thread->executed) {
                                remote_thread_keep_signal(thread, status);
                                return REMOTE_E_GONE;
                        }
                        *ret_status = status;
                        if (status >> 16 == 0 && WSTOPSIG(status) != (SIGTRAP | 0x80))
                                remote_step(REMOTE_STEP_SIGNAL);
                        return 0;
                }
                if (p < 0 && errno != EINTR) {
                        if (errno == ECHILD && follow(thread))
                                continue;
                        thread->dead = true;
                        return REMOTE_E_GONE;
                }
                thread->stopped_nsec = now;
                now = now_nsec();
                if (now >= until)
                        return REMOTE_E_BUSY;
                remote_nap(pause);
                pause = MIN_OF(pause + pause / 2, (uint64_t)POLL_MAX_NSEC);
        }
}

/* A ptrace request failed: the thread was killed under us, and its end has to be collected. */
int remote_thread_gone(RemoteThread *thread) {
        int status;
        thread->stopped = false;
        (void)remote_thread_wait(thread, DEATH_WAIT_NSEC, &status);
        return REMOTE_E_GONE;
}

int remote_thread_resume(RemoteThread *thread, int request) {
        if (ptrace(request, thread->tid, 0, thread->inject) < 0)
                return errno == ESRCH ? remote_thread_gone(thread) : -errno;
        thread->inject = 0;
        thread->stopped = false;
        return 0;
}

/* SIGTRAP | 0x80: no signal, but the stop of a system call. */
void remote_thread_keep_signal(RemoteThread *thread, int status) {
        int sig = WSTOPSIG(status);
        bool fault = sig == SIGSEGV || sig == SIGBUS || sig == SIGILL || sig == SIGFPE;
        if (status >> 16 == 0 && sig != (SIGTRAP | 0x80) && !(fault && thread->stage != REMOTE_STAGE_SEIZED))
                thread->inject = sig;
}

static bool is_interrupt_stop(int status) { return status >> 16 == PTRACE_EVENT_STOP; }

int remote_thread_interrupt(RemoteThread *thread) {
        if (ptrace(PTRACE_INTERRUPT, thread->tid, 0, 0) < 0)
                return errno == ESRCH ? remote_thread_gone(thread) : -errno;
        remote_step(REMOTE_STEP_INTERRUPTED);
        thread->stopped_nsec = now_nsec();
        return thread->stopped ? remote_thread_resume(thread, PTRACE_CONT) : 0;
}

int remote_thread_stop(RemoteThread *thread, uint64_t timeout_nsec) {
        uint64_t until = now_nsec() + timeout_nsec;
        int r = remote_thread_interrupt(thread);
        return r != 0 ? r : remote_thread_await(thread, until);
}

int remote_thread_await(RemoteThread *thread, uint64_t until) {
        for (;;) {
                int status;
                uint64_t now = now_nsec();
                int r = remote_thread_wait(thread, until > now ? until - now : 0, &status);
                if (r != 0)
                        return r;
                if (is_interrupt_stop(status))
                        /* A group-stop of the whole process shows as the stop of the signal that began it. */
                        return WSTOPSIG(status) == SIGTRAP || thread->stage == REMOTE_STAGE_INSIDE ? 0 : REMOTE_E_BUSY;
                /* The signal takes its course, the interrupt comes right after it. */
                remote_thread_keep_signal(thread, status);
                r = remote_thread_resume(thread, PTRACE_CONT);
                if (r != 0)
                        return r;
        }
}

bool remote_thread_in_rseq(RemoteThread *thread, uint64_t pc) {
        struct {
                uint64_t pointer;
                uint32_t size, signature, flags, pad;
        } area = {};
        struct {
                uint32_t version, flags;
                uint64_t start, length, abort;
        } section;
        uint64_t current = 0;
        if (!remote_guards(REMOTE_GUARD_RSEQ))
                return false;
        if (ptrace(PTRACE_GET_RSEQ_CONFIGURATION, thread->tid, sizeof area, &area) < 0 || !area.pointer)
                return false;
        if (pread(thread->memfd, &current, sizeof current, (off_t)(area.pointer + 8)) != sizeof current || !current)
                return false;
        if (pread(thread->memfd, &section, sizeof section, (off_t)current) != sizeof section)
                return true; /* nobody's memory: the kernel will have its say, not we */
        return pc - section.start < section.length;
}

/* A call that was interrupted by us and returned -EINTR is made again. Only in an interrupt-stop. */
void remote_thread_repair(RemoteThread *thread) {
        RemoteRegs regs;
        if (remote_guards(REMOTE_GUARD_EINTR) && remote_arch_get_regs(thread->tid, &regs) == 0 &&
            remote_arch_repair(&regs))
                (void)remote_arch_set_regs(thread->tid, &regs);
}

bool remote_thread_in_region(const RemoteThread *thread) {
        RemoteRegs regs;
        return remote_arch_get_regs(thread->tid, &regs) == 0 && remote_region_has(remote_arch_pc(&regs));
}

RemoteThread *remote_thread_forget(RemoteThread *thread) {
        *thread->link = thread->next;
        if (thread->next)
                thread->next->link = thread->link;
        safe_close(thread->memfd);
        free(thread->below);
        free(thread);
        return NULL;
}

/* False: it was killed, and its end is still to be collected. */
static bool detach(RemoteThread *thread) {
        remote_boost_end(thread->remote);
        if (ptrace(PTRACE_DETACH, thread->tid, 0, thread->inject) < 0) {
                (void)remote_thread_gone(thread);
                return thread->dead;
        }
        remote_step(REMOTE_STEP_DETACHED);
        return true;
}

/* A standing thread goes on as it would have. False: it is not possible yet. */
static bool let_go(RemoteThread *thread) {
        /* In the middle of a program it must not be called back: it ends by itself, as if we had died. */
        if (thread->stage == REMOTE_STAGE_INSIDE && remote_in_program(thread))
                return detach(thread);
        if (thread->stage == REMOTE_STAGE_PARKED && !thread->deserted && remote_unpark(thread) != 0)
                return false;
        if (thread->stage == REMOTE_STAGE_INSIDE && remote_leave(thread) != 0)
                return false;
        if (!thread->inject && thread->stage != REMOTE_STAGE_PARKED)
                remote_thread_repair(thread);
        return detach(thread);
}

RemoteThread *remote_thread_free(RemoteThread *thread) {
        if (!thread)
                return NULL;
        if (thread->dead || (thread->stopped && let_go(thread)) || thread->dead)
                return remote_thread_forget(thread);
        /* Wherever it is, let it stop as soon as it can: by then it may be frozen or asleep in the kernel. */
        if (!thread->stopped)
                ptrace(PTRACE_INTERRUPT, thread->tid, 0, 0);
        thread->lingers = true;
        return NULL;
}

void remote_reap(Remote *remote) {
        for (RemoteThread *next, *thread = remote->threads; thread; thread = next) {
                int status;
                next = thread->next;
                if (!thread->lingers)
                        continue;
                if (!thread->stopped && !thread->dead && remote_thread_wait(thread, 0, &status) == 0 &&
                    !is_interrupt_stop(status)) {
                        /* A signal on its way in comes first; the interrupt is still owed to us. */
                        remote_thread_keep_signal(thread, status);
                        ptrace(PTRACE_INTERRUPT, thread->tid, 0, 0);
                        (void)remote_thread_resume(thread, PTRACE_CONT);
                }
                remote_thread_free(thread);
        }
}

bool remote_has_lingering(const Remote *remote) {
        for (const RemoteThread *thread = remote->threads; thread; thread = thread->next)
                if (thread->lingers)
                        return true;
        return false;
}
