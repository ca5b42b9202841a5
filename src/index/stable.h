/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "base/util.h"

/*
 * The stable tree: contents that are merged and cannot change. A content is one node; when more pages share it than
 * one frame may carry (MaxPageSharing, so that a reverse-map walk over a frame stays bounded), the node becomes a
 * chain of dups: frames of equal content. Finding a dup with room costs the same however long the chain is.
 *
 * Frames are named by a 40-bit frame number (a PFN, or a page of a pool): one tree holds each frame at most once.
 * Nodes go stale (a frame is freed by the kernel when its last sharer leaves): pruning is lazy and rate-limited,
 * the caller's callback says what is left of a frame.
 */
typedef struct Stable Stable;

#define FRAME_NONE UINT64_MAX

int stable_new(uint32_t max_sharing, Stable **ret);
Stable *stable_free(Stable *tree);
DEFINE_CLEANUP(Stable, stable_free)

typedef struct StableHit {
        uint64_t frame;         /* a dup with room, FRAME_NONE when every dup of the chain is full */
        uint32_t n_dups;
        uint64_t n_sharing;     /* pages mapping any dup of the content, as far as the tree was told */
} StableHit;

/* Look-ups only read: any number of threads may look up at once while nobody changes the tree. */

/* true: the content is merged. */
bool stable_lookup(const Stable *tree, uint64_t key, StableHit *ret);
/* The same for a batch, prefetching. Returns how many are merged: hits[i].n_dups is 0 for those that are not; when
 * none is, hits need not have been written at all. */
size_t stable_lookup_batch(const Stable *tree, const uint64_t *keys, size_t n, StableHit *hits);
bool stable_has_frame(const Stable *tree, uint64_t frame, uint64_t *ret_key /* may be NULL */);

/* A frame of this content exists and is mapped sharers times. -EEXIST: the frame is there already, under this key or
 * another. -EINVAL: no sharers, or a frame number of more than 40 bits. -ENOMEM: the tree is as before. */
int stable_insert(Stable *tree, uint64_t key, uint64_t frame, uint32_t sharers);
/* Sets how often the frame is mapped now; 0 removes the dup, and the node with its last dup. Needs no memory.
 * -ENOENT. */
int stable_set_sharers(Stable *tree, uint64_t frame, uint32_t sharers);
int stable_get_sharers(const Stable *tree, uint64_t frame, uint32_t *ret); /* -ENOENT */

/* From now on a dup has room when it has fewer sharers than this; those above keep what they have. Goes through all
 * the dups of chains when the limit is another one. */
void stable_set_max_sharing(Stable *tree, uint32_t max_sharing);

/* Asks about the next budget dups, once around at most: in rounds, so that none is asked about again before all others
 * were, new ones included. The callback returns how often the frame is mapped now with this content; 0 when it is gone
 * or something else; it must not call into the tree. Needs no memory. Returns how many dups were removed. */
typedef uint32_t (*StableCheck)(void *userdata, uint64_t key, uint64_t frame);
size_t stable_prune(Stable *tree, size_t budget, StableCheck check, void *userdata);

typedef struct StableCounts {
        uint64_t pages_shared;          /* dups (frames) in the tree */
        uint64_t pages_sharing;         /* sum over dups of sharers - 1: pages saved */
        uint64_t stable_node_chains;    /* nodes with two dups or more */
        uint64_t stable_node_dups;      /* dups in those chains, as KSM counts them */
        uint64_t nodes;                 /* distinct contents */
        uint64_t bytes;                 /* all the memory the tree holds */
} StableCounts;

void stable_counts(const Stable *tree, StableCounts *ret);
