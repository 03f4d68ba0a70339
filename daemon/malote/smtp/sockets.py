"""The sockets that mail comes in on: bound here, taken over from systemd, and accepted from by several processes at once."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import socket
import stat
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import structlog

from malote.config import ListenerConfig
from malote.errors import ConfigError

BACKLOG = 512
FIRST_FD = 3            # sd_listen_fds(3)
PAUSE_SECONDS = 0.5     # without descriptors to accept with: until others have ended

log = structlog.get_logger("malote.smtp")

Place = tuple[str, int]     # what a listener listens on: ListenerConfig.place


def bind(config: ListenerConfig) -> list[socket.socket]:
    """Listening sockets for this place: one for each address that its host has. Raises `ConfigError`."""
    bound: list[socket.socket] = []
    try:
        if config.socket is not None:
            bound.append(unix_socket(config))
        else:
            found = socket.getaddrinfo(config.host or None, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            for family, _, _, _, address in dict.fromkeys(found):
                bound.append(_inet_socket(family, address))
        for sock in bound:
            sock.listen(BACKLOG)
    except OSError as error:
        close_all(bound)
        raise cannot_listen(config, error) from error
    return bound


def _inet_socket(family: int, address: tuple[object, ...]) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    return sock


def unix_socket(config: ListenerConfig) -> socket.socket:
    """Bound in the place of a socket that an earlier run left behind; of nothing else. Raises `ConfigError`, `OSError`."""
    path = config.socket or Path()
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
        if config.socket_group:
            _give_to_group(path, config.socket_group)
        path.chmod(config.socket_mode)      # last: until then, by the umask of the service, it is the owner's alone
    except BaseException:
        sock.close()
        raise
    sock.setblocking(False)
    return sock


def _give_to_group(path: Path, group: str) -> None:
    """Raises `ConfigError`."""
    try:
        shutil.chown(path, group=int(group) if group.isdecimal() else group)
    except LookupError:
        raise ConfigError(f"outgoing.listeners.socket_group: there is no group {group}") from None
    except PermissionError:
        raise ConfigError(f"outgoing.listeners.socket_group: this user may not give a file to the group {group}",
                          hint="make it a member of the group (SupplementaryGroups= in the unit)") from None


def cannot_listen(config: ListenerConfig, error: OSError) -> ConfigError:
    """What the person is told."""
    where = config.socket or f"{config.host} port {config.port}"
    why = os.strerror(error.errno) if error.errno and error.errno > 0 else "no such address"    # negative: the resolver's
    return ConfigError(f"outgoing.listeners: cannot listen on {where} ({why})", hint=_cure(error))


def _cure(error: OSError) -> str:
    match error.errno:
        case errno.EADDRINUSE:
            return "is malote running already? if not, set another port in [[outgoing.listeners]]"
        case errno.EACCES:
            return "ports below 1024 need CAP_NET_BIND_SERVICE; docs/operating.md says how"
        case _:
            return "set host to an address of this machine"


def close_all(sockets: Sequence[socket.socket]) -> None:
    for sock in sockets:
        sock.close()


class Activated:
    """The sockets that systemd holds for us (socket activation, sd_listen_fds(3)); none where there is no such thing.

    They stay open for as long as we run: clients that come while malote is restarted wait in them.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ, *, first_fd: int = FIRST_FD) -> None:
        self.sockets: list[socket.socket] = []
        try:
            ours = int(environment.get("LISTEN_PID", "")) == os.getpid()
            count = int(environment.get("LISTEN_FDS", ""))
        except ValueError:
            return
        for fd in range(first_fd, first_fd + count) if ours else ():
            os.set_inheritable(fd, False)
            try:
                sock = socket.socket(fileno=fd)
            except OSError:
                log.warning("what systemd handed over is no socket", fd=fd)
                continue
            sock.setblocking(False)
            self.sockets.append(sock)

    def find(self, config: ListenerConfig) -> list[socket.socket]:
        """Copies of those that listen on this place."""
        return [sock.dup() for sock in self.sockets if _name(sock) in _names(config)]

    def unused(self, listeners: Sequence[ListenerConfig]) -> list[str]:
        """Addresses of those that belong to no listener of the configuration."""
        wanted = [name for config in listeners for name in _names(config)]
        return [":".join(map(str, name)) for sock in self.sockets if (name := _name(sock)) not in wanted]


def _name(sock: socket.socket) -> Place:
    name = sock.getsockname()
    return (name, 0) if isinstance(name, str) else (name[0], name[1])


def _names(config: ListenerConfig) -> list[Place]:
    if config.socket is not None:
        return [config.place]
    with suppress(OSError):
        return [(str(found[4][0]), config.port) for found in
                socket.getaddrinfo(config.host or None, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)]
    return []


class Acceptor:
    """Accepts from sockets that other processes accept from too: one connection for each time that a socket is ready, so that
    who is busy leaves the next one to the others. (`loop.create_server` takes all that wait at once.)"""

    def __init__(self, sockets: Sequence[socket.socket], factory: Callable[[], asyncio.BaseProtocol]) -> None:
        self.sockets = tuple(sockets)
        self._factory = factory
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        for sock in self.sockets:
            self._loop.add_reader(sock, self._ready, sock)

    def close(self) -> None:
        """Stop accepting, and close the sockets. Who is on the way in is told 421 then, if the service stops."""
        for sock in self.sockets:
            self._loop.remove_reader(sock)
            sock.close()

    def _ready(self, sock: socket.socket) -> None:
        try:
            connection, _ = sock.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):     # another process was quicker; the client is gone
            return
        except OSError as error:
            log.error("no connection can be taken", fault=os.strerror(error.errno or 0))
            self._loop.remove_reader(sock)
            self._loop.call_later(PAUSE_SECONDS, self._resume, sock)
            return
        connection.setblocking(False)
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        task = self._loop.create_task(self._take(connection))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _resume(self, sock: socket.socket) -> None:
        if sock.fileno() >= 0:
            self._loop.add_reader(sock, self._ready, sock)

    async def _take(self, connection: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._factory, connection)
        except OSError:
            connection.close()
