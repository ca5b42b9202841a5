/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "keeper/keeper.h"
#include "merge/pool.h"
#include "track-child.h"

/*
 * What the tests of pool, guard and keeper share: a child that maps pool pages over an area of its own and makes its
 * userfaultfds itself, as the executor does it with a target's own threads. Every page of the pool and of the area has
 * a content of its own (page_fill()).
 */
extern Pool *pool;
extern Keeper *keeper;
extern const char *const guard_directory; /* the keeper's */
extern uint64_t pool_first;     /* the pool page of the area's first page */

/* A pool with n_pages known pages (skips where the kernel cannot have one), and a keeper started in a directory of the
 * test's own. */
void guard_test_begin(uint32_t n_pages, const char *program);
void guard_test_end(void);      /* the keeper ends by itself */

void page_fill(void *page, uint64_t number);
bool page_is(const void *page, uint64_t number);        /* as page_fill() made it */
bool page_is_zero(const void *page);

/* A child whose area's first n_pages are pool pages, as unstopped as it is: nothing but its orders touch them. */
typedef struct Guarded {
        Child child;
        int guard;              /* our copy */
        uint64_t id;
} Guarded;
Guarded guarded_start(uint32_t n_pages, bool hand_over);
void guarded_stop(Guarded *guarded);
/* The steps of guarded_start(): an area that pool_first fits, without pool pages; a guard for the child. */
void guarded_map_area(const Child *child, uint32_t n_pages);
void guarded_guard(Guarded *guarded, bool hand_over);
/* A userfaultfd of the child's: made there, taken here, and for GUARD_NONE not set up yet. kept: its own stays open, under
 * the number in *ret_theirs. */
int child_userfaultfd(const Child *child, GuardKind kind);
int child_userfaultfd_kept(const Child *child, GuardKind kind, long *ret_theirs);
/* Pool pages over area pages [first, first + n), as a child has them that was forked while nobody watched: no pte is made. */
void guarded_map_pool(const Guarded *guarded, uint64_t first, uint32_t n_pages, uint64_t pool_page);
/* The middle of a merge: pool pages over area pages [first, first + n), registered, every pte made. */
void guarded_remap(Guarded *guarded, uint64_t first, uint32_t n_pages, uint64_t pool_page);

/* Orders. The argument is a page of the area where nothing else is said. */
long order_check_pool(long n_pages);    /* the first n_pages are the pool's; returns how many are not */
long order_discard(long page);
long order_is_zero(long page);
long order_is_pool(long page);
