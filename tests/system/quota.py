#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""CPUQuota= from outside: what the daemon and ksmd use together, by the kernel's own count. How exactly the quota is
kept over whole minutes is measured by tests/bench/budget.py; here everything holds however busy the machine is."""
import contextlib
import os
import resource
import signal
import statistics
import subprocess
import sys
import threading
import time

from harness import BUILD, KSM, Host, check, cpu_nsec, knobs, ksmd_ticks, run_tests, wait_for

BUSY = BUILD / "tests/system/busy-host.so"


def opted_in(group, quota, more="", merge="yes", busy=100):
    return (f"MinimumAge=0\nScanInterval=100ms\nCPUQuota={quota:.2f}%\nCPUQuotaBusy={busy}%\n{more}\n"
            f"[Cgroup {group}]\nMerge={merge}\n")


@contextlib.contextmanager
def churn(host, group, mib=32, seconds=1, alive=4):
    """More work than a small quota allows, for the daemon and for ksmd: memory that is new all the time."""
    ended = threading.Event()

    def run():
        loads = []
        for seed in range(1, 1 << 30):
            if ended.is_set():
                break
            loads.append(host.workload(group, processes=4, mib=mib, duplicate=60, zero=5, seed=seed))
            if len(loads) > alive:
                host.end(loads.pop(0))
            ended.wait(seconds)
    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class Meter:
    """Seconds of CPU time that a daemon and ksmd used since the daemon was started."""

    def __init__(self, host, *arguments, **options):
        self.ksmd = ksmd_ticks()
        self.daemon = host.daemon(*arguments, **options)

    def parts(self):
        return cpu_nsec(self.daemon.pid) / 1e9, (ksmd_ticks() - self.ksmd) / 1e9

    def used(self):
        return sum(self.parts())


def share_while_busy(host, quota, seconds):
    """The share of a CPU used over so many seconds, once half of a minute's allowance is used; in percent."""
    group = host.cgroup(f"quota-{quota}")
    with churn(host, group):
        meter = Meter(host, host.configure(opted_in(group, quota)))
        wait_for("half of the allowance used", lambda: meter.used() > min(quota, 5) / 100 * 30, 60)
        begun, before = time.monotonic(), meter.parts()
        time.sleep(seconds)
        took, after = time.monotonic() - begun, meter.parts()
        status, waited = host.call("GetStatus"), host.stats()["throttled_nsec"]
        shares = [100 * (b - a) / took for a, b in zip(before, after)]
        print(f"    quota {quota} %: daemon {shares[0]:.1f}, ksmd {shares[1]:.1f} %, {status['full_scans']} passes, "
              f"throttled {status['throttled']}, used {100 * status['cpu_used']:.2f} %")
        check(abs(status["cpu_quota"] * 100 - quota) < 1e-6, f"{status}")
        check(host.stop(meter.daemon) == 0, "end")
    return sum(shares), status, waited


def quota_is_kept():
    """saturated, the daemon and ksmd together keep to the quota; without one they use far more"""
    with Host("quota") as host:
        share, status, waited = share_while_busy(host, 5, 20)  # 5 s' worth may have been saved up
        check(share <= 7.5, f"{share:.1f} % used of a quota of 5 %")
        check(waited > 0 and status["cpu_used"] <= 0.05, f"{status}")
        share, status, waited = share_while_busy(host, 100000, 6)
        check(share >= 15, f"{share:.1f} % without a quota: nothing was saturated, so this proves nothing")
        check(not status["throttled"] and waited == 0, f"{status}")


@contextlib.contextmanager
def spinning():
    """Somebody wants every CPU."""
    spinners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count())]
    try:
        yield
    finally:
        for spinner in spinners:
            spinner.kill()
            spinner.wait()


def busy_host():
    """where others want the CPUs little is used, from the start; the quota is whole again afterwards"""
    with Host("busy") as host:
        group = host.cgroup("a")
        used = {}
        for busy in (100, 10):
            with spinning(), churn(host, group):
                meter = Meter(host, host.configure(opted_in(group, 20, busy=busy)))
                wait_for("a look at the others", lambda: host.call("GetStatus")["host_busy"])
                begun, before = time.monotonic(), meter.used()
                time.sleep(8)
                used[busy] = 100 * (meter.used() - before) / (time.monotonic() - begun)
                status = host.call("GetStatus")
                print(f"    CPUQuotaBusy={busy}%: {used[busy]:.2f} % used, quota {100 * status['cpu_quota']:g} %")
                check(abs(status["cpu_quota"] * 100 - 20 * busy / 100) < 1e-6, f"{status}")
            if busy == 10:
                check("the host is busy" in host.ctl("status") or not host.call("GetStatus")["host_busy"], host.ctl("status"))
                wait_for("the others' end to be noticed", lambda: not host.call("GetStatus")["host_busy"])
                check(host.call("GetStatus")["cpu_quota"] == 0.2, f"{host.call('GetStatus')}")
            check(host.stop(meter.daemon) == 0, "end")
        check(used[10] <= 3, f"{used[10]:.2f} % used of 2 %")
        check(used[100] > 2 * used[10], f"{used}: nothing was held back, so this proves nothing")


def begins_evenly():
    """a daemon that is started on a busy host looks at it before it meets a process: its first work is paced"""
    with Host("evenly") as host:
        group = host.cgroup("a")
        load = host.workload(group, processes=2, mib=64)
        daemon = host.daemon(host.configure(opted_in(group, 20, busy=50)), environment={"LD_PRELOAD": str(BUSY)})
        wait_for("a pass", lambda: "pass: read and matched" in host.logs[0].read_text(errors="replace"), 60)
        status, log = host.call("GetStatus"), host.logs[0].read_text(errors="replace")
        looked, met, known, read = (log.find(words) for words in (
            "the others were looked at", f"cgroup {group} is managed", "others leave", "pass: read and matched"))
        check(0 <= looked < met, "the first look came after the processes")
        check(0 <= known < read, "that the host is busy was not known in the first pass")
        check(status["host_busy"] and host.stats()["throttled_nsec"] > 0, f"{status}")
        check(host.stop(daemon) == 0 and load.intact(), "end")


def share_of_all_cpus():
    """CPUQuotaBusy=auto is half a percent of all CPUs, and never more than the quota"""
    with Host("auto") as host:
        group = host.cgroup("a")
        host.workload(group, processes=1, mib=16)
        for quota in (60, 0.5):
            config = f"MinimumAge=0\nScanInterval=100ms\nCPUQuota={quota}%\nCPUQuotaBusy=auto\n[Cgroup {group}]\nMerge=yes\n"
            daemon = host.daemon(host.configure(config), environment={"LD_PRELOAD": str(BUSY)})
            seen = []  # by one answer: what daemon and ksmd use at full speed counts as left
            wait_for("a look at the others", lambda: seen.append(host.call("GetStatus")) or seen[-1]["host_busy"])
            want, found = min(0.5 * os.cpu_count(), quota), 100 * seen[-1]["cpu_quota"]
            check(abs(found - want) < 1e-6, f"{found} % where {want} % are due of {quota} %")
            check(host.stop(daemon) == 0, "end")


def new_memory_is_not_held_back():
    """with the default quota a daemon that starts merges what is there without waiting once"""
    with Host("start") as host:
        group = host.cgroup("a")
        load = host.workload(group, processes=4, mib=100, duplicate=30)
        begun = time.monotonic()
        meter = Meter(host, host.configure(opted_in(group, 10, "ScanInterval=1s")))
        wait_for("merged", lambda: load.merged() >= 0.95 * load.mergeable, 60, 0.01)
        took, used, stats = time.monotonic() - begun, meter.used(), host.stats()
        print(f"    95 % of {load.mergeable} pages merged within {took:.2f} s, {used:.2f} s of CPU time")
        check(used < 2.9 and stats["throttled_nsec"] == 0, f"held back after {used} s of CPU time: {stats}")
        check(host.stop(meter.daemon) == 0 and load.intact(), "end")


def control_is_answered():
    """while work waits for the quota, control is answered at once, and what interrupts a pass does so"""
    with Host("control") as host:
        group = host.cgroup("a")
        load = host.workload(group, processes=4, mib=128, duplicate=0)
        daemon = host.daemon(host.configure(opted_in(group, 1)))
        wait_for("throttled", lambda: host.call("GetStatus")["throttled"], 30)
        times, throttled = [], 0
        for _ in range(100):
            begun = time.monotonic()
            throttled += host.call("GetStatus")["throttled"]
            times.append(time.monotonic() - begun)
            time.sleep(0.013)
        print(f"    throttled in {throttled} of 100 calls: median {statistics.median(times) * 1e3:.1f} ms, "
              f"greatest {max(times) * 1e3:.1f} ms")
        check(throttled >= 50, "work did not wait, so this proves nothing")
        # One that does not answer while work waits is slow in nearly all of them, a busy machine in some.
        check(sorted(times)[25] < 0.05, f"{sorted(times)}")
        # The pass under way would take many seconds yet.
        waited, passes = host.stats()["throttled_nsec"], host.stats()["full_scans"]
        host.ctl("pause")
        wait_for("paused", lambda: host.call("GetStatus")["state"] == "paused")
        time.sleep(1.5)
        check(not host.call("GetStatus")["throttled"], "throttled while paused")
        host.ctl("resume")
        # A new quota is in force at once.
        host.configure(opted_in(group, 100000))
        host.ctl("reload")
        host.passes(2)
        check(host.stats()["full_scans"] >= passes + 2 and waited > 0, f"{host.stats()}")
        wait_for("a second without waiting", lambda: not host.call("GetStatus")["throttled"])
        check(host.stop(daemon) == 0 and load.intact(), "end")


def quota_that_ends_in_a_burst(host, group):
    """The percentage of which half a minute's allowance is used up in the middle of the first burst: so much was
    used when there was none."""
    load = host.workload(group, processes=2, mib=192, duplicate=95, run=64)
    meter = Meter(host, host.configure(opted_in(group, 100000)))
    host.converge(load)
    daemon, ksmd = meter.parts()
    check(host.stop(meter.daemon) == 0, "end")
    host.end(load)
    print(f"    without a quota: daemon {daemon:.2f} s, ksmd {ksmd:.2f} s")
    return round(100 * (daemon + ksmd / 5) / 30, 2)


def paused_burst(host, group, quota):
    """A daemon whose burst stands because the quota is used up; the workload, the daemon, its quota: the same work takes
    a third less on one day than on another, and a smaller one where this one was enough for all of it, or so much that
    little is left for after the pause."""
    for quota in (share * quota for share in (1, 0.9, 0.8, 0.7, 0.6, 0.5)):
        load = host.workload(group, processes=2, mib=192, duplicate=95, run=64)
        meter = Meter(host, host.configure(opted_in(group, round(quota, 2))))
        end = time.monotonic() + 30
        while time.monotonic() < end:
            check(meter.daemon.poll() is None, "the daemon ended")
            if int((KSM / "sleep_millisecs").read_text()) >= 60000 and (KSM / "run").read_text() == "1\n":
                merged = int((KSM / "pages_sharing").read_text())
                if merged < load.mergeable / 3:
                    return load, meter, quota
                print(f"    {merged} of {load.mergeable} pages were merged when the burst was paused with {quota:.2f} %")
                break
            time.sleep(0.001)
        else:
            print(f"    no burst was paused with {quota:.2f} %")
        check(host.stop(meter.daemon) == 0, "end")
        host.end(load)
    raise AssertionError("no burst was paused")


def burst_is_paused():
    """a burst that needs more than the quota is paused, ksmd rests meanwhile, and the knobs are put back all the same"""
    with Host("pause") as host:
        group = host.cgroup("a")
        load, meter, quota = paused_burst(host, group, quota_that_ends_in_a_burst(host, group))
        half, begun = quota / 100 * 30, time.monotonic()
        before = meter.used()
        # What is merged is counted every ten seconds of the burst, in its pauses too: nothing was counted before it.
        # Its first scan merges nothing, and it may have been paused in that.
        wait_for("a count in the burst", lambda: host.stats()["pages_sharing"] > 0, 60)
        check("KSM burst" not in host.logs[-1].read_text(errors="replace"), "the burst is over, so this proves nothing")
        share = 100 * (meter.used() - before) / (time.monotonic() - begun)
        print(f"    {before:.2f} s used when it was first paused, then {share:.1f} % of a CPU, {load.merged()} pages merged")
        check(before < half + 0.2, f"{before:.2f} s used before the first pause, half a minute's allowance is {half} s")
        check(share <= 1.5 * quota, f"{share:.1f} % used of a quota of {quota} %")
        check(host.stop(meter.daemon) == 0 and knobs() == host.knobs, f"SIGTERM left {knobs()}")
        check(load.intact(), "contents")
        host.end(load)

        load, meter, _ = paused_burst(host, group, quota)
        host.stop(meter.daemon, signal.SIGKILL)
        left, ticks = knobs(), ksmd_ticks()
        time.sleep(2)
        if int(left["sleep_millisecs"]) >= 60000:  # else it was going on when it was killed
            check(ksmd_ticks() - ticks < 100e6, f"ksmd used {(ksmd_ticks() - ticks) / 1e6} ms after the daemon's death")
        daemon = host.daemon(host.configure(opted_in(group, 100000)))
        host.converge(load)
        check(host.stop(daemon) == 0 and knobs() == host.knobs and load.intact(), f"{knobs()}")


def once_keeps_it():
    """--once, too, takes the time that the quota makes it take"""
    with Host("once") as host:
        group = host.cgroup("a")
        load = host.workload(group, processes=2, mib=1024, duplicate=90, run=512)

        def once(quota):
            before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
            stats = host.once(host.configure(opted_in(group, quota, merge="dry-run")))["daemon"]
            took, after = time.monotonic() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
            used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            print(f"    quota {quota:.2f} %: {used:.2f} s of CPU time in {took:.1f} s, "
                  f"{stats['throttled_nsec'] / 1e9:.1f} s of them waiting")
            return used, took, stats["throttled_nsec"]
        free = [once(100000) for _ in range(2)]  # the first meets memory that nobody has read yet
        check(all(waited == 0 for _, _, waited in free), "it waited without a quota")
        half = 0.7 * min(used for used, _, _ in free)
        used, took, waited = once(100 * half / 30)
        check(used > 1.1 * half, "too little to do, so this proves nothing")
        check(took >= 0.5 * (used - half) / (half / 30) and waited > 0, "it did not wait")
        check(load.intact(), "contents")


if __name__ == "__main__":
    run_tests(quota_is_kept, busy_host, begins_evenly, share_of_all_cpus, new_memory_is_not_held_back,
              control_is_answered, burst_is_paused, once_keeps_it)
