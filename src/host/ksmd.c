/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * The kernel thread ksmd as /proc shows it.
 */

#include "host/ksmd.h"

#include "base/io.h"

#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

/* The flags field of /proc/PID/stat is the kernel's own word: no process can call itself a kernel thread. */
#define PF_KTHREAD 0x00200000U

/* Whether a /proc/PID/stat line is ksmd's; its CPU time in ticks. */
static bool stat_is_ksmd(const char *stat, uint64_t *ret_ticks) {
        const char *open = strchr(stat, '('), *close = strrchr(stat, ')');
        uint64_t user, system;
        unsigned flags;

        if (!open || !close || close - open != 5 || strncmp(open + 1, "ksmd", 4) != 0)
                return false;
        if (sscanf(close + 1, " %*c %*d %*d %*d %*d %*d %u %*u %*u %*u %*u %" SCNu64 " %" SCNu64, &flags, &user,
                   &system) != 3 ||
            !(flags & PF_KTHREAD))
                return false;
        *ret_ticks = user + system;
        return true;
}

static int ksmd_stat(pid_t pid, uint64_t *ret_ticks) {
        _cleanup_free_ char *text = NULL;
        char path[32];
        int r;

        snprintf(path, sizeof path, "/proc/%d/stat", (int)pid);
        r = read_file(AT_FDCWD, path, &text, NULL);
        if (r < 0)
                return r;
        return stat_is_ksmd(text, ret_ticks) ? 0 : -ENOENT;
}

static int ksmd_find(pid_t *ret, uint64_t *ret_ticks) {
        _cleanup_closedir_ DIR *proc = NULL;
        int r = open_directory(AT_FDCWD, "/proc", &proc);

        if (r < 0)
                return r;
        r = -ENOENT;
        for (const struct dirent *entry; r < 0 && (entry = readdir(proc));) {
                pid_t pid = dirent_pid(entry);

                if (pid > 0 && ksmd_stat(pid, ret_ticks) == 0) {
                        *ret = pid;
                        r = 0;
                }
        }
        return r;
}

void ksmd_done(Ksmd *ksmd) { ksmd->schedstat = safe_close(ksmd->schedstat); }

/* In nanoseconds; needs CONFIG_SCHED_INFO. */
static int schedstat_cpu(int fd, uint64_t *ret) {
        char text[64];
        ssize_t n = pread(fd, text, sizeof text - 1, 0);

        if (n < 0)
                return -errno;
        text[n] = 0;
        return sscanf(text, "%" SCNu64, ret) == 1 && *ret > 0 ? 0 : -ENODATA;
}

int ksmd_cpu(Ksmd *ksmd, uint64_t *ret) {
        uint64_t ticks, nsec;
        char path[40];

        if (ksmd->schedstat >= 0 && schedstat_cpu(ksmd->schedstat, &nsec) == 0) {
                *ret = nsec;
                return 0;
        }
        if (ksmd->pid <= 0 || ksmd_stat(ksmd->pid, &ticks) < 0) {
                int r = ksmd_find(&ksmd->pid, &ticks);
                if (r < 0) {
                        ksmd->pid = 0;
                        return r;
                }
        }
        safe_close(ksmd->schedstat);
        snprintf(path, sizeof path, "/proc/%d/schedstat", (int)ksmd->pid);
        ksmd->schedstat = open(path, O_RDONLY | O_CLOEXEC);
        if (ksmd->schedstat >= 0 && schedstat_cpu(ksmd->schedstat, &nsec) == 0)
                *ret = nsec;
        else
                *ret = ticks * (NSEC_PER_SEC / (uint64_t)sysconf(_SC_CLK_TCK)); /* of 10 ms */
        return 0;
}
