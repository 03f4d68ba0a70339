"""One SMTP or LMTP connection to the upstream server: pipelined, replies paired strictly with commands.

Any surprise (a reply nobody asked for, bytes that are no reply, a timeout, an exception or a cancelled caller) aborts the
connection: it is never used again, because a reply that belongs to an old command must not answer a new one (a false 250
is a lost message). Works on asyncio and uvloop.
"""

from __future__ import annotations

import asyncio
import base64
import ipaddress
import ssl
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import cast

from malote.errors import Reply, UpstreamError
from malote.outgoing.replies import ReplyFault, ReplyParser, check_reply
from malote.outgoing.smtp_data import stuff

Challenge = Callable[[bytes], Awaitable["bytes | None"]]
Params = Mapping[str, "str | bool"]

Then = Callable[["UpstreamConnection"], "asyncio.Future[Reply]"]

BLOCK_BYTES = 256 * 1024    # one write of a message body; the block timer of RFC 5321 4.5.3.2.5 restarts with each
HIGH_WATER_BYTES = 512 * 1024

# LMTP answers per recipient: this one, told by `is`, stands for an answer that never came after others had.
IN_DOUBT = Reply(451, "4.4.2", "Connection lost before the answer, try again later")

_NO_SMTPUTF8 = Reply(553, "5.6.7", "The next mail server does not take addresses with letters beyond ASCII")
_NO_DSN = Reply(555, "5.5.4", "The next mail server does not offer delivery status notifications")
_NO_REQUIRETLS = Reply(550, "5.7.30", "The next mail server does not support REQUIRETLS")
_NO_8BIT = Reply(554, "5.6.3", "The next mail server takes no 8-bit text; nothing was sent")
_TOO_BIG = Reply(552, "5.3.4", "Message is larger than the next mail server takes; nothing was sent")


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds per phase (RFC 5321 4.5.3.2)."""

    connect: float = 30
    command: float = 300
    data_block: float = 180
    data_done: float = 600


class UpstreamConnection(asyncio.Protocol):
    """Made by `relay.Upstream`. `mail` and `rcpt` may be called without awaiting each other: that is the pipelining.

    Replies are values, whatever their code; exceptions mean that the connection is lost. `extensions`: EHLO keyword in
    capitals -> its parameters.
    """

    def __init__(self, *, lmtp: bool, helo_name: str, timeouts: Timeouts) -> None:
        self._loop = asyncio.get_running_loop()
        self._lmtp = lmtp
        self._helo_name = helo_name
        self._timeouts = timeouts
        self._transport: asyncio.Transport | None = None
        self._parser = ReplyParser()
        self._waiting: deque[asyncio.Future[Reply]] = deque()
        self._greeting: asyncio.Future[Reply] = self._loop.create_future()
        self._out: list[bytes] = []
        self._timer: asyncio.TimerHandle | None = None
        self._fires = 0.0               # loop time; uvloop's handle for "now" has no `when`
        self._deadline = 0.0
        self._writable: asyncio.Future[None] | None = None
        self._lost: UpstreamError | None = None
        self._in_body = False
        self._early: Reply | None = None    # a refusal that came while the body was being written
        self._dotted = False            # the final dot may have left, its reply has not come
        self._rcpts: list[asyncio.Future[Reply]] = []
        self.extensions: dict[str, str] = {}
        self.in_transaction = False
        self.tls = False
        self.authenticated = False
        self.transactions = 0           # begun on this connection
        self.idle_since = 0.0           # loop time; used by the pool
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
            self._deadline = self._loop.time() + self._timeouts.command
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
        self._writable = self._loop.create_future()

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
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
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
        future: asyncio.Future[Reply] = self._loop.create_future()
        if self._lost is not None:
            future.set_exception(self._error())
            future.exception()
            return future
        if not self._waiting:
            self._arm(timeout)
        self._waiting.append(future)
        return future

    def _arm(self, seconds: float) -> None:
        self._deadline = self._loop.time() + seconds
        if self._timer is None or self._fires > self._deadline:
            if self._timer is not None:
                self._timer.cancel()
            self._set_timer()

    def _set_timer(self) -> None:
        self._fires = self._deadline
        self._timer = self._loop.call_at(self._deadline, self._tick)

    def _tick(self) -> None:
        """The one timer: moved lazily, so that a command costs no timer of its own."""
        self._timer = None
        if not self._waiting and self._writable is None:
            return
        if self._loop.time() >= self._deadline:
            self._fail("did not answer in time")
        else:
            self._set_timer()

    def command(self, line: str, timeout: float | None = None) -> asyncio.Future[Reply]:
        """Send one command line; its reply comes in the future. Commands of one loop turn leave in one write."""
        data = line.encode("utf-8", "surrogateescape")
        if b"\r" in data or b"\n" in data or b"\0" in data:
            raise ValueError("line end inside an SMTP command")
        future = self._expect(timeout or self._timeouts.command)
        if self._lost is None:
            if not self._out:
                self._loop.call_soon(self._flush)
            self._out.append(data)
        return future

    def _flush(self) -> None:
        if self._out and self._transport is not None:
            self._out.append(b"")
            self._transport.write(b"\r\n".join(self._out))
        self._out.clear()

    # the session

    async def open(self, *, starttls: ssl.SSLContext | None, server_hostname: str) -> None:
        """Greeting, EHLO, and with `starttls` the upgrade, without which nothing goes on. Raises `UpstreamError`."""
        try:
            check_reply(await self._greeting)
            await self._ehlo()
            if starttls is not None:
                await self._starttls(starttls, server_hostname)
        except BaseException:
            self.abort()
            raise

    async def _ehlo(self) -> None:
        reply = check_reply(await self.command(f"{'LHLO' if self._lmtp else 'EHLO'} {self._helo_name}"))
        self.extensions = {}
        for line in reply.text.split("\n")[1:]:
            # "AUTH=LOGIN" is an old way to write "AUTH LOGIN", sent beside it for old clients
            keyword, _, parameters = (f"AUTH {line[5:]}" if line[:5].upper() == "AUTH=" else line).partition(" ")
            self.extensions[keyword.upper()] = f"{self.extensions.get(keyword.upper(), '')} {parameters.strip()}".strip()

    async def _starttls(self, context: ssl.SSLContext, server_hostname: str) -> None:
        if "STARTTLS" not in self.extensions:
            raise UpstreamError("the next mail server does not offer STARTTLS: nothing was sent, not even the login",
                                hint='set upstream.security to "tls" if it expects TLS from the first byte, often on port 465')
        check_reply(await self.command("STARTTLS"))
        if not self._parser.empty or self._waiting:
            raise UpstreamError("the next mail server sent clear text after its STARTTLS reply")
        try:
            transport = await self._loop.start_tls(
                self._wire, self, context, server_hostname=server_hostname, ssl_handshake_timeout=self._timeouts.connect,
            )
        except (OSError, EOFError) as error:      # ssl.SSLError and its certificate errors are OSErrors
            raise UpstreamError(tls_fault(error)) from error
        if transport is None:
            raise UpstreamError("the next mail server closed the connection during the TLS handshake")
        self._transport = transport
        self._transport.set_write_buffer_limits(high=HIGH_WATER_BYTES)
        self.tls = True
        await self._ehlo()      # RFC 3207 4.2: what was said before TLS does not count

    def auth_mechanisms(self) -> tuple[str, ...]:
        return tuple(self.extensions.get("AUTH", "").upper().split())

    async def authenticate(self, mechanism: str, initial: bytes | None, challenge: Challenge) -> Reply:
        """One AUTH exchange (RFC 4954); the upstream's own last reply, whatever it is. Raises `UpstreamError` when lost.

        `challenge` gets each decoded challenge and returns the answer; None gives up (`*`). Nothing of it is logged.
        """
        line = f"AUTH {mechanism}"
        late: bytes | None = None
        if initial is not None:
            encoded = base64.b64encode(initial).decode() or "="
            if len(line) + 1 + len(encoded) + 2 <= 12288:
                line += f" {encoded}"
            else:
                late = initial      # RFC 4954 4: too long for the command line, so it answers the first, empty challenge
        try:
            reply = await self.command(line)
            while reply.code == 334:
                answer = late if late is not None else await challenge(_decoded(reply.text))
                late = None
                reply = await self.command("*" if answer is None else base64.b64encode(answer).decode())
        except BaseException:
            self.abort()
            raise
        self.authenticated = reply.code == 235
        return reply

    # one transaction

    def mail(self, address: str, params: Params) -> asyncio.Future[Reply]:
        """MAIL FROM; begins a transaction. A missing extension that the parameters need is a refusal, nothing is left out."""
        refused = self._missing(address, params)
        if refused is not None:
            return self._refuse(refused)
        self.in_transaction = True
        self.transactions += 1
        self._rcpts = []
        return self.command(f"MAIL FROM:<{address}>{_parameters(params)}")

    async def begin(self, address: str, params: Params, then: Then | None = None) -> Reply:
        """MAIL FROM, and its reply. `then` gives a RCPT for the same packet; it is called only where the server offers PIPELINING
        (RFC 2920). After a refusal the reply to that RCPT, which means nothing, has been read. Raises `UpstreamError`."""
        mail = self.mail(address, params)
        rcpt = then(self) if then is not None and not mail.done() and "PIPELINING" in self.extensions else None
        reply = await mail
        if rcpt is not None and reply.code // 100 != 2 and reply.code != 421:
            with suppress(UpstreamError):       # the connection ended with the refusal, which stands
                await rcpt
        return reply

    def rcpt(self, address: str, params: Params) -> asyncio.Future[Reply]:
        """RCPT TO, pipelined: the future gives the reply of this recipient."""
        refused = self._missing(address, params)
        future = self._refuse(refused) if refused else self.command(f"RCPT TO:<{address}>{_parameters(params)}")
        self._rcpts.append(future)
        return future

    def _missing(self, address: str, params: Params) -> Reply | None:
        extensions = self.extensions
        if ("SMTPUTF8" in params or not address.isascii()) and "SMTPUTF8" not in extensions:
            return _NO_SMTPUTF8
        if "DSN" not in extensions and not params.keys().isdisjoint(("RET", "ENVID", "NOTIFY", "ORCPT")):
            return _NO_DSN
        if "REQUIRETLS" in params and not ("REQUIRETLS" in extensions and self.tls):
            return _NO_REQUIRETLS
        if str(params.get("BODY", "")).upper() == "8BITMIME" and "8BITMIME" not in extensions:
            return _NO_8BIT
        size = params.get("SIZE", "0")
        return _TOO_BIG if 0 < self.size_limit < int(size) else None

    @property
    def size_limit(self) -> int:
        """The largest message, in bytes, that the server takes; 0: it names no limit."""
        value = self.extensions.get("SIZE", "")
        return int(value) if value.isascii() and value.isdigit() else 0

    def _refuse(self, reply: Reply) -> asyncio.Future[Reply]:
        future: asyncio.Future[Reply] = self._loop.create_future()
        future.set_result(reply)
        return future

    async def data(
        self, content: bytes | bytearray, *, on_final_dot: Callable[[], object] | None = None,
    ) -> tuple[Reply, ...]:
        """Send the message. One reply per accepted recipient, in the order of RCPT (over SMTP they are all the same one).

        `content` in CRLF lines; a missing last CRLF is added. `on_final_dot` is called right before the bytes that hold the
        final dot are written: before it nothing has been sent, after it the outcome hangs on the server. Raises
        `UpstreamError`, with `in_doubt` when the connection was lost after that. Awaits RCPT replies that are still out.
        """
        accepted = 0
        try:
            for future in self._rcpts:
                accepted += (await future).code // 100 == 2
            refused = self._check_content(content, accepted)
            if refused is not None:
                return (refused,) * max(1, accepted)
            reply = await self.command("DATA")
            if reply.code != 354:
                if reply.code < 400:        # 2xx to DATA: nobody knows what the server thinks it has
                    self._fail("answered DATA out of order")
                    raise self._error()  # noqa: TRY301
                return (reply,) * max(1, accepted)
            replies = await self._send_body(stuff(content), accepted if self._lmtp else 1, on_final_dot)
            self.in_transaction = False
            return tuple(replies) if self._lmtp else (replies[0],) * accepted
        except UpstreamError:
            self.abort()
            if self._early is None:
                raise
            return (self._early,) * accepted
        except BaseException:
            self.abort()
            raise

    def _check_content(self, content: bytes | bytearray, accepted: int) -> Reply | None:
        if not accepted:
            return Reply(554, "5.5.1", "No valid recipients")
        if 0 < self.size_limit < len(content):
            return _TOO_BIG
        if "8BITMIME" not in self.extensions and not content.isascii():
            return _NO_8BIT
        return None

    async def _send_body(
        self, body: bytes | bytearray, replies: int, on_final_dot: Callable[[], object] | None,
    ) -> list[Reply]:
        self._in_body = True
        position = 0
        view = memoryview(body)
        while len(body) - position > BLOCK_BYTES:
            await self._write(view[position:position + BLOCK_BYTES])
            position += BLOCK_BYTES
        wire = self._wire
        if on_final_dot is not None:
            on_final_dot()
        self._in_body = False
        self._dotted = True
        futures = [self._expect(self._timeouts.data_done) for _ in range(replies)]
        wire.write(b"".join((view[position:], b".\r\n")))
        results = [await futures[0]]
        for future in futures[1:]:
            self._deadline = self._loop.time() + self._timeouts.data_done
            try:
                results.append(await future)
            except UpstreamError:   # LMTP: what was answered counts, the rest is in doubt
                results.append(IN_DOUBT)
        return results

    async def _write(self, block: memoryview) -> None:
        self._wire.write(block)
        if self._writable is not None:
            self._arm(self._timeouts.data_block)
            await asyncio.shield(self._writable)

    @property
    def _wire(self) -> asyncio.Transport:
        if self._lost is not None or self._transport is None:
            raise self._error()
        return self._transport

    async def rset(self) -> Reply:
        """End the transaction; the connection is as after EHLO."""
        try:
            reply = check_reply(await self.command("RSET"))
        except BaseException:
            self.abort()
            raise
        self.in_transaction = False
        self._rcpts = []
        return reply

    async def quit(self) -> None:
        """Say goodbye and close; waits shortly for the server's answer, which does not matter."""
        if self.usable:
            try:
                async with asyncio.timeout(5):
                    await self.command("QUIT")
            except (UpstreamError, TimeoutError):
                pass        # it closed first, or is slow: both end the same way
        if self._transport is not None and self._lost is None:
            self._transport.close()
        self._lost = self._lost or UpstreamError("the connection to the next mail server is closed")
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _parameters(params: Params) -> str:
    return "".join(f" {name}" if value is True else f" {name}={value}" for name, value in params.items() if value is not False)


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text.strip(), validate=True)
    except ValueError as error:
        raise UpstreamError("the next mail server sent a login challenge that is not base64") from error


def tls_fault(error: Exception) -> str:
    """A sentence for the log and for `malote check`: says what is wrong with the certificate, and no more."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the certificate of the next mail server is not accepted: {error.verify_message}"
    return "the TLS handshake with the next mail server failed"
