/* SPDX-License-Identifier: GPL-2.0 */

/*
 * The mappings of one thread's process, read like a file: an iterator (kernel/bpf/task_iter.c), which is told the
 * thread when it is opened. It holds the mmap lock for reading as long as it fills the buffer of one read(2), lets it
 * go where somebody waits for it, and looks at no page.
 */
#include "kernel.h"

#ifndef PROBE_RAW
#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct bpf_iter_meta {
        struct seq_file *seq;
};

struct vm_area_struct {
        unsigned long vm_start, vm_end;
        struct mm_struct *vm_mm;
        unsigned long vm_flags;
        struct anon_vma *anon_vma;
};

struct bpf_iter__task_vma {
        struct bpf_iter_meta *meta;
        struct task_struct *task;
        struct vm_area_struct *vma;
};

#pragma clang attribute pop

SEC("iter/task_vma")
int on_vma(struct bpf_iter__task_vma *ctx) {
        struct vm_area_struct *vma = ctx->vma;
        struct task_struct *task = ctx->task;
        struct probe_vma out = {};

        if (!task || !vma) /* the end */
                return 0;
        out.start = vma->vm_start;
        out.end = vma->vm_end;
        out.flags = vma->vm_flags;
        out.anonymous = vma->anon_vma != NULL;
        out.space = (__u64)vma->vm_mm;
        out.programs = task->self_exec_id;
        bpf_seq_write(ctx->meta->seq, &out, sizeof out);
        return 0;
}
#endif

char LICENSE[] SEC("license") = "GPL";
