/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "conf/conf.h"

#include "test.h"

#include <setjmp.h>
#include <stdarg.h>
#include <sys/stat.h>

#include <cmocka.h>

/* A temporary root with the directories of the real one; each test has its own. */
typedef struct Root {
        char path[64];
        char reports[512];              /* "path:line;" of each, the root left out */
} Root;

static void run_in(const Root *root, const char *command) {
        char line[256];

        snprintf(line, sizeof line, "cd %s && %s", root->path, command);
        assert_int_equal(system(line), 0);
}

static int setup(void **state) {
        Root *root = calloc(1, sizeof *root);

        assert_non_null(root);
        strcpy(root->path, "/tmp/ksmd-user-conf-XXXXXX");
        assert_non_null(mkdtemp(root->path));
        run_in(root, "mkdir -p etc/ksmd-user.conf.d run/ksmd-user.conf.d usr/lib/ksmd-user.conf.d");
        *state = root;
        return 0;
}

static int teardown(void **state) {
        Root *root = *state;

        run_in(root, "rm -r \"$PWD\"");
        free(root);
        return 0;
}

static void put(const Root *root, const char *path, const char *text) {
        char full[256];
        FILE *f;

        snprintf(full, sizeof full, "%s/%s", root->path, path);
        f = fopen(full, "we");
        assert_non_null(f);
        assert_true(fputs(text, f) >= 0);
        assert_int_equal(fclose(f), 0);
}

static void note(void *userdata, const char *file, unsigned line, const char *message) {
        Root *root = userdata;
        size_t used = strlen(root->reports);

        assert_memory_equal(file, root->path, strlen(root->path));
        snprintf(root->reports + used, sizeof root->reports - used, "%s:%u;", file + strlen(root->path), line);
}

static Conf *load(Root *root) {
        Conf *conf = NULL;

        root->reports[0] = 0;
        assert_int_equal(conf_load(root->path, NULL, note, root, &conf), 0);
        return conf;
}

/* What must fail: says so, and leaves the result alone. */
static void load_fails(Root *root, const char *main_path, int error) {
        Conf untouched, *conf = &untouched;

        root->reports[0] = 0;
        assert_int_equal(conf_load(root->path, main_path, note, root, &conf), error);
        assert_ptr_equal(conf, &untouched);
        assert_string_not_equal(root->reports, "");
}

static void test_nothing_there(void **state) {
        Root *root = *state;
        _cleanup_(conf_freep) Conf *conf = load(root);

        assert_string_equal(root->reports, "");
        assert_int_equal(conf->n_cgroups, 0);
        assert_int_equal(conf->daemon.scan_threads, 1);
        run_in(root, "rm -r ./*");
        conf_free(conf);
        conf = load(root);
        assert_int_equal(conf->daemon.scan_threads, 1);
}

/* By name, whichever the directory; and the main file before all of them. */
static void test_order(void **state) {
        Root *root = *state;
        Conf *conf;

        put(root, "etc/ksmd-user.conf", "[Daemon]\nScanThreads=2\n");
        conf = load(root);
        assert_int_equal(conf->daemon.scan_threads, 2);
        conf_free(conf);

        put(root, "usr/lib/ksmd-user.conf.d/30.conf", "[Daemon]\nScanThreads=3\n");
        put(root, "etc/ksmd-user.conf.d/20.conf", "[Daemon]\nScanThreads=4\nCPUQuota=4%\n");
        put(root, "run/ksmd-user.conf.d/10.conf", "[Daemon]\nScanThreads=5\nCPUQuota=5%\nMaxPageSharing=5\n");
        conf = load(root);
        assert_string_equal(root->reports, "");
        assert_int_equal(conf->daemon.scan_threads, 3);
        assert_int_equal(conf->daemon.cpu_quota, 400);
        assert_int_equal(conf->daemon.max_page_sharing, 5);
        conf_free(conf);
}

/* One name: /etc hides /run hides /usr/lib, also when what hides is empty or /dev/null. */
static void test_hiding(void **state) {
        Root *root = *state;
        Conf *conf;

        put(root, "usr/lib/ksmd-user.conf.d/x.conf", "[Daemon]\nScanThreads=3\nCPUQuota=3%\n");
        put(root, "run/ksmd-user.conf.d/x.conf", "[Daemon]\nScanThreads=5\n");
        conf = load(root);
        assert_int_equal(conf->daemon.scan_threads, 5);
        assert_int_equal(conf->daemon.cpu_quota, 1000);
        conf_free(conf);
        put(root, "etc/ksmd-user.conf.d/x.conf", "");
        conf = load(root);
        assert_int_equal(conf->daemon.scan_threads, 1);
        conf_free(conf);
        run_in(root, "ln -sf /dev/null etc/ksmd-user.conf.d/x.conf");
        conf = load(root);
        assert_string_equal(root->reports, "");
        assert_int_equal(conf->daemon.scan_threads, 1);
        conf_free(conf);
}

static void test_names(void **state) {
        Root *root = *state;
        Conf *conf;

        put(root, "etc/ksmd-user.conf.d/a.conf~", "[Daemon]\nScanThreads=3\n");
        put(root, "etc/ksmd-user.conf.d/a.conf.bak", "[Daemon]\nScanThreads=3\n");
        put(root, "etc/ksmd-user.conf.d/.a.conf", "[Daemon]\nScanThreads=3\n");
        put(root, "etc/ksmd-user.conf.d/.conf", "[Daemon]\nScanThreads=3\n");
        put(root, "etc/ksmd-user.conf.d/README", "[Daemon]\nScanThreads=3\n");
        conf = load(root);
        assert_int_equal(conf->daemon.scan_threads, 1);
        conf_free(conf);
}

static void test_sections_across_files(void **state) {
        Root *root = *state;
        Conf *conf;

        put(root, "etc/ksmd-user.conf", "[Cgroup a]\nMerge=yes\n[Cgroup b]\nMerge=yes\nTrack=no\n");
        put(root, "usr/lib/ksmd-user.conf.d/10.conf", "[Cgroup b]\nDomain=d\n[Cgroup c]\nMerge=yes\n");
        conf = load(root);
        assert_int_equal(conf->n_cgroups, 3);
        assert_string_equal(conf->cgroups[1].pattern, "b");
        assert_string_equal(conf->cgroups[1].domain, "d");
        assert_int_equal(conf->cgroups[1].merge, CONF_MERGE_YES);
        assert_int_equal(conf->cgroups[1].track, CONF_NO);
        assert_int_equal(conf->cgroups[1].line, 3);
        assert_string_equal(conf->cgroups[1].file + strlen(root->path), "/etc/ksmd-user.conf");
        assert_string_equal(conf->cgroups[2].file + strlen(root->path), "/usr/lib/ksmd-user.conf.d/10.conf");
        conf_free(conf);

        /* A section does not go on into the next file, and a mistake in one file closes the section of another. */
        put(root, "usr/lib/ksmd-user.conf.d/20.conf", "[Cgroup a]\nTrack=?\n");
        conf = load(root);
        assert_string_equal(root->reports, "/usr/lib/ksmd-user.conf.d/20.conf:2;");
        assert_int_equal(conf->cgroups[0].merge, CONF_MERGE_NO);
        assert_int_equal(conf->cgroups[1].merge, CONF_MERGE_YES);
        conf_free(conf);
        put(root, "usr/lib/ksmd-user.conf.d/20.conf", "Exclude=x\n");
        conf = load(root);
        assert_string_equal(root->reports, "/usr/lib/ksmd-user.conf.d/20.conf:1;");
        for (size_t i = 0; i < conf->n_cgroups; i++) {
                assert_null(conf->cgroups[i].exclude);
                assert_int_equal(conf->cgroups[i].merge, CONF_MERGE_NO);
        }
        conf_free(conf);
}

/* A main file that was asked for must exist, has its own drop-ins, and those of the system say nothing. */
static void test_given_main_file(void **state) {
        Root *root = *state;
        char path[128];
        Conf *conf = NULL;

        snprintf(path, sizeof path, "%s/mine.conf", root->path);
        load_fails(root, path, -ENOENT);
        assert_string_equal(root->reports, "/mine.conf:0;");

        put(root, "etc/ksmd-user.conf.d/x.conf", "[Daemon]\nScanThreads=3\n");
        put(root, "mine.conf", "[Daemon]\nScanThreads=2\nCPUQuota=2%\n");
        run_in(root, "mkdir mine.conf.d");
        put(root, "mine.conf.d/x.conf", "[Daemon]\nCPUQuota=7%\n");
        assert_int_equal(conf_load(root->path, path, note, root, &conf), 0);
        assert_int_equal(conf->daemon.scan_threads, 2);
        assert_int_equal(conf->daemon.cpu_quota, 700);
        conf_free(conf);
}

/* What is there but cannot be read may say something that matters: no configuration rather than a part of one. */
static void test_unreadable(void **state) {
        Root *root = *state;

        run_in(root, "ln -s /nonexistent etc/ksmd-user.conf.d/x.conf");
        load_fails(root, NULL, -ENOENT);
        assert_string_equal(root->reports, "/etc/ksmd-user.conf.d/x.conf:0;");
        run_in(root, "cd etc/ksmd-user.conf.d && rm x.conf && mkdir x.conf");
        load_fails(root, NULL, -EISDIR);
        run_in(root, "cd etc/ksmd-user.conf.d && rmdir x.conf && mkfifo x.conf");
        load_fails(root, NULL, -EBADF);
        run_in(root, "cd etc/ksmd-user.conf.d && rm x.conf && ln -s /dev/zero x.conf");
        load_fails(root, NULL, -EBADF);
        run_in(root, "cd etc/ksmd-user.conf.d && rm x.conf && truncate -s 2M x.conf");
        load_fails(root, NULL, -EFBIG);
        run_in(root, "cd etc && rm -r ksmd-user.conf.d && touch ksmd-user.conf.d");
        load_fails(root, NULL, -ENOTDIR);
        assert_string_equal(root->reports, "/etc/ksmd-user.conf.d:0;");
}

int main(void) {
        const struct CMUnitTest tests[] = {
                cmocka_unit_test_setup_teardown(test_nothing_there, setup, teardown),
                cmocka_unit_test_setup_teardown(test_order, setup, teardown),
                cmocka_unit_test_setup_teardown(test_hiding, setup, teardown),
                cmocka_unit_test_setup_teardown(test_names, setup, teardown),
                cmocka_unit_test_setup_teardown(test_sections_across_files, setup, teardown),
                cmocka_unit_test_setup_teardown(test_given_main_file, setup, teardown),
                cmocka_unit_test_setup_teardown(test_unreadable, setup, teardown),
        };
        return cmocka_run_group_tests(tests, NULL, NULL);
}
