"""The way in where SMTP does not come first: a PROXY header, then perhaps the TLS handshake, then the conversation.

asyncio's own server begins TLS with the first byte, so a header in front of it could not be read. Connections that are still on
their way in are counted: neither a slow handshake nor a header that never comes takes more than a bounded number of sockets.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections import Counter
from collections.abc import Callable, Sequence
from typing import cast

import structlog

from malote.smtp.conversation import TLS_HANDSHAKE_SECONDS
from malote.smtp.networks import UNIX, Networks, client_key
from malote.smtp.open_connections import IDLE_SECONDS, Connections
from malote.smtp.proxy_header import Origin, ProxyFault, read_proxy_header
from malote.smtp.sockets import Acceptor

PROXY_SECONDS = 5.0         # section 2 of the specification: at least 3, for a lost packet

log = structlog.get_logger("malote.smtp.server")


class Gate(Acceptor):
    """Accepts on `sockets`, which listen. `proxies` and `tls_context` are asked for each connection: a reload may change them."""

    def __init__(self, sockets: Sequence[socket.socket], factory: Callable[[Origin | None], asyncio.BaseProtocol],
                 connections: Connections, *, proxies: Callable[[], Networks],
                 tls_context: Callable[[], ssl.SSLContext | None]) -> None:
        self._for_origin = factory
        self._connections = connections
        self._proxies = proxies
        self._tls_context = tls_context
        self._entering: dict[asyncio.Task[object], tuple[str, float]] = {}    # client (client_key) and loop time; oldest first
        self._clients: Counter[str] = Counter()     # how many of each are among them
        super().__init__(sockets, lambda: factory(None))

    @property
    def entering(self) -> int:
        return len(self._entering)

    async def _take(self, connection: socket.socket) -> None:
        task = cast("asyncio.Task[object]", asyncio.current_task())
        try:
            peer = _peer_of(connection)
        except OSError:         # gone already
            connection.close()
            return
        if not self._enter(task, "" if peer in self._proxies() else client_key(peer)):
            connection.close()
            return
        try:
            await self._let_in(task, connection, peer)
        finally:
            self._leave(task)

    def _enter(self, task: asyncio.Task[object], client: str) -> bool:
        """Count it for that client, who may be known only now. False: there is no place."""
        connections, now = self._connections, self._loop.time()
        if client and connections.per_client and self._clients[client] >= connections.per_client:
            return False
        if task in self._entering:
            now = self._entering[task][1]
            self._uncount(task)
        elif self.entering >= connections.limit and not self._make_room(client, now):
            return False
        self._entering[task] = client, now
        self._clients[client] += 1
        return True

    def _make_room(self, client: str, now: float) -> bool:
        """As among those who are in (open_connections.py): the oldest of who has most, or whoever takes far too long, goes."""
        greedy, most = max(self._clients.items(), key=lambda each: each[1] if each[0] else 0, default=("", 0))
        if greedy and most > (self._clients[client] + 1 if client else 1):
            chosen = (task for task, (owner, _) in self._entering.items() if owner == greedy)
        else:
            chosen = (task for task, (_, since) in self._entering.items() if now - since >= IDLE_SECONDS)
        oldest = next(chosen, None)
        if oldest is None or not self._connections.limit:
            return False
        oldest.cancel()
        self._leave(oldest)
        return True

    def _leave(self, task: asyncio.Task[object]) -> None:
        if task in self._entering:
            self._uncount(task)
            del self._entering[task]

    def _uncount(self, task: asyncio.Task[object]) -> None:
        client = self._entering[task][0]
        self._clients[client] -= 1
        if not self._clients[client]:
            del self._clients[client]

    async def _let_in(self, task: asyncio.Task[object], connection: socket.socket, peer: str) -> None:
        origin: Origin | None = None
        if peer in self._proxies():
            try:
                async with asyncio.timeout(PROXY_SECONDS):
                    origin = await read_proxy_header(connection)
            except (ProxyFault, TimeoutError, OSError) as error:
                connection.close()
                log.warning("no PROXY header", fault=str(error) or "it did not come in time")
                return
            except BaseException:
                connection.close()
                raise
            if not self._enter(task, client_key(origin.address)):
                connection.close()
                return
        context = self._tls_context()
        try:
            await self._loop.connect_accepted_socket(
                lambda: self._for_origin(origin), connection, ssl=context,
                ssl_handshake_timeout=TLS_HANDSHAKE_SECONDS if context is not None else None)
        except (OSError, EOFError):     # ssl.SSLError is an OSError; the transport has closed the socket
            log.debug("no TLS handshake")


def _peer_of(sock: socket.socket) -> str:
    return UNIX if sock.family == socket.AF_UNIX else str(sock.getpeername()[0])
