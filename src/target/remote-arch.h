/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "base/util.h"

#include <sys/types.h>
#include <sys/user.h>

/*
 * What of a remote call depends on the architecture: registers, the signal frame that brings a thread back, the stub.
 */
typedef struct RemoteRegs {
        struct user_regs_struct r;
        long nr;                /* of the interrupted call; -1: none (x86_64: orig_rax) */
} RemoteRegs;

int remote_arch_get_regs(pid_t tid, RemoteRegs *ret);                   /* -errno */
int remote_arch_set_regs(pid_t tid, const RemoteRegs *regs);            /* -errno */
uint64_t remote_arch_pc(const RemoteRegs *regs);
uint64_t remote_arch_sp(const RemoteRegs *regs);
int64_t remote_arch_result(const RemoteRegs *regs);                     /* of the last call */
int remote_arch_thread_pointer(pid_t tid, const RemoteRegs *regs, uint64_t *ret);
uint64_t remote_arch_cookie(const RemoteRegs *regs);                    /* what remote_arch_aim_*() put there */

/* Runs native 64-bit code and its calls reach the kernel. */
bool remote_arch_fit(pid_t tid, const RemoteRegs *regs);

/* In an interrupt-stop: makes the kernel restart a call that was made to return -EINTR and can be repeated. True: the
 * registers were changed. */
bool remote_arch_repair(RemoteRegs *regs);

#define REMOTE_ARCH_AUDIT AUDIT_ARCH_X86_64 /* as seccomp filters call it */

/* Bytes below the stack pointer that belong to the function running there. */
#define REMOTE_ARCH_FRAME_MAX 32768U

/* Builds, for a thread stopped with these registers, what lies on its stack: the address of sigreturn and a complete
 * signal frame whose sigreturn makes it go on as if nothing had been. *ret_address is its lowest address,
 * below the red zone; ret holds REMOTE_ARCH_FRAME_MAX. -errno. */
int remote_arch_frame(pid_t tid, const RemoteRegs *regs, uint64_t mask, uint64_t sigreturn, uint8_t *ret,
                      uint64_t *ret_address, size_t *ret_size);
/* The same below an address that is not its stack's. */
int remote_arch_frame_below(pid_t tid, const RemoteRegs *regs, uint64_t mask, uint64_t sigreturn, uint64_t top,
                            uint8_t *ret, uint64_t *ret_address, size_t *ret_size);

/* Registers that make one call through code->call and then fall into the frame. */
void remote_arch_aim_call(RemoteRegs *regs, uint64_t call, uint64_t sigreturn, uint64_t frame, uint64_t cookie, long nr,
                          const uint64_t args[6]);
/* Registers that start the stub at region for n descriptors. */
void remote_arch_aim_stub(RemoteRegs *regs, uint64_t region, uint64_t frame, uint64_t cookie, uint64_t n);

/* Registers that make a thread wait in the region until the program there has ended, and then take its frame. */
void remote_arch_aim_park(RemoteRegs *regs, uint64_t region, uint64_t frame);

/* Right behind the borrowed call instruction. */
bool remote_arch_called(const RemoteRegs *regs, uint64_t call);

/* Right behind one of the stub's calls; *ret: the address of its descriptor. */
bool remote_arch_stub_made(const RemoteRegs *regs, uint64_t region, uint64_t *ret);

/* Of ourselves, in a signal handler: where the interrupted context is about to make this call, or to make it anew, it goes
 * on as if that had returned result. False: it is not. */
bool remote_arch_skip_call(void *context, long nr, uint64_t first_arg, int result);

/* What the stub does while it waits, as often. */
void remote_arch_pause(uint64_t times);

/* Byte patterns of the two snippets; pure. Offset of the first in text, or -1. */
ssize_t remote_arch_find_call(const uint8_t *text, size_t size);
ssize_t remote_arch_find_sigreturn(const uint8_t *text, size_t size);
#define REMOTE_ARCH_SNIPPET_MAX 16U

/* The region: a head with the code, descriptors or instructions (RX, written by us from outside), results and words
 * (RW). Its address spells "ksmd", so that a leftover is known even when nothing was written to it, and nothing of the
 * target's adjoins it. */
#define REMOTE_REGION_HEAD_BYTES ((uint64_t)4096)
#define REMOTE_REGION_CALLS_OFFSET REMOTE_REGION_HEAD_BYTES
#define REMOTE_REGION_RESULTS_OFFSET (REMOTE_REGION_CALLS_OFFSET + 65536)
#define REMOTE_REGION_WORDS_OFFSET (REMOTE_REGION_RESULTS_OFFSET + 3 * 4096) /* of a program */
#define REMOTE_REGION_BYTES (REMOTE_REGION_WORDS_OFFSET + 4 * 4096)
/* Behind the results: fstat(2) of what is held, right behind the call that made it and right before it is closed. */
#define REMOTE_REGION_MADE_OFFSET (REMOTE_REGION_RESULTS_OFFSET + 2 * 4096 + 1024)
#define REMOTE_REGION_FOUND_OFFSET (REMOTE_REGION_MADE_OFFSET + 1024)

#define REMOTE_REGION_BASE ((uint64_t)0x6b736d640000) /* "ksmd" */
#define REMOTE_REGION_STRIDE ((uint64_t)0x100000) /* behind the region: the frames of parked threads */
#define REMOTE_REGION_SLOTS 16U
#define REMOTE_MAGIC_0 ((uint64_t)0x6573752d646d736b) /* "ksmd-user remote" */
#define REMOTE_MAGIC_1 ((uint64_t)0x65746f6d65722072)

static inline bool remote_region_has(uint64_t address) {
        return address - REMOTE_REGION_BASE < REMOTE_REGION_SLOTS * REMOTE_REGION_STRIDE;
}

typedef struct RemoteHead {
        uint64_t magic[2];
        uint64_t stop;          /* we want no further call made: the time box is full */
        uint64_t spins;         /* to wait for us at the end */
        uint64_t unmap;         /* going home alone, unmap the region by the code at call */
        uint64_t call;
        uint64_t armed;         /* a thread was sent here, or is about to be */
        uint64_t release;       /* we have what was held for us: close it */
        uint64_t program;       /* what follows are instructions, not descriptors */
        uint64_t answered;      /* the question that was answered last */
        uint64_t refused;       /* with a no */
        uint64_t holds;         /* other threads may wait here */
        uint64_t bytes;         /* of the region, with the frames of those */
        uint8_t code[];
} RemoteHead;

typedef struct RemoteDescriptor {
        uint64_t nr, args[6];
        uint32_t ignore_error;
        uint32_t hold;          /* its result is a descriptor, to be closed when we have it or do not come */
} RemoteDescriptor;

/* Of a program (remote-program.h); takes the place of a descriptor. */
typedef struct RemoteInstruction {
        uint64_t nr, args[6];
        uint8_t op, reserved;
        uint16_t modes;         /* two bits for each argument: RemoteOperandKind */
        uint16_t result;        /* a word; UINT16_MAX: none */
        uint16_t target;        /* an instruction; UINT16_MAX: the next one */
} RemoteInstruction;

typedef struct RemoteResults {
        uint64_t done, left;    /* left: descriptors not made */
        uint64_t home;          /* left for good, with the region still there */
        uint64_t held;          /* 1 + the descriptor that is held open for us; 0: none */
        uint64_t asked;         /* the question that is to be answered */
        uint64_t parked;        /* threads that were sent to wait here, and have not left */
        uint64_t reserved[2];
        int64_t ret[];
} RemoteResults;

extern const uint8_t remote_stub_start[], remote_stub_made[], remote_stub_park[], remote_stub_end[];
/* From first to others: a jump past the look at stop. */
extern const uint8_t remote_stub_first[], remote_stub_others[];
#define REMOTE_ARCH_NOP 0x90 /* of one byte */
