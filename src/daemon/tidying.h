/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "daemon/remapping.h"

/*
 * Shared by what puts a pool in order: tidying.c (when, the look, what one process maps alone), joining.c (what lies
 * apart).
 */
enum { TIDYING_NOT_ASKED, TIDYING_FITS, TIDYING_FITS_NOT };

typedef struct Tidying {
        Pass *pass;
        Slot *slot;
        Pool *pool;
        PoolTidy *tidy;
        Member **members;               /* that map the pool: n of them */
        uint32_t *looks;                /* of each: how long what it has alone must have been so */
        uint8_t *fits;                  /* of each: TIDYING_*, as it was when that was asked first */
        uint32_t n;
        TidyPieces pieces;
        uint64_t breath_pages;          /* since the event loop had its turn */
        uint64_t until_nsec;            /* after which nothing more is begun */
        bool over;                      /* the main loop has something to carry out */
        bool lost;                      /* a process was lost sight of */
} Tidying;

/* The event loop has its turn, and others while CPUQuota= wants us to wait. Never between pool_take() and a mapping.
 * false: the main loop has something to carry out. */
bool tidying_breathe(Tidying *t);
/* For something more to be begun. */
bool tidying_has_time(const Tidying *t);
/* The member could be called, and may be. */
bool tidying_fits(const Member *member);
/* The kth of the members could when it was asked first: for a plan, as asking goes through all processes of the host. */
bool tidying_fitted(const Tidying *t, uint32_t k);
/* The mapping, a pool's, is what it became by merging: it would be another one if it were put back. */
static inline bool tidying_may_move(const Vma *vma) {
        return vma->write && !vma->exec && !vma->growsdown && !vma->huge_advised && !vma->sealed && !vma->keyed;
}
/* As the kernel counts them now: each of the pages, at most BLOCK_PAGES, is mapped so often. */
bool tidying_all_mapped(const Tidying *t, uint64_t page, uint32_t n_pages, uint32_t sharers);
/* The tree learns how often the pages, at most BLOCK_PAGES, are mapped now. Those that nobody maps are not to be found
 * again until they are freed: what was just put back would be mapped to them at once. */
void tidying_tell_tree(const Tidying *t, uint64_t page, uint32_t n_pages);
/* Something was done to the member, or tried; plain: some of it is plain memory now, that is to be read. */
void tidying_note_result(Tidying *t, Member *member, int result /* REMOTE_E_*, -errno */, bool plain);

/* joining.c: puts together what lies apart, by the pieces of this look. */
void tidying_join(Tidying *t);

/* What a test waits for, in each place of something that is put together. */
typedef enum TidyStep {
        TIDY_STEP_PLANNED,              /* its pages are about to be put back */
        TIDY_STEP_PLAIN,                /* and are about to be mapped again */
} TidyStep;

#ifdef DAEMON_TEST
void tidying_test_step(TidyStep step, size_t place, const Member *member);
#define tidying_step(step, place, member) tidying_test_step(step, place, member)
#else
#define tidying_step(step, place, member) ((void)(place))
#endif
