#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Pages that are written again and again are left alone, the rest stays merged; with the policy switched off (the control)
they are merged and broken for ever. What is counted is what the processes count for themselves. All of it with the
probes, and without them."""
import contextlib
import json
import pathlib
import re
import shutil
import subprocess

from harness import BUILD, Host, Obedient, check, run_tests, wait_for

VICTIM = BUILD / "tests/system/hot-victim"
MIB, HOT = 16, 20
HOT_PAGES = 2 * (MIB * 256 * HOT // 100)


class Victim(Obedient):
    def __init__(self, host, group, *options):
        self.process = host.spawn(None, VICTIM, "--mib", MIB, "--hot", HOT, "--cgroup", host.root / group, *options,
                                  stdin=subprocess.PIPE, ready="process")
        first = int(self.process.stdout.readline().split()[1])
        self.process.stdout.readline()
        self.pids = [first]
        self.pages = 2 * MIB * 256
        self.hot = HOT_PAGES
        self.cold = self.pages - self.hot

    def order(self, word):
        return [int(x) for x in super().order(word)]

    def write(self):
        """Writes the hot pages; how many of them were merged."""
        return self.order("write")[0]

    def merged(self):
        """(hot, cold) pages that are merged."""
        return self.order("count")


def start(host, options=(), daemon=""):
    group = host.cgroup("a")
    victim = Victim(host, group, *options)
    process = host.daemon(host.configure(f"MinimumAge=0\nScanInterval=1w\nBreakQuota=1000%\n{daemon}\n"
                                         f"[Cgroup {group}]\nMerge=yes\n"))
    for _ in range(8):
        host.passes()
        if sum(victim.merged()) >= victim.pages * 0.99:
            return victim, process
    raise AssertionError(f"{victim.merged()} of {victim.pages} pages merged: {host.stats()}")


def probed(host):
    return {probe["name"]: probe["way"] for probe in host.call("GetStatus")["probes"]}["faults"] != "none"


def until_hot_is_merged(host, victim, passes=12):
    for _ in range(passes):
        host.passes()
        if victim.merged()[0] >= victim.hot * 0.9:
            return True
    return False


def hot_pages_are_left_alone(options=(), daemon=""):
    with Host("judged") as host:
        victim, process = start(host, options, "PayBack=10min\n" + daemon)
        before, broken = host.stats()["cow_breaks"], []
        for round_ in range(8):
            broken.append(victim.write())
            if round_ == 0 and probed(host):
                counted = host.stats()["cow_breaks"] - before
                print(f"    {broken[0]} breaks provoked, {counted} counted")
                check(counted == broken[0], "not exact")
            host.passes(3)
        hot, cold = victim.merged()
        why = host.call("Explain", pid=victim.pids[0])
        stats = host.stats()
        print(f"    probes {probed(host)}: breaks in each round {broken}; merged after: hot {hot}, cold {cold} of "
              f"{victim.cold}; {why['judgement']}")
        check(broken[0] >= victim.hot * 0.95, "the hot pages were not merged at first")
        check(sum(broken[-4:]) / 4 * 10 <= broken[0], "breaks did not fall ten times")
        check(cold >= victim.cold * 0.95, "what does not change was taken apart, too")
        check(stats["pages_sharing"] >= victim.cold // 2 * 0.95, f"{stats['pages_sharing']} pages saved")
        check(why["judgement"]["pages_alone"] >= victim.hot / 2 * 0.9, "not said to be left alone")
        check(why["judgement"]["losses"] >= victim.hot / 2 * 0.9 and why["judgement"]["alone_nsec_max"] > 0, "no losses")
        check(stats["merge_failures"]["hot"] >= victim.hot * 0.9, f"{stats['merge_failures']}")
        check(stats["cow_breaks"] > 0, "no breaks are told")
        hashed = host.stats()["pages_hashed"]
        victim.write()
        host.passes(2)
        hashed = host.stats()["pages_hashed"] - hashed
        print(f"    {hashed} pages read after {victim.hot} more were written")
        check(hashed < victim.hot / 4, "what is left alone is read")
        victim.order("check")
        check(host.stop(process) == 0, "end")


def together():
    """hot pages side by side: breaks fall ten times, the rest stays merged"""
    hot_pages_are_left_alone()


def scattered():
    """the same with every fifth page hot"""
    hot_pages_are_left_alone(["--scatter"])


def without_probes():
    """the same with Probes=no: the census finds them"""
    hot_pages_are_left_alone(daemon="Probes=no\n")


def without_policy():
    """Judgement=no (the control): the same pages are merged and broken again and again"""
    with Host("unjudged") as host:
        victim, process = start(host, daemon="Judgement=no\n")
        broken = []
        for _ in range(5):
            broken.append(victim.write())
            check(until_hot_is_merged(host, victim), f"not merged again: {victim.merged()} of {victim.hot}")
        print(f"    breaks in each round {broken}, {host.stats()['cow_breaks']} told")
        check(min(broken) >= victim.hot * 0.8, "breaks fell without the policy")
        check(host.stats()["merge_failures"]["hot"] == 0, "left alone")
        victim.order("check")
        check(host.stop(process) == 0, "end")


def let_go():
    """what is written no more is merged again when its time is over; Judgement=no by reload lets go at once"""
    with Host("letgo") as host:
        victim, process = start(host, daemon="PayBack=1h\n")
        victim.write()
        host.passes(2)
        wait_for("hot pages to be left alone", lambda: host.passes() or
                 host.stats()["merge_failures"]["hot"] >= victim.hot * 0.9, 20)
        check(not until_hot_is_merged(host, victim, 3), "merged though left alone")
        config = host.dir / "test.conf"
        config.write_text(config.read_text().replace("PayBack=1h", "Judgement=no"))
        host.ctl("reload")
        check(until_hot_is_merged(host, victim), f"not merged again after the switch: {victim.merged()}")
        config.write_text(config.read_text().replace("Judgement=no", "PayBack=5s"))
        host.ctl("reload")

        def left_alone():
            """What was merged before the switch is not judged; what is merged after it is."""
            until_hot_is_merged(host, victim)
            victim.write()
            host.passes(2)
            return host.stats()["merge_failures"]["hot"] >= victim.hot * 0.9
        wait_for("hot pages to be left alone", left_alone, 60)
        wait_for("them to be let go and merged", lambda: host.passes() or
                 sum(victim.merged()) >= victim.pages * 0.99, 40)
        victim.order("check")
        check(host.stop(process) == 0, "end")


def told_blocks(daemon):
    """How many blocks the daemon's probes know of."""
    def ask(what, number):
        return json.loads(subprocess.check_output(["bpftool", "-j", "map", what, "id", number]))
    said = ""
    for info in pathlib.Path(f"/proc/{daemon.pid}/fdinfo").iterdir():
        with contextlib.suppress(FileNotFoundError):
            said += info.read_text()
    maps = set(re.findall(r"^map_id:\s*(\d+)", said, re.M))
    return sum(len(ask("dump", number)) for number in maps if ask("show", number)["name"] == "blocks")


def broken_blocks_are_forgotten():
    """a block of which every page broke costs the probes nothing any more, nor whoever goes through all of them later"""
    with Host("forgotten") as host:
        victim, process = start(host, ["--hot", "50"], "PayBack=10min\n")
        if probed(host) and shutil.which("bpftool"):
            before = told_blocks(process)
            broken = victim.write()
            check(broken >= victim.pages * 0.49, f"{broken} pages broken")
            # Of 8 MiB in each of two processes, at any address, three blocks are whole.
            wait_for("broken blocks to be forgotten", lambda: told_blocks(process) <= before - 6, 10)
            print(f"    {before} blocks told, {told_blocks(process)} after {broken} of {victim.pages} pages broke")
        victim.order("check")
        check(host.stop(process) == 0, "end")


if __name__ == "__main__":
    run_tests(together, scattered, without_probes, without_policy, let_go, broken_blocks_are_forgotten)
