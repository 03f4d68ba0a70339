"""Cuts what arrives on an IMAP connection into responses: no socket, no meaning (RFC 3501 2.2.2 and 4.3).

A FETCH answer with a line beyond all reason is dropped whole: a message can be written so that its BODYSTRUCTURE is that long,
and must not end the connection each time somebody looks. Any other such line ends it.

One bytearray, no recursion, every byte looked at once; a large literal is collected on its own, so a message of 50 MB costs
50 MB while it arrives. A response is its parts: a line, then a literal and the line that follows it, and so on.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator

MAX_LINE = 16 * 1024 * 1024     # SEARCH names every UID on one line: 1.4 million UIDs of 11 octets
MAX_PARTS = 20_000              # literals and lines of one response

_LITERAL = re.compile(rb"~?\{(\d{1,10})\}$")
_FETCH = re.compile(rb"\* \d{1,10} FETCH ", re.IGNORECASE)
_TAIL = 32                      # bytes kept of a line that is dropped: the literal it may announce must still be seen
_STATUS_LINE = re.compile(rb"\* (?:OK|NO|BAD|BYE|PREAUTH)\b", re.IGNORECASE)


class Framer:
    """Feed it bytes, take responses. `ValueError` means that the stream cannot be followed any further."""

    def __init__(self, max_literal: int) -> None:
        self.max_literal = max_literal
        self._buffer = bytearray()
        self._scanned = 0                       # bytes of the buffer that hold no end of line
        self._parts: list[bytes] = []
        self._size = 0
        self._literal: io.BytesIO | None = None     # its getvalue() does not copy
        self._missing = 0
        self._dropping = False

    @property
    def waiting(self) -> bool:
        """Whether there are bytes that are not a whole response yet."""
        return bool(self._buffer or self._parts or self._literal)

    def feed(self, data: bytes) -> Iterator[tuple[list[bytes], int]]:
        """Yield (parts, bytes in all) for each response that is now complete."""
        rest = self._fill_literal(data)
        if rest is None:
            return
        self._buffer += rest
        position = 0
        try:
            while (end := self._buffer.find(b"\r\n", max(position, self._scanned))) >= 0:
                line = bytes(self._buffer[position:end])
                position, self._scanned = end + 2, 0
                self._add(line)
                size = self._announced(line)
                if size is not None:
                    position = self._begin_literal(position, size)
                    continue
                parts, total, dropped = self._parts, self._size, self._dropping
                self._parts, self._size, self._dropping = [], 0, False
                if not dropped:
                    yield parts, total
        finally:
            del self._buffer[:position]         # also when the caller stops here: what is left stays to be looked at
        self._scanned = max(0, len(self._buffer) - 1)
        if len(self._buffer) > MAX_LINE:
            self._drop_line()

    def _drop_line(self) -> None:
        beginning = self._parts[0] if self._parts else bytes(self._buffer[:_TAIL])
        if not _FETCH.match(beginning):
            raise ValueError("a line too long")
        self._dropping = True
        self._parts = self._parts or [beginning]
        del self._buffer[:-_TAIL]
        self._scanned = _TAIL - 1

    def _fill_literal(self, data: bytes) -> bytes | None:
        """What follows the literal under way; None if it is not complete yet."""
        if self._literal is None:
            return data
        taken = min(self._missing, len(data))
        self._literal.write(memoryview(data)[:taken])
        self._missing -= taken
        if self._missing:
            return None
        self._add(self._literal.getvalue())
        self._literal = None
        return data[taken:]

    def _begin_literal(self, position: int, size: int) -> int:
        """Take the literal from the buffer as far as it is there; the position after it."""
        available = min(size, len(self._buffer) - position)
        if available == size:
            self._add(bytes(self._buffer[position:position + size]))
        else:
            self._literal = io.BytesIO()
            self._literal.write(self._buffer[position:position + available])
            self._missing = size - available
        return position + available

    def _announced(self, line: bytes) -> int | None:
        """The size of the literal that follows. The free text of a status may end in braces without announcing any."""
        if not line.endswith(b"}") or not self._parts[0].startswith(b"* ") or _STATUS_LINE.match(self._parts[0]):
            return None
        match = _LITERAL.search(line)
        if match is None:
            return None
        size = int(match[1])
        if size > self.max_literal or len(self._parts) > MAX_PARTS:
            raise ValueError("a literal too large")
        return size

    def _add(self, part: bytes) -> None:
        self._parts.append(part)
        self._size += len(part)
        if self._size > self.max_literal + MAX_LINE:
            raise ValueError("a response too large")
