"""What becomes of each recipient of one message, and who signs: all that the rules are asked, at RCPT and again at DATA.

The proxy obeys it, shadow mode notes it (judging.py), `malote explain` tells it (explain.py). Nothing is sent or written here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from functools import partial
from typing import TypeVar

from malote.core.address import domain_of, routed_addresses
from malote.core.content import NO_CONTENT, Content, read_content
from malote.core.encrypted import Encrypted, decide_encrypted
from malote.core.identity import Identity
from malote.core.message import Prepared
from malote.core.outer import reply_ids, threading_ids
from malote.core.policy import (
    Action,
    MessageDecision,
    MessageFacts,
    Policy,
    RecipientFacts,
    decide_refusal,
    let_pass,
    refusal_of,
)
from malote.errors import PolicyRefused, Reply, SenderRefused
from malote.outgoing.answers import printable
from malote.outgoing.delivery import INLINE_BYTES
from malote.outgoing.directory import CardFinder
from malote.outgoing.identities import Submitter, decide_signer
from malote.outgoing.transaction import Recipient
from malote.smtp.desk import Params
from malote.store.records import KnownMessage
from malote.store.store import Store

T = TypeVar("T")

_NOT_YOURS = Reply(550, "5.7.1", "The From address is not one of this login, and rules depend on who writes; nothing was sent")


class Decider:
    """Asks the rules. `identities`: those that can sign, by address, asked for each message."""

    def __init__(self, policy: Policy, store: Store, *, identities: Callable[[], Mapping[str, Identity]],
                 clock_ms: Callable[[], int], executor: Executor) -> None:
        self.policy = policy    # replaced by a reload, also for connections that are open: policy does not wait for them
        self.cards = CardFinder(store)
        self.clock_ms = clock_ms
        self._store = store
        self._identities = identities
        self._executor = executor

    async def recipient(self, address: str, path: str, params: Params, sender: str) -> Recipient:
        """Look up the card and decide what the envelope alone shows. Raises `KeyMissing`, `PolicyRefused` for a refusal."""
        policy = self.policy
        found = await self.cards.find(address, self.clock_ms())
        decision = policy.decide_recipient(
            MessageFacts(sender), RecipientFacts(address, found.card is not None, found.had_card))
        routes = tuple([await self._facts(target) for target in routed_addresses(address)])
        recipient = Recipient(address, path, params, found.card, found.had_card, decision, policy, routes)
        if policy.shadow:
            recipient.decision = let_pass(address)
        else:
            check_envelope(policy, recipient, sender)
        return recipient

    async def _facts(self, address: str) -> RecipientFacts:
        found = await self.cards.find(address, self.clock_ms())
        return RecipientFacts(address, found.card is not None, found.had_card)

    async def decide(self, policy: Policy, prepared: Prepared, content: bytes | bytearray, recipients: Mapping[str, Recipient],
                     submitter: Submitter, *, null_sender: bool) -> tuple[Mapping[str, str], Identity | None]:
        """Sets `Recipient.decision` and `action`; gives the outer ids of what it answers, and who signs. `malote explain` asks
        this too. Raises `MaloteError` when the whole message is refused."""
        ids = threading_ids(prepared.kept)
        messages = await self._store.known_messages(ids) if ids else {}
        known = {inner_id: message.outer_id for inner_id, message in messages.items()}
        if known:
            _mark_outsiders(recipients.values(), prepared, messages)
        encrypted = await self.work(len(content), decide_encrypted, content)
        asked = NO_CONTENT
        table = (policy.trial or policy).table      # a table with more rules asks for more
        if table.asks_content:
            asked = await self.work(len(content), partial(
                read_content, prepared.kept, content, table.wanted, null_sender=null_sender))
        return known, self._decide(policy, recipients, prepared, encrypted, asked, submitter, reply=bool(known))

    def _decide(self, policy: Policy, recipients: Mapping[str, Recipient], prepared: Prepared, encrypted: Encrypted,
                content: Content, submitter: Submitter, *, reply: bool) -> Identity | None:
        """The final action of each recipient, and who signs. Raises `MaloteError` when the whole message is refused."""
        from_address, table = prepared.from_address, policy.table
        identities = self._identities()
        exists = from_address in identities or f"@{domain_of(from_address)}" in identities
        if table.asks_sender and not submitter.owns(from_address):      # or whoever wants a weaker rule writes another From
            raise SenderRefused("rules tell senders apart", reply=_NOT_YOURS)
        changed = any(recipient.policy is not policy for recipient in recipients.values())
        if (changed or prepared.controls is not None or reply or encrypted != "no" or not exists
                or table.asks_sender or table.asks_content):
            facts = MessageFacts(from_address, exists, prepared.controls, reply, encrypted, content)
            decided = policy.decide_message(facts, [recipient.facts for recipient in recipients.values()])
            for recipient, decision in zip(recipients.values(), decided.decisions, strict=True):
                recipient.decision = decision
                if decision.action is Action.PLAIN:
                    _check_routes(policy, facts, recipient.routes)
        else:       # RCPT had all of it
            decisions = tuple([recipient.decision for recipient in recipients.values()])
            decided = MessageDecision(decisions, decide_refusal(decisions))
        decided.check()
        sealing = any(decision.action is Action.SEAL for decision in decided.decisions)
        identity = decide_signer(identities, submitter, from_address) if sealing else None
        for recipient in recipients.values():
            recipient.action = recipient.decision.action
        if policy.trial is not None:
            facts = MessageFacts(from_address, exists, prepared.controls, reply, encrypted, content)
            _try(policy.trial, facts, recipients.values())
        return identity

    async def work(self, size: int, function: Callable[..., T], *arguments: object) -> T:
        """Here, or in a thread where it takes long enough for other clients to notice."""
        if size <= INLINE_BYTES:
            return function(*arguments)
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, *arguments)


def _mark_outsiders(recipients: Iterable[Recipient], prepared: Prepared, known: Mapping[str, KnownMessage]) -> None:
    """Who had no part in the opened message that this one answers: what In-Reply-To names, else the nearest of References."""
    answered, earlier = reply_ids(prepared.kept)
    opened = [known[each] for each in answered if each in known and known[each].participants is not None]
    opened = opened or [known[each] for each in earlier if each in known and known[each].participants is not None][:1]
    for recipient in recipients:
        recipient.outsider = (recipient.address != prepared.from_address
                              and not all(each.had_part(recipient.address) for each in opened))


def _try(trial: Policy, facts: MessageFacts, recipients: Iterable[Recipient]) -> None:
    """What the rules on trial would do: nothing of it is obeyed."""
    recipients = list(recipients)
    decided = trial.decide_message(facts, [recipient.facts for recipient in recipients])
    for recipient, decision in zip(recipients, decided.decisions, strict=True):
        recipient.trial = Action.REFUSE if decided.refusal is not None else decision.action, decision


def check_envelope(policy: Policy, recipient: Recipient, sender: str) -> None:
    """Raises what RCPT is answered already."""
    if recipient.decision.action is Action.PLAIN:
        _check_routes(policy, MessageFacts(sender), recipient.routes)
    if recipient.decision.action is Action.REFUSE:
        refused = policy.decide_envelope(recipient.facts, sender)
        if refused is not None:
            raise refusal_of([refused])


def _check_routes(policy: Policy, message: MessageFacts, routes: Sequence[RecipientFacts]) -> None:
    """What must be sealed for bob@b.example does not leave in clear for bob%b.example@relay. Raises `PolicyRefused`."""
    for target in routes:
        if policy.decide_recipient(message, target).action is not Action.PLAIN:
            text = f"Mail for {printable(target.address)} must be sealed, so write to that address itself; nothing was sent"
            raise PolicyRefused("a route to a recipient whose mail is sealed", reply=Reply(550, "5.7.1", text))
