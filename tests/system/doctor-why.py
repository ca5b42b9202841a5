#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the operator is told: `why` for every kind of process, `doctor`, exit status and words of every command."""
import json
import os
import signal
import subprocess
import sys

from harness import BUILD, KSM, KSMCTL, Host, check, run_tests, wait_for

VICTIM = BUILD / "tests/system/estimate-victim"
SLEEP = "import ctypes, time\nlibc = ctypes.CDLL(None)\n{}\nprint('ready', flush=True)\ntime.sleep(1000)"
TRACED = """import ctypes, os, time
pid = os.fork()
if pid == 0:
    ctypes.CDLL(None).ptrace(0, 0, 0, 0)
    time.sleep(1000)
time.sleep(0.2)
print('ready', pid, flush=True)
time.sleep(1000)
"""


def section(*groups, more="ScanInterval=1s", merge="yes"):
    return f"MinimumAge=0\n{more}\n" + "".join(f"[Cgroup {group}]\nDomain=one\nMerge={merge}\n" for group in groups)


def python(host, group, code):
    return host.spawn(group, sys.executable, "-c", SLEEP.format(code), ready="ready").pid


def run(*arguments):
    """(exit status, standard output, standard error) of ksmctl"""
    result = subprocess.run([str(KSMCTL), *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True)
    return result.returncode, result.stdout, result.stderr


def why():
    """why tells each kind of process apart, and how many of its pages are in what state"""
    with Host("why") as host:
        group, outside = host.cgroup("a"), host.cgroup("b")
        load = host.workload(group, mib=4, zero=10)
        odd = host.spawn(group, VICTIM, "odd", ready="ready").pid
        secret = python(host, group, "libc.prctl(4, 0)")
        stopped = python(host, group, "")
        other = python(host, outside, "")
        tracer = host.spawn(group, sys.executable, "-c", TRACED, ready="ready")
        traced = int(open(f"/proc/{tracer.pid}/task/{tracer.pid}/children").read())
        daemon = host.daemon(host.configure(section(group)))
        host.converge(load)
        os.kill(stopped, signal.SIGSTOP)
        host.passes(2)
        for name, pid, words in [
                ("merged", load.pids[0], ["managed", "pages present", "merged"]), ("odd", odd, ["locked", "dontdump"]),
                ("secret", secret, ["skipped: not-dumpable"]), ("traced", traced, ["waiting: traced"]),
                ("stopped", stopped, ["stopped"]), ("other cgroup", other, ["excluded: no section", outside]),
                ("kernel thread", 2, ["excluded: kernel-thread"]), ("init", 1, ["excluded"]),
                ("daemon", daemon.pid, ["excluded"])]:
            said = host.ctl("why", pid)
            state = next(line for line in said.splitlines() if line.startswith("state"))
            print(f"    {name:13} {state}")
            check(all(word in said for word in words), f"{name}: {words} not in\n{said}")
        reply = host.call("Explain", pid=load.pids[0])
        check(load.duplicate * 0.99 <= reply["pages_merged"] <= load.duplicate * 1.1 + 200, f"{reply} {load.duplicate}")
        check(reply["pages_zero"] >= load.zero * 0.99, f"{reply} {load.zero}")
        reply = host.call("Explain", pid=odd)
        check(all(reply["pages_skipped"].get(kind, 0) >= 256 for kind in ("locked", "dontdump")), f"{reply}")
        os.kill(stopped, signal.SIGCONT)
        gone = subprocess.Popen(["true"])
        gone.wait()
        said = host.ctl("why", gone.pid, expect=1)
        check(f"{gone.pid}" in said, said)
        host.configure(section(group, more="ScanInterval=1s\nMinimumAge=1h"))
        host.ctl("reload")
        young = python(host, group, "")
        wait_for("young", lambda: "young" in host.ctl("why", young, expect=None), 5)
        host.configure(section(group, merge="no"))
        host.ctl("reload")
        check("Merge=no" in host.ctl("why", load.pids[0]), "Merge=no")
        check(host.stop(daemon) == 0, "end")


def read_bytes(pid):
    return int(open(f"/proc/{pid}/io").readline().split()[1])


def asked_often():
    """whoever may look asks again and again: that has the mappings of a process read now and then, not each time"""
    with Host("often") as host:
        group = host.cgroup("a")
        odd = host.spawn(group, VICTIM, "odd", ready="ready").pid
        daemon = host.daemon(host.configure(section(group, more="ScanInterval=1h")))
        host.passes(1)
        smaps = len(open(f"/proc/{odd}/smaps").read())
        first = host.call("Explain", pid=odd)["pages_skipped"]
        check(first["locked"] >= 256, f"{first}")
        before = read_bytes(daemon.pid)
        check(all(host.call("Explain", pid=odd)["pages_skipped"] == first for _ in range(300)), "it changed")
        times = (read_bytes(daemon.pid) - before) / smaps
        print(f"    300 times: as much as {times:.0f} times its smaps")
        check(times < 150, f"read {times} times")
        check(host.stop(daemon) == 0, "end")


def exit_statuses():
    """0 done, 1 failed, 2 wrong usage, 3 no daemon; every complaint says about what"""
    with Host("exit") as host:
        commands = ["status", "stats", "targets", "why 1", "scan", "pause", "resume", "reload", "unmerge x"]
        for command in commands:
            status, _, said = run("--socket", host.socket, *command.split())
            check(status == 3 and str(host.socket) in said, f"{command}: {status} {said}")
        for command in ["", "nonsense", "why", "why x", "why 0", "why -- -1", "why 1 2", "unmerge", "status now",
                        "--nonsense status", "scan x"]:
            status, _, said = run("--socket", host.socket, *command.split())
            check(status == 2 and "ksmctl" in said, f"{command}: {status} {said}")
        status, _, said = run("--config", host.dir / "none.conf", "doctor")
        check(status == 1 and str(host.dir / "none.conf") in said, f"{status} {said}")
        for what, arguments in {"usage": ["--nonsense"], "argument": ["stray"]}.items():
            status, said = host.refused(host.configure(""), *arguments)
            check(status == 2, f"{what}: {status} {said}")
        daemon = host.daemon(host.configure(section("no-such-cgroup")))
        for command in commands[:3] + ["why 1", "scan", "pause", "resume", "reload"]:
            host.ctl(*command.split())
            status, text, said = run("--socket", host.socket, "--json", *command.split())
            check(status == 0 and not said, f"{command}: {status} {said}")
            if text:
                json.loads(text)
        host.ctl("pause")
        said = host.ctl("scan", expect=1)
        check("paused" in said and host.ctl("status").startswith("state"), said)
        said = host.ctl("unmerge", "no/such", expect=1)
        check("opted in" in said, said)
        check(host.stop(daemon) == 0, "end")


def doctor():
    """doctor names what works, the sections, and who shares KSM's merge space; needs no daemon, changes nothing"""
    with Host("doctor") as host:
        group = host.cgroup("a")
        foreign = host.workload(None, mib=1, seed=8)
        foreign.order("mark")
        before = host.knobs
        config = host.configure(section(group) + "[Cgroup gone/*]\nMerge=yes\n[Cgroup bad]\nMerge=often\n")
        status, text, said = run("--config", config, "doctor")
        print("    " + "\n    ".join(text.splitlines()[-8:]))
        check(status == 0 and not said, f"{status} {said}")
        check("malformed" in text and "matches no cgroup" in text and "route advise" in text, text)
        check(f"{config}:" in text, "the line of the malformed section is not named")
        status, text, said = run("--config", config, "--json", "doctor")
        report = json.loads(text)
        names = {process["pid"] for process in report["foreign"]}
        if os.path.exists("/proc/self/ksm_stat") and "ksm_mergeable" in open("/proc/self/ksm_stat").read():
            check(set(foreign.pids) <= names, f"{names} without {foreign.pids}")
        check(all(feature["follows"] for feature in report["features"]), f"{report['features']}")
        check(report["ksm"]["usable"], f"{report['ksm']}")
        dear = [not feature["works"] for feature in report["features"] if feature["name"].startswith("page faults")] == [True]
        tracks = [feature["works"] for feature in report["features"] if feature["name"].startswith("tracking by")] == [True]
        check((report["tracked_write_nsec"] > 0) == tracks, f"{report['tracked_write_nsec']}")
        check(report["break_nsec"] > 0 and dear == (report["break_nsec"] >= 10000), f"{report['break_nsec']} {dear}")
        moves = [feature["works"] for feature in report["features"] if feature["name"] == "UFFDIO_MOVE"] == [True]
        check(report["remap"]["usable"] == moves and report["remap"]["verdict"] in text, f"{report['remap']}")
        check({name: (KSM / name).read_text().strip() for name in before} == before, "doctor changed a knob")
        host.end(foreign)


if __name__ == "__main__":
    run_tests(why, asked_often, exit_statuses, doctor)
