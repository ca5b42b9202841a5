/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "scan/frames.h"

#include <assert.h>
#include <string.h>

#define SLOTS_MIN 256U

static_assert(sizeof(Frame) == 16, "an entry is 16 bytes");

/* Neighbouring frames are the common case, and a multiplication by 2^64 / phi spreads them evenly (Knuth 6.4). */
static Frame *slot_of(Frame *slots, size_t allocated, uint64_t pfn) {
        size_t i = (size_t)((pfn * 0x9e3779b97f4a7c15U) >> 32) & (allocated - 1);

        while (slots[i].pfn && slots[i].pfn != pfn)
                i = (i + 1) & (allocated - 1);
        return &slots[i];
}

Frame *frame_map_find(const FrameMap *map, uint64_t pfn) {
        Frame *slot;

        if (!map->n)
                return NULL;
        slot = slot_of(map->slots, map->allocated, pfn);
        return slot->pfn ? slot : NULL;
}

static int grow(FrameMap *map) {
        size_t want = map->allocated ? map->allocated * 2 : SLOTS_MIN;
        Frame *slots = calloc(want, sizeof *slots);

        if (!slots)
                return -ENOMEM;
        for (size_t i = 0; i < map->allocated; i++)
                if (map->slots[i].pfn)
                        *slot_of(slots, want, map->slots[i].pfn) = map->slots[i];
        free(map->slots);
        map->slots = slots;
        map->allocated = want;
        return 0;
}

int frame_map_add(FrameMap *map, uint64_t pfn, Frame **ret) {
        Frame *slot;

        if (map->n >= map->allocated / 4 * 3) {
                int r = grow(map);
                if (r < 0)
                        return r;
        }
        slot = slot_of(map->slots, map->allocated, pfn);
        if (!slot->pfn) {
                slot->pfn = pfn;
                map->n++;
        }
        *ret = slot;
        return 0;
}

void frame_map_clear(FrameMap *map) {
        if (map->n < map->allocated / 8)
                frame_map_done(map);
        else if (map->n)
                memset(map->slots, 0, map->allocated * sizeof *map->slots);
        map->n = 0;
}

void frame_map_done(FrameMap *map) {
        free(map->slots);
        *map = (FrameMap) {};
}
