/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "keeper/guard.h"

#include "base/io.h"

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>

/*
 * GUARD_ZERO watches pool pages in a target. Every page of a remapped run has a pte from the beginning
 * (UFFDIO_CONTINUE), so a fault there, missing or minor, says that the target discarded the page (MADV_DONTNEED) and
 * must read zeros.
 *
 * Its features, and why each: MISSING_SHMEM and MINOR_SHMEM make both kinds of fault ours; WP_HUGETLBFS_SHMEM, with
 * registration for write protection, and EVENT_FORK make fork(2) copy the ptes and the registration into the child,
 * which could not be told from a discarded page otherwise; EVENT_REMAP keeps the registration when mremap(2) moves or
 * grows the mapping, whose new pages would otherwise show neighbouring pool pages: other processes' data. Not
 * EVENT_REMOVE or EVENT_UNMAP: a discarding target would have to wait for us each time.
 *
 * GUARD_MUTE holds accessors up while a run is put back. EVENT_REMAP lets the registration follow mremap(2). Nothing
 * should fork meanwhile; should it all the same, EVENT_FORK makes the child wait where it would read zeros otherwise.
 *
 * (fs/userfaultfd.c, mm/userfaultfd.c of 6.18; tests/kernel/guard-*.)
 */
static const uint64_t features_of[] = {
        [GUARD_ZERO] = UFFD_FEATURE_EVENT_FORK | UFFD_FEATURE_EVENT_REMAP | UFFD_FEATURE_MISSING_SHMEM |
                       UFFD_FEATURE_MINOR_SHMEM | UFFD_FEATURE_WP_HUGETLBFS_SHMEM | UFFD_FEATURE_PAGEFAULT_FLAG_WP,
        [GUARD_MUTE] = UFFD_FEATURE_EVENT_FORK | UFFD_FEATURE_EVENT_REMAP,
};

/* The kernel's own mark in what it shows: UFFD_FEATURE_INITIALIZED (fs/userfaultfd.c). */
#define FEATURE_INITIALIZED (1ULL << 31)

#define ID_POOL ((uint64_t)1 << 63)
#define ID_TABLE ((uint64_t)1 << 62)

/* The kernel refuses (EINVAL) what begins below what processes may map: CONFIG_LSM_MMAP_MIN_ADDR or the sysctl, whichever
 * is more. */
#define ADDRESS_MIN_USUAL ((uint64_t)65536)
#define ADDRESS_MIN_FILE "/proc/sys/vm/mmap_min_addr"
#define ADDRESS_END ((uint64_t)1 << 47)

int guard_init(int uffd, GuardKind kind) {
        struct uffdio_api api = { .api = UFFD_API, .features = features_of[kind] };

        return ioctl(uffd, UFFDIO_API, &api) == 0 ? 0 : -errno;
}

/* "API:\taa:FEATURES:IOCTLS", hexadecimal (userfaultfd_show_fdinfo()); no other file has such a line. A child's are its
 * parent's. */
GuardKind guard_kind(int fd) {
        _cleanup_free_ char *text = NULL;
        unsigned long long api, features;
        const char *line;
        char path[40];

        snprintf(path, sizeof path, "/proc/self/fdinfo/%d", fd);
        if (read_file(AT_FDCWD, path, &text, NULL) < 0)
                return GUARD_NONE;
        line = strstr(text, "\nAPI:\t");
        if (!line || sscanf(line, "\nAPI:\t%llx:%llx:", &api, &features) != 2 || api != UFFD_API)
                return GUARD_NONE;
        for (GuardKind kind = GUARD_ZERO; kind <= GUARD_MUTE; kind++)
                if ((features & ~FEATURE_INITIALIZED) == features_of[kind])
                        return kind;
        return GUARD_NONE;
}

/* Each userfaultfd has an inode of its own (anon_inode_create_getfile(), 5.12); each pool a device number. */
uint64_t guard_id(int fd) {
        struct stat st;

        if (fstat(fd, &st) < 0)
                return 0;
        return S_ISDIR(st.st_mode) ? ID_POOL | st.st_dev : S_ISREG(st.st_mode) ? ID_TABLE | st.st_ino : st.st_ino;
}

/* All that a process can map. */
static struct uffdio_range all_addresses(void) {
        static uint64_t min;

        if (min == 0) {
                uint64_t set;

                min = ADDRESS_MIN_USUAL;
                if (read_u64(AT_FDCWD, ADDRESS_MIN_FILE, &set) == 0 && set < ADDRESS_END / 2)
                        min = MAX_OF(min, ROUND_UP(set, PAGE_BYTES));
        }
        return (struct uffdio_range){ min, ADDRESS_END - PAGE_BYTES - min };
}

/* No mapping is as long as that, so nothing is filled: ENOENT where there is an address space, ESRCH where there is
 * none. */
bool guard_is_dead(int uffd) {
        struct uffdio_zeropage zero = { .range = all_addresses() };

        return ioctl(uffd, UFFDIO_ZEROPAGE, &zero) < 0 && errno == ESRCH;
}

int guard_requeue(int uffd) {
        struct uffdio_range all = all_addresses();

        return ioctl(uffd, UFFDIO_WAKE, &all) == 0 ? 0 : -errno;
}
