"""One submitted message from its last byte to the reply: gather, decide, write down, send, answer.

The order is what keeps the promises. Everything that can refuse comes first. Then serial numbers and journal are committed, and
only after that may a final dot leave (what leaves unsealed for all has no number: `Store.begin_plain`). 250 is said only when
the upstream server has said it for every recipient. Whatever goes wrong in between ends as a temporary failure, and no plain copy
is made of what was to be sealed (copies.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

import structlog

from malote.config import LimitsConfig, OutgoingConfig
from malote.core.address import domain_of, routed_addresses
from malote.core.content import NO_CONTENT, Content, read_content
from malote.core.encrypted import Encrypted, decide_encrypted
from malote.core.identity import Identity
from malote.core.message import Prepared, complete, prepare
from malote.core.outer import reply_ids, threading_ids
from malote.core.policy import (
    Action,
    MessageDecision,
    MessageFacts,
    Policy,
    RecipientFacts,
    decide_refusal,
    left_out_reply,
    let_pass,
    named,
    refusal_of,
)
from malote.core.primitives import hmac_sha256
from malote.errors import (
    ClockWrong,
    FormatError,
    KeyMissing,
    MailLoop,
    MaloteError,
    PolicyRefused,
    Reply,
    SenderRefused,
    SentElsewhere,
    StoreUnavailable,
    TooBusy,
)
from malote.outgoing.answers import Answer, Outcome, State, decide_answer, printable
from malote.outgoing.copies import Letter, received_line
from malote.outgoing.delivery import INLINE_BYTES, LOCAL, TOO_LATE, Delivery
from malote.outgoing.directory import CardFinder
from malote.outgoing.groups import Group, Kind, Member, group_members
from malote.outgoing.identities import Submitter, check_own, decide_signer
from malote.outgoing.inflight import InFlight, Turn
from malote.outgoing.notify import may_notify, notify_sender, wants_notice
from malote.outgoing.recorder import Recorder
from malote.outgoing.shadow import Reason, Would, tell, would
from malote.outgoing.shadow import entries as shadow_entries
from malote.outgoing.transaction import Recipient, Transaction
from malote.smtp.desk import ClientSession, Params
from malote.store.records import KnownMessage, OutcomeEntry, SendIntent, SendPlan, SendRecipient, SendRow, SendState
from malote.store.records import Outcome as Written
from malote.store.store import Store

log = structlog.get_logger("malote.outgoing")
T = TypeVar("T")

FIRST_WAIT_SECONDS = 0.05       # for another process that sends the same message, and how far this grows
MOST_WAIT_SECONDS = 1.0
WORKERS = 2             # threads that seal large messages: more would only wait for each other's GIL

_WRITTEN = {
    State.ACCEPTED: Written.ACCEPTED, State.REFUSED: Written.REFUSED,
    State.DEFERRED: Written.UNSENT, State.IN_DOUBT: Written.IN_DOUBT,
}
_BEFORE = Reply(250, "2.0.0", "Accepted before")
_NOT_YOURS = Reply(550, "5.7.1", "The From address is not one of this login, and rules depend on who writes; nothing was sent")
_NOT_NOTIFIED = Reply(451, "4.3.0", "Some recipients were refused and the sender cannot be notified now, try again later")


@dataclass(slots=True)
class Line:
    """What the one log line of a message says."""

    id: str = ""
    size: int = 0
    sealed: int = 0
    plain: int = 0
    copies: int = 0
    outcome: str = "failed"
    from_address: str = ""
    why: str = ""       # it was refused by us
    states: dict[State, int] = field(default_factory=dict)

    def note_alarm(self, alarm: str) -> None:
        if alarm:
            self.outcome, self.why = "stopped", f"by the last check: {alarm}"


@dataclass(frozen=True, slots=True)
class Finished:
    reply: Reply
    plan: SendPlan | None = None    # to be forgotten once the client has proved that it read the reply


class Submissions:
    """Sends messages for all listeners. `identities`: the unlocked ones by address, asked for each message. `clock_ms`: now.
    `inflight`: the one for the whole process, kept over a reload of the configuration."""

    def __init__(self, *, config: OutgoingConfig, limits: LimitsConfig, store: Store, host: str,
                 identities: Callable[[], Mapping[str, Identity]], clock_ms: Callable[[], int],
                 inflight: InFlight | None = None, recorder: Callable[[], Recorder | None] = lambda: None) -> None:
        self.config = config
        self.policy = Policy(config)    # replaced by a reload, also for connections that are open: policy does not wait for them
        self.clock_ms = clock_ms
        self.cards = CardFinder(store)
        self._limits = limits
        self._store = store
        self._host = host
        self._identities = identities
        self._inflight = inflight if inflight is not None else InFlight()
        self._recorder = recorder       # of the audit log; asked each time, as a reload may change it
        self._executor = ThreadPoolExecutor(WORKERS, thread_name_prefix="malote-seal")

    def close(self) -> None:
        """After the last message."""
        self._executor.shutdown(wait=False)

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
            _check_envelope(policy, recipient, sender)
        return recipient

    async def _facts(self, address: str) -> RecipientFacts:
        found = await self.cards.find(address, self.clock_ms())
        return RecipientFacts(address, found.card is not None, found.had_card)

    async def send(self, session: ClientSession, tx: Transaction, submitter: Submitter, content: bytearray) -> Finished:
        """Raises `MaloteError` with the reply when nothing was sent. `content` is emptied as soon as it is not needed."""
        line = Line(size=len(content))
        started = asyncio.get_running_loop().time()
        code = 451
        try:
            finished = await self._send(session, tx, submitter, content, line)
            code = finished.reply.code
            return finished
        except MaloteError as error:
            code, line.why = error.reply.code, _why(error)
            line.outcome = "refused" if code >= 500 else "failed"
            recorder = self._recorder()
            if recorder is not None and code >= 500:
                recorder.refused(line.id, line.from_address or tx.sender, tx.recipients, error.reply, line.why)
            raise
        finally:
            self._log(session, tx, line, code, int((asyncio.get_running_loop().time() - started) * 1000))

    def refused_recipient(self, session: ClientSession, sender: str, recipient: str, error: MaloteError) -> None:
        """For the log and `malote log`: it had its answer at RCPT, and the message may never come."""
        code = error.reply.code
        log.info("recipient refused", session=session.id, reply=code, reason=_why(error))
        recorder = self._recorder()
        if recorder is not None and code >= 500:
            recorder.refused_recipient(sender, recipient, error.reply, _why(error))
        self._store.log_outcome(OutcomeEntry(
            at_ms=self.clock_ms(), direction="out", outcome="refused", account=session.user, sender=sender, recipients=1,
            detail=f"{code} {_why(error)}".rstrip()))

    async def _send(self, session: ClientSession, tx: Transaction, submitter: Submitter, content: bytearray,
                    line: Line) -> Finished:
        deadline = asyncio.get_running_loop().time() + self._limits.reply_within_seconds
        policy = self.policy
        if policy.shadow:
            return await self._pass(session, tx, submitter, content, line, deadline)
        prepared = await self._work(len(content), prepare, content, *policy.tags)   # 512 KB of header take a third of a second
        line.from_address = prepared.from_address
        check_own(submitter, prepared.from_address)
        recipients = {recipient.address: recipient for recipient in tx.recipients}
        known, identity = await self.decide(policy, prepared, content, recipients, submitter, null_sender=not tx.sender)
        digest = await self._digest(prepared)
        key = (submitter.login, prepared.from_address, digest)
        turn = self._inflight.take(key) or await self._wait_for_turn(key, tx, deadline)
        try:
            plan = await self._begin(submitter, prepared, identity, digest, recipients, tx, deadline)
            line.id = plan.submission_id.hex()
            if policy.trial is not None:
                self._write_shadow(line, _changes(recipients.values()))
            try:
                letter = await self._letter(session, prepared, identity, recipients, plan, known)
            except BaseException:
                self._store.let_go(plan)
                raise
            shown = prepared.to_cc
            del prepared
            content.clear()
            delivery = Delivery(letter, tx.lane, tx.sender, tx.params, deadline, session.keep_going, self._executor, plan.tenure)
            delivery.outcomes.update(_left_out(letter, turn))
            return await self._deliver(delivery, shown, plan, turn, tx, line)
        finally:
            self._inflight.give_back(key, turn)

    async def _pass(self, session: ClientSession, tx: Transaction, submitter: Submitter, content: bytearray, line: Line,
                    deadline: float) -> Finished:
        """In shadow mode: the bytes as they came, for everybody; what the rules would have done is only written down."""
        judged = await self._judge(tx, submitter, content, line)
        recipients = {recipient.address: recipient for recipient in tx.recipients}
        for recipient in recipients.values():
            recipient.decision, recipient.action = let_pass(recipient.address), Action.PLAIN
        original = bytes(content)
        digest = await self._work(len(original), hmac_sha256, await self._store.local_key("journal"), original)
        key = (submitter.login, line.from_address, digest)
        turn = self._inflight.take(key) or await self._wait_for_turn(key, tx, deadline)
        try:
            intent = SendIntent(submitter.login, line.from_address, b"", digest,
                                [SendRecipient(address, sealed=False) for address in recipients], self.clock_ms())
            plan = self._store.begin_plain(intent) or await self._begin_alone(intent, tx, deadline)
            line.id = plan.submission_id.hex()
            letter = Letter(
                original=original, message_id="", sender_address=line.from_address, identity=None, recipients=recipients,
                rows={row.address: row for row in plan.rows}, submission_id=plan.submission_id, sent_at_ms=plan.sent_at_ms,
                received=received_line(self._host, session.protocol, self.clock_ms()), known_outer_ids={}, fold=False,
                shown=frozenset())
            delivery = Delivery(letter, tx.lane, tx.sender, tx.params, deadline, session.keep_going, self._executor, plan.tenure)
            delivery.outcomes.update(_left_out(letter, turn))
            finished = await self._deliver(delivery, frozenset(), plan, turn, tx, line)
            if line.outcome == "plain":
                line.outcome = "shadow"
            self._write_shadow(line, judged)
            return finished
        finally:
            self._inflight.give_back(key, turn)

    async def _judge(self, tx: Transaction, submitter: Submitter, content: bytearray, line: Line) -> list[Would]:
        """What enforcement would do. Raises only what is no matter of the rules: a loop, and a From that a bound login may not
        use."""
        line.from_address = tx.sender
        policy, judged = self.policy, []
        asked: dict[str, Recipient] = {}
        for each in tx.recipients:
            decision = policy.decide_recipient(MessageFacts(tx.sender), each.facts)
            like = Recipient(each.address, each.path, each.params, each.card, each.had_card, decision, policy, each.routes)
            try:
                _check_envelope(policy, like, tx.sender)
            except MaloteError:
                judged.append(would(each.address, decision, refusal=Reason.RULE))
            else:
                asked[each.address] = like
        refusal: Reason | None = None
        try:
            prepared = await self._work(len(content), prepare, content, *policy.tags)
            line.from_address = prepared.from_address
            check_own(submitter, prepared.from_address)
            await self.decide(policy, prepared, content, asked, submitter, null_sender=not tx.sender)
        except MailLoop:
            raise
        except FormatError as error:
            if submitter.bound:
                raise
            log.info("shadow", reason=_why(error))
            return [would(address, None) for address in asked] + judged
        except SenderRefused:
            if submitter.bound and not submitter.owns(line.from_address):
                raise
            refusal = Reason.SENDER
        except MaloteError:
            refusal = Reason.OTHERS
        except Exception as error:  # noqa: BLE001 - a border: nothing that goes wrong in judging stops the mail
            log.warning("shadow: not judged", error=type(error).__name__)
            return []
        return [would(each.address, each.decision, refusal=refusal) for each in asked.values()] + judged

    def _write_shadow(self, line: Line, judged: Sequence[Would]) -> None:
        if not judged:
            return
        tell(judged, message_id=line.id)
        for entry in shadow_entries(judged, message_id=line.id, now_ms=self.clock_ms()):
            self._store.log_outcome(entry)

    async def _wait_for_turn(self, key: Hashable, tx: Transaction, deadline: float) -> Turn:
        await tx.end()      # who waits holds no connection that the other may need
        try:
            async with asyncio.timeout_at(deadline):
                return await self._inflight.wait(key)
        except TimeoutError:
            raise MaloteError("an identical message took too long", reply=TOO_LATE) from None

    # decide

    async def decide(self, policy: Policy, prepared: Prepared, content: bytes | bytearray, recipients: Mapping[str, Recipient],
                     submitter: Submitter, *, null_sender: bool) -> tuple[Mapping[str, str], Identity | None]:
        """Sets `Recipient.decision` and `action`; gives the outer ids of what it answers, and who signs. `malote explain` asks
        this too. Raises `MaloteError` when the whole message is refused."""
        ids = threading_ids(prepared.kept)
        messages = await self._store.known_messages(ids) if ids else {}
        known = {inner_id: message.outer_id for inner_id, message in messages.items()}
        if known:
            _mark_outsiders(recipients.values(), prepared, messages)
        encrypted = await self._work(len(content), decide_encrypted, content)
        asked = NO_CONTENT
        table = (policy.trial or policy).table      # a table with more rules asks for more
        if table.asks_content:
            asked = await self._work(len(content), partial(
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

    async def _digest(self, prepared: Prepared) -> bytes:
        """What makes two submissions the same: the bytes after the removals, under a key that never leaves this store."""
        key = await self._store.local_key("journal")
        parts = prepared.stripped_parts
        digest = await self._work(len(prepared.submitted), hmac_sha256, key, *parts)
        for part in parts:      # the thread may hold it a moment longer, and the submitted bytes could not be given back
            if isinstance(part, memoryview):
                part.release()
        return digest

    async def _work(self, size: int, function: Callable[..., T], *arguments: object) -> T:
        """Here, or in a thread where it takes long enough for other clients to notice."""
        if size <= INLINE_BYTES:
            return function(*arguments)
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, *arguments)

    # write down

    async def _begin(self, submitter: Submitter, prepared: Prepared, identity: Identity | None, digest: bytes,
                     recipients: Mapping[str, Recipient], tx: Transaction, deadline: float) -> SendPlan:
        from_address = prepared.from_address
        wanted = [SendRecipient(each.address, each.action is Action.SEAL) for each in recipients.values()]
        if self._blob_to_self(identity, from_address, recipients):
            wanted.append(SendRecipient(from_address, sealed=True))
        skid = identity.signing.public.id if identity is not None else b""
        intent = SendIntent(submitter.login, from_address, skid, digest, wanted, self.clock_ms())
        if not any(each.sealed for each in wanted) and not prepared.needs_date and not prepared.needs_message_id:
            # what leaves unsealed for all is one copy in one transaction, and its bytes need nothing from the journal
            plan = self._store.begin_plain(intent)
            if plan is not None:
                return plan
        return await self._begin_alone(intent, tx, deadline)

    async def _begin_alone(self, intent: SendIntent, tx: Transaction, deadline: float) -> SendPlan:
        """Wait, as for `InFlight`, until no other process that shares the store sends the same."""
        wait = FIRST_WAIT_SECONDS
        while True:
            try:
                return await self._store.begin_send(replace(intent, now_ms=self.clock_ms()))
            except SentElsewhere:
                await tx.end()
                if asyncio.get_running_loop().time() + wait > deadline:
                    raise
            await asyncio.sleep(wait)
            wait = min(wait * 1.5, MOST_WAIT_SECONDS)

    def _blob_to_self(self, identity: Identity | None, from_address: str, recipients: Mapping[str, Recipient]) -> bool:
        return self.config.seal_to_self and identity is not None and from_address not in recipients

    async def _letter(self, session: ClientSession, prepared: Prepared, identity: Identity | None,
                      recipients: Mapping[str, Recipient], plan: SendPlan, known: Mapping[str, str]) -> Letter:
        from_address = prepared.from_address
        message_id = f"<{plan.submission_id.hex()}@{domain_of(from_address)}>"
        original = complete(prepared, date_ms=plan.first_at_ms, message_id=message_id)
        rows = {row.address: row for row in plan.rows}
        return Letter(
            original=original, message_id=prepared.message_id or message_id, sender_address=from_address, identity=identity,
            recipients=recipients, rows=rows, submission_id=plan.submission_id, sent_at_ms=plan.sent_at_ms,
            received=received_line(self._host, session.protocol, self.clock_ms()), known_outer_ids=known, fold=self.config.fold,
            shown=prepared.to_cc,
            to_self=rows[from_address] if self._blob_to_self(identity, from_address, recipients) else None,
        )

    # send

    async def _deliver(self, delivery: Delivery, shown: frozenset[str], plan: SendPlan, turn: Turn, tx: Transaction,
                       line: Line) -> Finished:
        letter = delivery.letter
        before = {address: Outcome(State.ACCEPTED, _BEFORE) for address in letter.recipients
                  if address in turn.earlier or letter.rows[address].state is SendState.ACCEPTED}
        groups = self._groups(letter, shown, before)
        letter.self_group = _with_own_blob(groups, letter)
        recorder = self._recorder()
        answer: Answer | None = None
        sent = False
        try:
            held_back = await recorder.leaving(letter, groups, delivery.deadline) if recorder is not None else None
            sent = held_back is None
            if held_back is None:
                await delivery.run(groups, tx)
            else:
                delivery.outcomes.update(held_back)
            answer = self._answer(letter, before | delivery.outcomes, tx)
        finally:    # also when cut off: what is known to be accepted must not be sent again
            outcomes = before | delivery.outcomes
            if recorder is not None and sent:
                recorder.left(letter, groups, outcomes)
            turn.accepted.update((address, each.reply) for address, each in outcomes.items() if each.state is State.ACCEPTED)
            self._count(line, letter, outcomes, delivery.copies)
            line.note_alarm(delivery.alarm)
            done = all(outcome.state is State.ACCEPTED for outcome in outcomes.values())
            await self._finish(plan, delivery, turn, wait=not done, telling=answer.notify if answer is not None else ())
        if delivery.outer_ids:
            self._store.remember_outer_id(letter.message_id, delivery.outer_ids[0], self.clock_ms())
        if answer.notify and not await self._tell(answer.notify, outcomes, delivery, plan, tx):
            line.note_alarm(delivery.alarm)
            return Finished(_NOT_NOTIFIED)
        if answer.settled:
            await self._settle(answer, outcomes, plan, turn)
        reply = _split_reply(letter, answer.reply) if line.outcome == "split" else answer.reply
        return Finished(reply, plan if reply.code // 100 == 2 else None)

    def _answer(self, letter: Letter, outcomes: Mapping[str, Outcome], tx: Transaction) -> Answer:
        relay = (self.config.partial_failure == "relay"
                 and not all(outcome.state is State.ACCEPTED for outcome in outcomes.values()))
        silent = frozenset(each.address for each in letter.recipients.values() if relay and not wants_notice(each.params))
        return decide_answer(outcomes, relay=relay, can_notify=relay and may_notify(tx.sender, letter), silent=silent)

    async def _tell(self, refused: Sequence[str], outcomes: Mapping[str, Outcome], delivery: Delivery, plan: SendPlan,
                    tx: Transaction) -> bool:
        """Whether the sender has been told of these. If not, nothing keeps another process from trying."""
        recorder, letter, told = self._recorder(), delivery.letter, False
        try:
            if recorder is None or await recorder.notifying(letter, tx.sender, refused, delivery.deadline):
                try:
                    told = await notify_sender(refused, outcomes, delivery, tx, host=self._host,
                                               remote=self.config.upstream.host, now_ms=self.clock_ms())
                finally:
                    if recorder is not None:
                        recorder.notified(letter, tx.sender, refused, accepted=told)
        finally:
            if not told:
                await self._write(plan, {
                    address: (Written.REFUSED, str(outcomes[address].reply)[:500]) for address in refused})
        return told

    async def _settle(self, answer: Answer, outcomes: Mapping[str, Outcome], plan: SendPlan, turn: Turn) -> None:
        """The sender has been told of these refusals: a client that comes again, as it did not get our 250, causes nothing."""
        turn.accepted.update((address, _BEFORE) for address in answer.settled)
        written = {address: (Written.SETTLED, str(outcomes[address].reply)[:500]) for address in answer.settled}
        await self._write(plan, written)

    def _groups(self, letter: Letter, shown: frozenset[str], before: Mapping[str, Outcome]) -> tuple[Group, ...]:
        members = [
            Member(each.address, each.action is Action.SEAL, each.decision.list, letter.rows[each.address].stream)
            for each in letter.recipients.values()
            if each.address not in before and each.action is not Action.REFUSE and each.refused is None
        ]
        return group_members(members, shown, reserve=1 if letter.to_self is not None else 0)

    async def _finish(self, plan: SendPlan, delivery: Delivery, turn: Turn, *, wait: bool, telling: Sequence[str]) -> None:
        """Write the outcomes down. Nothing is taken back if that fails: what is in doubt in the journal is sent again under the
        same number, and the receiver sees that it is the same. `telling`: of these the sender is told next."""
        outcomes = {address: (_WRITTEN[each.state], str(each.reply)[:500]) for address, each in delivery.outcomes.items()}
        for row in plan.rows:
            if row.address in turn.earlier and row.address not in delivery.outcomes:
                outcomes[row.address] = (Written.UNSENT, "")    # another took it: this number was never used
        own, group = delivery.letter.to_self, delivery.letter.self_group
        if own is not None:
            shared = [outcomes[address] for address in group.addresses] if group is not None else []
            outcomes[own.address] = min(shared, key=lambda each: _SELF_ORDER.index(each[0]), default=(Written.UNSENT, ""))
        outcomes |= dict.fromkeys(telling, (Written.HELD, ""))
        if wait:
            await self._write(plan, outcomes)
        else:
            self._store.finish_send_later(plan, outcomes, self.clock_ms())

    async def _write(self, plan: SendPlan, outcomes: Mapping[str, tuple[Written, str]]) -> None:
        try:
            await self._store.finish_send(plan, outcomes, self.clock_ms())
        except StoreUnavailable as error:
            log.warning("outcome not written down", id=plan.submission_id.hex(), error=type(error).__name__)

    # tell

    def _count(self, line: Line, letter: Letter, outcomes: Mapping[str, Outcome], copies: int) -> None:
        for outcome in outcomes.values():
            line.states[outcome.state] = line.states.get(outcome.state, 0) + 1
        line.sealed = sum(recipient.action is Action.SEAL for recipient in letter.recipients.values())
        line.plain = sum(recipient.action is Action.PLAIN for recipient in letter.recipients.values())
        line.copies = copies
        if line.states.get(State.ACCEPTED) == len(outcomes):
            line.outcome = "sealed" if not line.plain else "plain" if not line.sealed else "split"
        elif line.states.get(State.REFUSED) and not line.states.get(State.DEFERRED) and not line.states.get(State.IN_DOUBT):
            line.outcome = "partial" if line.states.get(State.ACCEPTED) else "refused"

    def _log(self, session: ClientSession, tx: Transaction, line: Line, code: int, took_ms: int) -> None:
        states = {state.value.replace("-", "_"): count for state, count in line.states.items()}
        log.info(
            "message", id=line.id, direction="out", outcome=line.outcome, reply=code, session=session.id, bytes=line.size,
            sealed=line.sealed, plain=line.plain, copies=line.copies, ms=took_ms, **states,
            login=session.user, sender=tx.sender, recipients=[recipient.address for recipient in tx.recipients],
            **({"reason": line.why} if line.why else {}),
        )
        self._store.log_outcome(OutcomeEntry(
            at_ms=self.clock_ms(), direction="out", outcome=line.outcome, account=session.user, message_id=line.id,
            sender=line.from_address, recipients=len(tx.recipients), detail=f"{code} {line.why}".rstrip(), took_ms=took_ms))


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


def _changes(recipients: Iterable[Recipient]) -> list[Would]:
    """Whom the rules on trial would treat otherwise."""
    tried = [(each.address, each.action, *each.trial) for each in recipients if each.trial is not None]
    return [would(address, decision, refusal=Reason.OTHERS if action is Action.REFUSE else None)
            for address, done, action, decision in tried if action is not done]


def _check_envelope(policy: Policy, recipient: Recipient, sender: str) -> None:
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


_WHY: Mapping[type[MaloteError], str] = {       # never the reply's text, which names the recipients
    KeyMissing: "no card", SenderRefused: "no identity that may sign", PolicyRefused: "by a rule", FormatError: "no mail",
    MailLoop: "a loop", TooBusy: "too busy", ClockWrong: "the clock is wrong", StoreUnavailable: "the store is not available",
}


def _why(error: MaloteError) -> str:
    return next((why for kind, why in _WHY.items() if isinstance(error, kind)), "")


def _left_out(letter: Letter, turn: Turn) -> dict[str, Outcome]:
    """Those who get nothing: they may not have what the others get (`mixed = "split"`), or the upstream server refused them at
    RCPT and this is not the message that they have had. Reported as refusals after RCPT are."""
    return {each.address: Outcome(State.REFUSED, each.refused or left_out_reply(each.decision))
            for each in letter.recipients.values()
            if (each.action is Action.REFUSE or each.refused is not None) and each.address not in turn.earlier
            and letter.rows[each.address].state is not SendState.ACCEPTED}


def _split_reply(letter: Letter, reply: Reply) -> Reply:
    """A person is told who got it in clear, as far as a reply can: RFC 9787 9.6."""
    clear = [each.address for each in letter.recipients.values() if each.decision.clear]
    if reply.code // 100 != 2 or not clear:
        return reply
    return Reply(reply.code, reply.enhanced, f"{reply.text}\nNOT sealed for {named(clear)}")


# One blob serves several recipients of a copy: it went out as soon as it went out for one of them.
_SELF_ORDER = (Written.ACCEPTED, Written.IN_DOUBT, Written.REFUSED, Written.UNSENT)


def _with_own_blob(groups: Sequence[Group], letter: Letter) -> Group | None:
    """The copy that a blob to the sender goes into: the first shared one, never a Bcc copy; and of the same numbering."""
    own = letter.to_self
    return next((group for group in groups if own is not None and group.kind in (Kind.VISIBLE, Kind.LIST)
                 and letter.rows[group.addresses[0]].stream == own.stream), None)


__all__ = ["LOCAL", "Finished", "SendRow", "Submissions"]
