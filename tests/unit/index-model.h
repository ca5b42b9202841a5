/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

/* What the tests of the index share: random numbers (random.h), and memory that runs out on command. The programs are
 * linked with --wrap for what src/index/array.c and the trees allocate by. */

#include "random.h"
#include "test.h"

#include "index/array.h"

#include <setjmp.h>
#include <stdarg.h>
#include <sys/mman.h>

#include <cmocka.h>

/* Allocations until memory runs out, and for how many it stays so; what was asked for so far. */
static size_t fail_after = SIZE_MAX, fail_for = SIZE_MAX, n_allocations, n_failed;

static inline bool allocation_fails(void) {
        size_t i = n_allocations++;
        if (i < fail_after || i - fail_after >= fail_for)
                return false;
        n_failed++;
        return true;
}

static inline void fail_never(void) {
        fail_after = fail_for = SIZE_MAX;
}

/* mmap() is mmap64() here (_FILE_OFFSET_BITS=64). */
void *__real_mmap64(void *p, size_t size, int prot, int flags, int fd, off_t offset);
void *__wrap_mmap64(void *p, size_t size, int prot, int flags, int fd, off_t offset);
void *__wrap_mmap64(void *p, size_t size, int prot, int flags, int fd, off_t offset) {
        if (allocation_fails()) {
                errno = ENOMEM;
                return MAP_FAILED;
        }
        return __real_mmap64(p, size, prot, flags, fd, offset);
}

void *__real_mremap(void *p, size_t old_size, size_t size, int flags);
void *__wrap_mremap(void *p, size_t old_size, size_t size, int flags);
void *__wrap_mremap(void *p, size_t old_size, size_t size, int flags) {
        if (allocation_fails()) {
                errno = ENOMEM;
                return MAP_FAILED;
        }
        return __real_mremap(p, old_size, size, flags);
}

void *__real_calloc(size_t n, size_t size);
void *__wrap_calloc(size_t n, size_t size);
void *__wrap_calloc(size_t n, size_t size) {
        return allocation_fails() ? NULL : __real_calloc(n, size);
}

/* Pages of the mapping that have memory behind them. */
static inline size_t resident_bytes(const Array *array) {
        static unsigned char vec[1 << 16];
        size_t n = 0, pages = array->reserved / PAGE_BYTES;
        if (pages == 0)
                return 0;
        assert_true(pages <= sizeof vec);
        assert_int_equal(mincore(array->data, array->reserved, vec), 0);
        for (size_t i = 0; i < pages; i++)
                n += vec[i] & 1;
        return n * PAGE_BYTES;
}

/* The array is so long, and the kernel has lent no more than it says. */
static inline void array_check(const Array *array, size_t used) {
        assert_int_equal(array->used, used);
        assert_in_range(array->held, used, array->reserved);
        assert_in_range(resident_bytes(array), 0, array->held);
}

/* Together they hold little more than they need. */
static inline void arrays_check(const Arrays *all) {
        size_t used = 0, held = 0;

        for (const Array *array = all->first; array; array = array->next) {
                used += array->used;
                held += array->held;
        }
        assert_int_equal(all->used, used);
        assert_int_equal(all->held, held);
        /* what was shrunk away is bounded by array_shrink(); growing adds less than a piece to each */
        assert_in_range(held - used, 0, 2 * arrays_slack(all) + used / 15);
}
