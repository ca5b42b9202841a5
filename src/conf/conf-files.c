/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "conf/conf-internal.h"

#include "base/io.h"
#include "host/thp.h"

#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>

/*
 * Which files make up the configuration: the main file, then the drop-ins in the order of their names, whichever of the
 * directories they are in; of those with one name only the one in the first directory of the list counts (so an empty
 * file, or a link to /dev/null, in /etc switches a vendor's drop-in off).
 */

#define MAIN_PATH KSMD_USER_SYSCONFDIR "/ksmd-user.conf"
#define FILE_BYTES_MAX ((off_t)1 << 20)

typedef struct DropIn {
        char *name;                     /* within its directory: what is sorted and hidden by */
        char *path;
} DropIn;

typedef struct DropIns {
        DropIn *items;
        size_t n, allocated;
} DropIns;

static void drop_ins_done(DropIns *drop_ins) {
        for (size_t i = 0; i < drop_ins->n; i++) {
                free(drop_ins->items[i].name);
                free(drop_ins->items[i].path);
        }
        free(drop_ins->items);
}

static int compare_names(const void *a, const void *b) {
        return strcmp(((const DropIn *)a)->name, ((const DropIn *)b)->name);
}

static bool is_drop_in(const char *name) {
        size_t size = strlen(name);

        return *name != '.' && size > 5 && strcmp(name + size - 5, ".conf") == 0;
}

static bool known(const DropIns *drop_ins, const char *name) {
        for (size_t i = 0; i < drop_ins->n; i++)
                if (strcmp(drop_ins->items[i].name, name) == 0)
                        return true;
        return false;
}

/* Adds the names of one directory that no directory before it had. A directory that does not exist is an empty one. */
static int list_directory(const char *path, DropIns *drop_ins) {
        _cleanup_closedir_ DIR *directory = NULL;
        const struct dirent *entry;
        int r = open_directory(AT_FDCWD, path, &directory);

        if (r < 0)
                return r == -ENOENT ? 0 : r;
        while (errno = 0, (entry = readdir(directory))) {
                DropIn item = {};

                if (!is_drop_in(entry->d_name) || known(drop_ins, entry->d_name))
                        continue;
                if (GROW(drop_ins->items, drop_ins->n, drop_ins->allocated) < 0)
                        return -ENOMEM;
                item.name = strdup(entry->d_name);
                if (!item.name)
                        return -ENOMEM;
                if (asprintf(&item.path, "%s/%s", path, entry->d_name) < 0) {
                        free(item.name);
                        return -ENOMEM;
                }
                drop_ins->items[drop_ins->n++] = item;
        }
        return -errno;
}

/* A FIFO or a terminal in the place of a file must not hold the daemon up: opened without waiting, read only if it is
 * a file, or /dev/null, which says "nothing". */
static int read_configuration(const char *path, char **ret, size_t *ret_size) {
        _cleanup_close_ int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
        struct stat st;

        if (fd < 0 || fstat(fd, &st) < 0)
                return -errno;
        if (S_ISDIR(st.st_mode))
                return -EISDIR;
        if (!S_ISREG(st.st_mode) && !(S_ISCHR(st.st_mode) && st.st_rdev == makedev(1, 3)))
                return -EBADF;
        if (st.st_size > FILE_BYTES_MAX)
                return -EFBIG;
        return read_fd(fd, ret, ret_size);
}

static int add_file(ConfBuilder *builder, const char *path, bool may_be_missing) {
        _cleanup_free_ char *text = NULL;
        size_t size;
        int r = read_configuration(path, &text, &size);

        if (r == -ENOENT && may_be_missing)
                return 0;
        if (r < 0) {
                conf_builder_report(builder, path, r == -EBADF ? "not a file" : strerror(-r));
                return r;
        }
        return conf_builder_add(builder, path, text, size);
}

static int add_directories(ConfBuilder *builder, const char *const *directories, size_t n, const char *prefix) {
        _cleanup_(drop_ins_done) DropIns drop_ins = {};
        int r;

        for (size_t i = 0; i < n; i++) {
                _cleanup_free_ char *path = NULL;

                if (asprintf(&path, "%s%s", prefix, directories[i]) < 0)
                        return -ENOMEM;
                r = list_directory(path, &drop_ins);
                if (r < 0) {
                        conf_builder_report(builder, path, strerror(-r));
                        return r;
                }
        }
        if (drop_ins.n)
                qsort(drop_ins.items, drop_ins.n, sizeof *drop_ins.items, compare_names);
        for (size_t i = 0; i < drop_ins.n; i++) {
                r = add_file(builder, drop_ins.items[i].path, false);
                if (r < 0)
                        return r;
        }
        return 0;
}

int conf_load(const char *root, const char *main_path, ConfReport report, void *userdata, Conf **ret) {
        static const char *const standard[] = {
                KSMD_USER_SYSCONFDIR "/ksmd-user.conf.d", "/run/ksmd-user.conf.d", "/usr/lib/ksmd-user.conf.d",
        };
        static const char *const own[] = { ".d" };
        _cleanup_(conf_builder_freep) ConfBuilder *builder = NULL;
        _cleanup_free_ char *path = NULL;
        int r = conf_builder_new(report, userdata, &builder);

        if (r < 0)
                return r;
        if (asprintf(&path, "%s%s", main_path ? "" : root, main_path ? main_path : MAIN_PATH) < 0)
                return -ENOMEM;
        r = add_file(builder, path, !main_path);
        if (r < 0)
                return r;
        if (main_path)
                r = add_directories(builder, own, ELEMENTSOF(own), main_path);
        else
                r = add_directories(builder, standard, ELEMENTSOF(standard), root);
        if (r < 0)
                return r;
        free(TAKE_PTR(path));
        if (asprintf(&path, "%s/sys/kernel/mm", root) < 0)
                return -ENOMEM;
        return conf_builder_finish(builder, host_shmem_huge_denied(path), ret);
}
