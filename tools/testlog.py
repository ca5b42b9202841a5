#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""testlog.py LOG PREFIX: one line "NAME<tab>ok|skip|fail|error<tab>REASON" for each test in meson's testlog.json; the last
lines that a failed one said are left in a file, PREFIX and its name with _ for /. error: exit status 99, a failure that no
second run makes good. REASON: why it was skipped, or parts of it were."""
import json
import pathlib
import sys

KINDS = {"OK": "ok", "EXPECTEDFAIL": "ok", "SKIP": "skip", "ERROR": "error"}
LINES = 15

for line in open(sys.argv[1]):
    test = json.loads(line)
    out = (test.get("stdout") or "") + (test.get("stderr") or "")
    reason = "; ".join(l.strip() for l in out.splitlines() if l.lstrip().startswith("SKIP: ")).replace("\t", " ")
    kind = KINDS.get(test["result"], "fail")
    if kind in ("fail", "error"):
        said = [l[:300] for l in out.splitlines()[-LINES:]]
        pathlib.Path(sys.argv[2] + test["name"].replace("/", "_")).write_text("\n".join([test["result"], *said, ""]))
    print(test["name"], kind, reason, sep="\t")
