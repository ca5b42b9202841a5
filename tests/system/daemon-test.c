/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "base/clock.h"
#include "daemon/remapping.h"
#include "daemon/roster.h"
#include "daemon/tidying.h"
#include "merge/remap.h"
#include "target/remote-internal.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>

/*
 * What makes the daemon one for tests (REMOTE_TEST, REMAP_TEST, DAEMON_TEST), by its environment:
 * KSMD_USER_TEST_LEAVE_OUT=MASK leaves safeguards of the remote calls out (REMOTE_GUARD_*), …_REMAP=MASK of route remap
 * (REMAP_GUARD_*), …_ROSTER=MASK of what belongs together (ROSTER_GUARD_*), …_TIDY=MASK of putting pools in order
 * (TIDY_GUARD_*);
 * KSMD_USER_TEST_END_AT=STEP:VISIT ends it as by SIGKILL when it comes to that step of the protocol for the VISITth time,
 * with a thread of a target in its hands;
 * KSMD_USER_TEST_JOIN=STEP:PLACE:SIGNAL sends itself that signal once, when something is put together and it comes to that
 * step (TIDY_STEP_*) in that place, having said whose that is.
 */
unsigned remote_test_leave_out, remap_test_leave_out, roster_test_leave_out, tidy_test_leave_out;
uint64_t remote_test_program_wait_nsec = NSEC_PER_SEC;
static unsigned end_at_step = _REMOTE_STEP_MAX, end_at_visit;
static unsigned join_step, join_place;
static int join_signal;

__attribute__((constructor)) static void read_environment(void) {
        const struct {
                const char *name;
                unsigned *mask;
        } masks[] = {
                { "KSMD_USER_TEST_LEAVE_OUT", &remote_test_leave_out },
                { "KSMD_USER_TEST_LEAVE_OUT_REMAP", &remap_test_leave_out },
                { "KSMD_USER_TEST_LEAVE_OUT_ROSTER", &roster_test_leave_out },
                { "KSMD_USER_TEST_LEAVE_OUT_TIDY", &tidy_test_leave_out },
        };
        const char *end_at = getenv("KSMD_USER_TEST_END_AT"), *join = getenv("KSMD_USER_TEST_JOIN");
        for (size_t i = 0; i < ELEMENTSOF(masks); i++)
                if (getenv(masks[i].name))
                        *masks[i].mask = (unsigned)strtoul(getenv(masks[i].name), NULL, 0);
        if (end_at && sscanf(end_at, "%u:%u", &end_at_step, &end_at_visit) != 2)
                abort();
        if (join && sscanf(join, "%u:%u:%d", &join_step, &join_place, &join_signal) != 3)
                abort();
}

void tidying_test_step(TidyStep step, size_t place, const Member *member) {
        int number = join_signal;

        if (number == 0 || step != join_step || place != join_place)
                return;
        join_signal = 0;
        fprintf(stderr, "the turn of %d has come\n", member->target->pid);
        raise(number);
}

void remote_test_step(RemoteStep step) {
        if (step == end_at_step && end_at_visit-- == 0)
                raise(SIGKILL);
}
