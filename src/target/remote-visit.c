/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "target/remote-internal.h"

#include "base/clock.h"
#include "base/io.h"

#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <sys/prctl.h>
#include <sys/syscall.h>

/*
 * What every visit of a target has in common, whether a batch of calls or a transaction: what is prepared before a
 * thread stands (its memory, where our region may lie and what of dead callers' is in the way, the borrowed code), the
 * look at where a thread stands, and making haste while it does.
 */
#define SLOW_STOP_INTERVAL_NSEC (5 * NSEC_PER_SEC)
#define INSISTENCE_SHARE 16U /* slow stops take one part in so many of the time */

bool remote_lingers_inside(const Remote *remote, const Target *target) {
        for (const RemoteThread *thread = remote->threads; thread; thread = thread->next)
                if (thread->lingers && thread->pid == target->pid)
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
               (!head.armed || remote_nobody_inside(target) ||
                (results.home && (!head.holds || results.parked == 0) && !remote_anybody_leaves(target)));
}

/* Where the region may go, and which ones of earlier stops are in the way. Nobody but us maps anything there. */
static size_t find_leftovers(const Target *target, const RemoteMaps *maps, int memfd,
                             RemoteCall ret[static 2 * REMOTE_REGION_SLOTS], uint64_t *ret_region) {
        size_t n = 0;
        uint64_t region = 0, held;
        RemoteMap map = {};
        bool more = true; /* something is mapped there or above: one question for all the slots that are empty */
        for (unsigned slot = 0; slot < REMOTE_REGION_SLOTS; slot++) {
                uint64_t address = REMOTE_REGION_BASE + slot * REMOTE_REGION_STRIDE;
                if (more && map.end <= address)
                        more = remote_maps_find_or_next(maps, address, &map);
                if (!more || map.start > address) {
                        if (!region)
                                region = address;
                } else if (map.start == address && map.exec && !map.write && !map.shared && !map.inode &&
                           is_deserted(target, memfd, address, &held)) {
                        if (held && remote_held_is_fresh(target->pid, held - 1))
                                ret[n++] = (RemoteCall){ .nr = SYS_close, .args = { held - 1 }, .ignore_error = true };
                        ret[n++] = (RemoteCall){ .nr = SYS_munmap, .args = { address, REMOTE_REGION_STRIDE } };
                }
        }
        *ret_region = region;
        return n;
}

void remote_visit_look_again(RemoteVisit *visit) {
        uint64_t region;

        visit->n_leftovers = find_leftovers(visit->target, &visit->maps, visit->memfd, visit->leftovers, &region);
}

void remote_visit_done(RemoteVisit *visit) {
        safe_close(visit->memfd);
        remote_maps_done(&visit->maps);
}

int remote_visit_prepare(Target *target, RemoteVisit *visit) {
        /* The memory first: if the process executes something else meanwhile, this descriptor is dead and we notice. */
        visit->memfd = openat(target->procfd, "mem", O_RDWR | O_CLOEXEC);
        if (visit->memfd < 0)
                return errno == ENOENT || errno == ESRCH ? REMOTE_E_GONE :
                       errno == EACCES || errno == EPERM ? REMOTE_E_DENIED : -errno;
        int r = remote_maps_open(target, &visit->maps);
        if (r != 0)
                return r;
        if (!remote_code_verify(visit->memfd, &target->code)) {
                r = remote_code_find(target, visit->memfd, &target->code);
                if (r != 0)
                        return r;
        }
        visit->code = target->code;
        visit->n_leftovers = find_leftovers(target, &visit->maps, visit->memfd, visit->leftovers, &visit->region);
        return visit->region ? 0 : REMOTE_E_BUSY;
}

/* Is the thread, as it stands, in a place where our calls can do no harm? */
int remote_visit_check(RemoteThread *thread, const RemoteVisit *visit, uint64_t *ret_floor) {
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

/* While a thread stands it is we who keep it waiting: ours is the next turn on the CPU, and a nap ends on time. We
 * never spin meanwhile, so nobody is kept from running. Refused without CAP_SYS_NICE: then it just takes longer. */
void remote_haste_begin(RemoteHaste *haste) {
        haste->slack_nsec = prctl(PR_GET_TIMERSLACK);
        if (haste->slack_nsec > 0)
                prctl(PR_SET_TIMERSLACK, 1);
        if (syscall(SYS_sched_getattr, 0, &haste->before, sizeof haste->before, 0) < 0)
                return;
        SchedAttr first = {
                .size = sizeof first,
                .policy = SCHED_FIFO,
                .flags = haste->before.flags,
                .priority = REMOTE_BOOST_PRIORITY + 1, /* before a stub that waits for us */
        };
        haste->scheduled = syscall(SYS_sched_setattr, 0, &first, 0) == 0;
}

void remote_haste_end(RemoteHaste *haste) {
        if (haste->boosting)
                remote_boost_end(haste->boosting);
        if (haste->scheduled)
                (void)syscall(SYS_sched_setattr, 0, &haste->before, 0);
        if (haste->slack_nsec > 0)
                prctl(PR_SET_TIMERSLACK, haste->slack_nsec);
}

void remote_note_slow(Remote *remote, uint64_t stood, uint64_t detached) {
        remote->slow_stops++;
        remote->slow_stop_nsec = detached;
        remote->slow_stop_took_nsec = detached - stood;
}

/* A thread that has to wait for a CPU stands for as long at each resume. That is done only as often as leaves the 99th
 * percentile of all stops alone, or now and then where nothing else is to be had; who insists gets it as often as
 * leaves the target most of the time. */
bool remote_may_be_slow(const Remote *remote) {
        uint64_t interval = SLOW_STOP_INTERVAL_NSEC;

        if (remote->insists && remote_guards(REMOTE_GUARD_INSIST))
                interval = MIN_OF(interval, (INSISTENCE_SHARE - 1) * remote->slow_stop_took_nsec);
        return remote->slow_stops * 200 <= remote->stats.stops || now_nsec() - remote->slow_stop_nsec > interval;
}

void remote_insist(Remote *remote, bool insist) { remote->insists = insist; }

bool remote_cpus_are_contended(const Remote *remote, unsigned threads) {
        _cleanup_free_ char *text = NULL;
        unsigned running;
        return read_file(AT_FDCWD, "/proc/loadavg", &text, NULL) == 0 &&
               sscanf(text, "%*s %*s %*s %u", &running) == 1 &&
               running > threads * remote->n_cpus;
}
