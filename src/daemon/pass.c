/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * One pass: read every target, match, plan, mark, let ksmd merge, count. Read manager_pass() at the end first.
 *
 * A pass works on a snapshot of the members, since processes and cgroups come and go while it breathes; a member that
 * has gone or is leaving is passed over. Nothing is acted on before everything was read: plans are made from whole
 * passes only.
 */
#include "daemon/manager.h"

#include "base/clock.h"
#include "base/log.h"

#include <string.h>

/* A block read for the first time is believed quiet when a sample of it is unchanged this much later. */
#define QUIET_NSEC (200 * NSEC_PER_MSEC)
/* A burst is worth while for one page to merge in so many marked ones; fewer wait for so many passes. */
#define BURST_WORTH 64U
#define BURST_PATIENCE 6U
#define BURST_BACKOFF_MAX 64U

typedef struct Pass {
        Manager *manager;
        Member **members;               /* snapshot */
        size_t n_members;
        Slot **slots;
        size_t n_slots;
        uint64_t first_read_nsec;
        uint64_t expected, marked;      /* over all domains that merge */
        bool fresh;                     /* a block was read for the first time */
} Pass;

static void pass_done(Pass *pass) {
        free(pass->members);
        free(pass->slots);
}

static int pass_begin(Manager *m, Pass *pass) {
        size_t n = roster_count_members(&m->roster);

        *pass = (Pass){ .manager = m };
        pass->members = calloc(n + 1, sizeof(Member *));
        pass->slots = calloc(m->roster.n_slots + 1, sizeof(Slot *));
        if (!pass->members || !pass->slots)
                return -ENOMEM;
        for (size_t i = 0; i < m->roster.n_slots; i++)
                if (m->roster.slots[i]->domain) {
                        pass->slots[pass->n_slots++] = m->roster.slots[i];
                        domain_begin_pass(m->roster.slots[i]->domain);
                }
        for (size_t i = 0; i < m->roster.n_groups; i++)
                for (size_t k = 0; k < m->roster.groups[i]->n_members; k++)
                        if (m->roster.groups[i]->slot->domain)
                                pass->members[pass->n_members++] = m->roster.groups[i]->members[k];
        return 0;
}

static bool passed_over(const Member *member) { return member->gone || member->leaving; }

/* The domain whose pages these are; valid while the member is not leaving. */
static Domain *domain_of(const Member *member) { return member->group->slot->domain; }

static void count_batch(MemberCounts *counts, const ScanBatch *batch) {
        for (unsigned i = 0; i < batch->n; i++) {
                const ScanPage *p = &batch->pages[i];

                switch ((ScanKind)p->kind) {
                case SCAN_NOTHING:
                        continue;
                case SCAN_FAILED:
                        counts->failed++;
                        continue;
                case SCAN_KSM:
                        counts->merged++;
                        break;
                case SCAN_ZERO:
                        counts->zero++;
                        break;
                case SCAN_SHARED:
                        counts->shared_by_fork++;
                        break;
                case SCAN_ZEROPAGE: /* counted by the census when it was given back */
                        continue;
                case SCAN_HASHED:
                        break;
                }
                counts->present++;
                counts->changed += p->changed;
        }
}

/* A page that was all zero on a frame of its own inside our marks and now maps the zero page was given back. */
static void note_given(Member *member, Block *block, const PageSet zero_before) {
        for (unsigned i = 0; i < ELEMENTSOF(block->given); i++)
                block->given[i] = (block->given[i] | zero_before[i]) & block->zeropage[i];
}

static int read_member(Pass *pass, Member *member) {
        Manager *m = pass->manager;
        ScanBatch batch = { .target = member->target, .vmas = &member->vmas };
        int r;

        member->counts = (MemberCounts){ 0 };
        for (size_t b = 0; b < member->space.n; b++) {
                Block *block = member->space.blocks[b];
                PageSet zero_before;

                memcpy(zero_before, block->zero, sizeof zero_before);
                scan_batch_whole(&batch, block);
                r = scan_batch(domain_of(member)->scanner, 0, &batch);
                if (r == TARGET_E_GONE) {
                        member->gone = true;
                        return 0;
                }
                if (r < 0)
                        return r;
                note_given(member, block, zero_before);
                pass->fresh |= block->first_pass == domain_of(member)->pass;
                count_batch(&member->counts, &batch);
                r = domain_see(domain_of(member), &batch);
                if (r < 0)
                        return r;
                if (manager_breathe(m, 0))
                        return -ECANCELED;
                if (passed_over(member))
                        return 0;
        }
        return 0;
}

static int read_all(Pass *pass) {
        pass->first_read_nsec = now_nsec();
        for (size_t i = 0; i < pass->n_members; i++) {
                Member *member = pass->members[i];
                int r;

                if (passed_over(member))
                        continue;
                if (manager_breathe(pass->manager, 0))
                        return -ECANCELED;
                if (passed_over(member) || !manager_member_ready(pass->manager, member))
                        continue;
                r = read_member(pass, member);
                if (r == -ECANCELED)
                        return r;
                if (r < 0)
                        log_debug("process %d: %s", member->target->pid, strerror(-r));
        }
        return 0;
}

/* What was read for the first time is believed only when a sample of it stands a second look. */
static int confirm_all(Pass *pass) {
        uint64_t since = now_nsec() - pass->first_read_nsec;

        if (!pass->fresh)
                return 0;
        if (since < QUIET_NSEC && manager_breathe(pass->manager, QUIET_NSEC - since))
                return -ECANCELED;
        for (size_t i = 0; i < pass->n_members; i++) {
                Member *member = pass->members[i];

                if (passed_over(member))
                        continue;
                for (size_t b = 0; b < member->space.n && !passed_over(member); b++) {
                        Block *block = member->space.blocks[b];
                        Domain *domain = domain_of(member);

                        if (block->pass != domain->pass || block->first_pass != domain->pass)
                                continue;
                        if (domain_confirm_block(domain, block, &member->vmas) == TARGET_E_GONE)
                                member->gone = true;
                }
                if (manager_breathe(pass->manager, 0))
                        return -ECANCELED;
        }
        return 0;
}

/* The spaces of one domain; the caller frees the array. */
static Space **spaces_of(const Pass *pass, const Domain *domain, size_t *ret_n) {
        Space **spaces = calloc(pass->n_members + 1, sizeof(Space *));
        size_t n = 0;

        for (size_t i = 0; spaces && i < pass->n_members; i++)
                if (pass->members[i]->space.table == &domain->blocks)
                        spaces[n++] = &pass->members[i]->space;
        *ret_n = n;
        return spaces;
}

static int end_domains(Pass *pass, bool whole) {
        int r = 0;

        for (size_t i = 0; i < pass->n_slots; i++) {
                Domain *domain = pass->slots[i]->domain;
                size_t n;
                _cleanup_free_ Space **spaces = spaces_of(pass, domain, &n);

                if (!spaces)
                        r = -ENOMEM;
                else if (whole)
                        domain_end_pass(domain, spaces, n);
                else
                        domain_abort_pass(domain, spaces, n);
        }
        return r;
}

static void count_wanted(Member *member) {
        uint64_t changed = 0, twin = 0, zero = 0;

        for (size_t b = 0; b < member->space.n; b++) {
                Block *block = member->space.blocks[b];
                twin += page_set_count(block->twin);
                zero += page_set_count(block->zero);
                changed += page_set_count(block->changed);
        }
        member->counts.twin = twin;
        member->counts.zero = zero;
        member->counts.changed = changed;
        member->counts.wanted = twin + zero;
        member->counts.unique = member->counts.present - MIN_OF(member->counts.present, twin + zero + changed +
                                                                member->counts.merged + member->counts.shared_by_fork);
}

static int merge_member(Pass *pass, Member *member) {
        Manager *m = pass->manager;
        _cleanup_(plan_done) Plan plan = { 0 };
        AdviseResult result = { 0 };
        PlanRules rules = {
                .minimum_run_pages = member->group->minimum_run_pages,
                .huge_page_split = member->group->huge_page_split,
                .vmas_max = m->kernel.max_map_count / 4,
        };
        int r;

        count_wanted(member);
        if (member->counts.wanted == 0 && member->marks.ours.n == 0)
                return 0;
        r = manager_refresh_vmas(member);
        if (r != 0)
                return r < 0 ? r : 0;
        if (target_image_replaced(member->target)) { /* the mappings of a program that was not read */
                member->gone = true;
                return 0;
        }
        rules.vmas_now = member->vmas.n;
        r = plan_make(&member->space, &member->vmas, &rules, &plan);
        if (r < 0)
                return r;
        member->counts.left_huge = plan.pages_left_huge;
        member->counts.left_budget = plan.pages_left_budget;
        member->counts.left_run = plan.pages_left_run;
        member->counts.left_stack = plan.pages_left_stack;
        member->counts.marked = plan.pages_marked;
        if (member->group->slot->dry_run || member->skip != TARGET_OK)
                return 0;
        r = advise_apply(m->advise, member->target, &plan, &member->marks, &result);
        m->merge_failures[MERGE_FAILURE_CHANGED] += result.failed_ranges;
        m->pass_changes += result.pages_marked;
        pass->marked += plan.pages_marked;
        if (r > 0)
                manager_note_remote_error(m, member, r);
        return r < 0 ? r : 0;
}

static int merge_all(Pass *pass) {
        for (size_t i = 0; i < pass->n_members; i++) {
                Member *member = pass->members[i];
                int r;

                if (manager_breathe(pass->manager, 0))
                        return -ECANCELED;
                if (passed_over(member) || !member->vmas.n)
                        continue;
                r = merge_member(pass, member);
                if (r < 0)
                        log_debug("process %d: marking: %s", member->target->pid, strerror(-r));
        }
        for (size_t i = 0; i < pass->n_slots; i++)
                if (!pass->slots[i]->dry_run)
                        pass->expected += pass->slots[i]->domain->stats.expected;
        return 0;
}

/* In a burst ksmd visits everything marked two or three times, so a handful of pages is let wait for company; and what
 * the last burst could not merge (pages that are pinned, or never stand still) is tried ever more seldom, unless more
 * has come since. */
static bool burst_is_due(Manager *m, const Pass *pass) {
        bool few = pass->expected * BURST_WORTH < pass->marked;

        if (pass->expected == 0 || pass->marked == 0 || !m->burst)
                return false;
        if (m->once)
                return true;
        m->passes_waited++;
        if (pass->expected > 2 * m->burst_missed && (!few || m->passes_waited >= BURST_PATIENCE))
                return true;
        return m->passes_waited >= m->burst_backoff && (!few || m->passes_waited >= BURST_PATIENCE);
}

static void note_burst(Manager *m, uint64_t expected, uint64_t merged) {
        m->passes_waited = 0;
        m->burst_missed = expected - MIN_OF(expected, merged);
        if (2 * merged >= expected)
                m->burst_backoff = 0;
        else if (m->burst_backoff == 0)
                m->burst_backoff = 2;
        else
                m->burst_backoff = MIN_OF(2 * m->burst_backoff, BURST_BACKOFF_MAX);
}

/* How many may share a page, and whether across NUMA nodes, are KSM's own knobs, which change only while nothing is
 * shared, to be put back too. So they are only made stricter, and only before a burst: until there is something to
 * merge nothing is touched. */
static void limit_sharing(Manager *m) {
        const ConfDaemon *conf = &m->conf->daemon;
        KsmKnobs knobs;
        bool busy = false;

        if (ksm_knobs(m->ksm, &knobs) < 0 || knobs.run != 0)
                return; /* the administrator runs ksmd: the settings are his */
        if (conf->max_page_sharing && conf->max_page_sharing < knobs.max_page_sharing)
                busy = ksm_set(m->ksm, "max_page_sharing", conf->max_page_sharing) == KSM_E_BUSY;
        if (!conf->merge_across_nodes)
                busy |= ksm_set(m->ksm, "merge_across_nodes", 0) == KSM_E_BUSY;
        if (busy && !m->limits_refused)
                log_warning("MaxPageSharing= or MergeAcrossNodes= is not in force: KSM can change it only while no page "
                            "is shared");
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

static int run_burst(Pass *pass) {
        Manager *m = pass->manager;
        BurstStats before, after;
        BurstState state;
        int r;

        if (!burst_is_due(m, pass))
                return 0;
        m->stranger_marked = stranger_is_marked(pass);
        if (m->stranger_marked)
                return 0;
        limit_sharing(m);
        burst_stats(m->burst, &before);
        r = burst_start(m->burst, pass->expected, pass->marked);
        if (r < 0) {
                log_warning("KSM cannot be run: %s", strerror(-r));
                return 0;
        }
        while ((state = burst_step(m->burst)) == BURST_RUNNING)
                if (manager_breathe_in_burst(m)) {
                        burst_stop(m->burst);
                        return -ECANCELED;
                }
        burst_stats(m->burst, &after);
        if (state == BURST_DONE)
                note_burst(m, pass->expected, after.pages_merged - before.pages_merged);
        return 0;
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
        m->state = MANAGER_SCANNING;
        m->pass_changes = 0;
        m->young_waiting = false;

        r = read_all(&pass);
        log_step("read", &since);
        if (r == 0)
                r = confirm_all(&pass);
        log_step("settled", &since);
        if (r == 0)
                r = end_domains(&pass, true);
        else
                end_domains(&pass, false);
        log_step("matched", &since);
        if (r == 0) {
                m->state = MANAGER_MERGING;
                r = merge_all(&pass);
        }
        log_step("marked", &since);
        if (r == 0)
                r = run_burst(&pass);
        log_step("merged", &since);
        manager_census(m);
        log_step("counted", &since);

        if (r == 0) {
                m->full_scans++;
                m->last_pass_nsec = now_nsec() - begun;
                for (size_t i = 0; i < pass.n_slots; i++)
                        m->pass_changes += pass.slots[i]->domain->stats.pages_volatile;
        }
        m->in_pass = false;
        m->state = MANAGER_IDLE;
        return r;
}
