/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "target/remote-program.h"
#include "target/vma.h"

/*
 * Route remap, in one target: runs of its pages are replaced by private mappings of a pool's pages, and back. What is
 * promised stands at the top of remap-merge.c and remap-undo.c; what to do is the planner's business (remap-plan.h),
 * whose faults the guard answers the keeper's (docs/route-remap.md).
 */

/* What a target's memory is guarded by, made at first use; ours to close. */
typedef struct RemapGuard {
        int zero;               /* registered with all that is remapped: a fault there means a discarded page */
        int mute;               /* whose faults wait, while a run is put back */
} RemapGuard;

#define REMAP_GUARD_NONE ((RemapGuard){ .zero = -EBADF, .mute = -EBADF })

/* Makes both in the target, takes them over, closes the target's own; nothing is registered with them yet, and the
 * keeper has to have them before anything is. 0; REMOTE_E_*; -EOPNOTSUPP: the target has no descriptor free, or its
 * security module refuses; -errno. */
int remap_guard_make(Remote *remote, Target *target, RemapGuard *ret);
void remap_guard_done(RemapGuard *guard);

typedef enum RemapResult {
        REMAP_NOT_BEGUN,        /* the time box was full, or the whole batch was given up */
        REMAP_MOVED,            /* seen only in a batch that was lost sight of */
        REMAP_DONE,
        REMAP_CHANGED,          /* the mapping is another one by now */
        REMAP_REFUSED,          /* it cannot be registered: it is somebody else's */
        REMAP_BUSY,             /* a page cannot be moved: pinned, shared by a fork, or away; see done_pages. Undoing: it
                                 * was written, see written_too */
        REMAP_DIFFERENT,        /* changed since it was read */
        REMAP_FAILED,           /* the kernel said no, for want of memory or mappings: everything is as it was */
        REMAP_UNGUARDED,        /* in place (undoing: still), but what is discarded there reads as what was: to be put right at
                                 * once */
        _REMAP_RESULT_MAX,
} RemapResult;

typedef struct RemapRange {
        uint64_t start;         /* page-aligned, in one mapping */
        uint32_t n_pages;
        uint64_t page;          /* of the pool; merging only */
        uint8_t advice;         /* VMA_NORESERVE, …: of the mapping, to be kept */
        bool mergeable;         /* the same */
        bool alone;             /* merging only: its frames were mapped by nobody else when last looked at. A fork that is
                                 * over leaves them unmovable until they are written; they are made movable again */
        uint64_t neighbour;     /* undoing only: a page of an anonymous mapping right before or behind, with the same
                                 * flags, which the run is to become one with; 0: there is none */
        RemapResult result;
        int error;              /* errno of what was refused, negative */
        uint32_t done_pages;    /* BUSY: how many could be moved; the next one could not */
} RemapRange;

#define REMAP_BATCH_MAX 96U

/* Called with all threads standing, before a page is touched. Once it returned 0 no answer of the guard's to a fault of
 * before can arrive: it asks the keeper (keeper_sync_begin()) and waits for it (_end()). Anything but 0: the batch is
 * given up. Two functions, because there is something else to do in between. */
typedef void (*RemapSettleBegin)(void *userdata);
typedef int (*RemapSettle)(void *userdata);

typedef struct RemapBatch {
        RemapRange *ranges;     /* by address, disjoint */
        size_t n;               /* at most REMAP_BATCH_MAX */
        const RemapGuard *guard; /* borrowed, as are the others */
        bool written_too;       /* undoing: pages that were written since they were merged are put back too. A write past the
                                 * page tables that is under way (O_DIRECT, io_uring, a device) is lost in them: nothing
                                 * tells which pages of a file's mapping are pinned. Else a run with one is BUSY */
        int pool_fd;            /* for reading only; merging only */
        dev_t pool_dev;         /* what the target's maps show of the pool; undoing only */
        ino_t pool_inode;
        RemapSettleBegin settle_begin; /* NULL: settle does it all */
        RemapSettle settle;     /* NULL: not needed, nothing of the target is guarded yet */
        void *userdata;
        uint64_t patience_nsec, run_nsec, expect_nsec; /* see RemoteTransaction */
        uint64_t stop_nsec, ran_nsec; /* filled in; see there */
        size_t threads, workers; /* the same; with workers nothing is begun */
} RemapBatch;

/* Both: 0: each range's result says what became of it. REMOTE_E_LOST: the program ends without us, and
 * what became of each is to be read from the target's mappings. Other REMOTE_E_*, -errno: nothing was begun. */
int remap_merge(Remote *remote, Target *target, RemapBatch *batch);
int remap_undo(Remote *remote, Target *target, RemapBatch *batch);

const char *remap_result_name(RemapResult result);

/* Safeguards that tests leave out, to see that they are missed. */
enum {
        REMAP_GUARD_BLOCK = 1 << 0,     /* the run is registered before it is moved: who cannot be stopped waits */
        REMAP_GUARD_MOVE = 1 << 1,      /* pages are moved away, which refuses what is pinned or shared, before … */
        REMAP_GUARD_COMPARE = 1 << 2,   /* … they are compared */
        REMAP_GUARD_BARRIER = 1 << 3,   /* writers that found their page before it was moved are waited for */
        REMAP_GUARD_POPULATE = 1 << 4,  /* every page is present before the guard is asked about absent ones */
        REMAP_GUARD_REGISTER = 1 << 5,  /* the guard is there */
        REMAP_GUARD_FORK = 1 << 6,      /* registered such that a fork copies the page tables */
        REMAP_GUARD_MUTE = 1 << 7,      /* undoing: the new mapping is blocked until the pages are in it */
        REMAP_GUARD_PROTECT = 1 << 8,   /* undoing: writers wait before the pages are copied */
        REMAP_GUARD_HOLD = 1 << 9,      /* the other threads wait for the end, even if we die */
        REMAP_GUARD_WRITTEN = 1 << 10,  /* undoing: pages that were written may be pinned, and are left */
        REMAP_GUARD_PIN = 1 << 11,      /* … unless nothing is seen that may pin them (remap_target_may_pin()) */
        REMAP_GUARD_HASTE = 1 << 12,    /* none; without it there is time for others between the steps of merging */
        REMAP_GUARD_SETTLE = 1 << 13,   /* no answer of the guard's is still to come */
        REMAP_GUARD_WORKERS = 1 << 14,  /* nothing is begun where somebody cannot be stopped */
        REMAP_GUARD_BESIDE = 1 << 15,   /* undoing: nothing of another's is let go of along with the run */
        REMAP_GUARD_FIRST = 1 << 16,    /* a range is begun in any case */
        REMAP_GUARD_LATE = 1 << 17,     /* merging: who comes so late that the pool's pages may be others maps none */
};

#ifdef REMAP_TEST
extern unsigned remap_test_leave_out;
#define remap_guards(guard) (!(remap_test_leave_out & (guard)))
#else
#define remap_guards(guard) true
#endif
