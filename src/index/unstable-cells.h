/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "index/buckets.h"
#include "index/unstable.h"

#include <string.h>

/*
 * How the unstable tree keeps a bucket's entries: in one cell, a piece of memory of 1 to 15 cache lines that is
 * exchanged for the next size when it is full. A cell of s lines begins with its header, then come the tags of its
 * entries side by side (so that a look-up compares many at a time), then their page references of five bytes:
 *
 *         | bucket 4 | n 2 | - 2 | tag 4 … | reference 5 … |                    9 bytes an entry
 *
 * Cells of one size form a dense array: a cell that is freed is overwritten with the last one, whose header says which
 * bucket has to learn of it. Cells are named by 32 bits: 4 of size, 28 of place in the array. 0 is no cell.
 *
 * Uniform keys never fill the largest cell (105 entries, where 60 in a bucket are rare). Keys that do, because somebody
 * feeds other than hashes, chain cells of that size, and are slow but right: its last word is the next cell's id.
 */

#define CELL_LINE 64U
#define CELL_SIZES 15U          /* sizes 1 … 15, in lines */
#define CELL_ENTRIES_MAX 105U
#define CELL_PLACE (((uint32_t)1 << 28) - 1)
#define CELL_DYING UINT32_MAX   /* "bucket" of cells that are being freed */

typedef struct Cell {
        uint32_t bucket;
        uint16_t n;
        uint16_t unused;
        uint32_t tags[];
} Cell;

typedef struct CellClass {
        Array cells;
        uint32_t n;
} CellClass;

struct Unstable {
        Arrays arrays;
        Buckets buckets;        /* words: id of the first cell, 0 when the bucket is empty */
        CellClass classes[CELL_SIZES + 1]; /* by size; 0 is not used */
        size_t n;
        size_t expected;        /* entries that there are to be soon: buckets for them are not joined; 0: none */
        uint64_t swept;         /* the position of the sweep, and above its 32 bits how often it has come round */
        uint32_t dying;         /* chain that cells_free() is at: where its moving cells are found */
};

static inline uint32_t cell_size(uint32_t id) {
        return id >> 28;
}

/* Entries that fit a size: the largest gives a word away to the chain. */
static inline uint32_t cell_capacity(uint32_t size) {
        static const uint8_t capacity[CELL_SIZES + 1] = {
                0, 6, 13, 20, 27, 34, 41, 48, 56, 63, 70, 77, 84, 91, 98, 105,
        };
        return capacity[size];
}

static inline Cell *cell_at(const Unstable *tree, uint32_t id) {
        uint32_t size = cell_size(id);
        return (Cell *)(void *)(tree->classes[size].cells.data + (size_t)(id & CELL_PLACE) * size * CELL_LINE);
}

static inline uint32_t *cell_link(Cell *cell) {
        return (uint32_t *)(void *)((uint8_t *)cell + CELL_SIZES * CELL_LINE) - 1;
}

/* The next cell of the same bucket, 0 after the last. */
static inline uint32_t cell_next(const Unstable *tree, uint32_t id) {
        return cell_size(id) == CELL_SIZES ? *cell_link(cell_at(tree, id)) : 0;
}

static inline uint8_t *cell_ref(const Cell *cell, uint32_t size, uint32_t i) {
        return (uint8_t *)cell + offsetof(Cell, tags) + cell_capacity(size) * 4 + i * 5;
}

static inline PageRef cell_get_ref(const Cell *cell, uint32_t size, uint32_t i) {
        const uint8_t *p = cell_ref(cell, size, i);
        uint32_t low;
        memcpy(&low, p, 4);
        return low | (PageRef)p[4] << 32;
}

static inline void cell_set_ref(Cell *cell, uint32_t size, uint32_t i, PageRef ref) {
        uint8_t *p = cell_ref(cell, size, i);
        uint32_t low = ref;
        memcpy(p, &low, 4);
        p[4] = ref >> 32;
}

static inline void cell_append(Cell *cell, uint32_t size, uint32_t tag, PageRef ref) {
        cell->tags[cell->n] = tag;
        cell_set_ref(cell, size, cell->n, ref);
        cell->n++;
}

/* Words of a cell, four at once: every machine we run on has 16-byte vectors, and the compiler knows how to use them. */
typedef uint32_t CellWords __attribute__((vector_size(16)));
typedef uint64_t CellHalves __attribute__((vector_size(16)));

/* Where in the cell the tag is, -1 when it is not. Asks whole lines, from the header on, and decides once at the end:
 * how many entries there are and where the tag is cannot be predicted, and a wrong guess costs more than a line. */
static inline int cell_find(const Cell *cell, uint32_t size, uint32_t tag) {
        static const CellWords places[4] = {
                { UINT32_MAX, 0, 1, 2 }, { 3, 4, 5, 6 }, { 7, 8, 9, 10 }, { 11, 12, 13, 14 },
        };
        const uint32_t *words = (const uint32_t *)(const void *)cell;
        const CellWords want = { tag, tag, tag, tag };
        uint32_t n_words = cell_capacity(size) + offsetof(Cell, tags) / 4;
        CellWords base = {}, found = {}; /* found: the place + 1 in one lane */

        for (uint32_t line = 0; line * 16 < n_words; line++) {
                CellWords here[4];
                memcpy(here, words + line * 16, sizeof here);
                found |= ((CellWords)(here[0] == want) & (places[0] + base)) |
                         ((CellWords)(here[1] == want) & (places[1] + base)) |
                         ((CellWords)(here[2] == want) & (places[2] + base)) |
                         ((CellWords)(here[3] == want) & (places[3] + base));
                base += 16;
        }

        CellHalves halves = (CellHalves)found;
        uint64_t both = halves[0] | halves[1];
        uint32_t i = (uint32_t)(both | both >> 32) - 1;
        if (__builtin_expect(i == UINT32_MAX, true))
                return -1;
        if (__builtin_expect(i < cell->n && cell->tags[i] == tag, true))
                return i;
        /* What is no tag (a tag that left, bytes of references) looked like one. */
        for (i = 0; i < cell->n; i++)
                if (cell->tags[i] == tag)
                        return i;
        return -1;
}

/* A new, empty cell. Pointers to cells of this size die, ids do not. -ENOMEM: as before. */
int cell_new(Unstable *tree, uint32_t size, uint32_t bucket, uint32_t *ret_id);
/* The bucket must not name the cell any more. Other cells may move: pointers and ids of cells are void after it. */
void cell_free(Unstable *tree, uint32_t id);
/* Exchanges the only cell of a bucket for one of another size that holds its entries too. -ENOMEM: as before. */
int cell_resize(Unstable *tree, uint32_t id, uint32_t size);

/* Makes cells with room for n entries, chained where one is not enough; 0 for none. Pointers to cells die, ids do not.
 * The bucket is not told. -ENOMEM: as before. */
int cells_new(Unstable *tree, uint32_t bucket, size_t n, uint32_t *ret_id);
/* Frees a chain that no bucket names (any more). Cells move, as above. */
void cells_free(Unstable *tree, uint32_t id);

/* How many entries a chain holds. */
size_t cells_count(const Unstable *tree, uint32_t id);

/* Moves the entries of a chain to two others, by a bit of their hash; there must be room. */
void cells_distribute(Unstable *tree, uint32_t from, uint32_t bit, const uint32_t to[2]);

/* Adds a bucket, with its share of its parent's entries; or drops the last one, whose entries go to its parent. Cells
 * move. -ENOMEM: as before. */
int unstable_split(Unstable *tree);
int unstable_join(Unstable *tree);

/* Forced into the caller: gcc 12 takes a function that does nothing but prefetch for one without effect, and drops the
 * calls. */
#define _fetch_ __attribute__((always_inline)) static inline

#define FETCH_LINES 5U

/* The lines that a look-up and an insertion touch: header and tags, and where the next reference goes. */
_fetch_ void unstable_fetch_bucket(const Unstable *tree, uint32_t bucket) {
        uint32_t id = *buckets_at(&tree->buckets, bucket);
        if (id == 0)
                return;

        const uint8_t *cell = (const uint8_t *)cell_at(tree, id);
        for (uint32_t line = 0; line < FETCH_LINES; line++)
                __builtin_prefetch(cell + MIN_OF(line, cell_size(id) - 1) * CELL_LINE, 1);
}

/* The bits of a key beyond its tag that the tree keeps: its highest ones, by the bucket that an entry is in. */
#define UNSTABLE_HIGH_BITS 8U
#define UNSTABLE_BUCKETS_MIN ((uint32_t)1 << UNSTABLE_HIGH_BITS)

/* The tag scattered, so that clustered keys spread as uniform ones do (multiplication by 2^64 / golden ratio). */
static inline uint32_t unstable_scatter(uint32_t tag) {
        return tag * UINT64_C(0x9e3779b97f4a7c15) >> 32;
}

/* The key's highest bits enter below bit 8 only. There are 256 buckets at least, so all of them always count, and
 * whatever a split asks for beyond them comes from the tag, which every entry still has. */
static inline uint32_t unstable_hash(uint64_t key) {
        return unstable_scatter(key) ^ (uint32_t)(key >> (64 - UNSTABLE_HIGH_BITS));
}
