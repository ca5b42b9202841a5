/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Route remap in a pass: what is wanted in a member that something was learnt about is mapped to its domain's pool, run
 * by run, as many in a batch as a stop has time for.
 *
 * Which content a page had is known by the bytes that are read here, not by what the scanner saw: they say where in the
 * pool it stands, or become a new page of the pool. None of that is believed: the program in the target compares while
 * nobody can write (merge/remap-merge.c). What a pool page holds never changes, so its key in the tree stays right.
 *
 * A batch takes its pages of the pool (pool_take()) before it is carried out, and drops them where nothing came of it.
 * pool_collect() is never called in between: it would free them.
 */
#include "daemon/remapping.h"

#include "base/clock.h"
#include "base/log.h"
#include "host/pagemap.h"
#include "host/thp.h"
#include "merge/remap-plan.h"
#include "scan/reader.h"

#include <string.h>

/* How often in a row a batch may come to nothing for want of time. */
#define TRIES_MAX 4U
/* The event loop gets its turn. */
#define BREATH_NSEC (5 * NSEC_PER_MSEC)

typedef struct Work {
        Pass *pass;
        Member *member;
        Pool *pool;
        Stable *stable;
        uint8_t *bytes;                 /* of the run at hand: POOL_RUN_MAX pages */
        uint64_t keys[POOL_RUN_MAX];
        RemapRange ranges[REMAP_BATCH_MAX];
        size_t n;
        uint64_t units;
        uint64_t merged, fresh;         /* pages; pages of the pool that were filled */
        uint64_t left_short;            /* in pieces too short for a mapping of their own */
        unsigned tries;                 /* batches in a row in which nothing was begun */
        int result;                     /* REMOTE_E_*, -errno: no more is begun; -ECANCELED: for the time being */
        bool again;                     /* something is left that the next pass may do */
        bool moving;                    /* it was mapped to other pages of the pool until a moment ago */
} Work;

static void work_done(Work *work) { free(work->bytes); }

/* What the tree knows of pages of the pool, so that who is full is passed over. */
static void note_sharers(const Work *w, uint64_t page, uint32_t n_pages) {
        const PoolSpace *space = pool_space(w->pool);

        for (uint64_t i = page; i < page + n_pages; i++)
                if (space->sharers[i] < POOL_RESERVED)
                        (void)stable_set_sharers(w->stable, i, MAX_OF(space->sharers[i], 1U));
}

static void forget_pages(const Member *member, uint64_t start, uint32_t n_pages, bool all) {
        for (uint64_t at = start; at < start + n_pages * PAGE_BYTES; at += PAGE_BYTES) {
                Block *block = space_find(&member->space, at);
                unsigned page = (unsigned)(at % BLOCK_BYTES / PAGE_BYTES);

                if (!block)
                        continue;
                page_set_remove(block->twin, page);
                page_set_remove(block->saves, page);
                if (!all)
                        continue;
                page_set_remove(block->hashed, page);
                page_set_remove(block->changed, page);
        }
}

/* What became of a range that was not put in place. Pages that cannot be moved (pinned, or shared by a fork that the
 * scanner has not seen yet) are not wanted again until they are read again. */
static void note_failure(Work *w, const RemapRange *range) {
        Manager *m = w->pass->manager;

        pool_drop(w->pool, range->page, range->n_pages);
        note_sharers(w, range->page, range->n_pages);
        switch (range->result) {
        case REMAP_DIFFERENT:
        case REMAP_CHANGED:
                m->merge_failures[MERGE_FAILURE_CHANGED]++;
                break;
        case REMAP_BUSY:
                w->member->counts.left_kind++;
                forget_pages(w->member, range->start + range->done_pages * PAGE_BYTES,
                             range->done_pages ? 1 : range->n_pages, false);
                w->again |= range->done_pages > 0;
                break;
        case REMAP_REFUSED:
                w->member->counts.left_kind += range->n_pages;
                forget_pages(w->member, range->start, range->n_pages, false);
                break;
        case REMAP_FAILED:
                w->result = -ENOMEM;
                break;
        default:
                w->again = true;
        }
        log_debug("process %d: %u pages at %lx: %s (%s), %u could be moved", w->member->target->pid, range->n_pages,
                  range->start, remap_result_name(range->result), strerror(-range->error), range->done_pages);
}

/* In place, but nobody noticed if a page of it were discarded. */
static bool guard_at_last(const Work *w, const RemapRange *range) {
        int r = remap_guard_register(w->member->guard.zero, range->start, range->start + range->n_pages * PAGE_BYTES);

        if (r < 0)
                log_error("process %d: merged pages at %lx cannot be watched: %s", w->member->target->pid, range->start,
                          strerror(-r));
        return r == 0;
}

/* Each of these pages was on a frame of its own, which is free now (pooled.c). What is moved was counted when it was
 * merged, or is what a parent merged. */
static int note_own(Work *w, Ranges *done, uint64_t start, uint32_t n_pages) {
        w->merged += n_pages;
        forget_pages(w->member, start, n_pages, true);
        if (w->moving)
                return 0;
        return ranges_append(done, start, start + n_pages * PAGE_BYTES);
}

/* What was not begun for want of time stays in the batch. */
static size_t note_results(Work *w) {
        _cleanup_(ranges_done) Ranges done = {}, all = {};
        size_t left = 0, begun = 0;

        for (size_t i = 0; i < w->n; i++) {
                RemapRange range = w->ranges[i];

                begun += range.result != REMAP_NOT_BEGUN;
                if (range.result == REMAP_NOT_BEGUN)
                        w->ranges[left++] = range;
                else if (range.result == REMAP_DONE || (range.result == REMAP_UNGUARDED && guard_at_last(w, &range)))
                        (void)note_own(w, &done, range.start, range.n_pages);
                else if (range.result != REMAP_UNGUARDED)
                        note_failure(w, &range);
        }
        w->tries = begun ? 0 : w->tries + 1;
        if (ranges_unite(&w->member->own, &done, &all) == 0) {
                ranges_done(&w->member->own);
                w->member->own = all;
                all = (Ranges){};
        }
        return left;
}

static void drop_all(Work *w) {
        for (size_t i = 0; i < w->n; i++)
                pool_drop(w->pool, w->ranges[i].page, w->ranges[i].n_pages);
        w->again |= w->n > 0;
        w->n = 0;
        w->units = 0;
}

/* A mapping has one userfaultfd: ours that follows writes lets go of the ranges, and takes back what is left of
 * them. */
static bool let_go(const Work *w, RemapRange *range) {
        return !w->member->track ||
               track_suspend(w->member->track, range->start, range->start + range->n_pages * PAGE_BYTES) == 0;
}

static void carry_out(Work *w) {
        Manager *m = w->pass->manager;
        RemapBatch batch = remapping_batch(m, &w->member->guard, w->ranges, 0, w->units, false);
        RemapRange visited[REMAP_BATCH_MAX];
        size_t left = 0;
        int r;

        for (size_t i = 0; i < w->n; i++)
                if (let_go(w, &w->ranges[i]))
                        w->ranges[batch.n++] = w->ranges[i];
                else
                        pool_drop(w->pool, w->ranges[i].page, w->ranges[i].n_pages);
        w->n = batch.n;
        if (w->n == 0)
                return;
        batch.pool_fd = pool_target_fd(w->pool);
        r = remap_merge(m->remote, w->member->target, &batch);
        memcpy(visited, w->ranges, w->n * sizeof *visited);
        if (r == 0) {
                remapping_learn(m->remapping, &batch, false);
                left = note_results(w);
        } else if (r == REMOTE_E_LOST) {
                /* Which of them are in place will show in its mappings, and in the kernel's counts of the pool. */
                m->remapping->uncertain_until_nsec = now_nsec() + UNCERTAIN_NSEC;
                pool_note_lost(w->pool);
                w->member->vmas_nsec = 0;
                w->again = true;
        } else
                drop_all(w);
        for (size_t i = 0; i < batch.n && w->member->track; i++)
                if (r != 0 || visited[i].result != REMAP_DONE)
                        track_resume(w->member->track, visited[i].start, visited[i].start + visited[i].n_pages * PAGE_BYTES);
        w->n = left;
        w->units = 0;
        for (size_t i = 0; i < w->n; i++)
                w->units += stop_pace_units(&m->remapping->pace[false], w->ranges[i].n_pages);
        w->result = w->result ?: r;
        if (batch.workers > 0) {
                w->member->remap_refused = "io_uring's workers cannot be stopped";
                w->result = w->result ?: REMOTE_E_BUSY;
        } else if (w->tries == TRIES_MAX)
                w->result = w->result ?: REMOTE_E_BUSY;
        if (w->result != 0)
                drop_all(w);
}

/* Between two stops. What waits in the batch keeps its pages of the pool meanwhile. What is being moved is moved whole. */
static void pause_work(Work *w) {
        if (w->result != 0 || w->moving)
                return;
        if (!visit_pause(&w->pass->visit))
                return;
        w->result = -ECANCELED;
        drop_all(w);
}

static void carry_out_and_pause(Work *w) {
        carry_out(w);
        pause_work(w);
}

static uint32_t room_pages(const Work *w, const StopPace *pace) {
        return stop_pace_room(pace, stop_pace_batch(pace), w->units);
}

/* So much of what is left of a run that neither that nor the rest is a run too short, should only one of them come
 * about. */
static uint32_t piece_of(const Work *w, uint32_t left, uint32_t room) {
        uint32_t minimum = MAX_OF(w->member->group->minimum_run_pages, REMAP_MINIMUM_RUN);
        uint32_t n = MAX_OF(room, minimum);

        if (n >= left)
                return left;
        if (left - n >= minimum)
                return n;
        return left >= 2 * minimum ? left - minimum : left;
}

/* Takes the pages of the pool for a part of a run, in pieces that fill up the batches; the kernel joins their
 * mappings. */
static void add_segment(Work *w, const Vma *vma, uint64_t start, uint32_t n_pages, uint64_t page) {
        const StopPace *pace = &w->pass->manager->remapping->pace[false];

        for (uint32_t done = 0, n; done < n_pages; done += n) {
                uint64_t at = start + done * PAGE_BYTES, units;

                n = n_pages - done;
                while (w->result == 0 && w->n > 0 &&
                       (w->n == REMAP_BATCH_MAX || room_pages(w, pace) < MIN_OF(n, STOP_PACE_PIECE_MIN)))
                        carry_out_and_pause(w);
                if (w->result != 0) { /* not even who the member is may be known any more */
                        w->again = true;
                        return;
                }
                n = piece_of(w, n, room_pages(w, pace));
                units = stop_pace_units(pace, n);
                if (pool_take(w->pool, page + done, n, at) != 0) {
                        w->again = true;
                        continue;
                }
                note_sharers(w, page + done, n);
                w->units += units;
                w->ranges[w->n++] = (RemapRange){
                        .start = at,
                        .n_pages = n,
                        .page = page + done,
                        .advice = vma->advice,
                        .mergeable = vma->mergeable,
                        /* read_run() takes no others; what is put back can be moved, unless a fork came. */
                        .alone = !w->moving,
                };
        }
}

/* What the pages of the run hold now, by keys; 0: not to be taken. Nothing is read that is not there, or that others
 * map too. */
static int read_run(Work *w, const RemapRun *run, ReaderWay way) {
        uint64_t entries[POOL_RUN_MAX], addrs[READER_PAGES];
        const Target *target = w->member->target;
        size_t n_pages;

        if (target_read_pagemap(target, run->start, run->n_pages, entries, &n_pages) != 0)
                n_pages = 0;
        memset(w->keys, 0, sizeof w->keys);
        for (uint32_t i = 0, n; i < n_pages; i += MAX_OF(n, 1U)) {
                bool read[READER_PAGES] = {};
                int r;

                for (n = 0; n < READER_PAGES && i + n < n_pages && pagemap_is_anonymous(entries[i + n]) &&
                            entries[i + n] & PAGEMAP_EXCLUSIVE; n++)
                        addrs[n] = run->start + (i + n) * PAGE_BYTES;
                if (n == 0)
                        continue;
                r = reader_read(target, way, addrs, n, w->bytes + i * PAGE_BYTES, read);
                if (r != 0)
                        return remote_error_of(r);
                for (uint32_t k = 0; k < n; k++)
                        if (read[k])
                                w->keys[i + k] = domain_key(pass_domain(w->member), w->bytes + (i + k) * PAGE_BYTES);
        }
        return 0;
}

int remapping_fill(Pool *pool, Stable *stable, const uint64_t *addresses, size_t n_addresses, const uint8_t *bytes,
                   const uint64_t *keys, uint32_t n_pages, uint64_t *ret_page) {
        uint64_t page;
        int r = pool_alloc(pool, n_pages, addresses, n_addresses, &page);

        if (r != 0)
                return r;
        r = pool_write(pool, page, n_pages, bytes);
        if (r < 0) {
                (void)pool_give_back(pool, page, n_pages);
                return r;
        }
        for (uint32_t i = 0; i < n_pages; i++) {
                (void)stable_set_sharers(stable, page + i, 0); /* it may have been something else once */
                (void)stable_insert(stable, keys[i], page + i, 1);
        }
        /* No longer reserved but mapped by nobody: collected, should nothing come of it. */
        if (pool_take(pool, page, n_pages, addresses[0]) == 0)
                pool_drop(pool, page, n_pages);
        *ret_page = page;
        return 0;
}

static int merge_run(Work *w, const RemapRun *run) {
        _cleanup_(remap_segments_done) RemapSegments segments = {};
        const Vma *vma = vma_list_find(&w->member->vmas, run->start);
        int r;

        if (!vma)
                return 0;
        /* They are its own alone, and only KSM could change that in between. */
        r = read_run(w, run, vma->mergeable ? READER_KEEPS_SHARING : READER_PINS);
        if (r != 0)
                return r;
        if (run->short_run)
                r = remap_segments_beside(w->stable, pool_space(w->pool), run, w->keys, &segments);
        else
                r = remap_segments_make(w->stable, pool_space(w->pool), run->start, w->keys, run->n_pages,
                                        w->member->group->minimum_run_pages, &segments);
        if (r < 0)
                return r;
        w->left_short += segments.pages_left;
        for (size_t i = 0; i < segments.n && w->result == 0; i++) {
                const RemapSegment *segment = &segments.segments[i];
                uint64_t start = run->start + segment->first * PAGE_BYTES, page = segment->page;

                if (page == REMAP_FRESH) {
                        r = remapping_fill(w->pool, w->stable, &start, 1, w->bytes + segment->first * PAGE_BYTES,
                                           w->keys + segment->first, segment->n_pages, &page);
                        if (r < 0)
                                return r;
                        if (r > 0)
                                continue;
                        w->fresh += segment->n_pages;
                }
                add_segment(w, vma, start, segment->n_pages, page);
        }
        return 0;
}

static void note_runs(Member *member, const RemapRuns *runs) {
        MemberCounts *counts = &member->counts;

        counts->left_huge += runs->pages_left_huge;
        counts->left_run += runs->pages_left_run;
        counts->left_budget += runs->pages_left_budget;
        counts->left_stack += runs->pages_left[REMAP_SKIP_STACK];
        for (RemapSkip skip = REMAP_OK; skip < _REMAP_SKIP_MAX; skip++)
                if (skip != REMAP_SKIP_STACK)
                        counts->left_kind += runs->pages_left[skip];
}

static size_t count_short(const RemapRuns *runs) {
        size_t n = 0;

        for (size_t i = 0; i < runs->n; i++)
                n += runs->runs[i].short_run;
        return n;
}

/* All the runs. Where nothing is merged for a while, the event loop has its turn all the same. */
static int merge_runs(Work *w, const RemapRuns *runs) {
        const Manager *m = w->pass->manager;
        size_t n_short = count_short(runs);
        uint64_t breathed = now_nsec();
        int r = 0;

        w->bytes = malloc(POOL_RUN_MAX * PAGE_BYTES);
        if (!w->bytes)
                return -ENOMEM;
        for (size_t i = 0, k = 0; i < runs->n && r == 0 && w->result == 0; i++) {
                if (runs->runs[i].short_run && !remap_short_run_due(k++, n_short, m->full_scans)) {
                        w->left_short += runs->runs[i].n_pages;
                        continue;
                }
                r = merge_run(w, &runs->runs[i]);
                if (now_nsec() - breathed < BREATH_NSEC)
                        continue;
                pause_work(w);
                breathed = now_nsec();
        }
        while (w->n > 0 && w->result == 0)
                carry_out(w);
        return r;
}

/* It is as good as any that could be merged, whatever the process has done with it since. */
static bool may_be_mapped(const Member *member, uint64_t start, uint64_t end) {
        while (start < end) {
                const Vma *vma = vma_list_find(&member->vmas, start);

                if (!vma || remap_vma_skip(vma) != REMAP_OK)
                        return false;
                start = vma->end;
        }
        return true;
}

int pass_remap_again(Pass *pass, Member *member, uint64_t start, uint32_t n_pages, uint64_t page, uint64_t *ret_pages) {
        uint64_t end = start + n_pages * PAGE_BYTES;
        Work w = {
                .pass = pass,
                .member = member,
                .pool = pass_slot(member)->pool->pool,
                .stable = pass_domain(member)->stable,
                .moving = true,
        };
        int r;

        member->vmas_nsec = 0; /* flags may have changed where the mappings are the same */
        r = manager_refresh_vmas(member);
        if (r != 0 || !may_be_mapped(member, start, end))
                return MIN_OF(r, 0);
        for (uint64_t at = start, n; at < end && w.result == 0; at += n * PAGE_BYTES) {
                const Vma *vma = vma_list_find(&member->vmas, at);

                n = (MIN_OF(vma->end, end) - at) / PAGE_BYTES;
                add_segment(&w, vma, at, (uint32_t)n, page + (at - start) / PAGE_BYTES);
        }
        while (w.n > 0 && w.result == 0)
                carry_out(&w);
        *ret_pages += w.merged;
        return w.result;
}

static int merge_member(Pass *pass, Member *member, const RemapRuns *runs) {
        Manager *m = pass->manager;
        _cleanup_(work_done) Work w = {
                .pass = pass,
                .member = member,
                .pool = pass_slot(member)->pool->pool,
                .stable = pass_domain(member)->stable,
        };
        int r = manager_find_guard(m, member, &member->vmas);

        if (r == 0)
                r = merge_runs(&w, runs);
        log_debug("process %d: %lu pages merged, %lu of them new to the pool", member->target->pid, w.merged, w.fresh);
        if (passed_over(member))
                return 0;
        member->counts.left_run += w.left_short;
        member->counts.twin -= MIN_OF(member->counts.twin, w.merged);
        m->pass_changes += w.merged;
        pass->marks_changed |= w.merged > 0;
        member->plan_again |= w.again;
        if (w.merged > 0 || w.again)
                (void)manager_refresh(m, member);
        r = r ?: w.result;
        if (r == -ECANCELED && !pass->visit.interrupted)
                r = 0;
        if (r > 0) {
                member->plan_again |= r != REMOTE_E_DENIED && r != REMOTE_E_UNFIT;
                manager_note_remote_error(m, member, r);
        }
        return r < 0 ? r : 0;
}

/* Who shares a pool has to trust the others, or nobody can do them harm; either may change at any time. */
void pass_judge_trust(Pass *pass) {
        const Manager *m = pass->manager;
        const char *nodes_problem = policy_nodes_problem(m->conf, m->numa.n_nodes);

        for (size_t s = 0; s < pass->n_slots; s++) {
                Slot *slot = pass->slots[s];
                const char *before = slot->trust_problem, *mapper = NULL;
                PolicyTrust trust = {};

                slot->trust_problem = NULL;
                slot->apart = false;
                if (slot->route != CONF_ROUTE_REMAP || slot->dry_run)
                        continue;
                for (size_t i = 0; i < m->roster.n_groups; i++) {
                        const Group *group = m->roster.groups[i];
                        const ConfCgroup *section = policy_find(m->conf, group->path);
                        uint64_t pooled = 0;

                        if (group->slot != slot || group->n_members == 0 || !section)
                                continue;
                        policy_trust_add(&trust, section, group->path);
                        for (size_t k = 0; k < group->n_members; k++)
                                pooled += group->members[k]->pooled;
                        slot->apart |= pooled > 0 && mapper;
                        mapper = pooled > 0 ? group->path : mapper;
                }
                slot->trust_problem = policy_trust_problem(&trust, host_shmem_huge_denied(NULL));
                slot->apart &= slot->trust_problem != NULL;
                if (nodes_problem) {
                        slot->trust_problem = nodes_problem;
                        slot->apart = true;
                }
                if (slot->trust_problem && !before)
                        log_warning("domain %s is not remapped: %s", slot->name, slot->trust_problem);
        }
}

/* Mappings of another domain's pool, that a process brought along from where it was forked. */
static int leave_others(Manager *m, Member *member) {
        const Slot *slot = pass_slot(member);
        const RemapPool *keep = slot->apart || slot->dry_run ? NULL : slot->pool;
        UndoSlice slice = manager_undo_begin();
        int r;

        manager_end_track(member);
        do {
                slice.cut = !manager_release_track(member, slice.until_nsec);
                r = slice.cut ? REMOTE_E_BUSY : manager_unmap(m, member, keep, &slice);
        } while (manager_undo_goes_on(m, member, &slice));
        log_info("process %d: %lu pages of a pool that is not for it are its own again", member->target->pid, slice.pages);
        if (passed_over(member))
                return 0;
        member->look_again = true;
        (void)manager_refresh(m, member);
        return r;
}

int pass_leave_others(Pass *pass, Member *member) {
        int r = leave_others(pass->manager, member);

        if (r > 0)
                manager_note_remote_error(pass->manager, member, r);
        member->plan_again |= r != 0;
        return r < 0 ? r : 0;
}

int pass_remap(Pass *pass, Member *member) {
        Manager *m = pass->manager;
        _cleanup_(remap_runs_done) RemapRuns runs = {};
        RemapRules rules = {
                .minimum_run_pages = member->group->minimum_run_pages,
                .huge_page_split = member->group->huge_page_split,
                .vmas_max = m->kernel.max_map_count / REMAP_VMAS_SHARE,
                .pool = pass_slot(member)->pool ? &pass_slot(member)->pool->identity : NULL,
        };
        PlanRules plan_rules = {
                .minimum_run_pages = rules.minimum_run_pages,
                .huge_page_split = rules.huge_page_split,
                .vmas_max = rules.vmas_max,
        };
        int r;

        /* Zero pages first, so that they are not between the others. It reads the mappings, too. */
        r = pass_give(pass, member);
        member->counts.wanted = member->counts.twin + member->counts.zero;
        if (r < 0 || passed_over(member) || member->skip != TARGET_OK || member->standing.cut)
                return r;
        r = manager_refresh_vmas(member);
        if (r == 0)
                r = pass_judge_huge(pass, member, &plan_rules);
        if (r != 0)
                return r < 0 ? r : 0;
        rules.vmas_now = member->vmas.n;
        r = remap_note_policies(member->target, &member->vmas);
        if (r != 0 && r != -ENOENT)
                return r < 0 ? r : 0;
        r = remap_runs_make(&member->space, &member->vmas, &rules, &runs);
        if (r < 0)
                return r;
        note_runs(member, &runs);
        member->remap_refused = pass_slot(member)->trust_problem;
        if (member->remap_refused)
                return 0;
        if (runs.n == 0)
                return 0;
        r = remap_target_fits(member->target);
        if (r < 0 || r == REMAP_E_GONE)
                return r < 0 ? r : 0;
        member->remap_refused = remap_fit_reason(r);
        if (r > 0) {
                for (size_t i = 0; i < runs.n; i++)
                        member->counts.left_kind += runs.runs[i].n_pages;
                return 0;
        }
        r = merge_member(pass, member, &runs);
        member->counts.wanted = member->counts.twin + member->counts.zero;
        return r;
}
