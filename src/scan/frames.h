/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "base/util.h"

/*
 * A map from page frame numbers to what is known of the frame: open addressing, 16 bytes an entry, at most 3/4 full.
 * Only frames that are mapped more than once go in, so it stays small beside the memory it describes.
 *
 * When it is full a table of twice the size takes over, and every addition brings a few slots of the old one along:
 * with millions of shared frames, moving them all at once would stop everything for a tenth of a second.
 */
typedef struct Frame {
        uint64_t value;         /* the user's */
        uint64_t pfn : 56;      /* 0: an empty slot; no anonymous page lies on frame 0 */
        uint64_t tag : 8;       /* the user's; 0 for a frame just added */
} Frame;

typedef struct FrameMap {
        Frame *slots;
        size_t n, allocated;    /* allocated: a power of two, or 0 */
        Frame *old;             /* the table before, or NULL: half as large, what is left of it counts too */
        size_t old_moved;       /* its slots before this one have been moved */
} FrameMap;

Frame *frame_map_find(const FrameMap *map, uint64_t pfn); /* NULL: not there */
/* Finds the frame or adds it with tag and value 0; *ret holds until the next addition. -ENOMEM. */
int frame_map_add(FrameMap *map, uint64_t pfn, Frame **ret);
void frame_map_clear(FrameMap *map); /* keeps room for about as many */
void frame_map_done(FrameMap *map);
