/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The way back from route remap, and whose guard is whose.
 *
 * A guard belongs to an address space, and is found again by the daemon that comes after, or for a child that was
 * forked, by trying the keeper's on one page of the process (remap_guard_watches()). The mute userfaultfd watches
 * nothing between two batches, so where it is not known a new one will do.
 *
 * Pages that were written since they were merged are put back too when all of a process is, unless something may have
 * pinned them: what writes past the page tables would be lost (merge/remap.h). Such runs stay as they are, and are
 * tried again. What a pass puts back by itself (tidying.c) never was written.
 *
 * All of a process takes seconds for each GiB, so it is done in slices, between which the event loop runs. The mappings
 * are read anew in each, and gone on with at the address where the one before ended. That nothing is left is concluded
 * only from a look at all of them.
 */
#include "daemon/remapping.h"

#include "base/clock.h"
#include "base/log.h"
#include "daemon/notify.h"

#include <fcntl.h>
#include <string.h>

#define ROUNDS_MAX 8U

void manager_note_pooled(Manager *m, Member *member) {
        const Slot *slot = member->group ? member->group->slot : NULL;

        member->pooled = member->astray = 0;
        for (size_t i = 0; m->remapping && i < member->vmas.n; i++) {
                const Vma *vma = &member->vmas.vmas[i];
                const RemapPool *pool = remapping_find_pool(m->remapping, vma);

                if (!pool)
                        continue;
                member->pooled += (vma->end - vma->start) / PAGE_BYTES;
                if (!slot || slot->pool != pool || slot->dry_run)
                        member->astray += (vma->end - vma->start) / PAGE_BYTES;
        }
}

static KeeperOwner owner_of(const Member *member) {
        return (KeeperOwner){ .pid = member->target->pid, .start_ticks = member->target->start_ticks };
}

typedef struct Search {
        const Member *member;
        uint64_t address;               /* in a mapping that a guard watches; 0: there is none */
        RemapGuard found;
} Search;

static bool is_found(const Search *search, const KeeperItem *item, int uffd) {
        const Target *target = search->member->target;
        bool ours = item->owner.pid == target->pid && item->owner.start_ticks == target->start_ticks;

        if (item->kind == GUARD_ZERO && search->address != 0)
                return (ours || item->owner.pid == 0) && remap_guard_watches(uffd, target, search->address);
        return ours && !guard_is_dead(uffd);
}

/* Of children the keeper does not know whose they are. 1: both are found. */
static int try_guard(void *userdata, const KeeperItem *item, int uffd) {
        Search *search = userdata;
        int *found = item->kind == GUARD_MUTE ? &search->found.mute : &search->found.zero;

        if (*found < 0 && is_found(search, item, uffd)) {
                *found = fcntl(uffd, F_DUPFD_CLOEXEC, 3);
                if (*found < 0)
                        return -errno;
        }
        return search->found.mute >= 0 && search->found.zero >= 0;
}

/* What an earlier daemon, or the process that forked it, remapped in the process, and nobody watches any more: both
 * keeper and daemon were killed. What is discarded from now on is noticed again. */
static void watch_again(const Manager *m, const Member *member, const VmaList *vmas) {
        for (size_t i = 0; i < vmas->n; i++) {
                const Vma *vma = &vmas->vmas[i];
                int r;

                if (!remapping_find_pool(m->remapping, vma) || remap_vma_guarded(vma))
                        continue;
                r = remap_guard_watch_again(member->guard.zero, member->target, vma->start, vma->end);
                log_warning("process %d: %lu merged pages were not watched for a time%s%s", member->target->pid,
                            (vma->end - vma->start) / PAGE_BYTES, r < 0 ? ", and cannot be: " : "",
                            r < 0 ? strerror(-r) : "");
        }
}

/* Both are with the keeper before anything is registered with them. */
static int hold(Manager *m, Member *member, RemapGuard *guard) {
        KeeperOwner owner = owner_of(member);
        int r = keeper_add(m->remapping->keeper, guard->zero, &owner);

        if (r == 0)
                r = keeper_add(m->remapping->keeper, guard->mute, &owner);
        if (r < 0) {
                remap_guard_done(guard);
                return r;
        }
        remap_guard_done(&member->guard);
        member->guard = *guard;
        *guard = REMAP_GUARD_NONE;
        return 0;
}

int manager_find_guard(Manager *m, Member *member, const VmaList *vmas) {
        Search search = { .member = member, .found = REMAP_GUARD_NONE };
        RemapGuard made = REMAP_GUARD_NONE;
        int r = 0;

        if (!manager_keeper_ready(m))
                return -ENOTCONN;
        if (member->guard.zero >= 0 && guard_is_dead(member->guard.zero))
                remap_guard_done(&member->guard);
        if (member->guard.zero < 0) {
                for (size_t i = 0; i < vmas->n && search.address == 0; i++)
                        if (remapping_find_pool(m->remapping, &vmas->vmas[i]) && remap_vma_guarded(&vmas->vmas[i]))
                                search.address = remap_guard_page(member->target, &vmas->vmas[i]);
                r = MIN_OF(keeper_list(m->remapping->keeper, try_guard, &search), 0);
                /* A mapping has one guard, and a new one could never put back what another watches. */
                if (r == 0 && search.address != 0 && search.found.zero < 0)
                        r = REMOTE_E_BUSY;
                if (r == 0 && (search.found.zero < 0 || search.found.mute < 0))
                        r = remap_guard_make(m->remote, member->target, &made);
                if (r != 0) {
                        remap_guard_done(&search.found);
                        return r;
                }
                if (search.found.zero < 0)
                        search.found.zero = TAKE_FD(made.zero);
                if (search.found.mute < 0)
                        search.found.mute = TAKE_FD(made.mute);
                remap_guard_done(&made);
                r = hold(m, member, &search.found);
        }
        if (r == 0)
                watch_again(m, member, vmas);
        return r;
}

typedef struct Unmap {
        Manager *m;
        Member *member;
        const VmaList *vmas;
        const RemapPool *keep;
        const RemapPool *pool;          /* of the batch at hand */
        RemapRange ranges[REMAP_BATCH_MAX];
        size_t n;
        uint64_t units;
        uint64_t added_end;             /* of what was added last */
        Ranges lent;                    /* pages that are not tracked for the time being */
        bool in_order;                  /* what stays as it is ends it: what is behind would not become one with it */
        int result;                     /* REMOTE_E_*, -errno: no more is begun */
        UnmapRound round;
        uint64_t pages;                 /* put back in all */
        uint64_t until_nsec;            /* the event loop has its turn then, if a batch was carried out */
        unsigned batches;
        bool cut;                       /* it has it */
} Unmap;

static bool goes_on(Unmap *u) {
        u->cut |= u->batches > 0 && now_nsec() >= u->until_nsec;
        return !u->cut && u->result == 0 && !(u->in_order && u->round.left > 0);
}

static void unmap_done(Unmap *u) { ranges_done(&u->lent); }

static bool same_flags(const Vma *a, const Vma *b) { return a->advice == b->advice && a->mergeable == b->mergeable; }

/* Another mapping that the run can become one with, right beside it. One that is tracked is in nobody's way if it was
 * claimed (track_claim()). */
static bool is_alike(const Vma *vma, const Vma *run) {
        return !vma->file && vma->skip == VMA_OK && vma->write && !vma->exec && !vma->growsdown && !vma->named &&
               !vma->keyed && !vma->huge_advised && same_flags(vma, run);
}

static void carry_out(Unmap *u) {
        RemapBatch batch = remapping_batch(u->m, &u->member->guard, u->ranges, u->n, u->units, true);

        if (u->n == 0)
                return;
        u->batches++;
        batch.written_too = u->round.written_too;
        batch.pool_dev = u->pool->identity.dev;
        batch.pool_inode = u->pool->identity.inode;
        u->result = remap_undo(u->m->remote, u->member->target, &batch);
        if (u->result == 0)
                remapping_learn(u->m->remapping, &batch, true);
        if (u->result == REMOTE_E_LOST)
                u->m->remapping->uncertain_until_nsec = now_nsec() + UNCERTAIN_NSEC;
        for (size_t i = 0; i < u->n && u->result == 0; i++) {
                const RemapRange *range = &u->ranges[i];

                *(range->result == REMAP_DONE ? &u->round.done : &u->round.left) += range->n_pages;
                u->pages += range->result == REMAP_DONE ? range->n_pages : 0;
                if (range->result == REMAP_UNGUARDED)
                        (void)remap_guard_register(u->member->guard.zero, range->start,
                                                   range->start + range->n_pages * PAGE_BYTES);
                u->round.busy += range->result == REMAP_BUSY ? range->n_pages : 0;
                if (range->result != REMAP_DONE)
                        log_debug("process %d: %u pages at %lx stay remapped: %s (%s)", u->member->target->pid,
                                  range->n_pages, range->start, remap_result_name(range->result),
                                  strerror(-range->error));
        }
        if (batch.workers > 0)
                u->result = REMOTE_E_BUSY;
        u->n = 0;
        u->units = 0;
        notify_watchdog();
}

/* false: it was not added, as no more is. */
static bool add_piece(Unmap *u, const Vma *vma, const RemapPool *pool, uint64_t start, uint32_t n_pages,
                      uint64_t neighbour) {
        const StopPace *pace = &u->m->remapping->pace[true];
        uint64_t units = stop_pace_units(pace, n_pages);

        if (u->n == REMAP_BATCH_MAX || u->pool != pool || (u->n > 0 && u->units + units > stop_pace_batch(pace)))
                carry_out(u);
        if (!goes_on(u))
                return false;
        u->pool = pool;
        u->units += units;
        u->ranges[u->n++] = (RemapRange){
                .start = start,
                .n_pages = n_pages,
                .advice = vma->advice,
                .mergeable = vma->mergeable,
                .neighbour = neighbour,
        };
        u->added_end = start + n_pages * PAGE_BYTES;
        return true;
}

/* A page of a mapping beside a run, for the run to become one with: not tracked until the run is in place, as a mapping
 * has one userfaultfd. 0: there is none. */
static uint64_t borrow(Unmap *u, const Vma *vma, uint64_t page) {
        Track *track = u->member->track;

        if (!vma->tracked || !track_covers(track, page))
                return page;
        if (ranges_append(&u->lent, page, page + PAGE_BYTES) < 0)
                return 0;
        return track_suspend(track, page, page + PAGE_BYTES) == 0 ? page : 0;
}

static void give_back_lent(Unmap *u) {
        for (size_t i = 0; i < u->lent.n; i++)
                track_resume(u->member->track, u->lent.ranges[i].start, u->lent.ranges[i].end);
        ranges_done(&u->lent);
}

/* [from, to) of a mapping. In the order of the addresses, so that each piece becomes one with the one before it. */
static void add_stretch(Unmap *u, size_t i, const RemapPool *pool, uint64_t from, uint64_t to) {
        const Vma *vma = &u->vmas->vmas[i];
        const Vma *below = i > 0 ? vma - 1 : NULL, *above = i + 1 < u->vmas->n ? vma + 1 : NULL;
        uint64_t lower = 0, upper = 0;

        if (from == vma->start && below && below->end == from) {
                if (is_alike(below, vma))
                        lower = borrow(u, below, from - PAGE_BYTES);
                else if (u->added_end == from && same_flags(below, vma))
                        lower = from - PAGE_BYTES;
        }
        if (!lower && to == vma->end && above && above->start == to && is_alike(above, vma))
                upper = borrow(u, above, to);
        for (uint64_t start = from; start < to && goes_on(u);) {
                uint32_t n = (uint32_t)MIN_OF((to - start) / PAGE_BYTES, (uint64_t)REMAP_PIECE_PAGES);
                uint64_t end = start + n * PAGE_BYTES;
                uint64_t neighbour = start > from ? start - PAGE_BYTES : lower ?: end == to ? upper : 0;

                if (!add_piece(u, vma, pool, start, n, neighbour))
                        return;
                start = end;
        }
}

/* One look at all of the mappings from where it is to go on. */
static int unmap_round(Unmap *u) {
        _cleanup_(vma_list_done) VmaList vmas = {};
        uint64_t begun = now_nsec(), read;
        bool any = false;
        int r = target_read_vma_flags(u->member->target, true, &vmas);

        if (r != 0)
                return remote_error_of(r);
        read = now_nsec();
        u->until_nsec = MAX_OF(u->until_nsec, 2 * read - begun); /* no more than half of it goes to looking */
        u->vmas = &vmas;
        u->added_end = 0;
        u->result = 0;
        for (size_t i = 0; i < vmas.n && goes_on(u); i++) {
                const Vma *vma = &vmas.vmas[i];
                const RemapPool *pool = remapping_find_pool(u->m->remapping, vma);

                if (!pool || pool == u->keep || vma->end <= u->round.from)
                        continue;
                if (!any) {
                        r = manager_find_guard(u->m, u->member, &vmas);
                        if (r != 0)
                                return r;
                }
                any = true;
                add_stretch(u, i, pool, MAX_OF(vma->start, u->round.from), vma->end);
        }
        if (u->result == 0)
                carry_out(u);
        if (u->added_end > 0)
                u->round.from = u->added_end;
        return u->result;
}

/* 0: nothing is left, or it was cut. */
static int unmap_rounds(Unmap *u) {
        while (u->round.rounds < ROUNDS_MAX) {
                UnmapRound *round = &u->round;
                bool whole = round->from == 0;
                int r = unmap_round(u);

                if (r != 0)
                        return r == -ENOTCONN || r == -ETIMEDOUT ? REMOTE_E_BUSY : r;
                if (u->cut || (whole && round->done == 0 && round->left == 0))
                        return 0;
                if (round->busy > 0 && !round->written_too)
                        round->written_too = !remap_target_may_pin(u->member->target);
                else if (round->done == 0 && round->left > 0)
                        return REMOTE_E_BUSY;
                *round = (UnmapRound){
                        .keep = u->keep,
                        .rounds = round->rounds + 1,
                        .written_too = round->written_too,
                };
        }
        return REMOTE_E_BUSY;
}

int manager_unmap(Manager *m, Member *member, const RemapPool *keep, UndoSlice *slice) {
        _cleanup_(unmap_done) Unmap u = { .m = m, .member = member, .keep = keep, .until_nsec = slice->until_nsec,
                                          .round = { .keep = keep } };
        int r;

        if (member->unmap.keep == keep)
                u.round = member->unmap;
        member->unmap = (UnmapRound){};
        if (!m->remapping && m->keeper_missed) /* what it maps is not known yet */
                return REMOTE_E_BUSY;
        if (!m->remapping || m->remapping->n_pools == 0)
                return 0;
        if (member->target->memfd < 0) {
                r = target_open_memory(member->target);
                if (r != 0)
                        return remote_error_of(r);
        }
        if (u.round.written_too) /* as nobody had anything pinned when it was looked at last */
                u.round.written_too = !remap_target_may_pin(member->target);
        r = unmap_rounds(&u);
        slice->pages += u.pages;
        member->put_back |= u.pages > 0;
        if (r != 0 || !u.cut)
                return r;
        member->unmap = u.round;
        slice->cut = true;
        return REMOTE_E_BUSY;
}

int manager_put_back(Manager *m, Member *member, const RemapPool *pool, const Ranges *stretches, uint64_t *ret_pages) {
        _cleanup_(unmap_done) Unmap u = { .m = m, .member = member, .in_order = true, .until_nsec = UINT64_MAX };
        _cleanup_(vma_list_done) VmaList vmas = {};
        size_t at = 0;
        int r = target_read_vma_flags(member->target, true, &vmas);

        if (r != 0)
                return remote_error_of(r);
        manager_claim_tracked(member, &vmas);
        r = manager_find_guard(m, member, &vmas);
        if (r != 0)
                return r == -ENOTCONN || r == -ETIMEDOUT ? REMOTE_E_BUSY : r;
        u.vmas = &vmas;
        for (size_t i = 0; i < vmas.n && goes_on(&u); i++) {
                const Vma *vma = &vmas.vmas[i];

                if (remapping_find_pool(m->remapping, vma) != pool)
                        continue;
                while (at < stretches->n && stretches->ranges[at].end <= vma->start)
                        at++;
                for (size_t k = at; k < stretches->n && stretches->ranges[k].start < vma->end && goes_on(&u); k++)
                        add_stretch(&u, i, pool, MAX_OF(stretches->ranges[k].start, vma->start),
                                    MIN_OF(stretches->ranges[k].end, vma->end));
        }
        if (goes_on(&u))
                carry_out(&u);
        give_back_lent(&u);
        *ret_pages += u.pages;
        return u.result;
}
