/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * StopQuota=: of a process that runs, stops take no more than a part of the time. One stop is over before anybody notices;
 * many of them, one right after the other, took half of a server's requests for as long as they lasted
 * (docs/performance.md). Who sleeps does not notice them either, and is dealt with at once.
 *
 * A visit is some stops in a row, then the process runs for as long as makes up for them, and others are visited meanwhile.
 * To begin a visit costs something, too (mappings are read, a plan is made): where that is much there are more stops in one.
 *
 * Whether a process runs its CPU time says, less what our programs used while it stood. That clock lags by a tick (4 ms)
 * for a thread that is running, so it is looked at in steps that are longer.
 */
#include "daemon/pass.h"

#include "base/clock.h"
#include "conf/conf-value.h"

#define LOOK_NSEC (20 * NSEC_PER_MSEC)
/* Of standing in a visit. */
#define VISIT_NSEC (4 * NSEC_PER_MSEC)
/* A stop may have taken long, because the CPUs were busy. */
#define REST_MAX_NSEC (10 * NSEC_PER_SEC)

/* elapsed: more than 0. */
static uint32_t share_used(const Member *member, uint64_t elapsed, uint64_t cpu) {
        const Standing *before = &member->standing;
        uint64_t used = cpu - MIN_OF(before->cpu_nsec, cpu), stood = member->target->stood_nsec - before->stood_nsec;

        used -= MIN_OF(stood, used);
        if (used <= elapsed / MEMBER_ASLEEP_SHARE)
                return 0;
        return (uint32_t)MIN_OF(used * CONF_SHARE_ONE / elapsed, (uint64_t)UINT32_MAX);
}

void manager_look_how_it_runs(Member *member, uint64_t after_nsec) {
        Standing *standing = &member->standing;
        uint64_t now = now_nsec(), elapsed = now - standing->looked_nsec, cpu = 0;

        if (standing->looked_nsec > 0 && elapsed < after_nsec)
                return;
        if (target_cpu_nsec(member->target, &cpu) != 0)
                standing->runs = 0; /* it ended */
        else if (standing->looked_nsec > 0 && elapsed > 0)
                standing->runs = share_used(member, elapsed, cpu);
        standing->looked_nsec = now;
        standing->cpu_nsec = cpu;
        standing->stood_nsec = member->target->stood_nsec;
}

static uint64_t visit_stood_nsec(const Visit *visit) { return visit->member->target->stood_nsec - visit->stood_nsec; }

Visit visit_begin(Manager *m, Member *member) {
        member->standing.cut = false;
        return (Visit){
                .manager = m,
                .member = member,
                .begun_cpu_nsec = clock_nsec(CLOCK_THREAD_CPUTIME_ID),
                .stood_nsec = member->target->stood_nsec,
        };
}

bool visit_pause(void *userdata) {
        Visit *visit = userdata;
        Member *member = visit->member;
        uint64_t stood = visit_stood_nsec(visit);

        if (visit->allowed_nsec == 0)
                visit->allowed_nsec = MAX_OF(VISIT_NSEC, clock_nsec(CLOCK_THREAD_CPUTIME_ID) - visit->begun_cpu_nsec);
        visit->interrupted = manager_breathe(visit->manager, 0);
        if (visit->interrupted || passed_over(member) || target_image_replaced(member->target))
                return true;
        manager_look_how_it_runs(member, LOOK_NSEC);
        member->standing.cut = member->standing.runs > 0 && stood >= visit->allowed_nsec &&
                               visit->manager->conf->daemon.stop_quota < CONF_SHARE_ONE;
        return member->standing.cut;
}

void visit_end(const Visit *visit) {
        uint64_t stood = visit_stood_nsec(visit), quota = visit->manager->conf->daemon.stop_quota;
        Standing *standing = &visit->member->standing;

        if (standing->runs > 0)
                standing->rests_until_nsec = now_nsec() + MIN_OF(stood * (CONF_SHARE_ONE - quota) / quota, REST_MAX_NSEC);
}
