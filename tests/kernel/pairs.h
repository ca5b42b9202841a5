/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "host/ksm.h"
#include "host/pagemap.h"

#include <sys/types.h>

/*
 * Pairs of processes that share frames at PAIR_AREA: by fork, or merged by KSM. Whether a reader took them apart shows
 * in the frames that the pages lie on before and after.
 */
#define PAIR_PAGES 1024U
#define PAIR_BYTES (PAIR_PAGES * PAGE_BYTES)
#define PAIR_ZEROS 100U         /* of the forked pair's pages: all zero */
#define PAIR_ALONE 200U         /* of the merged pair's pages: written by one side after merging */

typedef struct Pair {
        pid_t pids[2];
        volatile int stages[2];
        uint64_t frames[2][PAIR_PAGES];
} Pair;

/* KSM, locked for this test alone; ends it as skipped where there is none, or where it is not root's. */
Ksm *pairs_ksm(const char *test);
uint8_t *pair_area(void);       /* a multiple of BLOCK_BYTES, the same in all processes forked from here */
void pairs_start(Ksm *ksm, Pair **ret_forked, Pair **ret_merged); /* the KSM lock must be held */

void pair_remember(Pair *pair); /* where its pages are */
unsigned pair_count_moved(const Pair *pair); /* of 2 * PAIR_PAGES: pages that lie on another frame than then */
