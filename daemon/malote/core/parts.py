"""Finding the parts of a sealed message in whatever has become of it on its way (docs/format.md 4.4).

Lists wrap messages in footers, gateways rename types, re-wrap lines and change encodings. So the parts are found by their first
eight bytes, anywhere in the MIME tree; names, types and order say nothing. Every step is bounded: the splitter below only
looks for boundaries, decodes nothing but what starts like a part of ours, and gives up at fixed numbers. It uses no general
MIME parser, whose surprises would be ours.
"""

from __future__ import annotations

import binascii
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import pybase64

from malote.errors import Unreadable

KEY_BLOB_MAGIC = b"\x89MLK\r\n\x1a\n"       # docs/format.md 4.1: after PNG, shows damage by 7-bit paths and newline conversion
PAYLOAD_MAGIC = b"\x89MLP\r\n\x1a\n"
KEY_BLOB_TYPE = "application/vnd.malote.key-blob"
SEALED_TYPE = "application/vnd.malote.sealed"

MAX_DEPTH = 8               # our own tree is 2 deep; a list footer, a gateway and a forward add one each
MAX_PARTS = 200             # a note, 100 key blobs, the sealed part, and as much again for what was put around them
MAX_TOP_HEADER_BYTES = 256 * 1024       # Received, ARC and DKIM fields pile up at the top only
MAX_PART_HEADER_BYTES = 16 * 1024
MAX_BOUNDARY_BYTES = 200    # RFC 2046 5.1.1 allows 70; some programs exceed it
MAX_KEY_BLOB_BYTES = 4096   # 1,222 today; leaves room for other blob types, keeps 200 of them below a megabyte
MAX_FALSE_BOUNDARIES = 10_000           # lines that start like a boundary and are none: bounds time on hostile bodies

_SNIFF_BYTES = 512          # of a body, to see how it starts: 8 bytes in base64 after some blank lines, in quoted-printable
_WHITE = b" \t\r\n"
_BASE64_MAGICS = tuple(pybase64.b64encode(magic)[:10] for magic in (KEY_BLOB_MAGIC, PAYLOAD_MAGIC))     # 60 of the 64 bits
_MIME_FIELDS = re.compile(rb"(?im)^(content-type|content-transfer-encoding)[ \t]*:(.*(?:\n[ \t].*)*)")
_PARAMETER = re.compile(rb'[\s;]*([A-Za-z0-9!#$%&*+.^_`|~-]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s;"]+))', re.DOTALL)
# at the start of a line only: tried at every byte, a long word without colon costs the square of its length
_FIELD = re.compile(rb"(?m)^([\x21-\x39\x3b-\x7e]+)[ \t]*:(.*(?:\n[ \t].*)*)")


@dataclass(frozen=True, slots=True)
class FoundKeyBlob:
    raw: bytes = field(repr=False)      # the whole part, decoded: magic, version, eid, BLOB
    kid: str                            # the `kid` parameter: 16 hex digits, an unauthenticated hint; "" where absent
    forwarded: bool                     # below a message/rfc822


@dataclass(frozen=True, slots=True)
class FoundPayload:
    raw: bytes = field(repr=False)      # the whole part, decoded: header H and chunks
    forwarded: bool


@dataclass(frozen=True, slots=True)
class FoundParts:
    """What lies in one message: at least one part of ours, whole or damaged."""

    blobs: tuple[FoundKeyBlob, ...]
    payloads: tuple[FoundPayload, ...]
    damaged: int                        # parts that start like ours, broken; those in attached messages do not count
    outer: tuple[tuple[str, str], ...]  # top-level header fields as found, unfolded

    @property
    def forwarded(self) -> bool:
        """Whether everything of ours lies in attached messages: somebody passed on what was sent to somebody."""
        return (
            not self.damaged and all(blob.forwarded for blob in self.blobs) and all(each.forwarded for each in self.payloads)
        )


def looks_sealed(prefix: bytes) -> bool:
    """Whether an attachment that starts with these bytes (12 or more, decoded or still in base64) may be a part of ours."""
    return _sniff(prefix) is not None


def find_parts(raw: bytes) -> FoundParts | None:
    """The parts of a sealed message in `raw`, or None: nothing sealed here. `raw` may have any line ends.

    Raises `Unreadable` where parts were found and the message is over a limit: it may hold more than was looked at.
    """
    search = _Search()
    search.entity(raw, 0, len(raw), depth=1, forwarded=False)
    if not (search.blobs or search.payloads or search.damaged):
        return None
    if search.over_limit:
        raise Unreadable(f"over limit: {search.over_limit}")
    return FoundParts(tuple(search.blobs), tuple(search.payloads), search.damaged, tuple(top_fields(raw)))


def top_fields(raw: bytes) -> Iterator[tuple[str, str]]:
    """The top-level header fields, unfolded, for display and comparison only: what cannot be read is left out."""
    end, _ = _header_end(raw, 0, len(raw), MAX_TOP_HEADER_BYTES)
    for match in _FIELD.finditer(raw, 0, max(end, 0)):
        value = b"".join(line.rstrip(b"\r") for line in match[2].split(b"\n"))
        yield match[1].decode("ascii"), value.decode("utf-8", "replace").strip(" \t")


def _header_end(source: bytes, start: int, end: int, limit: int) -> tuple[int, int]:
    """End of the header and start of the body: at the first empty line. (-1, -1) where it is beyond the limit."""
    for empty in (b"\r\n", b"\n"):
        if source.startswith(empty, start, end):
            return start, start + len(empty)
    stop = min(end, start + limit)
    found: list[tuple[int, int]] = []
    for mark in (b"\n\r\n", b"\n\n"):
        at = source.find(mark, start, stop)
        if at >= 0:
            found.append((at + 1, at + len(mark)))
            stop = at + 1           # the other kind counts only if it is earlier
    if found:
        return min(found)
    return (end, end) if end - start <= limit else (-1, -1)


class _Search:
    """One walk through one message."""

    def __init__(self) -> None:
        self.blobs: list[FoundKeyBlob] = []
        self.payloads: list[FoundPayload] = []
        self.damaged = 0
        self.over_limit = ""        # which limit, once one was met
        self.parts = 0
        self.false_boundaries = 0

    def entity(self, source: bytes, start: int, end: int, *, depth: int, forwarded: bool) -> None:
        """Look at source[start:end], which begins with a header."""
        self.parts += 1
        if self.parts > MAX_PARTS:
            self.over_limit = "parts"
            return
        if depth > MAX_DEPTH:
            self.over_limit = "depth"
            return
        header_end, body = _header_end(source, start, end, MAX_TOP_HEADER_BYTES if depth == 1 else MAX_PART_HEADER_BYTES)
        if body < 0:
            self.over_limit = "header size"
            return
        media_type, parameters, encoding = _mime_fields(source, start, header_end)
        if media_type.startswith("multipart/") and 0 < len(boundary := parameters.get("boundary", b"")) <= MAX_BOUNDARY_BYTES:
            for part_start, part_end in self._split(source, body, end, boundary):
                self.entity(source, part_start, part_end, depth=depth + 1, forwarded=forwarded)
                if self.over_limit:
                    return
        elif media_type in ("message/rfc822", "message/global"):
            self._attached_message(source, body, end, encoding, depth)
        else:
            self._leaf(source, body, end, encoding, parameters, forwarded)

    def _split(self, source: bytes, start: int, end: int, boundary: bytes) -> Iterator[tuple[int, int]]:
        """The parts between the lines `--boundary` (RFC 2046 5.1.1); what stands before and after them is not looked at."""
        mark = b"\n--" + boundary
        part = -1
        at = source.find(mark, start - 1, end)      # the empty line before the body ends at start - 1
        while at >= 0:
            after = at + len(mark)
            newline = source.find(b"\n", after, min(end, after + 1000))
            line_end = newline if newline >= 0 else min(end, after + 1000)
            rest = source[after:line_end].strip(_WHITE)
            if rest not in (b"", b"--"):            # another boundary that starts with this one, or text
                self.false_boundaries += 1
                if self.false_boundaries > MAX_FALSE_BOUNDARIES:
                    self.over_limit = "boundaries"
                    return
                at = source.find(mark, after, end)
                continue
            if part >= 0:
                yield part, at if source[at - 1:at] != b"\r" else max(part, at - 1)
            if rest == b"--":
                return
            part = min(line_end + 1, end)
            at = source.find(mark, line_end, end)
        if part >= 0:
            yield part, end                         # no closing line: a message cut short

    def _attached_message(self, source: bytes, start: int, end: int, encoding: str, depth: int) -> None:
        if encoding == "base64":                    # RFC 2046 5.2.1 forbids it, some gateways do it
            try:
                source = pybase64.b64decode(source[start:end].translate(None, _WHITE), validate=True)
            except ValueError:
                return
            start, end = 0, len(source)
        elif encoding == "quoted-printable":
            source = binascii.a2b_qp(source[start:end])
            start, end = 0, len(source)
        self.entity(source, start, end, depth=depth + 1, forwarded=True)

    def _leaf(self, source: bytes, start: int, end: int, encoding: str, parameters: dict[str, bytes], forwarded: bool) -> None:
        """A body that is neither a multipart nor a message. It may be raw, base64, quoted-printable, or base64 in that."""
        quoted = encoding == "quoted-printable"
        head = source[start:min(end, start + _SNIFF_BYTES)]
        kind = _sniff(binascii.a2b_qp(head) if quoted else head)
        if kind is None:
            return
        data = binascii.a2b_qp(source[start:end]) if quoted else source[start:end]
        if kind == "base64":
            data = data.translate(None, _WHITE)     # a step of its own: the text with line ends is let go before decoding
            try:
                # White space may have changed on the way; anything else in there was put in, and the part is refused.
                data = pybase64.b64decode(data, validate=True)
            except ValueError:
                self.damaged += not forwarded
                return
        if data.startswith(PAYLOAD_MAGIC):
            self.payloads.append(FoundPayload(data, forwarded))
        elif data.startswith(KEY_BLOB_MAGIC) and len(data) <= MAX_KEY_BLOB_BYTES:
            kid = parameters.get("kid", b"")
            self.blobs.append(FoundKeyBlob(data, kid.decode("ascii", "replace").lower() if len(kid) == 16 else "", forwarded))
        else:
            self.damaged += not forwarded


def _sniff(head: bytes) -> str | None:
    """How a body that begins with `head` is encoded, if it is one of ours: "raw", "base64", or None."""
    if head.startswith((KEY_BLOB_MAGIC, PAYLOAD_MAGIC)):
        return "raw"
    return "base64" if head.translate(None, _WHITE).startswith(_BASE64_MAGICS) else None


def _mime_fields(source: bytes, start: int, end: int) -> tuple[str, dict[str, bytes], str]:
    """Media type, its parameters, and transfer encoding, in lower case; the first field of each name counts."""
    media_type, parameters, encoding = "text/plain", dict[str, bytes](), ""
    seen: set[bytes] = set()
    for match in _MIME_FIELDS.finditer(source, start, end):
        name = match[1].lower()
        if name in seen:
            continue
        seen.add(name)
        head, _, tail = match[2].partition(b";")
        value = head.strip(_WHITE).lower().decode("ascii", "replace")
        if name == b"content-type":
            media_type, parameters = value, _parameters(tail)
        else:
            encoding = value
    return media_type, parameters, encoding


def _parameters(text: bytes) -> dict[str, bytes]:
    """Parameters of a Content-Type, first of each name; reading stops at the first thing that is none. RFC 2231 is read as
    far as boundaries need it: `boundary*=` and the pieces `boundary*0=`, `boundary*1=`."""
    found: dict[str, bytes] = {}
    position = 0
    while match := _PARAMETER.match(text, position):
        position = match.end()
        value = re.sub(rb"\\(.)", rb"\1", match[2], flags=re.DOTALL) if match[2] is not None else match[3]
        name = match[1].decode("ascii").lower()
        found.setdefault(name, value.replace(b"\r", b"").replace(b"\n", b""))
    if "boundary" not in found:
        pieces: list[bytes] = []
        while f"boundary*{len(pieces)}" in found:
            pieces.append(found[f"boundary*{len(pieces)}"])
        found["boundary"] = b"".join(pieces) or found.get("boundary*", b"").rpartition(b"'")[2]
    return found
