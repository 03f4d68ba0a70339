"""What became of each incoming message: one line in the log, one in the store for `malote log`. Never content."""

from __future__ import annotations

import time
from collections.abc import Callable

import structlog

from malote.incoming.opening import Letter
from malote.store import OutcomeEntry, Store

log = structlog.get_logger("malote.incoming")


class Outcomes:
    """Notes outcomes of one account. `addresses`: whether the log line names the sender (configuration, `log.addresses`)."""

    def __init__(self, account: str, store: Store, clock: Callable[[], int], *, addresses: bool) -> None:
        self._account = account
        self._store = store
        self._clock = clock
        self._addresses = addresses

    def note(self, letter: Letter, outcome: str, verdict: str, *, detail: str = "") -> None:
        """`detail`: a code, a class of fault, or notes; nothing that a message or a server said."""
        took_ms = round((time.monotonic() - letter.started) * 1000)
        sender = letter.unsealed.sender if letter.unsealed is not None else ""
        named = {"sender": sender} if self._addresses and sender else {}
        if detail:
            named["detail"] = detail
        log.info("message", direction="in", account=self._account, id=letter.message_id, uid=letter.uid, outcome=outcome,
                 verdict=str(verdict), ms=took_ms, **named)
        self._store.log_outcome(OutcomeEntry(
            at_ms=self._clock(), direction="in", outcome=outcome, account=self._account, message_id=letter.message_id,
            sender=sender, recipients=1, verdict=str(verdict), detail=detail, took_ms=took_ms))
