"""What anybody may send costs time that grows with its size and no faster: one message must not hold up a mailbox.

No wall time is measured: each input has the largest size that the code accepts, with which anything quadratic takes minutes and
runs into the timeout of the test.
"""

from __future__ import annotations

import contextlib

import pybase64
import pytest

from malote.core import status, strict_json
from malote.core.address import canonical_address, parse_mailboxes
from malote.core.encrypted import decide_encrypted
from malote.core.inner import read_inner
from malote.core.message import MAX_HEADER_BYTES, header_fields, mask, prepare, quoted_spans
from malote.core.outer import outer_headers, strip_for, threading_ids
from malote.core.parts import MAX_PART_HEADER_BYTES, MAX_TOP_HEADER_BYTES, PAYLOAD_MAGIC, FoundParts, find_parts
from malote.core.payload import MAX_MANIFEST_BYTES
from malote.errors import FormatError, MailLoop, Unreadable

pytestmark = pytest.mark.timeout(60)

TOP = MAX_TOP_HEADER_BYTES - 1000
HEADER = MAX_HEADER_BYTES - 1000
SEALED = b"\r\n\r\n" + pybase64.b64encode(PAYLOAD_MAGIC + bytes(100))
AUTHSERV = "malote-00112233445566778899aabbccddeeff"


def fill(text: bytes, size: int) -> bytes:
    return (text * (size // len(text) + 1))[:size]


# Shapes on which patterns go back and forth: long words, runs of spaces, things opened and never closed, almost-matches
SHAPES = [
    b'a', b' ', b'\t', b':', b';', b'"', b'\\"', b'\\', b'(', b')', b'()', b'<', b'<a@a', b'a@', b'a@b,', b'a ',
    b'. ', b'=', b'; a', b';a=', b'; a="b"', b'\n ', b'a:\n ', b'\n\t\n\t', b'\r', b'\ra:', b'a\n', b'a:\n',
    b'malote-mark', b'malote-mark ', b'authentication-results:', b'\nauthentication-results ',
    b'\nmalote-verdict:\n ', b'content-type:', b'content-type ', b'for ', b'(for', b'=?utf-8?q?', b'\xcc\x80\xcc\x96',
    b'\xff',
]


@pytest.mark.parametrize("shape", SHAPES, ids=repr)
def test_header_of_a_sealed_message(shape: bytes) -> None:
    """Found by its parts, taken apart for display, searched for status fields: all before anything is authenticated."""
    for lead in (b"", b"A: ", b"Content-Type: ", b"Content-Type: multipart/mixed; boundary=", b"From: "):
        raw = lead + fill(shape, TOP) + SEALED
        found = find_parts(raw)
        assert found is None or found.payloads or found.damaged
        status.carries_status(raw, AUTHSERV)
        assert not status.carries_status(status.strip_forged(raw, AUTHSERV), AUTHSERV)


@pytest.mark.parametrize("shape", SHAPES, ids=repr)
def test_header_of_a_part(shape: bytes) -> None:
    part = b"--b\r\nContent-Type: text/plain; " + fill(shape, MAX_PART_HEADER_BYTES - 100) + SEALED + b"\r\n"
    raw = b'Content-Type: multipart/mixed; boundary="b"\r\n\r\n' + part * 100
    assert parts_or_limit(raw)


@pytest.mark.parametrize("shape", SHAPES, ids=repr)
def test_header_of_an_original(shape: bytes) -> None:
    """The original of a stranger, and what a client submits."""
    for lead in (b"", b"From: ", b"Received: ", b"References: <", b"To: ", b"Message-ID: <"):
        raw = lead + fill(shape, HEADER) + b"\r\n\r\n"
        read_inner(raw)
        quoted_spans(raw)
        mask(raw)
        strip_for(raw)
        decide_encrypted(b"Content-Type: application/pkcs7-mime; " + raw)
        for read in (header_fields, prepare, threading_ids, outer):
            with contextlib.suppress(FormatError, MailLoop):
                read(raw)


def outer(raw: bytes) -> object:
    raw = b"From: a@a.example\r\n" + raw
    return outer_headers(raw, sent_at_ms=0, sender_domain="a.example", received=b"", known_outer_ids={})


def parts_or_limit(raw: bytes) -> FoundParts | str | None:
    try:
        return find_parts(raw)
    except Unreadable as error:
        return error.reason


@pytest.mark.parametrize("tail", [
    b'"' + b'\\"' * (MAX_MANIFEST_BYTES // 2), b'"' + b"\\" * MAX_MANIFEST_BYTES, b'"' * MAX_MANIFEST_BYTES,
    b'"a":' * (MAX_MANIFEST_BYTES // 4), b"9" * MAX_MANIFEST_BYTES, b"[]," * (MAX_MANIFEST_BYTES // 3),
    b"[" * MAX_MANIFEST_BYTES, b" " * MAX_MANIFEST_BYTES,
], ids=lambda tail: repr(tail[:4]))
def test_json(tail: bytes) -> None:
    """A manifest is parsed before its signature is verified."""
    data = (b'{"_":[[],[],[],[],' + tail)[:MAX_MANIFEST_BYTES]
    with pytest.raises(FormatError):
        strict_json.loads(data, max_bytes=MAX_MANIFEST_BYTES, max_depth=3)


@pytest.mark.parametrize("character", [
    "\u0300\u0316", "\u0316\u0300", "a", "\u00e9", "\u1100\u1161\u11a8", ".", "\\", "\ufdfa", '\\"',
])
def test_address(character: str) -> None:
    """Normalising a long run of combining marks is quadratic in CPython; the limit on the local part comes before it."""
    text = "a" + character * (MAX_MANIFEST_BYTES // len(character.encode()))
    for address in (f"{text}@b.example", f'"{text}"@b.example', f"a@{text}", f"{text[: len(text) // 2]}\u0316@b.example"):
        with pytest.raises(FormatError):
            canonical_address(address)
        with pytest.raises(FormatError):
            parse_mailboxes(address)


def test_marks_in_order_and_out_of_order() -> None:
    """All marks of one class, then all of another: the worst order there is to sort."""
    text = "a" + "\u0300" * 60_000 + "\u0316" * 60_000
    with pytest.raises(FormatError):
        canonical_address(f"{text}@b.example")


def test_many_boundaries() -> None:
    """Multiparts in each other with one boundary, and boundaries of one character."""
    for boundary in (b"-", b"b", b"b" * 200):
        head = b"Content-Type: multipart/mixed; boundary=" + boundary + b"\r\n\r\n"
        deep = (head + b"--" + boundary + b"\r\n") * 50 + SEALED
        wide = head + b"\n--" + boundary + (b"x\n--" + boundary) * 200_000 + SEALED
        for raw in (deep, wide):
            found = parts_or_limit(raw)
            assert not isinstance(found, FoundParts) or len(found.payloads) == 1
