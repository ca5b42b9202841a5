/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "target/remote-internal.h"
#include "test.h"

/* Callers that run programs in their victims are ended at each step of the protocol: how often at which. */
typedef struct Steps {
        unsigned reached[_REMOTE_STEP_MAX];
} Steps;

/* Where CPUs are scarce a step may not be come to in time: it is tried for so much longer. */
#define STEPS_PATIENCE_NSEC (40 * NSEC_PER_SEC)

/* A step has its turn. False: it has had it, now that time is up; or it is one of stops of other kinds: nothing is taken from
 * the victims, they are sent no signal, and it is programs alone that they are called by. */
static inline bool steps_wants(const Steps *steps, unsigned step, bool time_is_up) {
        return !time_is_up ||
               (steps->reached[step] == 0 && step != REMOTE_STEP_SIGNAL && step != REMOTE_STEP_STOPPED &&
                step != REMOTE_STEP_TAKEN && step != REMOTE_STEP_RELEASED && step != REMOTE_STEP_BACK);
}

static inline bool steps_are_complete(const Steps *steps) {
        for (unsigned step = 0; step < _REMOTE_STEP_MAX; step++)
                if (steps_wants(steps, step, true))
                        return false;
        return true;
}

static inline void steps_check(const Steps *steps) {
        for (unsigned step = 0; step < _REMOTE_STEP_MAX; step++)
                printf("%s%u:%u", step ? " " : "steps ", step, steps->reached[step]);
        printf("\n");
        CHECK(steps_are_complete(steps), "a step was never reached");
}
