/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "base/util.h"

#include <jansson.h>
#include <stdio.h>

/* What the daemon said at one moment. */
typedef struct TopSample {
        json_t *status, *stats;         /* parameters of GetStatus and GetStats; NULL: none */
        uint64_t nsec;                  /* when */
} TopSample;

/* Writes one frame: what the daemon does, then a table of the cgroups, those that save most first. before: the sample
 * that rates are told from (with its stats NULL: none). Returns the number of the table's head line, from 0. */
unsigned top_write_frame(FILE *f, const TopSample *now, const TopSample *before);
