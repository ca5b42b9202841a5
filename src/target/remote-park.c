/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "target/remote-internal.h"

#include <string.h>
#include <sys/ptrace.h>

/*
 * The other threads, while one of them runs a program that must not be disturbed. They stand because we trace them;
 * when we die the kernel lets them go, and the program, which maps over addresses that it was told of, would meet
 * whatever they map there. So each is given registers that make it wait, in the region of the one that runs, for the
 * end of the program (remote_stub_park), and a signal frame in which all of it is kept: living, we put everything back
 * and the thread never knows, for it does not run meanwhile. Dead, it waits, and goes home by its frame.
 *
 * The frames lie behind the region, not on the threads' stacks: so it does not matter what these are. The order is that
 * of every remote call: frame, registers, mask going in; mask, registers going out.
 *
 * What always holds: a thread is parked only while the one that runs the program waits for our answer (it gives up on
 * us after a while, and then ends the program without having begun), so the end of the program always comes. The stub
 * that goes home alone leaves the region, which others may be in; the next visit takes it away when none is.
 */
#ifdef REMOTE_TEST
uint64_t remote_test_vector_bytes;
#define VECTOR_BYTES remote_test_vector_bytes
#else
#define VECTOR_BYTES 0
#endif

uint64_t remote_park_bytes(const RemoteThread *runner) {
        return ROUND_UP(runner->below_size + VECTOR_BYTES + 256, (uint64_t)64);
}

static int count(const RemoteThread *runner, uint64_t parked) {
        return remote_write(runner, &parked, sizeof parked,
                            runner->region + REMOTE_REGION_RESULTS_OFFSET + offsetof(RemoteResults, parked));
}

static int park(RemoteThread *thread, RemoteThread *runner, uint64_t nth, uint8_t *frame) {
        uint64_t bytes = remote_park_bytes(runner), slot = runner->region + REMOTE_REGION_BYTES + nth * bytes;
        size_t size;
        int r = remote_arch_get_regs(thread->tid, &thread->regs);
        if (r == 0)
                r = remote_mask_get(thread->tid, &thread->mask);
        if (r == -ESRCH)
                return remote_thread_gone(thread);
        if (r < 0)
                return r;
        if (!remote_arch_fit(thread->tid, &thread->regs))
                return REMOTE_E_UNFIT;
        if (remote_guards(REMOTE_GUARD_FILTER) && (r = remote_filter_check_return(thread, runner)) != 0)
                return r;
        if (remote_region_has(remote_arch_pc(&thread->regs)))
                return REMOTE_E_BUSY; /* a dead caller's */
        int own = thread->memfd;
        thread->memfd = runner->memfd;
        bool in_rseq = remote_thread_in_rseq(thread, remote_arch_pc(&thread->regs));
        thread->memfd = own;
        if (in_rseq)
                return REMOTE_E_BUSY; /* the kernel owes it an abort, which a thread that waits elsewhere would not get */
        r = remote_arch_frame_below(thread->tid, &thread->regs, thread->mask, runner->code.sigreturn, slot + bytes, frame,
                                    &thread->frame, &size);
        if (r < 0)
                return r == -ESRCH ? remote_thread_gone(thread) : r;
        if (thread->frame < slot)
                return REMOTE_E_BUSY; /* it uses more vector state than the one that runs */
        r = remote_write(runner, frame, size, thread->frame);
        if (r == 0)
                r = count(runner, nth + 1);
        if (r != 0)
                return r;
        RemoteRegs regs = thread->regs;
        remote_arch_aim_park(&regs, runner->region, thread->frame);
        r = remote_arch_set_regs(thread->tid, &regs);
        if (r == 0) {
                thread->stage = REMOTE_STAGE_PARKED;
                remote_step(REMOTE_STEP_PARK_REGS);
                r = remote_mask_set(thread->tid, UINT64_MAX);
        }
        return r == -ESRCH ? remote_thread_gone(thread) : r;
}

int remote_crowd_park(RemoteCrowd *crowd, RemoteThread *runner) {
        _cleanup_free_ uint8_t *frame = malloc(REMOTE_ARCH_FRAME_MAX);
        uint64_t nth = 0;
        if (!frame)
                return -ENOMEM;
        for (size_t i = 0; i < crowd->n; i++) {
                if (crowd->threads[i] == runner)
                        continue;
                int r = park(crowd->threads[i], runner, nth++, frame);
                if (r != 0)
                        return r;
        }
        remote_step(REMOTE_STEP_PARKED);
        return 0;
}

int remote_unpark(RemoteThread *thread) {
        int r = remote_mask_set(thread->tid, thread->mask);
        remote_step(REMOTE_STEP_MASK_BACK);
        if (r == 0)
                r = remote_arch_set_regs(thread->tid, &thread->regs);
        if (r < 0)
                return r == -ESRCH ? remote_thread_gone(thread) : r;
        thread->stage = REMOTE_STAGE_SEIZED;
        return 0;
}

/* Whom we take back does not count itself out. The others need the region for as long as they have not come to a CPU,
 * even if the program has ended by then and the one that ran it is taken back. */
void remote_crowd_unpark(RemoteCrowd *crowd, RemoteThread *runner, bool deserted) {
        uint64_t left = 0;
        for (size_t i = 0; i < crowd->n; i++) {
                RemoteThread *thread = crowd->threads[i];
                if (thread->stage != REMOTE_STAGE_PARKED)
                        continue;
                thread->deserted = deserted;
                left += deserted || (remote_unpark(thread) != 0 && !thread->dead);
        }
        runner->leaves_region = left > 0;
        if (left == 0 && runner->region)
                (void)count(runner, 0);
}
