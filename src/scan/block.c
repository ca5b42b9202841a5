/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Blocks, their table, and the blocks of one target.
 *
 * The trees refer to pages by the number of their block, and are told nothing when a block goes. So a freed number
 * stays in quarantine until its domain has swept its trees once: until then it resolves to nothing, and can never name
 * a page of another process. Every array that freeing a block needs was made with the block: freeing cannot fail.
 */
#include "scan/block.h"

#include "scan/present.h"

#include <malloc.h>
#include <string.h>

/* As many as 40-bit page references can name: 4 PiB of memory. */
#define BLOCKS_MAX ((uint32_t)1 << 31)
/* A block that nothing is present in is kept for so many passes: programs that free and use again keep their state. */
#define DEAD_PASSES_MAX 3

unsigned page_set_count(const PageSet set) {
        unsigned n = 0;

        for (size_t i = 0; i < BLOCK_PAGES / 64; i++)
                n += (unsigned)__builtin_popcountll(set[i]);
        return n;
}

bool page_set_any(const PageSet set) {
        uint64_t any = 0;

        for (size_t i = 0; i < BLOCK_PAGES / 64; i++)
                any |= set[i];
        return any;
}

void block_table_done(BlockTable *table) {
        for (uint32_t id = 0; id < table->n; id++) {
                if (table->blocks[id]) {
                        free(table->blocks[id]->judge);
                        free(table->blocks[id]->nodes);
                }
                free(table->blocks[id]);
        }
        free(table->blocks);
        free(table->free_ids);
        free(table->quarantine);
        *table = (BlockTable) {};
}

/* Room in all three arrays together. A failure half-way leaves some larger than `allocated` says: harmless. */
static int grow(BlockTable *table) {
        uint32_t want = table->allocated ? table->allocated * 2 : 64;
        uint32_t *ids;
        Block **blocks;

        if (want > BLOCKS_MAX)
                return -ENOSPC;
        blocks = reallocarray(table->blocks, want, sizeof *blocks);
        if (!blocks)
                return -ENOMEM;
        table->blocks = blocks;
        ids = reallocarray(table->free_ids, want, sizeof *ids);
        if (!ids)
                return -ENOMEM;
        table->free_ids = ids;
        ids = reallocarray(table->quarantine, want, sizeof *ids);
        if (!ids)
                return -ENOMEM;
        table->quarantine = ids;
        table->bytes += (uint64_t)(want - table->allocated) * (sizeof *blocks + 2 * sizeof *ids);
        table->allocated = want;
        return 0;
}

int block_new(BlockTable *table, Space *space, uint64_t addr, Block **ret) {
        Block *block;

        if (!table->n_free && table->n == table->allocated) {
                int r = grow(table);
                if (r < 0)
                        return r;
        }
        block = calloc(1, sizeof *block);
        if (!block)
                return -ENOMEM;
        block->addr = addr;
        block->space = space;
        block->id = table->n_free ? table->free_ids[--table->n_free] : table->n++;
        table->blocks[block->id] = block;
        table->bytes += malloc_usable_size(block);
        *ret = block;
        return 0;
}

void block_free(BlockTable *table, Block *block) {
        table->blocks[block->id] = NULL;
        table->quarantine[table->n_quarantine++] = block->id;
        table->bytes -= malloc_usable_size(block) + malloc_usable_size(block->judge) + malloc_usable_size(block->nodes);
        free(block->judge);
        free(block->nodes);
        free(block);
}

int block_make_nodes(Block *block) {
        if (block->nodes)
                return 0;
        block->nodes = calloc(1, BLOCK_PAGES);
        if (!block->nodes)
                return -ENOMEM;
        block->space->table->bytes += malloc_usable_size(block->nodes);
        return 0;
}

void block_table_release_quarantine(BlockTable *table, size_t n) {
        n = MIN_OF(n, table->n_quarantine);
        if (n == 0)
                return;
        memcpy(table->free_ids + table->n_free, table->quarantine, n * sizeof *table->quarantine);
        table->n_free += n;
        table->n_quarantine -= n;
        memmove(table->quarantine, table->quarantine + n, table->n_quarantine * sizeof *table->quarantine);
}

void space_done(Space *space) {
        for (size_t i = 0; i < space->n; i++)
                block_free(space->table, space->blocks[i]);
        if (space->table)
                space->table->bytes -= space->allocated * sizeof *space->blocks;
        free(space->blocks);
        *space = (Space) {};
}

size_t space_first(const Space *space, uint64_t addr) {
        size_t low = 0, high = space->n;

        addr &= ~(BLOCK_BYTES - 1);
        while (low < high) {
                size_t middle = low + (high - low) / 2;

                if (space->blocks[middle]->addr < addr)
                        low = middle + 1;
                else
                        high = middle;
        }
        return low;
}

Block *space_find(const Space *space, uint64_t addr) {
        size_t i = space_first(space, addr);

        return i < space->n && space->blocks[i]->addr == (addr & ~(BLOCK_BYTES - 1)) ? space->blocks[i] : NULL;
}

static void replace_blocks(Space *space, Block **blocks, size_t n, size_t allocated) {
        space->table->bytes += (allocated - space->allocated) * sizeof *blocks;
        free(space->blocks);
        space->blocks = blocks;
        space->n = n;
        space->allocated = allocated;
}

int space_add(Space *space, const uint64_t *addrs, size_t n) {
        size_t allocated = space->n + n, old = 0, count = 0;
        Block **blocks;
        int result = 0;

        if (n == 0)
                return 0;
        blocks = malloc(allocated * sizeof *blocks);
        if (!blocks)
                return -ENOMEM;
        for (size_t i = 0; i < n; i++) {
                while (old < space->n && space->blocks[old]->addr < addrs[i])
                        blocks[count++] = space->blocks[old++];
                if (old < space->n && space->blocks[old]->addr == addrs[i])
                        continue;
                result = block_new(space->table, space, addrs[i], &blocks[count]);
                if (result < 0)
                        break;
                count++;
        }
        while (old < space->n)
                blocks[count++] = space->blocks[old++];
        replace_blocks(space, blocks, count, allocated);
        return result;
}

/* Merges what is there with what was: both by address. Out of memory on the way the space lacks some new blocks, and
 * is as good as any other. */
static int update(Space *space, const PresentList *present) {
        size_t allocated = space->n + present->n, n = 0, old = 0;
        Block **blocks = NULL;
        int result = 0;

        if (allocated) {
                blocks = malloc(allocated * sizeof *blocks);
                if (!blocks)
                        return -ENOMEM;
        }
        for (size_t i = 0; i < present->n || old < space->n;) {
                const PresentBlock *found = i < present->n ? &present->blocks[i] : NULL;
                Block *block = old < space->n ? space->blocks[old] : NULL;

                if (found && (!block || found->addr < block->addr)) {
                        i++;
                        if (!found->pages || result < 0)
                                continue;
                        result = block_new(space->table, space, found->addr, &block);
                        if (result < 0)
                                continue;
                } else if (!found || block->addr < found->addr) {
                        old++;
                        block->huge = false;
                        if (!space->selected && !page_set_any(block->hole) && !block->told &&
                            ++block->dead_passes > DEAD_PASSES_MAX) {
                                block_free(space->table, block);
                                continue;
                        }
                        blocks[n++] = block;
                        continue;
                } else {
                        i++;
                        old++;
                }
                block->huge = found->huge;
                block->dead_passes = 0;
                blocks[n++] = block;
        }
        replace_blocks(space, blocks, n, allocated);
        return result;
}

int space_refresh(Space *space, VmaList *vmas) {
        _cleanup_(present_list_done) PresentList present = {};
        int r = PRESENT_E_PLAIN;

        if (!space->plain_pagemap)
                r = present_scan(space->target->pagemapfd, vmas, &present);
        if (r == PRESENT_E_PLAIN) {
                space->plain_pagemap = true;
                r = vmas->uncounted ? -EOPNOTSUPP : present_read(space->target->pagemapfd, vmas, &present);
        }
        /* Also after execve(2): the process is there, what we knew of it is not. What ends meanwhile looks empty. */
        if (r == -ESRCH || !target_alive(space->target))
                return TARGET_E_GONE;
        if (r < 0)
                return r;
        return update(space, &present);
}
