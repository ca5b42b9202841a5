/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "conf/conf-value.h"
#include "conf/conf.h"

#include <string.h>
#include <strings.h>

/*
 * Values are read in integers all the way (a fraction is digits and a power of ten), by hand: strtod() and strtoull()
 * take signs, leading space, hexadecimal, "inf" and the locale's decimal point, none of which belongs here.
 */

typedef struct Unit {
        const char *name;
        uint64_t factor;
} Unit;

#define MINUTE (60 * NSEC_PER_SEC)
#define HOUR (60 * MINUTE)

static const Unit times[] = {
        { "ns", 1 },                    { "nsec", 1 },
        { "us", NSEC_PER_USEC },        { "usec", NSEC_PER_USEC },      { "\xc2\xb5s", NSEC_PER_USEC },
        { "ms", NSEC_PER_MSEC },        { "msec", NSEC_PER_MSEC },
        { "", NSEC_PER_SEC },           { "s", NSEC_PER_SEC },          { "sec", NSEC_PER_SEC },
        { "second", NSEC_PER_SEC },     { "seconds", NSEC_PER_SEC },
        { "m", MINUTE },                { "min", MINUTE },              { "minute", MINUTE },   { "minutes", MINUTE },
        { "h", HOUR },                  { "hr", HOUR },                 { "hour", HOUR },       { "hours", HOUR },
        { "d", 24 * HOUR },             { "day", 24 * HOUR },           { "days", 24 * HOUR },
        { "w", 168 * HOUR },            { "week", 168 * HOUR },         { "weeks", 168 * HOUR },
};

static const Unit sizes[] = {
        { "", 1 },                      { "B", 1 },
        { "K", (uint64_t)1 << 10 },     { "M", (uint64_t)1 << 20 },     { "G", (uint64_t)1 << 30 },
        { "T", (uint64_t)1 << 40 },     { "P", (uint64_t)1 << 50 },     { "E", (uint64_t)1 << 60 },
};

static bool is_digit(char c) { return c >= '0' && c <= '9'; }

static bool is_space(char c) { return c == ' ' || c == '\t'; }

static const char *skip_space(const char *s) { return s + strspn(s, " \t"); }

/* A number with a fraction of at most nine digits: whole + fraction / scale. */
typedef struct Decimal {
        uint64_t whole, fraction, scale;
} Decimal;

static int decimal_read(const char **s, Decimal *ret) {
        const char *p = *s;
        Decimal d = { .scale = 1 };

        if (!is_digit(*p))
                return -EINVAL;
        for (; is_digit(*p); p++)
                if (__builtin_mul_overflow(d.whole, (uint64_t)10, &d.whole) ||
                    __builtin_add_overflow(d.whole, (uint64_t)(*p - '0'), &d.whole))
                        return -ERANGE;
        if (*p == '.') {
                p++;
                if (!is_digit(*p))
                        return -EINVAL;
                for (; is_digit(*p); p++) {
                        if (d.scale >= NSEC_PER_SEC)
                                return -EINVAL;
                        d.fraction = d.fraction * 10 + (uint64_t)(*p - '0');
                        d.scale *= 10;
                }
        }
        *s = p;
        *ret = d;
        return 0;
}

static int decimal_times(const Decimal *d, uint64_t factor, uint64_t *ret) {
        __extension__ typedef unsigned __int128 Wide;
        Wide value = (Wide)d->whole * factor + (Wide)d->fraction * factor / d->scale;

        if (value > UINT64_MAX)
                return -ERANGE;
        *ret = (uint64_t)value;
        return 0;
}

/* Reads the word at *s as one of the units. */
static const Unit *unit_read(const char **s, const Unit *units, size_t n) {
        const char *p = skip_space(*s);
        size_t size = strcspn(p, " \t.0123456789");

        for (size_t i = 0; i < n; i++)
                if (strlen(units[i].name) == size && memcmp(units[i].name, p, size) == 0) {
                        *s = skip_space(p + size);
                        return &units[i];
                }
        return NULL;
}

static int with_unit_read(const char **s, const Unit *units, size_t n, uint64_t *ret) {
        const Unit *unit;
        Decimal d;
        int r = decimal_read(s, &d);

        if (r < 0)
                return r;
        unit = unit_read(s, units, n);
        return unit ? decimal_times(&d, unit->factor, ret) : -EINVAL;
}

int conf_value_boolean(const char *s, bool *ret) {
        static const char *const words[][2] = {
                { "0", "1" }, { "no", "yes" }, { "n", "y" }, { "false", "true" }, { "f", "t" }, { "off", "on" },
        };

        for (size_t i = 0; i < ELEMENTSOF(words); i++)
                for (size_t j = 0; j < 2; j++)
                        if (strcasecmp(s, words[i][j]) == 0) {
                                *ret = j;
                                return 0;
                        }
        return -EINVAL;
}

int conf_value_number(const char *s, uint64_t *ret) {
        Decimal d;
        int r = decimal_read(&s, &d);

        if (r < 0)
                return r;
        if (*s || d.scale != 1)
                return -EINVAL;
        *ret = d.whole;
        return 0;
}

int conf_value_time(const char *s, uint64_t *ret_nsec) {
        uint64_t sum = 0, part;

        do {
                int r = with_unit_read(&s, times, ELEMENTSOF(times), &part);

                if (r < 0)
                        return r;
                if (__builtin_add_overflow(sum, part, &sum))
                        return -ERANGE;
        } while (*s);
        *ret_nsec = sum;
        return 0;
}

int conf_value_size(const char *s, uint64_t *ret) {
        uint64_t size;
        int r = with_unit_read(&s, sizes, ELEMENTSOF(sizes), &size);

        if (r < 0)
                return r;
        if (*s)
                return -EINVAL;
        *ret = size;
        return 0;
}

int conf_value_share(const char *s, uint32_t *ret) {
        uint64_t share;
        Decimal d;
        int r = decimal_read(&s, &d);

        if (r < 0)
                return r;
        if (strcmp(skip_space(s), "%") != 0 || d.scale > 100)
                return -EINVAL;
        r = decimal_times(&d, CONF_SHARE_ONE / 100, &share);
        if (r < 0)
                return r;
        if (share > UINT32_MAX)
                return -ERANGE;
        *ret = (uint32_t)share;
        return 0;
}

/*
 * Refuses what would match something else than its author meant: an Exclude= that silently matches nothing opts in.
 * Brackets and braces mean something in other glob languages and nothing here; "\x2d", copied from a unit's name, would
 * mean "x2d"; an empty component (a '/' too many) matches no cgroup.
 */
const char *conf_pattern_problem(const char *pattern) {
        if (strlen(pattern) > CONF_PATTERN_BYTES_MAX)
                return "pattern too long";
        for (const char *p = pattern; *p; p++) {
                if (strchr("[]{}", *p))
                        return "brackets and braces have no meaning in a pattern (put a backslash before one that is meant literally)";
                if (is_space(*p))
                        return "more than one word where one pattern belongs (put a backslash before a space that is meant)";
                if (*p == '/' && (p == pattern || p[1] == '/' || !p[1]))
                        return "empty component in the pattern (a '/' too many)";
                if (*p == '\\') {
                        p++;
                        if (!*p || !strchr("*?\\[]{} \t", *p))
                                return "backslash before an ordinary character (write \\\\ for one that is part of the name)";
                }
        }
        return NULL;
}
