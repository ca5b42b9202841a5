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
 * merely maps a frame already met is a twin only if that frame itself has a twin.
 */
#include "merge/domain.h"

#include <string.h>

#define CONFIRM_SAMPLE 4U
#define PRUNE_PER_PASS ((size_t)1 << 16)
#define SWEEP_PER_PASS ((size_t)1 << 18)

static bool known_frame(void *userdata, uint64_t pfn, uint64_t *ret_key) {
        Domain *domain = userdata;

        return stable_has_frame(domain->stable, pfn, ret_key);
}

int domain_new(const char *name, uint32_t max_page_sharing, Domain **ret) {
        _cleanup_(domain_freep) Domain *domain = calloc(1, sizeof *domain);
        int r;

        if (!domain)
                return -ENOMEM;
        domain->name = strdup(name);
        if (!domain->name)
                return -ENOMEM;
        r = hash_secret_new(&domain->secret);
        if (r < 0)
                return r;
        r = scanner_new(domain->secret, 1, &domain->scanner);
        if (r < 0)
                return r;
        r = unstable_new(&domain->unstable);
        if (r < 0)
                return r;
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
        unstable_free(domain->unstable);
        block_table_done(&domain->blocks);
        scanner_free(domain->scanner);
        hash_secret_free(domain->secret);
        free(domain->frames);
        free(domain->name);
        free(domain);
        return NULL;
}

void domain_begin_pass(Domain *domain) {
        domain->pass++;
        domain->n_frames = 0;
        domain->running = (DomainStats){ .stale = domain->stats.stale, .pruned = domain->stats.pruned };
        scanner_begin_pass(domain->scanner, domain->pass);
}

/* The block still stands and still held this content when it was last read. */
static Block *verify_hint(Domain *domain, uint64_t key, PageRef ref, unsigned *ret_page) {
        Block *block = block_of_ref(&domain->blocks, ref, ret_page);

        if (!block || !page_set_has(block->hashed, *ret_page) || page_set_has(block->merged, *ret_page) ||
            block->check[*ret_page] != (uint8_t)key)
                return NULL;
        return block;
}

static void see_merged(Domain *domain, Block *block, unsigned page, const ScanPage *p) {
        if (GROW(domain->frames, domain->n_frames, domain->frames_allocated) == 0)
                domain->frames[domain->n_frames++] = p->pfn;
        domain->running.pages_merged++;
        if (!p->key_known)
                return;
        /* -EEXIST is the common case; out of memory, the content is merely not known as merged until the next pass. */
        (void)stable_insert(domain->stable, p->key, p->pfn, 1);
        (void)unstable_remove(domain->unstable, p->key, BLOCK_PAGE_REF(block, page));
}

static int see_content(Domain *domain, Block *block, unsigned page, const ScanPage *p, int result, PageRef other) {
        Block *twin;
        unsigned twin_page;
        StableHit hit;

        if (stable_lookup(domain->stable, p->key, &hit)) {
                page_set_add(block->twin_next, page);
                domain->running.expected += p->kind == SCAN_HASHED;
                if (result == 0) /* merged contents have no business among those seen once */
                        (void)unstable_remove(domain->unstable, p->key, BLOCK_PAGE_REF(block, page));
                return 0;
        }
        if (result < 0)
                return result;
        if (result != UNSTABLE_E_TWIN)
                return 0;
        twin = verify_hint(domain, p->key, other, &twin_page);
        if (!twin) {
                domain->running.stale++;
                return unstable_replace(domain->unstable, p->key, other, BLOCK_PAGE_REF(block, page));
        }
        if (p->kind == SCAN_SHARED) {
                if (page_set_has(twin->twin_next, twin_page) || page_set_has(twin->twin, twin_page))
                        page_set_add(block->twin_next, page);
                return 0;
        }
        page_set_add(block->twin_next, page);
        page_set_add(twin->twin_next, twin_page);
        domain->running.expected++;
        return 0;
}

int domain_see(Domain *domain, const ScanBatch *batch) {
        uint64_t keys[BLOCK_PAGES], refs[BLOCK_PAGES], others[BLOCK_PAGES];
        uint16_t pages[BLOCK_PAGES];
        int results[BLOCK_PAGES], r = 0;
        size_t n = 0;

        for (unsigned k = 0; k < batch->n; k++) {
                const ScanPage *p = &batch->pages[k];
                Block *block = p->block;
                bool fresh = block->first_pass == domain->pass;
                unsigned i = p->page;

                page_set_remove(block->changed, i);
                if (p->kind != SCAN_ZEROPAGE)
                        page_set_remove(block->given, i);
                if (p->kind == SCAN_KSM)
                        see_merged(domain, block, i, p);
                if (p->kind != SCAN_HASHED && p->kind != SCAN_SHARED && p->kind != SCAN_ZERO)
                        continue;
                if (p->changed || (p->first && !fresh)) {
                        page_set_add(block->changed, i);
                        domain->running.pages_volatile++;
                }
                if (p->kind == SCAN_ZERO) {
                        domain->running.pages_zero_found++;
                        domain->running.expected++;
                        continue;
                }
                keys[n] = p->key;
                refs[n] = BLOCK_PAGE_REF(block, i);
                pages[n++] = (uint16_t)k;
        }
        if (n == 0)
                return 0;
        unstable_see_batch(domain->unstable, keys, refs, n, results, others);
        for (size_t k = 0; k < n; k++) {
                const ScanPage *p = &batch->pages[pages[k]];
                int s = see_content(domain, p->block, p->page, p, results[k], others[k]);
                if (s < 0)
                        r = s;
        }
        return r;
}

int domain_confirm_block(Domain *domain, Block *block, const VmaList *vmas) {
        PageSet candidates;
        unsigned n, step, seen = 0;

        for (unsigned i = 0; i < ELEMENTSOF(candidates); i++)
                candidates[i] = (block->twin_next[i] | block->zero[i]) & ~block->changed[i];
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
                        memset(block->changed, 0xff, sizeof block->changed);
                        domain->running.pages_volatile += n;
                        return 0;
                }
        }
        return 0;
}

static int compare_frames(const void *a, const void *b) {
        uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
        return x < y ? -1 : x > y;
}

static size_t first_frame(const Domain *domain, uint64_t frame) {
        size_t low = 0, high = domain->n_frames;

        while (low < high) {
                size_t middle = low + (high - low) / 2;
                if (domain->frames[middle] < frame)
                        low = middle + 1;
                else
                        high = middle;
        }
        return low;
}

/* How often the pass that just ended met the frame. */
static uint32_t frame_sharers(void *userdata, uint64_t key, uint64_t frame) {
        const Domain *domain = userdata;
        size_t i = first_frame(domain, frame);
        uint32_t n = 0;

        for (; i < domain->n_frames && domain->frames[i] == frame; i++)
                n++;
        return n;
}

static bool entry_is_stale(void *userdata, uint32_t tag, PageRef ref) {
        unsigned page;

        return !verify_hint(userdata, tag, ref, &page);
}

static void prune(Domain *domain) {
        size_t count = unstable_count(domain->unstable);

        if (domain->n_frames > 0)
                qsort(domain->frames, domain->n_frames, sizeof *domain->frames, compare_frames);
        for (size_t i = 0, j; i < domain->n_frames; i = j) {
                for (j = i + 1; j < domain->n_frames && domain->frames[j] == domain->frames[i]; j++)
                        ;
                (void)stable_set_sharers(domain->stable, domain->frames[i], (uint32_t)(j - i));
        }
        domain->running.pruned += stable_prune(domain->stable, PRUNE_PER_PASS, frame_sharers, domain);
        domain->running.stale += unstable_sweep(domain->unstable, SWEEP_PER_PASS, entry_is_stale, domain);
        /* A freed block's id may be given out again once no entry can name its former owner. */
        domain->swept += SWEEP_PER_PASS;
        if (domain->swept >= count) {
                /* A round that was over in one call began after the last block of this pass was freed. */
                block_table_release_quarantine(&domain->blocks, count <= SWEEP_PER_PASS ? domain->blocks.n_quarantine
                                                                                        : domain->quarantined);
                domain->swept = 0;
                domain->quarantined = domain->blocks.n_quarantine;
        }
}

void domain_end_pass(Domain *domain, Space *const *spaces, size_t n) {
        for (size_t s = 0; s < n; s++)
                for (size_t b = 0; b < spaces[s]->n; b++) {
                        Block *block = spaces[s]->blocks[b];

                        if (block->pass != domain->pass) /* could not be read: what it holds is not known */
                                memset(block->twin_next, 0, sizeof block->twin_next);
                        for (unsigned i = 0; i < ELEMENTSOF(block->twin); i++) {
                                block->twin[i] = block->twin_next[i] & ~block->changed[i];
                                block->zero[i] &= ~block->changed[i];
                                block->twin_next[i] = 0;
                        }
                        domain->running.pages_twin += page_set_count(block->twin);
                        domain->running.pages_unshared += page_set_count(block->hashed);
                }
        domain->running.pages_unshared -= MIN_OF(domain->running.pages_unshared, domain->running.pages_twin);
        prune(domain);
        domain->stats = domain->running;
}

void domain_abort_pass(Domain *domain, Space *const *spaces, size_t n) {
        for (size_t s = 0; s < n; s++)
                for (size_t b = 0; b < spaces[s]->n; b++)
                        memset(spaces[s]->blocks[b]->twin_next, 0, sizeof spaces[s]->blocks[b]->twin_next);
        domain->n_frames = 0;
}

uint64_t domain_bytes(const Domain *domain) {
        StableCounts counts;

        stable_counts(domain->stable, &counts);
        return unstable_bytes(domain->unstable) + counts.bytes + domain->blocks.bytes +
               domain->frames_allocated * sizeof *domain->frames;
}
