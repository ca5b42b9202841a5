#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a limit on sharing buys: how long the kernel takes to move a KSM page to the other node, by how often it is mapped
and by how many pieces each mapping was cut into (ksm-walk); and that the price we measure is of that order."""
import os
import pathlib
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "system"))
from harness import Host, check

BUILD = pathlib.Path(os.environ.get("KSMD_USER_BUILD_DIR", "."))


def walk(sharers, pieces=1):
    """Nanoseconds of CPU time."""
    return int(subprocess.run([BUILD / "tests/guest/ksm-walk", str(sharers), str(pieces)], stdout=subprocess.PIPE,
                              check=True).stdout)


pathlib.Path("/sys/kernel/mm/ksm/max_page_sharing").write_text("1024")
for _ in range(5):  # a host that is busy disturbs the one or other
    few, some, many = walk(2), walk(256), walk(1024)
    cut = walk(256, 1024)
    each = (many - few) / 1022
    piece = (cut - some) / (256 * 1024)
    print(f"moving a KSM page mapped 2 times: {few / 1e3:.0f} us, 256: {some / 1e3:.0f} us, 1024: {many / 1e3:.0f} us")
    print(f"256 mappings, each cut into 1024 pieces: {cut / 1e3:.0f} us: a piece costs 1/{each / piece:.0f} of a mapping"
          if piece > 0 else f"pieces cost nothing: {cut / 1e3:.0f} us")
    # The bound is worth having: a walk grows with the sharers, about evenly, and with the pieces.
    grows = 1.5 < some / few and 2 < many / some < 8 and cut > 2 * some
    if grows:
        break
check(grows, "a walk does not grow with the sharers, evenly, and with the pieces")

# What the daemon tells of them. Here the kernel lets a probe look at a function.
with Host("walks") as host:
    daemon = host.daemon(host.configure(""))
    way = {probe["name"]: probe["way"] for probe in host.call("GetStatus")["probes"]}["walks"]
    check(way == "btf", f"the probe is not there: {way}")
    before = host.stats()
    walk(1024)
    after = host.stats()
    walks, nsec = (after[name] - before[name] for name in ("rmap_walks", "rmap_walk_nsec"))
    longest = after["rmap_walk_nsec_max"]
    print(f"the daemon saw {walks} walks, {nsec / 1e3:.0f} us in all, the longest {longest / 1e3:.0f} us")
    # ksm-walk moves the page 14 times at least; each move walks twice, which is most of its time.
    check(walks >= 28 and longest <= after["rmap_walk_nsec"] and many / 20 < longest, "not seen")
    check("rmap walks" in host.ctl("stats"), "not shown")
    check(host.stop(daemon) == 0, "end")
