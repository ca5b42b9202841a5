/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "merge/tidy-pace.h"

#include "conf/conf-value.h"

/* What is put back in looks that follow each other is one event. */
#define EVENT_LOOKS 4U
/* So many times the wait without any: nothing came for long. */
#define QUIET_WAITS 4U
/* What is moved once more is waited for at least so long. */
#define AGAIN_LOOKS_MIN 16U
/* After a look. */
#define WORK_NSEC (5 * NSEC_PER_MSEC)

static bool is_long_ago(const TidyWait *wait, uint32_t look) { return look - wait->look > QUIET_WAITS * wait->looks; }

uint32_t tidy_alone_looks(const TidyWait *wait, uint32_t look) {
        if (look - wait->look <= EVENT_LOOKS || is_long_ago(wait, look))
                return TIDY_LOOKS_MIN;
        return MAX_OF(wait->looks, TIDY_LOOKS_MIN);
}

void tidy_alone_note(TidyWait *wait, uint32_t look) {
        if (look - wait->look > EVENT_LOOKS)
                wait->looks = MIN_OF(2 * tidy_alone_looks(wait, look), TIDY_LOOKS_MAX);
        wait->look = look;
}

bool tidy_again_waits(const TidyWait *wait, uint32_t look) { return look - wait->look < wait->looks; }

void tidy_again_note(TidyWait *wait, uint32_t look, bool done) {
        uint32_t looks = done ? wait->looks / 2 : 2 * wait->looks;

        /* The others of that look: it is longer if any of them failed. */
        if (wait->looks > 0 && look == wait->look && done)
                return;
        looks = is_long_ago(wait, look) ? AGAIN_LOOKS_MIN : MAX_OF(looks, AGAIN_LOOKS_MIN);
        wait->looks = MIN_OF(looks, TIDY_LOOKS_MAX);
        wait->look = look;
}

uint64_t tidy_until_nsec(uint64_t looked_nsec) { return looked_nsec + WORK_NSEC; }

uint64_t tidy_due_nsec(uint64_t begun_nsec, uint64_t ended_nsec, uint32_t quota) {
        return ended_nsec + (ended_nsec - begun_nsec) * TIDY_QUOTA_SHARE * CONF_SHARE_ONE / MAX_OF(quota, 1U);
}
