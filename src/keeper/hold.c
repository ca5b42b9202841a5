/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "keeper/hold.h"

#include "base/io.h"
#include "keeper/protocol.h"

#include <dirent.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>

/* How it looks belongs to the version: a keeper of another leaves it alone. */
#define TABLE_MAGIC (0x31656c626174534bULL ^ (uint64_t)sizeof(HoldEntry) << 48 ^ (uint64_t)KEEPER_PROTOCOL << 32)
#define ADOPT_ENTRIES_MAX (1 << 20)

struct HoldTable {
        uint64_t magic;
        int32_t end;            /* as high as Hold.end ever was */
        KeeperStats stats;
        HoldEntry entries[];
};

int hold_init(Hold *hold, int n_fds, int *ret_table_fd) {
        size_t bytes = sizeof(HoldTable) + (size_t)n_fds * sizeof(HoldEntry);
        _cleanup_close_ int fd = memfd_create("ksmd-keeper-table", MFD_CLOEXEC);
        HoldTable *table;

        if (fd < 0 || ftruncate(fd, (off_t)bytes) < 0)
                return -errno;
        table = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (table == MAP_FAILED)
                return -errno;
        table->magic = TABLE_MAGIC;
        *hold = (Hold){
                .table = table,
                .table_id = guard_id(fd),
                .stats = &table->stats,
                .entries = table->entries,
                .n = n_fds,
        };
        *ret_table_fd = TAKE_FD(fd);
        return 0;
}

static int read_all(int fd, void *to, size_t bytes, size_t offset) {
        ssize_t n = pread(fd, to, bytes, (off_t)offset);

        return n < 0 ? -errno : (size_t)n == bytes ? 0 : -EINVAL;
}

static int read_table(int fd, HoldTable *ret) {
        struct stat st;
        int r = fstat(fd, &st) < 0 ? -errno : S_ISREG(st.st_mode) ? read_all(fd, ret, sizeof *ret, 0) : -EINVAL;

        if (r < 0)
                return r;
        return ret->magic == TABLE_MAGIC && ret->end >= 0 && ret->end <= ADOPT_ENTRIES_MAX ? 0 : -EINVAL;
}

bool hold_is_table(int fd) {
        HoldTable table;

        return read_table(fd, &table) == 0;
}

int hold_adopt(Hold *hold, int fd, int first, int end) {
        _cleanup_free_ HoldEntry *entries = NULL;
        HoldTable table;
        int r = read_table(fd, &table);

        if (r < 0)
                return r;
        entries = calloc((size_t)table.end + 1, sizeof *entries);
        if (!entries)
                return -ENOMEM;
        r = read_all(fd, entries, (size_t)table.end * sizeof *entries, sizeof table);
        for (int held = first; r == 0 && held < end; held++) {
                uint64_t id = guard_kind(held) != GUARD_NONE ? guard_id(held) : 0;

                for (int i = 0; id != 0 && i < table.end; i++)
                        if (entries[i].id == id) {
                                if (hold_add(hold, held, &entries[i].item) == 0)
                                        hold->entries[held].stored = true;
                                break;
                        }
        }
        return r;
}

/* The name that the pool in this mount says it has (merge/pool-fs.c writes it). */
static int pool_name(int fd, char **ret) {
        struct statfs fs;
        size_t size;
        int r;

        if (fstatfs(fd, &fs) < 0)
                return -errno;
        if (fs.f_type != TMPFS_MAGIC)
                return -EINVAL;
        r = read_file(fd, "domain", ret, &size);
        return r < 0 ? -EINVAL : 0;
}

static uint32_t *counter_of(const Hold *hold, GuardKind kind) {
        return kind == GUARD_MUTE ? &hold->stats->mutes : &hold->stats->guards;
}

int hold_add(Hold *hold, int fd, const KeeperItem *item) {
        GuardKind kind = guard_kind(fd);
        HoldEntry *entry;

        if (kind == GUARD_NONE)
                return -EINVAL;
        if (fd >= hold->n)
                return -ENOSPC;
        entry = &hold->entries[fd];
        entry->item = *item;
        entry->item.id = guard_id(fd);
        entry->item.kind = kind;
        entry->unsent = item->parent != 0;
        entry->stored = false;
        __atomic_store_n(&entry->id, entry->item.id, __ATOMIC_RELEASE);
        ++*counter_of(hold, kind);
        hold->end = MAX_OF(hold->end, fd + 1);
        hold->table->end = MAX_OF(hold->table->end, hold->end);
        return 0;
}

void hold_drop(Hold *hold, int fd) {
        HoldEntry *entry = &hold->entries[fd];

        if (entry->id) {
                __atomic_store_n(&entry->id, 0, __ATOMIC_RELEASE);
                --*counter_of(hold, entry->item.kind);
        }
        safe_close(fd);
        while (hold->end > 0 && hold->entries[hold->end - 1].id == 0)
                hold->end--;
}

int hold_find(const Hold *hold, uint64_t id) {
        for (int fd = 0; id != 0 && fd < hold->end; fd++)
                if (hold->entries[fd].id == id)
                        return fd;
        return -ENOENT;
}

int hold_pool_find(const Hold *hold, const char *domain) {
        for (uint32_t i = 0; i < hold->stats->pools; i++) {
                _cleanup_free_ char *name = NULL;

                if (pool_name(hold->pools[i], &name) == 0 && strcmp(name, domain) == 0)
                        return hold->pools[i];
        }
        return -ENOENT;
}

int hold_pool_add(Hold *hold, int fd) {
        _cleanup_free_ char *name = NULL;

        if (pool_name(fd, &name) < 0)
                return -EINVAL;
        if (hold_pool_find(hold, name) >= 0)
                return -EEXIST;
        if (hold->stats->pools == HOLD_POOLS_MAX)
                return -ENOSPC;
        hold->pools[hold->stats->pools++] = fd;
        return 0;
}

void hold_pool_drop(Hold *hold, int fd) {
        for (uint32_t i = 0; i < hold->stats->pools; i++)
                if (hold->pools[i] == fd) {
                        hold->pools[i] = hold->pools[--hold->stats->pools];
                        safe_close(fd);
                        return;
                }
}

bool hold_is_idle(const Hold *hold) { return hold->stats->guards == 0 && hold->stats->mutes == 0; }

/* A child's userfaultfd whose reader was killed just then has no entry; a dropped one may have kept its descriptor. */
static void discover_one(Hold *hold, int fd, void (*other)(void *userdata, int fd), void *userdata) {
        KeeperItem item = {};
        bool stored = false;

        if (fd < hold->n && guard_kind(fd) != GUARD_NONE) {
                if (hold->entries[fd].id == guard_id(fd)) {
                        item = hold->entries[fd].item;
                        stored = hold->entries[fd].stored;
                } else
                        item.parent = UINT64_MAX; /* whose child is not known: for a daemon to take a copy of */
                if (hold_add(hold, fd, &item) == 0) {
                        hold->entries[fd].stored = stored;
                        return;
                }
        }
        if (hold_pool_add(hold, fd) < 0)
                other(userdata, fd);
}

static int read_numbers(int **ret, size_t *ret_n) {
        DIR *directory = opendir("/proc/self/fd");
        size_t n = 0, allocated = 0;
        int *fds = NULL, own;

        if (!directory)
                return -errno;
        own = dirfd(directory);
        for (const struct dirent *entry; (entry = readdir(directory));) {
                int fd = atoi(entry->d_name);

                if (entry->d_name[0] == '.' || fd == own)
                        continue;
                if (GROW(fds, n, allocated) < 0) {
                        free(fds);
                        closedir(directory);
                        return -ENOMEM;
                }
                fds[n++] = fd;
        }
        closedir(directory);
        *ret = fds;
        *ret_n = n;
        return 0;
}

int hold_discover(Hold *hold, void (*other)(void *userdata, int fd), void *userdata) {
        _cleanup_free_ int *fds = NULL;
        int highest = 0, r;
        size_t n = 0;

        r = read_numbers(&fds, &n);
        if (r < 0)
                return r;
        hold->stats->guards = hold->stats->mutes = hold->stats->pools = 0;
        for (size_t i = 0; i < n; i++) {
                discover_one(hold, fds[i], other, userdata);
                highest = MAX_OF(highest, fds[i]);
        }
        hold->end = MIN_OF(highest + 1, hold->n);
        for (int fd = 0; fd < hold->n && fd < MAX_OF(hold->end, highest + 1); fd++)
                if (hold->entries[fd].id && hold->entries[fd].id != guard_id(fd))
                        hold->entries[fd].id = 0;
        return 0;
}
