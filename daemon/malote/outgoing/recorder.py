"""What the audit log says of each copy that leaves, of notifications, and of what is refused. Never content.

Never subjects or Message-IDs either. One line for each copy and for each notification to a sender: `step` "done" with what became
of it; under `audit.required` also one before, `step` "leaving", which is on the disk before the first byte of the message goes to
the upstream server. A "leaving" without "done" is a crash in between: the copy may have left.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from malote.audit import AuditLog, Line
from malote.core.policy import Action
from malote.errors import AuditUnavailable, Reply
from malote.outgoing.answers import Outcome, State
from malote.outgoing.copies import Letter
from malote.outgoing.groups import Group, Kind
from malote.outgoing.transaction import Recipient

MAX_NAMED = 1000        # addresses in one line; the count says how many there were


class Recorder:
    """Values are taken on the event loop, lines are made of them in the thread of the log. `clock_ms`: now."""

    def __init__(self, audit: AuditLog, clock_ms: Callable[[], int]) -> None:
        self._audit = audit
        self._clock_ms = clock_ms
        self._addresses = audit.config.addresses

    async def leaving(self, letter: Letter, groups: Sequence[Group], deadline: float) -> dict[str, Outcome] | None:
        """Under `audit.required`: the lines of these copies are on the disk when this returns None. Else the outcomes of all
        recipients, and nothing may be sent. `deadline` is loop time."""
        if not self._audit.config.required:
            return None
        reply = await self._written([self._copy(letter, group, "leaving", None) for group in groups], deadline)
        if reply is None:
            return None
        return {address: Outcome(State.DEFERRED, reply) for group in groups for address in group.addresses}

    def left(self, letter: Letter, groups: Sequence[Group], outcomes: Mapping[str, Outcome]) -> None:
        for group in groups:
            self._audit.note(self._copy(letter, group, "done", outcomes))
        for each in letter.recipients.values():
            if each.action is Action.REFUSE and each.address in outcomes:       # left out, while others get it
                self._refused(letter.submission_id.hex(), letter.sender_address, [each.address], _rules([each]),
                              outcomes[each.address].reply, "left out")

    async def notifying(self, letter: Letter, sender: str, about: Sequence[str], deadline: float) -> bool:
        """Before a notification to `sender` that the recipients `about` were refused. False: under `audit.required` its line is
        not on the disk, and it may not be sent. `deadline` is loop time."""
        line = self._notification(letter, sender, about, "leaving", None)
        return not self._audit.config.required or await self._written([line], deadline) is None

    def notified(self, letter: Letter, sender: str, about: Sequence[str], *, accepted: bool) -> None:
        state = State.ACCEPTED if accepted else State.DEFERRED
        self._audit.note(self._notification(letter, sender, about, "done", state))

    def refused(self, submission: str, sender: str, recipients: Iterable[Recipient], reply: Reply, reason: str) -> None:
        """A whole message that we refused, with all its recipients."""
        found = list(recipients)
        rules = _rules(found)
        self._refused(submission, sender, [each.address for each in found], rules, reply, reason)

    def refused_recipient(self, sender: str, recipient: str, reply: Reply, reason: str) -> None:
        """One recipient that we refused before the message came."""
        self._refused("", sender, [recipient], None, reply, reason)

    def _refused(self, submission: str, sender: str, recipients: Sequence[str], rules: Sequence[int] | None, reply: Reply,
                 reason: str) -> None:
        at_ms, addresses = self._clock_ms(), self._addresses

        def line() -> dict[str, Any]:
            return {
                "at": _time(at_ms), "id": submission, "step": "done", "what": "refused", "reason": reason, "reply": reply.code,
                "recipients": len(recipients), **({"rules": list(rules)} if rules is not None else {}),
                **(_named(sender, recipients) if addresses else {}),
            }
        self._audit.note(line)

    async def _written(self, lines: Sequence[Line], deadline: float) -> Reply | None:
        """None: they are on the disk."""
        try:
            async with asyncio.timeout_at(deadline):
                await self._audit.write(lines)
        except AuditUnavailable as error:
            return error.reply
        except TimeoutError:
            return AuditUnavailable.default_reply
        return None

    def _notification(self, letter: Letter, sender: str, about: Sequence[str], step: str, state: State | None) -> Line:
        at_ms, submission, addresses = self._clock_ms(), letter.submission_id, self._addresses
        known = [letter.recipients[address] for address in about]

        def line() -> dict[str, Any]:
            return {
                "at": _time(at_ms), "id": submission.hex(), "step": step, "what": "notification", "recipients": 1,
                "about": len(known), "rules": _rules(known), **({"states": {state.value: 1}} if state is not None else {}),
                **(_named("", [sender]) if addresses else {}),
            }
        return line

    def _copy(self, letter: Letter, group: Group, step: str, outcomes: Mapping[str, Outcome] | None) -> Line:
        """Must not hold on to the letter: its text stays in memory as long as the line is not written."""
        at_ms, submission, identity, sender = self._clock_ms(), letter.submission_id, letter.identity, letter.sender_address
        recipients = [letter.recipients[address] for address in group.addresses]
        states = [outcomes[address].state for address in group.addresses if address in outcomes] if outcomes is not None else None
        addresses, kind = self._addresses, group.kind

        def line() -> dict[str, Any]:
            members: dict[str, Any] = {
                "at": _time(at_ms), "id": submission.hex(), "step": step, "what": "sealed" if group.sealed else "plain",
                "recipients": len(recipients), "rules": _rules(recipients),
            }
            if group.sealed and identity is not None:
                members["to"] = "bcc" if kind is Kind.BCC else "list" if kind is Kind.LIST else "visible"
                members["cards"] = [each.card.fingerprint for each in recipients if each.card is not None]
                members["signer"] = identity.signing.public.fingerprint
                members["algorithm"] = identity.signing.public.algorithm.value
            elif any(each.decision.covered for each in recipients):
                members["encrypted"] = True         # already when it was handed in
            if states is not None:
                members["states"] = dict(Counter(state.value for state in states))
            if addresses:
                members |= _named(sender, group.addresses)
            return members
        return line


def _rules(recipients: Iterable[Recipient]) -> list[int]:
    """Positions in the table, from 1; 0 is the default rule."""
    return sorted({0 if each.decision.rule is None else each.decision.rule + 1 for each in recipients})


def _named(sender: str, recipients: Sequence[str]) -> dict[str, Any]:
    return {"from": _text(sender), "addresses": [_text(address) for address in recipients[:MAX_NAMED]]}


def _text(address: str) -> str:
    """Bytes that are no text stand in it as escapes: half a surrogate would make the line one that others cannot read."""
    return address.encode("utf-8", "backslashreplace").decode()


def _time(at_ms: int) -> str:
    return datetime.fromtimestamp(at_ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
