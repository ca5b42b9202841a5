/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "target/remote-internal.h"

#include "base/clock.h"
#include "base/io.h"

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>

/*
 * System calls made inside a target, without it being able to tell. The protocol step by step, what can go wrong at
 * each step and which test watches over it: docs/remote-calls.md. In short:
 *
 *   1. Look for a thread that sleeps where waking it does not matter, on a stack where the kernel itself would put a
 *      signal frame (remote-choose.c, remote-map.c).
 *   2. Stop it (remote-thread.c). Not inside a restartable sequence.
 *   3. Write a signal frame for its context below its stack, and send it through a `syscall` instruction of its own C
 *      library to map a region for us; from there every path leads into the frame's sigreturn (remote-inject.c).
 *   4. Write a stub and the calls into the region; the stub makes them all in one go, and waits a moment for us.
 *   5. Unmap the region, put mask, registers and stack back, detach.
 *
 * What must always hold: whenever this process dies, at whatever instruction, the target's thread goes on with its own
 * registers, vector state, signal mask and pending signals. What may be left is the region (when it was just mapped,
 * or where a seccomp filter forbids the stub to unmap it): it lies at an address that spells "ksmd", holds nothing but
 * the calls, and the next remote_call() or remote_adopt() takes it away. What is left of risk: a thread that sat in a
 * call the kernel does not restart sees EINTR when we die between stopping it and its new registers. A process whose
 * seccomp filter would kill it for our calls is refused (remote-filter.c): PTRACE_O_SUSPEND_SECCOMP ends with its
 * tracer.
 */
#define STOP_WAIT_NSEC (60 * NSEC_PER_MSEC)
#define REACH_PATIENCE_NSEC NSEC_PER_MSEC
#define STOP_MAX_NSEC (2 * NSEC_PER_MSEC)
#define BATCH_MIN 16U
#define RSEQ_TRIES 8U
#define CALL_NSEC_FIRST (2 * NSEC_PER_USEC)
#define LINGER_AT_END_NSEC (100 * NSEC_PER_MSEC)

/* How often the stub has to pause to wait REMOTE_SPIN_NSEC: a pause takes 10 to 140 cycles. */
static uint64_t count_spins(void) {
        const uint64_t probe = 20000;
        uint64_t best = UINT64_MAX;
        for (int i = 0; i < 5; i++) {
                uint64_t started = now_nsec();
                remote_arch_pause(probe);
                best = MIN_OF(best, now_nsec() - started);
        }
        return REMOTE_SPIN_NSEC * probe / (best + 1) + 1000;
}

int remote_new(Remote **ret) {
        Remote *remote = calloc(1, sizeof *remote);
        if (!remote)
                return -ENOMEM;
        remote->call_nsec = CALL_NSEC_FIRST;
        remote->spins = count_spins();
        remote->n_cpus = (unsigned)MAX_OF(sysconf(_SC_NPROCESSORS_ONLN), 1L);
        *ret = remote;
        return 0;
}

Remote *remote_free(Remote *remote) {
        if (!remote)
                return NULL;
        uint64_t until = now_nsec() + LINGER_AT_END_NSEC;
        for (;;) {
                remote_reap(remote);
                if (!remote_has_lingering(remote) || now_nsec() >= until)
                        break;
                remote_nap(NSEC_PER_MSEC);
        }
        /* What still lingers is let go by the kernel when we end, and goes home by its frame. */
        while (remote->threads)
                (void)remote_thread_forget(remote->threads);
        remote_boost_free(remote->boost);
        remote_collect_done(remote);
        free(remote);
        return NULL;
}

/* Makes a thread stand where it may be used. */
static int stop_in_place(RemoteThread *thread, const RemoteVisit *visit, uint64_t *ret_floor) {
        for (unsigned try = 0;; try++) {
                uint64_t interrupted = now_nsec();
                int r = remote_thread_stop(thread, STOP_WAIT_NSEC);
                if (r != 0)
                        return r;
                remote_step(REMOTE_STEP_STOPPED);
                thread->interrupted_nsec = interrupted;
                r = remote_visit_check(thread, visit, ret_floor);
                if (r != 0)
                        return r;
                /* Every resume of it would wait as long for a CPU again. It stood for nothing, but only for a moment. */
                if (thread->stopped_nsec - interrupted > REACH_PATIENCE_NSEC && !remote_may_be_slow(thread->remote))
                        return REMOTE_E_BUSY;
                if (!remote_thread_in_rseq(thread, remote_arch_pc(&thread->regs)))
                        return 0;
                /* The kernel owes it an abort, which it gets on its way back. */
                if (try == RSEQ_TRIES)
                        return REMOTE_E_BUSY;
                r = remote_thread_resume(thread, PTRACE_CONT);
                if (r != 0)
                        return r;
                remote_nap(20 * NSEC_PER_USEC);
        }
}

/* Stops one thread and makes what fits of the calls, one at least. */
static int call_in_thread(Remote *remote, RemoteVisit *visit, RemoteCandidate candidate, RemoteCall *calls, size_t n,
                          size_t *ret_done) {
        RemoteThreadStatus status;
        if (remote_lingers_inside(remote, visit->target))
                return REMOTE_E_BUSY; /* one at a time */
        int r = remote_thread_status(visit->target, candidate.tid, &status);
        if (r != 0)
                return r;
        if (status.tracer)
                return REMOTE_E_TRACED;
        if (!remote_status_is_fit(&status))
                return REMOTE_E_UNFIT;
        if (status.state != 'S' && status.state != 'R')
                return REMOTE_E_BUSY;
        _cleanup_close_ int memfd = fcntl(visit->memfd, F_DUPFD_CLOEXEC, 3);
        if (memfd < 0)
                return -errno;

        _cleanup_(remote_haste_end) RemoteHaste haste = { .boosting = remote };
        remote_haste_begin(&haste);
        remote_boost_begin(remote, candidate.tid);
        _cleanup_(remote_thread_freep) RemoteThread *thread = NULL;
        r = remote_thread_seize(remote, visit->target, candidate.tid, &status, &memfd, &thread);
        if (r != 0)
                return r;
        thread->code = visit->code;
        uint64_t floor = 0, ran = 0;
        size_t done = 0;
        r = stop_in_place(thread, visit, &floor);
        uint64_t interrupted = thread->interrupted_nsec, stood = interrupted ? thread->stopped_nsec : 0;
        if (r == 0 && calls == visit->leftovers && remote_guards(REMOTE_GUARD_LEFT)) {
                remote_visit_look_again(visit);
                n = visit->n_leftovers;
        }
        if (r == 0 && n > 0)
                r = remote_filter_check(thread, visit->target, visit->region, calls, n, false);
        if (r == 0 && n > 0)
                r = remote_enter(thread, floor, visit->region, 0);
        if (r == 0 && n > 0)
                r = remote_run(thread, calls, n, stood, &done, &ran);
        remote_thread_free(TAKE_PTR(thread));
        if (stood) {
                uint64_t detached = now_nsec();
                visit->target->stood_nsec += detached - stood;
                remote_stats_count(&remote->stats, interrupted, stood, detached);
                if (detached - stood > STOP_MAX_NSEC)
                        remote_note_slow(remote, stood, detached);
        }
        if (r != 0)
                return r;
        remote->stats.calls += done;
        if (done >= BATCH_MIN)
                remote->call_nsec = (3 * remote->call_nsec + MAX_OF(ran / done, (uint64_t)50)) / 4;
        *ret_done = done;
        return 0;
}

/* What dead callers left is taken away first. */
static int sweep_and_call(Remote *remote, RemoteVisit *visit, RemoteCandidate candidate, RemoteCall *calls, size_t n,
                          size_t *ret_done) {
        if (visit->n_leftovers > 0) {
                size_t swept;
                int r = call_in_thread(remote, visit, candidate, visit->leftovers, visit->n_leftovers, &swept);
                if (r != 0)
                        return r;
                visit->n_leftovers = 0;
        }
        return call_in_thread(remote, visit, candidate, calls, n, ret_done);
}

/* One after the other, until it is done in one. REMOTE_E_UNFIT: all of them are. */
static int call_in_one_of(Remote *remote, RemoteVisit *visit, const RemoteCandidate *candidates, size_t n_candidates,
                          RemoteUnfit *unfit, RemoteCall *calls, size_t n, size_t *ret_done) {
        bool busy = false;
        for (size_t i = 0; i < n_candidates && unfit->n < ELEMENTSOF(unfit->tids); i++) {
                if (candidates[i].sleep == REMOTE_SLEEP_NONE && !remote_may_be_slow(remote) &&
                    remote_cpus_are_contended(remote, REMOTE_CONTENDED_THREADS) && !remote_boost_works(remote))
                        return REMOTE_E_BUSY;
                int r = sweep_and_call(remote, visit, candidates[i], calls, n, ret_done);
                if (r <= 0 || r == REMOTE_E_LOST || r == REMOTE_E_TRACED || r == REMOTE_E_DENIED)
                        return r;
                if (r == REMOTE_E_GONE && !target_alive(visit->target))
                        return REMOTE_E_GONE;
                if (r == REMOTE_E_UNFIT)
                        unfit->tids[unfit->n++] = candidates[i].tid;
                else
                        busy = true;
        }
        return busy ? REMOTE_E_BUSY : REMOTE_E_UNFIT;
}

static int why_nobody(const Target *target, const RemoteUnfit *unfit) {
        RemoteThreadStatus status;
        if (unfit->n > 0)
                return remote_others_may_be_fit(target, unfit) ? REMOTE_E_BUSY : REMOTE_E_UNFIT;
        int r = remote_thread_status(target, target->pid, &status);
        return r != 0 ? r : status.tracer ? REMOTE_E_TRACED : REMOTE_E_BUSY;
}

static int call_once_somewhere(Remote *remote, Target *target, RemoteCall *calls, size_t n, size_t *ret_done) {
        if (!target_alive(target))
                return REMOTE_E_GONE;
        if (remote_lingers_inside(remote, target))
                return REMOTE_E_BUSY;
        _cleanup_(remote_visit_done) RemoteVisit visit = { .target = target, .memfd = -EBADF, .maps.fd = -EBADF };
        RemoteUnfit unfit = {};
        int r = remote_visit_prepare(target, &visit);
        if (r != 0)
                return r;
        do {
                RemoteCandidate candidates[REMOTE_CANDIDATES];
                size_t n_candidates = 0;
                r = remote_choose(target, &visit.maps, &unfit, candidates, &n_candidates);
                if (r != 0)
                        return r;
                if (n_candidates == 0)
                        return why_nobody(target, &unfit);
                r = call_in_one_of(remote, &visit, candidates, n_candidates, &unfit, calls, n, ret_done);
        } while (r == REMOTE_E_UNFIT && unfit.n < ELEMENTSOF(unfit.tids));
        return r == REMOTE_E_UNFIT ? why_nobody(target, &unfit) : r;
}

static void none_made(RemoteCall *calls, size_t n) {
        for (size_t i = 0; i < n; i++) {
                calls[i].ret = -ECANCELED;
                calls[i].fd = -EBADF;
        }
}

int remote_call_some(Remote *remote, Target *target, RemoteCall *calls, size_t n, size_t *ret_done) {
        size_t batch = (size_t)(REMOTE_RUN_NSEC / remote->call_nsec), made = 0;
        batch = MAX_OF(batch, (size_t)BATCH_MIN);
        batch = MIN_OF(batch, (size_t)REMOTE_BATCH_MAX);
        batch = MIN_OF(batch, n);
        for (size_t i = 0; i < batch; i++)
                if (calls[i].take)
                        batch = i + 1; /* one of them in a stop, and held no longer than need be */
        none_made(calls, batch);
        remote_reap(remote);
        int r = call_once_somewhere(remote, target, calls, batch, &made);
        if (r == 0 && made == 0)
                r = REMOTE_E_LOST; /* somebody wrote into the region: not for ever */
        if (r != 0)
                remote->stats.failures++;
        *ret_done = made;
        return r;
}

int remote_call(Remote *remote, Target *target, RemoteCall *calls, size_t n, size_t *ret_done) {
        size_t done = 0;
        int r = 0;
        none_made(calls, n);
        while (done < n && r == 0) {
                size_t made;
                r = remote_call_some(remote, target, calls + done, n - done, &made);
                done += made;
                if (made > 0 && calls[done - 1].ret < 0 && calls[done - 1].ret >= -4095 && !calls[done - 1].ignore_error)
                        break;
        }
        *ret_done = done;
        return r;
}

int remote_adopt(Remote *remote, Target *target, int *ret_uffd, TargetSkip *ret) {
        RemoteCall calls[2] = {
                { .nr = SYS_prctl, .args = { PR_GET_DUMPABLE } },
                /* Of faults in user mode only: needs no privilege. What we use it for delivers no faults at all. */
                { .nr = SYS_userfaultfd, .args = { O_CLOEXEC | UFFD_USER_MODE_ONLY }, .take = true, .ignore_error = true },
        };
        size_t done;
        int r = remote_call(remote, target, calls, ret_uffd ? 2 : 1, &done);
        if (r != 0)
                return r;
        if (ret_uffd)
                *ret_uffd = calls[1].fd >= 0 ? calls[1].fd : -EBADF;
        *ret = calls[0].ret == 1 ? TARGET_OK : TARGET_SKIP_NOT_DUMPABLE;
        return 0;
}

void remote_stats(const Remote *remote, RemoteStats *ret) { *ret = remote->stats; }
