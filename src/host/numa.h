/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "base/util.h"

/*
 * Which NUMA node a page frame belongs to. The pagemap gives the frame of a page, so its node costs nothing more than a
 * look into a handful of ranges: no move_pages(2), no numa_maps. A snapshot: memory that is added or removed later is
 * not in it until it is read anew.
 */
typedef struct NumaRange {
        uint64_t first, end;    /* page frame numbers */
        unsigned node;
} NumaRange;

typedef struct Numa {
        NumaRange *ranges;      /* by frame, disjoint; none on a machine with one node */
        size_t n, allocated;
        unsigned n_nodes;       /* nodes that have memory */
} Numa;

#define NUMA_NODE_UNKNOWN 255U  /* frames that no node claims, or several */

/* system: NULL for /sys/devices/system; zoneinfo: NULL for /proc/zoneinfo, which is read where the kernel does not tell
 * memory blocks (no CONFIG_MEMORY_HOTPLUG). A machine that says nothing of nodes has one. *ret is replaced. -errno. */
int numa_read(const char *system, const char *zoneinfo, Numa *ret);
void numa_done(Numa *numa);

/* Nodes beyond 254 share numbers with lower ones. */
unsigned numa_node_of(const Numa *numa, uint64_t pfn);
