/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "merge/stop-pace.h"
#include "merge/zero-plan.h"
#include "scan/track.h"
#include "target/remote-program.h"

/*
 * Route zero: pages that hold nothing but zeros are given back to the kernel. A read then maps its shared zero page, a
 * write gets a fresh one: what the process sees is what it saw before. Needs no KSM, and leaves nothing to undo. How
 * it is done without losing what is written meanwhile: zero-program.c, docs/route-zero.md.
 */
typedef struct Zero Zero;
/* Borrows remote. -EOPNOTSUPP: this kernel cannot move pages (6.8); -errno: no /dev/userfaultfd. */
int zero_new(Remote *remote, Zero **ret);
Zero *zero_free(Zero *zero);
DEFINE_CLEANUP(Zero, zero_free)

/* Why a process is left alone, asked before each visit. 0; ZERO_E_*; -errno. */
enum {
        ZERO_E_PEER = 1,        /* another process shares its memory (clone(CLONE_VM)): it would not stand */
        ZERO_E_LOCKED,          /* locks what it maps (mlockall): our scratch would be filled with pages */
        ZERO_E_GONE,
};
int zero_target_fits(const Target *target);

typedef struct ZeroResult {
        uint64_t runs;          /* that were visited */
        uint64_t pages_given;   /* as the page tables say: not there afterwards */
        uint64_t pages_back;    /* written in the last moment: put back as they were */
        uint64_t pages_refused; /* pinned, shared with a child since, or not there any more */
        uint64_t pages_lost;    /* could not be put back: their mapping was gone by then */
        bool unfinished;        /* the pause said so */
} ZeroResult;

/* Gives back the runs of a plan made from what is known now, in as many stops as keep each within its time; *ret adds
 * up, also on failure. What was given back is noted in the blocks (hole), what was put back is forgotten there. track:
 * NULL, or what follows the writes of this process. pause: may be NULL. 0; REMOTE_E_*: the rest could not be done; -errno. */
int zero_give_back(Zero *zero, Space *space, Track *track, const ZeroPlan *plan, StopPause pause, void *userdata,
                   ZeroResult *ret);

/* How many pages that were given back are so still: not there, or mapping the kernel's zero page. Forgets the others.
 * TARGET_E_GONE, -errno. */
int zero_count(Space *space, const VmaList *vmas, uint64_t *ret_pages);
