#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Route remap against ksmd, on the same duplicates in runs of 8, 64 and 512 pages.

    remap.py [--mib N] [--processes N] [--threads N] [--rounds N]

remap: a daemon that runs, from the moment that the processes are opted in until all is merged; CPU time of the daemon
and the keeper, and of the processes, which do nothing of their own: what they use is the program that remaps. Finding
the duplicates is in it, as it is in ksmd's. ksmd flat out, the same processes made anew, marked whole, and where they
hold duplicates (told, what the daemon has to find out). Fault: the CPU time of the first write to a merged page. Stolen:
the share of time that the host took from the machine's CPUs meanwhile, of which no stop is spared. Rounds by turns;
medians."""
import argparse
import os
import time

from bench import Bench, Ksmd, KSM, check, cpu_nsec, main, median, wait_for
from remapped import keepers, pooled, section

DAEMON = "OnStop=unmerge\nCPUQuota=1000%\nCPUQuotaBusy=100%\nMinimumAge=0s\nScanInterval=1h\n"
RUNS = [8, 64, 512]
STOP_NSEC_MAX = 2_000_000
SHARE = 0.99


def touch(load):
    """CPU time of a first write to a merged page."""
    return int(load.order("touch")[0])


def stolen():
    """Seconds of all CPUs, so far."""
    return int(open("/proc/stat").readline().split()[8]) / os.sysconf("SC_CLK_TCK") / os.cpu_count()


def workload(bench, group, args, run):
    return bench.workload(group, processes=args.processes, mib=args.mib, duplicate=50, zero=0, run=run, threads=args.threads)


def remap(bench, args, run):
    group = bench.cgroup(f"{run}-{len(bench.groups)}")
    load = workload(bench, group, args, run)
    plain = touch(load)
    theirs = sum(map(cpu_nsec, load.pids))
    daemon = bench.daemon(bench.configure(DAEMON))
    bench.passes()
    begun, before, took = cpu_nsec(daemon.pid), time.monotonic(), stolen()
    bench.configure(DAEMON + section(group))
    bench.ctl("reload")
    for passes in range(1, 40):
        bench.ctl("scan")
        if (pages := pooled(load)[0]) >= load.mergeable * SHARE:
            break
    else:
        check(False, f"merged {pages} of {load.mergeable}")
    took = (stolen() - took) / (time.monotonic() - before)
    stats = bench.stats()
    cpu = cpu_nsec(daemon.pid) - begun + sum(map(cpu_nsec, keepers(bench)))
    theirs = sum(map(cpu_nsec, load.pids)) - theirs
    check(load.intact(), "contents")
    result = {"who": "remap", "run": run, "pages": pages, "passes": passes, "nsec_a_page": (cpu + theirs) / pages,
              "daemon_nsec_a_page": cpu / pages, "target_nsec_a_page": theirs / pages, "stops": stats["stops"],
              "stop_p50_nsec": stats["stop_nsec_p50"], "stop_p99_nsec": stats["stop_nsec_p99"],
              "stolen_share": took, "fault_nsec": touch(load), "write_nsec_unmerged": plain}
    check(bench.stop(daemon) == 0, "the daemon's end")
    bench.end(load)
    return result


def merged():
    return sum(int((KSM / name).read_text()) for name in ("pages_shared", "pages_sharing"))


def ksmd(bench, args, run, order):
    with Ksmd(bench) as ksm:
        load = workload(bench, None, args, run)
        load.order(order)
        cpu = cpu_nsec(ksm.pid)
        (KSM / "run").write_text("1")
        wait_for("ksmd", lambda: merged() >= load.mergeable * SHARE, 120, 0.005)
        cpu, pages = cpu_nsec(ksm.pid) - cpu, merged()
        (KSM / "run").write_text("0")
        result = {"who": f"ksmd, {'all' if order == 'mark' else 'duplicates'} marked", "run": run, "pages": pages,
                  "nsec_a_page": cpu / pages, "fault_nsec": touch(load)}
        bench.end(load)
    bench.unmerge()
    return result


def run_all(bench, args):
    for run in RUNS:
        found = {}
        for _ in range(args.rounds):
            for result in (remap(bench, args, run), ksmd(bench, args, run, "wanted"), ksmd(bench, args, run, "mark")):
                bench.record(detail="round", **result)
                found.setdefault(result["who"], []).append(result)
        middle = {who: {field: one[field] if isinstance(one[field], str) else median(r[field] for r in results)
                        for one in results[:1] for field in one} for who, results in found.items()}
        for one in middle.values():
            bench.record(**one)
        ours, directed, whole = middle.values()
        bench.require(f"runs of {run}: CPU a page, remap / ksmd with the duplicates marked",
                      ours["nsec_a_page"] / directed["nsec_a_page"], at_most=1)
        bench.require(f"runs of {run}: CPU a page, remap / ksmd with all marked", ours["nsec_a_page"] / whole["nsec_a_page"],
                      at_most=1)
        bench.require(f"runs of {run}: p99 of stops, ms", ours["stop_p99_nsec"] / 1e6, at_most=STOP_NSEC_MAX / 1e6)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--mib", type=int, default=96)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    main(Bench("remap"), lambda b: run_all(b, args))
