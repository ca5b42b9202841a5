#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""One line "NAME<tab>ok|skip|fail<tab>REASON" for each test in meson's testlog.json."""
import json
import sys

KINDS = {"OK": "ok", "EXPECTEDFAIL": "ok", "SKIP": "skip"}
for line in open(sys.argv[1]):
    test = json.loads(line)
    out = (test.get("stdout") or "") + (test.get("stderr") or "")
    reason = next((l for l in out.splitlines() if "SKIP" in l), "").replace("\t", " ")
    print(test["name"], KINDS.get(test["result"], "fail"), reason, sep="\t")
