"""The outer headers of a sealed message, by allow-list: what everybody on the way may read.

Nothing passes because nobody thought of it: each field here is built anew from values that were checked (docs/format.md 4.3;
RFC 9788 hcp_shy, and shorter). Never a display name, never Bcc, never the author's Message-ID or Subject.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from malote.core.message import (
    MAX_HOPS,
    Field,
    check_message_id,
    fold_field,
    format_date,
    header_fields,
    mask,
    quoted_spans,
    read_mailboxes,
    refusal,
    unfold,
    values,
)
from malote.core.primitives import random_bytes
from malote.core.tags import SUBJECT
from malote.errors import FormatError, MailLoop

MAX_REFERENCES = 50             # known outer ids kept of a long thread: the newest; about 3 KB
MAX_RECEIVED_BYTES = 4000       # of one Received line; the longest seen in the wild are below 1 KB
MAX_WORD = 900                  # of a Received line: fits a line of LINE_LIMIT

# RFC 3834 5.2, RFC 5436 2.7.1. Another value still means that a program wrote it.
_AUTO_SUBMITTED = frozenset({"no", "auto-generated", "auto-replied", "auto-notified"})
_MESSAGE_IDS = re.compile(r"<[!-;=?A-~]+@[!-;=?-~]+>")      # split at the first @ only: trying each takes quadratic time
# RFC 5321 4.4: the clauses of Received. Found in masked text, so a comment or a quoted string cannot pretend to be one.
_FOR = re.compile(rb"(?<![A-Za-z0-9.@+-])for(?![A-Za-z0-9.@+-])", re.IGNORECASE)
_CLAUSE_END = re.compile(rb";|(?<=[ \t\r\n])(?:from|by|via|with|id)(?=[ \t\r\n])", re.IGNORECASE)
_COMMENT_FOR = re.compile(rb"@|\bfor\b", re.IGNORECASE)
_RECEIVED_NAME = re.compile(rb"received[ \t]*:", re.IGNORECASE)
_UNPRINTABLE = re.compile(rb"[^ -~]")


@dataclass(frozen=True, slots=True)
class OuterHeaders:
    """The fields in order, unfolded as the manifest lists them, and folded as they are sent."""

    fields: tuple[tuple[str, str], ...]
    raw: bytes                  # CRLF after each line; without MIME fields and without the empty line
    message_id: str
    needs_smtputf8: bool        # a local part is not ASCII: the upstream must offer SMTPUTF8 (RFC 6531)


def outer_headers(
    original: bytes, *, sent_at_ms: int, sender_domain: str, received: bytes, known_outer_ids: Mapping[str, str],
) -> OuterHeaders:
    """The outer headers for one copy of `original`.

    `received` is our own Received line (with or without its name; empty: none). `known_outer_ids` gives the outer id, where
    known, of the inner ids that `threading_ids` names. Raises `FormatError` when From is not one address, `MailLoop` for too
    many hops.
    """
    fields = header_fields(original)
    builder = _Builder()
    _add_received(builder, fields, received)
    author = [address for value in values(fields, "from") for address in read_mailboxes(value)]
    if len(author) != 1:
        raise refusal(f"The From field names {len(author)} mailboxes, not one")
    builder.add("From", _addresses(author))
    for name in ("To", "Cc"):
        builder.add(name, _addresses(_readable(values(fields, name.lower()))))
    builder.add("Subject", [SUBJECT])
    builder.add("Date", format_date(sent_at_ms).split(" "))
    # fresh, because two messages of one id in one store are taken for one; and the inner one is the author's
    message_id = f"<{random_bytes(16).hex()}@{sender_domain}>"
    check_message_id(message_id)
    builder.add("Message-ID", [message_id])
    for name in ("In-Reply-To", "References"):
        builder.add(name, _known(_ids(fields, name.lower()), known_outer_ids))
    builder.add("Auto-Submitted", _auto_submitted(fields))
    builder.add("Malote", ["1"])    # a hint for SEARCH HEADER; proves nothing
    return builder.done(message_id)


def threading_ids(message: bytes | Iterable[Field]) -> list[str]:
    """The inner Message-IDs that In-Reply-To and References name, each once: what to look up for `known_outer_ids`.

    `message` or its fields, as `Prepared.kept`.
    """
    fields = header_fields(message) if isinstance(message, bytes) else list(message)
    return list(dict.fromkeys(_ids(fields, "in-reply-to") + _ids(fields, "references")))


def reply_ids(message: Iterable[Field]) -> tuple[list[str], list[str]]:
    """The inner Message-IDs that In-Reply-To names, and those of References from the nearest on."""
    fields = list(message)
    return _ids(fields, "in-reply-to"), _ids(fields, "references")[::-1]


def strip_for(value: bytes) -> bytes:
    """A Received value, unfolded, without its `for` clause and without comments that could name a recipient."""
    value = unfold(value)[:MAX_RECEIVED_BYTES]
    value = _without_comments(value)
    masked = mask(value)
    kept: list[bytes] = []
    position = 0
    for hit in _FOR.finditer(masked):
        if hit.start() < position:
            continue
        end = _CLAUSE_END.search(masked, hit.end())
        kept.append(value[position:hit.start()])
        position = end.start() if end is not None else len(value)
    kept.append(value[position:])
    return b"".join(kept)


def _without_comments(value: bytes) -> bytes:
    """Exim writes `(envelope-from <a@b>)`, others `(for a@b)`: a comment with an address or the word goes, the rest stays."""
    kept: list[bytes] = []
    position = 0
    for start, end, comment in quoted_spans(value):
        if comment and _COMMENT_FOR.search(value, start, end) is not None:
            kept.append(value[position:start])
            position = end
    kept.append(value[position:])
    return b"".join(kept)


class _Builder:
    def __init__(self) -> None:
        self._fields: list[tuple[str, str]] = []
        self._raw: list[bytes] = []

    def add(self, name: str, words: Sequence[str]) -> None:
        """One field; no words: none."""
        if words:
            self._raw.append(fold_field(name, words))
            self._fields.append((name, " ".join(words)))

    def done(self, message_id: str) -> OuterHeaders:
        raw = b"".join(self._raw)
        return OuterHeaders(tuple(self._fields), raw, message_id, not raw.isascii())


def _add_received(builder: _Builder, fields: Sequence[Field], ours: bytes) -> None:
    theirs = [field.raw_value for field in fields if field.name == "received"]
    if len(theirs) > MAX_HOPS:
        raise MailLoop()
    name = _RECEIVED_NAME.match(ours)
    if ours.strip():
        builder.add("Received", _own_trace_words(ours[name.end():] if name is not None else ours))
    for value in theirs:
        builder.add("Received", _trace_words(value))


def _trace_words(value: bytes) -> list[str]:
    text = _UNPRINTABLE.sub(b"?", strip_for(value).replace(b"\t", b" ")).decode("ascii")
    words = [word[:MAX_WORD] for word in text.split(" ") if word]
    return words or ["(removed)"]       # an empty one still counts as a hop


_own_trace_words = lru_cache(maxsize=8)(_trace_words)       # the same for all messages of a second


def _readable(field_values: Iterable[bytes]) -> list[str]:
    """The addresses of To or Cc, each once. A field that cannot be read is left out: its text may be anything."""
    found: dict[str, None] = {}
    for value in field_values:
        try:
            found.update(dict.fromkeys(read_mailboxes(value)))
        except FormatError:
            continue
    return [address for address in found if address.isprintable()]


def _addresses(addresses: Sequence[str]) -> list[str]:
    """Each with its comma; an address is never folded inside, as a quoted local part may hold spaces."""
    return [f"{address}," for address in addresses[:-1]] + list(addresses[-1:])


def _ids(fields: Iterable[Field], name: str) -> list[str]:
    found = [hit for value in values(fields, name) for hit in _MESSAGE_IDS.findall(value.decode("ascii", "replace"))]
    return found[-MAX_REFERENCES:]


def _known(inner: Iterable[str], known: Mapping[str, str]) -> list[str]:
    """The outer ids of the inner ids that have one. They once came from outside, so they are checked again."""
    found: list[str] = []
    for message_id in inner:
        outer = known.get(message_id)
        if outer is None:
            continue
        try:
            check_message_id(outer)
        except FormatError:
            continue
        found.append(outer)
    return found


def _auto_submitted(fields: Iterable[Field]) -> list[str]:
    found = values(fields, "auto-submitted")
    if not found:
        return []
    word = mask(found[0]).partition(b";")[0].strip().lower().decode("ascii", "replace")
    return [word if word in _AUTO_SUBMITTED else "auto-generated"]
