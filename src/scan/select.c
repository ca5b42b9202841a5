/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Tracking is exact and costs a walk of the page tables, a nanosecond or two a page. Even that is spared where nothing
 * happens: chunks of tracked memory in which nothing was written are visited at growing distances, unless the process
 * had more page faults than the writes that were found account for. The first write to a protected page is one fault,
 * so a write in a chunk that was not visited shows at once.
 *
 * A tracked block that is rewritten as fast as it is protected costs its process a fault a page and us a reading a page
 * for nothing: after some passes of that it is left unprotected and sampled, until a sample stands still. The same goes
 * for one of which most pages are left alone (block->alone); of any other these pages are protected with the rest, and
 * not read.
 *
 * What must hold: pages reported as written were protected again in that moment, so each of them stays in a selection
 * until it was read. A page that changed is no candidate before it stood still for a pass. Where writes are tracked,
 * not being reported is proof of that and it needs no second reading; one that was written is none either, even if it
 * holds what it held: merged, it would break at the next write.
 */
#include "scan/select.h"

#include <stdlib.h>
#include <string.h>

#define SAMPLE_STEP 32U                 /* one page in so many */
#define SAMPLE_WORTH 64U                /* a block with fewer pages known is read whole */
#define BUSY_SHARE (BLOCK_PAGES / 2)    /* pages changed that make a look a busy one */
#define WRITE_NSEC 1000U                /* what a first write may take for so many of them to be worth it */
#define DEAR_NSEC 5000U                 /* a page is read ten times in this: for so dear a first write new memory is looked at */
#define BUSY_PAGES_MIN 8U
#define BUSY_LOOKS 3U                   /* in a row, and the block is not worth tracking */
#define BUSY_AT_ONCE 8U                 /* or so many times the limit, once: where faults are dear, three looks are, too */
#define BUSY_DISTANCE_MAX 8U
#define QUIET_LOOKS 2U                  /* samples in a row that stood still, and it is again */
#define QUIET_DOUBLINGS_MAX 5U
#define WHOLE_LOOKS 4U                  /* one look in so many reads all of the block */
#define CHUNK_DOUBLINGS_MAX 4U

static int add_written(Space *space, Track *track, uint64_t start, uint64_t end, TrackRanges *ranges) {
        return start < end ? track_written(track, space->target, start, end, true, ranges) : 0;
}

void selection_done(Selection *selection) {
        free(selection->blocks);
        *selection = (Selection) {};
}

/* Not worth protecting. */
static bool is_busy(const Block *block) {
        return block->busy >= BUSY_LOOKS || page_set_count(block->alone) > BUSY_SHARE;
}

bool select_is_sampled(const Block *block) { return !block->tracked || block->huge || is_busy(block); }

/* The pages written in a chunk; its parts that are too busy are left as they are. */
static int scan_chunk(Space *space, Track *track, const TrackChunk *chunk, TrackRanges *ranges) {
        uint64_t from = chunk->start;

        for (size_t b = space_first(space, chunk->start); b < space->n && space->blocks[b]->addr < chunk->end; b++) {
                const Block *block = space->blocks[b];
                int r;

                if (!is_busy(block))
                        continue;
                r = add_written(space, track, from, block->addr, ranges);
                if (r != 0)
                        return r;
                from = block->addr + BLOCK_BYTES;
        }
        return add_written(space, track, from, chunk->end, ranges);
}

/* One chunk that a thread looks at. */
typedef struct ChunkJob {
        TrackChunk *chunk;
        TrackRanges ranges;
        int result;
} ChunkJob;

typedef struct ChunkJobs {
        Space *space;
        Track *track;
        ChunkJob *jobs;
        size_t n;
} ChunkJobs;

static void jobs_done(ChunkJobs *all) {
        for (size_t i = 0; i < all->n; i++)
                track_ranges_done(&all->jobs[i].ranges);
        free(all->jobs);
}

static void do_job(void *userdata, unsigned thread, size_t item) {
        ChunkJobs *all = userdata;
        ChunkJob *job = &all->jobs[item];

        job->result = scan_chunk(all->space, all->track, job->chunk, &job->ranges);
}

/* Adds what the job found; *ret_found grows by as many pages. */
static int take_job(ChunkJob *job, uint32_t pass, bool due, TrackRanges *ranges, uint64_t *ret_found) {
        TrackChunk *chunk = job->chunk;
        uint64_t pages = 0;

        if (job->result != 0)
                return job->result;
        for (size_t i = 0; i < job->ranges.n; i++) {
                if (GROW(ranges->ranges, ranges->n, ranges->allocated) < 0)
                        return -ENOMEM;
                ranges->ranges[ranges->n++] = job->ranges.ranges[i];
                pages += (job->ranges.ranges[i].end - job->ranges.ranges[i].start) / PAGE_BYTES;
        }
        if (pages > 0)
                chunk->quiet = 0;
        else if (due && chunk->quiet < CHUNK_DOUBLINGS_MAX)
                chunk->quiet++;
        chunk->due = pass + (1U << chunk->quiet);
        *ret_found += pages;
        return 0;
}

/* Looks at the chunks that are due, or at all that this pass has not looked at yet. */
static int scan_chunks(ChunkJobs *all, Crew *crew, uint32_t pass, bool due, TrackRanges *ranges, uint64_t *ret_found) {
        int r = 0;

        for (size_t i = 0; i < all->track->n; i++) {
                TrackChunk *chunk = &all->track->chunks[i];

                if (due ? chunk->due > pass : chunk->visited == pass)
                        continue;
                chunk->visited = pass;
                all->jobs[all->n++] = (ChunkJob) { .chunk = chunk };
        }
        crew_run(crew, all->n, do_job, all);
        for (size_t i = 0; i < all->n; i++) {
                int s = take_job(&all->jobs[i], pass, due, ranges, ret_found);

                track_ranges_done(&all->jobs[i].ranges);
                r = s != 0 ? s : r;
        }
        all->n = 0;
        return r;
}

/* Blocks that were sampled, and are to be tracked from now on: writes to them were no faults. */
static bool any_unprotected(const Space *space) {
        for (size_t b = 0; b < space->n; b++)
                if (space->blocks[b]->unprotected && !select_is_sampled(space->blocks[b]))
                        return true;
        return false;
}

/* What was written since the last time, by address. First it is looked for where it is to be expected, then, if that
 * does not account for all faults, everywhere. */
static int find_written(Space *space, Track *track, Crew *crew, const SelectRules *rules, TrackRanges *ranges) {
        _cleanup_(jobs_done) ChunkJobs all = { .space = space, .track = track };
        uint64_t found = 0, faults = any_unprotected(space) ? UINT64_MAX : rules->faults;
        int r;

        if (faults == 0 || track->n == 0)
                return 0;
        all.jobs = calloc(track->n, sizeof *all.jobs);
        if (!all.jobs)
                return -ENOMEM;
        r = scan_chunks(&all, crew, rules->pass, true, ranges, &found);
        if (r == 0 && found < faults)
                r = scan_chunks(&all, crew, rules->pass, false, ranges, &found);
        track_ranges_sort(ranges, 0);
        return r;
}

/* Memory that was written where there was none before. */
static int add_blocks(Space *space, const TrackRanges *ranges) {
        _cleanup_free_ uint64_t *addrs = NULL;
        size_t n = 0, allocated = 0, at = 0;
        int r;

        for (size_t i = 0; i < ranges->n; i++)
                for (uint64_t addr = ranges->ranges[i].start & ~(BLOCK_BYTES - 1); addr < ranges->ranges[i].end;
                     addr += BLOCK_BYTES) {
                        while (at < space->n && space->blocks[at]->addr < addr)
                                at++;
                        if ((at < space->n && space->blocks[at]->addr == addr) || (n > 0 && addrs[n - 1] == addr))
                                continue;
                        if (GROW(addrs, n, allocated) < 0)
                                return -ENOMEM;
                        addrs[n++] = addr;
                }
        if (n == 0)
                return 0;
        r = space_add(space, addrs, n);
        for (size_t i = 0; i < n; i++) {
                Block *block = space_find(space, addrs[i]);

                if (block)
                        block->tracked = true;
        }
        return r;
}

/* The part of the ranges from *at on that lies in the block. */
static void take_ranges(const TrackRanges *ranges, size_t *at, const Block *block, PageSet pages) {
        uint64_t end = block->addr + BLOCK_BYTES;

        while (*at < ranges->n && ranges->ranges[*at].end <= block->addr)
                ++*at;
        for (size_t i = *at; i < ranges->n && ranges->ranges[i].start < end; i++)
                block_add_range(block, ranges->ranges[i].start, ranges->ranges[i].end, pages);
}

static void add_sample(const Block *block, uint32_t pass, PageSet pages) {
        unsigned first = (pass * 7 + block->id) % SAMPLE_STEP;

        for (unsigned i = first; i < BLOCK_PAGES; i += SAMPLE_STEP)
                if (!page_set_has(block->merged, i))
                        page_set_add(pages, i);
}

/* Of a block that lies in several mappings, the pages whose writes are told. */
static void find_covered(const Block *block, const Track *track, const VmaList *vmas, PageSet covered) {
        for (size_t i = vma_list_first(vmas, block->addr); i < vmas->n; i++) {
                uint64_t from = MAX_OF(vmas->vmas[i].start, block->addr);
                uint64_t to = MIN_OF(vmas->vmas[i].end, block->addr + BLOCK_BYTES);

                if (from >= to)
                        break;
                if (vmas->vmas[i].skip == VMA_OK && track_covers(track, from))
                        block_add_range(block, from, to, covered);
        }
}

/* It cannot be told from outside what of the block changed, or not of all of it. */
static void select_sampled(Block *block, const Track *track, const VmaList *vmas, const SelectRules *rules,
                           PageSet pages) {
        PageSet chosen = {}, covered = {};

        if (block->due > rules->pass && !rules->all_due)
                return;
        if (track && !block->tracked && !block->huge && !is_busy(block) && block->pass > 0)
                find_covered(block, track, vmas, covered);
        if (block->pass == 0 || block->whole || rules->all_due || page_set_count(block->hashed) < SAMPLE_WORTH)
                memset(chosen, 0xff, sizeof chosen);
        else
                add_sample(block, rules->pass, chosen);
        for (unsigned i = 0; i < ELEMENTSOF(block->changed); i++)
                pages[i] |= (chosen[i] & ~covered[i]) | block->changed[i];
}

unsigned select_busy_pages(uint32_t write_nsec) {
        uint64_t pages = write_nsec > WRITE_NSEC ? (uint64_t)BUSY_SHARE * WRITE_NSEC / write_nsec : BUSY_SHARE;

        return MAX_OF((unsigned)pages, BUSY_PAGES_MIN);
}

bool select_tracking_is_dear(uint32_t write_nsec) { return write_nsec >= DEAR_NSEC; }

/* As if they had been written in each pass so far. */
static void take_for_busy(Space *space) {
        for (size_t b = 0; b < space->n; b++)
                if (space->blocks[b]->pass == 0)
                        space->blocks[b]->busy = BUSY_LOOKS;
}

/* Whether the block is rewritten too fast to be worth protecting, by how many of its pages were written since the last
 * look. Of one that was never read, or was not protected, all that is there is reported, which says nothing. */
static void note_busy(Block *block, const SelectRules *rules, unsigned n_written) {
        unsigned limit = rules->busy_pages ?: BUSY_SHARE;

        if (block->pass == 0 || block->unprotected) {
                block->unprotected = false;
                n_written = 0;
        }
        if (n_written > BUSY_AT_ONCE * limit)
                block->busy = BUSY_LOOKS;
        else
                block->busy = n_written > limit ? (uint8_t)(block->busy + 1) : 0;
        if (block->busy >= BUSY_LOOKS)
                block->quiet = 0; /* that it stands still is to be seen from now on */
}

/* Tracked: what is reported changed, and nothing else did. */
static void settle(Selection *selection, Block *block, const PageSet written) {
        if (block->unsettled) {
                for (unsigned i = 0; i < ELEMENTSOF(block->changed); i++)
                        block->changed[i] &= written[i];
                block->unsettled = page_set_any(block->changed);
                selection->settled = true;
        }
}

static int select_block(Selection *selection, Block *block, const Track *track, const VmaList *vmas,
                        const SelectRules *rules, const PageSet written) {
        bool sampled = select_is_sampled(block);
        SelectedBlock *selected;
        PageSet pages;

        memcpy(pages, written, sizeof pages);
        for (unsigned i = 0; i < ELEMENTSOF(pages) && block->recheck; i++)
                pages[i] |= block->changed[i];
        block->recheck = false;
        if (sampled) {
                select_sampled(block, track, vmas, rules, pages);
                block->unprotected = true;
        } else {
                settle(selection, block, written);
                note_busy(block, rules, page_set_count(written));
        }
        if (rules->recheck_forked)
                for (unsigned i = 0; i < ELEMENTSOF(pages); i++)
                        pages[i] |= block->forked[i] & block->hashed[i] & ~block->merged[i] & ~block->twin[i];
        for (unsigned i = 0; i < ELEMENTSOF(pages); i++)
                pages[i] = (pages[i] | block->again[i]) & ~block->alone[i];
        if (!page_set_any(pages))
                return 0;
        if (GROW(selection->blocks, selection->n, selection->allocated) < 0)
                return -ENOMEM;
        selected = &selection->blocks[selection->n++];
        *selected = (SelectedBlock){ .block = block };
        memcpy(selected->pages, pages, sizeof pages);
        if (block->pass > 0 && !sampled)
                memcpy(selected->written, written, sizeof selected->written);
        memset(block->again, 0, sizeof block->again);
        return 0;
}

int selection_make(Selection *selection, Space *space, Track *track, const VmaList *vmas, Crew *crew,
                   const SelectRules *rules) {
        _cleanup_(track_ranges_done) TrackRanges ranges = {};
        size_t at = 0;
        int found = 0, r;

        selection->n = selection->at = 0;
        selection->settled = false;
        if (rules->prove_quiet)
                take_for_busy(space);
        if (track)
                found = find_written(space, track, crew, rules, &ranges);
        if (found == TARGET_E_GONE)
                return found;
        r = add_blocks(space, &ranges);
        for (size_t b = 0; b < space->n; b++) {
                PageSet written = {};
                int s;

                take_ranges(&ranges, &at, space->blocks[b], written);
                s = select_block(selection, space->blocks[b], track, vmas, rules, written);
                if (s < 0)
                        r = s;
        }
        return r < 0 ? r : found;
}

uint64_t selection_count_new(const Selection *selection) {
        uint64_t n = 0;

        for (size_t i = selection->at; i < selection->n; i++)
                if (selection->blocks[i].block->pass == 0)
                        n += page_set_count(selection->blocks[i].pages);
        return n;
}

void select_cover(Space *space, const Track *track, const VmaList *vmas) {
        size_t v = 0;

        for (size_t b = 0; b < space->n; b++) {
                Block *block = space->blocks[b];
                bool tracked = track != NULL;

                while (v < vmas->n && vmas->vmas[v].end <= block->addr)
                        v++;
                for (size_t i = v; tracked && i < vmas->n && vmas->vmas[i].start < block->addr + BLOCK_BYTES; i++)
                        if (vmas->vmas[i].skip == VMA_OK && vmas->vmas[i].anonymous_bytes > 0)
                                tracked = track_covers(track, MAX_OF(vmas->vmas[i].start, block->addr));
                block->tracked = tracked;
        }
}

void selection_take(Selection *selection, const VmaList *vmas, Target *target, ScanBatch *batch) {
        batch->target = target;
        batch->vmas = vmas;
        batch->n = 0;
        for (; selection_left(selection); selection->at++) {
                const SelectedBlock *selected = &selection->blocks[selection->at];

                if (batch->n + page_set_count(selected->pages) > SCAN_BATCH_PAGES)
                        return;
                for (unsigned word = 0; word < ELEMENTSOF(selected->pages); word++)
                        for (uint64_t bits = selected->pages[word]; bits; bits &= bits - 1) {
                                ScanPage *p = &batch->pages[batch->n++];

                                p->block = selected->block;
                                p->page = (uint16_t)(word * 64 + (unsigned)__builtin_ctzll(bits));
                                p->written = page_set_has(selected->written, p->page);
                        }
        }
}

static void learn(Block *block, uint32_t pass, unsigned read, unsigned changed) {
        if (!select_is_sampled(block))
                return;
        if (changed == 0) {
                if (block->quiet < UINT8_MAX)
                        block->quiet++;
                if (block->quiet >= QUIET_LOOKS)
                        block->busy = 0;
                block->whole = block->quiet % WHOLE_LOOKS == WHOLE_LOOKS - 1;
                block->unsettled = false;
                block->due = pass + (1U << MIN_OF((unsigned)block->quiet, QUIET_DOUBLINGS_MAX));
                return;
        }
        block->quiet = 0;
        /* All of it was read, and most of it is different each time. */
        if (read > BUSY_SHARE && changed > BUSY_SHARE && block->first_pass != pass) {
                if (block->busy < UINT8_MAX)
                        block->busy++;
                block->due = pass + MIN_OF((unsigned)block->busy, BUSY_DISTANCE_MAX);
                block->whole = false;
                return;
        }
        block->whole = read < BUSY_SHARE && page_set_count(block->hashed) > read;
        block->due = pass + 1;
}

void select_learn(const ScanBatch *batch, uint32_t pass) {
        for (unsigned i = 0; i < batch->n;) {
                Block *block = batch->pages[i].block;
                unsigned read = 0, changed = 0, asked = 0;

                for (; i < batch->n && batch->pages[i].block == block; i++) {
                        const ScanPage *p = &batch->pages[i];

                        read += p->kind != SCAN_NOTHING;
                        changed += p->changed || (p->first && block->first_pass != pass);
                        asked++;
                }
                if (asked == BLOCK_PAGES)
                        block->judged = pass;
                learn(block, pass, read, changed);
        }
}

void select_recheck(Space *space) {
        for (size_t b = 0; b < space->n; b++) {
                Block *block = space->blocks[b];

                for (unsigned i = 0; i < ELEMENTSOF(block->twin); i++) {
                        uint64_t wanted = (block->twin[i] | block->zero[i]) & ~block->merged[i];

                        block->changed[i] |= wanted;
                        block->twin[i] &= ~wanted;
                        block->saves[i] &= ~wanted;
                        block->recheck |= wanted != 0;
                }
                block->unsettled |= block->recheck;
        }
}

void select_all(Space *space) {
        for (size_t b = 0; b < space->n; b++)
                for (unsigned i = 0; i < ELEMENTSOF(space->blocks[b]->again); i++)
                        space->blocks[b]->again[i] |= space->blocks[b]->hashed[i];
}

void select_soon(Block *block, uint32_t pass) {
        block->whole = true;
        block->due = pass + 1;
}
