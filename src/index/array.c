/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * No huge pages: a fault that takes one clears 2 MiB, may compact memory for it first, or waits for a hypervisor to
 * back it (measured: 4.4 ms), and what was given back in its middle would not come back to the kernel. They would save
 * a tenth of a look-up (28 ns to 25 at 10 million entries), since translations are fetched ahead like the data.
 */

#include "index/array.h"

#include <sys/mman.h>

/* Address space is reserved in multiples of this. */
#define RESERVED_MIN ((size_t)64 * 1024)
/* Memory is taken in pieces that grow with the array up to this: a fault for each page costs several times as much
 * (bench-index, 10 million entries in 16 trees, a guest of PVM: 192 ns for an insertion, 147 so). */
#define PIECE_MAX RESERVED_MIN
#define PIECE_SHARE 32U
/* And of one that is expected to grow at least so much: a fault for each page of a young index was a tenth of a first
 * pass there (11 us a page, 7 in pieces of four). */
#define PIECE_EXPECTED (4 * PAGE_BYTES)

static size_t round_up(size_t n, size_t to) {
        return DIV_ROUND_UP(n, to) * to;
}

void array_init(Array *array, Arrays *all) {
        *array = (Array){ .all = all, .next = all->first };
        all->first = array;
}

static size_t piece_bytes(const Array *array) {
        size_t piece = array->all->expecting ? PIECE_EXPECTED : PAGE_BYTES;

        while (piece < PIECE_MAX && piece * 2 <= array->held / PIECE_SHARE)
                piece *= 2;
        return piece;
}

static void set_held(Array *array, size_t bytes) {
        array->all->held -= array->held;
        array->held = bytes;
        array->all->held += bytes;
}

static int reserve(Array *array, size_t want) {
        void *p = array->data ? mremap(array->data, array->reserved, want, MREMAP_MAYMOVE)
                              : mmap(NULL, want, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

        if (p == MAP_FAILED)
                return -ENOMEM;
        /* Advice only: a kernel without huge pages refuses, and nothing is lost. */
        if (!array->data)
                (void)madvise(p, want, MADV_NOHUGEPAGE);
        array->data = p;
        array->reserved = want;
        return 0;
}

int array_extend(Array *array, size_t bytes) {
        int r = bytes > array->reserved ? reserve(array, round_up(2 * bytes, RESERVED_MIN)) : 0;

        if (r < 0)
                return r;
        size_t hold = round_up(bytes, piece_bytes(array)), more = hold - array->held;
        /* A kernel that cannot (before 5.14) has a fault for each as it is used. */
        if (more > PAGE_BYTES && more <= PIECE_MAX)
                (void)madvise(array->data + array->held, more, MADV_POPULATE_WRITE);
        set_held(array, hold);
        return 0;
}

static void array_trim(Array *array) {
        size_t keep = round_up(array->used + array->held / 64, PAGE_BYTES);

        if (keep >= array->held || madvise(array->data + keep, array->held - keep, MADV_DONTNEED) < 0)
                return;
        set_held(array, keep);

        size_t reserve = MAX_OF(round_up(2 * keep, RESERVED_MIN), RESERVED_MIN);
        if (reserve <= array->reserved / 2 && munmap(array->data + reserve, array->reserved - reserve) >= 0)
                array->reserved = reserve;
}

void array_expect(Array *array, size_t more) {
        size_t want = round_up(array->used + more, RESERVED_MIN);

        if (want > array->reserved)
                (void)reserve(array, want);
}

void arrays_trim(Arrays *all) {
        for (Array *array = all->first; array; array = array->next)
                array_trim(array);
}

void arrays_expect(Arrays *all, bool more) {
        if (all->expecting && !more)
                arrays_trim(all);
        all->expecting = more;
}

void array_done(Array *array) {
        if (array->data)
                munmap(array->data, array->reserved);
}
