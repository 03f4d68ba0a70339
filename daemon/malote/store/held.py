"""What nobody waits for, held back a moment on the event loop before it goes to the writer's thread.

The outcome lines of a quarter of a second become one operation. And that a message which left unsealed was accepted need not be
written at all when the client proves meanwhile that it read the reply, which most do within a millisecond: then there is nothing
that a retry could ask for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from malote.store import accounts, outbox
from malote.store.database import Db
from malote.store.records import Outcome, OutcomeEntry, SendPlan
from malote.store.writer import Commits

HOLD_SECONDS = 0.25


@dataclass(slots=True, eq=False)
class _Accepted:
    plan: SendPlan
    outcomes: Mapping[str, tuple[Outcome, str]]
    now_ms: int
    until: float            # loop time
    leaving: bool = False   # given to the writer; stays here until it is committed, because only then others can read it

    def write(self, db: Db) -> None:
        outbox.finish_send(db, self.plan, self.outcomes, self.now_ms)


class Held:
    """All methods on the event loop. What is released goes to the writer in order, before every operation submitted later."""

    def __init__(self, writer: Commits) -> None:
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
        if held is None or held.plan is not plan or held.leaving:
            return False
        del self._accepted[plan.key]
        return True

    def log(self, entry: OutcomeEntry) -> None:
        self._writer.check_open()
        self._start()
        self._entries.append(entry)

    def release_plan(self, key: bytes) -> bool:
        """True: one is held, and the next operation sees it (a look at what is committed may not)."""
        held = self._accepted.get(key)
        if held is not None and not held.leaving:
            self._let_go(held)
        return held is not None

    def release_all(self) -> None:
        for key in list(self._accepted):
            self.release_plan(key)
        self._release_entries()

    def _let_go(self, held: _Accepted) -> None:
        """To the writer, and known here until that has committed it."""
        loop = asyncio.get_running_loop()

        def written() -> None:      # in the writer's thread
            with suppress(RuntimeError):    # the loop is closed: nobody asks any more
                loop.call_soon_threadsafe(self._is_written, held)
        held.leaving = True
        self._writer.later(held.write, written)

    def _is_written(self, held: _Accepted) -> None:
        if self._accepted.get(held.plan.key) is held:
            del self._accepted[held.plan.key]

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
            self._timer = loop.call_later(HOLD_SECONDS, self._tick)
        return loop.time()

    def _tick(self) -> None:
        self._timer = None
        now = asyncio.get_running_loop().time()
        waiting = [held for held in self._accepted.values() if not held.leaving]
        for held in waiting:
            if held.until > now:
                self._start()
                break
            self._let_go(held)
        self._release_entries()
