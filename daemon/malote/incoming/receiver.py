"""Incoming mail, a batch of messages at a time: gather, decide, act.

For each message the order is fixed (design, Incoming): the judgement is written down as not delivered; the opened copy is
delivered and verified; the original is moved away, which also decides between two watchers; the delivery is written down. A
batch goes through these steps together, so that many messages share a round trip and a commit. After a crash at any point the
next run finds out from the store, the marks and the folders what was done.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import structlog

from malote.config import AccountConfig
from malote.core.freshness import Arrival, FreshnessLimits
from malote.errors import MailboxError
from malote.incoming.account import AccountKeys
from malote.incoming.arbiter import Contests
from malote.incoming.behind import Behind, Refused
from malote.incoming.delivery import Delivery, Failure, Parcel, carriable, wrapped
from malote.incoming.foreign import ForeignFolders
from malote.incoming.imap_protocol import MAX_LITERAL
from malote.incoming.mailbox import Fetched, Folder
from malote.incoming.opening import Kind, Letter, Opener, gateway_notes, off_loop, remember_outer_id
from malote.incoming.outcomes import Outcomes
from malote.incoming.presenting import Frame, opened_copy, received_lines
from malote.incoming.session import Folders, Session
from malote.incoming.settler import Settler
from malote.store import Attempt, Store, Stored

RETRY_FIRST_MS = 60_000             # of a message that could not be delivered; doubled each time
RETRY_MOST_MS = 6 * 3_600_000
NEVER_MS = 2**53                    # until the keys change
UNREADABLE_KEYWORD = "$MaloteUnreadable"
# Not the message's fault: another form of it would fare no better
NO_ROOM = frozenset({"OVERQUOTA", "LIMIT", "TOOBIG", "INUSE", "UNAVAILABLE", "TRYCREATE", "NONEXISTENT", "NOPERM", "DISK",
                     "NOT-STORED"})

log = structlog.get_logger("malote.incoming")

# (folder on the wire, UIDVALIDITY) -> UIDs of copies that we have put there: they need not be looked at
OwnCopies = dict[tuple[bytes, int], set[int]]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a batch comes from, and what is known of when it came."""

    folder: Folder
    uidvalidity: int
    last_sync_ms: int | None        # our previous complete look at the folder; None: there was none, or it waited since then
    keywords: bool                  # whether the folder keeps keywords
    waiting: Mapping[int, Attempt] = field(default_factory=dict)    # messages tried before: UID -> when, and why they failed


@dataclass(frozen=True, slots=True)
class Gathered:
    """A batch of messages, opened; and what the server did not give, with its code. All others that were asked for are gone."""

    asked: Sequence[int]
    letters: list[Letter]
    refused: dict[int, str]


@dataclass(slots=True)
class Judged:
    """An opened message with its judgement, and, once it is to be delivered, what is delivered."""

    letter: Letter
    stored: Stored
    parcel: Parcel | None = None


@dataclass(frozen=True, slots=True)
class Moves:
    """What became of originals: new UID by UID; and what the server would not move, with its code. All others were gone."""

    moved: dict[int, int]
    stuck: dict[int, str]


class Receiver:
    """Receives the mail of one account over one session."""

    def __init__(self, account: AccountConfig, *, store: Store, keys: AccountKeys, opener: Opener, delivery: Delivery,
                 folders: Folders, foreign: ForeignFolders, contests: Contests, outcomes: Outcomes, limits: FreshnessLimits,
                 device: str, own_copies: OwnCopies, clock: Callable[[], int]) -> None:
        self._account = account
        self._store = store
        self._keys = keys
        self._opener = opener
        self._delivery = delivery
        self._folders = folders
        self._foreign = foreign
        self._contests = contests
        self._outcomes = outcomes
        self._limits = limits
        self._device = device
        self._clock = clock
        self._own_copies = own_copies
        self._behind = Behind(account, store=store, outcomes=outcomes, limits=limits, clock=clock)
        self._settler = Settler(delivery=delivery, foreign=foreign, sealed=folders.sealed, contests=contests, device=device,
                                clock=clock)

    async def receive(self, session: Session, place: Place, gathered: Gathered) -> None:
        """Deal with these messages.

        Raises `MailboxLost`, `MailboxError`, `StoreUnavailable`: then nothing is lost, and the batch is to be tried again.
        """
        await self.catch_up(session)
        letters = gathered.letters
        refused = [Refused(letter, "FORGED") for letter in letters if letter.kind is Kind.FORGED]
        refused += await self._behind.decide(session, place.folder, letters, at_work=place.last_sync_ms is not None)
        first, repeats = first_of_each(letter for letter in letters if letter.kind is Kind.OPENED)
        others = self._others(letters)
        judged = await self._judge(place, first)
        await self._deliver(session, place, [item for item in judged if item.stored.judgement.deliver], others)
        again = await self._judge(place, repeats)       # now that it is known whether the first of each was delivered
        await self._deliver(session, place, await self._once_each(place, judged, again), others)
        await self._quarantine(session, place, [item for item in (*judged, *again) if item.stored.judgement.quarantine],
                               refused)
        await self._set_aside(session, place, [letter for letter in letters if letter.kind is Kind.UNREADABLE])
        for uid, code in gathered.refused.items():
            await self._try_later(place, uid, code)
        await self._forget_settled(place, gathered, {one.letter.uid for one in refused})

    async def _once_each(self, place: Place, judged: Sequence[Judged], again: Sequence[Judged]) -> list[Judged]:
        """Those of `again` that are to be delivered, but never one of a message that could not be delivered just now."""
        tried = {item.stored.row_id for item in judged}
        wanted: list[Judged] = []
        for item in again:
            if not item.stored.judgement.deliver:
                continue
            if item.stored.row_id in tried:
                await self._try_later(place, item.letter.uid, "REPEAT")
            else:
                tried.add(item.stored.row_id)
                wanted.append(item)
        return wanted

    async def _forget_settled(self, place: Place, gathered: Gathered, refused: set[int]) -> None:
        """What waited and is gone, or turns out to be no concern of ours, waits no more."""
        settled = {Kind.PLAIN, Kind.OURS, Kind.GATEWAY}
        kept = {letter.uid for letter in gathered.letters if letter.kind not in settled} | refused | gathered.refused.keys()
        await self._forget_attempts(place, [uid for uid in gathered.asked if uid not in kept])

    async def catch_up(self, session: Session) -> None:
        """Record what other devices have opened, and when we began to watch behind a gateway."""
        if self._keys.trusted:
            await self._behind.first_look()
        for letter in await self._foreign.record(session, (self._folders.sealed, self._folders.quarantine)):
            if letter.unsealed is not None:
                self._contests.open(self._keys.mark(letter.unsealed.payload_digest, self._device).message, self._clock())

    async def settle_contests(self, session: Session) -> None:
        await self._settler.settle(session)

    # --- gather ---

    async def gather(self, session: Session, uids: Sequence[int], sizes: dict[int, int]) -> Gathered:
        """Fetch from the folder that is selected, and open. Nothing is written down yet, so this may run ahead of `receive`.

        One damaged file on the server must not stop the rest: then each is asked for alone.
        """
        refused = {uid: "TOOBIG" for uid in uids if sizes.get(uid, 0) > MAX_LITERAL}
        try:
            return Gathered(uids, await self._opener.open(await session.fetch_all(uids, sizes)), refused)
        except MailboxError:
            if session.box.lost.is_set():
                raise
        fetched: list[Fetched] = []
        for uid in uids:
            try:
                fetched += await session.fetch_all([uid], sizes)
            except MailboxError as error:
                if session.box.lost.is_set():
                    raise
                refused[uid] = error.code
        return Gathered(uids, await self._opener.open(fetched), refused)

    def _others(self, letters: Sequence[Letter]) -> set[str]:
        """The messages of which other devices have put copies into this folder."""
        marks = (letter.mark for letter in letters if letter.kind is Kind.OURS)
        return {mark.message for mark in marks if mark is not None and mark.device != self._device}

    # --- decide ---

    async def _judge(self, place: Place, letters: Sequence[Letter]) -> list[Judged]:
        now_ms = self._clock()
        opened = [(letter, letter.opened) for letter in letters if letter.opened is not None]
        stored = await asyncio.gather(*(
            self._store.judge(message.claim(self._account.name),
                              Arrival(now_ms, letter.fetched.internal_date_ms, place.last_sync_ms), self._limits,
                              lease=self._account.name)
            for letter, message in opened))
        return [Judged(letter, row) for (letter, _), row in zip(opened, stored, strict=True)]

    # --- act: deliver ---

    async def _deliver(self, session: Session, place: Place, judged: Sequence[Judged], others: set[str]) -> None:
        if not judged:
            return
        for item in judged:
            item.parcel = await off_loop(len(item.letter.fetched.raw), self._parcel, place, item, others)
        session.box.check_ours()
        await self._delivery.deliver(session, place.folder, _parcels(judged))
        changed = [item for item in judged if item.parcel is not None and item.parcel.failure is not None
                   and item.parcel.failure.code not in NO_ROOM]
        if changed:     # what the server did not take or keep as it is goes as an attachment, which any server keeps
            for item in changed:
                item.parcel = await off_loop(len(item.letter.fetched.raw), self._parcel, place, item, others, True)
            await self._delivery.deliver(session, place.folder, _parcels(changed))
        delivered = [item for item in judged if item.parcel is not None and item.parcel.copy is not None]
        if delivered:
            await self._take_over(session, place, delivered)
        for item in judged:
            if item.parcel is not None and item.parcel.failure is not None:
                await self._fail(place, item, item.parcel.failure)

    async def _take_over(self, session: Session, place: Place, delivered: Sequence[Judged]) -> None:
        """The copies are verified: move the originals away, settle who did, and write it down."""
        self._note_copies(place, delivered)
        await self._follow_flags(session, place, delivered)
        moves = await self._move(session, place, [item.letter.uid for item in delivered], self._folders.sealed)
        lost = [item for item in delivered if item.letter.uid not in moves.moved and item.letter.uid not in moves.stuck]
        if lost:
            await self._settler.after_lost_moves(session, place.folder, [
                (item.parcel.mark, item.letter.unsealed.payload_digest) for item in lost if item.parcel and item.letter.unsealed])
        for item in delivered:      # a rival that is alive takes its copy back when its MOVE fails; one that is dead does not
            if item.parcel is not None and item.parcel.rival and item.letter.uid in moves.moved:
                self._contests.open(item.parcel.mark.message, self._clock())
        await self._finish(place, delivered, "opened")
        for uid, code in moves.stuck.items():       # delivered; a later look finds a duplicate there and moves that away
            await self._try_later(place, uid, code)

    def _parcel(self, place: Place, item: Judged, others: set[str], wrap: bool = False) -> Parcel:
        letter, opened = item.letter, item.letter.opened
        assert opened is not None       # noqa: S101 -- only opened letters are judged
        mark = self._keys.mark(opened.unsealed.payload_digest, self._device)
        form = wrapped if wrap else carriable if self._account.deliver != "maildir" else _as_it_is
        frame = Frame(self._keys, mark, opened.unsealed.recipient, received_lines(letter.fetched.raw),
                      letter.fetched.internal_date_ms)
        raw = opened_copy(opened, item.stored.judgement, frame, form)
        fetched = letter.fetched
        return Parcel(
            uid=fetched.uid, mark=mark, raw=raw,
            flags=kept_flags(fetched.flags, keywords=place.keywords), internal_date=fetched.internal_date,
            internal_date_ms=fetched.internal_date_ms, again=not item.stored.first, rival=mark.message in others,
        )

    def _note_copies(self, place: Place, delivered: Sequence[Judged]) -> None:
        if self._folders.target is None and self._account.deliver == "replace":
            own = self._own_copies.setdefault((place.folder.wire, place.uidvalidity), set())
            own.update(item.parcel.copy for item in delivered if item.parcel is not None and item.parcel.copy)

    async def _follow_flags(self, session: Session, place: Place, delivered: Sequence[Judged]) -> None:
        """A person may have read or flagged the original since it was fetched; after the MOVE nobody sees its flags."""
        await session.enter(place.folder)
        now = {peeked.uid: kept_flags(peeked.flags, keywords=place.keywords)
               for peeked in await session.box.peek_headers([item.letter.uid for item in delivered], ("Malote",))}
        for item in delivered:
            parcel = item.parcel
            if parcel is not None and set(now.get(parcel.uid, parcel.flags)) != set(parcel.flags):
                try:
                    await self._delivery.reflag(session, place.folder, parcel, now[parcel.uid])
                except MailboxError as error:
                    if session.box.lost.is_set():
                        raise
                    log.warning("flags not followed", account=self._account.name, folder=place.folder.name, code=error.code)

    async def _move(self, session: Session, place: Place, uids: Sequence[int], target: Folder) -> Moves:
        await session.enter(place.folder)
        stuck: dict[int, str] = {}
        try:
            moved = await session.box.move(uids, target) if uids else {}
        except MailboxError as error:
            if session.box.lost.is_set():
                raise
            if error.code == "NOUIDPLUS":       # copied, and marked deleted here: that is as far as this server goes
                return Moves(dict.fromkeys(uids, 0), {})
            if len(uids) == 1:
                return Moves({}, {uids[0]: error.code})
            moved = {}
            for uid in uids:        # one that the server cannot move must not hold the others
                single = await self._move(session, place, [uid], target)
                moved |= single.moved
                stuck |= single.stuck
        self._foreign.note_own(target, [uid for uid in moved.values() if uid])
        return Moves(moved, stuck)

    async def _finish(self, place: Place, done: Sequence[Judged], outcome: str) -> None:
        await asyncio.gather(*(self._store.mark_delivered(item.stored.row_id) for item in done if item.stored.row_id is not None))
        for item in done:
            notes = item.stored.judgement.notes
            if item.letter.opened is not None:
                remember_outer_id(self._store, item.letter.opened, item.stored.judgement.verdict, self._clock())
                notes = (*notes, *gateway_notes(item.letter.opened, self._keys))
            self._outcomes.note(item.letter, outcome, item.stored.judgement.verdict, detail=" ".join(notes))
        await self._forget_attempts(place, [item.letter.uid for item in done])

    async def _forget_attempts(self, place: Place, uids: Iterable[int]) -> None:
        for uid in uids:
            if uid in place.waiting:
                await self._store.clear_attempt(self._account.name, place.folder.name, place.uidvalidity, uid)

    # --- act: everything else ---

    async def _quarantine(self, session: Session, place: Place, judged: Sequence[Judged], refused: Sequence[Refused]) -> None:
        letters = [*(item.letter for item in judged), *(one.letter for one in refused)]
        if not letters:
            return
        moves = await self._move(session, place, [letter.uid for letter in letters], self._folders.quarantine)
        await self._finish(place, [item for item in judged if item.letter.uid in moves.moved], "quarantined")
        for one in refused:
            if one.letter.uid in moves.moved:
                self._outcomes.note(one.letter, "quarantined", one.verdict)
                await self._forget_attempts(place, [one.letter.uid])
        for uid, code in moves.stuck.items():
            await self._try_later(place, uid, code)

    async def _set_aside(self, session: Session, place: Place, letters: Sequence[Letter]) -> None:
        """Unreadable mail stays where it is, marked, and is not tried again before the keys change."""
        if not letters:
            return
        now_ms = self._clock()
        await asyncio.gather(*(
            self._store.put_attempt(Attempt(self._account.name, place.folder.name, place.uidvalidity, letter.uid, 1, NEVER_MS,
                                            unreadable_reason(self._keys)), now_ms)
            for letter in letters))
        for letter in letters:
            self._outcomes.note(letter, "unreadable", "UNREADABLE", detail=letter.reason)
        if place.keywords:
            await session.enter(place.folder)
            with contextlib.suppress(MailboxError):     # a courtesy; a lost connection shows itself at the next command
                await session.box.store_flags([letter.uid for letter in letters], add=[UNREADABLE_KEYWORD])

    async def _fail(self, place: Place, item: Judged, failure: Failure) -> None:
        await self._try_later(place, item.letter.uid, failure.code)
        self._outcomes.note(item.letter, "failed", item.stored.judgement.verdict, detail=failure.code)

    async def _try_later(self, place: Place, uid: int, code: str) -> None:
        earlier = place.waiting.get(uid)
        count = earlier.count + 1 if earlier is not None else 1
        delay_ms = min(RETRY_FIRST_MS * 2 ** min(count - 1, 20), RETRY_MOST_MS)
        now_ms = self._clock()
        await self._store.put_attempt(
            Attempt(self._account.name, place.folder.name, place.uidvalidity, uid, count, now_ms + delay_ms, code), now_ms)


def unreadable_reason(keys: AccountKeys) -> str:
    """Names the keys that could not open it: with others it is tried again."""
    return f"unreadable {keys.generation}"


def first_of_each(letters: Iterable[Letter]) -> tuple[list[Letter], list[Letter]]:
    """The first letter of each message, and the repeats: those are judged when the first is delivered or not."""
    seen: set[object] = set()
    first: list[Letter] = []
    repeats: list[Letter] = []
    for letter in letters:
        unsealed = letter.unsealed
        if unsealed is None:
            continue
        names = {unsealed.payload_digest, (unsealed.sender, unsealed.manifest.id)}
        if names & seen:
            repeats.append(letter)
        else:
            first.append(letter)
        seen |= names
    return first, repeats


def kept_flags(flags: Sequence[str], *, keywords: bool) -> tuple[str, ...]:
    """The flags that the opened copy gets: those of the original, but for what the server or we ourselves have set."""
    return tuple(flag for flag in flags if flag.lower() not in {"\\recent", UNREADABLE_KEYWORD.lower()}
                 and (keywords or flag.startswith("\\")))


def _as_it_is(original: bytes) -> bytes:
    return original


def _parcels(judged: Sequence[Judged]) -> list[Parcel]:
    return [item.parcel for item in judged if item.parcel is not None]
