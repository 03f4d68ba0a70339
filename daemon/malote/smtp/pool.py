"""Idle upstream connections, kept for the next message: a bound on how many are open, and a queue for who waits.

A client that names its recipients and then takes its time holds a connection whose transaction is open. Parked, it can be taken
back when others wait for one: else a few slow clients would stop the mail of all.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable

from malote.errors import Reply, UpstreamError
from malote.smtp.connection import UpstreamConnection

MAX_IDLE_SECONDS = 60           # below the 5 minutes of RFC 5321 4.5.3.2.7, and below what NAT routers forget
RESET_SECONDS = 10              # for RSET; a new connection is cheaper than waiting longer
PARKED_SECONDS = 5              # a transaction that waits for its client keeps its connection so long while others wait
LOOK_SECONDS = 0.5              # how often who waits looks for one of those
MAX_TRANSACTIONS = 500          # per connection; servers answer 421 beyond a limit of theirs, this avoids asking for it

_ALL_BUSY = Reply(451, "4.3.2", "All connections to the next mail server are in use, nothing was sent, try again later")


class Pool:
    """`open_connection` makes a new one. Every acquired connection must be released, whatever happened to it."""

    def __init__(
        self, open_connection: Callable[[], Awaitable[UpstreamConnection]], *, limit: int, wait_seconds: float,
        max_idle_seconds: float = MAX_IDLE_SECONDS,
    ) -> None:
        self._open = open_connection
        self._limit = limit
        self._wait_seconds = wait_seconds
        self._max_idle_seconds = max_idle_seconds
        self._idle: list[UpstreamConnection] = []       # the last one is used first: the others may grow old and close
        self._leased: set[UpstreamConnection] = set()
        self._parked: dict[UpstreamConnection, tuple[float, Callable[[], None]]] = {}   # of those; longest first
        self._opening = 0
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._sweeper: asyncio.TimerHandle | None = None
        self._farewells: set[asyncio.Task[None]] = set()
        self._closed = False

    async def acquire(self, *, fresh: bool = False) -> tuple[UpstreamConnection, bool]:
        """A connection ready for MAIL, and whether it has been used before. Raises `UpstreamError`."""
        deadline = asyncio.get_running_loop().time() + self._wait_seconds
        while True:
            if self._closed:
                raise UpstreamError("the connections to the next mail server are being closed")
            if not fresh and (connection := self._take_idle()) is not None:
                return connection, True
            if self._in_use < self._limit:
                return await self._open_new(), False
            if self._idle:      # fresh wanted: make room
                self._say_goodbye(self._idle.pop(0))
            else:
                await self._wait(deadline)

    def park(self, connection: UpstreamConnection, give_up: Callable[[], None]) -> None:
        """Nothing is under way on this leased connection, and its user waits for its client. `give_up` is called if it is taken
        back; from then on it is not the user's."""
        self._parked[connection] = (asyncio.get_running_loop().time(), give_up)

    def unpark(self, connection: UpstreamConnection) -> None:
        """The user goes on with it."""
        self._parked.pop(connection, None)

    def _take_parked(self) -> UpstreamConnection | None:
        for connection, (since, give_up) in self._parked.items():
            if asyncio.get_running_loop().time() - since < PARKED_SECONDS:
                return None
            del self._parked[connection]
            give_up()
            return connection
        return None

    @property
    def counts(self) -> dict[str, int]:
        """How many connections are in which state."""
        return {"idle": len(self._idle), "leased": len(self._leased), "opening": self._opening}

    @property
    def _in_use(self) -> int:
        return len(self._leased) + len(self._idle) + self._opening

    def _take_idle(self) -> UpstreamConnection | None:
        now = asyncio.get_running_loop().time()
        while self._idle:
            connection = self._idle.pop()
            if connection.usable and now - connection.idle_since < self._max_idle_seconds:
                self._leased.add(connection)
                return connection
            self._say_goodbye(connection)
        return None

    async def _open_new(self) -> UpstreamConnection:
        self._opening += 1
        try:
            connection = await self._open()
        except BaseException:
            self._opening -= 1
            self._wake()
            raise
        self._opening -= 1
        self._leased.add(connection)
        return connection

    async def _wait(self, deadline: float) -> None:
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[None] = loop.create_future()
        self._waiters.append(waiter)
        try:
            while not waiter.done():
                left = deadline - loop.time()
                if left <= 0:
                    raise UpstreamError("all connections to the next mail server are in use", reply=_ALL_BUSY)  # noqa: TRY301
                if (parked := self._take_parked()) is not None:
                    await self.release(parked)      # wakes whoever waits longest
                else:
                    await asyncio.wait([waiter], timeout=min(left, LOOK_SECONDS))
        except BaseException:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
            else:
                self._wake()        # it was this one's turn: the next one's now
            raise

    def _wake(self) -> None:
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return

    async def release(self, connection: UpstreamConnection) -> None:
        """Give it back: kept if it is certain to be clean, closed otherwise."""
        self._leased.discard(connection)
        self._parked.pop(connection, None)
        try:
            await self._reset(connection)
        finally:        # also when cut off: there is room now
            self._put_back(connection)
            self._wake()

    async def _reset(self, connection: UpstreamConnection) -> None:
        if not connection.usable or not connection.in_transaction or self._closed:
            return
        self._opening += 1      # it counts while it is being reset
        try:
            async with asyncio.timeout(RESET_SECONDS):
                await connection.rset()
        except (UpstreamError, TimeoutError):
            connection.abort()
        finally:
            self._opening -= 1

    def _put_back(self, connection: UpstreamConnection) -> None:
        if not connection.usable or connection.in_transaction:
            connection.abort()
        elif self._closed or connection.transactions >= MAX_TRANSACTIONS:
            self._say_goodbye(connection)
        else:
            loop = asyncio.get_running_loop()
            connection.idle_since = loop.time()
            self._idle.append(connection)
            if self._sweeper is None:
                self._sweeper = loop.call_later(self._max_idle_seconds, self._sweep)

    def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        self._sweeper = None
        oldest = loop.time() - self._max_idle_seconds
        for connection in [each for each in self._idle if each.idle_since <= oldest or not each.usable]:
            self._idle.remove(connection)
            self._say_goodbye(connection)
        if self._idle:
            self._sweeper = loop.call_at(self._idle[0].idle_since + self._max_idle_seconds, self._sweep)

    def _say_goodbye(self, connection: UpstreamConnection) -> None:
        task = asyncio.get_running_loop().create_task(connection.quit())
        self._farewells.add(task)
        task.add_done_callback(self._farewells.discard)

    async def close(self) -> None:
        """QUIT on the idle ones; those in use are closed when they are released."""
        self._closed = True
        if self._sweeper is not None:
            self._sweeper.cancel()
        for connection in self._idle:
            self._say_goodbye(connection)
        self._idle.clear()
        while self._waiters:
            self._wake()
        if self._farewells:
            await asyncio.wait(self._farewells)
