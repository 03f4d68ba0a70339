"""One task that owns a connection to PostgreSQL and puts everything that is waiting into one transaction (group commit).

The same promises as `writer.Writer` gives on SQLite, kept by a task of the event loop: what waits while one commit is under way
shares the next one. An operation is a function of a `Db`, run in a greenlet that lets the loop go on while the server works.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import Callable
from typing import TypeVar

import asyncpg
from sqlalchemy.util import greenlet_spawn

from malote.errors import CommitInDoubt, StoreUnavailable
from malote.store.database import Db
from malote.store.postgres import (
    PostgresDb,
    Server,
    disconnect,
    is_contention,
    is_database_error,
    is_disconnect,
    is_outage,
    take_slot,
    unavailable,
)
from malote.store.writer import LAZY_SECONDS, MAX_BATCH, MAX_LAZY, Job, Operation

TRIES = 8       # of a transaction that another node's made fail (deadlock, serialization): each of them goes on after some

Greet = Callable[[Db, bytes], None]
T = TypeVar("T")
log = logging.getLogger("malote.store")


class PostgresWriter:
    """All methods on the event loop that made it. Errors of the database never end it: the next operation connects anew."""

    def __init__(self, server: Server, *, readonly: bool = False, greet: Greet | None = None) -> None:
        """`greet`: an operation that comes first on each new connection, with the name of the server."""
        self._server = server
        self._readonly = readonly
        self._greet = greet
        self._connection: asyncpg.Connection | None = None
        self._db: PostgresDb | None = None
        self._waiting: deque[Job] = deque()
        self._lazy: deque[Job] = deque(maxlen=MAX_LAZY)
        self._wake = asyncio.Event()
        self._closed = False
        self._failing = False
        self._task = asyncio.create_task(self._main(), name="malote-store")

    async def write(self, operation: Operation[T]) -> T:
        """As `Writer.write`."""
        return await self._submit(operation, write=True)

    async def read(self, operation: Operation[T]) -> T:
        """Run without a transaction, each statement sees what is committed then; sees what was submitted before."""
        return await self._submit(operation, write=False)

    def later(self, operation: Operation[object], then: Callable[[], object] | None = None) -> None:
        """As `Writer.later`."""
        self.check_open()
        self._lazy.append(Job(operation, None, None, write=True, then=then))
        self._wake.set()

    @property
    def failing(self) -> bool:
        """Whether the last write found the database gone, full or read-only."""
        return self._failing

    async def claim(self, name: str) -> bool:
        """`Store.claim`, for as long as the connection is up."""
        def take(db: Db) -> bool:
            assert isinstance(db, PostgresDb)       # noqa: S101 -- made by `_connect`
            return db.claim(name)
        return await self._submit(take, write=True)

    def check_open(self) -> None:
        """Raises `StoreUnavailable` after `close`."""
        if self._closed:
            raise StoreUnavailable("the store is closed")

    async def close(self) -> None:
        """Finish what was submitted, then close the connection."""
        self._closed = True
        self._wake.set()
        await asyncio.wait([self._task])

    async def _submit(self, operation: Operation[T], *, write: bool) -> T:
        self.check_open()
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._waiting.append(Job(operation, future, loop, write))
        self._wake.set()
        return await future

    async def _main(self) -> None:
        try:
            while await self._work():
                jobs = list(self._lazy) + [self._waiting.popleft() for _ in range(min(len(self._waiting), MAX_BATCH))]
                self._lazy.clear()      # all of them: whoever waits now was promised that they come before
                if writes := [job for job in jobs if job.write]:
                    await self._run(writes, write=True)
                if reads := [job for job in jobs if not job.write]:     # after the writes: who reads sees them
                    await self._run(reads, write=False)
                self._settle(jobs)
        finally:
            self._closed = True
            for job in self._waiting:       # the loop is being torn down
                if job.future is not None:
                    job.future.cancel()
            await self._drop_connection()

    async def _work(self) -> bool:
        """Until there is something to do now; False: nothing, and nothing will come."""
        while not self._waiting:
            if self._closed:
                return bool(self._lazy)
            self._wake.clear()
            if not self._lazy:
                await self._wake.wait()
                continue
            try:        # what nobody waits for waits for company
                async with asyncio.timeout(LAZY_SECONDS):
                    while not self._waiting and not self._closed:
                        await self._wake.wait()
                        self._wake.clear()
            except TimeoutError:
                return True
        return True

    async def _run(self, jobs: list[Job], *, write: bool) -> None:
        """One transaction for all; if one fails, all again with a savepoint each, so that it fails alone."""
        fresh = self._connection is None
        for count in range(1, TRIES + 1):
            try:
                if not await self._attempt(jobs, write=write, apart=False):
                    await self._attempt(jobs, write=write, apart=True)
            except Exception as error:      # noqa: BLE001 -- whatever it is, it is for everybody in the transaction
                if is_contention(error) and count < TRIES:
                    await self._roll_back()
                    await asyncio.sleep(random.uniform(0, 0.005 * 2**count))     # noqa: S311 -- so that two do not meet again
                    if count > 1 and len(jobs) > 1:     # what holds one row at a time cannot be in a circle
                        for job in jobs:
                            await self._run([job], write=write)
                        return
                    continue
                lost = is_disconnect(error, self._connection)
                await self._drop_connection()
                if lost and not fresh and not isinstance(error, CommitInDoubt):   # it ended while idle: the server was restarted
                    fresh = True
                    continue
                self._outage(jobs, error, write=write)
            else:
                if write and self._failing:
                    log.warning("the store can be written again")
                    self._failing = False
            return

    def _outage(self, jobs: list[Job], error: Exception, *, write: bool) -> None:
        if write and not self._failing:     # once, not for every message of an outage
            log.error("the store cannot be written: %s", _shown(error))
            self._failing = True
        for job in jobs:
            job.error = error

    async def _attempt(self, jobs: list[Job], *, write: bool, apart: bool) -> bool:
        """True: committed. False: an operation failed, nothing was written. Raises for a failure of the database itself."""
        connection, db = await self._connect()
        if not write:
            await greenlet_spawn(self._read, jobs, db)
            return True
        db.forget()
        await connection.execute("BEGIN")
        if not await greenlet_spawn(self._write, jobs, db, apart):
            await connection.execute("ROLLBACK")
            return False
        try:
            status = await connection.execute("COMMIT")
        except Exception as error:
            raise CommitInDoubt("the database server did not say whether it wrote") from error
        if status != "COMMIT":
            raise StoreUnavailable("the database server wrote nothing")
        return True

    def _write(self, jobs: list[Job], db: PostgresDb, apart: bool) -> bool:
        for job in jobs:
            job.error = None
            if apart:
                db.command("SAVEPOINT one")
            try:
                job.result = job.operation(db)
                if apart:
                    db.command("RELEASE SAVEPOINT one")
            except Exception as error:
                if is_contention(error) or is_outage(error, self._connection):
                    raise
                if not apart:
                    return False
                job.error = error
                db.forget()
                db.command("ROLLBACK TO SAVEPOINT one")
        try:
            db.flush()
        except Exception as error:
            if is_contention(error) or is_outage(error, self._connection):
                raise
            return False        # of one of them: all again, each with a savepoint
        return True

    def _read(self, jobs: list[Job], db: PostgresDb) -> None:
        for job in jobs:
            job.error = None
            try:
                job.result = job.operation(db)
            except Exception as error:
                if is_contention(error) or is_outage(error, self._connection):
                    raise
                job.error = error

    async def _connect(self) -> tuple[asyncpg.Connection, PostgresDb]:
        if self._connection is not None and self._db is not None and not self._connection.is_closed():
            return self._connection, self._db
        await self._drop_connection()
        connection = await self._server.connect()
        try:
            slot = 0 if self._readonly else await take_slot(connection)
            db = PostgresDb(connection, slot)
            if self._greet is not None:
                name = await self._server.identify(connection)
                async with connection.transaction():
                    await greenlet_spawn(self._greet, db, name)
        except BaseException:
            await disconnect(connection)
            raise
        self._connection, self._db = connection, db
        return connection, db

    async def _roll_back(self) -> None:
        if self._connection is not None and not self._connection.is_closed():
            try:
                await self._connection.execute("ROLLBACK")
            except Exception:       # noqa: BLE001 -- then the next attempt connects anew
                await self._drop_connection()

    async def _drop_connection(self) -> None:
        """The next transaction connects anew: this is how the store recovers by itself."""
        connection, self._connection, self._db = self._connection, None, None
        await disconnect(connection)

    def _settle(self, jobs: list[Job]) -> None:
        for job in reversed(jobs):
            if job.future is None and job.error is not None and not self._closed and is_lasting(job.error):
                self._lazy.appendleft(job)
        for job in jobs:
            if job.future is not None:
                if job.future.done():       # its caller was cancelled
                    continue
                if job.error is None:
                    job.future.set_result(job.result)
                else:
                    job.future.set_exception(_shown(job.error))
            elif job.error is None or self._closed or not is_lasting(job.error):
                if job.error is not None:
                    log.warning("store operation dropped: %s", type(job.error).__name__)
                if job.then is not None:
                    job.then()


def is_lasting(error: BaseException) -> bool:
    """Whether the operation itself is not to blame: it is worth another try later."""
    return isinstance(error, StoreUnavailable) or is_contention(error) or is_outage(error, None) \
        or isinstance(error, asyncpg.InterfaceError)


def _shown(error: BaseException) -> BaseException:
    return unavailable(error) if is_database_error(error) else error
