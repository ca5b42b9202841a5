/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "daemon/pass.h"
#include "keeper/keeper.h"
#include "merge/pool-tidy.h"
#include "merge/pool.h"
#include "merge/stop-pace.h"
#include "merge/remap-target.h"
#include "merge/remap.h"

/*
 * Route remap in the daemon: keeping.c (the keeper and the pools), remapping.c (a pass), unmapping.c (guards, and the
 * way back), tidying.c and joining.c (pools are put in order), pooled.c (what is in the pools: statistics).
 *
 * What is remapped is read from the processes' mappings, always: nothing here remembers it. So it is right whatever
 * they did with it (fork, exec, munmap, mremap), and for a daemon that was started a moment ago.
 */
typedef struct RemapPool {
        Pool *pool;
        char *name;                     /* of its domain, as the pool has it */
        RemapIdentity identity;
        PoolTidy tidy;
} RemapPool;

typedef struct Remapping {
        Keeper *keeper;
        LoopSource *source;             /* of its connection; NULL while that is broken */
        int error;                      /* why it could not be reached the last time */
        RemapPool **pools;              /* of domains that are no more, too, while anything maps them */
        size_t n_pools, pools_allocated;
        uint64_t uncertain_until_nsec;  /* a program may still be at work in a process that was lost sight of */
        StopPace pace[2];              /* merging, undoing */
        uint64_t tidy_nsec;             /* pools are put in order again from then on */
        size_t tidy_turn;               /* whose turn it is */
        unsigned tidy_waited;           /* passes that had something else to do, since they were */
} Remapping;

/* keeping.c. Connects to the keeper, or starts one, and takes over the pools that it holds. Nothing if that is done.
 * -errno, with *ret_reason (static). */
int manager_open_keeper(Manager *manager, const char **ret_reason);
/* A daemon that died may have left something: a keeper is looked for, and who maps a pool and is managed no more, or in a
 * domain that merges nothing, joins the leaving. Manager.keeper_missed: one is there that could not be reached. */
void manager_find_remapped(Manager *manager);
/* Each second: a keeper that could not be reached is tried again. */
void manager_tend_keeper(Manager *manager);
void manager_close_keeper(Manager *manager);
/* Connected, again if need be. */
bool manager_keeper_ready(Manager *manager);
/* RosterOpenPool. */
const char *manager_open_pool(void *userdata, Slot *slot);
/* The configuration was swapped: MaxPageSharing= counts from now on. */
void manager_limit_pools(Manager *manager);
/* What is in the pool of a domain that was opened just now goes into its tree. */
void manager_learn_pool(Slot *slot);
/* Gives back pages that nobody maps any more, after a look at so many; ends pools that are not needed. */
void manager_tend_pools(Manager *manager, uint64_t n_pages);
/* As many as it takes to have looked at all. */
uint64_t manager_pool_pages(const Manager *manager);
/* All the memory that is kept about a pool. */
uint64_t remapping_pool_bytes(const RemapPool *pool);
RemapPool *remapping_find_pool(const Remapping *remapping, const Vma *vma);

/* remapping.c. New pages of the pool that fit all the addresses, with these bytes, to be found in the tree by these
 * keys. They are to be mapped before pool_collect() is called: nobody holds them. POOL_E_MISFIT, -errno. */
int remapping_fill(Pool *pool, Stable *stable, const uint64_t *addresses, size_t n_addresses, const uint8_t *bytes,
                   const uint64_t *keys, uint32_t n_pages, uint64_t *ret_page);
/* Plain memory of the member that was put back a moment ago is mapped to these pages of its pool, where it holds the same
 * as they do; nothing, if anything of it is no longer what could be merged. *ret_pages grows, also when it fails. 0: what
 * could be was; REMOTE_E_*; -errno. */
int pass_remap_again(Pass *pass, Member *member, uint64_t start, uint32_t n_pages, uint64_t page, uint64_t *ret_pages);

/* unmapping.c. Makes sure of the member's guards: its own if something of it is remapped. 0; REMOTE_E_*; -errno. */
int manager_find_guard(Manager *manager, Member *member, const VmaList *vmas);
/* A slice of the way back: everything of the member that maps a pool becomes plain memory again; only what maps another
 * pool than keep if that is not NULL. 0: nothing is left; REMOTE_E_BUSY: something is, to be tried again, at once if it
 * was cut; other REMOTE_E_*; -errno. */
int manager_unmap(Manager *manager, Member *member, const RemapPool *keep, UndoSlice *slice);
/* Of the member's mappings of the pool what lies in the stretches becomes plain memory again, where nothing was written
 * since it was merged; it is the caller's to have it looked at (manager_refresh()). *ret_pages grows, also when it
 * fails. 0: what could be was; REMOTE_E_*; -errno. */
int manager_put_back(Manager *manager, Member *member, const RemapPool *pool, const Ranges *stretches, uint64_t *ret_pages);
/* Counts what maps pools, from the mappings just read. */
void manager_note_pooled(Manager *manager, Member *member);

/* pooled.c: what the slot's pool saves, into the members' censuses. */
void manager_census_pooled(Manager *manager, Slot *slot, Member *const *members, size_t n);

#define REMAP_PIECE_PAGES 128U
/* A process with so large a part of vm.max_map_count is remapped no further: 1/REMAP_VMAS_SHARE. */
#define REMAP_VMAS_SHARE 4U
/* How long a program that lost us may take to its end: until then what it is about to map may look unused. Who takes longer
 * maps nothing any more (pool_note_lost()). */
#define UNCERTAIN_NSEC (10 * NSEC_PER_SEC)
/* A batch as both directions have it: the keeper is asked, and a stop is as long as it may be. */
RemapBatch remapping_batch(Manager *manager, const RemapGuard *guard, RemapRange *ranges, size_t n, uint64_t units,
                           bool undo);
/* It was carried out: what that taught. */
void remapping_learn(Remapping *remapping, const RemapBatch *batch, bool undo);

/* Safeguards that tests leave out, to see that they are missed. */
enum {
        TIDY_GUARD_WRITTEN = 1 << 0,    /* what was written is in no piece */
        TIDY_GUARD_FITS = 1 << 1,       /* a process that has pages pinned is left alone */
};

#ifdef DAEMON_TEST
extern unsigned tidy_test_leave_out;
#define tidy_guards(guard) (!(tidy_test_leave_out & (guard)))
#else
#define tidy_guards(guard) true
#endif
