"""Open connections of all listeners together: the limit on them, and how they end when the service stops."""

from __future__ import annotations

import asyncio
from typing import Protocol

from malote.smtp.desk import Desk


class OpenConnection(Protocol):
    """What is asked of a connection here; conversation.py has the one class."""

    @property
    def desk(self) -> Desk: ...

    @property
    def task(self) -> asyncio.Task[None] | None: ...

    def stop(self) -> None:
        """End when the message in hand is done."""
        ...

    def cut_off(self) -> None:
        """End now."""
        ...


class Connections:
    """Every open client connection. One object for all listeners, kept over a reload."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._open: set[OpenConnection] = set()

    def add(self, connection: OpenConnection) -> bool:
        """False: there are too many."""
        if len(self._open) >= self.limit:
            return False
        self._open.add(connection)
        return True

    def discard(self, connection: OpenConnection) -> None:
        self._open.discard(connection)

    def __len__(self) -> int:
        return len(self._open)

    def desks(self) -> set[Desk]:
        """Those that an open connection still talks to."""
        return {connection.desk for connection in self._open}

    async def drain(self, seconds: float) -> int:
        """421 to who is idle, wait for messages in flight, cut off what is left after `seconds`. Returns how many were cut off.
        Whoever is still in the TLS handshake is not let in any more.

        Does not rely on `Server.wait_closed`: it returns at once on Python 3.11 and waits for idle clients on 3.12.
        """
        self.limit = 0
        for connection in list(self._open):
            connection.stop()
        tasks = {connection.task for connection in self._open if connection.task is not None}
        if not tasks:
            return 0
        _, late = await asyncio.wait(tasks, timeout=seconds)
        for connection in list(self._open):
            if connection.task in late:
                connection.cut_off()
        if late:
            await asyncio.wait(late, timeout=10)
        return len(late)
