/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "merge/zero-plan.h"
#include "target/remote-program.h"

/* The program that gives a batch of runs back, and what it left. Its scratch lies behind the regions of remote calls,
 * on an address that a huge page can be moved to as it is. */
#define ZERO_SCRATCH ((uint64_t)0x6b736da00000)
#define ZERO_SCRATCH_PAGES ((uint64_t)8192)
#define ZERO_RUNS_MAX 192U

/* Of runs that begin with this one, those that lie so close together that they are registered at once: registering cuts
 * a mapping in two places and costs more than a few pages in between. *ret_end: where the last one ends. */
#define ZERO_SPAN_GAP_PAGES 16U
size_t zero_span(const ZeroRun *runs, size_t n, uint64_t *ret_end);

typedef struct ZeroBatch {
        RemoteProgram *program;
        size_t n_runs;
        unsigned table;         /* a word, as those that follow, which are valid when it was run */
        unsigned visited;       /* how many runs it had the time for, the first ones */
        unsigned taken, back;   /* bytes that were taken away, and that were put back */
        unsigned lost;          /* pages that could not be: their mapping was gone */
} ZeroBatch;

/* In tests single safeguards are left out, to see that it is noticed. */
enum {
        ZERO_GUARD_MISSING = 1 << 0,    /* who touches a page that is away waits */
        ZERO_GUARD_BACK = 1 << 1,       /* what is not zero is put back */
        ZERO_GUARD_MOVE = 1 << 2,       /* taken away first, looked at there: not looked at in place and dropped */
        ZERO_GUARD_EVENT = 1 << 3,      /* who discards pages that are away waits, and they do not come back */
};
#ifdef ZERO_TEST
extern unsigned zero_test_leave_out;
extern uint64_t zero_test_patience_nsec; /* RemoteTransaction.patience_nsec */
extern uint64_t zero_test_dawdle_nsec; /* between taking and looking: whatever can happen then, happens */
extern uint64_t zero_test_units_min; /* in a batch, however long that takes */
#define zero_guards(guard) (!(zero_test_leave_out & (guard)))
#else
#define zero_guards(guard) true
#define zero_test_patience_nsec ((uint64_t)0)
#define zero_test_dawdle_nsec ((uint64_t)0)
#define zero_test_units_min ((uint64_t)0)
#endif

/* As many of the runs as fit: *ret->n_runs; the program is the caller's to free. devicefd is borrowed until it was run. */
int zero_batch_make(const ZeroRun *runs, size_t n, int devicefd, ZeroBatch *ret);
