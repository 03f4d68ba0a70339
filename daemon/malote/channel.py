"""What a supervisor and its worker say to each other: a pair of sockets that nobody else has, whole messages (unix(7)).

To the worker: `reload` (with the configuration in a memfd and the listening sockets), `stop`; and the end of the channel, when
the supervisor is gone. To the supervisor: `ready`, `alive`, `reloaded`, `refused`.
"""

from __future__ import annotations

import array
import json
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from malote.config import Config
from malote.errors import ConfigError

MAX_BYTES = 64 * 1024
MAX_FDS = 253           # SCM_MAX_FD (unix(7))

Place = tuple[str, int]
Sockets = Mapping[Place, Sequence[socket.socket]]


@dataclass(frozen=True, slots=True)
class Said:
    word: str
    values: dict[str, Any] = field(default_factory=dict)
    fds: tuple[int, ...] = ()


class Channel:
    """One end."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        sock.setblocking(False)

    @classmethod
    def pair(cls) -> tuple[Channel, Channel]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(ours), cls(theirs)

    def say(self, word: str, fds: Sequence[int] = (), **values: Any) -> bool:
        """False: the other side is gone, or has not listened for long."""
        message = json.dumps({"word": word, "values": values}).encode()
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            self.socket.sendmsg([message], rights, socket.MSG_NOSIGNAL)
        except OSError:
            return False
        return True

    def hear(self) -> Said | None:
        """The next message; None: the other side is gone. Raises `BlockingIOError` when there is none yet."""
        try:
            data, rights, _, _ = self.socket.recvmsg(MAX_BYTES, socket.CMSG_SPACE(MAX_FDS * 4), socket.MSG_CMSG_CLOEXEC)
        except ConnectionError:
            return None
        fds = array.array("i")
        for level, kind, numbers in rights:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.frombytes(numbers[:len(numbers) - len(numbers) % fds.itemsize])
        if not data:
            return None
        said = json.loads(data)
        return Said(said["word"], said["values"], tuple(fds))

    def close(self) -> None:
        self.socket.close()


def say_reload(channel: Channel, config: Config, sockets: Sockets) -> bool:
    """A configuration may be larger than a message: it goes as a file that is nowhere on disk."""
    places = [place for place, bound in sockets.items() for _ in bound]
    document = os.memfd_create("malote-config")
    try:
        with os.fdopen(os.dup(document), "wb") as file:
            file.write(json.dumps({"config": config.model_dump(mode="json"), "places": places}).encode())
        return channel.say("reload", [document, *(sock.fileno() for bound in sockets.values() for sock in bound)])
    finally:
        os.close(document)


def check_number(sockets: Sockets) -> None:
    """Raises `ConfigError` when there are more than one message can carry."""
    if sum(map(len, sockets.values())) >= MAX_FDS:
        raise ConfigError(f"outgoing.listeners: {MAX_FDS - 1} sockets at most with service.workers above 1")


def read_reload(said: Said) -> tuple[Config, dict[Place, list[socket.socket]]]:
    """The other side of `say_reload`."""
    document, *fds = said.fds
    with os.fdopen(document, "rb") as file:
        file.seek(0)
        content = json.load(file)
    sockets: dict[Place, list[socket.socket]] = {}
    for (host, port), fd in zip(content["places"], fds, strict=True):
        sock = socket.socket(fileno=fd)
        sock.setblocking(False)
        sockets.setdefault((host, port), []).append(sock)
    return Config.model_validate_json(json.dumps(content["config"]), strict=True), sockets
