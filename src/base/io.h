/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "base/util.h"

#include <dirent.h>

/*
 * Whole small files of /proc, sysfs and cgroupfs. at is a directory descriptor or AT_FDCWD; path is relative to it.
 */

/* Reads all of a file, NUL-terminated; the caller frees *ret. ret_size (may be NULL) is without the NUL.
 * -EFBIG past 256 MiB; otherwise what openat(2) or read(2) said. */
int read_file(int at, const char *path, char **ret, size_t *ret_size);

/* Reads all of an already open file from its start by pread(2), like read_file(). */
int read_fd(int fd, char **ret, size_t *ret_size);

/* Opens a directory for readdir(3), close-on-exec. -errno. */
int open_directory(int at, const char *path, DIR **ret);
static inline void closedirp(DIR **dir) { if (*dir) closedir(*dir); }
#define _cleanup_closedir_ _cleanup_(closedirp)
/* The process whose directory in /proc the entry is, or the thread whose it is in a task directory; 0: it is none. */
static inline pid_t dirent_pid(const struct dirent *entry) {
        return entry->d_name[0] >= '1' && entry->d_name[0] <= '9' ? (pid_t)atoi(entry->d_name) : 0;
}

/* Reads one unsigned decimal number that is all the file holds. -EINVAL when it is something else. */
int read_u64(int at, const char *path, uint64_t *ret);

/* Writes text with one write(2), no truncation or creation: for control files. */
int write_text(int at, const char *path, const char *text);

/* Sends size bytes as one packet, with a descriptor unless fd is -EBADF, without SIGPIPE; flags: send(2)'s. -errno. */
int send_with_fd(int socket, const void *data, size_t size, int fd, int flags);

/* Writes a file so that a reader (or a crash) sees the old or the new content, never a part: temporary + rename. */
int write_file_atomic(int at, const char *path, const char *text);
int write_bytes_atomic(int at, const char *path, const void *bytes, size_t size);
