"""Where opened messages go over IMAP: the same folder or one of their own; each copy is verified before it counts.

A delivery may be tried again after a crash at any point. The mark in a copy's header says which message it is, so that a second
try finds what the first one left. Maildir delivery is in `maildir`.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from malote.core import status
from malote.core.message import header_fields
from malote.errors import FormatError, MailboxError
from malote.incoming.account import Mark, mark_of
from malote.incoming.arbiter import Copy
from malote.incoming.mailbox import Folder
from malote.incoming.session import Session

MARKS_AT_ONCE = 30      # in one SEARCH, of 70 bytes each: lines of 2 KB are taken by every server

_BARE_CR = re.compile(rb"\r(?!\n)")
_WRAPPED_FIELDS = frozenset({"from", "to", "cc", "subject", "date", "message-id", "in-reply-to", "references", "reply-to"})
_WRAPPED_NOTE = (
    b"This message holds bytes that a mailbox cannot store. It is attached here as\r\n"
    b"a file, exactly as it was written.\r\n"
)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a message was not delivered; `code` is the response code of the mailbox, as OVERQUOTA, or a word of ours."""

    code: str


ALTERED = Failure("ALTERED")            # stored, but not as it was given
NOT_STORED = Failure("NOT-STORED")      # said to be stored, and not to be found


@dataclass(slots=True)
class Parcel:
    """One opened message on its way to where it is read."""

    uid: int                        # of the sealed original
    mark: Mark
    raw: bytes                      # what is delivered, our headers included
    flags: tuple[str, ...]
    internal_date: str              # as IMAP gave it
    internal_date_ms: int
    again: bool                     # judged before: an earlier try may have left its copy
    rival: bool = False             # another device has put a copy there already
    copy: int | None = None         # UID of our verified copy; 0 where it has none here (Maildir, or filed by a person)
    failure: Failure | None = None


class Delivery(Protocol):
    """Gives each parcel its `copy` or its `failure`. Raises `MailboxLost` when nothing more can be said."""

    shared: bool        # other devices put their copies there too, and each sees those of the others

    async def deliver(self, session: Session, source: Folder, parcels: Sequence[Parcel]) -> None: ...

    async def copies(self, session: Session, source: Folder, messages: Collection[str]) -> list[Copy]:
        """The marked copies of these messages where opened mail goes, by whatever device."""
        ...

    async def copies_anywhere(self, session: Session, messages: Collection[str]) -> list[Copy]:
        """Also those that a person has filed in another folder."""
        ...

    async def is_same(self, session: Session, one: Copy, other: Copy) -> bool:
        """Whether both are still there and hold the same content."""
        ...

    async def withdraw(self, session: Session, copy: Copy, other: Copy | None = None) -> bool:
        """Take a copy of ours back. False: it was not there, somebody has just moved it; or `other`, which is to stay in its
        place, was not there any more, or is about to be taken back itself."""
        ...

    async def reflag(self, session: Session, source: Folder, parcel: Parcel, flags: Sequence[str]) -> None:
        """A person has changed the flags of the original since: the copy gets them too."""
        ...


# --- what IMAP can carry ---

def carriable(original: bytes) -> bytes:
    """The original, or, where it holds a NUL or a lone CR, a small message with the original attached in base64."""
    return wrapped(original) if b"\0" in original or _BARE_CR.search(original) else original


def wrapped(original: bytes) -> bytes:
    """A message that says what it is, with the whole original attached as a file; pure US-ASCII."""
    try:
        fields = [field.raw for field in header_fields(original) if field.name in _WRAPPED_FIELDS and _plain(field.raw)]
    except FormatError:
        fields = []
    head = b"".join(b"\r\n".join(raw.splitlines()) + b"\r\n" for raw in fields)
    boundary = b"--=_malote_attached"       # `=_` occurs neither in base64 nor in the note
    return b"".join((
        head, b'MIME-Version: 1.0\r\nContent-Type: multipart/mixed; boundary="=_malote_attached"\r\n\r\n',
        boundary, b"\r\nContent-Type: text/plain; charset=us-ascii\r\n\r\n", _WRAPPED_NOTE, b"\r\n",
        # not message/rfc822: RFC 2046 5.2.1 allows no base64 there
        boundary, b'\r\nContent-Type: application/octet-stream; name="message.eml"\r\n'
        b'Content-Transfer-Encoding: base64\r\nContent-Disposition: attachment; filename="message.eml"\r\n\r\n',
        base64.encodebytes(original).replace(b"\n", b"\r\n"), boundary, b"--\r\n",
    ))


def _plain(raw: bytes) -> bool:
    return raw.isascii() and b"\0" not in raw and not _BARE_CR.search(raw)


def same_message(stored: bytes, sent: bytes) -> bool:
    """Whether the mailbox kept what it was given. Servers may change line ends (bare LF becomes CRLF), nothing else."""
    return stored == sent or stored.replace(b"\r\n", b"\n") == sent.replace(b"\r\n", b"\n")


def same_content(stored: bytes, sent: bytes) -> bool:
    """Whether two copies were opened from the same message: our own headers may differ (another device, another time)."""
    return same_message(status.delivered_content(stored), status.delivered_content(sent))


# --- IMAP ---

class ImapDelivery:
    """APPEND with a mark, then FETCH what was stored and compare. `target`: None for the folder that the original is in."""

    shared = True

    def __init__(self, target: Folder | None) -> None:
        self._target = target

    async def deliver(self, session: Session, source: Folder, parcels: Sequence[Parcel]) -> None:
        target = self._target or source
        for parcel in parcels:
            if parcel.again:
                await self._find_earlier(session, target, parcel)
        new = [parcel for parcel in parcels if parcel.copy is None]
        if new:
            await self._append(session, target, new)
            await self._verify(session, target, [parcel for parcel in new if parcel.failure is None])

    async def copies(self, session: Session, source: Folder, messages: Collection[str]) -> list[Copy]:
        return await self._copies_in(session, self._target or source, messages)

    async def copies_anywhere(self, session: Session, messages: Collection[str]) -> list[Copy]:
        found: list[Copy] = []
        for folder in await session.box.list_folders() if messages else ():
            try:
                found += await self._copies_in(session, folder, messages) if folder.selectable else []
            except MailboxError as error:
                if session.box.lost.is_set() or error.code not in _NOT_READABLE:
                    raise       # a folder that we may not read holds nothing of ours; anything else is a fault
        return found

    async def _copies_in(self, session: Session, folder: Folder, messages: Collection[str]) -> list[Copy]:
        """Many at once: a search in headers may read every message of the folder."""
        await session.enter(folder)
        uids: list[int] = []
        wanted = list(messages)
        for start in range(0, len(wanted), MARKS_AT_ONCE):
            keys = [f'HEADER Malote-Mark "{message}"' for message in wanted[start:start + MARKS_AT_ONCE]]
            uids += await session.box.search("OR " * (len(keys) - 1) + " ".join(keys))
        peeked = await session.box.peek_headers(uids, ("Malote-Mark",)) if uids else []
        marks = ((mark_of(peek.header), peek) for peek in peeked)
        return [Copy(mark, folder, peek.uid, _is_discarded(folder, peek.flags)) for mark, peek in marks
                if mark is not None and mark.message in messages]

    async def is_same(self, session: Session, one: Copy, other: Copy) -> bool:
        found: list[bytes] = []
        for copy in (one, other):
            await session.enter(copy.folder)
            fetched = await session.box.fetch(copy.uid)
            found += [fetched.raw] if fetched is not None else []
        return len(found) == 2 and same_content(*found)

    async def withdraw(self, session: Session, copy: Copy, other: Copy | None = None) -> bool:
        if await self._flags_now(session, copy) is None:
            return False
        if other is not None:
            # Two devices may come to this at the same moment, each for the sake of the other's copy. Whoever marks its own
            # and then looks sees the mark of whoever marked before: so never do both go.
            await session.box.store_flags([copy.uid], add=["\\Deleted"])
            flags = await self._flags_now(session, other)
            await session.enter(copy.folder)
            if flags is None or _is_discarded(other.folder, flags):
                await session.box.store_flags([copy.uid], remove=["\\Deleted"])
                return False
        try:
            await session.box.expunge([copy.uid])
        except MailboxError as error:
            if error.code != "NOUIDPLUS":       # then it stays, marked deleted
                raise
        return True

    async def _flags_now(self, session: Session, copy: Copy) -> Sequence[str] | None:
        """Its flags; None: it is not there any more. Its folder is entered."""
        await session.enter(copy.folder)
        await session.box.noop()        # else a server may still show what another client has moved away or marked
        found = await session.box.peek_headers([copy.uid], ("Malote-Mark",))
        return found[0].flags if found and mark_of(found[0].header) == copy.mark else None

    async def reflag(self, session: Session, source: Folder, parcel: Parcel, flags: Sequence[str]) -> None:
        if not parcel.copy:
            return
        await session.enter(self._target or source)
        await session.box.store_flags([parcel.copy], add=[flag for flag in flags if flag not in parcel.flags],
                                      remove=[flag for flag in parcel.flags if flag not in flags])

    async def _find_earlier(self, session: Session, target: Folder, parcel: Parcel) -> None:
        """A copy of ours that is there already and whole serves (IMAP keeps no half of an APPEND)."""
        for copy in await self.copies(session, target, [parcel.mark.message]):
            if copy.mark != parcel.mark:
                parcel.rival = True
                continue
            stored = await session.box.fetch(copy.uid) if parcel.copy is None else None
            if stored is not None and same_content(stored.raw, parcel.raw):
                parcel.copy = copy.uid
        if parcel.copy is None and await self._is_elsewhere(session, parcel):
            parcel.copy = 0

    async def _is_elsewhere(self, session: Session, parcel: Parcel) -> bool:
        """Whether a person's own client has filed our copy in another folder already."""
        for copy in await self.copies_anywhere(session, [parcel.mark.message]):
            if copy.mark == parcel.mark:
                await session.enter(copy.folder)
                stored = await session.box.fetch(copy.uid)
                if stored is not None and same_content(stored.raw, parcel.raw):
                    return True
        return False

    async def _append(self, session: Session, target: Folder, parcels: Sequence[Parcel]) -> None:
        items = [(parcel.raw, parcel.flags, parcel.internal_date) for parcel in parcels]
        answers = await session.box.append_many(target, items)
        validity = (await session.enter(target)).uidvalidity
        for parcel, answer in zip(parcels, answers, strict=True):
            if isinstance(answer, MailboxError):
                parcel.failure = Failure(answer.code or "NO")
            elif answer is not None and answer.uidvalidity == validity:
                parcel.copy = answer.uid

    async def _verify(self, session: Session, target: Folder, parcels: Sequence[Parcel]) -> None:
        stored = await self._stored(session, target, parcels)
        unnamed = [parcel for parcel in parcels if not _bears(stored.get(parcel.copy or 0), parcel.mark)]
        if unnamed:     # no UIDPLUS, or what lies there is not ours and must not be touched
            copies = await self.copies(session, target, [parcel.mark.message for parcel in unnamed])
            for parcel in unnamed:
                parcel.copy = max((copy.uid for copy in copies if copy.mark == parcel.mark), default=None)
            stored |= await self._stored(session, target, unnamed)
        for parcel in parcels:
            content = stored.get(parcel.copy or 0)
            if content is not None and same_message(content, parcel.raw):
                continue
            if content is not None and parcel.copy:
                await self.withdraw(session, Copy(parcel.mark, target, parcel.copy))
                parcel.copy, parcel.failure = None, ALTERED
            elif await self._is_elsewhere(session, parcel):
                parcel.copy = 0
            else:
                parcel.copy, parcel.failure = None, NOT_STORED

    async def _stored(self, session: Session, target: Folder, parcels: Iterable[Parcel]) -> dict[int, bytes]:
        uids = [parcel.copy for parcel in parcels if parcel.copy]
        return {fetched.uid: fetched.raw for fetched in await session.fetch_new(target, uids)}


def _bears(content: bytes | None, mark: Mark) -> bool:
    return content is not None and mark_of(content) == mark


_NOT_READABLE = frozenset({"NO", "NOPERM", "NONEXISTENT", "NOSELECT", "NOUIDVALIDITY", "UIDNOTSTICKY", "INUSE", "UNAVAILABLE"})


def _is_discarded(folder: Folder, flags: Sequence[str]) -> bool:
    return folder.is_trash or any(flag.lower() == "\\deleted" for flag in flags)
