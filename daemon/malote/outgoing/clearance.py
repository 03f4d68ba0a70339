"""Leave to go: nothing is written to the upstream server as a message without it, and nobody but the last check gives it.

A copy is looked at once, right after it was made and in the same thread (`core.proof`; large ones take a moment). What it gives
is tied to those very bytes, which cannot change, and to the recipients. The second look, `Clearance.check`, comes where
the bytes are written, and asks: are these the bytes, are these the recipients, was plain text decided for every one of them?
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from malote.config import Level
from malote.core.address import domain_of
from malote.core.policy import Action
from malote.core.proof import Facts, check_sealed
from malote.core.proof_plain import check_covered, check_notice
from malote.errors import NotProven
from malote.outgoing.copies import Copy, Letter
from malote.outgoing.groups import Group
from malote.outgoing.transaction import Recipient


@dataclass(frozen=True, slots=True)
class Clearance:
    """One copy that may leave, and who may get it. Made by `clear` alone."""

    raw: bytes = field(repr=False)
    sealed: bool
    utf8_header: bool               # the outer header has letters beyond ASCII: needs SMTPUTF8
    outer_id: str                   # Message-ID that the outside sees of a sealed copy
    recipients: tuple[Recipient, ...]

    def check(self, content: bytes | bytearray, paths: Sequence[str]) -> None:
        """At the last moment. `content`: what will be written, `paths`: who the server was told it is for. Raises `NotProven`."""
        if not paths or not {each.path for each in self.recipients}.issuperset(paths):
            raise NotProven("recipients who are not of this copy")
        if not self.sealed:
            _check_plain(self.recipients)
        elif content is not self.raw:   # what is sealed has no line that begins with a dot: nothing was to be done to it
            raise NotProven("other bytes than those that were looked at")


def clear(letter: Letter, group: Group, copy: Copy) -> Clearance:
    """Raises `NotProven` unless this copy of the letter may go to this group."""
    recipients = tuple(letter.recipients[address] for address in group.addresses)
    if copy.sealed:
        check_sealed(copy.raw, _facts(letter, recipients, copy, with_self=group is letter.self_group))
        return Clearance(copy.raw, True, copy.utf8_header, copy.outer_id, recipients)
    _check_plain(recipients)
    if any(_must_be_encrypted(recipient) for recipient in recipients):
        check_covered(letter.original)
        if copy.raw != letter.received + letter.original:
            raise NotProven("other bytes than those that are encrypted")
    return Clearance(copy.raw, False, False, "", recipients)


def _check_plain(recipients: Sequence[Recipient]) -> None:
    for recipient in recipients:
        if recipient.action is not Action.PLAIN or recipient.decision.action is not Action.PLAIN:
            raise NotProven("a plain copy for somebody who gets it sealed")
        if _must_be_encrypted(recipient) and not recipient.decision.covered:
            raise NotProven("a plain copy where sealing is required")


def _must_be_encrypted(recipient: Recipient) -> bool:
    return recipient.decision.level is Level.REQUIRE


@dataclass(frozen=True, slots=True)
class NoticeClearance:
    """For a notice to the sender about some of the recipients of a letter (notice.py). It leaves unsealed."""

    letter: Letter
    sender: str

    def check(self, content: bytes | bytearray, paths: Sequence[str]) -> None:
        """As `Clearance.check`. Where nothing was to be sealed, the notice tells nothing that did not leave anyway."""
        if list(paths) != [self.sender]:
            raise NotProven("a notice to somebody else")
        if any(recipient.action is not Action.PLAIN for recipient in self.letter.recipients.values()):
            check_notice(bytes(content), self.sender, _header_facts(self.letter))


def _header_facts(letter: Letter, kids: tuple[str, ...] = (), payload: bytes | bytearray = b"", outer_id: str = "") -> Facts:
    return Facts(
        sender=letter.sender_address, shown=letter.shown, sent_at_ms=letter.sent_at_ms, received=letter.received,
        original=letter.original, message_id=letter.message_id, outer_ids=letter.known_outer_ids.values(), kids=kids,
        payload=payload, outer_id=outer_id)


def _facts(letter: Letter, recipients: Sequence[Recipient], copy: Copy, *, with_self: bool) -> Facts:
    shown = letter.shown
    visible = all(recipient.address in shown for recipient in recipients)
    if not visible and len(recipients) > 1 and not all(recipient.decision.list for recipient in recipients):
        raise NotProven("recipients who may not know of each other")
    cards = [recipient.card for recipient in recipients]
    for recipient, card in zip(recipients, cards, strict=True):
        if card is not None and card.address not in (recipient.address, f"@{domain_of(recipient.address)}"):
            raise NotProven("somebody else's card")
    if with_self and letter.identity is not None:
        cards.append(letter.identity.card)
    kids = []
    for card in cards:
        if card is None:
            raise NotProven("a sealed copy for somebody without a card")
        kids.append(card.encryption_key(letter.sent_at_ms).id[:8].hex() if visible else "")
    if not copy.outer_id:
        raise NotProven("a sealed copy without a name")
    return _header_facts(letter, tuple(kids), copy.payload, copy.outer_id)
