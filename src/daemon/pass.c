/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * One pass: read what is due, match, plan, mark, let ksmd merge, put pools in order, count. Read manager_pass() at the
 * end first.
 *
 * What it costs follows what changed. Of a process that did nothing it reads one line of /proc; of one that wrote, the
 * pages written; planned, marked and counted is only where something was learnt.
 */
#include "daemon/pass.h"

#include "base/clock.h"
#include "base/log.h"
#include "daemon/remapping.h"

#include <string.h>

/* Frames are counted anew after every merge; where merely pages were written that may have been merged, when that is
 * cheap (40 ns a marked page) or after so many passes. */
#define CENSUS_CHEAP_PAGES ((uint64_t)1 << 16)
#define CENSUS_PASSES 32U
/* Pages of each pool that are asked about in a pass: 2 us each. */
#define COLLECT_PAGES 8192U
/* Nothing is ever merged in a dry run, so what lost its twin shows only when everything is looked up again. */
#define DRY_RECHECK_PASSES 32U

/* Memory that was added or taken out since (never freed under a frame that somebody has: what is known stays right). */
#define NUMA_NSEC (60 * NSEC_PER_SEC)

static void pass_done(Pass *pass) {
        free(pass->members);
        free(pass->slots);
}

/* New processes first, what an earlier pass left unread next; then whoever has not been read for the longest, and of
 * those the ones in which most was found. */
static int compare_members(const void *a, const void *b) {
        const Member *x = *(Member *const *)a, *y = *(Member *const *)b;
        bool x_new = x->last_pass == 0 && !selection_left(&x->todo);
        bool y_new = y->last_pass == 0 && !selection_left(&y->todo);
        uint64_t x_yield = x->counts.wanted + x->counts.merged, y_yield = y->counts.wanted + y->counts.merged;

        if (x_new != y_new)
                return x_new ? -1 : 1;
        if (selection_left(&x->todo) != selection_left(&y->todo))
                return selection_left(&x->todo) ? -1 : 1;
        if (x->last_pass != y->last_pass)
                return x->last_pass < y->last_pass ? -1 : 1;
        return x_yield > y_yield ? -1 : x_yield < y_yield;
}

/* An administrator may have everything unmerged (run = 2). The processes do nothing then that would show it. */
static void notice_unmerging(Manager *m, const Pass *pass) {
        KsmCounters counters;

        if (!m->ksm || ksm_counters(m->ksm, &counters) < 0)
                return;
        for (size_t i = 0; counters.pages_sharing < m->sharing_seen / 2 && i < pass->n_members; i++)
                pass->members[i]->look_again = true;
}

static void remember_sharing(Manager *m) {
        KsmCounters counters;

        if (m->ksm && ksm_counters(m->ksm, &counters) == 0)
                m->sharing_seen = counters.pages_sharing;
}

static void recheck_slot(Manager *m, const Slot *slot) {
        for (size_t i = 0; i < m->roster.n_groups; i++)
                for (size_t k = 0; m->roster.groups[i]->slot == slot && k < m->roster.groups[i]->n_members; k++)
                        select_recheck(&m->roster.groups[i]->members[k]->space);
}

static void refresh_numa(Manager *m) {
        int r;

        if ((m->conf->daemon.merge_across_nodes && !m->roster.apart) || now_nsec() - m->numa_nsec < NUMA_NSEC)
                return;
        m->numa_nsec = now_nsec();
        r = numa_read(NULL, NULL, &m->numa);
        if (r < 0)
                log_debug("NUMA nodes: %s", strerror(-r));
}

static bool any_marked(const Pass *pass) {
        for (size_t i = 0; i < pass->n_members; i++)
                if (pass->members[i]->marks.ours.n > 0)
                        return true;
        return false;
}

/* KSM counts what was taken apart as shared until ksmd comes by. Once for each reload: others may share pages for ever. */
static bool is_anything_shared(Pass *pass) {
        Manager *m = pass->manager;
        KsmCounters counters;

        if (!m->ksm || (ksm_counters(m->ksm, &counters) == 0 && counters.pages_shared == 0))
                return false;
        if (!m->burst || m->nodes_asked || any_marked(pass) || burst_start(m->burst, 1, 1) < 0)
                return true;
        while (burst_step(m->burst) == BURST_RUNNING)
                if (manager_breathe_in_burst(m, 0)) {
                        burst_stop(m->burst);
                        return true;
                }
        m->nodes_asked = true;
        return ksm_counters(m->ksm, &counters) < 0 || counters.pages_shared > 0;
}

/* MergeAcrossNodes= was changed by a reload. What is merged was merged by the old rule, and KSM holds on to it until no
 * page is shared on the host: then it is put in force, for KSM and for our trees, at once. */
static void settle_nodes(Pass *pass) {
        static const char *const knob[] = { "merge_across_nodes" };
        Manager *m = pass->manager;
        bool across = m->conf->daemon.merge_across_nodes, waited = m->nodes_wait;

        m->nodes_wait = false;
        if (across != m->roster.apart)
                return;
        m->nodes_wait = is_anything_shared(pass);
        if (m->nodes_wait && !waited)
                log_warning("MergeAcrossNodes=%s is not in force yet: " MANAGER_NODES_WAIT, across ? "yes" : "no");
        if (m->nodes_wait)
                return;
        roster_set_apart(&m->roster, !across);
        if (across && m->ksm && ksm_restore_knobs(m->ksm, knob, ELEMENTSOF(knob)) != 0)
                log_warning("KSM goes on keeping NUMA nodes apart");
        log_info("pages of different NUMA nodes are %s from now on", across ? "merged" : "kept apart");
}

static int pass_begin(Manager *m, Pass *pass) {
        size_t n = roster_count_members(&m->roster);

        bool recheck = m->recheck_in > 0 && --m->recheck_in == 0;

        *pass = (Pass){ .manager = m, .asked_for = manager_scan_requested(m) };
        pass->members = calloc(n + 1, sizeof(Member *));
        pass->slots = calloc(m->roster.n_slots + 1, sizeof(Slot *));
        if (!pass->members || !pass->slots)
                return -ENOMEM;
        refresh_numa(m);
        for (size_t i = 0; i < m->roster.n_slots; i++) {
                Slot *slot = m->roster.slots[i];

                if (!slot->domain)
                        continue;
                pass->slots[pass->n_slots++] = slot;
                domain_begin_pass(slot->domain);
                slot->recheck_forked = slot->domain->fork_twin;
                if (recheck || (slot->dry_run && slot->domain->pass % DRY_RECHECK_PASSES == 0))
                        recheck_slot(m, slot);
                slot->domain->fork_twin = false;
        }
        for (size_t i = 0; i < m->roster.n_groups; i++)
                for (size_t k = 0; k < m->roster.groups[i]->n_members; k++)
                        if (m->roster.groups[i]->slot->domain)
                                pass->members[pass->n_members++] = m->roster.groups[i]->members[k];
        notice_unmerging(m, pass);
        qsort(pass->members, pass->n_members, sizeof *pass->members, compare_members);
        return 0;
}

static uint64_t metadata_max(const Manager *m) {
        const ConfDaemon *conf = &m->conf->daemon;
        uint64_t total = (uint64_t)sysconf(_SC_PHYS_PAGES) * PAGE_BYTES;

        return conf->metadata_max_bytes ?: total / 10000 * conf->metadata_max;
}

/* Each domain in proportion to what it holds, of what the books of the pools leave. */
void pass_limit_memory(const Pass *pass) {
        uint64_t max = metadata_max(pass->manager), total = 0;

        for (size_t i = 0; i < pass->n_slots; i++) {
                total += domain_bytes(pass->slots[i]->domain);
                if (pass->slots[i]->pool)
                        max -= MIN_OF(max, remapping_pool_bytes(pass->slots[i]->pool));
        }
        for (size_t i = 0; i < pass->n_slots; i++) {
                uint64_t bytes = domain_bytes(pass->slots[i]->domain);

                domain_limit_memory(pass->slots[i]->domain,
                                    (uint64_t)((double)max * (double)bytes / (double)MAX_OF(total, (uint64_t)1)));
        }
}

static void census(Pass *pass) {
        Manager *m = pass->manager;
        uint64_t marked = 0;

        for (size_t i = 0; i < pass->n_members; i++)
                marked += pass->members[i]->counts.marked;
        manager_tend_pools(m, COLLECT_PAGES);
        m->census_age++;
        if (pass->merged || pass->marks_changed || m->once || m->census_members != pass->n_members ||
            (pass->learnt && (marked <= CENSUS_CHEAP_PAGES || m->census_age >= CENSUS_PASSES)))
                manager_census(m);
        else {
                /* What is written or discarded in what is remapped shows nowhere else. */
                for (size_t i = 0; i < pass->n_slots; i++)
                        if (pass->slots[i]->pool)
                                manager_census_pooled(m, pass->slots[i], pass->members, pass->n_members);
                manager_count(m);
        }
        m->census_members = pass->n_members;
}

static void add_up(Pass *pass) {
        Manager *m = pass->manager;

        m->managed_pages = 0;
        for (size_t i = 0; i < pass->n_members; i++) {
                if (passed_over(pass->members[i]))
                        continue;
                m->managed_pages += pass->members[i]->counts.present;
                m->pass_changes += pass->members[i]->counts.changed;
        }
}

/* Where a pass's time goes, for KSMD_USER_DEBUG=1. */
static void log_step(const char *step, uint64_t *since) {
        uint64_t now = now_nsec();

        log_debug("pass: %s in %.1f ms", step, (double)(now - *since) / NSEC_PER_MSEC);
        *since = now;
}

int manager_pass(Manager *m) {
        _cleanup_(pass_done) Pass pass = { 0 };
        uint64_t begun = now_nsec(), since = begun;
        int r;

        r = pass_begin(m, &pass);
        if (r < 0)
                return r;
        m->in_pass = true;
        settle_nodes(&pass);
        manager_judge(m);
        m->state = MANAGER_SCANNING;
        m->pass_changes = 0;
        m->young_waiting = m->busy_waiting = m->go_on = false;
        m->rests_until_nsec = UINT64_MAX;

        r = pass_read(&pass);
        log_step("read and matched", &since);
        if (r == 0)
                r = pass_confirm(&pass);
        if (r != 0)
                pass_keep_cold(&pass);
        for (size_t i = 0; i < pass.n_slots; i++)
                domain_end_pass(pass.slots[i]->domain);
        pass_limit_memory(&pass);
        log_step("settled", &since);
        if (r == 0) {
                m->state = MANAGER_MERGING;
                r = pass_mark(&pass);
        }
        if (r == 0)
                r = pass_collapse(&pass);
        log_step("marked", &since);
        if (r == 0)
                r = pass_burst(&pass);
        log_step("merged", &since);
        if (r == 0)
                r = pass_tidy(&pass);
        census(&pass);
        if (pass.marks_changed)
                manager_keep(m);
        remember_sharing(m);
        log_step("counted", &since);

        if (r == 0) {
                add_up(&pass);
                m->full_scans += !pass.cut;
                m->last_pass_nsec = now_nsec() - begun;
        }
        m->in_pass = false;
        m->state = MANAGER_IDLE;
        return r == 0 && pass.cut ? MANAGER_E_CUT : r;
}
