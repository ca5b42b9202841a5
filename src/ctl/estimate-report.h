/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "scan/estimate.h"

/* What an estimate is made of and how it is shown. */
typedef struct EstimateItem {
        pid_t pid;
        unsigned group;         /* into the groups; 0: of none, asked for by its number */
        bool include_dontdump;
        bool counted;
        unsigned process;       /* its number in the estimate, when counted */
        const char *why;        /* not counted: the reason; NULL: it ended before it was looked at */
        char comm[16];
} EstimateItem;

typedef struct EstimateReport {
        EstimateItem *items;
        size_t n_items, items_allocated;
        char **groups;          /* paths of cgroups; [0] is NULL */
        size_t n_groups, groups_allocated;
        Estimate *estimate;
} EstimateReport;

void estimate_report_done(EstimateReport *report);
int estimate_report_json(const EstimateReport *report); /* prints it; CTL_DONE, CTL_FAILED */
void estimate_report_table(const EstimateReport *report);
