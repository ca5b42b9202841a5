/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What others leave of the CPUs, by numbers made up, and by this machine's. */
#include "host/cpu.h"

#include "tests/test.h"

#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>

#include <cmocka.h>

#define SEC NSEC_PER_SEC

static char path[] = "/tmp/ksmd-user-test-cpu-XXXXXX";

static void say(const char *text) {
        int fd = open(path, O_WRONLY | O_TRUNC | O_CLOEXEC);

        assert_true(fd >= 0);
        assert_int_equal(write(fd, text, strlen(text)), strlen(text));
        close(fd);
}

static void test_left(void **unused) {
        CpuLeft left = { 0 };
        uint32_t share;

        say("cpu  100 0 50 1000 10 0 0 0 0 0\ncpu0 1 1 1 1\n");
        assert_int_equal(cpu_left_look(&left, path, SEC, 7 * SEC, &share), 0);
        assert_int_equal(share, UINT32_MAX);
        /* In two seconds: half a second idle, another half waiting for a disk, half a second used by us. */
        say("cpu  300 0 50 1050 60 0 0 0 0 0\n");
        assert_int_equal(cpu_left_look(&left, path, 3 * SEC, 7 * SEC + SEC / 2, &share), 0);
        assert_int_equal(share, 6250);
        /* 64 CPUs, of which four are idle. */
        say("cpu  300 0 50 1450 60 0 0 0 0 0\n");
        assert_int_equal(cpu_left_look(&left, path, 4 * SEC, 7 * SEC + SEC / 2, &share), 0);
        assert_int_equal(share, 40000);
        /* A CPU went away; a clock that stood. */
        say("cpu  300 0 50 1000 60 0 0 0 0 0\n");
        assert_int_equal(cpu_left_look(&left, path, 5 * SEC, 7 * SEC + SEC / 2, &share), 0);
        assert_int_equal(share, 0);
        assert_int_equal(cpu_left_look(&left, path, 5 * SEC, 8 * SEC, &share), 0);
        assert_int_equal(share, UINT32_MAX);
}

static void test_unreadable(void **unused) {
        CpuLeft left = { 0 };
        uint32_t share = 1;

        say("cpu  1 2 3 4 5\n");
        assert_int_equal(cpu_left_look(&left, path, SEC, 0, &share), 0);
        say("cpu  1 2 3 x\n");
        assert_int_equal(cpu_left_look(&left, path, 2 * SEC, 0, &share), -EBADMSG);
        assert_int_equal(cpu_left_look(&left, "/nonexistent", 2 * SEC, 0, &share), -ENOENT);
        /* What was before is forgotten. */
        say("cpu  1 2 3 900 5\n");
        assert_int_equal(cpu_left_look(&left, path, 3 * SEC, 0, &share), 0);
        assert_int_equal(share, UINT32_MAX);
}

static void test_here(void **unused) {
        CpuLeft left = { 0 };
        uint32_t share;

        assert_int_equal(cpu_left_look(&left, NULL, SEC, 0, &share), 0);
        assert_true(left.idle_nsec > 0);
        usleep(50000);
        assert_int_equal(cpu_left_look(&left, NULL, SEC + SEC / 20, 0, &share), 0);
        assert_true(share <= (uint64_t)sysconf(_SC_NPROCESSORS_ONLN) * 10000 * 2);
}

int main(void) {
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(test_left),
                cmocka_unit_test(test_unreadable),
                cmocka_unit_test(test_here),
        };
        int fd = mkstemp(path), failed;

        if (fd < 0)
                return 1;
        close(fd);
        failed = cmocka_run_group_tests(tests, NULL, NULL);
        unlink(path);
        return failed;
}
