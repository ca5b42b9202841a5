# SPDX-License-Identifier: LGPL-2.1-or-later
"""Negative controls: the whole daemon with one safeguard left out, until what it is there for goes wrong."""
import signal
import sys
import traceback

from harness import BUILD, NOTICED, Host

TEST_DAEMON = BUILD / "tests/system/ksmd-user-test"


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
