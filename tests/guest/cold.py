#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""What reclaim takes when memory runs short, of two processes of equal size: one is used now and then, one is not. It
takes the latter's, also when the daemon has both opted in, or its scanner reads both again and again and puts back what
was cold (scan/cold.h); when that is not put back, the one in use pays."""
import pathlib
import subprocess
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "system"))
from harness import BUILD, Host, check, run_tests, wait_for

MIB = 1 << 20
SIZE = 32 * MIB         # of each process
TAKEN = 24 * MIB        # what is then too much, in steps
STEPS = 6
STEP_SECONDS = 0.8
MOSTLY = 70             # percent
ROUNDS = 3              # reclaim is no clockwork
READER = BUILD / "tests/guest/cold-reader"
# Memory with nothing alike in it; "hot" goes through it twice a second, "cold" leaves it alone.
PROCESS = f"""
import mmap, os, sys, time
memory = mmap.mmap(-1, {SIZE}, flags=mmap.MAP_PRIVATE)
memory.madvise(15)  # MADV_NOHUGEPAGE
memory[:] = os.urandom({SIZE})
print("ready", flush=True)
while True:
    if sys.argv[1] == "hot":
        memory[::4096]
    time.sleep(0.5)
"""


class Pair:
    """A cold and a hot process in a cgroup. The cold one looks as it does some rounds of reclaim after its last use."""

    def __init__(self, host, name):
        self.host, self.path, self.pids = host, host.root / host.cgroup(name), {}
        for kind in ["cold", "hot"]:
            process = host.spawn(self.path.name, sys.executable, "-c", PROCESS, kind, ready="ready")
            self.pids[kind] = process.pid
        pathlib.Path(f"/proc/{self.pids['cold']}/clear_refs").write_text("1")

    def reader(self, how):
        """Returns a function that reads both once, as the daemon does."""
        process = subprocess.Popen([READER, how, *map(str, self.pids.values())], stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE, text=True)
        self.host.processes.append(process)

        def read():
            process.stdin.write("\n")
            process.stdin.flush()
            check(process.stdout.readline(), "the reader ended")
        return read

    def daemon(self):
        """A daemon that has both opted in and has read them; it goes on reading when it likes."""
        pages = 2 * SIZE // 4096
        config = self.host.configure(f"ScanInterval=1s\nMinimumAge=0\n[Cgroup {self.path.name}]\nMerge=yes\n")
        self.host.daemon(config)
        wait_for("everything read", lambda: self.host.stats()["pages_hashed"] >= pages)
        return lambda: None

    def swapped_out(self, kind):
        """KiB that are out, and that were and came back: one page a fault, since nothing is read ahead."""
        status = open(f"/proc/{self.pids[kind]}/status").read()
        faults = open(f"/proc/{self.pids[kind]}/stat").read().rsplit(")", 1)[1].split()[9]
        return int(status.split("VmSwap:")[1].split()[0]) + 4 * int(faults)

    def pressure(self, read):
        """Takes memory away; returns what percentage of what was swapped out for it was the cold process's."""
        limit = int((self.path / "memory.current").read_text())
        before = {kind: self.swapped_out(kind) for kind in self.pids}
        for _ in range(STEPS):
            read()
            limit -= TAKEN // STEPS
            (self.path / "memory.max").write_text(str(limit))
            time.sleep(STEP_SECONDS)
        out = {kind: self.swapped_out(kind) - before[kind] for kind in self.pids}
        check(sum(out.values()) >= TAKEN // 2 // 1024, f"only {out} KiB were swapped out")
        return 100 * out["cold"] // sum(out.values())

    def end(self):
        for daemon in self.host.daemons:
            if daemon.poll() is None:
                self.host.stop(daemon)
        (self.path / "cgroup.kill").write_text("1")


def cold_share(host, name, reading=lambda pair: lambda: None):
    pair = Pair(host, name)
    percent = pair.pressure(reading(pair))
    pair.end()
    return percent


def reclaim_takes_the_cold():
    """not read; with the daemon; read and put back; and the control, read and left so"""
    # The classic lists, whose order reading changes most; one page a fault.
    pathlib.Path("/sys/kernel/mm/lru_gen/enabled").write_text("n")
    pathlib.Path("/proc/sys/vm/page-cluster").write_text("0")
    subprocess.run(["mkswap", "/dev/vdd"], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["swapon", "/dev/vdd"], check=True)
    with Host("cold") as host:
        for n in range(ROUNDS):
            untouched = cold_share(host, f"untouched-{n}")
            daemon = cold_share(host, f"daemon-{n}", Pair.daemon)
            restored = cold_share(host, f"restored-{n}", lambda pair: pair.reader("restore"))
            left = cold_share(host, f"left-{n}", lambda pair: pair.reader("leave"))
            print(f"    swapped out of the cold process: {untouched} % not read, {daemon} % with the daemon, "
                  f"{restored} % put back, {left} % left as read", flush=True)
            if min(untouched, daemon, restored) >= MOSTLY > left:
                return
    raise AssertionError("reading shows, or the control shows no harm")


run_tests(reclaim_takes_the_cold)
