/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * PAGEMAP_SCAN (Linux 6.7, Documentation/admin-guide/mm/pagemap.rst) returns ranges of pages whose categories are
 * alike, walking page tables only where there are any. Asked for PRESENT without FILE, it skips what was never touched,
 * what is swapped out, and pages of files that nobody wrote to. It neither faults anything in nor fills page tables.
 * FILE makes it look at each page's struct page (11 ms for 1 GiB of small pages), the rest at the page tables only
 * (3 ms): so it is asked for in mappings of files alone.
 *
 * One call walks as many mappings of one kind as lie close together, because 60,000 calls cost more than the walk; what
 * it finds in a mapping that is to be skipped is thrown away here. One call never covers more than CALL_BYTES: the
 * kernel holds the target's mmap lock meanwhile, and this keeps it below 2 ms with every page present.
 *
 * Without the ioctl there is only pagemap itself, which has an entry for every mapped page.
 */
#include "scan/present.h"

#include "host/pagemap.h"
#include "host/uapi.h"

#include <string.h>

#define REGIONS 2048
#define CALL_BYTES ((uint64_t)512 << 20)
/* Walking so much that is skipped or unmapped costs less than another call. */
#define BRIDGE_BYTES ((uint64_t)1 << 20)
#define ENTRIES (16 * BLOCK_PAGES)

void present_list_done(PresentList *list) {
        free(list->blocks);
        *list = (PresentList) {};
}

/* Notes that [start, end) holds something; ranges come by address. */
static int add(PresentList *list, uint64_t start, uint64_t end, bool pages, bool huge) {
        for (uint64_t addr = start & ~(BLOCK_BYTES - 1); addr < end; addr += BLOCK_BYTES) {
                PresentBlock *last = list->n ? &list->blocks[list->n - 1] : NULL;

                if (last && last->addr == addr) {
                        last->pages |= pages;
                        last->huge |= huge;
                        continue;
                }
                if (GROW(list->blocks, list->n, list->allocated) < 0)
                        return -ENOMEM;
                list->blocks[list->n++] = (PresentBlock) { .addr = addr, .pages = pages, .huge = huge };
        }
        return 0;
}

/* Adds what of the region lies in readable mappings; *at: the mapping to go on with. */
static int add_region(PresentList *list, VmaList *vmas, size_t *at, const PagemapRegion *region) {
        bool zero = region->categories & PAGEMAP_SCAN_PFNZERO;

        while (*at < vmas->n && vmas->vmas[*at].end <= region->start)
                ++*at;
        for (size_t i = *at; i < vmas->n && vmas->vmas[i].start < region->end; i++) {
                Vma *vma = &vmas->vmas[i];
                uint64_t start = MAX_OF(region->start, vma->start), end = MIN_OF(region->end, vma->end);
                int r;

                if (vma->skip != VMA_OK)
                        continue;
                r = add(list, start, end, !zero, region->categories & PAGEMAP_SCAN_HUGE);
                if (r < 0)
                        return r;
                if (vmas->uncounted && !zero)
                        vma->anonymous_bytes += end - start;
        }
        return 0;
}

static int scan_span(int fd, uint64_t start, uint64_t end, bool files, VmaList *vmas, size_t *at,
                     PagemapRegion *regions, PresentList *list) {
        while (start < end) {
                PagemapScan arg = {
                        .size = sizeof arg,
                        .start = start,
                        .end = MIN_OF(end, start + CALL_BYTES),
                        .vec = (uintptr_t)regions,
                        .vec_len = REGIONS,
                        .category_mask = PAGEMAP_SCAN_PRESENT | (files ? PAGEMAP_SCAN_FILE : 0),
                        .category_inverted = files ? PAGEMAP_SCAN_FILE : 0,
                        .return_mask = PAGEMAP_SCAN_PFNZERO | PAGEMAP_SCAN_HUGE,
                };
                int n = ioctl(fd, PAGEMAP_SCAN_IOCTL, &arg);

                if (n < 0)
                        return errno == ENOTTY ? PRESENT_E_PLAIN : -errno;
                for (int i = 0; i < n; i++) {
                        int r = add_region(list, vmas, at, &regions[i]);
                        if (r < 0)
                                return r;
                }
                start = pagemap_scan_resume(&arg, regions, n);
        }
        return 0;
}

/* Its list of mappings said that every page of it is there, and none of them huge: nothing is left to ask. */
static bool is_full(const VmaList *vmas, const Vma *vma) {
        return !vmas->uncounted && vma->skip == VMA_OK && !vma->file && vma->huge_bytes == 0 &&
               vma->end - vma->start >= BLOCK_BYTES && vma->anonymous_bytes == vma->end - vma->start;
}

int present_scan(int pagemapfd, VmaList *vmas, PresentList *ret) {
        _cleanup_(present_list_done) PresentList list = {};
        _cleanup_free_ PagemapRegion *regions = malloc(REGIONS * sizeof *regions);
        size_t at = 0;

        if (!regions)
                return -ENOMEM;
        for (size_t i = 0; i < vmas->n && vmas->uncounted; i++)
                if (vmas->vmas[i].skip == VMA_OK)
                        vmas->vmas[i].anonymous_bytes = 0;
        for (size_t i = 0; i < vmas->n;) {
                uint64_t start = vmas->vmas[i].start, end = vmas->vmas[i].end;
                bool files = vmas->vmas[i].file;
                bool full = is_full(vmas, &vmas->vmas[i]);
                int r;

                if (vmas->vmas[i++].skip != VMA_OK)
                        continue;
                for (; !full && i < vmas->n && vmas->vmas[i].start - end <= BRIDGE_BYTES &&
                       !is_full(vmas, &vmas->vmas[i]); i++)
                        if (vmas->vmas[i].skip == VMA_OK) {
                                if (vmas->vmas[i].file != files)
                                        break;
                                end = vmas->vmas[i].end;
                        }
                r = full ? add(&list, start, end, true, false)
                         : scan_span(pagemapfd, start, end, files, vmas, &at, regions, &list);
                if (r != 0)
                        return r;
        }
        *ret = list;
        list = (PresentList) {};
        return 0;
}

/* One huge page's mapping shows no mark in pagemap: frames in order from a multiple of 512 on, in a mapping that has
 * huge pages. A split huge page looks so too, and is then treated with the same care. */
static bool looks_huge(const Vma *vma, const uint64_t *entries, size_t n) {
        uint64_t first = entries[0] & PAGEMAP_PFN;

        if (!vma->huge_bytes || n < BLOCK_PAGES || !first || first % BLOCK_PAGES)
                return false;
        for (size_t i = 0; i < BLOCK_PAGES; i++)
                if (!(entries[i] & PAGEMAP_PRESENT) || (entries[i] & PAGEMAP_PFN) != first + i)
                        return false;
        return true;
}

static int read_vma(int fd, const Vma *vma, uint64_t *entries, PresentList *list) {
        uint64_t left = vma->anonymous_bytes / PAGE_BYTES;

        for (uint64_t addr = vma->start; addr < vma->end && left;) {
                uint64_t end = MIN_OF(vma->end, (addr & ~(BLOCK_BYTES - 1)) + ENTRIES * PAGE_BYTES);
                ssize_t n = pread(fd, entries, (end - addr) / PAGE_BYTES * sizeof *entries,
                                  (off_t)(addr / PAGE_BYTES * sizeof *entries));

                if (n < 0)
                        return -errno;
                if (n == 0)
                        return -ESRCH;
                for (size_t i = 0, all = (size_t)n / sizeof *entries; i < all;) {
                        size_t in_block = (BLOCK_BYTES - (addr + i * PAGE_BYTES) % BLOCK_BYTES) / PAGE_BYTES;
                        size_t stop = MIN_OF(all, i + in_block);
                        bool any = false, huge = looks_huge(vma, entries + i, stop - i);
                        uint64_t block = addr + i * PAGE_BYTES;
                        int r;

                        for (; i < stop; i++)
                                if (pagemap_is_anonymous(entries[i])) {
                                        any = true;
                                        /* Only what is surely one of the pages that smaps counted: not the zero
                                         * page. */
                                        if (entries[i] & PAGEMAP_EXCLUSIVE && left)
                                                left--;
                                }
                        if (!any)
                                continue;
                        r = add(list, block, block + 1, true, huge);
                        if (r < 0)
                                return r;
                }
                addr += (uint64_t)n / sizeof *entries * PAGE_BYTES;
        }
        return 0;
}

int present_read(int pagemapfd, const VmaList *vmas, PresentList *ret) {
        _cleanup_(present_list_done) PresentList list = {};
        _cleanup_free_ uint64_t *entries = malloc(ENTRIES * sizeof *entries);

        if (!entries)
                return -ENOMEM;
        for (size_t i = 0; i < vmas->n; i++)
                if (vmas->vmas[i].skip == VMA_OK) {
                        int r = read_vma(pagemapfd, &vmas->vmas[i], entries, &list);
                        if (r < 0)
                                return r;
                }
        *ret = list;
        list = (PresentList) {};
        return 0;
}
