/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "target/target.h"

/*
 * What was cold before we read it is cold afterwards. Reading a page makes it look used to reclaim, so on a host that
 * swaps (host_has_swap()), what was read for the first time in a mapping that the process itself had left alone is put
 * back: collect after the last read, with the list of mappings that was read before the first; then restore.
 */
typedef struct ColdRange {
        uint64_t start, end;    /* bytes, page-aligned: whole blocks, as far as their mapping goes */
} ColdRange;

typedef struct ColdList {
        ColdRange *ranges;      /* by address, if blocks were collected so */
        size_t n, allocated;
} ColdList;

void cold_list_done(ColdList *list);

/* Next to nothing of the mapping was used since reclaim last looked at it. */
bool cold_before(const Vma *vma);

/* Adds what of the block of BLOCK_BYTES lies in mappings that are read and were cold. 0, -ENOMEM. */
int cold_collect(ColdList *list, const VmaList *vmas, uint64_t block_addr);

/* Lets the ranges look unused again, as far as that goes: what was unmapped or locked meanwhile, and pages that others
 * map too, are passed over. TARGET_E_GONE; -ENOSYS: Linux before 5.10; -EPERM: without CAP_SYS_NICE; -errno. */
int cold_restore(const Target *target, const ColdRange *ranges, size_t n);
