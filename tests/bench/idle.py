#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a daemon in its default configuration takes of a CPU while much memory is opted in and nothing changes.

    idle.py [--mib N] [--settle SECONDS] [--seconds SECONDS]

As many 4 KiB pages as fit (16 GiB at most), each unlike all others, in four processes. From the daemon's start its
CPU time is read every two seconds (the curve); it is given time to converge and to find the memory quiet, and then
the share over a minute or more counts. Nothing is asked of it meanwhile."""
import argparse
import time

from bench import Bench, check, cpu_nsec, main, meminfo_bytes

LEFT_FREE = 3 << 30     # for the daemon's own memory and everybody else
STEP = 2
SHARE_MAX = 0.001


def idle(bench, mib, settle, seconds):
    mib = min(mib, (meminfo_bytes("MemAvailable") - LEFT_FREE) >> 20)
    check(mib >= 256, "too little memory")
    group = bench.cgroup("a")
    writers = [bench.writer(group, mib // 4, whole=False, seed=1 + i) for i in range(4)]
    time.sleep(6)  # MinimumAge
    daemon, begun = bench.daemon(bench.configure(f"[Cgroup {group}]\nMerge=yes\n")), time.monotonic()
    samples = [(0, 0)]
    while samples[-1][0] < settle + seconds:
        time.sleep(STEP)
        samples.append((time.monotonic() - begun, cpu_nsec(daemon.pid)))
    first = next(s for s in samples if s[0] >= settle)
    share = (samples[-1][1] - first[1]) / 1e9 / (samples[-1][0] - first[0])
    stats = bench.stats()
    pages = sum(writer.pages for writer in writers)
    check(stats["pages_unshared"] >= pages * 0.9, f"{stats['pages_unshared']} of {pages} pages are known")
    curve = [[round(b[0], 1), (b[1] - a[1]) / 1e9 / (b[0] - a[0])] for a, b in zip(samples, samples[1:])]
    bench.record(pages=pages, settle_seconds=settle, seconds=samples[-1][0] - first[0], cpu_share=share,
                 full_scans=stats["full_scans"],
                 metadata_bytes=stats["metadata_bytes"], samples=curve)
    check(bench.stop(daemon) == 0, "the daemon's end")
    bench.require("CPU share with nothing changing", share, at_most=SHARE_MAX)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--mib", type=int, default=16384)
    parser.add_argument("--settle", type=float, default=260)
    parser.add_argument("--seconds", type=float, default=100)
    args = parser.parse_args()
    main(Bench("idle"), lambda b: idle(b, args.mib, args.settle, args.seconds))
