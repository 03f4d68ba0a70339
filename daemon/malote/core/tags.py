"""A tag in the subject that says what `Malote-Seal` says, for mail programs that cannot write a header field of their own.

Where it stands it counts, also inside an encoded word, and it is taken out: nobody but this program is to read it. A subject
without encoded words keeps all its other bytes; one with them is written anew in UTF-8 (RFC 2047).
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from dataclasses import dataclass

from malote.core.words import decode_words

MIN_TAG, MAX_TAG = 3, 40
SUBJECT = "[...]"           # of sealed mail as others see it (RFC 9788 3.2.1)
_PRINTABLE = re.compile(r"[!-~]+")
_WORD_BYTES = 45            # of UTF-8 in one encoded word: 60 of base64, below RFC 2047's 75 in all
_LINE_END = re.compile(rb"[\r\n]*\Z")
_FOLD = re.compile(rb"\r?\n(?=[ \t])")


@dataclass(frozen=True, slots=True)
class Tag:
    text: str
    in_bytes: re.Pattern[bytes]
    in_text: re.Pattern[str]


def make_tag(text: str) -> Tag | None:
    """None for "": there is no such tag. `tag_fault` says what may be one."""
    if not text:
        return None
    # a tag that ends in a letter is no part of a longer word
    before, after = (r"(?<![A-Za-z0-9])" if text[0].isalnum() else ""), (r"(?![A-Za-z0-9])" if text[-1].isalnum() else "")
    word = before + re.escape(text) + after
    pattern = rf"((?:\r?\n)?[ \t]*){word}[ \t]*(?=(\r?\n|\Z)?)"
    return Tag(text, re.compile(pattern.encode("ascii"), re.IGNORECASE), re.compile(pattern, re.IGNORECASE))


def tag_fault(text: str) -> str:
    """What is wrong with it; "" for nothing."""
    if text and (not MIN_TAG <= len(text) <= MAX_TAG or _PRINTABLE.fullmatch(text) is None or "=?" in text):
        return f"must be {MIN_TAG} to {MAX_TAG} visible ASCII characters without spaces, as [seal]"
    if text == SUBJECT:
        return f"must not be {SUBJECT}, the subject of all sealed mail"
    return ""


def take_tag(raw: bytes, tag: Tag) -> bytes | None:
    """The Subject field `raw` without the tag; None if it is not in it."""
    name, _, value = raw.partition(b":")
    if b"=?" not in value:
        cut, count = tag.in_bytes.subn(lambda match: b"" if match[2] is not None else match[1], value)
        return name + b":" + cut + _end(raw, cut) if count else None
    text = decode_words(_FOLD.sub(b"", value).strip(b" \t\r\n"))
    cut_text, count = tag.in_text.subn(lambda match: "" if match[2] is not None else match[1], text)
    if not count:
        return None
    end = _LINE_END.search(raw)
    line_end = end[0] if end is not None and end[0] else b""
    return name + b": " + (line_end or b"\r\n").join(_folded(cut_text.strip(" \t"))) + line_end


def _end(raw: bytes, cut: bytes) -> bytes:
    """The line end of the field, where cutting took it."""
    return b"" if cut.endswith(b"\n") or not raw.endswith(b"\n") else b"\r\n" if raw.endswith(b"\r\n") else b"\n"


def _folded(text: str) -> Iterator[bytes]:
    chunk = b""
    lead = b""
    for character in text:
        encoded = character.encode("utf-8", "replace")
        if len(chunk) + len(encoded) > _WORD_BYTES:
            yield lead + b"=?utf-8?b?" + base64.b64encode(chunk) + b"?="
            chunk, lead = b"", b" "
        chunk += encoded
    yield lead + b"=?utf-8?b?" + base64.b64encode(chunk) + b"?=" if chunk else b""
