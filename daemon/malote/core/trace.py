"""The trace of a message: how many servers it has passed, how often this one, and the line that we add. Pure.

Two gateways that forward to each other show only in their Received lines (RFC 5321 6.3). Looks at the whole header, however
long: a limit would let a loop go on behind it.
"""

from __future__ import annotations

import re

from malote.core.message import MAX_HOPS, Bytes, format_date
from malote.errors import MailLoop

# A message may honestly pass the same gateway more than once (somebody forwards his mail elsewhere, and that comes back); in a
# loop of two gateways each waits for the other's answer, so it must end long before the connections to the next server do.
MAX_OWN_HOPS = 8

_RECEIVED = re.compile(rb"(?:\A|\n)received[ \t]*:([^\n]*(?:\n[ \t][^\n]*)*)", re.IGNORECASE)
_HEADER_END = re.compile(rb"(?:\A|\n)\r?\n")


def check_hops(raw: Bytes, host: str) -> None:
    """Raises `MailLoop` above `MAX_HOPS` Received lines at the top level, or `MAX_OWN_HOPS` of `host`'s."""
    end = _HEADER_END.search(raw)
    lines = [hit[1] for hit in _RECEIVED.finditer(raw, 0, end.end() if end is not None else len(raw))]
    ours = f"by {host} (malote)".encode().lower()
    if len(lines) > MAX_HOPS or sum(ours in b" ".join(line.lower().split()) for line in lines) > MAX_OWN_HOPS:
        raise MailLoop()


def received_line(host: str, *, helo: str, peer: str, protocol: str, now_ms: int) -> bytes:
    """RFC 5321 4.4, for mail that comes in. `peer`: address, or "" where there is none; `helo`: one word, as it was said."""
    said = f"from {helo} ({f'[{peer}]' if peer else 'local'})\r\n " if helo.isascii() and helo.isprintable() and helo else ""
    return f"Received: {said}by {host} (malote) with {protocol};\r\n {format_date(now_ms)}\r\n".encode()
