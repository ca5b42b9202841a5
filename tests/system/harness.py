# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the tests of the whole daemon share: cgroups, processes in them, a daemon with its own configuration and state
directory, its control socket, KSM's knobs, and the frames behind a process's pages (the only proof of anything).

A test is a program that ends with 0 (passed), 77 (skipped, the reason printed), 99 (somebody was harmed) or anything else. KSM
is one for the whole machine: every test takes the lock below and leaves the knobs as it found them."""
import contextlib
import fcntl
import json
import os
import pathlib
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time

import interface

PAGE = 4096
KSM = pathlib.Path("/sys/kernel/mm/ksm")
KNOBS = ["advisor_mode", "sleep_millisecs", "pages_to_scan", "smart_scan", "use_zero_pages", "max_page_sharing",
         "merge_across_nodes", "run"]
BUILD = pathlib.Path(os.environ.get("KSMD_USER_BUILD_DIR", "."))
DAEMON = pathlib.Path(os.environ.get("KSMD_USER_DAEMON", BUILD / "src/daemon/ksmd-user"))  # or one without a safeguard
KSMCTL = BUILD / "src/ctl/ksmctl"
PAGES = BUILD / "tests/bench-pages"
LOCK = pathlib.Path("/run/lock/ksmd-user-tests.ksm")
# KSM's knobs as the lock's holder found them. It is there while there is a holder, or when the last one was killed.
FOUND = pathlib.Path("/run/lock/ksmd-user-tests.found")
INTERFACE = interface.load()
# How much longer than on an idle machine everything may take.
PATIENCE = int(os.environ.get("KSMD_USER_TEST_PATIENCE", "1"))


NOTICED = 99  # an exit status: TEST_NOTICED in test.h


class Harmed(AssertionError):
    """A process was harmed, or could tell of us: no second run makes that good. A program that it ends, ends with NOTICED."""


def tell_and_end(kind, value, trace):
    sys.__excepthook__(kind, value, trace)
    if issubclass(kind, Harmed):
        sys.stdout.flush()
        os._exit(NOTICED)


sys.excepthook = tell_and_end


def skip(reason):
    print(f"SKIP: {reason}", flush=True)
    sys.exit(77)


def check(condition, message):
    if not condition:
        raise AssertionError(message)


def check_harmless(condition, message):
    if not condition:
        raise Harmed(message)


def wait_for(what, condition, seconds=30.0, interval=0.05):
    """Returns condition()'s first true value; fails naming what did not come: a text, or a function that makes one then."""
    seconds *= PATIENCE
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError(f"not within {seconds} s: {what() if callable(what) else what}")
        time.sleep(interval)


def run_tests(*tests):
    """Runs the functions, or those named on the command line; says how long each took. A function that skips ends only
    itself; all skipped is a skip."""
    unknown = set(sys.argv[1:]) - {t.__name__ for t in tests}
    check(not unknown, f"there is no such test: {unknown}")
    chosen, skipped = [t for t in tests if not sys.argv[1:] or t.__name__ in sys.argv[1:]], 0
    for test in chosen:
        begun = time.monotonic()
        print(f"--- {test.__name__}: {test.__doc__.splitlines()[0]}", flush=True)
        try:
            test()
        except SystemExit as end:
            if end.code != 77:
                raise
            skipped += 1
        print(f"    {time.monotonic() - begun:.1f} s", flush=True)
    sys.exit(77 if skipped == len(chosen) else 0)


def cgroup_root():
    for line in open("/proc/mounts"):
        fields = line.split()
        if fields[2] == "cgroup2":
            return pathlib.Path(fields[1])
    skip("no cgroup v2 hierarchy is mounted")


def knobs():
    return {name: (KSM / name).read_text().strip() for name in KNOBS if (KSM / name).exists()}


def put_back(found):
    """KSM's knobs, as far as that can be. While an advisor is on, pages_to_scan is its own."""
    def write(name, value):
        with contextlib.suppress(OSError):
            (KSM / name).write_text(value)
    now = knobs()
    changed = [name for name in found if now.get(name) != found[name] and name not in ("run", "advisor_mode")]
    if "advisor_mode" in found:
        write("advisor_mode", "none")
    for name in [name for name in found if name == "run"] + changed:
        write(name, found[name])
    if "advisor_mode" in found:
        write("advisor_mode", found["advisor_mode"].partition("[")[2].partition("]")[0])


def end_in_order(process):
    """On SIGTERM, which is how a test is told that it took too long, it ends as by an error, and leaves nothing behind."""
    def on_term(signum, frame):
        if os.getpid() != process:
            os._exit(128 + signum)
        sys.exit(128 + signum)
    signal.signal(signal.SIGTERM, on_term)


def cpu_nsec(pid):
    """CPU time of all threads of a process (or of a kernel thread), those that ended included."""
    return time.clock_gettime_ns(~pid << 3 | 2)  # clock_getcpuclockid(3): CPUCLOCK_SCHED of a process


NO_KSM = "mount -t tmpfs none /sys/kernel/mm"


def in_namespace(*setup):
    """A command prefix: in a mount namespace of its own, after what is set up there."""
    return ["unshare", "-m", "--propagation", "private", "sh", "-ec", " && ".join([*setup, 'exec "$@"']), "sh"]


def ksm_state():
    return " ".join(f"{file.name}={file.read_text().strip()}" for file in sorted(KSM.iterdir()) if file.is_file())


def ksmd_ticks():
    """CPU time of ksmd, in nanoseconds (schedstat) or clock ticks."""
    for entry in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (entry / "comm").read_text().strip() == "ksmd" and not os.path.exists(f"{entry}/exe/x"):
                try:
                    return int((entry / "schedstat").read_text().split()[0])
                except OSError:
                    fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
                    return int(fields[11]) + int(fields[12])
    raise AssertionError("no ksmd")


def nothing_shared(host):
    """Lets ksmd come by: what is unmerged or dead counts as shared until then. False: somebody else's pages are shared."""
    with host.knobs_set(run=1, sleep_millisecs=1):
        end = time.monotonic() + 3
        while (KSM / "pages_shared").read_text() != "0\n" and time.monotonic() < end:
            time.sleep(0.05)
        return (KSM / "pages_shared").read_text() == "0\n"


class Frames:
    """The frames behind a process's pages: pagemap and kpageflags."""
    KSM_FLAG, ZERO_FLAG = 1 << 21, 1 << 24

    def __init__(self):
        self.flags_fd = os.open("/proc/kpageflags", os.O_RDONLY)
        self.cache = {}

    def __del__(self):
        os.close(self.flags_fd)

    def flags(self, pfn):
        if pfn not in self.cache:
            self.cache[pfn] = struct.unpack("Q", os.pread(self.flags_fd, 8, pfn * 8))[0]
        return self.cache[pfn]

    def of(self, pid, first=0, last=1 << 64):
        """{page number: PFN} of every present anonymous page in private mappings between two addresses."""
        out = {}
        with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pagemap:
            for line in open(f"/proc/{pid}/maps"):
                fields = line.split()
                if fields[1][3] != "p" or (len(fields) > 5 and fields[5] in ("[vvar]", "[vdso]", "[vsyscall]")):
                    continue
                start, end = (int(x, 16) for x in fields[0].split("-"))
                start, end = max(start, first) // PAGE, min(end, last) // PAGE
                for base in range(start, end, 1 << 16):
                    n = min(end - base, 1 << 16)
                    data = os.pread(pagemap.fileno(), n * 8, base * 8)
                    for i, (entry,) in enumerate(struct.iter_unpack("Q", data)):
                        if entry >> 63 and not entry >> 61 & 1:
                            out[base + i] = entry & (1 << 55) - 1
        return out

    def ksm(self, pids):
        """(pages that map a KSM frame, distinct KSM frames) over the processes."""
        self.cache = {}
        mappings, frames = 0, set()
        for pid in pids:
            for pfn in self.of(pid).values():
                if self.flags(pfn) & self.KSM_FLAG:
                    mappings += 1
                    frames.add(pfn)
        return mappings, len(frames)


def smaps(pid):
    """[(first address, set of the flags of VmFlags, bytes of AnonHugePages)] of every mapping."""
    out = []
    for line in open(f"/proc/{pid}/smaps", errors="replace"):
        word = line.split(maxsplit=1)[0]
        if not word.endswith(":"):
            out.append([int(word.split("-")[0], 16), set(), 0])
        elif word == "AnonHugePages:":
            out[-1][2] = int(line.split()[1]) << 10
        elif word == "VmFlags:":
            out[-1][1] = set(line.split()[1:])
    return out


def marked(pid):
    """How many mappings of the process are offered to KSM."""
    return sum("mg" in flags for _, flags, _ in smaps(pid))


def mappings(pid):
    return len(smaps(pid))


class Obedient:
    """A process (a subclass's self.process) that obeys lines and answers each by one; it knows what its memory has to hold."""

    def ask(self, *words):
        """The words of its answer; none from one that is dead."""
        try:
            print(*words, file=self.process.stdin, flush=True)
        except BrokenPipeError:
            return []
        return self.process.stdout.readline().split()

    def order(self, *words, expect="ok"):
        """What it answers after the word that is expected. Whoever answers another, or not at all, was harmed."""
        answer = self.ask(*words)
        check_harmless(answer[:1] == [expect], f"process {self.process.pid}, {words}: {answer}, {self.process.poll()}")
        return answer[1:]

    def intact(self):
        """True; it raises where the memory is not what was written to it."""
        self.order("check")
        return True


class Workload(Obedient):
    """Processes of tests/bench/pages.c: known duplicates (of each other), known zero pages, contents they can check."""

    def __init__(self, process):
        self.process, self.pids, self.addresses, self.pages = process, [], [], 0
        for line in process.stdout:
            words = line.split()
            if words[0] == "ready":
                self.duplicate, self.zero = int(words[1]), int(words[2])
                break
            self.pids.append(int(words[1]))
            self.addresses.append(int(words[2], 16))
            self.pages = int(words[3]) // PAGE  # of each process
        else:
            raise AssertionError("the workload ended before it was ready")
        self.mergeable = self.duplicate * len(self.pids) if len(self.pids) > 1 else 0
        self.saveable = self.duplicate * (len(self.pids) - 1) + self.zero * len(self.pids)

    def marked(self):
        return sum(marked(pid) for pid in self.pids)

    def merged(self):
        """Pages of the known memory that map a KSM frame."""
        frames = Frames()
        return sum(bool(frames.flags(pfn) & frames.KSM_FLAG) for pfn in self.frames().values())

    def frames(self):
        """{(pid, page): PFN} of the known memory."""
        frames = Frames()
        return {(pid, page): pfn for pid, address in zip(self.pids, self.addresses)
                for page, pfn in frames.of(pid, address, address + self.pages * PAGE).items()}


class Varlink:
    def __init__(self, path, timeout=60):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(timeout)
        self.socket.connect(str(path))
        self.buffer = b""

    def send(self, method, parameters=None, **more):
        self.socket.sendall(json.dumps({"method": method, "parameters": parameters or {}, **more}).encode() + b"\0")

    def receive(self):
        while b"\0" not in self.buffer:
            data = self.socket.recv(65536)
            if not data:
                raise EOFError
            self.buffer += data
        message, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(message)

    def call(self, method, **parameters):
        self.send("org.ksmduser.Daemon." + method, parameters)
        reply = self.receive()
        parameters = reply.get("parameters", {})
        if "error" in reply:
            INTERFACE.check_error(reply["error"], parameters)
            raise RuntimeError(f"{reply['error']}: {parameters}")
        INTERFACE.check_reply(method, parameters)
        return parameters


def saved(*loads):
    """How many pages of the workloads have no frame of their own; a frame that is the zero page's is nobody's."""
    frames, seen = Frames(), [pfn for load in loads for pfn in load.frames().values()]
    own = {pfn for pfn in seen if not frames.flags(pfn) & Frames.ZERO_FLAG}
    return sum(load.pages * len(load.pids) for load in loads) - len(own)


def saveable(*loads):
    """Of workloads made from one seed: the duplicates are everybody's."""
    processes = sum(len(load.pids) for load in loads)
    return loads[0].duplicate * (processes - 1) + loads[0].zero * processes


class Host:
    """A with-block: the KSM lock, a scratch directory, cgroups, processes and daemons that are gone afterwards, and a
    check that KSM's knobs are as they were."""

    # Most tests are about other things than being held back, and should not take a minute for it.
    unlike_default = "CPUQuota=1000%\nCPUQuotaBusy=100%\nStopQuota=100%\n"

    def __init__(self, name):
        self.name = name

    def __enter__(self):
        if os.geteuid() != 0:
            skip("needs root")
        self.lock = LOCK.open("w")
        fcntl.flock(self.lock, fcntl.LOCK_EX)
        if not KSM.exists():
            skip("this kernel has no KSM")
        end_in_order(os.getpid())
        if FOUND.exists():
            print(f"the test before this one was killed: KSM's knobs are put back, {knobs()}", flush=True)
            put_back(json.loads(FOUND.read_text()))
        self.knobs = knobs()
        new = FOUND.with_suffix(".new")
        new.write_text(json.dumps(self.knobs))
        new.rename(FOUND)
        self.dir = pathlib.Path(tempfile.mkdtemp(prefix=f"ksmd-user-{self.name}."))
        self.root = cgroup_root()
        self.groups, self.processes, self.daemons, self.logs, self.workloads = [], [], [], [], []
        self.ksm_at_failure = None
        return self

    def __exit__(self, kind, value, trace):
        if kind not in (None, SystemExit):
            with contextlib.suppress(Exception):
                self.tell()
        for process in self.daemons + self.processes:
            with contextlib.suppress(OSError):
                process.kill()
            process.wait()
        # Leave the machine usable for the next test, whatever this one did: first of all, for there may be little time.
        after = knobs()
        if after != self.knobs:
            put_back(self.knobs)
        FOUND.unlink()
        try:
            self.remove_groups()
        finally:
            shutil.rmtree(self.dir, ignore_errors=True)
            self.lock.close()
        if kind is None:
            check(after == self.knobs, f"KSM's knobs were left changed: {self.knobs} -> {after}")

    def remove_groups(self):
        for group in reversed(self.groups):
            for pid in (self.root / group / "cgroup.procs").read_text().split() if (self.root / group).exists() else []:
                with contextlib.suppress(OSError):
                    os.kill(int(pid), signal.SIGKILL)
            wait_for("an empty cgroup", lambda g=group: self.remove(g), 10)

    def tell(self):
        """What somebody who reads of a failure on another machine wants to know."""
        print(f"load {os.getloadavg()}; KSM: {self.ksm_at_failure or ksm_state()}")
        for log in self.logs:
            print(f"{log.name}, its end:", *log.read_text(errors="replace").splitlines()[-100:], sep="\n")
        if any(daemon.poll() is None for daemon in self.daemons):
            print(self.ctl("status", expect=None), self.ctl("stats", expect=None), sep="\n")
            pids = [pid for load in self.workloads for pid in load.pids]
            for pid in pids[:8]:
                print(self.ctl("why", pid, expect=None))
        sys.stdout.flush()

    def remove(self, group):
        try:
            (self.root / group).rmdir()
        except FileNotFoundError:
            return True
        except OSError:
            return False
        return True

    def cgroup(self, name):
        """Makes a cgroup; returns its path relative to the root."""
        path = f"ksmd-user-test-{self.name}-{os.getpid()}-{name}"
        (self.root / path).mkdir()
        self.groups.append(path)
        return path

    def move(self, group, pid):
        (self.root / group / "cgroup.procs").write_text(str(pid))

    def spawn(self, group, *command, ready=None, environment=None, output=None, **options):
        """Starts a process inside the cgroup; waits for a line that begins with ready on its standard output. output: a
        file that takes what it says, errors too."""
        def enter():
            (self.root / group / "cgroup.procs").write_text("0")
        process = subprocess.Popen([str(c) for c in command], preexec_fn=enter if group else None,
                                   stdout=subprocess.PIPE if ready else output, text=True, env=environment,
                                   stderr=output, **options)
        self.processes.append(process)
        if ready:
            for line in process.stdout:
                if line.startswith(ready):
                    break
            else:
                raise AssertionError(f"{command[0]} ended without saying {ready!r}")
        return process

    def workload(self, group, processes=2, mib=16, duplicate=50, zero=0, run=8, seed=1, threads=1):
        arguments = ["--processes", processes, "--mib", mib, "--duplicate", duplicate, "--zero", zero, "--run", run,
                     "--seed", seed, "--threads", threads] + (["--cgroup", self.root / group] if group else [])
        process = subprocess.Popen([str(PAGES), *map(str, arguments)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                   text=True)
        self.processes.append(process)
        self.workloads.append(Workload(process))
        return self.workloads[-1]

    def end(self, workload):
        workload.process.stdin.close()
        workload.process.wait()

    @contextlib.contextmanager
    def knobs_set(self, **values):
        """KSM's knobs as an administrator would set them, and back."""
        before = knobs()
        try:
            for name, value in values.items():
                (KSM / name).write_text(str(value))
            yield knobs()
        except Exception:
            self.ksm_at_failure = ksm_state()  # before the knobs are back
            raise
        finally:
            put_back({name: before[name] for name in values})

    def configure(self, text, name="test.conf"):
        """Writes a configuration whose control socket is ours; text is what follows in the [Daemon] section."""
        path = self.dir / name
        if isinstance(text, str):
            text = text.encode()
        path.write_bytes(f"[Daemon]\nSocket={self.socket}\n{self.unlike_default}".encode() + text)
        return path

    @property
    def socket(self):
        return self.dir / "socket"

    def daemon(self, config, *arguments, wait=True, environment=None, program=DAEMON, command=(), **options):
        """Starts a daemon, by a command before it if there is one; what it logs can be read by its log(), without what is
        for us alone."""
        log = self.dir / f"daemon-{len(self.daemons)}.log"
        if "stderr" not in options:
            options["stderr"] = log.open("w")
            self.logs.append(log)
            environment = {"KSMD_USER_DEBUG": "1", "JOURNAL_STREAM": "log", **(environment or {})}
        process = subprocess.Popen([*command, str(program), "--config", str(config), *arguments],
                                   env={**os.environ, "RUNTIME_DIRECTORY": str(self.dir / "run"),
                                        **(environment or {})}, **options)
        self.daemons.append(process)
        process.log = lambda: "".join(line for line in log.open(errors="replace") if not line.startswith("<7>"))
        if wait:
            wait_for("the daemon's socket", lambda: process.poll() is not None or self.serving() == process.pid)
            check(process.poll() is None, f"the daemon ended with {process.returncode}")
        return process

    def refused(self, config, *arguments, environment=None, command=()):
        """Starts a daemon that must end by itself at once; returns (exit status, what it said)."""
        result = subprocess.run([*map(str, command), str(DAEMON), "--config", str(config), *arguments],
                                env={**os.environ, "RUNTIME_DIRECTORY": str(self.dir / "run"), **(environment or {})},
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=20)
        return result.returncode, result.stdout

    def passes(self, n=1, seconds=60):
        """Waits for whole passes, each begun after the call. One in which a process could not be called, which comes of
        a machine that is busy and may go on for some seconds, does not count, unless it is always so."""
        end = time.monotonic() + seconds * PATIENCE
        while n > 0:
            busy = self.stats()["merge_failures"]["busy"]
            self.ctl("scan")
            if self.stats()["merge_failures"]["busy"] == busy or time.monotonic() > end:
                n -= 1
            else:
                time.sleep(0.2)

    def converge(self, *workloads, share=0.99, passes=8):
        """Until the frames say that what is mergeable is merged."""
        for _ in range(passes):
            self.passes()
            short = [w for w in workloads if w.merged() < w.mergeable * share]
            if not short:
                return
        raise AssertionError(f"after {passes} passes merged {[w.merged() for w in workloads]} of "
                             f"{[w.mergeable for w in workloads]} pages: {self.stats()}")

    def once(self, config):
        """Runs --once; returns its statistics."""
        result = subprocess.run([str(DAEMON), "--config", str(config), "--once"], stdout=subprocess.PIPE, check=True,
                                env={**os.environ, "RUNTIME_DIRECTORY": str(self.dir / "run")})
        return json.loads(result.stdout)

    def serving(self):
        """The daemon that answers. One that was killed may still be listened for: the kernel takes its io_uring down
        some time after its death."""
        try:
            return self.call("GetStatus")["pid"]
        except (OSError, EOFError):
            return None

    def call(self, method, **parameters):
        return Varlink(self.socket).call(method, **parameters)

    def stats(self):
        return self.call("GetStats")["daemon"]

    def stats_of(self, group):
        return next(one for one in self.call("GetStats")["cgroups"] if one["path"] == group)

    def stop(self, daemon, how=signal.SIGTERM):
        daemon.send_signal(how)
        daemon.wait(30)
        check(how != signal.SIGKILL or daemon.returncode == -how, f"not killed, but ended with {daemon.returncode}")
        return daemon.returncode

    def ctl(self, *arguments, expect=0, environment=None):
        """Runs ksmctl; returns what it printed, what it complained of included."""
        result = subprocess.run([str(KSMCTL), "--socket", str(self.socket), *[str(a) for a in arguments]],
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
                                env={**os.environ, **(environment or {})})
        check(expect is None or result.returncode == expect,
              f"ksmctl {arguments}: exit {result.returncode}\n{result.stdout}")
        return result.stdout
