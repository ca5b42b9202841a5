/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * The kernel promises cgroup/ leans on: inotify tells of cgroups made and removed on the real cgroup2 mount, which
 * processes a cgroup holds, which cgroup a process is in, and that it is frozen.
 */

#include "base/io.h"
#include "cgroup/tree.h"
#include "tests/test.h"

#include <poll.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>

static char base[64];
static char *root;
static pid_t tester, child;

static const char *const names[] = { "", "/a", "/a/b c\\", "/later" };
static bool known[ELEMENTSOF(names)];

static char *full(const char *path, const char *file) {
        static char buffer[4096];
        snprintf(buffer, sizeof buffer, "%s/%s%s%s", root, base, path, file);
        return buffer;
}

static void clean(void) {
        if (getpid() != tester)
                return;
        if (child > 0) {
                (void)write_text(AT_FDCWD, full(names[1], "/cgroup.freeze"), "0");
                kill(child, SIGKILL);
                waitpid(child, NULL, 0);
        }
        /* A cgroup is busy for a moment after its last process was reaped. */
        for (int attempt = 0; attempt < 100 && access(full("", ""), F_OK) == 0; attempt++) {
                for (size_t i = ELEMENTSOF(names); i > 0; i--)
                        (void)rmdir(full(names[i - 1], ""));
                usleep(10000);
        }
}

/* Other cgroups of the machine come and go too. */
static void tell(void *userdata, const char *path, bool appeared) {
        size_t n = strlen(base);

        if (strncmp(path, base, n) != 0)
                return;
        for (size_t i = 0; i < ELEMENTSOF(names); i++)
                if (strcmp(path + n, names[i]) == 0) {
                        CHECK(known[i] != appeared, "%s told twice", path);
                        known[i] = appeared;
                        return;
                }
        CHECK(false, "unexpected %s", path);
}

static void dispatch(CgroupTree *tree) {
        CHECK(poll(&(struct pollfd){ cgroup_tree_fd(tree), POLLIN, 0 }, 1, 1000) == 1, "no event within a second");
        CHECK(cgroup_tree_dispatch(tree) == 0);
}

int main(void) {
        _cleanup_(cgroup_tree_freep) CgroupTree *tree = NULL;
        _cleanup_free_ char *path = NULL;
        _cleanup_free_ pid_t *pids = NULL;
        char relative[128], text[128];
        size_t n;
        int r;

        test_need_root();
        r = cgroup_find_root(&root);
        if (r < 0)
                TEST_SKIP("no cgroup v2 hierarchy: %s", strerror(-r));
        snprintf(base, sizeof base, "ksmd-user-test-%d", (int)getpid());
        if (mkdir(full("", ""), 0755) < 0)
                TEST_SKIP("cannot make cgroups here: %s", strerror(errno));
        tester = getpid();
        CHECK(atexit(clean) == 0);

        CHECK(cgroup_tree_new(NULL, tell, NULL, &tree) == 0);
        CHECK(strcmp(cgroup_tree_root(tree), root) == 0);
        CHECK(known[0]);
        CHECK(!known[1]);

        CHECK(mkdir(full(names[1], ""), 0755) == 0);
        CHECK(mkdir(full(names[2], ""), 0755) == 0);
        dispatch(tree);
        CHECK(known[1] && known[2], "found by event and by reading");

        child = fork();
        if (child == 0)
                for (;;)
                        pause();
        snprintf(text, sizeof text, "%d", (int)child);
        CHECK(write_text(AT_FDCWD, full(names[2], "/cgroup.procs"), text) == 0);
        snprintf(relative, sizeof relative, "%s%s", base, names[2]);
        CHECK(cgroup_processes(tree, relative, &pids, &n) == 0);
        CHECK(n == 1 && pids[0] == child);
        CHECK(cgroup_of_process(child, &path) == 0);
        CHECK(strcmp(path, relative) == 0, "%s", path);

        CHECK(!cgroup_frozen(tree, relative));
        CHECK(write_text(AT_FDCWD, full(names[1], "/cgroup.freeze"), "1") == 0);
        for (int i = 0; i < 500 && !cgroup_frozen(tree, relative); i++)
                usleep(10000);
        CHECK(cgroup_frozen(tree, relative), "frozen by its parent");
        CHECK(write_text(AT_FDCWD, full(names[1], "/cgroup.freeze"), "0") == 0);
        for (int i = 0; i < 500 && cgroup_frozen(tree, relative); i++)
                usleep(10000);
        CHECK(!cgroup_frozen(tree, relative));

        kill(child, SIGKILL);
        CHECK(waitpid(child, NULL, 0) == child);
        child = 0;
        for (int i = 0; i < 500 && rmdir(full(names[2], "")) < 0; i++)
                usleep(10000);
        CHECK(rmdir(full(names[1], "")) == 0);
        dispatch(tree);
        CHECK(!known[1] && !known[2]);
        r = cgroup_processes(tree, relative, &pids, &n);
        CHECK(r == -ENOENT || r == -ENODEV);

        /* A threaded cgroup has no processes of its own to list. */
        CHECK(mkdir(full(names[3], ""), 0755) == 0);
        CHECK(write_text(AT_FDCWD, full(names[3], "/cgroup.type"), "threaded") == 0);
        dispatch(tree);
        CHECK(known[3]);
        free(TAKE_PTR(pids));
        snprintf(text, sizeof text, "%s%s", base, names[3]);
        CHECK(cgroup_processes(tree, text, &pids, &n) == 0);
        CHECK(n == 0);
        return 0;
}
