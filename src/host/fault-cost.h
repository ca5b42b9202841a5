/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "base/util.h"

/*
 * What faults cost on this machine, by trying: a few hundred of them in memory of our own, some milliseconds. Where the
 * CPU walks the guest's page tables itself a write to a shared page takes 3 to 6 us, to a tracked one 0.8; where a
 * hypervisor shadows them (PVM) 15 to 70, and 14.
 */
typedef struct HostFaultCost {
        uint32_t break_nsec;    /* a write to a shared page, with its copy, in a process that runs on several CPUs */
        uint32_t flush_nsec;    /* what a TLB flush for it takes of a thread on another CPU; 0: none had time */
        uint32_t write_nsec;    /* the first write to a tracked page (userfaultfd, WP_ASYNC); 0: none can be tracked */
} HostFaultCost;

#define HOST_BREAK_DEAR_NSEC 10000U     /* from here on breaks are dear: no CPU does that by itself */

/* -errno: no memory; *ret is not touched. */
int host_fault_cost(HostFaultCost *ret);
