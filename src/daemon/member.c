/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What the manager does to one member: meets it, keeps up with its program and its mappings, undoes what was done.
 */
#include "daemon/manager.h"

#include "base/clock.h"
#include "base/log.h"

#include <string.h>

/* Flags (locked, DONTDUMP) may change while the mappings look the same: for so long that is as good as a race. */
#define VMAS_FRESH_NSEC NSEC_PER_SEC

/* First contact, before a page is read: is it dumpable, can it be called, what is marked already. */
static int adopt(Manager *m, Member *member) {
        TargetSkip skip = TARGET_OK;
        int r;

        if (member->group->slot->dry_run)
                return 0;
        if (member->remote_error == REMOTE_E_DENIED || member->remote_error == REMOTE_E_UNFIT)
                return member->remote_error; /* final for this process */
        r = remote_adopt(m->remote, member->target, NULL, &skip);
        if (r != 0)
                return r;
        member->remote_error = 0;
        member->skip = skip;
        if (skip == TARGET_OK)
                member->adopted = true;
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

static int read_vmas(Member *member) {
        int r = target_maps_fingerprint(member->target, &member->vmas_fingerprint);

        if (r != 0)
                return r;
        vma_list_done(&member->vmas);
        member->vmas_nsec = now_nsec();
        return target_read_vmas(member->target, member->group->include_dontdump, &member->vmas);
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
        marks_done(&member->marks);
        vma_list_done(&member->vmas);
        target_close_memory(member->target);
        space_done(&member->space);
        member->space = (Space){ .target = member->target, .table = &member->group->slot->domain->blocks,
                                 .owner = member };
        member->counts = (MemberCounts){ 0 };
        member->marks_loaded = member->adopted = false;
        member->remote_error = 0;
}

bool manager_member_ready(Manager *m, Member *member) {
        bool ask_dumpable = false; /* whom it cannot be seen from outside: adopt() asks everybody */
        uint64_t unmarked = 0;
        int r;

        if (target_image_replaced(member->target) && target_alive(member->target))
                forget_image(m, member);
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
        if (!member->adopted && member->skip == TARGET_OK) {
                r = adopt(m, member);
                if (r != 0) {
                        manager_note_remote_error(m, member, r);
                        return false;
                }
        }
        if (member->skip == TARGET_SKIP_NOT_DUMPABLE && member->marks.ours.n > 0)
                (void)manager_undo(m, member, &unmarked); /* it began to keep secrets; where that fails, the next pass */
        if (member->skip != TARGET_OK &&
            !(member->adopted && (member->skip == TARGET_SKIP_FROZEN || member->skip == TARGET_SKIP_STOPPED)))
                return false;
        r = read_vmas(member);
        if (r == 0 && !member->marks_loaded && !member->group->slot->dry_run) {
                r = marks_load(m->advise, member->target, &member->vmas, &member->marks);
                member->marks_loaded = r == 0;
        }
        if (r == 0)
                r = space_refresh(&member->space, &member->vmas);
        if (r == TARGET_E_DENIED)
                member->skip = TARGET_SKIP_DENIED;
        else if (r < 0)
                log_debug("process %d cannot be read: %s", member->target->pid, strerror(-r));
        return r == 0;
}

/* Ended, or runs another program, in which nothing of ours is. */
static bool image_gone(const Member *member) {
        return member->gone || !target_alive(member->target) || target_image_replaced(member->target);
}

int manager_load_marks(Manager *m, Member *member) {
        int r;

        if (member->marks_loaded || image_gone(member))
                return 0;
        vma_list_done(&member->vmas);
        r = target_read_vmas(member->target, true, &member->vmas);
        if (r == 0)
                r = marks_load(m->advise, member->target, &member->vmas, &member->marks);
        member->marks_loaded = r == 0;
        return r == TARGET_E_GONE ? REMOTE_E_GONE : r == TARGET_E_DENIED ? REMOTE_E_DENIED : r;
}

int manager_undo(Manager *m, Member *member, uint64_t *ret_pages) {
        AdviseResult result = { 0 };
        int r;

        if (image_gone(member)) {
                if (member->marks_loaded)
                        advise_forget(m->advise, member->target, &member->marks);
                return 0;
        }
        r = manager_load_marks(m, member);
        if (r != 0)
                return r == REMOTE_E_GONE ? 0 : r;
        if (member->marks.ours.n == 0) {
                advise_forget(m->advise, member->target, &member->marks);
                return 0;
        }
        r = advise_undo(m->advise, member->target, &member->marks, &result);
        *ret_pages += result.pages_unmarked;
        if (r == REMOTE_E_GONE) {
                advise_forget(m->advise, member->target, &member->marks);
                return 0;
        }
        return r == 0 && member->marks.ours.n > 0 ? REMOTE_E_BUSY : r;
}
