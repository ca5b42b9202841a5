/* SPDX-License-Identifier: GPL-2.0 */

/*
 * Writes to merged pages. The tracepoint says the address and why it faulted, not what is there; so the daemon says
 * beforehand which pages are merged, and a write fault on one of them is the write that takes it apart. Its bit is
 * cleared: the page is counted once, however many threads write to it at that moment.
 *
 * A fault costs a comparison unless it is a write to a page that is there and protected, and then one look-up.
 */
#include "kernel.h"

PROBE_MAP_TARGETS;
PROBE_MAP_BLOCKS;
PROBE_MAP_EVENTS;
PROBE_MAP_COSTS;

__u64 cow_breaks;

/* Of x86's error code: the page is present, it was a write; and what makes a fault something else (reserved bits,
 * instruction fetch, protection key, shadow stack). */
#define FAULT_PRESENT 1U
#define FAULT_WRITE 2U
#define FAULT_OTHERS (1U << 3 | 1U << 4 | 1U << 5 | 1U << 6)

static __always_inline int fault(__u64 addr, __u64 error) {
        struct probe_block_key key = {};
        struct probe_target *target;
        struct probe_block *block;
        __u64 bit = 1ULL << (addr >> PROBE_PAGE_SHIFT & 63), word = addr >> (PROBE_PAGE_SHIFT + 6) & 7;

        if ((error & (FAULT_PRESENT | FAULT_WRITE | FAULT_OTHERS)) != (FAULT_PRESENT | FAULT_WRITE)) {
                spend(&costs, &events, 1);
                return 0;
        }
        spend(&costs, &events, 2);
        key.block = addr >> PROBE_BLOCK_SHIFT;
        key.tgid = current_tgid();
        block = bpf_map_lookup_elem(&blocks, &key);
        if (!block || !(block->merged[word] & bit))
                return 0;
        if (!(__sync_fetch_and_and(&block->merged[word], ~bit) & bit))
                return 0;
        add(&cow_breaks, 1);
        target = bpf_map_lookup_elem(&targets, &key.tgid);
        if (target)
                add(&target->cow_breaks, 1);
        return 0;
}

TRACEPOINT(page_fault_user)
int BPF_PROG(on_fault_user, unsigned long addr, void *regs, unsigned long error) { return fault(addr, error); }

/* The kernel writes for the process: read(2) into a merged page. */
TRACEPOINT(page_fault_kernel)
int BPF_PROG(on_fault_kernel, unsigned long addr, void *regs, unsigned long error) { return fault(addr, error); }

char LICENSE[] SEC("license") = "GPL";
