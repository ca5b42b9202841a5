#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""A test that is ended in its middle leaves the machine to the next one as it found it."""
import pathlib
import shutil
import signal
import subprocess
import sys
import time

from harness import BUILD, FOUND, KSM, Host, check, knobs, run_tests, skip, wait_for

KSM_SCANS = BUILD / "tests/kernel/kernel-ksm-scans"  # a test in C, which can hold where it has turned all knobs


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


def end_ksm_scans(how):
    """In its middle, which is when it has turned knobs; what of its own is left."""
    def directories():
        return set(pathlib.Path("/tmp").glob("ksm-scans.*"))
    before = directories()
    test = subprocess.Popen([str(KSM_SCANS), "--hold"], stdout=subprocess.DEVNULL)
    try:
        # The directory, as the knobs may be turned by somebody else while it waits for the lock.
        wait_for("knobs turned", lambda: test.poll() is not None or
                 directories() > before and int(knobs()["sleep_millisecs"]) >= 999999, 600, 0.005)
        if test.poll() == 77:
            skip("it skips itself here")
        check(test.poll() is None, f"it ended with {test.returncode}")
    finally:
        test.send_signal(how)
        test.wait()
    return test.returncode, directories() - before


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


def c_program():
    """SIGTERM and SIGINT: a test in C cleans up"""
    before = found()
    for how in (signal.SIGTERM, signal.SIGINT):
        check(end_ksm_scans(how) == (-how, set()), "something is left")
        check(found() == before, f"{found()}, were {before}")


def c_program_killed():
    """SIGKILL: the next one puts back what a test in C had turned, be it in Python or in C"""
    before = found()
    for next_one in (lambda: None, lambda: end_ksm_scans(signal.SIGTERM)):
        _, left = end_ksm_scans(signal.SIGKILL)
        next_one()
        check(found() == before, f"{found()}, were {before}")
        check(not FOUND.exists(), "left for ever")
        for path in left:
            shutil.rmtree(path)


if __name__ == "__main__":
    hold() if sys.argv[1:] == ["hold"] else run_tests(sigterm, sigkill, c_program, c_program_killed)
