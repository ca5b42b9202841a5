/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "base/util.h"
#include "host/fault-cost.h"

/*
 * What this kernel and our privileges offer, found by trying, once. Every field is a fact that some module leans on;
 * `ksmctl doctor` prints them with what follows from each.
 */
typedef struct HostFeature {
        const char *name;       /* "process_madvise(MADV_MERGEABLE)" */
        int state;              /* 1: works; 0: absent; -errno: refused or broken */
        bool required;          /* the daemon cannot work without it */
        const char *follows;    /* what follows from its state, one sentence; static */
} HostFeature;

typedef struct HostKernel {
        bool page_size_supported, pagemap_pfns, kpageflags, process_vm_readv, proc_mem, ptrace, suspend_seccomp;
        bool pidfd, pidfd_getfd, io_uring, process_madvise_mergeable, pagemap_scan, uffd_wp_async, uffd_move;
        bool ksm, ksm_zero_pages, ksm_writable, swap;
        uint64_t memory_bytes;
        unsigned max_map_count, n_nodes, n_cpus;
        HostFaultCost fault_cost;       /* zeros: could not be measured */
        unsigned n_ksm_processes;       /* that offer memory to KSM now, as far as this kernel tells (ksm_process()) */
        char release[65];
        HostFeature features[40];
        size_t n_features;
} HostKernel;

/* Probes on ourselves and a short-lived child only; changes nothing. Never fails: what cannot be tried is absent. */
void host_kernel_probe(HostKernel *ret);

/* There is swap now: it comes and goes while we run. One sysinfo(2): to be asked once a pass, not for each page. */
bool host_has_swap(void);
