/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "merge/stop-pace.h"

/* As measured on an idle machine (docs/remap-programs.md); what is learnt is kept within these. */
#define FIXED_FIRST_NSEC (500 * NSEC_PER_USEC)
#define FIXED_MAX_NSEC (900 * NSEC_PER_USEC)
#define BEGIN_FIRST_NSEC (50 * NSEC_PER_USEC)
#define BEGIN_MAX_NSEC (400 * NSEC_PER_USEC)
#define UNIT_MIN_NSEC 200U
#define UNIT_MAX_NSEC 12000U
#define UNITS_FIRST 100U
#define SHARE_MIN (STOP_PACE_WHOLE / 16)
#define SHARE_STEP (STOP_PACE_WHOLE / 32)
#define UNITS_MIN 24U                   /* one short run: less than that would be all stop and no work */
#define WEIGHT (1.0 / 8)                /* of the last batch */
#define SPREAD_MIN (1.0 / 16)           /* of the mean: batches of less different sizes tell nothing of a unit */

StopPace stop_pace_first(uint64_t unit_nsec, uint32_t range_units) {
        const double spread = (double)UNITS_FIRST * UNITS_FIRST / 4;

        return (StopPace){
                .fixed_nsec = FIXED_FIRST_NSEC,
                .begin_nsec = BEGIN_FIRST_NSEC,
                .unit_nsec = unit_nsec,
                .units = UNITS_FIRST,
                .ran_nsec = (double)(BEGIN_FIRST_NSEC + UNITS_FIRST * unit_nsec),
                .spread = spread,
                .slope_spread = spread * (double)unit_nsec,
                .share = STOP_PACE_WHOLE,
                .range_units = range_units,
        };
}

uint64_t stop_pace_goal_nsec(const StopPace *pace) {
        uint64_t fixed = pace->fixed_nsec + pace->begin_nsec;

        return MAX_OF(STOP_PACE_GOAL_NSEC, 2 * fixed);
}

uint64_t stop_pace_batch(const StopPace *pace) {
        uint64_t work = stop_pace_goal_nsec(pace) - pace->fixed_nsec - pace->begin_nsec;

        return MAX_OF(work / pace->unit_nsec * pace->share / STOP_PACE_WHOLE, (uint64_t)UNITS_MIN);
}

uint32_t stop_pace_room(const StopPace *pace, uint64_t all, uint64_t used) {
        uint64_t taken = used + pace->range_units;
        uint32_t room = taken < all ? (uint32_t)MIN_OF(all - taken, (uint64_t)UINT32_MAX) : 0;

        return used > 0 ? room : MAX_OF(room, STOP_PACE_PIECE_MIN);
}

/* Down fast and up slowly: what took long now and then had to wait for a CPU, which smaller batches would not change. */
static uint64_t learn_fixed(uint64_t known, uint64_t seen) {
        unsigned weight = seen < known ? 4 : 16;

        return ((weight - 1) * known + MIN_OF(seen, FIXED_MAX_NSEC)) / weight;
}

static double within(double value, double min, double max) {
        return value < min ? min : value > max ? max : value;
}

/* A straight line through what batches took, the later ones counting more. */
static void learn_ran(StopPace *pace, double units, double ran_nsec) {
        double more = units - pace->units, longer = ran_nsec - pace->ran_nsec, unit_nsec = (double)pace->unit_nsec;

        pace->units += WEIGHT * more;
        pace->ran_nsec += WEIGHT * longer;
        pace->spread = (1 - WEIGHT) * (pace->spread + WEIGHT * more * more);
        pace->slope_spread = (1 - WEIGHT) * (pace->slope_spread + WEIGHT * more * longer);
        if (pace->spread > SPREAD_MIN * SPREAD_MIN * pace->units * pace->units)
                unit_nsec = pace->slope_spread / pace->spread;
        /* Whatever that says, what is left for the beginning is neither nothing nor everything. */
        unit_nsec = within(unit_nsec, (pace->ran_nsec - BEGIN_MAX_NSEC) / pace->units, pace->ran_nsec / pace->units);
        unit_nsec = within(unit_nsec, UNIT_MIN_NSEC, UNIT_MAX_NSEC);
        pace->unit_nsec = (uint64_t)unit_nsec;
        pace->begin_nsec = (uint64_t)within(pace->ran_nsec - unit_nsec * pace->units, 0, BEGIN_MAX_NSEC);
}

void stop_pace_learn(StopPace *pace, uint64_t units, uint64_t stop_nsec, uint64_t ran_nsec) {
        uint64_t long_nsec = stop_pace_goal_nsec(pace) + STOP_PACE_MAX_NSEC - STOP_PACE_GOAL_NSEC;

        ran_nsec = MIN_OF(ran_nsec, stop_nsec);
        pace->fixed_nsec = learn_fixed(pace->fixed_nsec, stop_nsec - ran_nsec);
        if (units > 0)
                learn_ran(pace, (double)units, (double)MIN_OF(ran_nsec, STOP_PACE_MAX_NSEC));
        pace->share = ran_nsec + pace->fixed_nsec > long_nsec
                              ? MAX_OF(pace->share / 2, SHARE_MIN)
                              : MIN_OF(pace->share + SHARE_STEP, STOP_PACE_WHOLE);
}
