#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Two NUMA nodes: pages meet across them or not, as configured; what the kernel moves to another node under us is found,
belongs to its new node's tree from then on and is no false hit in the old one; and memory can be taken out."""
import ctypes
import os
import pathlib
import re
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "system"))
from harness import KSM, KSMCTL, Frames, Host, check, marked, run_tests, wait_for

LOAD = {"mib": 4, "duplicate": 50, "zero": 0, "run": 64}
SYS_SET_MEMPOLICY, SYS_MIGRATE_PAGES = 238, 256
MPOL_DEFAULT, MPOL_BIND = 0, 2
libc = ctypes.CDLL(None, use_errno=True)


def syscall(*arguments):
    result = libc.syscall(*(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments))
    check(result >= 0, f"system call {arguments[0]}: {os.strerror(ctypes.get_errno())}")
    return result


def zones():
    """[(first frame, end, node)]"""
    out, node, spanned = [], None, 0
    for line in open("/proc/zoneinfo"):
        words = line.split()
        if words[0] == "Node":
            node, spanned = int(words[1].rstrip(",")), 0
        elif words[0] == "spanned":
            spanned = int(words[1])
        elif words[0] == "start_pfn:" and spanned:
            out.append((int(words[1]), int(words[1]) + spanned, node))
    return out


ZONES = zones()


def node_of(pfn):
    return next(node for first, end, node in ZONES if first <= pfn < end)


def on_node(node, start):
    """What start() starts takes its memory from that node."""
    mask = ctypes.c_ulong(1 << node)
    syscall(SYS_SET_MEMPOLICY, MPOL_BIND, ctypes.byref(mask), 64)
    try:
        return start()
    finally:
        syscall(SYS_SET_MEMPOLICY, MPOL_DEFAULT, None, 0)


def migrate(load, source, target):
    for pid in load.pids:
        syscall(SYS_MIGRATE_PAGES, pid, 64, ctypes.byref(ctypes.c_ulong(1 << source)),
                ctypes.byref(ctypes.c_ulong(1 << target)))


def nodes(load):
    """How many pages of the workload are on each node."""
    out = [0, 0]
    for pfn in load.frames().values():
        out[node_of(pfn)] += 1
    return out


def copies(*loads):
    """The distinct KSM frames behind the workloads."""
    frames = Frames()
    return {pfn for load in loads for pfn in load.frames().values() if frames.flags(pfn) & Frames.KSM_FLAG}


class Numa(Host):
    def daemon_for(self, group, across):
        return self.daemon(self.configure(f"MinimumAge=0\nScanInterval=1w\nMergeAcrossNodes={across}\n"
                                          f"[Cgroup {group}]\nMerge=yes\n"))

    def __exit__(self, kind, value, trace):
        if kind not in (None, SystemExit):
            for command in ["targets"], ["stats"], ["status"]:
                print(self.ctl(*command, expect=None))
        super().__exit__(kind, value, trace)

    def passes(self, n=1):
        """On a machine this slow a request may not be read within the time a client gets for it."""
        for _ in range(n):
            wait_for("a pass", lambda: subprocess.run([KSMCTL, "--socket", self.socket, "scan"],
                                                      stderr=subprocess.DEVNULL).returncode == 0)

    def undo(self, group):
        """Whom a stop would have disturbed is tried again."""
        self.ctl("unmerge", group, expect=None)
        pids = (self.root / group / "cgroup.procs").read_text().split()
        wait_for("nothing marked", lambda: sum(marked(pid) for pid in pids) == 0)
        check(sum(load.merged() for load in self.workloads) == 0, "unmarked, but merged")
        # KSM keeps nodes of frames that are gone, and its knob with them, until it is told to take everything apart. A
        # frame of libc's that a workload's processes had in common by their fork became KSM's when some of them were marked;
        # the first of them, which is not in the cgroup, still maps it.
        for load in self.workloads:
            self.end(load)
        for run in "2", "0":
            (KSM / "run").write_text(run)

    def until_merged(self, *loads):
        """By the clock, not by passes: stops take long here, and are put off."""
        def merged():
            self.passes()
            return all(load.merged() >= load.duplicate * len(load.pids) * 99 // 100 for load in loads)
        wait_for(f"{[load.duplicate * len(load.pids) for load in loads]} pages merged", merged, interval=0.2)


def apart():
    """MergeAcrossNodes=no: one copy on each node; what migratepages moves is found, meets its new node, misleads nobody"""
    with Numa("apart") as host:
        group = host.cgroup("a")
        zero = on_node(0, lambda: host.workload(group, processes=2, **LOAD))
        one = on_node(1, lambda: host.workload(group, processes=2, **LOAD))
        check(nodes(zero)[1] == 0 and nodes(one)[0] == 0, f"{nodes(zero)} {nodes(one)}")
        daemon = host.daemon_for(group, "no")
        host.until_merged(zero, one)
        check((KSM / "merge_across_nodes").read_text() == "0\n", "KSM was not told")
        found = copies(zero, one)
        print(f"    {zero.duplicate} contents, {len(found)} copies, pages by node {nodes(zero)} {nodes(one)}", flush=True)
        check(abs(len(found) - 2 * zero.duplicate) <= 64, "there is not one copy on each node")
        check(nodes(zero)[1] == 0 and nodes(one)[0] == 0, f"merged across: {nodes(zero)} {nodes(one)}")

        # The kernel moves all of node 1's to node 0; whoever comes to node 1 now is alone there.
        migrate(one, 1, 0)
        check(nodes(one)[1] <= 64, f"not moved: {nodes(one)}")
        host.passes(2)
        alone = on_node(1, lambda: host.workload(group, processes=1, **LOAD))
        host.passes(3)
        told = host.call("Explain", pid=alone.pids[0])
        print(f"    alone on node 1: {told['pages_merged']} merged, {told['merge_failures']['kernel']} wanted of {alone.pages}")
        check(told["pages_merged"] <= 64 and told["merge_failures"]["kernel"] <= alone.pages // 20,
              f"it is said to have twins: {told}")
        # Merging goes on, on both.
        more = [on_node(node, lambda: host.workload(group, processes=1, **LOAD)) for node in (0, 1)]
        host.until_merged(zero, one, alone, *more)
        check(nodes(alone)[0] == 0 and nodes(more[1])[0] == 0 and nodes(more[0])[1] == 0,
              f"merged across: {nodes(alone)} {[nodes(m) for m in more]}")
        check(all(load.intact() for load in (zero, one, alone, *more)), "memory changed")
        host.undo(group)
        check(host.stop(daemon) == 0, "end")


def together():
    """MergeAcrossNodes=yes: one copy; it is found again when the kernel moved it; memory is taken out meanwhile"""
    with Numa("together") as host:
        group = host.cgroup("a")
        zero = on_node(0, lambda: host.workload(group, processes=1, **LOAD))
        one = on_node(1, lambda: host.workload(group, processes=1, **LOAD))
        daemon = host.daemon_for(group, "yes")
        host.until_merged(zero, one)
        found = copies(zero, one)
        print(f"    {zero.pages} contents, {len(found)} copies", flush=True)  # the two are alike, page for page
        check(abs(len(found) - zero.pages) <= 64, "there is not one copy")

        # Moved, the merged pages have other frames; who comes now finds them all the same.
        source = 0 if nodes(zero)[0] > nodes(zero)[1] else 1
        migrate(zero, source, 1 - source)
        check(len(copies(zero, one) & found) < len(found) // 2, "the merged pages were not moved")
        host.passes(2)
        late = on_node(0, lambda: host.workload(group, processes=1, **LOAD))
        host.until_merged(zero, one, late)
        check(abs(len(copies(zero, one, late)) - zero.pages) <= 64, "the newcomer did not join")

        # Node 1 loses memory: its pages move out of the way, merged ones too.
        blocks = sorted(pathlib.Path("/sys/devices/system/node/node1").glob("memory[0-9]*"),
                        key=lambda p: int(re.sub(r"\D", "", p.name)))
        offline = []
        for block in reversed(blocks):
            try:
                (block / "state").write_text("offline")
                offline.append(block)
            except OSError:
                continue
            if len(offline) == 2:
                break
        print(f"    {len(offline)} of {len(blocks)} memory blocks of node 1 taken out", flush=True)
        again = on_node(0, lambda: host.workload(group, processes=1, **LOAD))
        host.until_merged(zero, one, late, again)
        check(all(load.intact() for load in (zero, one, late, again)), "memory changed")
        for block in offline:
            (block / "state").write_text("online")
        check(offline, "no memory could be taken out")
        host.undo(group)
        check(host.stop(daemon) == 0, "end")


if len(list(pathlib.Path("/sys/devices/system/node").glob("node[0-9]*"))) < 2:
    print("this machine has one node")
    sys.exit(1)
run_tests(apart, together)
