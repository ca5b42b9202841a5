/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * process_madvise(MADV_COLLAPSE), Linux 6.1: one huge page in place of 512 small ones, copied, now. It asks neither the
 * host's setting nor khugepaged's limits on shared pages: it would copy merged pages and fill in what was given back,
 * so whether it may is decided here.
 *
 * So each page must be there, on a frame of its own that nobody else maps, as the pagemap has it at that moment.
 *
 * The kernel does not collapse what a userfaultfd write-protects. So protection is lifted first: what is not collapsed
 * then counts as written and is read once more; what is collapsed is sampled, as huge pages are.
 *
 * What was collapsed is left whole for a while, each time for longer: contents that come and go should not have it
 * split and copied in turns.
 */
#include "merge/collapse.h"

#include "host/pagemap.h"

#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25 /* asm-generic/mman-common.h, 6.1 */
#endif

#define RETRY_PASSES 8U         /* at first, then twice as many each time */
#define REST_PASSES 64U
#define DOUBLINGS_MAX 8U

bool collapse_is_due(const Block *block, uint32_t pass) {
        if (!block->split || block->huge || block->split_due > pass)
                return false;
        for (unsigned i = 0; i < ELEMENTSOF(block->twin); i++)
                if ((block->twin[i] | block->zero[i] | block->merged[i] | block->zeropage[i] | block->hole[i] |
                     block->changed[i]) & ~block->alone[i])
                        return false;
        return true;
}

/* Of pages that are left alone nothing is known; and no page may have been merged since it was read. */
static int nothing_shared(const Block *block, bool *ret) {
        uint64_t entries[BLOCK_PAGES];
        size_t n;
        int r = target_read_pagemap(block->space->target, block->addr, BLOCK_PAGES, entries, &n);

        if (r < 0)
                return r;
        *ret = r == 0 && n == BLOCK_PAGES;
        for (unsigned i = 0; i < BLOCK_PAGES && *ret; i++)
                *ret = pagemap_is_anonymous(entries[i]) && entries[i] & PAGEMAP_EXCLUSIVE;
        return 0;
}

bool collapse_is_allowed(const Vma *vma, const Block *block, HostThp thp) {
        return vma && vma->skip == VMA_OK && !vma->mergeable && !vma->file && vma->start <= block->addr &&
               vma->end >= block->addr + BLOCK_BYTES &&
               (thp == HOST_THP_ALWAYS || (thp == HOST_THP_ADVISED && vma->huge_advised));
}

static uint32_t later(Block *block, uint32_t pass, uint32_t passes) {
        return pass + (passes << MIN_OF((unsigned)block->split_tries++, DOUBLINGS_MAX));
}

int collapse_block(const Target *target, Track *track, Block *block, uint32_t pass) {
        struct iovec range = { (void *)(uintptr_t)block->addr, BLOCK_BYTES };
        bool alone = false;
        int r = nothing_shared(block, &alone);

        if (r < 0)
                return r;
        if (!alone) {
                block->split_due = later(block, pass, RETRY_PASSES);
                return COLLAPSE_E_REFUSED;
        }
        if (track)
                track_unprotect(track, block->addr, block->addr + BLOCK_BYTES);
        if (syscall(SYS_process_madvise, target->pidfd, &range, 1, MADV_COLLAPSE, 0U) == (long)BLOCK_BYTES) {
                block->split = false;
                block->huge = true;
                block->split_due = later(block, pass, REST_PASSES);
                return 0;
        }
        /* EINVAL is both a kernel that does not know the advice and a mapping that does not take it. */
        if (errno == ENOSYS || errno == EPERM)
                return -errno;
        block->split_due = later(block, pass, RETRY_PASSES);
        return COLLAPSE_E_REFUSED;
}
