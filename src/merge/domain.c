/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Finding the pages that have a twin.
 *
 * A page's content is looked up first among the merged contents (stable tree), then among the contents seen once
 * (unstable tree). Both answers are hints: an entry of the unstable tree is believed only while the block it refers
 * to still stands and still has the key's low byte in its check byte for that page; what fails is replaced by the page
 * at hand and counted as stale. A wrong hint costs ksmd a look at a page in vain: equality is decided by the kernel,
 * on bytes, under write protection.
 *
 * Frames, not pages, are what can be saved: a frame that several processes map (fork) is one frame, so a page that
 * merely maps the frame of the page it matches is a twin only if that page has one besides. Frames are compared as they
 * are now, at the moment of the match: the other page may have been read long ago.
 *
 * The batches of one call are matched by many threads without a lock: every content belongs, by bits of its key, to one
 * shard of the unstable tree, and a shard to one thread. What the threads share is only read (the stable tree; which
 * pages are known, and their check bytes), or is a bit that is only ever set meanwhile (twin, saves).
 */
#include "merge/domain.h"

#include <string.h>

#define CONFIRM_SAMPLE 4U
#define SEE_PAGES 512U
#define PRUNE_PER_PASS ((size_t)1 << 16)
/* For every page that was something else before, one entry may have become stale. Four are looked at, so garbage stays
 * below a third. */
#define SWEEP_SHARE 4U
/* While freed block ids wait for it, the sweep goes on whatever changes. */
#define SWEEP_WAITED_FOR ((size_t)1 << 14)
/* And while memory is to be given back, 20 ms a pass. */
#define SWEEP_SHRINKING ((size_t)1 << 19)
#define SAMPLE_BITS_MAX 16U
#define EXPECT_WORTH 4096U      /* pages */

/* A machine may get its second node while we run. */
static bool nodes_matter(const Domain *domain) { return domain->numa && domain->numa->n_nodes > 1; }

/* What a content on this frame is called in the trees: with a tree for each node, contents of different nodes have
 * different keys. The high bits of a key choose neither shard nor sample, nor are they what a block remembers of it. */
static uint64_t tree_key(const Domain *domain, uint64_t key, uint64_t pfn) {
        return nodes_matter(domain) ? key ^ (uint64_t)numa_node_of(domain->numa, pfn) << 56 : key;
}

static bool known_frame(void *userdata, uint64_t pfn, uint64_t *ret_key) {
        const Domain *domain = userdata;

        if (domain->pooled || !stable_has_frame(domain->stable, pfn, ret_key))
                return false;
        *ret_key = tree_key(domain, *ret_key, pfn); /* twice is not at all */
        return true;
}

int domain_new(uint32_t max_page_sharing, unsigned n_threads, const Numa *numa, Domain **ret) {
        _cleanup_(domain_freep) Domain *domain = calloc(1, sizeof *domain);
        int r;

        if (!domain)
                return -ENOMEM;
        domain->numa = numa;
        r = hash_secret_new(&domain->secret);
        if (r < 0)
                return r;
        r = scanner_new(domain->secret, n_threads, &domain->scanner);
        if (r < 0)
                return r;
        for (unsigned i = 0; i < UNSTABLE_SHARDS; i++) {
                r = unstable_new(&domain->shards[i].tree);
                if (r < 0)
                        return r;
        }
        r = stable_new(max_page_sharing, &domain->stable);
        if (r < 0)
                return r;
        scanner_set_known_frames(domain->scanner, known_frame, domain);
        *ret = TAKE_PTR(domain);
        return 0;
}

Domain *domain_free(Domain *domain) {
        if (!domain)
                return NULL;
        stable_free(domain->stable);
        for (unsigned i = 0; i < UNSTABLE_SHARDS; i++) {
                unstable_free(domain->shards[i].tree);
                free(domain->shards[i].items);
        }
        block_table_done(&domain->blocks);
        scanner_free(domain->scanner);
        hash_secret_free(domain->secret);
        free(domain);
        return NULL;
}

void domain_use_pool(Domain *domain) { domain->pooled = true; }

uint64_t domain_key(const Domain *domain, const void *page) {
        uint64_t key = hash_page(domain->secret, page);

        return key == scanner_zero_key(domain->scanner) ? 0 : key;
}

static DomainShard *shard_of(Domain *domain, uint64_t key) {
        return &domain->shards[unstable_shard(key)];
}

void domain_begin_pass(Domain *domain) {
        domain->pass++;
        domain->changed = 0;
        scanner_begin_pass(domain->scanner, domain->pass);
}

void domain_expect(Domain *domain, uint64_t pages) {
        if (pages < EXPECT_WORTH || domain->zeros_only)
                return;
        for (unsigned s = 0; s < UNSTABLE_SHARDS; s++)
                unstable_expect(domain->shards[s].tree, (pages >> domain->sample_bits) / UNSTABLE_SHARDS);
        domain->expecting = true;
}

/* The block still stands and still held this content when it was last read. */
static Block *verify_hint(const Domain *domain, uint64_t key, PageRef ref, unsigned *ret_page) {
        Block *block = block_of_ref(&domain->blocks, ref, ret_page);

        if (!block || !page_set_has(block->hashed, *ret_page) || page_set_has(block->merged, *ret_page) ||
            block->check[*ret_page] != (uint8_t)key)
                return NULL;
        return block;
}

/* Out of memory, a move of the page will not be noticed before it is read again for another reason. */
static void note_node(const Domain *domain, const ScanPage *p) {
        if (nodes_matter(domain) && block_make_nodes(p->block) == 0)
                p->block->nodes[p->page] = (uint8_t)numa_node_of(domain->numa, p->pfn);
}

/* The page has a twin that was read just now; whoever plans for its process may have no other reason to. */
static void found(Block *block, unsigned page) {
        if (page_set_has_shared(block->twin, page))
                return;
        page_set_add_shared(block->twin, page);
        __atomic_store_n(&block->space->found, true, __ATOMIC_RELAXED);
}

/* Whoever held the content alone so far can join those that are merged. */
static void leave_unstable(Domain *domain, const ScanPage *p) {
        PageRef ref;
        Block *block;
        unsigned page;

        if (unstable_take(shard_of(domain, p->key)->tree, p->key, &ref) < 0)
                return;
        block = verify_hint(domain, p->key, ref, &page);
        if (!block)
                return;
        found(block, page);
        page_set_add(block->saves, page);
}

/* -EEXIST is the common case; out of memory, the content is merely not known as merged until it is met again. */
static void see_merged(Domain *domain, ScanPage *p) {
        if (!p->key_known || domain->pooled)
                return;
        note_node(domain, p);
        p->key = tree_key(domain, p->key, p->pfn);
        if (!unstable_in_sample(p->key, domain->sample_bits)) {
                domain->pages_left_out++;
                return;
        }
        (void)stable_insert(domain->stable, p->key, p->pfn, 1);
        leave_unstable(domain, p);
}

/* What the page's own block says of it, before it is matched. */
static void see_page(Domain *domain, const ScanPage *p) {
        Block *block = p->block;
        unsigned page = p->page;
        bool content = p->kind == SCAN_HASHED || p->kind == SCAN_SHARED || p->kind == SCAN_ZERO;
        bool fresh = block->first_pass == domain->pass;

        domain->changed += p->changed || (!content && !fresh);
        if (content && (p->changed || p->written || (p->first && !fresh))) {
                page_set_add(block->changed, page);
                block->unsettled = true;
        } else
                page_set_remove(block->changed, page);
        if (!content || p->first || p->changed || p->kind == SCAN_ZERO) {
                page_set_remove(block->twin, page);
                page_set_remove(block->saves, page);
        }
}

/* Sorts the pages of all batches by shard. */
static int deal(Domain *domain, ScanBatch *batches, size_t n) {
        int r = 0;

        for (unsigned s = 0; s < UNSTABLE_SHARDS; s++)
                domain->shards[s].n = 0;
        for (size_t b = 0; b < n; b++)
                for (unsigned i = 0; i < batches[b].n; i++) {
                        ScanPage *p = &batches[b].pages[i];
                        DomainShard *shard;

                        see_page(domain, p);
                        if (domain->zeros_only || (p->kind != SCAN_HASHED && p->kind != SCAN_SHARED))
                                continue;
                        note_node(domain, p);
                        p->key = tree_key(domain, p->key, p->pfn);
                        shard = shard_of(domain, p->key);
                        if (GROW(shard->items, shard->n, shard->allocated) < 0) {
                                r = -ENOMEM;
                                continue;
                        }
                        shard->items[shard->n++] = (uint32_t)(b * SCAN_BATCH_PAGES + i);
                }
        return r;
}

static void match(Domain *domain, DomainShard *shard, const ScanPage *p, int result, PageRef other) {
        uint64_t frame = 0;
        Block *twin;
        unsigned twin_page;
        bool asked;

        if (result < 0)
                shard->error = result;
        if (result != UNSTABLE_E_TWIN)
                return;
        twin = verify_hint(domain, p->key, other, &twin_page);
        asked = twin && (nodes_matter(domain) || !p->writable_alone) && scan_page_frame(twin, twin_page, &frame) == 0;
        if (asked && nodes_matter(domain) && frame != 0 &&
            numa_node_of(domain->numa, frame) != numa_node_of(domain->numa, p->pfn)) {
                page_set_add_shared(twin->again, twin_page); /* it moved, and belongs into another tree */
                twin = NULL;
        }
        if (!twin) {
                shard->stale++;
                (void)unstable_replace(shard->tree, p->key, other, BLOCK_PAGE_REF(p->block, p->page));
                return;
        }
        if (!p->writable_alone && asked && frame == p->pfn) {
                if (page_set_has_shared(twin->twin, twin_page)) {
                        page_set_add_shared(p->block->twin, p->page);
                        page_set_add_shared(p->block->saves, p->page);
                }
                return;
        }
        page_set_add_shared(p->block->twin, p->page);
        found(twin, twin_page);
        page_set_add_shared(p->block->saves, p->page);
        shard->fork_twin |= page_set_has(twin->forked, twin_page) || page_set_has(p->block->forked, p->page);
}

typedef struct Round {
        Domain *domain;
        ScanBatch *batches;
} Round;

/* Up to SEE_PAGES of the shard's items, from this one on. */
static size_t take_pages(const Round *round, const DomainShard *shard, size_t from,
                         const ScanPage *pages[static SEE_PAGES], uint64_t keys[static SEE_PAGES]) {
        size_t n = MIN_OF(shard->n - from, (size_t)SEE_PAGES);

        for (size_t i = 0; i < n; i++) {
                uint32_t which = shard->items[from + i];

                pages[i] = &round->batches[which / SCAN_BATCH_PAGES].pages[which % SCAN_BATCH_PAGES];
                keys[i] = pages[i]->key;
        }
        return n;
}

/* Takes out those whose content is merged, or is not to be remembered. Returns how many are left. */
static size_t sift(const Domain *domain, DomainShard *shard, const ScanPage **pages, uint64_t *keys, size_t n) {
        StableHit hits[SEE_PAGES];
        bool merged = stable_lookup_batch(domain->stable, keys, n, hits) > 0;
        size_t left = 0;

        for (size_t i = 0; i < n; i++) {
                const ScanPage *p = pages[i];

                if (merged && hits[i].n_dups > 0) {
                        page_set_add_shared(p->block->twin, p->page);
                        page_set_add_shared(p->block->saves, p->page);
                } else if (!unstable_in_sample(p->key, domain->sample_bits))
                        shard->left_out++;
                else {
                        pages[left] = p;
                        keys[left++] = p->key;
                }
        }
        return left;
}

static void match_shard(void *userdata, unsigned thread, size_t item) {
        const Round *round = userdata;
        DomainShard *shard = &round->domain->shards[item];

        for (size_t from = 0; from < shard->n; from += SEE_PAGES) {
                const ScanPage *pages[SEE_PAGES];
                uint64_t keys[SEE_PAGES], refs[SEE_PAGES], others[SEE_PAGES];
                int results[SEE_PAGES];
                size_t n = take_pages(round, shard, from, pages, keys);

                n = sift(round->domain, shard, pages, keys, n);
                for (size_t i = 0; i < n; i++)
                        refs[i] = BLOCK_PAGE_REF(pages[i]->block, pages[i]->page);
                unstable_see_batch(shard->tree, keys, refs, n, results, others);
                for (size_t i = 0; i < n; i++)
                        match(round->domain, shard, pages[i], results[i], others[i]);
        }
}

int domain_see(Domain *domain, Crew *crew, ScanBatch *batches, size_t n) {
        Round round = { .domain = domain, .batches = batches };
        int r = deal(domain, batches, n);

        crew_run(crew, UNSTABLE_SHARDS, match_shard, &round);
        for (unsigned s = 0; s < UNSTABLE_SHARDS; s++) {
                DomainShard *shard = &domain->shards[s];

                domain->stats.stale += shard->stale;
                domain->pages_left_out += shard->left_out;
                domain->fork_twin |= shard->fork_twin;
                r = shard->error < 0 ? shard->error : r;
                shard->fork_twin = false;
                shard->stale = shard->left_out = 0;
                shard->error = 0;
        }
        for (size_t b = 0; b < n; b++)
                for (unsigned i = 0; i < batches[b].n; i++)
                        if (batches[b].pages[i].kind == SCAN_KSM)
                                see_merged(domain, &batches[b].pages[i]);
        return r;
}

int domain_confirm_block(Domain *domain, Block *block, const VmaList *vmas) {
        PageSet candidates;
        unsigned n, step, seen = 0;

        for (unsigned i = 0; i < ELEMENTSOF(candidates); i++)
                candidates[i] = (block->twin[i] | block->zero[i]) & ~block->changed[i];
        n = page_set_count(candidates);
        if (n == 0)
                return 0;
        step = MAX_OF(n / CONFIRM_SAMPLE, 1U);
        for (unsigned i = 0; i < BLOCK_PAGES; i++) {
                uint64_t key = 0;
                ScanKind kind;
                bool same;

                if (!page_set_has(candidates, i) || seen++ % step != 0)
                        continue;
                kind = scan_page_again(domain->scanner, block->space->target, vmas, block->addr + i * PAGE_BYTES, &key);
                same = page_set_has(block->zero, i) ? kind == SCAN_ZERO || kind == SCAN_ZEROPAGE
                                                    : kind == SCAN_HASHED && (uint8_t)key == block->check[i];
                if (!same) {
                        if (!target_alive(block->space->target))
                                return TARGET_E_GONE;
                        memcpy(block->changed, block->hashed, sizeof block->changed);
                        block->unsettled = true;
                        return 0;
                }
        }
        return 0;
}

/* What only its being shared by a fork keeps from being merged by us (KSM does not mind), or from being given back. */
static void find_kept(const Domain *domain, const Block *block, PageSet ret) {
        for (unsigned i = 0; i < ELEMENTSOF(block->forked); i++)
                ret[i] = block->forked[i] & block->hashed[i] &
                         (block->zero[i] | (domain->pooled ? block->twin[i] : 0));
}

/* The pages of one block that lie on another node than they did, or that a fork does not share any more. */
static void find_outdated(const Domain *domain, Block *block) {
        const bool nodes_known = nodes_matter(domain) && block->nodes;
        uint64_t frames[BLOCK_PAGES];
        PageSet kept, alone;

        find_kept(domain, block, kept);
        if ((!nodes_known && !page_set_any(kept)) || scan_block_frames(block, frames, alone) != 0)
                return;
        for (unsigned i = 0; i < BLOCK_PAGES && nodes_known; i++)
                if (frames[i] != 0 && page_set_has(block->hashed, i) && !page_set_has(block->zero, i) && /* in no tree */
                    numa_node_of(domain->numa, frames[i]) != block->nodes[i])
                        page_set_add(block->again, i);
        for (unsigned i = 0; i < ELEMENTSOF(kept); i++)
                block->again[i] |= kept[i] & alone[i];
}

void domain_find_outdated(const Domain *domain, Space *space, size_t budget) {
        for (budget = MIN_OF(budget, space->n); budget > 0; budget--) {
                space->outdated_at = space->outdated_at < space->n ? space->outdated_at : 0;
                find_outdated(domain, space->blocks[space->outdated_at++]);
        }
}

static bool entry_is_stale(void *userdata, uint32_t tag, PageRef ref) {
        const Domain *domain = userdata;
        unsigned page;

        return !unstable_in_sample(tag, domain->sample_bits) || !verify_hint(domain, tag, ref, &page);
}

/* Each shard in proportion to what it holds, so that all come round together. */
static void sweep(Domain *domain, size_t budget) {
        size_t total = 0;
        bool round_over = true;

        for (unsigned s = 0; s < UNSTABLE_SHARDS; s++)
                total += unstable_count(domain->shards[s].tree);
        for (unsigned s = 0; s < UNSTABLE_SHARDS; s++) {
                DomainShard *shard = &domain->shards[s];
                size_t count = unstable_count(shard->tree);
                size_t part = (size_t)((double)budget * (double)count / (double)(total + 1)) + 1;

                part = budget >= total ? SIZE_MAX : part;
                domain->stats.stale += unstable_sweep(shard->tree, part, entry_is_stale, domain);
                round_over &= unstable_swept(shard->tree) - shard->swept >= UNSTABLE_ROUND;
        }
        if (!round_over)
                return;
        /* A freed block's id may be given out again once no entry can name its former owner. A round that was over in
         * one call began after the last block was freed. */
        block_table_release_quarantine(&domain->blocks,
                                       budget >= total ? domain->blocks.n_quarantine : domain->quarantined);
        domain->quarantined = domain->blocks.n_quarantine;
        for (unsigned s = 0; s < UNSTABLE_SHARDS; s++)
                domain->shards[s].swept = unstable_swept(domain->shards[s].tree);
}

void domain_end_pass(Domain *domain) {
        size_t budget = domain->changed * SWEEP_SHARE;

        for (unsigned s = 0; s < UNSTABLE_SHARDS && domain->expecting; s++)
                unstable_expect(domain->shards[s].tree, 0);
        domain->expecting = false;
        if (domain->blocks.n_quarantine > 0)
                budget = MAX_OF(budget, SWEEP_WAITED_FOR);
        if (domain->shrinking > 0) {
                budget = MAX_OF(budget, SWEEP_SHRINKING);
                domain->shrinking -= MIN_OF(domain->shrinking, budget);
        }
        if (budget > 0)
                sweep(domain, budget);
}

typedef struct Sharers {
        const Domain *domain;
        StableCheck mappings;
        void *userdata;
} Sharers;

static uint32_t count_sharers(void *userdata, uint64_t key, uint64_t frame) {
        const Sharers *sharers = userdata;

        return unstable_in_sample(key, sharers->domain->sample_bits) ? sharers->mappings(sharers->userdata, key, frame)
                                                                     : 0;
}

void domain_count_sharers(Domain *domain, StableCheck mappings, void *userdata) {
        Sharers sharers = { domain, mappings, userdata };

        domain->stats.pruned += stable_prune(domain->stable, PRUNE_PER_PASS, count_sharers, &sharers);
}

/* What a smaller sample makes smaller. */
static uint64_t index_bytes(const Domain *domain) {
        StableCounts counts;
        uint64_t bytes;

        stable_counts(domain->stable, &counts);
        bytes = counts.bytes;
        for (unsigned s = 0; s < UNSTABLE_SHARDS; s++)
                bytes += unstable_bytes(domain->shards[s].tree);
        return bytes;
}

/* What falls out of a smaller sample goes with the next sweeps, and only then is judged anew. */
void domain_limit_memory(Domain *domain, uint64_t bytes_max) {
        uint64_t bytes = domain_bytes(domain), index = index_bytes(domain), rest = bytes - index;

        if (domain->shrinking > 0)
                return;
        if (bytes > bytes_max && domain->sample_bits < SAMPLE_BITS_MAX) {
                do {
                        domain->sample_bits++;
                        index /= 2;
                } while (rest + index > bytes_max / 4 * 3 && domain->sample_bits < SAMPLE_BITS_MAX && index > 0);
                domain->shrinking = 1;
                for (unsigned s = 0; s < UNSTABLE_SHARDS; s++)
                        domain->shrinking += unstable_count(domain->shards[s].tree);
        } else if (bytes < bytes_max / 4 && domain->sample_bits > 0)
                domain->sample_bits--;
}

uint64_t domain_bytes(const Domain *domain) {
        uint64_t items = 0;

        for (unsigned s = 0; s < UNSTABLE_SHARDS; s++)
                items += domain->shards[s].allocated * sizeof *domain->shards[s].items;
        return index_bytes(domain) + items + domain->blocks.bytes;
}
