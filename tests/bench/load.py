#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""redis under load: pipelined gets and sets of random keys on one of four servers with the same data, while nothing
else runs; while a new daemon converges; beside the same daemon when it has (the load stands until little is left to merge:
beside it BreakQuota= may make that take long); beside ksmd flat out, the servers marked whole.

    load.py [--rounds N] [--requests N]

Interleaved: a round is a stretch alone and one converging; in every other one the load goes on until a pass of
the daemon saves hardly more than the one before, and some pairs of stretches follow, beside the daemon and while it is paused (its probes stay, whose
price probe-cost tells, and what is merged stays merged). Only neighbours are compared, as the machine is
not the same for long, and the median of all pairs counts. Writes take merged pages apart, so each round has new
servers. Server, load and whoever works beside them share the CPUs there are: with two of them, both are busy before the
daemon asks for any."""
import argparse
import statistics
import time

from bench import KSM, Bench, Cpu, Ksmd, check, main, median
from servers import Redis

KINDS = ["get", "set"]
LOADED_WAIT_MAX = 300  # seconds
STEADY_PAIRS = 4


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

    def stretch(self, servers, who, daemon=None):
        cpu, begun = Cpu(daemon), time.monotonic()
        result = load(servers, self.requests)
        self.shares = [used / 1e9 / (time.monotonic() - begun) for used in cpu.used()]
        for kind, (rps, p99) in result.items():
            self.bench.record(detail=who, kind=kind, requests_per_second=rps, p99_nsec=p99, daemon_cpu_share=self.shares[0],
                              ksmd_cpu_share=self.shares[1])
        return result

    def compare(self, who, result, shares, alone):
        for kind in KINDS:
            self.rounds.setdefault((who, kind), []).append((*result[kind], *shares, *alone[kind]))

    def wait_until_steady(self, servers):
        """Until the saving hardly changes from pass to pass: without load, then under it, where writes take some apart; there
        a pass may take minutes, and five of them are enough."""
        check(self.wait_until_saved(lambda: time.sleep(1)), "not steady without load")
        self.wait_until_saved(lambda: load(servers, self.requests // 20))

    def wait_until_saved(self, meanwhile):
        until, passes, saved = time.monotonic() + LOADED_WAIT_MAX, 0, 0
        while time.monotonic() < until:
            meanwhile()
            status = self.bench.serving() and self.bench.call("GetStatus")
            if not status or status["state"] != "idle" or status["full_scans"] == passes:
                continue
            if passes > 0 and abs(status["bytes_saved"] - saved) <= saved * 0.01:
                return True
            passes, saved = status["full_scans"], status["bytes_saved"]
        print(f"    not steady: {passes} passes, {saved} bytes saved", flush=True)
        return False

    def daemon_round(self, steady_too):
        servers = Redis(self.bench, self.group)
        load(servers, self.requests)  # the server's memory comes to its size
        servers.wait_until_old(6)
        alone = self.stretch(servers, "alone")
        daemon = self.bench.daemon(self.config)
        self.compare("converging", self.stretch(servers, "converging", daemon.pid), self.shares, alone)
        if steady_too:
            self.wait_until_steady(servers)
        for i in range(STEADY_PAIRS if steady_too else 0):
            paused = self.paused(servers) if i % 2 else None
            steady, shares = self.stretch(servers, "steady", daemon.pid), self.shares
            self.compare("steady", steady, shares, paused or self.paused(servers))
        check(self.bench.stop(daemon) == 0, "the daemon's end")
        servers.end()
        self.bench.unmerge()

    def paused(self, servers):
        self.bench.call("Pause")
        try:
            return self.stretch(servers, "paused")
        finally:
            self.bench.call("Resume")

    def ksmd_round(self):
        with Ksmd(self.bench, smart_scan=1):
            servers = Redis(self.bench, self.group, ksm=True)
            load(servers, self.requests)
            before = self.stretch(servers, "alone")
            (KSM / "run").write_text("1")
            beside = self.stretch(servers, "ksmd flat out")
            self.compare("ksmd flat out", beside, self.shares, before)
            (KSM / "run").write_text("0")
            servers.end()
        self.bench.unmerge()


def run(bench, rounds, requests):
    bench_load = Load(bench, requests)
    for i in range(rounds):
        bench_load.daemon_round(i % 2 == 0)
        if i == 0:
            bench_load.ksmd_round()
    summary = {}
    for (who, kind), stretches in bench_load.rounds.items():
        rps, p99, daemon, ksmd, rps_alone, p99_alone = (median(values) for values in zip(*stretches))
        ratios = [median(s[i] / s[i + 4] for s in stretches) for i in (0, 1)]
        summary[who, kind] = ratios
        bench.record(beside=who, kind=kind, daemon_cpu_share=daemon, ksmd_cpu_share=ksmd, requests_per_second=rps,
                     alone=rps_alone, throughput_ratio=ratios[0], p99_nsec=p99, p99_alone_nsec=p99_alone, p99_ratio=ratios[1])
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
