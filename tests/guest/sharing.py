#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a limit on sharing buys: how long the kernel takes to move a KSM page to the other node, by how often it is mapped
and by how many pieces each mapping was cut into (ksm-walk); and that the price we measure is of that order."""
import os
import pathlib
import subprocess
import sys

BUILD = pathlib.Path(os.environ.get("KSMD_USER_BUILD_DIR", "."))


def walk(sharers, pieces=1):
    """Nanoseconds of CPU time."""
    return int(subprocess.run([BUILD / "tests/guest/ksm-walk", str(sharers), str(pieces)], stdout=subprocess.PIPE,
                              check=True).stdout)


pathlib.Path("/sys/kernel/mm/ksm/max_page_sharing").write_text("1024")
few, some, many = walk(2), walk(256), walk(1024)
cut = walk(256, 1024)
each = (many - few) / 1022
piece = (cut - some) / (256 * 1024)
print(f"moving a KSM page mapped 2 times: {few / 1e3:.0f} us, 256: {some / 1e3:.0f} us, 1024: {many / 1e3:.0f} us")
print(f"256 mappings, each cut into 1024 pieces: {cut / 1e3:.0f} us: a piece costs 1/{each / piece:.0f} of a mapping"
      if piece > 0 else f"pieces cost nothing: {cut / 1e3:.0f} us")
# The bound is worth having: a walk grows with the sharers, about evenly, and with the pieces.
failed = not 1.5 < some / few or not 2 < many / some < 8 or not cut > 2 * some
sys.exit(failed)
