"""The Received fields of an outer header: ours, and those of the original without whoever they were for (docs/format.md 4.3).

The second program for that rule, part of the last check (proof.py): it shares nothing with `core.outer`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache

from malote.errors import NotProven

WIDTH = 78                      # RFC 5322 2.1.1: where outer fields are folded
MAX_TRACE_BYTES, MAX_TRACE_WORD = 4000, 900     # docs/format.md 4.3

_OWN_TRACE = re.compile(
    rb"Received: by [!-'*-:<-~]{1,255} \(malote\) with [A-Z0-9]{1,12};\r\n "
    rb"[A-Z][a-z]{2}, \d\d [A-Z][a-z]{2} \d{4} \d\d:\d\d:\d\d \+0000\r\n"
)
_TRACE = re.compile(rb"received[ \t\r\v\f]*:([^\n]*(?:\n[ \t][^\n]*)*)", re.IGNORECASE)
UNFOLD = re.compile(rb"\r?\n(?=[ \t])")
_MARKS = re.compile(rb'\\.|["()]', re.DOTALL)
# RFC 5321 4.4, in lower case: the clause begins with the word and ends before the date or the next clause
_FOR = re.compile(rb"for(?<![a-z0-9.@+-]for)(?![a-z0-9.@+-])")
_CLAUSE = re.compile(rb";|(?<=[ \t\r\n])(?:from|by|via|with|id)[ \t\r\n]")
_WORD_FOR = re.compile(rb"\bfor\b")
_NOT_PRINTABLE = re.compile("[^ -~]")


def check_trace(raw: bytes, position: int, received: bytes, original: bytes) -> int:
    """Where the fields after Received begin, which begin at `position`. `received`: our own line, empty for none. Raises
    `NotProven` unless they are ours and those of the original."""
    if received:
        position = _check_line(raw, position, _own_trace(received))
    for value in _traces(original):
        position = _check_line(raw, position, _trace(value))
    return position


def _check_line(raw: bytes, position: int, line: bytes) -> int:
    if not raw.startswith(line, position):
        raise NotProven("Received")
    return position + len(line)


@lru_cache(maxsize=8)       # of this second
def _own_trace(received: bytes) -> bytes:
    if not _OWN_TRACE.fullmatch(received):
        raise NotProven("our Received")
    return _trace(received.partition(b":")[2])


def _traces(original: bytes) -> Iterator[bytes]:
    """The values of the top-level Received fields, as they stand."""
    header = original[:header_end(original)]
    lower = b"\n" + header.lower()
    at = lower.find(b"\nreceived")
    while at >= 0:
        found = _TRACE.match(header, at)
        if found is not None:
            yield found[1]
        at = lower.find(b"\nreceived", at + 1)


def header_end(original: bytes) -> int:
    if original.startswith((b"\r\n", b"\n")):
        return 0
    end = original.find(b"\n\r\n")
    other = original.find(b"\n\n", 0, end if end >= 0 else len(original))
    ends = [at + 1 for at in (end, other) if at >= 0]
    return min(ends, default=len(original))


def _trace(value: bytes) -> bytes:
    """The whole line for the value of a Received field: without its `for` clause, without comments that name somebody."""
    value = UNFOLD.sub(b"", value).strip(b" \t\r\n")[:MAX_TRACE_BYTES]
    kept, shadow = _without_comments(value)
    clause = _FOR.search(shadow)
    if clause is not None:
        pieces: list[bytes] = []
        position = 0
        while clause is not None:
            pieces.append(kept[position:clause.start()])
            end = _CLAUSE.search(shadow, clause.end())
            position = end.start() if end is not None else len(shadow)
            clause = _FOR.search(shadow, position)
        kept = b"".join([*pieces, kept[position:]])
    text = kept.replace(b"\t", b" ").decode("latin-1")
    if not (text.isascii() and text.isprintable()):
        text = _NOT_PRINTABLE.sub("?", text)
    words = [word[:MAX_TRACE_WORD] for word in text.split(" ") if word]
    return b"Received: " + folded("Received", words or ["(removed)"]) + b"\r\n"


def _without_comments(value: bytes) -> tuple[bytes, bytes]:
    """The value without comments that hold an address or the word "for"; and the same in lower case, with other comments and what
    is in quotes blotted out, for nothing in them is a clause (RFC 5322 3.2.2, 3.2.4). What is not closed reaches to the end."""
    lower = value.lower()
    kept: list[bytes] = []
    shadow: list[bytes] = []
    depth = position = 0
    quoted = False
    for mark in _MARKS.finditer(value):
        sign = mark[0]
        if depth:
            depth += (sign == b"(") - (sign == b")")
            if depth:
                continue
            end, piece = mark.end(), lower[position:mark.end()]
            if b"@" not in piece and not (b"for" in piece and _WORD_FOR.search(piece)):
                kept.append(value[position:end])
                shadow.append(b" " * len(piece))
        elif quoted and sign == b'"':
            quoted, end = False, mark.end()
            kept.append(value[position:end])
            shadow.append(b"_" * (end - position))
        elif not quoted and sign in b'("':
            depth, quoted, end = int(sign == b"("), sign == b'"', mark.start()
            kept.append(value[position:end])
            shadow.append(lower[position:end])
        else:
            continue
        position = end
    rest = lower[position:]
    if not (depth and (b"@" in rest or _WORD_FOR.search(rest))):
        kept.append(value[position:])
        shadow.append(b" " * len(rest) if depth else b"_" * len(rest) if quoted else rest)
    return b"".join(kept), b"".join(shadow)


def folded(name: str, words: Sequence[str]) -> bytes:
    """The value of a field, folded before the word that would end beyond `WIDTH`."""
    out: list[str] = []
    column = len(name) + 1
    for word in words:
        if out and column + 1 + len(word) > WIDTH:
            out.append("\r\n ")
            column = 0
        elif out:
            out.append(" ")
        column += 1 + len(word)
        out.append(word)
    return "".join(out).encode("utf-8", "surrogatepass")
