# SPDX-License-Identifier: LGPL-2.1-or-later
"""Real redis-servers that were given the same insert stream, as tools/demo makes them."""
import contextlib
import csv
import ctypes
import hashlib
import json
import shutil
import socket
import subprocess
import time

from bench import check, harness, wait_for

KEYS = 150000   # about 100 MB in each server
PR_SET_MEMORY_MERGE = 67


def stream(keys):
    """SET commands; keys as redis-benchmark -r makes them, values of 512 bytes that are found nowhere else."""
    out = bytearray()
    for i in range(keys):
        value = hashlib.sha512(b"%d" % i).hexdigest() * 4
        out += b"*3\r\n$3\r\nSET\r\n$16\r\nkey:%012d\r\n$512\r\n%s\r\n" % (i, value.encode())
    return bytes(out)


class Redis:
    """N servers in a cgroup. ksm: offered to ksmd whole, by PR_SET_MEMORY_MERGE before they are executed."""

    def __init__(self, bench, group, servers=4, keys=KEYS, ksm=False):
        if not shutil.which("redis-server"):
            harness.skip("needs redis-server")
        self.bench, self.started = bench, time.monotonic()
        self.sockets = [bench.dir / f"redis{len(bench.processes)}.{i}" for i in range(servers)]
        command = ["redis-server", "--port", "0", "--save", "", "--appendonly", "no", "--daemonize", "no", "--dir",
                   bench.dir]
        if ksm:
            check(ctypes.CDLL(None, use_errno=True).prctl(PR_SET_MEMORY_MERGE, 1, 0, 0, 0) == 0, "PR_SET_MEMORY_MERGE")
        try:  # what is set here is inherited over fork and exec
            self.processes = [bench.spawn(group, *command, "--unixsocket", s, output=subprocess.DEVNULL)
                              for s in self.sockets]
        finally:
            if ksm:
                ctypes.CDLL(None).prctl(PR_SET_MEMORY_MERGE, 0, 0, 0, 0)
        self.pids = [process.pid for process in self.processes]
        data = stream(keys)
        for path in self.sockets:
            wait_for("a redis-server", lambda p=path: self.answers(p), 20)
            self.insert(path, data, keys)

    def wait_until_old(self, seconds):
        time.sleep(max(0, self.started + seconds - time.monotonic()))

    @staticmethod
    def answers(path):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as s:
            s.connect(str(path))
            s.sendall(b"PING\r\n")
            return s.recv(64).startswith(b"+PONG")

    @staticmethod
    def insert(path, data, keys):
        with socket.socket(socket.AF_UNIX) as s:
            s.connect(str(path))
            step, answered = 1 << 20, 0
            for at in range(0, len(data), step):
                s.sendall(data[at:at + step])
                with contextlib.suppress(BlockingIOError):
                    answered += len(s.recv(1 << 20, socket.MSG_DONTWAIT))
            while answered < keys * len(b"+OK\r\n"):
                got = s.recv(1 << 20)
                check(got, "the server hung up")
                answered += len(got)

    def saveable(self):
        """Pages that merging can save, as ksmctl estimate counts them: nothing is touched."""
        total = json.loads(subprocess.run([harness.KSMCTL, "estimate", "--json", *map(str, self.pids)], check=True,
                                          stdout=subprocess.PIPE).stdout)["total"]
        return total["duplicate"] + total["zero"]

    def load(self, kind, requests, server=0, keys=KEYS, clients=20, pipeline=16):
        """redis-benchmark's KIND ("get" or "set") on random keys: (requests a second, p99 in nanoseconds)."""
        command = ["redis-benchmark", "-s", self.sockets[server], "-t", kind, "-n", requests, "-r", keys, "-d", 512,
                   "-c", clients, "-P", pipeline, "--precision", 3, "--csv"]
        out = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, text=True, check=True).stdout
        header, row = list(csv.reader(out.splitlines()))[:2]
        row = dict(zip(header, row))
        return float(row["rps"]), float(row["p99_latency_ms"]) * 1e6

    def end(self):
        for process in self.processes:
            process.kill()
            process.wait()
