/* SPDX-License-Identifier: LGPL-2.1-or-later */

/* See format.h. Widths are counted in characters (UTF-8 sequences), all of them taken to be one column wide. */

#include "ctl/format.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

FormatText format_bytes(int64_t bytes) {
        static const char *const units[] = {"KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
        const char *sign = bytes < 0 ? "-" : "";
        uint64_t magnitude = bytes < 0 ? -(uint64_t)bytes : (uint64_t)bytes;
        FormatText text;
        unsigned unit = 0;

        if (magnitude < 1024) {
                snprintf(text.text, sizeof text.text, "%s%" PRIu64 " B", sign, magnitude);
                return text;
        }
        while (unit + 1 < ELEMENTSOF(units) && magnitude >> (10 * (unit + 2)))
                unit++;
        snprintf(text.text, sizeof text.text, unit == 0 ? "%s%.0f %s" : "%s%.1f %s", sign,
                 (double)magnitude / (double)((uint64_t)1 << (10 * (unit + 1))), units[unit]);
        return text;
}

FormatText format_nsec(uint64_t nsec) {
        uint64_t seconds = nsec / NSEC_PER_SEC, minutes = seconds / 60, hours = minutes / 60;
        FormatText text;

        if (nsec < NSEC_PER_MSEC)
                snprintf(text.text, sizeof text.text, "%" PRIu64 " us", nsec / NSEC_PER_USEC);
        else if (nsec < NSEC_PER_SEC)
                snprintf(text.text, sizeof text.text, "%.1f ms", (double)nsec / 1e6);
        else if (minutes == 0)
                snprintf(text.text, sizeof text.text, "%.1f s", (double)nsec / 1e9);
        else if (hours == 0)
                snprintf(text.text, sizeof text.text, "%" PRIu64 " min %" PRIu64 " s", minutes, seconds % 60);
        else if (hours < 48)
                snprintf(text.text, sizeof text.text, "%" PRIu64 " h %" PRIu64 " min", hours, minutes % 60);
        else
                snprintf(text.text, sizeof text.text, "%" PRIu64 " days %" PRIu64 " h", hours / 24, hours % 24);
        return text;
}

char *format_printable(char *text) {
        for (unsigned char *p = (unsigned char *)text; *p; p++)
                /* C0, DEL, and C1, which UTF-8 spells 0xc2 0x80 to 0xc2 0x9f */
                if (*p < ' ' || *p == 0x7f)
                        *p = '?';
                else if (*p == 0xc2 && p[1] >= 0x80 && p[1] < 0xa0) {
                        *p++ = '?';
                        *p = '?';
                }
        return text;
}

static size_t text_width(const char *text) {
        size_t width = 0;

        for (; *text; text++)
                width += ((unsigned char)*text & 0xc0) != 0x80;
        return width;
}

void table_cell(Table *table, const char *format, ...) {
        char *cell;
        va_list ap;

        if (GROW(table->cells, table->n, table->allocated) < 0)
                return;
        va_start(ap, format);
        if (vasprintf(&cell, format, ap) < 0)
                cell = NULL;
        va_end(ap);
        if (cell)
                table->cells[table->n++] = format_printable(cell);
}

static void write_cell(FILE *f, const char *text, size_t width, bool right, bool last) {
        int padding = (int)(width - text_width(text));

        if (right)
                fprintf(f, "%*s%s", padding, "", text);
        else if (last) /* nothing to align behind it */
                fputs(text, f);
        else
                fprintf(f, "%s%*s", text, padding, "");
        fputs(last ? "\n" : "  ", f);
}

void table_write(const Table *table, FILE *f) {
        size_t widths[32] = {};

        for (size_t c = 0; c < table->n_columns && c < ELEMENTSOF(widths); c++) {
                widths[c] = text_width(table->heads[c]) - (*table->heads[c] == '>');
                for (size_t i = c; i < table->n; i += table->n_columns)
                        widths[c] = MAX_OF(widths[c], text_width(table->cells[i]));
        }
        for (size_t c = 0; c < table->n_columns; c++) {
                bool right = *table->heads[c] == '>';

                write_cell(f, table->heads[c] + right, widths[c], right, c + 1 == table->n_columns);
        }
        for (size_t i = 0; i < table->n; i++) {
                size_t c = i % table->n_columns;

                write_cell(f, table->cells[i], widths[c], *table->heads[c] == '>', c + 1 == table->n_columns);
        }
}

void format_line(FILE *f, int label_width, const char *label, const char *format, ...) {
        _cleanup_free_ char *value = NULL;
        va_list ap;

        va_start(ap, format);
        if (vasprintf(&value, format, ap) < 0)
                value = NULL;
        va_end(ap);
        if (value)
                fprintf(f, "%-*s %s\n", label_width, label, format_printable(value));
}

void table_print(const Table *table) { table_write(table, stdout); }

void table_done(Table *table) {
        for (size_t i = 0; i < table->n; i++)
                free(table->cells[i]);
        free(table->cells);
        table->cells = NULL;
        table->n = table->allocated = 0;
}
