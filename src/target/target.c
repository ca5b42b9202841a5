/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Who a process is, and whether it is one to leave alone.
 *
 * Identity: pidfd_open(2) names the process; then its /proc directory is opened by number, and a signal 0 through the
 * pidfd proves that the process still held the number after that (a zombie holds it until it is reaped). So descriptor
 * and directory are the same process's, and every file is reached through that directory: once the process is gone
 * they answer ESRCH or ENOENT, whoever has the number then (fs/proc/base.c: an inode of /proc keeps the struct pid).
 *
 * What is read here is what the kernel says about the process, not what the process says: the auxiliary vector and
 * the name are the exceptions, and whoever lies there only keeps his own memory from being merged, or is found out
 * when a call is tried.
 */
#include "target/target.h"

#include "base/clock.h"
#include "base/io.h"
#include "target/vma-reader.h"

#include <elf.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>

/* include/linux/sched.h: not in any header for user space, but unchanged since 2008. */
#define PF_KTHREAD 0x00200000U

/* Whoever maps and unmaps all the time is read from smaps. */
#define FLAGS_TRIES 2U

static const char *const skip_names[_TARGET_SKIP_MAX] = {
        [TARGET_OK] = "ok",
        [TARGET_SKIP_SELF] = "self",
        [TARGET_SKIP_KERNEL_THREAD] = "kernel-thread",
        [TARGET_SKIP_ZOMBIE] = "zombie",
        [TARGET_SKIP_COMPAT32] = "32-bit",
        [TARGET_SKIP_TRACED] = "traced",
        [TARGET_SKIP_NOT_DUMPABLE] = "not-dumpable",
        [TARGET_SKIP_YOUNG] = "young",
        [TARGET_SKIP_FROZEN] = "frozen",
        [TARGET_SKIP_STOPPED] = "stopped",
        [TARGET_SKIP_SHADOW_STACK] = "shadow-stack",
        [TARGET_SKIP_DENIED] = "denied",
        [TARGET_SKIP_UNCALLABLE] = "uncallable",
};

const char *target_skip_name(TargetSkip skip) {
        return (unsigned)skip < _TARGET_SKIP_MAX ? skip_names[skip] : "?";
}

/* What an error from a file of /proc/PID means. */
static int outcome(int r) {
        switch (r) {
        case -ESRCH: case -ENOENT:
                return TARGET_E_GONE;
        case -EPERM: case -EACCES:
                return TARGET_E_DENIED;
        default:
                return r;
        }
}

typedef struct Stat {
        char comm[16];
        char state;
        unsigned flags;
        uint64_t start_ticks;
} Stat;

/* proc_pid_stat(5). The name may hold anything, parentheses and newlines too, so it ends at the last parenthesis. */
static int read_stat(int procfd, Stat *ret) {
        _cleanup_free_ char *text = NULL;
        unsigned long long start;
        Stat stat = {};
        char *open, *close;
        int r;

        r = read_file(procfd, "stat", &text, NULL);
        if (r < 0)
                return outcome(r);
        open = strchr(text, '(');
        close = strrchr(text, ')');
        if (!open || !close || close < open)
                return -EBADMSG;
        if (sscanf(close + 1, " %c %*d %*d %*d %*d %*d %u %*u %*u %*u %*u %*u %*u %*d %*d %*d %*d %*d %*d %llu",
                   &stat.state, &stat.flags, &start) != 3)
                return -EBADMSG;
        stat.start_ticks = start;
        *close = 0;
        /* Names of kernel threads may be longer (workers append what they work for). */
        snprintf(stat.comm, sizeof stat.comm, "%s", open + 1);
        *ret = stat;
        return 0;
}

int target_new(pid_t pid, Target **ret) {
        _cleanup_(target_freep) Target *target = calloc(1, sizeof *target);
        char path[32];
        Stat stat;
        int r;

        if (!target)
                return -ENOMEM;
        *target = (Target) { .pid = pid, .pidfd = -EBADF, .procfd = -EBADF, .memfd = -EBADF, .pagemapfd = -EBADF };
        target->pidfd = (int)syscall(SYS_pidfd_open, pid, 0); /* close-on-exec always */
        if (target->pidfd < 0) {
                /* EINVAL, ENOENT: the number of a thread that leads no process. */
                if (errno == EINVAL || errno == ENOENT)
                        return TARGET_E_GONE;
                return outcome(-errno);
        }
        snprintf(path, sizeof path, "/proc/%d", pid);
        target->procfd = open(path, O_PATH | O_DIRECTORY | O_CLOEXEC);
        if (target->procfd < 0)
                return outcome(-errno);
        /* EPERM: it exists. */
        if (syscall(SYS_pidfd_send_signal, target->pidfd, 0, NULL, 0) < 0 && errno != EPERM)
                return outcome(-errno);
        r = read_stat(target->procfd, &stat);
        if (r != 0)
                return r;
        memcpy(target->comm, stat.comm, sizeof target->comm);
        target->start_ticks = stat.start_ticks;
        *ret = TAKE_PTR(target);
        return 0;
}

Target *target_free(Target *target) {
        if (!target)
                return NULL;
        target_close_memory(target);
        safe_close(target->procfd);
        safe_close(target->pidfd);
        free(target);
        return NULL;
}

bool target_alive(const Target *target) {
        struct pollfd fd = { .fd = target->pidfd, .events = POLLIN };
        int r;

        do
                r = poll(&fd, 1, 0);
        while (r < 0 && errno == EINTR);
        return r == 0;
}

/* The value of "Key:\tvalue" in the text of status, up to the end of its line; NULL: no such key. Only the name of the
 * process precedes the first key, with its newlines written as \n. */
static const char *status_value(const char *status, const char *key) {
        size_t size = strlen(key);

        for (const char *line = status; line; line = strchr(line, '\n')) {
                if (*line == '\n')
                        line++;
                if (strncmp(line, key, size) == 0 && line[size] == ':') {
                        line += size + 1;
                        return line + strspn(line, "\t ");
                }
        }
        return NULL;
}

/* Compares with the file we run ourselves, and knows the control program by name: it reads processes like we do, and
 * two of us should not read each other. */
static bool is_ours(const Target *target) {
        struct stat ours, theirs;
        char link[4096];
        const char *name;
        ssize_t n;

        if (target->pid == getpid())
                return true;
        if (stat("/proc/self/exe", &ours) == 0 && fstatat(target->procfd, "exe", &theirs, 0) == 0 &&
            ours.st_dev == theirs.st_dev && ours.st_ino == theirs.st_ino)
                return true;
        if (strcmp(target->comm, "ksmctl") != 0 && strcmp(target->comm, "ksmd-user") != 0)
                return false;
        n = readlinkat(target->procfd, "exe", link, sizeof link - 1);
        if (n < 0)
                return false;
        link[n] = 0;
        name = strrchr(link, '/');
        if (!name)
                return false;
        n = (ssize_t)strcspn(++name, " "); /* "ksmctl (deleted)": an upgrade */
        return (n == 6 && strncmp(name, "ksmctl", 6) == 0) || (n == 9 && strncmp(name, "ksmd-user", 9) == 0);
}

/* The loader that started the program wrote the auxiliary vector in its own word size: pairs of 8 bytes, or of 4, in
 * which case the first "type" we read holds a value in its upper half. Cheaper than the ELF header of the executable,
 * which may have to come from disk. *ret: it is 32-bit. */
static int read_compat32(int procfd, bool *ret) {
        uint64_t auxv[2 * 64];
        ssize_t n;
        _cleanup_close_ int fd = openat(procfd, "auxv", O_RDONLY | O_CLOEXEC);

        if (fd < 0)
                return outcome(-errno);
        n = read(fd, auxv, sizeof auxv);
        if (n < 0)
                return outcome(-errno);
        if (n == 0)
                return TARGET_E_GONE; /* ending: it has no memory any more */
        for (size_t i = 0; i + 1 < (size_t)n / sizeof auxv[0] && auxv[i] != AT_NULL; i += 2)
                if (auxv[i] == AT_PAGESZ) {
                        *ret = auxv[i + 1] != PAGE_BYTES;
                        return 0;
                }
        *ret = true; /* nothing that we know: as good as foreign code */
        return 0;
}

/*
 * The files in the directory of a process that is not dumpable belong to the root of its user namespace instead of to
 * its effective user (task_dump_owner(), fs/proc/base.c). So for a process that is root there, nothing shows. In a user
 * namespace other than ours, which uid is its root is not worth finding out: ask.
 */
static int read_dumpable(int procfd, uid_t euid, bool *ret_dumpable, bool *ret_ask) {
        struct stat file, ours, theirs;

        if (fstatat(procfd, "stat", &file, 0) < 0)
                return outcome(-errno);
        if (fstatat(procfd, "ns/user", &theirs, 0) < 0)
                return outcome(-errno);
        if (stat("/proc/self/ns/user", &ours) < 0)
                return -errno;
        *ret_dumpable = file.st_uid == euid;
        *ret_ask = *ret_dumpable && (euid == 0 || ours.st_dev != theirs.st_dev || ours.st_ino != theirs.st_ino);
        return 0;
}

static uint64_t age_nsec(const Stat *stat) {
        uint64_t hz = (uint64_t)sysconf(_SC_CLK_TCK), now = clock_nsec(CLOCK_BOOTTIME);
        uint64_t start = stat->start_ticks / hz * NSEC_PER_SEC + stat->start_ticks % hz * NSEC_PER_SEC / hz;

        return now > start ? now - start : 0;
}

/* In the freezer of cgroup v1 (the cgroup layer knows the one of v2): in D state there. */
static bool in_freezer(int procfd) {
        _cleanup_free_ char *where = NULL;

        return read_file(procfd, "wchan", &where, NULL) == 0 && strcmp(where, "__refrigerator") == 0;
}

static int found(TargetSkip *ret, TargetSkip skip) {
        *ret = skip;
        return 0;
}

static int inspect(Target *target, uint64_t minimum_age_nsec, TargetSkip *ret, bool *ret_ask) {
        _cleanup_free_ char *status = NULL;
        bool compat32 = true, dumpable = false;
        const char *value;
        unsigned euid;
        Stat stat;
        int r;

        *ret_ask = false;
        r = read_stat(target->procfd, &stat);
        if (r != 0)
                return r;
        memcpy(target->comm, stat.comm, sizeof target->comm); /* another one since exec, or prctl(PR_SET_NAME) */

        /* For good first, then for now: a reason that lasts tells the operator more. */
        if (stat.flags & PF_KTHREAD)
                return found(ret, TARGET_SKIP_KERNEL_THREAD);
        if (stat.state == 'Z' || stat.state == 'X')
                return found(ret, TARGET_SKIP_ZOMBIE);
        if (is_ours(target))
                return found(ret, TARGET_SKIP_SELF);
        r = read_compat32(target->procfd, &compat32);
        if (r != 0)
                return r;
        if (compat32)
                return found(ret, TARGET_SKIP_COMPAT32);
        r = read_file(target->procfd, "status", &status, NULL);
        if (r < 0)
                return outcome(r);
        value = status_value(status, "Uid");
        if (!value || sscanf(value, "%*u %u", &euid) != 1)
                return -EBADMSG;
        r = read_dumpable(target->procfd, euid, &dumpable, ret_ask);
        if (r != 0)
                return r;
        if (!dumpable)
                return found(ret, TARGET_SKIP_NOT_DUMPABLE);
        value = status_value(status, "x86_Thread_features");
        if (value && memmem(value, strcspn(value, "\n"), "shstk", 5))
                return found(ret, TARGET_SKIP_SHADOW_STACK);
        value = status_value(status, "TracerPid");
        if (value && *value != '0')
                return found(ret, TARGET_SKIP_TRACED);
        if (minimum_age_nsec && age_nsec(&stat) < minimum_age_nsec)
                return found(ret, TARGET_SKIP_YOUNG);
        if (stat.state == 'T')
                return found(ret, TARGET_SKIP_STOPPED);
        if (stat.state == 'D' && in_freezer(target->procfd))
                return found(ret, TARGET_SKIP_FROZEN);
        return found(ret, TARGET_OK);
}

int target_inspect(Target *target, uint64_t minimum_age_nsec, TargetSkip *ret, bool *ret_ask_dumpable) {
        TargetSkip skip = TARGET_SKIP_DENIED;
        bool ask;
        int r;

        r = inspect(target, minimum_age_nsec, &skip, &ask);
        if (r != 0 && r != TARGET_E_DENIED)
                return r;
        *ret = skip;
        *ret_ask_dumpable = ask;
        return 0;
}

void target_close_memory(Target *target) {
        target->memfd = safe_close(target->memfd);
        target->pagemapfd = safe_close(target->pagemapfd);
}

/* These descriptors hold the address space of this moment: after an execve(2) they read as ended. So never reused. */
int target_open_memory(Target *target) {
        _cleanup_close_ int mem = openat(target->procfd, "mem", O_RDONLY | O_CLOEXEC), pagemap = -EBADF;

        if (mem < 0)
                return outcome(-errno);
        pagemap = openat(target->procfd, "pagemap", O_RDONLY | O_CLOEXEC);
        if (pagemap < 0)
                return outcome(-errno);
        target_close_memory(target);
        target->memfd = TAKE_FD(mem);
        target->pagemapfd = TAKE_FD(pagemap);
        return 0;
}

static int read_vmas(const Target *target, bool include_dontdump, VmaList *ret) {
        _cleanup_(vma_parser_done) VmaParser parser = { .include_dontdump = include_dontdump };
        _cleanup_close_ int fd = openat(target->procfd, "smaps", O_RDONLY | O_CLOEXEC);
        int r;

        if (fd < 0)
                return outcome(-errno);
        r = vma_parser_read(&parser, fd);
        if (r < 0)
                return outcome(r);
        /* An address space that is gone reads as empty, or ends early. */
        if (!parser.list.n || !target_alive(target))
                return TARGET_E_GONE;
        return vma_parser_finish(&parser, ret);
}

int target_read_vmas(Target *target, bool include_dontdump, VmaList *ret) {
        int r = read_vmas(target, include_dontdump, ret);

        /* execve(2) took the address space away that the file was opened on: there is another one. */
        if (r == TARGET_E_GONE && target_alive(target))
                r = read_vmas(target, include_dontdump, ret);
        return r;
}

int target_read_vma_flags(Target *target, bool include_dontdump, VmaList *ret) {
        int r = VMA_E_CHANGED;

        for (unsigned try = 0; target->vma_reader && r == VMA_E_CHANGED && try < FLAGS_TRIES; try++)
                r = vma_reader_read(target->vma_reader, target, include_dontdump, ret);
        return r == 0 ? 0 : target_read_vmas(target, include_dontdump, ret);
}

int target_maps_fingerprint(Target *target, uint64_t *ret) {
        uint64_t hash = 0xcbf29ce484222325; /* FNV-1a, by words */
        char buffer[16384] __attribute__((aligned(8)));
        _cleanup_close_ int fd = openat(target->procfd, "maps", O_RDONLY | O_CLOEXEC);

        if (fd < 0)
                return outcome(-errno);
        for (;;) {
                ssize_t n = read(fd, buffer, sizeof buffer);

                if (n < 0 && errno == EINTR)
                        continue;
                if (n < 0)
                        return outcome(-errno);
                if (n == 0)
                        break;
                memset(buffer + n, 0, (size_t)-n % sizeof(uint64_t));
                for (size_t i = 0; i < (size_t)n; i += sizeof(uint64_t))
                        hash = (hash ^ *(const uint64_t *)(const void *)(buffer + i)) * 0x100000001b3;
        }
        *ret = hash;
        return 0;
}

int target_read_pagemap(const Target *target, uint64_t start, size_t n_pages, uint64_t *ret_entries, size_t *ret_n) {
        ssize_t got = pread(target->pagemapfd, ret_entries, n_pages * sizeof *ret_entries,
                            (off_t)(start / PAGE_BYTES * sizeof *ret_entries));

        if (got < 0)
                return -errno;
        *ret_n = (size_t)got / sizeof *ret_entries;
        return *ret_n > 0 ? 0 : TARGET_E_GONE;
}

bool target_image_replaced(const Target *target) {
        uint64_t entry;

        /* pagemap stays with the address space it was opened on, and reads as empty when nobody uses that any more. */
        return target->pagemapfd >= 0 && pread(target->pagemapfd, &entry, sizeof entry, 0) == 0;
}
