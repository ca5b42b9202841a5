/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The reading half of a pass: of every member the pages that are due, in rounds. A round is what the crew reads and
 * matches in a few milliseconds; between two of them the event loop runs, on this thread alone.
 *
 * What was selected and could not be read before the pass ended (it was interrupted, or had read its share) is kept and
 * read first by the next one: it may have been reported as written, and will not be reported again.
 */
#include "daemon/pass.h"

#include "base/clock.h"
#include "base/log.h"
#include "scan/cold.h"

#include <string.h>

/* A block read for the first time is believed quiet when a look at it this much later finds nothing changed: sooner
 * where that look is exact, at most a few others aside. ksmd will see each page twice itself before it merges it. */
#define QUIET_NSEC (200 * NSEC_PER_MSEC)
#define QUIET_TRACKED_NSEC (50 * NSEC_PER_MSEC)
#define FEW_SHARE 8U
/* A pass ends after so many pages (2 GiB), so that what was found is merged, and newcomers get their turn. */
#define SLICE_PAGES ((uint64_t)1 << 19)

/* Giving tracking back takes 0.1 s a GiB: in one go, so much of it. */
#define RELEASE_NSEC (5 * NSEC_PER_MSEC)

/* Of the blocks of a process one in so many is asked each pass whether its frames are still what they were: a write is
 * told of, but not that a page moved to another NUMA node, nor the end of a child that shared it. */
#define OUTDATED_PASSES 16U

typedef struct Round {
        Scanner *scanner;
        ScanBatch *batches;
} Round;

static void scan_one(void *userdata, unsigned thread, size_t item) {
        Round *round = userdata;

        (void)scan_batch(round->scanner, thread, &round->batches[item]); /* the batch keeps the result */
}

static void count_fresh(Pass *pass, Member *member, const ScanBatch *batch) {
        uint32_t number = pass_domain(member)->pass;
        const Block *last = NULL;

        for (unsigned i = 0; i < batch->n; i++) {
                const Block *block = batch->pages[i].block;

                if (block == last)
                        continue;
                last = block;
                if (block->first_pass != number)
                        continue;
                pass->fresh++;
                pass->fresh_sampled += select_is_sampled(block);
                member->unconfirmed = member->unconfirmed ?: number;
        }
}

/* Reads and matches the next pages of the member. TARGET_E_GONE; -errno: they are still to be read. */
static int read_round(Pass *pass, Member *member) {
        Manager *m = pass->manager;
        Domain *domain = pass_domain(member);
        Round round = { .scanner = domain->scanner, .batches = m->batches };
        size_t begun = member->todo.at, n = 0;
        int r = 0;

        while (n < m->n_batches && selection_left(&member->todo))
                selection_take(&member->todo, &member->vmas, member->target, &m->batches[n++]);
        crew_run(m->crew, n, scan_one, &round);
        for (size_t i = 0; i < n; i++) {
                const ScanBatch *batch = &m->batches[i];

                if (batch->result != 0)
                        r = batch->result;
                count_fresh(pass, member, batch);
                pass->pages_read += batch->n;
        }
        if (r == 0)
                r = domain_see(domain, m->crew, m->batches, n);
        if (r < 0)
                member->todo.at = begun;
        for (size_t i = 0; i < n && r == 0; i++)
                select_learn(&m->batches[i], domain->pass);
        return r;
}

static void select_pages(const Pass *pass, Member *member) {
        const Manager *m = pass->manager;
        Domain *domain = pass_domain(member);
        SelectRules rules = {
                .pass = domain->pass,
                .faults = member->faults,
                .recheck_forked = pass_slot(member)->recheck_forked,
                .all_due = m->once || pass->asked_for,
                .busy_pages = select_busy_pages(m->kernel.fault_cost.write_nsec),
                .prove_quiet = member->group->track == CONF_AUTO &&
                               select_tracking_is_dear(m->kernel.fault_cost.write_nsec),
        };
        int r;

        domain_find_outdated(domain, &member->space,
                             rules.all_due ? SIZE_MAX : DIV_ROUND_UP(member->space.n, OUTDATED_PASSES));
        r = selection_make(&member->todo, &member->space, member->track, &member->vmas, m->crew, &rules);

        if (r == TARGET_E_GONE)
                member->gone = true;
        else if (r < 0) {
                log_debug("process %d: what was written is not known: %s", member->target->pid, strerror(-r));
                manager_end_track(member);
        }
        member->touched |= member->todo.settled;
}

/* What is registered keeps the process from a userfaultfd of its own, so neither the quota nor somebody who wants the pass
 * to end has it wait. */
static void release_track(Manager *m, Member *member) {
        while (!passed_over(member) && !manager_release_track(member, now_nsec() + RELEASE_NSEC))
                (void)manager_attend(m);
}

static int read_member(Pass *pass, Member *member) {
        bool ready = manager_member_ready(pass->manager, member);

        release_track(pass->manager, member);
        if (!ready || passed_over(member))
                return 0;
        if (!selection_left(&member->todo))
                select_pages(pass, member);
        release_track(pass->manager, member);
        if (passed_over(member))
                return 0;
        domain_expect(pass_domain(member), MIN_OF(selection_count_new(&member->todo), SLICE_PAGES - pass->pages_read));
        while (selection_left(&member->todo)) {
                int r = read_round(pass, member);

                member->touched = true;
                pass_limit_memory(pass);
                if (r == TARGET_E_GONE) {
                        member->gone = true;
                        return 0;
                }
                if (r < 0) {
                        log_debug("process %d: reading: %s", member->target->pid, strerror(-r));
                        return 0;
                }
                if (manager_breathe(pass->manager, 0))
                        return -ECANCELED;
                if (passed_over(member))
                        return 0;
                if (pass->pages_read >= SLICE_PAGES && selection_left(&member->todo)) {
                        pass->cut = true;
                        return 0;
                }
        }
        member->last_pass = pass_domain(member)->pass;
        return 0;
}

int pass_read(Pass *pass) {
        pass->first_read_nsec = now_nsec();
        for (size_t i = 0; i < pass->n_members; i++) {
                Member *member = pass->members[i];
                int r;

                if (passed_over(member))
                        continue;
                if (pass->pages_read >= SLICE_PAGES) {
                        pass->cut = true;
                        break;
                }
                if (manager_breathe(pass->manager, 0))
                        return -ECANCELED;
                if (passed_over(member))
                        continue;
                r = read_member(pass, member);
                if (r < 0)
                        return r;
        }
        return 0;
}

/* Also what was read by earlier passes that were given up. */
static bool is_unconfirmed(const Member *member, const Block *block) {
        return member->unconfirmed > 0 && block->first_pass >= member->unconfirmed;
}

/* Protected pages that were written since they were read: left unprotected, they are reported again to the next pass. */
static int confirm_tracked(Member *member) {
        _cleanup_(track_ranges_done) TrackRanges written = {};
        int r = 0;

        for (size_t i = 0; i < member->track->n && r == 0; i++)
                r = track_written(member->track, member->target, member->track->chunks[i].start,
                                  member->track->chunks[i].end, false, &written);
        for (size_t i = 0; i < written.n; i++)
                for (uint64_t addr = written.ranges[i].start; addr < written.ranges[i].end; addr += PAGE_BYTES) {
                        Block *block = space_find(&member->space, addr);

                        if (!block || !is_unconfirmed(member, block) || select_is_sampled(block))
                                continue;
                        page_set_add(block->changed, (unsigned)(addr % BLOCK_BYTES / PAGE_BYTES));
                        block->unsettled = true;
                }
        return r;
}

static void confirm_member(Member *member) {
        Domain *domain = pass_domain(member);
        int r = 0;

        if (member->track && confirm_tracked(member) == TARGET_E_GONE)
                member->gone = true;
        for (size_t b = 0; b < member->space.n && r == 0; b++) {
                Block *block = member->space.blocks[b];

                if (is_unconfirmed(member, block) && select_is_sampled(block))
                        r = domain_confirm_block(domain, block, &member->vmas);
        }
        member->gone |= r == TARGET_E_GONE;
}

/* What the process had not used for long, and we read just now for the first time: once, as it may be in use later. */
static void keep_cold(Member *member) {
        _cleanup_(cold_list_done) ColdList list = { 0 };
        uint32_t warm_from = member->warm_from;
        int r = 0;

        for (size_t b = 0; b < member->space.n && r == 0; b++) {
                const Block *block = member->space.blocks[b];

                if (!is_unconfirmed(member, block) || block->first_pass < member->warm_from)
                        continue;
                r = cold_collect(&list, &member->vmas, block->addr);
                warm_from = MAX_OF(warm_from, block->first_pass + 1);
        }
        if (r == 0)
                r = cold_restore(member->target, list.ranges, list.n);
        if (r < 0)
                log_debug("process %d: what was cold looks used now: %s", member->target->pid, strerror(-r));
        member->warm_from = warm_from;
}

static bool waits_for_look(const Member *member) {
        return !passed_over(member) && member->unconfirmed > 0 && member_may_be_read(member);
}

/* How long after the first reading of this pass the second look is to come; 0: there is nothing to look at. */
static uint64_t quiet_nsec(const Pass *pass) {
        bool any = false, earlier = false;

        for (size_t i = 0; i < pass->n_members; i++)
                if (waits_for_look(pass->members[i])) {
                        any = true;
                        earlier |= pass->members[i]->unconfirmed < pass_domain(pass->members[i])->pass;
                }
        if (!any)
                return 0;
        return earlier || pass->fresh_sampled * FEW_SHARE > pass->fresh ? QUIET_NSEC : QUIET_TRACKED_NSEC;
}

int pass_confirm(Pass *pass) {
        bool swap = host_has_swap();
        uint64_t since = now_nsec() - pass->first_read_nsec, quiet = quiet_nsec(pass);

        if (since < quiet && manager_breathe(pass->manager, quiet - since))
                return -ECANCELED;
        for (size_t i = 0; i < pass->n_members; i++) {
                Member *member = pass->members[i];

                if (!waits_for_look(member) || !manager_takes_part(pass->manager, member))
                        continue;
                confirm_member(member);
                if (swap && !member->gone)
                        keep_cold(member);
                member->unconfirmed = 0;
                if (manager_breathe(pass->manager, 0))
                        return -ECANCELED;
        }
        return 0;
}

/* Who leaves was read, too. The second look is the next pass's. */
void pass_keep_cold(const Pass *pass) {
        for (size_t i = 0; i < pass->n_members && host_has_swap(); i++) {
                Member *member = pass->members[i];

                if (member->gone || member->unconfirmed == 0)
                        continue;
                keep_cold(member);
                (void)manager_attend(pass->manager);
        }
}
