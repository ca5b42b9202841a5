/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "base/util.h"

#include <sys/ioctl.h>

/*
 * Of the kernel's interface to user space, what is younger than Debian 12's headers and used in several places.
 */

/* include/uapi/linux/userfaultfd.h */
#define UAPI_UFFD_WP_ASYNC ((uint64_t)1 << 15)  /* UFFD_FEATURE_WP_ASYNC, 6.7 */
#define UAPI_UFFD_MOVE ((uint64_t)1 << 16)      /* UFFD_FEATURE_MOVE, 6.8 */

typedef struct UffdMove { /* struct uffdio_move, 6.8 */
        uint64_t dst, src, len, mode;
        int64_t move;   /* bytes, or what went wrong with the first page */
} UffdMove;
#define UAPI_UFFDIO_MOVE _IOWR(0xAA, 0x05, UffdMove)
#define UAPI_UFFD_MOVE_DONTWAKE ((uint64_t)1 << 0)
#define UAPI_UFFD_MOVE_ALLOW_SRC_HOLES ((uint64_t)1 << 1)

/* include/uapi/linux/fs.h of 6.7, Documentation/admin-guide/mm/pagemap.rst. */
typedef struct PagemapRegion { /* struct page_region */
        uint64_t start, end, categories;
} PagemapRegion;

typedef struct PagemapScan { /* struct pm_scan_arg */
        uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
        uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
} PagemapScan;
_Static_assert(sizeof(PagemapScan) == 96, "struct pm_scan_arg");

#define PAGEMAP_SCAN_IOCTL _IOWR('f', 16, PagemapScan)
#define PAGEMAP_SCAN_PROTECT ((uint64_t)1 << 0) /* PM_SCAN_WP_MATCHING */
#define PAGEMAP_SCAN_WPALLOWED ((uint64_t)1 << 0)
#define PAGEMAP_SCAN_WRITTEN ((uint64_t)1 << 1)
#define PAGEMAP_SCAN_FILE ((uint64_t)1 << 2)
#define PAGEMAP_SCAN_PRESENT ((uint64_t)1 << 3)
#define PAGEMAP_SCAN_SWAPPED ((uint64_t)1 << 4)
#define PAGEMAP_SCAN_PFNZERO ((uint64_t)1 << 5)
#define PAGEMAP_SCAN_HUGE ((uint64_t)1 << 6)

/* Where to go on after a call that returned n regions. Not walk_end alone: where one call took several rounds of 512
 * regions and the last one reached the end, it is left where the round before stopped (do_pagemap_scan(),
 * fs/proc/task_mmu.c, 6.18). */
static inline uint64_t pagemap_scan_resume(const PagemapScan *scan, const PagemapRegion *regions, int n) {
        if ((uint64_t)n < scan->vec_len)
                return scan->end;
        return MAX_OF(scan->walk_end, regions[n - 1].end);
}
