/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "base/util.h"

/* Sets of addresses, as ranges by address that neither overlap nor touch. */
typedef struct PlanRange {
        uint64_t start, end;    /* bytes */
} PlanRange;

typedef struct Ranges {
        PlanRange *ranges;
        size_t n, allocated;
} Ranges;

void ranges_done(Ranges *ranges);
/* Appends; must not begin below the end of the last one, and becomes one with it where they touch. -ENOMEM. */
int ranges_append(Ranges *ranges, uint64_t start, uint64_t end);
/* *ret = a without b, a and b, a or b; a and b by address and disjoint, *ret initialised and replaced. -ENOMEM. */
int ranges_subtract(const Ranges *a, const Ranges *b, Ranges *ret);
int ranges_intersect(const Ranges *a, const Ranges *b, Ranges *ret);
int ranges_unite(const Ranges *a, const Ranges *b, Ranges *ret);
uint64_t ranges_pages(const Ranges *ranges);
