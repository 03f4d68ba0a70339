"""An identical message that arrives while the first is in flight waits for it, and takes over what it achieved.

Without this, a client that loses patience and tries again over a second connection would have its message sent twice: the
journal has no outcome yet. What the journal does after the first has ended is another matter (store).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Hashable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from malote.errors import Reply


@dataclass(slots=True)
class Turn:
    """The right to send a message that is identical with no other in flight."""

    earlier: dict[str, Reply] = field(default_factory=dict)     # accepted meanwhile, by those waited for
    accepted: dict[str, Reply] = field(default_factory=dict)    # filled in by the holder


class InFlight:
    """The messages being sent now, by what makes them identical: login, sender and the keyed hash of the bytes."""

    def __init__(self) -> None:
        self._running: dict[Hashable, asyncio.Future[Mapping[str, Reply]]] = {}

    def __len__(self) -> int:
        return len(self._running)

    def busy(self, key: Hashable) -> bool:
        """Whether `turn` would wait."""
        return key in self._running

    @asynccontextmanager
    async def turn(self, key: Hashable) -> AsyncIterator[Turn]:
        """Wait until no identical message is in flight, then be the one. The caller bounds the waiting."""
        turn = Turn()
        while (running := self._running.get(key)) is not None:
            turn.earlier.update(await asyncio.shield(running))
        done: asyncio.Future[Mapping[str, Reply]] = asyncio.get_running_loop().create_future()
        self._running[key] = done
        try:
            yield turn
        finally:
            del self._running[key]
            done.set_result({**turn.earlier, **turn.accepted})
