/* SPDX-License-Identifier: LGPL-2.1-or-later */

#include "index/stable-nodes.h"

uint32_t *stable_find_key(const Stable *tree, uint64_t key) {
        uint32_t *item = stable_bucket(tree, key);

        while (*item != NIL && item_key(tree, *item) != key)
                item = item_next(tree, *item);
        return item;
}

uint32_t *stable_find_frame(const Stable *tree, uint64_t frame) {
        uint32_t *dup = buckets_at(&tree->frames, buckets_find(&tree->frames, stable_hash(frame)));

        while (*dup != NIL && dup_at(tree, *dup)->frame != frame)
                dup = &dup_at(tree, *dup)->frame_next;
        return dup;
}

uint32_t dup_new(Stable *tree) {
        (void)array_grow(&tree->dups, ((size_t)tree->n_dups + 1) * sizeof(Dup));
        return tree->n_dups++;
}

uint32_t chain_record_new(Stable *tree) {
        (void)array_grow(&tree->chains, ((size_t)tree->n_chains + 1) * sizeof(Chain));
        return tree->n_chains++;
}

/* Moves a dup to a gap, and tells all that name it. */
static void dup_move(Stable *tree, uint32_t from, uint32_t to) {
        if (from == to)
                return;

        Dup *dup = dup_at(tree, to);
        *dup = *dup_at(tree, from);
        *stable_find_frame(tree, dup->frame) = to;
        if (!dup->chained) {
                *stable_find_key(tree, dup->key) = to;
                return;
        }
        if (dup->next != NIL)
                dup_at(tree, dup->next)->prev = to;
        if (dup->prev != NIL)
                dup_at(tree, dup->prev)->next = to;
        else
                chain_at(tree, *stable_find_key(tree, dup->key) & ~ITEM_CHAIN)->lists[dup->full] = to;
}

void dup_free(Stable *tree, uint32_t i) {
        /* Who has been asked about in this round stays before who has not. */
        if (i < tree->checked) {
                tree->checked--;
                dup_move(tree, tree->checked, i);
                i = tree->checked;
        }
        tree->n_dups--;
        dup_move(tree, tree->n_dups, i);
        array_shrink(&tree->dups, tree->n_dups * sizeof(Dup));
}

void chain_record_free(Stable *tree, uint32_t i) {
        tree->n_chains--;
        if (i != tree->n_chains) {
                Chain *chain = chain_at(tree, i);
                *chain = *chain_at(tree, tree->n_chains);
                *stable_find_key(tree, chain->key) = i | ITEM_CHAIN;
        }
        array_shrink(&tree->chains, tree->n_chains * sizeof(Chain));
}

void chain_link(const Stable *tree, Chain *chain, uint32_t i) {
        Dup *dup = dup_at(tree, i);

        dup->full = dup->sharers >= tree->max_sharing;
        dup->prev = NIL;
        dup->next = chain->lists[dup->full];
        if (dup->next != NIL)
                dup_at(tree, dup->next)->prev = i;
        chain->lists[dup->full] = i;
}

void chain_unlink(const Stable *tree, Chain *chain, uint32_t i) {
        const Dup *dup = dup_at(tree, i);

        if (dup->next != NIL)
                dup_at(tree, dup->next)->prev = dup->prev;
        if (dup->prev != NIL)
                dup_at(tree, dup->prev)->next = dup->next;
        else
                chain->lists[dup->full] = dup->next;
}

void chain_sort(const Stable *tree, Chain *chain) {
        uint32_t lists[2] = { chain->lists[0], chain->lists[1] };
        chain->lists[0] = chain->lists[1] = NIL;
        for (unsigned l = 0; l < 2; l++)
                while (lists[l] != NIL) {
                        uint32_t i = lists[l];
                        lists[l] = dup_at(tree, i)->next;
                        chain_link(tree, chain, i);
                }
}

/* What the two tables differ in. */
static uint32_t key_entry_hash(const Stable *tree, uint32_t item) {
        return stable_hash(item_key(tree, item));
}

static uint32_t frame_entry_hash(const Stable *tree, uint32_t dup) {
        return stable_hash(dup_at(tree, dup)->frame);
}

static uint32_t *frame_entry_next(const Stable *tree, uint32_t dup) {
        return &dup_at(tree, dup)->frame_next;
}

typedef uint32_t (*EntryHash)(const Stable *tree, uint32_t entry);
typedef uint32_t *(*EntryNext)(const Stable *tree, uint32_t entry);

/* One step of the table towards one bucket for each entry; without memory it is put off. Inlined for each table, so
 * that the calls are direct. */
static inline void table_step(Stable *tree, Buckets *table, uint32_t n, EntryHash hash, EntryNext next) {
        if (n > table->n) {
                uint32_t child = table->n, bit = buckets_bit(child);
                if (buckets_add(table, NIL) < 0)
                        return;
                uint32_t *stay = buckets_at(table, buckets_parent(child)), *go = buckets_at(table, child);
                for (uint32_t entry = *stay; entry != NIL; entry = *stay)
                        if (hash(tree, entry) & bit) {
                                *go = entry;
                                *stay = *next(tree, entry);
                                go = next(tree, entry);
                                *go = NIL;
                        } else
                                stay = next(tree, entry);
        } else if (table->n > 1 && n < table->n - table->n / 4) {
                uint32_t child = table->n - 1;
                uint32_t *end = buckets_at(table, buckets_parent(child));
                while (*end != NIL)
                        end = next(tree, *end);
                *end = *buckets_at(table, child);
                buckets_drop(table);
        }
}

void stable_adapt(Stable *tree) {
        /* Twice: a table of n buckets with 3n/4 entries loses four for three entries. */
        for (unsigned step = 0; step < 2; step++) {
                table_step(tree, &tree->keys, tree->n_nodes, key_entry_hash, item_next);
                table_step(tree, &tree->frames, tree->n_dups, frame_entry_hash, frame_entry_next);
        }
}

int stable_prepare(Stable *tree) {
        int r = tree->n_dups == DUPS_MAX ? -ENOMEM : 0;

        if (r >= 0)
                r = array_reserve(&tree->dups, ((size_t)tree->n_dups + 1) * sizeof(Dup));
        if (r >= 0)
                r = array_reserve(&tree->chains, ((size_t)tree->n_chains + 1) * sizeof(Chain));
        if (r >= 0 && tree->keys.n == 0)
                r = buckets_add(&tree->keys, NIL);
        if (r >= 0 && tree->frames.n == 0)
                r = buckets_add(&tree->frames, NIL);
        return r;
}
