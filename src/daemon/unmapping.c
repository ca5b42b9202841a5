/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The way back from route remap, and whose guard is whose.
 *
 * A guard belongs to an address space, and is found again by the daemon that comes after, or for a child that was forked,
 * by trying the keeper's on one page of the process (remap_guard_watches()). The mute userfaultfd watches nothing between
 * two batches, so where it is not known a new one will do.
 *
 * Pages that were written since they were merged are put back too, unless something may have pinned them: what writes
 * past the page tables would be lost (merge/remap.h). Such runs stay as they are, and are tried again.
 */
#include "daemon/remapping.h"

#include "base/clock.h"
#include "base/log.h"
#include "daemon/notify.h"

#include <string.h>

/* In one go, the event loop standing: what is left is gone on with a moment later. */
#define UNMAP_NSEC (400 * NSEC_PER_MSEC)
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
        uint64_t tried;
} Search;

/* The process's own are asked first; then the children's, whose process the keeper does not know. */
static int try_guard(void *userdata, const KeeperItem *item, int *uffd) {
        Search *search = userdata;
        const Target *target = search->member->target;
        bool ours = item->owner.pid == target->pid && item->owner.start_ticks == target->start_ticks;

        if (item->kind == GUARD_MUTE && ours && search->found.mute < 0 && !guard_is_dead(*uffd))
                search->found.mute = TAKE_FD(*uffd);
        if (item->kind == GUARD_ZERO && search->found.zero < 0 && search->address != 0 &&
            (ours || item->owner.pid == 0) && remap_guard_watches(*uffd, target, search->address))
                search->found.zero = TAKE_FD(*uffd);
        else if (item->kind == GUARD_ZERO && search->found.zero < 0 && search->address == 0 && ours && !guard_is_dead(*uffd))
                search->found.zero = TAKE_FD(*uffd);
        return 0;
}

/* What an earlier daemon, or the process that forked it, remapped in the process, and nobody watches any more: both
 * keeper and daemon were killed. What is discarded from now on is noticed again. */
static void watch_again(const Manager *m, const Member *member, const VmaList *vmas) {
        for (size_t i = 0; i < vmas->n; i++) {
                const Vma *vma = &vmas->vmas[i];
                int r;

                if (!remapping_find_pool(m->remapping, vma) || remap_vma_guarded(vma))
                        continue;
                r = remap_guard_register(member->guard.zero, vma->start, vma->end);
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
                                search.address = vmas->vmas[i].start;
                r = keeper_list(m->remapping->keeper, try_guard, &search);
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
        uint64_t units, done, left, busy;
        bool written_too;
        int result;                     /* REMOTE_E_*, -errno: no more is begun */
} Unmap;

/* Another mapping that the run can become one with, right beside it. */
static bool is_alike(const Vma *vma, const Vma *run) {
        return !vma->file && vma->skip == VMA_OK && vma->write && !vma->exec && !vma->growsdown && !vma->named &&
               !vma->keyed && !vma->tracked && !vma->huge_advised && vma->advice == run->advice &&
               vma->mergeable == run->mergeable;
}

static void carry_out(Unmap *u) {
        RemapBatch batch = remapping_batch(u->m, &u->member->guard, u->ranges, u->n, u->units, true);
        size_t left = 0;

        if (u->n == 0)
                return;
        batch.written_too = u->written_too;
        batch.pool_dev = u->pool->identity.dev;
        batch.pool_inode = u->pool->identity.inode;
        u->result = remap_undo(u->m->remote, u->member->target, &batch);
        if (u->result == 0)
                remapping_learn(u->m->remapping, &batch, true);
        if (u->result == REMOTE_E_LOST)
                u->m->remapping->uncertain_until_nsec = now_nsec() + UNCERTAIN_NSEC;
        for (size_t i = 0; i < u->n && u->result == 0; i++) {
                const RemapRange *range = &u->ranges[i];

                if (range->result == REMAP_DONE)
                        u->done += range->n_pages;
                else
                        left += range->n_pages;
                if (range->result == REMAP_UNGUARDED)
                        (void)remap_guard_register(u->member->guard.zero, range->start,
                                                   range->start + range->n_pages * PAGE_BYTES);
                u->busy += range->result == REMAP_BUSY ? range->n_pages : 0;
                if (range->result != REMAP_DONE)
                        log_debug("process %d: %u pages at %lx stay remapped: %s (%s)", u->member->target->pid,
                                  range->n_pages, range->start, remap_result_name(range->result), strerror(-range->error));
        }
        u->left += left;
        if (batch.workers > 0)
                u->result = REMOTE_E_BUSY;
        u->n = 0;
        u->units = 0;
        notify_watchdog();
}

static void add_piece(Unmap *u, const Vma *vma, const RemapPool *pool, uint64_t start, uint32_t n_pages, uint64_t neighbour) {
        const RemapPace *pace = &u->m->remapping->pace[true];
        uint64_t units = remap_pace_units(pace, n_pages);

        if (u->n == REMAP_BATCH_MAX || u->pool != pool || (u->n > 0 && u->units + units > remap_pace_batch(pace)))
                carry_out(u);
        if (u->result != 0)
                return;
        u->pool = pool;
        u->units += units;
        u->ranges[u->n++] = (RemapRange){
                .start = start,
                .n_pages = n_pages,
                .advice = vma->advice,
                .mergeable = vma->mergeable,
                .neighbour = neighbour,
        };
}

/* In the order of the addresses, so that each piece becomes one with the one before it. */
static void add_mapping(Unmap *u, size_t i, const RemapPool *pool) {
        const Vma *vma = &u->vmas->vmas[i], *below = i > 0 ? vma - 1 : NULL, *above = i + 1 < u->vmas->n ? vma + 1 : NULL;
        bool joins = below && below->end == vma->start &&
                     (is_alike(below, vma) || (remapping_find_pool(u->m->remapping, below) && below->advice == vma->advice &&
                                               below->mergeable == vma->mergeable));

        for (uint64_t start = vma->start; start < vma->end && u->result == 0;) {
                uint32_t n = (uint32_t)MIN_OF((vma->end - start) / PAGE_BYTES, (uint64_t)REMAP_PIECE_PAGES);
                bool last = start + n * PAGE_BYTES == vma->end, lower = start > vma->start || joins;

                add_piece(u, vma, pool, start, n,
                          lower                                                            ? start - PAGE_BYTES
                          : last && above && above->start == vma->end && is_alike(above, vma) ? vma->end
                                                                                           : 0);
                start += n * PAGE_BYTES;
        }
}

/* One look at all of the mappings. */
static int unmap_round(Unmap *u, uint64_t until_nsec) {
        _cleanup_(vma_list_done) VmaList vmas = {};
        bool any = false;
        int r = target_read_vma_flags(u->member->target, true, &vmas);

        if (r != 0)
                return r == TARGET_E_GONE ? REMOTE_E_GONE : r == TARGET_E_DENIED ? REMOTE_E_DENIED : r;
        u->vmas = &vmas;
        u->done = u->left = u->busy = 0;
        u->result = 0;
        for (size_t i = 0; i < vmas.n && u->result == 0; i++) {
                const RemapPool *pool = remapping_find_pool(u->m->remapping, &vmas.vmas[i]);

                if (!pool || pool == u->keep)
                        continue;
                if (!any) {
                        r = manager_find_guard(u->m, u->member, &vmas);
                        if (r != 0)
                                return r;
                }
                any = true;
                add_mapping(u, i, pool);
                if (now_nsec() > until_nsec && u->result == 0) {
                        carry_out(u);
                        return u->result != 0 ? u->result : REMOTE_E_BUSY;
                }
        }
        if (u->result == 0)
                carry_out(u);
        return u->result;
}

int manager_unmap(Manager *m, Member *member, const RemapPool *keep, uint64_t *ret_pages) {
        Unmap u = { .m = m, .member = member, .keep = keep };
        uint64_t until = now_nsec() + UNMAP_NSEC;
        int r = 0;

        if (!m->remapping || m->remapping->n_pools == 0)
                return 0;
        if (member->target->memfd < 0) {
                r = target_open_memory(member->target);
                if (r != 0)
                        return r == TARGET_E_GONE ? REMOTE_E_GONE : r == TARGET_E_DENIED ? REMOTE_E_DENIED : r;
        }
        for (unsigned round = 0; round < ROUNDS_MAX; round++) {
                r = unmap_round(&u, until);
                *ret_pages += u.done;
                if (r == -ENOTCONN || r == -ETIMEDOUT)
                        return REMOTE_E_BUSY;
                if (r != 0)
                        return r;
                if (u.done == 0 && u.left == 0)
                        return 0;
                if (u.busy > 0 && !u.written_too)
                        u.written_too = !remap_target_may_pin(member->target);
                else if (u.done == 0)
                        return REMOTE_E_BUSY;
        }
        return REMOTE_E_BUSY;
}
