/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "base/util.h"

#include <stdio.h>

/* Text for people: sizes, times, and tables with aligned columns. */

typedef struct FormatText {
        char text[32];
} FormatText;

FormatText format_bytes(int64_t bytes);         /* "0 B", "12 KiB", "171.2 MiB" */
FormatText format_nsec(uint64_t nsec);          /* "850 us", "85.0 ms", "7.3 s", "2 h 3 min" */

/* What a process or an administrator named may hold anything, escape sequences too: bytes that would not print are
 * shown as '?'. Returns text. */
char *format_printable(char *text);

/* "label   text", the labels of one output aligned, and nothing in the text that would not print. Out of memory: prints
 * nothing. */
void format_line(FILE *f, int label_width, const char *label, const char *format, ...) _printf_(4, 5);

/* Columns as wide as their widest cell; a head that begins with '>' aligns to the right. Out of memory: prints less. */
typedef struct Table {
        const char *const *heads;       /* borrowed */
        size_t n_columns;
        char **cells;                   /* row by row */
        size_t n, allocated;
} Table;

#define TABLE(...)                                                                   \
        ((Table){                                                                    \
                .heads = (const char *const[]){__VA_ARGS__},                         \
                .n_columns = sizeof((const char *const[]){__VA_ARGS__}) / sizeof(char *), \
        })

void table_cell(Table *table, const char *format, ...) _printf_(2, 3);
void table_write(const Table *table, FILE *f);
void table_print(const Table *table); /* to standard output */
void table_done(Table *table);
