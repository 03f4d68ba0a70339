"""Message bytes on their way through SMTP, as whole buffers: end of data, dots, line ends. No loop over lines anywhere.

Only CRLF.CRLF ends the data (RFC 5321 4.1.1.4). Anything that another server might take for it (LF.LF, LF.CRLF, CR.CR ...)
is data with a bare CR or LF in it, and such a message is refused or normalised before it is passed on: no smuggling.
"""

from __future__ import annotations

import re

from malote.errors import FormatError, Reply

END = b"\r\n.\r\n"

BARE_LINE_ENDS = Reply(550, "5.6.11", "Message has a line that does not end in CRLF, or a NUL; nothing was sent")

_BARE = re.compile(rb"\r(?!\n)|(?<!\r)\n")


def find_end(buffer: bytearray, scanned: int) -> int:
    """Where CRLF.CRLF begins, -1 if it has not come yet. `scanned`: length of the buffer at the previous search.

    The caller puts CRLF in front of the first data byte, so that an empty message and a first line `.` are no special cases.
    """
    return buffer.find(END, max(0, scanned - len(END) + 1))


def unstuff(buffer: bytearray) -> bytearray:
    """Undo dot-stuffing (RFC 5321 4.5.2) in a buffer that still has the CRLF in front; that CRLF is removed."""
    if b"\r\n." in buffer:
        buffer = buffer.replace(b"\r\n.", b"\r\n")
    del buffer[:2]
    return buffer


def stuff(content: bytes | bytearray) -> bytes | bytearray:
    """Dot-stuffing, and the final CRLF if it is missing: ready for `.CRLF`. The same object if there is nothing to do."""
    if b"\r\n." in content:
        content = content.replace(b"\r\n.", b"\r\n..")
    if content.startswith(b"."):
        content = b"." + content
    if content and not content.endswith(b"\r\n"):
        content = content + b"\r\n"
    return content


def clean_lines(content: bytearray, *, normalise: bool) -> bytearray:
    """Raises `FormatError` (550 5.6.11) for bare CR, bare LF or NUL; with `normalise` they become CRLF, and NUL is dropped."""
    pairs = content.count(b"\r\n")
    if content.count(b"\n") == pairs == content.count(b"\r") and b"\0" not in content:
        return content
    if not normalise:
        raise FormatError("bare CR, bare LF or NUL in the message", reply=BARE_LINE_ENDS)
    return bytearray(_BARE.sub(b"\r\n", content.replace(b"\0", b"")))
