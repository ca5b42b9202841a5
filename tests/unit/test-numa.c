/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * host/numa on machines made up in a directory: which node a frame belongs to, with one node, nodes whose memory is
 * interleaved, blocks on a border, blocks that are gone, and where only the zones are told.
 */
#include "base/io.h"
#include "host/numa.h"
#include "tests/test.h"

#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>

#include <fcntl.h>
#include <ftw.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#define BLOCK_FRAMES 0x8000ULL /* 128 MiB */

static char system_dir[64], zoneinfo[80];

static int remove_one(const char *path, const struct stat *st, int type, struct FTW *ftw) { return remove(path); }

static int setup(void **state) {
        strcpy(system_dir, "/tmp/test-numa.XXXXXX");
        assert_non_null(mkdtemp(system_dir));
        snprintf(zoneinfo, sizeof zoneinfo, "%s/zoneinfo", system_dir);
        return 0;
}

static int teardown(void **state) { return nftw(system_dir, remove_one, 8, FTW_DEPTH | FTW_PHYS); }

static void put(const char *name, const char *text) {
        char path[128];

        snprintf(path, sizeof path, "%s/%s", system_dir, name);
        assert_int_equal(write_file_atomic(AT_FDCWD, path, text), 0);
}

static void put_dir(const char *name) {
        char path[128];

        snprintf(path, sizeof path, "%s/%s", system_dir, name);
        assert_int_equal(mkdir(path, 0700), 0);
}

static void begin_blocks(unsigned nodes) {
        put_dir("memory");
        put("memory/block_size_bytes", "8000000\n");
        put_dir("node");
        put_dir("node/power"); /* nothing of ours, like the files online and has_memory */
        for (unsigned i = 0; i < nodes; i++) {
                char name[32];

                snprintf(name, sizeof name, "node/node%u", i);
                put_dir(name);
                snprintf(name, sizeof name, "node/node%u/meminfo", i);
                put(name, "");
        }
}

static void put_block(unsigned node, unsigned block) {
        char path[128];

        snprintf(path, sizeof path, "%s/node/node%u/memory%u", system_dir, node, block);
        assert_int_equal(symlink("../../memory", path), 0);
}

static void check_block(const Numa *numa, unsigned block, unsigned node) {
        assert_int_equal(numa_node_of(numa, block * BLOCK_FRAMES), node);
        assert_int_equal(numa_node_of(numa, block * BLOCK_FRAMES + 17), node);
        assert_int_equal(numa_node_of(numa, (block + 1) * BLOCK_FRAMES - 1), node);
}

static void test_one_node(void **state) {
        _cleanup_(numa_done) Numa numa = {};

        assert_int_equal(numa_read(system_dir, zoneinfo, &numa), 0); /* says nothing at all */
        assert_int_equal(numa.n_nodes, 1);
        assert_int_equal(numa_node_of(&numa, 12345), 0);
        begin_blocks(2); /* one has CPUs only */
        for (unsigned i = 0; i < 4; i++)
                put_block(1, i);
        assert_int_equal(numa_read(system_dir, zoneinfo, &numa), 0);
        assert_int_equal(numa.n_nodes, 1);
        assert_int_equal(numa.n, 0);
        assert_int_equal(numa_node_of(&numa, UINT64_MAX >> 12), 0);
}

static void test_blocks(void **state) {
        _cleanup_(numa_done) Numa numa = {};

        begin_blocks(3);
        for (unsigned i = 0; i < 24; i++)
                if (i != 7 && i != 20) /* a hole; a block that was taken out */
                        put_block(i < 10 || i >= 16 ? 0 : 1, i);
        put_block(0, 10); /* a border runs through it */
        for (unsigned i = 100; i < 102; i++)
                put_block(2, i);
        assert_int_equal(numa_read(system_dir, zoneinfo, &numa), 0);
        assert_int_equal(numa.n_nodes, 3);
        assert_int_equal(numa.n, 7);
        check_block(&numa, 0, 0);
        check_block(&numa, 6, 0);
        check_block(&numa, 7, NUMA_NODE_UNKNOWN);
        check_block(&numa, 9, 0);
        check_block(&numa, 10, NUMA_NODE_UNKNOWN);
        check_block(&numa, 11, 1);
        check_block(&numa, 15, 1);
        check_block(&numa, 16, 0);
        check_block(&numa, 20, NUMA_NODE_UNKNOWN);
        check_block(&numa, 23, 0);
        check_block(&numa, 24, NUMA_NODE_UNKNOWN);
        check_block(&numa, 101, 2);
        check_block(&numa, 5000, NUMA_NODE_UNKNOWN);

        put_block(1, 20); /* and came back elsewhere */
        assert_int_equal(numa_read(system_dir, zoneinfo, &numa), 0);
        check_block(&numa, 20, 1);
        check_block(&numa, 21, 0);
}

static void test_zones(void **state) {
        _cleanup_(numa_done) Numa numa = {};

        put("zoneinfo", "Node 0, zone      DMA\n  per-node stats\n      nr_inactive_anon 1\n  pages free     10\n"
                        "        spanned  4095\n        present  3998\n        managed  3840\n  start_pfn:           1\n"
                        "Node 0, zone   Normal\n        spanned  20000\n  start_pfn:           4096\n"
                        "Node 0, zone  Movable\n        spanned  0\n  start_pfn:           0\n"
                        "Node 1, zone   Normal\n        spanned  1000\n  start_pfn:           10000\n"
                        "Node 1, zone  Movable\n        spanned  5000\n  start_pfn:           24096\n");
        assert_int_equal(numa_read(system_dir, zoneinfo, &numa), 0);
        assert_int_equal(numa.n_nodes, 2);
        assert_int_equal(numa_node_of(&numa, 0), NUMA_NODE_UNKNOWN);
        assert_int_equal(numa_node_of(&numa, 1), 0);
        assert_int_equal(numa_node_of(&numa, 9999), 0);
        assert_int_equal(numa_node_of(&numa, 10000), 1); /* in the hole of node 0 */
        assert_int_equal(numa_node_of(&numa, 10999), 1);
        assert_int_equal(numa_node_of(&numa, 11000), 0);
        assert_int_equal(numa_node_of(&numa, 24095), 0);
        assert_int_equal(numa_node_of(&numa, 24096), 1);
        assert_int_equal(numa_node_of(&numa, 29095), 1);
        assert_int_equal(numa_node_of(&numa, 29096), NUMA_NODE_UNKNOWN);
        assert_int_equal(numa.n, 4);
}

/* This machine, whatever it is: every frame that we lie on belongs to a node that has memory. */
static void test_here(void **state) {
        _cleanup_(numa_done) Numa numa = {};
        _cleanup_close_ int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
        uint64_t entry = 0;
        static char page;

        page = 1;
        assert_int_equal(numa_read(NULL, NULL, &numa), 0);
        assert_true(numa.n_nodes >= 1);
        if (fd < 0 || pread(fd, &entry, sizeof entry, (off_t)((uintptr_t)&page / PAGE_BYTES * sizeof entry)) < 8)
                return;
        entry &= ((uint64_t)1 << 55) - 1;
        if (entry != 0)
                assert_int_not_equal(numa_node_of(&numa, entry), NUMA_NODE_UNKNOWN);
}

#define TEST(f) cmocka_unit_test_setup_teardown(f, setup, teardown)

int main(void) {
        const struct CMUnitTest tests[] = { TEST(test_one_node), TEST(test_blocks), TEST(test_zones), TEST(test_here) };

        return cmocka_run_group_tests(tests, NULL, NULL);
}
