#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""How exactly CPUQuota= is kept, by a daemon that has more to do than it allows.

    budget.py [--quota PERCENT] [--seconds SECONDS]

Measured from outside, twice a second: the CPU time of the daemon and of ksmd. Any minute from the daemon's start on may
hold no more than the quota and a point; any minute of the last two no less than the quota less a point (before, half
of a minute's share was used at once, on purpose, and the rest of that minute is the thinner for it)."""
import argparse
import time

from bench import Bench, check, main
from quota import Meter, churn, opted_in

WINDOW = 60


def windows(samples, begin):
    """The shares used, in percent, of every minute that begins at a sample at or after `begin`."""
    shares, last = [], 0
    for start, used in samples:
        while last < len(samples) - 1 and samples[last][0] < start + WINDOW:
            last += 1
        if start >= begin and samples[last][0] >= start + WINDOW:
            shares.append(100 * (samples[last][1] - used) / (samples[last][0] - start))
    return shares


def budget(bench, quota, seconds):
    group = bench.cgroup("a")
    with churn(bench, group, mib=64):
        meter, samples = Meter(bench, bench.configure(opted_in(group, quota))), []
        begun = time.monotonic()
        while time.monotonic() - begun < seconds:
            samples.append((time.monotonic() - begun, meter.used()))
            time.sleep(0.5)
        stats, (daemon, ksmd) = bench.stats(), meter.parts()
        check(bench.stop(meter.daemon) == 0, "the daemon's end")
    every, late = windows(samples, 0), windows(samples, seconds - 2 * WINDOW)
    bench.record(quota_percent=quota, seconds=seconds, first_minute_percent=every[0], most_percent=max(every),
                 late_least_percent=min(late), late_most_percent=max(late), daemon_cpu_nsec=int(daemon * 1e9),
                 ksmd_cpu_nsec=int(ksmd * 1e9), throttled_nsec=stats["throttled_nsec"], full_scans=stats["full_scans"],
                 pages_hashed=stats["pages_hashed"])
    bench.require("most of the quota used in any minute, in points above it", max(every) - quota, at_most=1)
    bench.require("least used in a saturated minute, in points below the quota", quota - min(late), at_most=1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--quota", type=float, default=20)
    parser.add_argument("--seconds", type=float, default=240)
    args = parser.parse_args()
    main(Bench("budget"), lambda b: budget(b, args.quota, args.seconds))
