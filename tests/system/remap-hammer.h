/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "base/util.h"

#include <stdatomic.h>
#include <sys/stat.h>
#include <sys/types.h>

/*
 * What the processes of the remap hammer share (see remap-hammer.c): the victims, which check every byte of their memory
 * while it is merged and unmerged under them; a writer from outside for each; the guard server; the engine.
 */
#define HAMMER_VICTIMS 2U
#define HAMMER_PAGES 2048U      /* of a victim's area: page i holds pattern i at first, and now and then again */
#define HAMMER_CONSTANT 64U     /* [0, this): never written, looked at by children */
#define HAMMER_JOINT 1536U      /* [this, HAMMER_OUTSIDE): each word belongs to one of the threads */
#define HAMMER_OUTSIDE 1792U    /* [this, HAMMER_PINNED): written from outside only */
#define HAMMER_SPARSE 1808U     /* [this, HAMMER_PINNED): written from outside seldom */
#define HAMMER_PINNED 1824U     /* [this, HAMMER_DIRECT): a buffer registered with io_uring */
#define HAMMER_DIRECT 1832U     /* [this, HAMMER_LAST): read into with O_DIRECT */
#define HAMMER_LAST 1840U       /* [this, HAMMER_PAGES): advised DONTDUMP, written now and then */
#define HAMMER_CHURN 16U        /* pages of a mapping that comes and goes */

typedef struct HammerVictim {
        pid_t pid, writer;
        atomic_ulong area, churn;       /* addresses; 0: not there yet */
        atomic_bool stop, quiet, checked;
        atomic_ulong errors, operations, discards, replaced, kernel_writes, outside_writes, forks, churned, pinned, direct,
                freed;
        char first[256];                /* the first error */
} HammerVictim;

typedef struct HammerShared {
        bool confined;                  /* the victims are as processes of a container */
        HammerVictim victims[HAMMER_VICTIMS];
        atomic_ulong merged, runs, undone, batches, busy, different, changed, refused, failed, unguarded, moved, outcomes[8],
                kills, stop_nsec, stop_nsec_max, faults, zeros, guard_forks, guard_remaps, syncs;
} HammerShared;

extern HammerShared *hammer;

void hammer_pattern(void *page, uint64_t id);
/* Ends the process when told to, having checked everything once more and said so in checked. */
_Noreturn void hammer_victim_run(HammerVictim *victim);
_Noreturn void hammer_writer_run(HammerVictim *victim);

/* The guard server, a stand-in for the keeper that shares nothing with it. */
pid_t hammer_guard_start(void);
void hammer_guard_add(int uffd, bool mute);     /* from the process that started it, and its children */
int hammer_guard_sync(void *unused);            /* a RemapSettle */

/* The pool, whose page i holds pattern i; and what is mapped in a process. */
extern int pool_ro;
extern struct stat pool_stat;
typedef struct Map {
        uint64_t start, end, offset, inode;
        bool usable;            /* readable, writable, private, not executable */
} Map;

typedef struct Maps {
        Map maps[4096];
        size_t n;
} Maps;

void read_maps(pid_t pid, Maps *maps);
void hammer_measure(uint32_t run_pages);
