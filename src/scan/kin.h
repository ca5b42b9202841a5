/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "scan/frames.h"

#include <xxhash.h>

/*
 * The counting rule for pages that relatives (processes forked from one another) have at one address with one content:
 * how many frames they would lie on, were they not merged. Those of which it is noted that they had one each ("own")
 * count each; all others together count as one, and as none beside an own one: the greater of 1 and the own ones.
 */
typedef enum Kin {
        KIN_NEW,                /* a frame's tag at first */
        KIN_LENT,               /* counted as one, for a page that was not noted */
        KIN_OWN,                /* counted for pages that were */
} Kin;

/* What pages are told apart by, as the key of a FrameMap: that has 56 bits, and 0 is an empty slot. */
static inline uint64_t kin_key(const void *name, size_t size) { return XXH3_64bits(name, size) >> 8 | 1; }

/* One more such page: whether it counts as one frame more. kin stands for all of one family, address and content. */
static inline bool kin_count(Frame *kin, bool own) {
        bool more = kin->tag == KIN_NEW || (own && kin->tag == KIN_OWN);

        if (own)
                kin->tag = KIN_OWN;
        else if (kin->tag == KIN_NEW)
                kin->tag = KIN_LENT;
        return more;
}
