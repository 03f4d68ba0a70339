"""The byte side of an upstream connection: commands out in as few writes as may be, replies paired strictly with them, one timer.

Any surprise (a reply nobody asked for, bytes that are no reply, a timeout, an exception or a cancelled caller) aborts the
connection: it is never used again, because a reply that belongs to an old command must not answer a new one (a false 250
is a lost message). Works on asyncio and uvloop.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections import deque
from dataclasses import dataclass
from typing import cast

from malote.errors import Reply, UpstreamError
from malote.smtp.replies import ReplyFault, ReplyParser
from malote.smtp.timer import Timed

HIGH_WATER_BYTES = 512 * 1024


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds per phase (RFC 5321 4.5.3.2)."""

    connect: float = 30
    command: float = 300
    data_block: float = 180
    data_done: float = 600


class UpstreamWire(Timed, asyncio.Protocol):
    """Replies are values, whatever their code; exceptions mean that the connection is lost."""

    def __init__(self, timeouts: Timeouts) -> None:
        super().__init__(asyncio.get_running_loop())
        self._timeouts = timeouts
        self._transport: asyncio.Transport | None = None
        self._parser = ReplyParser()
        self._waiting: deque[asyncio.Future[Reply]] = deque()
        self._greeting: asyncio.Future[Reply] = self.loop.create_future()
        self._out: list[bytes] = []
        self._writable: asyncio.Future[None] | None = None
        self._lost: UpstreamError | None = None
        self._in_body = False
        self._early: Reply | None = None    # a refusal that came while the body was being written
        self._dotted = False            # the final dot may have left, its reply has not come
        self.closed_by_server = False   # said 421 or closed: not to be used for another transaction

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=HIGH_WATER_BYTES)
        self._greeting = self._expect(self._timeouts.command)   # now: it may come before whoever connects runs again

    def data_received(self, data: bytes) -> None:
        try:
            replies = self._parser.feed(data)
        except ReplyFault:
            self._fail("sent something that is no SMTP reply")
            return
        for reply in replies:
            if not self._take(reply):
                return

    def _take(self, reply: Reply) -> bool:
        if reply.code == 421:
            self.closed_by_server = True
        if not self._waiting:
            if self._in_body and reply.code >= 400:
                self._early = reply     # as too much data: a refusal before our final dot, nothing was accepted
            self._fail("closed the connection" if reply.code == 421 else "sent a reply nobody asked for")
            return False
        future = self._waiting.popleft()
        if future.done():       # its caller was cancelled
            self._fail("answered a command that was given up")
            return False
        future.set_result(reply)
        if self._waiting:
            self._deadline = self.loop.time() + self._timeouts.command
        elif self._dotted:
            self._dotted = False
        return True

    def eof_received(self) -> bool:
        self.closed_by_server = True
        self._fail("closed the connection")
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed_by_server = True
        self._fail("closed the connection", exc)
        self._transport = None

    def pause_writing(self) -> None:
        self._writable = self.loop.create_future()

    def resume_writing(self) -> None:
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)
        self._writable = None

    # plumbing

    @property
    def usable(self) -> bool:
        """Whether a new transaction may begin on it now."""
        return (
            self._lost is None and not self._waiting and not self.closed_by_server and not self._out
            and self._transport is not None and not self._transport.is_closing() and self._parser.empty
        )

    @property
    def to_loopback(self) -> bool:
        peer = self._transport.get_extra_info("peername") if self._transport is not None else None
        return isinstance(peer, tuple) and ipaddress.ip_address(str(peer[0]).partition("%")[0]).is_loopback

    def abort(self) -> None:
        """Give the connection up at once; everything pending fails."""
        self._fail("was given up")

    def _fail(self, what: str, cause: BaseException | None = None) -> None:
        if self._lost is None:
            self._lost = UpstreamError(f"the next mail server {what}", in_doubt=self._dotted)
            self._lost.__cause__ = cause
            self._out.clear()
            self.stop_timer()
            if self._transport is not None:
                self._transport.abort()
        while self._waiting:
            future = self._waiting.popleft()
            if not future.done():
                future.set_exception(self._error())
                future.exception()      # read: a pipelined reply that nobody waits for any more is no news for the log
        if self._writable is not None and not self._writable.done():
            self._writable.set_exception(self._error())
            self._writable.exception()

    def _error(self) -> UpstreamError:
        """A new exception each time: one object raised in several tasks would mix their tracebacks."""
        lost = self._lost or UpstreamError("the next mail server is not connected")
        error = UpstreamError(str(lost), in_doubt=lost.in_doubt)
        error.__cause__ = lost.__cause__
        return error

    def _expect(self, timeout: float) -> asyncio.Future[Reply]:
        future: asyncio.Future[Reply] = self.loop.create_future()
        if self._lost is not None:
            future.set_exception(self._error())
            future.exception()
            return future
        if not self._waiting:
            self.start_timer(timeout)
        self._waiting.append(future)
        return future

    def timed_out(self) -> None:
        if self._waiting or self._writable is not None:     # else it is idle: nothing was asked
            self._fail("did not answer in time")

    def command(self, line: str, timeout: float | None = None) -> asyncio.Future[Reply]:
        """Send one command line; its reply comes in the future. Commands of one loop turn leave in one write."""
        data = line.encode("utf-8", "surrogateescape")
        if b"\r" in data or b"\n" in data or b"\0" in data:
            raise ValueError("line end inside an SMTP command")
        future = self._expect(timeout or self._timeouts.command)
        if self._lost is None:
            if not self._out:
                self.loop.call_soon(self._flush)
            self._out.append(data)
        return future

    def _flush(self) -> None:
        if self._out and self._transport is not None:
            self._out.append(b"")
            self._transport.write(b"\r\n".join(self._out))
        self._out.clear()

    async def _write(self, block: memoryview) -> None:
        self._wire.write(block)
        if self._writable is not None:
            self.start_timer(self._timeouts.data_block)
            await asyncio.shield(self._writable)

    @property
    def _wire(self) -> asyncio.Transport:
        if self._lost is not None or self._transport is None:
            raise self._error()
        return self._transport
