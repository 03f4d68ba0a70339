"""Reading from the selected folder: SEARCH, headers, structure, pieces and whole messages, by UID, several commands in flight.

Answers are matched by UID, never by sequence number, so other clients may expunge and flag meanwhile. A message that is gone is
simply not in the answer.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass

from malote.errors import MailboxError
from malote.incoming import imap_names, imap_parse
from malote.incoming.imap_exchange import Exchange
from malote.incoming.imap_parse import Data, Part, Value
from malote.incoming.imap_protocol import MailProtocol

BATCH_MESSAGES = 200                # messages in one FETCH of bodies
BATCH_BYTES = 4 * 1024 * 1024       # of message text in one FETCH; two are in flight, so about twice that is in memory
PEEK_BATCH = 200                    # messages in one FETCH of headers or pieces
HEADER_BYTES = 64 * 1024            # of one header that is read at all: strangers write headers, and 200 are in memory at once
BATCH_SLACK = 1024 * 1024           # bytes by which a batch of bodies may exceed what RFC822.SIZE said: it is often a little off
MAX_SECTION = 500                   # characters of the name of what is asked for; the parser takes no longer ones
ANSWER_SLACK = 4096                 # bytes that one FETCH answer may hold beside its body: flags, dates, punctuation

_FIELD = re.compile(r"[!-9;-~]+")               # RFC 5322 3.6.8, ftext
_SECTION = re.compile(r"(?:\d+(?:\.\d+)*(?:\.(?:HEADER|TEXT|MIME))?|HEADER|TEXT)?")
_FETCH = frozenset({"FETCH"})


@dataclass(frozen=True, slots=True)
class Peeked:
    """What is known of a message without its body; looking does not set \\Seen."""

    uid: int
    size: int                   # bytes, as the server says (RFC822.SIZE)
    internal_date_ms: int
    flags: tuple[str, ...]
    header: bytes               # the whole header, or the fields that were asked for


@dataclass(frozen=True, slots=True)
class Fetched:
    """A whole message, byte for byte as the server holds it."""

    uid: int
    raw: bytes
    flags: tuple[str, ...]
    internal_date: str          # as the server spells it, APPEND takes it unchanged; "" if it is no date
    internal_date_ms: int       # 0 if it is no date


class Reader:
    """The reading half of a mailbox, over one connection."""

    def __init__(self, protocol: MailProtocol, *, command_seconds: float, search_seconds: float) -> None:
        self._protocol = protocol
        self._seconds = command_seconds
        self._search_seconds = search_seconds

    async def search(self, criteria: str) -> list[int]:
        """UIDs, ascending, of what matches `criteria` (ASCII, RFC 3501 6.4.4). Raises `MailboxError`, `MailboxLost`."""
        if not criteria.isascii() or not criteria.isprintable():
            raise MailboxError("search criteria with other than printable ASCII are not accepted", code="CANNOT")
        short = "ESEARCH" in self._protocol.capabilities
        pieces = (b"RETURN (ALL)", criteria.encode()) if short else (criteria.encode(),)
        command = Exchange("SEARCH", self._protocol.new_tag(), pieces, prefix="UID", seconds=self._search_seconds,
                           wants=frozenset({"SEARCH", "ESEARCH"}))
        await self._protocol.execute(command)
        command.ok("search")
        with self._protocol.readable():
            found: set[int] = set()
            for data in command.data:
                if data.name == "SEARCH" or b'"%s"' % command.tag.encode() in data.rest:
                    found.update(imap_parse.parse_search(data))
            return sorted(found)

    async def search_after(self, uid: int) -> list[int]:
        """UIDs above `uid`. (`n:*` always names the last message too, even below n: RFC 3501 6.4.8.)"""
        if uid >= imap_names.MAX_UID:
            return []
        return [found for found in await self.search(f"UID {uid + 1}:*") if found > uid]

    async def sizes(self, uids: Iterable[int]) -> dict[int, int]:
        """UID -> size in bytes of those that are still there."""
        found: dict[int, int] = {}

        def take(uid: int, items: dict[str, Value]) -> None:
            found[uid] = imap_parse.fetch_number(items, "RFC822.SIZE")

        await self._in_turn(self._command(part, members, b"(UID RFC822.SIZE)", take, "RFC822.SIZE", len(members) * ANSWER_SLACK)
                            for part, members in imap_names.uid_sets(uids))
        return found

    async def peek_headers(self, uids: Iterable[int], fields: Sequence[str] = ()) -> list[Peeked]:
        """Size, date, flags and header (all of it, or only `fields`) of those still there, ascending; at most HEADER_BYTES."""
        wanted = "HEADER"
        if fields:
            if not all(_FIELD.fullmatch(field) for field in fields):
                raise MailboxError("a header field name is not one", code="CANNOT")
            wanted = f"HEADER.FIELDS ({' '.join(fields).upper()})"
            if len(wanted) > MAX_SECTION:
                raise MailboxError("too many header fields at once", code="CANNOT")
        found: dict[int, Peeked] = {}

        def take(uid: int, items: dict[str, Value]) -> None:
            _, date_ms = _date(items)
            found[uid] = Peeked(uid, imap_parse.fetch_number(items, "RFC822.SIZE"), date_ms, imap_parse.fetch_flags(items),
                                imap_parse.fetch_body(items) or b"")

        items = b"(UID FLAGS INTERNALDATE RFC822.SIZE BODY.PEEK[%s]<0.%d>)" % (wanted.encode(), HEADER_BYTES)
        await self._in_turn(self._command(part, members, items, take, "BODY[", len(members) * (HEADER_BYTES + ANSWER_SLACK))
                            for part, members in _batches(uids, PEEK_BATCH))
        return [found[uid] for uid in sorted(found)]

    async def peek_structure(self, uids: Sequence[int]) -> dict[int, list[Part]]:
        """UID -> the leaves of its MIME tree as the server sees it; empty if that is beyond our limits, absent if it is gone."""
        sizes = await self.sizes(uids)
        found: dict[int, list[Part]] = {uid: [] for uid in sizes}

        def take(uid: int, items: dict[str, Value]) -> None:
            with contextlib.suppress(ValueError):       # one strange message must not stop the others
                found[uid] = imap_parse.parse_structure(items.get("BODYSTRUCTURE"))

        # no budget: the parts kept are few whatever the answer's size, see MAX_TOKENS
        readable = [uid for uid, size in sizes.items() if size <= self._protocol.max_literal]
        await self._in_turn(self._command(part, members, b"(UID BODYSTRUCTURE)", take, "BODYSTRUCTURE", sys.maxsize)
                            for part, members in _batches(readable, PEEK_BATCH))
        return found

    async def peek_parts(self, sections: Iterable[tuple[int, str]], length: int, start: int = 0) -> dict[tuple[int, str], bytes]:
        """(UID, section) -> `length` bytes from `start` of that part, as encoded; section "" is the whole message."""
        by_section: dict[str, list[int]] = {}
        for uid, section in sections:
            if not _SECTION.fullmatch(section):
                raise MailboxError("a part of a message is not named so", code="CANNOT")
            by_section.setdefault(section, []).append(uid)
        found: dict[tuple[int, str], bytes] = {}

        def taker(section: str) -> Callable[[int, dict[str, Value]], None]:
            def take(uid: int, items: dict[str, Value]) -> None:
                content = imap_parse.fetch_body(items)
                if content is not None:
                    found[uid, section] = content[:length]
            return take

        await self._in_turn(
            self._command(part, members, b"(UID BODY.PEEK[%s]<%d.%d>)" % (section.encode(), start, length), taker(section),
                          "BODY[", len(members) * (length + ANSWER_SLACK))
            for section, uids in by_section.items() for part, members in _batches(uids, PEEK_BATCH))
        return found

    async def peek_bytes(self, uid: int, section: str, start: int, length: int) -> bytes | None:
        """`length` bytes from `start` of one part, as encoded; None if the message is gone."""
        return (await self.peek_parts([(uid, section)], length, start)).get((uid, section))

    async def fetch(self, uid: int, *, size: int | None = None) -> Fetched | None:
        """The message, or None if it is gone. `size` as known saves a question. Raises `MailboxError` TOOBIG above the limit."""
        known = (await self.sizes([uid])).get(uid) if size is None else size
        if known is None:
            return None
        if known > self._protocol.max_literal:
            raise MailboxError(f"a message of {known} bytes is larger than what is taken in", code="TOOBIG")
        async for fetched in self.fetch_many([uid], sizes={uid: known}):
            return fetched
        return None

    async def fetch_many(self, uids: Iterable[int], *, sizes: dict[int, int] | None = None,
                         batch_bytes: int = BATCH_BYTES) -> AsyncIterator[Fetched]:
        """The messages, ascending by batch, the next batch under way while one is read.

        Not in the answer: those that are gone, and those above the size limit (see `sizes`). Leaving the loop early is fine.
        """
        asked = sorted(set(uids))
        known = await self.sizes(asked) if sizes is None else sizes
        wanted = [uid for uid in asked if known.get(uid, self._protocol.max_literal + 1) <= self._protocol.max_literal]
        waiting: list[tuple[Exchange, list[Fetched]]] = []
        for batch in _by_bytes(wanted, known, batch_bytes):
            waiting.append(await self._ask_bodies(batch, known))
            if len(waiting) == 2:
                for fetched in await self._bodies(*waiting.pop(0)):
                    yield fetched
        for exchange, found in waiting:
            for fetched in await self._bodies(exchange, found):
                yield fetched

    async def _ask_bodies(self, batch: list[int], known: dict[int, int]) -> tuple[Exchange, list[Fetched]]:
        found: list[Fetched] = []

        def take(uid: int, items: dict[str, Value]) -> None:
            raw = imap_parse.fetch_body(items)
            if raw is not None:
                found.append(Fetched(uid, raw, imap_parse.fetch_flags(items), *_date(items)))

        budget = BATCH_SLACK + sum(2 * known[uid] + ANSWER_SLACK for uid in batch)
        part = b",".join(part for part, _ in imap_names.uid_sets(batch))
        command = self._command(part, batch, b"(UID FLAGS INTERNALDATE BODY.PEEK[])", take, "BODY[", budget)
        await self._protocol.submit(command)
        return command, found

    async def _bodies(self, command: Exchange, found: list[Fetched]) -> list[Fetched]:
        await self._protocol.finished(command)
        _check_fetched(command)
        answer = found[:]
        found.clear()
        return answer

    def _command(self, part: bytes, members: Sequence[int], items: bytes, take: Callable[[int, dict[str, Value]], None],
                 mark: str, budget: int) -> Exchange:
        """A UID FETCH. An answer is taken if it is about one of `members`, holds `mark`, and was not given before."""
        missing = set(members)

        def offer(data: Data) -> bool:
            try:
                items = imap_parse.parse_fetch(data)
            except ValueError:
                if mark == "BODYSTRUCTURE":
                    return False    # servers are known to quote strange messages wrongly here; the message is just not described
                raise
            uid = imap_parse.fetch_uid(items)
            if uid is None or uid not in missing or not any(name.startswith(mark) for name in items):
                return False
            missing.discard(uid)
            take(uid, items)
            return True

        return Exchange("FETCH", self._protocol.new_tag(), (part, items), prefix="UID", seconds=self._seconds, wants=_FETCH,
                        take=offer, budget=budget)

    async def _in_turn(self, commands: Iterable[Exchange]) -> None:
        """Run them with two in flight."""
        waiting: list[Exchange] = []
        for command in commands:
            await self._protocol.submit(command)
            waiting.append(command)
            if len(waiting) == 2:
                await self._done(waiting.pop(0))
        for command in waiting:
            await self._done(command)

    async def _done(self, command: Exchange) -> None:
        await self._protocol.finished(command)
        _check_fetched(command)


def _check_fetched(command: Exchange) -> None:
    """NO with EXPUNGEISSUED (RFC 5530) only says that some were gone; the others have been answered."""
    if command.status is None or command.status.code != "EXPUNGEISSUED":
        command.ok("fetch messages")


def _date(items: dict[str, Value]) -> tuple[str, int]:
    text = imap_parse.fetch_text(items, "INTERNALDATE")
    try:
        return text, imap_names.internal_date_ms(text)
    except ValueError:
        return "", 0        # a day that does not exist must not stop the mailbox


def _batches(uids: Iterable[int], count: int) -> Iterable[tuple[bytes, list[int]]]:
    ordered = sorted(set(uids))
    for start in range(0, len(ordered), count):
        yield from imap_names.uid_sets(ordered[start:start + count])


def _by_bytes(uids: Sequence[int], sizes: dict[int, int], batch_bytes: int) -> Iterable[list[int]]:
    batch: list[int] = []
    total = 0
    for uid in uids:
        if batch and (total + sizes[uid] > batch_bytes or len(batch) >= BATCH_MESSAGES):
            yield batch
            batch, total = [], 0
        batch.append(uid)
        total += sizes[uid]
    if batch:
        yield batch
