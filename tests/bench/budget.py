#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""How exactly CPUQuota= is kept, by a daemon that has more to do than it allows.

    budget.py [--quota PERCENT] [--seconds SECONDS]

Measured from outside, twice a second: the CPU time of the daemon and of ksmd. Any minute from the daemon's start on may
hold no more than the quota and a point; any saturated minute of the last two no less than the quota less a point
(before, half of a minute's share was used at once, on purpose, and the rest of that minute is the thinner for it). A
minute is saturated when work waited for the quota in every five seconds of it: on a machine that is busy with others
ksmd may get less than the quota for longer than is made up for."""
import argparse
import sys
import time

from bench import Bench, check, main
from quota import Meter, churn, opted_in

WINDOW, PART = 60, 5


def windows(samples, begin):
    """(share used in percent, whether it was saturated) of every minute that begins at a sample at or after `begin`."""
    found, last = [], 0
    for first, (start, used, _) in enumerate(samples):
        while last < len(samples) - 1 and samples[last][0] < start + WINDOW:
            last += 1
        if start < begin or samples[last][0] < start + WINDOW:
            continue
        waits = [next((s[2] for s in samples[first:] if s[0] >= start + t), None) for t in range(0, WINDOW, PART)]
        found.append((100 * (samples[last][1] - used) / (samples[last][0] - start),
                      all(a < b for a, b in zip(waits, waits[1:] + [samples[last][2]]))))
    return found


def budget(bench, quota, seconds):
    group = bench.cgroup("a")
    with churn(bench, group, mib=64):
        meter, samples = Meter(bench, bench.configure(opted_in(group, quota))), []
        begun = time.monotonic()
        while time.monotonic() - begun < seconds:
            samples.append((time.monotonic() - begun, meter.used(), bench.stats()["throttled_nsec"]))
            time.sleep(0.5)
        stats, (daemon, ksmd) = bench.stats(), meter.parts()
        check(bench.stop(meter.daemon) == 0, "the daemon's end")
    every, late = windows(samples, 0), windows(samples, seconds - 2 * WINDOW)
    most, saturated = max(share for share, _ in every), [share for share, full in late if full]
    bench.record(quota_percent=quota, seconds=seconds, first_minute_percent=every[0][0], most_percent=most,
                 late_least_percent=min(share for share, _ in late), late_minutes=len(late),
                 saturated_minutes=len(saturated), daemon_cpu_nsec=int(daemon * 1e9), ksmd_cpu_nsec=int(ksmd * 1e9),
                 throttled_nsec=stats["throttled_nsec"], full_scans=stats["full_scans"],
                 pages_hashed=stats["pages_hashed"])
    bench.require("most of the quota used in any minute, in points above it", most - quota, at_most=1)
    if saturated:
        bench.require("least used in a saturated minute, in points below the quota", quota - min(saturated), at_most=1)
    else:
        print("no minute was saturated: the machine is too busy to tell", file=sys.stderr)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--quota", type=float, default=20)
    parser.add_argument("--seconds", type=float, default=240)
    args = parser.parse_args()
    main(Bench("budget"), lambda b: budget(b, args.quota, args.seconds))
