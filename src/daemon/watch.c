/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The probes, and what they say of who comes and goes. Each event names a cgroup whose processes are read anew; so an
 * event that is lost, or comes before what it tells of can be read, costs the wait till the next look (a second), no
 * more.
 *
 * In a storm of forks, or of cgroups, they are read every REFRESH_REST_NSEC, however many events there are, and more seldom
 * where that takes long: whoever may make cgroups below a managed one must not keep us busy.
 */
#include "daemon/manager.h"

#include "base/clock.h"
#include "base/log.h"
#include "host/ksmd.h"

#include <poll.h>
#include <string.h>

#define REFRESH_REST_NSEC (20 * NSEC_PER_MSEC)
#define REFRESH_SHARE 20U               /* of the time, at most: one part of so many */
#define CGROUPS_MAX 64U                 /* in one go; more are all */

typedef struct ProbeNews {
        uint64_t cgroups[CGROUPS_MAX];
        size_t n;
        bool all;
        uint64_t carried_out_nsec, rest_nsec;
        bool timer_runs;
} ProbeNews;

static void on_event(void *userdata, const struct probe_event *event) {
        ProbeNews *news = userdata;

        for (size_t i = 0; i < news->n; i++)
                if (news->cgroups[i] == event->cgroup)
                        return;
        if (event->cgroup == 0 || news->n == CGROUPS_MAX)
                news->all = true;
        else
                news->cgroups[news->n++] = event->cgroup;
}

static void carry_out(Manager *m) {
        ProbeNews *news = m->news;
        uint64_t begun = now_nsec();

        if (news->all)
                roster_refresh(&m->roster);
        for (size_t i = 0; i < news->n && !news->all; i++)
                roster_refresh_cgroup(&m->roster, news->cgroups[i]);
        news->n = 0;
        news->all = false;
        manager_watch(m);
        news->carried_out_nsec = now_nsec();
        news->rest_nsec = MAX_OF(REFRESH_REST_NSEC, (news->carried_out_nsec - begun) * REFRESH_SHARE);
}

static int carry_out_paced(Manager *m) {
        uint64_t since = now_nsec() - m->news->carried_out_nsec;

        if (m->news->timer_runs || (m->news->n == 0 && !m->news->all))
                return 0;
        if (since >= m->news->rest_nsec) {
                carry_out(m);
                return 0;
        }
        m->news->timer_runs = true;
        return loop_source_set_timer(m->refresh_soon_timer, m->news->rest_nsec - since, 0);
}

/* Begins and ends the rests of the probes that take too much. */
static int see_to_rest(Manager *m) {
        bool rested = probes_state(m->probes, PROBE_FAULTS).resting || probes_state(m->probes, PROBE_FLUSHES).resting;
        uint64_t now = now_nsec(), next = probes_rest(m->probes, now);

        if (!rested && next == UINT64_MAX)
                return 0;
        if (next == UINT64_MAX)
                log_debug("the probes of faults and flushes are attached again");
        else if (!rested)
                log_info("faults or TLB flushes come so fast that counting them takes more than %u %% of a CPU: not counted "
                         "for %llu s", PROBE_COST_PERCENT, (unsigned long long)((next - now) / NSEC_PER_SEC));
        return loop_source_set_timer(m->rest_timer, next == UINT64_MAX ? UINT64_MAX : next - now, 0);
}

static int on_probes_rested(void *userdata, LoopSource *source) { return see_to_rest(userdata); }

static int on_readable(void *userdata, LoopSource *source, int fd, uint32_t revents) {
        Manager *m = userdata;
        int r;

        probes_read_events(m->probes, on_event, m->news);
        r = see_to_rest(m);
        if (r < 0)
                return r;
        return carry_out_paced(m);
}

int manager_refresh_soon(Manager *m) {
        m->news->all = true;
        return carry_out_paced(m);
}

static int on_rested(void *userdata, LoopSource *source) {
        Manager *m = userdata;

        m->news->timer_runs = false;
        carry_out(m);
        return 0;
}

static void say_what_is_missing(const Manager *m) {
        for (unsigned i = 0; i < _PROBE_MAX; i++) {
                ProbeState state = probes_state(m->probes, (ProbeId)i);

                if (state.way == PROBE_WAY_NONE && m->conf->daemon.probes == CONF_YES)
                        log_warning("probe %s: %s. %s", probe_name((ProbeId)i), probe_error_name(state.error),
                                    probe_follows((ProbeId)i, false));
        }
}

int manager_open_probes(Manager *m) {
        _cleanup_(ksmd_done) Ksmd ksmd = KSMD_NULL;
        uint64_t nsec;
        ProbeOptions options = { .off = m->conf->daemon.probes == CONF_NO, .memory_bytes = m->kernel.memory_bytes };
        int r;

        if (ksmd_cpu(&ksmd, &nsec) == 0)
                options.ksmd = ksmd.pid;
        m->news = calloc(1, sizeof *m->news);
        if (!m->news)
                return -ENOMEM;
        r = probes_new(&options, &m->probes);
        if (r < 0)
                return r;
        vma_reader_open(&m->vma_reader, m->probes, m->kernel.pagemap_scan);
        say_what_is_missing(m);
        m->breaks_seen = 0;
        manager_forget_told(m);
        r = loop_add_timer(m->loop, UINT64_MAX, 0, on_rested, m, &m->refresh_soon_timer);
        if (r < 0)
                return r;
        if (probes_event_fd(m->probes) >= 0) {
                r = loop_add_timer(m->loop, UINT64_MAX, 0, on_probes_rested, m, &m->rest_timer);
                if (r == 0)
                        r = loop_add_io(m->loop, probes_event_fd(m->probes), POLLIN, on_readable, m, &m->probe_source);
                if (r < 0)
                        return r;
        }
        manager_watch(m);
        return 0;
}

/* Of structures that are nothing but sums. */
static void add_sums(void *to, const void *from, size_t size) {
        uint64_t *sums = to;
        const uint64_t *more = from;

        for (size_t i = 0; i < size / sizeof *sums; i++)
                sums[i] += more[i];
}

void manager_flushes(const Manager *m, struct probe_flushes *ret) {
        probes_flushes(m->probes, ret);
        add_sums(ret, &m->probes_counted.flushes, sizeof *ret);
}

void manager_ksm_counts(const Manager *m, struct probe_ksm *ret) {
        probes_ksm(m->probes, ret);
        add_sums(ret, &m->probes_counted.ksm, sizeof *ret);
}

void manager_walks(const Manager *m, struct probe_walks *ret) {
        const struct probe_walks *before = &m->probes_counted.walks;

        probes_walks(m->probes, ret);
        ret->walks += before->walks;
        ret->nsec += before->nsec;
        ret->nsec_max = MAX_OF(ret->nsec_max, before->nsec_max);
}

void manager_close_probes(Manager *m) {
        ProbeSums sums;

        m->probe_source = loop_source_free(m->probe_source);
        m->refresh_soon_timer = loop_source_free(m->refresh_soon_timer);
        m->rest_timer = loop_source_free(m->rest_timer);
        m->breaks_found += m->probes ? probes_cow_breaks(m->probes) : 0;
        m->probes_rested_nsec += m->probes ? probes_rested(m->probes, now_nsec()) : 0;
        manager_flushes(m, &sums.flushes);
        manager_ksm_counts(m, &sums.ksm);
        manager_walks(m, &sums.walks);
        m->probes_counted = sums;
        vma_reader_close(&m->vma_reader);
        m->probes = probes_free(m->probes);
        free(m->news);
        m->news = NULL;
}

static int compare_ids(const void *a, const void *b) {
        uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

        return x < y ? -1 : x > y;
}

static int compare_pids(const void *a, const void *b) {
        pid_t x = *(const pid_t *)a, y = *(const pid_t *)b;

        return x < y ? -1 : x > y;
}

void manager_watch(Manager *m) {
        _cleanup_free_ uint64_t *ids = NULL;
        _cleanup_free_ pid_t *pids = NULL;
        size_t n_ids = 0, n_pids = 0;
        int r;

        if (!probes_have(m->probes, PROBE_ROSTER) && !probes_have(m->probes, PROBE_FAULTS) &&
            !probes_have(m->probes, PROBE_FLUSHES))
                return;
        ids = calloc(m->roster.n_groups + 1, sizeof *ids);
        pids = calloc(roster_count_members(&m->roster) + 1, sizeof *pids);
        if (!ids || !pids)
                return;
        for (size_t i = 0; i < m->roster.n_groups; i++) {
                const Group *group = m->roster.groups[i];

                if (group->id != 0)
                        ids[n_ids++] = group->id;
                for (size_t k = 0; k < group->n_members; k++)
                        if (!group->members[k]->gone)
                                pids[n_pids++] = group->members[k]->target->pid;
                        else
                                manager_untell(m, group->members[k]);
        }
        for (size_t i = 0; i < m->roster.n_leaving; i++)
                manager_untell(m, m->roster.leaving[i]);
        qsort(ids, n_ids, sizeof *ids, compare_ids);
        qsort(pids, n_pids, sizeof *pids, compare_pids);
        r = probes_watch_cgroups(m->probes, ids, n_ids);
        if (r == 0)
                r = probes_watch_targets(m->probes, pids, n_pids);
        if (r < 0)
                log_debug("the probes cannot be told who is managed: %s", strerror(-r));
}
