/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "probe/probe.h"

/* The compiled probes, as bpftool's skeletons hold them: ELF files in memory. Only in a build with probes. */
typedef struct ProbeObject {
        const void *(*bytes)(size_t *ret_size);
} ProbeObject;

extern const ProbeObject probe_objects[_PROBE_MAX][2]; /* typed, raw; bytes NULL: there is no such way */
