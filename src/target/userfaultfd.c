/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "target/target.h"

#include "base/io.h"

#include <fcntl.h>
#include <string.h>

/*
 * Whether a process uses userfaultfd(2) itself, or is about to. A mapping belongs to one userfaultfd only: where we
 * track, its own registration would fail with EBUSY (post-copy migration and snapshots of QEMU, CRIU's lazy pages,
 * collectors).
 *
 * What shows: a descriptor that is one, or the device that makes them. What is known beforehand: a QEMU started to
 * take in a migration, which may turn into a post-copy one. Whoever has given its only descriptor to another process
 * shows in the flags of its mappings (VMA_SKIP_UFFD).
 */
static bool is_link_to_userfaultfd(int fd, const char *name) {
        char link[32];
        ssize_t n = readlinkat(fd, name, link, sizeof link - 1);

        if (n <= 0)
                return false;
        link[n] = 0;
        return strcmp(link, "anon_inode:[userfaultfd]") == 0 || strcmp(link, "/dev/userfaultfd") == 0;
}

/* Arguments are told apart by their ends; a process may have overwritten them, to its own loss. */
static bool takes_in_a_migration(int procfd) {
        _cleanup_free_ char *arguments = NULL;
        size_t size;

        if (read_file(procfd, "cmdline", &arguments, &size) < 0)
                return false;
        for (const char *p = arguments; p < arguments + size; p += strlen(p) + 1)
                if (strcmp(p, "-incoming") == 0 || strcmp(p, "--incoming") == 0)
                        return true;
        return false;
}

bool target_has_userfaultfd(const Target *target) {
        _cleanup_closedir_ DIR *fds = NULL;
        bool found = false;
        int r = open_directory(target->procfd, "fd", &fds);

        if (r < 0)
                return r != -ENOENT && r != -ESRCH;
        for (const struct dirent *entry; !found && (entry = readdir(fds));)
                found = entry->d_name[0] != '.' && is_link_to_userfaultfd(dirfd(fds), entry->d_name);
        return found || takes_in_a_migration(target->procfd);
}
