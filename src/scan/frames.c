/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "scan/frames.h"

#include <assert.h>
#include <string.h>

#define SLOTS_MIN 256U
#define MOVED_PER_ADDITION 4U

static_assert(sizeof(Frame) == 16, "an entry is 16 bytes");

/* Neighbouring frames are the common case, and a multiplication by 2^64 / phi spreads them evenly (Knuth 6.4). */
static Frame *slot_of(Frame *slots, size_t allocated, uint64_t pfn) {
        size_t i = (size_t)((pfn * 0x9e3779b97f4a7c15U) >> 32) & (allocated - 1);

        while (slots[i].pfn && slots[i].pfn != pfn)
                i = (i + 1) & (allocated - 1);
        return &slots[i];
}

/* Where the frame is; NULL: nowhere. Slots of the old table that were moved keep their frames, so that what lies behind
 * them is still found; they themselves are found in the new one first. */
Frame *frame_map_find(const FrameMap *map, uint64_t pfn) {
        Frame *slot;

        if (!map->n)
                return NULL;
        slot = slot_of(map->slots, map->allocated, pfn);
        if (!slot->pfn && map->old)
                slot = slot_of(map->old, map->allocated / 2, pfn);
        return slot->pfn ? slot : NULL;
}

/* Takes some slots over from the old table. Two for each addition would do: it is empty long before the new one is
 * full. */
static void move_some(FrameMap *map) {
        size_t end = MIN_OF(map->old_moved + MOVED_PER_ADDITION, map->allocated / 2);

        for (; map->old_moved < end; map->old_moved++) {
                const Frame *frame = &map->old[map->old_moved];
                if (frame->pfn)
                        *slot_of(map->slots, map->allocated, frame->pfn) = *frame;
        }
        if (end == map->allocated / 2) {
                free(map->old);
                map->old = NULL;
        }
}

static int grow(FrameMap *map) {
        size_t want = map->allocated ? map->allocated * 2 : SLOTS_MIN;
        Frame *slots = calloc(want, sizeof *slots);

        if (!slots)
                return -ENOMEM;
        map->old = map->slots;
        map->old_moved = 0;
        map->slots = slots;
        map->allocated = want;
        return 0;
}

int frame_map_add(FrameMap *map, uint64_t pfn, Frame **ret) {
        Frame *slot;

        if (map->old)
                move_some(map);
        slot = frame_map_find(map, pfn);
        if (slot) {
                *ret = slot;
                return 0;
        }
        if (map->n >= map->allocated / 4 * 3) {
                int r = grow(map);
                if (r < 0)
                        return r;
        }
        slot = slot_of(map->slots, map->allocated, pfn);
        slot->pfn = pfn;
        map->n++;
        *ret = slot;
        return 0;
}

void frame_map_clear(FrameMap *map) {
        if (map->n < map->allocated / 8)
                frame_map_done(map);
        else if (map->n)
                memset(map->slots, 0, map->allocated * sizeof *map->slots);
        free(map->old);
        map->old = NULL;
        map->n = 0;
}

void frame_map_done(FrameMap *map) {
        free(map->slots);
        free(map->old);
        *map = (FrameMap) {};
}
