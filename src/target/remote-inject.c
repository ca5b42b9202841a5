/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "target/remote-internal.h"

#include "base/clock.h"

#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/random.h>
#include <sys/syscall.h>
#include <sys/wait.h>

/*
 * Our calls in a thread that stands in an interrupt-stop, and the way back. What always holds, at every instruction:
 *
 *   - While the registers are ours, a signal frame for the thread's own context lies below its stack, and whatever the
 *     thread runs ends in that frame's sigreturn without us. Hence the order: frame, registers, mask going in;
 *     mask, registers, bytes below the stack going out. The other order would leave, if we died in between, a thread
 *     with all signals blocked for ever, or one without its frame.
 *   - A register holds a random cookie meanwhile. A thread found without it went home alone: it is let go as
 *     it stands, its stack is its own again.
 *   - The thread is put back in an interrupt-stop, never in the stop of a system call: the kernel restarts what
 *     we interrupted only from there.
 */
/* Where getting in took longer than a stop should, for want of a CPU or because the machine is slow, the calls have
 * half as long as that took all the same: all the work is then done in three times its own time, where with what is
 * left of the box, nothing, the target would be stopped for each call. */
#define RUN_LATE_MAX_NSEC (5 * NSEC_PER_MSEC)
static const uint64_t all_signals = UINT64_MAX;

int remote_mask_get(pid_t tid, uint64_t *ret) {
        return ptrace(PTRACE_GETSIGMASK, tid, sizeof *ret, ret) < 0 ? -errno : 0;
}

int remote_mask_set(pid_t tid, uint64_t mask) {
        return ptrace(PTRACE_SETSIGMASK, tid, sizeof mask, &mask) < 0 ? -errno : 0;
}

static bool ours(const RemoteThread *thread, const RemoteRegs *regs) {
        uint64_t sp = remote_arch_sp(regs);
        return remote_arch_cookie(regs) == thread->cookie && sp >= thread->frame && sp <= thread->frame + 8;
}

static int aim(RemoteThread *thread, const RemoteRegs *regs) {
        int r = 0;
        bool mask_first = !remote_guards(REMOTE_GUARD_ORDER);
        bool mask = !thread->masked && remote_guards(REMOTE_GUARD_MASK);
        if (mask && mask_first) {
                r = remote_mask_set(thread->tid, all_signals);
                remote_step(REMOTE_STEP_MASKED);
        }
        if (r == 0)
                r = remote_arch_set_regs(thread->tid, regs);
        if (r == 0 && mask && !mask_first) {
                remote_step(REMOTE_STEP_MAP_REGS);
                r = remote_mask_set(thread->tid, all_signals);
        }
        if (r == 0)
                thread->masked = true;
        return r == -ESRCH ? remote_thread_gone(thread) : r;
}

static uint64_t left(uint64_t until_nsec) {
        uint64_t now = now_nsec();
        return until_nsec > now ? until_nsec - now : 0;
}

/* One call through the borrowed instruction. Ends in an interrupt-stop right behind it. */
static int call_once(RemoteThread *thread, long nr, const uint64_t args[6], RemoteStep entry, int64_t *ret) {
        RemoteRegs regs = thread->regs;
        remote_arch_aim_call(&regs, thread->code.call, thread->code.sigreturn, thread->frame, thread->cookie, nr, args);
        int status, r = aim(thread, &regs);
        if (r != 0)
                return r;
        remote_step(nr == SYS_munmap ? REMOTE_STEP_UNMAP_REGS : REMOTE_STEP_MASKED);
        uint64_t until = now_nsec() + REMOTE_STEP_NSEC;
        do {
                if ((r = remote_thread_resume(thread, PTRACE_SYSCALL)) != 0 ||
                    (r = remote_thread_wait(thread, left(until), &status)) != 0)
                        return r;
                remote_thread_keep_signal(thread, status);
        } while (WSTOPSIG(status) != (SIGTRAP | 0x80));
        remote_step(entry);

        /* It stands at the entry. Interrupted now, it stops next when the call is done, where restarts are made. */
        r = remote_thread_stop(thread, left(until));
        if (r != 0)
                return r;
        r = remote_arch_get_regs(thread->tid, &regs);
        if (r < 0)
                return r == -ESRCH ? remote_thread_gone(thread) : r;
        if (!ours(thread, &regs) || !remote_arch_called(&regs, thread->code.call))
                return REMOTE_E_LOST;
        *ret = remote_arch_result(&regs);
        return 0;
}

static int write_all(int memfd, const void *data, size_t size, uint64_t address) {
        return pwrite(memfd, data, size, (off_t)address) == (ssize_t)size ? 0 : REMOTE_E_BUSY;
}

int remote_write(const RemoteThread *thread, const void *data, size_t size, uint64_t address) {
        return write_all(thread->memfd, data, size, address);
}

int remote_enter(RemoteThread *thread, uint64_t floor, uint64_t region, size_t n_parked) {
        _cleanup_free_ uint8_t *frame = malloc(REMOTE_ARCH_FRAME_MAX);
        size_t size;
        if (!frame)
                return -ENOMEM;
        int r = remote_mask_get(thread->tid, &thread->mask);
        if (r == 0)
                r = remote_arch_frame(thread->tid, &thread->regs, thread->mask, thread->code.sigreturn, frame,
                                      &thread->frame, &size);
        if (r < 0)
                return r == -ESRCH ? remote_thread_gone(thread) : r;
        /* Room for a handler's frame too: without us signals are let in again while the frame is still needed. */
        if (thread->frame < floor + REMOTE_ARCH_FRAME_MAX)
                return REMOTE_E_BUSY;
        if (getrandom(&thread->cookie, sizeof thread->cookie, 0) != sizeof thread->cookie)
                return -errno;
        thread->below = malloc(size);
        if (!thread->below)
                return -ENOMEM;
        thread->below_size = size;
        /* How large a frame is depends on the processor (AMX: 11 KiB). As where there are more threads than may be parked: they
         * may be fewer later. */
        thread->region_bytes = REMOTE_REGION_BYTES + ROUND_UP(n_parked * remote_park_bytes(thread), PAGE_BYTES);
        if (thread->region_bytes > REMOTE_REGION_STRIDE)
                return REMOTE_E_BUSY;
        if (pread(thread->memfd, thread->below, size, (off_t)thread->frame) != (ssize_t)size)
                return REMOTE_E_BUSY;
        if (write_all(thread->memfd, frame, size, thread->frame) != 0) {
                (void)write_all(thread->memfd, thread->below, size, thread->frame);
                return REMOTE_E_BUSY;
        }
        remote_step(REMOTE_STEP_FRAME);

        thread->stage = REMOTE_STAGE_INSIDE;
        thread->wanted = region;
        const uint64_t args[6] = { region, thread->region_bytes, PROT_READ | PROT_EXEC,
                                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, UINT64_MAX, 0 };
        int64_t mapped;
        r = call_once(thread, SYS_mmap, args, REMOTE_STEP_MAP_ENTRY, &mapped);
        if (r != 0)
                return r;
        remote_step(REMOTE_STEP_MAPPED);
        if (mapped == -EACCES || mapped == -EPERM)
                return REMOTE_E_DENIED;
        if ((uint64_t)mapped != region) {
                /* A kernel older than 4.17 takes the address as a hint only. */
                if (mapped > 0)
                        thread->region = (uint64_t)mapped;
                return REMOTE_E_BUSY;
        }
        thread->region = region;
        return 0;
}

RemoteHead *remote_head_write(const RemoteThread *thread, uint8_t *text) {
        const size_t code = (size_t)(remote_stub_end - remote_stub_start);
        RemoteHead *head = (RemoteHead *)(void *)text;
        *head = (RemoteHead){
                .magic = { REMOTE_MAGIC_0, REMOTE_MAGIC_1 },
                .spins = thread->remote->spins,
                .unmap = !thread->seccomp,
                .call = thread->code.call,
                .bytes = thread->region_bytes,
        };
        memcpy(head->code, remote_stub_start, code);
        if (!remote_guards(REMOTE_GUARD_FIRST))
                memset(head->code + (remote_stub_first - remote_stub_start), REMOTE_ARCH_NOP,
                       (size_t)(remote_stub_others - remote_stub_first));
        return head;
}

static int write_region(RemoteThread *thread, const RemoteCall *calls, size_t n) {
        size_t size = REMOTE_REGION_HEAD_BYTES + n * sizeof(RemoteDescriptor);
        _cleanup_free_ uint8_t *text = calloc(1, size);
        if (!text)
                return -ENOMEM;
        (void)remote_head_write(thread, text);
        RemoteDescriptor *descriptor = (RemoteDescriptor *)(void *)(text + REMOTE_REGION_CALLS_OFFSET);
        for (size_t i = 0; i < n; i++) {
                descriptor[i].nr = (uint64_t)calls[i].nr;
                memcpy(descriptor[i].args, calls[i].args, sizeof calls[i].args);
                descriptor[i].ignore_error = calls[i].ignore_error;
                descriptor[i].hold = calls[i].take;
        }
        return write_all(thread->memfd, text, size, thread->region);
}

int remote_tend(RemoteThread *thread) {
        int status, r = remote_thread_wait(thread, 0, &status);
        if (r != 0)
                return r == REMOTE_E_BUSY ? 0 : r;
        remote_thread_keep_signal(thread, status);
        return remote_thread_resume(thread, PTRACE_CONT);
}

int remote_launch(RemoteThread *thread, uint64_t n) {
        const uint64_t yes = 1;
        int r = write_all(thread->memfd, &yes, sizeof yes, thread->region + offsetof(RemoteHead, armed));
        if (r != 0)
                return r;
        RemoteRegs regs = thread->regs;
        remote_arch_aim_stub(&regs, thread->region, thread->frame, thread->cookie, n);
        r = aim(thread, &regs);
        if (r != 0)
                return r;
        remote_step(REMOTE_STEP_STUB_REGS);
        r = remote_thread_resume(thread, PTRACE_CONT);
        if (r == 0)
                remote_step(REMOTE_STEP_RUNNING);
        return r;
}

/* Waits until the stub has set done. It runs on its own meanwhile; only job control can make it stand. */
static int await_done(RemoteThread *thread, size_t n, uint64_t deadline_nsec, RemoteResults *ret) {
        uint64_t results = thread->region + REMOTE_REGION_RESULTS_OFFSET, started = now_nsec();
        uint64_t pause = MIN_OF(n * thread->remote->call_nsec / 2, (uint64_t)NSEC_PER_MSEC);
        bool told = false;
        for (;;) {
                if (pread(thread->memfd, ret, sizeof *ret, (off_t)results) != (ssize_t)sizeof *ret)
                        return REMOTE_E_LOST;
                if (ret->done)
                        return 0;
                int r = remote_tend(thread);
                if (r != 0)
                        return r;
                uint64_t now = now_nsec();
                if (!told && now >= deadline_nsec) {
                        const uint64_t yes = 1;
                        (void)write_all(thread->memfd, &yes, sizeof yes, thread->region + offsetof(RemoteHead, stop));
                        told = true;
                }
                if (now - started > 5 * REMOTE_STEP_NSEC)
                        return REMOTE_E_LOST;
                remote_nap(MAX_OF(pause, 5 * NSEC_PER_USEC));
                /* Ever longer: it may be our CPU that the stub needs, and we come first there. */
                pause = MIN_OF((now - started) / 8, 100 * NSEC_PER_USEC);
        }
}

uint64_t remote_run_deadline(uint64_t stood_nsec, uint64_t run_nsec) {
        uint64_t now = now_nsec(), late = MIN_OF((now - stood_nsec) / 2, (uint64_t)RUN_LATE_MAX_NSEC);

        if (!remote_guards(REMOTE_GUARD_LATE))
                return stood_nsec + run_nsec;
        return MAX_OF(stood_nsec + run_nsec, now + late);
}

int remote_run(RemoteThread *thread, RemoteCall *calls, size_t n, uint64_t stood_nsec, size_t *ret_done,
               uint64_t *ret_run_nsec) {
        _cleanup_free_ int64_t *values = calloc(n, sizeof *values);
        if (!values)
                return -ENOMEM;
        int r = write_region(thread, calls, n);
        if (r != 0)
                return r;
        remote_step(REMOTE_STEP_CODE);
        uint64_t started = now_nsec();
        r = remote_launch(thread, n);
        if (r != 0)
                return r;

        RemoteResults results;
        r = await_done(thread, n, remote_run_deadline(stood_nsec, REMOTE_RUN_NSEC), &results);
        uint64_t ran = now_nsec() - started;
        if (r == REMOTE_E_GONE)
                return r;
        bool lost = r != 0 || results.left > n;
        size_t done = lost ? 0 : n - results.left;
        if (done > 0 && pread(thread->memfd, values, done * sizeof *values,
                              (off_t)(thread->region + REMOTE_REGION_RESULTS_OFFSET + sizeof results)) !=
                                (ssize_t)(done * sizeof *values))
                lost = true;
        _cleanup_close_ int taken = -EBADF;
        if (!lost && results.held)
                lost = remote_take(thread, results.held - 1, &taken) != 0;
        remote_step(REMOTE_STEP_DONE);
        if (!thread->stopped) {
                r = remote_thread_stop(thread, REMOTE_STEP_NSEC);
                if (r != 0 && (lost || r == REMOTE_E_GONE))
                        return r == REMOTE_E_BUSY ? REMOTE_E_LOST : r;
        }
        remote_step(REMOTE_STEP_BACK);
        if (lost)
                return REMOTE_E_LOST;
        for (size_t i = 0; i < done; i++) {
                calls[i].ret = values[i];
                if (calls[i].take && results.held)
                        calls[i].fd = taken >= 0 ? TAKE_FD(taken) : taken;
        }
        *ret_done = done;
        *ret_run_nsec = ran;
        return 0;
}

static int take_region_away(RemoteThread *thread, const RemoteRegs *regs) {
        uint64_t held;
        if (remote_guards(REMOTE_GUARD_CLOSE) && remote_still_held(thread, regs, &held)) {
                const uint64_t args[6] = { held };
                int64_t closed;
                int r = call_once(thread, SYS_close, args, REMOTE_STEP_RELEASED, &closed);
                if (r != 0)
                        return r;
        }
        const uint64_t args[6] = { thread->region, thread->region_bytes };
        int64_t unmapped;
        int r = call_once(thread, SYS_munmap, args, REMOTE_STEP_UNMAP_ENTRY, &unmapped);
        if (r != 0)
                return r;
        remote_step(REMOTE_STEP_UNMAPPED);
        thread->region = 0;
        return 0;
}

int remote_leave(RemoteThread *thread) {
        RemoteRegs regs;
        int r = remote_arch_get_regs(thread->tid, &regs);
        if (r < 0)
                return r == -ESRCH ? remote_thread_gone(thread) : r;
        bool inside = ours(thread, &regs);
        if (!inside && thread->masked) {
                thread->stage = REMOTE_STAGE_SEIZED; /* it went home alone, the way the frame leads */
                return 0;
        }
        if (inside && !thread->region && remote_arch_called(&regs, thread->code.call) &&
            (uint64_t)remote_arch_result(&regs) == thread->wanted)
                thread->region = thread->wanted;
        if (thread->region && !thread->leaves_region) {
                r = take_region_away(thread, &regs);
                if (r != 0) {
                        /* Somebody may see to it that this fails each time, and each time we would wait for it. */
                        thread->leaves_region = true;
                        return r;
                }
        }

        regs = thread->regs;
        if (remote_guards(REMOTE_GUARD_ORDER)) {
                r = remote_mask_set(thread->tid, thread->mask);
                remote_step(REMOTE_STEP_MASK_BACK);
                if (r == 0)
                        r = remote_arch_set_regs(thread->tid, &regs);
                remote_step(REMOTE_STEP_REGS_BACK);
        } else {
                r = remote_arch_set_regs(thread->tid, &regs);
                remote_step(REMOTE_STEP_REGS_BACK);
                if (r == 0)
                        r = remote_mask_set(thread->tid, thread->mask);
                remote_step(REMOTE_STEP_MASK_BACK);
        }
        if (r < 0)
                return r == -ESRCH ? remote_thread_gone(thread) : r;
        (void)write_all(thread->memfd, thread->below, thread->below_size, thread->frame);
        remote_step(REMOTE_STEP_STACK_BACK);
        if (thread->region) {
                const uint64_t yes = 1;
                (void)write_all(thread->memfd, &yes, sizeof yes,
                                thread->region + REMOTE_REGION_RESULTS_OFFSET + offsetof(RemoteResults, home));
        }
        thread->stage = REMOTE_STAGE_SEIZED;
        return 0;
}
