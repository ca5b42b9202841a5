/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "conf/conf-table.h"
#include "conf/conf-value.h"
#include "conf/conf.h"

#include <limits.h>
#include <string.h>
#include <sys/un.h>

/*
 * Defaults are written as they would be in a file and take the same way in, so the manual, the shipped file and the
 * built-in values can be compared as text. A key is added here, in ksmd-user.conf and in ksmd-user.conf(5), and nowhere
 * else.
 */

#define FIELD(type, key, base) ((type *)(void *)((char *)(base) + (key)->offset))

static int in_range(const ConfKey *key, uint64_t value) {
        return value >= key->min && value <= key->max ? 0 : -ERANGE;
}

static int parse_time(const ConfKey *key, const char *value, void *base) {
        uint64_t nsec;
        int r = conf_value_time(value, &nsec);

        if (r == 0)
                r = in_range(key, nsec);
        if (r == 0)
                *FIELD(uint64_t, key, base) = nsec;
        return r;
}

static int parse_share(const ConfKey *key, const char *value, void *base) {
        uint32_t share;
        int r = conf_value_share(value, &share);

        if (r == 0)
                r = in_range(key, share);
        if (r == 0)
                *FIELD(uint32_t, key, base) = share;
        return r;
}

static int parse_share_or_auto(const ConfKey *key, const char *value, void *base) {
        if (strcmp(value, "auto") != 0)
                return parse_share(key, value, base);
        *FIELD(uint32_t, key, base) = 0;
        return 0;
}

static int parse_number(const ConfKey *key, const char *value, void *base) {
        uint64_t number;
        int r = conf_value_number(value, &number);

        if (r == 0)
                r = in_range(key, number);
        if (r == 0)
                *FIELD(uint32_t, key, base) = (uint32_t)number;
        return r;
}

static int parse_number_or_auto(const ConfKey *key, const char *value, void *base) {
        if (strcmp(value, "auto") != 0)
                return parse_number(key, value, base);
        *FIELD(uint32_t, key, base) = 0;
        return 0;
}

static int parse_boolean(const ConfKey *key, const char *value, void *base) {
        return conf_value_boolean(value, FIELD(bool, key, base));
}

static int parse_switch(const ConfKey *key, const char *value, void *base) {
        bool on = false;
        bool automatic = strcmp(value, "auto") == 0;
        int r = automatic ? 0 : conf_value_boolean(value, &on);

        if (r == 0)
                *FIELD(ConfSwitch, key, base) = automatic ? CONF_AUTO : on ? CONF_YES : CONF_NO;
        return r;
}

static const char *const merge_names[] = {
        [CONF_MERGE_NO] = "no",
        [CONF_MERGE_DRY_RUN] = "dry-run",
        [CONF_MERGE_YES] = "yes",
};

static int parse_merge(const ConfKey *key, const char *value, void *base) {
        bool on = false;
        bool dry_run = strcmp(value, merge_names[CONF_MERGE_DRY_RUN]) == 0;
        int r = dry_run ? 0 : conf_value_boolean(value, &on);

        if (r == 0)
                *FIELD(ConfMerge, key, base) = dry_run ? CONF_MERGE_DRY_RUN : on ? CONF_MERGE_YES : CONF_MERGE_NO;
        return r;
}

static const char *const route_names[] = {
        [CONF_ROUTE_AUTO] = "auto",
        [CONF_ROUTE_ADVISE] = "advise",
        [CONF_ROUTE_REMAP] = "remap",
        [CONF_ROUTE_ZERO] = "zero",
};

static const char *const on_stop_names[] = {
        [CONF_ON_STOP_KEEP] = "keep",
        [CONF_ON_STOP_UNMERGE] = "unmerge",
};

static int name_index(const char *const *names, size_t n, const char *value, unsigned *ret) {
        for (unsigned i = 0; i < n; i++)
                if (strcmp(names[i], value) == 0) {
                        *ret = i;
                        return 0;
                }
        return -EINVAL;
}

static int parse_route(const ConfKey *key, const char *value, void *base) {
        unsigned i;
        int r = name_index(route_names, ELEMENTSOF(route_names), value, &i);

        if (r == 0)
                *FIELD(ConfRoute, key, base) = (ConfRoute)i;
        return r;
}

static int parse_on_stop(const ConfKey *key, const char *value, void *base) {
        unsigned i;
        int r = name_index(on_stop_names, ELEMENTSOF(on_stop_names), value, &i);

        if (r == 0)
                *FIELD(ConfOnStop, key, base) = (ConfOnStop)i;
        return r;
}

static void clear_string(void *field) {
        char **string = field;

        free(*string);
        *string = NULL;
}

static int store_string(const ConfKey *key, const char *value, void *base) {
        char *copy = strdup(value);

        if (!copy)
                return -ENOMEM;
        clear_string(FIELD(char *, key, base));
        *FIELD(char *, key, base) = copy;
        return 0;
}

static int parse_socket(const ConfKey *key, const char *value, void *base) {
        if (value[0] != '/' || strlen(value) >= sizeof((struct sockaddr_un *)0)->sun_path)
                return -EINVAL;
        return store_string(key, value, base);
}

static int parse_metadata(const ConfKey *key, const char *value, void *base) {
        ConfDaemon *daemon = base;
        uint64_t bytes = 0;
        int r;

        if (value[strlen(value) - 1] == '%')
                r = parse_share(key, value, base);
        else {
                r = conf_value_size(value, &bytes);
                if (r == 0 && bytes < ((uint64_t)1 << 20))
                        r = -ERANGE;
        }
        if (r == 0)
                daemon->metadata_max_bytes = bytes;
        return r;
}

/* "%c" and "%%" are all that '%' may introduce. */
static int parse_domain(const ConfKey *key, const char *value, void *base) {
        if (strlen(value) > NAME_MAX || strpbrk(value, " \t"))
                return -EINVAL;
        for (const char *p = strchr(value, '%'); p; p = strchr(p + 2, '%'))
                if (p[1] != 'c' && p[1] != '%')
                        return -EINVAL;
        return store_string(key, value, base);
}

static void clear_patterns(void *field) {
        char ***patterns = field;

        for (char **p = *patterns; p && *p; p++)
                free(*p);
        free(*patterns);
        *patterns = NULL;
}

/* Patterns, separated by space; they add to those given before. */
static int parse_patterns(const ConfKey *key, const char *value, void *base) {
        char ***field = FIELD(char **, key, base);

        for (const char *p = value; *p; p += strspn(p, " \t")) {
                size_t n = 0, size = 0;
                char *pattern;
                char **grown;

                for (; p[size] && p[size] != ' ' && p[size] != '\t'; size++)
                        if (p[size] == '\\' && p[size + 1])
                                size++;
                pattern = strndup(p + (*p == '/'), size - (*p == '/'));
                if (!pattern)
                        return -ENOMEM;
                if (conf_pattern_problem(pattern)) {
                        free(pattern);
                        return -EINVAL;
                }
                while (*field && (*field)[n])
                        n++;
                grown = reallocarray(*field, n + 2, sizeof *grown);
                if (!grown) {
                        free(pattern);
                        return -ENOMEM;
                }
                grown[n] = pattern;
                grown[n + 1] = NULL;
                *field = grown;
                p += size;
        }
        return 0;
}

#define KEY(scope_, type, name_, parse_, field, initial_, ...) \
        { .scope = scope_, .name = name_, .parse = parse_, .offset = offsetof(type, field), .initial = initial_, \
          .expected = __VA_ARGS__ }
#define DAEMON(...) KEY(CONF_SCOPE_DAEMON, ConfDaemon, __VA_ARGS__)
#define CGROUP(...) KEY(CONF_SCOPE_CGROUP, ConfCgroup, __VA_ARGS__)
#define RANGE(min_, max_) .min = min_, .max = max_
#define OWNED(clear_) .clear = clear_
#define YES_NO "yes or no"
#define WEEK (7 * 86400 * NSEC_PER_SEC)

static const ConfKey keys[] = {
        DAEMON("Socket", parse_socket, socket, "/run/ksmd-user/org.ksmduser.Daemon",
               "an absolute path of at most 107 bytes", OWNED(clear_string)),
        DAEMON("ScanInterval", parse_time, scan_interval_nsec, "10s", "a time like 10s, from 10ms to 1w",
               RANGE(10 * NSEC_PER_MSEC, WEEK)),
        DAEMON("CPUQuota", parse_share, cpu_quota, "10%", "a share of one CPU like 10%, above 0%", RANGE(1, UINT32_MAX)),
        DAEMON("CPUQuotaBusy", parse_share_or_auto, cpu_quota_busy, "auto",
               "auto or a share of CPUQuota= like 30%, above 0% and up to 100%",
               RANGE(1, CONF_SHARE_ONE)),
        DAEMON("ScanThreads", parse_number, scan_threads, "1", "a number from 1 to 1024", RANGE(1, 1024)),
        DAEMON("MaxPageSharing", parse_number_or_auto, max_page_sharing, "256", "auto or a number from 2 to 2147483647",
               RANGE(2, INT_MAX)), /* what mm/ksm.c takes for max_page_sharing */
        DAEMON("MaxRmapWalk", parse_time, max_rmap_walk_nsec, "1ms", "a time like 1ms, from 1us to 1s",
               RANGE(NSEC_PER_USEC, NSEC_PER_SEC)),
        DAEMON("MergeAcrossNodes", parse_boolean, merge_across_nodes, "yes", YES_NO),
        DAEMON("MinimumAge", parse_time, minimum_age_nsec, "5s", "a time like 5s, up to 1w", RANGE(0, WEEK)),
        DAEMON("MetadataMax", parse_metadata, metadata_max, "1%",
               "a share of memory like 1%, above 0% and up to 100%, or a size like 64M, from 1M", RANGE(1, CONF_SHARE_ONE)),
        DAEMON("Probes", parse_switch, probes, "auto", "auto, yes or no"),
        DAEMON("Judgement", parse_boolean, judgement, "yes", YES_NO),
        DAEMON("PayBack", parse_time, pay_back_nsec, "1min", "a time like 1min, from 1s to 1w", RANGE(NSEC_PER_SEC, WEEK)),
        DAEMON("BreakQuota", parse_share, break_quota, "1%", "a share of one CPU like 1%, above 0%",
               RANGE(1, UINT32_MAX)),
        DAEMON("StopQuota", parse_share, stop_quota, "0.5%", "a share of the time like 0.5%, above 0% and up to 100%",
               RANGE(1, CONF_SHARE_ONE)),
        DAEMON("OnStop", parse_on_stop, on_stop, "keep", "keep or unmerge"),

        CGROUP("Merge", parse_merge, merge, "no", "no, yes or dry-run"),
        CGROUP("Domain", parse_domain, domain, NULL,
               "a name without spaces of at most 255 bytes, with no % but %c and %%", OWNED(clear_string)),
        CGROUP("Route", parse_route, route, "auto", "auto, advise, remap or zero"),
        CGROUP("TrustedTogether", parse_boolean, trusted_together, "no", YES_NO),
        CGROUP("Track", parse_switch, track, "auto", "auto, yes or no"),
        CGROUP("MinimumRun", parse_number, minimum_run_pages, "1", "a number of pages from 1 to 262144",
               RANGE(1, 1 << 18)),
        CGROUP("HugePageSplit", parse_share, huge_page_split, "25%", "a share like 25%, up to 100%",
               RANGE(0, CONF_SHARE_ONE)),
        CGROUP("IncludeDontDump", parse_boolean, include_dontdump, "no", YES_NO),
        CGROUP("Exclude", parse_patterns, exclude, NULL,
               "cgroup patterns without brackets, braces or empty components, and \\\\ for a backslash",
               OWNED(clear_patterns)),
};

const ConfKey *conf_keys(size_t *ret_n) {
        *ret_n = ELEMENTSOF(keys);
        return keys;
}

const ConfKey *conf_key_find(ConfScope scope, const char *name) {
        for (size_t i = 0; i < ELEMENTSOF(keys); i++)
                if (keys[i].scope == scope && strcmp(keys[i].name, name) == 0)
                        return &keys[i];
        return NULL;
}

int conf_key_set(const ConfKey *key, const char *value, void *base) {
        if (*value)
                return key->parse(key, value, base);
        if (key->initial)
                return key->parse(key, key->initial, base);
        key->clear(FIELD(void, key, base));
        return 0;
}

int conf_section_init(ConfScope scope, void *base) {
        for (size_t i = 0; i < ELEMENTSOF(keys); i++)
                if (keys[i].scope == scope) {
                        int r = conf_key_set(&keys[i], "", base);
                        if (r < 0)
                                return r;
                }
        return 0;
}

void conf_section_done(ConfScope scope, void *base) {
        for (size_t i = 0; i < ELEMENTSOF(keys); i++)
                if (keys[i].scope == scope && keys[i].clear)
                        keys[i].clear(FIELD(void, &keys[i], base));
}

const char *conf_merge_name(ConfMerge merge) { return merge_names[merge]; }

const char *conf_route_name(ConfRoute route) { return route_names[route]; }
