/* SPDX-License-Identifier: LGPL-2.1-or-later */

/* What a frame of ksmctl top says. How much of it fits on the screen is decided where it is shown. */

#include "ctl/top.h"

#include "ctl/format.h"
#include "ctl/reply.h"

#include <inttypes.h>
#include <string.h>

#define line(f, ...) format_line(f, 9, __VA_ARGS__)

/* How much a counter of the daemon grew in a second; 0 when there is nothing to compare with. */
static double rate(const TopSample *now, const TopSample *before, const char *name) {
        const json_t *daemon = json_object_get(now->stats, "daemon");
        int64_t grown;

        if (!before->stats || now->nsec <= before->nsec)
                return 0;
        grown = number(daemon, name) - number(json_object_get(before->stats, "daemon"), name);
        return (double)grown * 1e9 / (double)(now->nsec - before->nsec);
}

static FormatText change(int64_t bytes) {
        FormatText text = format_bytes(bytes);

        if (bytes > 0) {
                memmove(text.text + 1, text.text, sizeof text.text - 1);
                *text.text = '+';
                text.text[sizeof text.text - 1] = 0;
        }
        return text;
}

static unsigned write_head(FILE *f, const TopSample *now, const TopSample *before) {
        const json_t *status = now->status, *daemon = json_object_get(now->stats, "daemon"), *warning;
        const json_t *next = json_object_get(status, "next_pass_nsec");
        const json_t *last = json_object_get(status, "last_pass_nsec");
        bool rates = before->stats != NULL;
        unsigned lines = 6;
        size_t i;

        line(f, "ksmd-user", "%s, %s%s%s, up %s", text(status, "version"), text(status, "state"),
             json_is_integer(next) ? ", next pass in " : "",
             json_is_integer(next) ? format_nsec((uint64_t)json_integer_value(next)).text : "",
             format_nsec((uint64_t)number(status, "uptime_nsec")).text);
        line(f, "saved", "%s, own records %s", format_bytes(number(daemon, "bytes_saved")).text,
             format_bytes(number(daemon, "metadata_bytes")).text);
        line(f, "managed", "processes %" PRId64 ", cgroups %" PRId64 ", domains %" PRId64,
             number(status, "processes"), number(status, "cgroups"), number(status, "domains"));
        if (rates)
                line(f, "CPU", "daemon %.1f %%, ksmd %.1f %%; %.1f %% over 60 s, quota %g %%%s",
                     rate(now, before, "cpu_nsec") / 1e7, rate(now, before, "ksmd_cpu_nsec") / 1e7,
                     100 * share(status, "cpu_used"), 100 * share(status, "cpu_quota"), quota_remarks(status));
        else
                line(f, "CPU", "%.1f %% over 60 s, quota %g %%%s", 100 * share(status, "cpu_used"),
                     100 * share(status, "cpu_quota"), quota_remarks(status));
        line(f, "passes", "%" PRId64 "%s%s; %" PRId64 " pages scanned, %.0f a second", number(status, "full_scans"),
             json_is_integer(last) ? ", the last took " : "",
             json_is_integer(last) ? format_nsec((uint64_t)json_integer_value(last)).text : "",
             number(daemon, "pages_scanned"), rate(now, before, "pages_scanned"));
        line(f, "stops", "%" PRId64 ", %.1f a second, p99 %s, longest %s", number(daemon, "stops"),
             rate(now, before, "stops"), format_nsec((uint64_t)number(daemon, "stop_nsec_p99")).text,
             format_nsec((uint64_t)number(daemon, "stop_nsec_max")).text);
        json_array_foreach(json_object_get(status, "warnings"), i, warning) {
                line(f, "warning", "%s", json_string_value(warning) ?: "-");
                lines++;
        }
        fputc('\n', f);
        return lines + 1;
}

static int compare_saved(const void *a, const void *b) {
        const json_t *one = *(json_t *const *)a, *other = *(json_t *const *)b;
        int64_t x = number(one, "bytes_saved"), y = number(other, "bytes_saved");

        return x != y ? (x < y ? 1 : -1) : strcmp(cgroup(one, "path"), cgroup(other, "path"));
}

static const json_t *find_cgroup(const json_t *stats, const char *path) {
        const json_t *one;
        size_t i;

        json_array_foreach(json_object_get(stats, "cgroups"), i, one)
                if (strcmp(cgroup(one, "path"), path) == 0)
                        return one;
        return NULL;
}

static void write_cgroups(FILE *f, const TopSample *now, const TopSample *before) {
        _cleanup_(table_done) Table table = TABLE(">SAVED", ">CHANGE", ">SHARING", ">ZERO", ">UNSHARED", ">VOLATILE",
                                                  ">PROCESSES", "CGROUP", "DOMAIN", "ROUTE");
        size_t n;
        _cleanup_free_ json_t **rows = elements(json_object_get(now->stats, "cgroups"), &n);

        if (!rows)
                return;
        qsort(rows, n, sizeof *rows, compare_saved);
        for (size_t i = 0; i < n; i++) {
                const json_t *row = rows[i], *was = find_cgroup(before->stats, cgroup(row, "path"));
                int64_t saved = number(row, "bytes_saved");

                table_cell(&table, "%s", format_bytes(saved).text);
                table_cell(&table, "%s", was ? change(saved - number(was, "bytes_saved")).text : "-");
                table_cell(&table, "%" PRId64, number(row, "pages_sharing"));
                table_cell(&table, "%" PRId64, number(row, "pages_zero"));
                table_cell(&table, "%" PRId64, number(row, "pages_unshared"));
                table_cell(&table, "%" PRId64, number(row, "pages_volatile"));
                table_cell(&table, "%" PRId64, number(row, "processes"));
                table_cell(&table, "%s", cgroup(row, "path"));
                table_cell(&table, "%s", text(row, "domain"));
                table_cell(&table, "%s", text(row, "route"));
        }
        table_write(&table, f);
}

unsigned top_write_frame(FILE *f, const TopSample *now, const TopSample *before) {
        unsigned head = write_head(f, now, before);

        write_cgroups(f, now, before);
        return head;
}
