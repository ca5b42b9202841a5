/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "index/unstable.h"
#include "scan/block.h"
#include "scan/hash.h"

/*
 * Reads pages of one process and says what each is. Never breaks sharing: process_vm_readv (whose pin un-shares)
 * only for frames mapped exclusively, /proc/PID/mem for the rest, and a frame that several processes map is read once
 * a pass. Never faults anything in: only what is present is read. Never touches file, shared or device pages.
 *
 * Pages go in batches, which several threads may scan at once. All threads of a scanner share what it knows of frames;
 * everything else a batch needs belongs to the thread that scans it.
 */
typedef enum ScanKind {
        SCAN_NOTHING,           /* not present, swapped, a file's page, or in a mapping that is skipped */
        SCAN_HASHED,            /* key is valid */
        SCAN_ZERO,              /* all zero, on a frame of its own */
        SCAN_ZEROPAGE,          /* maps the kernel's zero page already */
        SCAN_KSM,               /* maps a KSM frame; key is valid when key_known */
        SCAN_SHARED,            /* a frame (shared by fork) that this pass has read before; key is valid */
        SCAN_FAILED,            /* went away or changed its mapping while we read */
} ScanKind;

typedef struct ScanPage {
        Block *block;           /* of the batch's target */
        uint64_t key;
        uint64_t pfn;
        uint16_t page;          /* in the block */
        uint8_t kind;           /* ScanKind */
        bool written;           /* since it was last read: the caller says so */
        bool first;             /* not read before, or not since it was last absent */
        bool changed;           /* read before, and its check byte differs now */
        bool key_known;         /* always for SCAN_HASHED, SCAN_ZERO and SCAN_SHARED */
        bool writable_alone;    /* mapped exclusively: freeing it frees a frame */
} ScanPage;

#define SCAN_BATCH_PAGES BLOCK_PAGES

/* The caller says which pages: target, vmas, n, and each page's block, number and written, by ascending address. All
 * pages of a block that a pass asks for come in one batch, so that no two threads ever change one block. */
typedef struct ScanBatch {
        Target *target;         /* borrowed */
        const VmaList *vmas;    /* borrowed */
        int result;             /* what scan_batch() returned */
        unsigned n;
        ScanPage pages[SCAN_BATCH_PAGES];
} ScanBatch;

typedef struct ScanStats {
        uint64_t pages_scanned; /* looked at in pagemap and present */
        uint64_t pages_hashed;  /* read and hashed */
        uint64_t pages_skipped; /* present, but of a skipped mapping */
        uint64_t read_failures;
} ScanStats;

typedef struct Scanner Scanner;
/* For n_threads threads, numbered from 0. Borrows secret; -errno: no /proc/kpageflags, no PFNs. */
int scanner_new(const HashSecret *secret, unsigned n_threads, Scanner **ret);
Scanner *scanner_free(Scanner *scanner);
DEFINE_CLEANUP(Scanner, scanner_free)

/* Forgets which frames were read: a new pass. */
void scanner_begin_pass(Scanner *scanner, uint32_t pass);

/* What the content of a KSM frame is called is remembered by the caller's stable tree: asked before reading one, by any
 * thread. */
typedef bool (*ScanKnownFrame)(void *userdata, uint64_t pfn, uint64_t *ret_key);
void scanner_set_known_frames(Scanner *scanner, ScanKnownFrame known, void *userdata);

/* Reads the pages and fills in the rest of the batch, and what their blocks know of these pages and no others: hashed,
 * zero, merged, zeropage, forked, the check bytes; pass and first_pass. The target's memory must be open
 * (target_open_memory). Different threads may scan different batches at once. TARGET_E_GONE: ended or ran exec(2)
 * meanwhile; -errno. Either way no block was changed and nothing in the batch may be used. */
int scan_batch(Scanner *scanner, unsigned thread, ScanBatch *batch);
void scan_batch_whole(ScanBatch *batch, Block *block); /* asks for every page of the block */

/* The frame that the page lies on now; 0: no anonymous page is there. Any thread may ask. TARGET_E_GONE, -errno. */
int scan_page_frame(const Block *block, unsigned page, uint64_t *ret_pfn);
/* The same for all pages of the block, and which frames are mapped once. */
int scan_block_frames(const Block *block, uint64_t ret_pfns[static BLOCK_PAGES], PageSet ret_alone);

/* Reads one page again: SCAN_HASHED, SCAN_ZERO or SCAN_KSM with its key, or what became of it. Not beside threads. */
ScanKind scan_page_again(Scanner *scanner, Target *target, const VmaList *vmas, uint64_t addr, uint64_t *ret_key);

void scanner_stats(const Scanner *scanner, ScanStats *ret); /* of all threads; not beside them */
uint64_t scanner_zero_key(const Scanner *scanner); /* the key of a page of zeros: SCAN_ZERO has it, SCAN_KSM may */
/* The flags of n adjacent frames, as /proc/kpageflags has them. -ENODATA: no such frame; -errno. */
int scanner_page_flags(const Scanner *scanner, uint64_t pfn, unsigned n, uint64_t *ret);
