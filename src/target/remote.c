/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "target/remote-internal.h"

#include "base/clock.h"
#include "base/io.h"

#include <fcntl.h>
#include <linux/seccomp.h>
#include <linux/userfaultfd.h>
#include <sched.h>
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
#define SLOW_STOP_INTERVAL_NSEC (5 * NSEC_PER_SEC)
#define STOP_MAX_NSEC (2 * NSEC_PER_MSEC)
/* Of the 2 ms of a stop this much is for the calls; the rest is for getting in and out. */
#define RUN_BUDGET_NSEC (1100 * NSEC_PER_USEC)
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
        *ret = remote;
        return 0;
}

Remote *remote_free(Remote *remote) {
        if (!remote)
                return NULL;
        uint64_t until = now_nsec() + LINGER_AT_END_NSEC;
        for (;;) {
                remote_reap(remote);
                if (!remote->lingering || now_nsec() >= until)
                        break;
                remote_nap(NSEC_PER_MSEC);
        }
        /* What still lingers is let go by the kernel when we end, and goes home by its frame. */
        while (remote->lingering) {
                RemoteThread *thread = remote->lingering;
                remote->lingering = thread->next;
                safe_close(thread->memfd);
                free(thread->below);
                free(thread);
        }
        free(remote);
        return NULL;
}

static bool lingers_inside(const Remote *remote, const Target *target) {
        for (const RemoteThread *thread = remote->lingering; thread; thread = thread->next)
                if (thread->pid == target->pid)
                        return true;
        return false;
}

/* Nobody executes in this region of a daemon that died: no thread was sent there, or it left for good. A stub that
 * was deserted waits a few milliseconds and goes, but where no CPU is to be had, or its cgroup is frozen, it stays.
 * *ret_held: as in its results. */
static bool is_deserted(const Target *target, int memfd, uint64_t address, uint64_t *ret_held) {
        RemoteHead head;
        RemoteResults results;
        if (pread(memfd, &head, sizeof head, (off_t)address) != sizeof head ||
            pread(memfd, &results, sizeof results, (off_t)(address + REMOTE_REGION_RESULTS_OFFSET)) != sizeof results)
                return false;
        *ret_held = results.held;
        if (head.magic[0] == 0 && head.magic[1] == 0)
                return true;
        return head.magic[0] == REMOTE_MAGIC_0 && head.magic[1] == REMOTE_MAGIC_1 &&
               (!head.armed || results.home || remote_nobody_inside(target));
}

/* Where the region may go, and which ones of earlier stops are in the way. Nobody but us maps anything there. */
static size_t find_leftovers(const Target *target, const RemoteMaps *maps, int memfd,
                             RemoteCall ret[static 2 * REMOTE_REGION_SLOTS], uint64_t *ret_region) {
        size_t n = 0;
        uint64_t region = 0, held;
        for (unsigned slot = 0; slot < REMOTE_REGION_SLOTS; slot++) {
                uint64_t address = REMOTE_REGION_BASE + slot * REMOTE_REGION_STRIDE;
                RemoteMap map;
                if (!remote_maps_find(maps, address, &map)) {
                        if (!region)
                                region = address;
                } else if (map.start == address && map.exec && !map.write && !map.shared && !map.inode &&
                           is_deserted(target, memfd, address, &held)) {
                        if (held && remote_held_is_fresh(target->pid, held - 1))
                                ret[n++] = (RemoteCall){.nr = SYS_close, .args = {held - 1}, .ignore_error = true};
                        ret[n++] = (RemoteCall){.nr = SYS_munmap, .args = {address, REMOTE_REGION_BYTES}};
                }
        }
        *ret_region = region;
        return n;
}

/* Everything that can be prepared before a thread stands. */
typedef struct Visit {
        Target *target;
        int memfd;
        RemoteMaps maps;
        RemoteCode code;
        uint64_t region;
        RemoteCall leftovers[2 * REMOTE_REGION_SLOTS];
        size_t n_leftovers;
} Visit;

static void visit_done(Visit *visit) {
        safe_close(visit->memfd);
        remote_maps_done(&visit->maps);
}

static int visit_prepare(Remote *remote, Target *target, Visit *visit) {
        /* The memory first: if the process executes something else meanwhile, this descriptor is dead and we notice. */
        visit->memfd = openat(target->procfd, "mem", O_RDWR | O_CLOEXEC);
        if (visit->memfd < 0)
                return errno == ENOENT || errno == ESRCH ? REMOTE_E_GONE :
                       errno == EACCES || errno == EPERM ? REMOTE_E_DENIED : -errno;
        int r = remote_maps_open(target, &visit->maps);
        if (r != 0)
                return r;
        RemoteCodeCache *cached = &remote->codes[(uint32_t)target->pid % ELEMENTSOF(remote->codes)];
        if (cached->pid != target->pid || cached->start_ticks != target->start_ticks ||
            !remote_code_verify(visit->memfd, &cached->code)) {
                r = remote_code_find(target, visit->memfd, &visit->code);
                if (r != 0)
                        return r;
                *cached = (RemoteCodeCache){target->pid, target->start_ticks, visit->code};
        } else
                visit->code = cached->code;
        visit->n_leftovers = find_leftovers(target, &visit->maps, visit->memfd, visit->leftovers, &visit->region);
        return visit->region ? 0 : REMOTE_E_BUSY;
}

/* Is the thread, as it stands, in a place where our calls can do no harm? */
static int check_place(RemoteThread *thread, const Visit *visit, uint64_t *ret_floor) {
        uint64_t thread_pointer;
        int r = remote_arch_get_regs(thread->tid, &thread->regs);
        if (r == 0)
                r = remote_arch_thread_pointer(thread->tid, &thread->regs, &thread_pointer);
        /* Before anything else: from here on the call is restarted even if we die. */
        if (r == 0 && remote_guards(REMOTE_GUARD_EINTR) && remote_arch_repair(&thread->regs))
                r = remote_arch_set_regs(thread->tid, &thread->regs);
        if (r < 0)
                return r == -ESRCH ? remote_thread_gone(thread) : r;
        if (!remote_arch_fit(thread->tid, &thread->regs))
                return REMOTE_E_UNFIT;
        if (remote_region_has(remote_arch_pc(&thread->regs)))
                return REMOTE_E_BUSY; /* a dead caller's stub, on its way home */
        uint64_t floor = remote_stack_floor(thread->memfd, &visit->maps, thread->tid == visit->target->pid,
                                            remote_arch_sp(&thread->regs), thread_pointer);
        if (!floor || !remote_code_verify(thread->memfd, &visit->code))
                return REMOTE_E_BUSY;
        *ret_floor = floor;
        return 0;
}

/* sched_setattr(2), first version: linux/sched/types.h and sched.h cannot be included together. */
typedef struct SchedAttr {
        uint32_t size, policy;
        uint64_t flags;
        int32_t nice;
        uint32_t priority;
        uint64_t runtime, deadline, period;
} SchedAttr;
_Static_assert(sizeof(SchedAttr) == 48, "SCHED_ATTR_SIZE_VER0");

/* While a thread stands it is we who keep it waiting: ours is the next turn on the CPU, and a nap ends on time. We
 * never spin meanwhile, so nobody is kept from running. Refused without CAP_SYS_NICE: then it just takes longer. */
typedef struct Haste {
        SchedAttr before;
        long slack_nsec;
        bool scheduled;
} Haste;

static void haste_begin(Haste *haste) {
        haste->slack_nsec = prctl(PR_GET_TIMERSLACK);
        if (haste->slack_nsec > 0)
                prctl(PR_SET_TIMERSLACK, 1);
        if (syscall(SYS_sched_getattr, 0, &haste->before, sizeof haste->before, 0) < 0)
                return;
        SchedAttr first = {
                .size = sizeof first,
                .policy = SCHED_FIFO,
                .flags = haste->before.flags,
                .priority = 1,
        };
        haste->scheduled = syscall(SYS_sched_setattr, 0, &first, 0) == 0;
}

static void haste_end(Haste *haste) {
        if (haste->scheduled)
                (void)syscall(SYS_sched_setattr, 0, &haste->before, 0);
        if (haste->slack_nsec > 0)
                prctl(PR_SET_TIMERSLACK, haste->slack_nsec);
}

/* A thread that has to wait for a CPU stands for as long at each resume. That is done only as often as leaves the 99th
 * percentile of all stops alone, or now and then where nothing else is to be had. */
static bool may_be_slow(const Remote *remote) {
        return remote->slow_stops * 200 <= remote->stats.stops ||
               now_nsec() - remote->slow_stop_nsec > SLOW_STOP_INTERVAL_NSEC;
}

/* More threads want to run than there are CPUs: one that runs now will have to wait once it stood. */
static bool cpus_are_contended(void) {
        _cleanup_free_ char *text = NULL;
        unsigned running;
        return read_file(AT_FDCWD, "/proc/loadavg", &text, NULL) == 0 &&
               sscanf(text, "%*s %*s %*s %u", &running) == 1 && running > 4U * (unsigned)sysconf(_SC_NPROCESSORS_ONLN);
}

/* Makes a thread stand where it may be used. */
static int stop_in_place(RemoteThread *thread, const Visit *visit, uint64_t *ret_floor) {
        for (unsigned try = 0;; try++) {
                uint64_t interrupted = now_nsec();
                int r = remote_thread_stop(thread, STOP_WAIT_NSEC);
                if (r != 0)
                        return r;
                remote_step(REMOTE_STEP_STOPPED);
                thread->interrupted_nsec = interrupted;
                r = check_place(thread, visit, ret_floor);
                if (r != 0)
                        return r;
                /* Every resume of it would wait as long for a CPU again. It stood for nothing, but only for a moment. */
                if (thread->stopped_nsec - interrupted > REACH_PATIENCE_NSEC && !may_be_slow(thread->remote))
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

/* Stops one thread and makes what fits of the calls. */
static int call_in_thread(Remote *remote, Visit *visit, RemoteCandidate candidate, RemoteCall *calls, size_t n,
                          size_t *ret_done) {
        RemoteThreadStatus status;
        int r = remote_thread_status(visit->target, candidate.tid, &status);
        if (r != 0)
                return r;
        if (status.tracer)
                return REMOTE_E_TRACED;
        if (status.shadow_stack || (status.seccomp == SECCOMP_MODE_STRICT && remote_guards(REMOTE_GUARD_FILTER)))
                return REMOTE_E_UNFIT;
        if (status.state != 'S' && status.state != 'R')
                return REMOTE_E_BUSY;
        _cleanup_close_ int memfd = fcntl(visit->memfd, F_DUPFD_CLOEXEC, 3);
        if (memfd < 0)
                return -errno;

        _cleanup_(haste_end) Haste haste = {};
        haste_begin(&haste);
        _cleanup_(remote_thread_freep) RemoteThread *thread = NULL;
        r = remote_thread_seize(remote, visit->target, candidate.tid, &status, &memfd, &thread);
        if (r != 0)
                return r;
        thread->code = visit->code;
        uint64_t floor = 0, ran = 0;
        size_t done = 0;
        r = stop_in_place(thread, visit, &floor);
        uint64_t interrupted = thread->interrupted_nsec, stood = thread->stopped_nsec;
        if (r == 0 && thread->seccomp && remote_guards(REMOTE_GUARD_FILTER))
                r = remote_filter_check(thread, visit->region, calls, n);
        if (r == 0)
                r = remote_enter(thread, floor, visit->region);
        if (r == 0)
                r = remote_run(thread, calls, n, stood + RUN_BUDGET_NSEC, &done, &ran);
        remote_thread_free(TAKE_PTR(thread));
        if (stood) {
                uint64_t detached = now_nsec();
                remote_stats_count(&remote->stats, interrupted, stood, detached);
                if (detached - stood > STOP_MAX_NSEC) {
                        remote->slow_stops++;
                        remote->slow_stop_nsec = detached;
                }
        }
        if (r != 0)
                return r;
        remote->stats.calls += done;
        if (done >= BATCH_MIN)
                remote->call_nsec = (3 * remote->call_nsec + MAX_OF(ran / done, (uint64_t)50)) / 4;
        *ret_done = done;
        return 0;
}

static int call_once_somewhere(Remote *remote, Target *target, RemoteCall *calls, size_t n, size_t *ret_done) {
        if (!target_alive(target))
                return REMOTE_E_GONE;
        if (lingers_inside(remote, target))
                return REMOTE_E_BUSY;
        _cleanup_(visit_done) Visit visit = {.target = target, .memfd = -EBADF, .maps.fd = -EBADF};
        RemoteCandidate candidates[REMOTE_CANDIDATES];
        size_t n_candidates = 0;
        int r = visit_prepare(remote, target, &visit);
        if (r == 0)
                r = remote_choose(target, &visit.maps, candidates, &n_candidates);
        if (r != 0)
                return r;
        if (n_candidates == 0) {
                RemoteThreadStatus status;
                r = remote_thread_status(target, target->pid, &status);
                return r != 0 ? r : status.tracer ? REMOTE_E_TRACED : REMOTE_E_BUSY;
        }
        for (size_t i = 0; i < n_candidates; i++) {
                if (candidates[i].sleep == REMOTE_SLEEP_NONE && !may_be_slow(remote) && cpus_are_contended())
                        break;
                if (visit.n_leftovers > 0) {
                        size_t swept;
                        r = call_in_thread(remote, &visit, candidates[i], visit.leftovers, visit.n_leftovers, &swept);
                        if (r == 0)
                                visit.n_leftovers = 0;
                } else
                        r = 0;
                if (r == 0)
                        r = call_in_thread(remote, &visit, candidates[i], calls, n, ret_done);
                if (r <= 0 || r == REMOTE_E_LOST || r == REMOTE_E_TRACED || r == REMOTE_E_UNFIT || r == REMOTE_E_DENIED)
                        return r;
                if (r == REMOTE_E_GONE && !target_alive(target))
                        return REMOTE_E_GONE;
        }
        return REMOTE_E_BUSY;
}

int remote_call(Remote *remote, Target *target, RemoteCall *calls, size_t n, size_t *ret_done) {
        size_t done = 0;
        int r = 0;
        for (size_t i = 0; i < n; i++) {
                calls[i].ret = -ECANCELED;
                calls[i].fd = -EBADF;
        }
        while (done < n && r == 0) {
                size_t batch = (size_t)(RUN_BUDGET_NSEC / remote->call_nsec), made = 0;
                batch = MAX_OF(batch, (size_t)BATCH_MIN);
                batch = MIN_OF(batch, (size_t)REMOTE_BATCH_MAX);
                batch = MIN_OF(batch, n - done);
                for (size_t i = 0; i < batch; i++)
                        if (calls[done + i].take)
                                batch = i + 1; /* one of them in a stop, and held no longer than need be */
                remote_reap(remote);
                r = call_once_somewhere(remote, target, calls + done, batch, &made);
                if (r != 0)
                        remote->stats.failures++;
                done += made;
                if (made > 0 && calls[done - 1].ret < 0 && calls[done - 1].ret >= -4095 && !calls[done - 1].ignore_error)
                        break;
        }
        *ret_done = done;
        return r;
}

int remote_adopt(Remote *remote, Target *target, int *ret_uffd, TargetSkip *ret) {
        RemoteCall calls[2] = {
                {.nr = SYS_prctl, .args = {PR_GET_DUMPABLE}},
                /* Of faults in user mode only: needs no privilege. What we use it for delivers no faults at all. */
                {.nr = SYS_userfaultfd, .args = {O_CLOEXEC | UFFD_USER_MODE_ONLY}, .take = true, .ignore_error = true},
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
