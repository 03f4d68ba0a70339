"""Storing messages: what IMAP can carry, and APPEND with many in flight (RFC 3501 6.3.11, RFC 4315, RFC 7888)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from malote.errors import MailboxError, MailboxLost
from malote.incoming import imap_names, imap_parse
from malote.incoming.imap_folders import Folder
from malote.incoming.imap_names import Literal
from malote.incoming.imap_protocol import Exchange, MailProtocol, Piece

MAX_IN_FLIGHT = 64                      # commands
MAX_BYTES_IN_FLIGHT = 4 * 1024 * 1024   # of messages that the server has not answered for; one larger goes alone

_BARE_LF = re.compile(rb"(?<!\r)\n")


# (message, flags, INTERNALDATE as FETCH gave it; None or "": now)
AppendItem = tuple[bytes, Sequence[str], str | None]


@dataclass(frozen=True, slots=True)
class Appended:
    """Where the server put it (APPENDUID)."""

    uidvalidity: int
    uid: int


def appendable(raw: bytes) -> bytes:
    """The message as APPEND carries it: bare LF become CRLF, as servers would make them, else unchanged and not copied.

    Raises `MailboxError` NUL or BARECR for what no server keeps.
    """
    if b"\0" in raw:
        raise MailboxError("a message with NUL bytes cannot be stored over IMAP", code="NUL")
    pairs = raw.count(b"\r\n")
    if raw.count(b"\r") != pairs:
        raise MailboxError("a message with bare CR cannot be stored over IMAP", code="BARECR")
    return raw if raw.count(b"\n") == pairs else _BARE_LF.sub(b"\r\n", raw)


class Appender:
    """APPEND over one connection."""

    def __init__(self, protocol: MailProtocol, seconds: float) -> None:
        self._protocol = protocol
        self._seconds = seconds

    async def append_many(self, folder: Folder, items: Iterable[AppendItem]) -> list[Appended | MailboxError | None]:
        """Store them in order. A refusal stands in its place and does not stop the others. Raises `MailboxLost`."""
        outcomes: list[Appended | MailboxError | None] = []
        waiting: list[tuple[Exchange | MailboxError, int]] = []
        in_flight = 0
        for item in items:
            size = len(item[0])
            while waiting and (in_flight + size > MAX_BYTES_IN_FLIGHT or len(waiting) >= MAX_IN_FLIGHT):
                command, done = waiting.pop(0)
                in_flight -= done
                outcomes.append(await self._outcome(command))
            try:
                command = self._command(folder, *item)
            except MailboxLost:
                raise
            except MailboxError as error:
                waiting.append((error, 0))
                continue
            await self._protocol.submit(command)
            waiting.append((command, size))
            in_flight += size
        outcomes.extend([await self._outcome(command) for command, _ in waiting])
        return outcomes

    def _command(self, folder: Folder, raw: bytes, flags: Sequence[str], internal_date: str | None) -> Exchange:
        pieces: list[Piece] = [folder.argument()]
        if flags:
            pieces.append(imap_names.flag_list(flags))
        if internal_date:
            pieces.append(imap_names.internal_date(internal_date))
        pieces.append(Literal(appendable(raw)))
        return Exchange("APPEND", self._protocol.new_tag(), pieces, seconds=self._seconds)

    async def _outcome(self, command: Exchange | MailboxError) -> Appended | MailboxError | None:
        if isinstance(command, MailboxError):
            return command
        await self._protocol.finished(command)
        try:
            status = command.ok("store a message")
        except MailboxLost:
            raise
        except MailboxError as error:
            return error
        if status.code != "APPENDUID":
            return None
        with self._protocol.readable():
            validity, uids = imap_parse.parse_appenduid(status.arguments)
            return Appended(validity, *uids) if len(uids) == 1 else _too_many()


def _too_many() -> Appended:
    raise ValueError("an APPENDUID for several messages")
