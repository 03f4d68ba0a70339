"""Binary data as text between BEGIN and END lines (docs/format.md, Armour): written in one way, found after mail had its way."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import pybase64

from malote.errors import FormatError

LINE_BYTES = 64     # below every line length that mail programs wrap at, also when quoted a few times
_QUOTE_MARKS = re.compile(r"^[ \t]*(?:>[ \t]?)*", re.MULTILINE)
_BASE64 = re.compile(r"[A-Za-z0-9+/]*={0,2}")


def armored(kind: str, data: bytes, comments: Sequence[str]) -> str:
    """BEGIN line, comment lines and an empty line if there are any, base64 lines, END line."""
    encoded = pybase64.b64encode(data).decode()
    lines = [f"-----BEGIN {kind}-----", *comments]
    if comments:
        lines.append("")
    lines += (encoded[start:start + LINE_BYTES] for start in range(0, len(encoded), LINE_BYTES))
    lines.append(f"-----END {kind}-----")
    return "\n".join(lines) + "\n"


def find_blocks(kind: str, text: str) -> Iterator[str]:
    """What stands between BEGIN and END, without "> " in front of lines. Raises `FormatError` for a BEGIN without its END."""
    begin, end = f"-----BEGIN {kind}-----", f"-----END {kind}-----"
    if begin not in text:
        return
    text = _QUOTE_MARKS.sub("", text)
    position = 0
    while (start := text.find(begin, position)) >= 0:
        start += len(begin)
        position = text.find(end, start)
        if position < 0 or begin in text[start:position]:
            raise FormatError(f"text is cut off: a BEGIN {kind} line has no END line")
        yield text[start:position].removesuffix("- ")      # RFC 9580 7.2 dash escaping, in a clear-signed mail


def dearmor(text: str) -> bytes:
    """Base64 without white space, in its only form. Raises `FormatError`."""
    if len(text) % 4 or not _BASE64.fullmatch(text):
        raise FormatError("not complete base64")
    data = pybase64.b64decode(text)
    if pybase64.b64encode(data).decode() != text:       # spare bits that are not zero
        raise FormatError("base64 is not in its canonical form")
    return data
