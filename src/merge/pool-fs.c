/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "merge/pool-fs.h"

#include "base/io.h"
#include "merge/pool-space.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/vfs.h>

/* What "the kernel does not know it" looks like; anything else is refusal. */
static int unsupported(int error) {
        return error == ENOSYS || error == EINVAL || error == ENODEV ? -EOPNOTSUPP : -error;
}

static bool has_huge_pages(void) { return access("/sys/kernel/mm/transparent_hugepage/enabled", F_OK) == 0; }

/* shmem_enabled=force puts huge pages into every tmpfs, whatever it was mounted with. */
static bool huge_pages_forced(void) {
        _cleanup_free_ char *text = NULL;

        return read_file(AT_FDCWD, "/sys/kernel/mm/transparent_hugepage/shmem_enabled", &text, NULL) == 0 &&
               strstr(text, "[force]");
}

static int make_mount(int *ret, const char **ret_reason) {
        _cleanup_close_ int fs = fsopen("tmpfs", FSOPEN_CLOEXEC);
        int mount;

        *ret_reason = "fsopen(\"tmpfs\") (Linux 5.2, CAP_SYS_ADMIN)";
        if (fs < 0)
                return unsupported(errno);
        /* What is swapped out has no pte: it could not be told from what a target discarded. */
        *ret_reason = "tmpfs noswap (Linux 6.4)";
        if (fsconfig(fs, FSCONFIG_SET_FLAG, "noswap", NULL, 0) < 0)
                return unsupported(errno);
        *ret_reason = "tmpfs huge=never";
        if (has_huge_pages() && fsconfig(fs, FSCONFIG_SET_STRING, "huge", "never", 0) < 0)
                return unsupported(errno);
        *ret_reason = "shmem_enabled is force: huge pages in every tmpfs";
        if (huge_pages_forced())
                return -EOPNOTSUPP;
        *ret_reason = "tmpfs size=0, mode=0700";
        if (fsconfig(fs, FSCONFIG_SET_STRING, "size", "0", 0) < 0 || /* as much as there is */
            fsconfig(fs, FSCONFIG_SET_STRING, "mode", "0700", 0) < 0)
                return unsupported(errno);
        *ret_reason = "a tmpfs of our own (CAP_SYS_ADMIN)";
        if (fsconfig(fs, FSCONFIG_CMD_CREATE, NULL, NULL, 0) < 0)
                return unsupported(errno);
        /* Not MOUNT_ATTR_NOEXEC: a target may make its memory executable one day. */
        *ret_reason = "fsmount (CAP_SYS_ADMIN)";
        mount = fsmount(fs, FSMOUNT_CLOEXEC, MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV);
        if (mount < 0)
                return unsupported(errno);
        *ret = mount;
        return 0;
}

int pool_fs_new(const char *domain, int *ret_mount_fd, int *ret_rw_fd, const char **ret_reason) {
        _cleanup_close_ int mount = -EBADF, rw = -EBADF, name = -EBADF;
        int r = make_mount(&mount, ret_reason);

        if (r < 0)
                return r;
        *ret_reason = "files in the tmpfs";
        name = openat(mount, "domain", O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0400);
        rw = openat(mount, "pool", O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0400);
        if (name < 0 || rw < 0)
                return -errno;
        if (write(name, domain, strlen(domain)) != (ssize_t)strlen(domain))
                return -ENOSPC;
        /* Sparse, and so long that no mapping that grows ever passes its end. */
        if (ftruncate(rw, (off_t)(POOL_PAGES_MAX * PAGE_BYTES)) < 0)
                return -errno;
        *ret_mount_fd = TAKE_FD(mount);
        *ret_rw_fd = TAKE_FD(rw);
        *ret_reason = NULL;
        return 0;
}

int pool_fs_domain(int mount_fd, char **ret) {
        _cleanup_free_ char *name = NULL;
        struct statfs fs;
        size_t size;
        int r;

        if (fstatfs(mount_fd, &fs) < 0)
                return -errno;
        if (fs.f_type != TMPFS_MAGIC)
                return -EBADMSG;
        r = read_file(mount_fd, "domain", &name, &size);
        if (r < 0)
                return r == -ENOENT ? -EBADMSG : r;
        if (size != strlen(name))
                return -EBADMSG;
        *ret = TAKE_PTR(name);
        return 0;
}

int pool_fs_open(const char *domain, int mount_fd, int *ret_rw_fd) {
        _cleanup_free_ char *name = NULL;
        _cleanup_close_ int rw = -EBADF;
        struct stat st;
        int r = pool_fs_domain(mount_fd, &name);

        if (r < 0)
                return r;
        if (strcmp(name, domain) != 0)
                return -EBADMSG;
        rw = openat(mount_fd, "pool", O_RDWR | O_CLOEXEC | O_NOFOLLOW);
        if (rw < 0)
                return errno == ENOENT ? -EBADMSG : -errno;
        if (fstat(rw, &st) < 0)
                return -errno;
        if (!S_ISREG(st.st_mode) || (uint64_t)st.st_size < POOL_PAGES_MAX * PAGE_BYTES)
                return -EBADMSG;
        *ret_rw_fd = TAKE_FD(rw);
        return 0;
}

int pool_fs_open_readonly(int mount_fd, int *ret_fd, const char **ret_reason) {
        struct mount_attr attr = { .attr_set = MOUNT_ATTR_RDONLY };
        _cleanup_close_ int tree = -EBADF;
        int fd;

        *ret_reason = "open_tree(OPEN_TREE_CLONE) (Linux 5.2, CAP_SYS_ADMIN)";
        tree = open_tree(mount_fd, "", AT_EMPTY_PATH | OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC);
        if (tree < 0)
                return unsupported(errno);
        *ret_reason = "mount_setattr(MOUNT_ATTR_RDONLY) (Linux 5.12)";
        if (mount_setattr(tree, "", AT_EMPTY_PATH, &attr, sizeof attr) < 0)
                return unsupported(errno);
        *ret_reason = "the pool through its read-only mount";
        fd = openat(tree, "pool", O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
        if (fd < 0)
                return -errno;
        *ret_fd = fd;
        *ret_reason = NULL;
        return 0;
}

int pool_fs_lengthen(int rw_fd) {
        struct stat st;

        if (fstat(rw_fd, &st) < 0 || ftruncate(rw_fd, st.st_size + (off_t)PAGE_BYTES) < 0)
                return -errno;
        return 0;
}
