/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * One block: what each page is, and what it holds.
 *
 * The pagemap says which pages are anonymous, on which frame, and whether the frame is mapped once. Such a page is
 * read by the fast reader, unless its mapping is mergeable: there ksmd may make it a KSM frame at any moment (and one
 * that is mapped once looks exclusive), and the fast reader would undo that. All other pages are first looked up in
 * the pass's map of frames; only a frame not met before is asked for its flags (KSM? the zero page?) and read, by the
 * reader that keeps sharing. What remains is a fork between our look at the pagemap and the fast read, less than a
 * millisecond later: those pages, at most one block's, are copied a little earlier than the next write would have.
 *
 * What must hold: nothing that is not present is touched (it would be faulted in); nothing is believed unless the
 * process was alive, with the memory we opened, after the last read; the block changes only when everything is known.
 *
 * A frame's entry in the map may be outdated before the pass ends (freed, used anew). It is a hint, like every key.
 */
#include "scan/scan.h"

#include "scan/frames.h"
#include "scan/pagemap.h"
#include "scan/reader.h"

#include <fcntl.h>
#include <string.h>

/* Tags of the frame map: what the frame holds. */
enum {
        FRAME_UNREAD,           /* value: the serial number of the block that is to read it */
        FRAME_HASHED,           /* value: the key, in all the others too */
        FRAME_ZERO,
        FRAME_KSM,
        FRAME_ZEROPAGE,
};

struct Scanner {
        const HashSecret *secret;
        ScanKnownFrame known;
        void *known_userdata;
        uint8_t *buffer;        /* READER_PAGES pages */
        FrameMap frames;
        ScanStats stats;
        uint64_t zero_key;
        uint64_t serial;        /* of the block being scanned */
        int kpageflagsfd;
        uint32_t pass;
        PageSet quick;          /* to be read by READER_PINS */
        PageSet shared;         /* on a frame that others may map too, or in a mergeable mapping */
        PageSet leaders;        /* of shared: the first to map its frame */
        PageSet careful;        /* of leaders: to be read by READER_KEEPS_SHARING */
        uint64_t entries[BLOCK_PAGES]; /* of pagemap, then page flags */
};

/* Without CAP_SYS_ADMIN the frame numbers read as 0. */
static int check_frame_numbers(void) {
        _cleanup_close_ int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
        volatile uint64_t here = 1;
        uint64_t entry;
        ssize_t n;

        if (fd < 0)
                return -errno;
        n = pread(fd, &entry, sizeof entry, (off_t)((uintptr_t)&here / PAGE_BYTES * sizeof entry));
        if (n < 0)
                return -errno;
        return n == sizeof entry && entry & PAGEMAP_PFN ? 0 : -EPERM;
}

int scanner_new(const HashSecret *secret, Scanner **ret) {
        _cleanup_(scanner_freep) Scanner *scanner = calloc(1, sizeof *scanner);
        int r;

        if (!scanner)
                return -ENOMEM;
        scanner->secret = secret;
        scanner->kpageflagsfd = open("/proc/kpageflags", O_RDONLY | O_CLOEXEC);
        if (scanner->kpageflagsfd < 0)
                return -errno;
        r = check_frame_numbers();
        if (r < 0)
                return r;
        scanner->buffer = aligned_alloc(PAGE_BYTES, READER_PAGES * PAGE_BYTES);
        if (!scanner->buffer)
                return -ENOMEM;
        memset(scanner->buffer, 0, PAGE_BYTES);
        scanner->zero_key = hash_page(secret, scanner->buffer);
        *ret = TAKE_PTR(scanner);
        return 0;
}

Scanner *scanner_free(Scanner *scanner) {
        if (!scanner)
                return NULL;
        frame_map_done(&scanner->frames);
        free(scanner->buffer);
        safe_close(scanner->kpageflagsfd);
        free(scanner);
        return NULL;
}

void scanner_begin_pass(Scanner *scanner, uint32_t pass) {
        frame_map_clear(&scanner->frames);
        scanner->pass = pass;
}

void scanner_set_known_frames(Scanner *scanner, ScanKnownFrame known, void *userdata) {
        scanner->known = known;
        scanner->known_userdata = userdata;
}

void scanner_stats(const Scanner *scanner, ScanStats *ret) { *ret = scanner->stats; }

uint64_t scanner_zero_key(const Scanner *scanner) { return scanner->zero_key; }

int scanner_page_flags(const Scanner *scanner, uint64_t pfn, unsigned n, uint64_t *ret) {
        size_t size = n * sizeof *ret;
        ssize_t got = pread(scanner->kpageflagsfd, ret, size, (off_t)(pfn * sizeof *ret));

        if (got < 0)
                return -errno;
        return (size_t)got == size ? 0 : -ENODATA;
}

/* The first mapping that ends behind addr. */
static size_t first_vma(const VmaList *vmas, uint64_t addr) {
        size_t low = 0, high = vmas->n;

        while (low < high) {
                size_t middle = low + (high - low) / 2;
                if (vmas->vmas[middle].end <= addr)
                        low = middle + 1;
                else
                        high = middle;
        }
        return low;
}

/* Reads the pagemap from the block's first readable mapping to its last. */
static int read_pagemap(Scanner *scanner, const Target *target, uint64_t addr, const VmaList *vmas, size_t first_index) {
        uint64_t from = UINT64_MAX, to = 0, size;
        ssize_t n;

        memset(scanner->entries, 0, sizeof scanner->entries);
        for (size_t i = first_index; i < vmas->n && vmas->vmas[i].start < addr + BLOCK_BYTES; i++) {
                if (vmas->vmas[i].skip != VMA_OK)
                        continue;
                if (from == UINT64_MAX)
                        from = MAX_OF(vmas->vmas[i].start, addr);
                to = MIN_OF(vmas->vmas[i].end, addr + BLOCK_BYTES);
        }
        if (from == UINT64_MAX)
                return 0;
        size = (to - from) / PAGE_BYTES * sizeof(uint64_t);
        n = pread(target->pagemapfd, scanner->entries + (from - addr) / PAGE_BYTES, size,
                  (off_t)(from / PAGE_BYTES * sizeof(uint64_t)));
        if (n < 0)
                return -errno;
        return n == 0 ? TARGET_E_GONE : 0; /* less than asked for: the end of what can be mapped */
}

/* Sorts the block's pages by how they are to be read. */
static int look(Scanner *scanner, const Target *target, uint64_t addr, const VmaList *vmas, ScanPage *pages) {
        size_t first = first_vma(vmas, addr);
        int r;

        memset(scanner->quick, 0, sizeof scanner->quick);
        memset(scanner->shared, 0, sizeof scanner->shared);
        r = read_pagemap(scanner, target, addr, vmas, first);
        if (r != 0)
                return r;
        for (size_t v = first; v < vmas->n && vmas->vmas[v].start < addr + BLOCK_BYTES; v++) {
                const Vma *vma = &vmas->vmas[v];
                unsigned from = (unsigned)((MAX_OF(vma->start, addr) - addr) / PAGE_BYTES);
                unsigned to = (unsigned)((MIN_OF(vma->end, addr + BLOCK_BYTES) - addr) / PAGE_BYTES);

                for (unsigned i = from; i < to; i++) {
                        uint64_t entry = scanner->entries[i];
                        ScanPage *p = &pages[i];

                        if (!pagemap_is_anonymous(entry))
                                continue;
                        scanner->stats.pages_scanned++;
                        if (vma->skip != VMA_OK) {
                                scanner->stats.pages_skipped++;
                                continue;
                        }
                        p->kind = SCAN_FAILED; /* until it is known */
                        p->pfn = entry & PAGEMAP_PFN;
                        p->writable_alone = entry & PAGEMAP_EXCLUSIVE;
                        page_set_add(p->writable_alone && !vma->mergeable ? scanner->quick : scanner->shared, i);
                }
        }
        return 0;
}

/* The lowest page of the set from page on; BLOCK_PAGES: none. */
static unsigned next_page(const PageSet set, unsigned page) {
        for (unsigned word = page / 64; word < BLOCK_PAGES / 64; word++) {
                uint64_t bits = set[word];
                if (word == page / 64)
                        bits &= UINT64_MAX << (page % 64);
                if (bits)
                        return word * 64 + (unsigned)__builtin_ctzll(bits);
        }
        return BLOCK_PAGES;
}

#define foreach_page(i, set) \
        for (unsigned i = next_page(set, 0); i < BLOCK_PAGES; i = i + 1 < BLOCK_PAGES ? next_page(set, i + 1) : BLOCK_PAGES)

/* Of the pages on shared frames, those that the pass meets first. A frame that an earlier block was to read and could
 * not is tried again. */
static int find_leaders(Scanner *scanner, const ScanPage *pages) {
        memset(scanner->leaders, 0, sizeof scanner->leaders);
        foreach_page(i, scanner->shared) {
                Frame *frame;

                if (!pages[i].writable_alone) {
                        int r = frame_map_add(&scanner->frames, pages[i].pfn, &frame);
                        if (r < 0)
                                return r;
                        if (frame->tag != FRAME_UNREAD || frame->value == scanner->serial)
                                continue;
                        frame->value = scanner->serial;
                }
                page_set_add(scanner->leaders, i);
        }
        return 0;
}

/* Gets the page flags of the leaders into entries: one call for frames that follow each other. */
static int read_flags(Scanner *scanner, const ScanPage *pages) {
        for (unsigned i = next_page(scanner->leaders, 0); i < BLOCK_PAGES;) {
                unsigned n = 1;
                int r;

                while (i + n < BLOCK_PAGES && page_set_has(scanner->leaders, i + n) && pages[i + n].pfn == pages[i].pfn + n)
                        n++;
                r = scanner_page_flags(scanner, pages[i].pfn, n, scanner->entries + i);
                if (r < 0)
                        return r;
                i = i + n < BLOCK_PAGES ? next_page(scanner->leaders, i + n) : BLOCK_PAGES;
        }
        return 0;
}

/* What the flags alone tell of the leaders; the others go on to be read. */
static void judge_leaders(Scanner *scanner, ScanPage *pages) {
        memset(scanner->careful, 0, sizeof scanner->careful);
        foreach_page(i, scanner->leaders) {
                ScanPage *p = &pages[i];

                if (scanner->entries[i] & KPAGEFLAGS_ZERO_PAGE) {
                        p->kind = SCAN_ZEROPAGE;
                        continue;
                }
                if (scanner->entries[i] & KPAGEFLAGS_KSM) {
                        p->kind = SCAN_KSM;
                        p->key_known = scanner->known && scanner->known(scanner->known_userdata, p->pfn, &p->key);
                        if (p->key_known)
                                continue;
                }
                page_set_add(scanner->careful, i);
        }
}

static void take_content(Scanner *scanner, ScanPage *p, const void *content) {
        bool zero = page_is_zero(content);

        p->key = zero ? scanner->zero_key : hash_page(scanner->secret, content);
        p->key_known = true;
        if (p->kind != SCAN_KSM)
                p->kind = zero ? SCAN_ZERO : SCAN_HASHED;
        scanner->stats.pages_hashed++;
}

static int read_pages(Scanner *scanner, const Target *target, uint64_t addr, const PageSet set, ReaderWay way,
                      ScanPage *pages) {
        uint16_t chosen[READER_PAGES];
        unsigned n = 0, next = next_page(set, 0);

        while (next < BLOCK_PAGES) {
                bool read[READER_PAGES];
                int r;

                for (n = 0; n < READER_PAGES && next < BLOCK_PAGES; n++) {
                        chosen[n] = (uint16_t)next;
                        next = next + 1 < BLOCK_PAGES ? next_page(set, next + 1) : BLOCK_PAGES;
                }
                r = reader_read(target, way, addr, chosen, n, scanner->buffer, read);
                if (r != 0)
                        return r;
                for (unsigned i = 0; i < n; i++)
                        if (read[i])
                                take_content(scanner, &pages[chosen[i]], scanner->buffer + i * PAGE_BYTES);
                        else
                                scanner->stats.read_failures++;
        }
        return 0;
}

/* Notes what the leaders' frames hold, then gives it to the pages that map them too. */
static int share_knowledge(Scanner *scanner, ScanPage *pages) {
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

        foreach_page(i, scanner->leaders) {
                Frame *frame;
                int r;

                if (pages[i].kind == SCAN_FAILED || (pages[i].kind == SCAN_KSM && !pages[i].key_known) ||
                    (pages[i].writable_alone && pages[i].kind != SCAN_KSM))
                        continue;
                r = frame_map_add(&scanner->frames, pages[i].pfn, &frame);
                if (r < 0)
                        return r;
                frame->tag = tags[pages[i].kind];
                frame->value = pages[i].key;
        }
        foreach_page(i, scanner->shared) {
                const Frame *frame;

                if (page_set_has(scanner->leaders, i))
                        continue;
                frame = frame_map_find(&scanner->frames, pages[i].pfn);
                if (!frame)
                        continue;
                pages[i].kind = kinds[frame->tag];
                pages[i].key = frame->value;
                pages[i].key_known = frame->tag != FRAME_UNREAD && frame->tag != FRAME_ZEROPAGE;
        }
        return 0;
}

/* process_vm_readv() goes by number: the process must still have the number, and still the memory that was opened
 * (exec(2) replaces it, and the pagemap of the old one then reads as empty). */
static int check_still_there(const Target *target, uint64_t addr) {
        uint64_t entry;
        ssize_t n = pread(target->pagemapfd, &entry, sizeof entry, (off_t)(addr / PAGE_BYTES * sizeof entry));

        if (n < 0)
                return -errno;
        return n == 0 || !target_alive(target) ? TARGET_E_GONE : 0;
}

/* What is known of 64 pages goes into the block's bitmaps as words. A KSM frame whose content could not be had is known
 * to be one, and no more. */
static void commit_word(Block *block, unsigned word, ScanPage *pages) {
        uint64_t before = block->hashed[word], hashed = 0, zero = 0, merged = 0, zeropage = 0;
        uint8_t *check = block->check + word * 64;

        for (unsigned i = 0; i < 64; i++) {
                ScanPage *p = &pages[word * 64 + i];
                bool was = before >> i & 1, known = p->key_known;
                uint8_t now = known ? (uint8_t)p->key : 0;

                p->first = known && !was;
                p->changed = known && was && check[i] != now;
                check[i] = now;
                hashed |= (uint64_t)known << i;
                zero |= (uint64_t)(p->kind == SCAN_ZERO) << i;
                merged |= (uint64_t)(p->kind == SCAN_KSM) << i;
                zeropage |= (uint64_t)(p->kind == SCAN_ZEROPAGE) << i;
        }
        block->hashed[word] = hashed;
        block->zero[word] = zero;
        block->merged[word] = merged;
        block->zeropage[word] = zeropage;
}

static void commit(Scanner *scanner, Block *block, ScanPage *pages) {
        if (!block->pass)
                block->first_pass = scanner->pass;
        block->pass = scanner->pass;
        for (unsigned word = 0; word < BLOCK_PAGES / 64; word++)
                commit_word(block, word, pages);
}

static int scan_pages(Scanner *scanner, const Target *target, uint64_t addr, const VmaList *vmas, ScanPage *pages) {
        int r;

        scanner->serial++;
        memset(pages, 0, BLOCK_PAGES * sizeof *pages);
        r = look(scanner, target, addr, vmas, pages);
        if (r != 0)
                return r;
        r = find_leaders(scanner, pages);
        if (r < 0)
                return r;
        r = read_flags(scanner, pages);
        if (r < 0)
                return r;
        judge_leaders(scanner, pages);
        r = read_pages(scanner, target, addr, scanner->quick, READER_PINS, pages);
        if (r != 0)
                return r;
        r = read_pages(scanner, target, addr, scanner->careful, READER_KEEPS_SHARING, pages);
        if (r != 0)
                return r;
        r = share_knowledge(scanner, pages);
        if (r < 0)
                return r;
        return check_still_there(target, addr);
}

int scan_block(Scanner *scanner, Block *block, const VmaList *vmas, ScanBatch *ret) {
        int r = scan_pages(scanner, block->space->target, block->addr, vmas, ret->pages);

        if (r != 0)
                return r;
        commit(scanner, block, ret->pages);
        ret->block = block;
        return 0;
}

ScanKind scan_page_again(Scanner *scanner, Target *target, const VmaList *vmas, uint64_t addr, uint64_t *ret_key) {
        const Vma *vma = vma_list_find(vmas, addr);
        uint64_t entry, flags = 0;
        bool read = false;
        ScanPage page = { .kind = SCAN_FAILED };
        uint16_t none = 0;

        if (!vma || vma->skip != VMA_OK)
                return SCAN_NOTHING;
        if (pread(target->pagemapfd, &entry, sizeof entry, (off_t)(addr / PAGE_BYTES * sizeof entry)) != sizeof entry)
                return SCAN_FAILED;
        if (!pagemap_is_anonymous(entry))
                return SCAN_NOTHING;
        if ((vma->mergeable || !(entry & PAGEMAP_EXCLUSIVE)) &&
            scanner_page_flags(scanner, entry & PAGEMAP_PFN, 1, &flags) < 0)
                return SCAN_FAILED;
        if (flags & KPAGEFLAGS_ZERO_PAGE)
                return SCAN_ZEROPAGE;
        if (flags & KPAGEFLAGS_KSM)
                page.kind = SCAN_KSM;
        if (reader_read(target, READER_KEEPS_SHARING, addr, &none, 1, scanner->buffer, &read) != 0 || !read) {
                scanner->stats.read_failures++;
                return SCAN_FAILED;
        }
        take_content(scanner, &page, scanner->buffer);
        *ret_key = page.key;
        return (ScanKind)page.kind;
}
