"""An identical message that arrives while the first is in flight waits for it, and takes over what it achieved.

Without this, a client that loses patience and tries again over a second connection would have its message sent twice: the
journal has no outcome yet. What the journal does after the first has ended is another matter (store).
"""

from __future__ import annotations

import asyncio
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field

from malote.errors import Reply


@dataclass(slots=True)
class Turn:
    """The right to send a message that is identical with no other in flight."""

    earlier: dict[str, Reply] = field(default_factory=dict)     # accepted meanwhile, by those waited for
    accepted: dict[str, Reply] = field(default_factory=dict)    # filled in by the holder
    done: asyncio.Future[Mapping[str, Reply]] | None = None     # made by the first who waits


class InFlight:
    """The messages being sent now, by what makes them identical: login, sender and the keyed hash of the bytes."""

    def __init__(self) -> None:
        self._running: dict[Hashable, Turn] = {}

    def __len__(self) -> int:
        return len(self._running)

    def take(self, key: Hashable) -> Turn | None:
        """The turn, to be given back; None while an identical message is in flight."""
        if key in self._running:
            return None
        turn = self._running[key] = Turn()
        return turn

    async def wait(self, key: Hashable) -> Turn:
        """As `take`, after those that are in flight. The caller bounds the waiting."""
        earlier: dict[str, Reply] = {}
        while (running := self._running.get(key)) is not None:
            if running.done is None:
                running.done = asyncio.get_running_loop().create_future()
            earlier.update(await asyncio.shield(running.done))
        turn = self._running[key] = Turn(earlier)
        return turn

    def give_back(self, key: Hashable, turn: Turn) -> None:
        del self._running[key]
        if turn.done is not None:
            turn.done.set_result({**turn.earlier, **turn.accepted})
