/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The rule of judge.h, page by page in bitmaps: a block without losses costs a few words a look.
 *
 * Turns are 16 bits and wrap: no wait is longer than 2^JUDGE_LEVEL_MAX of them, and every block is turned in each.
 */
#include "merge/judge.h"

#include <malloc.h>
#include <string.h>

#define ONE 10000U              /* CPU, in the unit of shares */

#define FOREACH_PAGE(page, set)                                                         \
        for (unsigned _word = 0; _word < BLOCK_PAGES / 64; _word++)                     \
                for (uint64_t _bits = (set)[_word], page;                               \
                     _bits && ((page = _word * 64 + (unsigned)__builtin_ctzll(_bits)), true); _bits &= _bits - 1)

static void account(Block *block, ptrdiff_t bytes) { block->space->table->bytes += (uint64_t)bytes; }

static JudgeRecord *record_resize(Block *block, bool terms) {
        JudgeRecord *old = block->judge, *record;
        size_t before = old ? malloc_usable_size(old) : 0;

        if (old && (old->has_terms || !terms))
                return old;
        record = realloc(old, sizeof *record + (terms ? BLOCK_PAGES * sizeof(JudgeTerm) : 0));
        if (!record)
                return NULL;
        if (!old)
                memset(record, 0, sizeof *record);
        if (terms)
                memset(record->terms, 0, BLOCK_PAGES * sizeof(JudgeTerm));
        record->has_terms = terms;
        block->judge = record;
        account(block, (ptrdiff_t)malloc_usable_size(record) - (ptrdiff_t)before);
        return record;
}

/* What is known of pages that nobody follows any more is outdated. */
static void forget(Block *block, const PageSet pages) {
        for (unsigned i = 0; i < BLOCK_PAGES / 64; i++) {
                uint64_t keep = ~pages[i];

                block->hashed[i] &= keep;
                block->zero[i] &= keep;
                block->merged[i] &= keep;
                block->zeropage[i] &= keep;
                block->given[i] &= keep;
                block->forked[i] &= keep;
                block->twin[i] &= keep;
                block->saves[i] &= keep;
                block->changed[i] &= keep;
        }
}

static void convict(Block *block, uint16_t turn, unsigned page) {
        JudgeTerm *term = &block->judge->terms[page];

        term->level += term->level < JUDGE_LEVEL_MAX;
        term->until = (uint16_t)(turn + (1U << term->level));
        page_set_add(block->alone, page);
}

int judge_broken(Block *block, uint16_t turn, const PageSet broken, bool judging) {
        JudgeRecord *record = block->judge;
        PageSet losses;
        unsigned n_losses;

        if (!record)
                return 0;
        for (unsigned i = 0; i < BLOCK_PAGES / 64; i++)
                losses[i] = broken[i] & (record->young[0][i] | record->young[1][i]);
        n_losses = page_set_count(losses);
        if (judging && n_losses > 0) {
                record = record_resize(block, true);
                if (!record)
                        return -ENOMEM;
                FOREACH_PAGE(page, losses)
                        convict(block, turn, (unsigned)page);
                forget(block, losses);
        }
        record->breaks += page_set_count(broken);
        record->losses += n_losses;
        for (unsigned i = 0; i < BLOCK_PAGES / 64; i++) {
                record->merged[i] &= ~broken[i];
                record->young[0][i] &= ~broken[i];
                record->young[1][i] &= ~broken[i];
        }
        return (int)n_losses;
}

int judge_look(Block *block, uint16_t turn, const PageSet looked, const PageSet merged, const PageSet broken,
               bool judging) {
        JudgeRecord *record = block->judge;
        int losses;

        if (!record) {
                if (!page_set_any(merged))
                        return 0;
                record = record_resize(block, false);
                if (!record)
                        return -ENOMEM;
                record->turn = turn;
        }
        losses = judge_broken(block, turn, broken, judging);
        if (losses < 0)
                return losses;
        record = block->judge;
        for (unsigned i = 0; i < BLOCK_PAGES / 64; i++) {
                uint64_t now = merged[i] & looked[i];
                uint64_t fresh = now & ~record->merged[i];

                record->merges += (unsigned)__builtin_popcountll(fresh);
                record->merged[i] = (record->merged[i] & ~looked[i]) | now;
                record->young[0][i] = (record->young[0][i] | fresh) & record->merged[i];
                record->young[1][i] &= record->merged[i] & ~fresh;
        }
        return losses;
}

static void age(JudgeRecord *record) {
        if (record->has_terms)
                FOREACH_PAGE(page, record->young[1])
                        record->terms[page].level /= 2;
        memcpy(record->young[1], record->young[0], sizeof record->young[1]);
        memset(record->young[0], 0, sizeof record->young[0]);
}

unsigned judge_turn(Block *block, uint16_t turn, bool judging) {
        JudgeRecord *record = block->judge;
        PageSet free = { 0 };
        unsigned n;

        if (!record)
                return 0;
        /* After two turns nothing is young any more. */
        for (unsigned i = 0; i < 2 && record->turn != turn; i++) {
                age(record);
                record->turn++;
        }
        record->turn = turn;
        if (!page_set_any(block->alone))
                return 0;
        FOREACH_PAGE(page, block->alone)
                if (!judging || (int16_t)(turn - record->terms[page].until) >= 0)
                        page_set_add(free, (unsigned)page);
        n = page_set_count(free);
        if (n == 0)
                return 0;
        forget(block, free);
        for (unsigned i = 0; i < BLOCK_PAGES / 64; i++) {
                block->alone[i] &= ~free[i];
                block->changed[i] |= free[i];
        }
        block->recheck = block->unsettled = true;
        return n;
}

void judge_drop(Block *block) {
        JudgeRecord *record = block->judge;

        if (!record)
                return;
        memset(record->merged, 0, sizeof record->merged);
        memset(record->young, 0, sizeof record->young);
}

void judge_count(const Block *block, uint16_t turn, JudgeCounts *add) {
        const JudgeRecord *record = block->judge;

        if (!record)
                return;
        add->merges += record->merges;
        add->breaks += record->breaks;
        add->losses += record->losses;
        if (!page_set_any(block->alone))
                return;
        FOREACH_PAGE(page, block->alone) {
                int left = (int16_t)(record->terms[page].until - turn);

                add->alone++;
                if (left > (int)add->turns_left_max)
                        add->turns_left_max = (unsigned)left;
        }
}

/* Brings the ring to the second that now is: those between passed without anything. */
static void budget_turn(JudgeBudget *budget, uint64_t second) {
        for (unsigned i = 0; i < JUDGE_SLOTS && budget->second < second; i++)
                budget->nsec[++budget->second % JUDGE_SLOTS] = 0;
        budget->second = second;
}

/* What a quota gives in a time. */
static int64_t share_of(uint64_t nsec, uint32_t quota) { return (int64_t)(nsec / ONE * quota + nsec % ONE * quota / ONE); }

static void budget_spend(JudgeBudget *budget, uint64_t now_nsec, uint64_t cost_nsec, uint32_t quota) {
        uint64_t elapsed = now_nsec > budget->noted_nsec ? now_nsec - budget->noted_nsec : 0;

        elapsed = MIN_OF(elapsed, 2 * JUDGE_OWED_NSEC); /* longer makes no difference */
        budget->saved_nsec = MIN_OF(budget->saved_nsec + share_of(elapsed, quota), share_of(JUDGE_KEPT_NSEC, quota));
        budget->saved_nsec -= (int64_t)MIN_OF(cost_nsec, (uint64_t)INT64_MAX / 2);
        budget->saved_nsec = MAX_OF(budget->saved_nsec, -share_of(JUDGE_OWED_NSEC, quota));
        budget->noted_nsec = MAX_OF(budget->noted_nsec, now_nsec);
}

void judge_budget_note(JudgeBudget *budget, uint64_t now_nsec, uint64_t breaks, uint64_t flushes, uint32_t running,
                       uint32_t quota) {
        uint64_t second = now_nsec / NSEC_PER_SEC, cost;

        if (!budget->begun)
                *budget = (JudgeBudget){
                        .second = second,
                        .breaks = breaks,
                        .flushes = flushes,
                        .begun = true,
                        .break_nsec = budget->break_nsec ?: JUDGE_BREAK_NSEC,
                        .flush_nsec = budget->flush_nsec ?: JUDGE_FLUSH_NSEC,
                };
        budget_turn(budget, second);
        cost = (breaks - MIN_OF(breaks, budget->breaks)) * budget->break_nsec +
               (flushes - MIN_OF(flushes, budget->flushes)) * budget->flush_nsec * MIN_OF(running, ONE) / ONE;
        budget->nsec[second % JUDGE_SLOTS] += cost;
        budget_spend(budget, now_nsec, cost, quota);
        budget->breaks = breaks;
        budget->flushes = flushes;
}

uint64_t judge_budget_wait_nsec(JudgeBudget *budget, uint32_t quota) {
        int64_t missing = share_of(JUDGE_PORTION_NSEC, quota) - budget->saved_nsec;

        if (!budget->begun)
                return 0;
        if (budget->saved_nsec <= 0)
                budget->refilling = true;
        else if (missing <= 0)
                budget->refilling = false;
        return budget->refilling ? (uint64_t)missing * ONE / quota + 1 : 0;
}

uint32_t judge_budget_share(const JudgeBudget *budget, uint64_t now_nsec) {
        uint64_t second = now_nsec / NSEC_PER_SEC, sum = 0;

        for (uint64_t s = budget->second; s + JUDGE_SLOTS > second && s + JUDGE_SLOTS > budget->second; s--) {
                sum += budget->nsec[s % JUDGE_SLOTS];
                if (s == 0)
                        break;
        }
        return (uint32_t)MIN_OF(sum * ONE / (JUDGE_SLOTS * NSEC_PER_SEC), (uint64_t)UINT32_MAX);
}
