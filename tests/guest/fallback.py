#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""The daemon on Debian 12's own kernel (6.1), where nothing tells which pages were written and nobody may mark memory
from outside: as its unit, under systemd, it merges all that can be merged, says what it lacks, and undoes it."""
import json
import os
import pathlib
import subprocess
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "system"))
from harness import PAGE, Host, check, knobs, run_tests, saveable, saved, wait_for

UNIT = "ksmd-user.service"
# A stop takes ten times longer here than on a machine, and holds fewer calls: so few ranges.
LOAD = {"mib": 4, "duplicate": 40, "zero": 10, "run": 64}
CONFIG = pathlib.Path("/etc/ksmd-user.conf.d/test.conf")


class Guest(Host):
    """The host is ours alone: the daemon is the installed one, started as its administrator would."""
    socket = pathlib.Path("/run/ksmd-user/org.ksmduser.Daemon")

    def converge(self, *loads):
        """By the clock, not by passes: while the machine below is busy, stops take so long that few are allowed."""
        def merged():
            self.passes(1)
            return all(load.merged() >= load.mergeable * 99 // 100 for load in loads)
        begun = time.monotonic()
        wait_for(f"{[load.mergeable for load in loads]} pages merged", merged, interval=1)
        print(f"    converged in {time.monotonic() - begun:.1f} s", flush=True)

    def opt_in(self, group, merge="yes"):
        CONFIG.parent.mkdir(exist_ok=True)
        CONFIG.write_text("[Daemon]\nScanInterval=2s\nMinimumAge=0\nCPUQuota=100%\nCPUQuotaBusy=100%\n"
                          f"[Cgroup {group}]\nMerge={merge}\n")

    def __exit__(self, kind, value, trace):
        if kind not in (None, SystemExit):
            for command in ["targets"], ["stats"]:
                print(self.ctl(*command, expect=None))
            print(systemctl("status", "--lines=40", UNIT, expect=None))
        systemctl("stop", UNIT)
        super().__exit__(kind, value, trace)


def systemctl(*arguments, expect=0):
    result = subprocess.run(["systemctl", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    check(expect is None or result.returncode == expect, f"{arguments}: {result.stdout}")
    return result.stdout


def merges_and_undoes():
    """what is alike is merged, to the frame; what comes later joins; opting out undoes all of it"""
    with Guest("fallback") as guest:
        group = guest.cgroup("a")
        load = guest.workload(group, processes=2, **LOAD)
        before = saved(load)
        guest.opt_in(group)
        systemctl("start", UNIT)
        guest.converge(load)
        wait_for("the zero pages", lambda: saved(load) >= saveable(load) * 99 // 100)
        cpu = guest.stats()["cpu_nsec"]
        print(f"    saved {saved(load)} of {saveable(load)} pages, {before} before; {cpu / 1e9:.1f} s CPU")
        check(before == 0 and saved(load) <= saveable(load), "more is shared than is alike")
        check(load.intact(), "merging changed memory")

        # The daemon counts by frames too.
        guest.passes(1)
        stats = json.loads(guest.ctl("stats", "--json"))["daemon"]
        check(abs(stats["bytes_saved"] - saved(load) * PAGE) <= 64 * PAGE,
              f"says {stats['bytes_saved']} bytes, frames say {saved(load) * PAGE}")
        status = json.loads(guest.ctl("status", "--json"))
        check(status["processes"] >= 2 and status["cgroups"] == 1, f"{status}")
        why = guest.ctl("why", load.pids[0])
        check("merged" in why and group in why, why)
        told = json.loads(guest.ctl("why", "--json", load.pids[0]))
        check(abs(told["pages_merged"] - load.duplicate) <= 64 and abs(told["pages_zero"] - load.zero) <= 64, f"{told}")

        # Passes that find nothing new; a pass that was asked for reads everything.
        cpu, hashed, n = stats["cpu_nsec"], stats["pages_hashed"], 3
        guest.passes(n)
        stats = json.loads(guest.ctl("stats", "--json"))["daemon"]
        print(f"    a quiet pass: {(stats['pages_hashed'] - hashed) // n} pages hashed, "
              f"{(stats['cpu_nsec'] - cpu) / n / 1e6:.0f} ms CPU")

        late = guest.workload(group, processes=1, **LOAD)
        late.mergeable = late.duplicate  # with the others'
        guest.converge(load, late)
        check(saved(load, late) >= saveable(load, late) * 99 // 100, f"saved {saved(load, late)}")

        guest.opt_in(group, merge="no")
        systemctl("reload", UNIT)
        wait_for("nothing marked", lambda: load.marked() + late.marked() == 0)
        check(load.merged() + late.merged() == 0, "opted out, but merged")
        # Linux 6.1 leaves the zero page where it put it; a write takes it away as ever.
        check(saved(load, late) <= load.zero * 3, f"opted out, but {saved(load, late)} pages are shared")
        check(load.intact() and late.intact(), "opting out changed memory")
        systemctl("stop", UNIT)
        check(knobs() == guest.knobs, f"{guest.knobs} -> {knobs()}")


def says_what_is_missing():
    """doctor names each lack of this kernel, and what follows, and calls none of them fatal"""
    said = subprocess.run(["ksmctl", "doctor"], stdout=subprocess.PIPE, text=True)
    check(said.returncode == 0, f"doctor: exit {said.returncode}\n{said.stdout}")
    lines = said.stdout.splitlines()
    for name in ["PAGEMAP_SCAN", "tracking by PAGEMAP_SCAN and userfaultfd WP_ASYNC",
                 "process_madvise(MADV_MERGEABLE)"]:
        at = [i for i, line in enumerate(lines) if line.split() == f"no {name}: absent".split()]
        check(len(at) == 1, f"doctor does not say that there is no {name}")
        print(f"    {name}: {lines[at[0] + 1].strip()}")
    # Where nothing else tells what is written, the probes do: 6.1 has them all but ksmd's tracepoints (6.7).
    probes = {line.split()[1].rstrip(":"): line.split()[0] for line in lines[lines.index("Probes"):lines.index("KSM")]
              if line.split() and line.split()[0] in ("ok", "no")}
    print(f"    probes: {probes}")
    built = "not part of this build" not in said.stdout
    check(not built or probes == {"roster": "ok", "faults": "ok", "flushes": "ok", "ksm": "no", "walks": "ok",
                                  "vmas": "no"}, f"{probes}")
    check(not any("MISSING" in line for line in lines), "doctor calls something missing that can be done without")


release = os.uname().release
if tuple(int(x) for x in release.split(".")[:2]) >= (6, 7):
    print(f"this is no old kernel: {release}")
    sys.exit(1)
run_tests(merges_and_undoes, says_what_is_missing)
