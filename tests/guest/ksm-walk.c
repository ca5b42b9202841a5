/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * How long it takes the kernel to move a KSM page to another NUMA node, by how often it is mapped and by how many pieces
 * its mapping was cut into. Alone on its machine: runs ksmd. Usage: ksm-walk SHARERS PIECES; prints nanoseconds of CPU time.
 */
#include "base/clock.h"
#include "tests/test.h"

#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>

#define MOVE_ALL 4
#define ROUNDS 7

static void set(const char *knob, const char *value) {
        char path[64];
        FILE *file;

        snprintf(path, sizeof path, "/sys/kernel/mm/ksm/%s", knob);
        file = fopen(path, "w");
        CHECK(file && fputs(value, file) >= 0 && fclose(file) == 0, "%s", knob);
}

static unsigned long get(const char *knob) {
        char path[64];
        unsigned long value = 0;
        FILE *file;

        snprintf(path, sizeof path, "/sys/kernel/mm/ksm/%s", knob);
        file = fopen(path, "r");
        CHECK(file && fscanf(file, "%lu", &value) == 1, "%s", knob);
        fclose(file);
        return value;
}

/* Returns the CPU time it took. Whoever looks at the page in that moment (reclaim, compaction) keeps it where it is. */
static uint64_t move(void *page, int node) {
        int status = -EBUSY;

        for (unsigned tries = 0; tries < 1000; tries++) {
                uint64_t began = clock_nsec(CLOCK_THREAD_CPUTIME_ID), took;

                CHECK(syscall(SYS_move_pages, 0, 1UL, &page, &node, &status, MOVE_ALL) >= 0);
                took = clock_nsec(CLOCK_THREAD_CPUTIME_ID) - began;
                if (status == node)
                        return took;
                CHECK(status == -EBUSY || status == -EAGAIN, "status %d", status);
                usleep(1000);
        }
        CHECK(false, "status %d", status);
        return 0;
}

int main(int argc, char **argv) {
        size_t sharers = argc > 1 ? strtoul(argv[1], NULL, 0) : 256, pieces = argc > 2 ? strtoul(argv[2], NULL, 0) : 1;
        size_t pages = sharers + 2 * pieces;
        uint64_t best = UINT64_MAX, until = now_nsec() + 60 * NSEC_PER_SEC;
        uint8_t *area = mmap(NULL, pages * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

        CHECK(area != MAP_FAILED);
        for (size_t i = 0; i < pages * PAGE_BYTES; i++)
                area[i] = (uint8_t)(i % PAGE_BYTES * 7 + (i / PAGE_BYTES >= sharers ? i / PAGE_BYTES : 0));
        for (size_t i = 0; i < pieces; i++) /* pieces of one mapping, with one anon_vma */
                CHECK(mprotect(area + (sharers + 2 * i) * PAGE_BYTES, PAGE_BYTES, PROT_READ) == 0);
        set("run", "2"); /* KSM counts pages of processes that ended as shared until it comes by */
        set("run", "0");
        CHECK(get("pages_sharing") == 0);
        CHECK(madvise(area, sharers * PAGE_BYTES, MADV_MERGEABLE) == 0);
        set("sleep_millisecs", "0");
        set("run", "1");
        while (get("pages_sharing") < sharers - 1 && now_nsec() < until)
                usleep(10000);
        set("run", "0");
        set("sleep_millisecs", "20");
        CHECK(get("pages_sharing") == sharers - 1, "%lu of %zu are merged", get("pages_sharing"), sharers);
        (void)move(area, 1);
        for (unsigned i = 0; i < 2 * ROUNDS; i++)
                best = MIN_OF(best, move(area, (int)i % 2));
        printf("%llu\n", (unsigned long long)best);
        return 0;
}
