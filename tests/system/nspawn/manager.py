# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the programs that run inside the booted root (see boot) share: the service manager, asked by its own tools."""
import pathlib
import subprocess
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
from harness import check

SERVICE, SOCKET = "ksmd-user.service", "ksmd-user.socket"


def run(*command, expect=0):
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    check(expect is None or result.returncode == expect, f"{command}: exit {result.returncode}: {result.stdout}")
    return result.stdout


def show(unit, name):
    return run("systemctl", "show", "--value", "--property", name, unit).strip()


def main_pid(unit=SERVICE):
    return int(show(unit, "MainPID"))


def active(unit=SERVICE):
    return show(unit, "ActiveState") == "active"


def drop_in(unit, name, text):
    directory = pathlib.Path(f"/run/systemd/system/{unit}.d")
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{name}.conf").write_text(f"[Service]\n{text}\n")
    run("systemctl", "daemon-reload")


def run_tests(*tests):
    """Those named on the command line, or all."""
    for test in tests:
        if sys.argv[1:] and test.__name__[5:] not in sys.argv[1:]:
            continue
        before = time.monotonic()
        # What is tested is each restart, not how many of them systemd allows in a row.
        run("systemctl", "reset-failed")
        test()
        print(f"ok    {test.__name__[5:].replace('_', ' ')} ({time.monotonic() - before:.1f} s)", flush=True)
