/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The second half of a pass: what is wanted in each member that something was learnt about, the plan for it, and the
 * marks (or, by another route, the merging itself). Letting ksmd run is bursting.c's.
 *
 * A plan is made from mappings that were read a moment ago, which is not free (smaps): where only a few pages are to be
 * gained in a large process they wait some passes for more. What is to be unmarked does not wait.
 */
#include "daemon/pass.h"

#include "base/clock.h"
#include "base/log.h"

#include <string.h>

/* So many pages, or any after so many passes, or any in a process whose mappings are read as fast, are worth a plan. */
#define PLAN_WORTH_PAGES 64U
#define PLAN_PATIENCE 6U
#define PLAN_CHEAP_PAGES ((uint64_t)1 << 16)
/* So long those are waited for that are to be let run between their stops; then what is marked is merged first. */
#define MARK_NSEC (10 * NSEC_PER_SEC)

/* Of a burst nothing is expected that is not marked: by us, or by the process itself. */
static void count_expected(Member *member) {
        _cleanup_(ranges_done) Ranges marked = {};
        const Ranges *all = &member->marks.ours;
        int r = 0;

        if (member->marks.marks_itself) {
                for (size_t i = 0; i < member->vmas.n && r == 0; i++)
                        if (member->vmas.vmas[i].mergeable)
                                r = ranges_append(&marked, member->vmas.vmas[i].start, member->vmas.vmas[i].end);
                if (r == 0 && ranges_unite(&marked, all, &marked) == 0)
                        all = &marked;
        }
        member->counts.expected = plan_count_frees(&member->space, all->ranges, all->n);
}

/* What the bitmaps say, all in all. */
static void count_member(Member *member) {
        MemberCounts *counts = &member->counts;
        uint64_t alone = 0, known = 0, twin = 0, zero = 0, changed = 0, forked = 0, merged = 0;

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
        counts->unique = known - MIN_OF(known, twin + zero + changed + merged + forked + alone);
        count_expected(member);
}

/* It holds secrets by now, or is to be left alone; or it was born with marks, and this domain goes by another route. */
static bool must_unmark(const Member *member) {
        return member->unmark || (pass_slot(member)->route != CONF_ROUTE_ADVISE && member->marks.ours.n > 0);
}

static bool plan_is_due(const Manager *m, Member *member) {
        const MemberCounts *counts = &member->counts;

        if (counts->wanted == 0 && member->marks.ours.n == 0)
                return false;
        return m->once || must_unmark(member) || counts->present <= PLAN_CHEAP_PAGES || counts->wanted >= PLAN_WORTH_PAGES ||
               ++member->passes_waited >= PLAN_PATIENCE;
}

/* -ECANCELED. */
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
        if (member->group->slot->dry_run || !member->marks_loaded)
                return 0;
        plan.goes_on = pass->visits_again;
        r = advise_apply(m->advise, member->target, &plan, &member->marks, visit_pause, &pass->visit, &result);
        log_debug("process %d: %lu pages wanted, %zu ranges planned: %lu pages marked, %lu unmarked, %lu ranges failed: %d",
                  member->target->pid, plan.pages_wanted, plan.n, result.pages_marked, result.pages_unmarked,
                  result.failed_ranges, r);
        count_expected(member);
        m->merge_failures[MERGE_FAILURE_CHANGED] += result.failed_ranges;
        m->pass_changes += result.pages_marked;
        pass->newly_marked += result.pages_marked;
        if (result.pages_marked > 0)
                pass_open_huge(member);
        pass->marks_changed |= result.pages_marked + result.pages_unmarked > 0;
        if (result.pages_marked + result.pages_unmarked > 0 || r > 0)
                member->vmas_fingerprint = 0; /* marks show in smaps alone */
        member->plan_again = r > 0 || result.unfinished;
        if (r >= 0)
                member->unmark = result.unmark_left;
        if (r > 0)
                manager_note_remote_error(m, member, r);
        return pass->visit.interrupted ? -ECANCELED : r < 0 ? r : 0;
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

static bool is_due(const Pass *pass, const Member *member) {
        if (pass->visits_again)
                return member->standing.cut && !passed_over(member);
        return !passed_over(member) && member->vmas.n &&
               (member->touched || member->plan_again || member->unmark || is_astray(member));
}

/* -ECANCELED. */
static int mark_one(Pass *pass, Member *member) {
        int r;

        if (is_astray(member)) {
                r = pass_leave_others(pass, member);
                if (r < 0)
                        log_debug("process %d: another domain's pages: %s", member->target->pid, strerror(-r));
                if (passed_over(member) || is_astray(member))
                        return 0;
        }
        count_member(member);
        if (pass_slot(member)->route == CONF_ROUTE_ZERO) { /* that alone: no twin is wanted, nothing marked */
                member->counts.wanted = member->counts.zero;
                member->counts.expected = member->counts.marked = 0;
        }
        /* It may keep secrets by now, or be frozen or stopped: what was learnt is for later. */
        if (!manager_takes_part(pass->manager, member) || member->skip != TARGET_OK)
                return 0;
        pass->learnt |= member->touched;
        member->touched = false;
        if (!plan_is_due(pass->manager, member)) {
                member->plan_again = member->counts.wanted > 0 || (member->plan_again && member->marks.ours.n > 0);
                member->unmark = false; /* nothing is marked */
                return 0;
        }
        r = carry_out(pass, member);
        member->plan_again |= member->standing.cut || r < 0;
        if (r < 0 && r != -ECANCELED)
                log_debug("process %d: marking: %s", member->target->pid, strerror(-r));
        return r == -ECANCELED ? r : 0;
}

/* Those that may be stopped now. *ret_next: when others may; UINT64_MAX: all are done. -ECANCELED. */
static int mark_round(Pass *pass, uint64_t *ret_next) {
        *ret_next = UINT64_MAX;
        for (size_t i = 0; i < pass->n_members; i++) {
                Member *member = pass->members[i];
                int r;

                if (!is_due(pass, member))
                        continue;
                if (manager_breathe(pass->manager, 0))
                        return -ECANCELED;
                if (passed_over(member))
                        continue;
                if (member->standing.rests_until_nsec > now_nsec())
                        member->standing.cut = true;
                else {
                        pass->visit = visit_begin(pass->manager, member);
                        r = mark_one(pass, member);
                        visit_end(&pass->visit);
                        if (r < 0)
                                return r;
                }
                if (member->standing.cut)
                        *ret_next = MIN_OF(*ret_next, member->standing.rests_until_nsec);
        }
        return 0;
}

int pass_mark(Pass *pass) {
        Manager *m = pass->manager;
        uint64_t until = now_nsec() + MARK_NSEC, next, now;
        int r;

        pass_judge_trust(pass);
        for (size_t i = 0; i < pass->n_members; i++) {
                pass->members[i]->touched |= pass->members[i]->space.found;
                pass->members[i]->space.found = pass->members[i]->standing.cut = false;
        }
        r = mark_round(pass, &next);
        pass->visits_again = true;
        while (r == 0 && next < UINT64_MAX && (m->once || next < until)) {
                now = now_nsec();
                if (manager_breathe(m, next > now ? next - now : 0))
                        return -ECANCELED;
                r = mark_round(pass, &next);
        }
        m->rests_until_nsec = next;
        return r;
}
