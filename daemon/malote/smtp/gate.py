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

from malote.smtp.networks import UNIX, Networks, client_key
from malote.smtp.open_connections import Connections
from malote.smtp.proxy_header import Origin, ProxyFault, read_proxy_header

PROXY_SECONDS = 5.0         # section 2 of the specification: at least 3, for a lost packet
TLS_HANDSHAKE_SECONDS = 30.0
RETRY_SECONDS = 1.0         # when no socket can be accepted, as when too many files are open

log = structlog.get_logger("malote.smtp.server")

Factory = Callable[["Origin | None"], asyncio.Protocol]


class Gate:
    """Accepts on `sockets`, which listen. `proxies` and `tls_context` are asked for each connection: a reload may change them."""

    def __init__(self, sockets: Sequence[socket.socket], factory: Factory, connections: Connections, *,
                 proxies: Callable[[], Networks], tls_context: Callable[[], ssl.SSLContext | None]) -> None:
        loop = asyncio.get_running_loop()
        self.sockets = list(sockets)
        self._factory = factory
        self._connections = connections
        self._proxies = proxies
        self._tls_context = tls_context
        self._entering: dict[asyncio.Task[None], str] = {}
        self._clients: Counter[str] = Counter()
        self._accepting = [loop.create_task(self._accept(sock)) for sock in self.sockets]

    def close(self) -> None:
        """No more. Those that are on their way in are told 421 once they are, when the service stops (`Connections.drain`)."""
        for task in self._accepting:
            task.cancel()
        for sock in self.sockets:
            sock.close()

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _ = await loop.sock_accept(listening)
            except ConnectionAbortedError:
                continue
            except OSError as error:
                log.error("cannot accept connections", error=error.strerror)
                await asyncio.sleep(RETRY_SECONDS)
                continue
            try:
                peer = _peer_of(sock)
            except OSError:         # gone already
                sock.close()
                continue
            key = "" if peer in self._proxies() else client_key(peer)
            if not self._has_room(key):
                sock.close()
                continue
            task = loop.create_task(self._enter(sock, peer))
            self._entering[task] = key
            self._clients[key] += 1
            task.add_done_callback(self._entered)

    def _has_room(self, key: str) -> bool:
        most = self._connections.per_client
        return len(self._entering) < self._connections.limit and not (key and most and self._clients[key] >= most)

    def _entered(self, task: asyncio.Task[None]) -> None:
        key = self._entering.pop(task)
        self._clients[key] -= 1
        if not self._clients[key]:
            del self._clients[key]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("fault", error=type(error).__name__)

    async def _enter(self, sock: socket.socket, peer: str) -> None:
        origin: Origin | None = None
        if peer in self._proxies():
            try:
                async with asyncio.timeout(PROXY_SECONDS):
                    origin = await read_proxy_header(sock)
            except (ProxyFault, TimeoutError, OSError) as error:
                sock.close()
                log.warning("no PROXY header", fault=str(error) or "it did not come in time")
                return
            except BaseException:
                sock.close()
                raise
        context = self._tls_context()
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: self._factory(origin), sock, ssl=context,
                ssl_handshake_timeout=TLS_HANDSHAKE_SECONDS if context is not None else None)
        except (OSError, EOFError):     # ssl.SSLError is an OSError; the transport has closed the socket
            log.debug("no TLS handshake")


def _peer_of(sock: socket.socket) -> str:
    return UNIX if sock.family == socket.AF_UNIX else str(sock.getpeername()[0])
