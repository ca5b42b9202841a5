/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "scan/pagemap.h"
#include "scan/scan.h"
#include "scan/stripes.h"

/* What scanner.c and scan.c share: the inside of a Scanner. */

/* Some of a batch's pages, in its order. */
typedef struct ScanList {
        unsigned n;
        uint16_t places[SCAN_BATCH_PAGES]; /* in the batch */
        uint64_t addrs[SCAN_BATCH_PAGES];
} ScanList;

/* What one thread works with. Nothing here is another thread's business. */
typedef struct ScanDesk {
        uint8_t *buffer;        /* READER_PAGES pages */
        uint64_t serial;        /* of the batch being scanned; thread + 1 modulo the number of threads: nobody else's */
        ScanStats stats;
        ScanList quick;         /* to be read by READER_PINS */
        ScanList shared;        /* on a frame that others may map too, or in a mergeable mapping: */
        ScanList leaders;       /* the first to map their frame, */
        ScanList followers;     /* and the others */
        ScanList careful;       /* of leaders: to be read by READER_KEEPS_SHARING */
        uint64_t entries[SCAN_BATCH_PAGES]; /* of pagemap, then the leaders' page flags */
} ScanDesk;

struct Scanner {
        const HashSecret *secret;
        ScanKnownFrame known;
        void *known_userdata;
        FrameStripes *frames;   /* met in this pass */
        uint64_t zero_key;
        int kpageflagsfd;
        uint32_t pass;
        unsigned n_desks;
        ScanDesk *desks[];      /* by thread */
};

/* Names what was read of a page: its key, and its kind unless it is SCAN_KSM. */
void scanner_take_content(const Scanner *scanner, ScanDesk *desk, ScanPage *p, const void *content);
