#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""From the start of the daemon to 95 % of what can be saved on four redis-servers with the same data, in its default
configuration; and the same servers, made anew, under ksmd with the kernel's defaults (100 pages every 20 ms), marked
whole by PR_SET_MEMORY_MERGE.

    converge.py [--keys N] [--rounds N]

What can be saved is what `ksmctl estimate` counts. What is saved is counted in frames by bench-frames, from outside:
the frames the servers took before less those they take now. CPU time is the daemon's and that of ksmd, which merges for
it. The daemon's time begins with its execution, ksmd's with the write to its knob; the servers are older than
MinimumAge by then. The last round's curves are recorded."""
import argparse
import subprocess
import threading
import time

from bench import BUILD, KSM, Bench, Cpu, Ksmd, check, main, median
from servers import KEYS, Redis

ENOUGH = 0.95
DEFAULTS = {"run": 0, "pages_to_scan": 100, "sleep_millisecs": 20, "smart_scan": 1, "use_zero_pages": 0}


class Curve:
    """Frames of the servers over time."""

    def __init__(self, servers, milliseconds):
        command = [BUILD / "tests/bench/bench-frames", milliseconds, *servers.pids]
        self.process = subprocess.Popen([str(word) for word in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        text=True)
        servers.bench.processes.append(self.process)
        self.samples = []
        self.before = self.read()[1]
        self.thread = threading.Thread(target=self.collect, daemon=True)
        self.thread.start()

    def read(self):
        return tuple(map(int, self.process.stdout.readline().split()))

    def collect(self):
        for line in self.process.stdout:
            self.samples.append(tuple(map(int, line.split())))

    def wait(self, begun, pages, seconds):
        """Until so many pages are saved; when that was, in seconds."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for when, frames in list(self.samples):
                if when >= begun and self.before - frames >= pages:
                    return (when - begun) / 1e9
            time.sleep(0.05)
        return None

    def end(self, begun):
        """[(seconds, pages saved)] from the beginning on."""
        self.process.stdin.close()
        self.process.wait()
        self.thread.join()
        return [[round((when - begun) / 1e9, 3), self.before - frames]
                for when, frames in self.samples if when >= begun]


def thin(points, least):
    """The points between which something changes, and the first and last."""
    out = points[:1]
    for previous, point in zip(points, points[1:]):
        if abs(point[1] - out[-1][1]) >= least:
            out += ([previous] if previous != out[-1] else []) + [point]
    return out + points[-1:]


def converge(bench, servers, who, interval, seconds, start, after):
    pages = servers.saveable()
    curve = Curve(servers, interval)
    cpu, begun = Cpu(), time.monotonic_ns()
    cpu.daemon = start()
    took = curve.wait(begun, ENOUGH * pages, seconds)
    time.sleep(after)
    daemon_nsec, ksmd_nsec = cpu.used()
    points = curve.end(begun)
    check(took, f"{who}: {points[-1]} of {pages} pages after {seconds} s")
    bench.record(who=who, saveable_pages=pages, seconds=took, saved_pages=points[-1][1], daemon_cpu_nsec=daemon_nsec,
                 ksmd_cpu_nsec=ksmd_nsec)
    return took, pages, thin(points, pages // 200)


def ours(bench, group, keys):
    servers = Redis(bench, group, keys=keys)
    servers.wait_until_old(6)
    config = bench.configure(f"[Cgroup {group}]\nMerge=yes\n")
    daemons = []

    def start():
        daemons.append(bench.daemon(config, wait=False))
        return daemons[0].pid
    result = converge(bench, servers, "ksmd-user", 50, 60, start, 0.5)
    check(bench.stop(daemons[0]) == 0, "the daemon's end")
    servers.end()
    bench.unmerge()
    return result


def kernel(bench, group, keys):
    with Ksmd(bench, **DEFAULTS):
        servers = Redis(bench, group, keys=keys, ksm=True)
        servers.wait_until_old(6)

        def start():
            (KSM / "run").write_text("1")
        result = converge(bench, servers, "ksmd", 200, 300, start, 2)
        (KSM / "run").write_text("0")
        servers.end()
    bench.unmerge()
    return result


def run(bench, keys, rounds):
    group = bench.cgroup("a")
    mine = [ours(bench, group, keys) for _ in range(rounds)]
    theirs = kernel(bench, group, keys)
    for who, (_, pages, points) in (("ksmd-user", mine[-1]), ("ksmd", theirs)):
        bench.record(curve=who, saveable_pages=pages, points=points)
    bench.require("95 % of the saving: ksmd's time / ours", theirs[0] / median(took for took, _, _ in mine),
                  at_least=50)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--keys", type=int, default=KEYS)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    main(Bench("converge"), lambda b: run(b, args.keys, args.rounds))
