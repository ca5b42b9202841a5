#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the whole daemon does with its probes: knows at once who comes, counts what ksmd did, holds merging back while breaks
cost too much; and says so when it has none."""
import json
import statistics
import sys
import time

from harness import Frames, Host, check, run_tests, wait_for
from judgement import HOT_PAGES, Victim, probed, start

SLEEPER = [sys.executable, "-c", "import time; time.sleep(600)"]


def latency(host, group, daemon, n=9):
    """How long a process is in its cgroup before it is listed: the median, in seconds."""
    process = host.daemon(host.configure(f"MinimumAge=0\nScanInterval=1w\n{daemon}[Cgroup {group}]\nMerge=dry-run\n"))
    host.passes()
    has, took = probed(host), []
    for i in range(n):
        time.sleep(0.13 * i)  # at no fixed distance from the daemon's clock
        begun = time.monotonic()
        pid = host.spawn(group, *SLEEPER).pid
        wait_for(f"{pid} to be listed", lambda: pid in [t["pid"] for t in host.call("ListTargets")["targets"]],
                 interval=0.002)
        took.append(time.monotonic() - begun)
    check(host.stop(process) == 0, "end")
    return has, statistics.median(took)


def known_at_once():
    """a process is known when it comes, not when the daemon looks next"""
    with Host("probes") as host:
        group = host.cgroup("a")
        has, fast = latency(host, group, "")
        _, slow = latency(host, group, "Probes=no\n")
        print(f"    listed after {fast * 1000:.1f} ms, without probes {slow * 1000:.0f} ms (medians)")
        check(not has or fast * 2 < slow, "no sooner than by looking")


def counted():
    """what ksmd did for us is counted, and who flushed TLBs for it; without probes both are said to be unknown"""
    with Host("counted") as host:
        victim, process = start(host)
        stats, probes = host.stats(), {p["name"]: p for p in host.call("GetStatus")["probes"]}
        print(f"    {stats['ksm_results']} {stats['tlb_flushes_by']}")
        if probes["ksm"]["way"] != "none":
            check(stats["ksm_results"]["merged"] >= victim.pages * 0.99 and stats["ksm_results"]["scans"] >= 2,
                  f"{victim.pages} pages merged")
        if probes["flushes"]["way"] != "none":
            # By ksmd only where the process runs, or ran last, on some CPU at that moment.
            check(stats["tlb_flushes_by"]["daemon"] > 0, "the daemon's calls flushed nothing")
            check(stats["tlb_flushes"] == sum(n for by, n in stats["tlb_flushes_by"].items() if by != "others"), "sum")
        config = host.dir / "test.conf"
        config.write_text(config.read_text().replace("[Daemon]", "[Daemon]\nProbes=no"))
        host.ctl("reload")
        wait_for("the probes to be closed", lambda: all(p["way"] == "none" for p in host.call("GetStatus")["probes"]))
        after = host.stats()
        check(after["ksm_results"]["merged"] >= stats["ksm_results"]["merged"] and
              after["tlb_flushes"] >= stats["tlb_flushes"] and after["rmap_walks"] >= stats["rmap_walks"],
              "a reload set counters back")
        check(host.stop(process) == 0, "end")
    with Host("uncounted") as host:
        _, process = start(host, daemon="Probes=off\n")
        stats, probes = host.stats(), host.call("GetStatus")["probes"]
        check(all(p["way"] == "none" and p["reason"] for p in probes), f"{probes}")
        check(stats["tlb_flushes"] == 0 and not any(stats["ksm_results"].values()), "counted without probes")
        check(host.stop(process) == 0, "end")


def break_nsec(host):
    """What a write to a merged page takes on this machine."""
    return json.loads(host.ctl("--config", host.configure(""), "--json", "doctor", expect=None))["break_nsec"]


def breaks_cost_too_much():
    """beyond BreakQuota= nothing new is merged, at what breaks cost on this machine; below it again, it is"""
    with Host("quota-breaks") as host:
        price = break_nsec(host)
        quota = max(0.0001, round(HOT_PAGES * price / 10e9 / 4, 4))  # a fourth of what all hot pages cost, over ten seconds
        victim, process = start(host, daemon=f"BreakQuota={100 * quota:.2f}%\nPayBack=1h\n")
        late = Victim(host, host.groups[0])
        held = 0
        victim.write()
        for _ in range(3):
            host.passes()  # without probes it is the pass that finds out
            before = host.stats()["break_share"]
            host.passes()
            if min(before, host.stats()["break_share"]) > quota:
                check(sum(late.merged()) == 0, f"{late.merged()} pages merged while breaks cost {before}")
                held += 1
        print(f"    held back in {held} of 3 passes, at {price} ns a break and a quota of {quota}")
        check(held > 0, "the quota was never exceeded")
        wait_for("what came late to be merged", lambda: host.passes() or sum(late.merged()) >= late.cold * 0.99, 60, 0.5)
        victim.order("check"), late.order("check")
        check(host.stop(process) == 0, "end")


# 4,000 pages that another such process has too; then sleeps, or reads them on all CPUs and never writes to them.
READER = """
import hashlib, os, sys, threading, time
data = b''.join(i.to_bytes(8, 'big') * 512 for i in range(1, 4001))
def read():
    while True:
        hashlib.sha1(data)
for _ in range(os.cpu_count() if sys.argv[1] == 'run' else 0):
    threading.Thread(target=read, daemon=True).start()
print('ready', flush=True)
time.sleep(600)
"""


def start_readers(host, does, flushes):
    """Two with the same 4,000 pages, one of which runs or both sleep, and a daemon with a BreakQuota= for some so many flushes
    a second: each takes a third of a break, or half."""
    group, quota = host.cgroup("a"), max(0.01, break_nsec(host) * flushes / 2.5 / 1e9 * 100)
    readers = [host.spawn(group, sys.executable, "-c", READER, what, ready="ready") for what in (does, "sleep")]
    process = host.daemon(host.configure(f"MinimumAge=0\nScanInterval=1w\nBreakQuota={quota:.2f}%\nCPUQuotaBusy=100%\n"
                                         f"[Cgroup {group}]\nMerge=yes\n"))
    return process, [reader.pid for reader in readers]


def merged_in_a_pass(does, passes=1):
    """Of 8,000 pages, in passes at a BreakQuota= for 1,000 flushes in ten seconds."""
    with Host("flushes") as host:
        process, readers = start_readers(host, does, 100)
        has, frames, counts = probed(host), Frames(), []
        for i in range(passes):
            time.sleep(11 if i else 0)  # what was spent beyond the quota is owed for ten seconds at most
            frames.cache = {}
            host.passes()
            counts.append(frames.ksm(readers)[0])
        check(host.stop(process) == 0, "end")
    return has, counts


def flushes_cost_too_much():
    """a burst goes no faster than the flushes that interrupt a process may cost by BreakQuota=, ends when somebody has
    waited for it, and the next goes on; they cost nothing where nobody runs"""
    has, (asleep,) = merged_in_a_pass("sleep")
    _, running = merged_in_a_pass("run", passes=3)
    print(f"    {asleep} pages merged in one pass of processes that sleep, {running} after each of three where one runs")
    check(asleep >= 7900, "processes that sleep")
    if has:
        check(running[0] < asleep / 2, "the burst was not held back")
        check(running[0] < running[1] < running[2], "it does not go on")


def flushes_are_spread():
    """where nobody waits for the next pass a burst goes on by itself, at the pace that BreakQuota= sets, until all is merged"""
    with Host("spread") as host:
        begun, frames = time.monotonic(), Frames()
        process, readers = start_readers(host, "run", 1000)

        def merged():
            frames.cache = {}
            return frames.ksm(readers)[0]
        wait_for("all to be merged", lambda: merged() >= 7900, 120, 0.2)
        took = time.monotonic() - begun
        print(f"    {merged()} pages within {took:.1f} s in {host.call('GetStatus')['full_scans']} passes")
        if probed(host):
            check(took > 2, "nothing was held back")
        wait_for("the pass to end", lambda: host.call("GetStatus")["full_scans"] == 1, 30)
        check(host.stop(process) == 0, "end")


# Has the kernel write to a page that is there and may not be written to, as fast as it goes.
STORM = [sys.executable, "-c", """
import ctypes, mmap, os
os.nice(-20)
libc = ctypes.CDLL(None)
page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
page[0] = 1
address = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(page)))
libc.mprotect(address, ctypes.c_size_t(mmap.PAGESIZE), mmap.PROT_READ)
read, zero, one = libc.read, os.open("/dev/zero", os.O_RDONLY), ctypes.c_size_t(1)
while read(zero, address, one) < 0:
    pass
"""]


def rest():
    """in a storm of faults the probes rest, which is said; what breaks meanwhile is counted when frames are; after it they
    count again"""
    def resting():
        return {p["name"] for p in host.call("GetStatus")["probes"] if p["resting"]}

    with Host("rest") as host:
        victim, process = start(host, daemon="PayBack=10min\n")
        if not probed(host):
            check(host.stop(process) == 0, "end")
            return
        check(not resting() and host.stats()["probes_rested_nsec"] == 0, "they rest without a reason")
        storm = host.spawn(None, *STORM)
        wait_for("the probes to rest for long", lambda: host.stats()["probes_rested_nsec"] > 6.2e9 and resting(), 60, 0.05)
        before = host.stats()["cow_breaks"]
        broken = victim.write()
        check(host.stats()["cow_breaks"] == before, "counted by whom?")
        host.passes(2)
        counted = host.stats()["cow_breaks"] - before
        print(f"    while {sorted(resting())} rest: {broken} breaks provoked, {counted} counted")
        check(resting() == {"faults", "flushes"}, "which of them rest")
        check(broken >= victim.hot * 0.95 and counted == broken, "not exact")
        storm.kill()
        storm.wait()
        wait_for("the probes to be back", lambda: not resting(), 70, 0.1)
        before = host.stats()["tlb_flushes_by"]["others"]
        wait_for("flushes to be counted again", lambda: host.stats()["tlb_flushes_by"]["others"] > before)
        rested = host.stats()["probes_rested_nsec"]
        host.passes(2)
        check(host.stats()["probes_rested_nsec"] == rested, "they rest after the storm")
        victim.order("check")
        check(host.stop(process) == 0, "end")


if __name__ == "__main__":
    run_tests(known_at_once, counted, breaks_cost_too_much, flushes_cost_too_much, flushes_are_spread, rest)
