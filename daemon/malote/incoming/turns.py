"""Whose turn it is to deliver a message, at a place where delivery cannot be looked up afterwards.

The store decides what is new (design, Incoming): a row that says "not delivered" stands for a message that is still to be
delivered, with the verdict it got then. So the same message twice at the same moment must wait: one delivers, and the other then
finds a duplicate. What else a gateway has to know of a row is remembered here, in memory, and after a restart the safe thing
is assumed:

* not delivered for certain (the next server refused it, or nothing was sent): it is delivered when it comes again. Unknown, as
  after a crash: it is too, with a note that it may be the second time; but not while another process may be at it still.
* taken by the next server, while the store could not write that down: written down when it comes again.
* delivered, but the client does not know (another recipient failed and SMTP has one answer for all; it went away): when it
  comes again it is answered as delivered. Unknown: it is a duplicate, as any other repeat.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Hashable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import Enum

from malote.core.freshness import Arrival, Claim, FreshnessLimits
from malote.errors import MaloteError, Reply, StoreUnavailable
from malote.store import Store, Stored

MAX_KNOWN = 100_000
BUSY = Reply(451, "4.3.0", "This message is being delivered already, or was when this server stopped; try again later")


class Known(Enum):
    NOT_DELIVERED = 1
    NOT_WRITTEN = 2     # delivered, and the store does not know
    NOT_TOLD = 3        # delivered, and the client does not know


class Memory:
    """What is known of rows, and of unsealed messages (by any key of theirs)."""

    def __init__(self) -> None:
        self._known: OrderedDict[Hashable, Known] = OrderedDict()

    def note(self, key: Hashable, known: Known) -> None:
        self._known[key] = known
        self._known.move_to_end(key)
        if len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)

    def get(self, key: Hashable) -> Known | None:
        return self._known.get(key)

    def forget(self, key: Hashable) -> None:
        self._known.pop(key, None)

    def __len__(self) -> int:
        return len(self._known)


@dataclass(slots=True)
class Turn:
    """The right to deliver one message, until it ends. `done`: it was delivered before, and that is all there is to say."""

    stored: Stored
    row_id: int
    again: bool = False     # an earlier delivery may have succeeded
    sent: bool = False      # set right before the next server may take it
    done: bool = False


class Turns:
    """One for all listeners of the process. `at_most_ms`: how long one delivery may take."""

    def __init__(self, store: Store, *, clock: Callable[[], int], at_most_ms: int) -> None:
        self.memory = Memory()
        self.at_most_ms = at_most_ms
        self._store = store
        self._clock = clock
        self._under_way: dict[int, asyncio.Future[None]] = {}

    @asynccontextmanager
    async def take(self, claim: Claim, limits: FreshnessLimits) -> AsyncIterator[Turn]:
        """Judge, and wait for one's turn. Raises `StoreUnavailable`, and `MaloteError` (451) when it is another process's."""
        row_id, stored = await self._judge(claim, limits)
        ended = self._under_way[row_id] = asyncio.get_running_loop().create_future()
        try:
            turn = await self._begin(claim, row_id, stored)
            try:
                yield turn
            finally:
                if not (turn.sent or turn.done or stored.delivered):
                    self.not_delivered(turn)
        finally:
            del self._under_way[row_id]
            ended.set_result(None)

    async def _judge(self, claim: Claim, limits: FreshnessLimits) -> tuple[int, Stored]:
        first = False
        while True:
            stored = await self._store.judge(claim, Arrival(self._clock()), limits)
            row_id = stored.row_id
            if row_id is None:
                raise StoreUnavailable("a judgement that was not written down")
            first = first or stored.first
            if first and not stored.delivered and self.memory.get(row_id) is None:
                self.memory.note(row_id, Known.NOT_DELIVERED)   # nobody else can have been at it before us
            under_way = self._under_way.get(row_id)
            if under_way is None:
                return row_id, stored
            await asyncio.wait([under_way])

    async def _begin(self, claim: Claim, row_id: int, stored: Stored) -> Turn:
        known = self.memory.get(row_id)
        if known is Known.NOT_WRITTEN:
            await self.delivered(Turn(stored, row_id))
            return Turn(stored, row_id, done=True)
        if known is Known.NOT_TOLD and stored.delivered:
            self.memory.forget(row_id)
            return Turn(stored, row_id, done=True)
        again = not stored.delivered and known is None
        if again and await self._may_be_under_way(claim):
            raise MaloteError("another delivery of this message may be under way", reply=BUSY)
        # from here on it is in doubt, until the next server has said what it did
        self.memory.forget(row_id)
        return Turn(stored, row_id, again=again)

    async def _may_be_under_way(self, claim: Claim) -> bool:
        row = await self._store.remembered(claim.recipient, claim.payload_key)
        return row is not None and 0 <= self._clock() - row.first_ms < self.at_most_ms

    async def delivered(self, turn: Turn) -> None:
        """The next server has taken it. Raises `StoreUnavailable`: then the client must not be told so."""
        self.memory.note(turn.row_id, Known.NOT_WRITTEN)
        await self._store.mark_delivered(turn.row_id)
        self.memory.forget(turn.row_id)

    def not_delivered(self, turn: Turn) -> None:
        """The next server has not got it, for certain."""
        self.memory.note(turn.row_id, Known.NOT_DELIVERED)

    def not_told(self, row_id: int) -> None:
        """It is delivered, and the client does not know, or may not know."""
        self.memory.note(row_id, Known.NOT_TOLD)
