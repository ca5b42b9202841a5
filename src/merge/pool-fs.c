/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "merge/pool-fs.h"

#include "base/io.h"
#include "merge/pool-space.h"
#include "scan/pagemap.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/vfs.h>

/*
 * Counting. Whether a page of the pool may be given back to the kernel is asked of the kernel: a page of ours is mapped
 * into one of our own pages for a moment, and its frame's map count, less ours, is what the targets have.
 *
 * That count is wrong while the kernel migrates the frame (compaction, NUMA balancing): the ptes are replaced by
 * migration entries then and do not count. The kernel holds the lock of the page all that time, which kpageflags shows,
 * and the frame is another afterwards, which pagemap shows: the count is believed only between two looks that agree.
 * What is left is a migration that begins and fails between the two; so nobody gives a page back on one count (pool.c).
 */
#define KPAGEFLAGS_LOCKED ((uint64_t)1 << 0)
#define KPAGEFLAGS_HUGE ((uint64_t)1 << 22) /* KPF_THP */
#define COUNT_TRIES 3U

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
        if (!S_ISREG(st.st_mode) || (uint64_t)st.st_size != POOL_PAGES_MAX * PAGE_BYTES)
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

int pool_counter_init(PoolCounter *counter, int rw_fd) {
        *counter = (PoolCounter){
                .rw_fd = rw_fd,
                .pagemap_fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC),
                .kpagecount_fd = open("/proc/kpagecount", O_RDONLY | O_CLOEXEC),
                .kpageflags_fd = open("/proc/kpageflags", O_RDONLY | O_CLOEXEC),
        };
        if (counter->pagemap_fd < 0 || counter->kpagecount_fd < 0 || counter->kpageflags_fd < 0) {
                int r = -errno;
                pool_counter_done(counter);
                return r;
        }
        return 0;
}

void pool_counter_done(PoolCounter *counter) {
        counter->pagemap_fd = safe_close(counter->pagemap_fd);
        counter->kpagecount_fd = safe_close(counter->kpagecount_fd);
        counter->kpageflags_fd = safe_close(counter->kpageflags_fd);
}

static int read_word(int fd, uint64_t index, uint64_t *ret) {
        ssize_t n = pread(fd, ret, sizeof *ret, (off_t)(index * sizeof *ret));

        return n == sizeof *ret ? 0 : n < 0 ? -errno : -EIO;
}

/* One look at the page that we have mapped at address. */
static int count_once(PoolCounter *counter, const char *address, uint32_t *ret) {
        uint64_t page = (uintptr_t)address / PAGE_BYTES, before, after, flags, flags_after, count;
        int r = read_word(counter->pagemap_fd, page, &before);

        if (r < 0)
                return r;
        *ret = POOL_COUNT_BUSY;
        if (!(before & PAGEMAP_PRESENT))
                return 0;
        if (!(before & PAGEMAP_PFN))
                return -EPERM;
        r = read_word(counter->kpageflags_fd, before & PAGEMAP_PFN, &flags);
        if (r == 0)
                r = read_word(counter->kpagecount_fd, before & PAGEMAP_PFN, &count);
        if (r == 0)
                r = read_word(counter->kpageflags_fd, before & PAGEMAP_PFN, &flags_after);
        if (r == 0)
                r = read_word(counter->pagemap_fd, page, &after);
        if (r < 0)
                return r;
        if (((before ^ after) & (PAGEMAP_PRESENT | PAGEMAP_PFN)) || ((flags | flags_after) & KPAGEFLAGS_LOCKED) ||
            count == 0)
                return 0;
        /* Somebody collapsed it into a huge page: counts are the huge page's. Never free such. */
        if ((flags | flags_after) & KPAGEFLAGS_HUGE)
                return 0;
        *ret = (uint32_t)MIN_OF(count - 1, (uint64_t)POOL_RESERVED - 1);
        return 0;
}

static int count_mapped(PoolCounter *counter, char *map, uint32_t n_pages, uint32_t *ret) {
        unsigned char resident[BLOCK_PAGES];

        if (mincore(map, n_pages * PAGE_BYTES, resident) < 0)
                return -errno;
        for (uint32_t i = 0; i < n_pages; i++) {
                int r = 0;

                ret[i] = POOL_COUNT_NONE;
                if (!(resident[i] & 1))
                        continue; /* touched, it would be allocated */
                ret[i] = POOL_COUNT_BUSY;
                for (unsigned try = 0; try < COUNT_TRIES && ret[i] == POOL_COUNT_BUSY && r == 0; try++) {
                        (void)*(volatile char *)(map + i * PAGE_BYTES);
                        r = count_once(counter, map + i * PAGE_BYTES, &ret[i]);
                }
                if (r < 0)
                        return r;
        }
        return 0;
}

int pool_counter_count(PoolCounter *counter, uint64_t page, uint32_t n_pages, uint32_t *ret) {
        char *map;
        int r;

        if (n_pages > BLOCK_PAGES || page + n_pages > POOL_PAGES_MAX)
                return -EINVAL;
        map = mmap(NULL, n_pages * PAGE_BYTES, PROT_READ, MAP_SHARED, counter->rw_fd, (off_t)(page * PAGE_BYTES));
        if (map == MAP_FAILED)
                return -errno;
        r = count_mapped(counter, map, n_pages, ret);
        (void)munmap(map, n_pages * PAGE_BYTES);
        return r;
}
