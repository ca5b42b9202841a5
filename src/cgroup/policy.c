/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "cgroup/policy.h"

#include <stdio.h>
#include <string.h>

/*
 * Which section a cgroup falls under. fnmatch(3) knows no '**', and backtracks: a pattern with many stars can take it
 * exponential time. Here the pattern is an automaton run over the path, all its states at once: pattern bytes × path
 * bytes steps, whatever they hold (names of cgroups are chosen by the tenants).
 */

/* The states are the places in the pattern reached so far; at[size] is its end. Stars are passed over at no cost. */
typedef struct States {
        bool at[CONF_PATTERN_BYTES_MAX + 1];
} States;

static size_t star_size(const char *p) { return p[1] == '*' ? 2 : 1; }

/* A state that is set already has had the stars behind it passed over too: that keeps a step linear in the pattern. */
static void states_enter(States *states, const char *pattern, size_t i) {
        while (!states->at[i]) {
                states->at[i] = true;
                if (pattern[i] == '*')
                        i += star_size(pattern + i);
        }
}

/* One character of the path; false: there is no state left. */
static bool states_step(const States *from, const char *pattern, size_t size, char c, States *to) {
        bool any = false;

        memset(to->at, 0, size + 1);
        for (size_t i = 0; i < size; i++) {
                const char *p = pattern + i;
                size_t next = i + 1;

                if (!from->at[i])
                        continue;
                if (*p == '*') {
                        if (c == '/' && star_size(p) == 1)
                                continue;
                        next = i;
                } else if (*p == '?') {
                        if (c == '/')
                                continue;
                } else if (*p == '\\') {
                        if (p[1] != c)
                                continue;
                        next = i + 2;
                } else if (*p != c)
                        continue;
                states_enter(to, pattern, next);
                any = true;
        }
        return any;
}

bool cgroup_pattern_match(const char *pattern, const char *path) {
        States states[2];
        unsigned now = 0;
        size_t size;

        if (*pattern == '/')
                pattern++;
        size = strlen(pattern);
        if (size > CONF_PATTERN_BYTES_MAX)
                return false;
        memset(states[now].at, 0, size + 1);
        states_enter(&states[now], pattern, 0);
        for (; *path; path++, now ^= 1)
                if (!states_step(&states[now], pattern, size, *path, &states[now ^ 1]))
                        return false;
        return states[now].at[size];
}

static bool excluded(const ConfCgroup *section, const char *path) {
        for (char **pattern = section->exclude; pattern && *pattern; pattern++)
                if (cgroup_pattern_match(*pattern, path))
                        return true;
        return false;
}

const ConfCgroup *policy_find(const Conf *conf, const char *path) {
        for (size_t i = 0; i < conf->n_cgroups; i++) {
                const ConfCgroup *section = &conf->cgroups[i];

                if (cgroup_pattern_match(section->pattern, path) && !excluded(section, path))
                        return section;
        }
        return NULL;
}

int policy_domain(const ConfCgroup *section, const char *path, char **ret) {
        _cleanup_free_ char *name = NULL;
        size_t size;
        FILE *f = open_memstream(&name, &size);

        if (!f)
                return -ENOMEM;
        for (const char *p = section->domain; *p; p++)
                if (*p == '%' && p[1] == 'c') {
                        fputs(*path ? path : "/", f);
                        p++;
                } else {
                        fputc(*p, f);
                        p += *p == '%' && p[1] == '%';
                }
        if (fclose(f) != 0)
                return -ENOMEM;
        *ret = TAKE_PTR(name);
        return 0;
}

void policy_trust_add(PolicyTrust *trust, const ConfCgroup *section, const char *path) {
        trust->several |= trust->path && strcmp(trust->path, path) != 0;
        trust->doubted |= !section->trusted_together;
        trust->path = trust->path ?: path;
}

const char *policy_trust_problem(const PolicyTrust *trust, bool shmem_denied) {
        if (shmem_denied || !trust->several || !trust->doubted)
                return NULL;
        return "several cgroups would share a pool, and may not trust each other: TrustedTogether=yes if they do, Domain=%c "
               "for one pool each, or \"deny\" in /sys/kernel/mm/transparent_hugepage/shmem_enabled";
}

const char *policy_nodes_problem(const Conf *conf, unsigned n_nodes) {
        if (conf->daemon.merge_across_nodes || n_nodes <= 1)
                return NULL;
        return "route remap cannot keep NUMA nodes apart (MergeAcrossNodes=no)";
}
