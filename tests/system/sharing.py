#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""How often a page may be mapped: 4,096 identical pages under several limits make as many copies as the limit says, for
KSM and in our own trees; auto follows from what a mapping costs, measured."""
import pathlib
import subprocess
import sys

from harness import KSM, Frames, Host, Obedient, check, nothing_shared, run_tests, skip

PAGES = 4096
VICTIM = r"""
import mmap, sys
P, N = 4096, int(sys.argv[1])
page = bytes((i * 7 + i // 256) % 256 for i in range(P))
area = mmap.mmap(-1, N * P, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
area.madvise(mmap.MADV_NOHUGEPAGE)
for i in range(N):
    area[i * P:(i + 1) * P] = page
import ctypes
print("ready", ctypes.addressof(ctypes.c_char.from_buffer(area)), flush=True)
for line in sys.stdin:
    print("ok" if all(area[i * P:(i + 1) * P] == page for i in range(N)) else "bad", flush=True)
"""


class Twins(Obedient):
    """One of the processes that share the pages."""

    def __init__(self, host, group, pages):
        self.process = subprocess.Popen(["/usr/bin/env", "python3", "-c", VICTIM, str(pages)], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True)
        host.processes.append(self.process)
        self.first = int(self.process.stdout.readline().split()[1]) // 4096
        self.pages, self.pid = pages, self.process.pid
        host.move(group, self.pid)

    def frames(self):
        return list(Frames().of(self.pid, self.first * 4096, (self.first + self.pages) * 4096).values())


def knob(name):
    return int((KSM / name).read_text())


def forget_all():
    """KSM keeps nodes of frames that are gone, and its limit with them, until it is told to take everything apart."""
    found = (KSM / "run").read_text()
    (KSM / "run").write_text("2")
    (KSM / "run").write_text(found)


def under_limit(host, limit, more=""):
    """Merges the pages under MaxPageSharing=limit; returns the most mappings of a frame, the statistics, and KSM's."""
    group = host.cgroup(f"limit-{limit}-{len(host.groups)}")
    twins = [Twins(host, group, PAGES // 4) for _ in range(4)]
    daemon = host.daemon(host.configure(f"MinimumAge=0\nScanInterval=1w\nMaxPageSharing={limit}\nOnStop=unmerge\n{more}"
                                        f"[Cgroup {group}]\nMerge=yes\n"))
    names = [file.read_text() for file in pathlib.Path(f"/proc/{daemon.pid}/task").glob("*/comm")]
    check(("crew-1\n" in names) == ("ScanThreads" in more), f"threads {names} with {more!r}")
    for _ in range(20):
        host.passes()
        counts = {}
        for pfn in [pfn for twin in twins for pfn in twin.frames()]:
            counts[pfn] = counts.get(pfn, 0) + 1
        force = host.stats()["max_page_sharing"]
        if force and len(counts) <= -(-PAGES // force) * 101 // 100 + 2:
            break
    host.passes(2)
    stats = host.stats()
    kernel = {name: knob(name) for name in ("stable_node_dups", "stable_node_chains", "max_page_sharing")}
    check(all(twin.intact() for twin in twins), "merging changed memory")
    host.ctl("unmerge", group)
    forget_all()
    check(host.stop(daemon) == 0, "end")
    check(knob("max_page_sharing") == int(host.knobs["max_page_sharing"]), "KSM's limit was not put back")
    for twin in twins:
        twin.process.kill()
        twin.process.wait()
    return counts, stats, kernel


def dups_follow_the_limit():
    """limits 2, 16, 256 and auto: ceil(4096 / limit) frames, each mapped that often at most; KSM's numbers and ours"""
    with Host("sharing") as host:
        if not nothing_shared(host):  # asked first: it takes everybody's apart
            skip("somebody else shares pages on this host: KSM's limit cannot change")
        forget_all()
        for limit, more in (2, ""), (16, ""), (16, "ScanThreads=2\n"), (256, ""), ("auto", "MaxRmapWalk=50us\n"):
            counts, stats, kernel = under_limit(host, limit, more)
            force = stats["max_page_sharing"]
            wanted = -(-PAGES // force)
            print(f"    {limit}: in force {force}, {len(counts)} frames, at most {max(counts.values())} mappings; KSM "
                  f"{kernel}; ours {stats['stable_node_dups']} in {stats['stable_node_chains']}"
                  + (f"; {stats['rmap_mapping_nsec']} ns a mapping" if limit == "auto" else ""), flush=True)
            check(force == kernel["max_page_sharing"], "not what KSM has")
            check(force <= (256 if limit == "auto" else limit), "the limit is not in force")
            check(max(counts.values()) <= force, "a frame is mapped more often than allowed")
            check(wanted <= len(counts) <= wanted * 102 // 100 + 4, f"{len(counts)} frames, not {wanted}")
            # The interpreters' own pages make a chain here and there as well.
            # The last page may have nobody left to share with.
            check(wanted - 1 <= kernel["stable_node_dups"] <= wanted * 102 // 100 + 400, "KSM's dups")
            check(kernel["stable_node_chains"] >= 1 and stats["stable_node_chains"] >= 1, "no chain")
            check(wanted * 98 // 100 - 1 <= stats["stable_node_dups"] <= wanted * 102 // 100 + 400, "our dups")
            if limit == "auto":
                check(stats["rmap_mapping_nsec"] > 0, "nothing was measured")
                check(force == 256 or force * stats["rmap_mapping_nsec"] <= 50000 or force == 2,
                      "a walk would take longer than was asked for")


def across_nodes_by_reload():
    """MergeAcrossNodes= changed by a reload: put in force when no page is shared; till then it is said what to do"""
    with Host("across") as host:
        if not nothing_shared(host) or knob("merge_across_nodes") != 1:
            skip("somebody else shares pages on this host, or keeps nodes apart")
        forget_all()
        group = host.cgroup("a")
        twins = [Twins(host, group, PAGES // 4) for _ in range(2)]

        def configure(across):
            host.configure(f"MinimumAge=0\nScanInterval=1w\nMergeAcrossNodes={across}\nOnStop=unmerge\n"
                           f"[Cgroup {group}]\nMerge=yes\n")

        def waits():
            return [w for w in host.call("GetStatus")["warnings"] if "MergeAcrossNodes" in w]

        def merge():
            host.passes(3)
            check(len({pfn for twin in twins for pfn in twin.frames()}) <= PAGES // 2 // 256 * 2, "not merged")

        def change(across, was, wanted):
            configure(across)
            host.ctl("reload")
            host.passes(2)
            check(knob("merge_across_nodes") == was and len(waits()) == 1 and "ksmctl unmerge" in waits()[0], f"{waits()}")
            host.ctl("unmerge", group)
            host.ctl("reload")
            merge()
            check(knob("merge_across_nodes") == wanted and not waits(), f"not in force: {waits()}")

        configure("yes")
        daemon = host.daemon(host.dir / "test.conf")
        merge()
        change("no", 1, 0)
        change("yes", 0, 1)
        change("no", 1, 0)
        check(all(twin.intact() for twin in twins), "memory changed")
        told = [line for line in daemon.log().splitlines() if "nodes" in line.lower()]
        print(f"    {len(told)} lines in the log: {told[0]}")
        check(len(told) == 6, f"{told}")
        host.ctl("unmerge", group)
        forget_all()
        check(host.stop(daemon) == 0 and knob("merge_across_nodes") == 1, "the knob was not put back")


if __name__ == "__main__":
    run_tests(dups_follow_the_limit, across_nodes_by_reload)
