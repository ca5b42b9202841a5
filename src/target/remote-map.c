/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "target/remote-internal.h"

#include "base/io.h"

#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/sysmacros.h>

/*
 * What a remote call has to know of a target's memory: where a thread's stack may be lowered, and where its own code
 * holds the two snippets that we borrow. The text is read from the mapped file where that can be had (map_files), so
 * that looking for it does not fault pages into the target; the bytes are verified in the target once a thread stands.
 */
#define SEARCH_CHUNK ((size_t)1 << 20)
#define SEARCH_MAX ((uint64_t)64 << 20)
/* A thread's control block lies at the top of its stack's mapping: glibc's struct pthread is 2.3 KiB, musl keeps its
 * thread-specific data above. */
#define THREAD_BLOCK_MAX 16384U
#define THREAD_STACK_MAX ((uint64_t)8 << 20)
/* In how many pieces a stack may lie: looking at them takes a microsecond each while the thread stands. */
#define STACK_PIECES_MAX 128U

/* include/uapi/linux/fs.h of Linux 6.11, younger than Debian 12's headers. A maps file of a process with thousands of
 * mappings (we make them) takes milliseconds to read, and each stop needs to know of three or four. */
typedef struct ProcmapQuery {
        uint64_t size, flags, address;
        uint64_t start, end, vma_flags, page_size, offset, inode;
        uint32_t dev_major, dev_minor, name_size, build_id_size;
        uint64_t name_address, build_id_address;
} ProcmapQuery;
_Static_assert(sizeof(ProcmapQuery) == 104, "struct procmap_query");
#define PROCMAP_QUERY_IOCTL _IOWR('f', 17, ProcmapQuery)
enum { QUERY_READABLE = 1, QUERY_WRITABLE = 2, QUERY_EXECUTABLE = 4, QUERY_SHARED = 8, QUERY_OR_NEXT = 16 };

void remote_maps_done(RemoteMaps *maps) {
        free(maps->maps);
        safe_close(maps->fd);
        *maps = (RemoteMaps){ .fd = -EBADF };
}

static void name_map(RemoteMap *map, const char *path) {
        const char *base = strrchr(path, '/');
        map->main_stack = strcmp(path, "[stack]") == 0;
        map->vdso = strcmp(path, "[vdso]") == 0;
        map->libc = base && (strncmp(base, "/libc", 5) == 0 || strncmp(base, "/ld-musl", 8) == 0);
}

/* 0, -ENOENT: nothing is mapped there (nor, QUERY_OR_NEXT, above); -ESRCH; -ENOTTY: an older kernel. */
static int query(int fd, uint64_t address, uint64_t flags, RemoteMap *ret) {
        char name[PATH_MAX];
        name[0] = '\0';
        ProcmapQuery q = {
                .size = sizeof q,
                .flags = flags,
                .address = address,
                .name_size = sizeof name,
                .name_address = (uintptr_t)name,
        };
        while (ioctl(fd, PROCMAP_QUERY_IOCTL, &q) < 0) {
                if (errno != ENAMETOOLONG || q.name_size == 0)
                        return -errno;
                q.name_size = 0;
                q.name_address = 0;
        }
        *ret = (RemoteMap){
                .start = q.start,
                .end = q.end,
                .offset = q.offset,
                .inode = q.inode,
                .dev = (uint32_t)makedev(q.dev_major, q.dev_minor),
                .read = q.vma_flags & QUERY_READABLE,
                .write = q.vma_flags & QUERY_WRITABLE,
                .exec = q.vma_flags & QUERY_EXECUTABLE,
                .shared = q.vma_flags & QUERY_SHARED,
        };
        name_map(ret, q.name_size > 0 ? name : "");
        return 0;
}

int remote_maps_parse(char *text, RemoteMaps *ret) {
        _cleanup_(remote_maps_done) RemoteMaps maps = { .fd = -EBADF };
        for (char *line = text; *line;) {
                char *end = strchrnul(line, '\n');
                char *next = *end ? end + 1 : end;
                *end = '\0';
                RemoteMap map = {};
                char perms[5];
                unsigned dev_major, dev_minor;
                int name = 0;
                if (sscanf(line, "%lx-%lx %4s %lx %x:%x %lu %n", &map.start, &map.end, perms, &map.offset, &dev_major,
                           &dev_minor, &map.inode, &name) < 7 || strlen(perms) != 4)
                        return -EINVAL;
                map.dev = (uint32_t)makedev(dev_major, dev_minor);
                map.read = perms[0] == 'r';
                map.write = perms[1] == 'w';
                map.exec = perms[2] == 'x';
                map.shared = perms[3] == 's';
                if (name > 0)
                        name_map(&map, line + name);
                int r = GROW(maps.maps, maps.n, maps.allocated);
                if (r < 0)
                        return r;
                maps.maps[maps.n++] = map;
                line = next;
        }
        *ret = maps;
        maps = (RemoteMaps){ .fd = -EBADF };
        return 0;
}

int remote_maps_open(const Target *target, RemoteMaps *ret) {
        RemoteMap first;
        _cleanup_close_ int fd = openat(target->procfd, "maps", O_RDONLY | O_CLOEXEC);
        if (fd < 0)
                return errno == EACCES || errno == EPERM ? REMOTE_E_DENIED :
                       errno == ENOENT || errno == ESRCH ? REMOTE_E_GONE : -errno;
        int r = query(fd, 0, 0, &first);
        if (r == -ESRCH)
                return REMOTE_E_GONE;
        if (r < 0 && r != -ENOENT)
                return remote_maps_read(target, ret);
        *ret = (RemoteMaps){ .fd = TAKE_FD(fd) };
        return 0;
}

int remote_maps_read(const Target *target, RemoteMaps *ret) {
        _cleanup_free_ char *text = NULL;
        int r = read_file(target->procfd, "maps", &text, NULL);
        if (r == -EACCES || r == -EPERM)
                return REMOTE_E_DENIED;
        if (r == -ESRCH || r == -ENOENT || (r >= 0 && !*text))
                return REMOTE_E_GONE;
        return r < 0 ? r : remote_maps_parse(text, ret);
}

static const RemoteMap *find_or_next(const RemoteMaps *maps, uint64_t address) {
        size_t low = 0, high = maps->n;
        while (low < high) {
                size_t middle = (low + high) / 2;
                if (maps->maps[middle].end <= address)
                        low = middle + 1;
                else
                        high = middle;
        }
        return low < maps->n ? &maps->maps[low] : NULL;
}

bool remote_maps_find(const RemoteMaps *maps, uint64_t address, RemoteMap *ret) {
        if (maps->fd >= 0)
                return query(maps->fd, address, 0, ret) == 0;
        const RemoteMap *found = find_or_next(maps, address);
        if (!found || found->start > address)
                return false;
        *ret = *found;
        return true;
}

bool remote_maps_find_or_next(const RemoteMaps *maps, uint64_t address, RemoteMap *ret) {
        if (maps->fd >= 0)
                return query(maps->fd, address, QUERY_OR_NEXT, ret) == 0;
        const RemoteMap *found = find_or_next(maps, address);
        if (found)
                *ret = *found;
        return found;
}

static bool may_be_stack(const RemoteMap *map) {
        return map->read && map->write && !map->exec && !map->shared && !map->inode;
}

/* A stack is one mapping until parts of it are marked for merging, which splits it: then [stack] is the name of the
 * piece at the top only, and below the stack pointer there may be less than a page up to the next piece. Pieces that
 * touch are one stack. */
uint64_t remote_stack_floor(int memfd, const RemoteMaps *maps, bool leader, uint64_t sp, uint64_t thread_pointer) {
        RemoteMap top, bottom, next;
        unsigned pieces = 0;
        if (!remote_maps_find(maps, sp - 1, &top) || !may_be_stack(&top))
                return 0;
        bottom = top;
        while (!top.main_stack && (thread_pointer < top.start || thread_pointer >= top.end)) {
                if (pieces++ == STACK_PIECES_MAX || !remote_maps_find(maps, top.end, &next) || !may_be_stack(&next))
                        return 0;
                top = next;
        }
        bool guarded = true;
        while (remote_maps_find(maps, bottom.start - 1, &next)) {
                if (!may_be_stack(&next) || pieces++ == STACK_PIECES_MAX) {
                        guarded = !next.read && !next.write && !next.exec;
                        break;
                }
                bottom = next;
        }
        /* The room below the main stack is the kernel's to give: we use what is mapped. */
        if (top.main_stack)
                return leader ? bottom.start : 0;

        /* A stack that the C library made: guarded below, the thread's control block at its top, pointing to itself.
         * Stacks of goroutines, fibers and the like have neither; the memory below their pointer is somebody's. */
        uint64_t self;
        if (thread_pointer <= sp || thread_pointer - sp > THREAD_STACK_MAX ||
            top.end - thread_pointer > THREAD_BLOCK_MAX || !guarded)
                return 0;
        if (pread(memfd, &self, sizeof self, (off_t)thread_pointer) != sizeof self || self != thread_pointer)
                return 0;
        return bottom.start;
}

/* A piece of one mapping's text, from its file or, failing that, from the target's memory. */
static ssize_t read_text(int filefd, int memfd, const RemoteMap *map, uint64_t at, uint8_t *buffer, size_t size) {
        ssize_t n = filefd >= 0 ? pread(filefd, buffer, size, (off_t)(map->offset + at)) : -1;
        return n > 0 ? n : pread(memfd, buffer, size, (off_t)(map->start + at));
}

static void search_map(const Target *target, int memfd, const RemoteMap *map, uint8_t *buffer, RemoteCode *code) {
        char path[64];
        snprintf(path, sizeof path, "map_files/%lx-%lx", map->start, map->end);
        _cleanup_close_ int filefd = map->inode ? openat(target->procfd, path, O_RDONLY | O_CLOEXEC | O_NOCTTY) : -EBADF;
        uint64_t size = MIN_OF(map->end - map->start, SEARCH_MAX);
        for (uint64_t at = 0; at < size && (!code->call || !code->sigreturn);) {
                ssize_t n = read_text(filefd, memfd, map, at, buffer, (size_t)MIN_OF(size - at, (uint64_t)SEARCH_CHUNK));
                if (n <= 0)
                        return;
                ssize_t call = code->call ? -1 : remote_arch_find_call(buffer, (size_t)n);
                ssize_t sigreturn = code->sigreturn ? -1 : remote_arch_find_sigreturn(buffer, (size_t)n);
                if (call >= 0)
                        code->call = map->start + at + (uint64_t)call;
                if (sigreturn >= 0)
                        code->sigreturn = map->start + at + (uint64_t)sigreturn;
                if (at + (uint64_t)n >= size || n <= (ssize_t)REMOTE_ARCH_SNIPPET_MAX)
                        return;
                at += (uint64_t)n - REMOTE_ARCH_SNIPPET_MAX; /* a snippet may lie across two pieces */
        }
}

int remote_code_find(const Target *target, int memfd, RemoteCode *ret) {
        _cleanup_(remote_maps_done) RemoteMaps maps = { .fd = -EBADF };
        _cleanup_free_ uint8_t *buffer = malloc(SEARCH_CHUNK);
        if (!buffer)
                return -ENOMEM;
        int r = remote_maps_read(target, &maps);
        if (r != 0)
                return r;
        RemoteCode code = {};
        for (int libc = 1; libc >= 0; libc--)
                for (size_t i = 0; i < maps.n && (!code.call || !code.sigreturn); i++) {
                        const RemoteMap *map = &maps.maps[i];
                        if (map->read && map->exec && !map->write && !map->shared && (map->inode || map->vdso) &&
                            map->libc == (libc == 1))
                                search_map(target, memfd, map, buffer, &code);
                }
        if (!code.call || !code.sigreturn)
                return REMOTE_E_UNFIT;
        *ret = code;
        return 0;
}

bool remote_code_verify(int memfd, const RemoteCode *code) {
        uint8_t call[REMOTE_ARCH_SNIPPET_MAX] = {}, sigreturn[REMOTE_ARCH_SNIPPET_MAX] = {};
        return pread(memfd, call, sizeof call, (off_t)code->call) > 0 && remote_arch_find_call(call, sizeof call) == 0 &&
               pread(memfd, sigreturn, sizeof sigreturn, (off_t)code->sigreturn) > 0 &&
               remote_arch_find_sigreturn(sigreturn, sizeof sigreturn) == 0;
}
