/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "base/util.h"

/*
 * CPUQuota=: how much CPU time may be used, given how much was. Knows neither clocks nor threads: whoever asks hands in
 * the time (any clock that does not step) and the CPU time used so far by everything that counts, as a running total.
 *
 * The promise: in any 60 seconds no work is let on once the quota's share of them is used, and while there is work the
 * share is used. Nothing interrupts work: what is under way when the share is used up is the error.
 */
#define BUDGET_WINDOW_NSEC (60 * NSEC_PER_SEC)
#define BUDGET_SLOT_NSEC (100 * NSEC_PER_MSEC)
/* The one being filled, and as many as cover the window whenever that one began. */
#define BUDGET_SLOTS (BUDGET_WINDOW_NSEC / BUDGET_SLOT_NSEC + 1)

typedef struct Budget {
        uint64_t allowance_nsec;        /* of CPU time in a window */
        /* How use is paced, from the quota: */
        uint64_t free_nsec;             /* used in a window without a pace; 0: all is paced, evenly */
        int64_t portion_nsec;           /* what is saved up before work goes on */
        int64_t saved_max_nsec, owed_max_nsec; /* and the most that is saved up, and owed */
        uint64_t wait_max_nsec;         /* after which to ask again: the pace changes */
        uint64_t rate_max_nsec;         /* CPU time a slot */
        uint64_t slots[BUDGET_SLOTS];   /* CPU time used; slot number modulo BUDGET_SLOTS */
        uint64_t slot;                  /* the number of the one being filled: time / BUDGET_SLOT_NSEC */
        uint64_t used_nsec;             /* the sum of all slots */
        uint64_t seen_nsec, seen_cpu_nsec;      /* as last handed in */
        uint64_t rate_nsec;             /* the pace: CPU time a slot */
        int64_t saved_nsec;             /* CPU time that may be used at once beyond what is free; below 0: owed */
        bool refilling;                 /* it was used up and is not yet saved again, */
        uint64_t refilled_at_nsec;      /* but then */
        uint64_t wait_until_nsec;       /* as last answered; 0: never had to wait */
        uint64_t throttled_nsec;
} Budget;

/* quota: 1/10,000 of a CPU. cpu_nsec counts from 0: what the total holds at the first question was used just then. */
void budget_init(Budget *budget, uint32_t quota, uint64_t now);
/* What was used stays used. even_quota: 0, or for CPUs that others want: from now on no more than this is used, evenly,
 * in portions of a tenth of a second's worth (of more, where that is less than 1 ms), and nothing at once. quota holds as
 * well. */
void budget_set_quota(Budget *budget, uint32_t quota, uint32_t even_quota);

#define BUDGET_WAIT_MAX_NSEC (100 * NSEC_PER_MSEC)
#define BUDGET_WAIT_MAX_EVENLY_NSEC NSEC_PER_SEC
/* 0: work may go on; else how long to do nothing and then ask again, at most the one of these that applies. */
uint64_t budget_wait_nsec(Budget *budget, uint64_t now, uint64_t cpu_nsec);
/* After a 0: how much CPU time may be used before the next answer is a wait. */
uint64_t budget_left_nsec(const Budget *budget);

typedef struct BudgetStats {
        uint64_t used_nsec;             /* in the last BUDGET_WINDOW_NSEC */
        uint64_t throttled_nsec;        /* spent waiting, ever */
        bool throttled;                 /* work waits, or had to within the last second */
} BudgetStats;
void budget_stats(Budget *budget, uint64_t now, uint64_t cpu_nsec, BudgetStats *ret);
