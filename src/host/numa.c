/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Memory blocks in sysfs (Documentation/admin-guide/mm/memory-hotplug.rst) are exact: each of block_size_bytes, linked
 * from the node it belongs to, or from two where a border runs through it; who lies in such a block is not told.
 * Zones (/proc/zoneinfo) only tell from where to where, holes included, and a node's memory may lie in the hole of
 * another's: there the smaller one is believed.
 */
#include "host/numa.h"

#include "base/io.h"

#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>

static unsigned node_number(unsigned long node) { return (unsigned)(node % NUMA_NODE_UNKNOWN); }

static int add(Numa *numa, uint64_t first, uint64_t end, unsigned node) {
        if (GROW(numa->ranges, numa->n, numa->allocated) < 0)
                return -ENOMEM;
        numa->ranges[numa->n++] = (NumaRange){ first, end, node };
        return 0;
}

static int compare_claims(const void *a, const void *b) {
        const NumaRange *x = a, *y = b;

        if (x->first != y->first)
                return x->first < y->first ? -1 : 1;
        return x->end < y->end ? 1 : x->end > y->end ? -1 : 0; /* the larger one first */
}

/* Blocks of equal size: neighbours of one node become one; what two nodes claim is nobody's. */
static void join_blocks(Numa *numa) {
        size_t n = 0;

        qsort(numa->ranges, numa->n, sizeof *numa->ranges, compare_claims);
        for (size_t i = 0; i < numa->n; i++) {
                NumaRange range = numa->ranges[i], *last = n > 0 ? &numa->ranges[n - 1] : NULL;

                for (; i + 1 < numa->n && numa->ranges[i + 1].first == range.first; i++)
                        if (numa->ranges[i + 1].node != range.node)
                                range.node = NUMA_NODE_UNKNOWN;
                if (last && last->end == range.first && last->node == range.node)
                        last->end = range.end;
                else
                        numa->ranges[n++] = range;
        }
        numa->n = n;
}

/* The blocks that nodeN/ links to. */
static int add_node_blocks(Numa *numa, int system, const char *name, uint64_t block_frames) {
        unsigned long node = strtoul(name + strlen("node"), NULL, 10);
        size_t before = numa->n;
        _cleanup_closedir_ DIR *directory = NULL;
        char path[64];
        int r;

        snprintf(path, sizeof path, "node/node%lu", node);
        r = open_directory(system, path, &directory);
        if (r < 0)
                return r;
        for (const struct dirent *entry; r == 0 && (entry = readdir(directory));) {
                unsigned long long block;
                int end = 0;

                if (sscanf(entry->d_name, "memory%llu%n", &block, &end) == 1 && entry->d_name[end] == 0)
                        r = add(numa, block * block_frames, (block + 1) * block_frames, node_number(node));
        }
        numa->n_nodes += numa->n > before;
        return r;
}

static int read_blocks(int system, Numa *numa) {
        _cleanup_free_ char *text = NULL;
        _cleanup_closedir_ DIR *directory = NULL;
        uint64_t block_frames;
        int r;

        r = read_file(system, "memory/block_size_bytes", &text, NULL);
        if (r < 0)
                return r;
        block_frames = strtoull(text, NULL, 16) / PAGE_BYTES;
        if (block_frames == 0)
                return -EBADMSG;
        r = open_directory(system, "node", &directory);
        if (r < 0)
                return r;
        for (const struct dirent *entry; r == 0 && (entry = readdir(directory));)
                if (strncmp(entry->d_name, "node", 4) == 0 && entry->d_name[4] >= '0' && entry->d_name[4] <= '9')
                        r = add_node_blocks(numa, system, entry->d_name, block_frames);
        if (r == 0 && numa->n == 0)
                return -ENOENT;
        join_blocks(numa);
        return r;
}

/* Ranges that lie within one another become disjoint: the inner one is cut out of the outer one. */
static int nest_zones(Numa *numa) {
        _cleanup_(numa_done) Numa flat = { .n_nodes = numa->n_nodes };
        uint64_t at = 0;
        int r = 0;

        qsort(numa->ranges, numa->n, sizeof *numa->ranges, compare_claims);
        for (uint64_t next; r == 0; at = next) {
                const NumaRange *inner = NULL;

                next = UINT64_MAX;
                for (size_t i = 0; i < numa->n; i++) {
                        const NumaRange *range = &numa->ranges[i];

                        if (range->first > at)
                                next = MIN_OF(next, range->first);
                        else if (range->end > at) {
                                next = MIN_OF(next, range->end);
                                if (!inner || range->end - range->first < inner->end - inner->first)
                                        inner = range;
                        }
                }
                if (next == UINT64_MAX)
                        break;
                if (!inner)
                        continue;
                if (flat.n > 0 && flat.ranges[flat.n - 1].end == at && flat.ranges[flat.n - 1].node == inner->node)
                        flat.ranges[flat.n - 1].end = next;
                else
                        r = add(&flat, at, next, inner->node);
        }
        if (r < 0)
                return r;
        numa_done(numa);
        *numa = flat;
        flat = (Numa){};
        return 0;
}

static int read_zones(const char *zoneinfo, Numa *numa) {
        _cleanup_free_ char *text = NULL;
        unsigned long node = 0, last_node = ULONG_MAX;
        unsigned long long spanned = 0, first;
        char *rest;
        int r;

        r = read_file(AT_FDCWD, zoneinfo, &text, NULL);
        if (r < 0)
                return r;
        for (char *line = strtok_r(text, "\n", &rest); line; line = strtok_r(NULL, "\n", &rest)) {
                if (sscanf(line, "Node %lu, zone", &node) == 1)
                        spanned = 0;
                (void)sscanf(line, " spanned %llu", &spanned);
                if (sscanf(line, " start_pfn: %llu", &first) != 1 || spanned == 0)
                        continue;
                r = add(numa, first, first + spanned, node_number(node));
                if (r < 0)
                        return r;
                numa->n_nodes += node != last_node;
                last_node = node;
        }
        return nest_zones(numa);
}

int numa_read(const char *system, const char *zoneinfo, Numa *ret) {
        _cleanup_(numa_done) Numa numa = {};
        _cleanup_close_ int fd = open(system ?: "/sys/devices/system", O_PATH | O_DIRECTORY | O_CLOEXEC);
        int r = fd < 0 ? -errno : read_blocks(fd, &numa);

        if (r < 0 && r != -ENOMEM) {
                numa_done(&numa);
                r = read_zones(zoneinfo ?: "/proc/zoneinfo", &numa);
        }
        if (r < 0 && r != -ENOENT)
                return r;
        if (numa.n_nodes <= 1) {
                numa_done(&numa);
                numa.n_nodes = 1;
        }
        numa_done(ret);
        *ret = numa;
        numa = (Numa){};
        return 0;
}

void numa_done(Numa *numa) {
        free(numa->ranges);
        *numa = (Numa){};
}

unsigned numa_node_of(const Numa *numa, uint64_t pfn) {
        size_t i;

        if (numa->n_nodes <= 1)
                return 0;
        i = FIRST_BEHIND(numa->ranges, numa->n, pfn);
        return i < numa->n && numa->ranges[i].first <= pfn ? numa->ranges[i].node : NUMA_NODE_UNKNOWN;
}
