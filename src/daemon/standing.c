/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * StopQuota=: of a process that runs, stops take no more than a part of the time. One stop is over before anybody notices;
 * a hundred of them, one right after the other, are half a second in which a server answers a third of its requests. Who
 * sleeps does not notice a hundred either, and is dealt with at once.
 *
 * Whether a process runs its CPU time says, less what our programs used while it stood. That clock lags by a tick (4 ms)
 * for a thread that is running, so it is looked at in steps that are longer.
 */
#include "daemon/pass.h"

#include "base/clock.h"
#include "conf/conf-value.h"

#define LOOK_NSEC (20 * NSEC_PER_MSEC)
/* One stop may have taken long, because the CPUs were busy. */
#define REST_MAX_NSEC (2 * NSEC_PER_SEC)

void manager_look_whether_runs(Member *member) {
        uint64_t now = now_nsec(), elapsed = now - member->standing.looked_nsec, cpu, used, stood;
        Standing *standing = &member->standing;

        if (standing->looked_nsec > 0 && elapsed < LOOK_NSEC)
                return;
        if (target_cpu_nsec(member->target, &cpu) != 0)
                return; /* it ended */
        if (standing->looked_nsec > 0) {
                used = cpu - MIN_OF(standing->cpu_nsec, cpu);
                stood = member->target->stood_nsec - standing->stood_nsec;
                standing->runs = used > stood + elapsed / MEMBER_ASLEEP_SHARE;
        }
        standing->looked_nsec = now;
        standing->cpu_nsec = cpu;
        standing->stood_nsec = member->target->stood_nsec;
}

bool manager_let_run(Manager *m, Member *member) {
        uint64_t stood = member->target->stood_nsec - member->standing.rested_nsec, rest = 0;
        uint32_t quota = m->conf->daemon.stop_quota;

        member->standing.rested_nsec = member->target->stood_nsec;
        manager_look_whether_runs(member);
        if (member->standing.runs)
                rest = MIN_OF(stood * (CONF_SHARE_ONE - quota) / quota, REST_MAX_NSEC);
        return manager_breathe(m, rest);
}

bool pass_pause(void *userdata) {
        PassPause *pause = userdata;

        pause->interrupted = manager_let_run(pause->manager, pause->member);
        return pause->interrupted || passed_over(pause->member) || target_image_replaced(pause->member->target);
}
