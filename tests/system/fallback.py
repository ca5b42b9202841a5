#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""What Debian 12's own kernel (6.1) lacks, refused on this one (old-kernel.c): nothing tells which pages were written, or where
pages are. Slower by design, the same is merged, counted and undone. tests/guest/fallback.py has the real kernel."""
import os
import subprocess

from harness import BUILD, PAGE, Host, check, knobs, run_tests, saveable, saved, wait_for

OLD = {"LD_PRELOAD": str(BUILD / "tests/system/old-kernel.so")}
LOAD = {"mib": 8, "duplicate": 40, "zero": 10, "run": 16}


def opted_in(group, merge="yes"):
    return f"ScanInterval=1s\nMinimumAge=0\nJudgement=no\n[Cgroup {group}]\nMerge={merge}\n"


def merges_and_undoes():
    """what is alike is merged, to the frame; what is written is found; what comes later joins; opting out undoes all of it"""
    with Host("fallback") as host:
        group = host.cgroup("a")
        load = host.workload(group, processes=2, **LOAD)
        before = saved(load)
        daemon = host.daemon(host.configure(opted_in(group)), environment=OLD)
        host.converge(load, passes=12)
        check(not any(host.call("Explain", pid=pid)["tracked"] for pid in load.pids), "tracked: nothing is tested here")
        print(f"    saved {saved(load)} of {saveable(load)} pages, {before} before")
        check(before == 0 and saveable(load) * 0.99 <= saved(load) <= saveable(load), "more or less is shared than is alike")
        check(load.intact(), "merging changed memory")
        stats = host.stats()
        check(abs(stats["bytes_saved"] - saved(load) * PAGE) <= 64 * PAGE,
              f"says {stats['bytes_saved']} bytes, frames say {saved(load) * PAGE}")

        # Nobody tells what was written: it is seen to have changed, and zero pages are given back again.
        load.order("zero")
        check(saved(load) <= saveable(load) - load.zero, "rewritten, but saved")
        wait_for("zero pages again", lambda: host.passes() or saved(load) >= saveable(load) * 0.99)

        late = host.workload(group, processes=1, **LOAD)
        late.mergeable = late.duplicate  # with the others'
        host.converge(load, late, passes=12)
        wait_for("its zero pages", lambda: host.passes() or saved(load, late) >= saveable(load, late) * 0.99)

        host.configure(opted_in(group, merge="no"))
        host.ctl("reload")
        wait_for("nothing marked", lambda: load.marked() + late.marked() == 0)
        check(load.merged() + late.merged() == 0, "opted out, but merged")
        check(load.intact() and late.intact(), "opting out changed memory")
        check(host.stop(daemon) == 0 and knobs() == host.knobs, f"{host.knobs} -> {knobs()}")


def says_what_is_missing():
    """doctor names each lack, and what follows, and calls none of them fatal"""
    said = subprocess.run([BUILD / "src/ctl/ksmctl", "doctor"], stdout=subprocess.PIPE, text=True, env={**os.environ, **OLD})
    check(said.returncode == 0, f"doctor: exit {said.returncode}\n{said.stdout}")
    lines = [" ".join(line.split()) for line in said.stdout.splitlines()]
    for name in ["PAGEMAP_SCAN", "tracking by PAGEMAP_SCAN and userfaultfd WP_ASYNC", "UFFDIO_MOVE"]:
        check(any(line.startswith(f"no {name}: ") for line in lines), f"doctor does not say that there is no {name}\n{said.stdout}")
    check(any(line.startswith("not possible: this kernel cannot move pages") for line in lines), f"route remap\n{said.stdout}")
    check(not any("MISSING" in line for line in lines), "doctor calls something missing that can be done without")


if __name__ == "__main__":
    run_tests(merges_and_undoes, says_what_is_missing)
