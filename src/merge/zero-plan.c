/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "merge/zero-plan.h"

#include <string.h>

void zero_plan_done(ZeroPlan *plan) {
        free(plan->runs);
        *plan = (ZeroPlan){};
}

/* UFFDIO_MOVE (mm/userfaultfd.c, validate_move_areas(), 6.18) takes pages of private anonymous memory between mappings
 * of the same protection; ours is readable and writable. A stack grows under its registration. Whoever asked for huge
 * pages would have them filled in again by khugepaged. */
bool zero_vma_fits(const Vma *vma) {
        return vma->skip == VMA_OK && vma->write && !vma->exec && !vma->file && !vma->growsdown && !vma->huge_advised &&
               !vma->sealed && !vma->keyed;
}

static int add_run(ZeroPlan *plan, const ZeroRules *rules, const Vma *vma, const Block *block, unsigned first,
                   unsigned end) {
        if (end - first < MAX_OF(rules->minimum_run_pages, ZERO_MINIMUM_RUN)) {
                plan->pages_left_run += end - first;
                return 0;
        }
        if (GROW(plan->runs, plan->n, plan->allocated) < 0)
                return -ENOMEM;
        plan->runs[plan->n++] = (ZeroRun){
                .start = block->addr + first * PAGE_BYTES,
                .end = block->addr + end * PAGE_BYTES,
                .mapping = vma->start,
                .huge = block->huge && end - first == BLOCK_PAGES,
        };
        plan->pages += end - first;
        return 0;
}

/* The pages of a block that may be given back. */
static void zero_pages(const Block *block, PageSet ret) {
        for (unsigned i = 0; i < BLOCK_PAGES / 64; i++)
                ret[i] = block->zero[i] & ~block->changed[i] & ~block->forked[i] & ~block->merged[i];
}

static int add_block(ZeroPlan *plan, const ZeroRules *rules, const Vma *vma, const Block *block) {
        unsigned from = block->addr < vma->start ? (unsigned)((vma->start - block->addr) / PAGE_BYTES) : 0;
        uint64_t pages = (vma->end - block->addr) / PAGE_BYTES;
        unsigned to = (unsigned)MIN_OF(pages, (uint64_t)BLOCK_PAGES), n = 0;
        PageSet zero;

        zero_pages(block, zero);
        for (unsigned page = from; page < to; page++)
                n += page_set_has(zero, page);
        if (n == 0)
                return 0;
        if (!zero_vma_fits(vma)) {
                plan->pages_left_kind += n;
                return 0;
        }
        if (block->huge && (block->refilled || (uint64_t)n * 10000 < (uint64_t)rules->huge_page_split * BLOCK_PAGES)) {
                plan->pages_left_huge += n;
                return 0;
        }
        for (unsigned page = from, first; page < to; page++) {
                int r;

                if (!page_set_has(zero, page))
                        continue;
                for (first = page; page < to && page_set_has(zero, page);)
                        page++;
                r = add_run(plan, rules, vma, block, first, page);
                if (r < 0)
                        return r;
        }
        return 0;
}

int zero_plan_make(const Space *space, const VmaList *vmas, const ZeroRules *rules, ZeroPlan *ret) {
        _cleanup_(zero_plan_done) ZeroPlan plan = {};

        for (size_t i = 0; i < vmas->n; i++) {
                const Vma *vma = &vmas->vmas[i];

                if (vma->skip != VMA_OK)
                        continue;
                for (size_t b = space_first(space, vma->start);
                     b < space->n && space->blocks[b]->addr < vma->end; b++) {
                        int r = add_block(&plan, rules, vma, space->blocks[b]);
                        if (r < 0)
                                return r;
                }
        }
        *ret = plan;
        plan = (ZeroPlan){};
        return 0;
}
