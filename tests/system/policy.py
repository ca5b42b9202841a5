#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who is merged and who is not is what the configuration says, and nothing outside of it is touched."""
import os
import pathlib
import statistics
import subprocess
import sys
import time

from harness import KSM, Frames, Host, Obedient, check, knobs, nothing_shared, run_tests, skip, smaps, wait_for

# A process with its own contents on huge pages: argument 1 says how many of the pages have a twin in its like.
HUGE = """
import ctypes, hashlib, mmap, os, sys, time
shared = int(sys.argv[1])
size, huge = 16 << 20, 2 << 20
area = mmap.mmap(-1, size + huge, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
base = ctypes.addressof(ctypes.c_char.from_buffer(area))
libc = ctypes.CDLL(None)
libc.madvise(ctypes.c_void_p(base), ctypes.c_size_t(size + huge), 14)
start = -base % huge
for page in range(size >> 12):
    who = 0 if page % 512 < shared else os.getpid()
    area[start + page * 4096:start + (page + 1) * 4096] = hashlib.shake_128(b"%d %d" % (who, page)).digest(4096)
print("ready", flush=True)
time.sleep(1000)
"""


def section(pattern, merge="yes", **keys):
    return f"[Cgroup {pattern}]\nMerge={merge}\n" + "".join(f"{key}={value}\n" for key, value in keys.items())


def daemon_section(**keys):
    return "".join(f"{key}={value}\n" for key, value in {"MinimumAge": 0, "ScanInterval": "1s", **keys}.items())


def switches(pid):
    """How often the threads of a process were woken or driven off a CPU: a stopped thread shows."""
    total = 0
    for task in pathlib.Path(f"/proc/{pid}/task").iterdir():
        for line in (task / "status").read_text().splitlines():
            if "ctxt_switches" in line:
                total += int(line.split()[1])
    return total


def nested(host, parent, name):
    path = f"{parent}/{name}"
    (host.root / path).mkdir()
    host.groups.append(path)
    return path


def outside_is_untouched():
    """processes outside of what is opted in keep their frames and sleep on, though they hold the same contents"""
    with Host("outside") as host:
        inside, outside = host.cgroup("in"), host.cgroup("out")
        one, two = host.workload(inside, mib=8), host.workload(outside, mib=8)
        before, slept = two.frames(), {pid: switches(pid) for pid in one.pids + two.pids}
        daemon = host.daemon(host.configure(daemon_section() + section(inside)))
        host.converge(one)
        host.passes(2)
        woken = {pid for pid in slept if switches(pid) != slept[pid]}
        check(not woken & set(two.pids), "a process outside was woken")
        check(woken, "no process inside was stopped either, so the switches prove nothing")
        after = two.frames()
        changed = sum(before[key] != after.get(key) for key in before)
        check(after == before, f"{changed} of {len(before)} frames outside changed")
        check(two.marked() == 0, "a process outside was marked")
        listed = {t["pid"] for t in host.call("ListTargets")["targets"]}
        check(listed == set(one.pids), f"{listed}")
        check("no section" in host.ctl("why", two.pids[0]), "why")
        check(one.intact() and two.intact() and host.stop(daemon) == 0, "end")


def first_match_wins():
    """the first section that matches decides; ** and Exclude; a malformed section fails closed"""
    with Host("match") as host:
        top = host.cgroup("top")
        deep = nested(host, nested(host, top, "x"), "y")
        hidden, spared, broken = nested(host, top, "hidden"), nested(host, top, "spared"), nested(host, top, "broken")
        loads = {path: host.workload(path, mib=4, seed=3) for path in (deep, hidden, spared, broken)}
        text = (daemon_section() + section(f"{top}/hid*", merge="no") +
                section(f"{top}/bro?en") + "HugePageSplit=lots\n" +
                section(f"{top}/**", Exclude=spared, Domain="all") + section(f"{top}/*", merge="no"))
        config = host.configure(text)
        daemon = host.daemon(config)
        host.converge(loads[deep])
        for path in (hidden, spared, broken):
            check(loads[path].merged() == 0 and loads[path].marked() == 0, f"{path} was touched")
        line = config.read_text().splitlines().index("HugePageSplit=lots") + 1
        warnings = host.call("GetStatus")["warnings"]
        check(any(f"{config}:{line}:" in w for w in warnings), f"line {line} is not named: {warnings}")
        check("malformed" in host.ctl("why", loads[broken].pids[0]), "why of a malformed section")
        check("Merge=no" in host.ctl("why", loads[hidden].pids[0]), "why of Merge=no")
        check("no" in host.ctl("why", loads[spared].pids[0]), "why of an excluded one")
        doctor = host.ctl("--config", config, "doctor")
        check("malformed" in doctor and f"{config}:{line}" in doctor, doctor)
        status, said = host.refused(config, "--check-config")
        check(status == 1 and f"{config}:{line}:" in said, f"{status} {said}")
        check(host.stop(daemon) == 0, "end")


def second_domain():
    """KSM has one merge space: a second domain is not merged by it and says so; %c makes each cgroup a domain"""
    with Host("domain") as host:
        a, b = host.cgroup("a"), host.cgroup("b")
        one, two = host.workload(a, mib=4, seed=5), host.workload(b, mib=4, seed=5)
        for text in (section(a, Domain="first") + section(b, Domain="second"),
                     section("/".join(a.split("/")[:-1] + [a[:-1] + "?"]), Domain="%c"),
                     section(a) + section(b, Domain="second", Route="advise")):
            daemon = host.daemon(host.configure(daemon_section(OnStop="unmerge") + text))
            host.passes(2)
            wins, loses = (one, two) if one.merged() else (two, one)  # chance, unless one asks for it by name
            check("Route" not in text or wins is two, "who leaves the route open got KSM before who asked for it")
            host.converge(wins)
            check(loses.merged() == 0 and loses.marked() == 0, f"both domains merge: {text}")
            warnings = host.call("GetStatus")["warnings"]
            check(any("another domain" in w for w in warnings), f"not told: {warnings}")
            why = host.ctl("why", loses.pids[0])
            check("one merge space" in why, why)
            check("one merge space" in host.ctl("targets"), "targets")
            check(host.stop(daemon) == 0 and wins.marked() == 0, "end")


def domain_renamed():
    """a reload that renames the domain, or gives KSM to another one, takes effect"""
    with Host("rename") as host:
        a, b = host.cgroup("a"), host.cgroup("b")
        one, two = host.workload(a, mib=4, seed=5), host.workload(b, mib=4, seed=5)
        both = daemon_section() + section(a, Domain="first") + section(b, Domain="second")
        daemon = host.daemon(host.configure(both))
        host.passes(2)
        if not one.merged():  # which of the two is the first to be seen is chance
            (a, one), (b, two) = (b, two), (a, one)
        host.converge(one)
        host.configure(daemon_section() + section(a, Domain="renamed") + section(b, Domain="other"))
        host.ctl("reload")
        host.passes(4)
        shares = [w.merged() / w.mergeable for w in (one, two)]
        check(max(shares) > 0.99 and min(shares) == 0, f"merged after the domains were renamed: {shares}")
        host.configure(daemon_section() + section(a, merge="no") + section(b, Domain="second"))
        host.ctl("reload")
        host.converge(two)
        check(one.merged() == 0 and one.marked() == 0, "Merge=no left something")
        # The one that has KSM goes away for good: the next in line gets it.
        host.configure(daemon_section() + section(a, Domain="first") + section(b, Domain="second"))
        host.ctl("reload")
        host.passes(2)
        winner, waiting = (one, two) if one.merged() else (two, one)
        group = a if winner is one else b
        host.converge(winner)
        host.end(winner)
        wait_for("an empty cgroup", lambda: host.remove(group))
        wait_for("the next domain merges", lambda: waiting.merged() >= waiting.mergeable * 0.99)
        check(host.call("GetStatus")["warnings"] == [], f"{host.call('GetStatus')['warnings']}")
        check(host.stop(daemon) == 0, "end")


def dry_run():
    """Merge=dry-run reads, counts and changes nothing"""
    with Host("dry") as host:
        group = host.cgroup("a")
        load = host.workload(group, mib=8, zero=10)
        before, slept = load.frames(), {pid: switches(pid) for pid in load.pids}
        knobs_seen = set()
        daemon = host.daemon(host.configure(daemon_section() + section(group, merge="dry-run")))
        for _ in range(3):
            host.passes()
            knobs_seen.add((KSM / "run").read_text())
        check({pid: switches(pid) for pid in load.pids} == slept, "a process was stopped")
        check(load.frames() == before and load.marked() == 0 and len(knobs_seen) == 1, "something was changed")
        stats = host.stats()
        check(stats["pages_scanned"] > 0 and stats["bytes_saved"] == 0 and stats["stops"] == 0, f"{stats}")
        targets = host.call("ListTargets")["targets"]
        check({t["merge"] for t in targets} == {"dry-run"}, f"{targets}")
        check(host.stop(daemon) == 0, "end")


def domains_of_one_name():
    """merged, dry-run, and a cgroup's own: three domains that share nothing, and three series in `metrics`"""
    with Host("names") as host:
        a, b, c = host.cgroup("a"), host.cgroup("b"), host.cgroup("c")
        text = "".join(f"[Cgroup {group}]\nDomain={domain}\nMerge={merge}\n"
                       for group, domain, merge in [(a, c, "yes"), (b, c, "dry-run"), (c, "%c", "yes")])
        daemon = host.daemon(host.configure(daemon_section() + text))
        host.passes(1)
        domains = host.call("GetStats")["domains"]
        check({(d["domain"], d["merge"], d["own"]) for d in domains} ==
              {(c, "yes", False), (c, "dry-run", False), (c, "yes", True)}, f"{domains}")
        series = [line.rsplit(" ", 1)[0] for line in host.ctl("metrics").splitlines() if not line.startswith("#")]
        check(len(series) == len(set(series)), f"twice: {sorted(s for s in series if series.count(s) > 1)[:3]}")
        check(host.stop(daemon) == 0, "end")


def minimum_age():
    """a process younger than MinimumAge is left alone, then merged without being asked for"""
    with Host("age") as host:
        group = host.cgroup("a")
        daemon = host.daemon(host.configure(daemon_section(MinimumAge="4s") + section(group)))
        begun = time.monotonic()
        load = host.workload(group, mib=2)
        wait_for("noticed", lambda: host.call("GetStatus")["processes"] == 2)
        host.passes()
        if time.monotonic() - begun < 3.5:
            states = {(t["state"], t["reason"]) for t in host.call("ListTargets")["targets"]}
            check(states == {("waiting", "young")} and load.marked() == 0, f"{states}")
        wait_for("merged", lambda: load.merged() >= load.mergeable * 0.99, 60)
        took = time.monotonic() - begun
        print(f"    merged {took:.1f} s after the start of the processes")
        check(took > 4, "before it was old enough")
        check(host.stop(daemon) == 0, "end")


def comings_and_goings():
    """cgroups and processes that come and go are noticed within a second or so, at next to no cost"""
    with Host("notice") as host:
        top = host.cgroup("top")
        daemon = host.daemon(host.configure(daemon_section(ScanInterval="1h") + section(f"{top}/**")))
        host.passes()
        times = {}

        def noticed(what, condition):
            begun = time.monotonic()
            wait_for(what, condition, interval=0.01)
            times.setdefault(what, []).append(time.monotonic() - begun)

        def status():
            return host.call("GetStatus")
        for n in range(7):
            group = nested(host, top, f"g{n}")
            noticed("cgroup came", lambda: status()["cgroups"] == 1)
            inner = nested(host, group, "inner")
            noticed("cgroup came below", lambda: status()["cgroups"] == 2)
            load = host.workload(inner, mib=1)
            noticed("process came", lambda: status()["processes"] == 2)
            host.end(load)
            noticed("process went", lambda: status()["processes"] == 0)
            (host.root / inner).rmdir()
            noticed("cgroup went", lambda: status()["cgroups"] == 1)
            (host.root / group).rmdir()
            noticed("cgroup went", lambda: status()["cgroups"] == 0)
        # The median: a neighbour may make any of them long.
        medians = {what: statistics.median(seconds) for what, seconds in times.items()}
        print("    median: " + ", ".join(f"{what} {seconds * 1000:.0f} ms" for what, seconds in medians.items()))
        check(max(medians.values()) < 1.5, f"{times}")
        check(host.stop(daemon) == 0, "end")


def minimum_run():
    """MinimumRun=8 leaves single twins alone and says so"""
    with Host("run") as host:
        group = host.cgroup("a")
        short = host.workload(group, mib=16, duplicate=2, run=1, seed=1)
        long = host.workload(group, mib=4, run=32, seed=1000000)  # seeds that are near have contents in common
        daemon = host.daemon(host.configure(daemon_section() + section(group, MinimumRun=8)))
        host.converge(long)
        host.passes(2)
        check(short.merged() < short.mergeable * 0.1, f"{short.merged()} of {short.mergeable} single pages merged")
        failures = host.stats()["merge_failures"]
        check(failures["short_run"] >= short.mergeable * 0.8, f"{failures}")
        check("short_run" in host.ctl("why", short.pids[0]), host.ctl("why", short.pids[0]))
        check(host.stop(daemon) == 0, "end")


# Distinct pages that are not dumped, the same in each of its like. Obeys "check".
DONTDUMP = """
import hashlib, mmap, sys
def page(i):
    return hashlib.sha256(b"dontdump %d" % i).digest() * 128
area = mmap.mmap(-1, 512 << 12, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
area.madvise(mmap.MADV_NOHUGEPAGE)
area.madvise(mmap.MADV_DONTDUMP)
for i in range(512):
    area[i << 12:i + 1 << 12] = page(i)
print("ready", flush=True)
for line in sys.stdin:
    print("ok" if all(area[i << 12:i + 1 << 12] == page(i) for i in range(512)) else "bad", flush=True)
"""


class NotDumped(Obedient):
    def __init__(self, host, group):
        self.process = host.spawn(group, sys.executable, "-c", DONTDUMP, ready="ready", stdin=subprocess.PIPE)
        self.pid = self.process.pid
        self.first = min(self.mappings())

    def mappings(self):
        return {first: flags for first, flags, _ in smaps(self.pid) if {"dd", "wr"} <= flags}

    def merged(self):
        frames = Frames()
        return sum(bool(frames.flags(pfn) & frames.KSM_FLAG)
                   for pfn in frames.of(self.pid, self.first, self.first + (512 << 12)).values())

    def is_apart(self):
        return self.merged() == 0 and not any("mg" in flags for flags in self.mappings().values())


def dontdump():
    """IncludeDontDump= of one section says nothing of its neighbour, and a reload gives it to the other and takes it back"""
    with Host("dontdump") as host:
        groups = [host.cgroup("a"), host.cgroup("b")]
        victims = [[NotDumped(host, group) for _ in range(2)] for group in groups]
        daemon = None

        def included(which):
            text = daemon_section() + "".join(section(group, Domain="one", IncludeDontDump="yes" if i in which else "no")
                                              for i, group in enumerate(groups))
            return host.configure(text)

        def settle(which):
            for _ in range(8):
                host.passes()
                done = [all(v.merged() == 512 if i in which else v.is_apart() for v in pair) for i, pair in enumerate(victims)]
                if all(done):
                    break
            check(all(done), f"included {which}: {[[(v.merged(), v.is_apart()) for v in pair] for pair in victims]}")
            for i, pair in enumerate(victims):
                skipped = [host.call("Explain", pid=v.pid)["pages_skipped"].get("dontdump", 0) for v in pair]
                check(all(n >= 512 for n in skipped) != (i in which), f"included {which}: skipped {skipped}")

        for which in ({0}, {1}, {0, 1}, set()):
            config = included(which)
            if daemon:
                host.ctl("reload")
            else:
                daemon = host.daemon(config)
            settle(which)
        check(all(v.intact() for pair in victims for v in pair) and host.stop(daemon) == 0, "end")


def huge(pid):
    return sum(size for _, _, size in smaps(pid))


def huge_pages():
    """a huge page is split only where HugePageSplit of it is to be saved: neither by reading nor by marking"""
    with Host("huge") as host:
        if "[never]" in pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text():
            skip("no transparent huge pages here")
        group = host.cgroup("a")
        spawned = {n: [host.spawn(group, sys.executable, "-c", HUGE, str(n), ready="ready").pid for _ in range(2)]
                   for n in (0, 26, 256)}
        before = {pid: huge(pid) for pids in spawned.values() for pid in pids}
        check(all(size >= 14 << 20 for size in before.values()), f"no huge pages to begin with: {before}")
        daemon = host.daemon(host.configure(daemon_section() + section(group, HugePageSplit="25%")))
        frames = Frames()
        wait_for("half of each merged", lambda: frames.ksm(spawned[256])[0] >= 2 * 4096 * 0.49, 30)
        host.passes(2)
        after = {pid: huge(pid) for pid in before}
        for n, pids in spawned.items():
            print(f"    {n} of 512 pages with a twin: huge {[before[p] >> 20 for p in pids]} -> "
                  f"{[after[p] >> 20 for p in pids]} MiB, {frames.ksm(pids)[0]} pages merged")
        check(all(after[p] == before[p] for n in (0, 26) for p in spawned[n]), "huge pages not worth it were split")
        check("huge" in host.ctl("why", spawned[26][0]), host.ctl("why", spawned[26][0]))
        check(host.stop(daemon) == 0, "end")


def sharing_limit():
    """MaxPageSharing bounds how many pages map one frame, by the kernel's own count"""
    with Host("limit") as host:
        if not nothing_shared(host):
            skip("others share pages: the knob cannot change")
        group = host.cgroup("a")
        load = host.workload(group, processes=12, mib=1, duplicate=60)
        daemon = host.daemon(host.configure(daemon_section(MaxPageSharing=4, OnStop="unmerge") + section(group)))
        host.converge(load)
        counts = {}
        for pfn in load.frames().values():
            counts[pfn] = counts.get(pfn, 0) + 1
        chains = host.stats()["stable_node_chains"]
        print(f"    a frame is mapped at most {max(counts.values())} times; {chains} chains")
        check(max(counts.values()) <= 4, f"{max(counts.values())} pages on one frame")
        host.configure(daemon_section(MaxPageSharing=3, OnStop="unmerge") + section(group))
        host.ctl("reload")
        extra = host.workload(group, mib=1, seed=9)
        host.converge(extra)
        warnings = host.call("GetStatus")["warnings"]
        check(any("MaxPageSharing" in w for w in warnings), f"not told what is not in force: {warnings}")
        check(host.stop(daemon) == 0 and load.intact(), "end")
        host.end(load)
        host.end(extra)
        check(nothing_shared(host), "pages are shared by somebody")
        daemon = host.daemon(host.configure(""))  # what could not be put back is put back by the next start
        check(host.stop(daemon) == 0 and knobs() == host.knobs, f"{knobs()}")


if __name__ == "__main__":
    os.environ.setdefault("PYTHONHASHSEED", "0")
    run_tests(outside_is_untouched, first_match_wins, second_domain, domain_renamed, dontdump, dry_run, domains_of_one_name,
              minimum_age, comings_and_goings, minimum_run, huge_pages, sharing_limit)
