"""One listening socket: how it is made, renewed by a reload, and closed; and the certificate behind it."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import ssl
import stat
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from malote.config import LimitsConfig, ListenerConfig
from malote.errors import ConfigError
from malote.smtp.budget import MemoryBudget
from malote.smtp.conversation import TLS_HANDSHAKE_SECONDS, ServerSettings
from malote.smtp.desk import Desk
from malote.smtp.open_connections import Connections
from malote.smtp.server import SubmissionServer

SOCKET_MODE = 0o666     # who may connect is decided by uid and by the directory's permissions, as for /dev/log
BACKLOG = 512


@dataclass(slots=True)
class Listener:
    """One listening socket. `desk` may be replaced while it runs: new connections get the new one."""

    settings: ServerSettings
    desk: Desk
    connections: Connections
    budget: MemoryBudget
    _server: asyncio.Server | None = None
    _path: Path | None = None

    async def open(self, config: ListenerConfig) -> None:
        """Raises `ConfigError` when the address cannot be listened on."""
        loop = asyncio.get_running_loop()
        implicit = self.settings.tls_context if self.settings.implicit_tls else None
        handshake = TLS_HANDSHAKE_SECONDS if implicit else None     # handshakes are not among the counted connections
        factory: Callable[[], SubmissionServer] = lambda: SubmissionServer(  # noqa: E731
            self.settings, self.desk, self.connections, self.budget)
        try:
            if config.socket is not None:
                self._server = await loop.create_unix_server(
                    factory, sock=_unix_socket(config.socket), backlog=BACKLOG, ssl=implicit, ssl_handshake_timeout=handshake)
                self._path = config.socket
            else:
                self._server = await loop.create_server(
                    factory, config.host, config.port, backlog=BACKLOG, ssl=implicit, ssl_handshake_timeout=handshake)
        except OSError as error:
            where = config.socket or f"{config.host} port {config.port}"
            why = os.strerror(error.errno) if error.errno and error.errno > 0 else "no such address"    # negative: the resolver's
            raise ConfigError(f"outgoing.listeners: cannot listen on {where} ({why})", hint=_cure(error)) from error

    @property
    def addresses(self) -> list[tuple[str, int]]:
        """Host and port of each socket; the port is the one the system chose when 0 was asked for."""
        names = [sock.getsockname() for sock in self._server.sockets] if self._server is not None else []
        return [(name[0], name[1]) for name in names if isinstance(name, tuple)]

    def renew(self, config: ListenerConfig, settings: ServerSettings, desk: Desk) -> None:
        """For connections from now on. With TLS from the first byte the socket keeps its context: it gets the new certificate.

        Raises `ConfigError`.
        """
        context = self.settings.tls_context
        if self.settings.implicit_tls and context is not None:
            load_certificate(context, config)
            settings = replace(settings, tls_context=context)
        self.settings, self.desk = settings, desk

    def close(self) -> None:
        """Stop listening. Open connections go on: `Connections.drain` ends them."""
        if self._server is not None:
            self._server.close()
            self._server = None
        if self._path is not None:
            self._path.unlink(missing_ok=True)
            self._path = None


def _cure(error: OSError) -> str:
    match error.errno:
        case errno.EADDRINUSE:
            return "is malote running already? if not, set another port in [[outgoing.listeners]]"
        case errno.EACCES:
            return "ports below 1024 need CAP_NET_BIND_SERVICE; docs/operating.md says how"
        case _:
            return "set host to an address of this machine"


def _unix_socket(path: Path) -> socket.socket:
    """Bound in the place of a socket that an earlier run left behind; of nothing else."""
    if path.exists() or path.is_symlink():
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise ConfigError(f"outgoing.listeners.socket: {path} exists and is not a socket")
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(path))
            except OSError:
                path.unlink()
            else:
                raise ConfigError(f"outgoing.listeners.socket: something listens on {path} already")
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.bind(str(path))
        path.chmod(SOCKET_MODE)
    except OSError:
        sock.close()
        raise
    sock.setblocking(False)
    return sock


def server_tls_context(config: ListenerConfig) -> ssl.SSLContext | None:
    """From `certificate` and `certificate_key`; None with tls = "none". Raises `ConfigError`."""
    if config.tls == "none":
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    load_certificate(context, config)
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
    )
