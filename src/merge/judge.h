/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "scan/block.h"

/*
 * Judgement: which merges were a mistake, and what follows (docs/judgement.md). Pure: all functions work on a block and
 * the time they are given, and touch nothing else.
 *
 * A merge costs work, and its undoing by a write costs the process a fault. It pays when the page stays merged for the
 * pay-back time. A page whose merge broke sooner is left alone: neither marked nor read, for two turns, four after the
 * second loss in a row, and so on. A merge that stood for the pay-back time halves what the page has against it.
 *
 * Time is counted in turns, each as long as the pay-back time. So "sooner" is at least one pay-back time and less than
 * two.
 */
#define JUDGE_LEVEL_MAX 7U              /* 128 turns */

/* Why a page is left alone: kept for blocks that had a loss. */
typedef struct JudgeTerm {
        uint16_t until;                 /* the turn in which it may merge again; while the page is in block->alone */
        uint8_t level;                  /* losses in a row, halved by merges that stood */
} JudgeTerm;

/* Of a block that holds or held merged pages; block->judge. */
struct JudgeRecord {
        PageSet merged;                 /* when last looked at */
        PageSet young[2];               /* of merged: since this turn, since the one before */
        PageSet told;                   /* what the probe was told is merged, and was not yet seen to break */
        uint32_t merges, breaks, losses; /* pages, since the record was made */
        uint32_t looked;                /* serial number of the last look */
        uint16_t turn;                  /* up to which it was turned */
        bool has_terms;
        JudgeTerm terms[];              /* BLOCK_PAGES, or none */
};

typedef struct JudgeCounts {
        uint64_t merges, breaks, losses; /* pages that became merged; of them written to; of those too soon */
        uint64_t alone;                 /* pages left alone now */
        unsigned turns_left_max;        /* the longest of them has to wait */
} JudgeCounts;

/* The block was looked at: of the pages in looked, those in merged are merged now; those in broken were, and are there
 * still, written to by the process. What was merged and is neither any more went away otherwise, which is nobody's
 * fault. judging: losses are left alone. Returns how many losses there were; -ENOMEM: nothing was taken in. */
int judge_look(Block *block, uint16_t turn, const PageSet looked, const PageSet merged, const PageSet broken,
               bool judging);

/* Only that pages that were merged broke, before the next look. The same results. */
int judge_broken(Block *block, uint16_t turn, const PageSet broken, bool judging);

/* To be called in every turn: what stood is forgiven, who waited long enough may merge again (and has to be read:
 * nothing is known of it). With judging off all of them. Returns how many pages were let go. */
unsigned judge_turn(Block *block, uint16_t turn, bool judging);

/* Nothing of the block is merged any more as far as we know: what was is not judged. */
void judge_drop(Block *block);

void judge_count(const Block *block, uint16_t turn, JudgeCounts *add);

/*
 * The budget (BreakQuota=): what breaks and TLB flushes may cost the processes, as a share of one CPU. Estimated from
 * counts, at what each costs here (host/fault-cost.h), or what it costs usually. It is spent evenly, in portions that
 * nobody notices: what costs more at once is saved up again before merging goes on. What was not spent is kept for a
 * second (ksmd has to wait for a CPU, too), and what was spent beyond it (breaks are not ours to hold back) is owed for ten.
 */
#define JUDGE_BREAK_NSEC 3000U          /* a write fault on a merged page, its copy included */
#define JUDGE_FLUSH_NSEC 2000U          /* a TLB flush by ksmd or the daemon: what it takes of a thread that runs */
#define JUDGE_SLOTS 10U
/* What the quota gives in these times is a portion, the most that is kept, and the most that is owed. */
#define JUDGE_PORTION_NSEC (200 * NSEC_PER_MSEC)
#define JUDGE_KEPT_NSEC NSEC_PER_SEC
#define JUDGE_OWED_NSEC (JUDGE_SLOTS * NSEC_PER_SEC)

typedef struct JudgeBudget {
        uint64_t nsec[JUDGE_SLOTS];     /* of each of the last seconds, in a ring */
        uint64_t second;                /* that is being counted */
        uint64_t breaks, flushes;       /* as last told */
        uint64_t noted_nsec;            /* when that was */
        bool begun;
        uint32_t break_nsec, flush_nsec; /* the caller's to set; 0: as usual */
        int64_t saved_nsec;             /* to be spent; below 0: owed */
        bool refilling;                 /* it was spent, and is not yet saved again */
} JudgeBudget;

/* breaks and flushes: counted since the daemon started. running: how many threads of the processes run at a time, in
 * 1/10,000, from 0 on. A flush costs only who runs: who makes it pays by CPUQuota=. More than one are taken for one. quota:
 * of one CPU, in 1/10,000, more than 0. */
void judge_budget_note(JudgeBudget *budget, uint64_t now_nsec, uint64_t breaks, uint64_t flushes, uint32_t running,
                       uint32_t quota);
/* 0: merging may go on; else for how long it may not, as of the last note. */
uint64_t judge_budget_wait_nsec(JudgeBudget *budget, uint32_t quota);
/* The share of one CPU, in 1/10,000, that they cost over the last ten seconds. */
uint32_t judge_budget_share(const JudgeBudget *budget, uint64_t now_nsec);
