/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * A hash table without empty places and without a moment of rehashing. Of a key, the low 32 bits are stored (the tag)
 * and the high 8 are known from the bucket that the entry is in. Buckets are split and joined one at a time as the
 * tree grows and shrinks (index/buckets.h), so one holds between half of ENTRIES_MEAN and twice that, give or take, and
 * lives in a cell just large enough (index/unstable-cells.h). A red-black tree over the same entries would pay 24 bytes
 * for its pointers alone, an open-addressed table that doubles pays for its empty places and stops everything while it
 * does.
 *
 * What must always hold:
 *   - an entry is in the bucket that buckets_find(unstable_hash(key)) names, in a cell of that bucket's chain;
 *   - a tag occurs once in a bucket: equal tags of different keys differ in the high bits, hence in the bucket;
 *   - a bucket's first cell is not empty, and it is the only one but with keys that are no hashes;
 *   - splitting, joining, and shrinking a cell are improvements: without memory they are left for the next time.
 */

#include "index/unstable-cells.h"

#include <limits.h>

/* Entries in a bucket on average. More saves headers and half-filled lines, less has shorter look-ups. */
#define ENTRIES_MEAN 16U
/* Joined below this, split above the mean: the distance keeps a swinging count from splitting and joining. */
#define ENTRIES_LOW 14U
/* The cells of which most are, and what an entry takes in them, with what is free. */
#define EXPECTED_SIZES 5U
#define EXPECTED_ENTRY_BYTES 12U
/* A cell is exchanged for a smaller one when this many places would still be free in that. */
#define SHRINK_SLACK 2U
/* How far ahead a batch fetches the bucket's word, and then its cell (tried: 8 to 64; nearer, they come too late on a
 * busy machine, farther gains nothing). */
#define FETCH_WORD 64U
#define FETCH_CELL 24U

int unstable_new(Unstable **ret) {
        Unstable *tree = calloc(1, sizeof *tree);
        if (!tree)
                return -ENOMEM;

        array_init(&tree->buckets.words, &tree->arrays);
        for (uint32_t size = 1; size <= CELL_SIZES; size++)
                array_init(&tree->classes[size].cells, &tree->arrays);
        *ret = tree;
        return 0;
}

Unstable *unstable_free(Unstable *tree) {
        if (!tree)
                return NULL;

        array_done(&tree->buckets.words);
        for (uint32_t size = 1; size <= CELL_SIZES; size++)
                array_done(&tree->classes[size].cells);
        free(tree);
        return NULL;
}

_fetch_ void unstable_fetch_cell(const Unstable *tree, uint64_t key) {
        unstable_fetch_bucket(tree, buckets_find(&tree->buckets, unstable_hash(key)));
}

_fetch_ void unstable_fetch_word(const Unstable *tree, uint64_t key) {
        __builtin_prefetch(buckets_at(&tree->buckets, buckets_find(&tree->buckets, unstable_hash(key))));
}

static bool has_too_many_buckets(const Unstable *tree) {
        return tree->buckets.n > UNSTABLE_BUCKETS_MIN &&
                MAX_OF(tree->n, tree->expected) < (size_t)tree->buckets.n * ENTRIES_LOW;
}

/* Keeps the number of buckets at the number of entries. Two steps for each change of one entry catch up after a time
 * without memory. */
static void unstable_adapt(Unstable *tree, unsigned steps) {
        while (steps-- > 0) {
                int r;
                if (tree->n > (size_t)tree->buckets.n * ENTRIES_MEAN)
                        r = unstable_split(tree);
                else if (has_too_many_buckets(tree))
                        r = unstable_join(tree);
                else
                        return;
                if (r < 0)
                        return;
        }
}

static int unstable_prepare(Unstable *tree) {
        while (__builtin_expect(tree->buckets.n < UNSTABLE_BUCKETS_MIN, false)) {
                int r = buckets_add(&tree->buckets, 0);
                if (r < 0)
                        return r;
        }
        return 0;
}

/* Buckets that are split while there is little in them move next to nothing; split one by one as they fill, every entry
 * is moved once or twice (bench-index, a million entries, a busy machine: 107 ns for an insertion, 64 so). */
void unstable_expect(Unstable *tree, size_t n) {
        size_t buckets;

        tree->expected = n > 0 ? tree->n + n : 0;
        for (uint32_t size = 1; size <= EXPECTED_SIZES && n > 0; size++)
                array_expect(&tree->classes[size].cells, n * EXPECTED_ENTRY_BYTES);
        arrays_expect(&tree->arrays, n > 0);
        if (unstable_prepare(tree) < 0)
                return;
        buckets = MAX_OF(tree->n, tree->expected) / ENTRIES_MEAN;
        while (tree->buckets.n < MIN_OF(buckets, (size_t)BUCKETS_MAX))
                if (unstable_split(tree) < 0)
                        return;
        while (n == 0 && has_too_many_buckets(tree))
                if (unstable_join(tree) < 0)
                        return;
}

/* Where the key's entry is: true with its cell and place in it. */
static inline bool unstable_find(const Unstable *tree, uint64_t key, uint32_t *ret_bucket, uint32_t *ret_id,
                                 uint32_t *ret_i) {
        if (tree->buckets.n < UNSTABLE_BUCKETS_MIN)
                return false;

        *ret_bucket = buckets_find(&tree->buckets, unstable_hash(key));
        for (uint32_t id = *buckets_at(&tree->buckets, *ret_bucket); id > 0; id = cell_next(tree, id)) {
                int i = cell_find(cell_at(tree, id), cell_size(id), key);
                if (i >= 0) {
                        *ret_id = id;
                        *ret_i = i;
                        return true;
                }
        }
        return false;
}

/* Of a bucket's first cell. What the bucket is expected to hold it gets at once, and is not exchanged on the way. */
static uint32_t first_size(const Unstable *tree) {
        size_t each = tree->expected / tree->buckets.n;
        uint32_t size = 1;

        while (size < CELL_SIZES && cell_capacity(size + 1) <= each)
                size++;
        return size;
}

/* Makes room for more entries in the bucket's first cell, which is full or missing. */
static int bucket_grow(Unstable *tree, uint32_t bucket) {
        uint32_t id = *buckets_at(&tree->buckets, bucket), size = cell_size(id), new_id;

        if (id > 0 && size < CELL_SIZES)
                return cell_resize(tree, id, size + 1);

        int r = cell_new(tree, id > 0 ? CELL_SIZES : first_size(tree), bucket, &new_id);
        if (r < 0)
                return r;
        if (id > 0)
                *cell_link(cell_at(tree, new_id)) = id;
        *buckets_at(&tree->buckets, bucket) = new_id;
        return 0;
}

int unstable_see(Unstable *tree, uint64_t key, PageRef ref, PageRef *ret_other) {
        uint32_t bucket = 0, id, i;

        if (ref >> PAGE_REF_BITS != 0)
                return -EINVAL;
        int r = unstable_prepare(tree);
        if (r < 0)
                return r;

        if (unstable_find(tree, key, &bucket, &id, &i)) {
                PageRef other = cell_get_ref(cell_at(tree, id), cell_size(id), i);
                if (other == ref)
                        return UNSTABLE_E_SELF;
                *ret_other = other;
                return UNSTABLE_E_TWIN;
        }

        id = *buckets_at(&tree->buckets, bucket);
        if (id == 0 || cell_at(tree, id)->n == cell_capacity(cell_size(id))) {
                r = bucket_grow(tree, bucket);
                if (r < 0)
                        return r;
                id = *buckets_at(&tree->buckets, bucket);
        }
        cell_append(cell_at(tree, id), cell_size(id), key, ref);
        tree->n++;
        unstable_adapt(tree, 2);
        return 0;
}

void unstable_see_batch(Unstable *tree, const uint64_t *keys, const PageRef *refs, size_t n, int *results,
                        PageRef *others) {
        bool fetch = unstable_prepare(tree) >= 0;

        for (size_t i = 0; i < MIN_OF(n, (size_t)FETCH_WORD) && fetch; i++)
                unstable_fetch_word(tree, keys[i]);
        for (size_t i = 0; i < MIN_OF(n, (size_t)FETCH_CELL) && fetch; i++)
                unstable_fetch_cell(tree, keys[i]);
        for (size_t i = 0; i < n; i++) {
                if (fetch && n - i > FETCH_WORD)
                        unstable_fetch_word(tree, keys[i + FETCH_WORD]);
                if (fetch && n - i > FETCH_CELL)
                        unstable_fetch_cell(tree, keys[i + FETCH_CELL]);
                results[i] = unstable_see(tree, keys[i], refs[i], &others[i]);
        }
}

int unstable_replace(Unstable *tree, uint64_t key, PageRef old, PageRef ref) {
        uint32_t bucket, id, i;

        if (ref >> PAGE_REF_BITS != 0)
                return -EINVAL;
        if (!unstable_find(tree, key, &bucket, &id, &i) || cell_get_ref(cell_at(tree, id), cell_size(id), i) != old)
                return -ENOENT;
        cell_set_ref(cell_at(tree, id), cell_size(id), i, ref);
        return 0;
}

/* After entries left: frees the first cell when it is empty, or exchanges a bucket's only one for one that fits. */
static void bucket_tidy(Unstable *tree, uint32_t bucket) {
        uint32_t id;

        while ((id = *buckets_at(&tree->buckets, bucket)) > 0 && cell_at(tree, id)->n == 0) {
                *buckets_at(&tree->buckets, bucket) = cell_next(tree, id);
                cell_free(tree, id);
        }
        if (id == 0 || cell_next(tree, id) > 0)
                return;

        uint32_t n = cell_at(tree, id)->n, size = cell_size(id);
        while (size > 1 && n + SHRINK_SLACK <= cell_capacity(size - 1))
                size--;
        if (size < cell_size(id))
                (void)cell_resize(tree, id, size);
}

int unstable_take(Unstable *tree, uint64_t key, PageRef *ret) {
        uint32_t bucket, id, i;

        if (!unstable_find(tree, key, &bucket, &id, &i))
                return -ENOENT;
        *ret = cell_get_ref(cell_at(tree, id), cell_size(id), i);

        /* The first cell's last entry moves into the gap. */
        uint32_t head = *buckets_at(&tree->buckets, bucket);
        Cell *first = cell_at(tree, head), *cell = cell_at(tree, id);
        uint32_t last = --first->n;
        cell->tags[i] = first->tags[last];
        cell_set_ref(cell, cell_size(id), i, cell_get_ref(first, cell_size(head), last));

        tree->n--;
        bucket_tidy(tree, bucket);
        unstable_adapt(tree, 2);
        return 0;
}

/* Asks about every entry of the bucket. */
static size_t bucket_sweep(Unstable *tree, uint32_t bucket, UnstableStale stale, void *userdata) {
        uint32_t head = *buckets_at(&tree->buckets, bucket), fresh;
        size_t dropped = 0;

        for (uint32_t id = head; id > 0; id = cell_next(tree, id)) {
                uint32_t size = cell_size(id);
                Cell *cell = cell_at(tree, id);
                for (uint32_t i = 0; i < cell->n;) {
                        PageRef ref = cell_get_ref(cell, size, i);
                        if (!stale(userdata, cell->tags[i], ref)) {
                                i++;
                                continue;
                        }
                        uint32_t last = --cell->n;
                        cell->tags[i] = cell->tags[last];
                        cell_set_ref(cell, size, i, cell_get_ref(cell, size, last));
                        dropped++;
                }
        }
        tree->n -= dropped;
        if (dropped == 0)
                return 0;

        bucket_tidy(tree, bucket);
        head = *buckets_at(&tree->buckets, bucket);
        if (head > 0 && cell_next(tree, head) > 0 && cells_new(tree, bucket, cells_count(tree, head), &fresh) >= 0) {
                cells_distribute(tree, head, 0, (uint32_t[2]){ fresh, fresh });
                *buckets_at(&tree->buckets, bucket) = fresh;
                cells_free(tree, head);
        }
        return dropped;
}

size_t unstable_sweep(Unstable *tree, size_t budget, UnstableStale stale, void *userdata) {
        uint64_t around = tree->swept + UNSTABLE_ROUND;
        size_t dropped = 0, asked = 0;
        uint32_t i = 0;

        if (budget == 0)
                return 0;

        /* Once around is every bucket once: their number changes only after the walk. */
        for (; i < tree->buckets.n && tree->n > 0 && asked < budget; i++) {
                uint32_t position = (uint32_t)tree->swept, next = buckets_position_next(&tree->buckets, position);
                uint32_t bucket = buckets_position_bucket(&tree->buckets, position);
                uint32_t head = *buckets_at(&tree->buckets, bucket);
                if (head > 0) {
                        asked += cells_count(tree, head);
                        dropped += bucket_sweep(tree, bucket, stale, userdata);
                }
                tree->swept += (next > 0 ? next : UNSTABLE_ROUND) - position;
        }
        if (i == tree->buckets.n || tree->n == 0)
                tree->swept = around; /* also where the walk began amid a bucket */
        unstable_adapt(tree, UINT_MAX);
        return dropped;
}

uint64_t unstable_swept(const Unstable *tree) {
        return tree->swept;
}

size_t unstable_count(const Unstable *tree) {
        return tree->n;
}

size_t unstable_bytes(const Unstable *tree) {
        return sizeof *tree + tree->arrays.held;
}
