/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Who left is undone. A child learns from its parent's state file which marks it was born with, and that file ends with
 * the undoing of the parent. So all who leave are asked before any is undone; and as somebody may fork until the very
 * moment in which the last of his marks is gone, the file stays until then, and who was born by then is looked for.
 * What is born later has nothing of ours, so this comes to an end.
 */
#include "daemon/manager.h"

#include "base/io.h"
#include "base/log.h"
#include "daemon/notify.h"
#include "target/origin.h"

#include <fcntl.h>
#include <string.h>

static bool born_of_undone(const Roster *roster, pid_t pid) {
        TargetOrigin origin;

        if (target_origin_of(pid, &origin) < 0)
                return false;
        for (size_t i = 0; i < roster->n_leaving; i++) {
                const Member *member = roster->leaving[i];

                if (member->undone && target_origin_precedes(&member->marks.origin, &origin))
                        return true;
        }
        return false;
}

/* true: there are some whom no list has, and they leave too. */
static bool find_newborn(Manager *m) {
        _cleanup_closedir_ DIR *proc = NULL;
        bool found = false;

        roster_refresh(&m->roster); /* who was born in a cgroup that is managed is a member, not one who leaves */
        if (open_directory(AT_FDCWD, "/proc", &proc) < 0)
                return false;
        for (const struct dirent *entry; (entry = readdir(proc));) {
                pid_t pid = atoi(entry->d_name);
                Member *member;

                if (pid <= 0 || roster_find_leaving(&m->roster, pid) || !born_of_undone(&m->roster, pid))
                        continue;
                member = roster_find_member(&m->roster, pid);
                if (!member && roster_add_orphan(&m->roster, pid) == 0) {
                        member = roster_find_leaving(&m->roster, pid);
                        found = true;
                }
                if (member)
                        (void)manager_load_marks(m, member);
        }
        return found;
}

static bool drop_undone(Manager *m) {
        bool any = false, found;

        for (size_t i = 0; i < m->roster.n_leaving && !any; i++)
                any = m->roster.leaving[i]->undone;
        found = any && roster_guards(ROSTER_GUARD_BORN) && find_newborn(m);
        for (size_t i = 0; i < m->roster.n_leaving;) {
                Member *member = m->roster.leaving[i];

                if (!member->undone) {
                        i++;
                        continue;
                }
                advise_forget(m->advise, member->target, &member->marks);
                roster_drop(&m->roster, member);
        }
        return found;
}

bool manager_undo_leaving(Manager *m, uint64_t *ret_pages) {
        bool again = false;

        for (size_t i = 0; i < m->roster.n_leaving; i++)
                (void)manager_load_marks(m, m->roster.leaving[i]); /* manager_undo() says what is wrong */
        for (size_t i = 0; i < m->roster.n_leaving;) {
                Member *member = m->roster.leaving[i];
                bool had_marks = member->marks.recorded;
                int r;

                notify_watchdog(); /* each may take minutes, and the event loop stands meanwhile */
                r = manager_undo(m, member, ret_pages);
                if (r == REMOTE_E_BUSY || r == REMOTE_E_TRACED || r == REMOTE_E_LOST) {
                        again = true;
                        i++;
                        continue;
                }
                if (r != 0)
                        log_warning("process %d: what was marked for merging cannot be unmarked: %s",
                                    member->target->pid, r < 0 ? strerror(-r) : remote_error_name(r));
                /* The children of who just ended are as managed as he was, and know from what is remembered of him. */
                if (r == 0 && had_marks && (!member->group || (!member->gone && target_alive(member->target)))) {
                        member->undone = true;
                        i++;
                } else
                        roster_drop(&m->roster, member);
        }
        again |= drop_undone(m);
        roster_prune_slots(&m->roster);
        return again;
}
