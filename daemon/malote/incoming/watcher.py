"""The life of one watched account: connect, catch up, wait for news, and all of it again when the connection is lost.

What the watcher remembers of a folder (UIDVALIDITY, last UID) only saves work. Losing it, or a server that numbers its messages
anew, means that everything is looked at once more; what was delivered is known by the store, not by UIDs.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import ssl
import time
import traceback
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path

import structlog

from malote.config import AccountConfig
from malote.core.freshness import DAY_MS, FreshnessLimits
from malote.errors import ConfigError, KeyMissing, MailboxError, MaloteError
from malote.incoming.account import AccountKeys
from malote.incoming.arbiter import Contests
from malote.incoming.delivery import Delivery, ImapDelivery
from malote.incoming.foreign import ForeignFolders
from malote.incoming.mailbox import Folder, Mailbox, Selected
from malote.incoming.maildir import MaildirDelivery
from malote.incoming.opening import Opener
from malote.incoming.outcomes import Outcomes
from malote.incoming.receiver import NEVER_MS, Gathered, OwnCopies, Place, Receiver, unreadable_reason
from malote.incoming.scan import find_candidates
from malote.incoming.session import Folders, Session, bounded
from malote.store import Attempt, FolderState, Store

BATCH_MESSAGES = 100            # that share round trips and commits
RECONNECT_FIRST_SECONDS = 1.0   # doubled each time, with jitter, so that many watchers do not come back at once
RECONNECT_MOST_SECONDS = 300.0
SETTLED_SECONDS = 60.0          # a connection that lasted as long as this was no failure: the next wait is short again
PROGRESS_SECONDS = 5.0
NEVER_LOOKED = 0
RETENTION_EVERY_MS = 6 * 3_600_000
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")

log = structlog.get_logger("malote.incoming")

Password = Callable[[], Awaitable[str]]


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def _nothing() -> None:
    """Nobody waits."""


class Watcher:
    """Watches one account until `stop`.

    `keys` is asked at each look, so that keys that are added while the watcher runs open what waited for them.
    """

    def __init__(self, account: AccountConfig, *, store: Store, keys: Callable[[], AccountKeys], device: str,
                 password: Password, ssl_context: ssl.SSLContext | None = None, log_addresses: bool = False,
                 clock: Callable[[], int] = now_ms, may_act: Callable[[], bool] | None = None) -> None:
        self.account = account
        self.state = "new"              # for `malote check` and the service: connecting, catching up, watching, waiting, stopped
        self.last_error = ""
        self._store = store
        self._keys = keys
        self._device = device
        self._password = password
        self._ssl_context = ssl_context
        self._clock = clock
        self._may_act = may_act         # whether the mailbox is still ours among those that share the store; None: nobody does
        self._limits = FreshnessLimits(late_ms=account.late_days * DAY_MS, skew_ms=account.clock_skew_seconds * 1000)
        self._outcomes = Outcomes(account.name, store, clock, addresses=log_addresses)
        self._contests = Contests()
        self._own_copies: OwnCopies = {}
        self._stopping = asyncio.Event()
        self._hurry = asyncio.Event()   # ends a wait before the next connection
        self._retention_ms = 0
        self._wake: Callable[[], None] = _nothing

    async def run(self) -> None:
        """Until `stop` or cancellation. Raises `ConfigError` for what only the configuration can cure."""
        wait = RECONNECT_FIRST_SECONDS
        while not self._stopping.is_set():
            began = time.monotonic()
            try:
                await self._connection()
            except ConfigError:
                raise
            except MaloteError as error:
                self.last_error = str(error)
                log.warning("mailbox not available", account=self.account.name, fault=type(error).__name__, **_reason(error))
            except Exception as error:  # noqa: BLE001 -- a fault of ours in one account must not end the others
                self.last_error = "internal fault"
                where = traceback.extract_tb(error.__traceback__)[-1]
                # never its text, which may hold content
                log.error("fault in the watcher", account=self.account.name, fault=type(error).__name__,
                          where=f"{Path(where.filename).name}:{where.lineno}")
            if self._stopping.is_set():
                break
            wait = RECONNECT_FIRST_SECONDS if time.monotonic() - began > SETTLED_SECONDS else wait
            self.state = "waiting"
            await self._sleep(wait * (0.5 + random.random()))   # noqa: S311 -- jitter, not a secret
            wait = min(wait * 2, RECONNECT_MOST_SECONDS)
        self.state = "stopped"

    def stop(self) -> None:
        """Finish the batch under way, then end `run`."""
        self._stopping.set()
        self._hurry.set()
        self._wake()

    def look_now(self) -> None:
        """Do not wait, for news or to connect again: keys or cards have changed."""
        self._hurry.set()
        self._wake()

    async def run_once(self) -> None:
        """Connect, deal with everything that is there, and disconnect. Raises what stands in the way."""
        await self._connection(once=True)

    # --- one connection ---

    async def _connection(self, *, once: bool = False) -> None:
        keys = self._held_keys()
        self.state = "connecting"
        box = await Mailbox.connect(self.account, password=self._password, ssl_context=self._ssl_context)
        box.may_act = self._may_act
        try:
            session = Session(box)
            folders = await session.open_folders(self.account)
            self._tell(box, folders)
            if not folders.watched:
                raise MailboxError(f"account {self.account.name}: none of its folders exist", code="NONEXISTENT")
            receiver, foreign = self._receiver(folders, keys)
            while not self._stopping.is_set():
                self.state = "catching up"
                self.last_error = ""
                await self._look(session, folders, receiver, keys)
                await self._retain(session, folders.sealed, foreign)
                if once or self._stopping.is_set():
                    break
                self.state = "watching"
                await self._wait(session, folders.watched, keys)
                if _changes(self._keys()) != _changes(keys):
                    keys = self._held_keys()
                    receiver, foreign = self._receiver(folders, keys)
        finally:
            self._wake = _nothing
            await box.logout()

    def _held_keys(self) -> AccountKeys:
        """Without any we could not tell our own headers from forged ones, so nothing is looked at."""
        keys = self._keys()
        if not keys.pairs and not keys.trusted:
            raise KeyMissing(f"account {self.account.name}: there is no key for any of its addresses",
                             hint="malote keys new ADDRESS, or set `addresses` of the account")
        return keys

    def _receiver(self, folders: Folders, keys: AccountKeys) -> tuple[Receiver, ForeignFolders]:
        opener = Opener(self._store, keys)
        foreign = ForeignFolders(self.account, folders.sealed, store=self._store, opener=opener, limits=self._limits,
                                 clock=self._clock)
        receiver = Receiver(
            self.account, store=self._store, keys=keys, opener=opener, delivery=make_delivery(self.account, folders.target),
            folders=folders, foreign=foreign, contests=self._contests, outcomes=self._outcomes, limits=self._limits,
            device=self._device, own_copies=self._own_copies, clock=self._clock)
        return receiver, foreign

    def _tell(self, box: Mailbox, folders: Folders) -> None:
        log.info("mailbox open", account=self.account.name, folders=[folder.name for folder in folders.watched],
                 missing=list(folders.missing), idle=box.has_idle)
        if not (box.has_move and box.has_uidplus):
            log.warning("the mail server lacks MOVE or UIDPLUS: only one watcher may run on this mailbox",
                        account=self.account.name)

    # --- looking ---

    async def _look(self, session: Session, folders: Folders, receiver: Receiver, keys: AccountKeys) -> None:
        """Everything new in every folder, and what waits to be tried again."""
        await receiver.catch_up(session)
        for folder in folders.watched:
            if self._stopping.is_set():
                break
            try:
                await self._look_at(session, folder, receiver, keys)
            except MailboxError as error:       # one folder that cannot be read does not stop the others
                if session.box.lost.is_set():
                    raise
                self.last_error = str(error)
                log.warning("folder not available", account=self.account.name, folder=folder.name, code=error.code)
        await receiver.settle_contests(session)
        await receiver.catch_up(session)    # what we have moved ourselves is remembered: it must still be there next time

    async def _look_at(self, session: Session, folder: Folder, receiver: Receiver, keys: AccountKeys) -> None:
        began_ms = self._clock()
        selected = await session.enter(folder, fresh=True)
        state = await self._store.folder_state(self.account.name, folder.name)
        if state is not None and state.uidvalidity != selected.uidvalidity:
            log.warning("the mail server has renumbered the folder: all of it is looked at again", account=self.account.name,
                        folder=folder.name)
            state = None
        state = state or FolderState(selected.uidvalidity, 0, NEVER_LOOKED)
        own = self._own_copies.setdefault((folder.wire, selected.uidvalidity), set())
        found = await find_candidates(session.box, state.last_uid, skip=own, authserv_ids=keys.authserv_ids)
        waiting = await self._waiting(folder, selected)
        place = Place(folder, selected.uidvalidity, state.last_sync_ms or None, selected.keywords, waiting)
        await self._receive_all(session, place, [uid for uid in found.uids if uid not in waiting], receiver, state)
        # what waited since an earlier look was there then: only the server's own date says when it came
        due = [uid for uid, attempt in waiting.items() if self._is_due(attempt, keys)]
        await self._receive_all(session, replace(place, last_sync_ms=None), due, receiver, None)
        if not self._stopping.is_set():
            own.difference_update([uid for uid in own if uid <= found.top])
            await self._store.set_folder_state(self.account.name, folder.name,
                                               FolderState(selected.uidvalidity, max(state.last_uid, found.top), began_ms))

    async def _receive_all(self, session: Session, place: Place, uids: Sequence[int], receiver: Receiver,
                           state: FolderState | None) -> None:
        """In batches, the next one being fetched and opened while one is delivered. With `state`, how far we came is
        remembered after each, so that a long catch-up can be broken off."""
        progress = Progress(self.account.name, place.folder.name, len(uids))
        todo = deque(uids)
        ahead = await self._gather_ahead(session, place, todo, receiver)
        try:
            while ahead is not None and not self._stopping.is_set():
                batch, gathered = ahead[0], await ahead[1]
                ahead = None if self._stopping.is_set() else await self._gather_ahead(session, place, todo, receiver)
                await receiver.receive(session, place, gathered)
                left = [*todo, *(ahead[0] if ahead is not None else ())]
                progress.report(len(uids) - len(left))
                if state is not None and left and batch:
                    reached = FolderState(state.uidvalidity, max(state.last_uid, min(left) - 1), state.last_sync_ms)
                    await self._store.set_folder_state(self.account.name, place.folder.name, reached)
        finally:
            if ahead is not None:
                ahead[1].cancel()

    async def _gather_ahead(self, session: Session, place: Place, todo: deque[int],
                            receiver: Receiver) -> tuple[list[int], asyncio.Task[Gathered]] | None:
        """Take the next batch from `todo` and begin to fetch and open it. None: there is nothing left."""
        if not todo:
            return None
        await session.enter(place.folder)
        wanted = list(islice(todo, BATCH_MESSAGES))
        sizes = await session.box.sizes(wanted)
        batch = [todo.popleft() for _ in range(bounded(wanted, sizes, 0, BATCH_MESSAGES))]
        return batch, session.ahead(asyncio.create_task(receiver.gather(session, batch, sizes)))

    async def _waiting(self, folder: Folder, selected: Selected) -> dict[int, Attempt]:
        """Messages that were tried before, as far as their numbers still mean something."""
        waiting: dict[int, Attempt] = {}
        for attempt in await self._store.attempts(self.account.name, folder.name):
            if attempt.uidvalidity == selected.uidvalidity:
                waiting[attempt.uid] = attempt
            else:
                await self._store.clear_attempt(attempt.account, attempt.folder, attempt.uidvalidity, attempt.uid)
        return waiting

    def _is_due(self, attempt: Attempt, keys: AccountKeys) -> bool:
        if attempt.next_at_ms >= NEVER_MS:
            return attempt.reason != unreadable_reason(keys)
        return attempt.next_at_ms <= self._clock()

    # --- waiting ---

    async def _wait(self, session: Session, watched: Sequence[Folder], keys: AccountKeys) -> None:
        """For news of the first folder. The others are looked at every `poll_seconds` (IDLE hears one folder only), and so is one
        that could not be read."""
        seconds = self.account.idle_seconds
        if len(watched) > 1 or not session.box.has_idle or self.last_error:
            seconds = min(seconds, self.account.poll_seconds)
        for at_ms in (self._contests.next_ms(), await self._next_attempt_ms(watched)):
            if at_ms is not None:
                seconds = min(seconds, max(1.0, (at_ms - self._clock()) / 1000))
        await session.enter(watched[0])
        self._wake = session.box.wake
        if not self._stopping.is_set() and _changes(self._keys()) == _changes(keys):
            await session.box.idle(seconds)

    async def _next_attempt_ms(self, watched: Sequence[Folder]) -> int | None:
        name = self.account.name
        times = [attempt.next_at_ms for folder in watched for attempt in await self._store.attempts(name, folder.name)]
        return min((at_ms for at_ms in times if at_ms < NEVER_MS), default=None)

    async def _sleep(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._hurry.wait()
        if not self._stopping.is_set():
            self._hurry.clear()

    # --- keeping the sealed originals no longer than wanted ---

    async def _retain(self, session: Session, sealed: Folder, foreign: ForeignFolders) -> None:
        now = self._clock()
        if not self.account.keep_sealed_days or now - self._retention_ms < RETENTION_EVERY_MS:
            return
        self._retention_ms = now
        recorded = foreign.last_uid(sealed)     # never one that was not recorded as opened
        if not recorded:
            return
        await session.enter(sealed, fresh=True)
        before = imap_day(now - self.account.keep_sealed_days * DAY_MS)
        old = await session.box.search(f"UID 1:{recorded} BEFORE {before}")
        if old:
            try:
                await session.box.expunge(old)
            except MailboxError as error:
                if error.code != "NOUIDPLUS":
                    raise
                log.warning("old sealed originals cannot be deleted singly here", account=self.account.name)
                return
            await foreign.note_removed(sealed, len(old))
            log.info("old sealed originals deleted", account=self.account.name, count=len(old))


class Progress:
    """A line in the log every few seconds of a long catch-up."""

    def __init__(self, account: str, folder: str, total: int) -> None:
        self._account = account
        self._folder = folder
        self._total = total
        self._last = time.monotonic()

    def report(self, done: int) -> None:
        now = time.monotonic()
        if self._total > BATCH_MESSAGES and (now - self._last > PROGRESS_SECONDS or done >= self._total):
            self._last = now
            log.info("catching up", account=self._account, folder=self._folder, done=done, total=self._total)


def _changes(keys: AccountKeys) -> tuple[object, ...]:
    """What a look depends on."""
    return keys.generation, keys.trusted


def _reason(error: MaloteError) -> dict[str, str]:
    """For the log: our own words. A mail server's are not repeated, they may name people or folders."""
    told = {"code": error.code} if isinstance(error, MailboxError) else {"reason": str(error)}
    told["hint"] = error.hint
    return {name: text for name, text in told.items() if text}


def make_delivery(account: AccountConfig, target: Folder | None) -> Delivery:
    if account.deliver != "maildir":
        return ImapDelivery(target)
    if account.maildir is None:
        raise ConfigError(f"account {account.name}: deliver = \"maildir\" needs `maildir`, the directory")
    return MaildirDelivery(account.maildir)


def imap_day(at_ms: int) -> str:
    """`7-Jan-2026`, as SEARCH takes it (RFC 3501 9, date)."""
    day = datetime.fromtimestamp(at_ms / 1000, UTC)
    return f"{day.day}-{_MONTHS[day.month - 1]}-{day.year}"
