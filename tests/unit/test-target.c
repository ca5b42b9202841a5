/* SPDX-License-Identifier: LGPL-2.1-or-later */

/* Who is to be left alone, told from a directory that stands in for a process's in /proc. */

#include "target/target.h"
#include "tests/test.h"

#include <setjmp.h>
#include <stdarg.h>

#include <cmocka.h>
#include <elf.h>
#include <ftw.h>
#include <sys/stat.h>

static char root[] = "/tmp/test-target.XXXXXX";

static void put(int directory, const char *name, const void *data, size_t size) {
        _cleanup_close_ int fd = openat(directory, name, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);

        assert_true(fd >= 0);
        assert_int_equal(write(fd, data, size), size);
}

static void put_text(int directory, const char *name, const char *text) { put(directory, name, text, strlen(text)); }

static TargetSkip inspect(const char *status, const char *state) {
        static const uint64_t auxv[] = { AT_PAGESZ, PAGE_BYTES, AT_NULL, 0 };
        _cleanup_close_ int directory = open(root, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        Target target = { .pid = 1, .pidfd = -EBADF, .procfd = directory, .memfd = -EBADF, .pagemapfd = -EBADF };
        char text[256];
        TargetSkip skip;
        bool ask;

        (void)mkdirat(directory, "ns", 0700);
        put_text(directory, "ns/user", "");
        put(directory, "auxv", auxv, sizeof auxv);
        put_text(directory, "status", status);
        snprintf(text, sizeof text, "1 (victim) %s 1 1 1 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 1 0 0\n", state);
        put_text(directory, "stat", text);
        assert_int_equal(target_inspect(&target, 0, &skip, &ask), 0);
        return skip;
}

/* The reason that forbids reading comes first: who cannot be called may still be read by an estimate. */
static void test_secrets_first(void **unused) {
        char status[256], other[256];

        snprintf(status, sizeof status, "Uid:\t0\t%u\t0\t0\nTracerPid:\t0\nx86_Thread_features:\tshstk\n", geteuid());
        snprintf(other, sizeof other, "Uid:\t0\t%u\t0\t0\nTracerPid:\t7\nx86_Thread_features:\tshstk\n", geteuid() + 1);
        assert_int_equal(inspect(status, "S"), TARGET_SKIP_SHADOW_STACK);
        assert_int_equal(inspect(other, "S"), TARGET_SKIP_NOT_DUMPABLE);
        snprintf(status, sizeof status, "Uid:\t0\t%u\t0\t0\nTracerPid:\t0\nx86_Thread_features:\t\n", geteuid());
        assert_int_equal(inspect(status, "S"), TARGET_OK);
        assert_int_equal(inspect(status, "T"), TARGET_SKIP_STOPPED);
        assert_int_equal(inspect(status, "Z"), TARGET_SKIP_ZOMBIE);
}

static int remove_one(const char *path, const struct stat *st, int type, struct FTW *ftw) { return remove(path); }

static int set_up(void **unused) { return mkdtemp(root) ? 0 : -1; }

static int tear_down(void **unused) { return nftw(root, remove_one, 8, FTW_DEPTH | FTW_PHYS); }

int main(void) {
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(test_secrets_first),
        };

        return cmocka_run_group_tests(tests, set_up, tear_down);
}
