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

import structlog

from malote.smtp.conversation import TLS_HANDSHAKE_SECONDS
from malote.smtp.networks import UNIX, Networks, client_key
from malote.smtp.open_connections import Connections
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
        self._clients: Counter[str] = Counter()     # those on their way in
        super().__init__(sockets, lambda: factory(None))

    @property
    def entering(self) -> int:
        return self._clients.total()

    async def _take(self, connection: socket.socket) -> None:
        try:
            peer = _peer_of(connection)
        except OSError:         # gone already
            connection.close()
            return
        key = "" if peer in self._proxies() else client_key(peer)
        if not self._has_room(key):
            connection.close()
            return
        self._clients[key] += 1
        try:
            await self._let_in(connection, peer)
        finally:
            self._clients[key] -= 1
            if not self._clients[key]:
                del self._clients[key]

    def _has_room(self, key: str) -> bool:
        most = self._connections.per_client
        return self.entering < self._connections.limit and not (key and most and self._clients[key] >= most)

    async def _let_in(self, connection: socket.socket, peer: str) -> None:
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
        context = self._tls_context()
        try:
            await self._loop.connect_accepted_socket(
                lambda: self._for_origin(origin), connection, ssl=context,
                ssl_handshake_timeout=TLS_HANDSHAKE_SECONDS if context is not None else None)
        except (OSError, EOFError):     # ssl.SSLError is an OSError; the transport has closed the socket
            log.debug("no TLS handshake")


def _peer_of(sock: socket.socket) -> str:
    return UNIX if sock.family == socket.AF_UNIX else str(sock.getpeername()[0])
