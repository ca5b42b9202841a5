/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

/* What every test program shares. Unit tests use cmocka; programs of their own use CHECK(). */

#include "base/clock.h"
#include "base/util.h"

#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>

/* Ends the test as skipped; why is shown in the log. */
#define TEST_SKIP(...)                                    \
        do {                                              \
                printf("SKIP: ");                         \
                printf(__VA_ARGS__);                      \
                printf("\n");                             \
                fflush(stdout);                           \
                exit(77);                                 \
        } while (0)

/* Unlike assert(): says what was expected, is never compiled out. */
#define CHECK(condition, ...)                                                              \
        do {                                                                               \
                if (!(condition)) {                                                        \
                        fprintf(stderr, "%s:%d: not so: %s:", __FILE__, __LINE__, #condition); \
                        fprintf(stderr, " " __VA_ARGS__);                                  \
                        fprintf(stderr, " (errno %d %s)\n", errno, strerror(errno));       \
                        exit(1);                                                           \
                }                                                                          \
        } while (0)

static inline void test_need_root(void) {
        if (geteuid() != 0)
                TEST_SKIP("needs root");
}

/* KSM is one for the whole machine: everything that turns its knobs or counts its pages holds this lock meanwhile, so
 * that two builds may run their tests side by side. Held until the process ends (not inherited over exec). */
static inline void test_lock_ksm(void) {
        int fd = open("/run/lock/ksmd-user-tests.ksm", O_RDWR | O_CREAT | O_CLOEXEC, 0600);
        CHECK(fd >= 0, "the test lock");
        CHECK(flock(fd, LOCK_EX) == 0, "the test lock");
}
