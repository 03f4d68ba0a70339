"""One SMTP or LMTP connection to the upstream server: greeting, encryption and login, then one transaction after another."""

from __future__ import annotations

import asyncio
import base64
import re
import ssl
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress

from malote.errors import Reply, UpstreamError
from malote.smtp.data import stuff
from malote.smtp.replies import check_reply
from malote.smtp.sizes import announced_limit
from malote.smtp.upstream_wire import HIGH_WATER_BYTES, Timeouts, UpstreamWire

Challenge = Callable[[bytes], Awaitable["bytes | None"]]
Params = Mapping[str, "str | bool"]

Then = Callable[["UpstreamConnection"], "asyncio.Future[Reply]"]

Gate = Callable[["bytes | bytearray", "Sequence[str]"], object]

BLOCK_BYTES = 256 * 1024    # one write of a message body; the block timer of RFC 5321 4.5.3.2.5 restarts with each

# Who is asked what a path may be is smtp/path.py; here only: one word, or in quotes, and parameters with values
_COMMAND = re.compile(
    r'(?:MAIL FROM|RCPT TO):<(?:[^\x00-\x20\x7f<>"]|"(?:[^"\\\x00-\x1f]|\\[ -~])*"@)*>'
    r"(?: (?:SMTPUTF8|REQUIRETLS|[A-Z0-9-]{1,20}=[^\x00-\x20\x7f]*))*")

# LMTP answers per recipient: this one stands for an answer that never came after others had.
IN_DOUBT = Reply(451, "4.4.2", "Connection lost before the answer, try again later")

_NO_SMTPUTF8 = Reply(553, "5.6.7", "The next mail server does not take addresses with letters beyond ASCII")
# a client uses what we have offered it, as the server did then: this one must not bounce its mail because another runs there now
_NO_DSN = Reply(451, "4.3.5", "The next mail server does not offer delivery status notifications any more, try again")
_NO_REQUIRETLS = Reply(550, "5.7.30", "The next mail server does not support REQUIRETLS")
_NO_8BIT = Reply(554, "5.6.3", "The next mail server takes no 8-bit text; nothing was sent")
_TOO_BIG = Reply(552, "5.3.4", "Message is larger than the next mail server takes; nothing was sent")


class UpstreamConnection(UpstreamWire):
    """Made by `relay.Upstream`. `mail` and `rcpt` may be called without awaiting each other: that is the pipelining.

    Replies are values, whatever their code; exceptions mean that the connection is lost. `extensions`: EHLO keyword in
    capitals -> its parameters.
    """

    def __init__(self, *, lmtp: bool, helo_name: str, timeouts: Timeouts) -> None:
        super().__init__(timeouts)
        self._lmtp = lmtp
        self._helo_name = helo_name
        self._rcpts: list[asyncio.Future[Reply]] = []
        self._paths: list[str] = []     # of those RCPT
        self.extensions: dict[str, str] = {}
        self.in_transaction = False
        self.tls = False
        self.authenticated = False
        self.transactions = 0           # begun on this connection
        self.idle_since = 0.0           # loop time; used by the pool

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
            transport = await self.loop.start_tls(
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
        self._paths = []
        return self._begin_or_add(_line("MAIL FROM", address, params))

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
        future = self._refuse(refused) if refused else self._begin_or_add(_line("RCPT TO", address, params))
        self._rcpts.append(future)
        self._paths.append(address)
        return future

    def _begin_or_add(self, line: str) -> asyncio.Future[Reply]:
        """Raises `ValueError` for what is no MAIL or RCPT: in a command, no text leaves."""
        if _COMMAND.fullmatch(line) is None:
            raise ValueError("line end, or what is no path or parameter, inside an SMTP command")
        return self.command(line)

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
        return _TOO_BIG if "SIZE" in params and 0 < announced_limit(extensions) < int(params["SIZE"]) else None

    def _refuse(self, reply: Reply) -> asyncio.Future[Reply]:
        future: asyncio.Future[Reply] = self.loop.create_future()
        future.set_result(reply)
        return future

    async def data(
        self, content: bytes | bytearray, *, on_final_dot: Callable[[], object] | None = None, gate: Gate | None = None,
    ) -> tuple[Reply, ...]:
        """Send the message. One reply per accepted recipient, in the order of RCPT (over SMTP they are all the same one).

        `content` in CRLF lines; a missing last CRLF is added. `on_final_dot` is called right before the bytes that hold the
        final dot are written: before it nothing has been sent, after it the outcome hangs on the server. Raises
        `UpstreamError`, with `in_doubt` when the connection was lost after that. Awaits RCPT replies that are still out.
        `gate` gets the very bytes that will be written, and the path of every RCPT that was not refused; what it raises is raised
        here, with nothing written and the transaction still open.
        """
        body = stuff(content)
        if gate is not None:
            gate(body, [path for path, reply in zip(self._paths, self._rcpts, strict=True) if not _is_refusal(reply)])
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
            replies = await self._send_body(body, accepted if self._lmtp else 1, on_final_dot)
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
        if 0 < announced_limit(self.extensions) < len(content):
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
            self._deadline = self.loop.time() + self._timeouts.data_done
            try:
                results.append(await future)
            except UpstreamError:   # LMTP: what was answered counts, the rest is in doubt
                results.append(IN_DOUBT)
        return results

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
        self.stop_timer()


def _line(verb: str, address: str, params: Params) -> str:
    words = "".join([f" {name}" if value is True else f" {name}={value}" for name, value in params.items() if value is not False])
    return f"{verb}:<{address}>{words}"


def _is_refusal(reply: asyncio.Future[Reply]) -> bool:
    return reply.done() and not reply.cancelled() and reply.exception() is None and reply.result().code // 100 != 2


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
