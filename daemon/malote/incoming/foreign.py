"""What other devices of the account have opened: everything new in the sealed and the quarantine folder, before we judge.

A message that lies there was delivered by somebody, so it is remembered as delivered without being delivered again. Should one
of these folders go backwards, messages may have been hidden from us that were opened before; then mail that was sent before
that moment can no longer be called fresh.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import structlog

from malote.config import AccountConfig
from malote.core.freshness import Arrival, FreshnessLimits, Verdict
from malote.incoming.mailbox import Folder, FolderStatus
from malote.incoming.opening import Kind, Letter, Opener, remember_outer_id
from malote.incoming.session import Session
from malote.store import Store
from malote.store.records import FolderState

RECORD_BATCH = 200      # messages fetched and recorded together
MAX_SETTLED = 10_000    # payload digests of 32 bytes

log = structlog.get_logger("malote.incoming")


@dataclass(slots=True)
class _Known:
    """What we know of one of these folders, in memory and, as far as it must survive, in the store."""

    uidvalidity: int
    last_uid: int           # all up to here are recorded
    messages: int           # how many there were then
    own: set[int] = field(default_factory=set)      # above last_uid: put there by us, and recorded already


class ForeignFolders:
    """Keeps up with the sealed and the quarantine folder of one account."""

    def __init__(self, account: AccountConfig, sealed: Folder, *, store: Store, opener: Opener, limits: FreshnessLimits,
                 clock: Callable[[], int]) -> None:
        self._account = account
        self._sealed = sealed
        self._store = store
        self._opener = opener
        self._limits = limits
        self._clock = clock
        self._known: dict[bytes, _Known] = {}
        self._settled: OrderedDict[bytes, None] = OrderedDict()

    def note_own(self, folder: Folder, uids: Sequence[int]) -> None:
        """We have moved messages there: they need not be fetched again."""
        known = self._known.get(folder.wire)
        if known is not None:
            known.own.update(uids)
            known.messages += len(uids)

    async def note_removed(self, folder: Folder, count: int) -> None:
        """We have deleted some (retention): fewer are expected from now on."""
        known = self._known.get(folder.wire)
        if known is not None:
            known.messages = max(0, known.messages - count)
            await self._remember(folder, known)

    def last_uid(self, folder: Folder) -> int:
        """Up to which UID everything is recorded."""
        known = self._known.get(folder.wire)
        return known.last_uid if known is not None else 0

    def note_settled(self, payload_digest: bytes) -> None:
        """Another device has opened this one, and ours was taken back: that its original turns up is expected."""
        self._settled[payload_digest] = None
        if len(self._settled) > MAX_SETTLED:
            self._settled.popitem(last=False)

    async def record(self, session: Session, folders: Sequence[Folder]) -> list[Letter]:
        """Record what is new. Returns letters of which there may be two copies: a try of ours, which came to no end, had
        judged it before; or we have moved the original away, and so has another device (see `arbiter`)."""
        contested: list[Letter] = []
        for folder in folders:
            status = await session.box.status(folder)
            known = await self._compare(folder, status)
            if status.uidnext and status.uidnext == known.last_uid + 1:
                continue
            self._skip_own(known)
            if status.uidnext and status.uidnext == known.last_uid + 1:
                await self._remember(folder, known)
                continue
            contested += await self._record_new(session, folder, known)
            known.messages = status.messages
            await self._remember(folder, known)
        return contested

    async def look(self, session: Session, folder: Folder) -> set[bytes]:
        """Payload digests of what others have put into the folder since it was recorded last. Nothing is written down."""
        known = self._known.get(folder.wire)
        await session.enter(folder, fresh=True)
        new = await session.box.search_after(known.last_uid if known is not None else 0)
        found: set[bytes] = set()
        wanted = [uid for uid in new if known is None or uid not in known.own]
        async for batch, sizes in session.batches(wanted, messages=RECORD_BATCH):
            letters = await self._opener.open(await session.fetch_all(batch, sizes))
            found |= {letter.unsealed.payload_digest for letter in letters if letter.unsealed is not None}
        return found

    async def _compare(self, folder: Folder, status: FolderStatus) -> _Known:
        """What is known of the folder; if the folder has less than that, mail sent until now is not to be trusted."""
        known = self._known.get(folder.wire)
        if known is None:
            state = await self._store.folder_state(self._account.name, folder.name)
            count = await self._store.folder_state(self._account.name, _counter(folder))
            known = _Known(state.uidvalidity, state.last_uid, count.last_uid if count else 0) if state is not None else None
        if known is not None and self._went_back(folder, known, status):
            log.warning("folder went backwards", account=self._account.name, folder=folder.name)
            await self._store.distrust(self._clock(), recipient=self._account.name)
            known.messages = status.messages
            await self._remember(folder, known)
            if status.uidvalidity != known.uidvalidity or status.uidnext <= known.last_uid:
                known = None
        if known is None:
            known = _Known(status.uidvalidity, 0, 0)
            await self._remember(folder, known)
        self._known[folder.wire] = known
        return known

    def _went_back(self, folder: Folder, known: _Known, status: FolderStatus) -> bool:
        if status.uidvalidity != known.uidvalidity or (status.uidnext and status.uidnext <= known.last_uid):
            return True
        # another device may keep sealed originals for a shorter time; what it deletes is recorded here already
        expected_to_shrink = self._account.keep_sealed_days > 0 and folder.wire == self._sealed.wire
        return not expected_to_shrink and status.messages < known.messages

    def _skip_own(self, known: _Known) -> None:
        while known.last_uid + 1 in known.own:
            known.last_uid += 1
            known.own.discard(known.last_uid)

    async def _record_new(self, session: Session, folder: Folder, known: _Known) -> list[Letter]:
        await session.enter(folder, fresh=True)
        new = await session.box.search_after(known.last_uid)
        wanted = [uid for uid in new if uid not in known.own]
        contested: list[Letter] = []
        twice = known.last_uid > 0 and folder.wire == self._sealed.wire     # not at a first look, which finds all there ever was
        done = 0
        async for batch, sizes in session.batches(wanted, messages=RECORD_BATCH):
            letters = await self._opener.open(await session.fetch_all(batch, sizes))
            contested += await self._record((letter for letter in letters if letter.kind is Kind.OPENED), twice=twice)
            known.last_uid = batch[-1]
            await self._remember(folder, known)
            done += len(batch)
            if len(wanted) > RECORD_BATCH:
                log.info("recording what was opened elsewhere", account=self._account.name, folder=folder.name, done=done,
                         total=len(wanted))
        known.last_uid = max(known.last_uid, new[-1] if new else 0)
        known.own = {uid for uid in known.own if uid > known.last_uid}
        return contested

    async def _record(self, letters: Iterable[Letter], *, twice: bool) -> list[Letter]:
        """Write down as delivered; returns those that a row of ours said were not, and with `twice` those that it said were."""
        opened = [(letter, letter.opened) for letter in letters if letter.opened is not None]
        now_ms = self._clock()
        stored = await asyncio.gather(*(
            self._store.record_foreign(message.claim(self._account.name),
                                       Arrival(now_ms, letter.fetched.internal_date_ms, None), self._limits)
            for letter, message in opened))
        for (_, message), row in zip(opened, stored, strict=True):
            remember_outer_id(self._store, message, row.judgement.verdict, now_ms)      # it may be answered from here
        return [letter for (letter, message), row in zip(opened, stored, strict=True)
                if not row.first and message.unsealed.payload_digest not in self._settled
                and (twice or row.judgement.verdict is not Verdict.DUPLICATE)]

    async def _remember(self, folder: Folder, known: _Known) -> None:
        now_ms, account = self._clock(), self._account.name
        await asyncio.gather(
            self._store.set_folder_state(account, folder.name, FolderState(known.uidvalidity, known.last_uid, now_ms)),
            self._store.set_folder_state(account, _counter(folder), FolderState(known.uidvalidity, known.messages, now_ms)))


def _counter(folder: Folder) -> str:
    """Where the number of messages is kept: beside the folder, under a name that no folder can have."""
    return f"{folder.name}\n(messages)"
