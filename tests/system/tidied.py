#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Pools are put in order: what one process maps alone becomes its own again, unless it was written."""
import os
import random
import signal
import subprocess
import sys
import time

from harness import KSMCTL, PAGE, Host, check, run_tests, wait_for
from remapped import (DAEMON, TEST_DAEMON, Victim, converge, ended, entries, notice, pool_lines, section, started, stats,
                      unharmed, unmerge, until_noticed, wait_for_plain, without_ksm)

LOOKS = 8  # TIDY_LOOKS_MIN


def pool_pages(daemon):
    """Pages of memory that the pools of the daemon take."""
    found = {}
    for fd in os.listdir(f"/proc/{daemon.pid}/fd"):
        try:
            if os.readlink(f"/proc/{daemon.pid}/fd/{fd}").removesuffix(" (deleted)").endswith("/pool"):
                seen = os.stat(f"/proc/{daemon.pid}/fd/{fd}")
                found[seen.st_dev, seen.st_ino] = seen.st_blocks * 512 // PAGE
        except OSError:
            pass
    return sum(found.values())


def pieces(victim):
    """Mappings that its memory is in."""
    low, high = victim.addresses[0], victim.addresses[0] + victim.pages * PAGE
    found = (tuple(int(x, 16) for x in line.split()[0].split("-")) for line in open(f"/proc/{victim.pid}/maps"))
    return sum(start < high and end > low for start, end in found)


def leave(victim):
    victim.process.stdin.close()
    victim.process.wait()


def alone():
    """of three that share, one ends and one writes everything anew: the third has its memory for itself again"""
    with Host("tidyalone") as host:
        group = host.cgroup("a")
        victims = [Victim(host, group, "--quiet") for _ in range(3)]
        before, before_pieces = started(*victims), pieces(victims[0])
        daemon = without_ksm(host, host.configure(DAEMON + section(group)))
        converge(host, *victims)
        one, two, three = victims
        check(pool_pages(daemon) >= one.mergeable, f"{pool_pages(daemon)} pages in the pool")
        one.order("watch")
        # Two who share go on sharing.
        leave(three)
        host.passes(LOOKS + 2)
        check(stats(host, group)["pool_pages_returned"] == 0 and len(one.frames(False) & two.frames(False)) >= one.mergeable,
              "put back what two share")
        two.order("rewrite")
        wait_for("all plain", lambda: host.passes() or not pool_lines(one.pid), 60)
        one.order("seen")
        host.passes(2)
        got = stats(host, group)
        print(f"    {got['pool_pages_returned']} pages given back, {pool_pages(daemon)} left in the pool; "
              f"{pieces(one)} mappings, {before_pieces} before")
        check(got["pool_pages_returned"] >= one.pages and got["pages_sharing"] == 0, f"{got}")
        check(pool_pages(daemon) == 0, f"{pool_pages(daemon)} pages left in the pool")
        check(pieces(one) <= before_pieces, "it is in pieces")
        check(pool_lines(two.pid), "what was written was put back")
        # It is looked at as ever: somebody comes who has the same.
        four = Victim(host, group, "--quiet")
        converge(host, one, four)
        check(len(one.frames(False) & four.frames(False)) >= one.mergeable, "not the same frames")
        one.order("calm")
        two.order("check")
        unmerge(host, group)
        wait_for_plain([v.pid for v in (one, two, four)])
        unharmed({v.pid: before.get(v.pid, started(v)[v.pid]) for v in (one, two, four)}, one, two, four)
        ended(host, daemon, one, two, four)


def written():
    """pages that were written, and pieces too short between them, stay where they are; what is beside them goes"""
    with Host("tidywritten") as host:
        group = host.cgroup("a")
        one, two = victims = [Victim(host, group, "--quiet") for _ in range(2)]
        daemon = host.daemon(host.configure(DAEMON + section(group)))
        converge(host, *victims)
        one.order("write")  # every 37th page of the first half
        one.order("watch")
        own = {page: e & (1 << 55) - 1 for (_, page), e in entries(one).items() if page % 37 == 0 and page < one.pages // 2}
        leave(two)
        wait_for("half of it plain", lambda: host.passes() or
                 stats(host, group)["pool_pages_returned"] >= one.pages // 2 - 64, 60)
        host.passes(LOOKS)
        one.order("seen")
        now = {page: e & (1 << 55) - 1 for (_, page), e in entries(one).items() if page in own}
        check(now == own, "a page that was written was copied")
        low, high = one.addresses[0], one.addresses[0] + one.pages // 2 * PAGE
        mapped = [tuple(int(x, 16) for x in line.split()[0].split("-")) for line in pool_lines(one.pid)]
        check(any(start <= low + 37 * PAGE < end for start, end in mapped), "nothing is left of the pool")
        check(sum(end - start for start, end in mapped if start >= high) == 0, f"left: {pool_lines(one.pid)}")
        one.order("calm")
        unmerge(host, group)
        wait_for_plain([one.pid])
        ended(host, daemon, one)


def apart_but_for_pinned(host, leave_out):
    """A page that is pinned, and written past the page tables; the pool's page that was there is somebody's who stands
    still, and so is mapped once. Goes on until something wrong is seen, or a second page of the pool is given back."""
    group = host.cgroup("a")
    one, two = victims = [Victim(host, group, "--quiet") for _ in range(2)]
    daemon = host.daemon(host.configure(DAEMON + section(group)), program=TEST_DAEMON,
                         environment={"KSMD_USER_TEST_LEAVE_OUT" + name: str(mask) for name, mask in leave_out.items()})
    converge(host, *victims)
    two.process.send_signal(signal.SIGSTOP)
    one.order("pin")
    return daemon, one, two


def pinned():
    """what is pinned, and was written, stays: even where the daemon takes it for what it merged, by the program"""
    for leave_out in ({}, {"_TIDY": 3}):
        with Host("tidypinned") as host:
            daemon, one, two = apart_but_for_pinned(host, leave_out)
            for _ in range(64 + 2 * LOOKS):  # that it stands still is seen by then (LOOK_PASSES)
                host.ctl("scan")
                one.order("receive")
            check(stats(host, host.groups[0])["pool_pages_returned"] == 0, "pages were put back")
            two.process.send_signal(signal.SIGCONT)
            one.order("unpin")
            two.order("check")


def control_pinned():
    """what was written is put back by the daemon that does not look, and the program that does not: a buffer is elsewhere"""
    def act(host):
        daemon, one, two = apart_but_for_pinned(host, {"_TIDY": 3, "_REMAP": 1 << 10})
        while daemon.poll() is None:
            host.passes()
            notice(one, "receive")
    until_noticed("tidyctlpinned", act)


def killed():
    """killed while it puts back: a part is plain and a part the pool's, and the next daemon goes on"""
    with Host("tidykilled") as host:
        group = host.cgroup("a")
        one, two = victims = [Victim(host, group, "--quiet", mib=16) for _ in range(2)]
        before, before_pieces = started(one), pieces(one)
        config = host.configure(DAEMON + section(group))
        daemon = host.daemon(config)
        converge(host, *victims)
        one.order("watch")
        leave(two)
        wait_for("a beginning", lambda: host.passes() or stats(host, group)["pool_pages_returned"] > 0, 60, interval=0)
        returned = stats(host, group)["pool_pages_returned"]
        subprocess.Popen([str(KSMCTL), "--socket", str(host.socket), "scan"], stdout=subprocess.DEVNULL,
                         stderr=subprocess.DEVNULL)
        time.sleep(random.uniform(0, 0.02))
        daemon.kill()
        daemon.wait()
        left = len(one.frames(False))
        print(f"    killed after {returned} pages or more, {left} of {one.pages} were left")
        check(left > 0, "there was nothing left to be interrupted")
        one.order("seen")
        daemon = host.daemon(config)
        # What is about to be mapped by a program of the first one might look alone: for ten seconds nothing is done.
        wait_for("all plain", lambda: host.passes() or not pool_lines(one.pid), 60)
        one.order("seen")
        one.order("calm")
        print(f"    {pieces(one)} mappings, {before_pieces} before")
        unharmed(before, one)
        ended(host, daemon, one)


if __name__ == "__main__":
    run_tests(alone, written, pinned, killed, *([control_pinned] if sys.argv[1:] else []))
