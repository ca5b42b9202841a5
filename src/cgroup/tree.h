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

/* root NULL: found in /proc/self/mountinfo. -ENOENT: no cgroup v2 hierarchy is mounted (there). -ENOSPC: there are more
 * cgroups than the sysctl fs.inotify.max_user_watches allows watching. Reads the whole tree; the handler is told of
 * every cgroup found, here and later from cgroup_tree_dispatch(): of a parent before its children, of the end of
 * children before their parent's. It may ask cgroup_processes() and the like, but not dispatch or free the tree. */
int cgroup_tree_new(const char *root, CgroupHandler handler, void *userdata, CgroupTree **ret);
CgroupTree *cgroup_tree_free(CgroupTree *tree);
DEFINE_CLEANUP(CgroupTree, cgroup_tree_free)

const char *cgroup_tree_root(const CgroupTree *tree);
int cgroup_tree_fd(const CgroupTree *tree);     /* readable when something changed */
/* Tells the handler of what happened since, for some milliseconds: whoever makes cgroups may do so faster than they can be
 * watched, and the descriptor stays readable. A queue overflow is healed by reading the tree again. 0; -errno: some
 * cgroup could not be watched (-ENOSPC) or the hierarchy was unmounted (-ENODEV); the rest goes on, and the next call
 * reads the whole tree again to find what was missed. */
int cgroup_tree_dispatch(CgroupTree *tree);
/* Told again of every cgroup that exists now (after a reload of the configuration). */
void cgroup_tree_foreach(CgroupTree *tree, CgroupHandler handler, void *userdata);

/* The processes of one cgroup, without its descendants, each once, ascending; the caller frees *ret. -ENOENT, -ENODEV:
 * it is gone. Processes outside our pid namespace (0 in the file) are left out; a threaded cgroup holds threads of
 * processes that its domain's cgroup lists, and none of its own. */
int cgroup_processes(const CgroupTree *tree, const char *path, pid_t **ret, size_t *ret_n);
/* The number that the kernel has for the cgroup (bpf_get_current_cgroup_id(), the inode of its directory). -errno. */
int cgroup_id(const CgroupTree *tree, const char *path, uint64_t *ret);
/* Frozen now (v2 freezer of it or an ancestor); false when it cannot be told. */
bool cgroup_frozen(const CgroupTree *tree, const char *path);
/* The v2 cgroup of a process; the caller frees *ret. -ENOENT, -ESRCH: no such process. -EXDEV: the cgroup is outside
 * our cgroup namespace. A zombie's may be gone (the kernel then adds " (deleted)"): no such path is in the tree. */
int cgroup_of_process(pid_t pid, char **ret);

/* Where a line of /proc/PID/mountinfo says that cgroup2 is mounted, unescaped, the caller frees *ret. -ENOENT: it is of
 * another kind; -EINVAL: it is no such line. */
int cgroup_mount_of_line(const char *line, char **ret);
/* The mount point of the v2 hierarchy that we see. -ENOENT. */
int cgroup_find_root(char **ret);
