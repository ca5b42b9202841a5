/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What MADV_UNMERGEABLE does to a merged page (a copy of its own for the process) a read of it from outside does too: a
 * pin for reading on an anonymous page that is not the process's alone first gives it one (gup_must_unshare(), since
 * 5.19). Elsewhere that is what the scanner has to avoid; here it is wanted, for the process need not stand while it is
 * done. One under load had a quarter of its throughput while 370 MiB were taken apart by madvise(2) made in it,
 * for 3.8 s (docs/route-advise.md).
 *
 * It would un-share what relatives share by fork as well, which costs memory that nobody asked back. So the frame is looked
 * up first. Between that look and the read the page may have become another one; then one page is copied that would
 * have been copied by the next write.
 */
#include "merge/unshare.h"

#include "host/pagemap.h"
#include "scan/reader.h"

#include <string.h>

/* Looked up at a time, and read. */
#define LOOK_PAGES 512U
#define READ_PAGES 16U

typedef struct Found {
        uint64_t addrs[LOOK_PAGES], pfns[LOOK_PAGES];
        unsigned n;
} Found;

/* The anonymous pages: all of them may be merged, for a frame of KSM's may be mapped once, too. */
static int find_anonymous(const Target *target, uint64_t start, size_t n_pages, Found *ret) {
        uint64_t entries[LOOK_PAGES];
        size_t n = 0;
        int r = target_read_pagemap(target, start, n_pages, entries, &n);

        if (r != 0)
                return r;
        for (size_t i = 0; i < n; i++)
                if (pagemap_is_anonymous(entries[i]) && entries[i] & PAGEMAP_PFN) {
                        ret->addrs[ret->n] = start + i * PAGE_BYTES;
                        ret->pfns[ret->n++] = entries[i] & PAGEMAP_PFN;
                }
        return 0;
}

/* Keeps those on frames of KSM's. */
static void keep_merged(int kpageflagsfd, Found *found) {
        unsigned kept = 0;

        for (unsigned i = 0, n; i < found->n; i += n) {
                uint64_t flags[LOOK_PAGES];

                for (n = 1; i + n < found->n && found->pfns[i + n] == found->pfns[i] + n; n++)
                        ;
                if (pagemap_read_entries(kpageflagsfd, found->pfns[i], n, flags) < 0)
                        continue;
                for (unsigned j = 0; j < n; j++)
                        if (flags[j] & KPAGEFLAGS_KSM)
                                found->addrs[kept++] = found->addrs[i + j];
        }
        found->n = kept;
}

/* Until one cannot be read. */
static int read_all(const Target *target, const Found *found) {
        uint8_t content[READ_PAGES * PAGE_BYTES];
        bool read[READ_PAGES];
        int r = 0;

        for (unsigned done = 0, n; done < found->n && r == 0; done += n) {
                n = MIN_OF(found->n - done, READ_PAGES);
                /* By number: it must still be the one. */
                r = target_alive(target) ? reader_read(target, READER_PINS, found->addrs + done, n, content, read) :
                                           TARGET_E_GONE;
                if (r == 0 && memchr(read, false, n))
                        r = -ENOMEM; /* or it went away: not tried page by page, for each try reclaims what it can */
        }
        return r;
}

uint64_t unshare_merged(Target *target, int kpageflagsfd, uint64_t start, uint64_t end) {
        uint64_t sum = 0;
        int r = 0;

        if (kpageflagsfd < 0 || (target->pagemapfd < 0 && target_open_memory(target) != 0))
                return 0;
        for (uint64_t at = start, bytes; at < end && r == 0; at += bytes) {
                Found found = { .n = 0 };

                bytes = MIN_OF(end - at, LOOK_PAGES * PAGE_BYTES);
                r = find_anonymous(target, at, bytes / PAGE_BYTES, &found);
                keep_merged(kpageflagsfd, &found);
                if (r == 0)
                        r = read_all(target, &found);
                sum += found.n;
        }
        return sum;
}
