/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * Two tables over the same dups, by content and by frame, both growing and shrinking a bucket at a time
 * (index/buckets.h); records as index/stable-nodes.h lays them out.
 *
 * What must always hold:
 *   - every dup is in the table of frames; in the table of keys is each content once: its dup, or its chain when it
 *     has two or more, and then all its dups are in one of the chain's two lists;
 *   - the counters are sums over the dups, kept with every change;
 *   - the dups before `checked` have been asked about in this round of pruning, the others have not: who is added
 *     comes last, and a gap is filled so that it stays so.
 */

#include "index/stable-nodes.h"

#define FRAME_BITS 40

int stable_new(uint32_t max_sharing, Stable **ret) {
        Stable *tree = calloc(1, sizeof *tree);
        if (!tree)
                return -ENOMEM;

        tree->max_sharing = max_sharing;
        array_init(&tree->keys.words, &tree->arrays);
        array_init(&tree->frames.words, &tree->arrays);
        array_init(&tree->dups, &tree->arrays);
        array_init(&tree->chains, &tree->arrays);
        *ret = tree;
        return 0;
}

Stable *stable_free(Stable *tree) {
        if (!tree)
                return NULL;

        array_done(&tree->keys.words);
        array_done(&tree->frames.words);
        array_done(&tree->dups);
        array_done(&tree->chains);
        free(tree);
        return NULL;
}

bool stable_lookup(const Stable *tree, uint64_t key, StableHit *ret) {
        uint32_t item = tree->n_dups > 0 ? *stable_find_key(tree, key) : NIL;

        if (item == NIL)
                return false;
        if (!(item & ITEM_CHAIN)) {
                const Dup *dup = dup_at(tree, item);
                *ret = (StableHit){
                        .frame = dup->sharers < tree->max_sharing ? dup->frame : FRAME_NONE,
                        .n_dups = 1,
                        .n_sharing = dup->sharers,
                };
                return true;
        }

        const Chain *chain = chain_at(tree, item & ~ITEM_CHAIN);
        *ret = (StableHit){
                .frame = chain->lists[0] != NIL ? dup_at(tree, chain->lists[0])->frame : FRAME_NONE,
                .n_dups = chain->n_dups,
                .n_sharing = chain->n_sharing,
        };
        return true;
}

/* How far ahead a batch fetches the bucket's word, and then the item it names. */
#define FETCH_WORD 32U
#define FETCH_ITEM 16U

size_t stable_lookup_batch(const Stable *tree, const uint64_t *keys, size_t n, StableHit *hits) {
        size_t n_hits = 0;

        if (tree->n_dups == 0)
                return 0;
        for (size_t i = 0; i < n + FETCH_WORD; i++) {
                if (i < n)
                        __builtin_prefetch(stable_bucket(tree, keys[i]));
                if (i >= FETCH_WORD - FETCH_ITEM && i - (FETCH_WORD - FETCH_ITEM) < n) {
                        uint32_t item = *stable_bucket(tree, keys[i - (FETCH_WORD - FETCH_ITEM)]);
                        if (item != NIL)
                                __builtin_prefetch(item_at(tree, item));
                }
                if (i >= FETCH_WORD) {
                        StableHit *hit = &hits[i - FETCH_WORD];
                        if (stable_lookup(tree, keys[i - FETCH_WORD], hit))
                                n_hits++;
                        else
                                hit->n_dups = 0;
                }
        }
        return n_hits;
}

/* The frame's dup, NIL when there is none. */
static uint32_t stable_find_dup(const Stable *tree, uint64_t frame) {
        return tree->n_dups > 0 ? *stable_find_frame(tree, frame) : NIL;
}

bool stable_has_frame(const Stable *tree, uint64_t frame, uint64_t *ret_key) {
        uint32_t i = stable_find_dup(tree, frame);

        if (i != NIL && ret_key)
                *ret_key = dup_at(tree, i)->key;
        return i != NIL;
}

int stable_get_sharers(const Stable *tree, uint64_t frame, uint32_t *ret) {
        uint32_t i = stable_find_dup(tree, frame);

        if (i == NIL)
                return -ENOENT;
        *ret = dup_at(tree, i)->sharers;
        return 0;
}

/* Puts a chain of one dup where the dup itself was; the caller adds the second. */
static void stable_make_chain(Stable *tree, uint32_t *item) {
        uint32_t c = chain_record_new(tree);
        Dup *dup = dup_at(tree, *item);
        Chain *chain = chain_at(tree, c);
        *chain = (Chain){
                .key = dup->key,
                .n_sharing = dup->sharers,
                .n_dups = 1,
                .lists = { NIL, NIL },
                .key_next = dup->next,
        };
        dup->chained = true;
        chain_link(tree, chain, *item);
        tree->n_chained++;
        *item = c | ITEM_CHAIN;
}

/* Puts the dup that is left of a chain in its place. */
static void stable_dissolve_chain(Stable *tree, uint32_t *item) {
        uint32_t c = *item & ~ITEM_CHAIN;
        const Chain *chain = chain_at(tree, c);
        uint32_t i = chain->lists[0] != NIL ? chain->lists[0] : chain->lists[1];
        Dup *dup = dup_at(tree, i);

        dup->chained = dup->full = false;
        dup->prev = NIL;
        dup->next = chain->key_next;
        *item = i;
        tree->n_chained--;
        chain_record_free(tree, c);
}

int stable_insert(Stable *tree, uint64_t key, uint64_t frame, uint32_t sharers) {
        if (frame >> FRAME_BITS != 0 || sharers == 0)
                return -EINVAL;
        int r = stable_prepare(tree);
        if (r < 0)
                return r;

        uint32_t *in_frames = stable_find_frame(tree, frame), *item = stable_find_key(tree, key);
        if (*in_frames != NIL)
                return -EEXIST;
        if (*item != NIL && !(*item & ITEM_CHAIN))
                stable_make_chain(tree, item);

        uint32_t i = dup_new(tree);
        Dup *dup = dup_at(tree, i);
        *dup = (Dup){ .key = key, .frame = frame, .sharers = sharers, .frame_next = NIL, .next = NIL, .prev = NIL };
        *in_frames = i;
        if (*item == NIL) {
                *item = i;
                tree->n_nodes++;
        } else {
                Chain *chain = chain_at(tree, *item & ~ITEM_CHAIN);
                dup->chained = true;
                chain_link(tree, chain, i);
                chain->n_dups++;
                chain->n_sharing += sharers;
                tree->n_chained++;
        }
        tree->n_sharers += sharers;
        stable_adapt(tree);
        return 0;
}

static void stable_remove_dup(Stable *tree, uint32_t i) {
        Dup *dup = dup_at(tree, i);
        uint32_t *item = stable_find_key(tree, dup->key);

        *stable_find_frame(tree, dup->frame) = dup->frame_next;
        tree->n_sharers -= dup->sharers;
        if (dup->chained) {
                Chain *chain = chain_at(tree, *item & ~ITEM_CHAIN);
                chain_unlink(tree, chain, i);
                chain->n_sharing -= dup->sharers;
                tree->n_chained--;
                if (--chain->n_dups == 1)
                        stable_dissolve_chain(tree, item);
        } else {
                *item = dup->next;
                tree->n_nodes--;
        }
        dup_free(tree, i);
        stable_adapt(tree);
}

static void stable_set_dup_sharers(Stable *tree, uint32_t i, uint32_t sharers) {
        Dup *dup = dup_at(tree, i);

        if (sharers == 0) {
                stable_remove_dup(tree, i);
                return;
        }
        if (sharers == dup->sharers)
                return;

        tree->n_sharers += (uint64_t)sharers - dup->sharers;
        if (!dup->chained) {
                dup->sharers = sharers;
                return;
        }
        Chain *chain = chain_at(tree, *stable_find_key(tree, dup->key) & ~ITEM_CHAIN);
        chain->n_sharing += (uint64_t)sharers - dup->sharers;
        dup->sharers = sharers;
        if ((sharers >= tree->max_sharing) != dup->full) {
                chain_unlink(tree, chain, i);
                chain_link(tree, chain, i);
        }
}

int stable_set_sharers(Stable *tree, uint64_t frame, uint32_t sharers) {
        uint32_t i = stable_find_dup(tree, frame);

        if (i == NIL)
                return -ENOENT;
        stable_set_dup_sharers(tree, i, sharers);
        return 0;
}

void stable_set_max_sharing(Stable *tree, uint32_t max_sharing) {
        if (max_sharing == tree->max_sharing)
                return;
        tree->max_sharing = max_sharing;
        for (uint32_t c = 0; c < tree->n_chains; c++)
                chain_sort(tree, chain_at(tree, c));
}

size_t stable_prune(Stable *tree, size_t budget, StableCheck check, void *userdata) {
        size_t removed = 0;

        budget = MIN_OF(budget, (size_t)tree->n_dups);
        while (budget-- > 0) {
                if (tree->checked == tree->n_dups)
                        tree->checked = 0;

                uint32_t i = tree->checked;
                const Dup *dup = dup_at(tree, i);
                uint32_t sharers = check(userdata, dup->key, dup->frame);
                if (sharers > 0)
                        tree->checked++;
                else
                        removed++;
                stable_set_dup_sharers(tree, i, sharers);
        }
        return removed;
}

void stable_counts(const Stable *tree, StableCounts *ret) {
        *ret = (StableCounts){
                .pages_shared = tree->n_dups,
                .pages_sharing = tree->n_sharers - tree->n_dups,
                .stable_node_chains = tree->n_chains,
                .stable_node_dups = tree->n_chained,
                .nodes = tree->n_nodes,
                .bytes = sizeof *tree + tree->arrays.held,
        };
}
