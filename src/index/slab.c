/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * Chunks are 2 MiB and aligned so, that a huge page fits. But no operation here takes a huge page by a fault: clearing
 * it, compacting memory for it first (the kernel does for MADV_HUGEPAGE, by its default), or waiting for a hypervisor
 * to back it (measured: 4.4 ms) would be the longest pause of the whole index. So a chunk is filled page by page, and
 * offered to khugepaged when it is full and the pool is worth it; what is filled partly only is kept from khugepaged,
 * which would fill the rest with zeroes.
 */

#include "index/slab.h"

#include <string.h>
#include <sys/mman.h>

/* Below this many, small pages serve as well: the processor's own tables cover them. */
#define SMALL_CHUNKS 8U

static int chunk_new(uint8_t **ret) {
        /* twice the size always has an aligned half; what is over goes back at once */
        uint8_t *p = mmap(NULL, 2 * SLAB_CHUNK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (p == MAP_FAILED)
                return -ENOMEM;

        size_t skip = -(uintptr_t)p % SLAB_CHUNK_BYTES;
        if (skip > 0)
                munmap(p, skip);
        munmap(p + skip + SLAB_CHUNK_BYTES, SLAB_CHUNK_BYTES - skip);
        *ret = p + skip;
        return 0;
}

static int pool_add_chunk(SlabPool *pool) {
        int r = GROW(pool->chunks, pool->n_chunks, pool->allocated_chunks);
        if (r < 0)
                return r;

        uint8_t *chunk;
        r = chunk_new(&chunk);
        if (r < 0)
                return r;

        /* Advice only: a kernel without huge pages refuses, and nothing is lost. */
        (void)madvise(chunk, SLAB_CHUNK_BYTES, MADV_NOHUGEPAGE);
        if (pool->n_chunks >= SMALL_CHUNKS)
                for (size_t i = pool->n_chunks == SMALL_CHUNKS ? 0 : pool->n_chunks - 1; i < pool->n_chunks; i++)
                        (void)madvise(pool->chunks[i], SLAB_CHUNK_BYTES, MADV_HUGEPAGE);
        pool->chunks[pool->n_chunks++] = chunk;
        return 0;
}

/* Gives back what lies behind the slabs in use, but for some slack, lest a count that swings around a boundary costs
 * system calls: whole chunks, and the end of the last one. */
static void pool_trim(SlabPool *pool) {
        size_t slack = MIN_OF(pool->n_used / 16, (size_t)SLAB_CHUNK_SLABS / 2);
        size_t keep = pool->n_used + slack;

        while (pool->n_chunks > 0 && (pool->n_chunks - 1) * SLAB_CHUNK_SLABS >= keep)
                munmap(pool->chunks[--pool->n_chunks], SLAB_CHUNK_BYTES);
        pool->n_touched = MIN_OF(pool->n_touched, pool->n_chunks * SLAB_CHUNK_SLABS);

        if (pool->n_touched > keep + slack) {
                (void)madvise(pool->chunks[pool->n_chunks - 1], SLAB_CHUNK_BYTES, MADV_NOHUGEPAGE);
                if (madvise(slab_address(pool, keep), (pool->n_touched - keep) * SLAB_BYTES, MADV_DONTNEED) >= 0)
                        pool->n_touched = keep;
        }
}

static int pool_take(SlabPool *pool, SlabArray *array, size_t position, uint32_t *ret_id) {
        size_t id = pool->n_used;
        int r = GROW(pool->owners, id, pool->allocated_owners);
        if (r < 0)
                return r;

        if (id == pool->n_chunks * SLAB_CHUNK_SLABS) {
                r = pool_add_chunk(pool);
                if (r < 0)
                        return r;
        }

        pool->owners[id] = (SlabOwner){ array, position };
        pool->n_used++;
        pool->n_touched = MAX_OF(pool->n_touched, pool->n_used);
        *ret_id = id;
        return 0;
}

static void pool_give_back(SlabPool *pool, uint32_t id) {
        uint32_t last = --pool->n_used;

        if (id != last) {
                SlabOwner owner = pool->owners[last];
                memcpy(slab_address(pool, id), slab_address(pool, last), SLAB_BYTES);
                pool->owners[id] = owner;
                owner.array->ids[owner.position] = id;
        }
        pool_trim(pool);
}

int slab_array_grow(SlabArray *array) {
        int r = GROW(array->ids, array->n_slabs, array->allocated);
        if (r < 0)
                return r;

        r = pool_take(array->pool, array, array->n_slabs, &array->ids[array->n_slabs]);
        if (r < 0)
                return r;
        array->n_slabs++;
        return 0;
}

void slab_array_shrink(SlabArray *array) {
        array->n_slabs--;
        pool_give_back(array->pool, array->ids[array->n_slabs]);
}

void slab_array_destroy(SlabArray *array) {
        free(array->ids);
        *array = (SlabArray){ .pool = array->pool };
}

void slab_pool_destroy(SlabPool *pool) {
        for (size_t i = 0; i < pool->n_chunks; i++)
                munmap(pool->chunks[i], SLAB_CHUNK_BYTES);
        free(pool->chunks);
        free(pool->owners);
        *pool = (SlabPool){};
}

size_t slab_pool_bytes(const SlabPool *pool) {
        return pool->n_touched * SLAB_BYTES + pool->allocated_chunks * sizeof *pool->chunks +
               pool->allocated_owners * sizeof *pool->owners + 2 * SLAB_MALLOC_OVERHEAD;
}

size_t slab_array_bytes(const SlabArray *array) {
        return array->allocated * sizeof *array->ids + SLAB_MALLOC_OVERHEAD;
}
