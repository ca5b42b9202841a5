/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "target/target.h"

/*
 * Where a target's readable mappings hold anonymous pages, block by block, at a cost that follows what is present and
 * not what is mapped.
 */
typedef struct PresentBlock {
        uint64_t addr;          /* a multiple of BLOCK_BYTES */
        bool pages;             /* an anonymous page is present; false: only mappings of the shared zero page */
        bool huge;              /* mapped by one huge page */
} PresentBlock;

typedef struct PresentList {
        PresentBlock *blocks;   /* by address, each once */
        size_t n, allocated;
} PresentList;

void present_list_done(PresentList *list);

/* PRESENT_E_PLAIN: the kernel has no PAGEMAP_SCAN (before 6.7). */
enum { PRESENT_E_PLAIN = 1 };

/* By ioctl(PAGEMAP_SCAN). 1 TiB that holds 1,024 pages: some 12 ms. In an uncounted list it counts the anonymous pages
 * of the mappings that it looks into, as smaps would (undefined where it fails). PRESENT_E_PLAIN; -ESRCH: the address
 * space is gone; -errno. */
int present_scan(int pagemapfd, VmaList *vmas, PresentList *ret);

/* By reading pagemap: 40 ns a mapped page, be it present or not. Looks only into mappings that had anonymous pages when
 * *vmas (a counted list) was read, and in each until it has met as many. Does not tell the zero page from others. -ESRCH, -errno. */
int present_read(int pagemapfd, const VmaList *vmas, PresentList *ret);
