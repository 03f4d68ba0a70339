"""The header of a message as exact bytes: found, taken apart into fields, and edited before sealing.

Nothing is parsed and written again: a field that stays keeps every byte (docs/format.md 6.4). The edits are those of
the design and in its order: remove Bcc, Resent-Bcc, Return-Path and Malote's own control and status fields; remove the subject
tag if there is one; add Date and Message-ID where missing. The body is never looked at and copied at most once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Literal, NamedTuple

from malote.core.address import parse_mailboxes
from malote.core.tags import Tag, take_tag
from malote.errors import FormatError, MailLoop, Reply

# 1,000 recipients (the server's limit) of 254 bytes and a name; Exim takes 1 MiB. Bounds work on what is not authenticated.
MAX_HEADER_BYTES = 512 * 1024
MAX_HEADER_FIELDS = 2000        # 50 Received, 50 ARC sets of 3 and every list header there is are below 300
MAX_HOPS = 50                   # RFC 5321 6.3 asks for at least 100 in general; Postfix's hopcount_limit is 50
LINE_WANTED = 78                # RFC 5322 2.1.1, without CRLF
LINE_LIMIT = 998
MAX_MESSAGE_ID = 900            # of RFC 5322's 998 bytes in a line, with the name before it

Control = Literal["yes", "no"]
Bytes = bytes | bytearray | memoryview

# Fields of ours that a message from outside must not carry (design 5). Malote-Key is no status and passes.
STATUS_FIELDS = frozenset({"malote-verdict", "malote-seal", "malote-mark", "malote-gateway"})
REMOVED_FIELDS = frozenset({"bcc", "resent-bcc", "return-path"}) | STATUS_FIELDS
_RECIPIENT_FIELDS = frozenset({"to", "cc", "resent-to", "resent-cc"})

# A field is a line and the lines after it that begin with space or tab (RFC 5322 2.2.3). Each byte is looked at once.
_FIELD = re.compile(rb"[^\n]*(?:\n[ \t][^\n]*)*(?:\n|\Z)")
_HEADER_END = re.compile(rb"\n\r?\n")
# RFC 5322 3.6.8 ftext; the space before the colon is its obsolete syntax (4.5), which readers accept, so it counts here too
_NAME = re.compile(rb"[!-9;-~]+\Z")
_FOLD = re.compile(rb"\r?\n(?=[ \t])")
_MESSAGE_ID = re.compile(r"<[!-;=?-~]+@[!-;=?-~]+>\Z")
_SPECIAL = re.compile(rb'\\.|[()"]', re.DOTALL)
_CACHED_NAME, _CACHED_VALUE = 76, 998       # bytes; bounds what the caches hold, whatever strangers send
_DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Field(NamedTuple):
    """One top-level field. `name` is lower-case without the space before the colon; "" for a line that is no field."""

    name: str
    raw_value: bytes        # what follows the colon, folded as it came, without the last line end
    raw: bytes              # the whole of it; the fields' `raw` in a row are the header


def split_header(raw: Bytes) -> tuple[bytes, int]:
    """The header (with the end of its last line) and where the body begins. A message without empty line is all header.

    Raises `FormatError` for a header above `MAX_HEADER_BYTES`.
    """
    start = bytes(raw[:2])
    if start == b"\r\n" or start[:1] == b"\n":
        return b"", 2 if start == b"\r\n" else 1
    end = _HEADER_END.search(raw, 0, MAX_HEADER_BYTES)
    if end is not None:
        return bytes(raw[:end.start() + 1]), end.end()
    if len(raw) > MAX_HEADER_BYTES:
        raise refusal(f"The header of the message is longer than {MAX_HEADER_BYTES} bytes")
    return bytes(raw), len(raw)


def header_fields(raw: Bytes) -> list[Field]:
    """The top-level fields, in order. Lines that are no field keep their place, with the name "".

    Raises `FormatError` above `MAX_HEADER_BYTES` or `MAX_HEADER_FIELDS`.
    """
    return parse_fields(split_header(raw)[0])


def parse_fields(header: bytes) -> list[Field]:
    """As `header_fields`, for a header that is already cut off."""
    lines = [line for line in _FIELD.findall(header) if line]
    if len(lines) > MAX_HEADER_FIELDS:
        raise refusal(f"The message has more than {MAX_HEADER_FIELDS} header fields")
    return [_field(line) for line in lines]


def _field(raw: bytes) -> Field:
    name, colon, value = raw.partition(b":")
    known = (_known_name if len(name) <= _CACHED_NAME else _name)(name) if colon else ""
    if not known:
        return Field("", raw, raw)
    return Field(known, value.rstrip(b"\r\n"), raw)


def _name(raw: bytes) -> str:
    """A field name as `Field` has it, "" for none."""
    name = raw.rstrip()
    return "" if _NAME.match(name) is None else name.lower().decode("ascii")


# The same few dozen names and the same correspondents come in every message, and each is looked at in several steps of it.
_known_name = lru_cache(maxsize=512)(_name)


@lru_cache(maxsize=512)
def _known_mailboxes(raw_value: bytes) -> tuple[str, ...]:
    return tuple(parse_mailboxes(raw_value))


def read_mailboxes(raw_value: bytes) -> tuple[str, ...]:
    """`parse_mailboxes` with a memory for values of usual size. Raises `FormatError`."""
    return _known_mailboxes(raw_value) if len(raw_value) <= _CACHED_VALUE else tuple(parse_mailboxes(raw_value))


def unfold(raw_value: bytes) -> bytes:
    """RFC 5322 2.2.3: line ends before space or tab go; what is around the value too."""
    return _FOLD.sub(b"", raw_value).strip(b" \t\r\n")


def values(fields: Iterable[Field], name: str) -> list[bytes]:
    """The unfolded values of the fields of this lower-case name, in order."""
    return [unfold(field.raw_value) for field in fields if field.name == name]


def quoted_spans(value: bytes) -> list[tuple[int, int, bool]]:
    """Where comments (True) and quoted strings (False) lie, in order.

    RFC 5322 3.2.1, 3.2.2, 3.2.4: comments nest, a backslash quotes the next byte. What is not closed reaches to the end.
    """
    spans: list[tuple[int, int, bool]] = []
    if b"(" not in value and b'"' not in value:
        return spans
    depth, start, in_quotes = 0, 0, False
    for hit in _SPECIAL.finditer(value):
        at, char = hit.start(), hit.group()
        if in_quotes:
            if char == b'"':
                spans.append((start, at + 1, False))
                in_quotes = False
        elif char == b"(":
            start = at if depth == 0 else start
            depth += 1
        elif depth and char == b")":
            depth -= 1
            if depth == 0:
                spans.append((start, at + 1, True))
        elif depth == 0 and char == b'"':
            start, in_quotes = at, True
    if depth or in_quotes:
        spans.append((start, len(value), depth > 0))
    return spans


def mask(value: bytes) -> bytes:
    """The value at the same length, with comments as spaces and quoted strings as underscores: what is left is structure."""
    spans = quoted_spans(value)
    if not spans:
        return value
    out = bytearray(value)
    for start, end, comment in spans:
        out[start:end] = (b" " if comment else b"_") * (end - start)
    return bytes(out)


def fold_field(name: str, words: Sequence[str]) -> bytes:
    """`Name: words` with CRLF, folded between words at `LINE_WANTED`. Words are printable and not broken (RFC 5322 2.1.1, 2.2.3).

    Raises `FormatError` for what is not printable (no control, no CR or LF, no U+2028) or a word that fits no line: the last
    gate against header injection.
    """
    whole = f"{name}: {' '.join(words)}"
    if len(whole) <= LINE_WANTED and whole.isascii() and whole.isprintable():
        return whole.encode("ascii") + b"\r\n"
    lines: list[str] = []
    line = f"{name}:"
    for word in words:
        if len(line) + 1 + len(word) > LINE_WANTED and (lines or len(line) > len(name) + 1):
            lines.append(line)
            line = ""
        line += f" {word}"
    lines.append(line)
    data = "\r\n".join(lines).encode("utf-8", "surrogatepass") + b"\r\n"
    if not all(word.isprintable() for word in words):
        raise refusal(f"The {name} field holds characters that no header may hold")
    if any(len(line.encode("utf-8")) > LINE_LIMIT for line in lines):
        raise refusal(f"The {name} field holds a word that fits no line")
    return data


def refusal(text: str) -> FormatError:
    """A `FormatError` whose reply says what is wrong with the form of the message; `text` holds nothing of its content."""
    return FormatError(text, reply=Reply(554, "5.6.0", f"{text}, nothing was sent"))


@dataclass(frozen=True, slots=True)
class Prepared:
    """A submitted message after the removals and before the additions."""

    submitted: Bytes
    kept: tuple[Field, ...]         # the fields that stay
    changed: bool                   # something was removed
    tail_offset: int                # from here on (the empty line and the body) the submitted bytes stay as they are
    line_end: bytes                 # of the fields that are added
    controls: Control | None        # Malote-Seal, or a tag in the subject
    from_address: str
    to_cc: frozenset[str]           # who is visible: To, Cc, Resent-To, Resent-Cc; everybody else is Bcc
    needs_date: bool
    message_id: str                 # "" when missing
    hops: int

    @property
    def needs_message_id(self) -> bool:
        return not self.message_id

    @property
    def stripped_parts(self) -> tuple[Bytes, ...]:
        """The bytes after the removals, in pieces: what the journal hashes, without a copy of the body."""
        if not self.changed:
            return (self.submitted,)
        return (b"".join([field.raw for field in self.kept]), memoryview(self.submitted)[self.tail_offset:])

    @property
    def stripped(self) -> bytes:
        """The same in one piece; a copy if something was removed."""
        parts = self.stripped_parts
        return _whole(parts[0]) if len(parts) == 1 else b"".join(parts)


def prepare(submitted: Bytes, seal_tag: Tag | None = None, clear_tag: Tag | None = None) -> Prepared:
    """Take the header apart, note what is to be removed, and find who speaks to whom. The tags say yes and no in a subject.

    Raises `FormatError`, with a text for the client, for a header with a bare CR, a NUL, or a line that is no field, over the
    limits, with a bad or contradictory Malote-Seal, or without exactly one author; `MailLoop` above `MAX_HOPS` Received lines.
    """
    header = split_header(submitted)[0]
    if header.count(b"\r") != header.count(b"\r\n") or b"\0" in header:
        raise refusal("The header of the message holds a bare CR or a NUL")
    if header[:1] in (b" ", b"\t"):
        raise refusal("The header of the message begins in the middle of a field")
    fields = parse_fields(header)
    for number, field in enumerate(fields, 1):
        if not field.name:      # some readers end the header there and some do not: who wrote it would be up to the reader
            raise refusal(f"Field {number} of the header of the message is not a header field")
    kept: list[Field] = []
    groups: dict[str, list[bytes]] = {}
    for field in fields:
        name = field.name
        if name in REMOVED_FIELDS:
            groups.setdefault(name, []).append(field.raw_value)
            continue
        kept.append(field)
        if name in _GATHERED:
            groups.setdefault(name, []).append(field.raw_value)
    hops = len(groups.get("received", ()))
    if hops > MAX_HOPS:
        raise MailLoop()
    wanted = _take_tags(kept, seal_tag, clear_tag) if seal_tag is not None or clear_tag is not None else frozenset()
    return Prepared(
        submitted=submitted, kept=tuple(kept), changed=len(kept) != len(fields) or bool(wanted), tail_offset=len(header),
        line_end=b"\n" if b"\n" in header and b"\r\n" not in header else b"\r\n",
        controls=_control(groups.get("malote-seal", ()), wanted), from_address=_author(groups.get("from", ())),
        to_cc=_visible(groups), needs_date="date" not in groups,
        message_id=_message_id(groups.get("message-id", ())), hops=hops,
    )


_GATHERED = _RECIPIENT_FIELDS | {"from", "date", "message-id", "received"}


def complete(prepared: Prepared, *, date_ms: int, message_id: str) -> bytes:
    """The original: what was prepared, with Date and Message-ID added on top if missing, and nothing else changed.

    On top, because after the last field is not surely header: a line that is no field ends the header for some readers.
    Raises `FormatError` if `message_id` is needed and is none.
    """
    added: list[bytes] = []
    if prepared.needs_date:
        added.append(b"Date: " + format_date(date_ms).encode("ascii") + prepared.line_end)
    if prepared.needs_message_id:
        check_message_id(message_id)
        added.append(b"Message-ID: " + message_id.encode("ascii") + prepared.line_end)
    if not added:
        return prepared.stripped
    return b"".join([*added, *prepared.stripped_parts])


def check_message_id(message_id: str) -> None:
    """Raises `FormatError` unless it is `<left@right>` of visible ASCII (RFC 5322 3.6.4, without comments and quoting)."""
    if len(message_id) > MAX_MESSAGE_ID or _MESSAGE_ID.match(message_id) is None:
        raise FormatError("not a Message-ID")


def format_date(at_ms: int) -> str:
    """RFC 5322 3.3, in UTC: `Tue, 24 Nov 2026 10:02:00 +0000`. Raises `FormatError` for what no calendar holds."""
    try:
        at = _EPOCH + timedelta(milliseconds=at_ms)
    except OverflowError:
        raise FormatError("a time that no calendar holds") from None
    day, month = _DAYS[at.weekday()], _MONTHS[at.month - 1]
    return f"{day}, {at.day:02} {month} {at.year:04} {at.hour:02}:{at.minute:02}:{at.second:02} +0000"


def _whole(data: Bytes) -> bytes:
    return data if isinstance(data, bytes) else bytes(data)


def _take_tags(kept: list[Field], seal_tag: Tag | None, clear_tag: Tag | None) -> frozenset[bytes]:
    """What the tags in the subjects say; they are gone from `kept` then."""
    wanted: set[bytes] = set()
    for number, field in enumerate(kept):
        if field.name != "subject":
            continue
        for tag, word in ((seal_tag, b"yes"), (clear_tag, b"no")):
            without = take_tag(kept[number].raw, tag) if tag is not None else None
            if without is not None:
                kept[number] = _field(without)
                wanted.add(word)
    return frozenset(wanted)


def _control(raw_values: Iterable[bytes], tags: frozenset[bytes]) -> Control | None:
    """Malote-Seal and tags. Anything but a clear yes or no is refused: whoever writes it must not be misunderstood."""
    wanted = {unfold(value).lower() for value in raw_values} | tags
    if not wanted:
        return None
    if wanted == {b"yes"}:
        return "yes"
    if wanted == {b"no"}:
        return "no"
    if tags:
        raise refusal("The tag in the subject and the Malote-Seal field contradict each other")
    raise refusal("The Malote-Seal field must be yes or no")


def _author(raw_values: Iterable[bytes]) -> str:
    """The one mailbox of the one From field. RFC 5322 allows several and RFC 6854 a group; nobody can sign for those."""
    fields = list(raw_values)
    if len(fields) != 1:
        raise refusal("The message has no From field" if not fields else f"The message has {len(fields)} From fields, not one")
    value = unfold(fields[0])
    if b";" in value and b";" in mask(value):
        raise refusal("The From field names a group, not one person")
    try:
        addresses = read_mailboxes(value)
    except FormatError as error:
        raise refusal("The From field is not an address") from error
    if len(addresses) != 1:
        raise refusal(f"The From field names {len(addresses)} mailboxes, not one")
    if b"," in value and b"," in mask(value):       # a list of one: no receiver would take it for one person (`inner`)
        raise refusal("The From field is a list, not one mailbox")
    return addresses[0]


def _visible(groups: dict[str, list[bytes]]) -> frozenset[str]:
    """Everybody named in To and Cc. A field that cannot be read names nobody: its recipients get copies alone, as Bcc does."""
    found: set[str] = set()
    for name in _RECIPIENT_FIELDS:
        for value in groups.get(name, ()):
            try:
                found.update(read_mailboxes(unfold(value)))
            except FormatError:
                continue
    return frozenset(found)


def _message_id(raw_values: Iterable[bytes]) -> str:
    """The first Message-ID, as it stands, unfolded; a Message-ID that is not empty counts as there, even a strange one."""
    for value in raw_values:
        text = unfold(value).decode("utf-8", "replace")
        if text:
            return text
    return ""
