/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "base/util.h"

#include <unistd.h>

/*
 * Entries of /proc/PID/pagemap (Documentation/admin-guide/mm/pagemap.rst) and of /proc/kpageflags
 * (include/uapi/linux/kernel-page-flags.h), as far as we look at them.
 */
#define PAGEMAP_PRESENT ((uint64_t)1 << 63)
#define PAGEMAP_FILE ((uint64_t)1 << 61)        /* a file's page, or shared anonymous memory */
#define PAGEMAP_EXCLUSIVE ((uint64_t)1 << 56)   /* mapped once; says nothing of KSM: a KSM frame may be mapped once */
#define PAGEMAP_PFN (((uint64_t)1 << 55) - 1)   /* 0 without CAP_SYS_ADMIN */

#define KPAGEFLAGS_KSM ((uint64_t)1 << 21)
#define KPAGEFLAGS_ZERO_PAGE ((uint64_t)1 << 24)

/* Entries first … first + n of such a file. -ENODATA: it has not so many; -errno. */
static inline int pagemap_read_entries(int fd, uint64_t first, size_t n, uint64_t *ret) {
        size_t size = n * sizeof *ret;
        ssize_t got = pread(fd, ret, size, (off_t)(first * sizeof *ret));

        if (got < 0)
                return -errno;
        return (size_t)got == size ? 0 : -ENODATA;
}

/* Whether the entry is of an anonymous page (or of the shared zero page, which looks the same). */
static inline bool pagemap_is_anonymous(uint64_t entry) {
        return (entry & (PAGEMAP_PRESENT | PAGEMAP_FILE)) == PAGEMAP_PRESENT;
}

/* Whether it is of a file's page, which a private mapping of the file shows until it is written. */
static inline bool pagemap_is_files(uint64_t entry) {
        return (entry & (PAGEMAP_PRESENT | PAGEMAP_FILE)) == (PAGEMAP_PRESENT | PAGEMAP_FILE);
}
