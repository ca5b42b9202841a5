# SPDX-License-Identifier: LGPL-2.1-or-later
"""The interface file as a contract: parses a Varlink interface (https://varlink.org/Interface-Definition) and says where
parameters of a call, a reply or an error differ from it. As a program: checks the file, then that it finds what is wrong."""
import pathlib
import re
import sys

DOCUMENT = pathlib.Path(__file__).parents[2] / "docs/protocol.md"
FILE = pathlib.Path(__file__).parents[2] / "include/ksmd-user/org.ksmduser.Daemon.varlink"
TOKEN = re.compile(r"\s*(?:#[^\n]*\s*)*(->|[\[\]():,?]|[A-Za-z][A-Za-z0-9_.-]*|$)")
FIELD = re.compile(r"[A-Za-z](_?[A-Za-z0-9])*$")
BASE = {"bool": bool, "int": int, "float": (int, float), "string": str, "object": object}


class Interface:
    def __init__(self, text):
        self.text, self.at = text, 0
        self.types, self.methods, self.errors = {}, {}, {}
        self.used = set()
        assert self.take() == "interface"
        self.name = self.take()
        while (word := self.take()):
            name = self.take()
            assert re.match(r"[A-Z][A-Za-z0-9]*$", name), name
            table = {"type": self.types, "method": self.methods, "error": self.errors}[word]
            assert name not in table, f"{name} twice"
            table[name] = self.struct()
            if word == "method":
                assert self.take() == "->"
                table[name] = table[name], self.struct()
        assert not self.used - set(self.types), f"unknown types {self.used - set(self.types)}"
        assert not set(self.types) - self.used, f"unused types {set(self.types) - self.used}"

    def take(self):
        match = TOKEN.match(self.text, self.at)
        assert match, f"at {self.text[self.at:self.at + 40]!r}"
        self.at = match.end()
        return match.group(1)

    def peek(self):
        at, token = self.at, self.take()
        self.at = at
        return token

    def struct(self):
        """("struct", {field: type}) or ("enum", {word})"""
        assert self.take() == "("
        fields, words = {}, set()
        while self.peek() != ")":
            name = self.take()
            assert FIELD.match(name), f"not a field's name: {name}"
            assert name not in fields and name not in words, f"{name} twice"
            if self.peek() == ":":
                self.take()
                fields[name] = self.type()
            else:
                words.add(name)
            if self.peek() == ",":
                self.take()
        self.take()
        assert not (fields and words)
        return ("enum", words) if words else ("struct", fields)

    def type(self):
        token = self.peek()
        if token == "(":
            return self.struct()
        self.take()
        if token == "?":
            return "maybe", self.type()
        if token == "[":
            if self.take() == "]":
                return "array", self.type()
            assert self.take() == "]"  # [string]
            return "map", self.type()
        if token in BASE:
            return "base", token
        self.used.add(token)
        return "name", token

    def differs(self, type_, value, where):
        """What is wrong with the value, or None."""
        kind, of = type_
        if kind == "maybe":
            return None if value is None else self.differs(of, value, where)
        if kind == "name":
            return self.differs(self.types[of], value, where)
        if kind == "base":
            wrong = not isinstance(value, BASE[of]) or (of in ("int", "float") and isinstance(value, bool))
            return f"{where}: {value!r} is no {of}" if wrong else None
        if kind == "enum":
            return None if value in of else f"{where}: {value!r} is none of {sorted(of)}"
        if not isinstance(value, list if kind == "array" else dict):
            return f"{where}: {value!r} is no {kind}"
        if kind == "struct":
            if (extra := set(value) - set(of)):
                return f"{where}: unknown {sorted(extra)}"
            parts = [(name, t, value.get(name)) for name, t in of.items()]
        else:
            parts = [(key, of, v) for key, v in (value.items() if kind == "map" else enumerate(value))]
        return next((w for name, t, v in parts if (w := self.differs(t, v, f"{where}.{name}"))), None)

    def check_reply(self, method, parameters):
        assert not (wrong := self.differs(self.methods[method][1], parameters, method)), wrong
        assert not (new := self.document.unknown(self, self.methods[method][1], parameters, method)), f"not documented: {new}"

    def check_error(self, error, parameters):
        if error.startswith(self.name + "."):
            name = error[len(self.name) + 1:]
            assert not (wrong := self.differs(self.errors[name], parameters, name)), wrong


class Document:
    """What docs/protocol.md tells of: words in backquotes, below "## Fields"; and of which words it says what they mean, in the
    first column of a table or before a colon."""
    # Of these maps only what occurs is told; their words are named elsewhere.
    OPEN = {"Explain.pages_skipped"}

    def __init__(self, text):
        text = text.split("\n## Fields\n")[1]
        self.words = set(re.findall(r"`([a-z][a-z0-9_-]*)`", text))
        cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
        self.explained = {word for cell in cells for word in re.findall(r"`([a-z][a-z0-9_]*)`", cell)}

    def unknown(self, interface, type_, value, where):
        """Words of maps in a value that are not documented."""
        kind, of = type_
        if kind in ("maybe", "name"):
            return self.unknown(interface, interface.types[of] if kind == "name" else of, value, where)
        if value is None or kind in ("base", "enum"):
            return set()
        if kind == "array":
            return set().union(*(self.unknown(interface, of, v, where) for v in value))
        if kind == "struct":
            return set().union(*(self.unknown(interface, t, value[n], f"{where}.{n}") for n, t in of.items()))
        return set() if where in self.OPEN else {f"{where}.{word}" for word in value if word not in self.words}


def fields_of(interface):
    """All names of fields, parameters and words of enumerations."""
    out = set()

    def visit(type_):
        kind, of = type_
        if kind == "enum":
            out.update(of)
        elif kind == "struct":
            out.update(of)
            for t in of.values():
                visit(t)
        elif kind != "base" and kind != "name":
            visit(of)
    for type_ in (*interface.types.values(), *interface.errors.values()):
        visit(type_)
    for call, reply in interface.methods.values():
        visit(call), visit(reply)
    return out


def load():
    interface = Interface(FILE.read_text())
    interface.document = Document(DOCUMENT.read_text())
    return interface


def main():
    interface = load()
    methods = {"GetStatus", "GetStats", "ListTargets", "Explain", "ScanNow", "Pause", "Resume", "Unmerge", "Reload", "Monitor"}
    assert interface.name == "org.ksmduser.Daemon" and set(interface.methods) == methods
    assert interface.methods["Monitor"][1] == interface.methods["GetStats"][1]

    # The document tells of each field, and of nothing that is not there (but words of maps).
    fields, words = fields_of(interface), {"changed", "gone", "denied", "busy", "hot", "huge", "vma_budget", "short_run", "stack",
                                           "mapping", "metadata", "kernel"}
    assert not (fields - interface.document.words), f"not documented: {sorted(fields - interface.document.words)}"
    surplus = interface.document.explained - fields - words
    assert not surplus, f"documented, and not there: {sorted(surplus)}"
    map_of = ("struct", {"m": ("map", ("base", "int"))})
    assert interface.document.unknown(interface, map_of, {"m": {"hot": 1}}, "X") == set()
    assert interface.document.unknown(interface, map_of, {"m": {"hot": 1, "cold_feet": 1}}, "X") == {"X.m.cold_feet"}

    def wrong(method, parameters):
        return interface.differs(interface.methods[method][1], parameters, method)

    assert not wrong("ScanNow", {}) and wrong("ScanNow", {"pages": 1})
    assert not wrong("Unmerge", {"pages": 1})
    assert all(wrong("Unmerge", {"pages": bad}) for bad in (None, "1", 1.0, True, []))
    target = {"pid": 1, "name": "x", "cgroup": "", "domain": "d", "route": "advise", "merge": "yes", "state": "managed",
              "reason": None, "pages": 0, "pages_merged": 0}
    assert not wrong("ListTargets", {"targets": [target]})
    assert all(wrong("ListTargets", {"targets": [{**target, **bad}]}) for bad in
               ({"state": "lost"}, {"reason": 1}, {"name": None}, {"surplus": 1}))
    assert wrong("ListTargets", {"targets": [{k: v for k, v in target.items() if k != "pid"}]})
    for text in ("interface a.b\ntype T (x: Nowhere)", "interface a.b\nmethod M(dry-run: int) -> ()",
                 "interface a.b\nmethod M() -> (a: int, a: int)", "interface a.b\nmethod M() -> (a, b: int)"):
        try:
            Interface(text)
        except AssertionError:
            continue
        assert False, f"taken for an interface: {text}"


if __name__ == "__main__":
    sys.exit(main())
