/* SPDX-License-Identifier: LGPL-2.1-or-later */

/* The commands that show what the daemon knows. */

#include "ctl/ctl.h"
#include "ctl/format.h"
#include "ctl/reply.h"

#include <inttypes.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>

/* "1 process", "2 processes": the plural only adds to the singular. */
static FormatText counted(int64_t n, const char *singular, const char *ending) {
        FormatText text;

        snprintf(text.text, sizeof text.text, "%" PRId64 " %s%s", n, singular, n == 1 ? "" : ending);
        return text;
}

static FormatText pages_bytes(int64_t pages) {
        return format_bytes(pages * (int64_t)PAGE_BYTES);
}

#define line(...) format_line(stdout, 22, __VA_ARGS__)

/* "12 young, 3 traced", without what is zero; "-" when nothing is left. The caller frees it. */
static char *reasons_text(const json_t *reasons, bool (*want)(const char *reason)) {
        char *out = NULL;
        size_t size;
        FILE *f = open_memstream(&out, &size);
        const char *reason;
        json_t *count;
        bool any = false;

        if (!f)
                return NULL;
        json_object_foreach((json_t *)reasons, reason, count)
                if (json_integer_value(count) != 0 && (!want || want(reason))) {
                        fprintf(f, "%s%" JSON_INTEGER_FORMAT " %s", any ? ", " : "", json_integer_value(count), reason);
                        any = true;
                }
        if (!any)
                fputc('-', f);
        fclose(f);
        return out;
}

static void show_status(const json_t *reply) {
        const json_t *next = json_object_get(reply, "next_pass_nsec"), *last = json_object_get(reply, "last_pass_nsec");
        json_t *warning;
        size_t i;

        if (json_is_integer(next))
                line("state", "%s, next pass in %s", text(reply, "state"),
                     format_nsec((uint64_t)json_integer_value(next)).text);
        else
                line("state", "%s", text(reply, "state"));
        line("daemon", "%s, pid %" PRId64 ", up %s", text(reply, "version"), number(reply, "pid"),
             format_nsec((uint64_t)number(reply, "uptime_nsec")).text);
        line("managed", "%s in %s of %s", counted(number(reply, "processes"), "process", "es").text,
             counted(number(reply, "cgroups"), "cgroup", "s").text,
             counted(number(reply, "domains"), "domain", "s").text);
        if (json_is_integer(last))
                line("passes", "%" PRId64 ", the last took %s", number(reply, "full_scans"),
                     format_nsec((uint64_t)json_integer_value(last)).text);
        else
                line("passes", "%" PRId64, number(reply, "full_scans"));
        line("saved", "%s", format_bytes(number(reply, "bytes_saved")).text);
        line("own records", "%s", format_bytes(number(reply, "metadata_bytes")).text);
        line("CPU", "%.1f %% of one over 60 s, quota %g %%%s", 100 * share(reply, "cpu_used"),
             100 * share(reply, "cpu_quota"), quota_remarks(reply));
        json_array_foreach(json_object_get(reply, "probes"), i, warning)
                line(i == 0 ? "probes" : "", "%s: %s", text(warning, "name"),
                     json_is_true(json_object_get(warning, "resting"))    ? "rests, it cost too much"
                     : json_is_string(json_object_get(warning, "reason")) ? text(warning, "reason")
                                                                          : text(warning, "way"));
        json_array_foreach(json_object_get(reply, "warnings"), i, warning)
                line("warning", "%s", json_string_value(warning) ?: "-");
}

/* A row's cells that every kind of statistics has. */
static void statistics_cells(Table *table, const json_t *s) {
        _cleanup_free_ char *failures = reasons_text(json_object_get(s, "merge_failures"), reason_is_state);

        table_cell(table, "%s", format_bytes(number(s, "bytes_saved")).text);
        table_cell(table, "%" PRId64, number(s, "pages_shared"));
        table_cell(table, "%" PRId64, number(s, "pages_sharing"));
        table_cell(table, "%" PRId64, number(s, "pages_zero"));
        table_cell(table, "%" PRId64, number(s, "pages_unshared"));
        table_cell(table, "%" PRId64, number(s, "pages_volatile"));
        table_cell(table, "%" PRId64, number(s, "pages_skipped"));
        table_cell(table, "%s", failures ?: "-");
}

#define STATISTICS_HEADS ">SAVED", ">SHARED", ">SHARING", ">ZERO", ">UNSHARED", ">VOLATILE", ">SKIPPED", "NOT MERGED"

static void show_stats(const json_t *reply) {
        const json_t *daemon = json_object_get(reply, "daemon"), *s;
        _cleanup_free_ char *failures = reasons_text(json_object_get(daemon, "merge_failures"), reason_is_state);
        _cleanup_free_ char *events = reasons_text(json_object_get(daemon, "merge_failures"), reason_is_event);
        _cleanup_(table_done) Table domains = TABLE("DOMAIN", STATISTICS_HEADS);
        _cleanup_(table_done) Table cgroups = TABLE("CGROUP", "DOMAIN", "ROUTE", ">PROCESSES", STATISTICS_HEADS);
        size_t i;

        line("saved", "%s, profit %s", format_bytes(number(daemon, "bytes_saved")).text,
             format_bytes(number(daemon, "general_profit_bytes")).text);
        line("own records", "%s", format_bytes(number(daemon, "metadata_bytes")).text);
        line("pages shared", "%" PRId64, number(daemon, "pages_shared"));
        line("pages sharing", "%" PRId64 " (%s)", number(daemon, "pages_sharing"),
             pages_bytes(number(daemon, "pages_sharing")).text);
        line("pages zero", "%" PRId64 " (%s)", number(daemon, "pages_zero"),
             pages_bytes(number(daemon, "pages_zero")).text);
        line("pages unshared", "%" PRId64 " (%s)", number(daemon, "pages_unshared"),
             pages_bytes(number(daemon, "pages_unshared")).text);
        line("pages volatile", "%" PRId64, number(daemon, "pages_volatile"));
        line("pages skipped", "%" PRId64, number(daemon, "pages_skipped"));
        line("pages not merged", "%s", failures ?: "-");
        line("failed tries", "%s", events ?: "-");
        line("passes", "%" PRId64 ", %" PRId64 " pages scanned, %" PRId64 " hashed", number(daemon, "full_scans"),
             number(daemon, "pages_scanned"), number(daemon, "pages_hashed"));
        line("chains", "%" PRId64 " of %" PRId64 " dups", number(daemon, "stable_node_chains"),
             number(daemon, "stable_node_dups"));
        if (number(daemon, "max_page_sharing") > 0)
                line("page sharing", "%" PRId64 " mappings at most", number(daemon, "max_page_sharing"));
        if (number(daemon, "huge_pages_split") > 0)
                line("huge pages", "%" PRId64 " split, %" PRId64 " made whole again", number(daemon, "huge_pages_split"),
                     number(daemon, "huge_pages_collapsed"));
        if (number(daemon, "pool_pages_returned") > 0 || number(daemon, "pool_pieces_joined") > 0)
                line("pools", "%" PRId64 " pages given back that nobody shared, %" PRId64 " mappings joined to others",
                     number(daemon, "pool_pages_returned"), number(daemon, "pool_pieces_joined"));
        line("CPU", "%s, ksmd %s, waited %s for the quota", format_nsec((uint64_t)number(daemon, "cpu_nsec")).text,
             format_nsec((uint64_t)number(daemon, "ksmd_cpu_nsec")).text,
             format_nsec((uint64_t)number(daemon, "throttled_nsec")).text);
        line("stops", "%" PRId64 ", p50 %s, p99 %s, longest %s", number(daemon, "stops"),
             format_nsec((uint64_t)number(daemon, "stop_nsec_p50")).text,
             format_nsec((uint64_t)number(daemon, "stop_nsec_p99")).text,
             format_nsec((uint64_t)number(daemon, "stop_nsec_max")).text);
        line("COW breaks", "%" PRId64 ", at a cost of %.2f %% of a CPU", number(daemon, "cow_breaks"),
             100 * share(daemon, "break_share"));
        line("TLB flushes", "%" PRId64 " of %" PRId64 " pages", number(daemon, "tlb_flushes"),
             number(daemon, "tlb_flush_pages"));
        if (number(daemon, "probes_rested_nsec") > 0)
                line("", "not counted for %s: it cost too much",
                     format_nsec((uint64_t)number(daemon, "probes_rested_nsec")).text);
        if (number(daemon, "rmap_walks") > 0)
                line("rmap walks", "%" PRId64 ", %s each, longest %s", number(daemon, "rmap_walks"),
                     format_nsec((uint64_t)(number(daemon, "rmap_walk_nsec") / number(daemon, "rmap_walks"))).text,
                     format_nsec((uint64_t)number(daemon, "rmap_walk_nsec_max")).text);

        json_array_foreach(json_object_get(reply, "domains"), i, s) {
                table_cell(&domains, "%s%s%s", text(s, "domain"),
                           strcmp(text(s, "merge"), "dry-run") == 0 ? " (dry-run)" : "",
                           json_is_true(json_object_get(s, "own")) ? " (own)" : "");
                statistics_cells(&domains, s);
        }
        putchar('\n');
        table_print(&domains);
        json_array_foreach(json_object_get(reply, "cgroups"), i, s) {
                table_cell(&cgroups, "%s", cgroup(s, "path"));
                table_cell(&cgroups, "%s", text(s, "domain"));
                table_cell(&cgroups, "%s", text(s, "route"));
                table_cell(&cgroups, "%" PRId64, number(s, "processes"));
                statistics_cells(&cgroups, s);
        }
        putchar('\n');
        table_print(&cgroups);
}

static void show_targets(const json_t *reply) {
        _cleanup_(table_done) Table table =
                TABLE(">PID", "NAME", "STATE", "REASON", "MERGE", "ROUTE", ">PRESENT", ">MERGED", "DOMAIN", "CGROUP");
        const json_t *target;
        size_t i;

        json_array_foreach(json_object_get(reply, "targets"), i, target) {
                table_cell(&table, "%" PRId64, number(target, "pid"));
                table_cell(&table, "%s", text(target, "name"));
                table_cell(&table, "%s", text(target, "state"));
                table_cell(&table, "%s", text(target, "reason"));
                table_cell(&table, "%s", text(target, "merge"));
                table_cell(&table, "%s", text(target, "route"));
                table_cell(&table, "%s", pages_bytes(number(target, "pages")).text);
                table_cell(&table, "%s", pages_bytes(number(target, "pages_merged")).text);
                table_cell(&table, "%s", text(target, "domain"));
                table_cell(&table, "%s", cgroup(target, "cgroup"));
        }
        table_print(&table);
}

static void pages_line(const char *label, const json_t *reply, const char *name) {
        line(label, "%" PRId64 " (%s)", number(reply, name), pages_bytes(number(reply, name)).text);
}

static void show_judgement(const json_t *judgement) {
        if (!json_is_object(judgement))
                return;
        line("judgement", "%s", json_is_true(json_object_get(judgement, "on")) ? "on" : "off");
        line("  merges", "%" PRId64 ", of them written to %" PRId64 ", too soon %" PRId64, number(judgement, "merges"),
             number(judgement, "breaks"), number(judgement, "losses"));
        line("  pages left alone", "%" PRId64 ", for at most %s", number(judgement, "pages_alone"),
             format_nsec((uint64_t)number(judgement, "alone_nsec_max")).text);
}

static void show_why(const json_t *reply) {
        _cleanup_free_ char *skipped = reasons_text(json_object_get(reply, "pages_skipped"), NULL);
        _cleanup_free_ char *failures = reasons_text(json_object_get(reply, "merge_failures"), reason_is_state);
        bool reason = json_is_string(json_object_get(reply, "reason"));

        line("process", "%" PRId64 " %s", number(reply, "pid"), text(reply, "name"));
        line("cgroup", "%s", cgroup(reply, "cgroup"));
        line("section", "%s", text(reply, "section"));
        line("merge", "%s", text(reply, "merge"));
        line("domain", "%s", text(reply, "domain"));
        line("route", "%s", text(reply, "route"));
        line("state", "%s%s%s", text(reply, "state"), reason ? ": " : "", reason ? text(reply, "reason") : "");
        if (strcmp(text(reply, "state"), "excluded") == 0) /* nobody looked at its pages */
                return;
        line("tracked", "%s", json_is_true(json_object_get(reply, "tracked")) ? "yes" : "no");
        pages_line("pages present", reply, "pages");
        pages_line("  merged", reply, "pages_merged");
        pages_line("  zero", reply, "pages_zero");
        pages_line("  without a twin", reply, "pages_unshared");
        pages_line("  changing", reply, "pages_volatile");
        line("  left alone", "%s", skipped ?: "-");
        line("  not merged", "%s", failures ?: "-");
        show_judgement(json_object_get(reply, "judgement"));
}

static int show(const Ctl *ctl, const char *method, json_t *parameters, void (*print)(const json_t *reply)) {
        json_t *reply;
        int r = ctl_call(ctl, method, parameters, false, &reply);

        if (r != CTL_DONE)
                return r;
        if (ctl->json)
                r = ctl_print_json(reply);
        else
                print(reply);
        json_decref(reply);
        return r;
}

int command_status(const Ctl *ctl, int argc, char **argv) { return show(ctl, "GetStatus", NULL, show_status); }
int command_stats(const Ctl *ctl, int argc, char **argv) { return show(ctl, "GetStats", NULL, show_stats); }
int command_targets(const Ctl *ctl, int argc, char **argv) { return show(ctl, "ListTargets", NULL, show_targets); }

int command_why(const Ctl *ctl, int argc, char **argv) {
        char *end;
        long pid;

        errno = 0;
        pid = strtol(argv[0], &end, 10);
        if (errno != 0 || *end || end == argv[0] || pid <= 0 || pid > INT_MAX) {
                ctl_fail("%s: not a process id", argv[0]);
                return CTL_USAGE;
        }
        return show(ctl, "Explain", json_pack("{sI}", "pid", (json_int_t)pid), show_why);
}
