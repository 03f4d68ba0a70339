"""One message at a gateway, from its last byte to the reply: gather, decide, act, for each recipient by himself.

What is sealed for a key held here is opened, judged and delivered, each recipient in a transaction of his own: his verdict, his
headers. Everybody else gets the message as it came, together. 250 is said for a recipient only when the next server has said
it; the judgement is written down before as not delivered, and after as delivered (turns.py).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import structlog

from malote.config import OpeningConfig
from malote.core import status
from malote.core.card import Card
from malote.core.freshness import AGAIN, DAY_MS, FreshnessLimits, Judgement
from malote.core.identity import Identity
from malote.core.message import fold_field
from malote.core.open import Opened, Unsealed, authenticate, unseal
from malote.core.parts import FoundParts, find_parts
from malote.core.primitives import sha256
from malote.core.trace import check_hops
from malote.errors import MailLoop, MaloteError, Reply, Unreadable
from malote.incoming.account import AccountKeys
from malote.incoming.delivery import carriable, wrapped
from malote.incoming.gateway_keys import GatewayKeys
from malote.incoming.handover import Handover, Result, Target
from malote.incoming.opening import NO_ID, card_of, find_cards, gateway_notes, off_loop, remember_outer_id
from malote.incoming.presenting import Frame, framed, opened_copy, received_lines
from malote.incoming.turns import Known, Memory, Turn, Turns
from malote.smtp.lmtp import Replies
from malote.store import OutcomeEntry, Store

TOO_LATE = Reply(451, "4.4.2", "Took too long, try again later")
OK = Reply(250, "2.0.0", "Ok")
BEFORE = Reply(250, "2.0.0", "Delivered before")
QUARANTINE_FULL = Reply(451, "4.3.0", "This message belongs in quarantine, which does not take it now; try again later")
_REFUSALS = {
    "DUPLICATE": "Second copy of a message that was delivered before; it was not delivered again",
    "CONFLICT": "Another message with the same id was received before; this one was not delivered",
    "FORGED": "Message carries headers that only this server may write (Malote-Verdict and such); it was not delivered",
}
MASTERS_SECONDS = 5.0       # after which a key for watchers that was made or withdrawn counts

log = structlog.get_logger("malote.incoming")


@dataclass(frozen=True, slots=True, eq=False)
class Recipient:
    """One of the envelope. `address` canonical, "" where it is none that could have a key."""

    address: str
    target: Target
    keys: AccountKeys | None


@dataclass(slots=True)
class Mail:
    """One message on its way. `raw`: with our Received line, of `added` bytes, on top."""

    session: str
    handover: Handover
    raw: bytes = field(repr=False)
    added: int
    keep_going: Callable[[], None]
    started: float = field(default_factory=time.monotonic)
    replies: dict[Recipient, Reply] = field(default_factory=dict)
    delivered: list[int] = field(default_factory=list)      # rows of the store: delivered, and the client is to be told
    passed: list[Recipient] = field(default_factory=list)   # the same of what went as it came

    def digest(self) -> bytes:
        return sha256(bytes(memoryview(self.raw)[self.added:]))


@dataclass(frozen=True, slots=True)
class Case:
    """A message that was opened for one recipient."""

    mail: Mail
    recipient: Recipient
    keys: AccountKeys
    opened: Opened


class Passage:
    """For one listener. `turns` and `passed` are those of the whole process; `clock` gives ms."""

    def __init__(self, config: OpeningConfig, *, store: Store, identities: Callable[[], Mapping[str, Identity]], turns: Turns,
                 passed: Memory, device: str, host: str, seconds: float, log_addresses: bool, clock: Callable[[], int]) -> None:
        self.keys = GatewayKeys(identities)
        self._config = config
        self._store = store
        self._identities = identities
        self._turns = turns
        self._passed = passed
        self._device = device
        self._host = host
        self._seconds = seconds
        self._log_addresses = log_addresses
        self._clock = clock
        self._masters: tuple[bytes, ...] = ()
        self._masters_until = 0.0
        self._limits = FreshnessLimits(config.late_days * DAY_MS, config.clock_skew_seconds * 1000)

    async def deliver(self, mail: Mail, recipients: Sequence[Recipient]) -> Replies:
        """Raises `MailLoop`."""
        try:
            check_hops(mail.raw, self._host)
        except MailLoop:
            self._note(mail, "refused", recipients=len(recipients), detail="loop")
            raise
        try:
            async with asyncio.timeout(self._seconds):
                await self._all(mail, list(dict.fromkeys(recipients)))
        except TimeoutError:
            log.warning("too late", session=mail.session, recipients=len(recipients) - len(mail.replies))
        each = tuple(mail.replies.get(recipient, TOO_LATE) for recipient in recipients)
        summary = summarize([(recipient.target.path, reply) for recipient, reply in zip(recipients, each, strict=True)])
        if self._config.protocol == "smtp" and summary.code // 100 != 2:
            self.not_told(mail.delivered)
            mail.delivered.clear()
            for recipient in mail.passed:
                self._passed.note((mail.digest(), recipient.address), Known.NOT_TOLD)
        return Replies(summary.code, summary.enhanced, summary.text, each=each)

    def not_told(self, rows: Sequence[int]) -> None:
        """The client does not know, or did not prove that it does, that these were delivered: it may bring them again."""
        for row in rows:
            self._turns.not_told(row)

    async def _all(self, mail: Mail, recipients: Sequence[Recipient]) -> None:
        found, reason = await self._look(mail, recipients)
        width = asyncio.Semaphore(self._config.upstream.upstream_connections)     # each has an opened copy in memory
        async with asyncio.TaskGroup() as tasks:
            each = [tasks.create_task(self._one(mail, recipient, found, width)) for recipient in recipients]
        reasons = [task.result() for task in each]
        as_it_is = [recipient for recipient in recipients if recipient not in mail.replies]
        if as_it_is:
            await self._pass(mail, as_it_is, next(filter(None, (reason, *reasons)), ""))

    async def _one(self, mail: Mail, recipient: Recipient, found: FoundParts | None, width: asyncio.Semaphore) -> str:
        """Without a reply he gets the message as it came; then why it could not be opened for him, "" if it is not sealed."""
        async with width:
            if self._is_forged(mail, recipient):
                mail.replies[recipient] = await self._quarantine_forged(mail, recipient)
            elif found is not None and recipient.keys is not None:
                try:
                    unsealed = await off_loop(len(mail.raw), unseal, found, recipient.keys.pairs)
                except Unreadable as error:
                    return error.reason
                except Exception as error:  # noqa: BLE001 -- as in `_look`
                    return self._fault(mail, error)
                mail.replies[recipient] = await self._open(mail, recipient, recipient.keys, unsealed)
        return ""

    async def _look(self, mail: Mail, recipients: Sequence[Recipient]) -> tuple[FoundParts | None, str]:
        """The sealed parts that are this message's own, and why there are none though it seems to have some."""
        if all(recipient.keys is None for recipient in recipients):
            return None, ""
        try:
            found = await off_loop(len(mail.raw), find_parts, mail.raw)
        except Unreadable as error:
            return None, error.reason
        except Exception as error:  # noqa: BLE001 -- whatever a hostile message sets off, it is passed on; the class is logged
            return None, self._fault(mail, error)
        return (None if found is None or found.forwarded else found), ""

    def _fault(self, mail: Mail, error: Exception) -> str:
        log.error("message set off a fault", session=mail.session, fault=type(error).__name__)
        return "fault"

    # --- sealed, and opened here ---

    async def _open(self, mail: Mail, recipient: Recipient, keys: AccountKeys, unsealed: Unsealed) -> Reply:
        try:
            cards = await find_cards(self._store, {unsealed.sender})
            card = card_of(unsealed.sender, cards | self._own_cards(unsealed.sender))
            case = Case(mail, recipient, keys, await off_loop(len(mail.raw), authenticate, unsealed, card))
            async with self._turns.take(case.opened.claim(recipient.address), self._limits) as turn:
                return await self._settle(case, turn)
        except MaloteError as error:
            log.warning("not delivered", session=mail.session, id=unsealed.manifest.id.hex(), fault=type(error).__name__)
            return error.reply

    def _own_cards(self, sender: str) -> dict[str, Card]:
        """Mail of our own people: whose private half is here needs no card from elsewhere."""
        identities = self._identities()
        return {name: identities[name].card for name in (sender, f"@{sender.rpartition('@')[2]}") if name in identities}

    async def _settle(self, case: Case, turn: Turn) -> Reply:
        mail, judgement, unsealed = case.mail, turn.stored.judgement, case.opened.unsealed
        if turn.done:
            mail.delivered.append(turn.row_id)
            self._note(mail, "delivered before", verdict=judgement.verdict, recipient=case.recipient, unsealed=unsealed)
            return BEFORE
        if turn.again:
            judgement = replace(judgement, notes=(*judgement.notes, AGAIN))
        if judgement.quarantine:
            outcome, result = "quarantined", await self._quarantine(case, judgement, turn)
        else:
            outcome, result = "opened", await self._deliver(case, judgement, turn)
        if result.accepted:
            await self._turns.delivered(turn)
            mail.delivered.append(turn.row_id)
            if not judgement.quarantine:
                remember_outer_id(self._store, case.opened, judgement.verdict, self._clock())
        elif result.certain and not turn.stored.delivered:
            self._turns.not_delivered(turn)
        notes = " ".join((*judgement.notes, *gateway_notes(case.opened, case.keys)))
        self._note(mail, outcome if result.accepted else "failed", verdict=judgement.verdict, recipient=case.recipient,
                   unsealed=unsealed, detail=notes if result.accepted else str(result.reply.code))
        return result.reply

    async def _deliver(self, case: Case, judgement: Judgement, turn: Turn) -> Result:
        mail = case.mail
        frame = await self._frame(case, received_lines(mail.raw))
        form = carriable_lines if mail.handover.eight_bit else ascii_lines
        content = await off_loop(len(mail.raw), opened_copy, case.opened, judgement, frame, form)
        return await self._hand_over(mail, case.recipient.target, content, turn, opened=True)

    async def _hand_over(self, mail: Mail, target: Target, content: bytes, turn: Turn | None, *, opened: bool = False,
                         sender: str | None = None) -> Result:
        def final_dot() -> None:
            if turn is not None:
                turn.sent = True
            mail.keep_going()

        [result] = await mail.handover.deliver([target], content, on_final_dot=final_dot, opened=opened, sender=sender)
        return result

    async def _frame(self, case: Case, trace: Sequence[bytes]) -> Frame:
        if time.monotonic() >= self._masters_until:
            self._masters = await self._store.gateway_keys()
            self._masters_until = time.monotonic() + MASTERS_SECONDS
        mark = case.keys.mark(case.opened.unsealed.payload_digest, self._device)
        return Frame(case.keys, mark, case.recipient.address, trace, self._clock(), self._host, self._masters)

    # --- quarantine ---

    def _is_forged(self, mail: Mail, recipient: Recipient) -> bool:
        """Nothing that comes here was delivered by us: a header of ours in it is somebody else's."""
        return any(status.carries_status(mail.raw, name) for name in _authserv_ids(recipient))

    async def _quarantine(self, case: Case, judgement: Judgement, turn: Turn) -> Result:
        """The sealed message as it came, below the verdict: never opened."""
        if self._config.quarantine == "refuse":
            return Result(Reply(550, "5.7.1", _REFUSALS[str(judgement.verdict)]))
        content = framed(case.mail.raw, case.opened, judgement, await self._frame(case, ()))
        return await self._to_quarantine(case.mail, case.recipient, str(judgement.verdict), content, turn)

    async def _quarantine_forged(self, mail: Mail, recipient: Recipient) -> Reply:
        """Without the headers, which would be believed there as anywhere."""
        if self._config.quarantine == "refuse":
            result = Result(Reply(550, "5.7.1", _REFUSALS["FORGED"]))
        else:
            content = mail.raw
            for name in _authserv_ids(recipient):
                content = status.strip_forged(content, name)
            result = await self._to_quarantine(mail, recipient, "FORGED", content, None)
        self._note(mail, "quarantined" if result.accepted else "failed", verdict="FORGED", recipient=recipient,
                   detail="" if result.accepted else str(result.reply.code))
        return result.reply

    async def _to_quarantine(self, mail: Mail, recipient: Recipient, verdict: str, content: bytes, turn: Turn | None) -> Result:
        """From nobody: what becomes of it there is nothing to tell the sender."""
        local, _, domain = recipient.target.path.rpartition("@")
        place = self._config.quarantine.replace("{local}", local).replace("{domain}", domain)
        header = fold_field("Malote-Quarantine", [verdict, "for", recipient.address or "somebody"])
        result = await self._hand_over(mail, Target(place, {}), header + content, turn, sender="")
        if result.reply.code // 100 == 5:
            log.error("quarantine", session=mail.session, fault="the next server refuses the quarantine address",
                      code=result.reply.code)
            return Result(QUARANTINE_FULL)
        return result

    # --- as it came ---

    async def _pass(self, mail: Mail, recipients: Sequence[Recipient], reason: str) -> None:
        left = list(recipients)
        if len(self._passed):
            digest = mail.digest()
            before = [recipient for recipient in left if self._passed.get((digest, recipient.address)) is not None]
            for recipient in before:
                self._passed.forget((digest, recipient.address))
                mail.replies[recipient] = BEFORE
            mail.passed += before
            left = [recipient for recipient in left if recipient not in before]
        results = await mail.handover.deliver([recipient.target for recipient in left], mail.raw,
                                              on_final_dot=mail.keep_going) if left else []
        for recipient, result in zip(left, results, strict=True):
            mail.replies[recipient] = result.reply
        accepted = [recipient for recipient, result in zip(left, results, strict=True) if result.accepted]
        mail.passed += accepted
        damaged = bool(reason) and not reason.startswith("no match")
        self._note(mail, "failed" if len(accepted) < len(left) else "unreadable" if damaged else "passed",
                   recipients=len(recipients), detail=reason)

    def _note(self, mail: Mail, outcome: str, *, verdict: str = "", recipient: Recipient | None = None, recipients: int = 1,
              unsealed: Unsealed | None = None, detail: str = "") -> None:
        """One line in the log and one for `malote log`. `detail`: a code, a reason of `Unreadable`, or notes; never content."""
        took_ms = round((time.monotonic() - mail.started) * 1000)
        message_id = unsealed.manifest.id.hex() if unsealed is not None else ""
        sender = unsealed.sender if unsealed is not None else ""
        account = recipient.address if recipient is not None else ""
        named = {"sender": sender, "recipient": account} if self._log_addresses else {}
        log.info("message", direction="in", session=mail.session, id=message_id, outcome=outcome, verdict=str(verdict),
                 recipients=recipients, ms=took_ms, **named, **({"detail": detail} if detail else {}))
        self._store.log_outcome(OutcomeEntry(
            at_ms=self._clock(), direction="in", outcome=outcome, account=account, message_id=message_id, sender=sender,
            recipients=recipients, verdict=str(verdict), detail=detail, took_ms=took_ms))


def _authserv_ids(recipient: Recipient) -> tuple[str, ...]:
    return recipient.keys.authserv_ids if recipient.keys is not None else (NO_ID,)


def carriable_lines(original: bytes) -> bytes:
    """What SMTP can carry: lines that end in CRLF, no NUL, no bare CR (these go as an attachment)."""
    content = carriable(original)
    return content if content.count(b"\n") == content.count(b"\r\n") else content.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")


def ascii_lines(original: bytes) -> bytes:
    """The same for a server that takes ASCII only."""
    return carriable_lines(original) if original.isascii() else wrapped(original)


def summarize(replies: Sequence[tuple[str, Reply]]) -> Reply:
    """The one answer that SMTP has room for. Pure. A failure for now is one for all: the client comes again, and who has it
    already is not served twice. Recipients that were refused for good are named, as are those that have it."""
    refused = [(path, reply) for path, reply in replies if reply.code // 100 != 2]
    if not refused:
        return replies[0][1] if len(replies) == 1 else OK
    for _, reply in refused:
        if reply.code // 100 == 4:
            return reply
    if len(refused) == len(replies) and len({(reply.code, reply.text) for _, reply in refused}) == 1:
        return refused[0][1]
    accepted = [path for path, reply in replies if reply.code // 100 == 2]
    lines = [f"Delivered to {path}" for path in accepted] + [f"Refused for {path}: {reply.text}" for path, reply in refused]
    return Reply(554, "5.0.0", "\n".join(lines))

