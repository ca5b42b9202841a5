#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Victims that check themselves (victims.c) while the whole daemon manages them at full speed: none may notice,
nothing may be left in them. That each of them was acted on is seen from outside: its frames, its mappings' flags.

    managed.py [--seconds-scale X] PHASE...     PHASE: quiet busy storms threads threads64 kills control-eintr

The first five are some kinds each. kills: the daemon is killed and restarted ten times, half of them in the middle
of a stop. control-eintr: one safeguard is left out, and the victim must fail of it."""
import os
import random
import re
import signal
import struct
import subprocess
import sys
import time

from controls import STEPS, TEST_DAEMON
from harness import BUILD, NOTICED, PAGE, Frames, Host, check, check_harmless, wait_for

VICTIMS = BUILD / "tests/system/victims"
GUARD_EINTR = 1
PASSES_MIN = 20         # a daemon that hardly gets a CPU proves nothing, and is not to blame
UNDO_SECONDS = 6        # before the victims' end everything is unmerged
AREA = re.compile(r"^memory 0x([0-9a-f]+) (\d+)$", re.M)
CHILD = re.compile(r"^child (\d+)$", re.M)
# These never sleep, so a thread of theirs can be stopped only where there are CPUs enough.
BUSY = {"registers", "sigtrap", "rseq", "threads64"}
# Their seccomp would kill them if the daemon died in a stop: never called.
REFUSED = {"filter", "strict"}


class Victim:
    """One `victims KIND`: in its cgroup, its output in a file."""

    def __init__(self, host, group, kind, seconds, tolerant):
        self.kind, self.path = kind, host.dir / f"{kind}.out"
        environment = {**os.environ, **({"VICTIM_TOLERATES_EINTR": "1"} if tolerant else {})}
        with open(self.path, "w") as out:
            self.process = host.spawn(group, VICTIMS, kind, seconds, environment=environment, output=out)
        wait_for(f"victim {kind}", lambda: self.process.poll() is not None or "ready " in self.text(), 10)
        area = AREA.search(self.text())
        self.area, self.bytes = (int(area[1], 16), int(area[2])) if area else (0, 0)
        child = CHILD.search(self.text())
        self.pid = int(child[1]) if child and kind == "namespaces" else self.process.pid
        self.most_merged = self.most_zero = self.taken_apart = self.flags_changed = 0
        self.marks, self.merged = None, set()

    def text(self):
        return self.path.read_text(errors="replace")

    def look(self, frames, with_marks):
        """Pages of its memory that are merged now, and whether its marks changed: each change took at least a stop. The
        marks are in smaps, whose reader holds the lock of the process's mappings that our calls in it must wait for: so
        they are looked at seldom."""
        try:
            with open(f"/proc/{self.pid}/pagemap", "rb", buffering=0) as pagemap:
                data = os.pread(pagemap.fileno(), self.bytes // PAGE * 8, self.area // PAGE * 8)
            marks = mergeable(self.pid) if with_marks else self.marks
        except OSError:  # it has ended
            return
        merged, zero = set(), 0
        for page, (entry,) in enumerate(struct.iter_unpack("Q", data)):
            if entry >> 63:
                flags = frames.flags(entry & (1 << 55) - 1)
                zero += bool(flags & frames.ZERO_FLAG)
                if flags & frames.KSM_FLAG:
                    merged.add(page)
        self.taken_apart += len(self.merged - merged)
        self.flags_changed += self.marks is not None and marks != self.marks
        self.most_merged, self.most_zero = max(self.most_merged, len(merged)), max(self.most_zero, zero)
        self.merged, self.marks = merged, marks

    def acted_on(self):
        return (f"{self.most_merged:4} pages merged at best, {self.most_zero:4} zero, {self.taken_apart:5} seen apart, "
                f"marks seen changed {self.flags_changed:3} times")


def mergeable(pid):
    """The mappings that are marked for merging."""
    marked, address = [], None
    for line in open(f"/proc/{pid}/smaps"):
        if "-" in line.split(" ", 1)[0]:
            address = line.split(" ", 1)[0]
        elif line.startswith("VmFlags:") and " mg" in line:
            marked.append(address)
    return tuple(marked)


def foreign_mappings(pid):
    return [line for line in open(f"/proc/{pid}/maps") if line.startswith("6b736")]


def cpu_times():
    fields = [int(x) for x in open("/proc/stat").readline().split()[1:]]
    return sum(fields), fields[3]


def waited_for_cpu(pid):
    """Seconds that the main thread of a process was runnable and did not run."""
    return int(open(f"/proc/{pid}/schedstat").read().split()[1]) / 1e9


def members(host, group):
    """Every process of the cgroup and those below it."""
    return [int(pid) for path in (host.root / group).rglob("cgroup.procs") for pid in path.read_text().split()]


def what_is_left(host, group):
    left = []
    for pid in members(host, group):
        try:
            left += [f"{pid}: mergeable {address}" for address in mergeable(pid)]
            left += [f"{pid}: foreign {line}" for line in foreign_mappings(pid)]
        except OSError:  # ended meanwhile
            pass
    return left


def unmerge(host, group):
    """ksmctl unmerge, until all are reached: some stand still now, and what a dead daemon left goes with the visit."""
    for path in [group] + [t["cgroup"] for t in host.call("ListTargets")["targets"] if t["cgroup"] != group]:
        host.ctl("unmerge", path, expect=None)
    end = time.monotonic() + UNDO_SECONDS - 1
    while left := what_is_left(host, group):
        check(time.monotonic() < end, "left behind after unmerge:\n" + "\n".join(left))
        time.sleep(0.05)


def kill_and_restart(host, config, daemon, number):
    """Ends the daemon at this moment, if it did not end itself in the middle of a stop, as every other one will."""
    environment = {"KSMD_USER_TEST_END_AT": f"{random.randrange(len(STEPS))}:{random.randrange(6)}"} if number % 2 else {}
    host.stop(daemon, signal.SIGKILL)
    return host.daemon(config, environment=environment, program=TEST_DAEMON, wait=number == 0)


def run(host, phase, kinds, seconds, *, kills=0, leave_out=0, tolerant=False):
    """Returns the victims that failed. How long stops took is printed, and no verdict: benchmarks measure it."""
    group = host.cgroup(phase)
    victims = [Victim(host, group, kind, seconds, tolerant) for kind in kinds]
    began, (total, idle) = time.monotonic(), cpu_times()
    config = host.configure("ScanInterval=100ms\nMinimumAge=0s\nCPUQuota=100%\nCPUQuotaBusy=100%\nBreakQuota=1000%\n"
                            f"[Cgroup {group}]\nMerge=yes\nDomain=victims\n"
                            f"[Cgroup {group}/**]\nMerge=yes\nDomain=victims\n")
    options = {"environment": {"KSMD_USER_TEST_LEAVE_OUT": str(leave_out)}, "program": TEST_DAEMON} if leave_out else {}
    daemon = host.daemon(config, **options)
    frames, looked, runnable, killed, in_stop = Frames(), 0, [], 0, 0
    # After the last kill a daemon lives long enough to come round to all of them.
    kill_every = (seconds - UNDO_SECONDS - 4) / (kills + 1) if kills else None
    while time.monotonic() < began + seconds - UNDO_SECONDS:
        frames.cache = {}
        for victim in victims:
            victim.look(frames, looked % 4 == 0)
        looked += 1
        runnable.append(int(open("/proc/loadavg").read().split()[3].split("/")[0]))
        if killed < kills and time.monotonic() > began + (killed + 0.3 + 0.7 * random.random()) * kill_every:
            killed += 1
            in_stop += daemon.poll() is not None
            daemon = kill_and_restart(host, config, daemon, killed if killed < kills else 0)
        if leave_out and any(v.process.poll() for v in victims):
            break
        time.sleep(0.5)
    after_total, after_idle = cpu_times()
    idle = (after_idle - idle) / (after_total - total)
    waited, lasted = waited_for_cpu(daemon.pid), time.monotonic() - began
    stats = host.stats()
    states = {t["pid"]: f"{t['state']} {t['reason'] or ''}" for t in host.call("ListTargets")["targets"]}
    if not leave_out:
        unmerge(host, group)
    for victim in victims:
        try:
            victim.process.wait(30)
        except subprocess.TimeoutExpired:
            check(False, f"{victim.kind} does not end:\n{victim.text()}")
    check(host.stop(daemon) == 0, "the daemon ended badly")

    print(f"{phase}: {seconds} s, {stats['stops']} stops, p50 {stats['stop_nsec_p50'] / 1e6:.2f} p99 "
          f"{stats['stop_nsec_p99'] / 1e6:.2f} max {stats['stop_nsec_max'] / 1e6:.2f} ms, CPUs {idle:.0%} idle, "
          f"{stats['full_scans']} passes, {stats['pages_sharing']} pages saved in the end; failures "
          f"{ {k: v for k, v in stats['merge_failures'].items() if v} }"
          + (f"; {killed} kills, {in_stop} of them in a stop" if kills else ""), flush=True)
    # The rule of the remote calls (docs/remote-calls.md): one that would wait for a CPU at each resume is left alone.
    busy_looks = sum(n > 4 * os.cpu_count() for n in runnable)
    contended = f"over 4 runnable threads a CPU at {busy_looks} of {looked} looks" if busy_looks * 4 > looked else ""
    if waited > lasted / 4:
        contended += f"; the daemon waited for a CPU for {waited:.1f} of {lasted:.1f} s"
    failed = [v for v in victims if v.process.returncode not in (0, 77)]
    for victim in victims:
        print(f"  {victim.kind:11} {victim.acted_on()}; {states.get(victim.pid, 'ended')}", flush=True)
    for victim in failed:
        print(f"FAILED: {victim.kind} ended with {victim.process.returncode}:\n{victim.text()[-2000:]}", flush=True)
    for victim in victims:
        if victim.process.returncode == 77:
            print(f"SKIP: {victim.kind}: {' '.join(victim.text().split())[-200:]}", flush=True)
        if leave_out or victim.process.returncode == 77:
            continue
        if victim.kind in REFUSED:
            check(victim.most_merged == 0 and victim.flags_changed == 0, f"{victim.kind} was called")
            continue
        if victim.most_merged > 20 and victim.flags_changed > (0 if contended else 1):
            continue
        if contended and (victim.kind in BUSY or stats["full_scans"] < PASSES_MIN):
            print(f"{victim.kind}: too few stops to say much, {stats['full_scans']} passes; {contended}", flush=True)
            continue
        check(False, f"{victim.kind}: hardly anything was ever merged in it, or it was hardly ever acted on")
    ends = {v.kind: v.process.returncode for v in failed}
    # One that was ended by a signal was not ready for what came over it either.
    check_harmless(leave_out or not any(end == NOTICED or end < 0 for end in ends.values()), f"victims failed: {ends}")
    check(leave_out or contended or stats["stops"] > 20, "hardly any stop was made")
    check(in_stop >= kills // 4, f"only {in_stop} of {kills} daemons ended in a stop")
    return failed


# Those that sleep most of the time leave a CPU to be had: their stops are short. Two to five busy threads at once are
# as many as can be stopped at all on two CPUs.
QUIET = ["eintr", "mdwe", "namespaces", "filter", "strict", "traced", "bare"]
SPINNING = ["registers", "sigtrap", "frozen"]
STORMS = ["churn", "forkexec", "exit", "vfork", "stopcont"]
THREADS = ["rseq", "signals"]


def phase_quiet(host, scale):
    check(not run(host, "quiet", QUIET, 18 * scale), "a victim failed")


def phase_busy(host, scale):
    check(not run(host, "busy", SPINNING, 14 * scale), "a victim failed")


def phase_storms(host, scale):
    check(not run(host, "storms", STORMS, 16 * scale), "a victim failed")


def phase_threads(host, scale):
    check(not run(host, "threads", THREADS, 13 * scale), "a victim failed")


def phase_threads64(host, scale):
    check(not run(host, "threads64", ["threads64", "eintr"], 12 * scale), "a victim failed")


def phase_kills(host, scale):
    check(not run(host, "kills", QUIET + ["registers", "container"], 30 * scale, kills=10, tolerant=True), "a victim failed")


def phase_control_eintr(host, scale):
    failed = run(host, "control", ["eintr"], 12 * scale, leave_out=GUARD_EINTR)
    check(failed and "Interrupted system call" in failed[0].text(), "without the repair of EINTR it saw nothing")


def main(arguments):
    scale = 1.0
    if arguments[:1] == ["--seconds-scale"]:
        scale, arguments = float(arguments[1]), arguments[2:]
    for phase in arguments:
        with Host("managed") as host:
            try:
                globals()["phase_" + phase.replace("-", "_")](host, scale)
            finally:  # the cgroups that victims made, should they have left any
                for group in list(host.groups):
                    host.groups += [str(p.relative_to(host.root)) for p in (host.root / group).iterdir() if p.is_dir()]


main(sys.argv[1:] or ["quiet", "busy", "storms", "threads", "threads64", "kills"])
