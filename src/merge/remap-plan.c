/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The planner of route remap. A remapped run is one mapping of consecutive pages of the pool, so what counts is not
 * only that a content is in the pool but that its neighbours stand beside it there too.
 *
 * Between a run and the pool that is a matter of diagonals: page i of the run and page p of the pool lie on the
 * diagonal p - i, and every stretch of one diagonal on which the contents agree can be one mapping. The diagonals worth
 * a look are those on which the stable tree knows a page with room; each is followed both ways as far as it goes, the
 * longest stretch is taken, and what is left on either side is looked at again. Only so many diagonals are followed
 * (DIAGONALS_MAX): a run of 511 pages that are all the same lies on 511 of them.
 *
 * What is left over is new to the pool, or is known to it in bits and pieces. It becomes new pages, in the run's order,
 * when at least half of it is new: a known content in the middle is then stored twice (a dup), which costs a page and
 * spares two mappings, and whoever has the whole run too, as the owner of the twin often has, maps it as one. Where
 * most of it is known in bits, a copy would save nothing, and it is left.
 */
#include "merge/remap-plan.h"

#define DIAGONALS_MAX 16U

RemapSkip remap_vma_skip(const Vma *vma) {
        if (vma->skip != VMA_OK)
                return REMAP_SKIP_MAPPING;
        if (vma->file)
                return REMAP_SKIP_FILE;
        if (!vma->write)
                return REMAP_SKIP_READ_ONLY;
        if (vma->exec)
                return REMAP_SKIP_EXECUTABLE;
        if (vma->growsdown)
                return REMAP_SKIP_STACK;
        if (vma->huge_advised)
                return REMAP_SKIP_HUGE_ADVISED;
        if (vma->sealed)
                return REMAP_SKIP_SEALED;
        if (vma->keyed)
                return REMAP_SKIP_KEY;
        if (vma->named)
                return REMAP_SKIP_NAMED;
        if (vma->policy)
                return REMAP_SKIP_POLICY;
        return REMAP_OK;
}

void remap_runs_done(RemapRuns *runs) {
        free(runs->runs);
        *runs = (RemapRuns){};
}

void remap_segments_done(RemapSegments *segments) {
        free(segments->segments);
        *segments = (RemapSegments){};
}

static bool wanted(const Block *block, unsigned page) {
        unsigned i = page / 64;

        /* A frame that a fork shares cannot be moved (it is nobody's alone), and an all-zero page is worth no pool
         * page. */
        return (block->twin[i] & block->hashed[i] &
                ~(block->changed[i] | block->merged[i] | block->zero[i] | block->zeropage[i] | block->forked[i])) >>
                       (page % 64) & 1;
}

static unsigned count_wanted(const Block *block, unsigned from, unsigned to) {
        unsigned n = 0;

        for (unsigned i = from; i < to; i++)
                n += wanted(block, i);
        return n;
}

typedef struct Walk {
        RemapRuns *runs;
        const RemapRules *rules;
        const VmaList *vmas;
        size_t vma;                     /* the one at hand */
        uint64_t start;                 /* of the run that is open */
        uint32_t n_pages;               /* of it; 0: none is */
        bool cut;                       /* it goes on where the last one became too long */
} Walk;

/* What is left of a long stretch behind the last cut may be too short, and gets as much of the run before as it lacks. */
static uint32_t borrow(Walk *walk, uint32_t n_pages, uint32_t minimum) {
        RemapRun *last = walk->runs->n ? &walk->runs->runs[walk->runs->n - 1] : NULL;
        uint32_t lacking = minimum - n_pages;

        if (!walk->cut || !last || last->n_pages < lacking + minimum)
                return n_pages;
        last->n_pages -= lacking;
        walk->start -= lacking * PAGE_BYTES;
        return minimum;
}

/* The mapping, if it is one of the pool. */
static const Vma *pool_mapping(const Walk *walk, size_t i) {
        const Vma *vma = walk->rules->pool && i < walk->vmas->n ? &walk->vmas->vmas[i] : NULL;

        return vma && remap_vma_is(vma, walk->rules->pool) ? vma : NULL;
}

/* False: it lies beside nothing that it could go on with. */
static bool look_beside(const Walk *walk, RemapRun *run) {
        const Vma *before = walk->vma > 0 ? pool_mapping(walk, walk->vma - 1) : NULL;
        const Vma *behind = pool_mapping(walk, walk->vma + 1);

        run->short_run = true;
        run->before = run->behind = REMAP_FRESH;
        if (before && before->end == run->start)
                run->before = (before->offset + before->end - before->start) / PAGE_BYTES;
        if (behind && behind->start == run->start + run->n_pages * PAGE_BYTES && behind->offset > 0)
                run->behind = behind->offset / PAGE_BYTES - 1;
        return run->before != REMAP_FRESH || run->behind != REMAP_FRESH;
}

static int close_run(Walk *walk) {
        RemapRuns *runs = walk->runs;
        uint32_t n = walk->n_pages, minimum = MAX_OF(walk->rules->minimum_run_pages, REMAP_MINIMUM_RUN);
        RemapRun run;

        walk->n_pages = 0;
        if (n > 0 && n < minimum)
                n = borrow(walk, n, minimum);
        walk->cut = false;
        if (n == 0)
                return 0;
        run = (RemapRun){ .start = walk->start, .n_pages = n };
        if (n < minimum && !look_beside(walk, &run)) {
                runs->pages_left_run += n;
                return 0;
        }
        if (GROW(runs->runs, runs->n, runs->allocated) < 0)
                return -ENOMEM;
        runs->runs[runs->n++] = run;
        return 0;
}

/* Pages [from, to) of the block, all in one mapping that can be remapped. */
static int walk_block(Walk *walk, const Block *block, unsigned from, unsigned to) {
        unsigned all = block->huge ? count_wanted(block, 0, BLOCK_PAGES) : 0;
        int r;

        if (block->huge && (uint64_t)all * 10000 < (uint64_t)walk->rules->huge_page_split * BLOCK_PAGES) {
                unsigned n = count_wanted(block, from, to);

                walk->runs->pages_wanted += n;
                walk->runs->pages_left_huge += n;
                return close_run(walk);
        }
        for (unsigned page = from; page < to; page++) {
                uint64_t address = block->addr + page * PAGE_BYTES;

                if (!wanted(block, page)) {
                        r = close_run(walk);
                        if (r < 0)
                                return r;
                        continue;
                }
                walk->runs->pages_wanted++;
                if (walk->n_pages == POOL_RUN_MAX || walk->start + walk->n_pages * PAGE_BYTES != address) {
                        bool cut = walk->n_pages == POOL_RUN_MAX && walk->start + walk->n_pages * PAGE_BYTES == address;
                        r = close_run(walk);
                        if (r < 0)
                                return r;
                        walk->cut = cut;
                }
                if (walk->n_pages++ == 0)
                        walk->start = address;
        }
        return 0;
}

static int walk_vma(Walk *walk, const Space *space, size_t i) {
        const Vma *vma = &walk->vmas->vmas[i];
        RemapSkip skip = remap_vma_skip(vma);
        int r = 0;

        walk->vma = i;
        for (size_t b = space_first(space, vma->start); b < space->n && space->blocks[b]->addr < vma->end; b++) {
                const Block *block = space->blocks[b];
                unsigned from = (unsigned)((MAX_OF(block->addr, vma->start) - block->addr) / PAGE_BYTES);
                unsigned to = (unsigned)((MIN_OF(block->addr + BLOCK_BYTES, vma->end) - block->addr) / PAGE_BYTES);

                if (!page_set_any(block->twin))
                        continue;
                if (skip == REMAP_OK) {
                        r = walk_block(walk, block, from, to);
                        if (r < 0)
                                return r;
                } else if (vma->skip == VMA_OK) {
                        unsigned n = count_wanted(block, from, to);

                        walk->runs->pages_wanted += n;
                        walk->runs->pages_left[skip] += n;
                }
        }
        return close_run(walk);
}

bool remap_short_run_due(size_t k, size_t n, uint64_t pass) {
        return (k + n - pass * REMAP_SHORT_RUNS_MAX % n) % n < REMAP_SHORT_RUNS_MAX;
}

static int longer_first(const void *a, const void *b) {
        const RemapRun *x = a, *y = b;

        if (x->n_pages != y->n_pages)
                return x->n_pages > y->n_pages ? -1 : 1;
        return x->start < y->start ? -1 : x->start > y->start;
}

static int by_address(const void *a, const void *b) {
        const RemapRun *x = a, *y = b;

        return x->start < y->start ? -1 : x->start > y->start;
}

static void keep_budget(RemapRuns *runs, const RemapRules *rules) {
        size_t room = rules->vmas_max > rules->vmas_now ? (rules->vmas_max - rules->vmas_now) / 2 : 0;

        if (runs->n <= room)
                return;
        qsort(runs->runs, runs->n, sizeof *runs->runs, longer_first);
        for (size_t i = room; i < runs->n; i++)
                runs->pages_left_budget += runs->runs[i].n_pages;
        runs->n = room;
        qsort(runs->runs, runs->n, sizeof *runs->runs, by_address);
}

int remap_runs_make(const Space *space, const VmaList *vmas, const RemapRules *rules, RemapRuns *ret) {
        _cleanup_(remap_runs_done) RemapRuns runs = {};
        Walk walk = { .runs = &runs, .rules = rules, .vmas = vmas };
        int r;

        for (size_t i = 0; i < vmas->n; i++) {
                r = walk_vma(&walk, space, i);
                if (r < 0)
                        return r;
        }
        keep_budget(&runs, rules);
        *ret = runs;
        runs = (RemapRuns){};
        return 0;
}

typedef struct Matcher {
        const Stable *stable;
        const PoolSpace *space;
        uint64_t address;
        const uint64_t *keys;
        uint32_t minimum;
        RemapSegments *out;
} Matcher;

/* How often the segments there are so far will map the pool's page. */
static uint32_t promised(const Matcher *m, uint64_t page) {
        uint32_t n = 0;

        for (size_t i = 0; i < m->out->n; i++) {
                const RemapSegment *segment = &m->out->segments[i];

                n += segment->page != REMAP_FRESH && segment->page <= page && page - segment->page < segment->n_pages;
        }
        return n;
}

/* The pool's page holds the content of the run's page i, and can take one mapping more. */
static bool agrees(const Matcher *m, uint32_t i, uint64_t page) {
        uint64_t key;

        return page < m->space->n && m->keys[i] != 0 && stable_has_frame(m->stable, page, &key) && key == m->keys[i] &&
               m->space->sharers[page] + promised(m, page) < m->space->max_sharing;
}

/* Known, and one of its copies has room. */
static bool has_room(const Matcher *m, uint64_t key) {
        StableHit hit;

        return stable_lookup(m->stable, key, &hit) && hit.frame != FRAME_NONE;
}

static int add(const Matcher *m, uint32_t first, uint32_t n_pages, uint64_t page) {
        RemapSegments *out = m->out;

        if (GROW(out->segments, out->n, out->allocated) < 0)
                return -ENOMEM;
        out->segments[out->n++] = (RemapSegment){ first, n_pages, page };
        return 0;
}

/* The longest stretch of [from, to) that stands in the pool. */
static RemapSegment longest_known(const Matcher *m, uint32_t from, uint32_t to) {
        RemapSegment best = {};
        uint64_t followed[DIAGONALS_MAX];
        unsigned n_followed = 0;

        for (uint32_t i = from; i < to && n_followed < DIAGONALS_MAX; i++) {
                StableHit hit;
                uint32_t first = i, end = i + 1;
                bool again = false;

                if (m->keys[i] == 0 || !stable_lookup(m->stable, m->keys[i], &hit) || hit.frame == FRAME_NONE ||
                    !agrees(m, i, hit.frame))
                        continue;
                for (unsigned k = 0; k < n_followed; k++)
                        again |= followed[k] == hit.frame - i;
                if (again || !pool_fits(m->address + i * PAGE_BYTES, hit.frame))
                        continue;
                followed[n_followed++] = hit.frame - i;
                while (first > from && hit.frame - i + first > 0 && agrees(m, first - 1, hit.frame - i + first - 1))
                        first--;
                while (end < to && agrees(m, end, hit.frame - i + end))
                        end++;
                if (end - first > best.n_pages)
                        best = (RemapSegment){ first, end - first, hit.frame - i + first };
        }
        return best;
}

/* What of [from, to) stands in no long stretch of the pool: new pages where most of it is new. */
static int add_fresh(const Matcher *m, uint32_t from, uint32_t to) {
        for (uint32_t i = from; i < to;) {
                uint32_t first, known = 0;
                int r;

                while (i < to && m->keys[i] == 0) {
                        m->out->pages_left++;
                        i++;
                }
                for (first = i; i < to && m->keys[i] != 0; i++)
                        known += has_room(m, m->keys[i]);
                if (i - first < m->minimum || known * 2 > i - first) {
                        m->out->pages_left += i - first;
                        continue;
                }
                r = add(m, first, i - first, REMAP_FRESH);
                if (r < 0)
                        return r;
        }
        return 0;
}

static int cover(const Matcher *m, uint32_t from, uint32_t to) {
        RemapSegment best;
        int r;

        if (to - from < m->minimum) {
                m->out->pages_left += to - from;
                return 0;
        }
        best = longest_known(m, from, to);
        if (best.n_pages < m->minimum)
                return add_fresh(m, from, to);
        r = add(m, best.first, best.n_pages, best.page);
        if (r == 0)
                r = cover(m, from, best.first);
        if (r == 0)
                r = cover(m, best.first + best.n_pages, to);
        return r;
}

static int by_first(const void *a, const void *b) {
        const RemapSegment *x = a, *y = b;

        return x->first < y->first ? -1 : x->first > y->first;
}

int remap_segments_make(const Stable *stable, const PoolSpace *space, uint64_t address, const uint64_t *keys,
                        uint32_t n_pages, uint32_t minimum_run_pages, RemapSegments *ret) {
        _cleanup_(remap_segments_done) RemapSegments segments = {};
        Matcher matcher = {
                .stable = stable,
                .space = space,
                .address = address,
                .keys = keys,
                .minimum = MAX_OF(minimum_run_pages, REMAP_MINIMUM_RUN),
                .out = &segments,
        };
        int r = cover(&matcher, 0, n_pages);

        if (r < 0)
                return r;
        if (segments.n > 1)
                qsort(segments.segments, segments.n, sizeof *segments.segments, by_first);
        *ret = segments;
        segments = (RemapSegments){};
        return 0;
}

int remap_segments_beside(const Stable *stable, const PoolSpace *space, const RemapRun *run, const uint64_t *keys,
                          RemapSegments *ret) {
        _cleanup_(remap_segments_done) RemapSegments segments = {};
        const Matcher m = { .stable = stable, .space = space, .address = run->start, .keys = keys, .out = &segments };
        uint32_t first = 0, end = run->n_pages;
        int r = 0;

        while (run->before != REMAP_FRESH && first < end && agrees(&m, first, run->before + first))
                first++;
        if (first > 0)
                r = add(&m, 0, first, run->before);
        while (r == 0 && run->behind != REMAP_FRESH && first < end && run->behind >= run->n_pages - end &&
               agrees(&m, end - 1, run->behind - (run->n_pages - end)))
                end--;
        if (r == 0 && end < run->n_pages)
                r = add(&m, end, run->n_pages - end, run->behind - (run->n_pages - end - 1));
        if (r < 0)
                return r;
        segments.pages_left = end - first;
        *ret = segments;
        segments = (RemapSegments){};
        return 0;
}
