/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "base/util.h"

/*
 * The unstable tree: contents seen once, whose page may change under us. Knows keys (64-bit keyed hashes, uniformly
 * distributed) and page references, nothing else: no process, no memory of anyone's.
 *
 * A page reference is 40 bits: whatever the caller finds the page again by. An entry is a hint: the caller verifies
 * what a look-up returns and replaces what no longer holds.
 *
 * Of a key a tree keeps 40 bits, the low 32 (its tag) and the high 8, at any size: two keys that agree in them are one
 * key to it. Who spreads keys over UNSTABLE_SHARDS trees by unstable_shard() has four bits more: 44 in all, so a
 * look-up of a content that is not there returns a false twin with probability n / 2^44 where the trees hold n entries
 * (once in 1.7 million look-ups at 10 million entries). A twin is a candidate, never a proof.
 *
 * Nothing here is shared between trees and there is no lock: one thread at a time per tree.
 */
typedef struct Unstable Unstable;
typedef uint64_t PageRef;

#define PAGE_REF_BITS 40
#define PAGE_REF_NONE UINT64_MAX

/* Which of UNSTABLE_SHARDS trees a key belongs to: by bits 32 to 35, which no tree stores, so that they count too, and
 * which neither a bucket's number nor the sample below depends on: shards and samples fill evenly. */
#define UNSTABLE_SHARD_BITS 4U
#define UNSTABLE_SHARDS (1U << UNSTABLE_SHARD_BITS)
static inline unsigned unstable_shard(uint64_t key) {
        return key >> 32 & (UNSTABLE_SHARDS - 1);
}

/* Whoever has not the memory for every key indexes a sample of them, one in 2^sample_bits (0: all; 32 at most): those
 * whose tag begins with that many zero bits. Equal contents are in or out together, every sample holds the next smaller
 * one, and it can be told from what an entry stores: to leave a sample for a smaller one, unstable_sweep() with this as
 * the question gives the memory back. Of the tag, so that the callback can tell; its high bits, because the low byte
 * is what callers know pages by. */
static inline bool unstable_in_sample(uint64_t key_or_tag, unsigned sample_bits) {
        return (uint64_t)(uint32_t)key_or_tag >> (32 - sample_bits) == 0;
}

int unstable_new(Unstable **ret);
Unstable *unstable_free(Unstable *tree);
DEFINE_CLEANUP(Unstable, unstable_free)

enum {
        UNSTABLE_E_SELF = 1,    /* this very page was there under this key: unchanged since it was inserted */
        UNSTABLE_E_TWIN,        /* another page holds the key; the tree is unchanged */
};

/* About n entries more are coming, soon: they are inserted faster when their buckets are there. 0: no more are, and
 * what was made for those that did not come is given back. Without memory the tree is right, and slower. */
void unstable_expect(Unstable *tree, size_t n);

/* Looks the key up; when nobody holds it, inserts ref under it. 0: inserted. UNSTABLE_E_SELF. UNSTABLE_E_TWIN with
 * *ret_other set. -ENOMEM: not inserted, the tree is as before. -EINVAL: ref has more than PAGE_REF_BITS. */
int unstable_see(Unstable *tree, uint64_t key, PageRef ref, PageRef *ret_other);

/* The same for a batch, prefetching: results[i] is what unstable_see() returns for item i, others[i] its *ret_other.
 * Items are processed in order: a twin inside the batch is found. */
void unstable_see_batch(Unstable *tree, const uint64_t *keys, const PageRef *refs, size_t n, int *results,
                        PageRef *others);

/* Puts ref where old was (old proved stale). -ENOENT when (key, old) is not there, -EINVAL as above. */
int unstable_replace(Unstable *tree, uint64_t key, PageRef old, PageRef ref);
/* Takes the page out that holds the key. Needs no memory. -ENOENT: nobody does. */
int unstable_take(Unstable *tree, uint64_t key, PageRef *ret);

/* Walks on from where the last sweep stopped, over at least budget entries or once around, and drops those that the
 * callback calls stale; needs no memory. Whatever is inserted and removed between sweeps, an entry that stays is asked
 * about before any is twice around. tag is what every entry stores of its key: the low 32 bits. The callback must not
 * call into the tree. Returns how many it dropped. */
typedef bool (*UnstableStale)(void *userdata, uint32_t tag, PageRef ref);
size_t unstable_sweep(Unstable *tree, size_t budget, UnstableStale stale, void *userdata);
/* How far sweeps have come in all. Once it has grown by UNSTABLE_ROUND every entry that was there before, and is still, has
 * been asked about since. */
uint64_t unstable_swept(const Unstable *tree);
#define UNSTABLE_ROUND ((uint64_t)1 << 32)

size_t unstable_count(const Unstable *tree);    /* entries */
size_t unstable_bytes(const Unstable *tree);    /* all the memory it holds */
