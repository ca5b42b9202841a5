/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * All counters as OpenMetrics text (https://prometheus.io/docs/specs/om/open_metrics_spec), for a collector that runs
 * commands (Telegraf's exec) or reads files (node_exporter's textfile). The daemon itself opens no port.
 *
 * One family for each counter and kind of thing: ksmd_user_saved_bytes of the daemon, of a domain
 * ksmd_user_domain_saved_bytes{domain,merge,own}, of a cgroup ksmd_user_cgroup_saved_bytes{cgroup,domain}. They are not one
 * family with more labels: its sum would count everything three times. Times are in seconds, shares are ratios, what
 * only grows is a counter. Types that the older text format of Prometheus does not know (info) are not used, so that
 * its readers take this, too.
 */

#include "ctl/ctl.h"
#include "ctl/reply.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#define PREFIX "ksmd_user_"

typedef enum Unit { PLAIN, BYTES, SECONDS, RATIO } Unit;

typedef struct Metric {
        const char *field, *name;
        Unit unit;
        bool counter;
        const char *help;
} Metric;

static const Metric page_metrics[] = {
        { "bytes_saved", "saved", BYTES, false, "Memory that would be in use without merging." },
        { "metadata_bytes", "metadata", BYTES, false, "What the daemon's and the kernel's own records take." },
        { "general_profit_bytes", "profit", BYTES, false, "Saved memory less metadata." },
        { "pages_shared", "pages_shared", PLAIN, false, "Distinct contents that are kept." },
        { "pages_sharing", "pages_sharing", PLAIN, false, "Pages saved: they map another page's frame." },
        { "pages_zero", "pages_zero", PLAIN, false, "Pages that map the zero page." },
        { "pages_unshared", "pages_unshared", PLAIN, false, "Pages without a twin." },
        { "pages_volatile", "pages_volatile", PLAIN, false, "Pages that changed since the last pass." },
        { "pages_skipped", "pages_skipped", PLAIN, false, "Pages in mappings that are left alone." },
        { "stable_node_chains", "chains", PLAIN, false, "Contents kept more than once because of MaxPageSharing." },
        { "stable_node_dups", "dups", PLAIN, false, "The copies in those chains." },
        { "huge_pages_split", "huge_pages_split", PLAIN, true, "Huge pages split for merging." },
        { "huge_pages_collapsed", "huge_pages_collapsed", PLAIN, true, "Of them, those made whole again." },
        { "pool_pages_returned", "pool_pages_returned", PLAIN, true, "Pages of a pool that one process mapped alone, its own again." },
        { "pool_pieces_joined", "pool_pieces_joined", PLAIN, true, "Mappings of a pool that became one with another." },
        { "pages_scanned", "pages_scanned", PLAIN, true, "Pages looked at." },
        { "pages_hashed", "pages_hashed", PLAIN, true, "Pages read." },
        { "full_scans", "full_scans", PLAIN, true, "Passes over everything opted in." },
};

static const Metric daemon_metrics[] = {
        { "cpu_nsec", "cpu", SECONDS, true, "CPU time of the daemon." },
        { "ksmd_cpu_nsec", "ksmd_cpu", SECONDS, true, "CPU time of the kernel's ksmd on the daemon's behalf." },
        { "throttled_nsec", "throttled", SECONDS, true, "How long work waited for CPUQuota." },
        { "cow_breaks", "cow_breaks", PLAIN, true, "Write faults that took a merged page apart." },
        { "tlb_flushes", "tlb_flushes", PLAIN, true, "TLB flushes." },
        { "tlb_flush_pages", "tlb_flush_pages", PLAIN, true, "Pages flushed from TLBs." },
        { "break_share", "break_share", RATIO, false, "What breaks and flushes cost the processes, of one CPU." },
        { "probes_rested_nsec", "probes_rested", SECONDS, true, "How long flushes were not counted, and breaks only later." },
        { "max_page_sharing", "max_page_sharing", PLAIN, false, "How often a merged page may be mapped." },
        { "rmap_mapping_nsec", "rmap_mapping", SECONDS, false, "What a mapping costs a walk of the reverse map." },
        { "rmap_walks", "rmap_walks", PLAIN, true, "Walks of the reverse map of a merged page." },
        { "rmap_walk_nsec", "rmap_walk", SECONDS, true, "How long they took." },
        { "rmap_walk_nsec_max", "rmap_walk_max", SECONDS, false, "The longest of them." },
        { "stops", "stops", PLAIN, true, "How often a thread of a process was stopped." },
        { "stop_nsec_p50", "stop_p50", SECONDS, false, "Half of the stops were no longer than this." },
        { "stop_nsec_p99", "stop_p99", SECONDS, false, "99 of 100 stops were no longer than this." },
        { "stop_nsec_max", "stop_max", SECONDS, false, "The longest stop." },
};

static const Metric status_metrics[] = {
        { "uptime_nsec", "uptime", SECONDS, false, "How long the daemon has been running." },
        { "domains", "domains", PLAIN, false, "Domains managed." },
        { "cgroups", "cgroups", PLAIN, false, "Cgroups managed." },
        { "processes", "processes", PLAIN, false, "Processes managed." },
        { "cpu_quota", "cpu_quota", RATIO, false, "CPUQuota, or what CPUQuotaBusy leaves of it, whichever is in force, of one CPU." },
        { "cpu_used", "cpu_used", RATIO, false, "What daemon and ksmd used over the last 60 seconds, of one CPU." },
        { "throttled", "is_throttled", PLAIN, false, "Whether work waits for the quota." },
        { "host_busy", "host_busy", PLAIN, false, "Whether CPUQuotaBusy is in force." },
};

static const Metric cgroup_metrics[] = {
        { "processes", "processes", PLAIN, false, "Processes managed." },
};

/* Of an object, one sample for each of its fields. */
typedef struct Family {
        const char *field, *name, *label;
        bool counter;
        const char *help;
        bool (*want)(const char *key);  /* NULL: all of them */
} Family;

static const Family not_merged = { "merge_failures", "not_merged", "reason", false,
                                   "Pages that have a twin and are not merged, by reason.", reason_is_state };

static const Family daemon_families[] = {
        { "merge_failures", "failures", "reason", true, "How often a process or its pages could not be merged.", reason_is_event },
        { "ksm_results", "ksm", "result", true, "What ksmd did, for whomever.", NULL },
        { "tlb_flushes_by", "tlb_flushes_by", "by", true, "TLB flushes by who made them.", NULL },
        { "tlb_flushes_by_reason", "tlb_flushes_by_reason", "reason", true, "TLB flushes by the kernel's reason.", NULL },
};

/* A name for a label's value: what would end it, or the line, is escaped. */
static void print_escaped(const char *value) {
        for (const char *p = value; *p; p++)
                if (*p == '\n')
                        fputs("\\n", stdout);
                else {
                        if (*p == '"' || *p == '\\')
                                putchar('\\');
                        putchar(*p);
                }
}

static const char *label_value(const json_t *value) {
        return json_is_boolean(value) ? (json_is_true(value) ? "true" : "false") : json_string_value(value) ?: "";
}

/* {cgroup="a",domain="b"}, and one more label where one is given; nothing when there is no label. */
static void print_labels(const json_t *object, const char *const *labels, const char *more, const char *value) {
        bool any = false;

        for (; labels && *labels; labels += 2) {
                printf("%s%s=\"", any ? "," : "{", labels[0]);
                print_escaped(label_value(json_object_get(object, labels[1])));
                putchar('"');
                any = true;
        }
        if (more) {
                printf("%s%s=\"", any ? "," : "{", more);
                print_escaped(value);
                putchar('"');
                any = true;
        }
        if (any)
                putchar('}');
}

static const char *unit_name(Unit unit) {
        static const char *const names[] = {
                [PLAIN] = "", [BYTES] = "bytes", [SECONDS] = "seconds", [RATIO] = "ratio",
        };

        return names[unit];
}

static void print_head(const char *scope, const char *name, Unit unit, const char *type, const char *help) {
        const char *separator = unit == PLAIN ? "" : "_";

        printf("# TYPE " PREFIX "%s%s%s%s %s\n", scope, name, separator, unit_name(unit), type);
        if (unit != PLAIN)
                printf("# UNIT " PREFIX "%s%s%s%s %s\n", scope, name, separator, unit_name(unit), unit_name(unit));
        printf("# HELP " PREFIX "%s%s%s%s %s\n", scope, name, separator, unit_name(unit), help);
}

static void print_value(const json_t *value, Unit unit) {
        if (unit == SECONDS)
                printf(" %.9g\n", (double)json_integer_value(value) / 1e9);
        else if (json_is_boolean(value))
                printf(" %d\n", json_is_true(value));
        else if (json_is_real(value))
                printf(" %.9g\n", json_real_value(value));
        else
                printf(" %" JSON_INTEGER_FORMAT "\n", json_integer_value(value));
}

/* One family: a sample of each object that has the field. labels: pairs of a label and the field it is taken from, up
 * to a NULL; NULL: none. */
static void print_metric(const Metric *metric, const char *scope, json_t *const *objects, size_t n,
                         const char *const *labels) {
        bool head = false;

        for (size_t i = 0; i < n; i++) {
                const json_t *value = json_object_get(objects[i], metric->field);

                if (!json_is_number(value) && !json_is_boolean(value))
                        continue;
                if (!head)
                        print_head(scope, metric->name, metric->unit, metric->counter ? "counter" : "gauge",
                                   metric->help);
                head = true;
                printf(PREFIX "%s%s%s%s%s", scope, metric->name, metric->unit == PLAIN ? "" : "_",
                       unit_name(metric->unit), metric->counter ? "_total" : "");
                print_labels(objects[i], labels, NULL, NULL);
                print_value(value, metric->unit);
        }
}

/* A family whose samples are the fields of an object of each, by a label. */
static void print_map(const Family *family, const char *scope, json_t *const *objects, size_t n,
                      const char *const *labels) {
        if (n == 0)
                return;
        print_head(scope, family->name, PLAIN, family->counter ? "counter" : "gauge", family->help);
        for (size_t i = 0; i < n; i++) {
                const char *key;
                json_t *count;

                json_object_foreach(json_object_get(objects[i], family->field), key, count) {
                        if (family->want && !family->want(key))
                                continue;
                        printf(PREFIX "%s%s%s", scope, family->name, family->counter ? "_total" : "");
                        print_labels(objects[i], labels, family->label, key);
                        print_value(count, PLAIN);
                }
        }
}

/* Everything of one kind of thing; a family's samples stand together. */
static void print_scope(const char *scope, json_t *const *objects, size_t n, const char *const *labels) {
        for (size_t i = 0; i < ELEMENTSOF(page_metrics); i++)
                print_metric(&page_metrics[i], scope, objects, n, labels);
        print_map(&not_merged, scope, objects, n, labels);
}

static void print_array(const char *scope, const json_t *array, const char *const *labels, bool cgroups) {
        size_t n;
        _cleanup_free_ json_t **objects = elements(array, &n);

        if (!objects)
                return;
        print_scope(scope, objects, n, labels);
        for (size_t i = 0; cgroups && i < ELEMENTSOF(cgroup_metrics); i++)
                print_metric(&cgroup_metrics[i], scope, objects, n, labels);
}

static void print_status(json_t *status) {
        static const char *const version[] = { "version", "version", NULL };

        print_head("", "version", PLAIN, "gauge", "The version of the daemon, in a label.");
        printf(PREFIX "version");
        print_labels(status, version, NULL, NULL);
        printf(" 1\n");
        for (size_t i = 0; i < ELEMENTSOF(status_metrics); i++)
                print_metric(&status_metrics[i], "", &status, 1, NULL);
        print_head("", "warnings", PLAIN, "gauge", "What does not work or is wrong with the configuration.");
        printf(PREFIX "warnings %zu\n", json_array_size(json_object_get(status, "warnings")));
}

int command_metrics(const Ctl *ctl, int argc, char **argv) {
        static const char *const domain_labels[] = { "domain", "domain", "merge", "merge", "own", "own", NULL };
        static const char *const cgroup_labels[] = { "cgroup", "path", "domain", "domain", NULL };
        json_t *status, *stats, *daemon;
        int r;

        r = ctl_call(ctl, "GetStatus", NULL, false, &status);
        if (r != CTL_DONE)
                return r;
        r = ctl_call(ctl, "GetStats", NULL, false, &stats);
        if (r != CTL_DONE) {
                json_decref(status);
                return r;
        }
        daemon = json_object_get(stats, "daemon");
        print_status(status);
        print_scope("", &daemon, 1, NULL);
        for (size_t i = 0; i < ELEMENTSOF(daemon_metrics); i++)
                print_metric(&daemon_metrics[i], "", &daemon, 1, NULL);
        for (size_t i = 0; i < ELEMENTSOF(daemon_families); i++)
                print_map(&daemon_families[i], "", &daemon, 1, NULL);
        print_array("domain_", json_object_get(stats, "domains"), domain_labels, false);
        print_array("cgroup_", json_object_get(stats, "cgroups"), cgroup_labels, true);
        printf("# EOF\n");
        json_decref(status);
        json_decref(stats);
        return CTL_DONE;
}
