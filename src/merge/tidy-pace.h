/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "base/util.h"

/*
 * How often pools are put in order, and how much of the time that takes; pure. What it waits for is counted in looks at
 * the pool, which are as far apart as the quota says.
 */

/* A new page has one mapping until the process with its twin had its turn, which may take some passes when it cannot be
 * called just then: it must have been alone for so many looks. */
#define TIDY_LOOKS_MIN 8U
#define TIDY_LOOKS_MAX ((1U << 14) - 1)

/* Something that comes again and again, and is waited for longer each time. */
typedef struct TidyWait {
        uint32_t look;          /* in which it came last */
        uint32_t looks;         /* to wait; 0: it never came */
} TidyWait;

/* What one process maps alone is put back when it has been so for so many looks: for longer each time where the same comes
 * time and again (what is merged there has its twin where it cannot be merged), until nothing came for long. */
uint32_t tidy_alone_looks(const TidyWait *wait, uint32_t look);
void tidy_alone_note(TidyWait *wait, uint32_t look);

/* What was put together before, and is apart again, is not tried for so long: twice as long each time it fails, half as
 * long when it was done, and from the beginning when it was not wanted for long. */
bool tidy_again_waits(const TidyWait *wait, uint32_t look);
void tidy_again_note(TidyWait *wait, uint32_t look, bool done);

/* Until when something more may be begun that a look, which ended then, found: a look at a large pool takes longer than
 * that. */
uint64_t tidy_until_nsec(uint64_t looked_nsec);
/* When the next look is due: all of it takes one part in so many of the quota (of CONF_SHARE_ONE, a CPU). */
#define TIDY_QUOTA_SHARE 10U
uint64_t tidy_due_nsec(uint64_t begun_nsec, uint64_t ended_nsec, uint32_t quota);
