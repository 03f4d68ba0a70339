"""What nobody waits for, held back a moment on the event loop before it goes to the writer's thread.

The outcome lines of a quarter of a second become one operation. And that a message which left unsealed was accepted need not be
written at all when the client proves meanwhile that it read the reply, which most do within a millisecond: then there is nothing
that a retry could ask for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

from malote.store import accounts, outbox
from malote.store.database import Db
from malote.store.records import Outcome, OutcomeEntry, SendPlan
from malote.store.writer import Writer

HOLD_SECONDS = 0.25


@dataclass(frozen=True, slots=True)
class _Accepted:
    plan: SendPlan
    outcomes: Mapping[str, tuple[Outcome, str]]
    now_ms: int
    until: float            # loop time

    def write(self, db: Db) -> None:
        outbox.finish_send(db, self.plan, self.outcomes, self.now_ms)


class Held:
    """All methods on the event loop. What is released goes to the writer in order, before every operation submitted later."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._accepted: dict[bytes, _Accepted] = {}     # by journal key, oldest first
        self._entries: list[OutcomeEntry] = []
        self._timer: asyncio.TimerHandle | None = None

    def accept(self, plan: SendPlan, outcomes: Mapping[str, tuple[Outcome, str]], now_ms: int) -> None:
        """The upstream took an unjournaled plan. Until `forget`, or written, it is known here."""
        self._writer.check_open()
        self.release_plan(plan.key)
        self._accepted[plan.key] = _Accepted(plan, outcomes, now_ms, self._start() + HOLD_SECONDS)

    def forget(self, plan: SendPlan) -> bool:
        """True: it was still held, and nothing is left of it anywhere."""
        held = self._accepted.get(plan.key)
        if held is None or held.plan is not plan:
            return False
        del self._accepted[plan.key]
        return True

    def log(self, entry: OutcomeEntry) -> None:
        self._writer.check_open()
        self._start()
        self._entries.append(entry)

    def release_plan(self, key: bytes) -> bool:
        """True: one was held, and the next operation sees it."""
        held = self._accepted.pop(key, None)
        if held is not None:
            self._writer.later(held.write)
        return held is not None

    def release_all(self) -> None:
        for key in list(self._accepted):
            self.release_plan(key)
        self._release_entries()

    def close(self) -> None:
        """Release all; nothing may be held afterwards."""
        self.release_all()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _release_entries(self) -> None:
        if self._entries:
            entries, self._entries = self._entries, []
            self._writer.later(lambda db: accounts.log_outcomes(db, entries))

    def _start(self) -> float:
        loop = asyncio.get_running_loop()
        if self._timer is None:
            self._timer = loop.call_later(HOLD_SECONDS, self._tick, loop)
        return loop.time()

    def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        now = loop.time()
        for key, held in list(self._accepted.items()):
            if held.until > now:
                break
            self.release_plan(key)
        self._release_entries()
        if self._accepted:
            self._start()
