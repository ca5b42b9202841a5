/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "scan/track.h"
#include "target/remote.h"
#include "tests/test.h"

/*
 * What the tests of scan/track share: a process that does what it is told, adopted and tracked as the daemon does it,
 * and what is reported of it as a set of pages. The process is a fork, so an order is a function.
 */
#define MIB ((uint64_t)1 << 20)
#define GIB ((uint64_t)1 << 30)

typedef struct Child {
        pid_t pid;
        int to, from;
        Target *target;
        Track *track;
        VmaList vmas;
} Child;

/* What the parent and all children see. The area is what most tests are about: private memory of the child. */
typedef struct Shared {
        uint64_t start, pages;
        uint64_t seed;          /* which pages are picked */
        unsigned permille;      /* how many */
        unsigned uid;           /* whom a child becomes; 0: stays root */
        bool user_namespace, docker_filter;
        uint64_t stop;          /* running threads are to end */
        uint64_t counters[16];
} Shared;
extern Shared *shared;
extern Remote *remote;

void track_test_begin(void);    /* the above; skips where there is nothing to test */
void track_test_end(void);

Child child_start(void);
Child child_of(pid_t pid);      /* of a process that is already there and takes no orders */
long child_order(const Child *child, long (*run)(long), long argument);
void child_begin_order(const Child *child, long (*run)(long), long argument); /* the same, in two halves */
long child_end_order(const Child *child);
/* remote_adopt(), again while a machine that is busy keeps it from being stopped. */
void child_take(Child *child, int *ret_uffd, TargetSkip *ret_skip);
void child_adopt(Child *child);
void child_update(Child *child);        /* reads the mappings, claims, updates */
void child_read_vmas(Child *child);
void child_stop(Child *child);
size_t child_count_mappings(const Child *child);

typedef struct Pages {
        TrackRanges written;
        size_t count;
} Pages;
Pages child_written(Child *child, uint64_t start, uint64_t end, bool protect);
size_t child_count_written(Child *child, uint64_t start, uint64_t end);
bool pages_have(const Pages *pages, uint64_t addr);

static inline uint64_t area_page(uint64_t page) { return shared->start + page * PAGE_BYTES; }
static inline uint64_t area_end(void) { return area_page(shared->pages); }

/* Orders. */
#define ORDER_MAP_ROOM (128 * MIB)
long order_map(long bytes);             /* without huge pages; with room before and behind; the area from now on */
long order_map_huge(long bytes);        /* aligned to 2 MiB, advised; the area from now on */
long order_write_picked(long unused);   /* adds 1 to the first byte of each page that is picked */
bool is_picked(uint64_t page);

/* A child with an area of its own, all of it written, adopted, and everything reported once. */
Child child_tracked(uint64_t pages);
