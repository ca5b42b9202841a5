/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What route remap saves, as the page tables say: how many pages of how many processes map a page of the pool now. A
 * page that was written since is its process's own again (no file's page), one that was discarded is not there.
 *
 * As in scan/census.c: pages that relatives map at one address would lie on one frame without us too, if one inherited
 * them from the other. Those that were remapped in the process itself, by this daemon, had a frame each.
 */
#include "daemon/remapping.h"

#include "host/pagemap.h"
#include "scan/kin.h"

typedef struct Count {
        FrameMap pages, kin;    /* of the pool; of relatives, by (kin, address, page) */
        const RemapPool *pool;
        size_t own_at;          /* the member's ranges: where to go on */
        uint64_t since;         /* pages looked at since the event loop had its turn */
} Count;

/* Addresses come in order. */
static bool is_own(Count *count, const Member *member, uint64_t address) {
        const Ranges *own = &member->own;

        while (count->own_at < own->n && own->ranges[count->own_at].end <= address)
                count->own_at++;
        return count->own_at < own->n && own->ranges[count->own_at].start <= address;
}

static int count_page(Count *count, Member *member, uint64_t address, uint64_t page) {
        uint64_t name[3] = { member->kin, address, page };
        bool own = is_own(count, member, address);
        Census *census = &member->census;
        Frame *frame;
        int r = frame_map_add(&count->pages, page + 1, &frame);

        if (r < 0)
                return r;
        census->ksm_mappings++;
        census->ksm_frames += frame->value++ == 0;
        if (!member->has_relatives) {
                census->ksm_unmerged++;
                return 0;
        }
        r = frame_map_add(&count->kin, kin_key(name, sizeof name), &frame);
        if (r < 0)
                return r;
        census->ksm_unmerged += kin_count(frame, own);
        return 0;
}

static int count_piece(Count *count, Member *member, const Vma *vma, uint64_t start, uint64_t end) {
        uint64_t entries[BLOCK_PAGES];

        for (uint64_t at = start; at < end;) {
                size_t want = (size_t)MIN_OF((end - at) / PAGE_BYTES, (uint64_t)BLOCK_PAGES), n;
                int r = target_read_pagemap(member->target, at, want, entries, &n);

                if (r != 0)
                        return r;
                for (size_t i = 0; i < n; i++, at += PAGE_BYTES)
                        if (pagemap_is_files(entries[i])) {
                                r = count_page(count, member, at, (vma->offset + at - vma->start) / PAGE_BYTES);
                                if (r < 0)
                                        return r;
                        }
        }
        return 0;
}

/* The mapping of the pool at that address, or the next one behind it. */
static const Vma *find_pooled(const Count *count, const Member *member, uint64_t addr) {
        const VmaList *vmas = &member->vmas;

        for (size_t i = vma_list_first(vmas, addr); i < vmas->n; i++)
                if (remap_vma_is(&vmas->vmas[i], &count->pool->identity))
                        return &vmas->vmas[i];
        return NULL;
}

/* Goes by addresses: the list may be another when the event loop had its turn. */
static void count_mappings(Manager *m, Count *count, Member *member) {
        const Vma *vma;

        for (uint64_t at = 0, end; !passed_over(member) && (vma = find_pooled(count, member, at)); at = end) {
                at = MAX_OF(at, vma->start);
                end = breath_end(at, vma->end);
                if (count_piece(count, member, vma, at, end) != 0)
                        return;
                pass_breathe_counting(m, (end - at) / PAGE_BYTES, &count->since);
        }
}

static void count_member(Manager *m, Count *count, Member *member) {
        member->census = (Census){};
        count->own_at = 0;
        if (member->pooled > 0 && manager_refresh_vmas(member) == 0)
                manager_note_pooled(m, member);
        if (member->pooled > 0)
                count_mappings(m, count, member);
        if (passed_over(member))
                return;
        member->holes = 0;
        if (zero_count(&member->space, &member->vmas, &member->holes) != 0)
                member->holes = 0;
}

void manager_census_pooled(Manager *m, Slot *slot, Member *const *members, size_t n) {
        Count count = { .pool = slot->pool };

        for (size_t i = 0; i < n; i++)
                if (!passed_over(members[i]) && members[i]->group->slot == slot)
                        count_member(m, &count, members[i]);
        frame_map_done(&count.pages);
        frame_map_done(&count.kin);
}
