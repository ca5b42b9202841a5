/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "target/remote-internal.h"

#include "base/clock.h"
#include "base/io.h"

#include <sys/ptrace.h>

/*
 * All threads of a process, made to stand at once: while they do, none of them maps, forks, closes or writes. All are
 * looked at and seized first, which stops nobody; then they are interrupted, one right after the other, and waited for
 * afterwards: the first stands until the last does, and looking at one takes twenty times as long as interrupting it. The
 * list of them is read again until a look at it that began when all stood shows nobody new (only one that runs can start
 * another), and nobody was left out: next_tid() of the kernel loses its place when the thread there ends.
 *
 * Nothing is run in these threads: each has its interrupted call repaired the moment it stands, for we may die, and is
 * let go with its registers as they are. A thread in a restartable sequence may stand there; the kernel restarts it as
 * after any other interruption. io_uring's workers cannot be stopped by ptrace(2) and are counted instead: what they
 * touch must be guarded by other means.
 */
#define CROWD_WAIT_NSEC (60 * NSEC_PER_MSEC)
#define CROWD_LOOK_NSEC (5 * NSEC_PER_USEC)
#define CROWD_LOOK_MAX_NSEC (50 * NSEC_PER_USEC)

static bool is_known(const RemoteCrowd *crowd, pid_t tid) {
        for (size_t i = 0; i < crowd->n; i++)
                if (crowd->threads[i]->tid == tid)
                        return true;
        for (size_t i = 0; i < crowd->n_workers; i++)
                if (crowd->workers[i] == tid)
                        return true;
        return false;
}

typedef struct Newcomer {
        pid_t tid;
        RemoteThreadStatus status;
} Newcomer;

typedef struct Newcomers {
        Newcomer *list;
        size_t n, allocated;
} Newcomers;

static void newcomers_done(Newcomers *newcomers) { free(newcomers->list); }

bool remote_crowd_is_impatient(const RemoteCrowd *crowd) {
        return crowd->stood_nsec && now_nsec() - crowd->stood_nsec > crowd->patience_nsec;
}

/* Whom waking would harm, and that they are too many, is found before anybody new is woken. A thread that ended meanwhile is no
 * failure, here and below. *ret_ended: it can be listed until its parent waits for it. */
static int look_at(Remote *remote, const Target *target, pid_t tid, RemoteCrowd *crowd, Newcomers *newcomers, bool *ret_ended) {
        RemoteThreadStatus status;
        *ret_ended = false;
        if (remote_is_worker(target, tid)) {
                if (GROW(crowd->workers, crowd->n_workers, crowd->allocated_workers) < 0)
                        return -ENOMEM;
                crowd->workers[crowd->n_workers++] = tid;
                return 0;
        }
        int r = remote_thread_status(target, tid, &status);
        *ret_ended = r == REMOTE_E_GONE || (r == 0 && (status.state == 'Z' || status.state == 'X'));
        if (*ret_ended)
                return 0;
        if (r != 0)
                return r;
        if (status.tracer)
                return remote_lingers_inside(remote, target) ? REMOTE_E_BUSY : REMOTE_E_TRACED;
        if (status.state != 'S' && status.state != 'R')
                return REMOTE_E_BUSY; /* in a fork of its own, in the kernel's hands, stopped or frozen */
        if (crowd->n + newcomers->n >= crowd->n_max || remote_crowd_is_impatient(crowd) || remote_must_sleep_on(target, tid))
                return REMOTE_E_BUSY;
        if (GROW(newcomers->list, newcomers->n, newcomers->allocated) < 0)
                return -ENOMEM;
        newcomers->list[newcomers->n++] = (Newcomer){ tid, status };
        return 0;
}

static int seize(Remote *remote, const Target *target, const Newcomer *newcomer, RemoteCrowd *crowd) {
        if (GROW(crowd->threads, crowd->n, crowd->allocated) < 0)
                return -ENOMEM;
        RemoteThread *thread;
        int r = remote_thread_seize(remote, target, newcomer->tid, &newcomer->status, NULL, &thread);
        if (r == 0)
                crowd->threads[crowd->n++] = thread;
        return r == REMOTE_E_GONE ? 0 : r;
}

static int seize_all(Remote *remote, const Target *target, const Newcomers *newcomers, RemoteCrowd *crowd) {
        int r = 0;
        for (size_t i = 0; r == 0 && i < newcomers->n; i++)
                r = seize(remote, target, &newcomers->list[i], crowd);
        return r;
}

static int interrupt(RemoteThread *thread, RemoteCrowd *crowd) {
        uint64_t now = now_nsec();
        int r = remote_thread_interrupt(thread);
        thread->stopped_nsec = now; /* it is looked at when all are interrupted, and may stand since now */
        if (crowd->interrupted_nsec == 0)
                crowd->interrupted_nsec = now;
        remote_step(REMOTE_STEP_CROWD);
        return r == REMOTE_E_GONE ? 0 : r;
}

/* Interrupts whom it does not know yet. Where all others stand nobody is left unknown if nobody but the known and the ended was
 * seen, and as many as there were when the look began. */
static int gather(Remote *remote, const Target *target, DIR *tasks, pid_t only, RemoteCrowd *crowd, bool *ret_new) {
        _cleanup_(newcomers_done) Newcomers newcomers = {};
        size_t before = crowd->n, seen = 0, unknown = 0, threads = remote_tasks_count(tasks);
        int r = 0;
        rewinddir(tasks);
        for (pid_t tid; r == 0 && (tid = remote_tasks_next(tasks)) > 0; seen++)
                if (!is_known(crowd, tid) && (!only || tid == only)) {
                        bool ended;
                        r = look_at(remote, target, tid, crowd, &newcomers, &ended);
                        unknown += !ended;
                }
        if (r == 0 && newcomers.n > 0)
                r = seize_all(remote, target, &newcomers, crowd);
        for (size_t i = before; r == 0 && i < crowd->n; i++)
                r = interrupt(crowd->threads[i], crowd);
        *ret_new = unknown > 0 || (!only && seen != threads);
        return r == 0 && seen == 0 ? REMOTE_E_GONE : r;
}

/* One look at each that does not stand yet. */
static int look_around(RemoteCrowd *crowd, bool *ret_all) {
        bool all = true;
        for (size_t i = 0; i < crowd->n;) {
                RemoteThread *thread = crowd->threads[i];
                int r = 0;
                if (!thread->stopped && !thread->dead) {
                        r = remote_thread_await(thread, 0);
                        if (r == REMOTE_E_BUSY && thread->stopped)
                                return REMOTE_E_BUSY; /* job control */
                        if (r == 0) {
                                remote_thread_repair(thread);
                                if (remote_thread_in_region(thread))
                                        return REMOTE_E_BUSY; /* a dead caller's program has not come to its end */
                                if (crowd->stood_nsec == 0 || thread->stopped_nsec < crowd->stood_nsec)
                                        crowd->stood_nsec = thread->stopped_nsec;
                        }
                }
                if (r < 0)
                        return r;
                if (thread->executed)
                        return REMOTE_E_BUSY; /* another program than was prepared for */
                if (thread->dead) {
                        remote_thread_free(thread);
                        crowd->threads[i] = crowd->threads[--crowd->n];
                        continue;
                }
                if (!thread->stopped && remote_crowd_is_impatient(crowd))
                        return REMOTE_E_BUSY;
                all &= thread->stopped;
                i++;
        }
        *ret_all = all;
        return 0;
}

int remote_crowd_stop(Remote *remote, const Target *target, pid_t only, RemoteCrowd *crowd) {
        _cleanup_closedir_ DIR *tasks = NULL;
        int r = remote_tasks_open(target, &tasks);
        if (r != 0)
                return r;
        uint64_t started = now_nsec(), pause = CROWD_LOOK_NSEC;
        for (bool all = false;;) {
                bool found;
                bool stood = all;
                r = gather(remote, target, tasks, only, crowd, &found);
                if (r != 0)
                        return r;
                if (stood && !found)
                        break;
                if (stood && remote_crowd_is_impatient(crowd))
                        return REMOTE_E_BUSY;
                r = look_around(crowd, &all);
                if (r != 0)
                        return r;
                if (now_nsec() - started > CROWD_WAIT_NSEC)
                        return REMOTE_E_BUSY;
                if (all)
                        continue;
                remote_nap(pause);
                pause = MIN_OF(pause + pause / 2, (uint64_t)CROWD_LOOK_MAX_NSEC);
        }
        remote_step(REMOTE_STEP_STANDING);
        return crowd->n > 0 ? 0 : REMOTE_E_GONE;
}

RemoteThread *remote_crowd_find(const RemoteCrowd *crowd, pid_t tid) {
        for (size_t i = 0; i < crowd->n; i++)
                if (crowd->threads[i]->tid == tid)
                        return crowd->threads[i];
        return NULL;
}

/* The one that was inside has three more steps to go: the others need not wait for that. */
void remote_crowd_done(RemoteCrowd *crowd) {
        for (int inside = 0; inside <= 1; inside++)
                for (size_t i = 0; i < crowd->n; i++)
                        if (crowd->threads[i] && (crowd->threads[i]->stage == REMOTE_STAGE_INSIDE) == (inside == 1))
                                crowd->threads[i] = remote_thread_free(crowd->threads[i]);
        free(crowd->threads);
        free(crowd->workers);
        *crowd = (RemoteCrowd){};
}
