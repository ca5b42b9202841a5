/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

/* What every test program shares. Unit tests use cmocka; programs of their own use CHECK(). */

#include "base/clock.h"
#include "base/util.h"
#include "host/pagemap.h"

#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* Says what part of the test is skipped and why: tools/test shows it. */
#define TEST_SKIP_PART(...)                               \
        do {                                              \
                printf("SKIP: ");                         \
                printf(__VA_ARGS__);                      \
                printf("\n");                             \
                fflush(stdout);                           \
        } while (0)

/* Ends the test as skipped. */
#define TEST_SKIP(...)                                    \
        do {                                              \
                TEST_SKIP_PART(__VA_ARGS__);              \
                exit(77);                                 \
        } while (0)

/* Exit statuses. TEST_NOTICED: somebody was harmed, or could tell. No second run makes that good, so tools/test makes none;
 * and it is what a test has to end with that leaves a safeguard out (tests/control). */
#define TEST_FAILED 1
#define TEST_NOTICED 99

#define test_check(status, condition, text, ...)                                                   \
        do {                                                                                       \
                if (!(condition)) {                                                                \
                        fprintf(stderr, "%s:%d: not so: %s:", __FILE__, __LINE__, text);           \
                        fprintf(stderr, " " __VA_ARGS__);                                          \
                        fprintf(stderr, " (errno %d %s)\n", errno, strerror(errno));               \
                        exit(status);                                                              \
                }                                                                                  \
        } while (0)

/* Unlike assert(): says what was expected, is never compiled out. */
#define CHECK(condition, ...) test_check(TEST_FAILED, condition, #condition, __VA_ARGS__)
#define CHECK_AS(status, condition, ...) test_check(status, condition, #condition, __VA_ARGS__)
#define CHECK_HARMLESS(condition, ...) test_check(TEST_NOTICED, condition, #condition, __VA_ARGS__)

static inline void test_need_root(void) {
        if (geteuid() != 0)
                TEST_SKIP("needs root");
}

/* Memory that is read before it is written maps the kernel's zero page. Some kernels fill it with a page of its own: those
 * of s390 for processes with storage keys (mm_forbids_zeropage()), and of guests of PVM. */
static inline bool test_has_zero_page(void) {
        volatile uint8_t *page = mmap(NULL, PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
        uint64_t entry = 0;
        CHECK(page != MAP_FAILED && fd >= 0 && *page == 0, "a page");
        CHECK(pread(fd, &entry, sizeof entry, (off_t)((uintptr_t)page / PAGE_BYTES * sizeof entry)) == sizeof entry, "pagemap");
        close(fd);
        munmap((void *)page, PAGE_BYTES);
        return !(entry & PAGEMAP_EXCLUSIVE);
}

/* Below: ksm-lock.c, for programs that change the host (dep_ksm_lock). */

/* Calls function, the one that was given last first, when this process ends: by exit(), or by SIGTERM or SIGINT, as meson and
 * Ctrl-C end a test. As it may be called in the middle of anything, it does only what a signal handler may do: no CHECK(),
 * no allocation, no stdio. No other thread may turn knobs at that time. */
void test_at_end(void (*function)(void));
void test_remove_directory(const char *path); /* without directories in it; test_at_end() may call it */

/* KSM is one for the whole machine: everything that turns its knobs or counts its pages holds this lock meanwhile, so
 * that two builds may run their tests side by side. Held until the process ends (not inherited over exec); the knobs are
 * put back then, and those that a test left changed that was killed, before. */
void test_lock_ksm(void);
