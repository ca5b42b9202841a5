/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Counts KSM frames by what pagemap and kpageflags say. KSM's own counters go on claiming pages that were un-shared
 * (by a pinning read, for one), and our bookkeeping only knows what we wanted: neither proves a saving.
 *
 * What merged pages would take unmerged. Of a process without relatives each page would have a frame of its own. Of
 * processes that were forked from one another, pages at one address would lie on one frame, as far as nobody wrote to
 * his. So right before they are merged it is noted who had a frame to himself, and of those that shared one by fork,
 * one is noted for them all: of all that will ever leave that frame, which may take several bursts, the last one
 * looking as if he had it to himself. The notes outlive the daemon (kept.c). Pages at one address of which none was
 * noted (the process was forked with the page merged already) count as one. So what is merged at one address of
 * relatives is
 *
 *      the greater of 1 and the pages noted
 *
 * frames. That is exact while those live, and do not write, whose pages were noted. It is too little, by at most one
 * frame an address each, where one ended or wrote that was noted for others. It is too much only where a relative
 * outside the domain keeps a frame alive that our pages left.
 */
#include "scan/census.h"

#include "host/pagemap.h"
#include "scan/kin.h"
#include "scan/scanner.h"

enum {
        FRAME_NEW,
        FRAME_OTHER,
        FRAME_KSM,
        FRAME_ZEROPAGE,
};

/* No frame has this number: pages that map the zero page would each lie on another. */
#define ZERO_FRAME UINT64_MAX
/* A frame that was shared is forgotten when it was not met for so many rounds. */
#define NOTES_ROUNDS 64U

struct CensusFrames {
        const Scanner *scanner;
        FrameMap map;
        FrameMap kin;           /* merged pages of relatives, by (kin, address, frame) */
        uint64_t entries[BLOCK_PAGES], flags[BLOCK_PAGES];
};

int census_frames_new(Scanner *scanner, CensusFrames **ret) {
        CensusFrames *frames = calloc(1, sizeof *frames);

        if (!frames)
                return -ENOMEM;
        frames->scanner = scanner;
        *ret = frames;
        return 0;
}

CensusFrames *census_frames_free(CensusFrames *frames) {
        if (frames) {
                frame_map_done(&frames->map);
                frame_map_done(&frames->kin);
        }
        free(frames);
        return NULL;
}

static bool is_shared(uint64_t entry) { return pagemap_is_anonymous(entry) && !(entry & PAGEMAP_EXCLUSIVE); }

static uint8_t tag_of(uint64_t flags) {
        if (flags & KPAGEFLAGS_ZERO_PAGE)
                return FRAME_ZEROPAGE;
        return flags & KPAGEFLAGS_KSM ? FRAME_KSM : FRAME_OTHER;
}

/* Learns what the frames of entries[i], and of the entries behind it on the frames behind it, are. */
static int learn(CensusFrames *frames, size_t i, size_t n) {
        uint64_t pfn = frames->entries[i] & PAGEMAP_PFN;
        unsigned length = 1;
        int r;

        while (i + length < n && is_shared(frames->entries[i + length]) &&
               (frames->entries[i + length] & PAGEMAP_PFN) == pfn + length)
                length++;
        r = scanner_page_flags(frames->scanner, pfn, length, frames->flags);
        if (r < 0)
                return r;
        for (unsigned k = 0; k < length; k++) {
                Frame *frame;

                r = frame_map_add(&frames->map, pfn + k, &frame);
                if (r < 0)
                        return r;
                if (frame->tag == FRAME_NEW)
                        frame->tag = tag_of(frames->flags[k]);
        }
        return 0;
}

static int find_frame(CensusFrames *frames, size_t i, size_t n, Frame **ret) {
        uint64_t pfn = frames->entries[i] & PAGEMAP_PFN;

        *ret = frame_map_find(&frames->map, pfn);
        if (!*ret) {
                int r = learn(frames, i, n);
                if (r < 0)
                        return r;
                *ret = frame_map_find(&frames->map, pfn);
        }
        return 0;
}

/* A run of pages within one block. */
typedef struct Run {
        const CensusPart *part;
        Block *block;           /* NULL: nothing is known of it */
        uint64_t addr;
        unsigned first;         /* page of the block */
        size_t n;
        CensusLook *look;
} Run;

/* What the page is called among those of its relatives, as one that lies on this frame. */
static uint64_t kin_name(const Run *run, size_t i, uint64_t pfn) {
        uint64_t name[3] = { run->part->kin, run->addr + i * PAGE_BYTES, pfn };

        return kin_key(name, sizeof name);
}

/* Whether the merged page counts as one frame more. *ret: 0 or 1. */
static int count_kin(CensusFrames *frames, const Run *run, size_t i, uint64_t pfn, uint64_t *ret) {
        unsigned page = run->first + (unsigned)i;
        bool own = run->block && page_set_has(run->block->own, page);
        Frame *kin;
        int r;

        *ret = 1;
        if (run->part->kin == 0) {
                if (run->block) /* nobody else's; relatives may come to light later */
                        page_set_add(run->block->own, page);
                return 0;
        }
        r = frame_map_add(&frames->kin, kin_name(run, i, pfn), &kin);
        if (r < 0)
                return r;
        *ret = kin_count(kin, own);
        return 0;
}

/* It maps the zero page now. Those that did before they were marked were read and never written, which is no saving. */
static int count_zeropage(CensusFrames *frames, const Run *run, size_t i, Census *census) {
        const Block *block = run->block;
        unsigned page = run->first + (unsigned)i;
        uint64_t more;
        int r;

        census->zeropage++;
        page_set_add(run->look->zeropage, page);
        if (block && page_set_has(block->zeropage, page) && !page_set_has(block->given, page))
                return 0;
        r = count_kin(frames, run, i, ZERO_FRAME, &more);
        if (r < 0)
                return r;
        census->given++;
        census->given_unmerged += more;
        return 0;
}

/* Compaction and NUMA balancing move merged pages: what we knew them by is gone. One page of each is to be read again. */
static void look_up(const CensusFrames *frames, const Run *run, size_t i, uint64_t pfn) {
        const Scanner *scanner = frames->scanner;
        uint64_t key;

        if (run->part->all_known && run->block && scanner->known && !scanner->known(scanner->known_userdata, pfn, &key))
                page_set_add(run->block->again, run->first + (unsigned)i);
}

/* An unmerged page of relatives. The frame is in use for as long as any lies on it, whoever was noted for it. */
static int count_lagging(CensusFrames *frames, const Run *run, size_t i, Census *census) {
        uint64_t pfn = frames->entries[i] & PAGEMAP_PFN, name[2] = { pfn, run->part->kin };
        bool own = run->block && page_set_has(run->block->own, run->first + (unsigned)i);
        Frame *frame;
        int r;

        if (run->part->kin == 0 || !run->part->notes || !frame_map_find(&run->part->notes->frames, pfn))
                return 0;
        r = frame_map_add(&frames->kin, kin_key(name, sizeof name), &frame);
        if (r < 0)
                return r;
        if (own && frame->tag == KIN_LENT)
                census->lagging--; /* it lies there itself */
        else if (!own && frame->tag == KIN_NEW)
                census->lagging++;
        frame->tag = own || frame->tag == KIN_OWN ? KIN_OWN : KIN_LENT;
        return 0;
}

/* A frame's value: whether it was counted. */
static int count(CensusFrames *frames, const Run *run, void *userdata) {
        Census *census = userdata;

        for (size_t i = 0; i < run->n; i++) {
                uint64_t entry = frames->entries[i], more;
                Frame *frame;
                int r;

                if (!pagemap_is_anonymous(entry))
                        continue;
                if (!is_shared(entry)) {
                        census->pages++;
                        r = count_lagging(frames, run, i, census);
                        if (r < 0)
                                return r;
                        continue;
                }
                r = find_frame(frames, i, run->n, &frame);
                if (r < 0)
                        return r;
                if (frame->tag == FRAME_ZEROPAGE) {
                        r = count_zeropage(frames, run, i, census);
                        if (r < 0)
                                return r;
                        continue;
                }
                census->pages++;
                if (frame->tag == FRAME_KSM) {
                        census->ksm_mappings++;
                        page_set_add(run->look->merged, run->first + (unsigned)i);
                        if (frame->value++ == 0) {
                                census->ksm_frames++;
                                look_up(frames, run, i, frame->pfn);
                        }
                        r = count_kin(frames, run, i, frame->pfn, &more);
                        if (r < 0)
                                return r;
                        census->ksm_unmerged += more;
                } else {
                        r = count_lagging(frames, run, i, census);
                        if (r < 0)
                                return r;
                }
        }
        return 0;
}

/* Whether the page, which is not merged, is the first to be noted for its frame. A frame's value in the notes: the
 * round in which it was met last. */
static int note_page(CensusNotes *notes, const Run *run, size_t i, uint64_t entry) {
        unsigned page = run->first + (unsigned)i;
        uint64_t pfn = entry & PAGEMAP_PFN;
        Frame *frame = frame_map_find(&notes->frames, pfn);

        if (!frame && is_shared(entry)) {
                int r = frame_map_add(&notes->frames, pfn, &frame);
                if (r < 0)
                        return r;
                page_set_add(run->block->own, page);
        } else if (!frame)
                page_set_add(run->block->own, page);
        if (frame)
                frame->value = notes->round; /* this page may be the one that was noted for it: nothing changes */
        return 0;
}

static int note(CensusFrames *frames, const Run *run, void *userdata) {
        CensusNotes *notes = userdata;

        for (size_t i = 0; run->block && i < run->n; i++) {
                uint64_t entry = frames->entries[i];
                Frame *frame;
                int r;

                if (!pagemap_is_anonymous(entry))
                        continue;
                if (is_shared(entry)) {
                        r = find_frame(frames, i, run->n, &frame);
                        if (r < 0)
                                return r;
                        if (frame->tag != FRAME_OTHER)
                                continue; /* merged: what was noted then stands */
                }
                r = note_page(notes, run, i, entry);
                if (r < 0)
                        return r;
        }
        return 0;
}

typedef int (*RunHandler)(CensusFrames *frames, const Run *run, void *userdata);

static int for_each_run(CensusFrames *frames, const CensusPart *part, uint64_t start, uint64_t end, RunHandler handle,
                        void *userdata, CensusLooked looked, void *looked_userdata) {
        for (uint64_t addr = start; addr < end;) {
                uint64_t block = addr & ~(BLOCK_BYTES - 1);
                uint64_t want = (MIN_OF(end, block + BLOCK_BYTES) - addr) / PAGE_BYTES;
                CensusLook look = { .block = block, .first = (unsigned)((addr - block) / PAGE_BYTES),
                                    .entries = frames->entries };
                Run run = { part, part->space ? space_find(part->space, addr) : NULL, addr, look.first, 0, &look };
                int r = target_read_pagemap(part->target, addr, want, frames->entries, &run.n);

                if (r != 0)
                        return r;
                r = handle(frames, &run, userdata);
                if (r < 0)
                        return r;
                look.n = (unsigned)run.n;
                if (looked)
                        looked(looked_userdata, &look);
                addr += run.n * PAGE_BYTES;
        }
        return 0;
}

int census_add(CensusFrames *frames, const CensusPart *part, uint64_t start, uint64_t end, Census *add,
               CensusLooked looked, void *userdata) {
        Census census = *add;
        int r = for_each_run(frames, part, start, end, count, &census, looked, userdata);

        if (r == 0)
                *add = census;
        return r;
}

CensusPage census_page(const CensusFrames *frames, uint64_t entry) {
        uint64_t flags;

        if (!pagemap_is_anonymous(entry) || scanner_page_flags(frames->scanner, entry & PAGEMAP_PFN, 1, &flags) < 0)
                return CENSUS_ABSENT;
        return flags & (KPAGEFLAGS_KSM | KPAGEFLAGS_ZERO_PAGE) ? CENSUS_MERGED : CENSUS_OTHER;
}

static void keep_recent(const CensusNotes *notes, const Frame *slots, size_t n, FrameMap *kept) {
        for (size_t i = 0; slots && i < n; i++) {
                Frame *frame;

                if (slots[i].pfn != 0 && slots[i].value + NOTES_ROUNDS > notes->round &&
                    frame_map_add(kept, slots[i].pfn, &frame) == 0)
                        frame->value = slots[i].value;
        }
}

void census_notes_begin(CensusNotes *notes) {
        FrameMap kept = {};

        if (++notes->round % NOTES_ROUNDS != 0)
                return;
        /* What both tables have is right in the new one. */
        keep_recent(notes, notes->frames.old, notes->frames.allocated / 2, &kept);
        keep_recent(notes, notes->frames.slots, notes->frames.allocated, &kept);
        frame_map_done(&notes->frames);
        notes->frames = kept;
}

void census_notes_done(CensusNotes *notes) { frame_map_done(&notes->frames); }

int census_note(CensusFrames *frames, CensusNotes *notes, const CensusPart *part, uint64_t start, uint64_t end) {
        return for_each_run(frames, part, start, end, note, notes, NULL, NULL);
}

uint32_t census_mappings(const CensusFrames *frames, uint64_t pfn) {
        const Frame *frame = frame_map_find(&frames->map, pfn);
        uint64_t flags;

        if (frame && frame->tag == FRAME_KSM)
                return (uint32_t)MIN_OF(frame->value, (uint64_t)UINT32_MAX);
        return scanner_page_flags(frames->scanner, pfn, 1, &flags) == 0 && flags & KPAGEFLAGS_KSM;
}
