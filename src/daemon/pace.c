/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * Between two pieces of work: the event loop runs, requests are noticed, and CPUQuota= is kept (budget.c decides how).
 * Against the quota counts what all threads of the daemon use, answering control requests included, which is never
 * refused, and what ksmd uses in our bursts. A pass waits here; ksmd, which runs by itself, is paused.
 */

#include "daemon/manager.h"

#include "base/clock.h"
#include "base/log.h"
#include "conf/conf-value.h"

#include <string.h>

/* Looking at ksmd more often costs more than it saves. */
#define BURST_LOOK_MIN_NSEC NSEC_PER_MSEC
/* Where flushes cost somebody something: some hundred pages are merged in this time, and what they cost is felt at once.
 * While none are (ksmd notes pages first, or gets no CPU) a look is made more and more seldom. */
#define COSTS_LOOK_MIN_NSEC (2 * NSEC_PER_MSEC)
#define COSTS_LOOK_MAX_NSEC (8 * NSEC_PER_MSEC)
#define HOLD_MAX_NSEC (100 * NSEC_PER_MSEC)
/* How often to look at what others leave, and how much of one CPU that must be for us not to be in their way: our
 * thread and ksmd are nice, yet take up to a third of a CPU from whoever wants it. What they feel is over in half a second
 * where all is new to us, so that they want nearly all is believed at once; that they want some when it has lasted as long.
 * A command that is run now and then is nobody who is in want of CPUs: whether they still are is looked at soon at first. */
#define OTHERS_LOOK_NSEC (100 * NSEC_PER_MSEC)
#define OTHERS_LOOK_LONGER_NSEC (500 * NSEC_PER_MSEC)
#define OTHERS_LEAVE_MIN (CONF_SHARE_ONE * 2 / 3)
/* Where there is one, of which we may be all that runs: half of what we use counts as left. */
#define OTHERS_LEAVE_MIN_ALONE (CONF_SHARE_ONE / 3)
/* Of all CPUs, for CPUQuotaBusy=auto: we are in the way of whoever runs on one of them for so little that his 99th percentile
 * hardly shows it (1 % of a CPU of two: docs/performance.md). */
#define BUSY_SHARE (CONF_SHARE_ONE / 200)
/* That they leave less than such a part of it is believed at once. */
#define AT_ONCE(least) ((least) * 3 / 4)

/* There is something for the main loop to carry out before more work is done. */
static bool interrupted(const Manager *m) {
        if (m->stopping || m->reload_wanted || m->new_conf || (m->paused && m->in_pass))
                return true;
        for (size_t i = 0; i < m->n_requests; i++)
                if (m->requests[i].kind == REQUEST_UNMERGE ? !m->requests[i].started : !m->in_pass)
                        return true;
        return false;
}

static uint64_t cpu_nsec(const Manager *m) {
        BurstStats burst = { 0 };

        if (m->burst)
                burst_stats(m->burst, &burst);
        return process_cpu_nsec() + burst.ksmd_cpu_nsec;
}

static bool dispatch(Manager *m, uint64_t nsec) {
        int r = loop_dispatch(m->loop, nsec);

        if (r < 0) {
                log_error("the event loop failed: %s", strerror(-r));
                m->stopping = true;
        }
        return interrupted(m);
}

static uint64_t busy_quota(const ConfDaemon *conf, uint64_t n_cpus) {
        if (conf->cpu_quota_busy > 0)
                return (uint64_t)conf->cpu_quota * conf->cpu_quota_busy / CONF_SHARE_ONE;
        return MIN_OF(conf->cpu_quota, n_cpus * BUSY_SHARE);
}

uint32_t manager_quota(const Manager *m) {
        const ConfDaemon *conf = &m->conf->daemon;

        return m->host_busy ? (uint32_t)MAX_OF(busy_quota(conf, m->kernel.n_cpus), (uint64_t)1) : conf->cpu_quota;
}

/* With CPUQuotaBusy=100% no difference is made. */
void manager_set_quota(Manager *m) {
        uint32_t quota = m->conf->daemon.cpu_quota, now = manager_quota(m);

        budget_set_quota(&m->budget, quota, now < quota ? now : 0);
}

static bool leave_less(const Manager *m, CpuLeft *since, uint32_t least, uint32_t *ret_left) {
        return cpu_left_look(since, NULL, now_nsec(), cpu_nsec(m), ret_left) == 0 && *ret_left < least;
}

void manager_look_at_others(Manager *m) {
        uint32_t left = 0, least = m->kernel.n_cpus > 1 ? OTHERS_LEAVE_MIN : OTHERS_LEAVE_MIN_ALONE;
        uint64_t now = now_nsec();
        bool busy = m->host_busy;

        if (busy && now - m->cpu_left.now_nsec >= m->others_look_nsec) {
                busy = leave_less(m, &m->cpu_left, least, &left);
                m->others_look_nsec = MIN_OF(2 * m->others_look_nsec, OTHERS_LOOK_LONGER_NSEC);
        } else if (!busy && now - m->cpu_left.now_nsec >= OTHERS_LOOK_NSEC)
                busy = leave_less(m, &m->cpu_left, AT_ONCE(least), &left);
        if (!busy && !m->host_busy && now - m->cpu_left_longer.now_nsec >= OTHERS_LOOK_LONGER_NSEC)
                busy = leave_less(m, &m->cpu_left_longer, least, &left);
        if (busy == m->host_busy)
                return;
        m->host_busy = busy;
        m->others_look_nsec = OTHERS_LOOK_NSEC;
        manager_set_quota(m);
        log_debug("others leave %u %% of a CPU: the quota is %u.%02u %%", left / 100, manager_quota(m) / 100,
                  manager_quota(m) % 100);
        /* What was before is no part of what is looked at next. */
        if (m->cpu_left.now_nsec > m->cpu_left_longer.now_nsec)
                m->cpu_left_longer = m->cpu_left;
        else
                m->cpu_left = m->cpu_left_longer;
}

static uint64_t budget_wait(Manager *m) {
        manager_look_at_others(m);
        return budget_wait_nsec(&m->budget, now_nsec(), cpu_nsec(m));
}

bool manager_breathe(Manager *m, uint64_t nsec) {
        uint64_t now = now_nsec(), until = now + nsec;

        do {
                if (dispatch(m, now < until ? until - now : 0))
                        return true;
                if (m->in_pass)
                        until = MAX_OF(until, now_nsec() + budget_wait(m));
                now = now_nsec();
        } while (now < until);
        return false;
}

bool manager_attend(Manager *m) { return dispatch(m, 0); }

/* For how long ksmd may go on before BreakQuota= is looked at. */
static uint64_t costs_look_nsec(Manager *m) {
        uint64_t flushes = m->judge_budget.flushes;
        bool merging = m->running_wait || flushes != m->costs_flushes;

        m->costs_flushes = flushes;
        m->costs_look_nsec = merging ? COSTS_LOOK_MIN_NSEC : MIN_OF(2 * m->costs_look_nsec, COSTS_LOOK_MAX_NSEC);
        return m->costs_look_nsec;
}

bool manager_breathe_in_burst(Manager *m, uint64_t hold_nsec) {
        uint64_t hold = MIN_OF(hold_nsec, HOLD_MAX_NSEC), wait = budget_wait(m), left;

        wait = MAX_OF(wait, hold);
        if (wait > 0) {
                burst_pause(m->burst);
                return dispatch(m, wait);
        }
        burst_resume(m->burst);
        left = MAX_OF(budget_left_nsec(&m->budget), BURST_LOOK_MIN_NSEC); /* ksmd is one thread: it takes as long */
        if ((m->running > 0 || m->running_wait) && m->conf->daemon.judgement)
                left = MIN_OF(left, costs_look_nsec(m));
        return dispatch(m, MIN_OF(burst_interval_nsec(m->burst), left));
}

void manager_budget_stats(Manager *m, BudgetStats *ret) { budget_stats(&m->budget, now_nsec(), cpu_nsec(m), ret); }
