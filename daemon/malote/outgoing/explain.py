"""What would become of a message, and why: for `malote explain`. The daemon's own code is asked, with nobody to send to.

It looks into the store only. What RCPT refuses and what DATA refuses is told in the same words as a client gets them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import cast

from malote.config import Config
from malote.core.address import canonical_address, domain_of
from malote.core.card import parse_card
from malote.core.identity import Identity
from malote.core.message import prepare
from malote.core.policy import Action, MessageFacts, Policy, RecipientFacts, Why
from malote.errors import MaloteError
from malote.outgoing.deciding import Decider
from malote.outgoing.groups import Member, group_members
from malote.outgoing.identities import Submitter
from malote.outgoing.transaction import Recipient
from malote.store.records import LockedIdentity
from malote.store.store import Store


@dataclass(frozen=True, slots=True)
class CardShown:
    """A card that is held. `address` is that of the gateway where it serves the whole domain."""

    address: str
    fingerprint: str
    level: str              # how well it is proven
    source: str             # how it came here
    expires_at_ms: int


@dataclass(frozen=True, slots=True)
class Answer:
    """For one recipient. `action`: seal, plain, or refuse."""

    recipient: str
    action: str
    covered: bool                   # plain, but encrypted already
    reason: str
    level: str
    rule: int | None                # number of the rule that decided, from 1; None: the default row
    rules: tuple[int, ...]          # all that had a say
    patterns: tuple[str, ...]       # whom the deciding rule names
    asked_by: tuple[Why, ...]       # what asked for sealing beside the rules: card, history, reply, user
    at: str                         # where the client is told: RCPT or DATA
    had_card: bool
    card: CardShown | None


@dataclass(frozen=True, slots=True)
class CopyShown:
    """One transaction."""

    kind: str                       # visible, plain, list, bcc
    sealed: bool
    recipients: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Explanation:
    sender: str                     # From
    signer: CardShown | None        # whose identity would sign
    recipients: tuple[Answer, ...]
    refusal: str                    # the reply to the whole message; "": it is taken
    copies: tuple[CopyShown, ...] = field(default=())
    shadow: bool = False            # none of this is obeyed: all mail passes as it came
    trial: tuple[Answer, ...] = ()  # whom the rules on trial would treat otherwise


async def explain(store: Store, config: Config, sender: str, recipients: Sequence[str], content: bytes | None) -> Explanation:
    """`sender` of the envelope; `content` None: an empty message from the sender to all of them, openly. Raises `FormatError`
    for what is no address or no message."""
    identities = {each.address: each for each in await store.identities()}
    now_ms = time.time_ns() // 1_000_000
    with ThreadPoolExecutor(1) as executor:
        decider = Decider(
            # who signs is only looked up, so the locked ones do
            Policy(config.outgoing.model_copy(update={"shadow": False})), store,
            identities=lambda: cast("Mapping[str, Identity]", identities), clock_ms=lambda: now_ms, executor=executor)
        question = _Question(store, decider, identities)
        sender = canonical_address(sender) if sender else ""
        told = replace(await question.ask(sender, recipients, content), shadow=config.outgoing.shadow)
        if decider.policy.trial is None:
            return told
        decider.policy = decider.policy.trial
        tried = await question.ask(sender, recipients, content)
        before = {each.recipient: each.action for each in told.recipients}
        return replace(told, trial=tuple(each for each in tried.recipients if each.action != before[each.recipient]))


class _Question:
    def __init__(self, store: Store, decider: Decider, identities: Mapping[str, LockedIdentity]) -> None:
        self._store = store
        self._decider = decider
        self._identities = identities

    @property
    def _policy(self) -> Policy:
        return self._decider.policy

    async def ask(self, sender: str, recipients: Sequence[str], content: bytes | None) -> Explanation:
        if content is None:
            content = f"From: {sender}\r\nTo: {', '.join(recipients)}\r\n\r\n".encode()
        prepared = prepare(content, *self._policy.tags)
        author = prepared.from_address
        taken: dict[str, Recipient] = {}
        refused: dict[str, str] = {}
        for address in dict.fromkeys(canonical_address(each) for each in recipients):
            try:
                taken[address] = await self._decider.recipient(address, address, {}, sender)
            except MaloteError as error:
                refused[address] = str(error.reply)
        refusal = ""
        try:
            if taken:
                submitter = Submitter(sender, frozenset({sender, author}))      # whether a login may is another question
                await self._decider.decide(self._policy, prepared, content, taken, submitter, null_sender=not sender)
            else:
                refusal = next(iter(refused.values()), "")
        except MaloteError as error:
            refusal = str(error.reply)
        answers = [await self._answer(author, address, taken.get(address), refused.get(address, ""))
                   for address in dict.fromkeys((*taken, *refused))]
        copies: tuple[CopyShown, ...] = ()
        if not refusal:
            members = [Member(each.address, each.action is Action.SEAL, each.decision.list) for each in taken.values()
                       if each.action is not Action.REFUSE]
            copies = tuple(CopyShown(group.kind, group.sealed, group.addresses)
                           for group in group_members(members, prepared.to_cc))
        signer = None
        if any(copy.sealed for copy in copies):
            identity = self._identities.get(author) or self._identities[f"@{domain_of(author)}"]
            card = parse_card(identity.card_raw)
            signer = CardShown(card.address, card.fingerprint, "own", "", card.expires_at_ms)
        return Explanation(author, signer, tuple(answers), refusal, copies)

    async def _answer(self, author: str, address: str, taken: Recipient | None, refused: str) -> Answer:
        found = await self._decider.cards.find(address, self._decider.clock_ms())
        facts = RecipientFacts(address, found.card is not None, found.had_card)
        decision = taken.decision if taken is not None else self._policy.decide_recipient(MessageFacts(author), facts)
        rule = self._policy.table.rules[decision.rule] if decision.rule is not None else None
        return Answer(
            address, str(Action.REFUSE if refused else decision.action), decision.covered, refused or decision.reason,
            str(decision.level), decision.rule + 1 if decision.rule is not None else None,
            tuple(index + 1 for index in decision.rules), rule.recipients if rule is not None else (),
            decision.why, "RCPT" if refused else "DATA", found.had_card,
            await self._card(found.card.address) if found.card is not None else None)

    async def _card(self, address: str) -> CardShown:
        record = (await self._store.cards([address]))[address]
        card = parse_card(record.card_raw)
        return CardShown(address, card.fingerprint, str(record.level), record.evidence, card.expires_at_ms)
