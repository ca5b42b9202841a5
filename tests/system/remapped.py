#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Route remap by the whole daemon: what it merges is counted in frames and compared with what it says; everything becomes
plain memory again; domains share nothing; a daemon that is killed is followed by one that goes on."""
import os
import random
import signal
import struct
import subprocess
import time

from harness import BUILD, Frames, Host, PAGE, check, knobs, mappings, run_tests, wait_for

DAEMON = "MinimumAge=0s\nScanInterval=300ms\n"
HIDDEN = {"KSMD_USER_UNFINISHED_REMAP": "1"}


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


def stats(host, group):
    return next(one for one in host.call("GetStats")["cgroups"] if one["path"] == group)


def converge(host, *loads, share=0.99, passes=12, seconds=20):
    for _ in range(passes):
        host.passes(seconds=seconds)
        if all(pooled(load)[0] >= load.mergeable * share for load in loads):
            return
    raise AssertionError(f"merged {[pooled(load)[0] for load in loads]} of {[load.mergeable for load in loads]}: {host.stats()}")


def max_count(frames):
    with open("/proc/kpagecount", "rb", buffering=0) as counts:
        return max(struct.unpack("Q", os.pread(counts.fileno(), 8, pfn * 8))[0] for pfn in frames)


def merged():
    """merges by its own pool, frees frames, needs no KSM, keeps MaxPageSharing, and puts all back"""
    with Host("remap") as host:
        group = host.cgroup("a")
        load = host.workload(group, processes=4, mib=8, duplicate=50, zero=10, run=16)
        before = {pid: mappings(pid) for pid in load.pids}
        anon = sum(rss(pid, "RssAnon") for pid in load.pids)
        text = "OnStop=unmerge\nMaxPageSharing=2\n" + DAEMON
        daemon = host.daemon(host.configure(text + section(group)), environment=HIDDEN)
        converge(host, load)
        pages, frames = pooled(load)
        got = stats(host, group)
        print(f"    {pages} pages on {len(frames)} frames, of {load.mergeable}; RssAnon {anon >> 10} -> "
              f"{sum(rss(pid, 'RssAnon') for pid in load.pids) >> 10} KiB; {got}")
        check(load.intact(), "contents")
        check(got["route"] == "remap", "route")
        check(got["pages_shared"] == len(frames) and got["pages_sharing"] == pages - len(frames), f"{got}")
        check(max_count(frames) <= 2, f"a frame is mapped {max_count(frames)} times")
        check(anon - sum(rss(pid, "RssAnon") for pid in load.pids) >= (pages + load.zero * 4 * 0.99) * PAGE, "RssAnon")
        check(load.marked() == 0 and load.merged() == 0, "marked or merged by KSM")
        daemon_stats = host.stats()
        print(f"    {daemon_stats['stops']} stops, p50 {daemon_stats['stop_nsec_p50'] / 1e6:.2f} p99 "
              f"{daemon_stats['stop_nsec_p99'] / 1e6:.2f} ms; {[mappings(pid) for pid in load.pids]} mappings, {before}")
        print(host.ctl("why", load.pids[0]))
        check(host.stop(daemon) == 0, "end")
        print(daemon.log()[-2000:])
        check(load.intact(), "contents afterwards")
        for pid in load.pids:
            check(not pool_lines(pid), f"left: {pool_lines(pid)}")
            check(mappings(pid) <= before[pid] * 1.1, f"{mappings(pid)} mappings, {before[pid]} before")


class Victim:
    """remapped-victim.c: checks its own memory all the while."""

    def __init__(self, host, group, *arguments, mib=4):
        self.process = host.spawn(group, BUILD / "tests/system/remapped-victim", "--mib", mib, *arguments,
                                  stdin=subprocess.PIPE, output=subprocess.PIPE)
        words = self.process.stdout.readline().split()
        self.able = words != ["unable"]
        check(words and (words[0] == "ready" or not self.able), f"the victim said {words}")
        if not self.able:
            return
        self.pid, self.pids, self.addresses, self.pages = self.process.pid, [self.process.pid], [int(words[1], 16)], int(words[2])
        self.mergeable = self.pages // 2

    def order(self, word):
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline().strip()
        check(answer == "ok", f"victim {self.pid}, {word}: {answer!r}, {self.process.poll()}")

    def frames(self, still=True):
        """PFNs of pages that map a file's frame: all of them, or of those that nobody touches."""
        return {e & (1 << 55) - 1 for (_, page), e in entries(self).items()
                if e >> 63 and e >> 61 & 1 and (not still or page < self.pages // 2)}


def descriptors(pid):
    return len(os.listdir(f"/proc/{pid}/fd"))


def keeper_listens(host):
    return any(line.rstrip().endswith(str(host.dir / "run/keeper")) for line in open("/proc/net/unix"))


def all_plain(pids):
    for pid in pids:
        check(not pool_lines(pid), f"{pid} is still remapped: {pool_lines(pid)[:3]}")


def lived():
    """processes that write, discard and fork while they are merged, and a child: what is seen of them is right"""
    with Host("remaplive") as host:
        group = host.cgroup("a")
        victims = [Victim(host, group) for _ in range(3)]
        before = {v.pid: (mappings(v.pid), descriptors(v.pid)) for v in victims}
        daemon = host.daemon(host.configure(DAEMON + section(group)), environment=HIDDEN)
        converge(host, *victims)
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
        sharing, mapped = stats(host, group)["pages_sharing"], sum(len(v.frames(False)) for v in victims)
        print(f"    {mapped} pages, {sharing} of them saved")
        check(sharing <= mapped - len(set.union(*(v.frames(False) for v in victims))) + 200, f"{sharing} of {mapped}")
        victims[1].order("write")
        for v in victims:
            v.order("check")
        # One process that is told to go, a child, and everything else.
        before_pages = stats(host, group)["pages_sharing"]
        print(f"    {before_pages} pages saved; {host.ctl('unmerge', group).strip()}")
        wait_for("everything plain", lambda: not any(pool_lines(pid) for pid in [child] + [v.pid for v in victims]), 10)
        for v in victims:
            v.order("check")
        victims[0].order("end")
        for v in victims:
            v.order("check")
            maps, fds = before[v.pid]
            check(descriptors(v.pid) == fds, f"{descriptors(v.pid)} descriptors, {fds} before")
            print(f"    {mappings(v.pid)} mappings, {maps} before")
        check(host.stop(daemon) == 0, "end")
        for v in victims:
            v.process.stdin.close()
            v.process.wait()
        wait_for("the keeper's end", lambda: not keeper_listens(host), 20)


def skipped():
    """what route remap leaves alone, each with its reason"""
    with Host("remapskip") as host:
        group = host.cgroup("a")
        plain = [Victim(host, group, "--quiet") for _ in range(2)]
        kinds = {"lock": "locks", "peer": "shares", "pin": "pinned", "bind": None, "uffd": None, "name": None}
        others = {kind: Victim(host, group, "--quiet", "--as", kind) for kind in kinds}
        daemon = host.daemon(host.configure("OnStop=unmerge\n" + DAEMON + section(group)), environment=HIDDEN)
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


def domains():
    """two domains with the same contents never have a frame in common"""
    with Host("remapdomains") as host:
        a, b = host.cgroup("a"), host.cgroup("b")
        loads = [host.workload(group, processes=2, mib=8, duplicate=60, zero=5, run=32, seed=7) for group in (a, b)]

        def apart(when):
            # The zero page is nobody's.
            one, two = (set(x) for x in map(pfns, loads))
            frames = Frames()
            common = [pfn for pfn in one & two if not frames.flags(pfn) & Frames.ZERO_FLAG]
            check(not common, f"{when}: {len(common)} frames in common")

        apart("before")
        daemon = host.daemon(host.configure("OnStop=unmerge\nMinimumAge=0s\nScanInterval=1h\n" + section(a) + section(b)),
                             environment=HIDDEN)
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
        before = {v.pid: (mappings(v.pid), descriptors(v.pid)) for v in victims}
        config = host.configure(DAEMON + section(group))
        chance = random.Random(int(os.environ.get("SEED", "1")))
        merged_ever = 0
        for i in range(kills):
            daemon = host.daemon(config, environment=HIDDEN, wait=False)
            time.sleep(chance.uniform(0.05, 0.9))
            if i % 5 == 3:
                subprocess.Popen([str(BUILD / "src/ctl/ksmctl"), "--socket", str(host.socket), "unmerge", group],
                                 stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                time.sleep(chance.uniform(0, 0.3))
            daemon.kill()
            daemon.wait()
            merged_ever += sum(len(v.frames(False)) for v in victims)
            for v in victims:
                v.order(chance.choice(["check", "write", "discard", "check"]))
        daemon = host.daemon(config, environment=HIDDEN)
        host.passes(2)
        got = stats(host, group)
        print(f"    {merged_ever} pages seen merged after {kills} kills; in the end {got['pages_shared']} + {got['pages_sharing']}")
        check(merged_ever > 0 and got["pages_sharing"] > 0, "nothing was merged")
        print("    " + host.ctl("unmerge", group).strip())
        wait_for("everything plain", lambda: not any(pool_lines(v.pid) for v in victims), 20)
        host.passes(2)
        for v in victims:
            v.order("check")
            maps, fds = before[v.pid]
            check(descriptors(v.pid) == fds, f"{descriptors(v.pid)} descriptors, {fds} before")
            print(f"    {mappings(v.pid)} mappings, {maps} before")
            check(not any(line.startswith("6b736d") for line in open(f"/proc/{v.pid}/maps")), "something was left")
        check(host.stop(daemon) == 0, "end")
        for v in victims:
            v.process.stdin.close()
            v.process.wait()
        wait_for("the keeper's end", lambda: not keeper_listens(host), 20)


if __name__ == "__main__":
    run_tests(merged, lived, skipped, domains, restarted)
