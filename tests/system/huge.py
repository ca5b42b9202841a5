#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Huge pages: unique ones stay as they are, tracked or not; one that is mostly zero gives that part back; what was split
and holds nothing alike any more is made whole again, and what would save too little is never split."""
import pathlib
import subprocess
import sys

from harness import NOTICED, PAGE, Frames, Host, Obedient, check, run_tests, skip, smaps, wait_for

THP = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
HUGE = 2 << 20
SPLIT_BLINDLY = "split for what it held before"
# An area of huge pages whose contents follow from a kind; obeys lines, checks itself.
VICTIM = r"""
import ctypes, hashlib, mmap, os, sys
P, H, N = 4096, 2 << 20, int(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)
whole = mmap.mmap(-1, (N + 1) * H, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
base = ctypes.addressof(ctypes.c_char.from_buffer(whole))
at = -base % H
assert libc.madvise(ctypes.c_void_p(base + at), ctypes.c_size_t(N * H), 14) == 0  # MADV_HUGEPAGE
rounds = 0

def page(i):
    zero = share and i * 7919 % 512 * 100 < share * 512
    return bytes(P) if zero else hashlib.sha256(f"{rounds} {i} {sys.argv[2]}".encode()).digest() * (P // 32)

share = 0
def fill(percent):
    global share, rounds
    share, rounds = int(percent), rounds + 1
    for i in range(N * H // P):
        whole[at + i * P:at + (i + 1) * P] = page(i)

def dumpable(yes):
    os.setuid(65534)  # of root it cannot be seen from outside
    assert libc.prctl(4, int(yes), 0, 0, 0) == 0  # PR_SET_DUMPABLE

print("ready", base + at, flush=True)
for line in sys.stdin:
    word, *rest = line.split()
    if word in ("fill", "dumpable"):
        globals()[word](*rest)
        print("ok", flush=True)
    else:
        print("ok" if all(whole[at + i * P:at + (i + 1) * P] == page(i) for i in range(N * H // P)) else "bad",
              flush=True)
"""


class Victim(Obedient):
    def __init__(self, host, group, pages, name):
        self.process = subprocess.Popen([sys.executable, "-c", VICTIM, str(pages), name], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True)
        host.processes.append(self.process)
        self.pid, self.pages = self.process.pid, pages
        self.first = int(self.process.stdout.readline().split()[1])
        host.move(group, self.pid)

    def huge(self):
        """How many huge pages the area has."""
        return sum(size for start, _, size in smaps(self.pid)
                   if self.first <= start < self.first + self.pages * HUGE or start <= self.first) // HUGE

    def frames(self):
        """(pages on frames of their own, pages that map the zero page)"""
        frames = Frames()
        seen = list(frames.of(self.pid, self.first, self.first + self.pages * HUGE).values())
        zero = sum(bool(frames.flags(pfn) & Frames.ZERO_FLAG) for pfn in seen)
        return len(seen) - zero, zero


def conf(group, more=""):
    return f"MinimumAge=0\nScanInterval=1w\nOnStop=unmerge\n[Cgroup {group}]\nMerge=yes\n{more}"


def filled(host, group, pages, share, name):
    victim = Victim(host, group, pages, name)
    victim.order("fill", share)
    if victim.huge() < pages:
        skip(f"no huge pages to be had: {victim.huge()} of {pages}")
    return victim


def unique_ones_stay():
    """16 huge pages of unique contents, and 16 that are zero for a tenth: all of them there after ten passes"""
    with Host("whole") as host:
        group = host.cgroup("a")
        victims = [filled(host, group, 16, share, f"{share}") for share in (0, 10)]
        daemon = host.daemon(host.configure(conf(group)))
        for i in range(10):
            host.passes()
            if i % 3 == 1:
                check(all(victim.intact() for victim in victims), "memory changed")
        tracked = [sum("uw" in flags for _, flags, _ in smaps(victim.pid)) for victim in victims]
        group_stats = host.call("GetStats")["cgroups"][0]
        print(f"    huge pages {[victim.huge() for victim in victims]}, tracked mappings {tracked}, split "
              f"{group_stats['huge_pages_split']}, left whole {group_stats['merge_failures']['huge']} pages")
        check([victim.huge() for victim in victims] == [16, 16], "huge pages were split")
        check(all(tracked), "not tracked")
        check(group_stats["huge_pages_split"] == 0, "counted as split")
        check(group_stats["merge_failures"]["huge"] >= 16 * 51 * 9 // 10, "what is left whole is not said")
        check(host.stop(daemon) == 0, "end")


def zero_part_comes_back_and_goes():
    """16 huge pages that are zero for three quarters give these back; rewritten, they are made whole again"""
    with Host("back") as host:
        group = host.cgroup("a")
        victim = filled(host, group, 16, 75, "x")
        daemon = host.daemon(host.configure(conf(group)))
        wanted = 16 * 512 * 75 // 100

        def given():
            host.passes()
            return victim.frames()[1] >= wanted * 98 // 100
        wait_for("the zero part", given, 60, 0)
        host.passes(2)
        own, zero = victim.frames()
        stats = host.stats()
        print(f"    {own} pages of their own, {zero} zero, {victim.huge()} huge pages left, "
              f"{stats['huge_pages_split']} split, saved {stats['bytes_saved'] // PAGE} pages")
        check(stats["huge_pages_split"] == 16 and victim.huge() == 0, "not counted as split")
        # The kernel gives back the zero part of all of a huge page that it splits, what is not marked yet included.
        check(wanted * 80 // 100 <= stats["bytes_saved"] // PAGE <= zero + 256, "not counted as saved")
        victim.order("check")

        # No more of it is zero: unmarked after some passes, then offered back.
        victim.order("fill", 0)

        def whole():
            host.passes()
            return host.stats()["huge_pages_collapsed"] >= 16
        wait_for("huge pages again", whole, 60, 0)
        print(f"    rewritten: {victim.huge()} huge pages, {host.stats()['huge_pages_collapsed']} made whole again")
        check(victim.huge() == 16, "not whole")
        victim.order("check")

        # And what is done to them then is seen: they come apart again only after a while.
        victim.order("fill", 75)
        host.passes(6)
        check(victim.huge() == 16, "split again at once")
        victim.order("check")
        check(host.stop(daemon) == 0, "end")


def changed_since_it_was_read():
    """what was zero when it was read, and is no more, does not cost the huge page"""
    with Host("judged") as host:
        group = host.cgroup("a")
        victim = filled(host, group, 16, 40, "y")  # too little to mark what lies between as well, which would split nothing
        text = conf(group, "HugePageSplit=100%\n").replace("ScanInterval=1w", "ScanInterval=50ms")
        daemon = host.daemon(host.configure(text))

        def scans(n):  # a pass that is asked for would look at everything
            until = host.stats()["full_scans"] + n
            wait_for(f"{n} passes", lambda: host.stats()["full_scans"] >= until)
        scans(40)
        check(victim.huge() == 16, "split for less than all of it")
        victim.order("fill", 0)
        host.configure(text.replace("HugePageSplit=100%", "HugePageSplit=25%"))
        host.ctl("reload")
        scans(4)
        print(f"    huge pages {victim.huge()}, split {host.stats()['huge_pages_split']}")
        check(victim.huge() == 16 and host.stats()["huge_pages_split"] == 0, SPLIT_BLINDLY)
        check(victim.intact() and host.stop(daemon) == 0, "end")


# One page in so many of such an area of so many huge pages, filled once.
TWIN = r"""
import hashlib, mmap, sys, time
pages, step, name = int(sys.argv[1]) * 512, int(sys.argv[2]), sys.argv[3]
area = mmap.mmap(-1, pages // step * 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
area.madvise(mmap.MADV_NOHUGEPAGE)
area[:] = b"".join(hashlib.sha256(f"1 {i} {name}".encode()).digest() * 128 for i in range(0, pages, step))
print("ready", flush=True)
time.sleep(600)
"""


def secrets_are_not_read():
    """huge pages of a process that keeps secrets by now are not read when pages like them turn up elsewhere"""
    with Host("secrets") as host:
        group = host.cgroup("a")
        victim = filled(host, group, 32, 0, "s")
        victim.order("dumpable", 1)
        daemon = host.daemon(host.configure(conf(group, "HugePageSplit=1%\n")))
        host.passes(3)
        victim.order("dumpable", 0)
        wait_for("it to be left alone", lambda: host.passes() or "not-dumpable" in str(host.call("Explain", pid=victim.pid)))
        before = host.stats()["pages_hashed"]
        host.spawn(group, sys.executable, "-c", TWIN, 32, 32, "s", ready="ready")
        for _ in range(5):
            host.passes()
            read = host.stats()["pages_hashed"] - before
            found = host.call("Explain", pid=victim.pid)["merge_failures"]["kernel"]
            check(read < 32 * 512, "secrets were read")
            if found >= 400:
                break
        print(f"    {read} pages read, {found} of {32 * 512 // 32} found in the other process")
        check(found >= 400, "this proves nothing")
        check(victim.intact() and host.stop(daemon) == 0, "end")


def control():
    """A daemon that does not read a huge page as a whole before it splits it fails for that, and nothing else."""
    try:
        changed_since_it_was_read()
    except AssertionError as error:
        print(f"    {error}")
        sys.exit(NOTICED if str(error) == SPLIT_BLINDLY else 1)


if __name__ == "__main__":
    if "[never]" in THP.read_text():
        skip("huge pages are switched off")
    if sys.argv[1:] == ["control"]:
        control()
        sys.exit(1)
    run_tests(unique_ones_stay, zero_part_comes_back_and_goes, changed_since_it_was_read, secrets_are_not_read)
