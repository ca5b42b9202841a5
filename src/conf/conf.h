/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "base/util.h"

/*
 * The configuration: what /etc/ksmd-user.conf and its drop-ins say (names, defaults and syntax: ksmd-user.conf(5)).
 * A Conf is immutable once loaded; a reload loads a second one whole and the manager swaps.
 */

typedef enum ConfMerge { CONF_MERGE_NO, CONF_MERGE_DRY_RUN, CONF_MERGE_YES } ConfMerge;
typedef enum ConfRoute { CONF_ROUTE_AUTO, CONF_ROUTE_ADVISE, CONF_ROUTE_REMAP, CONF_ROUTE_ZERO } ConfRoute;
typedef enum ConfSwitch { CONF_AUTO, CONF_YES, CONF_NO } ConfSwitch;
typedef enum ConfOnStop { CONF_ON_STOP_KEEP, CONF_ON_STOP_UNMERGE } ConfOnStop;

/* Shares are in 1/10,000 (5 % = 500). */
typedef struct ConfDaemon {
        char *socket;                   /* absolute path */
        uint64_t scan_interval_nsec;    /* between the starts of two passes */
        uint32_t cpu_quota;             /* share of one CPU, may exceed 10,000 */
        uint32_t cpu_quota_busy;        /* share of cpu_quota, while everybody else leaves hardly a CPU; 0 = auto */
        uint32_t scan_threads;
        uint32_t max_page_sharing;      /* 0 = auto */
        uint64_t max_rmap_walk_nsec;    /* what auto keeps a walk over a merged page's mappings below */
        bool merge_across_nodes;
        uint64_t minimum_age_nsec;      /* younger processes are left alone */
        uint32_t metadata_max;          /* share of the host's memory; counts only while the next field is 0 */
        uint64_t metadata_max_bytes;    /* given as a size; 0 = given as a share */
        ConfSwitch probes;
        bool judgement;                 /* pages whose merges break too soon are left alone */
        uint64_t pay_back_nsec;         /* so soon */
        uint32_t break_quota;           /* share of one CPU that breaks may cost */
        uint32_t stop_quota;            /* share of the time for which a process that runs may be stopped */
        ConfOnStop on_stop;
} ConfDaemon;

/* A pattern, of a section or of Exclude=, has at most this many bytes. */
#define CONF_PATTERN_BYTES_MAX 4095U

/* One [Cgroup PATTERN] section. */
typedef struct ConfCgroup {
        char *pattern;                  /* relative to the cgroup root, no leading '/'; "" = the root cgroup */
        ConfMerge merge;
        char *domain;                   /* as written, "%c" and "%%" not expanded; default: the pattern (% doubled) */
        ConfRoute route;
        bool trusted_together;          /* Route=remap: its cgroups may share a pool with others of the domain */
        ConfSwitch track;
        uint32_t minimum_run_pages;
        uint32_t huge_page_split;       /* share of a huge page's 512 pages that must be saved to split it */
        bool include_dontdump;
        char **exclude;                 /* patterns, NULL-terminated; NULL = none */
        bool malformed;                 /* something in the section was wrong: merge is forced to CONF_MERGE_NO */
        char *file;                     /* where the section first appeared */
        unsigned line;
} ConfCgroup;

typedef struct Conf {
        ConfDaemon daemon;
        ConfCgroup *cgroups;            /* in the order of their first appearance: the first match wins */
        size_t n_cgroups;
        unsigned n_warnings;
} Conf;

/* Told of everything wrong with a file; line is 0 where the file as a whole is meant. The message says what follows
 * from it. A section header that cannot be understood might have been any section's: every section is then malformed. */
typedef void (*ConfReport)(void *userdata, const char *file, unsigned line, const char *message);

/*
 * Loads main_path (NULL: /etc/ksmd-user.conf; a missing default file is no error, a missing given one is) and the
 * drop-ins ksmd-user.conf.d/[*].conf of /usr/lib, /run and /etc below root ("" for the real one), systemd's precedence:
 * by file name, a name in /etc hides the same in /run hides /usr/lib. When main_path is given, its own
 * "<main_path>.d" is used instead of the three. Owned by the caller: conf_free().
 * -errno: a file could not be read; -ENOMEM. Bad content is never an error: it is reported and counted.
 */
int conf_load(const char *root, const char *main_path, ConfReport report, void *userdata, Conf **ret);
Conf *conf_free(Conf *conf);
DEFINE_CLEANUP(Conf, conf_free)

/* Whether each of the section's cgroups is a domain of its own (Domain= with %c). */
bool conf_domain_is_each(const ConfCgroup *section);

const char *conf_merge_name(ConfMerge merge);
const char *conf_route_name(ConfRoute route);
