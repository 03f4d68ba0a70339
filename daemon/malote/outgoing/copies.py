"""One message and the bytes that leave of it: sealed for a group of recipients, or plain where that was decided.

This is the only place that makes bytes for the upstream server out of what the client submitted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from malote.core.address import domain_of
from malote.core.identity import Identity
from malote.core.message import format_date
from malote.core.outer import OuterHeaders, outer_headers
from malote.core.policy import Action
from malote.core.seal import SealRecipient, seal
from malote.errors import KeyMissing, MaloteError
from malote.outgoing.groups import Group, Kind
from malote.outgoing.transaction import Recipient
from malote.store.records import SendRow

_ROLES = {Kind.VISIBLE: "to", Kind.BCC: "bcc", Kind.LIST: "list"}


@dataclass(slots=True)
class Letter:
    """Everything that the copies of one message are made from."""

    original: bytes = field(repr=False)
    message_id: str                         # the original's own
    sender_address: str                     # the From mailbox
    identity: Identity | None               # who signs; None when nothing is sealed
    recipients: Mapping[str, Recipient]     # by canonical address
    rows: Mapping[str, SendRow]             # the numbers given to them
    submission_id: bytes
    sent_at_ms: int
    received: bytes                         # our own Received line
    known_outer_ids: Mapping[str, str]
    fold: bool
    shown: frozenset[str]                   # who To and Cc name: they may know of each other
    to_self: SendRow | None = None          # the numbers of a blob to the sender itself
    self_group: Group | None = None         # the one copy that has it


@dataclass(frozen=True, slots=True)
class Copy:
    """What is sent to one group."""

    raw: bytes = field(repr=False)
    sealed: bool
    utf8_header: bool = False       # the outer header has letters beyond ASCII: needs SMTPUTF8
    outer_id: str = ""              # Message-ID that the outside sees
    payload: bytes | bytearray = field(default=b"", repr=False)     # the sealed part, for the check that follows


def make_copy(letter: Letter, group: Group) -> Copy:
    """Takes about 1 ms for a small message and 20 ms per MB; call it in a thread for large ones."""
    return _sealed_copy(letter, group) if group.sealed else _plain_copy(letter, group)


def _plain_copy(letter: Letter, group: Group) -> Copy:
    for address in group.addresses:
        if letter.recipients[address].action is not Action.PLAIN:
            raise MaloteError("a plain copy was asked for a recipient for whom that was not decided")
    return Copy(letter.received + letter.original, sealed=False)


def _sealed_copy(letter: Letter, group: Group) -> Copy:
    if letter.identity is None:
        raise MaloteError("a sealed copy was asked for without an identity to sign it")
    outer = make_outer(letter)
    sealed = seal(
        letter.original, identity=letter.identity, recipients=_seal_recipients(letter, group),
        submission_id=letter.submission_id, sent_at_ms=letter.sent_at_ms, outer=outer, fold=letter.fold,
        show_key_ids=group.kind is Kind.VISIBLE, name_recipients=group.kind is not Kind.LIST,
    )
    return Copy(sealed.raw, True, outer.needs_smtputf8, outer.message_id, sealed.payload)


def make_outer(letter: Letter) -> OuterHeaders:
    """The header that the outside sees of one sealed copy, with a Message-ID of its own."""
    return outer_headers(
        letter.original, sent_at_ms=letter.sent_at_ms, sender_domain=domain_of(letter.sender_address),
        received=letter.received, known_outer_ids=letter.known_outer_ids,
    )


def _seal_recipients(letter: Letter, group: Group) -> list[SealRecipient]:
    role = _ROLES[group.kind]
    found = []
    for address in group.addresses:
        recipient, row = letter.recipients[address], letter.rows[address]
        if recipient.card is None:
            raise KeyMissing
        key = recipient.card.encryption_key(letter.sent_at_ms)
        found.append(SealRecipient(address, key, role, row.stream, row.serial, row.prev))
    if letter.to_self is not None and group is letter.self_group and letter.identity is not None:
        row, card = letter.to_self, letter.identity.card
        found.append(SealRecipient(row.address, card.encryption_key(letter.sent_at_ms), "self", row.stream, row.serial, row.prev))
    return found


def received_line(host: str, protocol: str, now_ms: int) -> bytes:
    """Our trace line (RFC 5321 4.4): no client address, which is nobody's business, and no `for`, which may be a Bcc."""
    return _received_line(host, protocol, now_ms // 1000)


@lru_cache(maxsize=8)       # of this second
def _received_line(host: str, protocol: str, second: int) -> bytes:
    return f"Received: by {host} (malote) with {protocol};\r\n {format_date(second * 1000)}\r\n".encode()
