"""One thread that owns the database connection and puts everything that is waiting into one transaction (group commit).

A caller's future is resolved only after COMMIT: durability is for each message, the fsync is shared. An operation is a function
of a `Db`; it may be run twice, so it has no effect but on the database.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol, TypeVar

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import IntegrityError, OperationalError, SQLAlchemyError

from malote.errors import StoreUnavailable
from malote.store.database import Db, SqliteDb, unavailable

T = TypeVar("T")
Operation = Callable[[Db], T]

MAX_BATCH = 256             # operations in one commit: bounds how long the first waits for the last
MAX_LAZY = 20_000           # operations nobody waits for, kept while the store is unavailable; then the oldest are dropped
LAZY_SECONDS = 0.5          # how long such an operation waits for company
# How long a commit waits for more while several callers are about (PostgreSQL calls it commit_delay and commit_siblings); a lone
# caller never waits. Without, most commits of a busy relay have one or two callers, and each takes as long as one of ten.
LINGER_SECONDS = 0.002

log = logging.getLogger("malote.store")


@dataclass(slots=True)
class Job:
    operation: Operation[Any]
    future: asyncio.Future[Any] | None      # None: nobody waits (lazy)
    loop: asyncio.AbstractEventLoop | None
    write: bool
    then: Callable[[], object] | None = None
    result: Any = None
    error: BaseException | None = None


class Commits(Protocol):
    """What a store needs of its database: `Writer` for SQLite, `postgres_writer.PostgresWriter` for PostgreSQL."""

    @property
    def failing(self) -> bool: ...
    async def write(self, operation: Operation[T]) -> T: ...
    async def read(self, operation: Operation[T]) -> T: ...
    def later(self, operation: Operation[object], then: Callable[[], object] | None = None) -> None: ...
    async def claim(self, name: str) -> bool: ...
    def check_open(self) -> None: ...
    async def close(self) -> None: ...


class _Signal(Enum):
    NUDGE = "there is a lazy operation"
    STOP = "finish and close"


class Writer:
    """Runs operations in order of arrival. Errors of the database never end the thread: the next operation tries anew."""

    def __init__(self, engine: Engine, *, name: str) -> None:
        self._engine = engine
        self._connection: Connection | None = None
        self._queue: queue.SimpleQueue[Job | _Signal] = queue.SimpleQueue()
        self._lazy: deque[Job] = deque(maxlen=MAX_LAZY)
        self._closed = False
        self._failing = False
        self._company = 1           # how many callers shared one of the last commits
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._thread.start()

    async def write(self, operation: Operation[T]) -> T:
        """Run in a transaction that is committed, with others, when this returns. Raises what the operation raises (it alone
        is then undone) or `StoreUnavailable`. A cancelled caller does not cancel the operation."""
        return await self._submit(operation, write=True)

    async def read(self, operation: Operation[T]) -> T:
        """Run in a transaction that changes nothing; works also while the store is full or locked for writing."""
        return await self._submit(operation, write=False)

    def later(self, operation: Operation[object], then: Callable[[], object] | None = None) -> None:
        """Run with the next commit, or within half a second. For what may be lost in a crash; an outage is waited for.

        `then`: called in the thread once it is durable, or given up as faulty; it must not raise.
        """
        self.check_open()
        self._lazy.append(Job(operation, None, None, write=True, then=then))
        if len(self._lazy) == 1:    # asked after appending: the thread, once woken, must find it
            self._queue.put(_Signal.NUDGE)

    @property
    def failing(self) -> bool:
        """Whether the last write found the store full, locked, read-only or damaged."""
        return self._failing

    async def claim(self, name: str) -> bool:
        """True: `Store.claim`."""
        self.check_open()
        return True

    async def close(self) -> None:
        """Finish what was submitted, then close the connection."""
        if not self._closed:
            self._closed = True
            self._queue.put(_Signal.STOP)
        await asyncio.to_thread(self._thread.join)

    async def _submit(self, operation: Operation[T], *, write: bool) -> T:
        self.check_open()
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._queue.put(Job(operation, future, loop, write))
        return await future

    def check_open(self) -> None:
        """Raises `StoreUnavailable` after `close`."""
        if self._closed:
            raise StoreUnavailable("the store is closed")

    # ---- everything below runs in the thread -----------------------------------------------------------------------------

    def _main(self) -> None:
        going = True
        while going:
            items = self._wait()
            if items and all(item is _Signal.NUDGE for item in items):
                continue        # the first lazy operation after a pause: it waits for company
            going = _Signal.STOP not in items
            waiting = [item for item in items if isinstance(item, Job)]
            if waiting:
                self._company = max(len(waiting), self._company - 1)
            jobs = self._take_lazy() + waiting
            writes = [job for job in jobs if job.write]
            reads = [job for job in jobs if not job.write]
            if writes:
                self._run(writes, write=True)
            if reads:       # after the writes: who reads sees what was submitted before
                self._run(reads, write=False)
            self._settle(jobs)
        self._drop_connection()
        self._engine.dispose()

    def _wait(self) -> list[Job | _Signal]:
        """All that is on the queue, or nothing when lazy operations have waited long enough."""
        items: list[Job | _Signal] = []
        with suppress(queue.Empty):
            items.append(self._queue.get(timeout=LAZY_SECONDS if self._lazy else None))
            if self._company > 1:
                time.sleep(LINGER_SECONDS)
            while len(items) < MAX_BATCH:
                items.append(self._queue.get_nowait())
        return items

    def _take_lazy(self) -> list[Job]:
        """All of them: whoever waits now was promised that they come before."""
        jobs: list[Job] = []
        with suppress(IndexError):
            while len(jobs) < MAX_LAZY:
                jobs.append(self._lazy.popleft())
        return jobs

    def _run(self, jobs: list[Job], *, write: bool) -> None:
        """One transaction for all; if one fails, all again with a savepoint each, so that it fails alone."""
        try:
            if not self._attempt(jobs, write=write, apart=False):
                self._attempt(jobs, write=write, apart=True)
            if write and self._failing:
                log.warning("the store can be written again")
                self._failing = False
        except Exception as error:      # noqa: BLE001 -- full, locked, read-only, I/O: for everybody in the transaction
            if write and not self._failing:     # once, not for every message of an outage
                log.error("the store cannot be written: %s", unavailable(error))
                self._failing = True
            self._drop_connection()
            for job in jobs:
                job.error = error

    def _attempt(self, jobs: list[Job], *, write: bool, apart: bool) -> bool:
        """True: committed. False: an operation failed, nothing was written. Raises for a failure of the database itself."""
        connection = self._connect().execution_options(malote_read=not write)
        with connection.begin() as transaction:
            db = SqliteDb(connection)
            for job in jobs:
                job.error = None
                try:
                    if apart:
                        with connection.begin_nested():
                            job.result = job.operation(db)
                    else:
                        job.result = job.operation(db)
                except Exception as error:
                    if is_outage(error, db):
                        raise
                    if not apart:
                        transaction.rollback()
                        return False
                    job.error = error
        return True

    def _connect(self) -> Connection:
        if self._connection is None:
            self._connection = self._engine.connect()
        return self._connection

    def _drop_connection(self) -> None:
        """The next transaction opens the file anew: this is how the store recovers by itself."""
        connection, self._connection = self._connection, None
        if connection is None:
            return
        try:
            connection.close()
        except Exception as error:      # noqa: BLE001 -- it failed before; what counts is that it is gone
            log.warning("store connection closed with an error: %s", type(error).__name__)

    def _settle(self, jobs: list[Job]) -> None:
        by_loop: dict[asyncio.AbstractEventLoop, list[Job]] = {}
        for job in reversed(jobs):
            if job.loop is not None:
                by_loop.setdefault(job.loop, []).append(job)
            elif job.error is not None and is_outage(job.error, None) and not self._closed:
                self._lazy.appendleft(job)
            else:
                if job.error is not None:
                    log.warning("store operation dropped: %s", type(job.error).__name__)
                if job.then is not None:
                    job.then()
        for loop, own in by_loop.items():
            own.reverse()
            try:
                loop.call_soon_threadsafe(_resolve, own)
            except RuntimeError:        # the loop is closed: nobody waits any more
                log.debug("%d results came after their event loop was closed", len(own))


def is_outage(error: BaseException, db: SqliteDb | None) -> bool:
    """Whether the database failed, not the one operation. SQLite may then have undone the whole transaction by itself."""
    if db is not None and not db.driver.in_transaction:
        return True
    if isinstance(error, sqlite3.IntegrityError | IntegrityError):
        return False
    # DatabaseError itself is "damaged"; its other subclasses blame the statement
    return isinstance(error, sqlite3.OperationalError | OperationalError) or type(error) is sqlite3.DatabaseError


def _resolve(jobs: list[Job]) -> None:
    for job in jobs:
        future = job.future
        if future is None or future.done():     # done: its caller was cancelled
            continue
        if job.error is None:
            future.set_result(job.result)
        else:
            future.set_exception(unavailable(job.error) if _is_foreign(job.error) else job.error)


def _is_foreign(error: BaseException) -> bool:
    return isinstance(error, sqlite3.Error | SQLAlchemyError)
