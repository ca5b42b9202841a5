/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "keeper/guard.h"

/*
 * The daemon's side of the keeper: the small process that answers the faults of remapped memory, holds the pools, and
 * outlives the daemon (docs/route-remap.md). What the daemon hands over it keeps holding a copy of: a keeper that was
 * killed is started again and given everything anew.
 *
 * All calls are answered at once or fail with -ETIMEDOUT (KEEPER_PATIENCE_NSEC); after any negative error but -ENOENT,
 * -ENOSPC and -EEXIST the connection is broken (-ENOTCONN from then on) until keeper_recover(). Threads: one at a time.
 */
typedef struct Keeper Keeper;

#define KEEPER_PATIENCE_NSEC NSEC_PER_SEC
#define KEEPER_SYNC_NSEC (10 * NSEC_PER_MSEC)
#define KEEPER_DOMAIN_BYTES_MAX 4096U
#define KEEPER_NOTE_WORDS 6U

/* What is known of a held userfaultfd beside what it tells itself. */
typedef struct KeeperOwner {
        int32_t pid;            /* 0: of a child that was forked; see parent */
        uint32_t unused;
        uint64_t start_ticks;   /* Target.start_ticks */
        uint64_t note[KEEPER_NOTE_WORDS]; /* the caller's, given back by keeper_list() */
} KeeperOwner;

/* Connects to the keeper that listens at STATE_DIR/keeper (with ksmd-user-keeper.socket that is systemd, which starts
 * it), or, if nobody does, starts program (NULL: the installed one) with a socket made there. May take five seconds.
 * -ENOENT: program is missing; -EPROTO: it speaks another version of the protocol; -errno. */
int keeper_new(const char *state_dir, const char *program, Keeper **ret);
/* Who listens there, without starting anything (but with ksmd-user-keeper.socket systemd starts it) or disturbing who
 * is connected. -ENOENT: nobody; -ETIMEDOUT: somebody who does not answer; -errno. */
typedef struct KeeperSeen {
        uint32_t protocol, our_protocol; /* versions; the rest is known only if they are the same */
        int32_t pid;            /* who serves */
        uint32_t guards, pools;
} KeeperSeen;
int keeper_look(const char *state_dir, KeeperSeen *ret);
/* The connection only: the keeper goes on, and ends by itself once it holds nothing. */
Keeper *keeper_free(Keeper *keeper);
DEFINE_CLEANUP(Keeper, keeper_free)

/* Readable: keeper_dispatch() is due (a child was forked, or the keeper died). -EBADF while broken. */
int keeper_fd(const Keeper *keeper);
/* Takes in what the keeper tells by itself. -ENOTCONN: it died. */
int keeper_dispatch(Keeper *keeper);
/* Connects again, starting a keeper if there is none, and hands over whatever this side holds and the other does not.
 * Nothing that is guarded read a wrong byte meanwhile; what faulted waits until here. */
int keeper_recover(Keeper *keeper);

/* A userfaultfd made in a target, after guard_init() and *before* anything is registered with it: served once this
 * returned 0, and told from then on by guard_id(uffd). uffd is borrowed (duplicated). Adding what is held already
 * changes its owner. -EINVAL: not one of the two kinds; -ENOSPC: no descriptor left. */
int keeper_add(Keeper *keeper, int uffd, const KeeperOwner *owner);

/* No longer served or held, on either side. Only when nothing is registered with it any more: the kernel un-registers
 * what is left when the last holder closes, and unregistered pool pages show stale bytes. -ENOENT: not held (its
 * address space is gone). */
int keeper_drop(Keeper *keeper, uint64_t id);

/* Returns when every message that could be read before it was called has been answered. With all threads of a target
 * standing, no answer of the keeper's to an earlier fault can then arrive late and fill a page that has another meaning
 * by now: to be called after the last thread stopped and before pages are taken away. */
int keeper_sync(Keeper *keeper);
/* The same in two halves, with something done in between: asks, without waiting; waits for the answer, KEEPER_SYNC_NSEC
 * at most: -ETIMEDOUT from here breaks no connection. What _begin() failed in is told by _end(). */
void keeper_sync_begin(Keeper *keeper);
int keeper_sync_end(Keeper *keeper);

typedef struct KeeperItem {
        uint64_t id, parent;    /* parent: the userfaultfd of the process that forked; 0: was added */
        GuardKind kind;
        KeeperOwner owner;      /* of a child: the one it was forked from, pid 0 */
} KeeperItem;

/* All guards held, as far as we were told: of one that a child was forked with just now later. The keeper is not asked,
 * there may be thousands. uffd is borrowed; the handler calls nothing that takes the keeper. Anything but 0 from it ends
 * it and is returned. */
typedef int (*KeeperHandler)(void *userdata, const KeeperItem *item, int uffd);
int keeper_list(Keeper *keeper, KeeperHandler handler, void *userdata);

/* Pools: the detached mount of each domain (merge/pool.h), which has the domain's name in it; one a domain (-EEXIST).
 * mount_fd is borrowed. A name is at most KEEPER_DOMAIN_BYTES_MAX long (-ENAMETOOLONG). */
int keeper_pool_add(Keeper *keeper, int mount_fd);
int keeper_pool_get(Keeper *keeper, const char *domain, int *ret_mount_fd); /* -ENOENT: it has none */
/* All pools it has: as keeper_list(), with the mount for the userfaultfd. */
int keeper_pools(Keeper *keeper, KeeperHandler handler, void *userdata);
int keeper_pool_drop(Keeper *keeper, const char *domain);

typedef struct KeeperStats {
        uint64_t faults, zeros, wakes, forks, remaps;   /* since the keeper started */
        uint64_t restarts;                              /* of its serving process */
        uint64_t starved;                               /* forks that waited because no descriptor was left */
        uint32_t guards, mutes, pools;                  /* held now; children are guards */
        int32_t pid;                                    /* who serves */
} KeeperStats;
int keeper_stats(Keeper *keeper, KeeperStats *ret);
