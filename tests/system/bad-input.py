#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whatever is wrong around it, the daemon says what and stays up; what it cannot do without, it says before it ends."""
import contextlib
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

from harness import KSM, KSMCTL, NO_KSM, Host, check, in_namespace, knobs, run_tests, skip, wait_for

URING = pathlib.Path("/proc/sys/kernel/io_uring_disabled")
BROKEN = [b"", b"[", b"[]\n", b"=\n", b"\xff\xfe\0garbage\0", b"[Daemon\nScanInterval=1s\n", b"[Cgroup]\nMerge=yes\n",
          b"[Cgroup **]\nMerge=perhaps\n", b"[Cgroup **]\nMerge=yes\nDomain=\n[Cgroup **",
          b"[Daemon]\nScanInterval=-1s\n",
          b"[Cgroup **]\nMerge=yes\nRoute=\xc3\x28\n", b"A" * 100000, b"[Cgroup " + b"*" * 5000 + b"]\nMerge=yes\n",
          b"[Cgroup **]\nMerge=yes\nMinimumRun=99999999999999999999\n", b"\n" * 5000 + b"Merge=yes\n",
          b"[Cgroup **]\nMerge=yes\\\nMerge=yes\\\n"]


RUBBISH = [b"\0" * 50, b"{" * 1000 + b"\0", b"x" * 70000, b'{"method":',
           b'{"method":"org.ksmduser.Daemon.Explain","parameters":{"pid":-1}}\0',
           b'{"method":"org.ksmduser.Daemon.Monitor","parameters":{"interval":1},"more":true}\0']
# Allocates, then becomes another program or forks: argument 1 is how long it lives.
RESTLESS = """
import os, sys, time
data = bytearray(b"twin" * 262144)
if len(sys.argv) > 1:
    os.execv(sys.executable, [sys.executable, "-c",
             "x = bytearray(b'twin' * 262144); import time; time.sleep(%s)" % sys.argv[1]])
pid = os.fork()
time.sleep(0.05)
if pid: os.waitpid(pid, 0)
"""
NAMED = """
import ctypes, sys, time
ctypes.CDLL(None).prctl(15, bytes.fromhex(sys.argv[1]))
print('ready', flush=True)
time.sleep(99)
"""


def section(*groups, more="ScanInterval=200ms"):
    return f"MinimumAge=0\n{more}\n" + "".join(f"[Cgroup {group}]\nDomain=one\nMerge=yes\n" for group in groups)


def malformed_configurations():
    """malformed files at a start and at a reload: told with file and line, nothing merged by accident, no end"""
    with Host("conf") as host:
        group = host.cgroup("a")
        load = host.workload(group, mib=2)
        for text in BROKEN:
            config = host.configure(text)
            status, said = host.refused(config, "--check-config")
            check(status in (0, 1) and (status == 0 or f"{config}:" in said), f"{text[:60]}: {status} {said[:300]}")
            daemon = host.daemon(config)
            host.passes()
            check(load.marked() == 0, f"{text[:60]} opted something in")
            check(host.stop(daemon) == 0, f"{text[:60]}")
        status, said = host.refused(config, "--check-config", "--once")
        check(status == 2 and "exclude each other" in said, f"{status} {said[:300]}")
        daemon = host.daemon(host.configure(section(group)))
        host.converge(load)
        for n, text in enumerate(BROKEN):
            config = host.configure(text)
            if n % 2:
                daemon.send_signal(signal.SIGHUP)
            else:
                host.ctl("reload")
            host.passes()
            wait_for(f"{text[:60]}: nothing is opted in", lambda: load.marked() == 0, 5)
        # A file that cannot be read leaves the old configuration in force, and what was wrong with it.
        config = host.configure(section(group) + "[Nonsense]\n")
        host.ctl("reload")
        host.converge(load)
        config.unlink()
        said = host.ctl("reload", expect=1)
        check("the old one stands" in said, said)
        said = host.ctl("status")
        check("[Nonsense]" in said and f"the old one stands: {config}" in said, said)
        daemon.send_signal(signal.SIGHUP)
        host.passes(2)
        check(load.merged() >= load.mergeable * 0.99 and str(config) in daemon.log(), f"{daemon.log()[-300:]}")
        check(host.stop(daemon) == 0 and load.intact(), "end")
        status, said = host.refused(config)
        check(status == 1 and str(config) in said, f"a start without its file: {status} {said}")


def hostile_clients():
    """a thousand clients that send rubbish, too much, half a message, or nothing; good ones are answered in time"""
    with Host("clients") as host:
        group = host.cgroup("a")
        load = host.workload(group, mib=4)
        daemon = host.daemon(host.configure(section(group)))
        end = time.monotonic() + 8
        counts = {"hostile": 0, "answered": 0, "turned away": 0}
        slowest = 0.0

        def storm(seed):
            dice = random.Random(seed)
            held = []
            while time.monotonic() < end:
                with contextlib.suppress(OSError):
                    s = socket.socket(socket.AF_UNIX)
                    s.settimeout(0.2)
                    s.connect(str(host.socket))
                    counts["hostile"] += 1
                    s.send(dice.choice([dice.randbytes(200), *RUBBISH]))
                    held.append(s)
                if len(held) > 6:
                    held.pop(dice.randrange(len(held))).close()
                time.sleep(0.003)
        threads = [threading.Thread(target=storm, args=(n,)) for n in range(4)]
        before = len(os.listdir(f"/proc/{daemon.pid}/fd"))
        for thread in threads:
            thread.start()
        while time.monotonic() < end:
            begun = time.monotonic()
            try:
                check(host.call("GetStatus")["pid"] == daemon.pid, "status")
                slowest = max(slowest, time.monotonic() - begun)
                counts["answered"] += 1
            except (OSError, EOFError):
                counts["turned away"] += 1
            time.sleep(0.02)
        for thread in threads:
            thread.join()
        print(f"    {counts}, slowest answer {slowest * 1000:.0f} ms")
        check(counts["hostile"] > 1000 and counts["answered"] > 50 and slowest < 2, f"{counts} {slowest}")
        wait_for("an answer afterwards", lambda: host.serving() == daemon.pid, 10)
        after = len(os.listdir(f"/proc/{daemon.pid}/fd"))
        check(after < before + 16, f"descriptors were left open: {before} before, {after} after")
        host.converge(load)
        check(load.intact() and host.stop(daemon) == 0, "end")


def everything_vanishes():
    """cgroups and processes that come, exec, fork and go at every moment"""
    with Host("vanish") as host:
        top = host.cgroup("top")
        steady = host.cgroup("steady")
        load = host.workload(steady, mib=4)
        daemon = host.daemon(host.configure(section(f"{top}/**", steady, more="ScanInterval=100ms")))
        end, storms = time.monotonic() + 20, [0] * 3

        def storm(n):
            dice = random.Random(n)
            while time.monotonic() < end:
                path = host.root / top / f"g{n}-{storms[n]}"
                path.mkdir()
                def enter():
                    (path / "cgroup.procs").write_text("0")
                arguments = [str(dice.choice([0.05, 0.3]))] if dice.random() < 0.5 else []
                children = [subprocess.Popen([sys.executable, "-c", RESTLESS, *arguments], preexec_fn=enter)
                            for _ in range(2)]
                time.sleep(dice.random() * 0.3)
                for child in children:
                    child.kill()
                    child.wait()
                while True:
                    try:
                        path.rmdir()
                        break
                    except OSError:  # a grandchild that ends by itself
                        for pid in (path / "cgroup.procs").read_text().split():
                            with contextlib.suppress(OSError):
                                os.kill(int(pid), signal.SIGKILL)
                        time.sleep(0.005)
                storms[n] += 1
        threads = [threading.Thread(target=storm, args=(n,)) for n in range(len(storms))]
        for thread in threads:
            thread.start()
        while time.monotonic() < end:
            host.call("GetStats")
            for target in host.call("ListTargets")["targets"]:
                with contextlib.suppress(RuntimeError):  # gone meanwhile
                    host.call("Explain", pid=target["pid"])
            time.sleep(0.1)
        for thread in threads:
            thread.join()
        stats = host.stats()
        print(f"    {sum(storms)} cgroups, {stats['full_scans']} passes, {stats['stops']} stops, failures "
              f"{ {k: v for k, v in stats['merge_failures'].items() if v} }")
        check(daemon.poll() is None, f"the daemon ended with {daemon.returncode}")
        wait_for("only the steady ones", lambda: host.call("GetStatus")["processes"] == 2, 5)
        wait_for("only the steady cgroup", lambda: host.call("GetStatus")["cgroups"] == 1, 5)
        host.converge(load)
        check(sum(storms) > 30 and load.intact() and host.stop(daemon) == 0, "end")
        left = [f.name for f in (host.dir / "run").iterdir() if f.name[0].isdigit() and
                int(f.name.split(".")[0]) not in load.pids]
        check(len(left) <= 2, f"records of ended processes: {left}")


def hostile_names():
    """names of processes and cgroups are any bytes: what is shown is printable and valid JSON"""
    with Host("names") as host:
        top = host.cgroup("top")
        names = [b"bytes-\xff\xfe\x80", b"quote'\"\\`$(id)", b"line\nbreak", b"escape\x1b[31mred", b"blank tab\t.",
                 b"[x]*?"]
        root = os.fsencode(host.root / top)
        daemon = host.daemon(host.configure(section(f"{top}/**")))
        made = []
        try:
            pids = []
            for name in names:
                if b"\n" not in name:  # the kernel refuses that one
                    os.mkdir(root + b"/" + name)
                    made.append(root + b"/" + name)
                process = host.spawn(None, sys.executable, "-c", NAMED, name[:15].hex(), ready="ready")
                pids.append(process.pid)
                pathlib.Path(os.fsdecode(made[-1]), "cgroup.procs").write_text(str(process.pid))
            wait_for("noticed", lambda: host.call("GetStatus")["processes"] == len(names), 5)
            host.passes(2)
            listed = host.call("ListTargets")["targets"]
            check(len(listed) == len(names), f"{listed}")
            for command in [["targets"], ["stats"], ["status"]] + [["why", pid] for pid in pids]:
                text = subprocess.run([str(KSMCTL), "--socket", str(host.socket), *map(str, command)], check=True,
                                      stdout=subprocess.PIPE).stdout
                check(all(c == 10 or c >= 32 and c != 127 for c in text), f"{command}: control characters: {text}")
                text.decode()
            text = subprocess.run([str(KSMCTL), "--json", "estimate", top], check=True, stdout=subprocess.PIPE).stdout
            estimated = json.loads(text)
            check(all("path" in one for one in estimated["cgroups"]), f"{estimated['cgroups']}")
            check(all("cgroup" in one and "comm" in one for one in estimated["processes"]), f"{estimated['processes']}")
            config = host.configure(section(f"{top}/**"))
            text = subprocess.run([str(KSMCTL), "--config", str(config), "doctor"], check=True,
                                  stdout=subprocess.PIPE).stdout
            check(all(c == 10 or c >= 32 and c != 127 for c in text), f"doctor: {text}")
            host.configure(section() + f"[Cgroup {top}/**]\nDomain=%c\nMerge=yes\n")
            host.ctl("reload")
            wait_for("a domain each", lambda: host.call("GetStatus")["domains"] == len(made), 5)
            warnings = host.call("GetStatus")["warnings"]
            check(len(warnings) == len(made) - 1 or any("\\xff" in warning for warning in warnings), f"{warnings}")
            for group in host.call("GetStats")["cgroups"]:
                if "\\x" not in group["path"]:
                    host.call("Unmerge", cgroup=group["path"])
            check(host.stop(daemon) == 0, "end")
        finally:
            for process in host.processes:
                process.kill()
                process.wait()
            for path in made:
                wait_for("an empty cgroup", lambda p=path: not os.path.exists(p) or os.rmdir(p) is None, 5)


def ksm_absent_or_readonly():
    """without KSM, or with it read-only, the daemon is up, says so and marks nothing"""
    with Host("noksm") as host:
        group = host.cgroup("a")
        load = host.workload(group, mib=2)
        for what, setup in {"absent": NO_KSM,
                            "empty": "mount -t tmpfs none /sys/kernel/mm/ksm",
                            "read-only": f"mount --bind {KSM} {KSM} && mount -o remount,ro,bind {KSM}"}.items():
            config = host.configure(section(group))
            daemon = host.daemon(config, command=in_namespace(setup))
            host.passes(2)
            warnings = host.call("GetStatus")["warnings"]
            check(any("KSM cannot be used" in w for w in warnings), f"{what}: {warnings}")
            check("KSM cannot be used" in daemon.log(), f"{what}: {daemon.log()}")
            check(load.marked() == 0 and load.merged() == 0, f"{what}: marked")
            why = host.ctl("why", load.pids[0])
            check("no usable KSM" in why, f"{what}: {why}")
            doctor = subprocess.run([*in_namespace(setup), str(KSMCTL), "--config", str(config), "doctor"],
                                    stdout=subprocess.PIPE, text=True).stdout
            check("no KSM" in doctor or "cannot be changed" in doctor, f"{what}: {doctor}")
            check("merged by route advise" not in doctor, f"{what}: {doctor}")
            check(host.stop(daemon) == 0, what)
        check(knobs() == host.knobs, "knobs")


def knob_stuck():
    """a setting that could not be put back is put back when it can be, while the daemon is paused too"""
    with Host("stuck") as host, host.knobs_set(sleep_millisecs=77):
        knob, before = KSM / "sleep_millisecs", host.knobs["sleep_millisecs"]
        (host.dir / "run").mkdir()
        (host.dir / "run" / "ksm.found").write_text(f"sleep_millisecs {before} 77\n")  # a burst of another daemon's
        daemon = host.daemon(host.configure(""), command=in_namespace(f"mount --bind {knob} {knob}",
                                                                      f"mount -o remount,ro,bind {knob}"))
        host.ctl("pause")
        time.sleep(1.5)
        check(knob.read_text() == "77\n" and "cannot be put back" in daemon.log(), f"{knob.read_text()}, {daemon.log()}")
        subprocess.run(["nsenter", "-t", str(daemon.pid), "-m", "umount", str(knob)], check=True)
        wait_for("put back", lambda: knob.read_text().strip() == before, 5)
        check(host.stop(daemon) == 0, "end")


def capabilities_missing():
    """without root or a capability it needs it says which and ends; ksmctl without root says what it may not"""
    with Host("caps") as host:
        if not shutil.which("setpriv"):
            skip("needs setpriv")
        config = host.configure("")
        os.chmod(host.dir, 0o755)
        for what, command, expected in [
                ("nobody", ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"], "root"),
                ("ptrace", ["setpriv", "--bounding-set=-sys_ptrace", "--inh-caps=-sys_ptrace"], "CAP_SYS_PTRACE"),
                ("admin", ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin"], "CAP_SYS_ADMIN")]:
            status, said = host.refused(config, command=command)
            print(f"    {what}: exit {status}: {said.strip()[:150]}")
            check(status == 1 and expected in said, f"{what}: {status} {said}")
        daemon = host.daemon(config)
        os.chmod(host.socket, 0o666)
        nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
        for command, status in {"status": 0, "pause": 1, "reload": 1, "scan": 1}.items():
            result = subprocess.run([*nobody, str(KSMCTL), "--socket", str(host.socket), command], text=True,
                                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            check(result.returncode == status, f"{command} as nobody: {result.returncode} {result.stdout}")
            check(status == 0 or "only root" in result.stdout, result.stdout)
        check(host.stop(daemon) == 0, "end")


def uring_disabled():
    """where the administrator disabled io_uring the daemon says so and ends"""
    with Host("uring") as host:
        if not URING.exists():
            print("    this kernel cannot disable it")
            return
        before = URING.read_text()
        try:
            URING.write_text("2")
            status, said = host.refused(host.configure(""))
            doctor = subprocess.run([str(KSMCTL), "--config", str(host.configure("")), "doctor"],
                                    stdout=subprocess.PIPE, text=True)
        finally:
            URING.write_text(before)
        print(f"    exit {status}: {said.strip()}")
        check(status == 1 and "io_uring" in said, f"{status} {said}")
        check(doctor.returncode == 1 and "io_uring" in doctor.stdout, doctor.stdout)


def state_directory():
    """a state directory that is not there, not one, or not writable: said, by name"""
    with Host("state") as host:
        config = host.configure("")
        file = host.dir / "file"
        file.write_text("")
        for path in (file, file / "below", "/proc/1/nothing"):
            status, said = host.refused(config, environment={"RUNTIME_DIRECTORY": str(path)})
            check(status == 1 and str(path) in said, f"{path}: {status} {said}")
        ro = host.dir / "ro"
        ro.mkdir()
        status, said = host.refused(config, environment={"RUNTIME_DIRECTORY": str(ro)},
                                    command=in_namespace(f"mount -t tmpfs -o ro none {ro}"))
        check(status == 1 and str(ro) in said and "Read-only" in said, f"{status} {said}")
        (host.dir / "run").mkdir(exist_ok=True)
        for text in ("garbage\n", "run 0\n", "run 0 1\n" * 3, "\xff", "pages_to_scan 100 ../../etc 5\n"):
            (host.dir / "run" / "ksm.found").write_text(text, encoding="latin-1")
            daemon = host.daemon(config)
            check(host.stop(daemon) == 0 and knobs() == host.knobs, f"{text!r}: {knobs()}")
        for name in ("1.1", "99999999.1", "12.34.new", "0.0", "x"):
            (host.dir / "run" / name).write_text("garbage")
        daemon = host.daemon(config)
        host.passes()
        check(host.stop(daemon) == 0, "garbage among the records")


if __name__ == "__main__":
    run_tests(malformed_configurations, hostile_clients, everything_vanishes, hostile_names, ksm_absent_or_readonly,
              knob_stuck, capabilities_missing, uring_disabled, state_directory)
