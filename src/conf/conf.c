/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "conf/conf-internal.h"
#include "conf/conf-parse.h"
#include "conf/conf-table.h"
#include "conf/conf-value.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <strings.h>

/*
 * The model: what the files say, section by section, and what follows when they say it wrongly.
 *
 * [Daemon] is lenient: a mistake is reported and the value that was there stands. [Cgroup PATTERN] decides whose memory
 * may meet, so every doubt is decided against merging:
 *   - anything wrong inside a section makes that section malformed, which forces Merge=no, whatever it says before or
 *     after. It goes on matching its cgroups, so that they do not fall to a later, wider section;
 *   - lines whose section is not known (a header that cannot be understood, none at all) might have narrowed any
 *     section, or stood before one: all sections are malformed.
 * Merge is decided in one place, conf_builder_finish(); until then sections only carry what was written.
 */

/* Enough for any host; keeps a generated file from turning look-ups into a burden. */
#define SECTIONS_MAX 4096U
#define NAME_BYTES_SHOWN 128U
/* Some names and what is said of them. */
#define MESSAGE_BYTES 1024U

typedef enum Place {
        PLACE_NOWHERE,                  /* before the first header of a file */
        PLACE_DAEMON,
        PLACE_CGROUP,
        PLACE_SKIPPED,                  /* lines that belong to nobody: said once, at their header */
} Place;

/* Where something was written; file is borrowed from the builder. */
typedef struct Origin {
        const char *file;
        unsigned line;
} Origin;

struct ConfBuilder {
        ConfReport report;
        void *userdata;
        Conf *conf;
        size_t allocated;               /* of conf->cgroups */
        Origin *origins;                /* for each of them: its Route= or its Domain=, whichever came last */
        char **files;                   /* names, kept for the origins */
        size_t n_files, allocated_files;
        Place place;
        size_t current;                 /* PLACE_CGROUP: index of the section */
        Origin here;
        bool lost;                      /* there were lines whose section is not known */
};

Conf *conf_free(Conf *conf) {
        if (!conf)
                return NULL;
        conf_section_done(CONF_SCOPE_DAEMON, &conf->daemon);
        for (size_t i = 0; i < conf->n_cgroups; i++) {
                conf_section_done(CONF_SCOPE_CGROUP, &conf->cgroups[i]);
                free(conf->cgroups[i].pattern);
                free(conf->cgroups[i].file);
        }
        free(conf->cgroups);
        free(conf);
        return NULL;
}

int conf_builder_new(ConfReport report, void *userdata, ConfBuilder **ret) {
        _cleanup_(conf_builder_freep) ConfBuilder *b = calloc(1, sizeof *b);
        int r;

        if (!b)
                return -ENOMEM;
        b->report = report;
        b->userdata = userdata;
        b->conf = calloc(1, sizeof *b->conf);
        if (!b->conf)
                return -ENOMEM;
        r = conf_section_init(CONF_SCOPE_DAEMON, &b->conf->daemon);
        if (r < 0)
                return r;
        *ret = TAKE_PTR(b);
        return 0;
}

ConfBuilder *conf_builder_free(ConfBuilder *b) {
        if (!b)
                return NULL;
        conf_free(b->conf);
        for (size_t i = 0; i < b->n_files; i++)
                free(b->files[i]);
        free(b->files);
        free(b->origins);
        free(b);
        return NULL;
}

static void report(ConfBuilder *b, Origin at, const char *message) {
        b->conf->n_warnings++;
        if (b->report)
                b->report(b->userdata, at.file, at.line, message);
}

void conf_builder_report(ConfBuilder *b, const char *file, const char *message) {
        report(b, (Origin){ .file = file }, message);
}

/* How many bytes of a name are shown in a message: whole characters, all names are UTF-8 (conf-parse.c). */
static int shown(const char *name) {
        size_t n = strnlen(name, NAME_BYTES_SHOWN);

        while (n > 0 && ((unsigned char)name[n] & 0xc0) == 0x80)
                n--;
        return (int)n;
}

#define SHOWN(name) shown(name), (name) /* for %.*s */

/* Something is wrong where we are: says so, and what follows from it there. */
static void _printf_(2, 3) complain(ConfBuilder *b, const char *format, ...) {
        char what[MESSAGE_BYTES], line[2 * MESSAGE_BYTES];
        va_list ap;

        va_start(ap, format);
        vsnprintf(what, sizeof what, format, ap);
        va_end(ap);
        if (b->place == PLACE_CGROUP) {
                b->conf->cgroups[b->current].malformed = true;
                snprintf(line, sizeof line, "%s; nothing in [Cgroup %.*s] is merged", what,
                         SHOWN(b->conf->cgroups[b->current].pattern));
        } else
                snprintf(line, sizeof line, "%s; ignored", what);
        report(b, b->here, line);
}

/* What follows belongs to nobody, and nobody can tell what it was to change. */
static void lose(ConfBuilder *b, const char *what) {
        char line[MESSAGE_BYTES];

        b->lost = true;
        b->place = PLACE_SKIPPED;
        snprintf(line, sizeof line, "%s; which section is meant cannot be told, so no cgroup is merged", what);
        report(b, b->here, line);
}

/* Goes on with the section of that pattern, a new one at the end if there is none. */
static int enter_cgroup(ConfBuilder *b, const char *pattern) {
        ConfCgroup *c;
        Origin *origins;
        int r;

        b->place = PLACE_CGROUP;
        for (b->current = 0; b->current < b->conf->n_cgroups; b->current++)
                if (strcmp(b->conf->cgroups[b->current].pattern, pattern) == 0)
                        return 0;
        if (b->conf->n_cgroups == SECTIONS_MAX) {
                lose(b, "too many sections");
                return 0;
        }
        if (GROW(b->conf->cgroups, b->conf->n_cgroups, b->allocated) < 0)
                return -ENOMEM;
        origins = reallocarray(b->origins, b->allocated, sizeof *origins);
        if (!origins)
                return -ENOMEM;
        b->origins = origins;
        b->origins[b->current] = b->here;
        c = &b->conf->cgroups[b->conf->n_cgroups++];
        *c = (ConfCgroup){ .line = b->here.line };
        r = conf_section_init(CONF_SCOPE_CGROUP, c);
        if (r < 0)
                return r;
        c->file = strdup(b->here.file);
        c->pattern = strdup(pattern);
        return c->file && c->pattern ? 0 : -ENOMEM;
}

static int enter(ConfBuilder *b, const char *name, const char *argument) {
        static const char word[] = "-ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789";
        const char *problem;

        if (strcmp(name, "Daemon") == 0 && !argument) {
                b->place = PLACE_DAEMON;
                return 0;
        }
        if (strcmp(name, "Cgroup") == 0) {
                if (!argument) {
                        lose(b, "[Cgroup] without a pattern");
                        return 0;
                }
                if (*argument == '/')
                        argument++;
                problem = conf_pattern_problem(argument);
                if (!problem)
                        return enter_cgroup(b, argument);
                lose(b, problem);
                return 0;
        }
        /* A plain word is a section of another version, and not about cgroups; anything more may be. */
        if (argument || strncasecmp(name, "Cgroup", 6) == 0 || name[strspn(name, word)]) {
                lose(b, "unknown kind of section (there are [Daemon] and [Cgroup PATTERN])");
                return 0;
        }
        b->place = PLACE_NOWHERE;
        complain(b, "unknown section [%.*s]", SHOWN(name));
        b->place = PLACE_SKIPPED;
        return 0;
}

static int assign(ConfBuilder *b, const char *name, const char *value) {
        ConfScope scope = b->place == PLACE_CGROUP ? CONF_SCOPE_CGROUP : CONF_SCOPE_DAEMON;
        const ConfKey *key = conf_key_find(scope, name);
        int r;

        if (!key) {
                complain(b, "unknown key %.*s=", SHOWN(name));
                return 0;
        }
        r = conf_key_set(key, value, b->place == PLACE_CGROUP ? (void *)&b->conf->cgroups[b->current]
                                                              : (void *)&b->conf->daemon);
        if (r == -ENOMEM)
                return r;
        if (r < 0) {
                complain(b, "%s=%.*s is not %s", name, SHOWN(value), key->expected);
                return 0;
        }
        if (b->place == PLACE_CGROUP && (strcmp(name, "Route") == 0 || strcmp(name, "Domain") == 0))
                b->origins[b->current] = b->here;
        return 0;
}

static int handle_item(void *userdata, const ConfItem *item) {
        ConfBuilder *b = userdata;

        b->here.line = item->line;
        if (item->type == CONF_ITEM_SECTION)
                return enter(b, item->name, item->argument);
        if (item->type == CONF_ITEM_BAD_SECTION)
                lose(b, item->problem);
        else if (b->place == PLACE_NOWHERE)
                lose(b, "line before the first section");
        else if (b->place == PLACE_SKIPPED)
                return 0;
        else if (item->type == CONF_ITEM_BAD_LINE)
                complain(b, "%s", item->problem);
        else
                return assign(b, item->name, item->argument);
        return 0;
}

int conf_builder_add(ConfBuilder *b, const char *file, const char *text, size_t size) {
        char *name;

        if (GROW(b->files, b->n_files, b->allocated_files) < 0)
                return -ENOMEM;
        name = strdup(file);
        if (!name)
                return -ENOMEM;
        b->files[b->n_files++] = name;
        b->here = (Origin){ .file = name };
        b->place = PLACE_NOWHERE;
        return conf_parse(text, size, handle_item, b);
}

/* The default domain is the section's own, its pattern taken literally. */
static int default_domain(ConfCgroup *c) {
        const char *from = *c->pattern ? c->pattern : "/";
        char *to = malloc(strlen(from) * 2 + 1);

        if (!to)
                return -ENOMEM;
        c->domain = to;
        for (; *from; from++) {
                *to++ = *from;
                if (*from == '%')
                        *to++ = '%';
        }
        *to = 0;
        return 0;
}

bool conf_domain_is_each(const ConfCgroup *c) {
        for (const char *p = strchr(c->domain, '%'); p; p = strchr(p + 2, '%'))
                if (p[1] == 'c')
                        return true;
        return false;
}

/* KSM has one merge space for the whole machine, so only one domain may be merged through it. */
static void check_advise(ConfBuilder *b) {
        const ConfCgroup *first = NULL;

        b->place = PLACE_CGROUP;
        for (size_t i = 0; i < b->conf->n_cgroups; i++) {
                const ConfCgroup *c = &b->conf->cgroups[i];

                if (c->route != CONF_ROUTE_ADVISE)
                        continue;
                b->current = i;
                b->here = b->origins[i];
                if (conf_domain_is_each(c))
                        complain(b, "Route=advise cannot keep the domains of Domain=%.*s apart", SHOWN(c->domain));
                else if (!first)
                        first = c;
                else if (strcmp(first->domain, c->domain) != 0)
                        complain(b, "Route=advise for domain %.*s, which domain %.*s has already (%.*s:%u)",
                                 SHOWN(c->domain), SHOWN(first->domain), SHOWN(first->file), first->line);
        }
}

static bool merges(const ConfCgroup *c) { return c->merge != CONF_MERGE_NO && !c->malformed; }

static bool same_domain(const ConfCgroup *a, const ConfCgroup *b) {
        return a->merge == b->merge && !conf_domain_is_each(a) && strcmp(a->domain, b->domain) == 0;
}

/* A domain has one route: what one of its cgroups asked for is not done to another's, and who asked to be kept out of
 * KSM's merge space is. Where one of its sections says advise, those that leave it open mean that. */
static void check_routes(ConfBuilder *b) {
        b->place = PLACE_CGROUP;
        for (size_t i = 0; i < b->conf->n_cgroups; i++) {
                ConfCgroup *c = &b->conf->cgroups[i];

                for (size_t k = 0; merges(c) && k < i; k++) {
                        ConfCgroup *other = &b->conf->cgroups[k];

                        if (!merges(other) || !same_domain(c, other) || c->route == other->route)
                                continue;
                        if (c->route == CONF_ROUTE_ADVISE && other->route == CONF_ROUTE_AUTO)
                                other->route = CONF_ROUTE_ADVISE;
                        else if (c->route == CONF_ROUTE_AUTO && other->route == CONF_ROUTE_ADVISE)
                                c->route = CONF_ROUTE_ADVISE;
                        else {
                                b->current = i;
                                b->here = b->origins[i];
                                complain(b, "Route=%s for domain %.*s, which has Route=%s already (%.*s:%u)",
                                         conf_route_name(c->route), SHOWN(c->domain),
                                         conf_route_name(other->route), SHOWN(other->file), other->line);
                        }
                }
        }
}

static bool is_remapped(const ConfCgroup *c) {
        return c->merge == CONF_MERGE_YES && c->route == CONF_ROUTE_REMAP && !c->malformed;
}

/* Who can have huge pages made of a pool's pages can make them read as zeros for others that map them: cgroups share
 * one only if they trust each other, or if nobody can. Of what one section matches that is seen when there are two
 * (policy_trust_problem()); here, of two sections. The first one may stay. */
static void check_trust(ConfBuilder *b) {
        b->place = PLACE_CGROUP;
        for (size_t i = b->conf->n_cgroups; i-- > 0;) {
                const ConfCgroup *c = &b->conf->cgroups[i];

                if (!is_remapped(c) || c->trusted_together || conf_domain_is_each(c))
                        continue;
                for (size_t k = 0; k < b->conf->n_cgroups; k++) {
                        const ConfCgroup *other = &b->conf->cgroups[k];

                        if (k == i || !is_remapped(other) || strcmp(other->domain, c->domain) != 0)
                                continue;
                        b->current = i;
                        b->here = b->origins[i];
                        complain(b, "Route=remap for domain %.*s, in which [Cgroup %.*s] is too (%.*s:%u): both need "
                                 "TrustedTogether=yes, or \"deny\" in /sys/kernel/mm/transparent_hugepage/shmem_enabled",
                                 SHOWN(c->domain), SHOWN(other->pattern), SHOWN(other->file), other->line);
                        break;
                }
        }
}

int conf_builder_finish(ConfBuilder *b, bool shmem_denied, Conf **ret) {
        for (size_t i = 0; i < b->conf->n_cgroups; i++) {
                ConfCgroup *c = &b->conf->cgroups[i];
                int r = c->domain ? 0 : default_domain(c);

                if (r < 0)
                        return r;
        }
        check_advise(b);
        check_routes(b);
        if (!shmem_denied)
                check_trust(b);
        for (size_t i = 0; i < b->conf->n_cgroups; i++) {
                ConfCgroup *c = &b->conf->cgroups[i];

                c->malformed |= b->lost;
                if (c->malformed)
                        c->merge = CONF_MERGE_NO;
        }
        *ret = TAKE_PTR(b->conf);
        return 0;
}
