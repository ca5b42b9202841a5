/* SPDX-License-Identifier: GPL-2.0 */

/*
 * Reverse-map walks over KSM pages: how many, and how long each took. No tracepoint tells, so this is fentry and fexit,
 * which some hosts refuse. A walk may sleep, and does not begin another.
 */
#include "kernel.h"

#ifndef PROBE_RAW
struct {
        __uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
        __uint(max_entries, 1);
        __type(key, __u32);
        __type(value, struct probe_walks);
} walks SEC(".maps");

/* When the walk of a thread began. */
struct {
        __uint(type, BPF_MAP_TYPE_LRU_HASH);
        __uint(max_entries, 1024);
        __type(key, __u32);
        __type(value, __u64);
} begun SEC(".maps");

SEC("fentry/rmap_walk_ksm")
int BPF_PROG(on_walk) {
        __u32 thread = bpf_get_current_pid_tgid();
        __u64 now = bpf_ktime_get_ns();

        bpf_map_update_elem(&begun, &thread, &now, BPF_ANY);
        return 0;
}

SEC("fexit/rmap_walk_ksm")
int BPF_PROG(on_walked) {
        __u32 zero = 0, thread = bpf_get_current_pid_tgid();
        __u64 *since = bpf_map_lookup_elem(&begun, &thread), nsec;
        struct probe_walks *sum = bpf_map_lookup_elem(&walks, &zero);

        if (!since || !sum)
                return 0;
        nsec = bpf_ktime_get_ns() - *since;
        bpf_map_delete_elem(&begun, &thread);
        sum->walks++;
        sum->nsec += nsec;
        if (nsec > sum->nsec_max)
                sum->nsec_max = nsec;
        return 0;
}
#endif

char LICENSE[] SEC("license") = "GPL";
