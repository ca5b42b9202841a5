/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "base/util.h"
#include "target/target.h"

/*
 * What the scanner remembers of a target's memory: per 2 MiB block a handful of bitmaps and one check byte a page.
 * The trees refer to a page as (block id, page): 40 bits. All blocks of a domain live in one BlockTable.
 */
typedef struct Space Space;

typedef uint64_t PageSet[BLOCK_PAGES / 64];

/* What judgement keeps of a block (merge/judge.h): one allocation, that goes with it. */
typedef struct JudgeRecord JudgeRecord;

static inline bool page_set_has(const PageSet set, unsigned page) { return set[page / 64] >> (page % 64) & 1; }
static inline void page_set_add(PageSet set, unsigned page) { set[page / 64] |= (uint64_t)1 << (page % 64); }
static inline void page_set_remove(PageSet set, unsigned page) { set[page / 64] &= ~((uint64_t)1 << (page % 64)); }
/* The same while other threads add to the set or look at it. */
static inline bool page_set_has_shared(const PageSet set, unsigned page) {
        return __atomic_load_n(&set[page / 64], __ATOMIC_RELAXED) >> (page % 64) & 1;
}
static inline void page_set_add_shared(PageSet set, unsigned page) {
        __atomic_fetch_or(&set[page / 64], (uint64_t)1 << (page % 64), __ATOMIC_RELAXED);
}
unsigned page_set_count(const PageSet set);
bool page_set_any(const PageSet set);

typedef struct Block {
        uint64_t addr;          /* of its first page, a multiple of BLOCK_BYTES */
        Space *space;
        uint32_t id;
        uint32_t pass;          /* the pass that last read of it; 0: none yet */
        uint32_t first_pass;    /* the pass that first read of it */
        uint32_t due;           /* the pass that looks at it next where nobody tells when it is written */
        uint8_t quiet;          /* looks in a row that found nothing changed */
        uint8_t busy;           /* looks in a row that found most of it changed */
        uint8_t dead_passes;    /* looks at the mappings since anything was present */
        bool huge;              /* mapped by one huge page when last looked at */
        bool tracked;           /* what is written in it is told (but not of a huge page) */
        bool whole;             /* the next look reads all of it, not a sample */
        bool unsettled;         /* changed is not empty */
        bool opened;            /* pages of it were marked while it was huge */
        bool split;             /* … and it is huge no more */
        bool keep_whole;        /* not to be split now: it was collapsed lately, or cannot be read */
        uint8_t split_tries;    /* how often it was collapsed, or could not be */
        uint32_t split_due;     /* the pass from which on it may be split or collapsed again */
        uint32_t judged;        /* the pass that last read all of its pages */
        bool recheck;           /* what is in changed is to be read again */
        bool unprotected;       /* it was sampled: when it is tracked again, pages are reported that nobody wrote to */
        bool told;              /* a probe was told that pages of it are merged (merge/judge.h) */
        bool refilled;          /* khugepaged filled in what was given back: not to be given back again */
        PageSet hashed;         /* check[] holds something */
        PageSet zero;           /* all zero when last read, on a frame of its own */
        PageSet merged;         /* maps a KSM frame */
        PageSet zeropage;       /* maps the shared zero page */
        PageSet forked;         /* maps a frame, not KSM's, that is mapped more than once */
        PageSet twin;           /* another page like it was found when it, or that one, was last read */
        PageSet saves;          /* of twin: it will leave its frame for another's (of each content one stays) */
        PageSet changed;        /* new, different or written when last read: no candidate before it stood still for a pass */
        PageSet given;          /* was all zero on a frame of its own, maps the shared zero page since we marked it */
        PageSet hole;           /* was given back to the kernel by us (merge/zero), and has not been filled since */
        PageSet alone;          /* left alone for a while: neither read nor wanted (merge/judge.h) */
        JudgeRecord *judge;     /* NULL: nothing was merged in it yet */
        PageSet own;            /* merging it freed a frame: its own, or one shared by fork, for all who did (census.c) */
        PageSet again;          /* to be read again although nobody wrote it: its frame is not what we know of it */
        uint8_t check[BLOCK_PAGES]; /* low byte of the key when last read */
        uint8_t *nodes;         /* of each page, the NUMA node of its frame when last read; NULL: they do not matter */
} Block;

typedef struct BlockTable {
        Block **blocks;         /* by id; NULL: free or in quarantine */
        uint32_t n, allocated;
        uint32_t *free_ids, *quarantine; /* ids the trees may still name wait for a whole sweep */
        size_t n_free, n_quarantine;
        uint64_t bytes;         /* all the memory of the table and its blocks */
} BlockTable;

void block_table_done(BlockTable *table);
int block_new(BlockTable *table, Space *space, uint64_t addr, Block **ret);
void block_free(BlockTable *table, Block *block);
int block_make_nodes(Block *block); /* -ENOMEM */
/* No tree names the n ids that have been freed the longest any more. */
void block_table_release_quarantine(BlockTable *table, size_t n);

/* Adds the block's pages in a range of addresses (multiples of PAGE_BYTES), which may reach beyond it. */
static inline void block_add_range(const Block *block, uint64_t start, uint64_t end, PageSet pages) {
        end = MIN_OF(end, block->addr + BLOCK_BYTES);
        for (uint64_t addr = MAX_OF(start, block->addr); addr < end; addr += PAGE_BYTES)
                page_set_add(pages, (unsigned)((addr - block->addr) / PAGE_BYTES));
}

#define BLOCK_PAGE_REF(block, page) ((uint64_t)(block)->id << 9 | (page))
/* NULL when the block is gone. */
static inline Block *block_of_ref(const BlockTable *table, uint64_t ref, unsigned *ret_page) {
        uint32_t id = (uint32_t)(ref >> 9);
        *ret_page = (unsigned)(ref & (BLOCK_PAGES - 1));
        return id < table->n ? table->blocks[id] : NULL;
}

/* The blocks of one target, by address. */
struct Space {
        Target *target;         /* borrowed */
        BlockTable *table;      /* borrowed */
        void *owner;            /* whoever drives the scan may hang its own record here */
        Block **blocks;
        size_t n, allocated;
        size_t outdated_at;     /* how far domain_find_outdated() has come */
        bool found;             /* some of its pages were found to have a twin when others were read */
        bool selected;          /* a selection names blocks of it: none is dropped until it was read */
        bool plain_pagemap;     /* PAGEMAP_SCAN is not to be used: the kernel lacks it, or a test wants it so */
};

void space_done(Space *space);  /* frees its blocks */
/* Makes blocks for the readable mappings where anonymous pages are present, drops those that stayed empty for some
 * passes. Costs nothing for what is not present (PAGEMAP_SCAN; else pagemap). The target's memory must be open. In an
 * uncounted list, the anonymous pages of readable mappings are counted on the way.
 * TARGET_E_GONE: it ended, or began another program; -ENOMEM: some new blocks are missing; -errno: nothing changed. */
int space_refresh(Space *space, VmaList *vmas);
/* Makes a block for each of these addresses (ascending; multiples of BLOCK_BYTES) that has none. -ENOMEM, -ENOSPC (no
 * more ids): some are missing. */
int space_add(Space *space, const uint64_t *addrs, size_t n);
Block *space_find(const Space *space, uint64_t addr); /* NULL */
size_t space_first(const Space *space, uint64_t addr); /* the index of the first block that ends behind addr */
