/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "target/target.h"

/*
 * What route remap asks about a process as a whole: whether it may be remapped at all, which of its mappings are a
 * pool's, which guard is its own. Everything is read from /proc, or tried where trying changes nothing.
 */

/* Why a process is left alone, asked before each visit. 0; REMAP_E_*; -errno. */
enum {
        REMAP_E_PEER = 1,       /* another process shares its memory (clone(CLONE_VM)): it would not stand */
        REMAP_E_LOCKED,         /* locks memory: our scratch would be locked, too */
        REMAP_E_PINNED,         /* something has pinned pages of it: a device, io_uring's registered buffers */
        REMAP_E_GONE,
};
int remap_target_fits(const Target *target);
const char *remap_fit_reason(int error);

/* Pages that were written may be pinned, now or in a moment, by something that does not stand with its threads: pinned
 * or locked pages, io_uring, aio. True also when that cannot be told. */
bool remap_target_may_pin(const Target *target);

/* Notes in the list which mappings have a memory policy, or get one from their process. -ENOENT: without NUMA there are
 * none. TARGET_E_GONE, -errno. */
int remap_note_policies(const Target *target, VmaList *vmas);

/* What /proc shows of a pool's mapping. */
typedef struct RemapIdentity {
        dev_t dev;
        ino_t inode;
} RemapIdentity;

static inline bool remap_vma_is(const Vma *vma, const RemapIdentity *identity) {
        return vma->file && vma->dev == identity->dev && vma->inode == identity->inode;
}

/* Somebody's userfaultfd watches the mapping. */
static inline bool remap_vma_guarded(const Vma *vma) { return vma->skip_if_ours == VMA_SKIP_UFFD; }

/* Whether uffd, a guard, is this process's: it protects the page at address, which some guard watches, against writing
 * for an instant and looks whether it is. No also when that cannot be told, as its keeper reads no events. */
bool remap_guard_watches(int uffd, const Target *target, uint64_t address);
/* The page of a mapping to try that with: one that is there, if one of the first is. Protecting an absent one would
 * leave a mark behind if it could not be taken back. */
uint64_t remap_guard_page(const Target *target, const Vma *vma);
/* Watches a mapping of a pool that nobody does. */
int remap_guard_register(int uffd, uint64_t start, uint64_t end);
/* The same where nobody has for a time. There an absent page was not discarded for sure: it is also what a child has that
 * was forked meanwhile (the kernel copies no page tables that it can make again), or a process in the middle of being
 * merged. So all of them are mapped first; what really was discarded reads as the pool's page. -EFAULT: one cannot be
 * (nothing is registered then); -errno. The target's memory is open. */
int remap_guard_watch_again(int uffd, const Target *target, uint64_t start, uint64_t end);
