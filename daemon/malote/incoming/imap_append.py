"""Storing messages: what IMAP can carry, and APPEND with many in flight (RFC 3501 6.3.11, RFC 3502, RFC 4315, RFC 7888)."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass

from malote.errors import MailboxError, MailboxLost
from malote.incoming import imap_names, imap_parse
from malote.incoming.imap_exchange import Exchange, Piece
from malote.incoming.imap_folders import Folder
from malote.incoming.imap_names import Literal
from malote.incoming.imap_parse import Status
from malote.incoming.imap_protocol import MailProtocol

MAX_IN_FLIGHT = 64                      # commands
MAX_BYTES_IN_FLIGHT = 4 * 1024 * 1024   # of messages that the server has not answered for; one larger goes alone
GROUP_MESSAGES = 50                     # in one APPEND: Dovecot then syncs once, 1,000 of 5 KB in 0.4 s and not in 1.3 s
GROUP_BYTES = 512 * 1024

_BARE_LF = re.compile(rb"(?<!\r)\n")

# (message, flags, INTERNALDATE as FETCH gave it; None or "": now)
AppendItem = tuple[bytes, Sequence[str], str | None]


@dataclass(frozen=True, slots=True)
class Appended:
    """Where the server put it (APPENDUID)."""

    uidvalidity: int
    uid: int


Outcome = Appended | MailboxError | None


@dataclass(frozen=True, slots=True)
class _Ready:
    """A message as it goes on the wire. `index`: its place among those asked for."""

    index: int
    pieces: tuple[Piece, ...]
    size: int


_Stored = tuple[list[_Ready], Status | MailboxError]


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

    async def append_many(self, folder: Folder, items: Iterable[AppendItem]) -> list[Outcome]:
        """Store them in order. A refusal stands in its place and does not stop the others. Raises `MailboxLost`."""
        outcomes: list[Outcome] = []
        ready: list[_Ready] = []
        for index, item in enumerate(items):
            try:
                ready.append(_ready(index, *item))
                outcomes.append(None)
            except MailboxError as error:
                outcomes.append(error)
        refused: list[_Ready] = []      # groups are all or nothing (RFC 3502): find out who it was one by one
        grouped = {"MULTIAPPEND", "UIDPLUS"} <= self._protocol.capabilities
        async for group, outcome in self._store(folder, _groups(ready, GROUP_MESSAGES if grouped else 1)):
            if len(group) > 1 and isinstance(outcome, MailboxError):
                refused += group
            else:
                self._note(group, outcome, outcomes)
        async for group, outcome in self._store(folder, [[one] for one in refused]):
            self._note(group, outcome, outcomes)
        return outcomes

    async def _store(self, folder: Folder, groups: Iterable[list[_Ready]]) -> AsyncIterator[_Stored]:
        """Yield each group with its status or refusal, in order, others being in flight meanwhile."""
        waiting: deque[tuple[list[_Ready], Exchange]] = deque()
        in_flight = 0
        for group in groups:
            size = sum(one.size for one in group)
            while waiting and (in_flight + size > MAX_BYTES_IN_FLIGHT or len(waiting) >= MAX_IN_FLIGHT):
                done, command = waiting.popleft()
                in_flight -= sum(one.size for one in done)
                yield done, await self._answer(command)
            pieces = [folder.argument(), *(piece for one in group for piece in one.pieces)]
            command = Exchange("APPEND", self._protocol.new_tag(), pieces, seconds=self._seconds)
            await self._protocol.submit(command)
            waiting.append((group, command))
            in_flight += size
        for done, command in waiting:
            yield done, await self._answer(command)

    async def _answer(self, command: Exchange) -> Status | MailboxError:
        await self._protocol.finished(command)
        try:
            return command.ok("store a message")
        except MailboxLost:
            raise
        except MailboxError as error:
            return error

    def _note(self, group: list[_Ready], outcome: Status | MailboxError, outcomes: list[Outcome]) -> None:
        if isinstance(outcome, MailboxError):
            outcomes[group[0].index] = outcome
        elif outcome.code == "APPENDUID":
            with self._protocol.readable():
                validity, uids = imap_parse.parse_appenduid(outcome.arguments)
                for one, uid in zip(group, uids, strict=True):
                    outcomes[one.index] = Appended(validity, uid)


def _ready(index: int, raw: bytes, flags: Sequence[str], internal_date: str | None) -> _Ready:
    pieces: list[Piece] = []
    if flags:
        pieces.append(imap_names.flag_list(flags))
    if internal_date:
        pieces.append(imap_names.internal_date(internal_date))
    return _Ready(index, (*pieces, Literal(appendable(raw))), len(raw))


def _groups(ready: Sequence[_Ready], count: int) -> Iterator[list[_Ready]]:
    group: list[_Ready] = []
    for one in ready:
        if group and (len(group) >= count or sum(other.size for other in group) + one.size > GROUP_BYTES):
            yield group
            group = []
        group.append(one)
    if group:
        yield group
