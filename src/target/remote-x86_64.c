/* SPDX-License-Identifier: LGPL-2.1-or-later */
#if defined(__x86_64__)
#include "target/remote-arch.h"
#include "target/remote-internal.h"

#include <cpuid.h>
#include <elf.h>
#include <signal.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>

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

/* The bytes of an XSAVE image with these features: those a process has without asking for more. */
static size_t xstate_size(uint64_t features) {
        size_t size = XSTATE_HEADER_END;
        for (unsigned i = 2; i < 63; i++) {
                unsigned a, b, c, d;
                if (!(features >> i & 1) || !__get_cpuid_count(0xd, i, &a, &b, &c, &d))
                        continue;
                if (!(c & 1)) /* not a supervisor feature: part of the standard image */
                        size = MAX_OF(size, (size_t)a + b);
        }
        return size;
}

int remote_arch_frame(pid_t tid, const RemoteRegs *regs, uint64_t mask, uint64_t sigreturn, uint8_t *ret,
                      uint64_t *ret_address, size_t *ret_size) {
        static uint8_t xstate[REMOTE_ARCH_FRAME_MAX - 1024] __attribute__((aligned(64)));
        struct iovec vector = {xstate, sizeof xstate - 64};
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

        uint64_t top = regs->r.rsp - (remote_guards(REMOTE_GUARD_RED_ZONE) ? RED_ZONE : 0);
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
        r->r13 = n;
        r->rbx = frame;
        r->r15 = cookie;
        regs->nr = -1;
}

bool remote_arch_called(const RemoteRegs *regs, uint64_t call) { return regs->r.rip == call + 2; }

bool remote_arch_stub_made(const RemoteRegs *regs, uint64_t region, uint64_t *ret) {
        if (regs->r.rip != region + sizeof(RemoteHead) + (uint64_t)(remote_stub_made - remote_stub_start))
                return false;
        *ret = regs->r.r14;
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

/*
 * The stub. In: r12 the region, r13 descriptors to make, rbx the frame, r15 the cookie that says these registers are
 * ours. It uses registers only: no stack, no calls, no vector registers. Afterwards it waits in user mode, not in a
 * call: without its tracer a seccomp filter may not like that call. A descriptor that one of the calls made it holds
 * meanwhile, and closes it when told to, if it is still the same file. Nobody coming, it goes home by the frame, and closes the descriptor and takes
 * the region away on the way when there is no filter to object: by the borrowed `syscall; ret`, which lands in
 * sigreturn.
 */
#define STR_(x) #x
#define STR(x) STR_(x)
#define HEAD_STOP 16
#define HEAD_SPINS 24
#define HEAD_UNMAP 32
#define HEAD_CALL 40
#define HEAD_RELEASE 56
#define CALLS_OFFSET 4096
#define RESULTS_OFFSET 69632
#define RESULTS_BYTES 12288
#define REGION_BYTES 81920
_Static_assert(HEAD_STOP == offsetof(RemoteHead, stop) && HEAD_SPINS == offsetof(RemoteHead, spins) &&
               HEAD_UNMAP == offsetof(RemoteHead, unmap) && HEAD_CALL == offsetof(RemoteHead, call) &&
               HEAD_RELEASE == offsetof(RemoteHead, release), "");
_Static_assert(CALLS_OFFSET == REMOTE_REGION_CALLS_OFFSET && RESULTS_OFFSET == REMOTE_REGION_RESULTS_OFFSET &&
               REGION_BYTES == REMOTE_REGION_BYTES && RESULTS_OFFSET + RESULTS_BYTES == REGION_BYTES, "");
_Static_assert(sizeof(RemoteDescriptor) == 64 && sizeof(RemoteResults) == 64 &&
               offsetof(RemoteDescriptor, ignore_error) == 56 && offsetof(RemoteDescriptor, hold) == 60 &&
               offsetof(RemoteResults, home) == 16 && offsetof(RemoteResults, held) == 24, "");
#define RESULTS_HELD "24+" STR(RESULTS_OFFSET) "(%r12)"
#define MADE_OFFSET 78848
#define FOUND_OFFSET 79872
_Static_assert(MADE_OFFSET == REMOTE_REGION_MADE_OFFSET && FOUND_OFFSET == REMOTE_REGION_FOUND_OFFSET &&
               FOUND_OFFSET + sizeof(struct stat) <= REGION_BYTES && offsetof(struct stat, st_dev) == 0 &&
               offsetof(struct stat, st_ino) == 8 &&
               RESULTS_OFFSET + sizeof(RemoteResults) + REMOTE_BATCH_MAX * sizeof(int64_t) <= MADE_OFFSET, "");

asm(".pushsection .rodata\n"
    ".globl remote_stub_start, remote_stub_made, remote_stub_end\n"
    "remote_stub_start:\n"
    "       xor     %r14d, %r14d\n" /* as long as it is 0 the results cannot be written */
    "       mov     $28, %eax\n" /* madvise(region, all, MADV_DONTFORK) */
    "       mov     %r12, %rdi\n"
    "       mov     $" STR(REGION_BYTES) ", %esi\n"
    "       mov     $10, %edx\n"
    "       syscall\n"
    "       test    %rax, %rax\n"
    "       jnz     3f\n"
    "       mov     $10, %eax\n" /* mprotect(results, PROT_READ|PROT_WRITE) */
    "       lea     " STR(RESULTS_OFFSET) "(%r12), %rdi\n"
    "       mov     $" STR(RESULTS_BYTES) ", %esi\n"
    "       mov     $3, %edx\n"
    "       syscall\n"
    "       test    %rax, %rax\n"
    "       jnz     3f\n"
    "       lea     " STR(CALLS_OFFSET) "(%r12), %r14\n"
    "       lea     64+" STR(RESULTS_OFFSET) "(%r12), %rbp\n"
    "1:     test    %r13, %r13\n"
    "       jz      2f\n"
    "       cmpq    $0, " STR(HEAD_STOP) "(%r12)\n"
    "       jne     2f\n"
    "       mov     0(%r14), %rax\n"
    "       mov     8(%r14), %rdi\n"
    "       mov     16(%r14), %rsi\n"
    "       mov     24(%r14), %rdx\n"
    "       mov     32(%r14), %r10\n"
    "       mov     40(%r14), %r8\n"
    "       mov     48(%r14), %r9\n"
    "       syscall\n"
    "remote_stub_made:\n"
    "       mov     %rax, (%rbp)\n"
    "       add     $8, %rbp\n"
    "       add     $64, %r14\n"
    "       dec     %r13\n"
    "       cmp     $-4095, %rax\n" /* unsigned: below it is no error */
    "       jae     10f\n"
    "       cmpl    $0, 60-64(%r14)\n"
    "       je      1b\n"
    "       mov     %rax, %rdi\n"
    "       inc     %rax\n"
    "       mov     %rax, " RESULTS_HELD "\n"
    "       mov     $5, %eax\n" /* fstat(held, made) */
    "       lea     " STR(MADE_OFFSET) "(%r12), %rsi\n"
    "       syscall\n"
    "       jmp     1b\n"
    "10:    cmpl    $0, 56-64(%r14)\n"
    "       jne     1b\n"
    "2:     mov     %r13, 8+" STR(RESULTS_OFFSET) "(%r12)\n"
    "       movq    $1, " STR(RESULTS_OFFSET) "(%r12)\n"
    "3:     mov     " STR(HEAD_SPINS) "(%r12), %rcx\n"
    "4:     pause\n"
    "       cmpq    $0, " STR(HEAD_RELEASE) "(%r12)\n"
    "       je      5f\n"
    "       cmpq    $0, " RESULTS_HELD "\n"
    "       jne     6f\n"
    "5:     dec     %rcx\n"
    "       jnz     4b\n"
    "       cmpq    $0, " STR(HEAD_UNMAP) "(%r12)\n"
    "       je      8f\n"
    "       cmpq    $0, " RESULTS_HELD "\n"
    "       je      7f\n"
    "6:     mov     $5, %eax\n" /* fstat(held, found) */
    "       mov     " RESULTS_HELD ", %rdi\n"
    "       dec     %rdi\n"
    "       lea     " STR(FOUND_OFFSET) "(%r12), %rsi\n"
    "       syscall\n"
    "       mov     " STR(MADE_OFFSET) "(%r12), %rax\n"
    "       cmp     " STR(FOUND_OFFSET) "(%r12), %rax\n"
    "       jne     11f\n"
    "       mov     8+" STR(MADE_OFFSET) "(%r12), %rax\n"
    "       cmp     8+" STR(FOUND_OFFSET) "(%r12), %rax\n"
    "       jne     11f\n"
    "       mov     $3, %eax\n" /* close(held) */
    "       syscall\n"
    "11:    movq    $0, " RESULTS_HELD "\n"
    "       cmpq    $0, " STR(HEAD_RELEASE) "(%r12)\n"
    "       jne     3b\n" /* we are there, and will come and stop it */
    "7:     mov     %rbx, %rsp\n"
    "       mov     $11, %eax\n" /* munmap(region, all) */
    "       mov     %r12, %rdi\n"
    "       mov     $" STR(REGION_BYTES) ", %esi\n"
    "       jmp     *" STR(HEAD_CALL) "(%r12)\n"
    "8:     test    %r14, %r14\n"
    "       jz      9f\n"
    "       movq    $1, 16+" STR(RESULTS_OFFSET) "(%r12)\n"
    "9:     lea     8(%rbx), %rsp\n"
    "       mov     $15, %eax\n"
    "       syscall\n"
    "remote_stub_end:\n"
    ".popsection\n");
#endif
