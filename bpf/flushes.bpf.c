/* SPDX-License-Identifier: GPL-2.0 */

/*
 * TLB flushes, by reason and by who ran on the CPU: ksmd, the daemon, a managed process, anybody else. A flush that a
 * CPU makes because another asked it to (remote shootdown) counts for who ran there and was interrupted.
 */
#include "kernel.h"

PROBE_MAP_TARGETS;
PROBE_MAP_EVENTS;
PROBE_MAP_COSTS;

struct {
        __uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
        __uint(max_entries, 1);
        __type(key, __u32);
        __type(value, struct probe_flushes);
} flushes SEC(".maps");

const volatile struct probe_settings settings;

TRACEPOINT(tlb_flush)
int BPF_PROG(on_flush, int reason, unsigned long pages) {
        __u32 zero = 0, tgid = current_tgid(), by = PROBE_BY_OTHERS, which;
        bool all = pages == (unsigned long)-1;
        struct probe_flush_count *count;
        struct probe_target *target;
        struct probe_flushes *sum = bpf_map_lookup_elem(&flushes, &zero);

        if (!sum)
                return 0;
        if (tgid && tgid == settings.ksmd_tgid)
                by = PROBE_BY_KSMD;
        else if (tgid == settings.daemon_tgid)
                by = PROBE_BY_DAEMON;
        else {
                /* What ksmd and the daemon pay is theirs to pay, and what is to be counted first of all. */
                spend(&costs, &events, 2);
                target = bpf_map_lookup_elem(&targets, &tgid);
                if (target) {
                        by = PROBE_BY_TARGETS;
                        add(&target->tlb_flushes, 1);
                        if (!all)
                                add(&target->tlb_flush_pages, pages);
                }
        }
        /* One index, checked as it is used: that is what the verifier follows. */
        which = by * PROBE_FLUSH_REASONS + ((__u32)reason & (PROBE_FLUSH_REASONS - 1));
        barrier_var(which);
        if (which >= PROBE_BY_N * PROBE_FLUSH_REASONS)
                return 0;
        count = &sum->count[0][0] + which;
        count->flushes++;
        if (all)
                count->all++;
        else
                count->pages += pages;
        return 0;
}

char LICENSE[] SEC("license") = "GPL";
