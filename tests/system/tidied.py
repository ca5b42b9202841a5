#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Pools are put in order: what one process maps alone becomes its own again, and what lies side by side in processes but
apart in the pool is put together, unless it was written."""
import os
import random
import re
import signal
import subprocess
import sys
import time

from controls import TEST_DAEMON
from harness import KSMCTL, PAGE, Host, check, run_tests, wait_for
from remapped import (DAEMON, Noticed, Victim, converge, ended, entries, max_count, notice, pool_lines,
                      pooled, put_back_and_ended, section, started, unharmed, unmerge, until_noticed,
                      wait_for_plain, without_ksm)

LOOKS = 8  # TIDY_LOOKS_MIN


def pool_pages(daemon):
    """Pages of memory that the pools of the daemon take."""
    found = {}
    for fd in os.listdir(f"/proc/{daemon.pid}/fd"):
        try:
            if os.readlink(f"/proc/{daemon.pid}/fd/{fd}").removesuffix(" (deleted)").endswith("/pool"):
                seen = os.stat(f"/proc/{daemon.pid}/fd/{fd}")
                found[seen.st_dev, seen.st_ino] = seen.st_blocks * 512 // PAGE
        except OSError:
            pass
    return sum(found.values())


def pieces(victim):
    """Mappings that its memory is in."""
    low, high = victim.addresses[0], victim.addresses[0] + victim.pages * PAGE
    found = (tuple(int(x, 16) for x in line.split()[0].split("-")) for line in open(f"/proc/{victim.pid}/maps"))
    return sum(start < high and end > low for start, end in found)


def leave(victim):
    victim.process.stdin.close()
    victim.process.wait()


def alone():
    """of three that share, one ends and one writes everything anew: the third has its memory for itself again"""
    with Host("tidyalone") as host:
        group = host.cgroup("a")
        victims = [Victim(host, group, "--quiet") for _ in range(3)]
        before, before_pieces = started(*victims), pieces(victims[0])
        daemon = without_ksm(host, host.configure(DAEMON + section(group)))
        converge(host, *victims)
        one, two, three = victims
        check(pool_pages(daemon) >= one.mergeable, f"{pool_pages(daemon)} pages in the pool")
        one.order("watch")
        # Two who share go on sharing.
        leave(three)
        host.passes(LOOKS + 2)
        check(host.stats_of(group)["pool_pages_returned"] == 0 and len(one.frames(False) & two.frames(False)) >= one.mergeable,
              "put back what two share")
        two.order("rewrite")
        wait_for("all plain", lambda: host.passes() or not pool_lines(one.pid), 150)
        one.order("seen")
        host.passes(2)
        got = host.stats_of(group)
        print(f"    {got['pool_pages_returned']} pages given back, {pool_pages(daemon)} left in the pool; "
              f"{pieces(one)} mappings, {before_pieces} before")
        check(got["pool_pages_returned"] >= one.pages and got["pages_sharing"] == 0, f"{got}")
        check(pool_pages(daemon) == 0, f"{pool_pages(daemon)} pages left in the pool")
        check(pieces(one) <= before_pieces, "it is in pieces")
        check(pool_lines(two.pid), "what was written was put back")
        # It is looked at as ever: somebody comes who has the same.
        four = Victim(host, group, "--quiet")
        converge(host, one, four)
        check(len(one.frames(False) & four.frames(False)) >= one.mergeable, "not the same frames")
        one.order("calm")
        two.order("check")
        unmerge(host, group)
        wait_for_plain([v.pid for v in (one, two, four)])
        unharmed({v.pid: before.get(v.pid, started(v)[v.pid]) for v in (one, two, four)}, one, two, four)
        ended(host, daemon, one, two, four)


def written():
    """pages that were written, and pieces too short between them, stay where they are; what is beside them goes"""
    with Host("tidywritten") as host:
        group = host.cgroup("a")
        one, two = victims = [Victim(host, group, "--quiet") for _ in range(2)]
        daemon = host.daemon(host.configure(DAEMON + section(group)))
        converge(host, *victims)
        one.order("write")  # every 37th page of the first half
        one.order("watch")
        own = {page: e & (1 << 55) - 1 for (_, page), e in entries(one).items() if page % 37 == 0 and page < one.pages // 2}
        leave(two)
        wait_for("half of it plain", lambda: host.passes() or
                 host.stats_of(group)["pool_pages_returned"] >= one.pages // 2 - 64, 60)
        host.passes(LOOKS)
        one.order("seen")
        now = {page: e & (1 << 55) - 1 for (_, page), e in entries(one).items() if page in own}
        check(now == own, "a page that was written was copied")
        low, high = one.addresses[0], one.addresses[0] + one.pages // 2 * PAGE
        mapped = [tuple(int(x, 16) for x in line.split()[0].split("-")) for line in pool_lines(one.pid)]
        check(any(start <= low + 37 * PAGE < end for start, end in mapped), "nothing is left of the pool")
        check(sum(end - start for start, end in mapped if start >= high) == 0, f"left: {pool_lines(one.pid)}")
        one.order("calm")
        unmerge(host, group)
        wait_for_plain([one.pid])
        ended(host, daemon, one)


def apart_but_for_pinned(host, leave_out):
    """A page that is pinned, and written past the page tables; the pool's page that was there is somebody's who stands
    still, and so is mapped once. Goes on until something wrong is seen, or a second page of the pool is given back."""
    group = host.cgroup("a")
    one, two = victims = [Victim(host, group, "--quiet") for _ in range(2)]
    daemon = host.daemon(host.configure(DAEMON + section(group)), program=TEST_DAEMON,
                         environment={"KSMD_USER_TEST_LEAVE_OUT" + name: str(mask) for name, mask in leave_out.items()})
    converge(host, *victims)
    two.process.send_signal(signal.SIGSTOP)
    one.order("pin")
    return daemon, one, two


def pinned():
    """what is pinned, and was written, stays: even where the daemon takes it for what it merged, by the program"""
    for leave_out in ({}, {"_TIDY": 3}):
        with Host("tidypinned") as host:
            daemon, one, two = apart_but_for_pinned(host, leave_out)
            for _ in range(64 + 2 * LOOKS):  # that it stands still is seen by then (LOOK_PASSES)
                host.ctl("scan")
                one.order("receive")
            check(host.stats_of(host.groups[0])["pool_pages_returned"] == 0, "pages were put back")
            two.process.send_signal(signal.SIGCONT)
            one.order("unpin")
            two.order("check")


def control_pinned():
    """what was written is put back by the daemon that does not look, and the program that does not: a buffer is elsewhere"""
    def act(host):
        daemon, one, two = apart_but_for_pinned(host, {"_TIDY": 3, "_REMAP": 1 << 10})
        while daemon.poll() is None:
            host.passes()
            notice(one, "receive")
    until_noticed("tidyctlpinned", act)


def killed():
    """killed while it puts back: a part is plain and a part the pool's, and the next daemon goes on"""
    with Host("tidykilled") as host:
        group = host.cgroup("a")
        one, two = victims = [Victim(host, group, "--quiet", mib=16) for _ in range(2)]
        before, before_pieces = started(one), pieces(one)
        config = host.configure(DAEMON + section(group))
        daemon = host.daemon(config)
        converge(host, *victims)
        one.order("watch")
        leave(two)
        wait_for("a beginning", lambda: host.passes() or host.stats_of(group)["pool_pages_returned"] > 0, 60, interval=0)
        returned = host.stats_of(group)["pool_pages_returned"]
        subprocess.Popen([str(KSMCTL), "--socket", str(host.socket), "scan"], stdout=subprocess.DEVNULL,
                         stderr=subprocess.DEVNULL)
        time.sleep(random.uniform(0, 0.02))
        host.stop(daemon, signal.SIGKILL)
        left = len(one.frames(False))
        print(f"    killed after {returned} pages or more, {left} of {one.pages} were left")
        check(left > 0, "there was nothing left to be interrupted")
        one.order("seen")
        daemon = host.daemon(config)
        # What is about to be mapped by a program of the first one might look alone: for ten seconds nothing is done.
        wait_for("all plain", lambda: host.passes() or not pool_lines(one.pid), 150)
        one.order("seen")
        one.order("calm")
        print(f"    {pieces(one)} mappings, {before_pieces} before")
        unharmed(before, one)
        ended(host, daemon, one)


PIECE_PAGES = 16  # of remapped-victim's "even" and "odd"


def come_apart(host, *victims, between=lambda: None):
    """What they have in common comes in two parts, so that no piece lies beside its neighbour in the pool."""
    host.ctl("pause")
    for v in victims:
        v.order("even")
    host.ctl("resume")
    converge(host, *victims)
    between()
    # A page that is read too late alone would be too short a run.
    host.ctl("pause")
    for v in victims:
        v.order("odd")
    host.ctl("resume")
    victims[0].order("watch")


def share_all(*victims):
    frames = [v.frames(False) for v in victims]
    return all(len(one) == v.pages and one == frames[0] for one, v in zip(frames, victims))


def share_most(*victims):
    """But for a page here and there that was read later than those beside it, and is too short a run alone."""
    return len(set.intersection(*(v.frames(False) for v in victims))) >= victims[0].pages * 0.99


def apart():
    """what was merged piece by piece becomes one mapping in each process, of the same frames, none mapped more often"""
    with Host("tidyapart") as host:
        group = host.cgroup("a")
        victims = [Victim(host, group, "--quiet", "--unlike", mib=1) for _ in range(2)]
        before, counts = started(*victims), []
        daemon = host.daemon(host.configure("MaxPageSharing=2\n" + DAEMON + section(group)))
        come_apart(host, *victims, between=lambda: counts.extend(map(pieces, victims)))

        def are_one():
            host.passes()
            frames = set().union(*(v.frames(False) for v in victims))
            check(not frames or max_count(frames) <= 2, "a frame is mapped more often than MaxPageSharing= says")
            return share_all(*victims) and all(pieces(v) == len(pool_lines(v.pid)) == 1 for v in victims)
        wait_for("one mapping", are_one, 150)
        wait_for("no copy left", lambda: host.passes() or pool_pages(daemon) == victims[0].pages, 20)
        for v in victims:
            v.order("seen")
        got = host.stats_of(group)
        print(f"    of {counts} mappings one is left: {got['pool_pieces_joined']} joined in both together")
        in_all = victims[0].pages // PIECE_PAGES
        check(min(counts) >= in_all, f"it was not in pieces: {counts}")
        # Those that could not be mapped again at once are merged like new ones.
        check(got["pool_pieces_joined"] >= in_all, f"{counts} mappings before, {got}")
        check(got["pages_sharing"] == victims[0].pages, f"{got}")
        # What lies together stays so, and is written and put back as ever.
        host.passes(LOOKS)
        check(host.stats_of(group)["pool_pieces_joined"] == got["pool_pieces_joined"], "joined again")
        for v in victims:
            v.order("calm")
        victims[0].order("rewrite")
        put_back_and_ended(host, group, daemon, before, *victims)


def apart_written():
    """pieces in which a page was written stay as they are; the others are put together"""
    with Host("tidyapartwritten") as host:
        group = host.cgroup("a")
        one, two = victims = [Victim(host, group, "--quiet", "--unlike", mib=1) for _ in range(2)]
        before = started(*victims)
        daemon = host.daemon(host.configure(DAEMON + section(group)))
        low, half = one.addresses[0], one.addresses[0] + one.pages // 2 * PAGE
        touched = range(0, one.pages // 2, 37)  # in each even piece of the first half
        # The last of them ends its piece, which the one behind is odd to: from there on all can be one.
        free = touched[-1] + 1
        own, lines = {}, set()

        def write():
            one.order("write")
            own.update(written_frames())
            lines.update(line for line in pool_lines(one.pid) if int(line.split("-")[0], 16) < half)

        def written_frames():
            return {page: e & (1 << 55) - 1 for (_, page), e in entries(one).items() if page in touched}
        check(free % PIECE_PAGES == 0, "the test is wrong about its victim")
        come_apart(host, *victims, between=write)

        def is_one(victim):
            ends = (victim.addresses[0] + n * PAGE for n in (free, victim.pages))
            start = "-".join(f"{end:08x}" for end in ends)
            return any(line.startswith(start + " ") for line in pool_lines(victim.pid))
        wait_for("the rest joined", lambda: host.passes() or all(map(is_one, victims)), 150)
        host.passes(LOOKS)
        check(written_frames() == own, "a page that was written was copied")
        check(len(lines) == len(touched) and lines <= set(pool_lines(one.pid)),
              f"a piece with a written page was moved: {lines - set(pool_lines(one.pid))}")
        check(pooled(one)[0] == one.pages - len(touched), f"{pooled(one)[0]} pages are the pool's")
        for v in victims:
            v.order("seen")
            v.order("calm")
        put_back_and_ended(host, group, daemon, before, *victims)


def apart_chased():
    """one of them discards and writes pages all the while: what it has is right, and the rest is put together"""
    with Host("tidyapartchased") as host:
        group = host.cgroup("a")
        one, two = victims = [Victim(host, group, "--quiet", "--unlike", mib=4) for _ in range(2)]
        before = started(*victims)
        daemon = host.daemon(host.configure(DAEMON + section(group)))
        come_apart(host, *victims)
        two.order("calm")
        two.order("chase")  # the first half
        half = two.pages // 2

        def of_the_rest(victim):
            start = victim.addresses[0] + half * PAGE
            return sum(int(line.split()[0].split("-")[1], 16) > start for line in pool_lines(victim.pid))

        def joined():
            host.passes()
            for v in victims:
                v.order("seen")
            # At most 511 pages in a mapping, and what lies beside them may have begun in the other half.
            return all(of_the_rest(v) <= 4 for v in victims) and host.stats_of(group)["pool_pieces_joined"] > 0
        wait_for("the rest joined", joined, 150)
        host.passes(LOOKS)
        for v in victims:
            v.order("calm")
        print(f"    {host.stats_of(group)['pool_pieces_joined']} mappings joined; {[pieces(v) for v in victims]} are left")
        put_back_and_ended(host, group, daemon, before, *victims)


def waiting(victim):
    """Its own memory of which an absent page would be waited for (um)."""
    low, high, out = victim.addresses[0], victim.addresses[0] + victim.pages * PAGE, []
    for line in open(f"/proc/{victim.pid}/smaps"):
        words = line.split()
        if "-" in words[0]:
            start, end = (int(x, 16) for x in words[0].split("-"))
            own = words[-1] != "/pool" and start < high and end > low
        elif words[0] == "VmFlags:" and own and "um" in words:
            out.append(hex(start))
    return out


PLANNED, PLAIN = 0, 1  # TIDY_STEP_*


def apart_but_for(host, step, place, number, **environment):
    """Of three who share what lies apart the turn of one has come: its pages are about to be put back, or are plain and not yet
    mapped again. The daemon sends itself the signal. (daemon, the request that is under way, the victims, that one first,
    config)"""
    group = host.cgroup("a")
    victims = [Victim(host, group, "--quiet", "--unlike", mib=1) for _ in range(3)]
    config = host.configure(DAEMON + section(group))
    daemon = host.daemon(config, program=TEST_DAEMON,
                         environment={"KSMD_USER_TEST_JOIN": f"{step}:{place}:{int(number)}", **environment})
    come_apart(host, *victims)
    scan = None

    def has_come():
        nonlocal scan
        if daemon.poll() is not None or open(f"/proc/{daemon.pid}/stat").read().rpartition(")")[2].split()[0] == "T":
            return True
        if not scan or scan.poll() is not None:
            scan = subprocess.Popen([str(KSMCTL), "--socket", str(host.socket), "scan"], stdout=subprocess.DEVNULL,
                                    stderr=subprocess.DEVNULL)
        return False
    wait_for("the moment", has_come, 60, interval=0.005)
    turn = re.search("the turn of ([0-9]+) has come", daemon.log())
    check(turn, "the daemon did not come to it")
    victims.sort(key=lambda v: v.pid != int(turn[1]))
    left = pooled(victims[0])[0]
    check(step == PLANNED or left < victims[0].pages, f"it is not the moment: {left} of its pages are pooled")
    return daemon, scan, victims, config


def share_new(*victims):
    """They map the same, each in few pieces."""
    return share_most(*victims) and all(len(pool_lines(v.pid)) <= 3 for v in victims)


def apart_failed():
    """one of three writes, ends, executes another program or forks when its turn has come, the first or a later one: what
    it holds is right, the others are brought to an end, and no copy is left"""
    for what, step, place in (("write", PLANNED, 0), ("write", PLANNED, 1), ("write", PLAIN, 0), ("write", PLAIN, 1),
                              ("rewrite", PLAIN, 1), ("end", PLANNED, 1), ("end", PLAIN, 0), ("again", PLAIN, 1),
                              ("fork", PLANNED, 1), ("fork", PLAIN, 0), ("fork", PLAIN, 1)):
        with Host("tidyapartfailed") as host:
            daemon, scan, (one, *others), _ = apart_but_for(host, step, place, signal.SIGSTOP)
            if what == "end":
                leave(one)
            else:
                one.order(what)
                if what == "again":
                    one.read_ready()
            daemon.send_signal(signal.SIGCONT)
            scan.wait()
            alive = others if what == "end" else [one, *others]
            for v in alive:
                v.order("check")
                check(not waiting(v), f"what is its own waits for somebody: {waiting(v)}")
            if what == "fork":
                one.order("end")
            # What is written in one stays apart in all, where it was not put together just then.
            if what != "write":
                wait_for("the others in few pieces", lambda: host.passes() or share_new(*others), 60)

            # Short stretches beside what was written stay mapped.
            spare = 2 * PIECE_PAGES if what == "write" else 0

            def is_tidy():
                host.passes()
                frames = set().union(*(v.frames(False) for v in others))
                check(max_count(frames) <= 4, "a frame is mapped by more than there are")
                return pool_pages(daemon) <= others[0].pages + spare
            wait_for("no copy left", is_tidy, 60)
            # But for what was written, and what is too short beside it.
            if what in ("write", "fork"):
                wait_for("merged again", lambda: host.passes() or
                         len(one.frames(False) & others[0].frames(False)) >= one.pages - 2 * PIECE_PAGES, 60)
            print(f"    {what}, step {step}, place {place}: {[pooled(v)[0] for v in alive]} pages pooled in "
                  f"{[len(pool_lines(v.pid)) for v in alive]} mappings, {pool_pages(daemon)} in the pool")
            for v in alive:
                v.order("check")
            unmerge(host, host.groups[0])
            wait_for_plain([v.pid for v in alive])
            for v in alive:
                v.order("check")


def apart_killed_between():
    """killed when the pages of one of three, the first or a later one, are plain and not mapped yet: the next daemon goes on"""
    for place in (0, 1):
        with Host("tidyapartbetween") as host:
            daemon, _, victims, config = apart_but_for(host, PLAIN, place, signal.SIGKILL)
            daemon.wait()
            for v in victims:
                v.order("seen")
                v.order("check")
            daemon = host.daemon(config)
            wait_for("few pieces", lambda: host.passes() or share_new(*victims), 90)
            wait_for("no copy left", lambda: host.passes() or pool_pages(daemon) <= victims[0].pages, 60)
            for v in victims:
                v.order("seen")
                v.order("calm")
            unmerge(host, host.groups[0])
            wait_for_plain([v.pid for v in victims])
            for v in victims:
                v.order("check")


def control_apart_compare():
    """what is written between putting back and mapping is not compared: it is lost"""
    def act(host):
        daemon, scan, (one, *_), _ = apart_but_for(host, PLAIN, 1, signal.SIGSTOP,
                                                   KSMD_USER_TEST_LEAVE_OUT_REMAP=str(1 << 2))
        one.order("write")
        daemon.send_signal(signal.SIGCONT)
        scan.wait()
        notice(one, "check")
    # Now and then not everything is merged yet when the first of it is put together, and nothing of that is written.
    until_noticed("tidyapartctl", act, attempts=5)


def control_apart_beside():
    """what stays beside a run is let go of with it, which does nothing: who touches what it discarded there waits for ever"""
    def act(host):
        daemon, scan, (one, *_), _ = apart_but_for(host, PLANNED, 0, signal.SIGSTOP,
                                                   KSMD_USER_TEST_LEAVE_OUT_REMAP=str(1 << 15))
        one.order("write")
        daemon.send_signal(signal.SIGCONT)
        scan.wait()
        if waiting(one):
            raise Noticed(f"what is its own waits for somebody: {waiting(one)}")
    until_noticed("tidyapartctl", act, attempts=5)


def apart_killed():
    """killed while it puts together: contents stay, and the next daemon brings it to an end"""
    with Host("tidyapartkilled") as host:
        group = host.cgroup("a")
        victims = [Victim(host, group, "--quiet", "--unlike", mib=4) for _ in range(2)]
        before = started(*victims)
        config = host.configure(DAEMON + section(group))
        daemon = host.daemon(config)
        come_apart(host, *victims)
        wait_for("a beginning", lambda: host.passes() or host.stats_of(group)["pool_pieces_joined"] > 0, 60, interval=0)
        subprocess.Popen([str(KSMCTL), "--socket", str(host.socket), "scan"], stdout=subprocess.DEVNULL,
                         stderr=subprocess.DEVNULL)
        time.sleep(random.uniform(0, 0.05))
        host.stop(daemon, signal.SIGKILL)
        print(f"    killed with {[pieces(v) for v in victims]} mappings of {[pooled(v)[0] for v in victims]} pages")
        for v in victims:
            v.order("seen")
        daemon = host.daemon(config)
        # In runs of at most 511 pages, some of which the first one left half done.
        wait_for("few mappings", lambda: host.passes() or
                 (share_most(*victims) and all(pieces(v) <= 16 for v in victims)), 90)
        print(f"    {[pieces(v) for v in victims]} mappings")
        for v in victims:
            v.order("seen")
            v.order("calm")
        put_back_and_ended(host, group, daemon, before, *victims)


if __name__ == "__main__":
    run_tests(alone, written, pinned, killed, apart, apart_written, apart_chased, apart_failed, apart_killed,
              apart_killed_between,
              *([control_pinned, control_apart_compare, control_apart_beside] if sys.argv[1:] else []))
