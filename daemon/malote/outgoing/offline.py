"""Sealing without a server: the copies of one message as files, for `malote seal`.

The serial numbers are as real as those of the proxy: they come from the store, committed before anything is sealed. Whether the
copies are ever sent is not known here, so no later message names them as its predecessor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from malote.config import OutgoingConfig
from malote.core.address import domain_of
from malote.core.identity import Identity
from malote.core.message import complete, prepare
from malote.core.policy import Action, MessageFacts, Policy, RecipientFacts
from malote.core.primitives import hmac_sha256, random_bytes
from malote.errors import KeyMissing
from malote.outgoing.clearance import clear
from malote.outgoing.copies import Letter, make_copy
from malote.outgoing.directory import CardFinder
from malote.outgoing.groups import Member, group_members
from malote.outgoing.transaction import Recipient
from malote.store.records import Outcome, SendIntent, SendRecipient
from malote.store.store import Store


@dataclass(frozen=True, slots=True)
class SealedCopy:
    """One message to be sent to exactly these addresses."""

    recipients: tuple[str, ...]
    raw: bytes = field(repr=False)


async def seal_offline(submitted: bytes, recipients: Sequence[str], *, identities: Mapping[str, Identity], store: Store,
                       config: OutgoingConfig, now_ms: int) -> list[SealedCopy]:
    """Seal for all of `recipients` (canonical addresses; none: those in To and Cc). Those in neither get copies of their own.

    Raises `KeyMissing` naming who has no card, or the sender without an identity; `FormatError` for the message.
    """
    prepared = prepare(submitted, *Policy(config).tags)
    wanted = list(dict.fromkeys(recipients)) or sorted(prepared.to_cc)
    if not wanted:
        raise KeyMissing("the message names nobody in To or Cc", hint="name the recipients with --to")
    sender = prepared.from_address
    identity = identities.get(sender) or identities.get(f"@{domain_of(sender)}")
    if identity is None:
        raise KeyMissing(f"there is no identity for {sender}, nothing was sealed", hint=f"malote keys new {sender}")
    people = await _recipients(wanted, sender, CardFinder(store), config, now_ms)
    # a journal entry of its own each time: sealing the same file twice makes two messages
    digest = hmac_sha256(await store.local_key("journal"), random_bytes(32))
    plan = await store.begin_send(SendIntent("", sender, identity.signing.public.id, digest,
                                             [SendRecipient(address, sealed=True) for address in wanted], now_ms))
    await store.finish_send(plan, dict.fromkeys(wanted, (Outcome.UNSENT, "")), now_ms)
    message_id = f"<{plan.submission_id.hex()}@{domain_of(sender)}>"
    letter = Letter(
        original=complete(prepared, date_ms=plan.first_at_ms, message_id=message_id),
        message_id=prepared.message_id or message_id, sender_address=sender, identity=identity, recipients=people,
        rows={row.address: row for row in plan.rows}, submission_id=plan.submission_id, sent_at_ms=plan.sent_at_ms,
        received=b"", known_outer_ids={}, fold=config.fold, shown=prepared.to_cc,
    )
    members = [Member(address, sealed=True, stream=letter.rows[address].stream) for address in wanted]
    return [SealedCopy(group.addresses, clear(letter, group, make_copy(letter, group)).raw)
            for group in group_members(members, prepared.to_cc)]


async def _recipients(wanted: Sequence[str], sender: str, finder: CardFinder, config: OutgoingConfig,
                      now_ms: int) -> dict[str, Recipient]:
    found = {address: await finder.find(address, now_ms) for address in wanted}
    missing = [address for address, each in found.items() if each.card is None]
    if missing:
        raise KeyMissing(f"no card that can be used for {', '.join(missing)}; nothing was sealed", hint="malote keys import FILE")
    people, policy = {}, Policy(config)
    for address, each in found.items():
        decision = policy.decide_recipient(MessageFacts(sender), RecipientFacts(address, card=True, had_card=True))
        people[address] = Recipient(address, address, {}, each.card, had_card=True, decision=decision, action=Action.SEAL)
    return people
