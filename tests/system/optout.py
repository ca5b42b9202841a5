#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whatever ends the consent of a process takes everything apart that was done to it: its frames are its own again, no
mapping is offered to KSM any more, the mappings are as many as before, every byte is what it was."""
import contextlib
import os
import signal
import sys
import threading
import time

from controls import Noticed, test_daemon, until_noticed
from harness import Frames, Host, check, mappings, marked, run_tests, wait_for


def conf(*groups, more="", merge="yes"):
    """KSM serves one domain, so the cgroups are one."""
    sections = "".join(f"[Cgroup {group}]\nDomain=one\nMerge={merge}\n" for group in groups)
    return f"MinimumAge=0\nScanInterval=1s\n{more}\n{sections}"


@contextlib.contextmanager
def merged(name, more="", groups=1):
    """Hands out (host, its cgroups, a merged workload in each, the mappings of each process before, the daemon)."""
    with Host(name) as host:
        paths = [host.cgroup(chr(ord("a") + n)) for n in range(groups)]
        loads = [host.workload(path, mib=8, zero=10, seed=n) for n, path in enumerate(paths)]
        before = {pid: mappings(pid) for load in loads for pid in load.pids}
        daemon = host.daemon(host.configure(conf(*paths, more=more)))
        host.converge(*loads)
        for load in loads:
            shared_zero(host, load)
        yield host, paths, loads, before, daemon


def shared_zero(host, load):
    """Its zero pages map the zero page: as much a change as the rest."""
    frames = Frames()
    def count():
        frames.cache = {}
        return sum(bool(frames.flags(pfn) & frames.ZERO_FLAG) for pid in load.pids for pfn in frames.of(pid).values())
    wait_for("zero pages given back", lambda: count() >= load.zero * len(load.pids) * 0.99)


def apart(load, before, what):
    """Proves that nothing of ours is left in the processes."""
    check(load.marked() == 0, f"{what}: {load.marked()} mappings are still marked")
    pfns = list(load.frames().values())
    check(len(set(pfns)) == len(pfns), f"{what}: {len(pfns) - len(set(pfns))} of {len(pfns)} pages still share a frame")
    check(load.merged() == 0, f"{what}: {load.merged()} pages still map a KSM frame")
    for pid in load.pids:
        check(mappings(pid) <= before[pid] * 1.1, f"{what}: mappings {before[pid]} -> {mappings(pid)}")
    check(load.intact(), f"{what}: contents")


def process_moved_out():
    """a process that leaves its cgroup, the others stay merged"""
    with merged("moved") as (host, _, (load,), before, daemon):
        elsewhere = host.cgroup("elsewhere")
        for pid in load.pids:
            host.move(elsewhere, pid)
        wait_for("unmarked", lambda: load.marked() == 0)
        apart(load, before, "moved out")
        check(host.call("GetStatus")["processes"] == 0, "still managed")
        for pid in load.pids:
            host.move(host.groups[0], pid)
        host.converge(load)
        check(host.stop(daemon) == 0, "end")


def section_removed():
    """the section is removed, or says Merge=no, or excludes the cgroup, or becomes malformed, then SIGHUP or reload"""
    with merged("removed") as (host, (group,), (load,), before, daemon):
        full = conf(group)
        for what, text in {"removed": conf(), "Merge=no": conf(group, merge="no"),
                           "excluded": full + f"Exclude={group}\n",
                           "malformed": full + "MinimumRun=often\n",
                           "dry-run": conf(group, merge="dry-run")}.items():
            host.configure(text)
            if what in ("removed", "dry-run"):
                daemon.send_signal(signal.SIGHUP)
            else:
                said = host.ctl("reload")
                check(("test.conf:" in said) == (what == "malformed"), f"{what}: {said!r}")
            wait_for(f"{what}: unmarked", lambda: load.marked() == 0)
            apart(load, before, what)
            host.passes(2)
            apart(load, before, what + ", two passes later")
            host.configure(full)
            host.ctl("reload")
            host.converge(load)
        check(host.stop(daemon) == 0, "end")


def unmerge_command():
    """ksmctl unmerge takes one cgroup apart, for good until a reload, and leaves the other alone"""
    with merged("unmerge", groups=2) as (host, (a, b), (one, two), before, daemon):
        kept = two.merged()
        said = host.ctl("unmerge", a)
        print(f"    {said.strip()}")
        check(int(said.split()[0]) >= one.mergeable * 0.99, f"answered before it was done: {said}")
        apart(one, before, "unmerge")
        check(two.merged() >= kept * 0.99, f"the other cgroup: {kept} -> {two.merged()}")
        host.passes(3)
        apart(one, before, "unmerge, three passes later")
        check("unmerged by command" in host.ctl("why", one.pids[0]), host.ctl("why", one.pids[0]))
        check(f"{a} was unmerged by command" in host.ctl("status"), host.ctl("status"))
        said = host.ctl("unmerge", a, expect=1)
        check("unmerged before" in said, said)
        host.ctl("unmerge", "no/such/cgroup", expect=1)
        host.ctl("reload")
        check("unmerged by command" not in host.ctl("status"), host.ctl("status"))
        host.converge(one, two)
        host.ctl("pause")
        host.ctl("unmerge", b)
        apart(two, before, "unmerge while paused")
        check(one.merged() >= one.mergeable * 0.99 and host.stop(daemon) == 0, "end")


def unmerge_again():
    """an unmerge after a reload waits for processes that an earlier one could not undo yet"""
    with merged("again") as (host, (group,), (load,), before, daemon):
        for pid in load.pids:
            os.kill(pid, signal.SIGSTOP)
        said = host.ctl("unmerge", group, expect=1)
        check("goes on being tried" in said and load.marked() > 0, said)
        host.ctl("reload")
        said = host.ctl("unmerge", group, expect=1)
        check("goes on being tried" in said and load.marked() > 0, said)
        host.ctl("reload")
        answers = []
        again = threading.Thread(target=lambda: answers.append(host.ctl("unmerge", group)))
        again.start()
        time.sleep(1)
        for pid in load.pids:
            os.kill(pid, signal.SIGCONT)
        again.join()
        check(answers and int(answers[0].split()[0]) >= load.mergeable * 0.99, f"{answers}")
        apart(load, before, "unmerge once more")
        check(host.stop(daemon) == 0, "end")


def on_stop():
    """OnStop=unmerge leaves nothing; OnStop=keep leaves all merged, and the next daemon can undo it"""
    with merged("on-stop", more="OnStop=unmerge") as (host, (group,), (load,), before, daemon):
        check(host.stop(daemon) == 0, "end")
        apart(load, before, "OnStop=unmerge")
        check(not [f.name for f in (host.dir / "run").iterdir() if f.name[0].isdigit()], "records were left")

        daemon = host.daemon(host.configure(conf(group)))
        host.converge(load)
        check(host.stop(daemon) == 0, "end")
        check(load.merged() >= load.mergeable * 0.99, "OnStop=keep un-shared")
        frames = load.frames()
        daemon = host.daemon(host.configure(conf(group, more="OnStop=unmerge")))
        host.passes(2)
        check(load.merged() >= load.mergeable * 0.99, "the next daemon un-shared")
        stats = host.stats()
        check(load.duplicate * 1.01 >= stats["pages_sharing"] >= load.duplicate * 0.99 and
              stats["pages_zero"] >= load.zero * len(load.pids) * 0.99, f"the next daemon counts {stats}")
        same = sum(load.frames().get(key) == pfn for key, pfn in frames.items())
        print(f"    {same} of {len(frames)} pages on the same frame under the next daemon")
        check(host.stop(daemon) == 0, "end")
        apart(load, before, "OnStop=unmerge of the next daemon")


def reloaded_and_stopped():
    """a reload that a stop follows at once is how it ends: OnStop= of the new configuration holds"""
    with merged("reload-stop") as (host, (group,), (load,), before, daemon):
        host.configure(conf(group, more="OnStop=unmerge"))
        daemon.send_signal(signal.SIGSTOP)  # so that the two come together
        daemon.send_signal(signal.SIGHUP)
        daemon.send_signal(signal.SIGTERM)
        daemon.send_signal(signal.SIGCONT)
        check(host.stop(daemon) == 0, "end")
        apart(load, before, "OnStop=unmerge of a reload")


def orphans():
    """a daemon is killed, the configuration opts out meanwhile: the next start undoes what the first one did"""
    for how in "removed", "dry-run":
        with merged("orphans") as (host, (group,), (load,), before, daemon):
            host.stop(daemon, signal.SIGKILL)
            check(load.marked() > 0 and load.merged() > 0, "the kill undid it, so this proves nothing")
            daemon = host.daemon(host.configure(conf() if how == "removed" else conf(group, merge="dry-run")))
            wait_for("unmarked", lambda: load.marked() == 0)
            apart(load, before, how)
            check(str(load.pids[0]) in daemon.log(), f"not told: {daemon.log()}")
            check(host.stop(daemon) == 0, "end")
            apart(load, before, how + ", after its end")


def own_marks_stay():
    """what a process offers to KSM itself is none of ours: it stays marked whatever we undo"""
    with Host("own") as host:
        group = host.cgroup("a")
        load = host.workload(group, mib=8)
        load.order("mark")
        own = load.marked()
        daemon = host.daemon(host.configure(conf(group, more="OnStop=unmerge")))
        host.converge(load)
        host.ctl("unmerge", group)
        check(load.marked() == own, f"{own} -> {load.marked()} after unmerge")
        check(host.stop(daemon) == 0 and load.marked() == own, f"{own} -> {load.marked()} after the end")
        check(load.intact(), "contents")
        host.end(load)


# 2,000 pages that the other process has too; at SIGUSR1 forks 40 children, one after the other, that stay: each in a new
# cgroup in the one that is named.
PREFORK = """
import os, signal, sys, time
data = b''.join(i.to_bytes(8, 'big') * 512 for i in range(1, 2001))
def fork(*_):
    for _ in range(40):
        if os.fork() == 0:
            if len(sys.argv) > 1:
                new = f"{sys.argv[1]}/{os.getpid()}"
                os.mkdir(new)
                open(new + "/cgroup.procs", "w").write(str(os.getpid()))
            while True:
                signal.pause()
        time.sleep(0.005)
signal.signal(signal.SIGUSR1, fork)
print('ready', flush=True)
while True:
    signal.pause()
"""


def forked_while_undone(host, start):
    """Daemons come from start(host, configuration). Returns (the daemon, what says which processes there are)."""
    group = host.cgroup("a")
    parents = [host.spawn(group, sys.executable, "-c", PREFORK, ready="ready") for _ in range(2)]
    daemon = start(host, host.configure(conf(group)))
    frames = Frames()

    def pids():
        return [int(pid) for pid in (host.root / group / "cgroup.procs").read_text().split()]

    wait_for("merged", lambda: frames.ksm(pids())[0] > 3900)
    for parent in parents:
        parent.send_signal(signal.SIGUSR1)
    time.sleep(0.05)
    before = len(pids())
    host.ctl("unmerge", group)
    wait_for("the children", lambda: len(pids()) == 82)
    print(f"    {before} processes when it was asked for, 82 in the end")
    check(before < 82, "all were born before")
    return daemon, pids


def born_meanwhile():
    """children that are forked while their parent is being undone have its marks, and are undone too"""
    with Host("born") as host:
        daemon, pids = forked_while_undone(host, Host.daemon)
        wait_for("unmarked", lambda: not any(marked(pid) for pid in pids()), 10)
        check(host.stop(daemon) == 0, "end")


def born_elsewhere():
    """the same while all is undone because the daemon ends, in cgroups that are new and would be managed"""
    with Host("elsewhere") as host:
        group = host.cgroup("a")
        path = host.root / group
        parents = [host.spawn(group, sys.executable, "-c", PREFORK, path, ready="ready") for _ in range(2)]
        daemon = host.daemon(host.configure(conf(group, f"{group}/**", more="OnStop=unmerge")))
        frames = Frames()
        wait_for("merged", lambda: frames.ksm([parent.pid for parent in parents])[0] > 3900)
        for parent in parents:
            parent.send_signal(signal.SIGUSR1)
        time.sleep(0.05)
        daemon.send_signal(signal.SIGTERM)

        def children():
            return [int(one.name) for one in path.iterdir() if one.is_dir()]

        before = len(children())
        wait_for("the children", lambda: len(children()) == 80)
        check(daemon.wait() == 0, "end")
        host.groups += [f"{group}/{pid}" for pid in children()]
        left = [pid for pid in children() + [parent.pid for parent in parents] if marked(pid)]
        print(f"    {before} children when it was told to end, 80 in the end, {len(left)} marked")
        check(before < 80 and not left, f"{left} are marked")


def control_born():
    """nobody looks for children that were forked meanwhile: they keep their marks"""
    def act(host):
        daemon, pids = forked_while_undone(host, lambda *what: test_daemon(*what, "_ROSTER", 2))
        host.ctl("unmerge", host.groups[0], expect=1)  # nobody is left to be undone
        left = sum(marked(pid) > 0 for pid in pids())
        if left > 0 and daemon.poll() is None:
            raise Noticed(f"{left} children are marked")
    until_noticed("bornctl", act, attempts=10)


def route_changed():
    """a reload that asks for another route: what the old one did is undone, and the new one is taken"""
    def route():
        return [one["route"] for one in host.call("GetStats")["cgroups"]]

    with merged("route") as (host, (group,), (load,), before, daemon):
        host.configure(conf(group) + "Route=zero\n")
        host.ctl("reload")
        wait_for("unmarked", lambda: load.marked() == 0)
        host.passes(3)
        check(route() == ["zero"] and load.marked() == 0 and load.merged() == 0, f"{route()}, {load.merged()} pages")
        host.configure(conf(group))
        host.ctl("reload")
        check(host.ctl("reload") is not None and route() == ["advise"], route())
        host.converge(load)
        check(load.intact() and host.stop(daemon) == 0, "end")


def other_domain_after_restart():
    """a cgroup is of a domain of its own for the next daemon, which cannot call its processes: nothing is merged by KSM
    until it can, as they would be among it"""
    with merged("domains", groups=2) as (host, (a, b), (one, two), before, daemon):
        check(host.stop(daemon) == 0 and two.marked() > 0, "nothing was left marked")
        for pid in two.pids:
            os.kill(pid, signal.SIGSTOP)
        daemon = host.daemon(host.configure(conf(a) + f"[Cgroup {b}]\nMerge=yes\n"))
        more = host.workload(a, mib=8, seed=7)
        wait_for("a pass that would merge", lambda: "merging waits" in host.ctl("status"))
        host.passes(2)
        check(more.merged() == 0 and two.marked() > 0, f"{more.merged()} pages were merged beside them")
        for pid in two.pids:
            os.kill(pid, signal.SIGCONT)
        wait_for("unmarked", lambda: two.marked() == 0)
        host.converge(more)
        check(not set(one.frames().values()) & set(two.frames().values()), "they share frames")
        check(two.merged() == 0 and all(load.intact() for load in (one, two, more)) and host.stop(daemon) == 0, "end")


# 2,000 pages that the other process has too; at SIGUSR1 it does what it was told.
DOES = """
import ctypes, signal, struct, sys
data = b''.join(i.to_bytes(8, 'big') * 512 for i in range(1, 2001))
prctl = ctypes.CDLL(None).prctl
def secrets(*_):
    print(prctl(4, 0), flush=True)  # PR_SET_DUMPABLE
def refuse(*_):
    # Whoever calls madvise is killed.
    code = b''.join(struct.pack('HBBI', *one) for one in
                    [(0x20, 0, 0, 0), (0x15, 0, 1, 28), (0x06, 0, 0, 0x80000000), (0x06, 0, 0, 0x7fff0000)])
    buffer = ctypes.create_string_buffer(code)
    program = struct.pack('HxxxxxxP', 4, ctypes.addressof(buffer))
    print(prctl(38, 1, 0, 0, 0) or prctl(22, 2, program), flush=True)
signal.signal(signal.SIGUSR1, globals()[sys.argv[1]])
print('ready', flush=True)
while True:
    signal.pause()
"""


@contextlib.contextmanager
def merged_that(host, group, does):
    """Processes of that cgroup that are merged, and do that when they are told to."""
    processes = [host.spawn(group, sys.executable, "-c", DOES, does, ready="ready") for _ in range(2)]
    daemon = host.daemon(host.configure(conf(group)))
    frames = Frames()
    wait_for("merged", lambda: frames.ksm([process.pid for process in processes])[0] > 3900)

    def tell():
        for process in processes:
            process.send_signal(signal.SIGUSR1)
            check(process.stdout.readline().strip() == "0", f"{does}: refused")
    yield processes, daemon, tell


def secrets_after_restart():
    """who begins to keep secrets while no daemon runs is undone by the next one"""
    with Host("secrets") as host:
        group = host.cgroup("a")
        with merged_that(host, group, "secrets") as (processes, daemon, tell):
            check(host.stop(daemon) == 0, "end")
            tell()
            check(all(marked(process.pid) for process in processes), "nothing was left marked")
            daemon = host.daemon(host.configure(conf(group)))
            wait_for("unmarked", lambda: not any(marked(process.pid) for process in processes), 20)
            check(host.stop(daemon) == 0, "end")


def refuses_for_good():
    """who cannot be undone any more is not forgotten: while it lives KSM merges for no other domain"""
    with Host("refuses") as host:
        a, b = host.cgroup("a"), host.cgroup("b")
        with merged_that(host, a, "refuse") as (processes, daemon, tell):
            load = host.workload(b, mib=8)
            tell()
            host.configure(f"MinimumAge=0\nScanInterval=1s\n[Cgroup {b}]\nMerge=yes\n")
            host.ctl("reload")
            wait_for("refused", lambda: "cannot be undone" in daemon.log())
            host.passes(3)
            check(load.merged() == 0 and "belongs to another domain" in host.ctl("status"),
                  f"{load.merged()} pages were merged beside it")
            for process in processes:
                process.kill()
                process.wait()
            host.converge(load)
            check(load.intact() and host.stop(daemon) == 0, "end")


if __name__ == "__main__":
    tests = [process_moved_out, section_removed, unmerge_command, unmerge_again, on_stop, reloaded_and_stopped, orphans,
             own_marks_stay, born_meanwhile, born_elsewhere, route_changed, other_domain_after_restart,
             secrets_after_restart, refuses_for_good]
    run_tests(*tests, *([control_born] if sys.argv[1:] else []))
