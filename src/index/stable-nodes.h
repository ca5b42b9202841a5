/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "index/buckets.h"
#include "index/stable.h"

/*
 * How the stable tree keeps its nodes. Nearly every content has one frame, so such a node is its dup's record alone:
 * 32 bytes, and a 4-byte word in the table of keys and in the table of frames. Only a content of several frames gets
 * a chain record, and the links that tied its dup into the table of keys become the dup's place in the chain.
 *
 * Records are named by their place in a dense array; the last one moves into a gap, and all that named it is found
 * by its key and its frame. The items in the table of keys are dups and chains, told apart by a bit.
 *
 * A chain keeps its dups that have room apart from the full ones: a look-up takes the first that has room, however many
 * are full. When the limit changes, which is rare, all chains are sorted anew at once: look-ups write nothing.
 */

#define NIL UINT32_MAX
#define ITEM_CHAIN ((uint32_t)1 << 31)
#define DUPS_MAX (ITEM_CHAIN - 1)

typedef struct Dup {
        uint64_t key;
        uint64_t frame : 40;
        uint64_t chained : 1;
        uint64_t full : 1;      /* chained: the list it is in */
        uint32_t sharers;
        uint32_t frame_next;    /* dup, in the same bucket of frames */
        uint32_t next;          /* chained: dup, in the same list; else item, in the same bucket of keys */
        uint32_t prev;          /* chained: dup, in the same list */
} Dup;

_Static_assert(sizeof(Dup) == 32, "two dups in a cache line");

typedef struct Chain {
        uint64_t key;
        uint64_t n_sharing;     /* sum of sharers */
        uint32_t n_dups;        /* 2 at least */
        uint32_t lists[2];      /* first dup with room, first full dup */
        uint32_t key_next;      /* item, in the same bucket of keys */
} Chain;

struct Stable {
        Arrays arrays;
        Buckets keys;           /* words: first item */
        Buckets frames;         /* words: first dup */
        Array dups;
        Array chains;
        uint32_t n_dups;
        uint32_t n_chains;
        uint32_t n_nodes;
        uint32_t checked;       /* dups 0 … checked - 1 have been asked about in this round of pruning */
        uint32_t max_sharing;
        uint64_t n_sharers;     /* sum over all dups */
        uint64_t n_chained;     /* dups in chains */
};

static inline Dup *dup_at(const Stable *tree, uint32_t i) {
        return (Dup *)(void *)tree->dups.data + i;
}

static inline Chain *chain_at(const Stable *tree, uint32_t i) {
        return (Chain *)(void *)tree->chains.data + i;
}

static inline uint64_t item_key(const Stable *tree, uint32_t item) {
        return item & ITEM_CHAIN ? chain_at(tree, item & ~ITEM_CHAIN)->key : dup_at(tree, item)->key;
}

static inline uint32_t *item_next(const Stable *tree, uint32_t item) {
        return item & ITEM_CHAIN ? &chain_at(tree, item & ~ITEM_CHAIN)->key_next : &dup_at(tree, item)->next;
}

static inline const void *item_at(const Stable *tree, uint32_t item) {
        return item & ITEM_CHAIN ? (const void *)chain_at(tree, item & ~ITEM_CHAIN) : dup_at(tree, item);
}

/* Keys are uniform already, frames are not; both are folded and scattered (2^64 / golden ratio), so that whatever
 * bits differ count. */
static inline uint32_t stable_hash(uint64_t x) {
        return (x ^ x >> 32) * UINT64_C(0x9e3779b97f4a7c15) >> 32;
}

static inline uint32_t *stable_bucket(const Stable *tree, uint64_t key) {
        return buckets_at(&tree->keys, buckets_find(&tree->keys, stable_hash(key)));
}

/* The word that names the key's item, or the NIL at the end of its bucket. The tables must have a bucket. */
uint32_t *stable_find_key(const Stable *tree, uint64_t key);
/* The same for the frame's dup. */
uint32_t *stable_find_frame(const Stable *tree, uint64_t frame);

/* Makes room for one more of everything, so that what follows cannot fail and moves nothing. -ENOMEM */
int stable_prepare(Stable *tree);
/* Appends a record, its content undefined; there must be room. */
uint32_t dup_new(Stable *tree);
uint32_t chain_record_new(Stable *tree);
/* Frees a record that nothing names any more. Others may move: places and pointers are void after it. */
void dup_free(Stable *tree, uint32_t i);
void chain_record_free(Stable *tree, uint32_t i);

/* Puts a dup into the list of its chain that its sharers say, or takes it out of the one it is in. */
void chain_link(const Stable *tree, Chain *chain, uint32_t i);
void chain_unlink(const Stable *tree, Chain *chain, uint32_t i);
/* Sorts the lists by the limit of now. */
void chain_sort(const Stable *tree, Chain *chain);

/* Adds a bucket to the tables where their contents have outgrown them, drops one where there are far too many. */
void stable_adapt(Stable *tree);
