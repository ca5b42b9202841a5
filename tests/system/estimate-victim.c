/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * `estimate-victim KIND`: memory of one kind, then quiet. Says "ready PID..." when it is there.
 *   huge   three areas of 16 MiB of huge pages: zeros, duplicates in pairs, one page copied all over
 *   family a parent and two children; each writes its own part of what they shared
 *   file   a private mapping of its own executable's file, partly written to; the shared zero page read all over
 *   odd    what is left alone: locked, not dumped, shared, unreadable
 */
#include "test.h"

#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>

#define MIB ((size_t)1 << 20)

static uint8_t *map(size_t size, int flags) {
        uint8_t *area = mmap(NULL, size + BLOCK_BYTES, PROT_READ | PROT_WRITE, MAP_ANONYMOUS | flags, -1, 0);
        CHECK(area != MAP_FAILED);
        return (uint8_t *)(((uintptr_t)area + BLOCK_BYTES - 1) & ~(BLOCK_BYTES - 1));
}

/* Writes page i of a content that depends on seed only. */
static void write_page(uint8_t *page, uint32_t seed) {
        for (size_t i = 0; i < PAGE_BYTES; i += 4) {
                seed = seed * 1664525 + 1013904223;
                memcpy(page + i, &seed, 4);
        }
}

static void make_huge(void) {
        uint8_t *area = map(48 * MIB, MAP_PRIVATE);

        CHECK(madvise(area, 48 * MIB, MADV_HUGEPAGE) == 0);
        memset(area, 0, 16 * MIB);
        for (size_t i = 0; i < 4096; i++) {
                write_page(area + 16 * MIB + i * PAGE_BYTES, (uint32_t)i / 2 * 7919 + 1);
                write_page(area + 32 * MIB + i * PAGE_BYTES, i % 3 ? 5 : (uint32_t)i + 100000000);
        }
}

static void make_family(void) {
        uint8_t *area = map(16 * MIB, MAP_PRIVATE);
        volatile int *stages = mmap(NULL, PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

        CHECK(stages != MAP_FAILED);
        CHECK(madvise(area, 16 * MIB, MADV_NOHUGEPAGE) == 0);
        for (size_t i = 0; i < 4096; i++)
                write_page(area + i * PAGE_BYTES, (uint32_t)i % 1500 + 200000000);
        memset(area + 100 * PAGE_BYTES, 0, 50 * PAGE_BYTES);
        printf("ready %d", getpid());
        for (int child = 1; child <= 2; child++) {
                pid_t pid = fork();

                CHECK(pid >= 0);
                if (pid == 0) {
                        prctl(PR_SET_PDEATHSIG, SIGKILL);
                        for (int i = 0; i < 300; i++)
                                write_page(area + (size_t)(child * 1000 + i) * PAGE_BYTES, (uint32_t)(300000000 + i * child));
                        stages[child] = 1;
                        for (;;)
                                pause();
                }
                while (!stages[child])
                        usleep(1000);
                printf(" %d", pid);
        }
        printf("\n");
}

static void make_file(void) {
        int fd = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
        size_t n = (size_t)lseek(fd, 0, SEEK_END) / PAGE_BYTES;
        uint8_t *file = mmap(NULL, n * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
        volatile uint8_t *zeros = map(4 * MIB, MAP_PRIVATE);
        unsigned sum = 0;

        CHECK(fd >= 0 && file != MAP_FAILED && n >= 2);
        CHECK(madvise((void *)zeros, 4 * MIB, MADV_NOHUGEPAGE) == 0);
        for (size_t i = 0; i < n; i++)
                sum += file[i * PAGE_BYTES];
        for (size_t i = 0; i < n; i += 2)
                write_page(file + i * PAGE_BYTES, (uint32_t)i % 8 + 400000000);
        for (size_t i = 0; i < 4 * MIB; i += PAGE_BYTES)
                sum += zeros[i];
        for (size_t i = 0; i < 4 * MIB; i += 3 * PAGE_BYTES)
                write_page((uint8_t *)zeros + i, 1);
        CHECK(sum != 1);
}

static void make_odd(void) {
        uint8_t *area = map(MIB, MAP_PRIVATE);

        for (int kind = 0; kind < 4; kind++) {
                area = map(MIB, kind == 2 ? MAP_SHARED : MAP_PRIVATE);
                for (size_t i = 0; i < MIB; i += PAGE_BYTES)
                        write_page(area + i, 42);
                if (kind == 0)
                        CHECK(mlock(area, MIB) == 0);
                if (kind == 1)
                        CHECK(madvise(area, MIB, MADV_DONTDUMP) == 0);
                if (kind == 3)
                        CHECK(mprotect(area, MIB, PROT_NONE) == 0);
        }
}

int main(int argc, char **argv) {
        const char *kind = argc > 1 ? argv[1] : "";

        prctl(PR_SET_PDEATHSIG, SIGKILL);
        setvbuf(stdout, NULL, _IOLBF, 4096); /* allocated before the counting, not by the first line */
        if (strcmp(kind, "huge") == 0)
                make_huge();
        else if (strcmp(kind, "file") == 0)
                make_file();
        else if (strcmp(kind, "odd") == 0)
                make_odd();
        else
                make_family();
        if (strcmp(kind, "family") != 0)
                printf("ready %d\n", getpid());
        for (;;)
                pause();
}
