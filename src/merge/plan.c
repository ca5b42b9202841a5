/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * The range planner: from the bitmaps of what is wanted merged to the ranges to be marked MADV_MERGEABLE.
 *
 * Within one mapping the wanted pages form runs with gaps between them. A gap is either bridged (its pages are marked
 * too and ksmd reads them in vain) or left (one call and two mappings more); each gap is decided for itself, and the
 * first and the last gap of a mapping (one mapping more, no call) alike. As the costs of gaps do not depend on one
 * another, deciding each by itself is the optimum: no plan is cheaper, neither "mark each run" nor "mark it all".
 *
 * The costs, in nanoseconds of CPU, memory priced at what KSM itself pays for memory: 5.6 µs of ksmd for each 4,096
 * bytes saved, so 1.4 ns a byte. Measured by tests/bench/mark-cost on Linux 6.18, x86_64, a VM with 2 CPUs, 256 MiB:
 *
 *   a unique page marked: 0.5 to 0.8 µs in the first scan (checksum), 5.0 µs in the second (descent of the trees),
 *     and a rmap_item of 64 bytes for as long as it is marked                                 5,600 + 90 -> PAGE_NSEC
 *   a page that is not there, or is the zero page: 5 to 28 ns a scan; but it may be filled later, and not
 *     measured but assumed is that one in ten gets unique contents                              30 + 570 -> HOLE_NSEC
 *   madvise on part of a mapping: 2.4 µs, with 300 as with 25,000 ranges                           2,400 -> CALL_NSEC
 *   a page left alone, because its merges broke too soon: merged again, it breaks again (a merge and a write fault with
 *     its copy); more than any gap is worth, for it would be marked and unmarked by turns      10,000 -> ALONE_NSEC
 *   a mapping: 192 bytes and its part of a maple node (some 30), and 0.25 µs of ksmd's walk a scan
 *                                                                                           310 + 500 -> VMA_NSEC
 *   and whoever looks for a merged page's mappings (reclaim, migration, DAMON) visits all those of the process, since its
 *     pieces share their anon_vma (rmap_walk_ksm()): 64 ns each (host/walk.c). Not measured but assumed is that this
 *     happens to one merged page in a hundred                                 0.64 a wanted page -> vma_nsec()
 *
 * So leaving a gap (4.0 µs) is cheaper than bridging it when it holds a single unique page, unless thousands of pages are
 * wanted; bridged are gaps of some pages that are not there. What bridges many unique pages is want of mappings only: a
 * process may have vmas_max of them, a quarter of vm.max_map_count, so that it cannot run into the limit because of us. Beyond, gaps are bridged, the
 * cheapest for each mapping saved first, as long as that costs less than leaving out the smaller neighbour, a saved
 * page being worth SAVED_NSEC; then the ranges with the fewest wanted pages are left out.
 *
 * What always holds: ranges lie in mappings that may be merged (VMA_OK), one in one. A huge page whose wanted pages
 * are too few is not touched, and no gap is bridged across it: ksmd would split it the day it finds a twin of any of
 * its pages. Of one that is worth splitting only the wanted runs are marked, as elsewhere (the first mark splits its
 * mapping, the first merge the page).
 *
 * A mapping that is mergeable already needs no call and no split for what it holds; nothing wanted in it is ever left
 * out, so that whatever was read and is outside the plan may be unmarked without un-sharing a page. Wanted there is the
 * zero page too: it may be KSM's doing (use_zero_pages), and unmarking would put a frame of its own back in its place.
 *
 * The exception are pages left alone (merge/judge.h). What of them is mergeable is unmarked whatever it holds, run by
 * run, the longest first for as long as there are mappings for it: a run in the middle of a mapping takes two.
 */

#include "merge/plan.h"

#define PAGE_NSEC 5700ULL
#define HOLE_NSEC 600ULL
#define ALONE_NSEC 10000ULL
#define CALL_NSEC 2400ULL
#define VMA_NSEC 800ULL
#define WALK_NSEC 64ULL
#define WALKED_SHARE 100ULL
/* Not more than makes a gap of one unique page worth bridging: with three, what is merged in single pages costs ksmd a fifth
 * more (bench-advise, 30 % duplicate in runs of 1), and a heap in long runs is marked in few pieces with one already. */
#define WALKS_NSEC_MAX 2000ULL

/* Bridging sixteen unique pages costs 1 KiB of rmap_items of the 4 KiB that one wanted page saves, and 90 µs of ksmd
 * in each burst: about where it stops being sensible. */
#define SAVED_NSEC (16 * PAGE_NSEC)

#define NSEC_BARRIER UINT64_MAX

typedef struct Run {
        uint64_t start, end;            /* bytes */
        uint64_t wanted_pages;
        uint64_t gap_nsec;              /* what bridging costs: from the run before in its mapping, or its start */
        uint64_t tail_nsec;             /* to the mapping's end; NSEC_BARRIER when a run follows */
        uint64_t gap_wanted_pages;      /* pages of runs left out as too short that lie in that gap */
        uint64_t tail_wanted_pages;
        const Vma *vma;
        bool first;                     /* of its mapping */
        bool joined;                    /* continues the run before it */
        bool dropped;
} Run;

typedef struct Planner {
        Run *runs;
        size_t n, allocated;
        const PlanRules *rules;
        const VmaList *vmas;
        Plan *plan;
        /* The mapping being walked: */
        const Vma *vma;
        bool vma_has_run;
        uint64_t gap_nsec;              /* of the gap that is open */
        uint64_t vma_nsec;              /* what a mapping costs in this process */
} Planner;

static uint64_t vma_nsec(uint64_t wanted_pages) {
        return VMA_NSEC + MIN_OF(wanted_pages * WALK_NSEC / WALKED_SHARE, WALKS_NSEC_MAX);
}

static void planner_done(Planner *planner) {
        free(planner->runs);
}

static uint64_t nsec_sum(uint64_t a, uint64_t b) {
        return a == NSEC_BARRIER || b == NSEC_BARRIER ? NSEC_BARRIER : a + b;
}

static void gap_add(Planner *p, uint64_t nsec) {
        p->gap_nsec = nsec_sum(p->gap_nsec, nsec);
}

static uint64_t word_mask(unsigned word, unsigned from, unsigned to) {
        unsigned low = word * 64, high = low + 64;
        uint64_t mask = UINT64_MAX;

        if (from >= high || to <= low)
                return 0;
        if (from > low)
                mask &= UINT64_MAX << (from - low);
        if (to < high)
                mask &= UINT64_MAX >> (high - to);
        return mask;
}

static unsigned set_count(const PageSet set, unsigned from, unsigned to) {
        unsigned n = 0;

        for (unsigned i = from / 64; i < DIV_ROUND_UP(to, 64); i++)
                n += (unsigned)__builtin_popcountll(set[i] & word_mask(i, from, to));
        return n;
}

/* The first page of [from, to) that is (value) or is not in the set; to when there is none. */
static unsigned set_next(const PageSet set, unsigned from, unsigned to, bool value) {
        for (unsigned i = from / 64; i < DIV_ROUND_UP(to, 64); i++) {
                uint64_t bits = (value ? set[i] : ~set[i]) & word_mask(i, from, to);
                if (bits)
                        return i * 64 + (unsigned)__builtin_ctzll(bits);
        }
        return to;
}

static int run_add(Planner *p, uint64_t start, uint64_t end) {
        Run *last = p->vma_has_run ? &p->runs[p->n - 1] : NULL;
        uint64_t pages = (end - start) / PAGE_BYTES;

        p->plan->pages_wanted += pages;
        if (last && (start == last->end || p->gap_nsec <= CALL_NSEC + 2 * p->vma_nsec)) {
                last->end = end;
                last->wanted_pages += pages;
        } else {
                bool to_start = !last && p->gap_nsec <= p->vma_nsec;
                if (GROW(p->runs, p->n, p->allocated) < 0)
                        return -ENOMEM;
                p->runs[p->n++] = (Run){
                        .start = to_start ? p->vma->start : start,
                        .end = end,
                        .wanted_pages = pages,
                        .gap_nsec = p->gap_nsec,
                        .tail_nsec = NSEC_BARRIER,
                        .vma = p->vma,
                        .first = !last,
                };
        }
        p->vma_has_run = true;
        p->gap_nsec = 0;
        return 0;
}

/* What is wanted from here to there is left alone, and no gap is bridged across it. */
static void leave(Planner *p, const PageSet wanted, unsigned from, unsigned to, uint64_t *counter) {
        unsigned n = set_count(wanted, from, to);

        p->plan->pages_wanted += n;
        *counter += n;
        gap_add(p, NSEC_BARRIER);
}

/* Mappings that marking the run makes; 0 where the mapping is mergeable already. */
static unsigned run_vmas(const Run *run) {
        return run->vma->mergeable ? 0 : (run->start > run->vma->start) + (run->end < run->vma->end);
}

/* Runs of pages that are left alone, in a mapping that is mergeable. */
static int hot_add(Plan *plan, const Block *block, unsigned from, unsigned to) {
        for (unsigned page = from; page < to;) {
                unsigned start = set_next(block->alone, page, to, true), end = set_next(block->alone, start, to, false);
                uint64_t first = block->addr + start * PAGE_BYTES, last = block->addr + end * PAGE_BYTES;

                page = end;
                if (start == end)
                        break;
                if (plan->n_hot > 0 && plan->hot[plan->n_hot - 1].end == first && start == 0 && from == 0) {
                        plan->hot[plan->n_hot - 1].end = last;
                        continue;
                }
                if (GROW(plan->hot, plan->n_hot, plan->hot_allocated) < 0)
                        return -ENOMEM;
                plan->hot[plan->n_hot++] = (PlanRange){ first, last };
        }
        return 0;
}

static int longer_first(const void *a, const void *b) {
        uint64_t x = ((const PlanRange *)a)->end - ((const PlanRange *)a)->start;
        uint64_t y = ((const PlanRange *)b)->end - ((const PlanRange *)b)->start;

        return x > y ? -1 : x < y;
}

static int by_address(const void *a, const void *b) {
        uint64_t x = ((const PlanRange *)a)->start, y = ((const PlanRange *)b)->start;

        return x < y ? -1 : x > y;
}

/* At two mappings a run, the longest that there are mappings for. */
static void hot_keep_budget(Planner *p) {
        Plan *plan = p->plan;
        size_t needed = p->rules->vmas_now, room;

        for (size_t i = 0; i < p->n; i++)
                needed += run_vmas(&p->runs[i]);
        room = (p->rules->vmas_max - MIN_OF(needed, p->rules->vmas_max)) / 2;
        if (plan->n_hot <= room)
                return;
        qsort(plan->hot, plan->n_hot, sizeof *plan->hot, longer_first);
        plan->n_hot = room;
        qsort(plan->hot, plan->n_hot, sizeof *plan->hot, by_address);
}

static bool worth_splitting(const PlanRules *rules, const PageSet wanted) {
        return (uint64_t)set_count(wanted, 0, BLOCK_PAGES) * 10000 >= (uint64_t)rules->huge_page_split * BLOCK_PAGES;
}

static void find_wanted(const Block *block, bool mergeable, PageSet ret) {
        for (unsigned i = 0; i < BLOCK_PAGES / 64; i++) {
                ret[i] = ((block->twin[i] | block->zero[i]) & ~block->changed[i]) | block->merged[i];
                if (mergeable)
                        ret[i] |= block->zeropage[i];
                ret[i] &= ~block->alone[i];
        }
}

/* Those that are merged already too: their mappings are looked for as well, and what was marked stays in few pieces. */
static uint64_t count_wanted(const Space *space) {
        uint64_t n = 0;

        for (size_t i = 0; i < space->n; i++) {
                PageSet wanted;

                find_wanted(space->blocks[i], false, wanted);
                n += set_count(wanted, 0, BLOCK_PAGES);
        }
        return n;
}

bool plan_would_split(const PlanRules *rules, const Block *block) {
        PageSet wanted;

        find_wanted(block, false, wanted);
        return block->huge && worth_splitting(rules, wanted);
}

/* The part of a block that lies in the mapping being walked. */
static int block_add(Planner *p, const Block *block, unsigned from, unsigned to) {
        PageSet wanted;
        int r;

        find_wanted(block, p->vma->mergeable, wanted);
        if (block->huge && !p->vma->mergeable && (block->keep_whole || !worth_splitting(p->rules, wanted))) {
                leave(p, wanted, from, to, &p->plan->pages_left_huge);
                return 0;
        }
        /* The kernel holds each piece of a split stack against the limit by itself, and a piece that grows takes the
         * mark along to pages that nobody planned. */
        if (p->vma->growsdown && !p->vma->mergeable) {
                leave(p, wanted, from, to, &p->plan->pages_left_stack);
                return 0;
        }
        if (p->vma->mergeable) {
                r = hot_add(p->plan, block, from, to);
                if (r == 0 && block->pass == 0)
                        r = ranges_append(&p->plan->unread, block->addr + from * PAGE_BYTES, block->addr + to * PAGE_BYTES);
                if (r < 0)
                        return r;
        }
        for (unsigned page = from; page < to;) {
                unsigned start = set_next(wanted, page, to, true);
                unsigned end = set_next(wanted, start, to, false);
                unsigned unique = set_count(block->hashed, page, start), alone = set_count(block->alone, page, start);
                unsigned holes = start - page - MIN_OF(unique + alone, start - page);

                gap_add(p, unique * PAGE_NSEC + alone * ALONE_NSEC + holes * HOLE_NSEC);
                if (start < end) {
                        r = run_add(p, block->addr + start * PAGE_BYTES, block->addr + end * PAGE_BYTES);
                        if (r < 0)
                                return r;
                }
                page = end;
        }
        return 0;
}

static int vma_add(Planner *p, const Space *space, const Vma *vma, size_t *block) {
        uint64_t at = vma->start;
        int r;

        p->vma = vma;
        p->vma_has_run = false;
        p->gap_nsec = 0;
        while (*block < space->n && space->blocks[*block]->addr + BLOCK_BYTES <= vma->start)
                (*block)++;
        /* The last block may reach into the next mapping too: *block stays on it. */
        for (size_t i = *block; i < space->n && space->blocks[i]->addr < vma->end; i++) {
                const Block *b = space->blocks[i];
                uint64_t from = MAX_OF(b->addr, vma->start), to = MIN_OF(b->addr + BLOCK_BYTES, vma->end);

                gap_add(p, (from - at) / PAGE_BYTES * HOLE_NSEC);
                r = block_add(p, b, (unsigned)((from - b->addr) / PAGE_BYTES), (unsigned)((to - b->addr) / PAGE_BYTES));
                if (r < 0)
                        return r;
                at = to;
        }
        gap_add(p, (vma->end - at) / PAGE_BYTES * HOLE_NSEC);
        if (p->vma_has_run) {
                Run *last = &p->runs[p->n - 1];
                last->tail_nsec = p->gap_nsec;
                if (p->gap_nsec <= p->vma_nsec)
                        last->end = vma->end;
        }
        return 0;
}

/* Whether the run begins or ends where a mapping that is marked already does: it makes that one longer. */
static bool run_extends_marked(const VmaList *vmas, const Run *run) {
        const Vma *begin = vmas->vmas, *end = vmas->vmas + vmas->n, *vma = run->vma;

        return (vma > begin && vma[-1].mergeable && vma[-1].end == run->start) ||
               (vma + 1 < end && vma[1].mergeable && vma[1].start == run->end);
}

static void drop_short(Planner *p) {
        for (size_t i = 0; i < p->n; i++) {
                Run *run = &p->runs[i];
                if (run->wanted_pages >= p->rules->minimum_run_pages || run->vma->mergeable ||
                    run_extends_marked(p->vmas, run))
                        continue;
                run->dropped = true;
                p->plan->pages_left_run += run->wanted_pages;
        }
}

/* Takes the joined and the dropped runs out of the array; what was dropped becomes part of the gap around it. */
static void compact(Planner *p) {
        size_t n = 0;

        for (size_t i = 0; i < p->n; i++) {
                const Run *run = &p->runs[i];
                Run *last = n > 0 && p->runs[n - 1].vma == run->vma ? &p->runs[n - 1] : NULL;
                Run *next = i + 1 < p->n && run[1].vma == run->vma ? &p->runs[i + 1] : NULL;

                if (run->joined) {
                        last->end = run->end;
                        last->wanted_pages += run->wanted_pages + run->gap_wanted_pages;
                        last->tail_nsec = run->tail_nsec;
                        last->tail_wanted_pages = run->tail_wanted_pages;
                } else if (!run->dropped)
                        p->runs[n++] = *run;
                else if (next) {
                        next->gap_nsec = nsec_sum(run->gap_nsec, next->gap_nsec);
                        next->gap_wanted_pages += run->gap_wanted_pages + run->wanted_pages;
                        next->first = run->first;
                } else if (last) {
                        last->tail_nsec = nsec_sum(run->gap_nsec, run->tail_nsec);
                        last->tail_wanted_pages = run->gap_wanted_pages + run->wanted_pages + run->tail_wanted_pages;
                }
        }
        p->n = n;
}

/* One way to need fewer mappings: a gap to bridge or a run to leave out. */
typedef struct Saving {
        size_t run;
        uint64_t harm_nsec;     /* for each mapping saved */
        bool tail;              /* the gap behind the run, not the one before it */
} Saving;

static int saving_compare(const void *a, const void *b) {
        const Saving *x = a, *y = b;

        if (x->harm_nsec != y->harm_nsec)
                return x->harm_nsec < y->harm_nsec ? -1 : 1;
        return x->run < y->run ? -1 : x->run > y->run;
}

/* Bridges gaps, cheapest first, while more mappings are needed than there may be. */
static int bridge_to_budget(Planner *p, size_t *excess) {
        _cleanup_free_ Saving *savings = reallocarray(NULL, 2 * p->n, sizeof *savings);
        size_t n = 0;

        if (!savings)
                return -ENOMEM;
        for (size_t i = 0; i < p->n; i++) {
                const Run *run = &p->runs[i];
                uint64_t worth = SAVED_NSEC * run->wanted_pages;

                if (run->vma->mergeable)
                        continue;
                if (!run->first && run->gap_nsec <= MIN_OF(worth, SAVED_NSEC * run[-1].wanted_pages))
                        savings[n++] = (Saving){ i, run->gap_nsec / 2, false };
                if (run->first && run->start > run->vma->start && run->gap_nsec <= worth)
                        savings[n++] = (Saving){ i, run->gap_nsec, false };
                if (run->end < run->vma->end && run->tail_nsec <= worth)
                        savings[n++] = (Saving){ i, run->tail_nsec, true };
        }
        qsort(savings, n, sizeof *savings, saving_compare);
        for (size_t i = 0; i < n && *excess > 0; i++) {
                Run *run = &p->runs[savings[i].run];
                size_t saved = 1;

                if (savings[i].tail) {
                        run->end = run->vma->end;
                        run->wanted_pages += run->tail_wanted_pages;
                        p->plan->pages_left_run -= run->tail_wanted_pages;
                } else {
                        p->plan->pages_left_run -= run->gap_wanted_pages;
                        if (run->first) {
                                run->start = run->vma->start;
                                run->wanted_pages += run->gap_wanted_pages;
                                run->gap_wanted_pages = 0;
                        } else {
                                run->joined = true;
                                saved = 2;
                        }
                }
                *excess -= MIN_OF(saved, *excess);
        }
        compact(p);
        return 0;
}

static int drop_to_budget(Planner *p, size_t *excess) {
        _cleanup_free_ Saving *savings = reallocarray(NULL, p->n, sizeof *savings);
        size_t n = 0;

        if (!savings)
                return -ENOMEM;
        for (size_t i = 0; i < p->n; i++) {
                unsigned vmas = run_vmas(&p->runs[i]);
                if (vmas > 0)
                        savings[n++] = (Saving){ i, SAVED_NSEC * p->runs[i].wanted_pages / vmas, false };
        }
        qsort(savings, n, sizeof *savings, saving_compare);
        for (size_t i = 0; i < n && *excess > 0; i++) {
                Run *run = &p->runs[savings[i].run];
                run->dropped = true;
                p->plan->pages_left_budget += run->wanted_pages;
                *excess -= MIN_OF((size_t)run_vmas(run), *excess);
        }
        compact(p);
        return 0;
}

static int keep_budget(Planner *p) {
        size_t needed = p->rules->vmas_now, excess;
        int r;

        for (size_t i = 0; i < p->n; i++)
                needed += run_vmas(&p->runs[i]);
        if (p->n == 0 || needed <= p->rules->vmas_max)
                return 0;
        excess = needed - p->rules->vmas_max;
        r = bridge_to_budget(p, &excess);
        if (r < 0 || excess == 0)
                return r;
        return drop_to_budget(p, &excess);
}

static uint64_t frees(const Block *block, unsigned word) {
        return (block->saves[word] | block->zero[word]) & ~block->changed[word] & ~block->merged[word] & ~block->alone[word];
}

uint64_t plan_count_frees(const Space *space, const PlanRange *ranges, size_t n) {
        uint64_t pages = 0;
        size_t block = 0;

        for (size_t i = 0; i < n; i++) {
                const PlanRange *range = &ranges[i];

                while (block < space->n && space->blocks[block]->addr + BLOCK_BYTES <= range->start)
                        block++;
                for (size_t k = block; k < space->n && space->blocks[k]->addr < range->end; k++) {
                        const Block *b = space->blocks[k];
                        PageSet set;

                        for (unsigned word = 0; word < ELEMENTSOF(set); word++)
                                set[word] = frees(b, word);
                        pages += set_count(set, (unsigned)((MAX_OF(b->addr, range->start) - b->addr) / PAGE_BYTES),
                                           (unsigned)((MIN_OF(b->addr + BLOCK_BYTES, range->end) - b->addr) / PAGE_BYTES));
                }
        }
        return pages;
}

void plan_done(Plan *plan) {
        free(plan->ranges);
        free(plan->mergeable);
        free(plan->hot);
        ranges_done(&plan->unread);
        *plan = (Plan){};
}

static int mergeable_add(Plan *plan, const Vma *vma) {
        bool secret = vma_holds_secrets(vma);

        if (!vma->mergeable)
                return 0;
        if (GROW(plan->mergeable, plan->n_mergeable, plan->mergeable_allocated) < 0)
                return -ENOMEM;
        plan->mergeable[plan->n_mergeable++] = (PlanMergeable){
                .range = { vma->start, vma->end },
                .revoked = secret,
                .withheld = vma->skip != VMA_OK && !secret,
        };
        return 0;
}

int plan_make(const Space *space, const VmaList *vmas, const PlanRules *rules, Plan *ret) {
        _cleanup_(plan_done) Plan plan = {};
        _cleanup_(planner_done) Planner planner = {
                .rules = rules, .vmas = vmas, .plan = &plan, .vma_nsec = vma_nsec(count_wanted(space)),
        };
        size_t block = 0;
        int r;

        for (size_t i = 0; i < vmas->n; i++) {
                r = mergeable_add(&plan, &vmas->vmas[i]);
                if (r < 0)
                        return r;
                if (vmas->vmas[i].skip != VMA_OK)
                        continue;
                r = vma_add(&planner, space, &vmas->vmas[i], &block);
                if (r < 0)
                        return r;
        }
        drop_short(&planner);
        compact(&planner);
        r = keep_budget(&planner);
        if (r < 0)
                return r;
        hot_keep_budget(&planner);
        plan.ranges = reallocarray(NULL, MAX_OF(planner.n, (size_t)1), sizeof *plan.ranges);
        if (!plan.ranges)
                return -ENOMEM;
        plan.allocated = planner.n;
        for (size_t i = 0; i < planner.n; i++) {
                const Run *run = &planner.runs[i];
                plan.ranges[plan.n++] = (PlanRange){ run->start, run->end };
                plan.pages_marked += (run->end - run->start) / PAGE_BYTES;
        }
        *ret = plan;
        plan = (Plan){};
        return 0;
}
