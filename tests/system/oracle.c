/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * `oracle PID...`: the frames of processes, counted the slow and obvious way, to check `ksmctl estimate` against.
 * Shares no code and no idea with it: no hash, no batch, no state; every page is read through /proc/PID/mem and kept,
 * pages are sorted by frame to have each frame once, frames are sorted by their bytes to have equal ones together.
 * For quiet processes only.
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { PAGE = 4096 };

typedef struct Page {
        uint64_t frame;
        unsigned char *bytes;
} Page;

static Page *pages;
static size_t n_pages, room;
static int flags_fd;

static void die(const char *what) {
        fprintf(stderr, "oracle: %s: %s\n", what, strerror(errno));
        exit(1);
}

static int open_of(const char *pid, const char *file) {
        char path[64];
        int fd;

        snprintf(path, sizeof path, "/proc/%s/%s", pid, file);
        fd = open(path, O_RDONLY);
        if (fd < 0)
                die(path);
        return fd;
}

/* What no merger may touch, by the two-letter flags of proc(5). */
static bool is_taboo(const char *flags) {
        static const char *const taboo[] = { "sh", "io", "pf", "mm", "de", "ht", "lo", "dd", "wf", "dp", "ss", "um", "uw", "ui" };

        for (size_t i = 0; i < sizeof taboo / sizeof *taboo; i++) {
                char word[5];
                snprintf(word, sizeof word, " %s ", taboo[i]);
                if (strstr(flags, word))
                        return true;
        }
        return false;
}

static void take(const char *pid, unsigned long from, unsigned long to) {
        int map = open_of(pid, "pagemap"), mem = open_of(pid, "mem");

        for (unsigned long address = from; address < to; address += PAGE) {
                uint64_t entry, flags;

                if (pread(map, &entry, 8, (off_t)(address / PAGE * 8)) != 8)
                        die("pagemap");
                if (!(entry & 1ULL << 63) || entry & 1ULL << 61)
                        continue;
                entry &= (1ULL << 55) - 1;
                if (pread(flags_fd, &flags, 8, (off_t)(entry * 8)) != 8)
                        die("kpageflags");
                if (flags & 1ULL << 24)
                        continue;
                if (n_pages == room) {
                        room = room ? room * 2 : 65536;
                        pages = realloc(pages, room * sizeof *pages);
                }
                pages[n_pages] = (Page) { entry, malloc(PAGE) };
                if (pread(mem, pages[n_pages].bytes, PAGE, (off_t)address) != PAGE)
                        die("mem");
                n_pages++;
        }
        close(map);
        close(mem);
}

static void read_process(const char *pid) {
        char line[8192], path[64];
        unsigned long from = 0, to = 0, a, b;
        bool usable = false;
        char mode[8];
        FILE *smaps;

        snprintf(path, sizeof path, "/proc/%s/smaps", pid);
        smaps = fopen(path, "r");
        if (!smaps)
                die(path);
        while (fgets(line, sizeof line, smaps)) {
                if (sscanf(line, "%lx-%lx %7s", &a, &b, mode) == 3) {
                        from = a;
                        to = b;
                        usable = mode[0] == 'r' && mode[3] == 'p' && !strstr(line, "[v");
                } else if (strncmp(line, "VmFlags:", 8) == 0 && usable && !is_taboo(line))
                        take(pid, from, to);
        }
        fclose(smaps);
}

static int by_frame(const void *x, const void *y) {
        const Page *a = x, *b = y;
        return a->frame < b->frame ? -1 : a->frame > b->frame;
}

static int by_bytes(const void *x, const void *y) {
        return memcmp(((const Page *)x)->bytes, ((const Page *)y)->bytes, PAGE);
}

int main(int argc, char **argv) {
        static const unsigned char nothing[PAGE];
        size_t frames = 0, zero = 0, distinct = 0, mappings;

        flags_fd = open("/proc/kpageflags", O_RDONLY);
        if (flags_fd < 0)
                die("/proc/kpageflags");
        for (int i = 1; i < argc; i++)
                read_process(argv[i]);
        mappings = n_pages;
        qsort(pages, n_pages, sizeof *pages, by_frame);
        for (size_t i = 0; i < n_pages; i++)
                if (frames == 0 || pages[frames - 1].frame != pages[i].frame)
                        pages[frames++] = pages[i];
        qsort(pages, frames, sizeof *pages, by_bytes);
        for (size_t i = 0; i < frames; i++) {
                if (memcmp(pages[i].bytes, nothing, PAGE) == 0)
                        zero++;
                else if (i == 0 || by_bytes(&pages[i - 1], &pages[i]) != 0)
                        distinct++;
        }
        printf("{\"pages\": %zu, \"zero\": %zu, \"distinct\": %zu, \"duplicate\": %zu, \"already_shared\": %zu}\n", frames,
               zero, distinct, frames - zero - distinct, mappings - frames);
        return 0;
}
