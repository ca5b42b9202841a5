/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What is saved, as the frames behind the marked ranges say, and the statistics that follow: of each cgroup, counted in
 * the order of the cgroups so that a frame that several share counts as kept once, and of each domain, their sum.
 */
#include "daemon/remapping.h"

void manager_add_failures(const MemberCounts *counts, PageStats *stats) {
        stats->merge_failures[MERGE_FAILURE_HOT] += counts->alone;
        stats->merge_failures[MERGE_FAILURE_HUGE] += counts->left_huge;
        stats->merge_failures[MERGE_FAILURE_VMA_BUDGET] += counts->left_budget;
        stats->merge_failures[MERGE_FAILURE_SHORT_RUN] += counts->left_run;
        stats->merge_failures[MERGE_FAILURE_STACK] += counts->left_stack;
        stats->merge_failures[MERGE_FAILURE_MAPPING] += counts->left_kind;
        stats->merge_failures[MERGE_FAILURE_KERNEL] += counts->unmerged;
}

void manager_total(const Manager *m, PageStats *ret) {
        *ret = (PageStats){ 0 };
        for (size_t i = 0; i < m->roster.n_slots; i++)
                page_stats_add(ret, &m->roster.slots[i]->stats);
}

static int compare_kin(const void *a, const void *b) {
        uint64_t x = (*(Member *const *)a)->kin, y = (*(Member *const *)b)->kin;

        return x < y ? -1 : x > y;
}

/* Who of these has others beside him that were forked from one another. -ENOMEM. */
static int find_relatives(Member *const *members, size_t n) {
        _cleanup_free_ Member **sorted = calloc(n + 1, sizeof(Member *));

        if (!sorted)
                return -ENOMEM;
        for (size_t i = 0; i < n; i++)
                sorted[i] = members[i];
        qsort(sorted, n, sizeof *sorted, compare_kin);
        for (size_t i = 0; i < n; i++) {
                uint64_t kin = sorted[i]->kin;

                sorted[i]->has_relatives = kin != 0 && ((i > 0 && sorted[i - 1]->kin == kin) ||
                                                        (i + 1 < n && sorted[i + 1]->kin == kin));
        }
        return 0;
}

/* The member as the census wants it. */
static CensusPart part_of(Member *member) {
        return (CensusPart){
                .target = member->target,
                .notes = &member->group->slot->notes,
                .space = &member->space,
                .all_known = domain_knows_all(member->group->slot->domain),
                .kin = member->has_relatives ? member->kin : 0,
        };
}

void pass_breathe_counting(Manager *m, uint64_t n_pages, uint64_t *pages) {
        *pages += n_pages;
        if (*pages >= BREATH_PAGES && m->in_pass) {
                (void)manager_breathe(m, 0); /* whoever wants the pass to end gets it a moment later */
                *pages = 0;
        }
}

static void census_member(Manager *m, CensusFrames *frames, Member *member) {
        JudgeLooking looking = { .manager = m, .frames = frames, .member = member };
        CensusPart part = part_of(member);
        uint64_t pages = 0;

        m->looks++;
        member->census = (Census){ 0 };
        for (size_t i = 0; i < member->marks.ours.n; i++) {
                const PlanRange range = member->marks.ours.ranges[i];

                for (uint64_t at = range.start, end; at < range.end && !passed_over(member); at = end) {
                        end = breath_end(at, range.end);
                        if (census_add(frames, &part, at, end, &member->census, manager_looked, &looking) != 0)
                                return;
                        pass_breathe_counting(m, (end - at) / PAGE_BYTES, &pages);
                }
        }
        if (passed_over(member)) /* it left meanwhile */
                return;
        manager_end_looking(&looking);
        member->holes = 0;
        if (zero_count(&member->space, &member->vmas, &member->holes) != 0)
                member->holes = 0;
}

static void note_member(Manager *m, CensusFrames *frames, Member *member) {
        CensusNotes *notes = &member->group->slot->notes; /* the group may go while we breathe, the slot may not */
        CensusPart part = part_of(member);
        uint64_t pages = 0;

        for (size_t i = 0; i < member->marks.ours.n; i++) {
                const PlanRange range = member->marks.ours.ranges[i];

                for (uint64_t at = range.start, end; at < range.end && !passed_over(member); at = end) {
                        end = breath_end(at, range.end);
                        if (census_note(frames, notes, &part, at, end) != 0)
                                return;
                        pass_breathe_counting(m, (end - at) / PAGE_BYTES, &pages);
                }
        }
}

static void count_member(Member *member, PageStats *stats) {
        const Census *census = &member->census;
        MemberCounts *counts = &member->counts;
        uint64_t left = counts->left_huge + counts->left_budget + counts->left_run + counts->left_stack +
                        counts->left_kind;
        uint64_t zeroed = census->given; /* by KSM */

        bool pooled = member->group->slot->pool; /* what is remapped is in no block any more, and not wanted */

        counts->unmerged = counts->wanted + counts->merged;
        counts->unmerged -= MIN_OF(counts->unmerged, (pooled ? 0 : census->ksm_mappings + zeroed) + left);
        counts->given = zeroed + member->holes;
        stats->pages_shared += census->ksm_frames;
        stats->pages_sharing += census->ksm_unmerged - census->ksm_frames - (uint64_t)census->lagging;
        stats->pages_zero += census->given_unmerged + member->holes;
        stats->pages_unshared += counts->unique;
        stats->pages_volatile += counts->changed;
        stats->metadata_bytes += member->space.n * sizeof(Block);
        manager_add_failures(counts, stats);
        /* What KSM keeps: 64 bytes for each page it was shown and for each node. */
        if (!pooled)
                stats->general_profit_bytes -= (int64_t)(64 * (counts->marked + census->ksm_frames));
}

static void finish_stats(PageStats *stats, uint64_t passes) {
        stats->full_scans = passes;
        /* One lags in one cgroup for another's page. */
        stats->pages_sharing = (int64_t)stats->pages_sharing < 0 ? 0 : stats->pages_sharing;
        stats->bytes_saved = (stats->pages_sharing + stats->pages_zero) * PAGE_BYTES;
        stats->general_profit_bytes += (int64_t)stats->bytes_saved - (int64_t)stats->metadata_bytes;
}

static void count_slot(Manager *m, Slot *slot) {
        PageStats sum = { 0 };
        StableCounts counts;
        ScanStats scanned;

        for (size_t i = 0; i < m->roster.n_groups; i++) {
                Group *group = m->roster.groups[i];
                PageStats stats = { 0 };

                if (group->slot != slot)
                        continue;
                for (size_t k = 0; k < group->n_members; k++)
                        if (!group->members[k]->gone)
                                count_member(group->members[k], &stats);
                stats.huge_pages_split = group->huge_pages_split;
                stats.huge_pages_collapsed = group->huge_pages_collapsed;
                stats.pool_pages_returned = group->pool_pages_returned;
                stats.pool_pieces_joined = group->pool_pieces_joined;
                page_stats_add(&sum, &stats);
                group->stats = stats;
                finish_stats(&group->stats, slot->domain->pass);
        }
        stable_counts(slot->domain->stable, &counts);
        scanner_stats(slot->domain->scanner, &scanned);
        sum.stable_node_chains = counts.stable_node_chains;
        sum.stable_node_dups = counts.stable_node_dups;
        sum.pages_scanned = scanned.pages_scanned;
        sum.pages_hashed = scanned.pages_hashed;
        sum.pages_skipped = scanned.pages_skipped;
        sum.metadata_bytes = domain_bytes(slot->domain) + (slot->pool ? remapping_pool_bytes(slot->pool) : 0);
        sum.merge_failures[MERGE_FAILURE_METADATA] = slot->domain->pages_left_out;
        slot->stats = sum;
        finish_stats(&slot->stats, slot->domain->pass);
}

void manager_count(Manager *m) {
        for (size_t s = 0; s < m->roster.n_slots; s++)
                if (m->roster.slots[s]->domain)
                        count_slot(m, m->roster.slots[s]);
}

/* How often the frame is mapped; one that the census did not meet may still be KSM's, mapped once. */
static uint32_t frame_mappings(void *userdata, uint64_t key, uint64_t frame) {
        return census_mappings(userdata, frame);
}

static bool is_in(const Member *member, const Slot *slot) {
        return !member->gone && !member->leaving && member->group->slot == slot;
}

/* A snapshot of all members in the order of their cgroups. NULL: out of memory. */
static Member **all_members(const Manager *m, size_t *ret_n) {
        _cleanup_free_ Member **members = calloc(roster_count_members(&m->roster) + 1, sizeof(Member *));
        size_t n = 0;

        if (!members)
                return NULL;
        for (size_t i = 0; i < m->roster.n_groups; i++)
                for (size_t k = 0; k < m->roster.groups[i]->n_members; k++)
                        members[n++] = m->roster.groups[i]->members[k];
        if (find_relatives(members, n) < 0)
                return NULL;
        *ret_n = n;
        return TAKE_PTR(members);
}

void manager_note_frames(Manager *m) {
        size_t n_slots = m->roster.n_slots, n = 0;
        _cleanup_free_ Slot **slots = calloc(n_slots + 1, sizeof(Slot *));
        _cleanup_free_ Member **members = all_members(m, &n);

        for (size_t s = 0; slots && s < n_slots; s++)
                slots[s] = m->roster.slots[s];
        for (size_t s = 0; slots && members && s < n_slots; s++) {
                _cleanup_(census_frames_freep) CensusFrames *frames = NULL;

                if (!slots[s]->domain || slots[s]->pool || census_frames_new(slots[s]->domain->scanner, &frames) < 0)
                        continue;
                manager_take_notes(m, slots[s]);
                census_notes_begin(&slots[s]->notes);
                for (size_t i = 0; i < n; i++)
                        if (is_in(members[i], slots[s]) && members[i]->has_relatives)
                                note_member(m, frames, members[i]);
        }
}

/* Goes by a snapshot: who is managed may change while the event loop runs. */
void manager_census(Manager *m) {
        size_t n_slots = m->roster.n_slots, n = 0;
        _cleanup_free_ Slot **slots = calloc(n_slots + 1, sizeof(Slot *));
        _cleanup_free_ Member **members = all_members(m, &n);

        m->census_age = 0;
        if (!slots || !members)
                return;
        for (size_t s = 0; s < n_slots; s++)
                slots[s] = m->roster.slots[s];
        for (size_t s = 0; s < n_slots; s++) {
                _cleanup_(census_frames_freep) CensusFrames *frames = NULL;

                if (slots[s]->domain && slots[s]->pool)
                        manager_census_pooled(m, slots[s], members, n);
                if (!slots[s]->domain || slots[s]->pool || census_frames_new(slots[s]->domain->scanner, &frames) < 0)
                        continue;
                manager_take_notes(m, slots[s]);
                for (size_t i = 0; i < n; i++)
                        if (is_in(members[i], slots[s]))
                                census_member(m, frames, members[i]);
                domain_count_sharers(slots[s]->domain, frame_mappings, frames);
        }
        manager_count(m);
}
