"""Encoded words in header fields (RFC 2047): how a subject with letters beyond ASCII is written."""

from __future__ import annotations

import binascii
import re

# RFC 2047 2; the charset may have a language (RFC 2231 5). Whitespace between two encoded words is not text (6.2).
_ENCODED_WORD = re.compile(rb"=\?([A-Za-z0-9_.:-]{1,40})(?:\*[A-Za-z0-9-]{1,40})?\?([bBqQ])\?([!->@-~ ]*?)\?=")
_BETWEEN = re.compile(rb"[ \t]+")
# codecs of Python that are no character sets of mail, some of them slow
_NO_CHARSETS = frozenset({"idna", "punycode", "undefined", "mbcs", "oem", "unicode_escape", "raw_unicode_escape"})


def decode_words(value: bytes) -> str:
    """The text of an unfolded field value, with its encoded words decoded. Never raises."""
    if b"=?" not in value:
        return _decoded(value, "utf-8")
    runs: list[tuple[str, bytes]] = []          # bytes of one charset in a row: words may end within a character
    position, after_word = 0, False
    for match in _ENCODED_WORD.finditer(value):
        between = value[position:match.start()]
        if between and not (after_word and _BETWEEN.fullmatch(between)):
            runs.append(("utf-8", between))
        charset = match[1].decode("ascii").lower()
        data = _word_bytes(match[3], match[2] in b"bB")
        if after_word and runs and runs[-1][0] == charset and position and (not between or _BETWEEN.fullmatch(between)):
            runs[-1] = (charset, runs[-1][1] + data)
        else:
            runs.append((charset, data))
        position, after_word = match.end(), True
    runs.append(("utf-8", value[position:]))
    return "".join(_decoded(data, charset) for charset, data in runs)


def _word_bytes(text: bytes, base64: bool) -> bytes:
    if not base64:
        return binascii.a2b_qp(text, header=True)
    try:
        return binascii.a2b_base64(text + b"=" * (-len(text) % 4))
    except binascii.Error:
        return text


def _decoded(data: bytes, charset: str) -> str:
    if charset not in _NO_CHARSETS:
        try:
            return data.decode(charset)
        except (LookupError, ValueError):
            pass
    return data.decode("latin-1")       # most sets of the world have ASCII where it is
