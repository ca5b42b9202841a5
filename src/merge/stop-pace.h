/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "base/util.h"

/*
 * How much is done to a target in one stop (a batch, of route remap or zero), so that it stands for as long as it may
 * and not longer. Learnt from each stop: what it costs whatever is done in it, before and after the program and in the
 * program, and what each unit of work costs; the latter two from how the program's time goes with the size of batches.
 * (Its time for each unit alone would be the greater the smaller batches are, and make them smaller still.) Where the
 * work in a stop takes too long all the same, batches are halved, and grow slowly again.
 *
 * A unit is a page; each range counts as some more, what its mappings cost.
 */
#define STOP_PACE_MAX_NSEC (2 * NSEC_PER_MSEC)  /* no stop should last longer */
/* What batches are made for; where more than half of that goes by before and after the work (a guest whose page tables
 * are shadowed), for work that takes as long as that: short stops that do next to nothing are so many that the target
 * would stand for several times as long in all. */
#define STOP_PACE_GOAL_NSEC (1500 * NSEC_PER_USEC)

typedef struct StopPace {
        uint64_t fixed_nsec;            /* of a stop, outside the program */
        uint64_t begin_nsec, unit_nsec; /* of the program */
        double units, ran_nsec;         /* of a batch: moving means … */
        double spread, slope_spread;    /* … and how far from them: squared, and multiplied with each other */
        uint32_t share;         /* of what there seems to be time for: 1/STOP_PACE_WHOLE */
        uint32_t range_units;
} StopPace;

#define STOP_PACE_WHOLE 1024U

/* Asked by who stops a target several times, between two stops, for as long as the caller likes; true: what is not done yet
 * is to be left. */
typedef bool (*StopPause)(void *userdata);

/* When nothing is learnt yet: what a unit probably costs. range_units: as how many a range counts, besides its pages. */
StopPace stop_pace_first(uint64_t unit_nsec, uint32_t range_units);
static inline uint64_t stop_pace_units(const StopPace *pace, uint32_t n_pages) { return n_pages + pace->range_units; }
/* How long a stop is to be. */
uint64_t stop_pace_goal_nsec(const StopPace *pace);
/* So long after its beginning no more work is begun in a stop; what was begun is ended. */
static inline uint64_t stop_pace_begin_nsec(const StopPace *pace) { return stop_pace_goal_nsec(pace) / 15 * 11; }
/* How many units a batch has. */
uint64_t stop_pace_batch(const StopPace *pace);
/* A long range may be cut. A piece of fewer pages is not worth what its mappings cost. */
#define STOP_PACE_PIECE_MIN 16U
/* How many pages of one more range a batch of all units has room for when used ones are taken; an empty one for a piece
 * at least. */
uint32_t stop_pace_room(const StopPace *pace, uint64_t all, uint64_t used);
/* How long the program takes for so many. */
static inline uint64_t stop_pace_ran_nsec(const StopPace *pace, uint64_t units) {
        return pace->begin_nsec + units * pace->unit_nsec;
}
/* A batch of so many units was carried out: how long the target stood, and for how long of that its program ran. */
void stop_pace_learn(StopPace *pace, uint64_t units, uint64_t stop_nsec, uint64_t ran_nsec);
