/* SPDX-License-Identifier: GPL-2.0 */

/* What ksmd did with what was marked, and why a page did not merge (Linux 6.7 has the tracepoints). */
#include "kernel.h"

struct {
        __uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
        __uint(max_entries, 1);
        __type(key, __u32);
        __type(value, struct probe_ksm);
} ksm SEC(".maps");

static __always_inline int count(__u32 which) {
        __u32 zero = 0;
        struct probe_ksm *sum = bpf_map_lookup_elem(&ksm, &zero);

        if (sum && which < PROBE_KSM_N)
                sum->count[which]++;
        return 0;
}

static __always_inline int count_result(__u32 merged, int error) {
        switch (error) {
        case 0:
                return count(merged);
        case -14: /* EFAULT */
                return count(PROBE_KSM_CHANGED);
        case -12: /* ENOMEM */
                return count(PROBE_KSM_NO_MEMORY);
        }
        return count(PROBE_KSM_OTHER_ERROR);
}

TRACEPOINT(ksm_stop_scan)
int BPF_PROG(on_scan) { return count(PROBE_KSM_SCANS); }

TRACEPOINT(ksm_merge_with_ksm_page)
int BPF_PROG(on_merge, void *page, unsigned long pfn, void *item, void *mm, int error) {
        return count_result(PROBE_KSM_MERGED, error);
}

TRACEPOINT(ksm_merge_one_page)
int BPF_PROG(on_zero, unsigned long pfn, void *item, void *mm, int error) {
        return count_result(PROBE_KSM_ZERO, error);
}

TRACEPOINT(ksm_remove_ksm_page)
int BPF_PROG(on_drop) { return count(PROBE_KSM_DROPPED); }

char LICENSE[] SEC("license") = "GPL";
