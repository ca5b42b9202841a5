# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the benchmarks of the whole daemon share: CPU clocks of other processes, ksmd driven one scan at a time, the
programs in C that hold memory, read it or count its frames, and the lines that come out.

A benchmark prints one JSON object a line: measurements, and for each requirement one with "required" in it. It ends
with 1 when a requirement is missed. `record` puts the machine in front and keeps the lines (tools/bench-report reads
them). KSM is one for the whole machine: the lock of the tests is held, knobs are put back, and nothing is left merged.

CPU times are the scheduler's, of all threads of a process, in nanoseconds. Everything that is compared is measured in
the same run, and by medians: the machine may be anybody's."""
import contextlib
import json
import os
import pathlib
import statistics
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "system"))
import harness  # noqa: E402
from harness import BUILD, KSM, PAGE, Host, check, cpu_nsec, wait_for  # noqa: E402, F401

median = statistics.median


def status_bytes(pid, field):
    for line in open(f"/proc/{pid}/status"):
        if line.startswith(field + ":"):
            return int(line.split()[1]) << 10
    raise AssertionError(f"no {field}")


def meminfo_bytes(field):
    for line in open("/proc/meminfo"):
        if line.startswith(field + ":"):
            return int(line.split()[1]) << 10
    raise AssertionError(f"no {field}")


class Bench(Host):
    """A with-block of a benchmark NAME: a Host whose KSM holds nothing before and after, and nothing of others'."""
    unlike_default = ""

    def __init__(self, name):
        super().__init__(f"bench-{name}")
        self.bench, self.missed = name, 0

    def __enter__(self):
        super().__enter__()
        if (others := others_with_ksm()):
            harness.skip(f"ksmd has other memory to scan: of {', '.join(others)}")
        self.unmerge()
        return self

    def __exit__(self, kind, value, trace):
        for process in self.daemons + self.processes:
            with contextlib.suppress(OSError):
                process.kill()
            process.wait()
        self.unmerge()
        super().__exit__(kind, value, trace)

    def daemon(self, config, *arguments, **options):
        """As the unit starts it."""
        return super().daemon(config, *arguments, **{"preexec_fn": lambda: os.nice(10), **options})

    def unmerge(self):
        """Takes apart what KSM holds of anybody's: a scan that has old pages to visit measures them too."""
        for value in ("2", self.knobs["run"] if self.knobs["run"] != "2" else "0"):
            (KSM / "run").write_text(value)

    def record(self, **fields):
        print(json.dumps({"bench": self.bench, **fields}), flush=True)

    def require(self, what, value, at_least=None, at_most=None):
        """A requirement: held or missed, it is told."""
        ok = value >= at_least if at_most is None else value <= at_most
        self.missed += not ok
        self.record(required=what, value=value, ok=ok,
                    **({"at_least": at_least} if at_most is None else {"at_most": at_most}))

    def connect(self, seconds=300):
        """A connection to the daemon for calls that may take long."""
        return harness.Varlink(self.socket, timeout=seconds)

    def writer(self, group, mib, **options):
        return Writer(self, group, mib, **options)


class Writer:
    """bench-writer: one process with MIB of pages of distinct contents that it writes on command."""

    def __init__(self, host, group, mib, whole=True, huge=False, seed=1):
        arguments = ["--mib", mib, "--seed", seed] + (["--word"] if not whole else []) + (["--huge"] if huge else [])
        if group:
            arguments += ["--cgroup", host.root / group]
        self.process = subprocess.Popen([BUILD / "tests/bench/bench-writer", *map(str, arguments)], text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        host.processes.append(self.process)
        word, pid, address = self.process.stdout.readline().split()
        check(word == "ready", "bench-writer")
        self.pid, self.address, self.pages = int(pid), int(address, 16), mib << 20 >> 12

    def begin(self, *words):
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        self.process.stdin.flush()

    def answer(self):
        words = self.process.stdout.readline().split()
        check(words and words[0] == "ok", f"bench-writer: {words}")
        return [int(word) for word in words[1:]]

    def order(self, *words):
        self.begin(*words)
        return self.answer()

    def write(self, pages, run=1):
        """Writes a word in each of so many pages, in runs of so many at random places, others each time; the CPU time
        it took the writer."""
        return self.order("write", pages, run)[0]

    def end(self):
        self.process.stdin.close()
        self.process.wait()

    def floor(self, at_once=1, plain=False):
        """CPU time a page of nothing but process_vm_readv and XXH3 over the memory, by so many processes at once, each
        with its part of it. plain: XXH3 for any CPU, not for the widest vectors of this one."""
        pages = self.pages // at_once
        readers = [subprocess.Popen([BUILD / "tests/bench/bench-floor", str(self.pid),
                                     hex(self.address + i * pages * PAGE), str(pages), *(["plain"] if plain else [])],
                                    stdout=subprocess.PIPE, text=True)
                   for i in range(at_once)]
        return statistics.mean(float(reader.communicate()[0]) for reader in readers)


class Cpu:
    """CPU time from now on, in nanoseconds: of a daemon (0 where there is none, or none yet), and of ksmd, which works for a
    daemon as well as alone."""

    def __init__(self, daemon=None):
        self.daemon, self.ksmd = daemon, ksmd_pid()
        self.begun = self.now()

    def now(self):
        return cpu_nsec(self.daemon) if self.daemon else 0, cpu_nsec(self.ksmd)

    def used(self):
        return tuple(now - begun for now, begun in zip(self.now(), self.begun))


class Ksmd:
    """The kernel's own scanner, run flat out for whole scans: a with-block, knobs put back."""

    def __init__(self, host, **knobs):
        self.host, self.knobs = host, {"sleep_millisecs": 0, "pages_to_scan": 1000, "smart_scan": 0, "run": 0, **knobs}
        self.pid = ksmd_pid()

    def __enter__(self):
        self.context = self.host.knobs_set(**{k: v for k, v in self.knobs.items() if (KSM / k).exists()})
        self.context.__enter__()
        return self

    def __exit__(self, *details):
        self.context.__exit__(*details)

    def scan(self, n=1):
        """Runs until the end of the n-th scan; CPU time. What is read beyond the end belongs to the next scan, and is
        missing there."""
        cpu, begun = cpu_nsec(self.pid), int((KSM / "full_scans").read_text())
        (KSM / "run").write_text("1")
        wait_for("a scan of ksmd", lambda: int((KSM / "full_scans").read_text()) >= begun + n, 300, 0.001)
        (KSM / "run").write_text("0")
        return cpu_nsec(self.pid) - cpu



def others_with_ksm():
    """Processes that offer memory to ksmd (QEMU does by default): it would be measured on that as well."""
    out = []
    for stat in pathlib.Path("/proc").glob("[0-9]*/ksm_stat"):
        with contextlib.suppress(OSError):
            if "ksm_mergeable: yes" in stat.read_text():
                out.append(f"{stat.parent.name} ({(stat.parent / 'comm').read_text().strip()})")
    return out


def ksmd_pid():
    for comm in pathlib.Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):
            # A kernel thread has no command line.
            if comm.read_text() == "ksmd\n" and not (comm.parent / "cmdline").read_bytes():
                return int(comm.parent.name)
    raise AssertionError("no ksmd")


def main(bench, function):
    """Runs function(Bench) to its end; exit status as every test's."""
    with bench:
        function(bench)
    sys.exit(1 if bench.missed else 0)
