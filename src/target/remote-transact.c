/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "target/remote-internal.h"

#include "base/clock.h"

#include <fcntl.h>
#include <string.h>
#include <sys/syscall.h>

/*
 * A transaction: all threads of a process stand, one of them runs a program to its end (remote-program.h). On top of
 * what holds for every remote call (remote-inject.c) this must always hold:
 *
 *   - A program that was begun is never called back. Whatever becomes of us or of our patience, its thread runs on in the
 *     stub until the program's own end, and goes home from there by its frame. Only before its first instruction and
 *     after its last do we put registers back.
 *   - So every call of the program has to work without us: where a seccomp filter does not allow one, which it is asked for
 *     all of them beforehand, nothing is begun.
 *   - Nothing is waited for in the program but our answers, and for them not longer than the stub would wait at its end.
 */
#define PATIENCE_NSEC (1500 * NSEC_PER_USEC)
#define RUN_NSEC (1100 * NSEC_PER_USEC)
#ifdef REMOTE_TEST
#define PROGRAM_WAIT_NSEC remote_test_program_wait_nsec
#else
#define PROGRAM_WAIT_NSEC NSEC_PER_SEC
#endif
#define STOP_LONG_NSEC (2 * NSEC_PER_MSEC)

static uint64_t words_at(const RemoteThread *thread) { return thread->region + REMOTE_REGION_WORDS_OFFSET; }

static int write_program(RemoteThread *thread, const RemoteProgram *program, size_t n_threads) {
        _cleanup_free_ uint8_t *text = calloc(1, REMOTE_REGION_HEAD_BYTES);
        if (!text)
                return -ENOMEM;
        RemoteHead *head = remote_head_write(thread, text);
        head->program = 1;
        if (program->holds && n_threads > 1) { /* others may be waiting in it when the stub goes home alone */
                head->holds = 1;
                head->unmap = 0;
        }
        const struct {
                const void *data;
                size_t size;
                uint64_t offset;
        } parts[] = {
                { text, REMOTE_REGION_HEAD_BYTES, 0 },
                { program->ops, program->n_ops * sizeof *program->ops, REMOTE_REGION_CALLS_OFFSET },
                { program->words, program->n_words * sizeof *program->words, REMOTE_REGION_WORDS_OFFSET },
        };
        int r = 0;
        for (size_t i = 0; i < ELEMENTSOF(parts) && r == 0; i++)
                if (parts[i].size > 0)
                        r = remote_write(thread, parts[i].data, parts[i].size, thread->region + parts[i].offset);
        return r;
}

static int read_words(const RemoteThread *thread, RemoteProgram *program) {
        size_t size = program->n_words * sizeof *program->words;
        return pread(thread->memfd, program->words, size, (off_t)words_at(thread)) == (ssize_t)size ? 0 : REMOTE_E_LOST;
}

/* The stub waits for us. Whatever we fail in, it is told so, or finds out by itself. */
static int answer(RemoteThread *thread, RemoteProgram *program, const Target *target, uint64_t question) {
        uint64_t refused = 1;
        remote_step(REMOTE_STEP_ASKED);
        if (question <= program->n_questions && read_words(thread, program) == 0) {
                refused = 0;
                for (unsigned i = 0; i < program->n_asks && !refused; i++)
                        if (program->asks[i].question == question)
                                refused = program->asks[i].answer(program->asks[i].userdata, program, target) != 0;
                if (!refused && program->n_words > 0 &&
                    remote_write(thread, program->words, program->n_words * sizeof *program->words, words_at(thread)) != 0)
                        return REMOTE_E_LOST;
        }
        if (remote_write(thread, &refused, sizeof refused, thread->region + offsetof(RemoteHead, refused)) != 0 ||
            remote_write(thread, &question, sizeof question, thread->region + offsetof(RemoteHead, answered)) != 0)
                return REMOTE_E_LOST;
        remote_step(REMOTE_STEP_ANSWERED);
        return 0;
}

/* Until the program has ended. How long it may go on is known once its first question is answered: until then the other
 * threads are parked, of which each takes its time. */
static int attend(RemoteThread *thread, RemoteProgram *program, const Target *target, uint64_t stood_nsec,
                  uint64_t run_nsec, uint64_t expect_nsec, uint64_t *ret_ran_nsec) {
        uint64_t deadline_nsec = program->n_questions > 0 ? UINT64_MAX : remote_run_deadline(stood_nsec, run_nsec);
        uint64_t results_at = thread->region + REMOTE_REGION_RESULTS_OFFSET, started = now_nsec(), answered = 0;
        uint64_t quiet_since = started, begun = started;
        for (bool told = false;;) {
                RemoteResults results;
                if (pread(thread->memfd, &results, sizeof results, (off_t)results_at) != sizeof results)
                        return REMOTE_E_LOST;
                if (results.done) {
                        *ret_ran_nsec = now_nsec() - begun;
                        return 0;
                }
                int r = remote_tend(thread);
                if (r != 0)
                        return r;
                uint64_t now = now_nsec();
                if (now - started > PROGRAM_WAIT_NSEC)
                        return REMOTE_E_LOST;
                if (results.asked && results.asked != answered) {
                        r = answer(thread, program, target, results.asked);
                        if (r != 0)
                                return r;
                        if (!answered) {
                                begun = now;
                                deadline_nsec = remote_run_deadline(stood_nsec, run_nsec);
                        }
                        answered = results.asked;
                        quiet_since = now;
                }
                if (!told && now >= deadline_nsec) {
                        const uint64_t yes = 1;
                        (void)remote_write(thread, &yes, sizeof yes, thread->region + offsetof(RemoteHead, stop));
                        told = true;
                }
                uint64_t pause = MAX_OF((now - quiet_since) / 8, 5 * NSEC_PER_USEC);
                pause = MIN_OF(pause, 100 * NSEC_PER_USEC);
                if (answered == program->n_questions && begun + expect_nsec > now + pause) {
                        pause = MIN_OF((begun + expect_nsec - now) / 4 * 3,
                                       deadline_nsec > now ? deadline_nsec - now : pause);
                        expect_nsec = 0;
                }
                remote_nap(pause);
        }
}

bool remote_in_program(const RemoteThread *thread) {
        RemoteRegs regs;
        uint64_t done;
        if (!thread->program || !remote_guards(REMOTE_GUARD_WHOLE))
                return false;
        if (remote_arch_get_regs(thread->tid, &regs) < 0 || remote_arch_cookie(&regs) != thread->cookie ||
            !remote_region_has(remote_arch_pc(&regs)))
                return false; /* at its borrowed call, before or after; or gone home */
        off_t results = (off_t)(thread->region + REMOTE_REGION_RESULTS_OFFSET);
        return pread(thread->memfd, &done, sizeof done, results) != sizeof done || !done;
}

static int run(RemoteThread *thread, const Target *target, RemoteTransaction *transaction, uint64_t stood_nsec) {
        RemoteProgram *program = transaction->program;
        int r = write_program(thread, program, transaction->threads);
        if (r != 0)
                return r;
        remote_step(REMOTE_STEP_PROGRAM);
        thread->program = true;
        r = remote_launch(thread, 0);
        if (r == 0)
                r = attend(thread, program, target, stood_nsec, transaction->run_nsec ? transaction->run_nsec : RUN_NSEC,
                           transaction->expect_nsec, &transaction->ran_nsec);
        if (r == 0)
                r = read_words(thread, program);
        remote_step(REMOTE_STEP_DONE);
        if (r != 0)
                return r == REMOTE_E_GONE ? r : REMOTE_E_LOST;
        /* It waits for us. What happens to it now cannot undo what was done. */
        thread->program = false;
        if (!thread->stopped)
                (void)remote_thread_stop(thread, REMOTE_STEP_NSEC);
        return 0;
}

static int check_filters(RemoteThread *thread, const RemoteVisit *visit, const RemoteProgram *program) {
        _cleanup_free_ RemoteCall *calls = calloc(program->n_ops, sizeof *calls);
        size_t n = 0;
        if (!calls)
                return -ENOMEM;
        for (unsigned i = 0; i < program->n_ops; i++)
                n += remote_program_call_at(program, i, visit->region, &calls[n]);
        return remote_filter_check(thread, visit->target, visit->region, calls, n, true);
}

/* refused: by its filters; NULL: nobody was yet. */
static int try_out(RemoteThread *thread, const RemoteVisit *visit, const RemoteProgram *program, const RemoteThread *refused,
               uint64_t *ret_floor) {
        thread->memfd = fcntl(visit->memfd, F_DUPFD_CLOEXEC, 3);
        if (thread->memfd < 0)
                return -errno;
        thread->code = visit->code;
        int r = remote_visit_check(thread, visit, ret_floor);
        if (r != 0)
                return r;
        if (remote_thread_in_rseq(thread, remote_arch_pc(&thread->regs)))
                return REMOTE_E_BUSY;
        if (refused && remote_filters_alike(thread, refused))
                return REMOTE_E_UNFIT;
        return check_filters(thread, visit, program);
}

/* Of the standing threads, one that may be used. REMOTE_E_UNFIT: none of them ever may. */
static int pick(RemoteCrowd *crowd, const RemoteVisit *visit, const RemoteCandidate *candidates, size_t n,
                const RemoteProgram *program, RemoteThread **ret, uint64_t *ret_floor) {
        bool busy = false, unfit = false;
        const RemoteThread *refused = NULL;
        for (size_t i = 0; i < n + crowd->n; i++) {
                pid_t tid = i < n ? candidates[i].tid : crowd->threads[i - n]->tid;
                RemoteThread *thread = remote_crowd_find(crowd, tid);
                if (!thread || thread->memfd >= 0)
                        continue; /* ended, or tried already */
                if ((unfit || busy) && remote_crowd_is_impatient(crowd))
                        return REMOTE_E_BUSY; /* all stand meanwhile */
                int r = try_out(thread, visit, program, refused, ret_floor);
                if (r == 0) {
                        *ret = thread;
                        return 0;
                }
                if (r < 0 || r == REMOTE_E_DENIED)
                        return r;
                unfit |= r == REMOTE_E_UNFIT;
                busy |= r == REMOTE_E_BUSY;
                if (thread->n_filters > 0)
                        refused = thread;
        }
        return unfit && !busy ? REMOTE_E_UNFIT : REMOTE_E_BUSY;
}

/* What dead callers left is taken away first, in a visit of its own. */
static int prepare(Remote *remote, Target *target, RemoteVisit *visit) {
        for (unsigned try = 0;; try++) {
                int r = remote_visit_prepare(target, visit);
                if (r != 0 || visit->n_leftovers == 0 || try > 0)
                        return r;
                RemoteCall nothing = { .nr = SYS_getppid };
                size_t done;
                remote_visit_done(visit);
                visit->memfd = -EBADF;
                r = remote_call(remote, target, &nothing, 1, &done);
                if (r != 0)
                        return r;
        }
}

static int transact(Remote *remote, Target *target, RemoteTransaction *transaction, RemoteCrowd *crowd) {
        _cleanup_(remote_visit_done) RemoteVisit visit = { .target = target, .memfd = -EBADF, .maps.fd = -EBADF };
        RemoteCandidate candidates[REMOTE_CANDIDATES];
        size_t n_candidates = 0;
        int r = prepare(remote, target, &visit);
        if (r == 0)
                r = remote_choose(target, &visit.maps, &(RemoteUnfit){}, candidates, &n_candidates);
        if (r != 0)
                return r;
        if (n_candidates > 0 && candidates[0].sleep == REMOTE_SLEEP_NONE && !remote_may_be_slow(remote) &&
            remote_guards(REMOTE_GUARD_CALM) && remote_cpus_are_contended(remote, REMOTE_CONTENDED_THREADS))
                return REMOTE_E_BUSY;
        pid_t only = remote_guards(REMOTE_GUARD_CROWD) ? 0 : n_candidates > 0 ? candidates[0].tid : target->pid;
        r = remote_crowd_stop(remote, target, only, crowd);
        if (r != 0)
                return r;
        transaction->threads = crowd->n;
        transaction->workers = crowd->n_workers;
        if (transaction->on_standing)
                transaction->on_standing(transaction->userdata);

        RemoteThread *chosen = NULL;
        uint64_t floor = 0;
        r = pick(crowd, &visit, candidates, n_candidates, transaction->program, &chosen, &floor);
        if (r == 0)
                remote_boost_begin(remote, chosen->tid); /* all the others wait for what it does */
        if (r == 0)
                r = remote_enter(chosen, floor, visit.region, transaction->program->holds ? crowd->n - 1 : 0);
        if (r == 0) {
                transaction->program->crowd = crowd;
                transaction->program->runner = chosen;
                r = run(chosen, target, transaction, crowd->stood_nsec);
                remote_crowd_unpark(crowd, chosen, r == REMOTE_E_LOST);
        }
        return r;
}

int remote_transact(Remote *remote, Target *target, RemoteTransaction *transaction) {
        int r = remote_program_finish(transaction->program);
        if (r < 0)
                return r;
        remote_reap(remote);
        if (!target_alive(target))
                return REMOTE_E_GONE;
        if (remote_lingers_inside(remote, target))
                return REMOTE_E_BUSY;
        RemoteCrowd crowd = {
                .patience_nsec = transaction->patience_nsec ? transaction->patience_nsec : PATIENCE_NSEC,
                .n_max = transaction->program->holds ? REMOTE_PARKED_MAX : SIZE_MAX,
        };
        transaction->threads = transaction->workers = 0;
        transaction->stop_nsec = transaction->ran_nsec = 0;
        {
                _cleanup_(remote_haste_end) RemoteHaste haste = { .boosting = remote };
                remote_haste_begin(&haste);
                r = transact(remote, target, transaction, &crowd);
                uint64_t interrupted = crowd.interrupted_nsec, stood = crowd.stood_nsec;
                remote_crowd_done(&crowd);
                if (stood) {
                        uint64_t detached = now_nsec();
                        transaction->stop_nsec = detached - stood;
                        target->stood_nsec += detached - stood;
                        remote_stats_count(&remote->stats, MIN_OF(interrupted, stood), stood, detached);
                        if (detached - stood > STOP_LONG_NSEC)
                                remote_note_slow(remote, stood, detached);
                }
        }
        if (r != 0)
                remote->stats.failures++;
        return r;
}
