"""What is told of one submitted message: to the log, `malote log`, the audit log; and what rules on trial would have done."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import structlog

from malote.core.policy import Action
from malote.errors import (
    ClockWrong,
    FormatError,
    KeyMissing,
    MailLoop,
    MaloteError,
    PolicyRefused,
    SenderRefused,
    StoreUnavailable,
    TooBusy,
)
from malote.outgoing.answers import Outcome, State
from malote.outgoing.copies import Letter
from malote.outgoing.recorder import Recorder
from malote.outgoing.shadow import Would, entries, tell
from malote.outgoing.transaction import Transaction
from malote.smtp.desk import ClientSession
from malote.store.records import OutcomeEntry
from malote.store.store import Store

log = structlog.get_logger("malote.outgoing")


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

    def count(self, letter: Letter, outcomes: Mapping[str, Outcome], copies: int) -> None:
        for outcome in outcomes.values():
            self.states[outcome.state] = self.states.get(outcome.state, 0) + 1
        self.sealed = sum(recipient.action is Action.SEAL for recipient in letter.recipients.values())
        self.plain = sum(recipient.action is Action.PLAIN for recipient in letter.recipients.values())
        self.copies = copies
        if self.states.get(State.ACCEPTED) == len(outcomes):
            self.outcome = "sealed" if not self.plain else "plain" if not self.sealed else "split"
        elif self.states.get(State.REFUSED) and not self.states.get(State.DEFERRED) and not self.states.get(State.IN_DOUBT):
            self.outcome = "partial" if self.states.get(State.ACCEPTED) else "refused"


class Reporter:
    """`recorder`: of the audit log; asked each time, as a reload may change it."""

    def __init__(self, store: Store, *, clock_ms: Callable[[], int], recorder: Callable[[], Recorder | None]) -> None:
        self.recorder = recorder
        self._store = store
        self._clock_ms = clock_ms

    def failed(self, tx: Transaction, line: Line, error: MaloteError) -> None:
        """Nothing was sent. `finished` follows."""
        code, line.why = error.reply.code, why_refused(error)
        line.outcome = "refused" if code >= 500 else "failed"
        recorder = self.recorder()
        if recorder is not None and code >= 500:
            recorder.refused(line.id, line.from_address or tx.sender, tx.recipients, error.reply, line.why)

    def refused_recipient(self, session: ClientSession, sender: str, recipient: str, error: MaloteError) -> None:
        """For the log and `malote log`: it had its answer at RCPT, and the message may never come."""
        code = error.reply.code
        log.info("recipient refused", session=session.id, reply=code, reason=why_refused(error))
        recorder = self.recorder()
        if recorder is not None and code >= 500:
            recorder.refused_recipient(sender, recipient, error.reply, why_refused(error))
        self._store.log_outcome(OutcomeEntry(
            at_ms=self._clock_ms(), direction="out", outcome="refused", account=session.user, sender=sender, recipients=1,
            detail=f"{code} {why_refused(error)}".rstrip()))

    def finished(self, session: ClientSession, tx: Transaction, line: Line, code: int, took_ms: int) -> None:
        states = {state.value.replace("-", "_"): count for state, count in line.states.items()}
        log.info(
            "message", id=line.id, direction="out", outcome=line.outcome, reply=code, session=session.id, bytes=line.size,
            sealed=line.sealed, plain=line.plain, copies=line.copies, ms=took_ms, **states,
            login=session.user, sender=tx.sender, recipients=[recipient.address for recipient in tx.recipients],
            **({"reason": line.why} if line.why else {}),
        )
        self._store.log_outcome(OutcomeEntry(
            at_ms=self._clock_ms(), direction="out", outcome=line.outcome, account=session.user, message_id=line.id,
            sender=line.from_address, recipients=len(tx.recipients), detail=f"{code} {line.why}".rstrip(), took_ms=took_ms))

    def judged(self, line: Line, judged: Sequence[Would]) -> None:
        """By rules that are not obeyed."""
        if not judged:
            return
        tell(judged, message_id=line.id)
        for entry in entries(judged, message_id=line.id, now_ms=self._clock_ms()):
            self._store.log_outcome(entry)


_WHY: Mapping[type[MaloteError], str] = {       # never the reply's text, which names the recipients
    KeyMissing: "no card", SenderRefused: "no identity that may sign", PolicyRefused: "by a rule", FormatError: "no mail",
    MailLoop: "a loop", TooBusy: "too busy", ClockWrong: "the clock is wrong", StoreUnavailable: "the store is not available",
}


def why_refused(error: MaloteError) -> str:
    return next((why for kind, why in _WHY.items() if isinstance(error, kind)), "")
