/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * A sliding window and, within it, a pace.
 *
 * While less than half of the window's allowance is used, work is not held back at all: a daemon that starts, or a new
 * container, is dealt with at once. Beyond, it is paced: CPU time is saved up at a rate and used in small portions. A
 * token bucket alone cannot do both: one that is deep enough for such a burst must refill slowly to keep the promise,
 * and a saturated daemon would then never get more than half of its quota.
 *
 * The rate is the greatest at which work could go on evenly for a whole window without ever meeting the limit, given
 * what was used in the window and when that falls out of it. Used evenly, this is the quota itself. After a burst it
 * is less until the burst falls out of the window, instead of the quota first and nothing at all afterwards.
 *
 * Where others want the CPU a smaller quota is used evenly: all of it is paced, in portions that nobody notices, and
 * what nobody used stays unused. That is a pace and no limit for a window: what was used before, when nobody else
 * wanted it, is no reason to stand still now. Nor is what could not be done in portions (a daemon that starts), for long.
 */

#include "daemon/budget.h"

#include <string.h>

#define QUOTA_ONE 10000U
/* The portions: what the quota gives in this time, short enough to be smooth. */
#define PORTION_TIME_NSEC (200 * NSEC_PER_MSEC)
/* But no smaller than this, since each has its price (ksmd is stopped and started), unless they would come more seldom
 * than so. */
#define PORTION_MIN_NSEC (20 * NSEC_PER_MSEC)
#define PORTION_TIME_MAX_NSEC NSEC_PER_SEC
#define PORTION_TIME_EVENLY_NSEC (100 * NSEC_PER_MSEC)
#define PORTION_MIN_EVENLY_NSEC NSEC_PER_MSEC
/* Who waited for a portion and came back has used some of it for that: what is left, if not less than so, is used. */
#define PORTION_LEFT_SHARE 2
/* So much may be saved up while there is no work, or no CPU to do it, and is then used in one go: the share of a minute
 * with such gaps is reached all the same. */
#define SAVED_TIME_NSEC (5 * NSEC_PER_SEC)
/* Of an even pace no more than what it gives in this time is owed. */
#define OWED_TIME_EVENLY_NSEC (5 * NSEC_PER_SEC)

__extension__ typedef unsigned __int128 Wide;

static uint64_t scale(uint64_t value, uint64_t by, uint64_t of) { return (uint64_t)((Wide)value * by / of); }

static int64_t portion_nsec(uint64_t allowance, uint64_t time_nsec, uint64_t min_nsec) {
        uint64_t usual = scale(allowance, time_nsec, BUDGET_WINDOW_NSEC);
        uint64_t most = scale(allowance, PORTION_TIME_MAX_NSEC, BUDGET_WINDOW_NSEC);
        uint64_t portion = usual >= min_nsec ? usual : MIN_OF(most, min_nsec);

        return (int64_t)MAX_OF(portion, (uint64_t)1);
}

static int64_t beyond_free_nsec(const Budget *budget) {
        return budget->used_nsec > budget->free_nsec ? (int64_t)(budget->used_nsec - budget->free_nsec) : 0;
}

/* Over the next n slots the oldest n fall out: used - oldest + n * rate may not exceed the allowance, for any n. The
 * last n bounds the rate by the quota. */
static void set_rate(Budget *budget) {
        uint64_t room = budget->allowance_nsec, rate = UINT64_MAX, used = budget->used_nsec;

        for (uint64_t n = 1; n <= BUDGET_SLOTS; n++) {
                used -= budget->slots[(budget->slot + n) % BUDGET_SLOTS];
                rate = MIN_OF(rate, room > used ? (room - used) / n : 0);
        }
        budget->rate_nsec = MIN_OF(rate, budget->rate_max_nsec);
}

static void turn_slots(Budget *budget, uint64_t now) {
        uint64_t slot = now / BUDGET_SLOT_NSEC;

        if (slot == budget->slot)
                return;
        if (slot - budget->slot >= BUDGET_SLOTS) {
                memset(budget->slots, 0, sizeof budget->slots);
                budget->used_nsec = 0;
        } else
                for (uint64_t s = budget->slot + 1; s <= slot; s++) {
                        budget->used_nsec -= budget->slots[s % BUDGET_SLOTS];
                        budget->slots[s % BUDGET_SLOTS] = 0;
                }
        budget->slot = slot;
        set_rate(budget);
}

static void save_up(Budget *budget, uint64_t elapsed) {
        uint64_t saved = scale(budget->rate_nsec, elapsed, BUDGET_SLOT_NSEC);
        int64_t room = budget->saved_max_nsec - budget->saved_nsec;

        if (room > 0)
                budget->saved_nsec += (int64_t)MIN_OF(saved, (uint64_t)room);
}

/* Counted as used when it is told: whoever works asks every few milliseconds. A clock that stepped back, or a total
 * that shrank, is taken for one that stood. */
static void account(Budget *budget, uint64_t now, uint64_t cpu_nsec) {
        uint64_t used = cpu_nsec > budget->seen_cpu_nsec ? cpu_nsec - budget->seen_cpu_nsec : 0;

        budget->seen_cpu_nsec = MAX_OF(cpu_nsec, budget->seen_cpu_nsec);
        budget->saved_nsec -= (int64_t)used;
        budget->saved_nsec = MAX_OF(budget->saved_nsec, -budget->owed_max_nsec);
        if (now > budget->seen_nsec) {
                if (budget->wait_until_nsec > budget->seen_nsec)
                        budget->throttled_nsec += MIN_OF(now, budget->wait_until_nsec) - budget->seen_nsec;
                turn_slots(budget, now);
                save_up(budget, now - budget->seen_nsec);
                budget->seen_nsec = now;
        }
        budget->slots[budget->slot % BUDGET_SLOTS] += used;
        budget->used_nsec += used;
        /* What was used of the free part is not owed. */
        if (budget->free_nsec > 0)
                budget->saved_nsec = MAX_OF(budget->saved_nsec, budget->portion_nsec - beyond_free_nsec(budget));
}

void budget_init(Budget *budget, uint32_t quota, uint64_t now) {
        *budget = (Budget){ .slot = now / BUDGET_SLOT_NSEC, .seen_nsec = now };
        budget_set_quota(budget, quota, 0);
}

void budget_set_quota(Budget *budget, uint32_t quota, uint32_t even_quota) {
        budget->allowance_nsec = scale(BUDGET_WINDOW_NSEC, quota, QUOTA_ONE);
        if (even_quota > 0) {
                uint64_t even = scale(BUDGET_WINDOW_NSEC, even_quota, QUOTA_ONE);

                budget->portion_nsec = portion_nsec(even, PORTION_TIME_EVENLY_NSEC, PORTION_MIN_EVENLY_NSEC);
                budget->saved_max_nsec = budget->portion_nsec;
                budget->owed_max_nsec = (int64_t)scale(even, OWED_TIME_EVENLY_NSEC, BUDGET_WINDOW_NSEC);
                budget->wait_max_nsec = BUDGET_WAIT_MAX_EVENLY_NSEC; /* to ask is a part of a small portion */
                budget->free_nsec = 0;
                budget->rate_max_nsec = scale(even, BUDGET_SLOT_NSEC, BUDGET_WINDOW_NSEC);
        } else {
                budget->portion_nsec = portion_nsec(budget->allowance_nsec, PORTION_TIME_NSEC, PORTION_MIN_NSEC);
                budget->saved_max_nsec = (int64_t)scale(budget->allowance_nsec, SAVED_TIME_NSEC, BUDGET_WINDOW_NSEC);
                budget->owed_max_nsec = INT64_MAX;
                budget->wait_max_nsec = BUDGET_WAIT_MAX_NSEC;
                budget->free_nsec = budget->allowance_nsec / 2;
                budget->rate_max_nsec = UINT64_MAX;
        }
        budget->saved_nsec = budget->portion_nsec; /* what was owed was owed to the other quota */
        budget->refilling = false;
        set_rate(budget);
}

/* How long until a portion is there; 0: it is. Rounded up: what is waited for is there then. */
static uint64_t refill_nsec(Budget *budget) {
        int64_t missing = budget->portion_nsec - budget->saved_nsec;
        bool was_refilling = budget->refilling;
        uint64_t wait;

        if (budget->saved_nsec <= 0)
                budget->refilling = true;
        else if (missing <= 0 ||
                 (budget->seen_nsec >= budget->refilled_at_nsec && missing <= budget->portion_nsec / PORTION_LEFT_SHARE))
                budget->refilling = false;
        if (!budget->refilling)
                return 0;
        if (budget->rate_nsec == 0)
                return budget->wait_max_nsec;
        wait = scale((uint64_t)missing, BUDGET_SLOT_NSEC, budget->rate_nsec) + 1;
        /* To ask costs something, too: that does not put it off. */
        if (!was_refilling || budget->refilled_at_nsec <= budget->seen_nsec ||
            budget->refilled_at_nsec > budget->seen_nsec + wait)
                budget->refilled_at_nsec = budget->seen_nsec + wait;
        return budget->refilled_at_nsec - budget->seen_nsec;
}

uint64_t budget_wait_nsec(Budget *budget, uint64_t now, uint64_t cpu_nsec) {
        uint64_t wait;

        account(budget, now, cpu_nsec);
        wait = MIN_OF(refill_nsec(budget), budget->wait_max_nsec);
        if (budget->used_nsec >= budget->allowance_nsec)
                wait = budget->wait_max_nsec;
        budget->wait_until_nsec = MIN_OF(budget->wait_until_nsec, budget->seen_nsec);
        if (wait > 0)
                budget->wait_until_nsec = budget->seen_nsec + wait;
        return wait;
}

uint64_t budget_left_nsec(const Budget *budget) {
        uint64_t left = (uint64_t)MAX_OF(budget->saved_nsec, (int64_t)0);

        if (budget->refilling || budget->used_nsec >= budget->allowance_nsec)
                return 0;
        if (budget->used_nsec < budget->free_nsec)
                left += budget->free_nsec - budget->used_nsec;
        return MIN_OF(left, budget->allowance_nsec - budget->used_nsec);
}

void budget_stats(Budget *budget, uint64_t now, uint64_t cpu_nsec, BudgetStats *ret) {
        account(budget, now, cpu_nsec);
        *ret = (BudgetStats){
                .used_nsec = budget->used_nsec,
                .throttled_nsec = budget->throttled_nsec,
                .throttled = budget->wait_until_nsec > 0 && now < budget->wait_until_nsec + NSEC_PER_SEC,
        };
}
