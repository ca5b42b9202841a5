/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * Any text as configuration. The input is one file, or several one on top of the other, separated by a line of "----".
 *
 * Must hold: it ends, and without a crash; every report has the file and a line of it; values are within their ranges; a
 * report on a line within [Cgroup PATTERN] leaves that section malformed, one on a line whose section cannot be told
 * leaves all of them so; malformed is never merged. Whose line it is, the oracle below finds out on its own and more
 * simply than the parser does.
 */

#include "cgroup/policy.h"
#include "conf/conf-internal.h"
#include "fuzz.h"

#include <ctype.h>
#include <strings.h>

#define FILES_MAX 8

typedef struct Report {
        unsigned file, line;
} Report;

typedef struct Run {
        struct {
                const char *text;
                size_t size;
        } files[FILES_MAX];
        unsigned n_files;
        Report *reports;
        size_t n, allocated;
        unsigned n_reports;
} Run;

static void note(void *userdata, const char *file, unsigned line, const char *message) {
        Run *run = userdata;
        Report report = { .file = (unsigned)(*file - '0'), .line = line };

        MUST(report.file < run->n_files && !file[1]);
        MUST(line > 0);
        MUST(*message);
        MUST(GROW(run->reports, run->n, run->allocated) == 0);
        run->reports[run->n++] = report;
        run->n_reports++;
}

/* A line and its end, without the space around. */
static void trim(const char **p, const char **end) {
        while (*p < *end && (**p == ' ' || **p == '\t'))
                (*p)++;
        while (*end > *p && ((*end)[-1] == ' ' || (*end)[-1] == '\t' || (*end)[-1] == '\r'))
                (*end)--;
}

/*
 * The section line belongs to, by the last line above (or at) it that looks like a header and does not continue another
 * line: a copy of what is between the brackets, or NULL when there is none or it is not to be trusted.
 */
static char *header_of(const char *text, size_t size, unsigned line) {
        const char *end = text + size, *next, *stop;
        bool continued = false;
        char *header = NULL;

        if (size >= 3 && memcmp(text, "\xef\xbb\xbf", 3) == 0)
                text += 3;
        for (unsigned n = 1; n <= line && text < end; n++, text = next) {
                size_t backslashes = 0;
                const char *p = text;

                stop = memchr(text, '\n', (size_t)(end - text));
                next = stop ? stop + 1 : end;
                if (!stop)
                        stop = end;
                if (stop > p && stop[-1] == '\r')
                        stop--;
                while ((size_t)(stop - p) > backslashes && stop[-1 - (ptrdiff_t)backslashes] == '\\')
                        backslashes++;
                while (p < stop && (*p == ' ' || *p == '\t'))
                        p++;
                if (p < stop && (*p == '#' || *p == ';'))
                        continue;
                if (!continued && (p == stop || (stop - p == 1 && *p == '\\')))
                        continue;
                if (!continued && *p == '[') {
                        free(header);
                        trim(&p, &stop);
                        header = strndup(p + 1, stop[-1] == ']' && stop - p >= 2 ? (size_t)(stop - p - 2) : 0);
                        MUST(header);
                }
                continued = backslashes % 2 == 1;
        }
        return header;
}

static const ConfCgroup *section_of(const Conf *conf, const char *header) {
        const char *pattern = header;

        pattern += strspn(pattern, " \t");
        if (strncmp(pattern, "Cgroup", 6) != 0)
                return NULL;
        pattern += 6;
        pattern += strspn(pattern, " \t");
        pattern += *pattern == '/';
        for (size_t i = 0; i < conf->n_cgroups; i++) {
                size_t n = strlen(conf->cgroups[i].pattern);

                if (strncmp(conf->cgroups[i].pattern, pattern, n) == 0 && !pattern[n + strspn(pattern + n, " \t")])
                        return &conf->cgroups[i];
        }
        return NULL;
}

/* [Daemon], or a section that has nothing to do with cgroups: one plain word. */
static bool is_other(const char *header) {
        size_t n = 0;

        header += strspn(header, " \t");
        while (isalnum((unsigned char)header[n]) || header[n] == '-')
                n++;
        return n > 0 && !header[n + strspn(header + n, " \t")] && strncasecmp(header, "Cgroup", 6) != 0;
}

static void check_closed(const Conf *conf, const Run *run) {
        for (size_t i = 0; i < conf->n_cgroups; i++)
                MUST(!conf->cgroups[i].malformed || conf->cgroups[i].merge == CONF_MERGE_NO);
        for (size_t i = 0; i < run->n; i++) {
                const Report *report = &run->reports[i];
                _cleanup_free_ char *header =
                        header_of(run->files[report->file].text, run->files[report->file].size, report->line);
                const ConfCgroup *section = header ? section_of(conf, header) : NULL;

                if (section)
                        MUST(section->merge == CONF_MERGE_NO && section->malformed);
                else if (header && is_other(header))
                        continue;
                else
                        for (size_t j = 0; j < conf->n_cgroups; j++)
                                MUST(conf->cgroups[j].merge == CONF_MERGE_NO && conf->cgroups[j].malformed);
        }
}

/* "%c" that is not the end of "%%". */
static bool has_own_domains(const ConfCgroup *c) {
        for (const char *p = strchr(c->domain, '%'); p; p = strchr(p + 2, '%'))
                if (p[1] == 'c')
                        return true;
        return false;
}

static void check_values(const Conf *conf) {
        const ConfDaemon *d = &conf->daemon;
        const ConfCgroup *advise = NULL;

        MUST(d->socket[0] == '/' && strlen(d->socket) < 108);
        MUST(d->scan_interval_nsec >= 10 * NSEC_PER_MSEC);
        MUST(d->cpu_quota > 0 && d->scan_threads > 0 && d->max_page_sharing != 1);
        MUST(d->metadata_max > 0 && d->metadata_max <= 10000);
        for (size_t i = 0; i < conf->n_cgroups; i++) {
                const ConfCgroup *c = &conf->cgroups[i];

                MUST(c->pattern && c->domain && *c->domain && c->file && c->line);
                MUST(strlen(c->pattern) <= CONF_PATTERN_BYTES_MAX && *c->pattern != '/');
                MUST(c->minimum_run_pages > 0 && c->huge_page_split <= 10000);
                for (char **e = c->exclude; e && *e; e++)
                        MUST(**e != '/' && strlen(*e) <= CONF_PATTERN_BYTES_MAX);
                for (size_t j = 0; j < i; j++)
                        MUST(strcmp(conf->cgroups[j].pattern, c->pattern) != 0);
                for (size_t j = 0; j < i && c->route == CONF_ROUTE_REMAP && c->merge == CONF_MERGE_YES; j++) {
                        const ConfCgroup *other = &conf->cgroups[j];

                        MUST(other->route != CONF_ROUTE_REMAP || other->merge != CONF_MERGE_YES ||
                             strcmp(other->domain, c->domain) != 0 || has_own_domains(c) ||
                             (c->trusted_together && other->trusted_together));
                }
                if (c->route == CONF_ROUTE_ADVISE && c->merge != CONF_MERGE_NO) {
                        MUST(!advise || strcmp(advise->domain, c->domain) == 0);
                        advise = c;
                }
        }
}

static void check_policy(const Conf *conf) {
        static const char *const paths[] = { "", "a", "machine.slice/libpod-1.scope/container", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaab" };

        for (size_t i = 0; i < ELEMENTSOF(paths); i++) {
                const ConfCgroup *section = policy_find(conf, paths[i]);
                _cleanup_free_ char *domain = NULL;

                if (!section)
                        continue;
                MUST(cgroup_pattern_match(section->pattern, paths[i]));
                for (char **e = section->exclude; e && *e; e++)
                        MUST(!cgroup_pattern_match(*e, paths[i]));
                MUST(policy_domain(section, paths[i], &domain) == 0 && *domain);
        }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
        static const char separator[] = "\n----\n";
        static const char *const names[FILES_MAX] = { "0", "1", "2", "3", "4", "5", "6", "7" };
        _cleanup_(conf_builder_freep) ConfBuilder *builder = NULL;
        _cleanup_(conf_freep) Conf *conf = NULL;
        const char *text = (const char *)data, *end = text + size;
        Run run = {};

        MUST(conf_builder_new(note, &run, &builder) == 0);
        for (bool last = false; !last && run.n_files < FILES_MAX;) {
                const char *stop = memmem(text, (size_t)(end - text), separator, sizeof separator - 1);

                last = !stop;
                run.files[run.n_files].text = text;
                run.files[run.n_files].size = (size_t)((last ? end : stop) - text);
                run.n_files++;
                MUST(conf_builder_add(builder, names[run.n_files - 1], text, run.files[run.n_files - 1].size) == 0);
                if (!last)
                        text = stop + sizeof separator - 1;
        }
        MUST(conf_builder_finish(builder, false, &conf) == 0);
        MUST(conf->n_warnings == run.n_reports);
#ifdef FAIL_OPEN
        for (size_t i = 0; i < conf->n_cgroups; i++)
                if (conf->cgroups[i].malformed) {
                        conf->cgroups[i].malformed = false;
                        conf->cgroups[i].merge = CONF_MERGE_YES;
                }
#endif
        check_values(conf);
        check_closed(conf, &run);
        check_policy(conf);
        free(run.reports);
        return 0;
}
