/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * What the files of the v2 hierarchy and of /proc say about one cgroup or one process (cgroup-v2.rst; proc(5)).
 */

#include "cgroup/tree.h"

#include "base/io.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/vfs.h>

/* mountinfo writes space, tab, newline and backslash as \ooo. */
static void unescape_octal(char *text) {
        char *to = text;

        for (const char *from = text; *from;) {
                if (from[0] == '\\' && from[1] >= '0' && from[1] <= '3' && from[2] >= '0' && from[2] <= '7' &&
                    from[3] >= '0' && from[3] <= '7') {
                        *to++ = (char)((from[1] - '0') << 6 | (from[2] - '0') << 3 | (from[3] - '0'));
                        from += 4;
                } else
                        *to++ = *from++;
        }
        *to = 0;
}

/* "36 35 98:0 /root /mount/point rw,noatime master:1 - cgroup2 source rw" */
int cgroup_mount_of_line(const char *line, char **ret) {
        const char *point, *type = strstr(line, " - ");
        char *copy;

        point = line;
        for (int i = 0; i < 4; i++) {
                point = strchr(point, ' ');
                if (!point)
                        return -EINVAL;
                point++;
        }
        if (!type || point >= type || *point != '/')
                return -EINVAL;
        if (strncmp(type, " - cgroup2 ", 11) != 0)
                return -ENOENT;
        copy = strndup(point, strcspn(point, " "));
        if (!copy)
                return -ENOMEM;
        unescape_octal(copy);
        *ret = copy;
        return 0;
}

int cgroup_find_root(char **ret) {
        _cleanup_free_ char *text = NULL;
        char *rest = NULL;
        int r;

        r = read_file(AT_FDCWD, "/proc/self/mountinfo", &text, NULL);
        if (r < 0)
                return r;
        for (char *line = strtok_r(text, "\n", &rest); line; line = strtok_r(NULL, "\n", &rest)) {
                _cleanup_free_ char *point = NULL;
                struct statfs fs;

                r = cgroup_mount_of_line(line, &point);
                if (r == -ENOMEM)
                        return r;
                /* Something else may be mounted over it since. */
                if (r < 0 || statfs(point, &fs) < 0 || fs.f_type != CGROUP2_SUPER_MAGIC)
                        continue;
                *ret = TAKE_PTR(point);
                return 0;
        }
        return -ENOENT;
}

static int read_cgroup_file(const CgroupTree *tree, const char *cgroup, const char *name, char **ret) {
        _cleanup_free_ char *path = NULL;

        if (asprintf(&path, "%s/%s/%s", cgroup_tree_root(tree), cgroup, name) < 0)
                return -ENOMEM;
        return read_file(AT_FDCWD, path, ret, NULL);
}

static int compare_pids(const void *a, const void *b) {
        pid_t x = *(const pid_t *)a, y = *(const pid_t *)b;
        return (x > y) - (x < y);
}

int cgroup_processes(const CgroupTree *tree, const char *path, pid_t **ret, size_t *ret_n) {
        _cleanup_free_ char *text = NULL;
        _cleanup_free_ pid_t *pids = NULL;
        size_t n = 0, allocated = 0, distinct = 0;
        int r;

        r = read_cgroup_file(tree, path, "cgroup.procs", &text);
        if (r == -EOPNOTSUPP) { /* threaded */
                *ret = NULL;
                *ret_n = 0;
                return 0;
        }
        if (r < 0)
                return r;
        for (char *p = text, *end; *p; p = end + 1) {
                long pid;

                errno = 0;
                pid = strtol(p, &end, 10);
                if (errno || end == p || *end != '\n' || pid < 0 || pid > INT32_MAX)
                        return -EBADMSG;
                if (pid == 0)
                        continue;
                r = GROW(pids, n, allocated);
                if (r < 0)
                        return r;
                pids[n++] = (pid_t)pid;
        }
        /* The kernel promises neither order nor that each comes once. */
        if (n > 0)
                qsort(pids, n, sizeof *pids, compare_pids);
        for (size_t i = 0; i < n; i++)
                if (i == 0 || pids[i] != pids[i - 1])
                        pids[distinct++] = pids[i];
        *ret = TAKE_PTR(pids);
        *ret_n = distinct;
        return 0;
}

int cgroup_id(const CgroupTree *tree, const char *path, uint64_t *ret) {
        _cleanup_free_ char *full = NULL;
        struct stat st;

        if (asprintf(&full, "%s/%s", cgroup_tree_root(tree), path) < 0)
                return -ENOMEM;
        if (stat(full, &st) < 0)
                return -errno;
        *ret = st.st_ino;
        return 0;
}

bool cgroup_frozen(const CgroupTree *tree, const char *path) {
        _cleanup_free_ char *text = NULL;
        char *rest = NULL;

        if (read_cgroup_file(tree, path, "cgroup.events", &text) < 0)
                return false; /* the root cgroup has none and cannot be frozen */
        for (char *line = strtok_r(text, "\n", &rest); line; line = strtok_r(NULL, "\n", &rest))
                if (strcmp(line, "frozen 1") == 0)
                        return true;
        return false;
}

int cgroup_of_process(pid_t pid, char **ret) {
        _cleanup_free_ char *text = NULL;
        char path[32], *rest = NULL, *copy;
        int r;

        snprintf(path, sizeof path, "/proc/%d/cgroup", (int)pid);
        r = read_file(AT_FDCWD, path, &text, NULL);
        if (r < 0)
                return r;
        for (char *line = strtok_r(text, "\n", &rest); line; line = strtok_r(NULL, "\n", &rest)) {
                if (strncmp(line, "0::/", 4) != 0)
                        continue;
                line += 4;
                if (strcmp(line, "..") == 0 || strncmp(line, "../", 3) == 0)
                        return -EXDEV;
                copy = strdup(line);
                if (!copy)
                        return -ENOMEM;
                *ret = copy;
                return 0;
        }
        return -ENOENT; /* no v2 hierarchy */
}
