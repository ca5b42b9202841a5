/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

/*
 * Put in front of a source (-include): its allocations fail when the test says so. The headers that declare what is
 * redefined have to come first.
 */

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* How many allocations succeed before one fails; -1: all succeed. */
extern long allocations_left;

static inline bool allocation_fails(void) { return allocations_left >= 0 && allocations_left-- == 0; }

#define malloc(n) (allocation_fails() ? NULL : malloc(n))
#define calloc(n, size) (allocation_fails() ? NULL : calloc(n, size))
#define realloc(p, n) (allocation_fails() ? NULL : realloc(p, n))
#define reallocarray(p, n, size) (allocation_fails() ? NULL : reallocarray(p, n, size))
#define strdup(s) (allocation_fails() ? NULL : strdup(s))
#define strndup(s, n) (allocation_fails() ? NULL : strndup(s, n))
#define asprintf(...) (allocation_fails() ? -1 : asprintf(__VA_ARGS__))
#define open_memstream(p, n) (allocation_fails() ? NULL : open_memstream(p, n))
