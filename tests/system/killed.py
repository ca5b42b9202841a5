#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""A test that is ended in its middle leaves the machine to the next one as it found it."""
import signal
import subprocess
import sys
import time

from harness import FOUND, KSM, Host, check, run_tests


def hold():
    with Host("victim") as host, host.knobs_set(sleep_millisecs=77, pages_to_scan=77):
        if "advisor_mode" in host.knobs:
            (KSM / "advisor_mode").write_text("scan-time")  # as a daemon might have left it
        print("ready", host.dir, host.root / host.cgroup("a"), flush=True)
        time.sleep(60)


def found():
    with Host("found") as host:
        return host.knobs


def end(how):
    test = subprocess.Popen([sys.executable, __file__, "hold"], stdout=subprocess.PIPE, text=True)
    ready, *left = test.stdout.readline().split()
    check(ready == "ready", "it did not begin")
    test.send_signal(how)
    test.wait()
    return test.returncode, [path for path in left if subprocess.run(["test", "-e", path]).returncode == 0]


def sigterm():
    """SIGTERM: a test that takes too long cleans up"""
    before = found()
    check(end(signal.SIGTERM) == (128 + signal.SIGTERM, []), "something is left")
    check(found() == before, f"{found()}, were {before}")


def sigkill():
    """SIGKILL: the next one puts KSM's knobs back"""
    before = found()
    _, left = end(signal.SIGKILL)
    check(found() == before, f"{found()}, were {before}")
    check(not FOUND.exists(), "left for ever")
    for path in left:
        subprocess.run(["rmdir", path])


if __name__ == "__main__":
    hold() if sys.argv[1:] == ["hold"] else run_tests(sigterm, sigkill)
