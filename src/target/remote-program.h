/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "target/remote.h"

/*
 * A transaction: a small program that one thread of a target runs to its end, whatever becomes of us. remote_call()
 * makes calls of which each is right on its own; what takes pages away and gives them back is right only as a whole. So
 * everything that undoes is part of the program and is decided in it, from results of the calls before: a caller that
 * is killed in the middle changes nothing but that the other threads go on while it runs; or not even that
 * (remote_program_hold()).
 *
 * All threads of the process stand meanwhile. Those that cannot (io_uring's workers) are counted, see
 * RemoteTransaction.
 *
 * A program has words of 64 bits, which we fill beforehand and read afterwards, and instructions, each with up to six
 * operands: a value, the content of a word, or the address of one. A structure that a system call takes is a row of
 * words. Whatever goes wrong while one is built is remembered and told by remote_transact().
 *
 *      RemoteProgram *p = NULL;
 *      remote_program_new(&p);
 *      unsigned out = remote_program_label(p), fd = remote_program_words(p, 1), …;
 *      remote_program_give(p, &dev, 1, fd, out);
 *      REMOTE_CALL(p, out, uffd, SYS_ioctl, remote_word(fd), remote_value(USERFAULTFD_IOC_NEW), remote_value(flags));
 *      …
 *      remote_program_here(p, out);
 *      remote_program_close(p, uffd);
 */
typedef struct RemoteProgram RemoteProgram;
int remote_program_new(RemoteProgram **ret);    /* -ENOMEM */
RemoteProgram *remote_program_free(RemoteProgram *program);
DEFINE_CLEANUP(RemoteProgram, remote_program_free)

typedef enum RemoteOperandKind {
        REMOTE_VALUE,
        REMOTE_WORD,            /* what the word holds when the instruction is run */
        REMOTE_AT,              /* where the word lies in the target's memory */
} RemoteOperandKind;

typedef struct RemoteOperand {
        RemoteOperandKind kind;
        uint64_t value;         /* or the word's index */
} RemoteOperand;

static inline RemoteOperand remote_value(uint64_t value) { return (RemoteOperand){ REMOTE_VALUE, value }; }
static inline RemoteOperand remote_word(unsigned word) { return (RemoteOperand){ REMOTE_WORD, word }; }
static inline RemoteOperand remote_at(unsigned word) { return (RemoteOperand){ REMOTE_AT, word }; }

typedef enum RemoteOp {
        REMOTE_OP_CALL,         /* result = the system call; jumps if it is an error */
        REMOTE_OP_ADD,          /* result = a + b */
        REMOTE_OP_SUB,          /* result = a - b */
        REMOTE_OP_LOAD,         /* result = 64 bits at address a */
        REMOTE_OP_LOAD_INT,     /* result = 32 bits at address a, with their sign */
        REMOTE_OP_STORE,        /* 64 bits at address a = b */
        REMOTE_OP_JUMP,
        REMOTE_OP_BELOW,        /* jumps if a < b, unsigned */
        REMOTE_OP_EQUAL,        /* jumps if a = b */
        REMOTE_OP_ZEROS,        /* result = bytes of the whole pages from a on, of b bytes, that hold zeros only */
        REMOTE_OP_NONZEROS,     /* that do not */
        REMOTE_OP_ASK,          /* see remote_program_ask(); jumps if nobody answers */
        REMOTE_OP_STOPPED,      /* jumps if the time box is full: where a program may end early */
        REMOTE_OP_END,
        _REMOTE_OP_MAX,
} RemoteOp;

#define REMOTE_PROGRAM_WORDS_MAX 2048U
#define REMOTE_PROGRAM_OPS_MAX 1024U
#define REMOTE_NOWHERE UINT16_MAX       /* a label: go on with the next instruction */
#define REMOTE_NOTHING UINT16_MAX       /* a result that is not kept */

/* n words in a row, 0 at first: the index of the first. */
unsigned remote_program_words(RemoteProgram *program, size_t n);
void remote_program_set(RemoteProgram *program, unsigned word, uint64_t value);
/* As set, or as the target left it: valid after remote_transact() returned 0. */
uint64_t remote_program_get(const RemoteProgram *program, unsigned word);

/* Where a member, of 64 bits, lies in the row of words that holds its structure. */
#define WORD_OF(structure, member) (offsetof(structure, member) / sizeof(uint64_t))
/* What a negative number is not below (REMOTE_OP_BELOW), and any count is. */
#define REMOTE_NEGATIVE ((uint64_t)1 << 63)

/* A place to jump to, placed now or later, once. */
unsigned remote_program_label(RemoteProgram *program);
void remote_program_here(RemoteProgram *program, unsigned label);

/* One instruction. What ZEROS and the like look at must be the program's own memory: a page that others can take away
 * would be a fault, and nobody's. */
void remote_program_op(RemoteProgram *program, RemoteOp op, unsigned label, unsigned result, size_t n,
                       const RemoteOperand *operands);
/* The word becomes what the operand is when it comes to that; remote_program_set() says what it is at the beginning. */
void remote_program_copy(RemoteProgram *program, unsigned word, RemoteOperand from);
void remote_program_call(RemoteProgram *program, unsigned on_error, unsigned result, long nr, size_t n,
                         const RemoteOperand *operands);
#define REMOTE_OPERANDS(...) \
        sizeof((RemoteOperand[]){ __VA_ARGS__ }) / sizeof(RemoteOperand), (RemoteOperand[]){ __VA_ARGS__ }
#define REMOTE_OPERATE(program, op, label, result, ...) \
        remote_program_op((program), (op), (label), (result), REMOTE_OPERANDS(__VA_ARGS__))
#define REMOTE_CALL(program, on_error, result, nr, ...) \
        remote_program_call((program), (on_error), (result), (nr), REMOTE_OPERANDS(__VA_ARGS__))
void remote_program_jump(RemoteProgram *program, unsigned label);

/* Descriptors into the target: n (at most 4) of ours, borrowed until remote_transact() returns, are there as numbers in
 * n words from word on, close-on-exec. Goes to on_error if they cannot be had (no descriptor free, a security module):
 * remote_program_close() may then be run on all of those words. The program closes what it was given. */
void remote_program_give(RemoteProgram *program, const int *fds, size_t n, unsigned word, unsigned on_error);
/* Notes what the descriptor in word is, right behind the call that made it; remote_program_give() does that itself. */
void remote_program_note(RemoteProgram *program, unsigned word);
/* Closes the descriptor in word if it is still what was noted, and forgets it. Nothing is done for one that was never
 * made (0 or an error in word). */
void remote_program_close(RemoteProgram *program, unsigned word);

/* The program waits here for us (15 ms at most, then on_error): answer is called with all threads standing, may read
 * and write words by remote_program_get() and _set(), and says 0: go on; anything else: on_error. */
typedef int (*RemoteAnswer)(void *userdata, RemoteProgram *program, const Target *target);
void remote_program_ask(RemoteProgram *program, RemoteAnswer answer, void *userdata, unsigned on_error);
/* Answered together with the next question, before it and in this order: each waiting costs the target what several do. */
void remote_program_ask_along(RemoteProgram *program, RemoteAnswer answer, void *userdata);
/* For answers: a copy of the descriptor in word, the caller's to close. -errno. */
int remote_program_take(const RemoteProgram *program, const Target *target, unsigned word);

/* Before its first instruction that must not be half done: from the next question on to the end of the program the
 * other threads are kept waiting, whatever becomes of us. Without it they go on the moment we die, while the program
 * runs. What unmaps or maps at fixed addresses cannot do without. That question fails if it cannot be done. */
void remote_program_hold(RemoteProgram *program);

/* In tests, where a safeguard is left out: it sleeps, and what that keeps from happening has the time to. */
void remote_program_dawdle(RemoteProgram *program, uint64_t nsec);

typedef struct RemoteTransaction {
        RemoteProgram *program;
        uint64_t patience_nsec;         /* how long those that stand wait for those that do not yet; 0: 1.5 ms */
        uint64_t run_nsec;              /* then STOPPED jumps; 0: 1.1 ms */
        uint64_t expect_nsec;           /* how long it will take from its first answer on: it is not looked at sooner than
                                         * it can have ended, once it was answered all it asks */
        void (*on_standing)(void *userdata); /* NULL, or called when all stand, before anything else is done */
        void *userdata;
        size_t threads, workers;        /* filled in: how many stood, how many cannot be stopped and run on */
        uint64_t stop_nsec, ran_nsec;   /* filled in: that some thread stood; of it, since its first question was answered */
} RemoteTransaction;

/* Stops all threads, runs the program in one of them, lets go. 0: it ran to its end, its words are as it left them.
 * REMOTE_E_LOST: it was begun, and ends without us. Any other: it was not begun. REMOTE_E_BUSY: also if a thread did
 * not stop in time or sleeps in a call that must not be interrupted, or there are more than can be held. REMOTE_E_UNFIT:
 * also if a seccomp filter does not allow one of the calls: with us dies what suspends it. -errno; -E2BIG, -EINVAL: the
 * program is none. */
int remote_transact(Remote *remote, Target *target, RemoteTransaction *transaction);
