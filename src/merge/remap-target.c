/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "merge/remap-target.h"

#include "base/io.h"
#include "host/pagemap.h"
#include "merge/remap.h"
#include "merge/zero.h"

#include <linux/userfaultfd.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>

#define PAGEMAP_PROTECTED ((uint64_t)1 << 57)   /* by a userfaultfd; of an absent page, too */
#define IO_URING_FILE "anon_inode:[io_uring]"
/* A keeper that is not starved reads an event within some hundred microseconds. */
#define EVENT_TRIES 20U
#define EVENT_WAIT_USEC 250U

static const char *const reasons[] = {
        [REMAP_E_PEER] = "another process shares its memory",
        [REMAP_E_LOCKED] = "it locks its memory",
        [REMAP_E_PINNED] = "a device or io_uring has pinned memory of it",
        [REMAP_E_GONE] = "it ended",
};

const char *remap_fit_reason(int error) {
        return error > 0 && (size_t)error < ELEMENTSOF(reasons) ? reasons[error] : NULL;
}

/* "VmPin:	       0 kB"; a line that is not there is no zero. */
static bool is_zero(const char *status, const char *name) {
        const char *line = strstr(status, name);

        return line && strtoul(line + strlen(name), NULL, 10) == 0;
}

static int read_status(const Target *target, char **ret) {
        int r = read_file(target->procfd, "status", ret, NULL);

        return r == -ENOENT || r == -ESRCH ? REMAP_E_GONE : r;
}

int remap_target_fits(const Target *target) {
        _cleanup_free_ char *status = NULL;
        int r = read_status(target, &status);

        if (r != 0)
                return r;
        if (!is_zero(status, "\nVmPin:"))
                return REMAP_E_PINNED;
        r = zero_target_fits(target);
        return r == ZERO_E_PEER ? REMAP_E_PEER
             : r == ZERO_E_LOCKED ? REMAP_E_LOCKED
             : r == ZERO_E_GONE ? REMAP_E_GONE : r;
}

/* Who pins for VFIO's first kind of container (vfio_lock_acct()) counts as VmLck, like mlock(2). */
static bool counts_pinned(const Target *target) {
        _cleanup_free_ char *status = NULL;

        return read_status(target, &status) != 0 || !is_zero(status, "\nVmPin:") || !is_zero(status, "\nVmLck:");
}

static bool holds_ring(const Target *target) {
        _cleanup_closedir_ DIR *dir = NULL;
        bool found = false;

        if (open_directory(target->procfd, "fd", &dir) < 0)
                return true;
        for (const struct dirent *entry; !found && (entry = readdir(dir));) {
                char link[64];
                ssize_t n = readlinkat(dirfd(dir), entry->d_name, link, sizeof link - 1);

                if (n <= 0)
                        continue;
                link[n] = 0;
                found = strcmp(link, IO_URING_FILE) == 0;
        }
        return found;
}

/* A ring may be in the table of one thread, or registered (io_uring_register_ring_fd(3)) and closed: then its memory is
 * mapped all the same. */
static bool maps_ring(const Target *target) {
        _cleanup_free_ char *maps = NULL;

        return read_file(target->procfd, "maps", &maps, NULL) < 0 || strstr(maps, IO_URING_FILE) || strstr(maps, "/[aio]");
}

bool remap_target_may_pin(const Target *target) {
        return remap_guards(REMAP_GUARD_PIN) && (counts_pinned(target) || holds_ring(target) || maps_ring(target));
}

/* "7f0123456000 default anon=3 …", one for each mapping; a process's own policy shows at all of its mappings. */
int remap_note_policies(const Target *target, VmaList *vmas) {
        _cleanup_free_ char *text = NULL;
        size_t i = 0;
        int r = read_file(target->procfd, "numa_maps", &text, NULL);

        if (r < 0)
                return r == -ESRCH ? TARGET_E_GONE : r;
        for (char *line = text; line && *line; line = strchr(line, '\n'), line += line != NULL) {
                char *end;
                uint64_t start = strtoull(line, &end, 16);

                if (strncmp(end, " default", strlen(" default")) == 0)
                        continue;
                while (i < vmas->n && vmas->vmas[i].end <= start)
                        i++;
                if (i < vmas->n)
                        vmas->vmas[i].policy = true;
        }
        return 0;
}

/* EAGAIN: its process forks, or moves a mapping, and the keeper has not read the event yet. */
static int protect(int uffd, uint64_t address, uint64_t mode) {
        struct uffdio_writeprotect change = { .range = { address, PAGE_BYTES }, .mode = mode };

        for (unsigned tries = 0; ioctl(uffd, UFFDIO_WRITEPROTECT, &change) < 0; tries++) {
                if (errno != EAGAIN || tries == EVENT_TRIES)
                        return -errno;
                usleep(EVENT_WAIT_USEC);
        }
        return 0;
}

static bool is_protected(const Target *target, uint64_t address) {
        uint64_t entry;
        size_t n;

        return target_read_pagemap(target, address, 1, &entry, &n) == 0 && entry & PAGEMAP_PROTECTED;
}

uint64_t remap_guard_page(const Target *target, const Vma *vma) {
        uint64_t entries[BLOCK_PAGES];
        size_t want = (size_t)MIN_OF((vma->end - vma->start) / PAGE_BYTES, (uint64_t)BLOCK_PAGES), n;

        if (target_read_pagemap(target, vma->start, want, entries, &n) != 0)
                return vma->start;
        for (size_t i = 0; i < n; i++)
                if (entries[i] & PAGEMAP_PRESENT && !(entries[i] & PAGEMAP_PROTECTED))
                        return vma->start + i * PAGE_BYTES;
        return vma->start;
}

/* Who writes meanwhile faults, and is let go by the keeper or by the second call. */
bool remap_guard_watches(int uffd, const Target *target, uint64_t address) {
        bool is;

        if (is_protected(target, address) || protect(uffd, address, UFFDIO_WRITEPROTECT_MODE_WP) < 0)
                return false;
        is = is_protected(target, address);
        (void)protect(uffd, address, 0);
        return is && !is_protected(target, address);
}

int remap_guard_register(int uffd, uint64_t start, uint64_t end) {
        struct uffdio_register reg = {
                .range = { start, end - start },
                .mode = UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR | UFFDIO_REGISTER_MODE_WP,
        };

        return ioctl(uffd, UFFDIO_REGISTER, &reg) < 0 ? -errno : 0;
}

/* Reading a page maps it, as the process's own reading would. */
static int map_absent(const Target *target, uint64_t start, uint64_t end) {
        for (uint64_t at = start; at < end; at += BLOCK_PAGES * PAGE_BYTES) {
                uint64_t entries[BLOCK_PAGES];
                size_t n;

                if (target_read_pagemap(target, at, MIN_OF((end - at) / PAGE_BYTES, (uint64_t)BLOCK_PAGES), entries, &n) != 0)
                        return -EFAULT;
                for (size_t i = 0; i < n; i++) {
                        char byte;

                        if (!(entries[i] & PAGEMAP_PRESENT) &&
                            pread(target->memfd, &byte, 1, (off_t)(at + i * PAGE_BYTES)) != 1)
                                return -EFAULT;
                }
        }
        return 0;
}

int remap_guard_watch_again(int uffd, const Target *target, uint64_t start, uint64_t end) {
        return map_absent(target, start, end) ?: remap_guard_register(uffd, start, end);
}
