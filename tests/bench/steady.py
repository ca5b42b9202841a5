#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""A pass over quiet memory of which a share was written since the last one, in the CPU time of the daemon and in what
the writes cost the target more than the same writes elsewhere. Beside it, in the same run and on processes of the
same size: one whole scan of ksmd with the same share written before it, reading and hashing everything once, and a
pass without tracking.

    steady.py [--mib N] [--rounds N]

Three processes with distinct contents take the same writes: one opted in, one marked for ksmd, one left alone. The
daemon and ksmd never run at the same time. ksmd's scan is a whole one (smart_scan=0, no sleep); what the kernel's
default, smart_scan=1, makes of it in the long run is told beside it."""
import argparse

from bench import PAGE, Bench, Ksmd, check, cpu_nsec, main, median

CLUSTER = 64  # pages in a run of the clustered pattern: 256 KiB
KSM_SCANS = 3
SHARES = [0.001, 0.01, 0.1, 1]
QUOTA = "MinimumAge=0\nScanInterval=1w\nCPUQuota=100%\nCPUQuotaBusy=100%\nMetadataMax=100%\n"


class Steady:
    def __init__(self, bench, mib, rounds):
        self.bench, self.rounds = bench, rounds
        self.group = bench.cgroup("a")
        self.ours, self.plain, self.marked = (bench.writer(g, mib, seed=1 + i) for i, g in
                                              enumerate([self.group, None, None]))
        self.pages = self.ours.pages
        self.config = bench.configure(self.text("auto"))
        self.daemon = bench.daemon(self.config)
        self.varlink = bench.connect()

    def text(self, track):
        return f"{QUOTA}[Cgroup {self.group}]\nMerge=yes\nTrack={track}\n"

    def scan(self):
        """One pass; its CPU time."""
        before = cpu_nsec(self.daemon.pid)
        self.varlink.call("ScanNow")
        return cpu_nsec(self.daemon.pid) - before

    def rounds_of(self, count, run):
        """Medians of (CPU of a pass, CPU of the writes before it in the target, in the process left alone), and the
        pages read in a pass."""
        for _ in range(4):  # the daemon learns what the memory is like
            self.ours.write(count, run)
            self.scan()
        passes, tracked, plain, hashed = [], [], [], self.bench.stats()["pages_hashed"]
        for i in range(self.rounds):
            # Whoever comes second finds the CPU awake: so each is first every other time.
            for writer, out in [(self.plain, plain), (self.ours, tracked)][::1 if i % 2 else -1]:
                out.append(writer.write(count, run))
            passes.append(self.scan())
        hashed = self.bench.stats()["pages_hashed"] - hashed
        return median(passes), median(tracked), median(plain), hashed / self.rounds

    def ksmd_scan(self, ksmd, count, run):
        cpu = []
        for _ in range(KSM_SCANS):
            self.marked.write(count, run)
            cpu.append(ksmd.scan())
        return median(cpu)

    def measure(self, ksmd, share, run):
        count = int(self.pages * share) // run * run
        nsec, tracked, plain, hashed = self.rounds_of(count, run)
        scan, extra = self.ksmd_scan(ksmd, count, run), max(0, tracked - plain)
        row = {"share": share, "pattern": "random" if run == 1 else "clustered", "pages": self.pages,
               "pages_written": count, "pages_hashed": round(hashed), "pass_nsec": nsec,
               "target_extra_nsec": tracked - plain,
               "ksmd_scan_nsec": scan, "ratio": scan / nsec, "ratio_with_target": scan / (nsec + extra),
               "write_nsec_per_page": plain / count if count else None,
               "write_tracked_nsec_per_page": tracked / count if count else None}
        self.bench.record(**row)
        return row

    def untracked(self, share):
        """The same with Track=no."""
        self.bench.configure(self.text("no"))
        self.varlink.call("Reload")
        nsec, ours, plain, hashed = self.rounds_of(int(self.pages * share), 1)
        self.bench.record(track="no", share=share, pattern="random", pages=self.pages, pages_hashed=round(hashed),
                          pass_nsec=nsec, target_extra_nsec=ours - plain)
        return nsec + max(0, ours - plain)


def steady(bench, mib, rounds):
    run = Steady(bench, mib, rounds)
    for _ in range(4):  # where tracking is dear it begins when memory was seen to stand still
        run.varlink.call("ScanNow")
    bench.record(bare_read_and_hash_nsec=run.plain.floor() * run.pages, pages=run.pages)
    rows = {}
    with Ksmd(bench) as ksmd:
        run.marked.order("mark")
        ksmd.scan(3)
        for share in SHARES:
            rows[share] = run.measure(ksmd, share, 1)
        for share in SHARES[:3]:
            run.measure(ksmd, share, CLUSTER)
        run.measure(ksmd, 0, 1)
    with Ksmd(bench, smart_scan=1) as ksmd:
        ksmd.scan(9)  # what stays as it is comes to be skipped eight times of nine
        bench.record(ksmd_smart_scan_nsec=ksmd.scan(9) / 9, pages=run.pages)
    run.marked.order("unmark")
    rehash = [run.untracked(share) for share in (0.001, 1)][1]
    check(bench.stop(run.daemon) == 0, "the daemon's end")
    for share in SHARES[:3]:
        read, written = (rows[share][f"pages_{what}"] for what in ("hashed", "written"))
        check(read >= 0.95 * written, f"{share} written: {read} of {written} pages were read: no pass to be measured")
    everything = rows[1]["pass_nsec"] + max(0, rows[1]["target_extra_nsec"])
    bench.require("0.1 % written: ksmd's scan / our pass", rows[0.001]["ratio"], at_least=200)
    bench.require("1 % written: ksmd's scan / our pass and the target's extra faults", rows[0.01]["ratio_with_target"],
                  at_least=50)
    bench.require("all written: our pass and what the target pays / the same without tracking", everything / rehash,
                  at_most=1.05)  # no worse; two medians of the same thing differ by so much


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=8)
    args = parser.parse_args()
    check(args.mib << 20 >= 1000 * PAGE, "too little memory for a share of it")
    main(Bench("steady"), lambda b: steady(b, args.mib, args.rounds))
