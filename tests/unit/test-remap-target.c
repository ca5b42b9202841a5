/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "merge/remap-target.h"

#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#include <cmocka.h>

/* What may have pinned pages of a process, as its /proc shows it. */
#define STATUS(lck, pin) "Name:\ttest\nVmLck:\t       " lck " kB\nVmPin:\t       " pin " kB\nVmHWM:\t    1000 kB\n"
#define MEMORY "7f0000000000-7f0000001000 rw-p 00000000 00:00 0 \n"

static bool may_pin(const char *status, const char *link, const char *maps) {
        char path[] = "/tmp/test-remap-target-XXXXXX";
        Target target;
        FILE *file;
        bool may;

        assert_non_null(mkdtemp(path));
        target = (Target){ .procfd = open(path, O_PATH | O_CLOEXEC) };
        assert_true(target.procfd >= 0);
        assert_int_equal(mkdirat(target.procfd, "fd", 0700), 0);
        if (link)
                assert_int_equal(symlinkat(link, target.procfd, "fd/3"), 0);
        for (unsigned i = 0; i < 2; i++) {
                const char *text = i == 0 ? status : maps;

                if (!text)
                        continue;
                file = fdopen(openat(target.procfd, i == 0 ? "status" : "maps", O_CREAT | O_WRONLY | O_CLOEXEC, 0600), "w");
                assert_non_null(file);
                assert_true(fputs(text, file) >= 0);
                assert_int_equal(fclose(file), 0);
        }
        may = remap_target_may_pin(&target);
        (void)unlinkat(target.procfd, "status", 0);
        (void)unlinkat(target.procfd, "maps", 0);
        (void)unlinkat(target.procfd, "fd/3", 0);
        assert_int_equal(unlinkat(target.procfd, "fd", AT_REMOVEDIR), 0);
        assert_int_equal(rmdir(path), 0);
        safe_close(target.procfd);
        return may;
}

static void test_nothing(void **state) {
        assert_false(may_pin(STATUS("0", "0"), NULL, MEMORY));
        assert_false(may_pin(STATUS("0", "0"), "anon_inode:[eventpoll]", MEMORY));
}

/* iommufd and RDMA count as pinned, VFIO's first kind as locked. */
static void test_counted(void **state) {
        assert_true(may_pin(STATUS("0", "4"), NULL, MEMORY));
        assert_true(may_pin(STATUS("4", "0"), NULL, MEMORY));
}

static void test_rings(void **state) {
        assert_true(may_pin(STATUS("0", "0"), "anon_inode:[io_uring]", MEMORY));
        assert_true(may_pin(STATUS("0", "0"), NULL,
                            MEMORY "7f0000001000-7f0000002000 rw-s 00000000 00:11 1 /[aio] (deleted)\n"));
        assert_true(may_pin(STATUS("0", "0"), NULL,
                            MEMORY "7f0000001000-7f0000002000 rw-s 10000000 00:10 1034 anon_inode:[io_uring]\n"));
}

static void test_not_told(void **state) {
        assert_true(may_pin(NULL, NULL, MEMORY));
        assert_true(may_pin("Name:\ttest\n", NULL, MEMORY));
        assert_true(may_pin(STATUS("0", "0"), NULL, NULL));
}

int main(void) {
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(test_nothing),
                cmocka_unit_test(test_counted),
                cmocka_unit_test(test_rings),
                cmocka_unit_test(test_not_told),
        };
        return cmocka_run_group_tests(tests, NULL, NULL);
}
