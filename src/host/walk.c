/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Where there is another NUMA node, move_pages(2) with MPOL_MF_MOVE_ALL makes the kernel do just what is to be
 * measured: it unmaps the page from all its mappings, copies it, and maps it again. With one node nothing moves a page
 * by request. What also visits every mapping of one page, to unmap it, is punching a hole into a file of shared memory:
 * one walk instead of two, but with a TLB flush for each mapping, and its price grows evenly, 0.7 to 1.0 µs a mapping
 * from 128 to 8,192 (Linux 6.18). The difference between many mappings and few leaves out what does not depend on their
 * number. CPU time, and the least of several: others on this machine are no part of the price.
 *
 * KSM. rmap_walk_ksm() goes through all the mappings of the anon_vma of each sharer to find the one that the page is in
 * (mm/ksm.c, 6.18), and marking cuts a mapping into pieces that share their anon_vma. A piece costs a step in an
 * interval tree: an eleventh of what it costs to move the page away from a mapping (tests/guest/sharing, which moves
 * KSM pages on an emulated machine: 8.6 us a mapping, 0.8 us a piece).
 */
#include "host/walk.h"

#include "base/clock.h"

#include <fcntl.h>
#include <linux/falloc.h>
#include <sys/mman.h>
#include <sys/syscall.h>

#define FEW 64U
#define MANY 1024U
#define ROUNDS 5U
#define PIECES_A_MAPPING 11U
#define MPOL_MF_MOVE_ALL 4 /* linux/mempolicy.h */
#define NODES_MAX 64

static void *address(uint8_t *area, unsigned i) { return area + 2 * i * PAGE_BYTES; }

/* n mappings of the one page of fd, with gaps so that each stays one. */
static uint8_t *map_often(int fd, unsigned n) {
        uint8_t *area = mmap(NULL, 2 * n * PAGE_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

        for (unsigned i = 0; area != MAP_FAILED && i < n; i++) {
                if (mmap(address(area, i), PAGE_BYTES, PROT_READ, MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED) {
                        munmap(area, 2 * n * PAGE_BYTES);
                        return NULL;
                }
                (void)*(volatile uint8_t *)address(area, i);
        }
        return area == MAP_FAILED ? NULL : area;
}

/* The node of the page, or -errno; with a node given moves it there first. */
static int page_node(void *page, const int *node) {
        int status = -ENOENT;

        if (syscall(SYS_move_pages, 0, 1UL, &page, node, &status, node ? MPOL_MF_MOVE_ALL : 0) < 0)
                return -errno;
        return status;
}

/* A node that the page can be moved to; -ENODEV. Leaves it there. */
static int other_node(void *page) {
        int here = page_node(page, NULL);

        for (int node = 0; here >= 0 && node < NODES_MAX; node++)
                if (node != here && page_node(page, &node) == node)
                        return here;
        return -ENODEV;
}

/* *ret_moved: how. */
static int measure(unsigned n, uint64_t *ret_nsec, bool *ret_moved) {
        _cleanup_close_ int fd = memfd_create("ksmd-user-walk", MFD_CLOEXEC);
        uint64_t began;
        uint8_t *area;
        int node, r = 0;

        if (fd < 0 || ftruncate(fd, PAGE_BYTES) < 0)
                return -errno;
        area = map_often(fd, n);
        if (!area)
                return -errno;
        node = other_node(address(area, 0));
        began = clock_nsec(CLOCK_THREAD_CPUTIME_ID);
        if (node >= 0)
                r = page_node(address(area, 0), &node) == node ? 0 : -EBUSY;
        else if (fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, (off_t)PAGE_BYTES) < 0)
                r = -errno;
        *ret_nsec = clock_nsec(CLOCK_THREAD_CPUTIME_ID) - began;
        *ret_moved = node >= 0;
        munmap(area, 2 * n * PAGE_BYTES);
        return r;
}

int walk_measure(WalkCost *ret) {
        uint64_t few = UINT64_MAX, many = UINT64_MAX;
        bool moved = false;

        for (unsigned i = 0; i < ROUNDS; i++) {
                uint64_t a, b;
                int r = measure(FEW, &a, &moved);

                if (r == 0)
                        r = measure(MANY, &b, &moved);
                if (r < 0)
                        return r;
                few = MIN_OF(few, a);
                many = MIN_OF(many, b);
        }
        *ret = (WalkCost){ .mapping_nsec = many > few ? MAX_OF((many - few) / (MANY - FEW), (uint64_t)1) : 1,
                           .moved = moved };
        return 0;
}

uint32_t walk_limit(const WalkCost *cost, uint64_t latency_nsec, uint64_t pieces) {
        uint64_t nsec = cost->mapping_nsec + cost->mapping_nsec * pieces / PIECES_A_MAPPING;
        uint64_t limit = latency_nsec / MAX_OF(nsec, (uint64_t)1);

        limit = MAX_OF(limit, (uint64_t)2);
        return (uint32_t)MIN_OF(limit, (uint64_t)INT32_MAX);
}
