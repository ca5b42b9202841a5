/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "base/util.h"

/*
 * Memory for the index: slabs of 16 KiB, cut from chunks of 2 MiB, strung together to arrays that grow and shrink at
 * their end by one slab.
 *
 * What is different from a general allocator: slabs move. Hashing scatters the entries of one process over the whole
 * index, so when it leaves, every slab has holes and hardly one is empty; only moving what is left can give memory
 * back. The arrays keep themselves dense (their last element moves into a hole), and so does the pool: the slab that
 * is given back is overwritten with the pool's last one. So the memory held follows the content, upwards and
 * downwards, and no fragmentation can build up over the months a daemon runs.
 *
 * Only giving back moves. Pointers into slabs stay good across slab_array_grow() and die with slab_array_shrink().
 */

#define SLAB_BYTES (16U * 1024)

typedef struct SlabPool SlabPool;

typedef struct SlabArray {
        SlabPool *pool;
        uint32_t *ids;          /* which slab of the pool holds each part of the array */
        size_t n_slabs;
        size_t allocated;
} SlabArray;

typedef struct SlabOwner {
        SlabArray *array;
        uint32_t position;      /* array->ids[position] is this slab */
} SlabOwner;

struct SlabPool {
        uint8_t **chunks;
        size_t n_chunks, allocated_chunks;
        SlabOwner *owners;      /* of the slabs 0 … n_used - 1 */
        size_t allocated_owners;
        size_t n_used;          /* slabs in use: always the first ones */
        size_t n_touched;       /* slabs that hold physical memory: the first ones */
};

#define SLAB_CHUNK_SLABS 128U
#define SLAB_CHUNK_BYTES ((size_t)SLAB_CHUNK_SLABS * SLAB_BYTES)

static inline uint8_t *slab_address(const SlabPool *pool, uint32_t id) {
        return pool->chunks[id / SLAB_CHUNK_SLABS] + (size_t)(id % SLAB_CHUNK_SLABS) * SLAB_BYTES;
}

static inline uint8_t *slab_array_at(const SlabArray *array, size_t slab) {
        return slab_address(array->pool, array->ids[slab]);
}

/* One slab more, its content undefined. -ENOMEM: as before. */
int slab_array_grow(SlabArray *array);
/* One slab less; any other slab of the pool may move meanwhile. */
void slab_array_shrink(SlabArray *array);
/* Frees what the array holds outside the pool, for when the pool goes as a whole. */
void slab_array_destroy(SlabArray *array);

void slab_pool_destroy(SlabPool *pool);

/* What is held for the pool or array, in bytes: slabs are counted with the pool. */
size_t slab_pool_bytes(const SlabPool *pool);
size_t slab_array_bytes(const SlabArray *array);

/* What malloc() adds to an allocation of ours (glibc: a header of 8 bytes, sizes rounded up to 16). */
#define SLAB_MALLOC_OVERHEAD 16U
