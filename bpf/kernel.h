/* SPDX-License-Identifier: GPL-2.0 */
#pragma once

/*
 * What the probes know of the kernel: the few fields they read, found at load time in the kernel's own BTF (CO-RE),
 * wherever they are by then. No vmlinux.h.
 *
 * Each source is compiled twice: for tp_btf, whose arguments are typed and which the kernel checks against its BTF;
 * and, with PROBE_RAW, for plain raw tracepoints, for kernels without BTF: what needs a field is left out there.
 */
#include <linux/types.h>
#include <linux/bpf.h>
#include <stdbool.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>
#ifndef PROBE_RAW
#include <bpf/bpf_core_read.h>
#endif

#include "probe.h"

#ifdef PROBE_RAW
#define TRACEPOINT(name) SEC("raw_tp/" #name)
#else
#define TRACEPOINT(name) SEC("tp_btf/" #name)

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct kernfs_node {
        __u64 id;
};

struct cgroup {
        struct kernfs_node *kn;
};

struct css_set {
        struct cgroup *dfl_cgrp;
};

struct task_struct {
        int pid;
        int tgid;
        struct css_set *cgroups;
        __u64 self_exec_id;
};

#pragma clang attribute pop
#endif

/* The sizes are set before loading where they depend on the host. */
#define PROBE_MAP_CGROUPS                                          \
        struct {                                                   \
                __uint(type, BPF_MAP_TYPE_HASH);                   \
                __uint(map_flags, BPF_F_NO_PREALLOC);              \
                __uint(max_entries, 65536);                        \
                __type(key, __u64);                                \
                __type(value, __u32);                              \
        } cgroups SEC(".maps")

#define PROBE_MAP_TARGETS                                          \
        struct {                                                   \
                __uint(type, BPF_MAP_TYPE_HASH);                   \
                __uint(map_flags, BPF_F_NO_PREALLOC);              \
                __uint(max_entries, 65536);                        \
                __type(key, __u32);                                \
                __type(value, struct probe_target);                \
        } targets SEC(".maps")

#define PROBE_MAP_BLOCKS                                           \
        struct {                                                   \
                __uint(type, BPF_MAP_TYPE_HASH);                   \
                __uint(map_flags, BPF_F_NO_PREALLOC);              \
                __uint(max_entries, 65536);                        \
                __type(key, struct probe_block_key);               \
                __type(value, struct probe_block);                 \
        } blocks SEC(".maps")

static __always_inline __u32 current_tgid(void) { return bpf_get_current_pid_tgid() >> 32; }

static __always_inline void add(__u64 *counter, __u64 n) { __sync_fetch_and_add(counter, n); }
