"""Parsing SMTP replies: strictly, with limits, from a buffer that grows as bytes arrive (RFC 5321 4.2)."""

from __future__ import annotations

import re

from malote.errors import Reply, UpstreamRefused

MAX_REPLY_LINE = 4096       # RFC 5321 4.5.3.1.5 says 512; AUTH challenges reach 12288 / 4 (RFC 4954 section 4)
MAX_REPLY_LINES = 200       # an EHLO reply of a large provider has about 15 lines
_LINE = re.compile(rb"([2-5][0-9][0-9])(?:([ -])([^\r\n\0]*))?\r?\n")
_ENHANCED = re.compile(r"([245]\.\d{1,3}\.\d{1,3})(?: +|$)")
_UNPRINTABLE = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


class ReplyFault(Exception):
    """What the server sent is no SMTP reply."""


class ReplyParser:
    """Feed bytes, get replies. The text keeps what the server said, without control characters."""

    def __init__(self) -> None:
        self.buffer = bytearray()
        self._lines: list[tuple[bytes, bytes]] = []

    @property
    def empty(self) -> bool:
        return not self.buffer and not self._lines

    def feed(self, data: bytes) -> list[Reply]:
        """The replies that are complete now. Raises `ReplyFault`."""
        buffer = self.buffer
        buffer += data
        replies: list[Reply] = []
        start = 0
        while (end := buffer.find(b"\n", start)) >= 0:
            match = _LINE.fullmatch(buffer, start, end + 1)
            if match is None or end - start > MAX_REPLY_LINE:
                raise ReplyFault
            start = end + 1
            code, more, text = match.groups(b"")
            if (self._lines and self._lines[0][0] != code) or len(self._lines) >= MAX_REPLY_LINES:
                raise ReplyFault
            self._lines.append((code, text))
            if more != b"-":
                replies.append(_reply(self._lines))
                self._lines = []
        del buffer[:start]
        if len(buffer) > MAX_REPLY_LINE:
            raise ReplyFault
        return replies


def _reply(lines: list[tuple[bytes, bytes]]) -> Reply:
    code = int(lines[0][0])
    texts = [_UNPRINTABLE.sub("?", text.decode("utf-8", "surrogateescape")) for _, text in lines]
    match = _ENHANCED.match(texts[0])
    if match is None or int(match[1][0]) != code // 100:
        return Reply(code, "", "\n".join(texts))
    enhanced = match[1]
    return Reply(code, enhanced, "\n".join(
        text[len(enhanced):].lstrip(" ") if text == enhanced or text.startswith(f"{enhanced} ") else text for text in texts
    ))


def check_reply(reply: Reply) -> Reply:
    """Raises `UpstreamRefused` unless the reply is 2xx."""
    if reply.code // 100 != 2:
        raise UpstreamRefused(reply)
    return reply
