/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "ctl/estimate-report.h"

#include "control/json-text.h"
#include "ctl/ctl.h"
#include "ctl/format.h"

#include <assert.h>
#include <inttypes.h>
#include <jansson.h>
#include <stdio.h>
#include <string.h>

static const char *const run_names[] = { "1", "2-3", "4-7", "8-15", "16-63", "64-511", "512+" };

static_assert(ELEMENTSOF(run_names) == ELEMENTSOF(((EstimateCounts *)NULL)->runs), "a name for each class of runs");

void estimate_report_done(EstimateReport *report) {
        for (size_t i = 0; i < report->n_groups; i++)
                free(report->groups[i]);
        free(report->groups);
        free(report->items);
        estimate_free(report->estimate);
        *report = (EstimateReport) {};
}

static json_t *json_counts(const EstimateCounts *counts) {
        json_t *runs = json_object(), *json;

        for (size_t i = 0; i < ELEMENTSOF(run_names); i++)
                json_object_set_new(runs, run_names[i], json_integer((json_int_t)counts->runs[i]));
        json = json_pack("{sI sI sI sI sI sI sI sI sI sI s{sI sI} so}",
                         "pages", (json_int_t)counts->pages,
                         "zero", (json_int_t)counts->zero,
                         "distinct", (json_int_t)counts->distinct,
                         "duplicate", (json_int_t)counts->duplicate,
                         "duplicate_within", (json_int_t)counts->duplicate_within,
                         "already_shared", (json_int_t)counts->already_shared,
                         "huge_pages", (json_int_t)counts->huge_pages,
                         "unread", (json_int_t)counts->unread,
                         "dontdump", (json_int_t)counts->dontdump,
                         "bytes_saveable", (json_int_t)((counts->zero + counts->duplicate) * PAGE_BYTES),
                         "bytes_saveable_by_route",
                         "advise", (json_int_t)counts->bytes_saveable_advise,
                         "zero", (json_int_t)counts->bytes_saveable_zero,
                         "run_pages", runs);
        return json;
}

static json_t *json_process(const EstimateReport *report, const EstimateItem *item) {
        EstimateCounts counts;
        json_t *json;

        estimate_process(report->estimate, item->process, &counts);
        json = json_counts(&counts);
        json_object_set_new(json, "pid", json_integer(item->pid));
        json_object_set_new(json, "comm", json_text(item->comm));
        if (item->group)
                json_object_set_new(json, "cgroup", json_text(report->groups[item->group]));
        return json;
}

/* Of one cgroup: how many of its processes were counted. */
static size_t n_counted(const EstimateReport *report, size_t group) {
        size_t n = 0;

        for (size_t i = 0; i < report->n_items; i++)
                n += report->items[i].counted && report->items[i].group == group;
        return n;
}

int estimate_report_json(const EstimateReport *report) {
        json_t *processes = json_array(), *cgroups = json_array(), *left_out = json_array(), *json;
        EstimateCounts counts;
        int r;

        for (size_t i = 0; i < report->n_items; i++) {
                const EstimateItem *item = &report->items[i];

                if (item->counted)
                        json_array_append_new(processes, json_process(report, item));
                else
                        json_array_append_new(left_out, json_pack("{si ss}", "pid", (int)item->pid, "reason",
                                                                  item->why ? item->why : "gone"));
        }
        for (size_t g = 1; g < report->n_groups; g++) {
                json_t *cgroup;

                estimate_group(report->estimate, (unsigned)g, &counts);
                cgroup = json_counts(&counts);
                json_object_set_new(cgroup, "path", json_text(report->groups[g]));
                json_object_set_new(cgroup, "processes", json_integer((json_int_t)n_counted(report, g)));
                json_array_append_new(cgroups, cgroup);
        }
        estimate_total(report->estimate, &counts);
        json = json_pack("{so so so so}", "processes", processes, "cgroups", cgroups, "total", json_counts(&counts),
                         "left_out", left_out);
        if (!json)
                return ctl_fail("out of memory");
        r = ctl_print_json(json);
        json_decref(json);
        return r;
}

#define COUNT_HEADS ">MEMORY", ">ZERO", ">DISTINCT", ">DUPLICATE", ">WITHIN", ">SHARED", ">SAVEABLE"

static void pages_cell(Table *table, uint64_t pages) {
        table_cell(table, "%s", format_bytes((int64_t)(pages * PAGE_BYTES)).text);
}

static void count_cells(Table *table, const EstimateCounts *counts) {
        pages_cell(table, counts->pages);
        pages_cell(table, counts->zero);
        pages_cell(table, counts->distinct);
        pages_cell(table, counts->duplicate);
        pages_cell(table, counts->duplicate_within);
        pages_cell(table, counts->already_shared);
        pages_cell(table, counts->zero + counts->duplicate);
}

static void print_processes(const EstimateReport *report) {
        _cleanup_(table_done) Table table = TABLE(">PID", "COMMAND", COUNT_HEADS);
        EstimateCounts counts;

        for (size_t i = 0; i < report->n_items; i++) {
                const EstimateItem *item = &report->items[i];

                if (!item->counted)
                        continue;
                estimate_process(report->estimate, item->process, &counts);
                table_cell(&table, "%d", item->pid);
                table_cell(&table, "%s", item->comm);
                count_cells(&table, &counts);
        }
        estimate_total(report->estimate, &counts);
        table_cell(&table, "%s", "");
        table_cell(&table, "%s", "total");
        count_cells(&table, &counts);
        table_print(&table);
}

static void print_cgroups(const EstimateReport *report) {
        _cleanup_(table_done) Table table = TABLE("CGROUP", ">PROCESSES", COUNT_HEADS);
        EstimateCounts counts;

        if (report->n_groups < 2)
                return;
        for (size_t g = 1; g < report->n_groups; g++) {
                estimate_group(report->estimate, (unsigned)g, &counts);
                table_cell(&table, "%s", *report->groups[g] ? report->groups[g] : "/");
                table_cell(&table, "%zu", n_counted(report, g));
                count_cells(&table, &counts);
        }
        putchar('\n');
        table_print(&table);
}

void estimate_report_table(const EstimateReport *report) {
        EstimateCounts total;

        print_processes(report);
        print_cgroups(report);
        estimate_total(report->estimate, &total);
        printf("\nMEMORY is anonymous memory in frames; one that several processes map counts with the first of them, and\n"
               "as SHARED with the others. WITHIN: of DUPLICATE, what has its twin in the same process (cgroup).\n"
               "Merging (route advise) would save %s net of KSM's bookkeeping;",
               format_bytes((int64_t)total.bytes_saveable_advise).text);
        printf(" giving zero pages back alone (route zero) %s.\n"
               "Pages with twins, by the length of the runs they lie in:",
               format_bytes((int64_t)total.bytes_saveable_zero).text);
        for (size_t i = 0; i < ELEMENTSOF(run_names); i++)
                printf("%s %s: %" PRIu64, i ? "," : "", run_names[i], total.runs[i]);
        printf(".\nHuge pages: %" PRIu64 ". Left out, because their mapping is never merged or they went away: %s",
               total.huge_pages, format_bytes((int64_t)(total.unread * PAGE_BYTES)).text);
        if (total.dontdump > 0)
                printf(", of which IncludeDontDump=yes would take in %s",
                       format_bytes((int64_t)(total.dontdump * PAGE_BYTES)).text);
        puts(".");
}
