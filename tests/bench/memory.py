#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""What remembering pages takes, for each page that has no twin: by the daemon's own count (metadata_bytes), as its
resident memory grew, and what the kernel keeps for us (slabs, and page tables of the process); beside it the slabs that
grow when the same memory is marked for ksmd and scanned: 64 bytes a page for its ksm_rmap_item.

    memory.py [--mib N]"""
import argparse

from bench import Bench, Ksmd, check, main, meminfo_bytes, status_bytes

PASSES = 4


def kernel(writer):
    """(slab memory of the kernel that cannot be reclaimed, page tables of the process), bytes. The slabs are
    everybody's, so the least of some readings is taken."""
    return min(meminfo_bytes("SUnreclaim") for _ in range(20)), status_bytes(writer.pid, "VmPTE")


def memory(bench, mib):
    group = bench.cgroup("a")
    config = bench.configure("MinimumAge=0\nScanInterval=1w\nCPUQuota=100%\nCPUQuotaBusy=100%\n"
                             f"[Cgroup {group}]\nMerge=yes\n")
    daemon = bench.daemon(config)
    varlink = bench.connect()
    varlink.call("ScanNow")
    resident = status_bytes(daemon.pid, "VmRSS")
    writer = bench.writer(group, mib, whole=False)
    slab, tables = kernel(writer)
    for _ in range(PASSES):
        writer.write(writer.pages // 1000)
        varlink.call("ScanNow")
    stats = bench.stats()
    check(stats["pages_unshared"] >= writer.pages * 0.95, f"{stats['pages_unshared']} pages are known")
    pages = stats["pages_unshared"]
    slab_after, tables_after = kernel(writer)
    row = {"pages": pages, "metadata_bytes": stats["metadata_bytes"],
           "resident_bytes": status_bytes(daemon.pid, "VmRSS") - resident,
           "resident_at_most_bytes": status_bytes(daemon.pid, "VmHWM") - resident,
           "slab_bytes": slab_after - slab, "page_table_bytes": tables_after - tables}
    row["bytes_per_page"] = (row["resident_bytes"] + max(0, row["slab_bytes"]) + row["page_table_bytes"]) / pages
    bench.record(**row)
    check(bench.stop(daemon) == 0, "the daemon's end")
    with Ksmd(bench) as ksmd:
        slab, _ = kernel(writer)
        writer.order("mark")
        ksmd.scan(2)
        ksm = (kernel(writer)[0] - slab) / writer.pages
        bench.record(ksm_slab_bytes_per_page=ksm)
    bench.require("bytes a page, daemon and kernel", row["bytes_per_page"], at_most=16)
    bench.require("KSM's bytes a page / ours", ksm / row["bytes_per_page"], at_least=4)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--mib", type=int, default=4096)
    args = parser.parse_args()
    main(Bench("memory"), lambda b: memory(b, args.mib))
