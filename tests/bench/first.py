#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""The first pass over memory of distinct contents: the whole daemon against the bare reading and hashing of the same
memory in the same run, and two scanning threads against one.

    first.py [--mib N] [--rounds N]

Each round: the floor (bench-floor), a new daemon, the floor again; then one with one thread and one with two. A daemon
is started over an empty cgroup, the process moves in, and what is measured is one pass asked for: its CPU time for the
floor (Merge=dry-run: everything is read, hashed, looked up and noted, nothing is done to the process), its wall time
for the threads (Merge=yes: before a dry run looks a second time it waits, and no thread shortens that). What two
threads can gain here at most is told by two floors at once: CPUs share caches, memory, sometimes a core."""
import argparse
import time

from bench import Bench, check, cpu_nsec, main, median, wait_for


def first_pass(bench, writer, group, elsewhere, merge, threads):
    """(CPU time, wall time)"""
    bench.move(elsewhere, writer.pid)
    daemon = bench.daemon(bench.configure(
        f"MinimumAge=0\nScanInterval=1w\nCPUQuota=1000%\nCPUQuotaBusy=100%\nMetadataMax=100%\nOnStop=unmerge\n"
        f"ScanThreads={threads}\n"
        f"[Cgroup {group}]\nMerge={merge}\n"))
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
    rates, speedups, cpus = [], [], []
    for _ in range(rounds):
        floor = writer.floor()
        cpu, _ = first_pass(bench, writer, group, elsewhere, "dry-run", 1)
        floor = (floor + writer.floor()) / 2 * writer.pages
        one_cpu, one = first_pass(bench, writer, group, elsewhere, "yes", 1)
        two_cpu, two = first_pass(bench, writer, group, elsewhere, "yes", 2)
        rates.append(floor / cpu)
        cpus.append(cpu)
        speedups.append(one / two)
        bench.record(pages=writer.pages, floor_nsec=floor, dry_run_cpu_nsec=cpu, rate_of_floor=rates[-1],
                     one_thread_cpu_nsec=one_cpu, one_thread_wall_nsec=one, two_threads_cpu_nsec=two_cpu,
                     two_threads_wall_nsec=two, speedup=speedups[-1])
    plain, cpu = writer.floor(plain=True), median(cpus)
    bench.record(floor_nsec_per_page=writer.floor(), floor_nsec_per_page_two_at_once=writer.floor(2),
                 plain_floor_nsec_per_page=plain, rate_of_plain_floor=plain * writer.pages / cpu)
    bench.require("first pass, one thread, share of the bare rate", median(rates), at_least=0.85)
    bench.require("two threads against one, wall time", median(speedups), at_least=1.7)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    # A pass ends after 2 GiB and goes on in the next: two of them, both full.
    parser.add_argument("--mib", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    main(Bench("first"), lambda b: first(b, args.mib, args.rounds))
