"""One IMAP connection: aioimaplib's state machine and commands, with a parser, command queue and ends of our own.

Overridden, each with a test: the recursive parser (3,000 flags broke it), lost connections that nobody noticed, notifications
dropped between commands, commands that could not be in flight together, one shared literal buffer, names changed while parsing,
`PREAUTH` found anywhere in the greeting, and every chunk formatted for a log. Commands are told apart by their tags, so several
may be in flight (RFC 3501 5.5); those that change the state of the connection go alone.

A connection has one way to end, `fail`: whatever breaks (time, garbage, cancelled commands, limits), the socket is closed at
once and every command under way raises `MailboxLost`. Half-done commands never leave a stream out of step.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from aioimaplib import aioimaplib

from malote.errors import MailboxError, MailboxLost
from malote.incoming.imap_exchange import Exchange
from malote.incoming.imap_frame import Framer
from malote.incoming.imap_parse import Data, Status, parse_status, parse_untagged

MAX_LITERAL = 160 * 1024 * 1024     # the largest message taken in; announced literals above it end the connection
WRITE_CHUNK = 256 * 1024            # of a literal, between looks at the flow control
MAX_WAITS = 60                      # how often a command that trickles in may be given its time again

_TAGGED = re.compile(rb"([A-Z]+[0-9]+) (.*)", re.DOTALL)
# These may be in flight with others: their answers are told apart by UID, or are only the tagged line. All else goes alone, since
# it changes the state of the connection or is answered by untagged data that names no command (RFC 3501 5.5).
_TOGETHER = frozenset({"FETCH", "APPEND", "STORE", "NOOP"})
_EXTRA_STATES = {"UNSELECT": (aioimaplib.SELECTED,)}


class MailProtocol(aioimaplib.IMAP4ClientProtocol):     # type: ignore[misc]
    """The wire. `news` is set when the folder may have changed, and when the connection is gone."""

    transport: asyncio.Transport
    capabilities: set[str]

    def __init__(self, loop: asyncio.AbstractEventLoop, *, max_literal: int = MAX_LITERAL) -> None:
        super().__init__(loop)
        self.max_literal = max_literal
        self.lost = asyncio.Event()
        self.lost_reason = ""
        self.news = asyncio.Event()
        self.greeted = asyncio.Event()
        self.preauth = False
        self.exists = 0
        self.uidvalidity = 0                # of the selected folder; a change while it is open ends the connection
        self.pending: dict[str, aioimaplib.Command] = {}
        self._order = asyncio.Lock()        # held while a command is written, and throughout by one that goes alone
        self._idle_pending = asyncio.Event()        # set while nothing is in flight
        self._idle_pending.set()
        self._writable = asyncio.Event()
        self._writable.set()
        self._sending: Exchange | None = None       # the command that a `+` is for
        self._upgrading = False             # between the OK of STARTTLS and TLS: whatever arrives now was injected
        self._received = 0
        self.may_act: Callable[[], bool] | None = None
        self._framer = Framer(max_literal)

    # --- from the socket ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if self.state == aioimaplib.STARTED:        # not once more when TLS is put on top
            super().connection_made(transport)

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.fail("the mail server closed the connection" if exc is None else "the connection to the mail server broke")
        super().connection_lost(exc)

    def data_received(self, d: bytes) -> None:
        if self.lost.is_set():
            return
        self._received += len(d)
        try:
            for parts, size in self._framer.feed(d):
                self._response(parts, size)
                if self.lost.is_set() or self._upgrading:
                    break
            injected = self._upgrading and self._framer.waiting
        except ValueError as error:
            self.fail(f"the mail server does not follow the protocol ({error})")
            return
        if injected:
            self.fail("the mail server does not follow the protocol (data before the start of TLS)")

    # --- responses ---

    def _response(self, parts: list[bytes], size: int) -> None:
        line = parts[0]
        if self.state == aioimaplib.CONNECTED:
            self._greeting(line)
        elif line.startswith(b"* "):
            parts[0] = line[2:]
            self._untagged(parse_untagged(parts), size)
        elif line.startswith(b"+"):
            self._continuation(line[2:])
        elif match := _TAGGED.fullmatch(line):
            self._tagged(match[1].decode(), parse_status(match[2]))
        elif line:
            raise ValueError("a line that is no response")

    def _greeting(self, line: bytes) -> None:
        status = parse_status(line[2:]) if line.startswith(b"* ") else None
        if status is None or status.result not in ("OK", "PREAUTH"):
            said = f": {status.text}" if status is not None and status.text else ""
            self.fail(f"the mail server does not take the connection{said}")
            return
        self.preauth = status.result == "PREAUTH"
        self.state = aioimaplib.AUTH if self.preauth else aioimaplib.NONAUTH
        self.greeted.set()

    def _untagged(self, response: Status | Data, size: int) -> None:
        if isinstance(response, Status):
            self._untagged_status(response)
            return
        self._notice(response)
        for command in self.pending.values():
            if isinstance(command, Exchange):
                if command.offer(response, size):
                    return
            elif response.name == command.untagged_resp_name:
                command.append_to_resp(response.rest)
                return

    def _notice(self, response: Data) -> None:
        if response.name == "EXISTS" and response.number is not None:
            self.exists = response.number
            self.news.set()
        elif response.name == "EXPUNGE":
            self.exists = max(0, self.exists - 1)
            self.news.set()
        elif response.name == "VANISHED":
            self.news.set()

    def _untagged_status(self, status: Status) -> None:
        logging_out = any(command.name == "LOGOUT" for command in self.pending.values())
        if status.result == "BYE" and not logging_out:
            said = f": {status.text}" if status.text else ""
            self.fail(f"the mail server ends the connection{said}")
            return
        if status.code == "UIDVALIDITY" and self.uidvalidity and status.arguments != str(self.uidvalidity).encode() \
                and not any(command.name in ("SELECT", "EXAMINE") for command in self.pending.values()):
            self.fail("the folder was replaced on the mail server while it was open")
            return
        if status.code:
            for command in self.pending.values():
                if isinstance(command, Exchange) and status.code in command.wants:
                    command.codes.append(status)
                    return

    def _continuation(self, text: bytes) -> None:
        command = self._sending
        if command is None or command.done:
            raise ValueError("a continuation that nobody asked for")
        if command.answer is not None:
            self._write_now(command.answer(text))
        elif command.continued is not None and not command.continued.is_set():
            command.continued.set()
        else:
            raise ValueError("a continuation that nobody asked for")

    def _tagged(self, tag: str, status: Status | None) -> None:
        if tag not in self.pending or status is None or status.result not in ("OK", "NO", "BAD"):
            raise ValueError("an answer to no command")
        command = self.pending.pop(tag)
        if command.name == "STARTTLS" and status.result == "OK":
            self._upgrading = True
            self.transport.pause_reading()
        if not self.pending:
            self._idle_pending.set()
        if isinstance(command, Exchange):
            command.finish(status)
        else:
            command.close(status.text.encode(), status.result)

    # --- commands ---

    async def execute(self, command: aioimaplib.Command, scrub: str | None = None) -> aioimaplib.Response:
        """Send and wait for the answer. Raises `MailboxLost`; NO and BAD are in the response. `scrub` is not needed: no log."""
        if command.name not in _TOGETHER:
            async with self._order:
                await self._wait_for(self._idle_pending, getattr(command, "seconds", 30.0))
                await self._send(command)
                await self.finished(command)
        else:
            await self.submit(command)
            await self.finished(command)
        return command.response

    async def submit(self, command: aioimaplib.Command) -> None:
        """Send, and do not wait for the answer. The order of the calls is the order on the wire."""
        async with self._order:
            await self._send(command)

    async def finished(self, command: aioimaplib.Command) -> None:
        """Wait until the command is answered; the time starts again while bytes still move. Raises `MailboxLost`."""
        if not command._event.is_set():
            await self._wait_for(command._event, getattr(command, "seconds", 30.0))
        await command.wait()

    async def _wait_for(self, event: asyncio.Event, seconds: float) -> None:
        for _ in range(MAX_WAITS):
            before = self._progress()
            try:
                async with asyncio.timeout(seconds):
                    await event.wait()
                return
            except TimeoutError:
                if self._progress() == before:
                    break
            except asyncio.CancelledError:
                self.fail("a command was cancelled")
                raise
        self.fail("the mail server did not answer in time")
        raise MailboxLost(self.lost_reason)

    def _progress(self) -> tuple[int, int]:
        return self._received, self.transport.get_write_buffer_size()

    def check_ours(self) -> None:
        """Raises `MailboxLost` when this process may have been away for so long that another has the mailbox now."""
        if self.lost.is_set():
            raise MailboxLost(self.lost_reason)
        if self.may_act is not None and not self.may_act():
            self.fail("another process may watch this mailbox now")
            raise MailboxLost(self.lost_reason)

    async def _send(self, command: aioimaplib.Command) -> None:
        self.check_ours()
        states = _EXTRA_STATES.get(command.name) or aioimaplib.Commands[command.name].valid_states
        if self.state not in states:
            raise MailboxError(f"{command.name} is not possible in this state of the connection", code="STATE")
        self.pending[command.tag] = command
        self._idle_pending.clear()
        try:
            if isinstance(command, Exchange):
                await self._send_pieces(command)
            else:
                self._write_now(str(command).encode() + b"\r\n")
        except BaseException:
            self.fail("a command was cut off while it was sent")
            raise

    async def _send_pieces(self, command: Exchange) -> None:
        self._sending = command
        line = bytearray(f"{command.tag} {command.prefix or ''}{command.name}".encode())
        for piece in command.pieces:
            if isinstance(piece, bytes):
                line += b" " + piece
                continue
            without_waiting = self._literal_plus(len(piece.content))
            line += b" {%d%s}\r\n" % (len(piece.content), b"+" if without_waiting else b"")
            if not without_waiting:
                command.continued = asyncio.Event()
                self._write_now(line)
                line = bytearray()
                if not await self._may_go_on(command):
                    return
            line = await self._send_literal(line, piece.content, command.seconds)
        self._write_now(line + b"\r\n")
        await self._flow(command.seconds)

    def _literal_plus(self, size: int) -> bool:
        """RFC 7888: LITERAL+ takes any size without a go-ahead, LITERAL- up to 4096 octets."""
        return "LITERAL+" in self.capabilities or ("LITERAL-" in self.capabilities and size <= 4096)

    async def _may_go_on(self, command: Exchange) -> bool:
        """Wait for `+`. False: the command was answered instead, and its literal is not sent."""
        if command.continued is not None:
            await self._wait_for(command.continued, command.seconds)
        if self.lost.is_set():
            raise MailboxLost(self.lost_reason)
        command.continued = None
        return not command.done

    async def _send_literal(self, line: bytearray, content: bytes, seconds: float) -> bytearray:
        """What is left to be sent: small literals go out together with what surrounds them."""
        if len(line) + len(content) <= WRITE_CHUNK:
            line += content
            return line
        if line:
            self._write_now(line)
        view = memoryview(content)
        for start in range(0, len(view), WRITE_CHUNK):
            self._write_now(view[start:start + WRITE_CHUNK])
            await self._flow(seconds)
        return bytearray()

    async def _flow(self, seconds: float) -> None:
        if not self._writable.is_set():
            await self._wait_for(self._writable, seconds)

    def _write_now(self, data: bytes | bytearray | memoryview) -> None:
        if self.lost.is_set():
            raise MailboxLost(self.lost_reason)
        self.transport.write(data)

    # --- IDLE (RFC 2177) ---

    async def idle_for(self, seconds: float, command_seconds: float) -> bool:
        """IDLE until there is news, `seconds` are over or `news` is set by somebody; True if there was news."""
        if not self.news.is_set():
            async with self._order:
                await self._wait_for(self._idle_pending, command_seconds)
                if not self.news.is_set():
                    await self._idle(seconds, command_seconds)
        return self.take_news()

    def take_news(self) -> bool:
        """Whether there was news since the last call. Raises `MailboxLost`."""
        if self.lost.is_set():
            raise MailboxLost(self.lost_reason)
        happened = self.news.is_set()
        self.news.clear()
        return happened

    async def _idle(self, seconds: float, command_seconds: float) -> None:
        command = Exchange("IDLE", self.new_tag(), seconds=command_seconds)
        command.continued = asyncio.Event()
        await self._send(command)
        try:
            if await self._may_go_on(command):
                try:
                    async with asyncio.timeout(seconds):
                        await self.news.wait()
                except TimeoutError:
                    pass
                if not self.lost.is_set():
                    self._write_now(b"DONE\r\n")
        except BaseException:
            self.fail("IDLE was cut off")
            raise
        await self.finished(command)
        command.ok("watch the folder")

    # --- the end ---

    def fail(self, reason: str) -> None:
        """End the connection now; every command under way raises `MailboxLost`. Safe to call again."""
        if self.lost.is_set():
            return
        self.lost_reason = reason
        self.state = aioimaplib.LOGOUT
        self.lost.set()
        commands, self.pending = list(self.pending.values()), {}
        self._framer = Framer(self.max_literal)
        for command in commands:
            if isinstance(command, Exchange):
                command.break_off(reason)
            else:
                command._exception = MailboxLost(reason)
                command.close(b"", "KO")
        for event in (self._idle_pending, self._writable, self.news, self.greeted):
            event.set()
        if self.transport is not None:
            self.transport.abort()

    @contextmanager
    def readable(self) -> Iterator[None]:
        """Around reading an answer: what cannot be read ends the connection, since it cannot be trusted any further."""
        try:
            yield
        except ValueError as error:
            self.fail(f"the mail server does not follow the protocol ({error})")
            raise MailboxLost(self.lost_reason) from error

    # --- STARTTLS ---

    async def start_tls(self, context: ssl.SSLContext, server_name: str, seconds: float) -> None:
        """Upgrade (RFC 3501 6.2.1). What the server said before is forgotten. Raises `MailboxError`, `MailboxLost`, `OSError`."""
        command = Exchange("STARTTLS", self.new_tag(), seconds=seconds)
        await self.execute(command)
        command.ok("start TLS")
        if self.lost.is_set():
            raise MailboxLost(self.lost_reason)
        try:
            async with asyncio.timeout(seconds):
                transport = await self.loop.start_tls(self.transport, self, context, server_hostname=server_name)
        except TimeoutError:
            self.fail("the mail server did not start TLS in time")
            raise MailboxLost(self.lost_reason) from None
        except BaseException:
            self.fail("TLS could not be started")
            raise
        if transport is None:
            raise MailboxLost("the connection is gone")
        self.transport = transport
        self.capabilities = set()
        self._upgrading = False
        self.news.clear()
