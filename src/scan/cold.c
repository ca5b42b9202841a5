/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * process_madvise(MADV_COLD) (Linux 5.10): takes the marks of use off pages and puts active ones on the inactive list,
 * where reclaim looks first. Both readers leave such marks (PG_referenced by FOLL_TOUCH, mm/gup.c), and smaps shows
 * them as Referenced.
 *
 * When a mapping counts as cold. Nothing but reclaim ever takes marks off, so memory that was just written is all
 * Referenced, whatever becomes of it; only where reclaim has passed since does Referenced tell use from disuse, and
 * there a mapping in use is soon far above a sixteenth. smaps has one number for a mapping, so what is used of a cold
 * one is put back with the rest: at most a sixteenth, once, and marked as used again by its next use. The error in the
 * other direction, of a mapping that is partly cold and left to look hot, costs one round of reclaim.
 *
 * Huge pages. MADV_COLD on a part of a huge page splits it; on all of it, it does not. A huge page is mapped as such
 * only where one mapping covers the whole block, so ranges that are whole blocks cut at the ends of mappings never name
 * a part of one. They have to arrive so, too: the kernel silently shortens the ranges of one call to 2 GiB less a page
 * (import_iovec()). So a call is given less, cut between blocks.
 *
 * What stays looking used: pages that others map too, since the kernel leaves these alone here (a KSM page is never
 * read by us, a frame shared by fork is read once for all its mappings); and those that wait in another CPU's batch on
 * their way to a list, 31 a CPU at most.
 */
#include "scan/cold.h"

#include <limits.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>

#define COLD_SHARE 16U
/* The mmap lock of the target is held for this much at a time. A multiple of BLOCK_BYTES. */
#define CALL_BYTES (16 * BLOCK_BYTES)

void cold_list_done(ColdList *list) {
        free(list->ranges);
        *list = (ColdList){};
}

bool cold_before(const Vma *vma) {
        return vma->rss_bytes > 0 && vma->referenced_bytes <= vma->rss_bytes / COLD_SHARE;
}

int cold_collect(ColdList *list, const VmaList *vmas, uint64_t block_addr) {
        uint64_t block_end = block_addr + BLOCK_BYTES;

        for (size_t i = vma_list_first(vmas, block_addr); i < vmas->n && vmas->vmas[i].start < block_end; i++) {
                const Vma *vma = &vmas->vmas[i];
                uint64_t start = MAX_OF(vma->start, block_addr), end = MIN_OF(vma->end, block_end);

                if (vma->skip != VMA_OK || !cold_before(vma))
                        continue;
                if (list->n && list->ranges[list->n - 1].end == start) {
                        list->ranges[list->n - 1].end = end;
                        continue;
                }
                if (GROW(list->ranges, list->n, list->allocated) < 0)
                        return -ENOMEM;
                list->ranges[list->n++] = (ColdRange){ start, end };
        }
        return 0;
}

/* Fills vectors for one call with what is left from *range on, in that from *at on (0: its start); moves both on. */
static size_t next_call(const ColdRange *ranges, size_t n_ranges, size_t *range, uint64_t *at, struct iovec *vectors) {
        uint64_t left = CALL_BYTES;
        size_t n = 0;

        while (*range < n_ranges && n < IOV_MAX && left >= BLOCK_BYTES) {
                uint64_t start = MAX_OF(*at, ranges[*range].start);
                uint64_t cut = (start & ~(BLOCK_BYTES - 1)) + (left & ~(BLOCK_BYTES - 1));
                uint64_t end = MIN_OF(ranges[*range].end, cut);

                vectors[n++] = (struct iovec){ (void *)(uintptr_t)start, end - start };
                left -= end - start;
                *at = end;
                if (end == ranges[*range].end) {
                        ++*range;
                        *at = 0;
                }
        }
        return n;
}

/* The call ends at the first range it cannot do, and says how many bytes came before that one. */
static int advise_cold(const Target *target, struct iovec *vectors, size_t n) {
        for (size_t i = 0; i < n;) {
                long done = syscall(SYS_process_madvise, target->pidfd, vectors + i, n - i, MADV_COLD, 0U);

                if (done < 0) {
                        if (errno == ESRCH)
                                return TARGET_E_GONE;
                        if (errno != ENOMEM && errno != EINVAL)
                                return -errno;
                        done = 0;
                }
                for (; i < n && (size_t)done >= vectors[i].iov_len; i++)
                        done -= (long)vectors[i].iov_len;
                i++;
        }
        return 0;
}

int cold_restore(const Target *target, const ColdRange *ranges, size_t n) {
        struct iovec vectors[IOV_MAX];
        uint64_t at = 0;
        size_t n_vectors;

        for (size_t range = 0; (n_vectors = next_call(ranges, n, &range, &at, vectors)) > 0;) {
                int r = advise_cold(target, vectors, n_vectors);
                if (r != 0)
                        return r;
        }
        return 0;
}
