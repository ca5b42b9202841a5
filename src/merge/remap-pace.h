/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "base/util.h"

/*
 * How much a batch of route remap may be, so that a target stands for as long as it may and not longer. Learnt from
 * each stop: what it costs whatever is done in it, and what each unit of work costs. Where the work in a stop takes too
 * long all the same, batches are halved, and grow slowly again.
 *
 * A unit is a page; each range counts as some more, what its mappings cost.
 */
#define REMAP_PACE_STOP_NSEC (2 * NSEC_PER_MSEC)        /* no stop should last longer */
#define REMAP_PACE_GOAL_NSEC (1500 * NSEC_PER_USEC)     /* what batches are made for */

typedef struct RemapPace {
        uint64_t fixed_nsec, unit_nsec;
        uint32_t share;         /* of what there seems to be time for: 1/REMAP_PACE_WHOLE */
        uint32_t range_units;
} RemapPace;

#define REMAP_PACE_WHOLE 1024U

RemapPace remap_pace_first(bool undo);
static inline uint64_t remap_pace_units(const RemapPace *pace, uint32_t n_pages) { return n_pages + pace->range_units; }
/* How many units a batch has. */
uint64_t remap_pace_batch(const RemapPace *pace);
/* A batch of so many units was carried out: how long the target stood, and for how long of that its program ran. */
void remap_pace_learn(RemapPace *pace, uint64_t units, uint64_t stop_nsec, uint64_t ran_nsec);
