/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

/*
 * Whether the administrator wants huge pages (2 MiB) made: Documentation/admin-guide/mm/transhuge.rst. MADV_COLLAPSE does
 * not ask for it, so we do. May change at any time: to be read when it is needed.
 */
typedef enum HostThp {
        HOST_THP_NEVER,
        HOST_THP_ADVISED,       /* in mappings with MADV_HUGEPAGE */
        HOST_THP_ALWAYS,
} HostThp;

/* sysfs NULL: /sys/kernel/mm/transparent_hugepage. Where nothing is told: never. */
HostThp host_thp(const char *sysfs);
