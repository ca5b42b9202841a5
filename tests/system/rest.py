#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Nothing is at work when nothing is to do, and KSM's knobs belong to the administrator: after convergence, after
SIGTERM, after SIGKILL at the worst moments, and when he runs ksmd himself."""
import os
import pathlib
import resource
import signal
import time

from harness import BUILD, KSM, Host, check, cpu_nsec, knobs, ksmd_ticks, run_tests, wait_for

ODD_KNOBS = {"pages_to_scan": 137, "sleep_millisecs": 33, "use_zero_pages": 0, "smart_scan": 0}


def opted_in(group, more=""):
    return f"MinimumAge=0\n{more}\n[Cgroup {group}]\nMerge=yes\n"


def burst_seen(process):
    """Waits until the daemon has ksmd running: for one reading of the knob, so look without a pause."""
    end = time.monotonic() + 20
    while (KSM / "run").read_text() != "1\n":
        check(process.poll() is None and time.monotonic() < end, "no burst came")


def converged_is_at_rest():
    """after convergence run is as it was, ksmd takes no CPU time in 10 s, the daemon next to none"""
    with Host("rest") as host:
        group = host.cgroup("a")
        load = host.workload(group, zero=10)
        daemon = host.daemon(host.configure(opted_in(group, "ScanInterval=4s")))
        # To the last page: for one that is left ksmd is let run again, seldom and more seldom.
        host.converge(load, share=1, passes=30)
        wait_for("idle", lambda: host.call("GetStatus")["state"] == "idle")
        time.sleep(0.5)  # ksmd wakes once more to see that it is to rest
        ticks, cpu, runs, passes = ksmd_ticks(), cpu_nsec(daemon.pid), set(), host.stats()["full_scans"]
        end = time.monotonic() + 10
        while time.monotonic() < end:
            runs.add((KSM / "run").read_text().strip())
            time.sleep(0.002)
        ticks, cpu = ksmd_ticks() - ticks, cpu_nsec(daemon.pid) - cpu
        passes = host.stats()["full_scans"] - passes
        print(f"    10 s, {passes} passes: ksmd {ticks} ns, daemon {cpu / 1e6:.1f} ms, run {runs}")
        check(passes >= 2, "no pass came by itself")
        check(runs == {host.knobs["run"]} and ticks == 0, f"ksmd is not at rest: run {runs}, {ticks} ns")
        check(knobs() == host.knobs, f"{knobs()}")
        check(cpu < 1e9, f"the daemon takes {cpu / 1e7:.0f} % of a CPU for {passes} passes over 32 MiB")

        host.ctl("pause")
        cpu, passes = cpu_nsec(daemon.pid), host.stats()["full_scans"]
        time.sleep(5)
        cpu = cpu_nsec(daemon.pid) - cpu
        print(f"    paused for 5 s: {cpu / 1e6:.2f} ms")
        check(host.stats()["full_scans"] == passes, "a pass while paused")
        check(cpu < 50e6, f"paused, it takes {cpu / 5e7:.1f} % of a CPU")
        host.ctl("resume")
        check(load.intact() and host.stop(daemon) == 0, "end")


def sigterm_restores():
    """SIGTERM, idle and in the middle of a burst, leaves every knob as found"""
    with Host("sigterm") as host:
        group = host.cgroup("a")
        with host.knobs_set(**ODD_KNOBS) as found:
            load = host.workload(group, mib=64, duplicate=80, zero=10)
            config = host.configure(opted_in(group, "OnStop=unmerge"))
            for _ in range(9):
                daemon = host.daemon(config)
                burst_seen(daemon)
                during = knobs()
                check(host.stop(daemon) == 0, "SIGTERM in a burst")
                check(knobs() == found, f"SIGTERM in a burst left {knobs()}, found {found}")
                left = load.marked(), load.merged()
                check(left == (0, 0), f"OnStop=unmerge left {left} mappings marked, pages merged")
                if during != found:
                    break
            else:
                check(False, "each burst was over before it was looked at")
            daemon = host.daemon(config)
            host.converge(load)
            check(host.stop(daemon) == 0 and knobs() == found, f"SIGTERM left {knobs()}, found {found}")
            check(load.merged() == 0 and load.intact(), "OnStop=unmerge")


def sigkill_in_a_burst():
    """SIGKILL in the middle of a burst: the next start puts the knobs back and says so"""
    with Host("sigkill") as host:
        group = host.cgroup("a")
        with host.knobs_set(**ODD_KNOBS) as found:
            killed, config = 0, host.configure(opted_in(group, "OnStop=unmerge"))
            for n in range(9):
                load = host.workload(group, mib=48, duplicate=80, seed=n)
                daemon = host.daemon(config)
                burst_seen(daemon)
                host.stop(daemon, signal.SIGKILL)
                left = knobs()
                if left["run"] != "1":  # the burst was over before the signal came, on a busy machine
                    check(left == found, f"after a burst: {left}")
                    host.end(load)
                    continue
                check(left != found, f"nothing was left changed: {left}")
                killed += 1
                daemon = host.daemon(config)
                check("put KSM's settings back" in daemon.log(), f"not told: {daemon.log()}")
                host.converge(load)
                check(load.intact() and host.stop(daemon) == 0, "the next daemon")
                check(knobs() == found, f"left {knobs()}, found {found}")
                check(load.marked() == 0 and load.merged() == 0, "what the killed daemon had marked stayed")
                host.end(load)
                if killed == 3:
                    break
            check(killed > 0, "no daemon was killed in a burst")


def recorded(host, pids):
    """Of which processes there is a record in the state directory: made right before anything is marked."""
    return [pid for pid in pids if any(host.dir.glob(f"run/{pid}.*"))]


def sigkill_while_marking():
    """SIGKILL in the middle of marking: the next daemon knows the marks as its own and can undo them"""
    with Host("sigkill-mark") as host:
        group = host.cgroup("a")
        config = host.configure(opted_in(group, "OnStop=unmerge"))
        marks = []
        for n in range(5):
            load = host.workload(group, processes=3, mib=16, duplicate=50, run=1, seed=n)
            before = [len(open(f"/proc/{pid}/maps").readlines()) for pid in load.pids]
            daemon = host.daemon(config)
            wait_for("a mark on record", lambda: recorded(host, load.pids), interval=0)
            time.sleep(0.003 * n)
            host.stop(daemon, signal.SIGKILL)
            marks.append(load.marked())
            daemon = host.daemon(config)
            host.passes()
            check(host.stop(daemon) == 0, "the next daemon")
            check(load.marked() == 0, f"kill {n}: {load.marked()} of {marks[-1]} marks stayed")
            after = [len(open(f"/proc/{pid}/maps").readlines()) for pid in load.pids]
            check(all(a <= b * 1.1 for a, b in zip(after, before)), f"mappings {before} -> {after}")
            check(load.intact() and knobs() == host.knobs, f"{knobs()}")
            host.end(load)
        print(f"    mappings left marked by the kills: {marks}")
        check(any(marks), "no kill left anything marked, so this proves nothing")


def administrator_runs_ksmd():
    """an administrator who runs ksmd himself keeps his settings; pages merge all the same"""
    with Host("admin") as host:
        group = host.cgroup("a")
        # smart_scan leaves a page out of up to eight scans of nine: of twins that were marked at different times ksmd may never
        # look at both in one scan. Whether he has it on is not what this is about.
        with host.knobs_set(pages_to_scan=2000, sleep_millisecs=10, smart_scan=0, run=1) as found:
            load = host.workload(group)
            daemon = host.daemon(host.configure(opted_in(group, "ScanInterval=1s")))
            changed = []

            def merged():
                changed.extend([] if knobs() == found else [knobs()])
                return load.merged() >= load.mergeable * 0.99
            wait_for(lambda: f"merged by his ksmd: {load.merged()} of {load.mergeable} pages, {load.marked()} mappings marked, "
                             f"his settings became {changed}", merged, 30)
            check(host.stop(daemon) == 0, "end")
            check(not changed and knobs() == found, f"his settings became {changed} {knobs()}")
            check(load.intact(), "contents")
        # He stops his ksmd while the daemon runs: then it is the daemon's to run.
        with host.knobs_set(run=1):
            load = host.workload(group, seed=7)
            daemon = host.daemon(host.configure(opted_in(group, "ScanInterval=1s")))
            host.passes()
            (KSM / "run").write_text("0")
            host.converge(load)
            wait_for("idle", lambda: host.call("GetStatus")["state"] == "idle")
            check((KSM / "run").read_text() == "0\n", "run is not what he set last")
            check(host.stop(daemon) == 0, "end")
            check((KSM / "run").read_text() == "0\n", "run is not what he set last")


def one_daemon_a_host():
    """a second daemon is refused, by the state directory and by the socket"""
    with Host("two") as host:
        config = host.configure("")
        first = host.daemon(config)
        status, said = host.refused(config)
        check(status == 1 and "another ksmd-user runs on this host" in said, f"{status} {said}")
        status, said = host.refused(config, environment={"RUNTIME_DIRECTORY": str(host.dir / "elsewhere")})
        check(status == 1 and "another daemon listens there" in said and str(host.socket) in said, f"{status} {said}")
        status, said = host.refused(config, "--once")
        check(status == 1 and "another ksmd-user runs on this host" in said, f"{status} {said}")
        check(host.call("GetStatus")["pid"] == first.pid, "the first one does not answer")
        check(host.stop(first) == 0, "end")
        second = host.daemon(config)  # the socket of a daemon that is gone is no daemon
        host.stop(second, signal.SIGKILL)
        third = host.daemon(config)
        check(host.call("GetStatus")["pid"] == third.pid and host.stop(third) == 0, "after a SIGKILL")


def memory_stays():
    """the daemon does not grow while processes come and go"""
    with Host("churn") as host:
        group = host.cgroup("a")
        keep = host.workload(group, mib=8)
        daemon = host.daemon(host.configure(opted_in(group, "ScanInterval=100ms")))

        def resident():
            return int(pathlib.Path(f"/proc/{daemon.pid}/statm").read_text().split()[1]) * resource.getpagesize()

        def descriptors():
            return len(os.listdir(f"/proc/{daemon.pid}/fd"))
        host.converge(keep)
        sizes, begun, usual = [], host.stats()["full_scans"], 0
        for n in range(40):
            load = host.workload(group, processes=4, mib=2, seed=100 + n)
            time.sleep(0.5)
            host.end(load)
            if n < 7:
                continue
            # A process is forgotten first, and let go when the pass under way is over: no moment in between counts.
            wait_for("forgotten", lambda: host.call("GetStatus")["processes"] == 2)
            if n == 7:
                host.passes(2)
                usual = descriptors()
                continue
            wait_for(f"{usual} descriptors again", lambda: descriptors() <= usual)
            sizes.append(resident())
        passes = host.stats()["full_scans"] - begun
        early, late = max(sizes[:8]), max(sizes[-8:])
        print(f"    {passes} passes, {40 * 4} processes: {early >> 10} KiB early, {late >> 10} KiB late, "
              f"{usual} descriptors after each")
        check(late < early * 1.1 + (256 << 10), f"the daemon grew: {[s >> 10 for s in sizes]} KiB")
        records = {int(f.name.split(".")[0]) for f in (host.dir / "run").iterdir() if f.name[0].isdigit()}
        check(records <= set(keep.pids), f"records of ended processes: {records}")
        check(keep.intact() and host.stop(daemon) == 0, "end")


if __name__ == "__main__":
    check(BUILD.exists(), "KSMD_USER_BUILD_DIR")
    run_tests(converged_is_at_rest, sigterm_restores, sigkill_in_a_burst, sigkill_while_marking,
              administrator_runs_ksmd, one_daemon_a_host, memory_stays)
