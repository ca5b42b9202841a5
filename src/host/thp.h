/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "base/util.h"

/*
 * Whether the administrator wants huge pages (2 MiB) made: Documentation/admin-guide/mm/transhuge.rst. MADV_COLLAPSE
 * does not ask for it, so we do. May change at any time: to be read when it is needed.
 */
typedef enum HostThp {
        HOST_THP_NEVER,
        HOST_THP_ADVISED,       /* in mappings with MADV_HUGEPAGE */
        HOST_THP_ALWAYS,
} HostThp;

/* sysfs NULL: /sys/kernel/mm/transparent_hugepage. Where nothing is told: never. */
HostThp host_thp(const char *sysfs);

/* No huge page can be made of tmpfs pages, by whatever call: shmem_enabled is "deny", or the kernel has no huge pages.
 * The same holds of it: it may change. sysfs NULL: /sys/kernel/mm. Where nothing is told: false. */
bool host_shmem_huge_denied(const char *sysfs);
