"""The byte side of one client connection: buffer, lines, replies, one timer, and the proof that a reply was read.

Replaces the StreamReader half of aiosmtpd's SMTP class. Faults of that half that are gone here: the timer that runs on during
DATA and the handler, EOF and a lost connection that cancel a relay under way, the 999-byte line limit, replies sent one by one.
"""

from __future__ import annotations

import asyncio
import fcntl
import re
import socket
import struct
import termios
from collections.abc import Iterator
from enum import Enum, auto
from typing import cast

from malote.errors import Reply
from malote.smtp.timer import Timed

MAX_LINE = 12288 + 2            # RFC 4954 section 4: an AUTH line may have 12288 octets
MAX_DROPPED = 1024 * 1024       # of one line that is too long: whoever sends more does not speak SMTP
HIGH_WATER_BYTES = 64 * 1024    # unread command bytes above which the socket is left alone
MAX_REPLY_TEXT = 480            # characters in a line of a reply, beside code and enhanced code
LINGER_SECONDS = 30             # for the last reply to leave after we have closed
MIN_DATA_RATE = 512             # bytes per second averaged over the whole data phase: a 1980s modem; below it is a slow-loris

_UNSAFE = re.compile(r"[\x00-\x09\x0b-\x1f\x7f]")
NO_LINES = Reply(421, "4.5.2", "This is no SMTP command, closing the connection")
TIMED_OUT = Reply(421, "4.4.2", "Timeout, closing the connection")


class ClientGone(Exception):
    """The connection is closed or cannot go on."""


class LineFault(Exception):
    """A command line that is too long or does not end in CRLF. It has been read to its end."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(reply.text)
        self.reply = reply


class Phase(Enum):
    """What the connection is doing; the timer means something else in each."""

    COMMAND = auto()        # waiting for a command line
    DATA = auto()           # reading a message
    HANDLER = auto()        # the desk is at work


class ClientWire(Timed, asyncio.Protocol):
    """Mixed into the server class. All offsets count bytes received since the connection (or TLS) began."""

    transport: asyncio.Transport | None

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        Timed.__init__(self, loop)
        self.transport = None
        self._buffer = bytearray()
        self._out: list[bytes] = []
        self._received = 0
        self._waiter: asyncio.Future[None] | None = None
        self._eof = False
        self._read_paused = False
        self._writable: asyncio.Future[None] | None = None
        self._phase = Phase.COMMAND
        self._waiting_since = 0.0       # loop time at which the client's next command was begun to be waited for
        self._fd = -1
        self._over_tls = False
        self._unread_reply = False      # a reply to a message is out whose reading is not proved yet
        self._mark = -1                 # a command that begins at or after this offset proves it; -1: not known yet

    # protocol callbacks

    def wire_made(self, transport: asyncio.Transport) -> None:
        self.transport = transport
        sock = transport.get_extra_info("socket")
        self._fd = sock.fileno() if sock is not None else -1

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        self._received += len(data)
        if self._phase is not Phase.DATA and len(self._buffer) > HIGH_WATER_BYTES:
            self._pause_reading()
        self._wake()

    def _pause_reading(self) -> None:
        if self.transport is not None and not self._read_paused:
            self.transport.pause_reading()
            self._read_paused = True

    def eof_received(self) -> bool:
        """A half-closed client still gets its replies; TLS has no half-closed state."""
        self._eof = True
        self._wake()
        return not self._over_tls

    def wire_lost(self) -> None:
        self.transport = None
        self._eof = True
        self.stop_timer()
        self._wake()
        self.resume_writing()

    def pause_writing(self) -> None:
        self._writable = self.loop.create_future()

    def resume_writing(self) -> None:
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)
        self._writable = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # reading

    async def wait_for_bytes(self) -> None:
        """Send what is to be sent, then wait until more has come. Raises `ClientGone` when no more will."""
        self.flush()
        if self._writable is not None:      # a client that sends and never reads waits for itself
            self._pause_reading()           # also while it sends a message: nobody counts what comes meanwhile
            await self._writable
        if self._eof or self.transport is None:
            raise ClientGone
        if self._read_paused:
            self._read_paused = False
            self.transport.resume_reading()
        self._waiter = self.loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    async def read_line(self) -> bytes:
        """One line without its CRLF. Raises `LineFault`, and `ClientGone` also after a line without an end."""
        start = dropped = 0
        while (end := self._buffer.find(b"\n", start)) < 0:
            start = len(self._buffer)
            if start > MAX_LINE:
                dropped += start
                if dropped > MAX_DROPPED:
                    self.hang_up(NO_LINES)
                    raise ClientGone
                self._buffer.clear()
                start = 0
            await self.wait_for_bytes()
        line = bytes(self._buffer[:end + 1])
        del self._buffer[:end + 1]
        if dropped or len(line) > MAX_LINE:
            raise LineFault(Reply(500, "5.5.6", "Line too long"))
        if not line.endswith(b"\r\n"):
            # a bare LF between commands is how the second half of a smuggled message looks
            raise LineFault(Reply(500, "5.5.2", "Lines must end in CRLF"))
        return line[:-2]

    def has_come(self, verb: bytes) -> bool:
        """Whether the next line is there as a whole, is without fault, and begins with that."""
        if self._buffer[:len(verb)].upper() != verb:
            return False
        end = self._buffer.find(b"\n", 0, MAX_LINE)
        return end > 0 and self._buffer[end - 1] == 0x0d

    async def read_command(self, seconds: float) -> tuple[bytes, bool]:
        """The next command line, and whether it proves that our replies to messages so far were read."""
        first = self._received - len(self._buffer)
        self.enter(Phase.COMMAND, seconds)
        line = await self.read_line()
        proof = self._unread_reply and 0 <= self._mark <= first
        if proof:
            self._unread_reply = False
        return line, proof

    # writing

    def say(self, reply: Reply) -> None:
        """Queue a reply; it leaves with the others when input runs out (RFC 2920 section 3.2)."""
        self._out.append(encode_reply(reply))

    def flush(self) -> None:
        if self._out:
            if self.transport is not None and not self.transport.is_closing():
                if self._unread_reply and self._mark < 0:
                    self._mark = self._proof_offset()
                self.transport.write(self._out[0] if len(self._out) == 1 else b"".join(self._out))
            self._out.clear()

    def say_final(self, reply: Reply) -> None:
        """The reply to a message, sent at once; from here on a command can prove that it was read.

        Bytes that are already in our buffer or in the kernel's were sent before the client can have read it, be they QUIT
        or the next MAIL: they prove nothing. Nor does FIN.
        """
        self.say(reply)
        self._unread_reply = True
        self._mark = -1
        self.flush()
        if self.transport is not None and not self.transport.is_closing() and self.transport.get_write_buffer_size():
            self._mark = -1     # it waits behind a full socket: asked again at the next reply

    def _proof_offset(self) -> int:
        """The offset of the first byte that has not arrived at this machine yet; -1 if that cannot be told now."""
        if self.transport is None or self.transport.get_write_buffer_size():
            return -1
        waiting = bytes_in_kernel(self._fd)
        if waiting and (self._over_tls or waiting < 0):
            return -1           # encrypted bytes cannot be counted as clear ones
        return self._received + waiting

    # time

    def enter(self, phase: Phase, seconds: float) -> None:
        """Begin a phase that may last that long."""
        self._phase = phase
        self.start_timer(seconds)
        self._waiting_since = self._deadline - seconds

    def timed_out(self) -> None:
        self.hang_up(TIMED_OUT)

    def hang_up(self, reply: Reply | None = None) -> None:
        """Say a last word and close."""
        if reply is not None:
            self.say(reply)
        self.flush()
        transport = self.transport
        if transport is not None and not transport.is_closing():    # a second close() of a TLS transport breaks it
            if transport.get_write_buffer_size():
                self.loop.call_later(LINGER_SECONDS, transport.abort)   # a peer that reads nothing must not keep the socket
            transport.close()
        self._eof = True
        self._wake()
        self.resume_writing()


def encode_reply(reply: Reply) -> bytes:
    """Wire form. A control character in the text, from wherever it came, cannot become a line of its own.

    Lines are kept below 512 octets (RFC 5321 4.5.3.1.5): Python's smtplib gives up on long ones, and then the client does not
    know what became of its message. Not so for 334, whose text is one base64 string (RFC 4954 section 4).
    """
    text = reply.text
    width = MAX_REPLY_TEXT if text.isascii() else MAX_REPLY_TEXT // 4
    if not text.isprintable() or len(text) > width:
        lines = _UNSAFE.sub(" ", text).split("\n")
        if reply.code != 334:
            lines = [part for line in lines for part in _folded(line, width)]
        reply = Reply(reply.code, reply.enhanced, "\n".join(lines))
    return f"{reply}\r\n".encode(errors="replace")


def _folded(line: str, width: int) -> Iterator[str]:
    while len(line) > width:
        cut = line.rfind(" ", 0, width) + 1 or width
        yield line[:cut]
        line = line[cut:]
    yield line


def bytes_in_kernel(fd: int) -> int:
    """Bytes that have arrived on a socket and were not read yet (FIONREAD); -1 if it cannot be asked."""
    try:
        return cast(int, struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, b"\0\0\0\0"))[0])
    except OSError:
        return -1


def peer_uid(sock: socket.socket) -> int:
    """User id of the process at the other end of a UNIX socket (unix(7), SO_PEERCRED)."""
    _pid, uid, _gid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return cast(int, uid)
