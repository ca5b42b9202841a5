/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What is saved, as the frames behind the marked ranges say, and the statistics that follow: of each cgroup, counted in
 * the order of the cgroups so that a frame that several share counts as kept once, and of each domain, their sum.
 */
#include "daemon/manager.h"

/* 2 to 3 ms. */
#define BREATH_PAGES ((uint64_t)1 << 16)

/* Pages of the range that mapped the zero page before we marked it: they were read and never written, which is no
 * saving of ours. */
static uint64_t natural_zero_pages(const Space *space, const PlanRange *range) {
        const Block *block = NULL;
        uint64_t n = 0;

        for (uint64_t at = range->start; at < range->end; at += PAGE_BYTES) {
                unsigned page = (unsigned)(at % BLOCK_BYTES / PAGE_BYTES);

                if (at == range->start || page == 0)
                        block = space_find(space, at - at % BLOCK_BYTES);
                n += block && page_set_has(block->zeropage, page) && !page_set_has(block->given, page);
        }
        return n;
}

void manager_add_failures(const MemberCounts *counts, PageStats *stats) {
        stats->merge_failures[MERGE_FAILURE_HOT] += counts->alone;
        stats->merge_failures[MERGE_FAILURE_HUGE] += counts->left_huge;
        stats->merge_failures[MERGE_FAILURE_VMA_BUDGET] += counts->left_budget;
        stats->merge_failures[MERGE_FAILURE_SHORT_RUN] += counts->left_run;
        stats->merge_failures[MERGE_FAILURE_STACK] += counts->left_stack;
        stats->merge_failures[MERGE_FAILURE_KERNEL] += counts->unmerged;
}

void manager_total(const Manager *m, PageStats *ret) {
        *ret = (PageStats){ 0 };
        for (size_t i = 0; i < m->roster.n_slots; i++)
                page_stats_add(ret, &m->roster.slots[i]->stats);
}

/* Within a pass the event loop is let run now and then. */
static void census_member(Manager *m, CensusFrames *frames, Member *member) {
        JudgeLooking looking = { .manager = m, .frames = frames, .member = member };
        uint64_t pages = 0;

        m->looks++;
        member->census = (Census){ 0 };
        member->natural_zero = 0;
        for (size_t i = 0; i < member->marks.ours.n; i++) {
                const PlanRange *range = &member->marks.ours.ranges[i];

                if (census_add(frames, member->target, range->start, range->end, &member->census, manager_looked,
                               &looking) != 0)
                        return;
                member->natural_zero += natural_zero_pages(&member->space, range);
                pages += (range->end - range->start) / PAGE_BYTES;
                if (pages >= BREATH_PAGES && m->in_pass) {
                        (void)manager_breathe(m, 0); /* whoever wants the pass to end gets it a moment later */
                        pages = 0;
                }
        }
        manager_end_looking(&looking);
}

static void count_member(Member *member, PageStats *stats) {
        const Census *census = &member->census;
        MemberCounts *counts = &member->counts;
        uint64_t left = counts->left_huge + counts->left_budget + counts->left_run + counts->left_stack;

        counts->given = census->zeropage - MIN_OF(census->zeropage, member->natural_zero);
        counts->unmerged = counts->wanted + counts->merged;
        counts->unmerged -= MIN_OF(counts->unmerged, census->ksm_mappings + counts->given + left);
        stats->pages_shared += census->ksm_frames;
        stats->pages_sharing += census->ksm_mappings - census->ksm_frames;
        stats->pages_zero += counts->given;
        stats->pages_unshared += counts->unique;
        stats->pages_volatile += counts->changed;
        stats->metadata_bytes += member->space.n * sizeof(Block);
        manager_add_failures(counts, stats);
        /* What KSM keeps: 64 bytes for each page it was shown and for each node. */
        stats->general_profit_bytes -= (int64_t)(64 * (counts->marked + census->ksm_frames));
}

static void finish_stats(PageStats *stats, uint64_t passes) {
        stats->full_scans = passes;
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
        sum.metadata_bytes = domain_bytes(slot->domain);
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

/* Goes by a snapshot: who is managed may change while the event loop runs. */
void manager_census(Manager *m) {
        size_t n_slots = m->roster.n_slots, n = 0;
        _cleanup_free_ Slot **slots = calloc(n_slots + 1, sizeof(Slot *));
        _cleanup_free_ Member **members = calloc(roster_count_members(&m->roster) + 1, sizeof(Member *));

        m->census_age = 0;
        if (!slots || !members)
                return;
        for (size_t s = 0; s < n_slots; s++)
                slots[s] = m->roster.slots[s];
        for (size_t i = 0; i < m->roster.n_groups; i++)
                for (size_t k = 0; k < m->roster.groups[i]->n_members; k++)
                        members[n++] = m->roster.groups[i]->members[k];
        for (size_t s = 0; s < n_slots; s++) {
                _cleanup_(census_frames_freep) CensusFrames *frames = NULL;

                if (!slots[s]->domain || census_frames_new(slots[s]->domain->scanner, &frames) < 0)
                        continue;
                for (size_t i = 0; i < n; i++)
                        if (is_in(members[i], slots[s]))
                                census_member(m, frames, members[i]);
                domain_count_sharers(slots[s]->domain, frame_mappings, frames);
        }
        manager_count(m);
}
