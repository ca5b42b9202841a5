#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""The first pass over memory of distinct contents: the whole daemon against the bare reading and hashing of the same
memory in the same run, and two scanning threads against one.

    first.py [--mib N] [--rounds N]

Each round: the floor (bench-floor), a new daemon with one thread, one with two, the floor again. A daemon is started
over an empty cgroup, the process moves in, and what is measured is one pass asked for: its CPU time for the floor,
its wall time for the threads. Merge=dry-run: nothing is merged or tracked, everything is read, hashed, looked up and
noted. What two threads can gain here at most is told by two floors at once: CPUs share caches, memory, sometimes a
core."""
import argparse
import time

from bench import Bench, check, cpu_nsec, main, median, wait_for


def first_pass(bench, writer, group, elsewhere, threads):
    bench.move(elsewhere, writer.pid)
    daemon = bench.daemon(bench.configure(
        f"MinimumAge=0\nScanInterval=1w\nCPUQuota=1000%\nMetadataMax=100%\nScanThreads={threads}\n"
        f"[Cgroup {group}]\nMerge=dry-run\n"))
    varlink = bench.connect()
    varlink.call("ScanNow")
    bench.move(group, writer.pid)
    wait_for("a process that is known", lambda: varlink.call("GetStatus")["processes"] == 1, 10, 0.01)
    hashed, cpu, wall = bench.stats()["pages_hashed"], cpu_nsec(daemon.pid), time.monotonic_ns()
    varlink.call("ScanNow")
    wall, cpu = time.monotonic_ns() - wall, cpu_nsec(daemon.pid) - cpu
    hashed = bench.stats()["pages_hashed"] - hashed
    check(hashed >= writer.pages, f"{hashed} of {writer.pages} pages were read within the pass")
    check(bench.stop(daemon) == 0, "the daemon's end")
    return cpu, wall


def first(bench, mib, rounds):
    group, elsewhere = bench.cgroup("a"), bench.cgroup("elsewhere")
    writer = bench.writer(elsewhere, mib)
    shares, speedups = [], []
    for _ in range(rounds):
        floor = writer.floor()
        cpu, wall = first_pass(bench, writer, group, elsewhere, 1)
        cpu2, wall2 = first_pass(bench, writer, group, elsewhere, 2)
        floor = (floor + writer.floor()) / 2 * writer.pages
        shares.append(floor / cpu)
        speedups.append(wall / wall2)
        bench.record(pages=writer.pages, floor_nsec=floor, pass_nsec=cpu, pass_wall_nsec=wall, pass_2_threads_nsec=cpu2,
                     pass_2_threads_wall_nsec=wall2, rate_of_floor=shares[-1], speedup=speedups[-1])
    bench.record(floor_nsec_per_page=writer.floor(), floor_nsec_per_page_two_at_once=writer.floor(2))
    bench.require("first pass, one thread, share of the bare rate", median(shares), at_least=0.85)
    bench.require("two threads against one, wall time", median(speedups), at_least=1.7)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--mib", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    main(Bench("first", alone=False), lambda b: first(b, args.mib, args.rounds))
