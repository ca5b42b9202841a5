/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "merge/remap.h"

#include "host/uapi.h"

#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>

/*
 * What the programs of remap-merge.c and remap-undo.c share: a table of ranges that they walk, the ioctls of a
 * userfaultfd with their structures, and the way back of moved pages. See remap-program.c.
 */

/* madvise(2) of 5.14, younger than some C libraries. */
#define REMAP_POPULATE_READ 22
#define REMAP_POPULATE_WRITE 23

/* A mapping of the pool is registered so. Write-protection makes a fork copy the page tables. */
#define REMAP_GUARD_MODE (UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR | UFFDIO_REGISTER_MODE_WP)

#define REMAP_ADVICE_MAX 4U

/* Words of one range in the table. */
enum {
        ROW_START,
        ROW_BYTES,
        ROW_PAGES,
        ROW_OFFSET,             /* merging: in the pool, bytes */
        ROW_NEIGHBOUR,          /* undoing */
        ROW_WHOLE_START,        /* undoing: with the neighbour's page */
        ROW_WHOLE_BYTES,
        ROW_SCRATCH,            /* in the scratch mapping, bytes */
        ROW_ALONE,              /* merging */
        ROW_FLAGS,              /* of mmap(2), MAP_FIXED and MAP_ANONYMOUS left out */
        ROW_ADVICE,             /* … REMAP_ADVICE_MAX of them, 0: none */
        ROW_RESULT = ROW_ADVICE + REMAP_ADVICE_MAX,
        ROW_ERROR,
        ROW_DONE_BYTES,
        ROW_WORDS,
};

/* A program under construction, and the words that every row is unpacked into. */
typedef struct RemapProgram {
        RemoteProgram *p;
        unsigned rows, row, rows_end;   /* the table; the address of the row at hand, and of the end */
        unsigned field;                 /* an address within it */
        unsigned values;                /* ROW_RESULT words: the row's, copied */
        unsigned there;                 /* where its pages are in the scratch mapping */
        unsigned scratch, scratch_bytes;
        unsigned reg, range, move;      /* structures */
        unsigned error;                 /* the result of the call that failed */
        unsigned temporary;
        RemapBatch *batch;              /* borrowed, as is … */
        const RemoteTransaction *transaction; /* … this, while it runs */
        bool undo;
} RemapProgram;

int remap_program_new(RemapBatch *batch, RemapProgram *ret);
void remap_program_done(RemapProgram *program);

static inline RemoteOperand row_value(const RemapProgram *program, unsigned field) {
        return remote_word(program->values + field);
}

/* The loop over the rows: begin, …, next. Rows whose result is not the given one are passed over. until_stopped: none but
 * the first is begun when time is up. */
typedef struct RemapLoop {
        unsigned again, next, end;
} RemapLoop;
RemapLoop remap_loop_begin(RemapProgram *program, RemapResult only, bool until_stopped);
void remap_loop_next(RemapProgram *program, const RemapLoop *loop);
/* Stores the result of the row at hand. */
void remap_row_result(RemapProgram *program, RemapResult result);
void remap_row_error(RemapProgram *program);
void remap_row_done(RemapProgram *program); /* how far the last move came */

void remap_register(RemapProgram *program, unsigned uffd, RemoteOperand start, RemoteOperand bytes, uint64_t mode,
                    unsigned on_error);
/* UFFDIO_UNREGISTER or UFFDIO_WAKE; what fails is passed over. */
void remap_range(RemapProgram *program, unsigned uffd, uint64_t request, RemoteOperand start, RemoteOperand bytes);
/* A mapping of the row's size, with its flags and these. fd: REMAP_NO_FILE for an anonymous one. */
#define REMAP_NO_FILE remote_value(UINT64_MAX)
void remap_mmap(RemapProgram *program, RemoteOperand start, int flags, RemoteOperand fd, RemoteOperand offset,
                unsigned on_error);
void remap_advise(RemapProgram *program, RemoteOperand start, unsigned on_error);
/* The scratch mapping, registered with uffd. */
void remap_scratch(RemapProgram *program, unsigned uffd, unsigned on_error);
void remap_unscratch(RemapProgram *program);
/* Of what was to be moved or copied (the words say whereto, from where, how many bytes) so many bytes came over: they say
 * the same of the rest from then on. Where there is none it goes on at done. */
void remap_go_on(RemapProgram *program, unsigned to, unsigned from, unsigned size, unsigned came, unsigned done);
/* Moves the row's pages from scratch to where they belong, as many as are there, however often it takes. */
void remap_move_in(RemapProgram *program, unsigned uffd);
/* Where a control of the tests left a safeguard out: long enough to be seen. */
#define REMAP_DAWDLE_NSEC (300 * NSEC_PER_USEC)

/* With the next question, all threads standing, before anything is mapped: waits for the guard (RemapSettle), and
 * passes over the ranges whose mapping is not what was planned for any more. What lies there now may be anything, or
 * nothing; then the program's own mappings might come to lie there. */
void remap_ask(RemapProgram *program, bool undo);

/* Runs it, and reads the results back into the batch. */
int remap_transact(Remote *remote, Target *target, RemapProgram *program);
