"""Where a client session's upstream transactions run: on pooled connections, or on one that is the session's own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Protocol

from malote.errors import Reply, UpstreamError
from malote.smtp.connection import Then
from malote.smtp.desk import Params
from malote.smtp.relay import Upstream, UpstreamConnection

ASKED_SECONDS = 3.0     # for what another client has asked of the next server already

_LOST = Reply(421, "4.4.2", "The connection to the next mail server is lost, nothing was sent, connect again")


class Lane(Protocol):
    @property
    def width(self) -> int:
        """Transactions of one message at the same time, at most."""
        ...

    @property
    def extensions(self) -> Mapping[str, str]:
        """What the server offered when it was last asked; empty if that has not been yet."""
        ...

    async def begin(self, address: str, params: Params, then: Then | None = None) -> tuple[UpstreamConnection, Reply]:
        """A connection and the server's reply to MAIL, whatever it is. `then` may give a RCPT to be sent with it, see
        `UpstreamConnection.begin`. Raises `UpstreamError`."""
        ...

    def park(self, connection: UpstreamConnection, give_up: Callable[[], None]) -> None:
        """While the client takes its time: the connection may be taken for others, and `give_up` is called then."""
        ...

    def unpark(self, connection: UpstreamConnection) -> None:
        """The client goes on."""
        ...

    async def release(self, connection: UpstreamConnection) -> None:
        """After each `begin`, always. An open transaction is reset; a connection that may be out of step is dropped."""
        ...


class PooledLane:
    """Connections with configured credentials (or none), shared by all clients."""

    def __init__(self, upstream: Upstream, width: int) -> None:
        self._upstream = upstream
        self.width = width
        self.extensions: Mapping[str, str] = {}
        self._asking: asyncio.Task[Mapping[str, str]] | None = None

    async def begin(self, address: str, params: Params, then: Then | None = None) -> tuple[UpstreamConnection, Reply]:
        connection, reply = await self._upstream.begin(address, params, then)
        self.extensions = connection.extensions
        return connection, reply

    async def ask(self) -> Mapping[str, str]:
        """The server's extensions, asked for now if that was never done. Raises `UpstreamError`.

        One asks, the others wait, and not for ever: a server that hands its mail to us waits for this very answer. Then none is
        promised, and the loop shows itself at MAIL.
        """
        if self.extensions:
            return self.extensions
        asking = self._asking
        if asking is None or asking.done():
            asking = self._asking = asyncio.create_task(self._ask())
            asking.add_done_callback(lambda task: task.cancelled() or task.exception())     # read, also when who asked is gone
            return await asyncio.shield(asking)
        await asyncio.wait([asking], timeout=ASKED_SECONDS)
        return asking.result() if asking.done() else {}

    async def _ask(self) -> Mapping[str, str]:
        connection = await self._upstream.acquire()
        self.extensions = connection.extensions
        await self._upstream.release(connection)
        return self.extensions

    def park(self, connection: UpstreamConnection, give_up: Callable[[], None]) -> None:
        self._upstream.park(connection, give_up)

    def unpark(self, connection: UpstreamConnection) -> None:
        self._upstream.unpark(connection)

    async def release(self, connection: UpstreamConnection) -> None:
        await self._upstream.release(connection)


class OwnLane:
    """The one connection on which this client has logged in at the upstream server. It ends with the session."""

    width = 1

    def __init__(self, connection: UpstreamConnection) -> None:
        self.connection = connection

    @property
    def extensions(self) -> Mapping[str, str]:
        return self.connection.extensions

    async def begin(self, address: str, params: Params, then: Then | None = None) -> tuple[UpstreamConnection, Reply]:
        if not self.connection.usable:
            raise UpstreamError("the connection of this session to the next mail server is lost", reply=_LOST)
        return self.connection, await self.connection.begin(address, params, then)

    def park(self, connection: UpstreamConnection, give_up: Callable[[], None]) -> None:
        """Nobody else may use it."""

    def unpark(self, connection: UpstreamConnection) -> None:
        """It was never parked."""

    async def release(self, connection: UpstreamConnection) -> None:
        if connection.usable and connection.in_transaction:
            try:
                await connection.rset()
            except UpstreamError:
                connection.abort()
        if not connection.usable:
            connection.abort()
