#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Route remap by the whole daemon: what it merges is counted in frames and compared with what it says; everything becomes
plain memory again; domains share nothing; a daemon that is killed is followed by one that goes on."""
import collections
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

from controls import Noticed, end_at_every_step, test_daemon, until_noticed
from harness import (BUILD, KSM, KSMCTL, NO_KSM, Frames, Host, Obedient, PAGE, check, in_namespace, knobs, mappings,
                     run_tests, skip, wait_for)

DAEMON = "MinimumAge=0s\nScanInterval=300ms\n"


def ksm_counters():
    return {name: (KSM / name).read_text() for name in ("pages_shared", "pages_sharing", "full_scans", "run")}


def section(group, **keys):
    return f"[Cgroup {group}]\nMerge=yes\nRoute=remap\n" + "".join(f"{k}={v}\n" for k, v in keys.items())


def pool_lines(pid):
    return [line for line in open(f"/proc/{pid}/maps") if "/pool (deleted)" in line or line.rstrip().endswith("/pool")]


def entries(load, which=None):
    """{(pid, page): pagemap entry} of the known memory."""
    out = {}
    for pid, address in zip(load.pids, load.addresses):
        with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pagemap:
            data = os.pread(pagemap.fileno(), load.pages * 8, address // PAGE * 8)
        for page, (entry,) in enumerate(struct.iter_unpack("Q", data)):
            out[pid, page] = entry
    return out


def pooled(load):
    """(pages that map a file's frame, the distinct frames of those)."""
    found = [e & (1 << 55) - 1 for e in entries(load).values() if e >> 63 and e >> 61 & 1]
    return len(found), set(found)


def pfns(load):
    return {e & (1 << 55) - 1 for e in entries(load).values() if e >> 63}


def rss(pid, kind):
    for line in open(f"/proc/{pid}/status"):
        if line.startswith(kind + ":"):
            return int(line.split()[1]) * 1024
    raise AssertionError(kind)


def converge(host, *loads, share=0.99, passes=40, seconds=2):
    for _ in range(passes):
        host.passes(seconds=seconds)
        if all(pooled(load)[0] >= load.mergeable * share for load in loads):
            return
    raise AssertionError(f"merged {[pooled(load)[0] for load in loads]} of {[load.mergeable for load in loads]}: {host.stats()}")


def max_count(frames):
    with open("/proc/kpagecount", "rb", buffering=0) as counts:
        return max(struct.unpack("Q", os.pread(counts.fileno(), 8, pfn * 8))[0] for pfn in frames)


def without_ksm(host, config):
    """A daemon that sees nothing of KSM, as on a kernel without it."""
    return host.daemon(config, command=in_namespace(NO_KSM))


def merged():
    """merges by its own pool, frees frames, needs no KSM, keeps MaxPageSharing, and puts all back"""
    with Host("remap") as host:
        group = host.cgroup("a")
        load = host.workload(group, processes=4, mib=8, duplicate=50, zero=10, run=16)
        before = {pid: mappings(pid) for pid in load.pids}
        anon = sum(rss(pid, "RssAnon") for pid in load.pids)
        text = "OnStop=unmerge\nMaxPageSharing=2\n" + DAEMON
        ksm = ksm_counters()
        daemon = without_ksm(host, host.configure(text + section(group)))
        converge(host, load, share=1)
        pages, frames = pooled(load)
        got = host.stats_of(group)
        # Looked at before the contents are: on a kernel without a zero page (tests/test.h) reading takes pages.
        now = sum(rss(pid, "RssAnon") for pid in load.pids)
        print(f"    {pages} pages on {len(frames)} frames, of {load.mergeable}; RssAnon {anon >> 10} -> {now >> 10} KiB; {got}")
        check(load.intact(), "contents")
        check(got["route"] == "remap", "route")
        check(got["pages_shared"] == len(frames) and got["pages_sharing"] == pages - len(frames), f"{got}")
        # Two may share a page: each content is kept twice for four processes, and saved twice.
        check(got["pages_sharing"] == load.mergeable - 2 * load.duplicate, f"{got['pages_sharing']} saved")
        # The daemon maps what it compares, for a moment; what a process maps stays.
        wait_for(lambda: f"a frame is mapped {max_count(frames)} times", lambda: max_count(frames) <= 2, 5)
        check(anon - now >= (pages + load.zero * 4 * 0.99) * PAGE, "RssAnon")
        check(load.marked() == 0 and load.merged() == 0, "marked or merged by KSM")
        daemon_stats = host.stats()
        print(f"    {daemon_stats['stops']} stops, p50 {daemon_stats['stop_nsec_p50'] / 1e6:.2f} p99 "
              f"{daemon_stats['stop_nsec_p99'] / 1e6:.2f} ms; {[mappings(pid) for pid in load.pids]} mappings, {before}")
        check("remap" in host.ctl("why", load.pids[0]), "why")
        check(host.stop(daemon) == 0, "end")
        check(ksm_counters() == ksm and knobs() == host.knobs, "KSM was used")
        check(load.intact(), "contents afterwards")
        for pid in load.pids:
            check(not pool_lines(pid), f"left: {pool_lines(pid)}")
            check(mappings(pid) <= before[pid] * 1.1, f"{mappings(pid)} mappings, {before[pid]} before")


class Victim(Obedient):
    """remapped-victim.c: checks its own memory all the while."""

    def __init__(self, host, group, *arguments, mib=4):
        self.process = host.spawn(group, BUILD / "tests/system/remapped-victim", "--mib", mib, *arguments,
                                  stdin=subprocess.PIPE, output=subprocess.PIPE)
        self.read_ready()

    def read_ready(self):
        words = self.process.stdout.readline().split()
        self.able = words != ["unable"]
        check(words and (words[0] == "ready" or not self.able), f"the victim said {words}")
        if not self.able:
            return
        self.pid, self.pids, self.addresses, self.pages = self.process.pid, [self.process.pid], [int(words[1], 16)], int(words[2])
        self.mergeable = self.pages // 2

    def frames(self, still=True):
        """PFNs of pages that map a file's frame: all of them, or of those that nobody touches."""
        return {e & (1 << 55) - 1 for (_, page), e in entries(self).items()
                if e >> 63 and e >> 61 & 1 and (not still or page < self.pages // 2)}


# Known pages, but for one that is another at first, if it is late; says so, then does as it is told.
GROWING = """
import ctypes, mmap, random, sys
pages, late = int(sys.argv[1]), int(sys.argv[2])
content = random.Random(7).randbytes(pages * mmap.PAGESIZE)
memory = mmap.mmap(-1, len(content), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_NOHUGEPAGE)
part = slice(late * mmap.PAGESIZE, (late + 1) * mmap.PAGESIZE)
memory[:] = content
if late:
    memory[part] = random.Random(8).randbytes(mmap.PAGESIZE)
print("ready", hex(ctypes.addressof(ctypes.c_char.from_buffer(memory))), pages, flush=True)
for line in sys.stdin:
    if line == "now\\n":
        memory[part] = content[part]
    expected = late == 0 or memory[part] == content[part]
    rest = memory[:part.start] + memory[part.stop:] == content[:part.start] + content[part.stop:]
    print("ok" if expected and rest else "bad", flush=True)
"""


class Growing(Victim):
    def __init__(self, host, group, pages, late=0):
        self.process = host.spawn(group, sys.executable, "-c", GROWING, pages, late, stdin=subprocess.PIPE,
                                  output=subprocess.PIPE)
        self.read_ready()

    def lines(self):
        """Its mappings of the pool in the known memory."""
        start, end = self.addresses[0], self.addresses[0] + self.pages * PAGE
        return [line for line in pool_lines(self.pid) if start <= int(line.split("-")[0], 16) < end]


def descriptors(pid):
    return len(os.listdir(f"/proc/{pid}/fd"))


def keeper_sockets(host):
    return {f"socket:[{line.split()[6]}]" for line in open("/proc/net/unix")
            if line.rstrip().endswith(str(host.dir / "run/keeper"))}


def keepers(host):
    """The processes of this test's keeper."""
    sockets, found = keeper_sockets(host), []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if open(f"/proc/{pid}/comm").read().startswith("ksmd-keeper") and any(
                    os.readlink(f"/proc/{pid}/fd/{fd}") in sockets for fd in os.listdir(f"/proc/{pid}/fd")):
                found.append(int(pid))
        except OSError:
            pass
    return found


def all_plain(pids):
    for pid in pids:
        check(not pool_lines(pid), f"{pid} is still remapped: {pool_lines(pid)[:3]}")


def wait_for_plain(pids, seconds=20, meanwhile=lambda: None):
    wait_for("everything plain", lambda: meanwhile() or not any(map(pool_lines, pids)), seconds)


def unmerge(host, group):
    """Whom it cannot call now, on a busy machine, it goes on trying."""
    return host.ctl("unmerge", group, expect=None).strip()


def started(*victims):
    """{pid: (mappings, descriptors)} before a daemon knows of them."""
    return {v.pid: (mappings(v.pid), descriptors(v.pid)) for v in victims}


def unharmed(before, *victims):
    """What they hold is right, and nothing is left in them."""
    for v in victims:
        v.order("check")
        maps, fds = before[v.pid]
        check(descriptors(v.pid) == fds, f"{descriptors(v.pid)} descriptors, {fds} before")
        print(f"    {mappings(v.pid)} mappings, {maps} before")
        check(not any(line.startswith("6b736d") for line in open(f"/proc/{v.pid}/maps")), "something was left")


def ended(host, daemon, *victims):
    """The daemon, the victims, and with them the keeper, which holds nothing any more."""
    check(host.stop(daemon) == 0, "end")
    for v in victims:
        v.process.stdin.close()
        v.process.wait()
    wait_for("the keeper's end", lambda: not keepers(host), 20)


def put_back_and_ended(host, group, daemon, before, *victims):
    """All of it is plain again, then nothing of us is left."""
    unmerge(host, group)
    wait_for_plain([v.pid for v in victims])
    unharmed(before, *victims)
    ended(host, daemon, *victims)


def urgency_is_to_be_had():
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    except OSError:
        return False
    return True


def grown():
    """a page that becomes its twin's equal later goes on in the mapping beside it, though it is a run of one"""
    with Host("remapgrown") as host:
        group = host.cgroup("a")
        first = [Growing(host, group, 64) for _ in range(2)]
        late = Growing(host, None, 64, late=40)
        victims = [*first, late]
        before = started(*victims)
        daemon = host.daemon(host.configure(DAEMON + section(group, MinimumRun=16)))
        wait_for("the twins", lambda: host.passes() or all(pooled(v)[0] == 64 for v in first), 60)
        (host.root / group / "cgroup.procs").write_text(str(late.pid))
        wait_for("all but one", lambda: host.passes() or pooled(late)[0] == 63, 60)
        check(len(late.lines()) == 2, f"{late.lines()}")
        late.order("now")
        wait_for("the one", lambda: host.passes() or pooled(late)[0] == 64, 60)
        check(len(late.lines()) == 1, f"{late.lines()}")
        check(late.frames(False) == first[0].frames(False) == first[1].frames(False), "other frames")
        put_back_and_ended(host, group, daemon, before, *victims)


def relimited():
    """a reload changes MaxPageSharing= for a pool that is in use"""
    with Host("remaprelimited") as host:
        group = host.cgroup("a")
        victims = [Growing(host, group, 64) for _ in range(2)]
        host.configure("MaxPageSharing=2\n" + DAEMON + section(group))
        daemon = host.daemon(host.dir / "test.conf")
        wait_for("the first", lambda: host.passes() or all(pooled(v)[0] == 64 for v in victims), 60)
        host.configure("MaxPageSharing=4\n" + DAEMON + section(group))
        host.ctl("reload")
        victims += [Growing(host, group, 64) for _ in range(2)]
        wait_for("the others", lambda: host.passes() or all(pooled(v)[0] == 64 for v in victims), 60)
        check(all(v.frames(False) == victims[0].frames(False) for v in victims), "other frames")
        check(max_count(victims[0].frames(False)) == 4, "a frame is not mapped four times")
        ended(host, daemon, *victims)


def fork_is_over():
    """what a child shared when it was read is merged once the child has ended, though nobody writes it"""
    with Host("remapforkover") as host:
        group = host.cgroup("a")
        parent, other = victims = [Victim(host, group, "--quiet", mib=2) for _ in range(2)]
        before = started(*victims)
        parent.order("fork")
        daemon = host.daemon(host.configure(DAEMON + section(group)))
        wait_for("the other", lambda: host.passes() or pooled(other)[0] >= other.pages * 0.99, 60)
        host.passes(3)
        check(pooled(parent)[0] == 0, f"{pooled(parent)[0]} pages that a child shares were merged")
        parent.order("end")
        wait_for("its parent", lambda: host.passes() or pooled(parent)[0] >= parent.pages * 0.99, 60)
        check(parent.frames(False) <= other.frames(False), "other frames")
        put_back_and_ended(host, group, daemon, before, *victims)


def lived():
    """processes that write, discard and fork while they are merged, and a child: what is seen of them is right"""
    with Host("remaplive") as host:
        group = host.cgroup("a")
        victims = [Victim(host, group) for _ in range(3)]
        before = started(*victims)
        daemon = host.daemon(host.configure(DAEMON + section(group)))
        converge(host, *victims)
        # Threads stand while it is waited for.
        check(not urgency_is_to_be_had() or {os.sched_getscheduler(pid) for pid in keepers(host)} == {os.SCHED_FIFO},
              f"the keeper is not first: { {pid: os.sched_getscheduler(pid) for pid in keepers(host)} }")
        for v in victims:
            v.order("check")
        # Each content once: they all map the same frames.
        frames = set.union(*(v.frames() for v in victims))
        check(len(frames) <= victims[0].pages // 2 * 1.01, f"{len(frames)} frames for {victims[0].pages // 2} contents")
        victims[0].order("discard")
        victims[0].order("fork")
        child = int(open(f"/proc/{victims[0].pid}/task/{victims[0].pid}/children").read().split()[0])
        wait_for("the child's turn", lambda: host.passes() or
                 any(t["pid"] == child and t["pages_merged"] > 0 for t in host.call("ListTargets")["targets"]))
        check(pool_lines(child), "the child does not map the pool")
        # What they share by fork is no saving.
        sharing, mapped = host.stats_of(group)["pages_sharing"], sum(len(v.frames(False)) for v in victims)
        print(f"    {mapped} pages, {sharing} of them saved")
        check(sharing <= mapped - len(set.union(*(v.frames(False) for v in victims))) + 200, f"{sharing} of {mapped}")
        victims[1].order("write")
        for v in victims:
            v.order("check")
        # One process that is told to go, a child, and everything else.
        before_pages = host.stats_of(group)["pages_sharing"]
        print(f"    {before_pages} pages saved; {host.ctl('unmerge', group).strip()}")
        wait_for_plain([child] + [v.pid for v in victims])
        for v in victims:
            v.order("check")
        victims[0].order("end")
        unharmed(before, *victims)
        ended(host, daemon, *victims)


def skipped():
    """what route remap leaves alone, each with its reason"""
    with Host("remapskip") as host:
        group = host.cgroup("a")
        plain = [Victim(host, group, "--quiet") for _ in range(2)]
        kinds = {"lock": "locks", "peer": "shares", "pin": "pinned", "bind": None, "uffd": None, "name": None}
        others = {kind: Victim(host, group, "--quiet", "--as", kind) for kind in kinds}
        daemon = host.daemon(host.configure("OnStop=unmerge\n" + DAEMON + section(group)))
        converge(host, *plain, seconds=2)
        for kind, victim in others.items():
            if not victim.able:
                print(f"    {kind}: not on this kernel")
                continue
            check(not pool_lines(victim.pid), f"{kind}: was remapped")
            victim.order("check")
            why = host.call("Explain", pid=victim.pid)
            print(f"    {kind}: {why['reason']}; {why['pages_skipped']}, {why['merge_failures']}")
            if kinds[kind]:
                check(kinds[kind] in (why["reason"] or ""), f"{kind}: {why['reason']}")
            else:
                check(why["pages_skipped"] or why["merge_failures"]["mapping"] >= victim.pages * 0.9, f"{kind}: {why}")
        check(host.stop(daemon) == 0, "end")
        all_plain(v.pid for v in plain)
        for v in plain:
            v.order("check")


# Who shares a pool has to say that it may: two domains share none, whatever they say.
TRUST = {"TrustedTogether": "yes"}
TWO_DOMAINS = "OnStop=unmerge\nMinimumAge=0s\nScanInterval=1h\n"


def common(one, two):
    """The frames that both have. The zero page is nobody's."""
    frames = Frames()
    return [pfn for pfn in pfns(one) & pfns(two) if not frames.flags(pfn) & Frames.ZERO_FLAG]


def domains():
    """two domains with the same contents never have a frame in common"""
    with Host("remapdomains") as host:
        a, b = host.cgroup("a"), host.cgroup("b")
        loads = [host.workload(group, processes=2, mib=8, duplicate=60, zero=5, run=32, seed=7) for group in (a, b)]

        def apart(when):
            check(not common(*loads), f"{when}: {len(common(*loads))} frames in common")

        apart("before")
        daemon = host.daemon(host.configure(TWO_DOMAINS + section(a, **TRUST) + section(b, **TRUST)))
        for _ in range(12):
            host.passes()
            apart("meanwhile")
            if all(pooled(load)[0] >= load.mergeable * 0.99 for load in loads):
                break
        converge(host, *loads)
        apart("merged")
        identities = [{line.split()[3] + line.split()[4] for pid in load.pids for line in pool_lines(pid)} for load in loads]
        check(len(identities[0]) == len(identities[1]) == 1 and identities[0] != identities[1], f"{identities}")
        got = {one["domain"]: one for one in host.call("GetStats")["domains"]}
        check(all(got[g]["pages_sharing"] >= load.duplicate * 0.99 for g, load in ((a, loads[0]), (b, loads[1]))), f"{got}")
        check(all(load.intact() for load in loads), "contents")
        check(host.stop(daemon) == 0, "end")
        apart("afterwards")
        all_plain(pid for load in loads for pid in load.pids)


def restarted(kills=int(os.environ.get("KILLS", "24"))):
    """killed again and again: processes go on, the next daemon goes on and can undo everything, nothing is left"""
    with Host("remapkill") as host:
        group = host.cgroup("a")
        victims = [Victim(host, group) for _ in range(3)]
        before = started(*victims)
        config = host.configure(DAEMON + section(group))
        chance = random.Random(int(os.environ.get("SEED", "1")))
        merged_ever, longest = 0, 0.9
        for i in range(kills):
            daemon = host.daemon(config, wait=False)
            time.sleep(chance.uniform(0.05, longest))
            if i % 5 == 3:
                subprocess.Popen([str(BUILD / "src/ctl/ksmctl"), "--socket", str(host.socket), "unmerge", group],
                                 stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                time.sleep(chance.uniform(0, 0.3))
            if i % 4 == 2 and keepers(host):
                os.kill(chance.choice(keepers(host)), signal.SIGKILL)
                time.sleep(chance.uniform(0, 0.1))
            host.stop(daemon, signal.SIGKILL)
            merged = sum(len(v.frames(False)) for v in victims)
            merged_ever += merged
            # On a busy machine a daemon needs longer to come to anything that could be interrupted.
            longest = max(longest / 1.1, 0.9) if merged else min(longest * 1.2, 8)
            for v in victims:
                v.order(chance.choice(["check", "write", "discard", "check"]))
        daemon = host.daemon(config)
        host.passes(2)
        got = host.stats_of(group)
        print(f"    {merged_ever} pages seen merged after {kills} kills; in the end {got['pages_shared']} + {got['pages_sharing']}")
        check(merged_ever > 0 and got["pages_sharing"] > 0, "nothing was merged")
        print("    " + unmerge(host, group))
        wait_for_plain([v.pid for v in victims])
        host.passes(2)
        unharmed(before, *victims)
        ended(host, daemon, *victims)


def abandoned():
    """merged by a daemon that was killed, opted out while none ran: the next one undoes it; a program that is replaced"""
    with Host("remapleft") as host:
        group = host.cgroup("a")
        victims = [Victim(host, group) for _ in range(3)]
        before = started(*victims)
        daemon = host.daemon(host.configure(DAEMON + section(group)))
        converge(host, *victims)
        victims[0].order("fork")
        child = int(open(f"/proc/{victims[0].pid}/task/{victims[0].pid}/children").read().split()[0])
        check(pool_lines(child), "the child does not map the pool")
        # Another program in the same process: nothing of before is in it, and it is merged as a new one is.
        victims[2].order("again")
        victims[2].read_ready()
        converge(host, victims[1], victims[2])
        host.stop(daemon, signal.SIGKILL)
        daemon = host.daemon(host.configure(DAEMON))
        wait_for_plain([child] + [v.pid for v in victims])
        victims[0].order("end")
        unharmed(before, *victims)
        ended(host, daemon, *victims)


def unreached():
    """opted out while none ran, and the keeper cannot be reached when the next one starts: tried again, and undone then"""
    with Host("remapunreached") as host:
        group = host.cgroup("a")
        victims = [Victim(host, group) for _ in range(2)]
        before = started(*victims)
        daemon = host.daemon(host.configure(DAEMON + section(group)))
        converge(host, *victims)
        host.stop(daemon, signal.SIGKILL)
        held = keepers(host)
        for pid in held:
            os.kill(pid, signal.SIGSTOP)
        try:
            daemon = host.daemon(host.configure(DAEMON))
            check("the keeper cannot be used" in daemon.log(), daemon.log())
        finally:
            for pid in held:
                os.kill(pid, signal.SIGCONT)
        wait_for_plain([v.pid for v in victims])
        unharmed(before, *victims)
        ended(host, daemon, *victims)


def killed():
    """killed in the middle of a stop, at every step: contents stay, nothing is left behind, the next one goes on"""
    with Host("remapsteps") as host:
        group = host.cgroup("a")
        victims = [Victim(host, group) for _ in range(2)]
        before = started(*victims)
        config = host.configure(DAEMON + section(group))

        def look(step):
            for v in victims:
                v.order("write")
        # All threads of a busy victim have to stand at once for some; remap-hammer-kill-steps comes to every step.
        end_at_every_step(host, config, look, 3, {"SIGNAL", "PARK_REGS"}, spare=6)
        daemon = host.daemon(config)
        host.passes(2)
        unmerge(host, group)
        wait_for_plain([v.pid for v in victims])
        host.passes()
        unharmed(before, *victims)
        ended(host, daemon, *victims)


def doctor(config):
    return subprocess.run([str(KSMCTL), "--config", str(config), "doctor"], stdout=subprocess.PIPE, text=True).stdout


def trusted():
    """two cgroups share a pool only while they say that they trust each other"""
    with Host("remaptrust") as host:
        if "[deny]" in open("/sys/kernel/mm/transparent_hugepage/shmem_enabled").read():
            skip("shmem_enabled is deny: everybody may share")
        top = host.cgroup("t")
        a, b = (top + name for name in ("-1", "-2"))
        for group in (a, b):
            (host.root / group).mkdir()
            host.groups.append(group)
        text = DAEMON + f"[Cgroup {top}-*]\nMerge=yes\nRoute=remap\n"
        one = [Victim(host, a, "--quiet") for _ in range(2)]
        path = host.configure(text)
        daemon = host.daemon(path)
        converge(host, *one)
        two = [Victim(host, b, "--quiet") for _ in range(2)]
        host.passes(2)
        check(not any(pool_lines(v.pid) for v in two), "remapped without trust")
        why = host.call("Explain", pid=two[0].pid)
        check("TrustedTogether" in (why["reason"] or ""), f"{why['reason']}")
        warnings = host.call("GetStatus")["warnings"]
        check(any(f"domain {top}-* is not remapped: several" in w for w in warnings), f"{warnings}")
        check("only its zero pages are given back" in doctor(path), doctor(path))
        host.configure(text + "TrustedTogether=yes\n")
        host.ctl("reload")
        converge(host, *one, *two)
        check("merged by route remap" in doctor(path), doctor(path))
        host.configure(text)
        host.ctl("reload")
        wait_for("an end of sharing", lambda: host.passes() or not any(pool_lines(v.pid) for v in one + two), 20)
        for v in one + two:
            v.order("check")
        check(host.stop(daemon) == 0, "end")


def confined():
    """processes of nobody's, in a user namespace, under a container's seccomp filter, by a daemon that sees no KSM"""
    with Host("remapconfined") as host:
        group = host.cgroup("a")
        victims = [Victim(host, group, "--confined") for _ in range(2)]
        uid = [line.split()[1] for line in open(f"/proc/{victims[0].pid}/status") if line.startswith(("Uid:", "Seccomp:"))]
        check(uid == ["65534", "2"], f"not confined: {uid}")
        before = started(*victims)
        daemon = without_ksm(host, host.configure(DAEMON + section(group)))
        converge(host, *victims)
        for order in ("check", "discard", "write", "fork", "check", "end"):
            victims[0].order(order)
        victims[1].order("check")
        put_back_and_ended(host, group, daemon, before, *victims)


def pinned():
    """what was merged, written, and is pinned by io_uring stays where it is until it is not pinned any more"""
    with Host("remappinned") as host:
        group = host.cgroup("a")
        victims = [Victim(host, group, "--quiet") for _ in range(2)]
        before = started(*victims)
        daemon = host.daemon(host.configure(DAEMON + section(group)))
        converge(host, *victims)
        victims[0].order("pin")
        unmerge(host, group)
        wait_for_plain([victims[1].pid])
        wait_for("the rest plain", lambda: len(pool_lines(victims[0].pid)) == 1, 20)
        for _ in range(3):
            victims[0].order("receive")
            time.sleep(0.2)
        check(pool_lines(victims[0].pid), "a pinned page was put back")
        victims[0].order("unpin")
        wait_for_plain([victims[0].pid])
        before[victims[0].pid] = before[victims[0].pid][0], descriptors(victims[0].pid)
        unharmed(before, *victims)
        ended(host, daemon, *victims)


def outside():
    """another process writes to what is put back just then: nothing that it wrote is lost"""
    with Host("remapoutside") as host:
        group = host.cgroup("a")
        victims = [Victim(host, group, "--quiet") for _ in range(2)]
        daemon = host.daemon(host.configure(DAEMON + section(group)))
        for _ in range(4):
            converge(host, *victims)
            victims[0].order("outside")
            unmerge(host, group)
            wait_for_plain([v.pid for v in victims])
            victims[0].order("calm")
            host.ctl("reload")
        ended(host, daemon, *victims)


def contents(load):
    """[{page: content}] of each process, read past everybody: a frame that was read is as it was."""
    out = []
    for pid, address in zip(load.pids, load.addresses):
        with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
            memory.seek(address)
            out.append({page: hash(memory.read(PAGE)) for page in range(load.pages)})
    return out


def saveable_in_runs(processes, zero, minimum):
    """How many frames can go when only runs of at least so many pages may be mapped anew: a count that knows nothing of
    how it is done. What has no second copy among what may be mapped is no candidate; that can make runs too short, whose
    pages were somebody's second copies: until nothing changes."""
    pages = [{page: content for page, content in one.items() if content != zero} for one in processes]
    while True:
        copies = collections.Counter(content for one in pages for content in one.values())
        kept = []
        for one in pages:
            wanted = sorted(page for page, content in one.items() if copies[content] > 1)
            runs = []
            for page in wanted:
                if runs and runs[-1][-1] == page - 1:
                    runs[-1].append(page)
                else:
                    runs.append([page])
            kept.append({page: one[page] for run in runs if len(run) >= minimum for page in run})
        if kept == pages:
            return sum(copies.values()) - len(copies)
        pages = kept


def exact():
    """the frames that it frees are those that a count of the contents says can be freed"""
    with Host("remapexact") as host:
        # The same contents at the same places; then where each has them begins and ends elsewhere, which leaves pieces of all
        # lengths of what is in the pool already: a short one does not get a mapping of its own.
        for runs, at_least in (((16, 16), 0.995), ((16, 21), 0.96)):
            group = host.cgroup(f"{runs[1]}")
            loads = [host.workload(group, processes=2, mib=8, duplicate=60, zero=5, run=run, seed=3) for run in runs]
            processes = [one for load in loads for one in contents(load)]
            zero, pages = hash(bytes(PAGE)), sum(map(len, processes))
            zeros = sum(content == zero for one in processes for content in one.values())
            expected = saveable_in_runs(processes, zero, 8) + zeros

            def freed():
                frames, own = Frames(), set.union(*map(pfns, loads))
                return pages - sum(not frames.flags(pfn) & Frames.ZERO_FLAG for pfn in own)

            check(freed() == 0, "shared before")
            daemon = host.daemon(host.configure("OnStop=unmerge\n" + DAEMON + section(group)))
            for _ in range(12):
                host.passes(seconds=3)
                if freed() >= expected * 0.999:
                    break
            print(f"    runs of {runs}: {pages} pages; {expected} can be freed, {zeros} of them zero: {freed()} are")
            check(expected * at_least <= freed() <= expected, f"freed {freed()} of {expected}")
            check(all(load.intact() for load in loads), "contents")
            check(host.stop(daemon) == 0, "end")
            for load in loads:
                host.end(load)


class StrangeKeeper(threading.Thread):
    """Listens where the keeper does, and greets with another version of the protocol."""
    VERSION = 4711

    def __init__(self, path):
        super().__init__(daemon=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.asked, self.socket = [], socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.bind(str(path))
        self.socket.listen()
        self.start()

    def run(self):
        while True:
            try:
                peer, _ = self.socket.accept()
            except OSError:
                return
            while request := peer.recv(65536):
                self.asked.append(struct.unpack_from("I", request)[0])
                peer.send(request[:4] + struct.pack("I", self.VERSION) + request[8:])

    def end(self):
        self.socket.shutdown(socket.SHUT_RDWR)
        self.join()
        self.socket.close()


def strange():
    """a keeper of another version: told with both versions, by the log and the doctor; nothing is merged, the daemon lives"""
    with Host("remapstrange") as host:
        group = host.cgroup("a")
        victims = [Victim(host, group, "--quiet") for _ in range(2)]
        path = host.dir / "run/keeper"
        doctor = lambda: host.ctl("--config", config, "doctor", environment={"RUNTIME_DIRECTORY": str(host.dir / "run")})
        config = host.configure(DAEMON + section(group))
        check("keeper: none runs" in doctor(), doctor())
        keeper = StrangeKeeper(path)
        daemon = host.daemon(config)
        host.passes(2)
        check(f"version {keeper.VERSION}" in daemon.log() and "version 1" in daemon.log(), daemon.log())
        warnings = host.call("GetStatus")["warnings"]
        check(any("another version" in w for w in warnings), f"{warnings}")
        why = host.call("Explain", pid=victims[0].pid)
        check("another version" in (why["reason"] or ""), f"{why}")
        check(f"version {keeper.VERSION}" in doctor(), doctor())
        check(not any(pool_lines(v.pid) for v in victims) and set(keeper.asked) <= {1, 9}, f"asked for {set(keeper.asked)}")
        for v in victims:
            v.order("check")
        check(host.stop(daemon) == 0, "end")
        # With one of its own it goes on.
        keeper.end()
        daemon = host.daemon(config)
        converge(host, *victims)
        check("keeper: process" in doctor(), doctor())
        unmerge(host, group)
        wait_for_plain([v.pid for v in victims])
        ended(host, daemon, *victims)


def notice(victim, word):
    if victim.ask(word) == ["bad"]:
        raise Noticed(f"{word}: wrong bytes")


def control_domain():
    """domains are not kept apart: frames in common"""
    def act(host):
        a, b = host.cgroup("a"), host.cgroup("b")
        loads = [host.workload(group, processes=2, mib=4, duplicate=60, run=32, seed=7) for group in (a, b)]
        check(not common(*loads), "before")
        daemon = test_daemon(host, host.configure(TWO_DOMAINS + section(a, **TRUST) + section(b, **TRUST)), "_ROSTER", 1)
        while daemon.poll() is None:
            host.passes()
            if common(*loads):
                raise Noticed(f"{len(common(*loads))} frames in common")
    until_noticed("remapctldomain", act)


def control_crowd():
    """the other threads do not stand: what one discards meanwhile is there again"""
    def act(host):
        group = host.cgroup("a")
        victims = [Victim(host, group, "--quiet") for _ in range(2)]
        victims[0].order("chase")
        daemon = test_daemon(host, host.configure(DAEMON + section(group)), "", 1 << 11)
        while daemon.poll() is None:
            host.ctl("scan")
            host.ctl("scan")
            notice(victims[0], "seen")
            unmerge(host, group)  # what was discarded and written in a pool's mapping is not looked at again
            wait_for_plain([v.pid for v in victims], 60)
            notice(victims[0], "seen")
            host.ctl("reload")
    # Seen while runs are merged for the first time, or hardly ever: so with new ones, again and again.
    until_noticed("remapctlcrowd", act, attempts=12, seconds=8)


def merged_then(name, variable, mask, begin, end):
    """Merged, begin, everything put back, end: which must go wrong."""
    def act(host):
        group = host.cgroup("a")
        victims = [Victim(host, group, "--quiet") for _ in range(2)]
        daemon = test_daemon(host, host.configure(DAEMON + section(group)), variable, mask)
        while daemon.poll() is None:
            converge(host, *victims)
            victims[0].order(begin)
            unmerge(host, group)
            wait_for_plain([v.pid for v in victims], 60)
            notice(victims[0], end)
            host.ctl("reload")
    until_noticed(name, act)


def control_protect():
    """putting back, pages are not protected against writing: what is written from outside meanwhile is lost"""
    merged_then("remapctlprotect", "_REMAP", 1 << 8, "outside", "calm")


def control_written():
    """putting back, pages that were written are not left: a registered buffer is somewhere else by then"""
    merged_then("remapctlwritten", "_REMAP", 1 << 10, "pin", "receive")


def control_pin():
    """putting back pages that were written, nobody looks whether they are pinned: the same"""
    merged_then("remapctlpin", "_REMAP", 1 << 11, "pin", "receive")


if __name__ == "__main__":
    tests = [merged, grown, relimited, fork_is_over, lived, skipped, trusted, domains, abandoned, unreached, killed, restarted, confined,
             pinned, outside, exact, strange]
    controls = [control_domain, control_crowd, control_protect, control_written, control_pin]
    run_tests(*tests, *(controls if sys.argv[1:] else []))
