/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * No huge pages: a fault that takes one clears 2 MiB, may compact memory for it first, or waits for a hypervisor to
 * back it (measured: 4.4 ms), and what was given back in its middle would not come back to the kernel. They would save
 * a tenth of a look-up's wait at most, since the translations are fetched ahead like the data.
 */

#include "index/array.h"

#include <sys/mman.h>

#define RESERVED_MIN ((size_t)64 * 1024)

static size_t round_up(size_t n, size_t to) {
        return DIV_ROUND_UP(n, to) * to;
}

int array_extend(Array *array, size_t bytes) {
        if (bytes > array->reserved) {
                size_t want = round_up(bytes + bytes / 2, RESERVED_MIN);
                void *p = array->data ? mremap(array->data, array->reserved, want, MREMAP_MAYMOVE)
                                      : mmap(NULL, want, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
                if (p == MAP_FAILED)
                        return -ENOMEM;
                /* Advice only: a kernel without huge pages refuses, and nothing is lost. */
                if (!array->data)
                        (void)madvise(p, want, MADV_NOHUGEPAGE);
                array->data = p;
                array->reserved = want;
        }
        array->held = round_up(bytes, PAGE_BYTES);
        return 0;
}

void array_trim(Array *array, size_t bytes) {
        size_t keep = round_up(bytes + ARRAY_SLACK_BYTES / 2 + array->held / 32, PAGE_BYTES);

        if (madvise(array->data + keep, array->held - keep, MADV_DONTNEED) < 0)
                return;
        array->held = keep;

        size_t reserve = round_up(keep + keep / 2, RESERVED_MIN);
        if (reserve <= array->reserved / 2 && munmap(array->data + reserve, array->reserved - reserve) >= 0)
                array->reserved = reserve;
}

void array_done(Array *array) {
        if (array->data)
                munmap(array->data, array->reserved);
        *array = (Array){};
}
