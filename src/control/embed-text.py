#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""embed-text.py SYMBOL FILE: writes a C source that defines SYMBOL as the text of FILE, NUL-terminated."""
import sys

symbol, path = sys.argv[1:]
data = open(path, "rb").read() + b"\0"
print(f"extern const char {symbol}[];\nconst char {symbol}[] = {{")
for i in range(0, len(data), 24):
        print(" ".join(f"{byte}," for byte in data[i:i + 24]))
print("};")
