#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""StopQuota= from outside: a process that runs is let run between the stops it takes to merge its memory, one that sleeps is
not kept waiting."""
import contextlib
import re
import sys
import time

from harness import Host, check, run_tests, wait_for

# Pages for many stops: some that the other process has too, as many of its own. Runs all the time, or sleeps.
VICTIM = """
import hashlib, os, sys, threading, time
PAGES, RUN = int(sys.argv[2]), int(sys.argv[3])
data = bytearray(PAGES * 4096)
for i in range(PAGES):
    data[i * 4096:i * 4096 + 8] = (i if i % (2 * RUN) < RUN else i + PAGES * os.getpid()).to_bytes(8, 'little')
    data[i * 4096 + 8:i * 4096 + 16] = b'contents'
before = hashlib.sha1(data).digest()
print('ready', flush=True)
while sys.argv[1] == 'run':
    if hashlib.sha1(data).digest() != before:
        os._exit(3)
time.sleep(600)
"""


def took(host):
    """For how long passes stopped processes, in seconds."""
    return sum(map(float, re.findall(r"pass: marked in ([0-9.]+) ms", host.logs[0].read_text(errors="replace")))) / 1000


@contextlib.contextmanager
def merged(route, pages, run, does, quota, more=""):
    """(The host, its cgroup, the daemon, stops to meet them, what is counted) when both are merged."""
    with Host("stop-quota") as host:
        group = host.cgroup("a")
        victims = [host.spawn(group, sys.executable, "-c", VICTIM, does, str(pages), str(run), ready="ready") for _ in range(2)]
        config = host.configure(f"MinimumAge=0\nScanInterval=2s\nStopQuota={100 * quota:g}%\nBreakQuota=1000%\n{more}"
                                f"[Cgroup {group}]\nMerge=yes\nMinimumRun={run}\nRoute={route}\n")
        daemon = host.daemon(config)
        met = wait_for("them to be met", lambda: host.stats()["stops"])
        wait_for("all to be merged", lambda: host.stats()["pages_sharing"] >= 0.95 * pages / 2, 120)
        yield host, group, daemon, met, host.stats()
        check(all(victim.poll() is None for victim in victims), "contents")


def merge(route, pages, run, does, quota):
    """(Seconds, stops, what they took at least) until both are merged."""
    with merged(route, pages, run, does, quota) as (host, _, daemon, met, stats):
        check(host.stop(daemon) == 0, "end")
        # The upper edge of a bin of half an octave: no less than so much.
        return took(host), stats["stops"] - met, stats["stop_nsec_p50"] / 1.5e9


def check_route(route, pages, run, quota):
    asleep, n, _ = merge(route, pages, run, "sleep", quota)
    free, n_free, _ = merge(route, pages, run, "run", 1)
    spread, n_spread, stop = merge(route, pages, run, "run", quota)
    print(f"    {route}: asleep {asleep:.2f} s ({n} stops), running without a quota {free:.2f} s ({n_free}), "
          f"at {quota:.0%} {spread:.2f} s ({n_spread} of {1000 * stop:.2f} ms)")
    # Each stands for half of it; after the last visit nobody is waited for, and stops are not all as long as most.
    rest = (n_spread * stop / 2 - 0.012) * (1 - quota) / quota
    check(rest > 0, "too few stops, so this proves nothing")
    check(spread >= 0.4 * rest and spread > 2 * max(asleep, free), "it stood for more than its quota")


def advise():
    """route advise"""
    check_route("advise", 65536, 4, 0.01)


def remap():
    """route remap"""
    check_route("remap", 16384, 8, 0.05)


def take_apart(does, ends):
    """Seconds, by a request or because the daemon ends."""
    with merged("advise", 32768, 4, does, 1, "OnStop=unmerge\n") as (host, group, daemon, _, stats):
        begun = time.monotonic()
        if ends:
            check(host.stop(daemon) == 0, "end")
        else:
            pages = host.call("Unmerge", cgroup=group)["pages"]
            check(pages >= stats["pages_sharing"] and host.stats()["pages_sharing"] == 0, f"{pages} pages were taken apart")
        return time.monotonic() - begun


def undoing():
    """who runs is let run while what was merged is taken apart, and is not where the daemon ends"""
    asleep, ends, runs = take_apart("sleep", False), take_apart("run", True), take_apart("run", False)
    print(f"    asleep {asleep:.2f} s, running {runs:.2f} s, running as the daemon ends {ends:.2f} s")
    check(runs > 2 * max(asleep, ends), "it was not let run")


if __name__ == "__main__":
    run_tests(advise, remap, undoing)
