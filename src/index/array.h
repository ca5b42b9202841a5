/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "base/util.h"

/*
 * Memory for the index: arrays that grow and shrink at their end, each a mapping of its own.
 *
 * Hashing scatters the entries of one process over the whole index, so when it leaves, every page of memory gets holes
 * and hardly one becomes empty: a common allocator could give nothing back. So all that the index keeps lies in dense
 * arrays, whose last element moves into a hole, and what is behind the end goes back to the kernel. The memory held
 * follows the content, upwards and downwards, and no fragmentation builds up over the months a daemon runs.
 *
 * Growing never copies: address space is asked for with room to spare, and when that is used up mremap(2) moves the
 * page tables (60 us for 128 MiB). So pointers into an array die when that array grows, but not when it shrinks.
 */
typedef struct Array {
        uint8_t *data;
        size_t held;            /* bytes from the start that may have physical memory behind them */
        size_t reserved;        /* bytes of address space */
} Array;

#define ARRAY_SLACK_BYTES (2 * PAGE_BYTES)

int array_extend(Array *array, size_t bytes);
void array_trim(Array *array, size_t bytes);
void array_done(Array *array);

/* Makes room for so many bytes in all; what is new is zero or what was there before. -ENOMEM: as before. */
static inline int array_grow(Array *array, size_t bytes) {
        return __builtin_expect(bytes <= array->held, true) ? 0 : array_extend(array, bytes);
}

/* Only so many bytes are needed any longer. Some slack stays, lest a size that swings costs system calls. */
static inline void array_shrink(Array *array, size_t bytes) {
        if (__builtin_expect(array->held - bytes > ARRAY_SLACK_BYTES + array->held / 8, false))
                array_trim(array, bytes);
}
