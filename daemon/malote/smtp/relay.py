"""The upstream mail server: opening connections to it as configured, and the pool of those with configured credentials."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Mapping

from malote.config import Security, UpstreamConfig
from malote.errors import ConfigError, Reply, UpstreamError
from malote.smtp.connection import IN_DOUBT, Then, UpstreamConnection, tls_fault
from malote.smtp.pool import Pool
from malote.smtp.replies import check_reply
from malote.smtp.sasl import Credentials, login
from malote.smtp.upstream_wire import Timeouts

__all__ = ["IN_DOUBT", "Credentials", "Upstream", "UpstreamConnection", "check_reply", "default_tls_context"]

Params = Mapping[str, "str | bool"]


def default_tls_context(config: UpstreamConfig) -> ssl.SSLContext:
    """Certificate and name are always verified. Raises `ConfigError` for a bad `ca_file`."""
    try:
        context = ssl.create_default_context(cafile=str(config.ca_file) if config.ca_file else None)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError("upstream.ca_file cannot be read as certificates in PEM form") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2     # RFC 8997
    return context


class Upstream:
    """`acquire`/`begin` and `release` for pooled connections, `connect` for one that belongs to the caller.

    `credentials` is asked before each login (a token may have been renewed); None: no login, or the client's own.
    Raises `ConfigError` at once for a setting that would send in clear over a network.
    """

    def __init__(
        self, config: UpstreamConfig, *, credentials: Callable[[], Awaitable[Credentials]] | None = None,
        tls_context: ssl.SSLContext | None = None,
    ) -> None:
        if not config.host and config.socket is None:
            raise ConfigError("outgoing.upstream.host: must be set, there is no default")
        self._config = config
        self._credentials = credentials
        self._helo_name = config.helo_name or socket.getfqdn()
        self._timeouts = Timeouts(
            config.connect_seconds, config.command_seconds, config.data_block_seconds, config.data_done_seconds)
        self._tls_context: ssl.SSLContext | None = None
        if config.security is not Security.NONE:
            self._tls_context = tls_context or default_tls_context(config)
        elif config.socket is None and not _may_be_loopback(config.host):
            raise ConfigError('outgoing.upstream.security: "none" is accepted only for a loopback address or a UNIX socket')
        self._pool = Pool(self._open_with_login, limit=config.connections, wait_seconds=config.command_seconds)
        self.lmtp = config.protocol == "lmtp"
        self.connects = 0               # opened since the start
        self.failures = 0               # attempts that failed
        self.last_connect_s = 0.0       # Unix time
        self.reached = False            # whether the last attempt succeeded

    @property
    def connections(self) -> dict[str, int]:
        """Kept ones, by state."""
        return self._pool.counts

    async def connect(self) -> UpstreamConnection:
        """A connection of the caller's own, greeted and (unless so configured) encrypted, but not logged in: for the client's
        own AUTH. End it with `quit()` or `abort()`. Raises `UpstreamError`, `UpstreamRefused`."""
        try:
            connection = await self._connect()
        except UpstreamError:
            self.failures += 1
            self.reached = False
            raise
        self.connects += 1
        self.last_connect_s, self.reached = time.time(), True
        return connection

    async def _connect(self) -> UpstreamConnection:
        config = self._config
        connection = UpstreamConnection(lmtp=self.lmtp, helo_name=self._helo_name, timeouts=self._timeouts)
        loop = asyncio.get_running_loop()
        implicit = self._tls_context if config.security is Security.TLS else None
        name = config.host or "localhost"
        try:
            async with asyncio.timeout(config.connect_seconds):
                if config.socket is not None:
                    await loop.create_unix_connection(
                        lambda: connection, str(config.socket), ssl=implicit, server_hostname=name if implicit else None)
                else:
                    await loop.create_connection(
                        lambda: connection, config.host, config.port, ssl=implicit, server_hostname=name if implicit else None)
        except TimeoutError:
            connection.abort()
            raise UpstreamError("the next mail server does not answer") from None
        except ssl.SSLError as error:
            raise UpstreamError(tls_fault(error)) from error
        except OSError as error:
            raise UpstreamError("the next mail server cannot be reached") from error
        except BaseException:
            connection.abort()
            raise
        connection.tls = implicit is not None
        if config.security is Security.NONE and config.socket is None and not connection.to_loopback:
            connection.abort()
            raise UpstreamError("the next mail server is not on this machine and upstream.security is none: nothing was sent")
        await connection.open(
            starttls=self._tls_context if config.security is Security.STARTTLS else None, server_hostname=name)
        return connection

    async def _open_with_login(self) -> UpstreamConnection:
        connection = await self.connect()
        if self._credentials is not None:
            try:
                await login(connection, await self._credentials(), self._config.auth)
            except BaseException:
                connection.abort()
                raise
        return connection

    async def acquire(self) -> UpstreamConnection:
        """A pooled connection, logged in, ready for MAIL. Waits for one if all are in use. Raises `UpstreamError`."""
        connection, _ = await self._pool.acquire()
        return connection

    async def begin(
        self, address: str, params: Params, then: Then | None = None,
    ) -> tuple[UpstreamConnection, Reply]:
        """A pooled connection with the server's reply to MAIL, whatever it is. Release the connection afterwards. `then`: see
        `UpstreamConnection.begin`; called again where MAIL is tried again.

        A kept connection may have been closed by the server meanwhile: then, as nothing has been accepted yet, MAIL is tried
        once more on a new one. Raises `UpstreamError`.
        """
        connection, used_before = await self._pool.acquire()
        try:
            try:
                reply = await connection.begin(address, params, then)
                if not (used_before and reply.code == 421):
                    return connection, reply
            except UpstreamError:
                if not used_before:
                    raise
        except BaseException:
            connection.abort()
            await self._pool.release(connection)
            raise
        connection.abort()
        await self._pool.release(connection)
        connection, _ = await self._pool.acquire(fresh=True)
        try:
            return connection, await connection.begin(address, params, then)
        except BaseException:
            connection.abort()
            await self._pool.release(connection)
            raise

    def park(self, connection: UpstreamConnection, give_up: Callable[[], None]) -> None:
        """See `Pool.park`."""
        self._pool.park(connection, give_up)

    def unpark(self, connection: UpstreamConnection) -> None:
        self._pool.unpark(connection)

    async def release(self, connection: UpstreamConnection) -> None:
        """After each `acquire` and `begin`, in a `finally`. A transaction left open is reset; a lost connection is dropped."""
        await self._pool.release(connection)

    async def close(self) -> None:
        await self._pool.close()


def _may_be_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"      # where it leads is checked again once connected
