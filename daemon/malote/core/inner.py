"""What the signed manifest says about the original is compared with the original itself (docs/format.md 6.4).

Both sides read it by these rules, so that a manifest and its original agree or the message is not accepted.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from malote.core.address import parse_mailboxes
from malote.core.message import Bytes, Field, header_fields, mask, values
from malote.errors import FormatError

_MESSAGE_ID = re.compile(rb"[\x21-\x7e][\x20-\x7e]{0,997}")
_ODD = re.compile(rb"\r(?!\n)|\x00")        # what some programs take for a line end or an end of text


@dataclass(frozen=True, slots=True)
class InnerHeader:
    message_id: str             # "" where there is no single usable one
    from_address: str | None    # canonical; None where programs could disagree about who it is from


def read_inner(original: Bytes) -> InnerHeader:
    """Never raises: an original that cannot be read has neither."""
    try:
        fields = header_fields(original)
    except FormatError:
        return InnerHeader("", None)
    return InnerHeader(_message_id(fields), _from_address(fields))


def read_participants(original: Bytes) -> frozenset[str]:
    """Whom the original says it is from and for, and whom its author wants to be answered: From, To, Cc, Reply-To.

    Never raises: a field that cannot be read names nobody.
    """
    try:
        fields = header_fields(original)
    except FormatError:
        return frozenset()
    found: set[str] = set()
    for name in ("from", "to", "cc", "reply-to"):
        for value in values(fields, name):
            try:
                found.update(parse_mailboxes(value))
            except FormatError:
                continue
    return frozenset(found)


def _message_id(fields: list[Field]) -> str:
    found = values(fields, "message-id")
    return found[0].decode("ascii") if len(found) == 1 and _MESSAGE_ID.fullmatch(found[0]) else ""


def _from_address(fields: list[Field]) -> str | None:
    """The one mailbox of the one From field, if no line of the header holds an odd line end.

    No list and no group, even with one member: `"bob@b.example": alice@a.example;` is shown by programs in as many ways.
    """
    if _ODD.search(b"".join([field.raw for field in fields])):
        return None
    found = values(fields, "from")
    if len(found) != 1 or any(mark in mask(found[0]) for mark in (b",", b";")):
        return None
    try:
        mailboxes = parse_mailboxes(found[0])
    except FormatError:
        return None
    return mailboxes[0] if len(mailboxes) == 1 else None
