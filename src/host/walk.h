/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "base/util.h"

/*
 * What it costs the kernel to visit every mapping of one page (a walk of its reverse map: whenever the page is moved,
 * reclaimed or found broken), measured on a page of our own; and how often a page may then be mapped for a walk to
 * stay below a time.
 */
typedef struct WalkCost {
        uint64_t mapping_nsec;  /* CPU time of each mapping more */
        bool moved;             /* measured by moving the page to another NUMA node and not by taking it out */
} WalkCost;

/* Some milliseconds. Leaves nothing behind. -errno. */
int walk_measure(WalkCost *ret);

/* How many mappings a walk gets through in so many nanoseconds where each lies in a mapping that was cut into so many
 * pieces (KSM looks at all of them): at least 2, at most INT32_MAX. */
uint32_t walk_limit(const WalkCost *cost, uint64_t latency_nsec, uint64_t pieces);
