/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The scanner itself, and its looks at single pages and frames. Batches are in scan.c.
 */
#include "scan/scanner.h"

#include "scan/reader.h"

#include <fcntl.h>
#include <stdalign.h>
#include <string.h>

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

int scanner_new(const HashSecret *secret, unsigned n_threads, Scanner **ret) {
        static const uint8_t zero[PAGE_BYTES];
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
        r = frame_stripes_new(&scanner->frames);
        if (r < 0)
                return r;
        scanner->threads = aligned_alloc(alignof(ScanThread), n_threads * sizeof *scanner->threads);
        if (!scanner->threads)
                return -ENOMEM;
        for (scanner->n_threads = 0; scanner->n_threads < n_threads; scanner->n_threads++)
                scanner->threads[scanner->n_threads] = (ScanThread) { .serial = scanner->n_threads + 1 };
        scanner->zero_key = hash_page(secret, zero);
        *ret = TAKE_PTR(scanner);
        return 0;
}

Scanner *scanner_free(Scanner *scanner) {
        if (!scanner)
                return NULL;
        free(scanner->threads);
        frame_stripes_free(scanner->frames);
        safe_close(scanner->kpageflagsfd);
        free(scanner);
        return NULL;
}

void scanner_begin_pass(Scanner *scanner, uint32_t pass) {
        frame_stripes_clear(scanner->frames);
        scanner->pass = pass;
}

void scanner_set_known_frames(Scanner *scanner, ScanKnownFrame known, void *userdata) {
        scanner->known = known;
        scanner->known_userdata = userdata;
}

void scanner_stats(const Scanner *scanner, ScanStats *ret) {
        *ret = (ScanStats) {};
        for (unsigned i = 0; i < scanner->n_threads; i++) {
                const ScanStats *stats = &scanner->threads[i].stats;

                ret->pages_scanned += stats->pages_scanned;
                ret->pages_hashed += stats->pages_hashed;
                ret->pages_skipped += stats->pages_skipped;
                ret->read_failures += stats->read_failures;
        }
}

uint64_t scanner_zero_key(const Scanner *scanner) { return scanner->zero_key; }

int scanner_page_flags(const Scanner *scanner, uint64_t pfn, unsigned n, uint64_t *ret) {
        return pagemap_read_entries(scanner->kpageflagsfd, pfn, n, ret);
}

void scanner_take_content(const Scanner *scanner, ScanThread *thread, ScanPage *p, const void *content) {
        bool zero = page_is_zero(content);

        p->key = zero ? scanner->zero_key : hash_page(scanner->secret, content);
        p->key_known = true;
        if (p->kind != SCAN_KSM)
                p->kind = zero ? SCAN_ZERO : SCAN_HASHED;
        thread->stats.pages_hashed++;
}

static int read_entry(const Target *target, uint64_t addr, uint64_t *ret) {
        size_t n;

        return target_read_pagemap(target, addr, 1, ret, &n);
}

int scan_page_frame(const Block *block, unsigned page, uint64_t *ret_pfn) {
        uint64_t entry;
        int r = read_entry(block->space->target, block->addr + page * PAGE_BYTES, &entry);

        if (r != 0)
                return r;
        *ret_pfn = pagemap_is_anonymous(entry) ? entry & PAGEMAP_PFN : 0;
        return 0;
}

int scan_block_frames(const Block *block, uint64_t ret_pfns[static BLOCK_PAGES], PageSet ret_alone) {
        size_t n;
        int r = target_read_pagemap(block->space->target, block->addr, BLOCK_PAGES, ret_pfns, &n);

        if (r != 0)
                return r;
        if (n != BLOCK_PAGES)
                return TARGET_E_GONE;
        memset(ret_alone, 0, sizeof(PageSet));
        for (unsigned i = 0; i < BLOCK_PAGES; i++) {
                uint64_t entry = ret_pfns[i];

                ret_pfns[i] = pagemap_is_anonymous(entry) ? entry & PAGEMAP_PFN : 0;
                if (ret_pfns[i] != 0 && entry & PAGEMAP_EXCLUSIVE)
                        page_set_add(ret_alone, i);
        }
        return 0;
}

ScanKind scan_page_again(Scanner *scanner, Target *target, const VmaList *vmas, uint64_t addr, uint64_t *ret_key) {
        ScanThread *thread = &scanner->threads[0];
        const Vma *vma = vma_list_find(vmas, addr);
        uint64_t entry, flags = 0;
        uint8_t content[PAGE_BYTES];
        bool read = false;
        ScanPage page = { .kind = SCAN_FAILED };

        if (!vma || vma->skip != VMA_OK)
                return SCAN_NOTHING;
        if (read_entry(target, addr, &entry) != 0)
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
        if (reader_read(target, READER_KEEPS_SHARING, &addr, 1, content, &read) != 0 || !read) {
                thread->stats.read_failures++;
                return SCAN_FAILED;
        }
        scanner_take_content(scanner, thread, &page, content);
        *ret_key = page.key;
        return (ScanKind)page.kind;
}
