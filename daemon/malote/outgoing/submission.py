"""One submitted message from its last byte to the reply: gather, decide, write down, send, answer.

The order is what keeps the promises. Everything that can refuse comes first. Then serial numbers and journal are committed, and
only after that may a final dot leave (what leaves unsealed for all has no number: `Store.begin_plain`). 250 is said only when
the upstream server has said it for every recipient. Whatever goes wrong in between ends as a temporary failure, and no plain copy
is made of what was to be sealed (copies.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import structlog

from malote.config import LimitsConfig, OutgoingConfig
from malote.core.address import domain_of
from malote.core.identity import Identity
from malote.core.message import Prepared, complete, prepare
from malote.core.policy import Action, Policy, left_out_reply, let_pass, named
from malote.core.primitives import hmac_sha256
from malote.errors import MaloteError, Reply, SentElsewhere, StoreUnavailable
from malote.outgoing.answers import Answer, Outcome, State, decide_answer
from malote.outgoing.copies import Letter, received_line
from malote.outgoing.deciding import Decider
from malote.outgoing.delivery import TOO_LATE, Delivery
from malote.outgoing.groups import Group, Kind, Member, group_members
from malote.outgoing.identities import Submitter, check_own
from malote.outgoing.inflight import InFlight, Turn
from malote.outgoing.judging import changes, judge
from malote.outgoing.notify import may_notify, notify_sender, wants_notice
from malote.outgoing.recorder import Recorder
from malote.outgoing.reporting import Line, Reporter
from malote.outgoing.transaction import Recipient, Transaction
from malote.smtp.desk import ClientSession
from malote.store.records import Outcome as Written
from malote.store.records import SendIntent, SendPlan, SendRecipient, SendState
from malote.store.store import Store

log = structlog.get_logger("malote.outgoing")

FIRST_WAIT_SECONDS = 0.05       # for another process that sends the same message, and how far this grows
MOST_WAIT_SECONDS = 1.0
WORKERS = 2             # threads that seal large messages: more would only wait for each other's GIL

_WRITTEN = {
    State.ACCEPTED: Written.ACCEPTED, State.REFUSED: Written.REFUSED,
    State.DEFERRED: Written.UNSENT, State.IN_DOUBT: Written.IN_DOUBT,
}
_BEFORE = Reply(250, "2.0.0", "Accepted before")
_NOT_NOTIFIED = Reply(451, "4.3.0", "Some recipients were refused and the sender cannot be notified now, try again later")


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
        self.clock_ms = clock_ms
        self._limits = limits
        self._store = store
        self._host = host
        self._inflight = inflight if inflight is not None else InFlight()
        self._executor = ThreadPoolExecutor(WORKERS, thread_name_prefix="malote-seal")
        self.decider = Decider(Policy(config), store, identities=identities, clock_ms=clock_ms, executor=self._executor)
        self.reporter = Reporter(store, clock_ms=clock_ms, recorder=recorder)

    def close(self) -> None:
        """After the last message."""
        self._executor.shutdown(wait=False)

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
            code = error.reply.code
            self.reporter.failed(tx, line, error)
            raise
        finally:
            self.reporter.finished(session, tx, line, code, int((asyncio.get_running_loop().time() - started) * 1000))

    async def _send(self, session: ClientSession, tx: Transaction, submitter: Submitter, content: bytearray,
                    line: Line) -> Finished:
        deadline = asyncio.get_running_loop().time() + self._limits.reply_within_seconds
        policy = self.decider.policy
        if policy.shadow:
            return await self._pass(session, tx, submitter, content, line, deadline)
        prepared = await self.decider.work(len(content), prepare, content, *policy.tags)   # a header takes up to 0.3 s
        line.from_address = prepared.from_address
        check_own(submitter, prepared.from_address)
        recipients = {recipient.address: recipient for recipient in tx.recipients}
        known, identity = await self.decider.decide(policy, prepared, content, recipients, submitter, null_sender=not tx.sender)
        digest = await self._digest(prepared)
        key = (submitter.login, prepared.from_address, digest)
        turn = self._inflight.take(key) or await self._wait_for_turn(key, tx, deadline)
        try:
            plan = await self._begin(submitter, prepared, identity, digest, recipients, tx, deadline)
            line.id = plan.submission_id.hex()
            if policy.trial is not None:
                self.reporter.judged(line, changes(recipients.values()))
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
        judged = await judge(self.decider, tx, submitter, content, line)
        recipients = {recipient.address: recipient for recipient in tx.recipients}
        for recipient in recipients.values():
            recipient.decision, recipient.action = let_pass(recipient.address), Action.PLAIN
        original = bytes(content)
        digest = await self.decider.work(len(original), hmac_sha256, await self._store.local_key("journal"), original)
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
            self.reporter.judged(line, judged)
            return finished
        finally:
            self._inflight.give_back(key, turn)

    async def _wait_for_turn(self, key: Hashable, tx: Transaction, deadline: float) -> Turn:
        await tx.end()      # who waits holds no connection that the other may need
        try:
            async with asyncio.timeout_at(deadline):
                return await self._inflight.wait(key)
        except TimeoutError:
            raise MaloteError("an identical message took too long", reply=TOO_LATE) from None

    async def _digest(self, prepared: Prepared) -> bytes:
        """What makes two submissions the same: the bytes after the removals, under a key that never leaves this store."""
        key = await self._store.local_key("journal")
        parts = prepared.stripped_parts
        digest = await self.decider.work(len(prepared.submitted), hmac_sha256, key, *parts)
        for part in parts:      # the thread may hold it a moment longer, and the submitted bytes could not be given back
            if isinstance(part, memoryview):
                part.release()
        return digest

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
        recorder = self.reporter.recorder()
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
            line.count(letter, outcomes, delivery.copies)
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
        recorder, letter, told = self.reporter.recorder(), delivery.letter, False
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
