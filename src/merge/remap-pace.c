/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "merge/remap-pace.h"

/* As measured on an idle machine (docs/remap-programs.md); what is learnt is kept within these. */
#define FIXED_FIRST_NSEC (500 * NSEC_PER_USEC)
#define FIXED_MAX_NSEC (900 * NSEC_PER_USEC)
#define UNIT_FIRST_NSEC 3000U
#define UNIT_MIN_NSEC 300U
#define UNIT_MAX_NSEC 12000U
#define SHARE_MIN (REMAP_PACE_WHOLE / 16)
#define SHARE_STEP (REMAP_PACE_WHOLE / 32)
#define UNITS_MIN 24U                   /* one short run: less than that would be all stop and no work */

RemapPace remap_pace_first(bool undo) {
        return (RemapPace){
                .fixed_nsec = FIXED_FIRST_NSEC,
                .unit_nsec = UNIT_FIRST_NSEC,
                .share = REMAP_PACE_WHOLE,
                .range_units = undo ? 24 : 8, /* putting back waits for the keeper in each range */
        };
}

uint64_t remap_pace_batch(const RemapPace *pace) {
        uint64_t units = (REMAP_PACE_GOAL_NSEC - pace->fixed_nsec) / pace->unit_nsec * pace->share / REMAP_PACE_WHOLE;

        return MAX_OF(units, (uint64_t)UNITS_MIN);
}

/* Down fast and up slowly: what took long now and then had to wait for a CPU, which smaller batches would not change. */
static uint64_t learn(uint64_t known, uint64_t seen, uint64_t min, uint64_t max) {
        unsigned weight = seen < known ? 4 : 16;

        seen = MAX_OF(seen, min);
        return ((weight - 1) * known + MIN_OF(seen, max)) / weight;
}

void remap_pace_learn(RemapPace *pace, uint64_t units, uint64_t stop_nsec, uint64_t ran_nsec) {
        ran_nsec = MIN_OF(ran_nsec, stop_nsec);
        pace->fixed_nsec = learn(pace->fixed_nsec, stop_nsec - ran_nsec, 0, FIXED_MAX_NSEC);
        if (units > 0)
                pace->unit_nsec = learn(pace->unit_nsec, ran_nsec / units, UNIT_MIN_NSEC, UNIT_MAX_NSEC);
        pace->share = ran_nsec + pace->fixed_nsec > REMAP_PACE_STOP_NSEC
                              ? MAX_OF(pace->share / 2, SHARE_MIN)
                              : MIN_OF(pace->share + SHARE_STEP, REMAP_PACE_WHOLE);
}
