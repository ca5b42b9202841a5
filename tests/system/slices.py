#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is large is taken apart in slices: meanwhile the daemon answers, whoever forks, ends or runs another program is
dealt with, and a daemon that is stopped or killed in the middle leaves nothing that is not undone."""
import contextlib
import signal
import sys
import threading

from harness import PAGE, Host, Varlink, check, run_tests, wait_for

ROUTES = "advise", "remap"
# Some seconds of undoing, or one on a machine that is five times as fast.
MIB = {"advise": 768, "remap": 192}


def conf(route, *groups, more=""):
    return (f"MinimumAge=0\nScanInterval=1s\n{more}\n" +
            "".join(f"[Cgroup {group}]\nDomain=one\nMerge=yes\nRoute={route}\n" for group in groups))


def left(load):
    """Pages of mappings that something of ours is in."""
    pages = 0
    for pid in load.pids:
        with contextlib.suppress(OSError):
            for line in open(f"/proc/{pid}/smaps", errors="replace"):
                word, *rest = line.split()
                if not word.endswith(":"):
                    start, end = (int(x, 16) for x in word.split("-"))
                    pool = bool(rest[4:]) and rest[4].endswith("/pool")
                elif word == "VmFlags:" and (pool or "mg" in rest):
                    pages += (end - start) // PAGE
    return pages


@contextlib.contextmanager
def merged(name, route, more=""):
    with Host(name) as host:
        group = host.cgroup("a")
        load = host.workload(group, mib=MIB[route], duplicate=90, run=16)
        daemon = host.daemon(host.configure(conf(route, group, more=more)))
        wait_for("merged", lambda: host.ctl("scan") is None or
                 host.stats()["pages_sharing"] >= load.duplicate * 0.98, 90)
        yield host, group, load, daemon


class Unmerge(threading.Thread):
    """Asks for it; meanwhile counts whatever else is answered."""

    def __init__(self, host, group):
        super().__init__(daemon=True)
        self.connection, self.group, self.reply, self.answers = Varlink(host.socket, 120), group, None, 0
        self.start()

    def run(self):
        try:
            self.reply = self.connection.call("Unmerge", cgroup=self.group)
        except (RuntimeError, OSError, EOFError) as error:
            self.reply = error

    def wait_for_middle(self, host, load):
        """Until part of it is done, as the daemon's answers and the kernel say."""
        begun = left(load)
        check(begun > min(MIB.values()) * 256, f"hardly anything to undo: {begun} pages")
        while self.reply is None:
            host.call("GetStatus")
            self.answers += self.reply is None
            if self.answers >= 3 and 0 < left(load) < begun:
                return
        raise AssertionError(f"over before its middle, {self.answers} answers: {self.reply}")


def apart(load, what):
    check(left(load) == 0, f"{what}: {left(load)} pages are left")
    pfns = list(load.frames().values())
    check(len(set(pfns)) == len(pfns), f"{what}: {len(pfns) - len(set(pfns))} of {len(pfns)} pages still share a frame")
    check(load.intact(), f"{what}: contents")


def answers():
    """others are answered while a cgroup is unmerged, which is answered when all of it is done"""
    for route in ROUTES:
        with merged("slices", route) as (host, group, load, daemon):
            unmerge = Unmerge(host, group)
            unmerge.wait_for_middle(host, load)
            while unmerge.is_alive():
                host.call("GetStats")
                unmerge.answers += unmerge.reply is None
            unmerge.join()
            print(f"    {route}: {unmerge.answers} answers meanwhile; {unmerge.reply}")
            check(unmerge.reply["pages"] >= load.mergeable * 0.98, f"{unmerge.reply}")
            check(host.stats()["pages_sharing"] == 0, "counted as shared")
            apart(load, route)
            check(host.stop(daemon) == 0, "end")


def stopped():
    """a daemon that is told to end in the middle ends when all is undone, and says so to who asked"""
    for route in ROUTES:
        with merged("slicestop", route) as (host, group, load, daemon):
            unmerge = Unmerge(host, group)
            unmerge.wait_for_middle(host, load)
            daemon.send_signal(signal.SIGTERM)
            check(daemon.wait(60) == 0, "end")
            unmerge.join(5)
            apart(load, route)
            check(isinstance(unmerge.reply, dict), f"{unmerge.reply!r}")
            check(unmerge.reply["pages"] >= load.mergeable * 0.98, f"{unmerge.reply}")


def killed():
    """a daemon that is killed in the middle: the next one, by whose configuration it is over, does the rest"""
    for route in ROUTES:
        with merged("slicekill", route) as (host, group, load, daemon):
            Unmerge(host, group).wait_for_middle(host, load)
            host.stop(daemon, signal.SIGKILL)
            check(left(load) > 0, "the kill undid it, so this proves nothing")
            check(load.intact(), "contents after the kill")
            daemon = host.daemon(host.configure(conf(route)))
            wait_for("all undone", lambda: left(load) == 0, 60)
            apart(load, route)
            check(host.stop(daemon) == 0, "end")


# Memory that the other has too; SIGUSR1: forks two children that stay. SIGUSR2: runs another program.
LIVELY = """
import os, signal, sys
data = b''.join(i.to_bytes(8, 'big') * 512 for i in range(1, int(sys.argv[1]) * 256 + 1))
def fork(*_):
    for _ in range(2):
        if os.fork() == 0:
            while True:
                signal.pause()
signal.signal(signal.SIGUSR1, fork)
signal.signal(signal.SIGUSR2, lambda *_: os.execv('/bin/sleep', ['sleep', '1000']))
print('ready', flush=True)
while True:
    signal.pause()
"""


class Lively:
    """The workload that these are."""

    def __init__(self, host, group, mib):
        self.processes = [host.spawn(group, sys.executable, "-c", LIVELY, str(mib), ready="ready") for _ in range(3)]
        self.procs = host.root / group / "cgroup.procs"

    @property
    def pids(self):
        return [int(pid) for pid in self.procs.read_text().split()]


def lively():
    """in the middle one forks, one ends, one runs another program: the children are undone too, and it is answered"""
    for route in ROUTES:
        with Host("slicelive") as host:
            group = host.cgroup("a")
            load = Lively(host, group, MIB[route])
            daemon = host.daemon(host.configure(conf(route, group)))
            wait_for("merged", lambda: host.ctl("scan") is None or
                     host.stats()["pages_sharing"] >= MIB[route] * 256 * 2 * 0.95, 90)
            unmerge = Unmerge(host, group)
            unmerge.wait_for_middle(host, load)
            # The first is being undone; the second, who comes last, is still as it was.
            for process, signo in zip(load.processes, (signal.SIGKILL, signal.SIGUSR1, signal.SIGUSR2)):
                process.send_signal(signo)
            wait_for("the children", lambda: len(load.pids) == 4)
            check(left(load) > 0, "all was undone already, so this proves nothing")
            unmerge.join(60)
            print(f"    {route}: {unmerge.answers} answers meanwhile; {unmerge.reply}")
            check(isinstance(unmerge.reply, dict), f"{unmerge.reply}")
            check(left(load) == 0, f"{left(load)} pages are left in {load.pids}")
            check(host.stop(daemon) == 0, "end")


if __name__ == "__main__":
    run_tests(answers, stopped, killed, lively)
