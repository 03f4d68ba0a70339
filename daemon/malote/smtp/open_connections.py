"""Open connections of all listeners together: the limit on them, and how they end when the service stops."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Protocol

from malote.config import LimitsConfig
from malote.errors import Reply
from malote.smtp.desk import Desk
from malote.smtp.rates import Rates
from malote.smtp.siblings import SharedClients, SharedNumber, Siblings

IDLE_SECONDS = 10.0     # who has waited that long between two messages makes room when all places are taken
FULL = Reply(421, "4.3.2", "Too many connections, try again later")


class OpenConnection(Protocol):
    """What is asked of a connection here; conversation.py has the one class."""

    @property
    def desk(self) -> Desk: ...

    @property
    def task(self) -> asyncio.Task[None] | None: ...

    @property
    def idle_since(self) -> float | None:
        """Loop time since when it has been waiting for a command outside of a transaction; None: it is busy."""
        ...

    @property
    def logged_in(self) -> bool: ...

    def stop(self) -> None:
        """End when the message in hand is done."""
        ...

    def give_way(self) -> None:
        """End now, since nothing is under way and others wait."""
        ...

    def cut_off(self) -> None:
        """End now."""
        ...


class Connections:
    """Every open client connection. One object for all listeners, kept over a reload. `rates`: what clients did lately."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.per_client = 0
        self.rates = Rates()
        # with the other workers of the service, for all of which the limits are
        self._shared: SharedNumber | None = None
        self._shared_clients: SharedClients | None = None
        self._open: dict[OpenConnection, str] = {}
        self._clients: Counter[str] = Counter()

    def renew(self, limits: LimitsConfig) -> None:
        self.limit = limits.connections
        self.per_client = limits.client_connections
        self.rates.renew(limits)

    def share(self, siblings: Siblings, slot: int) -> None:
        """Before the first connection."""
        self._shared, self._shared_clients, self.rates = siblings.connections(slot), siblings.clients(slot), siblings.rates

    def admit(self, connection: OpenConnection, client: str) -> Reply | None:
        """The refusal if there are too many. `client`: whom it counts for, "" for nobody (networks.client_key)."""
        loop = asyncio.get_running_loop()
        if client and self.per_client and self._of_client(client) >= self.per_client:
            return Reply(421, "4.7.0", f"Too many connections from your address, at most {self.per_client}; close some")
        if not self.rates.client_connections.take(client, loop.time()):
            return Reply(421, "4.7.0", "Too many connections from your address within a minute, try again later")
        if self._of_all() >= self.limit and not self._make_room(client, loop.time()):
            return FULL
        self._open[connection] = client
        self._clients[client] += 1
        self._tell(client)
        return None

    def _make_room(self, client: str, now: float) -> bool:
        """End a connection that is idle: one of the client that has most of them, if that is more than the new one's would have;
        else the one that has been idle longest. One that has logged in goes only if there is no other."""
        idle = [(connection, since, self._clients[owner] if owner else 0) for connection, owner in self._open.items()
                if (since := connection.idle_since) is not None] if self.limit else []
        share = self._clients[client] + 1 if client else 1
        greedy = [each for each in idle if each[2] > share]
        if greedy:
            most = max(each[2] for each in greedy)
            chosen = [each for each in greedy if each[2] == most]
        else:
            chosen = [each for each in idle if now - each[1] >= IDLE_SECONDS]
        if not chosen:
            return False
        min(chosen, key=lambda each: (each[0].logged_in, each[1]))[0].give_way()
        return True

    def discard(self, connection: OpenConnection) -> None:
        client = self._open.pop(connection, None)
        if client is not None:
            self._clients[client] -= 1
            self._tell(client)
            if not self._clients[client]:
                del self._clients[client]

    def __len__(self) -> int:
        return len(self._open)

    def _of_all(self) -> int:
        return len(self._open) if self._shared is None else len(self._open) + self._shared.others()

    def _of_client(self, client: str) -> int:
        return self._clients[client] + (self._shared_clients.others(client) if self._shared_clients is not None else 0)

    def _tell(self, client: str) -> None:
        if self._shared is not None:
            self._shared.set(len(self._open))
        if self._shared_clients is not None and client:
            self._shared_clients.set(client, self._clients[client])

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
