/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The merging half of a pass: what is wanted in each member that something was learnt about, the plan for it, the
 * marks, and ksmd.
 *
 * A plan is made from mappings that were read a moment ago, which is not free (smaps): where only a few pages are to be
 * gained in a large process they wait some passes for more.
 */
#include "daemon/pass.h"

#include "base/clock.h"
#include "base/log.h"

#include <string.h>

/* So many pages, or any after so many passes, or any in a process whose mappings are read as fast, are worth a plan. */
#define PLAN_WORTH_PAGES 64U
#define PLAN_PATIENCE 6U
#define PLAN_CHEAP_PAGES ((uint64_t)1 << 16)
/* A burst is worth while for one page to merge in so many marked ones; fewer wait for so many passes. */
#define BURST_WORTH 64U
#define BURST_PATIENCE 6U
#define BURST_BACKOFF_MAX 64U
/* One page merged in so many that were expected is progress, and worth another burst at once. */
#define PROGRESS_SHARE 8U
/* One page missed in so many has everything unmerged read again. */
#define RECHECK_SHARE 64U
/* Where there is little CPU a burst takes minutes: what is saved is counted meanwhile, and what breaks again is
 * noticed. */
#define CENSUS_IN_BURST_NSEC (10 * NSEC_PER_SEC)

/* What the bitmaps say, all in all. */
static void count_member(Member *member) {
        MemberCounts *counts = &member->counts;
        uint64_t alone = 0, known = 0, twin = 0, zero = 0, changed = 0, forked = 0, merged = 0, expected = 0;

        for (size_t b = 0; b < member->space.n; b++) {
                const Block *block = member->space.blocks[b];

                for (unsigned i = 0; i < BLOCK_PAGES / 64; i++) {
                        uint64_t stands = ~block->changed[i] & ~block->merged[i];
                        uint64_t wanted = (block->twin[i] | block->zero[i]) & stands;

                        known += (unsigned)__builtin_popcountll(block->hashed[i] | block->merged[i] | block->alone[i]);
                        alone += (unsigned)__builtin_popcountll(block->alone[i]);
                        merged += (unsigned)__builtin_popcountll(block->merged[i]);
                        changed += (unsigned)__builtin_popcountll(block->changed[i]);
                        twin += (unsigned)__builtin_popcountll(block->twin[i] & stands);
                        zero += (unsigned)__builtin_popcountll(block->zero[i] & stands);
                        expected += (unsigned)__builtin_popcountll((block->saves[i] | block->zero[i]) & stands);
                        forked += (unsigned)__builtin_popcountll(block->forked[i] & ~wanted & stands);
                }
        }
        counts->present = known;
        counts->alone = alone;
        counts->merged = merged;
        counts->changed = changed;
        counts->twin = twin;
        counts->zero = zero;
        counts->wanted = twin + zero;
        counts->expected = expected;
        counts->unique = known - MIN_OF(known, twin + zero + changed + merged + forked + alone);
}

static bool plan_is_due(const Manager *m, Member *member) {
        const MemberCounts *counts = &member->counts;

        if (counts->wanted == 0 && member->marks.ours.n == 0)
                return false;
        return m->once || counts->present <= PLAN_CHEAP_PAGES || counts->wanted >= PLAN_WORTH_PAGES ||
               ++member->passes_waited >= PLAN_PATIENCE;
}

static int mark_member(Pass *pass, Member *member) {
        Manager *m = pass->manager;
        _cleanup_(plan_done) Plan plan = { 0 };
        AdviseResult result = { 0 };
        PlanRules rules = {
                .minimum_run_pages = member->group->minimum_run_pages,
                .huge_page_split = member->group->huge_page_split,
                .vmas_max = m->kernel.max_map_count / 4,
        };
        int r;

        r = manager_refresh_vmas(member);
        if (r != 0)
                return r < 0 ? r : 0;
        if (target_image_replaced(member->target)) { /* the mappings of a program that was not read */
                member->gone = true;
                return 0;
        }
        rules.vmas_now = member->vmas.n;
        r = pass_judge_huge(pass, member, &rules);
        if (r != 0) {
                member->plan_again = true;
                return r < 0 ? r : 0;
        }
        r = plan_make(&member->space, &member->vmas, &rules, &plan);
        if (r < 0)
                return r;
        member->passes_waited = 0;
        member->counts.left_huge = plan.pages_left_huge;
        member->counts.left_budget = plan.pages_left_budget;
        member->counts.left_run = plan.pages_left_run;
        member->counts.left_stack = plan.pages_left_stack;
        member->counts.marked = plan.pages_marked;
        member->counts.expected -= MIN_OF(member->counts.expected, plan.pages_left_huge + plan.pages_left_budget +
                                                                           plan.pages_left_run + plan.pages_left_stack);
        if (member->group->slot->dry_run || member->skip != TARGET_OK)
                return 0;
        r = advise_apply(m->advise, member->target, &plan, &member->marks, &result);
        log_debug("process %d: %lu pages wanted, %zu ranges planned: %lu pages marked, %lu unmarked, %lu ranges failed: %d",
                  member->target->pid, plan.pages_wanted, plan.n, result.pages_marked, result.pages_unmarked,
                  result.failed_ranges, r);
        m->merge_failures[MERGE_FAILURE_CHANGED] += result.failed_ranges;
        m->pass_changes += result.pages_marked;
        pass->newly_marked += result.pages_marked;
        if (result.pages_marked > 0)
                pass_open_huge(member);
        pass->marks_changed |= result.pages_marked + result.pages_unmarked > 0;
        if (result.pages_marked + result.pages_unmarked > 0 || r > 0)
                member->vmas_fingerprint = 0; /* marks show in smaps alone */
        member->plan_again = r > 0 || member->marks.n_idle > 0;
        if (r > 0)
                manager_note_remote_error(m, member, r);
        return r < 0 ? r : 0;
}

static int carry_out(Pass *pass, Member *member) {
        switch (pass_slot(member)->route) {
        case CONF_ROUTE_ZERO:
                return pass_give(pass, member);
        case CONF_ROUTE_REMAP:
                return pass_remap(pass, member);
        default:
                return mark_member(pass, member);
        }
}

/* It maps pages of a pool that is not for it. */
static bool is_astray(const Member *member) {
        return member->astray > 0 || (member->pooled > 0 && pass_slot(member)->apart);
}

int pass_mark(Pass *pass) {
        pass_judge_trust(pass);
        for (size_t i = 0; i < pass->n_members; i++) {
                Member *member = pass->members[i];
                int r;

                member->touched |= member->space.found;
                member->space.found = false;
                if (passed_over(member) || !member->vmas.n)
                        continue;
                if (!member->touched && !member->plan_again && !is_astray(member))
                        continue;
                if (manager_breathe(pass->manager, 0))
                        return -ECANCELED;
                if (passed_over(member))
                        continue;
                if (is_astray(member)) {
                        r = pass_leave_others(pass, member);
                        if (r < 0)
                                log_debug("process %d: another domain's pages: %s", member->target->pid, strerror(-r));
                        if (passed_over(member) || is_astray(member))
                                continue;
                }
                count_member(member);
                if (pass_slot(member)->route == CONF_ROUTE_ZERO) { /* that alone: no twin is wanted, nothing marked */
                        member->counts.wanted = member->counts.zero;
                        member->counts.expected = member->counts.marked = 0;
                }
                pass->learnt |= member->touched;
                member->touched = false;
                if (!plan_is_due(pass->manager, member)) {
                        member->plan_again = member->counts.wanted > 0;
                        continue;
                }
                r = carry_out(pass, member);
                if (r < 0)
                        log_debug("process %d: marking: %s", member->target->pid, strerror(-r));
        }
        return 0;
}

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
        if (manager_breaks_too_dear(m))
                return false;
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

/* KSM would let pages of a process that left another domain, and could not be undone yet, meet those of this one. */
static bool stranger_is_marked(const Pass *pass) {
        const Roster *roster = &pass->manager->roster;

        for (size_t i = 0; i < roster->n_leaving; i++) {
                const Member *member = roster->leaving[i];
                bool ours = false;

                if (member->gone || (member->marks_loaded && member->marks.ours.n == 0))
                        continue;
                for (size_t k = 0; k < pass->n_slots && !ours; k++)
                        ours = !pass->slots[k]->dry_run && member->space.table == &pass->slots[k]->domain->blocks;
                if (!ours)
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

static void look_who_runs(Pass *pass) {
        for (size_t i = 0; i < pass->n_members; i++) {
                TargetActivity now;

                if (!passed_over(pass->members[i]) && target_activity(pass->members[i]->target, &now) == 0)
                        manager_note_ticks(pass->manager, pass->members[i], &now);
        }
}

/* Until ksmd is done; 0: or it merged as much as BreakQuota= allows for now. -ECANCELED. */
static int burst_run(Pass *pass, BurstState *ret) {
        Manager *m = pass->manager;
        uint64_t counted = now_nsec();

        look_who_runs(pass);
        manager_forget_running(m);
        while ((*ret = burst_step(m->burst)) == BURST_RUNNING) {
                if (manager_running_is_due(m)) {
                        look_who_runs(pass);
                        manager_note_running(m);
                }
                manager_note_costs(m);
                if (!m->once && manager_breaks_too_dear(m)) {
                        burst_stop(m->burst);
                        return 0;
                }
                if (manager_breathe_in_burst(m)) {
                        burst_stop(m->burst);
                        return -ECANCELED;
                }
                if (now_nsec() - counted > CENSUS_IN_BURST_NSEC) {
                        burst_pause(m->burst); /* the census waits for the budget */
                        manager_census(m);
                        look_who_runs(pass);
                        manager_note_running(m);
                        counted = now_nsec();
                }
        }
        return 0;
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

