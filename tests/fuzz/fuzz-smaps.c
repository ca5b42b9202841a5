/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * Any text as smaps, and any bytes as the name of a file in it.
 *
 * Must hold: it ends, and without a crash; what is accepted is in order, and does not depend on the pieces it came in;
 * nothing is readable whose header or VmFlags say that it is to be left alone (the oracle below looks at each line on
 * its own, slowly). And a name that the kernel wrote changes nothing but the name.
 */

#include "target/vma.h"
#include "fuzz.h"

/* Feeds text in pieces of so many bytes. */
static int parse(const char *text, size_t size, size_t piece, VmaList *ret) {
        _cleanup_(vma_parser_done) VmaParser parser = {};
        size_t at = 0, shown = 0, used;

        while (shown < size) {
                int r;

                shown = size - shown < piece ? size : shown + piece;
                r = vma_parser_feed(&parser, text + at, shown - at, &used);
                if (r < 0)
                        return r;
                MUST(used <= shown - at && (used == 0 || text[at + used - 1] == '\n'));
                at += used;
        }
        return at == size ? vma_parser_finish(&parser, ret) : -EINVAL;
}

/* Whether the words of a VmFlags line (up to size bytes) hold one that keeps us out. */
static bool flags_forbid(const char *p, size_t size) {
        static const char forbidden[] = "sh ms io pf mm de ss wf dp ht lo lf dd um uw ui ";

        for (size_t i = 0; i + 1 < size; i++) {
                if (p[i] == ' ')
                        continue;
                for (const char *f = forbidden; *f; f += 3)
                        if (f[0] == p[i] && f[1] == p[i + 1])
                                return true;
                i++;
        }
        return false;
}

static void check(const char *text, size_t size, const VmaList *list) {
        size_t n = 0;
        bool allowed = false;

        for (const char *p = text, *end = text + size, *eol; p < end; p = eol + 1) {
                eol = memchr(p, '\n', (size_t)(end - p));
                MUST(eol);
                if (*p >= 'A' && *p <= 'Z') {
                        if (eol - p >= 8 && memcmp(p, "VmFlags:", 8) == 0 && flags_forbid(p + 8, (size_t)(eol - p) - 8))
                                allowed = false;
                        if (eol - p >= 8 && memcmp(p, "VmFlags:", 8) == 0) {
                                const Vma *vma = &list->vmas[n - 1];
                                VmaSkip skip = vma->skip;
#ifdef FAIL_OPEN
                                if (skip == VMA_SKIP_LOCKED)
                                        skip = VMA_OK;
#endif
                                MUST(n > 0 && n <= list->n);
                                MUST(skip != VMA_OK || allowed);
                        }
                } else {
                        const char *space = memchr(p, ' ', (size_t)(eol - p));

                        n++;
                        MUST(n <= list->n && space && eol - space > 4);
                        allowed = space[1] == 'r' && space[4] == 'p';
                }
        }
        MUST(n == list->n);
        for (size_t i = 0; i < n; i++) {
                const Vma *vma = &list->vmas[i];

                MUST(vma->start < vma->end && vma->start % PAGE_BYTES == 0 && vma->end % PAGE_BYTES == 0);
                MUST(i == 0 || vma->start >= vma[-1].end);
                MUST((unsigned)vma->skip < _VMA_SKIP_MAX);
                MUST(vma_list_find(list, vma->start) == vma && vma_list_find(list, vma->end - 1) == vma);
        }
}

static bool same(const VmaList *a, const VmaList *b) {
        if (a->n != b->n)
                return false;
        for (size_t i = 0; i < a->n; i++)
                if (a->vmas[i].start != b->vmas[i].start || a->vmas[i].end != b->vmas[i].end ||
                    a->vmas[i].skip != b->vmas[i].skip || a->vmas[i].anonymous_bytes != b->vmas[i].anonymous_bytes ||
                    a->vmas[i].rss_bytes != b->vmas[i].rss_bytes ||
                    a->vmas[i].referenced_bytes != b->vmas[i].referenced_bytes)
                        return false;
        return true;
}

/* As seq_path(m, path, "\n") writes it. */
static size_t write_name(char *to, const uint8_t *name, size_t size) {
        size_t n = 0;

        to[n++] = '/';
        for (size_t i = 0; i < size && name[i]; i++)
                if (name[i] == '\n') {
                        memcpy(to + n, "\\012", 4);
                        n += 4;
                } else
                        to[n++] = (char)name[i];
        return n;
}

#define REST(flags)                                                                                              \
        "\nSize:                  4 kB\nRss:                   4 kB\nAnonymous:             4 kB\n"              \
        "AnonHugePages:         0 kB\nTHPeligible:           0\nVmFlags: " flags " \n"

static void check_name(const uint8_t *name, size_t size) {
        static const char before[] = "7f0000000000-7f0000001000 rw-p 00000000 fe:00 17                         ";
        static const char between[] = REST("rd wr mr mw me lo ac")
                "7f0000001000-7f0000002000 rw-p 00000000 fe:00 17                         ";
        static const char after[] = REST("rd wr mr mw me ac")
                "7f0000002000-7f0000003000 rw-p 00000000 00:00 0 " REST("rd wr mr mw me dd");
        _cleanup_free_ char *text = malloc(sizeof before + sizeof between + sizeof after + 2 * (4 * size + 1));
        VmaList list;
        size_t n = 0;

        MUST(text);
        memcpy(text, before, sizeof before - 1);
        n = sizeof before - 1;
        n += write_name(text + n, name, size);
        memcpy(text + n, between, sizeof between - 1);
        n += sizeof between - 1;
        n += write_name(text + n, name, size);
        memcpy(text + n, after, sizeof after);
        n += sizeof after - 1;
        MUST(vma_list_parse(text, false, &list) == 0);
        MUST(list.n == 3);
        /* A name may say that memory is secret. */
        MUST(list.vmas[0].skip == VMA_SKIP_LOCKED || list.vmas[0].skip == VMA_SKIP_SECRET);
        MUST(list.vmas[1].skip == VMA_OK || list.vmas[1].skip == VMA_SKIP_SECRET);
        MUST(list.vmas[2].skip == VMA_SKIP_DONTDUMP);
        for (size_t i = 0; i < 3; i++)
                MUST(list.vmas[i].anonymous_bytes == PAGE_BYTES && list.vmas[i].file == (i < 2));
        vma_list_done(&list);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
        _cleanup_free_ char *text = malloc(size + 1);
        VmaList whole, pieces;
        int r;

        MUST(text);
        memcpy(text, data, size);
        text[size] = 0;
        r = parse(text, size, size + 1, &whole);
        MUST(r == 0 || r == -EINVAL);
        for (size_t piece = 1; piece < 400; piece = piece * 3 + 1) {
                MUST(parse(text, size, piece, &pieces) == r);
                if (r == 0) {
                        MUST(same(&whole, &pieces));
                        vma_list_done(&pieces);
                }
        }
        if (r == 0) {
                check(text, size, &whole);
                vma_list_done(&whole);
        }
        check_name(data, MIN_OF(size, (size_t)4096));
        return 0;
}
