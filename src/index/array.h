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
typedef struct Array Array;

/* All the arrays of a tree: what one does not use at the moment may be as much as is fair for all of them, so that
 * sizes that swing against each other, as those of a growing hash table do, cost no system calls. */
typedef struct Arrays {
        Array *first;
        size_t used, held;      /* bytes, sums over the arrays */
        bool expecting;         /* they are growing: memory is taken in larger pieces */
} Arrays;

struct Array {
        uint8_t *data;
        size_t used;            /* bytes */
        size_t held;            /* bytes from the start that may have physical memory behind them */
        size_t reserved;        /* bytes of address space */
        Arrays *all;
        Array *next;
};

/* What is not used goes back when it is more than a sixteenth of all and this, which covers a part of a page for every
 * array that a tree of hashes uses. */
#define ARRAYS_SLACK_BYTES (10 * PAGE_BYTES)
#define ARRAYS_SLACK_EXPECTING_BYTES (4 * ARRAYS_SLACK_BYTES)

static inline size_t arrays_slack(const Arrays *all) {
        return all->expecting ? ARRAYS_SLACK_EXPECTING_BYTES : ARRAYS_SLACK_BYTES;
}

void array_init(Array *array, Arrays *all);
void array_done(Array *array); /* together with all the others */

/* The array may soon be so many bytes longer: address space for them is asked for at once. Each time that page tables
 * are moved costs a flush of the TLB, and all that was there is touched anew. Pointers into the array die. */
void array_expect(Array *array, size_t more);
/* true: they are going to grow. false: they have grown, and what is not used goes back. */
void arrays_expect(Arrays *all, bool more);

int array_extend(Array *array, size_t bytes);
void arrays_trim(Arrays *all);

/* Makes room for the array to grow to so many bytes: until something shrinks, that cannot fail. -ENOMEM: as before. */
static inline int array_reserve(Array *array, size_t bytes) {
        return __builtin_expect(bytes <= array->held, true) ? 0 : array_extend(array, bytes);
}

/* Makes the array longer; what is new is zero or what was there before. -ENOMEM: as before. */
static inline int array_grow(Array *array, size_t used) {
        int r = array_reserve(array, used);

        if (r < 0)
                return r;
        array->all->used += used - array->used;
        array->used = used;
        return 0;
}

static inline void array_shrink(Array *array, size_t used) {
        Arrays *all = array->all;

        all->used -= array->used - used;
        array->used = used;
        if (__builtin_expect(all->held - all->used > arrays_slack(all) + all->held / 16, false))
                arrays_trim(all);
}
