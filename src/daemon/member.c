/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What the manager does to one member: meets it, keeps up with its program and its mappings, undoes what was done.
 */
#include "daemon/manager.h"

#include "base/clock.h"
#include "base/log.h"
#include "daemon/remapping.h"

#include <string.h>

/* Flags (locked, DONTDUMP) may change while the mappings look the same: for so long that is as good as a race. */
#define VMAS_FRESH_NSEC NSEC_PER_SEC
/* smaps walks the page tables, 11 ms for 1 GiB of small pages; without it the look at where pages are present is what
 * costs, a third of that. All lists together are read again as often as takes 3/10,000 of a CPU; where the size of the
 * address space changed, ten times as often. */
#define VMAS_NSEC_PER_GIB (37 * NSEC_PER_SEC)
#define VMAS_CHANGED_SHARE 10U
/* What activity does not show (writes of other processes, flags) is looked for every so many passes. */
#define LOOK_PASSES 64U
/* So many pages more or less: somewhere whole blocks came or went. */
#define RESIDENT_CHANGE_PAGES BLOCK_PAGES

static bool wants_track(const Manager *m, const Member *member) {
        return member->group->track != CONF_NO && !member->group->slot->dry_run && !m->track_absent &&
               !member->track_tried && !member->track && !member->past_track;
}

static void begin_track(Manager *m, Member *member, int uffd) {
        int r = uffd < 0 ? -EOPNOTSUPP : track_new(TAKE_FD(uffd), &member->track);

        if (r == 0) {
                member->look_again = member->vmas_changed = true;
                return;
        }
        m->track_absent |= r == -EINVAL || r == -ENOSYS;
        log_debug("process %d: its writes cannot be followed: %s", member->target->pid, strerror(-r));
}

void manager_end_track(Member *member) {
        if (!member->track)
                return;
        member->past_track = TAKE_PTR(member->track);
        for (size_t b = 0; b < member->space.n; b++)
                member->space.blocks[b]->tracked = false;
}

bool manager_release_track(Member *member, uint64_t until_nsec) {
        if (member->past_track && !track_release(member->past_track, until_nsec))
                return false;
        member->past_track = track_free(member->past_track);
        return true;
}

void manager_claim_tracked(const Member *member, VmaList *vmas) {
        track_claim(member->track, vmas);
        track_claim(member->past_track, vmas);
}

/* First contact, before a page is read: is it dumpable, can it be called, what is marked already. */
static int adopt(Manager *m, Member *member) {
        TargetSkip skip = TARGET_OK;
        int uffd = -EBADF, r;
        bool track = wants_track(m, member) && !target_has_userfaultfd(member->target);

        if (member->group->slot->dry_run)
                return 0;
        if (member->remote_error == REMOTE_E_DENIED || member->remote_error == REMOTE_E_UNFIT)
                return member->remote_error; /* final for this process */
        r = remote_adopt(m->remote, member->target, track ? &uffd : NULL, &skip);
        if (r != 0)
                return r;
        member->track_tried = true;
        member->remote_error = 0;
        member->skip = skip;
        if (skip == TARGET_OK) {
                member->adopted = true;
                if (track)
                        begin_track(m, member, TAKE_FD(uffd));
        }
        safe_close(uffd);
        return 0;
}

void manager_note_remote_error(Manager *m, Member *member, int error) {
        switch (error) {
        case REMOTE_E_GONE:
                m->merge_failures[MERGE_FAILURE_GONE]++;
                break;
        case REMOTE_E_BUSY:
        case REMOTE_E_LOST:
                member->skip = TARGET_SKIP_UNCALLABLE;
                m->merge_failures[MERGE_FAILURE_BUSY]++;
                break;
        case REMOTE_E_TRACED:
                member->skip = TARGET_SKIP_TRACED;
                break;
        default:
                member->skip = error == REMOTE_E_DENIED ? TARGET_SKIP_DENIED : TARGET_SKIP_UNCALLABLE;
                m->merge_failures[MERGE_FAILURE_DENIED] += member->remote_error != error; /* final: not tried again */
        }
        member->remote_error = error;
}

/* What of it will be read for the first time may be cold, which only the sums tell (scan/cold.h). */
static bool wants_sums(const Member *member) {
        bool unread = member->space.n == 0;

        if (!host_has_swap())
                return false;
        for (size_t b = 0; b < member->space.n && !unread; b++)
                unread = member->space.blocks[b]->pass == 0;
        return unread;
}

/* A mark of ours is on what became a secret. */
static bool marks_secrets(const Member *member) {
        const Ranges *ours = &member->marks.ours;
        size_t at = 0;

        for (size_t i = 0; i < member->vmas.n; i++) {
                const Vma *vma = &member->vmas.vmas[i];

                if (!vma->mergeable || !vma_holds_secrets(vma))
                        continue;
                while (at < ours->n && ours->ranges[at].end <= vma->start)
                        at++;
                if (at < ours->n && ours->ranges[at].start < vma->end)
                        return true;
        }
        return false;
}

static int read_vmas(Member *member) {
        int r = target_maps_fingerprint(member->target, &member->vmas_fingerprint);

        if (r != 0)
                return r;
        vma_list_done(&member->vmas);
        member->vmas_nsec = now_nsec();
        r = (wants_sums(member) ? target_read_vmas : target_read_vma_flags)(
                        member->target, member->group->include_dontdump, &member->vmas);
        if (r != 0)
                return r;
        manager_claim_tracked(member, &member->vmas);
        member->unmark |= marks_secrets(member);
        return 0;
}

int manager_refresh_vmas(Member *member) {
        uint64_t fingerprint;
        int r;

        if (now_nsec() - member->vmas_nsec < VMAS_FRESH_NSEC) {
                r = target_maps_fingerprint(member->target, &fingerprint);
                if (r != 0 || fingerprint == member->vmas_fingerprint)
                        return r;
        }
        return read_vmas(member);
}

/* execve(2): another program, with nothing of ours in it; it is met as if for the first time. */
static void forget_image(Manager *m, Member *member) {
        advise_forget(m->advise, member->target, &member->marks);
        manager_untell(m, member);
        probes_forget_blocks(m->probes, member->target->pid);
        marks_done(&member->marks);
        vma_list_done(&member->vmas);
        target_close_memory(member->target);
        member->track = track_free(member->track);
        member->past_track = track_free(member->past_track);
        selection_done(&member->todo);
        space_done(&member->space);
        member->space = (Space){ .target = member->target, .table = &member->group->slot->domain->blocks,
                                 .owner = member };
        member->counts = (MemberCounts){ 0 };
        member->census = (Census){ 0 };
        member->holes = 0;
        member->unmap = (UnmapRound){ 0 };
        remap_guard_done(&member->guard);
        ranges_done(&member->own);
        member->pooled = member->astray = 0;
        member->marks_loaded = member->adopted = member->track_tried = member->kept_taken = false;
        member->kin = 0;
        member->vmas_nsec = member->refreshed_nsec = 0;
        member->last_pass = member->met_pass = member->unconfirmed = member->warm_from = 0;
        member->remote_error = 0;
        memset(member->skipped, 0, sizeof member->skipped);
        member->skipped_due_nsec = 0;
}

/* What an earlier daemon did to it counts, too: its mappings are read for that, once. */
static bool holds_ours(Manager *m, Member *member) {
        if (!member->marks_loaded && !member->group->slot->dry_run && manager_load_marks(m, member) == 0)
                manager_note_pooled(m, member);
        return member->marks.ours.n > 0 || member->pooled > 0;
}

/* Ended, or runs another program, in which nothing of ours is. */
static bool image_gone(const Member *member) {
        return member->gone || !target_alive(member->target) || target_image_replaced(member->target);
}

/* Whether it takes part at all, asked again whenever it did something. */
static bool meet(Manager *m, Member *member) {
        bool ask_dumpable = false; /* whom it cannot be seen from outside: adopt() asks everybody */
        UndoSlice slice = manager_undo_begin();
        int r;

        member->met_pass = member->group->slot->domain->pass;
        r = target_inspect(member->target, m->once ? 0 : m->conf->daemon.minimum_age_nsec, &member->skip,
                           &ask_dumpable);
        if (r != 0) {
                member->gone |= r == TARGET_E_GONE;
                return false;
        }
        m->young_waiting |= member->skip == TARGET_SKIP_YOUNG;
        if (member->skip == TARGET_OK && cgroup_frozen(m->roster.tree, member->group->path))
                member->skip = TARGET_SKIP_FROZEN;
        /* Opened once, before first contact: after an execve(2) it reads as ended, so that what was found out about one
         * program is never taken for true of the next. */
        if (member->skip == TARGET_OK && member->target->memfd < 0) {
                r = target_open_memory(member->target);
                if (r != 0) {
                        member->gone |= r == TARGET_E_GONE;
                        member->skip = TARGET_SKIP_DENIED;
                        return false;
                }
        }
        if (member->skip == TARGET_OK && (!member->adopted || wants_track(m, member))) {
                r = adopt(m, member);
                if (r != 0) {
                        m->busy_waiting |= r == REMOTE_E_BUSY && !member->adopted;
                        manager_note_remote_error(m, member, r);
                        return false;
                }
        }
        if (member->track && member->group->track == CONF_NO)
                manager_end_track(member);
        if (member->skip == TARGET_SKIP_NOT_DUMPABLE && holds_ours(m, member)) {
                do /* it began to keep secrets; where that fails, the next pass */
                        (void)manager_undo(m, member, &slice);
                while (manager_undo_goes_on(m, member, &slice));
                return false;
        }
        return member_may_be_read(member);
}

/* A pass that is cut leaves some whom it has not come to. */
bool manager_takes_part(Manager *m, Member *member) {
        if (member->met_pass == member->group->slot->domain->pass)
                return member_may_be_read(member);
        return !image_gone(member) && meet(m, member) && !member->gone && !member->leaving;
}

/* The mappings, and where in them pages are present: which shows what is new, and may be cold. */
static int read_space(Member *member) {
        int r;

        member->space.selected = selection_left(&member->todo);
        do {
                r = read_vmas(member);
                if (r == 0)
                        r = space_refresh(&member->space, &member->vmas);
        } while (r == 0 && member->vmas.uncounted && wants_sums(member));
        return r;
}

int manager_refresh(Manager *m, Member *member) {
        bool wants_its_own = member->track && target_has_userfaultfd(member->target);
        TargetOrigin origin;
        int r = read_space(member);

        if (r != 0)
                return r;
        member->vmas_changed = false;
        manager_note_pooled(m, member);
        if (member->kin == 0 && target_origin(member->target, &origin) == 0)
                member->kin = target_origin_kin(&origin);
        if (!member->marks_loaded && !member->group->slot->dry_run) {
                r = marks_load(m->advise, member->target, &member->vmas, &member->marks);
                member->marks_loaded = r == 0;
                if (r < 0)
                        return r;
        }
        if (member->track) {
                r = track_update(member->track, member->target, &member->vmas);
                if (r == TARGET_E_GONE)
                        return r;
                member->look_again |= r == 0 && member->track->grown;
                if (r < 0 || wants_its_own) /* a mapping belongs to one userfaultfd */
                        manager_end_track(member);
        }
        manager_take_kept(m, member);
        select_cover(&member->space, member->track, &member->vmas);
        member->refreshed_nsec = now_nsec();
        return 0;
}

static uint64_t distance(uint64_t a, uint64_t b) { return a > b ? a - b : b - a; }

static bool refresh_is_due(const Manager *m, Member *member, const TargetActivity *now, bool active) {
        uint64_t age = now_nsec() - member->refreshed_nsec; /* a plan reads the mappings too, and no more */
        uint64_t patience = m->managed_pages * PAGE_BYTES / (1 << 20) * VMAS_NSEC_PER_GIB / 1024;

        if (member->refreshed_nsec == 0 || m->once)
                return true;
        member->vmas_changed |= (member->track && member->track->stale) ||
                                now->mapped_bytes != member->activity.mapped_bytes ||
                                distance(now->resident_pages, member->activity.resident_pages) >= RESIDENT_CHANGE_PAGES;
        if (member->vmas_changed)
                return manager_scan_requested(m) || age >= patience / VMAS_CHANGED_SHARE;
        return active && age >= patience;
}

bool manager_member_ready(Manager *m, Member *member) {
        TargetActivity now;
        bool active, look, left;
        int r;

        if (target_image_replaced(member->target) && target_alive(member->target))
                forget_image(m, member);
        left = selection_left(&member->todo);
        r = target_activity(member->target, &now);
        if (r != 0) {
                member->gone |= r == TARGET_E_GONE;
                return false;
        }
        if (member->standing.looked_nsec == 0)
                manager_look_how_it_runs(member, 0);
        look = member->last_pass == 0 || member->look_again || m->once ||
               (member->group->slot->domain->pass + member->space.n) % LOOK_PASSES == 0;
        active = look || left || memcmp(&now, &member->activity, sizeof now) != 0;
        if ((active || member->skip != TARGET_OK || wants_track(m, member)) && !meet(m, member))
                return false;
        r = 0;
        if (refresh_is_due(m, member, &now, active)) {
                r = left ? read_vmas(member) : manager_refresh(m, member);
                member->vmas_changed |= left; /* what is new in them is looked for once that was read */
        }
        if (r == TARGET_E_DENIED)
                member->skip = TARGET_SKIP_DENIED;
        else if (r < 0)
                log_debug("process %d cannot be read: %s", member->target->pid, strerror(-r));
        if (r != 0 || left)
                return r == 0;
        look |= member->look_again; /* what was written to before it was registered was no fault, or is one used up */
        member->faults = look ? UINT64_MAX : now.faults - member->activity.faults;
        member->activity = now;
        member->look_again = false;
        return true;
}

int manager_load_marks(Manager *m, Member *member) {
        int r;

        if (member->marks_loaded || image_gone(member))
                return 0;
        vma_list_done(&member->vmas);
        r = target_read_vma_flags(member->target, true, &member->vmas);
        if (r == 0)
                r = marks_load(m->advise, member->target, &member->vmas, &member->marks);
        member->marks_loaded = r == 0;
        return remote_error_of(r);
}

int manager_unmark(Manager *m, Member *member, UndoSlice *slice) {
        AdviseResult result = { 0 };
        int r;

        if (member->marks.ours.n == 0)
                return 0;
        r = advise_undo(m->advise, member->target, &member->marks, slice->until_nsec, &result);
        slice->pages += result.pages_unmarked;
        slice->cut |= r == 0 && result.unfinished;
        return r == 0 && (slice->cut || member->marks.ours.n > 0) ? REMOTE_E_BUSY : r;
}

static int undo(Manager *m, Member *member, UndoSlice *slice) {
        int r;

        if (image_gone(member))
                return 0;
        manager_end_track(member);
        if (!manager_release_track(member, slice->until_nsec)) {
                slice->cut = true;
                return REMOTE_E_BUSY;
        }
        r = manager_unmap(m, member, NULL, slice);
        if (r == 0)
                r = manager_load_marks(m, member);
        return r == 0 ? manager_unmark(m, member, slice) : r;
}

/* Merging can wait until CPUs are free, to be left alone is everybody's right. */
int manager_undo(Manager *m, Member *member, UndoSlice *slice) {
        int r;

        remote_insist(m->remote, true);
        r = undo(m, member, slice);
        /* Ending, or becoming another program, it is refused or not found in many ways. */
        if (r == REMOTE_E_GONE || image_gone(member)) {
                if (member->marks_loaded)
                        advise_forget(m->advise, member->target, &member->marks);
                slice->cut = false;
                r = 0;
        }
        remote_insist(m->remote, false);
        return r;
}
