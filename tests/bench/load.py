#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""redis under load: pipelined gets and sets of random keys on one of four servers with the same data, while nothing
else runs; while a new daemon converges; beside the same daemon when it has; beside ksmd flat out, the servers marked
whole.

    load.py [--rounds N] [--requests N]

Interleaved: a round is a stretch alone, one converging, load until the daemon has made two passes and the next is near,
one steady, and one alone again, the daemon stopped. Each is compared with the stretch alone that is next to it, as the
machine is not the same for long, and the median over the rounds counts. Writes take merged pages apart, so each round
has new servers. Server, load and whoever works beside them share the CPUs there are: with two of them, both are busy
before the daemon asks for any."""
import argparse
import statistics
import time

from bench import KSM, Bench, Ksmd, check, cpu_nsec, main, median
from servers import Redis

KINDS = ["get", "set"]
LOADED_WAIT_MAX = 300  # seconds


def load(servers, requests):
    """Gets and sets by turns. {kind: (requests a second, p99 in nanoseconds)}"""
    parts = {kind: [] for kind in KINDS}
    for _ in range(2):
        for kind in KINDS:
            parts[kind].append(servers.load(kind, requests // 2))
    return {kind: tuple(statistics.mean(values) for values in zip(*part)) for kind, part in parts.items()}


class Load:
    def __init__(self, bench, requests):
        self.bench, self.requests, self.rounds = bench, requests, {}
        self.group = bench.cgroup("a")
        self.config = bench.configure(f"[Cgroup {self.group}]\nMerge=yes\n")

    def stretch(self, servers, who, pid=None):
        cpu, begun = pid and cpu_nsec(pid), time.monotonic()
        result = load(servers, self.requests)
        self.share = (cpu_nsec(pid) - cpu) / 1e9 / (time.monotonic() - begun) if pid else 0
        for kind, (rps, p99) in result.items():
            self.bench.record(detail=who, kind=kind, requests_per_second=rps, p99_nsec=p99, cpu_share=self.share)
        return result

    def compare(self, who, result, share, alone):
        for kind in KINDS:
            self.rounds.setdefault((who, kind), []).append((*result[kind], share, *alone[kind]))

    def pass_is_near(self):
        if not self.bench.serving():
            return False
        status = self.bench.call("GetStatus")
        return status["full_scans"] >= 2 and 1e9 < (status["next_pass_nsec"] or 0) < 4e9

    def daemon_round(self):
        servers = Redis(self.bench, self.group)
        load(servers, self.requests)  # the server's memory comes to its size
        servers.wait_until_old(6)
        before = self.stretch(servers, "alone")
        daemon = self.bench.daemon(self.config)
        converging = self.stretch(servers, "converging", daemon.pid)
        self.compare("converging", converging, self.share, before)
        until = time.monotonic() + LOADED_WAIT_MAX
        while not self.pass_is_near():
            check(time.monotonic() < until, "no second pass under load")
            load(servers, self.requests // 20)
        steady = self.stretch(servers, "steady", daemon.pid)
        share = self.share
        check(self.bench.stop(daemon) == 0, "the daemon's end")
        self.compare("steady", steady, share, self.stretch(servers, "alone"))
        servers.end()
        self.bench.unmerge()

    def ksmd_round(self):
        with Ksmd(self.bench, smart_scan=1) as ksmd:
            servers = Redis(self.bench, self.group, ksm=True)
            load(servers, self.requests)
            before = self.stretch(servers, "alone")
            (KSM / "run").write_text("1")
            beside = self.stretch(servers, "ksmd flat out", ksmd.pid)
            self.compare("ksmd flat out", beside, self.share, before)
            (KSM / "run").write_text("0")
            servers.end()
        self.bench.unmerge()


def run(bench, rounds, requests):
    bench_load = Load(bench, requests)
    for i in range(rounds):
        bench_load.daemon_round()
        if i % 3 == 0:
            bench_load.ksmd_round()
    summary = {}
    for (who, kind), stretches in bench_load.rounds.items():
        rps, p99, share, rps_alone, p99_alone = (median(values) for values in zip(*stretches))
        ratios = [median(s[i] / s[i + 3] for s in stretches) for i in (0, 1)]
        summary[who, kind] = ratios
        bench.record(beside=who, kind=kind, its_cpu_share=share, requests_per_second=rps, alone=rps_alone,
                     throughput_ratio=ratios[0], p99_nsec=p99, p99_alone_nsec=p99_alone, p99_ratio=ratios[1])
    for who in ("converging", "steady"):
        for kind in KINDS:
            bench.require(f"{kind}s, daemon {who}: throughput", summary[who, kind][0], at_least=0.97)
            bench.require(f"{kind}s, daemon {who}: p99 latency", summary[who, kind][1], at_most=1.1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--requests", type=int, default=2000000)
    args = parser.parse_args()
    main(Bench("load"), lambda b: run(b, args.rounds, args.requests))
