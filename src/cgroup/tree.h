/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "base/util.h"

#include <sys/types.h>

/*
 * The host's cgroup v2 tree (the unified hierarchy, or the v2 mount of the hybrid layout): which cgroups exist, which
 * come and go (inotify: no polling), which processes they hold. Paths are relative to the root, without a leading
 * '/'; the root cgroup itself is "".
 */
typedef struct CgroupTree CgroupTree;

typedef void (*CgroupHandler)(void *userdata, const char *path, bool appeared /* else vanished */);

/* root NULL: found in /proc/self/mountinfo. -ENOENT: no cgroup v2 hierarchy is mounted. Reads the whole tree; the
 * handler is told of every cgroup found, here and later from cgroup_tree_dispatch(). */
int cgroup_tree_new(const char *root, CgroupHandler handler, void *userdata, CgroupTree **ret);
CgroupTree *cgroup_tree_free(CgroupTree *tree);
DEFINE_CLEANUP(CgroupTree, cgroup_tree_free)

const char *cgroup_tree_root(const CgroupTree *tree);
int cgroup_tree_fd(const CgroupTree *tree);     /* readable when something changed */
int cgroup_tree_dispatch(CgroupTree *tree);     /* a queue overflow is healed by reading the tree again */
/* Told again of every cgroup that exists now (after a reload of the configuration). */
int cgroup_tree_foreach(CgroupTree *tree, CgroupHandler handler, void *userdata);

/* The processes of one cgroup, without its descendants; the caller frees *ret. -ENOENT, -ENODEV: it is gone. Processes
 * outside our pid namespace (0 in the file) are left out. */
int cgroup_processes(const CgroupTree *tree, const char *path, pid_t **ret, size_t *ret_n);
/* Frozen now (v2 freezer of it or an ancestor); false when it cannot be told. */
bool cgroup_frozen(const CgroupTree *tree, const char *path);
/* The v2 cgroup of a process; the caller frees *ret. */
int cgroup_of_process(pid_t pid, char **ret);
