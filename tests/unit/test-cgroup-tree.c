/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * cgroup/tree and cgroup/procs on plain directories: what the handler is told must add up to what is there, however the
 * directories change while they are read.
 */

#include "base/io.h"
#include "cgroup/tree.h"
#include "tests/test.h"

#include <setjmp.h>
#include <stdarg.h>

#include <cmocka.h>
#include <dirent.h>
#include <ftw.h>
#include <poll.h>
#include <sys/inotify.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>

static char root[] = "/tmp/test-cgroup-tree.XXXXXX";

/* What the handler has been told, as a plain list. */
typedef struct Told {
        char **paths;
        size_t n, allocated;
        size_t calls;
        const char *mkdir_at;   /* when this appears, a child is made in it */
} Told;

/* Turned on by single tests, to bring about what otherwise happens once in a year. */
static struct {
        const char *around_watch;       /* a child of this is made just before it is watched, another just after */
        bool never_read;                /* the control: directories are watched, but look empty */
        bool no_descriptors;            /* directories cannot be opened */
        bool hide_overflow;             /* the control: nobody hears of an overflow */
} act;

static char *full(const char *path) {
        static char buffer[8192];
        snprintf(buffer, sizeof buffer, "%s/%s", root, path);
        return buffer;
}

static void make(const char *path) { assert_int_equal(mkdir(full(path), 0755), 0); }
static void unmake(const char *path) { assert_int_equal(rmdir(full(path)), 0); }

int inotify_add_watch(int fd, const char *path, uint32_t mask) {
        bool now = act.around_watch && strcmp(path, full(act.around_watch)) == 0;
        char child[128];
        int wd;

        if (now) {
                snprintf(child, sizeof child, "%s/before", act.around_watch);
                (void)mkdir(full(child), 0755);
        }
        wd = (int)syscall(SYS_inotify_add_watch, fd, path, mask);
        if (now) {
                snprintf(child, sizeof child, "%s/after", act.around_watch);
                (void)mkdir(full(child), 0755);
        }
        return wd;
}

DIR *opendir(const char *path) {
        int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);

        if (act.never_read || act.no_descriptors) {
                close(fd);
                errno = act.never_read ? ENOENT : EMFILE;
                return NULL;
        }
        return fd < 0 ? NULL : fdopendir(fd);
}

ssize_t read(int fd, void *buffer, size_t n) {
        ssize_t got = syscall(SYS_read, fd, buffer, n);

        if (act.hide_overflow && got > 0 && n == 4096)
                for (char *p = buffer; p < (char *)buffer + got;) {
                        struct inotify_event *event = (struct inotify_event *)(void *)p;
                        event->mask &= ~(uint32_t)IN_Q_OVERFLOW;
                        p += sizeof *event + event->len;
                }
        return got;
}

static int catch_up(CgroupTree *tree) {
        int r;

        do
                r = cgroup_tree_dispatch(tree);
        while (r == 0 && poll(&(struct pollfd){ cgroup_tree_fd(tree), POLLIN, 0 }, 1, 0) == 1);
        return r;
}

static size_t told_find(const Told *told, const char *path) {
        size_t i;

        for (i = 0; i < told->n; i++)
                if (strcmp(told->paths[i], path) == 0)
                        break;
        return i;
}

static bool knows(const Told *told, const char *path) { return told_find(told, path) < told->n; }

static void parent_of(const char *path, char *ret) {
        char *slash;

        strcpy(ret, path);
        slash = strrchr(ret, '/');
        *(slash ?: ret) = 0;
}

static void tell(void *userdata, const char *path, bool appeared) {
        Told *told = userdata;
        char parent[4096];

        told->calls++;
        if (appeared) {
                assert_false(knows(told, path));
                parent_of(path, parent);
                assert_true(*path == 0 || knows(told, parent));
                assert_int_equal(GROW(told->paths, told->n, told->allocated), 0);
                told->paths[told->n++] = strdup(path);
                if (told->mkdir_at && strcmp(told->mkdir_at, path) == 0) {
                        char child[4096];
                        snprintf(child, sizeof child, "%s/made-in-handler", path);
                        make(child);
                }
        } else {
                size_t i = told_find(told, path);
                assert_true(i < told->n);
                for (size_t k = 0; k < told->n; k++) { /* no child outlives it */
                        parent_of(told->paths[k], parent);
                        assert_true(*told->paths[k] == 0 || strcmp(parent, path) != 0);
                }
                free(told->paths[i]);
                told->paths[i] = told->paths[--told->n];
        }
}

static void told_done(Told *told) {
        for (size_t i = 0; i < told->n; i++)
                free(told->paths[i]);
        free(told->paths);
}

static Told *compared;
static size_t n_found;

static int compare_one(const char *path, const struct stat *st, int type, struct FTW *ftw) {
        const char *relative = path + strlen(root);

        if (type != FTW_D && type != FTW_DP)
                return 0;
        if (*relative == '/')
                relative++;
        n_found++;
        return !knows(compared, relative);
}

/* Whether what was told is exactly what is there. */
static bool adds_up(Told *told) {
        compared = told;
        n_found = 0;
        return nftw(root, compare_one, 16, FTW_PHYS) == 0 && n_found == told->n;
}

static int remove_one(const char *path, const struct stat *st, int type, struct FTW *ftw) {
        return ftw->level == 0 ? 0 : remove(path);
}

static int clean(void **unused) {
        memset(&act, 0, sizeof act);
        nftw(root, remove_one, 16, FTW_DEPTH | FTW_PHYS);
        return 0;
}

static void test_finds_and_follows(void **unused) {
        _cleanup_(cgroup_tree_freep) CgroupTree *tree = NULL;
        _cleanup_(told_done) Told told = {}, again = {};

        make("a");
        make("a/b");
        make("c d\te\\x\xff");
        assert_int_equal(symlink("a", full("link")), 0);
        assert_int_equal(cgroup_tree_new(root, tell, &told, &tree), 0);
        assert_int_equal(told.n, 4);
        assert_true(adds_up(&told));
        assert_string_equal(cgroup_tree_root(tree), root);
        assert_int_equal(catch_up(tree), 0);
        assert_int_equal(told.calls, 4);

        make("a/b/c");
        assert_false(adds_up(&told)); /* the control: it does not know before it is asked to look */
        assert_int_equal(poll(&(struct pollfd){ cgroup_tree_fd(tree), POLLIN, 0 }, 1, 1000), 1);
        assert_int_equal(catch_up(tree), 0);
        assert_true(adds_up(&told));
        assert_int_equal(poll(&(struct pollfd){ cgroup_tree_fd(tree), POLLIN, 0 }, 1, 0), 0);

        /* Only the first of these makes an event: the rest is found by reading. */
        make("x");
        make("x/y");
        make("x/y/z");
        assert_int_equal(catch_up(tree), 0);
        assert_true(adds_up(&told));
        make("x/y/z/later");
        assert_int_equal(catch_up(tree), 0);
        assert_true(adds_up(&told));

        unmake("x/y/z/later");
        unmake("x/y/z");
        unmake("x/y");
        unmake("a/b/c");
        assert_int_equal(catch_up(tree), 0);
        assert_true(adds_up(&told));

        cgroup_tree_foreach(tree, tell, &again);
        assert_int_equal(again.n, told.n);
        assert_true(adds_up(&again));
}

static void test_made_while_it_is_read(void **unused) {
        _cleanup_(cgroup_tree_freep) CgroupTree *tree = NULL;
        _cleanup_(told_done) Told told = { .mkdir_at = "n" };

        assert_int_equal(cgroup_tree_new(root, tell, &told, &tree), 0);
        make("n");
        act.around_watch = "n";
        assert_int_equal(catch_up(tree), 0);
        assert_int_equal(catch_up(tree), 0);
        assert_true(knows(&told, "n/made-in-handler"));
        assert_true(knows(&told, "n/before"));
        assert_true(knows(&told, "n/after"));
        assert_true(adds_up(&told));

        make("m");
        act.around_watch = "m";
        act.never_read = true;
        assert_int_equal(catch_up(tree), 0);
        assert_false(knows(&told, "m/before"));
        assert_true(knows(&told, "m/after"));
}

static void test_removed_and_made_again(void **unused) {
        _cleanup_(cgroup_tree_freep) CgroupTree *tree = NULL;
        _cleanup_(told_done) Told told = {};

        make("a");
        make("a/b");
        assert_int_equal(cgroup_tree_new(root, tell, &told, &tree), 0);
        for (int i = 0; i < 5; i++) {
                unmake("a/b");
                unmake("a");
                make("a");
                make("a/b");
        }
        assert_int_equal(catch_up(tree), 0);
        assert_true(adds_up(&told));
        make("a/b/c"); /* the new directory is watched, not the old one */
        assert_int_equal(catch_up(tree), 0);
        assert_true(adds_up(&told));
}

/* What could not be read is not taken for gone, and is found later. */
static void test_out_of_descriptors(void **unused) {
        _cleanup_(cgroup_tree_freep) CgroupTree *tree = NULL;
        _cleanup_(told_done) Told told = {};

        make("a");
        make("a/b");
        assert_int_equal(cgroup_tree_new(root, tell, &told, &tree), 0);
        make("x");
        make("x/y");
        act.no_descriptors = true;
        assert_int_equal(catch_up(tree), -EMFILE);
        assert_true(knows(&told, "a/b"));
        act.no_descriptors = false;
        assert_int_equal(catch_up(tree), 0);
        assert_true(adds_up(&told));
}

static bool overflow_is_healed(uint64_t queue) {
        _cleanup_(cgroup_tree_freep) CgroupTree *tree = NULL;
        _cleanup_(told_done) Told told = {};

        make("gone");
        make("gone/too");
        make("stays");
        assert_int_equal(cgroup_tree_new(root, tell, &told, &tree), 0);
        for (uint64_t i = 0; i < queue / 2 + 10; i++) {
                make("churn");
                unmake("churn");
        }
        make("unseen");
        make("unseen/child");
        unmake("gone/too");
        unmake("gone");
        unmake("stays");
        make("stays");
        assert_int_equal(catch_up(tree), 0);
        if (!adds_up(&told))
                return false;
        make("stays/child");
        assert_int_equal(catch_up(tree), 0);
        return adds_up(&told);
}

static void test_overflow(void **unused) {
        uint64_t queue;

        if (read_u64(AT_FDCWD, "/proc/sys/fs/inotify/max_queued_events", &queue) < 0 || queue > 200000)
                skip();
        assert_true(overflow_is_healed(queue));
        clean(NULL);
        act.hide_overflow = true;
        assert_false(overflow_is_healed(queue));
}

static void test_deep_and_many(void **unused) {
        _cleanup_(cgroup_tree_freep) CgroupTree *tree = NULL;
        _cleanup_(told_done) Told told = {};
        char path[4096] = "";

        for (int i = 0; i < 300; i++) {
                strcat(path, i ? "/deep" : "deep");
                make(path);
        }
        for (int i = 0; i < 2000; i++) {
                snprintf(path, sizeof path, "many-%d", i);
                make(path);
        }
        assert_int_equal(cgroup_tree_new(root, tell, &told, &tree), 0);
        assert_int_equal(told.n, 2301);
        assert_true(adds_up(&told));
        for (int i = 0; i < 2000; i += 2) {
                snprintf(path, sizeof path, "many-%d", i);
                unmake(path);
        }
        assert_int_equal(catch_up(tree), 0);
        assert_int_equal(told.n, 1301);
        assert_true(adds_up(&told));
}

/* Another process makes and removes directories at random while we look on. */
static void test_churn(void **unused) {
        _cleanup_(cgroup_tree_freep) CgroupTree *tree = NULL;
        _cleanup_(told_done) Told told = {};
        pid_t child;
        int status;

        assert_int_equal(cgroup_tree_new(root, tell, &told, &tree), 0);
        child = fork();
        if (child == 0) {
                srandom(1);
                for (int i = 0; i < 30000; i++) {
                        char path[64];
                        long r = random();
                        int depth = (int)(r % 4), n = 0;

                        for (int d = 0; d <= depth; d++, r /= 3)
                                n += snprintf(path + n, sizeof path - (size_t)n, "%s%c", d ? "/" : "",
                                              (char)('a' + r / 16 % 3));
                        if (random() % 5 < 3)
                                (void)mkdir(full(path), 0755);
                        else
                                (void)rmdir(full(path));
                }
                _exit(0);
        }
        while (waitpid(child, &status, WNOHANG) == 0)
                assert_int_equal(catch_up(tree), 0);
        assert_int_equal(status, 0);
        assert_int_equal(catch_up(tree), 0);
        assert_true(told.calls > 100);
        assert_true(adds_up(&told));
}

static void make_another(void *userdata, const char *path, bool appeared) {
        unsigned *n = userdata;
        char next[32];

        snprintf(next, sizeof next, "%u", ++*n);
        if (appeared && *path)
                make(next);
}

/* Where they come faster than they can be followed, the caller has his turn all the same. */
static void test_storm(void **unused) {
        _cleanup_(cgroup_tree_freep) CgroupTree *tree = NULL;
        unsigned n = 0;

        assert_int_equal(cgroup_tree_new(root, make_another, &n, &tree), 0);
        make("begin");
        for (int i = 0; i < 3; i++)
                assert_int_equal(cgroup_tree_dispatch(tree), 0);
        assert_true(n > 3);
        assert_int_equal(poll(&(struct pollfd){ cgroup_tree_fd(tree), POLLIN, 0 }, 1, 0), 1);
}

static void put(const char *path, const char *text) {
        FILE *f = fopen(full(path), "we");
        assert_non_null(f);
        fputs(text, f);
        fclose(f);
}

static void test_processes(void **unused) {
        _cleanup_(cgroup_tree_freep) CgroupTree *tree = NULL;
        _cleanup_(told_done) Told told = {};
        static const char *const bad[] = { "12", "x\n", "12 13\n", "-5\n", "99999999999\n", "12\n\n", " 12x\n" };
        pid_t *pids = NULL;
        size_t n;

        make("a");
        assert_int_equal(cgroup_tree_new(root, tell, &told, &tree), 0);
        assert_int_equal(cgroup_processes(tree, "a", &pids, &n), -ENOENT);
        assert_int_equal(cgroup_processes(tree, "nowhere", &pids, &n), -ENOENT);
        put("a/cgroup.procs", "");
        assert_int_equal(cgroup_processes(tree, "a", &pids, &n), 0);
        assert_int_equal(n, 0);
        free(pids);
        put("a/cgroup.procs", "30\n0\n7\n30\n0\n9\n");
        assert_int_equal(cgroup_processes(tree, "a", &pids, &n), 0);
        assert_int_equal(n, 3);
        assert_int_equal(pids[0], 7);
        assert_int_equal(pids[1], 9);
        assert_int_equal(pids[2], 30);
        free(pids);
        for (size_t i = 0; i < ELEMENTSOF(bad); i++) {
                put("a/cgroup.procs", bad[i]);
                assert_int_equal(cgroup_processes(tree, "a", &pids, &n), -EBADMSG);
        }
        assert_false(cgroup_frozen(tree, "a"));
        put("a/cgroup.events", "populated 1\nfrozen 0\n");
        assert_false(cgroup_frozen(tree, "a"));
        put("a/cgroup.events", "populated 1\nfrozen 1\n");
        assert_true(cgroup_frozen(tree, "a"));
        put("a/cgroup.events", "frozen 12\nnotfrozen 1\n");
        assert_false(cgroup_frozen(tree, "a"));
}

static void test_mount_lines(void **unused) {
        static const struct {
                const char *line, *point;
                int r;
        } lines[] = {
                { "38 31 0:29 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw", "/sys/fs/cgroup/unified", 0 },
                { "30 23 0:26 / /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw,nsdelegate", "/sys/fs/cgroup", 0 },
                { "30 23 0:26 / /a\\040b\\134c\\012 rw - cgroup2 x rw", "/a b\\c\n", 0 },
                { "32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu", NULL, -ENOENT },
                { "32 31 0:29 / /x rw - cgroup2fs cgroup2 rw", NULL, -ENOENT },
                { "32 31 0:29 /", NULL, -EINVAL },
                { "32 31 0:29 / x rw - cgroup2 cgroup2 rw", NULL, -EINVAL },
                { "32 31 0:29 / /x rw", NULL, -EINVAL },
                { "", NULL, -EINVAL },
        };

        for (size_t i = 0; i < ELEMENTSOF(lines); i++) {
                _cleanup_free_ char *point = NULL;
                assert_int_equal(cgroup_mount_of_line(lines[i].line, &point), lines[i].r);
                if (lines[i].r == 0)
                        assert_string_equal(point, lines[i].point);
                else
                        assert_null(point);
        }
}

static void test_own_cgroup(void **unused) {
        _cleanup_free_ char *path = NULL;
        int r = cgroup_of_process(getpid(), &path);

        assert_true(r == 0 || r == -ENOENT || r == -EXDEV);
        assert_true(r < 0 || path[0] != '/');
        assert_int_equal(cgroup_of_process(INT32_MAX, &path), -ENOENT);
}

static void test_no_root(void **unused) {
        CgroupTree *tree = NULL;
        _cleanup_(told_done) Told told = {};

        assert_int_equal(cgroup_tree_new(full("nowhere"), tell, &told, &tree), -ENOENT);
        put("file", "");
        assert_int_equal(cgroup_tree_new(full("file"), tell, &told, &tree), -ENOENT);
        assert_null(tree);
        assert_int_equal(told.calls, 0);
}

int main(void) {
        const struct CMUnitTest tests[] = {
                cmocka_unit_test_teardown(test_finds_and_follows, clean),
                cmocka_unit_test_teardown(test_made_while_it_is_read, clean),
                cmocka_unit_test_teardown(test_removed_and_made_again, clean),
                cmocka_unit_test_teardown(test_out_of_descriptors, clean),
                cmocka_unit_test_teardown(test_overflow, clean),
                cmocka_unit_test_teardown(test_deep_and_many, clean),
                cmocka_unit_test_teardown(test_churn, clean),
                cmocka_unit_test_teardown(test_storm, clean),
                cmocka_unit_test_teardown(test_processes, clean),
                cmocka_unit_test_teardown(test_mount_lines, clean),
                cmocka_unit_test_teardown(test_own_cgroup, clean),
                cmocka_unit_test_teardown(test_no_root, clean),
        };
        int failed;

        if (!mkdtemp(root))
                return 1;
        failed = cmocka_run_group_tests(tests, NULL, NULL);
        rmdir(root);
        return failed;
}
