/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What the census knows beyond what frames say goes to a file before each burst, and after whatever else changed
 * savings: a daemon that starts where another ended (or was killed) then reports the same of what that one merged.
 */
#include "daemon/manager.h"

#include "base/log.h"

#include <fcntl.h>
#include <string.h>

#define KEPT_NAME "merged"

static int open_dir(const Manager *m) {
        int fd = open(m->state_dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);

        return fd < 0 ? -errno : fd;
}

static KeptId id_of(const Member *member) {
        return (KeptId){ (uint64_t)member->target->pid, member->target->start_ticks, member->kin };
}

void manager_read_kept(Manager *m) {
        _cleanup_close_ int fd = open_dir(m);
        int r = fd < 0 ? fd : kept_read(fd, KEPT_NAME, &m->kept);

        if (r < 0 && r != -ENOENT)
                log_warning("%s/" KEPT_NAME ": %s: less may be reported as saved than is", m->state_dir, strerror(-r));
}

void manager_take_kept(Manager *m, Member *member) {
        KeptId id = id_of(member);

        if (!member->kept_taken && kept_take_space(&m->kept, &id, &member->space))
                log_debug("process %d: what an earlier daemon merged is known", member->target->pid);
        member->kept_taken = true;
}

void manager_take_notes(Manager *m, Slot *slot) {
        if (!slot->notes_taken)
                (void)kept_take_notes(&m->kept, slot->name, &slot->notes);
        slot->notes_taken = true;
}

void manager_keep(Manager *m) {
        _cleanup_(kept_writer_done) KeptWriter writer = {};
        _cleanup_close_ int fd = open_dir(m);
        int r = fd;

        for (size_t s = 0; s < m->roster.n_slots; s++)
                if (m->roster.slots[s]->domain && !m->roster.slots[s]->dry_run)
                        kept_add_notes(&writer, m->roster.slots[s]->name, &m->roster.slots[s]->notes);
        for (size_t i = 0; i < m->roster.n_groups; i++) {
                const Group *group = m->roster.groups[i];

                for (size_t k = 0; !group->slot->dry_run && k < group->n_members; k++) {
                        const Member *member = group->members[k];
                        KeptId id = id_of(member);

                        if (member->kept_taken && !member->gone)
                                kept_add_space(&writer, &id, &member->space);
                }
        }
        kept_pass_on(&m->kept, &writer);
        if (r >= 0)
                r = kept_write(&writer, fd, KEPT_NAME);
        if (r < 0)
                log_debug("%s/" KEPT_NAME ": %s", m->state_dir, strerror(-r));
}
