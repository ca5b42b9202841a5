/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Route zero in a pass: what is zero in a member that something was learnt about is given back at once. There is
 * nothing to wait for afterwards, nothing to undo, and nothing kept but which pages are holes for it, which the census
 * looks at.
 */
#include "daemon/pass.h"

#include "base/log.h"

#include <string.h>

static const char *refusal(int error) {
        return error == ZERO_E_PEER ? "another process shares its memory" :
               error == ZERO_E_LOCKED ? "it locks its memory" : NULL;
}

/* Marks of a time when this domain went by route advise. */
static int undo_marks(Manager *m, Member *member) {
        UndoSlice slice = manager_undo_begin();
        int r;

        do
                r = manager_unmark(m, member, &slice);
        while (manager_undo_goes_on(m, member, &slice));
        return r;
}

static void note_plan(Member *member, const ZeroPlan *plan) {
        MemberCounts *counts = &member->counts;

        counts->left_huge = plan->pages_left_huge;
        counts->left_run = plan->pages_left_run;
        counts->left_kind = plan->pages_left_kind;
        counts->left_budget = counts->left_stack = 0;
}

static int give(Pass *pass, Member *member, const ZeroPlan *plan) {
        Manager *m = pass->manager;
        ZeroResult result = { 0 };
        int r = zero_give_back(m->zero, &member->space, member->track, plan, visit_pause, &pass->visit, &result);

        m->merge_failures[MERGE_FAILURE_CHANGED] += result.pages_back;
        m->pass_changes += result.pages_given;
        pass->marks_changed |= result.pages_given > 0;
        member->counts.zero -= MIN_OF(member->counts.zero, plan->pages);
        member->counts.wanted = member->counts.zero;
        if (result.pages_lost > 0)
                log_warning("process %d: %lu pages lost their mapping while they were away", member->target->pid,
                            result.pages_lost);
        log_debug("process %d: %lu of %lu zero pages given back, %lu put back, %lu refused", member->target->pid,
                  result.pages_given, plan->pages, result.pages_back, result.pages_refused);
        member->plan_again = r > 0 || result.unfinished;
        if (r > 0)
                manager_note_remote_error(m, member, r);
        return pass->visit.interrupted ? -ECANCELED : r < 0 ? r : 0;
}

int pass_give(Pass *pass, Member *member) {
        Manager *m = pass->manager;
        _cleanup_(zero_plan_done) ZeroPlan plan = { 0 };
        ZeroRules rules = {
                .minimum_run_pages = member->group->minimum_run_pages,
                .huge_page_split = member->group->huge_page_split,
        };
        int r;

        r = manager_refresh_vmas(member);
        if (r != 0)
                return r < 0 ? r : 0;
        if (target_image_replaced(member->target)) {
                member->gone = true;
                return 0;
        }
        member->passes_waited = 0;
        member->plan_again = member->unmark = false;
        r = zero_plan_make(&member->space, &member->vmas, &rules, &plan);
        if (r < 0)
                return r;
        note_plan(member, &plan);
        if (pass_slot(member)->dry_run)
                return 0;
        r = undo_marks(m, member);
        if (passed_over(member))
                return 0;
        if (r != 0) {
                member->plan_again = r > 0;
                if (r > 0)
                        manager_note_remote_error(m, member, r);
                return r < 0 ? r : 0;
        }
        if (plan.n == 0)
                return 0;
        r = zero_target_fits(member->target);
        if (r < 0 || r == ZERO_E_GONE)
                return r < 0 ? r : 0;
        member->zero_refused = refusal(r);
        if (r > 0) {
                member->counts.left_kind += plan.pages;
                return 0;
        }
        return give(pass, member, &plan);
}
