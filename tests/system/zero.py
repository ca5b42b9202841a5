#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Route zero by the whole daemon: what it gives back is counted in frames, before and after, and what it says is held against that."""
import contextlib
import os
import time

from controls import end_at_every_step
from harness import Frames, Host, NO_KSM, PAGE, check, in_namespace, knobs, run_tests

DAEMON = "MinimumAge=0s\nScanInterval=300ms\n"


def section(group, **keys):
    return f"[Cgroup {group}]\nMerge=yes\n" + "".join(f"{k}={v}\n" for k, v in keys.items())


def is_zero(memory, page):
    """While it is away, reading it fails instead of waiting (docs/route-zero.md)."""
    for _ in range(100):
        with contextlib.suppress(OSError):
            return not any(os.pread(memory.fileno(), PAGE, page * PAGE))
        time.sleep(0.01)
    raise AssertionError(f"page {page} cannot be read")


def zero_frames(load):
    """Pages of the known memory on a frame of their own, and how many of those hold nothing but zeros."""
    frames, own, zero = Frames(), 0, 0
    for pid, address in zip(load.pids, load.addresses):
        with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
            for page, pfn in frames.of(pid, address, address + load.pages * PAGE).items():
                if frames.flags(pfn) & frames.ZERO_FLAG:
                    continue
                own += 1
                zero += is_zero(memory, page)
    return own, zero


def await_given(host, group, wanted):
    for _ in range(20):
        host.passes()
        if host.stats_of(group)["pages_zero"] >= wanted * 0.99:
            return host.stats_of(group)
    raise AssertionError(f"{host.stats_of(group)['pages_zero']} of {wanted} pages given back: {host.stats_of(group)}")


def asked_for():
    """Route=zero: frames are freed, counted as they are, contents stay, what is written is there, twins are let be"""
    with Host("zero") as host:
        group = host.cgroup("a")
        load = host.workload(group, mib=16, duplicate=30, zero=40, run=8)
        own, zero = zero_frames(load)
        check(zero >= load.zero * len(load.pids), f"{zero} zero pages of {load.zero}")
        daemon = host.daemon(host.configure(DAEMON + section(group, Route="zero")))
        got = await_given(host, group, zero)
        now_own, now_zero = zero_frames(load)
        print(f"    frames {own} -> {now_own}, of them zero {zero} -> {now_zero}; said {got['pages_zero']}, "
              f"saved {got['bytes_saved']}")
        check(own - now_own >= zero * 0.99, f"frames {own} -> {now_own}")
        check(abs(got["pages_zero"] - (own - now_own)) <= zero * 0.01, f"said {got['pages_zero']}, freed {own - now_own}")
        check(got["bytes_saved"] == (got["pages_zero"] + got["pages_sharing"]) * PAGE, f"{got}")
        check(load.marked() == 0 and load.merged() == 0, "marked or merged by KSM")
        check(load.intact(), "contents")
        check(host.stats_of(group)["route"] == "zero", "route")
        daemon_stats = host.call("GetStats")["daemon"]
        print(f"    {daemon_stats['stops']} stops, p50 {daemon_stats['stop_nsec_p50'] / 1e6:.2f} p99 "
              f"{daemon_stats['stop_nsec_p99'] / 1e6:.2f} ms")
        # What is filled again is no saving any more.
        check(host.call("Explain", pid=load.pids[0])["tracked"], "its writes are not followed")
        host.ctl("pause")  # or they are given back again before they are counted
        load.order("zero")
        check(zero_frames(load)[1] >= zero * 0.99, "rewriting zeros")
        host.ctl("resume")
        # Their userfaultfd was taken away and given back in the stop: what was written since is seen all the same.
        await_given(host, group, zero)
        check(zero_frames(load)[1] <= zero * 0.01 and load.intact(), "what was filled again was not found")
        check("zero" in host.ctl("why", load.pids[0]), "why")
        check(host.stop(daemon) == 0 and load.intact(), "end")


def left_open():
    """Route=auto: a second domain, and a host without KSM, have their zero pages given back at least"""
    with Host("zeroauto") as host:
        a, b = host.cgroup("a"), host.cgroup("b")
        one, two = host.workload(a, mib=4, zero=20, seed=5), host.workload(b, mib=4, zero=20, seed=5)
        text = section(a, Route="advise") + section(b, Domain="second")
        daemon = host.daemon(host.configure("OnStop=unmerge\n" + DAEMON + text))
        host.converge(one)
        await_given(host, b, two.zero * 2)
        check(two.marked() == 0 and two.merged() == 0 and two.intact(), "the second domain")
        check(any("only zero pages" in w for w in host.call("GetStatus")["warnings"]), "not told")
        check(host.stop(daemon) == 0, "end")
    with Host("zeronoksm") as host:
        group = host.cgroup("a")
        load = host.workload(group, mib=4, zero=30)
        _, zero = zero_frames(load)
        daemon = host.daemon(host.configure(DAEMON + section(group)), command=in_namespace(NO_KSM))
        await_given(host, group, zero)
        check(load.marked() == 0 and zero_frames(load)[1] <= zero * 0.01 and load.intact(), "without KSM")
        check(host.stop(daemon) == 0, "end")
        check(knobs() == host.knobs, "knobs")


def killed():
    """killed in the middle of a stop, at every step: contents stay, nothing is left behind, the next one goes on"""
    with Host("zerokill") as host:
        group = host.cgroup("a")
        load = host.workload(group, processes=2, mib=8, duplicate=10, zero=50)
        config = host.configure(DAEMON + section(group, Route="zero"))

        def look(step):
            check(load.intact(), "contents after a kill")
            load.order("zero")
        # Nothing is taken from it, and its threads are neither signalled nor many.
        end_at_every_step(host, config, look, 1.2, {"SIGNAL", "STOPPED", "TAKEN", "RELEASED", "PARK_REGS", "BACK"})
        daemon = host.daemon(config)
        await_given(host, group, load.zero * 2)
        check(load.intact(), "contents")
        check(host.stop(daemon) == 0, "end")
        for pid in load.pids:
            check(not any(line.startswith("6b736d") for line in open(f"/proc/{pid}/maps")), "something was left")


if __name__ == "__main__":
    run_tests(asked_for, left_open, killed)
