# SPDX-License-Identifier: LGPL-2.1-or-later
"""Negative controls: the whole daemon with one safeguard left out, until what it is there for goes wrong."""
import pathlib
import re
import signal
import subprocess
import sys
import traceback

from harness import BUILD, NOTICED, Host, check

TEST_DAEMON = BUILD / "tests/system/ksmd-user-test"
# Of the protocol of the remote calls, by name; the place is the number that KSMD_USER_TEST_END_AT takes.
STEPS = re.findall(r"^\s+REMOTE_STEP_(\w+),", (pathlib.Path(__file__).parents[2] / "src/target/remote-internal.h").read_text(),
                   re.MULTILINE)
GUARD_CALM = 1 << 13  # REMOTE_GUARD_CALM: without it the daemon stops whom it can, however scarce CPUs are


class Noticed(Exception):
    """What a control is there to see."""


def on_alarm(signum, frame):
    raise TimeoutError("nothing was noticed in time")


def until_noticed(name, act, attempts=1, seconds=100):
    """A daemon with a safeguard left out (daemon-test.c), until somebody notices: only that ends with NOTICED. Whatever else
    goes wrong proves nothing."""
    signal.signal(signal.SIGALRM, on_alarm)
    for _ in range(attempts):
        try:
            with Host(name) as host:
                signal.alarm(seconds)
                act(host)
        except Noticed as noticed:
            print(f"    noticed: {noticed}", flush=True)
            sys.exit(NOTICED)
        except Exception:
            traceback.print_exc()
        finally:
            signal.alarm(0)
    print("    nothing was noticed", flush=True)
    sys.exit(1)


def test_daemon(host, config, variable, mask):
    return host.daemon(config, program=TEST_DAEMON, environment={"KSMD_USER_TEST_LEAVE_OUT" + variable: str(mask)})


def ended_at(host, config, step, visit, seconds):
    """A daemon that ends itself when it comes to a step of the protocol: whether it did. If not it is killed where it is."""
    daemon = host.daemon(config, program=TEST_DAEMON, wait=False,
                         environment={"KSMD_USER_TEST_END_AT": f"{step}:{visit}", "KSMD_USER_TEST_LEAVE_OUT": str(GUARD_CALM)})
    came = True
    try:
        daemon.wait(seconds)
    except subprocess.TimeoutExpired:
        came = False
        daemon.kill()
        daemon.wait()
    check(daemon.returncode == -signal.SIGKILL, f"{STEPS[step]}: {daemon.returncode}")
    return came


def end_at_every_step(host, config, look, seconds, unmet, spare=0):
    """Daemons that end in the middle of a stop, at every step but unmet, those of stops of other kinds; look(step) after each.
    Where CPUs are scarce a step may not be come to at once, and spare of them never."""
    left = range(len(STEPS))
    for visit in (1, 0, 0):
        missed = []
        for step in left:
            if not ended_at(host, config, step, visit, seconds):
                missed.append(step)
            look(step)
        print(f"    not come to: {', '.join(STEPS[step] for step in missed)}", flush=True)
        left = [step for step in missed if STEPS[step] not in unmet]
        if len(left) <= spare:
            return
    check(False, f"never come to: {[STEPS[step] for step in left]}")
