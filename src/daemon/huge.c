/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Huge pages: read as a whole before they are split, and offered back when the split did not pay.
 *
 * Nothing tells what is written in a huge page (to protect it would split it), so what we know of it is a sample, and
 * of most of its pages what they were some passes ago. So when that says that it is worth splitting, all of it is read
 * again right then, 0.3 ms, and the plan goes by that.
 */
#include "daemon/pass.h"

#include "base/log.h"
#include "merge/collapse.h"

#include <string.h>

/* Each is copied, 0.1 to 1 ms. */
#define COLLAPSE_PASS_MAX 16U

/* Test builds leave it out, to see its test fail. */
#ifndef HUGE_LEAVE_OUT
#define HUGE_LEAVE_OUT 0
#endif

/* Reads all of the block, and matches it. */
static int read_whole(Pass *pass, Member *member, Block *block) {
        Manager *m = pass->manager;
        Domain *domain = pass_domain(member);
        ScanBatch *batch = &m->batches[0];
        int r;

        batch->target = member->target;
        batch->vmas = &member->vmas;
        scan_batch_whole(batch, block);
        r = scan_batch(domain->scanner, 0, batch);
        if (r != 0)
                return r;
        pass->pages_read += BLOCK_PAGES;
        r = domain_see(domain, m->crew, batch, 1);
        if (r == 0)
                select_learn(batch, domain->pass);
        return r;
}

int pass_judge_huge(Pass *pass, Member *member, const PlanRules *rules) {
        uint32_t now = pass_domain(member)->pass;

        for (size_t b = 0; b < member->space.n; b++) {
                Block *block = member->space.blocks[b];
                const Vma *vma;
                int r = 0;

                if (!block->huge)
                        continue;
                vma = vma_list_find(&member->vmas, block->addr);
                block->keep_whole = block->split_due > now;
                if (!vma || vma->mergeable || block->keep_whole || block->judged == now ||
                    !plan_would_split(rules, block))
                        continue;
                if (!HUGE_LEAVE_OUT)
                        r = read_whole(pass, member, block);
                block->keep_whole = r != 0;
                member->gone |= r == TARGET_E_GONE;
                if (manager_breathe(pass->manager, 0))
                        return -ECANCELED;
                if (passed_over(member))
                        return TARGET_E_GONE;
        }
        return 0;
}

void pass_open_huge(Member *member) {
        const Ranges *ours = &member->marks.ours;
        size_t at = 0;

        for (size_t b = 0; b < member->space.n; b++) {
                Block *block = member->space.blocks[b];

                while (at < ours->n && ours->ranges[at].end <= block->addr)
                        at++;
                if (block->huge)
                        block->opened = at < ours->n && ours->ranges[at].start < block->addr + BLOCK_BYTES;
        }
}

/* What became of the huge pages that were opened for merging. true: some are split by now, or will be. */
static bool look_at_opened(Member *member) {
        bool any = false;

        for (size_t b = 0; b < member->space.n; b++) {
                Block *block = member->space.blocks[b];

                if (block->opened && !block->huge) {
                        block->opened = false;
                        block->split = block->dead_passes == 0;
                        member->group->huge_pages_split += block->split;
                }
                any |= block->split || block->opened;
        }
        return any;
}

/* How many of so many it collapsed or tried to. */
static unsigned collapse_member(Pass *pass, Member *member, HostThp thp, unsigned budget) {
        uint32_t now = pass_domain(member)->pass;
        unsigned tried = 0;

        for (size_t b = 0; b < member->space.n && tried < budget; b++) {
                Block *block = member->space.blocks[b];
                int r;

                if (!collapse_is_due(block, now))
                        continue;
                if (tried == 0 && manager_refresh_vmas(member) != 0)
                        break;
                if (!collapse_is_allowed(vma_list_find(&member->vmas, block->addr), block, thp))
                        continue;
                tried++;
                r = collapse_block(member->target, member->track, block, now);
                if (r == 0) {
                        member->group->huge_pages_collapsed++;
                        member->look_again = member->vmas_changed = true;
                } else if (r < 0) {
                        log_debug("process %d: huge pages cannot be made: %s", member->target->pid, strerror(-r));
                        break;
                }
        }
        return tried;
}

int pass_collapse(Pass *pass) {
        HostThp thp = HOST_THP_NEVER;
        unsigned budget = COLLAPSE_PASS_MAX;
        bool asked = false;

        for (size_t i = 0; i < pass->n_members; i++) {
                Member *member = pass->members[i];

                if (passed_over(member) || !look_at_opened(member) || budget == 0 || pass_slot(member)->dry_run ||
                    member->skip != TARGET_OK)
                        continue;
                if (!asked)
                        thp = host_thp(NULL);
                asked = true;
                if (thp == HOST_THP_NEVER)
                        continue;
                budget -= collapse_member(pass, member, thp, budget);
                if (manager_breathe(pass->manager, 0))
                        return -ECANCELED;
        }
        return 0;
}
