/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The end of a pass: whether it is worth while to let ksmd run over what is marked, with which of its settings, and for
 * how long.
 */
#include "daemon/pass.h"

#include "base/clock.h"
#include "base/log.h"
#include "conf/conf-value.h"

#include <string.h>

/* A burst is worth while for one page to merge in so many marked ones; fewer wait for so many passes. */
#define BURST_WORTH 64U
#define BURST_PATIENCE 6U
#define BURST_BACKOFF_MAX 64U
/* One page merged in so many that were expected is progress, and worth another burst at once. */
#define PROGRESS_SHARE 8U
/* One page missed in so many has everything unmerged read again. */
#define RECHECK_SHARE 64U
/* Where there is little CPU a burst takes minutes: what is saved is counted meanwhile, and what breaks again is
 * noticed. One part of the quota in so many at most goes into that. */
#define CENSUS_IN_BURST_NSEC (10 * NSEC_PER_SEC)
#define CENSUS_IN_BURST_SHARE 16U
/* Who runs is asked for so long after a burst began, then so often. */
#define LOOK_FIRST_NSEC (20 * NSEC_PER_MSEC)
#define LOOK_NSEC NSEC_PER_SEC
/* Who asked for a pass is let wait for BreakQuota= so long. */
#define ASKED_WAIT_MAX_NSEC (5 * NSEC_PER_SEC)

/* In a burst ksmd visits everything marked two or three times, so a handful of pages is let wait for company; and what
 * the last burst could not merge (pages that are pinned, or never stand still) is tried ever more seldom, unless more
 * has come since. */
static bool burst_is_due(Manager *m, const Pass *pass) {
        bool few = pass->expected * BURST_WORTH < pass->marked;

        /* What was missed and is not expected any more (dropped, rewritten) holds up nothing that comes in its place. */
        m->burst_missed = MIN_OF(m->burst_missed, pass->expected);
        if (m->burst_missed == 0)
                m->burst_backoff = 0;
        if (pass->expected == 0 || pass->marked == 0 || !m->burst)
                return false;
        if (m->once)
                return true;
        m->passes_waited++;
        /* A process that could not be called before: what is marked in it may be what the last burst missed. */
        if (pass->newly_marked * PROGRESS_SHARE > m->burst_missed) {
                if (m->burst_backoff > 0)
                        burst_look_at_all(m->burst);
                m->burst_missed = m->burst_backoff = 0;
        }
        if (pass->expected > 2 * m->burst_missed && (!few || m->passes_waited >= BURST_PATIENCE))
                return true;
        return m->passes_waited >= m->burst_backoff && (!few || m->passes_waited >= BURST_PATIENCE);
}

static void note_burst(Manager *m, uint64_t expected, uint64_t merged) {
        m->passes_waited = 0;
        m->burst_missed = expected - MIN_OF(expected, merged);
        /* Some of it may have lost its twins since it found them; or ksmd, which runs at low priority, got no CPU. */
        if (m->burst_missed * RECHECK_SHARE > expected)
                m->recheck_in = MAX_OF(m->burst_backoff, 1U);
        m->go_on = m->burst_missed * RECHECK_SHARE > expected && merged * PROGRESS_SHARE >= expected;
        if (merged * PROGRESS_SHARE >= expected)
                m->burst_backoff = 0;
        else if (m->burst_backoff == 0)
                m->burst_backoff = 2;
        else
                m->burst_backoff = MIN_OF(2 * m->burst_backoff, BURST_BACKOFF_MAX);
}

/* Marking cuts mappings into pieces, and KSM looks at them all for each sharer. */
static uint64_t most_pieces(const Pass *pass) {
        uint64_t most = 0;

        for (size_t i = 0; i < pass->n_members; i++)
                if (!passed_over(pass->members[i]))
                        most = MAX_OF(most, (uint64_t)(2 * pass->members[i]->marks.ours.n));
        return most;
}

/* MaxPageSharing=, and what auto comes to. It is measured when it is first needed. */
static uint64_t wanted_sharing(Manager *m, const Pass *pass) {
        const ConfDaemon *conf = &m->conf->daemon;
        int r = 0;

        if (conf->max_page_sharing)
                return conf->max_page_sharing;
        if (m->walk.mapping_nsec == 0)
                r = walk_measure(&m->walk);
        if (r < 0) {
                log_warning("MaxPageSharing=auto: what a reverse map costs cannot be measured (%s): KSM's own limit stays",
                            strerror(-r));
                return UINT64_MAX;
        }
        return walk_limit(&m->walk, conf->max_rmap_walk_nsec, most_pieces(pass));
}

/* How many may share a page, and whether across NUMA nodes, are KSM's own knobs, which change only while nothing is
 * shared, to be put back too. So they are only made stricter, and only before a burst: until there is something to
 * merge nothing is touched. */
static void limit_sharing(Manager *m, const Pass *pass) {
        uint64_t sharing = wanted_sharing(m, pass);
        KsmKnobs knobs;
        bool busy = false;

        if (ksm_knobs(m->ksm, &knobs) < 0)
                return;
        m->max_page_sharing = (uint32_t)MIN_OF(knobs.max_page_sharing, (uint64_t)INT32_MAX);
        if (knobs.run != 0)
                return; /* the administrator runs ksmd: the settings are his */
        if (sharing < knobs.max_page_sharing) {
                int r = ksm_set(m->ksm, "max_page_sharing", sharing);

                busy = r == KSM_E_BUSY;
                if (r == 0)
                        m->max_page_sharing = (uint32_t)sharing;
        }
        for (size_t i = 0; i < pass->n_slots; i++)
                if (!pass->slots[i]->pool)
                        stable_set_max_sharing(pass->slots[i]->domain->stable, m->max_page_sharing);
        if (m->roster.apart)
                busy |= ksm_set(m->ksm, "merge_across_nodes", 0) == KSM_E_BUSY;
        if (busy && !m->limits_refused)
                log_warning("MaxPageSharing= or MergeAcrossNodes= is not in force: " MANAGER_NODES_WAIT);
        m->limits_refused = busy;
}

/* KSM would let pages of a process that left another domain, or whose domain goes by another route by now, and could not be
 * undone yet, meet those of this one. */
static bool stranger_is_marked(const Pass *pass) {
        const Roster *roster = &pass->manager->roster;

        for (size_t i = 0; i < roster->n_leaving; i++) {
                const Member *member = roster->leaving[i];
                bool ours = false;

                if (member->gone || (member->marks_loaded && member->marks.ours.n == 0))
                        continue;
                for (size_t k = 0; k < pass->n_slots && !ours; k++)
                        ours = !pass->slots[k]->dry_run && pass->slots[k]->route == CONF_ROUTE_ADVISE &&
                               member->space.table == &pass->slots[k]->domain->blocks;
                if (!ours)
                        return true;
        }
        for (size_t i = 0; i < pass->n_members; i++) {
                const Member *member = pass->members[i];

                if (!passed_over(member) && pass_slot(member)->route != CONF_ROUTE_ADVISE && member->marks.ours.n > 0)
                        return true;
        }
        return false;
}

static void add_expected(Pass *pass) {
        for (size_t i = 0; i < pass->n_members; i++) {
                const Member *member = pass->members[i];

                if (passed_over(member) || pass_slot(member)->dry_run || pass_slot(member)->route == CONF_ROUTE_REMAP)
                        continue;
                pass->expected += member->counts.expected;
                pass->marked += member->counts.marked;
        }
}

/* Those of the block that are marked, wanted and not known to be merged are to be read again. */
static void look_again(Block *block, const PlanRange *marked) {
        PageSet pages = {};

        block_add_range(block, marked->start, marked->end, pages);
        for (unsigned i = 0; i < ELEMENTSOF(pages); i++)
                block->again[i] |= pages[i] & block->twin[i] & ~block->merged[i];
}

/* A merge is no page fault of the process, and shows nowhere else: not in blocks that are not tracked, nor in the first
 * page of a content, which becomes KSM's where it is. */
static void look_at_merged(Member *member) {
        const Ranges *marked = &member->marks.ours;
        uint32_t pass = pass_domain(member)->pass;

        member->look_again = true;
        for (size_t b = 0, first = 0; b < member->space.n; b++) {
                Block *block = member->space.blocks[b];

                if (page_set_any(block->twin) || page_set_any(block->zero))
                        select_soon(block, pass);
                while (first < marked->n && marked->ranges[first].end <= block->addr)
                        first++;
                for (size_t i = first; i < marked->n && marked->ranges[i].start < block->addr + BLOCK_BYTES; i++)
                        look_again(block, &marked->ranges[i]);
        }
}

/* How many run at a time since the last look, in CONF_SHARE_ONE: TLB flushes cost those who do. Our own calls in them
 * (marking) are over when a burst begins, and what is left is what they do by themselves. */
static uint32_t look_who_runs(const Pass *pass) {
        uint64_t sum = 0;

        for (size_t i = 0; i < pass->n_members; i++) {
                Member *member = pass->members[i];

                if (passed_over(member))
                        continue;
                manager_look_how_it_runs(member, 0);
                sum += member->standing.runs;
        }
        return (uint32_t)MIN_OF(sum, (uint64_t)UINT32_MAX);
}

/* BreakQuota= has merging wait, between two portions or to begin with. It does until the next pass is due, unless there is
 * more to be read, or somebody waits for this pass, or for the next. */
static bool waits_too_long(const Pass *pass, uint64_t begun, uint64_t hold) {
        const Manager *m = pass->manager;
        uint64_t until = now_nsec() + hold;

        return pass->cut || until >= m->next_pass_nsec || manager_scan_waits(m) ||
               (pass->asked_for && until >= begun + ASKED_WAIT_MAX_NSEC);
}

enum { BURSTING_E_HELD_BACK = 1 };

/* BURSTING_E_HELD_BACK, -ECANCELED. */
static int wait_for_portion(const Pass *pass) {
        Manager *m = pass->manager;
        uint64_t begun = now_nsec(), hold;

        while ((hold = manager_breaks_wait_nsec(m)) > 0) {
                if (waits_too_long(pass, begun, hold)) {
                        log_debug("pass: nothing is merged: BreakQuota= is used up for %.1f s", (double)hold / NSEC_PER_SEC);
                        return BURSTING_E_HELD_BACK;
                }
                if (manager_breathe(m, hold))
                        return -ECANCELED;
        }
        return 0;
}

/* How long until it may be done again. */
static uint64_t census_in_burst(Manager *m) {
        uint64_t begun = process_cpu_nsec(), took;

        burst_pause(m->burst); /* the census waits for the budget */
        manager_census(m);
        took = process_cpu_nsec() - begun;
        return MAX_OF(CENSUS_IN_BURST_NSEC, took * CENSUS_IN_BURST_SHARE / manager_quota(m) * CONF_SHARE_ONE);
}

/* Until ksmd is done; 0: or it merged as much as BreakQuota= allows for. -ECANCELED. */
static int burst_steps(Pass *pass, BurstState *ret) {
        Manager *m = pass->manager;
        uint64_t begun = now_nsec(), looked = begun, look_in = LOOK_FIRST_NSEC;
        uint64_t counted = begun, count_in = CENSUS_IN_BURST_NSEC;

        (void)look_who_runs(pass); /* what was before the burst does not count */
        while ((*ret = burst_step(m->burst)) == BURST_RUNNING) {
                uint64_t now = now_nsec(), hold;

                if (now - looked > look_in) {
                        m->running = look_who_runs(pass);
                        m->running_wait = false;
                        looked = now;
                        look_in = LOOK_NSEC;
                }
                hold = manager_breaks_wait_nsec(m);
                if (hold > 0 && waits_too_long(pass, begun, hold)) {
                        log_debug("pass: BreakQuota= was used up before all was merged (flushes where %u/10000 run)",
                                  m->running);
                        burst_stop(m->burst);
                        return 0;
                }
                if (manager_breathe_in_burst(m, hold)) {
                        burst_stop(m->burst);
                        return -ECANCELED;
                }
                if (now - counted > count_in) {
                        count_in = census_in_burst(m);
                        counted = now_nsec();
                }
        }
        return 0;
}

/* What was over before it could be told who runs counts by who ran in the burst before. */
static int burst_run(Pass *pass, BurstState *ret) {
        int r;

        pass->manager->running_wait = true;
        r = burst_steps(pass, ret);
        pass->manager->running_wait = false;
        return r;
}

int pass_burst(Pass *pass) {
        Manager *m = pass->manager;
        BurstStats before, after;
        BurstState state;
        int r;

        add_expected(pass);
        log_debug("pass: %lu of %lu marked pages are to be merged, %lu of them missed before; %u passes waited of %u",
                  pass->expected, pass->marked, m->burst_missed, m->passes_waited, m->burst_backoff);
        if (!burst_is_due(m, pass))
                return 0;
        r = wait_for_portion(pass);
        if (r != 0)
                return r < 0 ? r : 0;
        m->stranger_marked = stranger_is_marked(pass);
        if (m->stranger_marked)
                return 0;
        limit_sharing(m, pass);
        manager_note_frames(m);
        manager_keep(m);
        burst_stats(m->burst, &before);
        r = burst_start(m->burst, pass->expected, pass->marked);
        if (r < 0) {
                log_warning("KSM cannot be run: %s", strerror(-r));
                return 0;
        }
        pass->merged = true;
        for (size_t i = 0; i < pass->n_members; i++)
                if (!passed_over(pass->members[i]) && pass->members[i]->marks.ours.n > 0)
                        look_at_merged(pass->members[i]);
        r = burst_run(pass, &state);
        if (r < 0)
                return r;
        burst_stats(m->burst, &after);
        if (state == BURST_DONE)
                note_burst(m, pass->expected, after.pages_merged - before.pages_merged);
        return 0;
}
