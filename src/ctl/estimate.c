/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Before anything is opted in: what would merging save? Reads the processes that are named, or those of the cgroups
 * that are named, or else those of the cgroups that the configuration opts in (dry-run included), and counts.
 */
#include "ctl/estimate-report.h"

#include "cgroup/policy.h"
#include "cgroup/tree.h"
#include "ctl/ctl.h"
#include "target/target.h"

#include <limits.h>
#include <string.h>

typedef struct Paths {
        char **paths;
        size_t n, allocated;
        int error;
} Paths;

static void paths_done(Paths *paths) {
        for (size_t i = 0; i < paths->n; i++)
                free(paths->paths[i]);
        free(paths->paths);
}

static void note_path(void *userdata, const char *path, bool appeared) {
        Paths *paths = userdata;
        char *copy;

        if (!appeared)
                return;
        copy = strdup(path);
        if (!copy || GROW(paths->paths, paths->n, paths->allocated) < 0) {
                free(copy);
                paths->error = -ENOMEM;
                return;
        }
        paths->paths[paths->n++] = copy;
}

static int add_item(EstimateReport *report, pid_t pid, unsigned group, bool include_dontdump) {
        for (size_t i = 0; i < report->n_items; i++)
                if (report->items[i].pid == pid)
                        return 0;
        if (GROW(report->items, report->n_items, report->items_allocated) < 0)
                return -ENOMEM;
        report->items[report->n_items++] =
                (EstimateItem) { .pid = pid, .group = group, .include_dontdump = include_dontdump };
        return 0;
}

static int add_group(EstimateReport *report, const char *path) {
        char *copy = NULL;

        if (path) {
                copy = strdup(path);
                if (!copy)
                        return -ENOMEM;
        }
        if (GROW(report->groups, report->n_groups, report->groups_allocated) < 0) {
                free(copy);
                return -ENOMEM;
        }
        report->groups[report->n_groups++] = copy;
        return 0;
}

/* The processes of one cgroup; nothing when it has none of its own, or went away. */
static int add_cgroup(EstimateReport *report, const CgroupTree *tree, const char *path, bool include_dontdump) {
        _cleanup_free_ pid_t *pids = NULL;
        size_t n;
        int r;

        if (cgroup_processes(tree, path, &pids, &n) < 0 || n == 0)
                return 0;
        r = add_group(report, path);
        for (size_t i = 0; i < n && r == 0; i++)
                r = add_item(report, pids[i], (unsigned)(report->n_groups - 1), include_dontdump);
        return r;
}

static bool is_below(const char *path, const char *top) {
        size_t n = strlen(top);

        return n == 0 || (strncmp(path, top, n) == 0 && (path[n] == 0 || path[n] == '/'));
}

/* A cgroup as people write it: with or without the mount point, with or without slashes at its ends. */
static char *plain_path(const CgroupTree *tree, const char *given) {
        const char *root = cgroup_tree_root(tree);
        char *path;

        if (strncmp(given, root, strlen(root)) == 0)
                given += strlen(root);
        while (*given == '/')
                given++;
        path = strdup(given);
        for (size_t n = path ? strlen(path) : 0; n > 0 && path[n - 1] == '/'; n--)
                path[n - 1] = 0;
        return path;
}

/* Whether it would be read, were the cgroup opted in. */
static bool takes_dontdump(const Conf *conf, const char *cgroup) {
        const ConfCgroup *section = conf ? policy_find(conf, cgroup) : NULL;

        return section && !section->malformed && section->include_dontdump;
}

static int add_named_cgroup(EstimateReport *report, const CgroupTree *tree, const Paths *paths, const Conf *conf,
                            const char *given) {
        _cleanup_free_ char *top = plain_path(tree, given);
        bool found = false;

        if (!top)
                return -ENOMEM;
        for (size_t i = 0; i < paths->n; i++) {
                int r;

                if (!is_below(paths->paths[i], top))
                        continue;
                found = true;
                r = add_cgroup(report, tree, paths->paths[i], takes_dontdump(conf, paths->paths[i]));
                if (r < 0)
                        return r;
        }
        if (!found)
                ctl_fail("%s: no such cgroup", given);
        return 0;
}

static int add_named_process(EstimateReport *report, const Conf *conf, pid_t pid) {
        _cleanup_free_ char *cgroup = NULL;

        return add_item(report, pid, 0, cgroup_of_process(pid, &cgroup) == 0 && takes_dontdump(conf, cgroup));
}

static void warn_of_conf(void *userdata, const char *file, unsigned line, const char *message) {
        if (line)
                ctl_fail("%s:%u: %s", file, line, message);
        else
                ctl_fail("%s: %s", file, message);
}

static int add_opted_in(EstimateReport *report, const CgroupTree *tree, const Paths *paths, const Conf *conf) {
        int r;

        for (size_t i = 0; i < paths->n; i++) {
                const ConfCgroup *section = policy_find(conf, paths->paths[i]);

                if (!section || section->merge == CONF_MERGE_NO)
                        continue;
                r = add_cgroup(report, tree, paths->paths[i], section->include_dontdump);
                if (r < 0)
                        return r;
        }
        if (!report->n_items)
                ctl_fail("the configuration opts no process in; name processes or cgroups to look at");
        return 0;
}

/* Reads the whole argument as a process id; 0: it is not one. */
static pid_t parse_pid(const char *text) {
        char *end;
        long value;

        if (!*text || strspn(text, "0123456789") != strlen(text))
                return 0;
        errno = 0;
        value = strtol(text, &end, 10);
        return errno || value > INT_MAX ? 0 : (pid_t)value;
}

static int collect(EstimateReport *report, char **names, const char *config) {
        _cleanup_(cgroup_tree_freep) CgroupTree *tree = NULL;
        _cleanup_(conf_freep) Conf *conf = NULL;
        _cleanup_(paths_done) Paths paths = {};
        bool cgroups = !*names;
        int r = conf_load("", config, warn_of_conf, NULL, &conf);

        if (r < 0 && !*names) {
                ctl_fail("the configuration cannot be read: %s", strerror(-r));
                return r;
        }
        if (r < 0) /* nothing but IncludeDontDump= is wanted of it */
                ctl_fail("the configuration cannot be read, DONTDUMP memory is left out: %s", strerror(-r));
        r = add_group(report, NULL);
        for (char **name = names; *name && r == 0; name++) {
                pid_t pid = parse_pid(*name);
                if (pid)
                        r = add_named_process(report, conf, pid);
                else
                        cgroups = true;
        }
        if (r < 0 || !cgroups)
                return r;
        r = cgroup_tree_new(NULL, note_path, &paths, &tree);
        if (r == 0)
                r = paths.error;
        if (r < 0) {
                ctl_fail("the cgroups cannot be read: %s", strerror(-r));
                return r;
        }
        if (!*names)
                return add_opted_in(report, tree, &paths, conf);
        for (char **name = names; *name && r == 0; name++)
                if (!parse_pid(*name))
                        r = add_named_cgroup(report, tree, &paths, conf, *name);
        return r;
}

/* Pages that merging would never get at are not counted; who is merely stopped or young now is. */
static bool is_left_out(TargetSkip skip) {
        return skip == TARGET_SKIP_SELF || skip == TARGET_SKIP_KERNEL_THREAD || skip == TARGET_SKIP_ZOMBIE ||
               skip == TARGET_SKIP_COMPAT32 || skip == TARGET_SKIP_NOT_DUMPABLE || skip == TARGET_SKIP_SHADOW_STACK ||
               skip == TARGET_SKIP_DENIED;
}

static void leave_out(EstimateItem *item, const char *why) {
        item->why = why;
        ctl_fail("process %d is left out: %s", item->pid, why);
}

static int read_item(EstimateReport *report, EstimateItem *item) {
        _cleanup_(target_freep) Target *target = NULL;
        TargetSkip skip;
        bool ask;
        int r;

        r = target_new(item->pid, &target);
        if (r == 0) {
                memcpy(item->comm, target->comm, sizeof item->comm);
                r = target_inspect(target, 0, &skip, &ask);
        }
        if (r == 0 && is_left_out(skip)) {
                leave_out(item, target_skip_name(skip));
                return 0;
        }
        if (r == 0)
                r = estimate_add(report->estimate, target, item->include_dontdump, item->group, &item->process);
        item->counted = r == 0;
        if (r == TARGET_E_GONE)
                leave_out(item, target ? "ended while it was being read" : "no such process");
        else if (r == TARGET_E_DENIED || r == -EPERM || r == -EACCES)
                leave_out(item, "the kernel does not let us read it");
        else if (r < 0 && r != -ENOMEM)
                leave_out(item, strerror(-r));
        return r == -ENOMEM ? r : 0;
}

static int count(EstimateReport *report, char **names, const char *config) {
        size_t n_counted = 0;
        int r = estimate_new(&report->estimate);

        if (r == -EPERM || r == -EACCES) {
                ctl_fail("reading the memory of processes takes root (CAP_SYS_ADMIN, CAP_SYS_PTRACE)");
                return r;
        }
        if (r == 0)
                r = collect(report, names, config);
        for (size_t i = 0; i < report->n_items && r == 0; i++) {
                r = read_item(report, &report->items[i]);
                n_counted += report->items[i].counted;
        }
        if (r == 0)
                r = estimate_finish(report->estimate);
        if (r == -ENOMEM)
                ctl_fail("out of memory");
        /* What was named and is not there has been said. */
        return r == 0 && n_counted == 0 && *names ? -ESRCH : r;
}

int command_estimate(const Ctl *ctl, int argc, char **argv) {
        _cleanup_(estimate_report_done) EstimateReport report = {};

        if (count(&report, argv, ctl->config) < 0)
                return CTL_FAILED;
        if (ctl->json)
                return estimate_report_json(&report);
        estimate_report_table(&report);
        return CTL_DONE;
}
