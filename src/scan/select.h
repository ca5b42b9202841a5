/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "base/crew.h"
#include "scan/scan.h"
#include "scan/track.h"

/*
 * Which pages of a process a pass has to read. Where writes are tracked: those written since the last time. Elsewhere
 * (huge pages, mappings that cannot be tracked, blocks that are rewritten all the time) a block is looked at now and
 * then: a sample of its pages, the more seldom the longer nothing changed, and all of them where the sample did.
 */
typedef struct SelectedBlock {
        Block *block;
        PageSet pages;
        PageSet written;        /* of a block that was read before, as tracking reports them */
} SelectedBlock;

typedef struct Selection {
        SelectedBlock *blocks;  /* by address */
        size_t n, allocated;
        size_t at;              /* how far they have been read */
        bool settled;           /* pages that had changed stood still since: there may be new candidates */
} Selection;

void selection_done(Selection *selection);
/* How many of the pages that are left to be read lie in blocks of which nothing was read yet. */
uint64_t selection_count_new(const Selection *selection);
static inline bool selection_left(const Selection *selection) { return selection->at < selection->n; }

typedef struct SelectRules {
        uint32_t pass;
        uint64_t faults;        /* of the process since the last time: each first write to a tracked page is one.
                                 * UINT64_MAX: look everywhere */
        bool recheck_forked;    /* read again what is on shared frames: one of them was found to have a twin */
        bool all_due;           /* look at every block, however quiet */
        unsigned busy_pages;    /* written since the last time, of a tracked block, for it to count as busy; 0: half of them */
        bool prove_quiet;       /* a new block is tracked only when it was seen to stand still */
} SelectRules;

/* More pages of a block written in each pass than these, and tracking it does not pay: each costs its process a fault, of
 * write_nsec (host/fault-cost.h; 0: not known). Not tracked, pages are read that did not change: half of a block takes as
 * long as its writes' faults at 1 us each. */
unsigned select_busy_pages(uint32_t write_nsec);
/* They cost so much that to find out by them which blocks are busy is dearer than to read all blocks some times more. */
bool select_tracking_is_dear(uint32_t write_nsec);

/* Makes the selection anew; the old one must have been read to its end. While any of it is left its blocks must stay
 * (Space.selected). Blocks that are not known yet are made. track NULL: nothing is tracked. TARGET_E_GONE; -errno: what
 * was written may be forgotten, the track must be freed. */
int selection_make(Selection *selection, Space *space, Track *track, const VmaList *vmas, Crew *crew,
                   const SelectRules *rules);

/* What is written in it is not told: it cannot be, or is not worth it. */
bool select_is_sampled(const Block *block);

/* Which blocks are tracked: to be worked out again whenever the mappings or the blocks were refreshed. */
void select_cover(Space *space, const Track *track, const VmaList *vmas);

/* Takes the next pages that fit one batch. batch->n = 0: none are left. */
void selection_take(Selection *selection, const VmaList *vmas, Target *target, ScanBatch *batch);

/* What was read of each block of the batch decides when it is looked at next. */
void select_learn(const ScanBatch *batch, uint32_t pass);

/* Forgets that pages are wanted that are not merged; the next selection has them read again, whichever pass that is
 * in. To be done with all members of a domain before any of them is read: one that is read later would forget again
 * what an earlier one found out about it. */
void select_recheck(Space *space);

/* Everything that was read is read again by the next pass, as if it had come from elsewhere. */
void select_all(Space *space);
/* The block is to be looked at, all of it, by the next pass. */
void select_soon(Block *block, uint32_t pass);
