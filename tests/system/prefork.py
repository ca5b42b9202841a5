#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Processes that were forked from one another. What they share by that is no saving of ours; what drifted apart and is
alike again is merged back; and what is reported as saved are the frames that became free, to the frame."""
import os
import signal
import subprocess
import sys

from harness import PAGE, Frames, Host, Obedient, check, check_harmless, marked, run_tests, wait_for

MIB = 64
CHILDREN = 8

# A server that builds its memory and forks workers, like php-fpm. A worker obeys signals: USR1 makes it rewrite some parts
# and put most of it back as it was, USR2 check all of it. Parts overlap between neighbours.
SERVER = r"""
import ctypes, hashlib, mmap, os, signal, sys, time
P, N, CHILDREN = 4096, int(sys.argv[1]), int(sys.argv[2])
libc = ctypes.CDLL(None)

def page(seed):
    return hashlib.sha256(str(seed).encode()).digest() * (P // 32)

area = mmap.mmap(-1, N * P, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
area.madvise(mmap.MADV_NOHUGEPAGE)
# A quarter is alike in pairs, a part is all zero.
def content(i):
    return bytes(P) if i % 32 == 7 else page(i // 2 if i % 8 < 2 else 1000000 + i)
for i in range(N):
    area[i * P:(i + 1) * P] = content(i)

def drift(me):
    for i in range(me * N // 16, me * N // 16 + N // 8):
        area[i * P:(i + 1) * P] = page(-i - 1)
        if i % 16:
            area[i * P:(i + 1) * P] = content(i)

def check(me):
    for i in range(N):
        mine = me is not None and me * N // 16 <= i < me * N // 16 + N // 8 and i % 16 == 0 and drifted
        if area[i * P:(i + 1) * P] != (page(-i - 1) if mine else content(i)):
            return False
    return True

drifted = False
def worker(me):
    global drifted
    sys.stdin = open("/dev/null")
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1, signal.SIGUSR2])
    libc.prctl(1, signal.SIGKILL) if me < CHILDREN else None
    while True:
        if signal.sigwait([signal.SIGUSR1, signal.SIGUSR2]) == signal.SIGUSR1:
            drift(me), os.write(pipe[1], b"d")
            drifted = True
        else:
            os.write(pipe[1], b"y" if check(me) else b"n")

pipe = os.pipe()
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1, signal.SIGUSR2])
pids = []
def fork(me):
    pid = os.fork()
    if pid == 0:
        worker(me)
    pids.append(pid)
    return pid
libc.prctl(36, 0)
print("ready", ctypes.addressof(ctypes.c_char.from_buffer(area)), flush=True)
for line in sys.stdin:
    word, *rest = line.split()
    if word == "fork":
        print("ok", fork(int(rest[0])), flush=True)
    elif word == "signal":
        answers = []
        for pid in pids:
            os.kill(pid, int(rest[0]))
        while len(answers) < len(pids):
            answers += list(os.read(pipe[0], len(pids) - len(answers)).decode())
        print("ok", "".join(answers) + ("y" if check(None) else "n"), flush=True)
"""


class Server(Obedient):
    def __init__(self, host, group, pages=MIB * 256):
        self.process = host.spawn(group, sys.executable, "-c", SERVER, pages, CHILDREN, ready="ready",
                                  stdin=subprocess.PIPE)
        self.pids = [self.process.pid]

    def fork(self, number):
        self.pids.append(int(self.order("fork", number)[0]))
        return self.pids[-1]

    def drift(self):
        self.order("signal", int(signal.SIGUSR1))

    def intact(self):
        answers, = self.order("signal", int(signal.SIGUSR2))
        check_harmless(set(answers) == {"y"}, f"a process of the server reads what it did not write: {answers}")
        return True


def frames_in_use(pids):
    """Distinct frames behind all private anonymous memory of the processes; the zero page is nobody's."""
    frames, seen = Frames(), set()
    for pid in pids:
        seen.update(frames.of(pid).values())
    return sum(not frames.flags(pfn) & Frames.ZERO_FLAG for pfn in seen)


def reported(host):
    stats = host.call("GetStats")
    group = stats["cgroups"][0]
    check(group["bytes_saved"] == stats["daemon"]["bytes_saved"] == stats["domains"][0]["bytes_saved"], f"{stats}")
    return group["bytes_saved"] // PAGE


def settled(host):
    """Passes until what is wanted is merged, or stays as it is; returns how many pages are left."""
    host.passes(2)
    left, same = host.stats()["merge_failures"]["kernel"], 0
    while left > 16 and same < 80:
        host.passes()
        now = host.stats()["merge_failures"]["kernel"]
        left, same = now, same + 1 if now == left else 0
    host.passes(2)
    return left


ANY_BREAKS = "BreakQuota=1000%\n"  # what they cost here is another test's


def conf(group, daemon="Judgement=no\n", merge="yes"):
    # What drifts is broken merges to the judge, who leaves it alone for a while.
    return f"MinimumAge=0\nScanInterval=1w\n{daemon}[Cgroup {group}]\nMerge={merge}\n"


def drifted(host, pages=MIB * 256):
    """A server whose workers have drifted apart, not managed yet: (its cgroup, it, its frames)"""
    group = host.cgroup("a")
    server = Server(host, group, pages)
    for i in range(CHILDREN):
        server.fork(i)
    server.drift()
    return group, server, frames_in_use(server.pids)


def restarted(host, daemon, how):
    """Another daemon takes over; returns it."""
    host.stop(daemon, how)
    return host.daemon(host.dir / "test.conf")


def savings_are_frames():
    """a server of 64 MiB and 8 workers that drift: what is reported is what became free; what fork shares is not"""
    with Host("prefork") as host:
        group, server, started = drifted(host)
        daemon = host.daemon(host.configure(conf(group)))
        left = settled(host)
        now, told = frames_in_use(server.pids), reported(host)
        print(f"    {started} frames, merged {now}: freed {started - now}, reported {told}, {left} left unmerged")
        check(started - now > MIB * 256 // 8 * CHILDREN * 9 // 10, "what drifted apart was not merged back")
        # What relatives that are not marked lie on still is not free yet: some pages of the interpreter's.
        check(abs(told - (started - now)) <= (started - now) // 100 + left, f"{started - now} frames became free, {told} are reported")

        # Workers that are forked now map what is merged already: nothing more is saved.
        for i in range(CHILDREN, CHILDREN + 4):
            server.fork(i)
        forked = frames_in_use(server.pids)
        left += settled(host)
        listed = {t["pid"]: t for t in host.call("ListTargets")["targets"]}
        check(all(pid in listed for pid in server.pids), "a child of a managed process is not managed")
        after = frames_in_use(server.pids)
        print(f"    4 more workers: {forked - now} frames for themselves, freed {forked - after}, reported {reported(host)}")
        # Forking takes pages apart that were noted for others: one frame less each may be reported.
        check(abs(reported(host) - told - (forked - after)) <= forked - now + left,
              f"{forked - after} frames became free, {reported(host) - told} more are reported")

        # They drift apart, and are merged back.
        told, before = reported(host), frames_in_use(server.pids)
        server.drift()
        apart = frames_in_use(server.pids)
        settled(host)
        now = frames_in_use(server.pids)
        print(f"    drifted again: {apart - before} more frames, {now - before} when merged again, "
              f"reported {told} and {reported(host)}")
        check(now - before <= (apart - before) // 10, "not merged back")
        check(server.intact(), "merging changed memory")
        check(host.stop(daemon) == 0, "end")


def restart_tells_the_same():
    """killed when all is merged, or stopped with OnStop=keep: the next daemon reports what became free, and goes on"""
    with Host("restart") as host:
        group, server, started = drifted(host, MIB * 64)
        daemon = host.daemon(host.configure(conf(group)))
        left = settled(host)
        for how in signal.SIGKILL, signal.SIGTERM, signal.SIGKILL:
            now, told = frames_in_use(server.pids), reported(host)
            daemon = restarted(host, daemon, how)
            host.passes(2)
            again, after = reported(host), frames_in_use(server.pids)
            print(f"    freed {started - now}, reported {told}; after {how.name}: freed {started - after}, reported {again}")
            check(started - after > MIB * 64 // 8 * CHILDREN * 9 // 10, "not merged")
            check(abs(again - (started - after)) <= (started - after) // 100 + left,
                  f"{started - after} frames are free, {again} are reported by the next daemon")

        # What is written while no daemon runs counts for nothing, until the next one has merged it again.
        host.stop(daemon, signal.SIGKILL)
        server.drift()
        daemon = host.daemon(host.dir / "test.conf")
        host.passes(1)
        left += settled(host)
        after, again = frames_in_use(server.pids), reported(host)
        print(f"    drifted meanwhile: freed {started - after}, reported {again}")
        check(abs(again - (started - after)) <= (started - after) // 100 + left,
              f"{started - after} frames are free, {again} are reported")
        check(server.intact(), "merging changed memory")

        # The control: what an earlier daemon left to read is what the figures above come from.
        host.stop(daemon, signal.SIGKILL)
        (host.dir / "run/merged").unlink()
        daemon = host.daemon(host.dir / "test.conf")
        host.passes(2)
        print(f"    without the file: reported {reported(host)}")
        check(reported(host) < again // 2, "told without being known")
        check(host.stop(daemon) == 0, "end")


def judged():
    """the same with judgement: what drifts is left alone, what is reported is what is free, also while it is; let go, it merges"""
    with Host("judged") as host:
        group, server, started = drifted(host, MIB * 64)
        daemon = host.daemon(host.configure(conf(group, daemon=ANY_BREAKS)))
        left = settled(host)
        merged, told = frames_in_use(server.pids), reported(host)
        check(started - merged > MIB * 64 // 8 * CHILDREN * 9 // 10, "what drifted apart was not merged back")
        check(abs(told - (started - merged)) <= (started - merged) // 100 + left, f"{started - merged}, {told} reported")

        server.drift()
        apart = frames_in_use(server.pids)
        settled(host)
        alone, told = host.stats()["merge_failures"]["hot"], reported(host)
        now = frames_in_use(server.pids)
        print(f"    drifted: {apart - merged} more frames, {now - merged} with judgement, {alone} pages left alone; "
              f"freed {started - now}, reported {told}")
        check(alone >= (apart - merged) * 9 // 10, "what broke was not left alone")
        check(now - merged >= (apart - merged) * 9 // 10, "what was left alone was merged")
        check(abs(told - (started - now)) <= (apart - merged) // 100 + left, f"{started - now} are free, {told} reported")

        host.configure(conf(group, daemon=ANY_BREAKS + "PayBack=1s\n"))  # lets everybody go
        host.ctl("reload")
        settled(host)
        now, told = frames_in_use(server.pids), reported(host)
        print(f"    let go: {now - merged} more frames than at first, freed {started - now}, reported {told}")
        check(now - merged <= (apart - merged) // 10, "not merged back")
        check(abs(told - (started - now)) <= (started - now) // 100 + left, f"{started - now} are free, {told} reported")
        check(server.intact(), "merging changed memory")
        check(host.stop(daemon) == 0, "end")


def orphans_marks_are_ours():
    """a child whose parent ended before we met it: the marks it was born with are ours, and go with an opt-out"""
    with Host("orphan") as host:
        group, other = host.cgroup("a"), host.cgroup("b")
        server = Server(host, group, pages=1024)
        daemon = host.daemon(host.configure(conf(group)))
        host.passes(4)
        check(marked(server.pids[0]) > 0, "nothing was marked")
        orphan = server.fork(CHILDREN)  # outlives its parent
        host.move(other, orphan)        # out of sight
        server.process.kill()
        server.process.wait()
        host.passes(2)
        check(marked(orphan) > 0, "the child was not born with marks")
        host.move(group, orphan)
        host.passes(3)
        check(host.call("Explain", pid=orphan)["state"] == "managed", "it is not managed")
        host.ctl("unmerge", group)
        check(marked(orphan) == 0, "marks that it was born with were taken for its own")
        os.kill(orphan, signal.SIGKILL)
        check(host.stop(daemon) == 0, "end")


if __name__ == "__main__":
    run_tests(savings_are_frames, restart_tells_the_same, judged, orphans_marks_are_ours)
