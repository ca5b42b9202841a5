/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "keeper/keeper.h"

/*
 * What a keeper holds, by descriptor number. The table lies in memory that the serving process shares with the one that
 * starts it again (main.c), as they share their descriptors. It says only what the kernel cannot, whose a userfaultfd
 * is: what is there, and what it is, a new server asks the kernel (hold_discover()).
 *
 * That memory is a file without a name, which the service manager stores beside the descriptors (store.h): a keeper
 * that it starts when both processes were killed reads in it whose they are (hold_adopt()).
 */
typedef struct HoldEntry {
        uint64_t id;            /* guard_id(); 0: nothing. Written last, cleared first */
        KeeperItem item;
        bool unsent;            /* a child that no daemon has a copy of yet */
        bool stored;            /* the service manager has a copy */
} HoldEntry;

#define HOLD_POOLS_MAX 4096U

typedef struct HoldTable HoldTable;

typedef struct Hold {
        HoldTable *table;       /* the shared memory */
        uint64_t table_id;      /* guard_id() of its file */
        HoldEntry *entries;     /* in it: n of them, by descriptor */
        int n, end;             /* no descriptor held is at or above end */
        KeeperStats *stats;     /* in it; the counts of what is held are current */
        int pools[HOLD_POOLS_MAX]; /* mounts, stats->pools of them. Not shared: found again by hold_discover() */
} Hold;

/* For descriptors below n_fds. *ret_table_fd: the table's, for the service manager's store; the caller's. -errno. */
int hold_init(Hold *hold, int n_fds, int *ret_table_fd);

/* fd is the table of a keeper of this version. */
bool hold_is_table(int fd);
/* The table of another keeper, whose processes are gone: of the descriptors in [first, end), those it knows are held
 * from then on, as what they were there. -EINVAL: fd is none; -errno. */
int hold_adopt(Hold *hold, int fd, int first, int end);

/* Looks through all descriptors of this process: userfaultfds of our kinds and pools are held from then on, entries
 * without their descriptor forgotten. other is called for each descriptor that is neither. -errno. */
int hold_discover(Hold *hold, void (*other)(void *userdata, int fd), void *userdata);

/* fd becomes the table's. -EINVAL: not of our kinds; -ENOSPC: its number is too high. */
int hold_add(Hold *hold, int fd, const KeeperItem *item);
/* Closes it. */
void hold_drop(Hold *hold, int fd);
int hold_find(const Hold *hold, uint64_t id);           /* its descriptor, or -ENOENT */

/* fd becomes the table's. -EINVAL: no pool's mount; -EEXIST: its domain has one; -ENOSPC. */
int hold_pool_add(Hold *hold, int fd);
int hold_pool_find(const Hold *hold, const char *domain);       /* its descriptor, or -ENOENT */
void hold_pool_drop(Hold *hold, int fd);

/* No userfaultfd is held. A pool alone is nothing: who maps it has a guard. */
bool hold_is_idle(const Hold *hold);
