"""The lines of the audit log and the chain that they form. Pure.

A line is one JSON object. `n` counts up from 1, and `prev` is the SHA-256 of the line before (its bytes without the line end;
64 zeros before the first), so that whoever changes, removes or moves a line must write all lines after it anew. What the chain
alone cannot show is lines that are missing at the end: for that the head (number and hash of the last line) is kept beside the
file, and may be kept elsewhere. An anchor that was noted elsewhere also shows a chain that was written anew as a whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from malote.core import strict_json
from malote.core.primitives import sha256
from malote.errors import FormatError

MAX_LINE_BYTES = 1 << 20        # 1000 recipients with their addresses take a quarter of it
_MAX_DEPTH = 4
_DIGITS = 20                    # of `n` in a head: it is overwritten in place, so always as long
HEAD_BYTES = _DIGITS + 1 + 64 + 1

RECOVERED = "recovered"         # `event` of the line after one that a crash or a full disk has cut off
LOST = "lost"                   # `event` of the line that says how many could not be written


@dataclass(frozen=True, slots=True)
class Head:
    """The last line of a chain: its number and its hash (hex)."""

    n: int = 0
    hash: str = "0" * 64


START = Head()


def make_line(head: Head, members: Mapping[str, Any]) -> tuple[bytes, Head]:
    """The next line of the chain, without its line end, and the head that it makes."""
    content = {"n": head.n + 1, **members, "prev": head.hash}
    line = json.dumps(content, separators=(",", ":")).encode("ascii")
    return line, Head(head.n + 1, line_hash(line))


def line_hash(line: bytes) -> str:
    return sha256(line).hex()


def parse_line(line: bytes) -> dict[str, Any]:
    """Raises `FormatError` for what is no line of an audit log."""
    members = strict_json.loads(line, max_bytes=MAX_LINE_BYTES, max_depth=_MAX_DEPTH)
    number, prev = members.get("n"), members.get("prev")
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise FormatError("a line of the audit log without its number")
    if not isinstance(prev, str) or len(prev) != 64 or not set(prev) <= set("0123456789abcdef"):
        raise FormatError("a line of the audit log without the hash of the one before")
    return members


def serialize_head(head: Head) -> bytes:
    return f"{head.n:0{_DIGITS}d} {head.hash}\n".encode("ascii")


def parse_head(raw: bytes) -> Head:
    """Raises `FormatError`."""
    if len(raw) != HEAD_BYTES or raw[_DIGITS:_DIGITS + 1] != b" " or raw[-1:] != b"\n" or not raw[:_DIGITS].isdigit():
        raise FormatError("this is no head of an audit log")
    return Head(int(raw[:_DIGITS]), parse_hash(raw[_DIGITS + 1:-1].decode("ascii", "replace")))


def parse_hash(text: str) -> str:
    """Raises `FormatError`."""
    if len(text) != 64 or not set(text.lower()) <= set("0123456789abcdef"):
        raise FormatError("a hash of the audit log has 64 hexadecimal digits")
    return text.lower()


def torn_members(fragment: bytes) -> dict[str, Any]:
    """What the line after a fragment says of it: with that the fragment is accounted for, and anything else there is not."""
    return {"event": RECOVERED, "torn_bytes": len(fragment), "torn_sha256": line_hash(fragment)}


# --- verification


class Damage(StrEnum):
    CHANGED = "changed"         # a line is not what it was when the one after it was written
    REMOVED = "removed"
    REORDERED = "reordered"
    DOUBLED = "doubled"
    TRUNCATED = "truncated"     # missing at the end
    UNKNOWN = "unknown"         # no line of an audit log, and nothing accounts for it
    BEGINNING = "beginning"     # what comes before the first line here is not here
    HEAD = "head"               # what is kept beside the files is gone or damaged
    ANCHOR = "anchor"           # a line that was noted elsewhere is not in the chain


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong. `where`: the file and line at which it shows; "" where that is nowhere."""

    damage: Damage
    text: str
    where: str = ""


@dataclass(slots=True)
class Chain:
    """Takes in the lines of all files in their order, then `finish`; faults as they are found. Remembers no lines.

    `after`: the head that comes before the first line here, where earlier files were put elsewhere. `anchors`: lines that must be
    in the chain, as they were noted elsewhere, by number.
    """

    after: Head = START
    anchors: dict[int, str] = field(default_factory=dict)
    lines: int = 0
    recovered: int = 0
    lost: int = 0
    head: Head = field(init=False)
    _missing: list[tuple[int, int]] = field(default_factory=list)   # ranges of numbers, in order
    _torn: tuple[bytes, str] | None = None
    _first: bool = True

    def __post_init__(self) -> None:
        self.head = self.after

    def take(self, line: bytes, where: str) -> Iterator[Fault]:
        """`line` without its line end."""
        try:
            members = parse_line(line)
        except FormatError:
            yield from self._unaccounted()
            self._torn = (line, where)
            return
        yield from self._account(members)
        self.lines += 1
        number, prev = members["n"], members["prev"]
        first, self._first = self._first, False
        if number == self.head.n + 1:
            if prev != self.head.hash:
                yield self._mismatch(number, where)
        elif number > self.head.n + 1:
            if first and self.after == START:
                yield Fault(Damage.BEGINNING, f"lines 1 to {number - 1} are not here", where)
            else:
                self._missing.append((self.head.n + 1, number - 1))
        else:
            yield self._behind(number, where)
            return
        self.head = Head(number, line_hash(line))
        if self.anchors.pop(number, self.head.hash) != self.head.hash:
            yield Fault(Damage.ANCHOR, f"line {number} is not the one that was noted", where)

    def finish(self, kept: Head | None) -> Iterator[Fault]:
        """`kept`: the head that was kept beside the files, if there is one."""
        yield from self._unaccounted()
        for first, last in self._missing:
            yield Fault(Damage.REMOVED, f"line {first} is missing" if first == last else f"lines {first} to {last} are missing")
        for number in self.anchors:
            yield Fault(Damage.ANCHOR, f"line {number}, which was noted, is not here")
        if kept is not None and kept.n > self.head.n:
            yield Fault(Damage.TRUNCATED, f"the end is missing: the last line here is {self.head.n}, of {kept.n} written")
        elif kept is not None and kept.n == self.head.n and kept.hash != self.head.hash:
            yield Fault(Damage.CHANGED, f"line {kept.n}, the last, is not what was written")

    def _account(self, members: Mapping[str, Any]) -> Iterator[Fault]:
        if self._torn is not None:
            if all(members.get(name) == value for name, value in torn_members(self._torn[0]).items()):
                self.recovered += 1
                self._torn = None
            yield from self._unaccounted()
        if members.get("event") == LOST and isinstance(members.get("count"), int):
            self.lost += members["count"]

    def _unaccounted(self) -> Iterator[Fault]:
        if self._torn is not None:
            _, where = self._torn
            self._torn = None
            yield Fault(Damage.UNKNOWN, "this is no line of an audit log, or only a part of one", where)

    def _mismatch(self, number: int, where: str) -> Fault:
        if number == 1:
            return Fault(Damage.CHANGED, "line 1 does not say that it is the first", where)
        return Fault(Damage.CHANGED, f"line {number - 1} was changed, or the hash of it in line {number}", where)

    def _behind(self, number: int, where: str) -> Fault:
        for position, (first, last) in enumerate(self._missing):
            if first <= number <= last:
                rest = [(first, number - 1), (number + 1, last)]
                self._missing[position:position + 1] = [(low, high) for low, high in rest if low <= high]
                return Fault(Damage.REORDERED, f"line {number} stands after line {self.head.n}", where)
        return Fault(Damage.DOUBLED, f"line {number} stands here again", where)
