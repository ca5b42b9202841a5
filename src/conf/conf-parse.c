/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "conf/conf-parse.h"

#include <string.h>

/*
 * The syntax of systemd.syntax(7): sections, assignments, comments on lines of their own, continuation by a trailing
 * backslash (which becomes a space; comment lines in between are passed over). CRLF and a leading byte order mark are
 * tolerated.
 *
 * Why not a library. libinih (r55) cuts section names off after 49 bytes (cgroup patterns are longer, and a pattern cut
 * off is another pattern), lets the lines after a bad header fall into the section before it, and gives line numbers
 * and new sections to the handler only when it was compiled so. libeconf (0.5.1) gives a file up at its first error,
 * keeps one value for each key, and does not read /run. Both take the text for what a C string holds: neither minds
 * NUL bytes or encodings.
 *
 * What must hold: every line of the text is either empty, a comment, or ends up in exactly one item; a line that is
 * damaged is never handed out in part.
 */

typedef struct Joined {
        char *text;
        size_t size;
        unsigned line;                  /* where it began; 0 = nothing is pending */
        char first;                     /* its first character, damaged or not */
        const char *problem;            /* of any of its lines */
} Joined;

static bool is_space(char c) { return c == ' ' || c == '\t'; }

static char *strip(char *s) {
        char *end;

        while (is_space(*s))
                s++;
        end = s + strlen(s);
        while (end > s && is_space(end[-1]))
                end--;
        *end = 0;
        return s;
}

/* How many bytes the UTF-8 sequence at s takes, 0 when it is none (RFC 3629: no surrogates, nothing overlong). */
static size_t utf8_length(const unsigned char *s, size_t size) {
        size_t n;
        uint32_t c, least;

        if (s[0] < 0x80)
                return 1;
        if (s[0] >= 0xf0) {
                n = 4;
                least = 0x10000;
        } else if (s[0] >= 0xe0) {
                n = 3;
                least = 0x800;
        } else {
                n = 2;
                least = 0x80;
        }
        if (s[0] < 0xc0 || s[0] > 0xf4 || n > size)
                return 0;
        c = s[0] & (0x7fU >> n);
        for (size_t i = 1; i < n; i++) {
                if ((s[i] & 0xc0) != 0x80)
                        return 0;
                c = c << 6 | (s[i] & 0x3fU);
        }
        return c < least || c > 0x10ffff || (c >= 0xd800 && c <= 0xdfff) ? 0 : n;
}

static const char *line_problem(const char *line, size_t size) {
        const unsigned char *s = (const unsigned char *)line;

        for (size_t i = 0, n; i < size; i += n) {
                if (!s[i])
                        return "NUL byte";
                if ((s[i] < ' ' && s[i] != '\t') || s[i] == 0x7f)
                        return "control character";
                n = utf8_length(s + i, size - i);
                if (!n)
                        return "invalid UTF-8";
        }
        return NULL;
}

/* An even number of backslashes at the end are escaped ones; an odd one continues the line. */
static bool continues(const char *line, size_t size) {
        size_t n = 0;

        while (n < size && line[size - n - 1] == '\\')
                n++;
        return n % 2 == 1;
}

/* Adds a line to what is pending. Once something is wrong the text no longer grows. */
static int joined_add(Joined *joined, const char *line, size_t size, unsigned number) {
        const char *problem = line_problem(line, size);
        char *p;

        if (!problem && (size > CONF_LINE_BYTES_MAX || joined->size > CONF_LINE_BYTES_MAX - size))
                problem = "line too long";
        if (!joined->line) {
                joined->line = number;
                joined->first = *line;
        } else if (joined->first == '[')
                problem = "section header continued on another line";
        else if (size > 0 && *line == '[') {
                joined->first = '[';
                problem = "section header after a line that ends in a backslash";
        }
        if (!joined->problem)
                joined->problem = problem;
        if (joined->problem)
                return 0;
        p = realloc(joined->text, joined->size + size + 1);
        if (!p)
                return -ENOMEM;
        memcpy(p + joined->size, line, size);
        joined->text = p;
        joined->size += size;
        p[joined->size] = 0;
        return 0;
}

/* Keys start with a letter. What starts otherwise, or ends like a header, may be what is left of one. */
static ConfItemType bad_type(char first, char last) {
        bool letter = (first >= 'a' && first <= 'z') || (first >= 'A' && first <= 'Z');

        return letter && last != ']' ? CONF_ITEM_BAD_LINE : CONF_ITEM_BAD_SECTION;
}

static void item_from_header(ConfItem *item, char *text) {
        size_t size = strlen(text);
        char *p;

        item->type = CONF_ITEM_BAD_SECTION;
        if (text[size - 1] != ']') {
                item->problem = "section header without a closing ']'";
                return;
        }
        text[size - 1] = 0;
        text = strip(text + 1);
        if (!*text) {
                item->problem = "section header without a name";
                return;
        }
        item->type = CONF_ITEM_SECTION;
        item->name = text;
        p = text + strcspn(text, " \t");
        if (*p) {
                *p = 0;
                item->argument = strip(p + 1);
        }
}

static void item_from_assignment(ConfItem *item, char *text) {
        char *equals = strchr(text, '='), last = text[strlen(text) - 1];

        if (!equals) {
                item->type = bad_type(*text, last);
                item->problem = "neither a section, an assignment nor a comment";
                return;
        }
        *equals = 0;
        item->name = strip(text);
        item->argument = strip(equals + 1);
        item->type = CONF_ITEM_ASSIGNMENT;
        if (last == ']' && strpbrk(item->name, " \t")) {
                item->type = CONF_ITEM_BAD_SECTION;
                item->problem = "section header without an opening '['";
        } else if (!*item->name) {
                item->type = CONF_ITEM_BAD_LINE;
                item->problem = "assignment without a key";
        }
}

/* Hands the pending logical line out and forgets it. */
static int joined_flush(Joined *joined, ConfItemHandler handler, void *userdata) {
        ConfItem item = { .line = joined->line };
        char *text;

        if (!joined->line)
                return 0;
        joined->line = 0;
        joined->size = 0;
        if (joined->problem) {
                item.type = bad_type(joined->first, 0);
                item.problem = TAKE_PTR(joined->problem);
                return handler(userdata, &item);
        }
        text = strip(joined->text);
        if (*text == '[')
                item_from_header(&item, text);
        else
                item_from_assignment(&item, text);
        return handler(userdata, &item);
}

static int parse_lines(Joined *joined, const char *text, size_t size, ConfItemHandler handler, void *userdata) {
        const char *end = text + size, *next;
        unsigned number = 0;

        for (; text < end; text = next) {
                const char *newline = memchr(text, '\n', (size_t)(end - text));
                const char *stop = newline ? newline : end;
                bool more;
                int r;

                next = newline ? newline + 1 : end;
                number++;
                if (stop > text && stop[-1] == '\r')
                        stop--;
                while (text < stop && is_space(*text))
                        text++;
                if (text < stop && (*text == '#' || *text == ';'))
                        continue;
                /* Empty, or a backslash that has nothing to continue. */
                if (!joined->line && (text == stop || (stop - text == 1 && *text == '\\')))
                        continue;
                more = continues(text, (size_t)(stop - text));
                r = joined_add(joined, text, (size_t)(stop - text), number);
                if (r < 0)
                        return r;
                if (more) {
                        if (!joined->problem)
                                joined->text[joined->size - 1] = ' ';
                        continue;
                }
                r = joined_flush(joined, handler, userdata);
                if (r)
                        return r;
        }
        return joined_flush(joined, handler, userdata);
}

int conf_parse(const char *text, size_t size, ConfItemHandler handler, void *userdata) {
        static const char mark[] = "\xef\xbb\xbf";
        Joined joined = {};
        int r;

        if (size >= sizeof mark - 1 && memcmp(text, mark, sizeof mark - 1) == 0) {
                text += sizeof mark - 1;
                size -= sizeof mark - 1;
        }
        r = parse_lines(&joined, text, size, handler, userdata);
        free(joined.text);
        return r;
}
