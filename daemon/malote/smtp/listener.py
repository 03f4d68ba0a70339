"""One listening socket: how it is made, renewed by a reload, and closed; and the certificate behind it."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from malote.config import LimitsConfig, ListenerConfig
from malote.errors import ConfigError
from malote.smtp.budget import MemoryBudget
from malote.smtp.conversation import ServerSettings
from malote.smtp.desk import Desk
from malote.smtp.gate import Gate
from malote.smtp.lmtp import LmtpServer
from malote.smtp.networks import Networks
from malote.smtp.open_connections import Connections
from malote.smtp.server import SubmissionServer
from malote.smtp.sockets import BACKLOG, Acceptor, bind, cannot_listen, unix_socket


@dataclass(slots=True)
class Listener:
    """One listening socket. `desk` may be replaced while it runs: new connections get the new one."""

    settings: ServerSettings
    desk: Desk
    connections: Connections
    budget: MemoryBudget
    lmtp: bool = False
    _server: asyncio.Server | Acceptor | None = None
    _path: Path | None = None

    async def open(self, config: ListenerConfig, sockets: Sequence[socket.socket] = ()) -> None:
        """Raises `ConfigError` when the address cannot be listened on.

        `sockets` listen on it already, and other processes may accept from them too; they are closed with the listener.
        """
        loop = asyncio.get_running_loop()
        server = LmtpServer if self.lmtp else SubmissionServer
        factory: Callable[..., SubmissionServer] = lambda origin=None: server(  # noqa: E731
            self.settings, self.desk, self.connections, self.budget, origin)
        if needs_gate(self.settings):
            self._path = None if sockets else config.socket
            self._server = Gate(
                sockets or bind(config), factory, self.connections, proxies=lambda: self.settings.proxies,
                tls_context=lambda: self.settings.tls_context if self.settings.implicit_tls else None)
            return
        if sockets:
            self._server = Acceptor(sockets, factory)
            return
        try:
            if config.socket is not None:
                self._server = await loop.create_unix_server(factory, sock=unix_socket(config), backlog=BACKLOG)
                self._path = config.socket
            else:
                self._server = await loop.create_server(factory, config.host, config.port, backlog=BACKLOG)
        except OSError as error:
            raise cannot_listen(config, error) from error

    @property
    def addresses(self) -> list[tuple[str, int]]:
        """Host and port of each socket; the port is the one the system chose when 0 was asked for."""
        names = [sock.getsockname() for sock in self._server.sockets] if self._server is not None else []
        return [(name[0], name[1]) for name in names if isinstance(name, tuple)]

    @property
    def gated(self) -> bool:
        """See `needs_gate`."""
        return isinstance(self._server, Gate)

    def renew(self, settings: ServerSettings, desk: Desk) -> None:
        """For connections from now on."""
        self.settings, self.desk = settings, desk

    def close(self) -> None:
        """Stop listening. Open connections go on: `Connections.drain` ends them."""
        if self._server is not None:
            self._server.close()
            self._server = None
        if self._path is not None:
            self._path.unlink(missing_ok=True)
            self._path = None


def needs_gate(settings: ServerSettings) -> bool:
    """Whether something comes before SMTP: then connections are let in by a `Gate`, and all about TLS can change at any time."""
    return settings.implicit_tls or bool(settings.proxies)


def server_tls_context(config: ListenerConfig) -> ssl.SSLContext | None:
    """From `certificate` and `certificate_key`; None with tls = "none". Raises `ConfigError`."""
    if config.tls == "none":
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    load_certificate(context, config)
    if config.client_ca is not None:
        try:
            context.load_verify_locations(cafile=config.client_ca)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError("outgoing.listeners.client_ca cannot be read as certificates in PEM form") from error
        # optional: who has none is told so in words, at MAIL; a wrong one ends the handshake
        context.verify_mode = ssl.CERT_OPTIONAL
    return context


def load_certificate(context: ssl.SSLContext, config: ListenerConfig) -> None:
    """Raises `ConfigError`."""
    if config.certificate is None:
        raise ConfigError(f'outgoing.listeners.certificate: must be set with tls = "{config.tls}"')
    try:
        context.load_cert_chain(config.certificate, config.certificate_key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError("outgoing.listeners: certificate and certificate_key cannot be read, or do not match") from error


def server_settings(config: ListenerConfig, limits: LimitsConfig, hostname: str) -> ServerSettings:
    """Raises `ConfigError`."""
    return ServerSettings(
        hostname=hostname, max_message_bytes=limits.max_message_bytes, max_recipients=limits.recipients,
        command_seconds=limits.command_seconds, data_block_seconds=limits.data_block_seconds,
        handler_seconds=limits.reply_within_seconds + 60, normalise=limits.bare_line_ends == "normalise",
        tls_context=server_tls_context(config), implicit_tls=config.tls == "tls", require_tls=config.tls == "starttls",
        networks=Networks(config.networks), proxies=Networks(config.proxies), xclient=Networks(config.xclient),
    )
