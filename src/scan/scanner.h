/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "host/pagemap.h"
#include "scan/scan.h"
#include "scan/stripes.h"

/* What scanner.c and scan.c share: the inside of a Scanner. */

/* What a thread keeps from batch to batch. */
typedef struct ScanThread {
        uint64_t serial;        /* of its current batch; thread + 1 modulo the number of threads: nobody else's */
        ScanStats stats;
} __attribute__((aligned(128))) ScanThread; /* no cache line, nor the one fetched along with it, is two threads' */

struct Scanner {
        const HashSecret *secret;
        ScanKnownFrame known;
        void *known_userdata;
        FrameStripes *frames;   /* met in this pass */
        uint64_t zero_key;
        int kpageflagsfd;
        uint32_t pass;
        unsigned n_threads;
        ScanThread *threads;
};

/* Names what was read of a page: its key, and its kind unless it is SCAN_KSM. */
void scanner_take_content(const Scanner *scanner, ScanThread *thread, ScanPage *p, const void *content);
