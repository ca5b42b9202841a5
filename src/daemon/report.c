/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What the control service asks and is told (shapes: include/ksmd-user/org.ksmduser.Daemon.varlink), read from the
 * state as it stands: nothing here touches a process but Explain, which looks at the mappings of the one asked about.
 */
#include "daemon/manager.h"

#include "base/clock.h"
#include "base/log.h"
#include "conf/conf-value.h"
#include "control/json-text.h"

#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

/* Counting for Explain takes no more than one part in so many of the time: of one process, of all together. */
#define COUNT_SHARE_OF_ONE 100U
#define COUNT_SHARE_OF_ALL 10U

static const char *state_name(const Manager *m) {
        static const char *const names[] = { [MANAGER_IDLE] = "idle",         [MANAGER_SCANNING] = "scanning",
                                             [MANAGER_MERGING] = "merging",   [MANAGER_PAUSED] = "paused",
                                             [MANAGER_STOPPING] = "stopping" };
        return names[m->paused && m->state != MANAGER_STOPPING ? MANAGER_PAUSED : m->state];
}

static const char *slot_route(const Slot *slot) {
        return slot->idle_reason && !slot->dry_run ? "none" : conf_route_name(slot->route);
}

static void add_warning(json_t *array, const char *format, ...) _printf_(2, 3);
static void add_warning(json_t *array, const char *format, ...) {
        _cleanup_free_ char *text = NULL;
        va_list ap;
        int n;

        va_start(ap, format);
        n = vasprintf(&text, format, ap);
        va_end(ap);
        if (n < 0)
                text = NULL;
        else
                json_array_append_new(array, json_text(text));
}

static json_t *warnings_json(const Manager *m) {
        json_t *array = json_array();

        if (!array)
                return NULL;
        for (size_t i = 0; i < m->warnings.n; i++)
                json_array_append_new(array, json_text(m->warnings.texts[i]));
        if (m->reload_problem)
                json_array_append_new(array, json_text(m->reload_problem));
        if (!m->ksm)
                add_warning(array, m->zero ? "KSM cannot be used (%s): route advise merges nothing, route auto gives back zero "
                                             "pages only"
                                           : "KSM cannot be used (%s): routes advise and auto merge nothing",
                            strerror(-m->ksm_error));
        if (m->stranger_marked)
                add_warning(array, "merging waits: a process that left another domain is still marked and cannot be "
                                   "called at the moment");
        if (m->breaks_too_dear)
                add_warning(array, "merging waits: writes to merged pages and TLB flushes cost the processes more than "
                                   "BreakQuota=");
        if (m->limits_refused)
                add_warning(array, "MaxPageSharing= or MergeAcrossNodes= is not in force: " MANAGER_NODES_WAIT);
        if (m->nodes_wait)
                add_warning(array, "MergeAcrossNodes=%s is not in force yet: " MANAGER_NODES_WAIT,
                            m->conf->daemon.merge_across_nodes ? "yes" : "no");
        for (size_t i = 0; i < m->roster.n_blocked; i++)
                add_warning(array, "cgroup %s was unmerged by command: it is left alone until a reload",
                            m->roster.blocked[i]);
        for (size_t i = 0; i < m->roster.n_slots; i++)
                if (m->roster.slots[i]->idle_reason && !m->roster.slots[i]->dry_run)
                        add_warning(array, "domain %s merges nothing: %s", m->roster.slots[i]->name,
                                    m->roster.slots[i]->idle_reason);
                else if (m->roster.slots[i]->trust_problem)
                        add_warning(array, "domain %s is not remapped: %s", m->roster.slots[i]->name,
                                    m->roster.slots[i]->trust_problem);
                else if (m->roster.slots[i]->zero_reason)
                        add_warning(array, "domain %s: only zero pages are given back: %s", m->roster.slots[i]->name,
                                    m->roster.slots[i]->zero_reason);
        return array;
}

static json_t *nullable(bool known, uint64_t value) { return known ? json_integer((json_int_t)value) : json_null(); }

static json_t *probes_json(const Manager *m) {
        json_t *array = json_array();

        for (unsigned i = 0; array && i < _PROBE_MAX; i++) {
                ProbeState state = probes_state(m->probes, (ProbeId)i);

                json_array_append_new(array, json_pack("{s:s, s:s, s:b, s:s?}", "name", probe_name((ProbeId)i), "way",
                                                       probe_way_name(state.way), "resting", (int)state.resting, "reason",
                                                       state.way == PROBE_WAY_NONE ? probe_error_name(state.error) : NULL));
        }
        return array;
}

/* Without those that nobody is in any more, and that are being undone: another of the same name may be there already. */
static bool is_domain(const Slot *slot) { return slot->n_groups > 0; }

static size_t count_domains(const Roster *roster) {
        size_t n = 0;

        for (size_t i = 0; i < roster->n_slots; i++)
                n += is_domain(roster->slots[i]);
        return n;
}

static json_t *get_status(void *userdata) {
        Manager *m = userdata;
        uint64_t now = now_nsec();
        BudgetStats budget;
        PageStats total;

        manager_total(m, &total);
        manager_budget_stats(m, &budget);
        return json_pack("{s:s, s:i, s:s, s:I, s:I, s:I, s:I, s:I, s:o, s:o, s:I, s:I, s:f, s:f, s:b, s:b, s:o, s:o}", "version",
                         KSMD_USER_VERSION,
                         "pid", (int)getpid(), "state", state_name(m), "uptime_nsec",
                         (json_int_t)(now - m->started_nsec), "domains", (json_int_t)count_domains(&m->roster), "cgroups",
                         (json_int_t)m->roster.n_groups, "processes", (json_int_t)roster_count_members(&m->roster),
                         "full_scans", (json_int_t)m->full_scans, "last_pass_nsec",
                         nullable(m->last_pass_nsec > 0, m->last_pass_nsec), "next_pass_nsec",
                         nullable(!m->in_pass && !m->paused,
                                  m->next_pass_nsec > now ? m->next_pass_nsec - now : 0),
                         "bytes_saved", (json_int_t)total.bytes_saved, "metadata_bytes",
                         (json_int_t)total.metadata_bytes, "cpu_quota",
                         (double)manager_quota(m) / CONF_SHARE_ONE, "cpu_used",
                         (double)budget.used_nsec / (double)BUDGET_WINDOW_NSEC, "throttled", (int)budget.throttled,
                         "host_busy", (int)m->host_busy,
                         "probes", probes_json(m), "warnings", warnings_json(m));
}

static const char *const flush_names[PROBE_BY_N] = {
        [PROBE_BY_OTHERS] = "others",
        [PROBE_BY_TARGETS] = "targets",
        [PROBE_BY_KSMD] = "ksmd",
        [PROBE_BY_DAEMON] = "daemon",
};

/* What a later kernel adds is "other". */
static const char *const flush_reasons[PROBE_FLUSH_REASONS] = {
        [PROBE_FLUSH_TASK_SWITCH] = "task_switch",
        [PROBE_FLUSH_REMOTE] = "remote",
        [PROBE_FLUSH_LOCAL] = "local",
        [PROBE_FLUSH_LOCAL_MM] = "local_mm",
        [PROBE_FLUSH_REMOTE_SEND] = "remote_send",
        [PROBE_FLUSH_REMOTE_WRONG_CPU] = "remote_wrong_cpu", "other", "other",
};

static const char *const ksm_names[PROBE_KSM_N] = {
        [PROBE_KSM_SCANS] = "scans",          [PROBE_KSM_MERGED] = "merged",
        [PROBE_KSM_ZERO] = "zero",            [PROBE_KSM_CHANGED] = "changed",
        [PROBE_KSM_NO_MEMORY] = "no_memory",  [PROBE_KSM_OTHER_ERROR] = "other_error",
        [PROBE_KSM_DROPPED] = "dropped",
};

/* What the probes count, beside what is theirs in the statistics. */
static void add_probe_counts(const Manager *m, DaemonStats *stats, json_t **ret_flushes, json_t **ret_reasons,
                             json_t **ret_ksm) {
        struct probe_flushes flushes;
        struct probe_walks walks;
        struct probe_ksm ksm;

        *ret_flushes = json_object();
        *ret_reasons = json_object();
        *ret_ksm = json_object();
        manager_flushes(m, &flushes);
        manager_walks(m, &walks);
        manager_ksm_counts(m, &ksm);
        stats->rmap_walks = walks.walks;
        stats->rmap_walk_nsec = walks.nsec;
        stats->rmap_walk_nsec_max = walks.nsec_max;
        stats->cow_breaks = manager_cow_breaks(m);
        stats->probes_rested_nsec = m->probes_rested_nsec + probes_rested(m->probes, now_nsec());
        for (unsigned by = 0; by < PROBE_BY_N; by++) {
                uint64_t n = 0, pages = 0;

                for (unsigned i = 0; i < PROBE_FLUSH_REASONS; i++) {
                        n += flushes.count[by][i].flushes;
                        pages += flushes.count[by][i].pages;
                }
                json_object_set_new(*ret_flushes, flush_names[by], json_integer((json_int_t)n));
                if (by == PROBE_BY_OTHERS)
                        continue;
                stats->tlb_flushes += n;
                stats->tlb_flush_pages += pages;
        }
        for (unsigned i = 0; i < PROBE_FLUSH_REASONS; i++) {
                json_int_t n = json_integer_value(json_object_get(*ret_reasons, flush_reasons[i]));

                for (unsigned by = PROBE_BY_OTHERS + 1; by < PROBE_BY_N; by++)
                        n += (json_int_t)flushes.count[by][i].flushes;
                json_object_set_new(*ret_reasons, flush_reasons[i], json_integer(n));
        }
        for (unsigned i = 0; i < PROBE_KSM_N; i++)
                json_object_set_new(*ret_ksm, ksm_names[i], json_integer((json_int_t)ksm.count[i]));
}

static json_t *daemon_json(Manager *m) {
        DaemonStats stats = { 0 };
        RemoteStats remote;
        BurstStats burst = { 0 };
        BudgetStats budget;
        json_t *flushes, *reasons, *ksm, *object;

        manager_total(m, &stats.pages);
        stats.pages.full_scans = m->full_scans;
        for (size_t i = 0; i < _MERGE_FAILURE_MAX; i++)
                stats.pages.merge_failures[i] += m->merge_failures[i];
        remote_stats(m->remote, &remote);
        if (m->burst)
                burst_stats(m->burst, &burst);
        stats.cpu_nsec = process_cpu_nsec();
        stats.ksmd_cpu_nsec = burst.ksmd_cpu_nsec;
        manager_budget_stats(m, &budget);
        stats.throttled_nsec = budget.throttled_nsec;
        stats.max_page_sharing = m->max_page_sharing;
        stats.rmap_mapping_nsec = m->walk.mapping_nsec;
        stats.stops = remote.stops;
        stats.stop_nsec_p50 = remote_stop_percentile(&remote, 500);
        stats.stop_nsec_p99 = remote_stop_percentile(&remote, 990);
        stats.stop_nsec_max = remote.stop_nsec_max;
        add_probe_counts(m, &stats, &flushes, &reasons, &ksm);
        object = daemon_stats_json(&stats);
        json_object_set_new(object, "tlb_flushes_by", flushes);
        json_object_set_new(object, "tlb_flushes_by_reason", reasons);
        json_object_set_new(object, "ksm_results", ksm);
        json_object_set_new(object, "break_share",
                            json_real((double)judge_budget_share(&m->judge_budget, now_nsec()) / CONF_SHARE_ONE));
        return object;
}

json_t *manager_stats_json(Manager *m) {
        json_t *domains = json_array(), *cgroups = json_array();

        for (size_t i = 0; domains && i < m->roster.n_slots; i++) {
                const Slot *slot = m->roster.slots[i];
                json_t *one;

                if (!is_domain(slot))
                        continue;
                one = page_stats_json(&slot->stats);
                json_object_set_new(one, "domain", json_text(slot->name));
                json_object_set_new(one, "merge", json_string(slot->dry_run ? "dry-run" : "yes"));
                json_object_set_new(one, "own", json_boolean(slot->own));
                json_array_append_new(domains, one);
        }
        for (size_t i = 0; cgroups && i < m->roster.n_groups; i++) {
                const Group *group = m->roster.groups[i];
                json_t *one = page_stats_json(&group->stats);

                json_object_set_new(one, "path", json_text(group->path));
                json_object_set_new(one, "domain", json_text(group->slot->name));
                json_object_set_new(one, "route", json_string(slot_route(group->slot)));
                json_object_set_new(one, "processes", json_integer((json_int_t)group->n_members));
                json_array_append_new(cgroups, one);
        }
        return json_pack("{s:o, s:o, s:o}", "daemon", daemon_json(m), "domains", domains, "cgroups", cgroups);
}

static json_t *get_stats(void *userdata) { return manager_stats_json(userdata); }

/* State and reason of one managed process, as Target and Explain show them. */
static const char *member_state(const Manager *m, const Member *member, const char **ret_reason) {
        const Slot *slot = member->group->slot;

        *ret_reason = NULL;
        if (slot->idle_reason && !slot->dry_run) {
                *ret_reason = slot->idle_reason;
                return "skipped";
        }
        if (member->skip != TARGET_OK) {
                bool uncallable = member->skip == TARGET_SKIP_UNCALLABLE;

                *ret_reason = uncallable ? remote_error_name(member->remote_error) : target_skip_name(member->skip);
                return member->skip == TARGET_SKIP_YOUNG || member->skip == TARGET_SKIP_FROZEN ||
                                       member->skip == TARGET_SKIP_STOPPED || member->skip == TARGET_SKIP_TRACED ||
                                       (uncallable && member->remote_error != REMOTE_E_UNFIT)
                               ? "waiting"
                               : "skipped";
        }
        if (!slot->dry_run && !member->adopted) {
                *ret_reason = "first pass";
                return "waiting";
        }
        if (slot->route == CONF_ROUTE_ZERO && !slot->dry_run)
                *ret_reason = member->zero_refused ?: slot->zero_reason;
        if (slot->route == CONF_ROUTE_REMAP && !slot->dry_run)
                *ret_reason = member->remap_refused;
        return "managed";
}

static uint64_t member_pages(const Member *member) {
        return member->counts.present + member->counts.given +
               (member->group->slot->pool ? member->census.ksm_mappings : 0);
}

static json_t *list_targets(void *userdata) {
        Manager *m = userdata;
        json_t *array = json_array();

        for (size_t i = 0; array && i < m->roster.n_groups; i++)
                for (size_t k = 0; k < m->roster.groups[i]->n_members; k++) {
                        const Member *member = m->roster.groups[i]->members[k];
                        const Group *group = member->group;
                        const char *reason, *state = member_state(m, member, &reason);

                        json_array_append_new(
                                array,
                                json_pack("{s:i, s:o, s:o, s:o, s:s, s:s, s:s, s:s?, s:I, s:I}", "pid",
                                          (int)member->target->pid, "name", json_text(member->target->comm), "cgroup",
                                          json_text(group->path), "domain", json_text(group->slot->name), "route",
                                          slot_route(group->slot), "merge",
                                          group->slot->dry_run ? "dry-run" : "yes", "state", state, "reason", reason,
                                          "pages", (json_int_t)member_pages(member), "pages_merged",
                                          (json_int_t)(member_merged(member) + member->counts.given)));
                }
        return array;
}

static void count_skipped(Member *member) {
        _cleanup_(vma_list_done) VmaList vmas = { 0 };

        if (target_read_vmas(member->target, member->group->include_dontdump, &vmas) != 0)
                return;
        manager_claim_tracked(member, &vmas);
        memset(member->skipped, 0, sizeof member->skipped);
        for (size_t i = 0; i < vmas.n; i++)
                if (vmas.vmas[i].skip != VMA_OK && vmas.vmas[i].skip != VMA_SKIP_SHARED)
                        member->skipped[vmas.vmas[i].skip] += vmas.vmas[i].anonymous_bytes / PAGE_BYTES;
}

/* Present anonymous pages in mappings that are left alone, by reason. To count them holds the process's mmap lock, and our
 * loop, for milliseconds a GiB, and whoever may look can ask as often as he likes: what is known is told meanwhile. */
static json_t *skipped_json(Manager *m, Member *member) {
        json_t *object = json_object();
        uint64_t begun = now_nsec();

        if (begun >= MAX_OF(member->skipped_due_nsec, m->skipped_due_nsec) || member->skipped_due_nsec == 0) {
                count_skipped(member);
                member->skipped_due_nsec = begun + (now_nsec() - begun) * COUNT_SHARE_OF_ONE;
                m->skipped_due_nsec = begun + (now_nsec() - begun) * COUNT_SHARE_OF_ALL;
        }
        for (size_t i = 0; i < _VMA_SKIP_MAX; i++)
                if (member->skipped[i] > 0)
                        json_object_set_new(object, vma_skip_name((VmaSkip)i),
                                            json_integer((json_int_t)member->skipped[i]));
        return object;
}

static json_t *failures_json(const Member *member) {
        PageStats stats = { 0 };
        json_t *whole, *failures;

        manager_add_failures(&member->counts, &stats);
        whole = page_stats_json(&stats);
        failures = json_incref(json_object_get(whole, "merge_failures"));
        json_decref(whole);
        return failures;
}

static json_t *judgement_json(const Manager *m, const Member *member) {
        struct probe_target met;
        JudgeCounts counts;

        manager_count_judged(m, member, &counts);
        probes_target(m->probes, member->target->pid, &met);
        return json_pack("{s:b, s:I, s:I, s:I, s:I, s:I, s:I}", "on", (int)m->conf->daemon.judgement, "merges",
                         (json_int_t)counts.merges, "breaks", (json_int_t)counts.breaks, "losses",
                         (json_int_t)counts.losses, "pages_alone", (json_int_t)counts.alone, "alone_nsec_max",
                         (json_int_t)(counts.turns_left_max * m->conf->daemon.pay_back_nsec), "tlb_flushes",
                         (json_int_t)met.tlb_flushes);
}

/* That a process was stopped is no activity of it, so a pass may not have noticed. */
static void notice_stop(const Manager *m, Member *member) {
        TargetSkip skip;
        bool ask;

        if (member->skip == TARGET_OK &&
            target_inspect(member->target, m->once ? 0 : m->conf->daemon.minimum_age_nsec, &skip, &ask) == 0 &&
            skip == TARGET_SKIP_STOPPED)
                member->skip = skip;
}

static int explain_managed(Manager *m, Member *member, json_t **ret) {
        const Group *group = member->group;
        const ConfCgroup *section = policy_find(m->conf, group->path);
        const MemberCounts *counts = &member->counts;
        const char *reason, *state;

        notice_stop(m, member);
        state = member_state(m, member, &reason);
        *ret = json_pack("{s:i, s:o, s:o, s:o, s:s, s:o, s:s, s:s, s:s?, s:b, s:I, s:I, s:I, s:I, s:I, s:o, s:o, s:o}", "pid",
                         (int)member->target->pid, "name", json_text(member->target->comm), "cgroup", json_text(group->path),
                         "section", json_text(section ? section->pattern : NULL), "merge",
                         group->slot->dry_run ? "dry-run" : "yes",
                         "domain", json_text(group->slot->name), "route", slot_route(group->slot), "state", state, "reason",
                         reason, "tracked", member->track != NULL, "pages", (json_int_t)member_pages(member),
                         "pages_merged", (json_int_t)member_merged(member), "pages_zero", (json_int_t)counts->given,
                         "pages_unshared", (json_int_t)counts->unique, "pages_volatile", (json_int_t)counts->changed, "pages_skipped",
                         skipped_json(m, member),
                         "merge_failures", failures_json(member), "judgement", judgement_json(m, member));
        return *ret ? 0 : -ENOMEM;
}

/* Its cgroup is opted in, and yet it is not managed. */
static const char *left_out_reason(const Manager *m, pid_t pid, const char *cgroup) {
        if (roster_is_blocked(&m->roster, cgroup))
                return "its cgroup was unmerged by command, until a reload";
        return roster_find_leaving(&m->roster, pid) ? "what was done to it before is being undone"
                                                    : "it is about to be taken up";
}

static int explain(void *userdata, pid_t pid, json_t **ret, const char **ret_reason) {
        Manager *m = userdata;
        _cleanup_(target_freep) Target *target = NULL;
        _cleanup_free_ char *cgroup = NULL;
        const ConfCgroup *section = NULL;
        TargetSkip skip = TARGET_OK;
        const Group *group = NULL;
        Member *member;
        bool ask;
        int r;

        if (cgroup_of_process(pid, &cgroup) == 0) {
                section = policy_find(m->conf, cgroup);
                group = roster_find_group(&m->roster, cgroup);
        }
        if (group)
                roster_refresh_cgroup(&m->roster, group->id); /* it may have been born a moment ago */
        member = roster_find_member(&m->roster, pid);
        if (member)
                return explain_managed(m, member, ret);
        r = target_new(pid, &target);
        if (r == TARGET_E_GONE) {
                static char reason[64];

                snprintf(reason, sizeof reason, "there is no process %d", (int)pid);
                *ret_reason = reason;
                return SERVICE_E_NOT_FOUND;
        }
        if (r < 0)
                return r;
        if (r == 0)
                (void)target_inspect(target, 0, &skip, &ask);
        *ret = json_pack("{s:i, s:o, s:o, s:o, s:s, s:n, s:n, s:s, s:s, s:b, s:i, s:i, s:i, s:i, s:i, s:{}, s:{}, s:n}", "pid",
                         (int)pid, "name", json_text(target ? target->comm : ""), "cgroup", json_text(cgroup ?: ""), "section",
                         json_text(section ? section->pattern : NULL), "merge",
                         section ? conf_merge_name(section->merge) : "no",
                         "domain", "route", "state", "excluded", "reason",
                         skip == TARGET_SKIP_KERNEL_THREAD ? target_skip_name(skip)
                         : !section                        ? "no section of the configuration matches its cgroup"
                         : section->malformed              ? "its section of the configuration is malformed"
                         : section->merge == CONF_MERGE_NO ? "its section says Merge=no"
                         : skip != TARGET_OK               ? target_skip_name(skip)
                                                           : left_out_reason(m, pid, cgroup),
                         "tracked", 0, "pages", 0, "pages_merged", 0, "pages_zero", 0, "pages_unshared", 0,
                         "pages_volatile", 0, "pages_skipped", "merge_failures", "judgement");
        return *ret ? 0 : -ENOMEM;
}

static int add_request(Manager *m, Request request) {
        int r = GROW(m->requests, m->n_requests, m->requests_allocated);

        if (r < 0)
                return r;
        m->requests[m->n_requests++] = request;
        return 0;
}

static int scan_now(void *userdata, ServiceCall *call, const char **ret_reason) {
        Manager *m = userdata;

        if (m->paused || m->stopping) {
                *ret_reason = m->paused ? "the daemon is paused" : "the daemon stops";
                return SERVICE_E_REFUSED;
        }
        return add_request(m, (Request){ .kind = REQUEST_SCAN, .call = call });
}

static int pause_daemon(void *userdata, const char **ret_reason) {
        Manager *m = userdata;

        m->paused = true;
        /* Whoever waits for a pass would wait for a resume that may never come. */
        for (size_t i = 0; i < m->n_requests;) {
                Request request = m->requests[i];

                if (request.kind != REQUEST_SCAN) {
                        i++;
                        continue;
                }
                m->requests[i] = m->requests[--m->n_requests];
                service_call_end(request.call, SERVICE_E_REFUSED, "the daemon was paused", NULL);
        }
        return 0;
}

static int resume_daemon(void *userdata, const char **ret_reason) {
        Manager *m = userdata;

        m->paused = false;
        return 0;
}

static int unmerge(void *userdata, const char *cgroup, ServiceCall *call, const char **ret_reason) {
        Manager *m = userdata;
        char *copy;
        int r;

        if (roster_is_blocked(&m->roster, cgroup)) {
                *ret_reason = "it was unmerged before, and is left alone until a reload; what could not be called then goes "
                              "on being tried";
                return SERVICE_E_REFUSED;
        }
        if (!roster_find_group(&m->roster, cgroup)) {
                static char reason[PATH_MAX + 64];

                /* Cut off, it might end inside a character. */
                snprintf(reason, sizeof reason, "no cgroup '%s' is opted in", strlen(cgroup) < PATH_MAX ? cgroup : "…");
                *ret_reason = reason;
                return SERVICE_E_NOT_FOUND;
        }
        copy = strdup(cgroup);
        if (!copy)
                return -ENOMEM;
        r = add_request(m, (Request){ .kind = REQUEST_UNMERGE, .call = call, .cgroup = copy });
        if (r < 0)
                free(copy);
        return r;
}

static int reload(void *userdata, json_t **ret_warnings, const char **ret_reason) {
        Manager *m = userdata;
        int r = manager_load_config(m);

        if (r < 0) {
                *ret_reason = "the configuration cannot be read, the old one stands";
                return r;
        }
        *ret_warnings = json_array();
        for (size_t i = 0; *ret_warnings && i < m->warnings.n; i++)
                json_array_append_new(*ret_warnings, json_text(m->warnings.texts[i]));
        return *ret_warnings ? 0 : -ENOMEM;
}

const ServiceOps manager_ops = {
        .get_status = get_status,
        .get_stats = get_stats,
        .list_targets = list_targets,
        .explain = explain,
        .scan_now = scan_now,
        .pause = pause_daemon,
        .resume = resume_daemon,
        .unmerge = unmerge,
        .reload = reload,
};
