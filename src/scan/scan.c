/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * One batch: what each page is, and what it holds.
 *
 * The pagemap says which pages are anonymous, on which frame, and whether the frame is mapped once. Such a page is
 * read by the fast reader, unless its mapping is mergeable: there ksmd may make it a KSM frame at any moment (and one
 * that is mapped once looks exclusive), and the fast reader would undo that. All other pages are first looked up in
 * the pass's map of frames; only a frame not met before is asked for its flags (KSM? the zero page?) and read, by the
 * reader that keeps sharing. What remains is a fork between our look at the pagemap and the fast read, less than a
 * millisecond later: those pages, at most one batch's, are copied a little earlier than the next write would have.
 *
 * What must hold: nothing that is not present is touched (it would be faulted in); nothing is believed unless the
 * process was alive, with the memory we opened, after the last read; blocks change only when everything is known, and
 * a block is in one batch only, so that threads need no lock for them.
 *
 * A frame's entry in the map may be outdated before the pass ends (freed, used anew). It is a hint, like every key.
 * Two threads that meet a frame at the same moment may both read it: the one that comes later cannot tell a reader at
 * work from one that failed, and need not.
 */
#include "scan/scanner.h"

#include "scan/reader.h"

#include <string.h>

/* Pages at most this far apart are looked up in one read of the pagemap: the entries between them cost less than
 * another call. */
#define NEAR_PAGES 16U

/* Tags of the frame map: what the frame holds. */
enum {
        FRAME_UNREAD,           /* value: the serial number of the batch that is to read it */
        FRAME_HASHED,           /* value: the key, in all the others too */
        FRAME_ZERO,
        FRAME_KSM,
        FRAME_ZEROPAGE,
};

/* Some of a batch's pages, in its order. */
typedef struct ScanList {
        unsigned n;
        uint16_t places[SCAN_BATCH_PAGES]; /* in the batch */
        uint64_t addrs[SCAN_BATCH_PAGES];
} ScanList;

/* What a batch needs while it is scanned. It lies on its thread's stack, of which it takes some 570 KiB: so there is
 * one a thread, however many domains have a scanner. */
typedef struct ScanDesk {
        ScanThread *thread;
        ScanList quick;         /* to be read by READER_PINS */
        ScanList shared;        /* on a frame that others may map too, or in a mergeable mapping: */
        ScanList leaders;       /* the first to map their frame, */
        ScanList followers;     /* and the others */
        ScanList careful;       /* of leaders: to be read by READER_KEEPS_SHARING */
        uint64_t entries[SCAN_BATCH_PAGES]; /* of pagemap, then the leaders' page flags */
        uint8_t buffer[READER_PAGES * PAGE_BYTES] __attribute__((aligned(PAGE_BYTES)));
} ScanDesk;

static uint64_t addr_of(const ScanPage *p) { return p->block->addr + p->page * PAGE_BYTES; }

static void list_add(ScanList *list, unsigned place, uint64_t addr) {
        list->places[list->n] = (uint16_t)place;
        list->addrs[list->n++] = addr;
}

/* The mapping at addr, NULL when there is none. *cursor: no mapping before it ends behind addr; moves on. */
static const Vma *next_vma(const VmaList *vmas, size_t *cursor, uint64_t addr) {
        if (*cursor < vmas->n && vmas->vmas[*cursor].end <= addr)
                *cursor = vma_list_first(vmas, addr);
        return *cursor < vmas->n && vmas->vmas[*cursor].start <= addr ? &vmas->vmas[*cursor] : NULL;
}

/* The pages from page i on that one read of the pagemap covers. */
static unsigned cluster_length(const ScanBatch *batch, unsigned i) {
        uint64_t first = addr_of(&batch->pages[i]), last = first;
        unsigned n = 1;

        for (; i + n < batch->n; n++) {
                uint64_t addr = addr_of(&batch->pages[i + n]);

                if (addr - last > NEAR_PAGES * PAGE_BYTES || addr - first >= SCAN_BATCH_PAGES * PAGE_BYTES)
                        break;
                last = addr;
        }
        return n;
}

/* Reads the pagemap from the first of the n pages at p to the last, into entries. */
static int read_pagemap(const Target *target, const ScanPage *p, unsigned n, uint64_t *entries) {
        uint64_t from = addr_of(&p[0]);
        size_t n_pages = (size_t)((addr_of(&p[n - 1]) - from) / PAGE_BYTES + 1), got;
        int r = target_read_pagemap(target, from, n_pages, entries, &got);

        if (r != 0)
                return r;
        memset(entries + got, 0, (n_pages - got) * sizeof *entries); /* behind the end of what can be mapped */
        return 0;
}

/* Sorts n pages, from page i on, by how they are to be read. */
static void sort_pages(ScanDesk *desk, ScanBatch *batch, unsigned i, unsigned n, size_t *cursor) {
        uint64_t first = addr_of(&batch->pages[i]);
        const Vma *vma = NULL;

        for (unsigned end = i + n; i < end; i++) {
                ScanPage *p = &batch->pages[i];
                uint64_t addr = addr_of(p), entry = desk->entries[(addr - first) / PAGE_BYTES];

                if (!vma || addr >= vma->end)
                        vma = next_vma(batch->vmas, cursor, addr);
                if (!vma || !pagemap_is_anonymous(entry))
                        continue;
                desk->thread->stats.pages_scanned++;
                if (vma->skip != VMA_OK) {
                        desk->thread->stats.pages_skipped++;
                        continue;
                }
                p->kind = SCAN_FAILED; /* until it is known */
                p->pfn = entry & PAGEMAP_PFN;
                p->writable_alone = entry & PAGEMAP_EXCLUSIVE;
                list_add(p->writable_alone && !vma->mergeable ? &desk->quick : &desk->shared, i, addr);
        }
}

static int look(ScanDesk *desk, ScanBatch *batch) {
        size_t cursor = 0;

        desk->quick.n = desk->shared.n = 0;
        for (unsigned i = 0, n; i < batch->n; i += n) {
                int r;

                n = 1;
                if (!next_vma(batch->vmas, &cursor, addr_of(&batch->pages[i])))
                        continue;
                n = cluster_length(batch, i);
                r = read_pagemap(batch->target, &batch->pages[i], n, desk->entries);
                if (r != 0)
                        return r;
                sort_pages(desk, batch, i, n, &cursor);
        }
        return 0;
}

/* Of the pages on shared frames, those that the pass meets first, and the others. A frame that an earlier batch was to
 * read and could not is tried again. */
static int find_leaders(Scanner *scanner, ScanDesk *desk, const ScanPage *pages) {
        const ScanList *shared = &desk->shared;

        desk->leaders.n = desk->followers.n = 0;
        for (unsigned i = 0; i < shared->n; i++) {
                const ScanPage *p = &pages[shared->places[i]];
                bool met = false;

                if (!p->writable_alone) {
                        Frame before;
                        int r = frame_stripes_claim(scanner->frames, p->pfn, desk->thread->serial, &before);

                        if (r < 0)
                                return r;
                        met = before.tag != FRAME_UNREAD || before.value == desk->thread->serial;
                }
                list_add(met ? &desk->followers : &desk->leaders, shared->places[i], shared->addrs[i]);
        }
        return 0;
}

/* Gets the page flags of the leaders into entries: one call for frames that follow each other. */
static int read_flags(const Scanner *scanner, ScanDesk *desk, const ScanPage *pages) {
        const ScanList *leaders = &desk->leaders;

        for (unsigned i = 0, n; i < leaders->n; i += n) {
                uint64_t pfn = pages[leaders->places[i]].pfn;
                int r;

                for (n = 1; i + n < leaders->n && pages[leaders->places[i + n]].pfn == pfn + n; n++)
                        ;
                r = scanner_page_flags(scanner, pfn, n, desk->entries + i);
                if (r < 0)
                        return r;
        }
        return 0;
}

/* What the flags alone tell of the leaders; the others go on to be read. */
static void judge_leaders(const Scanner *scanner, ScanDesk *desk, ScanPage *pages) {
        const ScanList *leaders = &desk->leaders;

        desk->careful.n = 0;
        for (unsigned i = 0; i < leaders->n; i++) {
                ScanPage *p = &pages[leaders->places[i]];

                if (desk->entries[i] & KPAGEFLAGS_ZERO_PAGE) {
                        p->kind = SCAN_ZEROPAGE;
                        continue;
                }
                if (desk->entries[i] & KPAGEFLAGS_KSM) {
                        p->kind = SCAN_KSM;
                        p->key_known = scanner->known && scanner->known(scanner->known_userdata, p->pfn, &p->key);
                        if (p->key_known)
                                continue;
                }
                list_add(&desk->careful, leaders->places[i], leaders->addrs[i]);
        }
}

static int read_pages(const Scanner *scanner, ScanDesk *desk, const Target *target, const ScanList *list, ReaderWay way,
                      ScanPage *pages) {
        for (unsigned done = 0, n; done < list->n; done += n) {
                bool read[READER_PAGES];
                int r;

                n = MIN_OF(list->n - done, READER_PAGES);
                r = reader_read(target, way, list->addrs + done, n, desk->buffer, read);
                if (r != 0)
                        return r;
                for (unsigned i = 0; i < n; i++)
                        if (read[i])
                                scanner_take_content(scanner, desk->thread, &pages[list->places[done + i]],
                                                     desk->buffer + i * PAGE_BYTES);
                        else
                                desk->thread->stats.read_failures++;
        }
        return 0;
}

/* Notes what the leaders' frames hold, then gives it to the pages that map them too. */
static int share_knowledge(Scanner *scanner, ScanDesk *desk, ScanPage *pages) {
        static const uint8_t tags[] = {
                [SCAN_HASHED] = FRAME_HASHED,
                [SCAN_ZERO] = FRAME_ZERO,
                [SCAN_ZEROPAGE] = FRAME_ZEROPAGE,
                [SCAN_KSM] = FRAME_KSM,
        };
        static const uint8_t kinds[] = {
                [FRAME_UNREAD] = SCAN_FAILED,
                [FRAME_HASHED] = SCAN_SHARED,
                [FRAME_ZERO] = SCAN_ZERO,
                [FRAME_KSM] = SCAN_KSM,
                [FRAME_ZEROPAGE] = SCAN_ZEROPAGE,
        };

        for (unsigned i = 0; i < desk->leaders.n; i++) {
                const ScanPage *p = &pages[desk->leaders.places[i]];
                int r;

                if (p->kind == SCAN_FAILED || (p->kind == SCAN_KSM && !p->key_known) ||
                    (p->writable_alone && p->kind != SCAN_KSM))
                        continue;
                r = frame_stripes_set(scanner->frames, p->pfn, tags[p->kind], p->key);
                if (r < 0)
                        return r;
        }
        for (unsigned i = 0; i < desk->followers.n; i++) {
                ScanPage *p = &pages[desk->followers.places[i]];
                Frame frame;

                if (!frame_stripes_get(scanner->frames, p->pfn, &frame))
                        continue;
                p->kind = kinds[frame.tag];
                p->key_known = frame.tag != FRAME_UNREAD && frame.tag != FRAME_ZEROPAGE;
                p->key = p->key_known ? frame.value : 0;
        }
        return 0;
}

/* process_vm_readv() goes by number: the process must still have the number, and still the memory that was opened
 * (exec(2) replaces it, and the pagemap of the old one then reads as empty). */
static int check_still_there(const Target *target, uint64_t addr) {
        uint64_t entry;
        size_t n;
        int r = target_read_pagemap(target, addr, 1, &entry, &n);

        return r == 0 && !target_alive(target) ? TARGET_E_GONE : r;
}

/* What is known of pages that share a word of their block's sets goes in as words. A KSM frame whose content could not
 * be had is known to be one, and no more. */
static unsigned commit_word(const Scanner *scanner, ScanPage *pages, unsigned n) {
        Block *block = pages[0].block;
        unsigned word = pages[0].page / 64, i;
        uint64_t before = block->hashed[word], asked = 0, known = 0, alone = 0, kinds[SCAN_FAILED + 1] = {}, keep;

        for (i = 0; i < n && pages[i].block == block && pages[i].page / 64 == word; i++) {
                ScanPage *p = &pages[i];
                unsigned bit = p->page % 64;
                bool was = before >> bit & 1;
                uint8_t now = p->key_known ? (uint8_t)p->key : 0;

                p->first = p->key_known && !was;
                p->changed = p->key_known && was && block->check[p->page] != now;
                block->check[p->page] = now;
                asked |= (uint64_t)1 << bit;
                known |= (uint64_t)p->key_known << bit;
                alone |= (uint64_t)p->writable_alone << bit;
                kinds[p->kind] |= (uint64_t)1 << bit;
        }
        keep = ~asked;
        /* A page that was all zero and maps the zero page now was given back. */
        block->given[word] = (block->given[word] | (block->zero[word] & asked)) & (keep | kinds[SCAN_ZEROPAGE]);
        block->hole[word] &= keep | kinds[SCAN_ZEROPAGE] | kinds[SCAN_NOTHING];
        block->hashed[word] = (before & keep) | known;
        block->zero[word] = (block->zero[word] & keep) | kinds[SCAN_ZERO];
        block->merged[word] = (block->merged[word] & keep) | kinds[SCAN_KSM];
        block->zeropage[word] = (block->zeropage[word] & keep) | kinds[SCAN_ZEROPAGE];
        block->forked[word] = (block->forked[word] & keep) | (known & ~alone & ~kinds[SCAN_KSM]);
        if (!block->pass)
                block->first_pass = scanner->pass;
        block->pass = scanner->pass;
        return i;
}

static int scan_pages(Scanner *scanner, ScanDesk *desk, ScanBatch *batch) {
        ScanPage *pages = batch->pages;
        int r;

        r = look(desk, batch);
        if (r != 0)
                return r;
        r = find_leaders(scanner, desk, pages);
        if (r < 0)
                return r;
        r = read_flags(scanner, desk, pages);
        if (r < 0)
                return r;
        judge_leaders(scanner, desk, pages);
        r = read_pages(scanner, desk, batch->target, &desk->quick, READER_PINS, pages);
        if (r != 0)
                return r;
        r = read_pages(scanner, desk, batch->target, &desk->careful, READER_KEEPS_SHARING, pages);
        if (r != 0)
                return r;
        r = share_knowledge(scanner, desk, pages);
        if (r < 0)
                return r;
        return check_still_there(batch->target, addr_of(&pages[0]));
}

int scan_batch(Scanner *scanner, unsigned thread, ScanBatch *batch) {
        ScanDesk desk;

        batch->result = 0;
        if (batch->n == 0)
                return 0;
        desk.thread = &scanner->threads[thread];
        desk.thread->serial += scanner->n_threads;
        for (unsigned i = 0; i < batch->n; i++)
                batch->pages[i] = (ScanPage) { .block = batch->pages[i].block, .page = batch->pages[i].page,
                                               .written = batch->pages[i].written };
        batch->result = scan_pages(scanner, &desk, batch);
        if (batch->result == 0)
                for (unsigned i = 0; i < batch->n;)
                        i += commit_word(scanner, batch->pages + i, batch->n - i);
        return batch->result;
}

void scan_batch_whole(ScanBatch *batch, Block *block) {
        batch->n = BLOCK_PAGES;
        for (unsigned i = 0; i < BLOCK_PAGES; i++) {
                batch->pages[i].block = block;
                batch->pages[i].page = (uint16_t)i;
                batch->pages[i].written = false;
        }
}
