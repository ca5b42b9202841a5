#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a target pays: the first write to each page after a pass, and a pass over it while it is busy.

    overhead.py [--mib N] [--seconds N] [--rounds N]

First writes: 1 % of the pages, with Track=yes and Track=no, against a process of the same size that is left alone.
Busy: one thread writes at random places all the time, for a stretch alone, beside a daemon that makes one pass after
the other, alone again, …; writes in a second of its own CPU time (the faults count), in a second of wall time (the
passes' share of the machine counts too), and how long sixteen writes took at most in 99.99 % of the cases."""
import argparse
import threading

from bench import Bench, check, cpu_nsec, main, median


def config(bench, group, track):
    return bench.configure("MinimumAge=0\nScanInterval=1w\nCPUQuota=100%\nCPUQuotaBusy=100%\nMetadataMax=100%\n"
                           f"[Cgroup {group}]\nMerge=yes\nTrack={track}\n")


def first_writes(bench, group, target, other, track, rounds):
    daemon = bench.daemon(config(bench, group, track))
    varlink = bench.connect()
    count, ours, plain = target.pages // 100, [], []
    for _ in range(4):
        target.write(count)
        varlink.call("ScanNow")
    for i in range(rounds):
        for writer, out in [(other, plain), (target, ours)][::1 if i % 2 else -1]:
            out.append(writer.write(count) / count)
        varlink.call("ScanNow")
    bench.record(what="first writes", track=track, pages_written=count, nsec_per_page=median(ours),
                 untracked_nsec_per_page=median(plain), extra_nsec_per_page=median(o - p for o, p in zip(ours, plain)))
    check(bench.stop(daemon) == 0, "the daemon's end")


def busy_stretch(target, seconds, varlink=None):
    target.begin("busy", int(seconds * 1000))
    passes, done = 0, threading.Event()
    result = []

    def collect():
        result.extend(target.answer())
        done.set()
    thread = threading.Thread(target=collect)
    thread.start()
    while varlink and not done.is_set():
        varlink.call("ScanNow")
        passes += 1
        done.wait(0.05)
    thread.join()
    writes, cpu, p99, p9999, longest = result
    return {"daemon_cpu_share": None, "passes": passes, "writes_cpu_second": writes / (cpu / 1e9),
            "writes_second": writes / seconds, "p99_nsec": p99, "p99.99_nsec": p9999, "longest_nsec": longest}


def busy(bench, group, target, track, seconds, rounds):
    alone, beside = [], []
    for _ in range(rounds):
        alone.append(busy_stretch(target, seconds))
        daemon = bench.daemon(config(bench, group, track))
        varlink = bench.connect()
        for _ in range(3):
            varlink.call("ScanNow")
        cpu = cpu_nsec(daemon.pid)
        beside.append(busy_stretch(target, seconds, varlink))
        beside[-1]["daemon_cpu_share"] = (cpu_nsec(daemon.pid) - cpu) / 1e9 / seconds
        check(bench.stop(daemon) == 0, "the daemon's end")
    for who, rows in (("alone", alone), ("passes", beside)):
        middle = {field: None if rows[0][field] is None else median(row[field] for row in rows) for field in rows[0]}
        bench.record(what="busy", track=track, who=who, **middle)


def overhead(bench, mib, seconds, rounds):
    group = bench.cgroup("a")
    target, other = bench.writer(group, mib), bench.writer(None, mib, seed=2)
    for track in ("yes", "no"):
        first_writes(bench, group, target, other, track, 9)
    other.end()
    for track in ("yes", "auto", "no"):
        busy(bench, group, target, track, seconds, rounds)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    main(Bench("overhead"), lambda b: overhead(b, args.mib, args.seconds, args.rounds))
