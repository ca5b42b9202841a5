/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Who left is undone. A child learns from its parent's state file which marks it was born with, and that file ends with
 * the undoing of the parent. So all who leave are asked before any is undone; and as somebody may fork until the very
 * moment in which the last of his marks is gone, the file stays until then, and who was born by then is looked for.
 * What is born later has nothing of ours, so this comes to an end.
 *
 * Undoing takes seconds for each GiB, so it is done in slices, between which the event loop runs; who is in the middle
 * of it goes on where it was. As nothing is written down of how far it came, a daemon that is killed in between leaves
 * what the next one undoes from the beginning: what is still marked or remapped is the kernel's to tell.
 */
#include "daemon/manager.h"

#include "base/clock.h"
#include "base/io.h"
#include "base/log.h"
#include "daemon/remapping.h"
#include "target/origin.h"

#include <fcntl.h>
#include <string.h>

#define SLICE_NSEC (50 * NSEC_PER_MSEC)
/* Of one that runs less is done in a row, and then it is let run, so that undoing has a tenth of its time: to have a page of
 * its own again costs it a flush of its TLB. That would take minutes for some GiB where all is undone because the daemon
 * ends, and whoever ends it waits. */
#define RUNS_SLICE_NSEC (5 * NSEC_PER_MSEC)
#define RUNS_SHARE 10U
#define RUNS_LOOK_NSEC (20 * NSEC_PER_MSEC)
/* Who could not be undone is tried again so soon, and ever more seldom while nothing comes of it: each try reads
 * mappings, and may disturb. */
#define RETRY_NSEC (50 * NSEC_PER_MSEC)
#define RETRY_MAX_NSEC NSEC_PER_SEC
/* Who refuses for good is asked again so seldom: he may become another program, and while he lives the domain that he left
 * is the only one that KSM may merge. */
#define GIVEN_UP_NSEC (60 * NSEC_PER_SEC)
/* Of each pool, in one go: some ten milliseconds. */
#define TEND_PAGES 8192U

UndoSlice manager_undo_begin(void) { return (UndoSlice){ .until_nsec = now_nsec() + SLICE_NSEC }; }

bool manager_undo_goes_on(Manager *m, const Member *member, UndoSlice *slice) {
        if (!slice->cut || manager_attend(m) || member->gone || member->leaving)
                return false;
        slice->cut = false;
        slice->until_nsec = now_nsec() + SLICE_NSEC;
        return true;
}

/* Of whom this one may have been born; NULL: of nobody. */
static int undone_parent(const Roster *roster, pid_t pid, const Member **ret) {
        TargetOrigin origin;
        int r = target_origin_of(pid, &origin);

        *ret = NULL;
        if (r < 0)
                return target_origin_is_gone(r) ? 0 : r;
        for (size_t i = 0; i < roster->n_leaving && !*ret; i++) {
                const Member *member = roster->leaving[i];

                if (member->undone && target_origin_precedes(&member->marks.origin, &origin))
                        *ret = member;
        }
        return 0;
}

/* Was it born of somebody whom we undid, and no list has it, it leaves too; and it learns its marks, while it can. */
static int take_newborn(Manager *m, pid_t pid) {
        Member *member = roster_find_leaving(&m->roster, pid);
        const Member *parent;
        int r;

        if (member && (member->marks_loaded || member->undone))
                return 0;
        r = undone_parent(&m->roster, pid, &parent);
        if (!parent)
                return r;
        member = member ?: roster_find_member(&m->roster, pid);
        if (!member) {
                r = roster_add_orphan(&m->roster, pid);
                if (r != 0)
                        return r;
                member = roster_find_leaving(&m->roster, pid);
                member->unmerge = parent->unmerge;
        }
        return manager_load_marks(m, member);
}

/* -errno: who was born cannot be told, or not what he was born with. */
static int find_newborn(Manager *m) {
        _cleanup_closedir_ DIR *proc = NULL;
        int r;

        roster_refresh(&m->roster); /* who was born in a cgroup that is managed is a member, not one who leaves */
        r = open_directory(AT_FDCWD, "/proc", &proc);
        if (r < 0)
                return r;
        for (const struct dirent *entry; errno = 0, (entry = readdir(proc));) {
                pid_t pid = dirent_pid(entry);
                int taken = pid > 0 ? take_newborn(m, pid) : 0;

                r = taken < 0 ? taken : r;
        }
        return errno ? -errno : r;
}

/* Each time that nothing comes of it later. */
static void retry_later(Member *member, bool anything_came_of_it) {
        if (anything_came_of_it || member->undo_wait_nsec == 0)
                member->undo_wait_nsec = RETRY_NSEC;
        else
                member->undo_wait_nsec = MIN_OF(2 * member->undo_wait_nsec, RETRY_MAX_NSEC);
        member->undo_at_nsec = now_nsec() + member->undo_wait_nsec;
}

static void keep_undone(Manager *m, int error) {
        log_debug("who was born while his parent was undone cannot be told: %s", strerror(-error));
        for (size_t i = 0; i < m->roster.n_leaving; i++)
                if (m->roster.leaving[i]->undone)
                        retry_later(m->roster.leaving[i], false);
}

static void drop_undone(Manager *m) {
        bool any = false;
        int r = 0;

        for (size_t i = 0; i < m->roster.n_leaving && !any; i++)
                any = m->roster.leaving[i]->undone;
        if (any && roster_guards(ROSTER_GUARD_BORN))
                r = find_newborn(m);
        if (r < 0) {
                keep_undone(m, r);
                return;
        }
        for (size_t i = 0; i < m->roster.n_leaving;) {
                Member *member = m->roster.leaving[i];

                if (!member->undone) {
                        i++;
                        continue;
                }
                advise_forget(m->advise, member->target, &member->marks);
                roster_drop(&m->roster, member);
        }
}

/* Of those who asked for its undoing the one after that (NULL: the first); NULL: there is no other. */
static Request *next_request(Manager *m, const Member *member, const Request *after) {
        for (size_t i = after ? (size_t)(after - m->requests) + 1 : 0; i < m->n_requests; i++)
                if (m->requests[i].id == member->unmerge && member->unmerge != 0)
                        return &m->requests[i];
        return NULL;
}

/* Somebody left for it and is not undone yet. */
static bool is_awaited(const Manager *m, const Request *request) {
        for (size_t i = 0; i < m->roster.n_leaving; i++)
                if (m->roster.leaving[i]->unmerge == request->id)
                        return true;
        return false;
}

/* As manager_undo(). *ret_cut: of this one there is more to be done, at once or after a rest. */
static int undo_by_turns(Manager *m, Member *member, UndoSlice *slice, bool *ret_cut) {
        uint64_t begun = now_nsec(), until = slice->until_nsec;
        bool gently;
        int r;

        manager_look_how_it_runs(member, RUNS_LOOK_NSEC);
        gently = member->standing.runs > 0 && !m->stopping && !m->once;
        if (gently)
                slice->until_nsec = MIN_OF(until, begun + RUNS_SLICE_NSEC);
        r = manager_undo(m, member, slice);
        slice->until_nsec = until;
        *ret_cut = slice->cut;
        member->undo_rests = gently && slice->cut;
        if (member->undo_rests) {
                slice->cut = false; /* the others need not wait */
                member->undo_at_nsec = now_nsec() + (now_nsec() - begun) * (RUNS_SHARE - 1);
        }
        return r;
}

static void give_up(Manager *m, Member *member, int error) {
        if (!member->given_up)
                log_warning("process %d: what was done to it cannot be undone: %s", member->target->pid,
                            error < 0 ? strerror(-error) : remote_error_name(error));
        for (Request *request = NULL; (request = next_request(m, member, request));)
                request->failed++;
        member->given_up = true;
        member->unmerge = 0; /* nobody waits for it any more */
        member->undo_at_nsec = now_nsec() + GIVEN_UP_NSEC;
}

/* A slice's worth of one of them. true: it is not over, or its record is still needed. */
static bool undo_one(Manager *m, Member *member, UndoSlice *slice) {
        uint64_t before = slice->pages;
        bool had_marks = member->marks.recorded, cut;
        int r = undo_by_turns(m, member, slice, &cut);

        for (Request *request = NULL; (request = next_request(m, member, request));) {
                request->pages += slice->pages - before;
                if (slice->pages > before || cut)
                        request->moved_nsec = now_nsec();
        }
        if (cut)
                return true;
        if (r == REMOTE_E_BUSY || r == REMOTE_E_TRACED || r == REMOTE_E_LOST) {
                retry_later(member, slice->pages > before);
                return true;
        }
        if (r != 0) {
                give_up(m, member, r);
                return true;
        }
        /* The children of who just ended are as managed as he was, and know from what is remembered of him. */
        member->undone = (had_marks || member->put_back) &&
                         (!member->group || (!member->gone && target_alive(member->target)));
        return member->undone;
}

static bool is_due(const Member *member) { return member->gone || member->undo_at_nsec <= now_nsec(); }

bool manager_undo_leaving(Manager *m, uint64_t *ret_pages) {
        UndoSlice slice;
        bool wanting = false;

        for (size_t i = 0; i < m->roster.n_leaving; i++)
                if (is_due(m->roster.leaving[i]))
                        (void)manager_load_marks(m, m->roster.leaving[i]); /* manager_undo() says what is wrong */
        slice = manager_undo_begin();
        for (size_t i = 0; i < m->roster.n_leaving && !slice.cut;) {
                Member *member = m->roster.leaving[i];

                if (now_nsec() >= slice.until_nsec)
                        slice.cut = true;
                else if (!is_due(member) || undo_one(m, member, &slice))
                        i++;
                else
                        roster_drop(&m->roster, member);
        }
        drop_undone(m);
        roster_prune_slots(&m->roster);
        m->undo_at_nsec = slice.cut ? 0 : UINT64_MAX;
        for (size_t i = 0; i < m->roster.n_leaving; i++) {
                m->undo_at_nsec = MIN_OF(m->undo_at_nsec, m->roster.leaving[i]->undo_at_nsec);
                wanting |= !m->roster.leaving[i]->given_up;
        }
        /* Whose turn it was not is not to blame. */
        for (size_t i = 0; i < m->n_requests && slice.cut; i++)
                m->requests[i].moved_nsec = now_nsec();
        *ret_pages += slice.pages;
        return wanting;
}

uint64_t manager_undo_wait_nsec(const Manager *m) {
        uint64_t now = now_nsec();

        return m->undo_at_nsec == UINT64_MAX ? UINT64_MAX : MAX_OF(m->undo_at_nsec, now) - now;
}

bool manager_undo_rests(const Manager *m) {
        for (size_t i = 0; i < m->roster.n_leaving; i++)
                if (m->roster.leaving[i]->undo_rests)
                        return true;
        return false;
}

/* Of who asked for the same before a reload, and still waits; or a new one. */
static uint64_t unmerge_id(Manager *m, const Request *request) {
        for (size_t i = 0; i < m->n_requests; i++)
                if (m->requests[i].id != 0 && strcmp(m->requests[i].cgroup, request->cgroup) == 0)
                        return m->requests[i].id;
        return ++m->request_ids;
}

void manager_begin_unmerges(Manager *m) {
        for (size_t i = 0; i < m->n_requests;) {
                Request *request = &m->requests[i];
                int r = 0;

                if (request->kind == REQUEST_UNMERGE && !request->started) {
                        request->started = true;
                        request->id = unmerge_id(m, request);
                        request->moved_nsec = now_nsec();
                        r = roster_block(&m->roster, request->cgroup, request->id);
                }
                if (r < 0)
                        manager_end_request(m, i, r == -ENOENT ? SERVICE_E_NOT_FOUND : r, "no such cgroup is opted in",
                                            NULL);
                else
                        i++;
        }
}

/* true: what nobody maps any more was given back. */
static bool tend_for(Manager *m, Request *request) {
        uint64_t all = manager_pool_pages(m);

        if (request->tended < all) {
                manager_tend_pools(m, TEND_PAGES);
                request->tended += TEND_PAGES;
        }
        return request->tended >= all;
}

/* One is undone, and its answer is a matter of moments. */
bool manager_answer_is_near(const Manager *m) {
        for (size_t i = 0; i < m->n_requests; i++)
                if (m->requests[i].tended > 0)
                        return true;
        return false;
}

/* Answered when it is done, which takes a while for what is large, or where a process cannot be called at once. */
void manager_end_unmerges(Manager *m) {
        bool counted = false;

        for (size_t i = 0; i < m->n_requests;) {
                Request *request = &m->requests[i];
                bool awaited = is_awaited(m, request);

                if (request->kind != REQUEST_UNMERGE || !request->started ||
                    (awaited && now_nsec() < request->moved_nsec + UNDO_PATIENCE_NSEC) ||
                    (!awaited && !tend_for(m, request))) {
                        i++;
                        continue;
                }
                if (!counted)
                        manager_census(m);
                counted = true;
                if (awaited)
                        manager_end_request(m, i, SERVICE_E_BUSY,
                                            "some processes cannot be called now; it goes on being tried", NULL);
                else if (request->failed > 0)
                        manager_end_request(m, i, -EIO,
                                            "some processes could not be undone: the daemon's log says which", NULL);
                else
                        manager_end_request(m, i, 0, NULL, json_pack("{s:I}", "pages", (json_int_t)request->pages));
        }
}
