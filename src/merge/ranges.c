/* SPDX-License-Identifier: LGPL-2.1-or-later */

/* Set operations on sorted ranges: each is one walk over both inputs, and builds a new set, so that what fails for
 * want of memory leaves both as they were. */

#include "merge/ranges.h"

void ranges_done(Ranges *ranges) {
        free(ranges->ranges);
        *ranges = (Ranges){};
}

int ranges_append(Ranges *ranges, uint64_t start, uint64_t end) {
        if (start >= end)
                return 0;
        if (ranges->n > 0 && ranges->ranges[ranges->n - 1].end == start) {
                ranges->ranges[ranges->n - 1].end = end;
                return 0;
        }
        if (GROW(ranges->ranges, ranges->n, ranges->allocated) < 0)
                return -ENOMEM;
        ranges->ranges[ranges->n++] = (PlanRange){ start, end };
        return 0;
}

static void replace(Ranges *ret, Ranges *by) {
        ranges_done(ret);
        *ret = *by;
        *by = (Ranges){};
}

int ranges_subtract(const Ranges *a, const Ranges *b, Ranges *ret) {
        _cleanup_(ranges_done) Ranges out = {};
        size_t j = 0;

        for (size_t i = 0; i < a->n; i++) {
                uint64_t at = a->ranges[i].start, end = a->ranges[i].end;

                while (j < b->n && b->ranges[j].end <= at)
                        j++;
                /* The last of b may reach into the next of a too: j stays on it. */
                for (size_t k = j; k < b->n && b->ranges[k].start < end; k++) {
                        if (ranges_append(&out, at, b->ranges[k].start) < 0)
                                return -ENOMEM;
                        at = b->ranges[k].end;
                }
                if (ranges_append(&out, at, end) < 0)
                        return -ENOMEM;
        }
        replace(ret, &out);
        return 0;
}

int ranges_intersect(const Ranges *a, const Ranges *b, Ranges *ret) {
        _cleanup_(ranges_done) Ranges out = {};

        for (size_t i = 0, j = 0; i < a->n && j < b->n;) {
                const PlanRange *x = &a->ranges[i], *y = &b->ranges[j];

                if (ranges_append(&out, MAX_OF(x->start, y->start), MIN_OF(x->end, y->end)) < 0)
                        return -ENOMEM;
                if (x->end <= y->end)
                        i++;
                else
                        j++;
        }
        replace(ret, &out);
        return 0;
}

int ranges_unite(const Ranges *a, const Ranges *b, Ranges *ret) {
        _cleanup_(ranges_done) Ranges out = {};

        for (size_t i = 0, j = 0; i < a->n || j < b->n;) {
                const PlanRange *next;
                uint64_t start;

                if (j >= b->n || (i < a->n && a->ranges[i].start <= b->ranges[j].start))
                        next = &a->ranges[i++];
                else
                        next = &b->ranges[j++];
                start = out.n > 0 ? MAX_OF(next->start, out.ranges[out.n - 1].end) : next->start;
                if (ranges_append(&out, start, next->end) < 0)
                        return -ENOMEM;
        }
        replace(ret, &out);
        return 0;
}

uint64_t ranges_pages(const Ranges *ranges) {
        uint64_t pages = 0;

        for (size_t i = 0; i < ranges->n; i++)
                pages += (ranges->ranges[i].end - ranges->ranges[i].start) / PAGE_BYTES;
        return pages;
}
