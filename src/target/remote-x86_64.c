/* SPDX-License-Identifier: LGPL-2.1-or-later */
#if defined(__x86_64__)
#include "target/remote-arch.h"
#include "target/remote-internal.h"

#include <cpuid.h>
#include <elf.h>
#include <signal.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <ucontext.h>

/*
 * The x86_64 half of a remote call. What it leans on: the layout of struct rt_sigframe and the checks that
 * rt_sigreturn(2) makes of it (arch/x86/kernel/signal_64.c, fpu/signal.c): uc_flags, 64-byte alignment of the vector
 * state, FP_XSTATE_MAGIC1/2 around an XSAVE image no larger than the process's own. Without the magic words the
 * vector registers would be reset. The kernel's system call path preserves all but rax, rcx and r11, and
 * `syscall` itself only uses those: so nothing of the stub's state lives in them.
 */
#ifndef PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG
#define PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG 0x4211
#endif
#define USER_CS_64 0x33
#define RED_ZONE 128U
/* What the kernel keeps to itself of a call that a signal interrupted (include/linux/errno.h). */
#define ERESTARTSYS 512
#define ERESTARTNOINTR 513
#define ERESTARTNOHAND 514
#define ERESTART_RESTARTBLOCK 516

#define MAGIC1 0x46505853U
#define MAGIC2 0x46505845U
#define SW_RESERVED_OFFSET 464
#define XSTATE_BV_OFFSET 512
#define XSTATE_HEADER_END 576
#define XFEATURE_TILE_DATA ((uint64_t)1 << 18)

typedef struct Frame {
        uint64_t sigreturn;     /* the kernel calls it pretcode; rt_sigreturn expects sp right behind it */
        uint64_t uc_flags, uc_link;
        uint64_t altstack_sp;
        uint32_t altstack_flags, altstack_pad;
        uint64_t altstack_size;
        uint64_t r8, r9, r10, r11, r12, r13, r14, r15, di, si, bp, bx, dx, ax, cx, sp, ip, flags;
        uint16_t cs, gs, fs, ss;
        uint64_t err, trapno, oldmask, cr2, fpstate, reserved[8];
        uint64_t mask;
} Frame;
_Static_assert(sizeof(Frame) == 312, "struct ucontext of the kernel");

typedef struct SoftwareReserved {
        uint32_t magic1, extended_size;
        uint64_t xfeatures;
        uint32_t xstate_size, padding[7];
} SoftwareReserved;

int remote_arch_get_regs(pid_t tid, RemoteRegs *ret) {
        RemoteRegs regs;
        if (ptrace(PTRACE_GETREGS, tid, 0, &regs.r) < 0)
                return -errno;
        regs.nr = (long)regs.r.orig_rax;
        *ret = regs;
        return 0;
}

int remote_arch_set_regs(pid_t tid, const RemoteRegs *regs) {
        struct user_regs_struct r = regs->r;
        r.orig_rax = (unsigned long)regs->nr;
        return ptrace(PTRACE_SETREGS, tid, 0, &r) < 0 ? -errno : 0;
}

uint64_t remote_arch_pc(const RemoteRegs *regs) { return regs->r.rip; }
uint64_t remote_arch_sp(const RemoteRegs *regs) { return regs->r.rsp; }
int64_t remote_arch_result(const RemoteRegs *regs) { return (int64_t)regs->r.rax; }
uint64_t remote_arch_cookie(const RemoteRegs *regs) { return regs->r.r15; }

int remote_arch_thread_pointer(pid_t tid, const RemoteRegs *regs, uint64_t *ret) {
        *ret = regs->r.fs_base;
        return 0;
}

bool remote_arch_fit(pid_t tid, const RemoteRegs *regs) {
        if (regs->r.cs != USER_CS_64)
                return false;
        struct {
                uint64_t mode, selector, offset, len;
        } dispatch = {};
        return ptrace(PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG, tid, sizeof dispatch, &dispatch) < 0 ||
               dispatch.mode == 0;
}

/* The result of an interrupted call, as the kernel's restart logic will look at it. */
bool remote_arch_repair(RemoteRegs *regs) {
        if (regs->nr < 0 || remote_arch_result(regs) != -EINTR || !remote_sleep_repeatable(regs->nr))
                return false;
        regs->r.rax = (uint64_t)-ERESTARTNOHAND;
        return true;
}

/* restart_syscall(2) goes on with what the thread's restart block holds, and rt_sigreturn empties that. The wrappers of
 * the C libraries load the number right before the instruction: b8 NR 00 00 00 0f 05. */
static long restarted_call(pid_t tid, uint64_t ip) {
        uint8_t code[8];
        errno = 0;
        long word = ptrace(PTRACE_PEEKTEXT, tid, ip - 7, 0);
        if (errno)
                return -1;
        memcpy(code, &word, sizeof code);
        if (code[0] != 0xb8 || code[2] || code[3] || code[4])
                return -1;
        long nr = code[1];
        return nr == SYS_poll || nr == SYS_nanosleep || nr == SYS_clock_nanosleep || nr == SYS_futex ? nr : -1;
}

/* What the kernel's restart would have done by the time the thread is back in its own code. */
static void frame_restart(pid_t tid, const RemoteRegs *regs, Frame *frame) {
        long nr = regs->nr;
        if (nr < 0)
                return;
        switch (remote_arch_result(regs)) {
        case -EINTR:
                if (!remote_sleep_repeatable(nr))
                        return;
                break;
        case -ERESTARTSYS:
        case -ERESTARTNOINTR:
        case -ERESTARTNOHAND:
                break;
        case -ERESTART_RESTARTBLOCK:
                if (nr == SYS_restart_syscall)
                        nr = restarted_call(tid, frame->ip);
                if (nr < 0) {
                        frame->ax = (uint64_t)-EINTR;
                        return;
                }
                break;
        default:
                return;
        }
        frame->ax = (uint64_t)nr;
        frame->ip -= 2;
}

/* The bytes of an XSAVE image with these features: those a process has without asking for more. The processor is asked
 * once: each CPUID leaves a virtual machine, while a target stands. */
static size_t xstate_size(uint64_t features) {
        static uint64_t known_features;
        static size_t known;
        size_t size = XSTATE_HEADER_END;
        if (known > 0 && features == known_features)
                return known;
        for (unsigned i = 2; i < 63; i++) {
                unsigned a, b, c, d;
                if (!(features >> i & 1) || !__get_cpuid_count(0xd, i, &a, &b, &c, &d))
                        continue;
                if (!(c & 1)) /* not a supervisor feature: part of the standard image */
                        size = MAX_OF(size, (size_t)a + b);
        }
        known_features = features;
        known = size;
        return size;
}

int remote_arch_frame(pid_t tid, const RemoteRegs *regs, uint64_t mask, uint64_t sigreturn, uint8_t *ret,
                      uint64_t *ret_address, size_t *ret_size) {
        uint64_t top = regs->r.rsp - (remote_guards(REMOTE_GUARD_RED_ZONE) ? RED_ZONE : 0);
        return remote_arch_frame_below(tid, regs, mask, sigreturn, top, ret, ret_address, ret_size);
}

int remote_arch_frame_below(pid_t tid, const RemoteRegs *regs, uint64_t mask, uint64_t sigreturn, uint64_t top,
                            uint8_t *ret, uint64_t *ret_address, size_t *ret_size) {
        static uint8_t xstate[REMOTE_ARCH_FRAME_MAX - 1024] __attribute__((aligned(64)));
        struct iovec vector = { xstate, sizeof xstate - 64 };
        if (ptrace(PTRACE_GETREGSET, tid, NT_X86_XSTATE, &vector) < 0)
                return -errno;
        if (vector.iov_len < XSTATE_HEADER_END || vector.iov_len == sizeof xstate - 64)
                return -EOPNOTSUPP;

        /* Bytes 464.. of a ptrace image hold the features of the machine; the process may have been given fewer. */
        uint64_t features, used;
        memcpy(&features, xstate + SW_RESERVED_OFFSET, sizeof features);
        memcpy(&used, xstate + XSTATE_BV_OFFSET, sizeof used);
        if (!(used & XFEATURE_TILE_DATA))
                features &= ~XFEATURE_TILE_DATA;
        size_t size = MIN_OF(xstate_size(features), (size_t)vector.iov_len);

        SoftwareReserved reserved = {
                .magic1 = MAGIC1,
                .extended_size = (uint32_t)size + 4,
                .xfeatures = features,
                .xstate_size = (uint32_t)size,
        };
        memcpy(xstate + SW_RESERVED_OFFSET, &reserved, sizeof reserved);
        uint32_t magic2 = MAGIC2;
        memcpy(xstate + size, &magic2, sizeof magic2);

        uint64_t fpstate = (top - size - sizeof magic2) & ~(uint64_t)63;
        uint64_t address = (fpstate - sizeof(Frame)) & ~(uint64_t)15;
        const struct user_regs_struct *r = &regs->r;
        Frame frame = {
                .sigreturn = sigreturn,
                .uc_flags = 1 | 2 | 4, /* UC_FP_XSTATE, UC_SIGCONTEXT_SS, UC_STRICT_RESTORE_SS */
                .altstack_flags = SS_ONSTACK | SS_DISABLE, /* both: refused, so the alternate stack stays as it is */
                .r8 = r->r8, .r9 = r->r9, .r10 = r->r10, .r11 = r->r11,
                .r12 = r->r12, .r13 = r->r13, .r14 = r->r14, .r15 = r->r15,
                .di = r->rdi, .si = r->rsi, .bp = r->rbp, .bx = r->rbx,
                .dx = r->rdx, .ax = r->rax, .cx = r->rcx, .sp = r->rsp,
                .ip = r->rip, .flags = r->eflags,
                .cs = (uint16_t)r->cs, .ss = (uint16_t)r->ss,
                .fpstate = remote_guards(REMOTE_GUARD_XSTATE) ? fpstate : 0,
                .mask = mask,
        };
        if (remote_guards(REMOTE_GUARD_EINTR))
                frame_restart(tid, regs, &frame);

        memset(ret, 0, fpstate - address);
        memcpy(ret, &frame, sizeof frame);
        memcpy(ret + (fpstate - address), xstate, size + sizeof magic2);
        *ret_address = address;
        *ret_size = fpstate - address + size + sizeof magic2;
        return 0;
}

void remote_arch_aim_call(RemoteRegs *regs, uint64_t call, uint64_t sigreturn, uint64_t frame, uint64_t cookie, long nr,
                          const uint64_t args[6]) {
        struct user_regs_struct *r = &regs->r;
        r->rip = call;
        r->rsp = frame;
        r->rax = (uint64_t)nr;
        r->rdi = args[0];
        r->rsi = args[1];
        r->rdx = args[2];
        r->r10 = args[3];
        r->r8 = args[4];
        r->r9 = args[5];
        r->rbx = frame;
        r->r15 = cookie;
        r->eflags &= ~(unsigned long long)0x400; /* direction flag: as the ABI has it */
        regs->nr = -1;
}

void remote_arch_aim_stub(RemoteRegs *regs, uint64_t region, uint64_t frame, uint64_t cookie, uint64_t n) {
        struct user_regs_struct *r = &regs->r;
        r->rip = region + sizeof(RemoteHead);
        r->rsp = frame;
        r->rax = 0;
        r->r12 = region;
        r->r13 = n; /* of a program, which says itself where it ends: 0 */
        r->rbx = frame;
        r->r15 = cookie;
        regs->nr = -1;
}

void remote_arch_aim_park(RemoteRegs *regs, uint64_t region, uint64_t frame) {
        struct user_regs_struct *r = &regs->r;
        r->rip = region + sizeof(RemoteHead) + (uint64_t)(remote_stub_park - remote_stub_start);
        r->rsp = frame;
        r->rbx = frame;
        r->r12 = region;
        regs->nr = -1;
}

bool remote_arch_called(const RemoteRegs *regs, uint64_t call) { return regs->r.rip == call + 2; }

bool remote_arch_stub_made(const RemoteRegs *regs, uint64_t region, uint64_t *ret) {
        if (regs->r.rip != region + sizeof(RemoteHead) + (uint64_t)(remote_stub_made - remote_stub_start))
                return false;
        *ret = regs->r.r14;
        return true;
}

/* A call that is to be made anew has nothing done, and the kernel has put back both the number and the place. */
bool remote_arch_skip_call(void *context, long nr, uint64_t first_arg, int result) {
        greg_t *regs = ((ucontext_t *)context)->uc_mcontext.gregs;

        if (regs[REG_RAX] != nr || (uint64_t)regs[REG_RDI] != first_arg ||
            memcmp((const void *)regs[REG_RIP], "\x0f\x05", 2) != 0) /* syscall */
                return false;
        regs[REG_RIP] += 2;
        regs[REG_RAX] = result;
        return true;
}

void remote_arch_pause(uint64_t times) {
        while (times-- > 0)
                __builtin_ia32_pause();
}

ssize_t remote_arch_find_call(const uint8_t *text, size_t size) {
        const uint8_t *p = memmem(text, size, "\x0f\x05\xc3", 3); /* syscall; ret */
        return p ? p - text : -1;
}

ssize_t remote_arch_find_sigreturn(const uint8_t *text, size_t size) {
        const uint8_t *p = memmem(text, size, "\x48\xc7\xc0\x0f\x00\x00\x00\x0f\x05", 9); /* mov $15,%rax; syscall */
        if (!p)
                p = memmem(text, size, "\xb8\x0f\x00\x00\x00\x0f\x05", 7); /* mov $15,%eax; syscall */
        return p ? p - text : -1;
}
#endif
