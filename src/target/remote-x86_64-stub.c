/* SPDX-License-Identifier: LGPL-2.1-or-later */
#if defined(__x86_64__)
#include "target/remote-internal.h"

#include <sys/stat.h>

/*
 * The stub. In: r12 the region, r13 descriptors to make, rbx the frame, r15 the cookie that says these registers are
 * ours. It uses registers only: no stack, no calls, no vector registers. Afterwards it waits in user mode, not in a
 * call: without its tracer a seccomp filter may not like that call. A descriptor that one of the calls made it holds
 * meanwhile, and closes it when told to, if it is still the same file. Nobody coming, it goes home by the frame, and
 * closes the descriptor and takes the region away on the way when there is no filter to object: by the borrowed
 * `syscall; ret`, which lands in sigreturn.
 */
#define STR_(x) #x
#define STR(x) STR_(x)
#define HEAD_STOP 16
#define HEAD_SPINS 24
#define HEAD_UNMAP 32
#define HEAD_CALL 40
#define HEAD_RELEASE 56
#define HEAD_PROGRAM 64
#define HEAD_ANSWERED 72
#define HEAD_REFUSED 80
#define HEAD_BYTES 96
#define CALLS_OFFSET 4096
#define RESULTS_OFFSET 69632
#define WORDS_OFFSET 81920
#define WRITABLE_BYTES 28672
#define REGION_BYTES 98304
_Static_assert(HEAD_STOP == offsetof(RemoteHead, stop) && HEAD_SPINS == offsetof(RemoteHead, spins) &&
               HEAD_UNMAP == offsetof(RemoteHead, unmap) && HEAD_CALL == offsetof(RemoteHead, call) &&
               HEAD_RELEASE == offsetof(RemoteHead, release) && HEAD_PROGRAM == offsetof(RemoteHead, program) &&
               HEAD_ANSWERED == offsetof(RemoteHead, answered) && HEAD_REFUSED == offsetof(RemoteHead, refused) &&
               HEAD_BYTES == offsetof(RemoteHead, bytes), "");
_Static_assert(CALLS_OFFSET == REMOTE_REGION_CALLS_OFFSET && RESULTS_OFFSET == REMOTE_REGION_RESULTS_OFFSET &&
               WORDS_OFFSET == REMOTE_REGION_WORDS_OFFSET && REGION_BYTES == REMOTE_REGION_BYTES &&
               RESULTS_OFFSET + WRITABLE_BYTES == REGION_BYTES &&
               WORDS_OFFSET + REMOTE_PROGRAM_WORDS_MAX * sizeof(uint64_t) == REGION_BYTES &&
               CALLS_OFFSET + REMOTE_PROGRAM_OPS_MAX * sizeof(RemoteInstruction) == RESULTS_OFFSET, "");
_Static_assert(sizeof(RemoteDescriptor) == 64 && sizeof(RemoteResults) == 64 &&
               offsetof(RemoteDescriptor, ignore_error) == 56 && offsetof(RemoteDescriptor, hold) == 60 &&
               offsetof(RemoteResults, home) == 16 && offsetof(RemoteResults, held) == 24 &&
               offsetof(RemoteResults, parked) == 40, "");
#define RESULTS_HELD "24+" STR(RESULTS_OFFSET) "(%r12)"
/* Operand i, at offset, into a register: its two bits of %r11d say what is meant by it. */
#define OPERAND(offset, register, i) \
    "       mov     " #offset "(%r14), %" #register "\n" \
    "       bt      $2*" #i ", %r11d\n" \
    "       jnc     1f\n" \
    "       mov     (%rbp,%" #register ",8), %" #register "\n" \
    "1:     bt      $2*" #i "+1, %r11d\n" \
    "       jnc     1f\n" \
    "       lea     (%rbp,%" #register ",8), %" #register "\n" \
    "1:\n"
#define MADE_OFFSET 78848
#define FOUND_OFFSET 79872
_Static_assert(MADE_OFFSET == REMOTE_REGION_MADE_OFFSET && FOUND_OFFSET == REMOTE_REGION_FOUND_OFFSET &&
               FOUND_OFFSET + sizeof(struct stat) <= WORDS_OFFSET && offsetof(struct stat, st_dev) == 0 &&
               offsetof(struct stat, st_ino) == 8 &&
               RESULTS_OFFSET + sizeof(RemoteResults) + REMOTE_BATCH_MAX * sizeof(int64_t) <= MADE_OFFSET, "");

asm(".pushsection .rodata\n"
    ".globl remote_stub_start, remote_stub_first, remote_stub_others, remote_stub_made, remote_stub_park, remote_stub_end\n"
    "remote_stub_start:\n"
    "       xor     %r14d, %r14d\n" /* as long as it is 0 the results cannot be written */
    "       mov     $28, %eax\n" /* madvise(region, all, MADV_DONTFORK) */
    "       mov     %r12, %rdi\n"
    "       mov     " STR(HEAD_BYTES) "(%r12), %rsi\n"
    "       mov     $10, %edx\n"
    "       syscall\n"
    "       test    %rax, %rax\n"
    "       jnz     3f\n"
    "       mov     $10, %eax\n" /* mprotect(results, PROT_READ|PROT_WRITE) */
    "       lea     " STR(RESULTS_OFFSET) "(%r12), %rdi\n"
    "       mov     $" STR(WRITABLE_BYTES) ", %esi\n"
    "       mov     $3, %edx\n"
    "       syscall\n"
    "       test    %rax, %rax\n"
    "       jnz     3f\n"
    "       lea     " STR(CALLS_OFFSET) "(%r12), %r14\n"
    "       cmpq    $0, " STR(HEAD_PROGRAM) "(%r12)\n"
    "       jne     20f\n"
    "       lea     64+" STR(RESULTS_OFFSET) "(%r12), %rbp\n"
    "remote_stub_first:\n"
    "       jmp     12f\n" /* the first one in any case: else a machine on which getting here takes longer than a stop
                              * should would be stopped again and again for nothing */
    "remote_stub_others:\n"
    "1:     cmpq    $0, " STR(HEAD_STOP) "(%r12)\n"
    "       jne     2f\n"
    "12:    test    %r13, %r13\n"
    "       jz      2f\n"
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
    "       mov     " STR(HEAD_BYTES) "(%r12), %rsi\n"
    "       jmp     *" STR(HEAD_CALL) "(%r12)\n"
    "8:     test    %r14, %r14\n"
    "       jz      9f\n"
    "       movq    $1, 16+" STR(RESULTS_OFFSET) "(%r12)\n"
    "9:     lea     8(%rbx), %rsp\n"
    "       mov     $15, %eax\n"
    "       syscall\n"

    /* A program: r14 the instruction, rbp the words, r13 is 0. Operands first: a value, a word, or a word's address. */
    "20:    lea     " STR(WORDS_OFFSET) "(%r12), %rbp\n"
    "30:    movzwl  58(%r14), %r11d\n"
            OPERAND(8, rdi, 0)
            OPERAND(16, rsi, 1)
            OPERAND(24, rdx, 2)
            OPERAND(32, r10, 3)
            OPERAND(40, r8, 4)
            OPERAND(48, r9, 5)
    "       movzbl  56(%r14), %ecx\n"
    "       test    %ecx, %ecx\n" /* CALL */
    "       jnz     31f\n"
    "       mov     (%r14), %rax\n"
    "       syscall\n"
    "       movzwl  60(%r14), %ecx\n"
    "       cmp     $0xffff, %ecx\n"
    "       je      61f\n"
    "       mov     %rax, (%rbp,%rcx,8)\n"
    "61:    cmp     $-4095, %rax\n"
    "       jae     91f\n"
    "       jmp     92f\n"

    "31:    dec     %ecx\n" /* ADD */
    "       jnz     32f\n"
    "       lea     (%rdi,%rsi), %rax\n"
    "       jmp     90f\n"
    "32:    dec     %ecx\n" /* SUB */
    "       jnz     33f\n"
    "       mov     %rdi, %rax\n"
    "       sub     %rsi, %rax\n"
    "       jmp     90f\n"
    "33:    dec     %ecx\n" /* LOAD */
    "       jnz     34f\n"
    "       mov     (%rdi), %rax\n"
    "       jmp     90f\n"
    "34:    dec     %ecx\n" /* LOAD_INT */
    "       jnz     35f\n"
    "       movslq  (%rdi), %rax\n"
    "       jmp     90f\n"
    "35:    dec     %ecx\n" /* STORE */
    "       jnz     36f\n"
    "       mov     %rsi, (%rdi)\n"
    "       jmp     92f\n"
    "36:    dec     %ecx\n" /* JUMP */
    "       jz      91f\n"
    "       dec     %ecx\n" /* BELOW */
    "       jnz     38f\n"
    "       cmp     %rsi, %rdi\n"
    "       jb      91f\n"
    "       jmp     92f\n"
    "38:    dec     %ecx\n" /* EQUAL */
    "       jnz     39f\n"
    "       cmp     %rsi, %rdi\n"
    "       je      91f\n"
    "       jmp     92f\n"

    "39:    xor     %r10d, %r10d\n" /* what the wanted pages have: 0, or anything else */
    "       dec     %ecx\n" /* ZEROS */
    "       jz      71f\n"
    "       inc     %r10d\n"
    "       dec     %ecx\n" /* NONZEROS */
    "       jnz     43f\n"
    "71:    add     %rdi, %rsi\n" /* the end */
    "       mov     %rdi, %rdx\n"
    "72:    cmp     %rsi, %rdx\n"
    "       jae     74f\n"
    "       mov     $64, %ecx\n"
    "       mov     %rdx, %r9\n"
    "73:    mov     (%r9), %rax\n"
    "       or      8(%r9), %rax\n"
    "       or      16(%r9), %rax\n"
    "       or      24(%r9), %rax\n"
    "       or      32(%r9), %rax\n"
    "       or      40(%r9), %rax\n"
    "       or      48(%r9), %rax\n"
    "       or      56(%r9), %rax\n"
    "       jnz     75f\n"
    "       add     $64, %r9\n"
    "       dec     %ecx\n"
    "       jnz     73b\n"
    "75:    test    %rax, %rax\n"
    "       setnz   %al\n"
    "       cmp     %r10b, %al\n"
    "       jne     74f\n"
    "       add     $4096, %rdx\n"
    "       jmp     72b\n"
    "74:    mov     %rdx, %rax\n"
    "       sub     %rdi, %rax\n"
    "       jmp     90f\n"

    "43:    dec     %ecx\n" /* ASK */
    "       jnz     44f\n"
    "       mov     %rdi, 32+" STR(RESULTS_OFFSET) "(%r12)\n"
    "       mov     " STR(HEAD_SPINS) "(%r12), %rcx\n"
    "62:    pause\n"
    "       cmp     " STR(HEAD_ANSWERED) "(%r12), %rdi\n"
    "       je      63f\n"
    "       dec     %rcx\n"
    "       jnz     62b\n"
    "       movq    $0, 32+" STR(RESULTS_OFFSET) "(%r12)\n"
    "       jmp     91f\n"
    "63:    movq    $0, 32+" STR(RESULTS_OFFSET) "(%r12)\n"
    "       cmpq    $0, " STR(HEAD_REFUSED) "(%r12)\n"
    "       jne     91f\n"
    "       jmp     92f\n"
    "44:    dec     %ecx\n" /* STOPPED */
    "       jnz     2b\n" /* END */
    "       cmpq    $0, " STR(HEAD_STOP) "(%r12)\n"
    "       jne     91f\n"
    "       jmp     92f\n"

    "90:    movzwl  60(%r14), %ecx\n" /* keep the result, go on */
    "       cmp     $0xffff, %ecx\n"
    "       je      92f\n"
    "       mov     %rax, (%rbp,%rcx,8)\n"
    "92:    add     $64, %r14\n"
    "       jmp     30b\n"
    "91:    movzwl  62(%r14), %ecx\n" /* jump, if there is where to */
    "       cmp     $0xffff, %ecx\n"
    "       je      92b\n"
    "       shl     $6, %ecx\n"
    "       lea     " STR(CALLS_OFFSET) "(%r12,%rcx), %r14\n"
    "       jmp     30b\n"

    /* A parked thread: r12 the region, rbx its frame, whose first word is where the C library's sigreturn lies. It
     * waits without a system call, which its seccomp filter might not like, until the program has ended. */
    "remote_stub_park:\n"
    "       pause\n"
    "       cmpq    $0, " STR(RESULTS_OFFSET) "(%r12)\n"
    "       je      remote_stub_park\n"
    "       mov     %rbx, %rsp\n"
    "       lock decq 40+" STR(RESULTS_OFFSET) "(%r12)\n"
    "       ret\n"
    "remote_stub_end:\n"
    ".popsection\n");
#endif
