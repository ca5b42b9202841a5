/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * When a huge page that was split is offered back: what the host wants, what the mapping allows, what the block holds.
 */
#include "base/io.h"
#include "merge/collapse.h"
#include "merge/plan.h"
#include "tests/test.h"

#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>

#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

static void put(const char *directory, const char *name, const char *text) {
        char path[128];

        snprintf(path, sizeof path, "%s/%s", directory, name);
        assert_int_equal(write_file_atomic(AT_FDCWD, path, text), 0);
}

static void test_host(void **state) {
        char directory[] = "/tmp/test-collapse.XXXXXX", path[64];

        assert_non_null(mkdtemp(directory));
        assert_int_equal(host_thp(directory), HOST_THP_NEVER); /* nothing is told */
        assert_int_equal(host_thp("/nowhere"), HOST_THP_NEVER);
        put(directory, "enabled", "[always] madvise never\n");
        assert_int_equal(host_thp(directory), HOST_THP_ALWAYS);
        put(directory, "enabled", "always [madvise] never\n");
        assert_int_equal(host_thp(directory), HOST_THP_ADVISED);
        put(directory, "enabled", "always madvise [never]\n");
        assert_int_equal(host_thp(directory), HOST_THP_NEVER);
        snprintf(path, sizeof path, "%s/hugepages-2048kB", directory);
        assert_int_equal(mkdir(path, 0700), 0);
        put(path, "enabled", "[always] inherit madvise never\n"); /* a size of its own will */
        assert_int_equal(host_thp(directory), HOST_THP_ALWAYS);
        put(path, "enabled", "always [inherit] madvise never\n");
        assert_int_equal(host_thp(directory), HOST_THP_NEVER);
        snprintf(path, sizeof path, "%s/hugepages-2048kB/enabled", directory);
        unlink(path);
        snprintf(path, sizeof path, "%s/hugepages-2048kB", directory);
        rmdir(path);
        snprintf(path, sizeof path, "%s/enabled", directory);
        unlink(path);
        assert_int_equal(rmdir(directory), 0);
}

static void test_shmem(void **state) {
        char directory[] = "/tmp/test-collapse.XXXXXX", path[64];

        assert_non_null(mkdtemp(directory));
        assert_false(host_shmem_huge_denied("/nowhere"));
        assert_true(host_shmem_huge_denied(directory)); /* a kernel without huge pages */
        snprintf(path, sizeof path, "%s/transparent_hugepage", directory);
        assert_int_equal(mkdir(path, 0700), 0);
        assert_false(host_shmem_huge_denied(directory));
        put(path, "shmem_enabled", "always within_size advise [never] deny force\n");
        assert_false(host_shmem_huge_denied(directory)); /* MADV_COLLAPSE does not ask for "never" */
        put(path, "shmem_enabled", "always within_size advise never [deny] force\n");
        assert_true(host_shmem_huge_denied(directory));
        snprintf(path, sizeof path, "%s/transparent_hugepage/shmem_enabled", directory);
        unlink(path);
        snprintf(path, sizeof path, "%s/transparent_hugepage", directory);
        rmdir(path);
        assert_int_equal(rmdir(directory), 0);
}

static void test_mapping(void **state) {
        Block block = { .addr = 8 * BLOCK_BYTES };
        Vma fit = { .start = 8 * BLOCK_BYTES, .end = 9 * BLOCK_BYTES, .skip = VMA_OK }, vma;

        assert_true(collapse_is_allowed(&fit, &block, HOST_THP_ALWAYS));
        assert_false(collapse_is_allowed(NULL, &block, HOST_THP_ALWAYS));
        assert_false(collapse_is_allowed(&fit, &block, HOST_THP_ADVISED));
        assert_false(collapse_is_allowed(&fit, &block, HOST_THP_NEVER));
        vma = fit, vma.huge_advised = true;
        assert_true(collapse_is_allowed(&vma, &block, HOST_THP_ADVISED));
        assert_false(collapse_is_allowed(&vma, &block, HOST_THP_NEVER));
        vma = fit, vma.mergeable = true;
        assert_false(collapse_is_allowed(&vma, &block, HOST_THP_ALWAYS));
        vma = fit, vma.start += PAGE_BYTES;
        assert_false(collapse_is_allowed(&vma, &block, HOST_THP_ALWAYS));
        vma = fit, vma.end -= PAGE_BYTES;
        assert_false(collapse_is_allowed(&vma, &block, HOST_THP_ALWAYS));
        vma = fit, vma.skip = VMA_SKIP_LOCKED;
        assert_false(collapse_is_allowed(&vma, &block, HOST_THP_ALWAYS));
        vma = fit, vma.file = true;
        assert_false(collapse_is_allowed(&vma, &block, HOST_THP_ALWAYS));
}

static void test_block(void **state) {
        uint64_t *sets[] = { NULL, NULL, NULL, NULL, NULL, NULL };
        Block block = { .split = true };

        assert_true(collapse_is_due(&block, 10));
        block.split_due = 11;
        assert_false(collapse_is_due(&block, 10));
        assert_true(collapse_is_due(&block, 11));
        block.huge = true;
        assert_false(collapse_is_due(&block, 11));
        block.huge = false;
        sets[0] = block.twin, sets[1] = block.zero, sets[2] = block.merged, sets[3] = block.zeropage;
        sets[4] = block.hole, sets[5] = block.changed;
        for (unsigned i = 0; i < ELEMENTSOF(sets); i++) {
                sets[i][7] = 1;
                assert_false(collapse_is_due(&block, 11));
                block.alone[7] = 1; /* nothing is known of it */
                assert_true(collapse_is_due(&block, 11));
                block.alone[7] = sets[i][7] = 0;
        }
        block.split = false; /* it was not we who split it */
        assert_false(collapse_is_due(&block, 11));
}

/* A page that is shared, or not there, keeps the block as it is, and is asked about ever more seldom. */
static void test_shared(void **state) {
        static uint8_t memory[2 * BLOCK_BYTES] __attribute__((aligned(BLOCK_BYTES)));
        Target target = { .pid = getpid(), .pidfd = -EBADF, .pagemapfd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC) };
        Space space = { .target = &target };
        Block block = { .addr = (uintptr_t)memory, .space = &space, .split = true };
        uint32_t due = 0, distance = 0;

        assert_true(target.pagemapfd >= 0);
        memset(memory, 1, BLOCK_BYTES / 2);
        for (uint32_t pass = 1; pass < 200; pass = due) {
                assert_int_equal(collapse_block(&target, NULL, &block, pass), COLLAPSE_E_REFUSED);
                assert_true(block.split && !block.huge);
                assert_true(block.split_due - pass > distance);
                distance = block.split_due - pass;
                due = block.split_due;
        }
        close(target.pagemapfd);
}

static void test_plan_keeps_whole(void **state) {
        PlanRules rules = { .minimum_run_pages = 1, .huge_page_split = 2500, .vmas_max = 1000 };
        Vma vma = { .start = 8 * BLOCK_BYTES, .end = 9 * BLOCK_BYTES, .skip = VMA_OK };
        VmaList vmas = { .vmas = &vma, .n = 1, .allocated = 1 };
        Block block = { .addr = 8 * BLOCK_BYTES, .huge = true }, *blocks[] = { &block };
        Space space = { .blocks = blocks, .n = 1 };

        memset(block.hashed, 0xff, sizeof block.hashed);
        memset(block.zero, 0xff, 2 * sizeof block.zero[0]); /* 128 of 512: just enough */
        assert_true(plan_would_split(&rules, &block));
        for (unsigned keep = 0; keep < 2; keep++) {
                _cleanup_(plan_done) Plan plan = {};

                block.keep_whole = keep;
                assert_int_equal(plan_make(&space, &vmas, &rules, &plan), 0);
                assert_int_equal(plan.pages_marked, keep ? 0 : 128);
                assert_int_equal(plan.pages_left_huge, keep ? 128 : 0);
        }
        block.changed[0] = 1;
        assert_false(plan_would_split(&rules, &block));
        block.changed[0] = 0, block.huge = false;
        assert_false(plan_would_split(&rules, &block));
}

int main(void) {
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(test_host),
                cmocka_unit_test(test_shmem),   cmocka_unit_test(test_mapping),          cmocka_unit_test(test_block),
                cmocka_unit_test(test_shared), cmocka_unit_test(test_plan_keeps_whole),
        };

        return cmocka_run_group_tests(tests, NULL, NULL);
}
