#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Passes that read only what changed: nothing is missed that is written, mapped, dropped, forked or executed while they
go on; nothing is read that was not; and registrations are gone when they should be."""
import os
import signal
import subprocess
import sys
import threading

from harness import KSM, Frames, Host, Obedient, check, ksmd_ticks, run_tests, smaps, wait_for

# Areas of pages whose contents follow from a seed; obeys lines, answers "ok". Contents are checked by heart.
VICTIM = r"""
import ctypes, hashlib, mmap, os, sys
P = 4096
areas, want = [], []
libc = ctypes.CDLL(None, use_errno=True)

def page(seed, i):
    return hashlib.sha256(f"{seed}:{i}".encode()).digest() * (P // 32)

def map(n):
    area = mmap.mmap(-1, n * P, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area.madvise(mmap.MADV_NOHUGEPAGE)
    areas.append(area), want.append([None] * n)

def fill(a, first, n, seed):
    for i in range(first, first + n):
        areas[a][i * P:(i + 1) * P] = page(seed, i)
        want[a][i] = seed

def drop(a):
    areas[a].madvise(mmap.MADV_DONTNEED)
    want[a] = [None] * len(want[a])

def check():
    for area, seeds in zip(areas, want):
        for i, seed in enumerate(seeds):
            if seed is not None and area[i * P:(i + 1) * P] != page(seed, i):
                raise SystemExit(f"page {i} is not {seed}")

def uffd():
    assert libc.syscall(323, 0o2000000 | 1) >= 0

print("ready", flush=True)
for line in sys.stdin:
    word, *rest = line.split()
    if word == "exec":
        os.execv(sys.executable, [sys.executable, "-c", open("/proc/self/cmdline").read().split("\0")[2]])
    if word == "fork":
        child = os.fork()
        if child == 0:
            check()
            fill(0, 0, 8, "child")
            sys.stdin = open("/dev/null")
            import time; time.sleep(600)
        print("ok", child, flush=True)
        continue
    globals()[word](*[int(x) if x.isdigit() else x for x in rest])
    print("ok", flush=True)
"""


class Victim(Obedient):
    def __init__(self, host, group):
        self.process = host.spawn(group, sys.executable, "-c", VICTIM, ready="ready", stdin=subprocess.PIPE)
        self.pid = self.process.pid

    def tracked(self):
        return sum("uw" in flags for _, flags, _ in smaps(self.pid))


def userfaultfds(daemon):
    return sum("userfaultfd" in os.readlink(f"/proc/{daemon.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{daemon.pid}/fd"))


def conf(group, track="auto", more="", daemon="", interval="1w"):
    return f"MinimumAge=0\nScanInterval={interval}\n{daemon}\n[Cgroup {group}]\nMerge=yes\nTrack={track}\n{more}"


def merged(*victims):
    return Frames().ksm([v.pid for v in victims])[0]


def until_merged(host, pages, *victims, passes=8):
    for _ in range(passes):
        host.passes()
        if merged(*victims) >= pages * 0.99:
            return
    raise AssertionError(f"{merged(*victims)} of {pages} pages merged: {host.stats()}")


def start(host, track="auto", victims=2, **options):
    group = host.cgroup("a")
    members = [Victim(host, group) for _ in range(victims)]
    for i, victim in enumerate(members):
        victim.order("map", 1024)
        victim.order("fill", 0, 0, 1024, f"own{i}")
    daemon = host.daemon(host.configure(conf(group, track, **options)))
    host.passes(4)
    return group, members, daemon


def hashed(host):
    return host.stats()["pages_hashed"]


def only_what_changed_is_read():
    """quiet memory is not read again; what is written is found, merged, and seen to be taken apart"""
    with Host("changed") as host:
        _, (one, two), daemon = start(host, interval="50ms")  # a pass that is asked for looks at more
        check(one.tracked() > 0 and two.tracked() > 0, "nothing is tracked")
        until = host.stats()["full_scans"] + 60
        wait_for("60 passes", lambda: host.stats()["full_scans"] > until)
        before = hashed(host)
        wait_for("60 passes", lambda: host.stats()["full_scans"] > until + 60)
        quiet = hashed(host) - before
        base = merged(one, two)
        for victim in one, two:
            victim.order("fill", 0, 100, 300, "same")
        before = hashed(host)
        until_merged(host, base + 600, one, two)
        changed = hashed(host) - before
        print(f"    hashed in 60 quiet passes: {quiet}, after 600 pages were written: {changed}")
        check(quiet < 1024, f"{quiet} pages of quiet processes were read")
        check(changed < 600 * 8, f"{changed} pages were read when 600 were written")
        for victim in one, two:
            victim.order("check")
        shared = host.stats()["pages_sharing"]
        one.order("fill", 0, 100, 200, "different")
        host.passes(3)
        check(host.stats()["pages_sharing"] <= shared - 190, "the statistics still count pages that were written")
        one.order("check"), two.order("check")
        check(host.stop(daemon) == 0, "end")
        check(one.tracked() == two.tracked() == 0, "a registration was left")


def mappings_come_and_go():
    """memory mapped later, dropped and filled again, moved to another program, and that of a child"""
    with Host("mappings") as host:
        _, (one, two), daemon = start(host)
        base = merged(one, two)
        for victim in one, two:
            victim.order("map", 512)
            victim.order("fill", 1, 0, 512, "new")
        until_merged(host, base + 1024, one, two)
        for victim in one, two:
            victim.order("drop", 1)
        host.passes(3)
        check(merged(one, two) <= base + 100, "what was dropped still counts")
        for victim in one, two:
            victim.order("fill", 1, 0, 512, "again")
        until_merged(host, base + 1024, one, two)

        child = int(one.order("fork")[0])
        host.passes(6)
        listed = {t["pid"]: t for t in host.call("ListTargets")["targets"]}
        check(listed[child]["state"] == "managed", f"{listed[child]}")
        one.order("check"), two.order("check")

        two.order("exec", expect="ready")
        two.order("map", 512)
        two.order("fill", 0, 0, 512, "again")
        one.order("fill", 0, 0, 512, "again")
        base = merged(one)
        until_merged(host, base + 512, one)
        check(two.tracked() > 0, "the new program is not tracked")
        one.order("check"), two.order("check")
        check(host.stop(daemon) == 0, "end")
        check(one.tracked() == two.tracked() == 0, "a registration was left")


def new_memory_of_the_busy():
    """memory mapped by processes that are planned in each pass is found, where lists of mappings are dear"""
    with Host("busy") as host:
        # The more is managed the more seldom are lists of mappings read: every 2 s here, four passes.
        group, (one, two), daemon = start(host, interval="500ms")
        load = host.workload(group, mib=512, duplicate=0, run=64)
        host.passes(2)
        stop = threading.Event()

        def write():
            n = 0
            while not stop.wait(0.02):
                n += 1
                for victim in one, two:
                    victim.order("fill", 0, n % 64, 1, f"busy{n}")

        for victim in one, two:
            victim.order("fill", 0, 100, 300, "same")
        until_merged(host, 600, one, two)
        for victim in one, two:
            victim.order("map", 512)
            victim.order("fill", 1, 0, 512, "new")
        writer = threading.Thread(target=write)
        writer.start()
        try:
            wait_for("the new memory merged", lambda: merged(one, two) >= 600 + 1000, 30, 0.5)
        finally:
            stop.set()
            writer.join()
        one.order("check"), two.order("check")
        check(load.intact() and host.stop(daemon) == 0, "end")


def released_when_asked():
    """a userfaultfd of its own, Track=no, opting out, a daemon that is killed: tracking ends, merging goes on"""
    with Host("released") as host:
        group, (one, two), daemon = start(host)
        one.order("uffd")
        for _ in range(20):
            one.order("map", 1)  # it does something, so it is looked at
            host.passes()
            if one.tracked() == 0:
                break
        check(one.tracked() == 0 and two.tracked() > 0, "a process that has a userfaultfd is tracked still")
        base = merged(one, two)
        for victim in one, two:
            victim.order("fill", 0, 0, 300, "same")
        until_merged(host, base + 600, one, two, passes=12)

        host.configure(conf(group, "no"))
        host.ctl("reload")
        two.order("map", 1)
        host.passes(2)
        check(two.tracked() == 0, "Track=no did not end it")
        for victim in one, two:
            victim.order("fill", 0, 400, 300, "more")
        until_merged(host, base + 1200, one, two, passes=12)
        host.configure(conf(group))
        host.ctl("reload")
        host.passes(2)
        check(two.tracked() > 0 and one.tracked() == 0, "Track=auto did not begin it again")
        before = userfaultfds(daemon)
        host.configure(conf(group, "yes"))
        host.ctl("reload")
        two.order("map", 1)
        host.passes(2)
        check(userfaultfds(daemon) == before > 0, "Track=yes took another userfaultfd beside the one of Track=auto")
        host.stop(daemon, signal.SIGKILL)
        wait_for("the kernel to take registrations back", lambda: two.tracked() == 0)
        daemon = host.daemon(host.configure(conf(group)))
        host.passes(2)
        check(two.tracked() > 0, "the next daemon does not track")
        host.ctl("unmerge", group)
        check(two.tracked() == 0, "a registration was left by unmerge")
        one.order("check"), two.order("check")
        check(host.stop(daemon) == 0, "end")


def partner_comes_late():
    """a process that could not be called when its twin was marked is merged as soon as it can be"""
    with Host("late") as host:
        _, (one, two), daemon = start(host)
        base = merged(one, two)
        two.order("fill", 0, 0, 512, "same")
        host.passes(2)
        one.order("fill", 0, 0, 512, "same")  # the later ones are what a burst is for
        two.process.send_signal(signal.SIGSTOP)
        bursts = ksmd_ticks()
        for _ in range(8):  # ksmd is let run in vain, and then ever more seldom
            host.ctl("scan")
        check(ksmd_ticks() > bursts and merged(one, two) < base + 100, "nothing was tried in vain: this proves nothing")
        two.process.send_signal(signal.SIGCONT)
        until_merged(host, base + 1024, one, two, passes=3)
        one.order("check"), two.order("check")
        check(host.stop(daemon) == 0, "end")


def others_merge_without_it():
    """a process that could not be called while its twins were merged joins them as soon as it can be"""
    with Host("without") as host:
        _, victims, daemon = start(host, victims=3)
        base = merged(*victims)
        for victim in victims:
            victim.order("fill", 0, 0, 512, "same")
        victims[0].process.send_signal(signal.SIGSTOP)
        until_merged(host, base + 1024, *victims)
        host.passes(4)  # what was expected of it is forgotten
        victims[0].process.send_signal(signal.SIGCONT)
        until_merged(host, base + 1536, *victims, passes=3)
        for victim in victims:
            victim.order("check")
        check(host.stop(daemon) == 0, "end")


def unmerging_is_noticed():
    """an administrator has everything unmerged: no process did anything, and yet it is merged again"""
    with Host("unmerged") as host:
        _, (one, two), daemon = start(host)
        for victim in one, two:
            victim.order("fill", 0, 0, 512, "same")
        until_merged(host, 1024, one, two)
        try:
            (KSM / "run").write_text("2")
        finally:
            (KSM / "run").write_text("0")
        check(merged(one, two) == 0, "run=2 left something merged")
        until_merged(host, 1024, one, two)
        one.order("check"), two.order("check")
        check(host.stop(daemon) == 0, "end")


def dry_run_registers_nothing():
    """Merge=dry-run counts without touching, and still sees what changes"""
    with Host("dry") as host:
        group = host.cgroup("a")
        one, two = Victim(host, group), Victim(host, group)
        for victim in one, two:
            victim.order("map", 512)
            victim.order("fill", 0, 0, 512, "same")
        text = conf(group).replace("Merge=yes", "Merge=dry-run")
        daemon = host.daemon(host.configure(text))
        host.passes(3)
        check(one.tracked() == two.tracked() == 0, "a dry run registered")
        twins = host.call("Explain", pid=one.pid)["merge_failures"]["kernel"]
        check(twins >= 500, f"{twins} twins found")
        check(host.stop(daemon) == 0 and merged(one, two) == 0, "end")


def memory_is_limited():
    """MetadataMax= holds: a part of the contents is remembered, and what is remembered is merged"""
    with Host("limited") as host:
        group = host.cgroup("a")
        load = host.workload(group, mib=384, duplicate=20, run=64, seed=5)
        daemon = host.daemon(host.configure(conf(group, daemon="MetadataMax=2M")))
        host.passes(6)
        stats = host.stats()
        print(f"    {load.pages * 2} pages: {stats['metadata_bytes']} bytes, {load.merged()} of {load.mergeable} merged, "
              f"left out {stats['merge_failures']['metadata']}")
        check(stats["metadata_bytes"] <= 2 << 20, f"{stats['metadata_bytes']} bytes")
        check(stats["merge_failures"]["metadata"] > 0, "nothing is said of it")
        check(0 < load.merged() < load.mergeable, f"{load.merged()} of {load.mergeable} merged")
        check(load.intact() and host.stop(daemon) == 0, "end")


if __name__ == "__main__":
    run_tests(only_what_changed_is_read, mappings_come_and_go, new_memory_of_the_busy, released_when_asked, partner_comes_late,
              others_merge_without_it, unmerging_is_noticed, dry_run_registers_nothing, memory_is_limited)
