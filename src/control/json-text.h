/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include <jansson.h>

/* A text that somebody else chose, as a new JSON string: JSON is UTF-8, names of files, processes and cgroups are any
 * bytes. What is no UTF-8 has every byte above 0x7f written \xNN, and is cut off after some 1,000 bytes. NULL: JSON's
 * null. Out of memory: NULL. */
json_t *json_text(const char *text);
