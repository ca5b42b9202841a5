/* SPDX-License-Identifier: GPL-2.0 */

/*
 * Who comes and goes in the cgroups that are managed: fork, exec, the end of a process, and moves between cgroups, said
 * at once. Only what concerns a managed cgroup is said; the daemon then reads that cgroup's processes, so that an event
 * is a hint and a lost one costs the wait till the daemon looks by itself.
 */
#include "kernel.h"

PROBE_MAP_CGROUPS;
PROBE_MAP_TARGETS;
PROBE_MAP_EVENTS;

static __always_inline int say(__u32 kind, __u64 cgroup, __u32 tgid) { return say_to(&events, kind, cgroup, tgid); }

static __always_inline int say_if_managed(__u32 kind, __u64 cgroup, __u32 tgid) {
        return bpf_map_lookup_elem(&cgroups, &cgroup) ? say(kind, cgroup, tgid) : 0;
}

/* By then the child is in its cgroup, which need not be its parent's (CLONE_INTO_CGROUP). */
#ifdef PROBE_RAW
TRACEPOINT(sched_process_fork)
int BPF_PROG(on_fork, void *parent, void *child) {
        return say_if_managed(PROBE_EVENT_FORK, bpf_get_current_cgroup_id(), 0);
}
#else
TRACEPOINT(sched_process_fork)
int BPF_PROG(on_fork, struct task_struct *parent, struct task_struct *child) {
        if (child->pid != child->tgid) /* a thread */
                return 0;
        return say_if_managed(PROBE_EVENT_FORK, child->cgroups->dfl_cgrp->kn->id, child->tgid);
}
#endif

TRACEPOINT(sched_process_exec)
int BPF_PROG(on_exec) { return say_if_managed(PROBE_EVENT_EXEC, bpf_get_current_cgroup_id(), current_tgid()); }

TRACEPOINT(sched_process_exit)
int BPF_PROG(on_exit) {
        __u64 who = bpf_get_current_pid_tgid();

        if ((__u32)who != who >> 32) /* a thread */
                return 0;
        return say_if_managed(PROBE_EVENT_EXIT, bpf_get_current_cgroup_id(), who >> 32);
}

/* Into a managed cgroup, or out of one. */
#ifdef PROBE_RAW
TRACEPOINT(cgroup_attach_task)
int BPF_PROG(on_attach) { return say(PROBE_EVENT_ATTACH, 0, 0); }
#else
TRACEPOINT(cgroup_attach_task)
int BPF_PROG(on_attach, struct cgroup *cgroup, const char *path, struct task_struct *task) {
        __u64 id = cgroup->kn->id;
        __u32 tgid = task->tgid;

        if (bpf_map_lookup_elem(&targets, &tgid))
                return say(PROBE_EVENT_ATTACH, 0, tgid);
        return say_if_managed(PROBE_EVENT_ATTACH, id, tgid);
}
#endif

char LICENSE[] SEC("license") = "GPL";
