/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * The prices that the range planner goes by (src/merge/plan.c), on this machine: what ksmd spends on a marked page
 * that has no twin, on one that is not there, and on more mappings around the same pages; what a mark on part of a
 * mapping costs and how much kernel memory the mappings take. JSON lines.
 *
 * ksmd's time is read at the end of each full scan, from its schedstat, which the scheduler brings up to date at its
 * tick: the figures of single scans are good to 4 ms, and the memory is large so that a scan takes many times that.
 */

#include "base/io.h"
#include "tests/test.h"

#include <inttypes.h>
#include <sys/mman.h>

#define KSM "/sys/kernel/mm/ksm/"
#define PAGES 65536U
#define SCANS 3U

static pid_t ksmd;

static uint64_t ksm_get(const char *name) {
        char path[128];
        uint64_t value;

        snprintf(path, sizeof path, KSM "%s", name);
        CHECK(read_u64(AT_FDCWD, path, &value) == 0, "%s", path);
        return value;
}

static void ksm_set(const char *name, uint64_t value) {
        char path[128], text[32];

        snprintf(path, sizeof path, KSM "%s", name);
        snprintf(text, sizeof text, "%" PRIu64, value);
        CHECK(write_text(AT_FDCWD, path, text) == 0, "%s", path);
}

static uint64_t ksmd_nsec(void) {
        char path[64];
        _cleanup_free_ char *text = NULL;

        snprintf(path, sizeof path, "/proc/%d/schedstat", ksmd);
        CHECK(read_file(AT_FDCWD, path, &text, NULL) == 0, "%s", path);
        return strtoull(text, NULL, 10);
}

static void find_ksmd(void) {
        for (ksmd = 2; ksmd < 1000; ksmd++) {
                char path[64];
                _cleanup_free_ char *text = NULL;

                snprintf(path, sizeof path, "/proc/%d/comm", ksmd);
                if (read_file(AT_FDCWD, path, &text, NULL) == 0 && strcmp(text, "ksmd\n") == 0)
                        return;
        }
        TEST_SKIP("no ksmd");
}

/* Objects in use of a slab cache; 0 where /proc/slabinfo does not say. */
static uint64_t slab_bytes(const char *cache) {
        _cleanup_free_ char *text = NULL;
        char line[64];
        const char *at;
        uint64_t active, all, size;

        snprintf(line, sizeof line, "\n%s ", cache);
        if (read_file(AT_FDCWD, "/proc/slabinfo", &text, NULL) < 0 || !(at = strstr(text, line)) ||
            sscanf(at + strlen(line), "%" SCNu64 " %" SCNu64 " %" SCNu64, &active, &all, &size) != 3)
                return 0;
        return active * size;
}

/* Runs ksmd for some full scans and says what each cost, for one of n things. */
static void measure_scans(const char *what, unsigned n) {
        uint64_t scans = ksm_get("full_scans"), last = ksmd_nsec();

        printf("{\"what\":\"%s\",\"ksmd_nsec_each_by_scan\":[", what);
        ksm_set("run", 1);
        for (unsigned i = 0; i < SCANS;) {
                uint64_t now;

                usleep(500);
                if (ksm_get("full_scans") <= scans + i)
                        continue;
                now = ksmd_nsec();
                printf("%s%.0f", i ? "," : "", (double)(now - last) / n);
                last = now;
                i++;
        }
        ksm_set("run", 2); /* forgets what it knows of the pages, too */
        ksm_set("run", 0);
        printf("]}\n");
        fflush(stdout);
}

static void fill(uint64_t *memory) {
        uint64_t x = 88172645463325252ULL;

        for (size_t i = 0; i < PAGES * PAGE_BYTES / 8; i++) {
                x ^= x << 13;
                x ^= x >> 7;
                x ^= x << 17;
                memory[i] = x;
        }
}

static void mark_each(char *memory, unsigned step) {
        uint64_t before = slab_bytes("vm_area_struct"), before_nodes = slab_bytes("maple_node");
        uint64_t started = process_cpu_nsec(), nsec;
        unsigned calls = 0;
        char what[64];

        for (unsigned i = 0; i < PAGES && calls < 25000; i += step, calls++)
                CHECK(madvise(memory + i * PAGE_BYTES, PAGE_BYTES, MADV_MERGEABLE) == 0, "MADV_MERGEABLE");
        nsec = process_cpu_nsec() - started;
        sleep(1); /* nodes that were replaced are freed after a grace period */
        printf("{\"what\":\"mark one page of %u\",\"nsec_each\":%.0f,\"vma_bytes_each\":%.0f,\"node_bytes_each\":%.0f}\n",
               step, (double)nsec / calls, (double)(slab_bytes("vm_area_struct") - before) / calls,
               (double)(int64_t)(slab_bytes("maple_node") - before_nodes) / calls);
        snprintf(what, sizeof what, "unique page, marked one of %u", step);
        measure_scans(what, calls);
        CHECK(madvise(memory, PAGES * PAGE_BYTES, MADV_UNMERGEABLE) == 0, "MADV_UNMERGEABLE");
}

int main(void) {
        char *memory;

        test_need_root();
        test_lock_ksm();
        if (access(KSM "run", W_OK) < 0)
                TEST_SKIP("no KSM");
        find_ksmd();
        ksm_set("run", 2);
        ksm_set("run", 0);
        ksm_set("sleep_millisecs", 0);
        ksm_set("pages_to_scan", 500);
        ksm_set("smart_scan", 0);
        memory = mmap(NULL, PAGES * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        CHECK(memory != MAP_FAILED && madvise(memory, PAGES * PAGE_BYTES, MADV_NOHUGEPAGE) == 0, "memory");
        fill((uint64_t *)(void *)memory);

        CHECK(madvise(memory, PAGES * PAGE_BYTES, MADV_MERGEABLE) == 0, "MADV_MERGEABLE");
        measure_scans("unique page, all marked", PAGES);
        CHECK(madvise(memory, PAGES * PAGE_BYTES, MADV_UNMERGEABLE) == 0, "MADV_UNMERGEABLE");
        for (unsigned step = 2; step <= 16; step *= 2)
                mark_each(memory, step);
        for (unsigned i = 0; i < PAGES; i++)
                if (i % 512)
                        CHECK(madvise(memory + i * PAGE_BYTES, PAGE_BYTES, MADV_DONTNEED) == 0, "MADV_DONTNEED");
        CHECK(madvise(memory, PAGES * PAGE_BYTES, MADV_MERGEABLE) == 0, "MADV_MERGEABLE");
        measure_scans("page not there, one of 512 is", PAGES);
        return 0;
}
