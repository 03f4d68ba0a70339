"""What rules may ask of the content of a message: decoded header fields, its size, and which kind of mail it says it is.

Users decide all of this, so by design it can only add to what the rules for the envelope say (policy.py). Only what the table
asks for is looked at. Nothing here raises for what is in a message: what cannot be decoded is read as Latin-1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from malote.config import Kind
from malote.core.message import Bytes, Field, mask, values
from malote.core.words import decode_words
from malote.errors import FormatError

MAX_VALUE = 10_000      # bytes of a field that are looked at: a subject in the wild has a few hundred

_FIELD_NAME = re.compile(r"[!-9;-~]+")
_CALENDAR = re.compile(rb"^content-(?:type:(?:[ \t]|\r?\n[ \t])*text/calendar|class:[ \t]*urn:content-classes:calendarmessage)",
                       re.IGNORECASE | re.MULTILINE)
_AUTOMATIC = frozenset({b"auto-generated", b"auto-notified"})       # RFC 3834 5.2, RFC 5436 2.7.1


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a table asks for."""

    fields: frozenset[str] = frozenset()
    kinds: bool = False


@dataclass(frozen=True, slots=True)
class Content:
    size: int = 0
    fields: Mapping[str, tuple[str, ...]] = field(default_factory=dict)     # decoded, by lower-case name; only those asked for
    kinds: frozenset[Kind] = frozenset()


NO_CONTENT = Content()


@dataclass(frozen=True, slots=True)
class Glob:
    """Text with `*`. No regular expression: each piece is looked for once."""

    pieces: tuple[str, ...]     # case-folded

    def met(self, text: str) -> bool:
        """`text` is case-folded."""
        if len(self.pieces) == 3 and not self.pieces[0] and not self.pieces[2]:     # mostly
            return self.pieces[1] in text
        first, last = self.pieces[0], self.pieces[-1]
        if len(self.pieces) == 1:
            return text == first
        if len(text) < len(first) + len(last) or not (text.startswith(first) and text.endswith(last)):
            return False
        position, end = len(first), len(text) - len(last)
        for piece in self.pieces[1:-1]:
            found = text.find(piece, position, end)
            if found < 0:
                return False
            position = found + len(piece)
        return True


@dataclass(frozen=True, slots=True)
class HeaderGlob:
    name: str           # lower-case
    value: Glob

    def met(self, values: Sequence[str]) -> bool:
        """`values` are case-folded."""
        return any(self.value.met(value) for value in values)


def make_glob(text: str) -> Glob:
    return Glob(tuple(text.casefold().split("*")))


def make_header_glob(text: str) -> HeaderGlob:
    """From `Name` (it is there) or `Name: text with *`. Raises `FormatError`."""
    name, colon, value = text.partition(":")
    if _FIELD_NAME.fullmatch(name.strip()) is None:
        raise FormatError("not a header field name")
    return HeaderGlob(name.strip().lower(), make_glob(value.strip() if colon else "*"))


def read_content(fields: Sequence[Field], submitted: Bytes, wanted: Wanted, *, null_sender: bool) -> Content:
    """`fields`: the top-level ones; `null_sender`: MAIL FROM:<>, which only answers and reports have (RFC 3834 4, RFC 3464)."""
    found: dict[str, tuple[str, ...]] = {}
    for name in wanted.fields:
        present = tuple(decode_words(value[:MAX_VALUE]) for value in values(fields, name))
        if present:
            found[name] = present
    kinds = decide_kinds(fields, submitted, null_sender=null_sender) if wanted.kinds else frozenset()
    return Content(len(submitted), found, kinds)


def decide_kinds(fields: Sequence[Field], submitted: Bytes, *, null_sender: bool) -> frozenset[Kind]:
    """By what such mail says in its header, and a calendar part by its own. There is no sure sign for any of them."""
    kinds: set[Kind] = set()
    automatic = {mask(value).partition(b";")[0].strip().lower() for value in values(fields, "auto-submitted")}
    precedence = {value.lower() for value in values(fields, "precedence")}
    names = {each.name for each in fields}
    media = [value.lower() for value in values(fields, "content-type")]
    if _CALENDAR.search(submitted) is not None:
        kinds.add(Kind.CALENDAR)
    if null_sender or any(value.startswith(b"multipart/report") and b"delivery-status" in value for value in media):
        kinds.add(Kind.BOUNCE)
    if b"auto-replied" in automatic or b"auto_reply" in precedence or names & {"x-autoreply", "x-autorespond"}:
        kinds.add(Kind.AUTO_REPLY)
    if automatic & _AUTOMATIC:
        kinds.add(Kind.AUTOMATIC)
    if "list-id" in names or b"list" in precedence:      # RFC 2919; RFC 2076 3.9
        kinds.add(Kind.LIST)
    return frozenset(kinds)
