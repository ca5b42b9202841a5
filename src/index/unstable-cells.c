/* SPDX-License-Identifier: LGPL-2.1-or-later */

#include "index/unstable-cells.h"

#define FETCH_MOVING 3U

int cell_new(Unstable *tree, uint32_t size, uint32_t bucket, uint32_t *ret_id) {
        CellClass *class = &tree->classes[size];

        if (class->n > CELL_PLACE)
                return -ENOMEM;
        int r = array_grow(&class->cells, ((size_t)class->n + 1) * size * CELL_LINE);
        if (r < 0)
                return r;

        uint32_t id = size << 28 | class->n++;
        Cell *cell = cell_at(tree, id);
        *cell = (Cell){ .bucket = bucket };
        if (size == CELL_SIZES)
                *cell_link(cell) = 0;
        *ret_id = id;
        return 0;
}

/* Whole lines: neither a call nor a string instruction pays for so few. */
static inline void cell_copy(Cell *to, const Cell *from, uint32_t size) {
        typedef struct Line { uint8_t bytes[CELL_LINE]; } Line;
        for (uint32_t line = 0; line < size; line++)
                ((Line *)(void *)to)[line] = ((const Line *)(const void *)from)[line];
}

/* A cell moved: whoever named it has to name its new place. */
static void cell_relink(Unstable *tree, const Cell *moved, uint32_t from, uint32_t to) {
        uint32_t *name = moved->bucket == CELL_DYING ? &tree->dying : buckets_at(&tree->buckets, moved->bucket);

        while (*name != from)
                name = cell_link(cell_at(tree, *name));
        *name = to;
}

void cell_free(Unstable *tree, uint32_t id) {
        uint32_t size = cell_size(id);
        CellClass *class = &tree->classes[size];
        uint32_t last = size << 28 | --class->n;

        if (id != last) {
                Cell *hole = cell_at(tree, id);
                cell_copy(hole, cell_at(tree, last), size);
                cell_relink(tree, hole, last, id);
        }
        array_shrink(&class->cells, (size_t)class->n * size * CELL_LINE);
        /* Those that move next: the cell of one, and the word that has to learn of the other, whose cell is here. */
        if (class->n > FETCH_MOVING) {
                const Cell *next = cell_at(tree, last - 1);
                if (next->bucket != CELL_DYING)
                        __builtin_prefetch(buckets_at(&tree->buckets, next->bucket), 1);
                const uint8_t *later = (const uint8_t *)cell_at(tree, last - FETCH_MOVING);
                for (uint32_t line = 0; line < size; line++)
                        __builtin_prefetch(later + line * CELL_LINE);
        }
}

int cell_resize(Unstable *tree, uint32_t id, uint32_t size) {
        const Cell *old = cell_at(tree, id);
        uint32_t bucket = old->bucket, new_id;

        int r = cell_new(tree, size, bucket, &new_id);
        if (r < 0)
                return r;

        Cell *cell = cell_at(tree, new_id);
        cell->n = old->n;
        memcpy(cell->tags, old->tags, old->n * sizeof *old->tags);
        memcpy(cell_ref(cell, size, 0), cell_ref(old, cell_size(id), 0), (size_t)old->n * 5);
        *buckets_at(&tree->buckets, bucket) = new_id;
        cell_free(tree, id);
        return 0;
}

int cells_new(Unstable *tree, uint32_t bucket, size_t n, uint32_t *ret_id) {
        uint32_t head = 0;

        while (n > 0) {
                uint32_t size = CELL_SIZES, full = cell_capacity(CELL_SIZES), id;
                if (head == 0 && n <= full)
                        for (size = 1; cell_capacity(size) < n;)
                                size++;

                int r = cell_new(tree, size, bucket, &id);
                if (r < 0) {
                        /* Newest first: each is the last of its size, so nothing moves. */
                        while (head > 0) {
                                uint32_t next = cell_next(tree, head);
                                cell_free(tree, head);
                                head = next;
                        }
                        return r;
                }
                if (size == CELL_SIZES)
                        *cell_link(cell_at(tree, id)) = head;
                head = id;
                n -= MIN_OF(n, (size_t)cell_capacity(size));
        }
        *ret_id = head;
        return 0;
}

void cells_free(Unstable *tree, uint32_t id) {
        if (id > 0 && cell_next(tree, id) == 0) {
                cell_free(tree, id);
                return;
        }
        for (uint32_t i = id; i > 0; i = cell_next(tree, i))
                cell_at(tree, i)->bucket = CELL_DYING;

        tree->dying = id;
        while (tree->dying > 0) {
                uint32_t dead = tree->dying;
                tree->dying = cell_next(tree, dead);
                cell_free(tree, dead);
        }
}

size_t cells_count(const Unstable *tree, uint32_t id) {
        size_t n = 0;

        for (; id > 0; id = cell_next(tree, id))
                n += cell_at(tree, id)->n;
        return n;
}
