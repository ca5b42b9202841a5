/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * Splitting and joining buckets, by which the unstable tree grows and shrinks. One in sixteen insertions splits a
 * bucket, so this is made for the bucket that has one cell, as all have with keys that are hashes; chains are only
 * right.
 */

#include "index/unstable-cells.h"

void cells_distribute(Unstable *tree, uint32_t from, uint32_t bit, const uint32_t to[2]) {
        uint32_t id[2] = { to[0], to[1] };

        for (; from > 0; from = cell_next(tree, from)) {
                const Cell *cell = cell_at(tree, from);
                for (uint32_t i = 0; i < cell->n; i++) {
                        bool one = unstable_scatter(cell->tags[i]) & bit;
                        Cell *target = cell_at(tree, id[one]);
                        if (target->n == cell_capacity(cell_size(id[one]))) {
                                id[one] = cell_next(tree, id[one]);
                                target = cell_at(tree, id[one]);
                        }
                        cell_append(target, cell_size(id[one]), cell->tags[i], cell_get_ref(cell, cell_size(from), i));
                }
        }
}

/* Entries on their way from one cell to two. */
typedef struct Part {
        uint32_t tags[CELL_ENTRIES_MAX + 1];
        uint8_t refs[(CELL_ENTRIES_MAX + 1) * 5];
        uint32_t n;
} Part;

/* Sorts the entries by a bit of their hash. Each is written to both sides and counts on one: which one cannot be
 * predicted. */
static void cell_part(const Cell *cell, uint32_t size, uint32_t bit, Part *stay, Part *go) {
        const uint8_t *refs = cell_ref(cell, size, 0);
        unsigned shift = __builtin_ctz(bit);
        uint32_t n = cell->n, s = 0, g = 0;

        for (uint32_t i = 0; i < n; i++) {
                uint32_t tag = cell->tags[i], one = unstable_scatter(tag) >> shift & 1;
                stay->tags[s] = go->tags[g] = tag;
                memcpy(stay->refs + s * 5, refs + i * 5, 5);
                memcpy(go->refs + g * 5, refs + i * 5, 5);
                s += 1 - one;
                g += one;
        }
        stay->n = s;
        go->n = g;
}

static void cell_fill(Cell *cell, uint32_t size, const Part *part) {
        cell->n = part->n;
        memcpy(cell->tags, part->tags, part->n * sizeof *part->tags);
        memcpy(cell_ref(cell, size, 0), part->refs, (size_t)part->n * 5);
}

/* Makes two chains that hold what is in one, by a bit of the hash. The buckets are not told. -ENOMEM: as before. */
static int cells_split(Unstable *tree, uint32_t old, uint32_t bit, const uint32_t buckets[2], uint32_t ret_ids[2]) {
        bool single = cell_next(tree, old) == 0;
        Part parts[2];
        size_t n[2] = {};

        if (single) {
                cell_part(cell_at(tree, old), cell_size(old), bit, &parts[0], &parts[1]);
                n[0] = parts[0].n;
                n[1] = parts[1].n;
        } else
                for (uint32_t id = old; id > 0; id = cell_next(tree, id)) {
                        const Cell *cell = cell_at(tree, id);
                        for (uint32_t i = 0; i < cell->n; i++)
                                n[(unstable_scatter(cell->tags[i]) & bit) != 0]++;
                }

        int r = cells_new(tree, buckets[0], n[0], &ret_ids[0]);
        if (r < 0)
                return r;
        r = cells_new(tree, buckets[1], n[1], &ret_ids[1]);
        if (r < 0) {
                cells_free(tree, ret_ids[0]);
                return r;
        }

        if (!single)
                cells_distribute(tree, old, bit, ret_ids);
        else
                for (unsigned k = 0; k < 2; k++)
                        if (ret_ids[k] > 0)
                                cell_fill(cell_at(tree, ret_ids[k]), cell_size(ret_ids[k]), &parts[k]);
        return 0;
}

int unstable_split(Unstable *tree) {
        uint32_t child = tree->buckets.n, parent = buckets_parent(child);
        uint32_t old = *buckets_at(&tree->buckets, parent), ids[2] = {};

        int r = buckets_add(&tree->buckets, 0);
        if (r < 0)
                return r;
        if (old > 0) {
                r = cells_split(tree, old, buckets_bit(child), (uint32_t[2]){ parent, child }, ids);
                if (r < 0) {
                        buckets_drop(&tree->buckets);
                        return r;
                }
        }
        *buckets_at(&tree->buckets, parent) = ids[0];
        *buckets_at(&tree->buckets, child) = ids[1];
        cells_free(tree, old);
        /* Buckets are split in their order: the next one's turn comes soon. */
        unstable_fetch_bucket(tree, buckets_parent(child + 1));
        return 0;
}

int unstable_join(Unstable *tree) {
        uint32_t child = tree->buckets.n - 1, parent = buckets_parent(child), id;
        uint32_t *parent_word = buckets_at(&tree->buckets, parent), *child_word = buckets_at(&tree->buckets, child);
        uint32_t old = *parent_word;

        int r = cells_new(tree, parent, cells_count(tree, old) + cells_count(tree, *child_word), &id);
        if (r < 0)
                return r;

        /* The parent's go first, then the child's behind them: the second call has to find the place. */
        uint32_t both[2] = { id, id };
        cells_distribute(tree, old, 0, both);
        while (both[0] > 0 && cell_at(tree, both[0])->n == cell_capacity(cell_size(both[0])))
                both[0] = cell_next(tree, both[0]);
        cells_distribute(tree, *child_word, 0, both);

        /* One after the other: while the first chain's cells are freed, the child's must be named by its bucket. */
        *parent_word = id;
        cells_free(tree, old);
        old = *buckets_at(&tree->buckets, child);
        *buckets_at(&tree->buckets, child) = 0;
        cells_free(tree, old);
        buckets_drop(&tree->buckets);
        return 0;
}
