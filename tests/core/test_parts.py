"""The parts are found after everything that mail does to a message, in bounded work, and only what was sealed gets out."""

from __future__ import annotations

import base64
import binascii
import contextlib
import re
from email.message import EmailMessage
from functools import lru_cache
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lab.envelope import ALICE, BOB, CAROL, Envelope, message, open_as, recipient, seal_for, unseal_as, wrap
from malote.core import parts
from malote.core.open import authenticate, unseal
from malote.core.parts import MAX_FALSE_BOUNDARIES, MAX_PARTS, find_parts, looks_sealed
from malote.errors import Unreadable


@lru_cache
def sealed() -> bytes:
    return seal_for(message(), [recipient(BOB), recipient(CAROL, "cc")]).raw


def boundary(raw: bytes) -> bytes:
    match = re.search(rb'boundary="([^"]+)"', raw)
    assert match is not None
    return match[1]


def bodies(raw: bytes) -> list[bytes]:
    """The base64 bodies of the parts, decoded: two key blobs and the sealed part."""
    found = find_parts(raw)
    assert found is not None
    return [*(blob.raw for blob in found.blobs), *(payload.raw for payload in found.payloads)]


def rewrap(raw: bytes, width: int, line_end: bytes = b"\r\n") -> bytes:
    def lines(match: re.Match[bytes]) -> bytes:
        text = match[0].replace(b"\r\n", b"")
        return line_end.join(text[at:at + width] for at in range(0, len(text), width)) + b"\r\n"

    return re.sub(rb"(?:[A-Za-z0-9+/]{76}\r\n)+[A-Za-z0-9+/=]*\r\n", lines, raw)


def quoted_text(raw: bytes) -> bytes:
    """A gateway that takes the base64 text for text and makes it quoted-printable."""
    def quote(match: re.Match[bytes]) -> bytes:
        return binascii.b2a_qp(match[0].replace(b"\r\n", b"\n"), istext=True).replace(b"\n", b"\r\n")

    text = re.sub(rb"iU1M[A-Za-z0-9+/=\r\n]*\r\n(?=--)", quote, raw)
    return text.replace(b"Content-Transfer-Encoding: base64", b"Content-Transfer-Encoding: quoted-printable")


def quoted_binary(raw: bytes) -> bytes:
    """A gateway that decodes the parts and sends the binary as quoted-printable."""
    mixed = EmailMessage()
    mixed["From"] = "alice@a.example"
    text = b"Content-Type: application/octet-stream\r\nContent-Transfer-Encoding: quoted-printable\r\n\r\n"
    pieces = [b"--b\r\n" + text + binascii.b2a_qp(body, istext=False).replace(b"\n", b"\r\n") + b"\r\n" for body in bodies(raw)]
    return b"From: a\r\nContent-Type: multipart/mixed; boundary=b\r\n\r\n" + b"".join(pieces) + b"--b--\r\n"


def binary(raw: bytes) -> bytes:
    text = b"Content-Type: application/octet-stream\r\nContent-Transfer-Encoding: binary\r\n\r\n"
    pieces = [b"--b\r\n" + text + body + b"\r\n" for body in bodies(raw)]
    return b"From: a\r\nContent-Type: multipart/mixed; boundary=b\r\n\r\n" + b"".join(pieces) + b"--b--\r\n"


def swapped(raw: bytes) -> bytes:
    mark = b"--" + boundary(raw) + b"\r\n"
    head, note, first, second, last = raw.split(mark)
    last, end = last.split(b"--" + boundary(raw) + b"--")
    return mark.join([head, last, second, note, first]) + b"--" + boundary(raw) + b"--" + end


def footer(raw: bytes) -> bytes:
    """What Mailman does to a multipart: a new multipart/mixed around it, and its footer as a part."""
    header, _, body = raw.partition(b"\r\n\r\n")
    inner = b"\r\n".join(line for line in header.split(b"\r\n") if line.startswith(b"Content-Type"))
    outer = b"\r\n".join(line for line in header.split(b"\r\n") if not line.startswith(b"Content-Type"))
    return (outer + b'\r\nContent-Type: multipart/mixed; boundary="list"\r\n\r\n--list\r\n' + inner + b"\r\n\r\n" + body +
            b"\r\n--list\r\nContent-Type: text/plain\r\n\r\n____\r\nlist@lists.example\r\n--list--\r\n")


def exchange(raw: bytes) -> bytes:
    """Types, names and header rewritten, an HTML part added, and other case and quoting."""
    mark = b"--" + boundary(raw)
    name = b'application/octet-stream;\r\n\tname="ATT00001.bin"'
    raw = re.sub(rb"application/vnd\.malote\.[a-z-]+(; kid=[0-9a-f]+)?", name, raw)
    raw = re.sub(rb'filename="[^"]*"', b'filename="ATT00001.bin"', raw)
    raw = raw.replace(b"Content-Type: multipart/mixed; b", b"content-type: MULTIPART/Mixed;\r\n  charset=x ;\r\n\tB")
    return raw.replace(mark, mark + b"\r\nContent-Type: text/html\r\n\r\n<html>sealed</html>\r\n" + mark, 1)


def protected(raw: bytes) -> bytes:
    """multipart/encrypted with the parts somewhere inside, as a program might build it that knows RFC 1847."""
    return raw.replace(b"multipart/mixed;", b'multipart/encrypted; protocol="application/vnd.malote";')


MANGLED: dict[str, Any] = {
    "as sent": lambda raw: raw,
    "LF": lambda raw: raw.replace(b"\r\n", b"\n"),
    "60 characters": lambda raw: rewrap(raw, 60),
    "72 characters": lambda raw: rewrap(raw, 72),
    "one line": lambda raw: rewrap(raw, 10**9),
    "blank lines between": lambda raw: rewrap(raw, 60, b"\r\n\r\n"),
    "trailing spaces": lambda raw: raw.replace(b"\r\n", b" \r\n").replace(b" \r\n \r\n", b"\r\n\r\n"),
    "quoted-printable text": quoted_text,
    "quoted-printable binary": quoted_binary,
    "binary": binary,
    "parts swapped": swapped,
    "list footer": footer,
    "list footer twice": lambda raw: footer(footer(raw).replace(b"list", b"tsil")),
    "Exchange": exchange,
    "encrypted": protected,
    "preamble and epilogue": lambda raw: raw.replace(b"\r\n\r\n--", b"\r\n\r\nMIME.\r\n--", 1) + b"\r\n-- \r\nscanned by us\r\n",
    "no closing boundary": lambda raw: raw[:raw.rindex(b"--" + boundary(raw))],
    "header fields around": lambda raw: b"Received: x\r\n" * 300 + b"DKIM-Signature: y;\r\n\tb=z\r\n" + raw,
    "token boundary": lambda raw: raw.replace(b'"' + boundary(raw) + b'"', b"abc").replace(boundary(raw), b"abc"),
    "RFC 2231 boundary": lambda raw: raw.replace(b'boundary="=_mlt_', b'boundary*0="=_mlt_";\r\n boundary*1="'),
    "comment in type": lambda raw: raw.replace(b"multipart/mixed; b", b"multipart/mixed ; b"),
    "mbox escape": lambda raw: b"From alice Mon Sep 21 14:13:20 2026\r\n" + raw,
}


@pytest.mark.parametrize("name", MANGLED)
def test_opens_after(name: str) -> None:
    opened = open_as(MANGLED[name](sealed()), BOB)
    assert (opened.original, opened.signature, opened.addressed) == (message(), "valid", True)
    assert not opened.unsealed.forwarded


def as_attachment(raw: bytes) -> bytes:
    return (b"From: mallory@m.example\r\nContent-Type: multipart/mixed; boundary=f\r\n\r\n--f\r\n\r\nsee below\r\n--f\r\n"
            b"Content-Type: message/rfc822\r\n\r\n" + raw + b"\r\n--f--\r\n")


def encoded(encoding: bytes, body: bytes) -> bytes:
    header = b"message/rfc822\r\nContent-Transfer-Encoding: " + encoding + b"\r\n\r\n"
    return as_attachment(b"").replace(b"message/rfc822\r\n\r\n", header + body)


@pytest.mark.parametrize("encode", [
    as_attachment,
    lambda raw: footer(as_attachment(raw)),
    lambda raw: encoded(b"base64", base64.encodebytes(raw)),
    lambda raw: encoded(b"quoted-printable", binascii.b2a_qp(raw)),
    lambda raw: as_attachment(raw).replace(b"multipart/mixed; boundary=f", b"multipart/report; boundary=f"),
])
def test_below_an_attached_message_it_is_forwarded(encode: Any) -> None:
    """A bounce or a forward is not the arrival of the message: it must not touch what was seen."""
    raw = encode(sealed())
    found = find_parts(raw)
    assert found is not None
    assert found.forwarded
    unsealed = unseal_as(raw, BOB)
    assert unsealed.forwarded
    assert authenticate(unsealed, ALICE.card).original == message()


def test_a_part_at_the_top_counts_before_a_forwarded_one() -> None:
    mine = seal_for(message("at the top"), [recipient(BOB)]).raw
    top = b"From: a\r\nContent-Type: multipart/mixed; boundary=f\r\n\r\n--f\r\nContent-Type: message/rfc822\r\n\r\n"
    both = b"".join([top, sealed(), b"\r\n--f\r\n", mine[mine.index(b"MIME-Version"):], b"\r\n--f--\r\n"])
    opened = open_as(both, BOB)
    assert opened.original == message("at the top")
    assert not opened.unsealed.forwarded


def test_a_forwarded_part_cannot_be_lifted_to_the_top() -> None:
    """A stray blob or a damaged part of ours outside does not make an attached message an arrival."""
    blob = b"Content-Type: x/y\r\nContent-Transfer-Encoding: base64\r\n\r\n" + base64.encodebytes(bodies(sealed())[0])
    for stray in (blob, blob[:300] + b"!" + blob[300:]):
        raw = as_attachment(sealed()).replace(b"see below", b"see below\r\n--f\r\n" + stray)
        found = find_parts(raw)
        assert found is not None
        assert not found.forwarded
        with pytest.raises(Unreadable):
            unseal_as(raw, BOB)


def test_a_damaged_part_in_an_attached_message_is_no_matter() -> None:
    raw = sealed()
    at = raw.rindex(b"iU1M") + 300
    broken = as_attachment(raw[:at] + b"!" + raw[at:])
    found = find_parts(broken)
    assert found is not None
    assert found.forwarded
    assert open_as(broken.replace(b"see below", b"\r\n--f\r\n" + raw[raw.index(b"MIME"):]), BOB).addressed


@pytest.mark.parametrize("position", [100, 700])
@pytest.mark.parametrize("text", [b"!", b"<b>", b"-- \r\nfooter\r\n", b"=", b"\0", b"\xff", b".", b"==AAAA"])
def test_text_put_into_a_base64_body_is_refused(position: int, text: bytes) -> None:
    """A decoder that skips what is not base64 would let anybody put bytes inside; here the part is damaged."""
    raw = sealed()
    at = raw.rindex(b"iU1M") + position
    with pytest.raises(Unreadable):
        unseal_as(raw[:at] + text + raw[at:], BOB)


def test_a_damaged_blob_of_another_recipient_is_no_matter() -> None:
    raw = sealed()
    at = raw.index(b"iU1M")
    assert open_as(raw[:at + 50] + b"!" + raw[at + 50:], CAROL).addressed
    with pytest.raises(Unreadable):
        unseal_as(raw[:at + 50] + b"!" + raw[at + 50:], BOB)


# --- only what was sealed gets out (EFAIL direct exfiltration, multipart/oracle, RFC 9787 6.2.2)

HTML = b'Content-Type: text/html\r\n\r\n<img src="http://x.example/'


def surrounded(raw: bytes, kind: bytes, *, depth: int = 1) -> bytes:
    header, _, body = raw.partition(b"\r\n\r\n")
    inner = header[header.index(b"Content-Type"):header.index(b"\r\nMalote")] + b"\r\n\r\n" + body
    for level in range(depth):
        head = b"Content-Type: multipart/%b; boundary=x%d\r\n\r\n" % (kind, level)
        mark = b"\r\n--x%d\r\n" % level
        inner = mark.join([head, HTML, inner, b"Content-Type: text/html\r\n\r\n\">"]) + b"\r\n--x%d--\r\n" % level
    return b"From: mallory@m.example\r\nTo: bob@b.example\r\nMIME-Version: 1.0\r\n" + inner


@pytest.mark.parametrize("kind", [b"mixed", b"related", b"alternative", b"signed", b"report", b"encrypted", b"unheard-of"])
@pytest.mark.parametrize("depth", [1, 3])
def test_nothing_around_the_sealed_part_gets_out(kind: bytes, depth: int) -> None:
    opened = open_as(surrounded(sealed(), kind, depth=depth), BOB)
    assert opened.original == message()
    assert b"x.example" not in opened.original


def test_html_around_each_part() -> None:
    raw = sealed()
    mark = b"--" + boundary(raw) + b"\r\n"
    assert open_as(raw.replace(mark, mark + HTML + b"\r\n" + mark), BOB).original == message()


# --- nothing sealed

@pytest.mark.parametrize("raw", [
    b"", b"\r\n", b"\0", message(), b"Malote: 1\r\n\r\nno parts", b"Content-Type: message/rfc822\r\n\r\n",
    b"Content-Type: multipart/mixed; boundary=\r\n\r\n--\r\n", b"Content-Type: multipart/mixed; boundary*0=\r\n\r\n",
    b"Content-Type: application/vnd.malote.sealed\r\n\r\nnothing", b"Content-Type: message/rfc822",
    b"Content-Type: multipart/mixed; boundary=b\r\n\r\n--b\r\n--b\r\n\r\n--b",
    b"Content-Type: text/plain\r\n\r\niU1MUA0KGg but that is not all of it".replace(b"iU1MUA", b"iU1MUB"),
])
def test_ordinary_mail_is_none_of_ours(raw: bytes) -> None:
    assert find_parts(raw) is None


def test_parts_without_their_other_half_are_unreadable() -> None:
    envelope = Envelope(message()).add(BOB)
    halves = [([], envelope.payload()), (envelope.parts, b"nothing of ours"), (envelope.parts, b"\x89MLP\r\n\x1a\n")]
    for blobs, sealed_part in halves:
        found = find_parts(wrap(blobs, sealed_part))
        assert found is not None
        with pytest.raises(Unreadable):
            unseal(found, [(BOB.address, BOB.decryption[0])])


@pytest.mark.parametrize(("prefix", "sealed_part"), [
    (b"\x89MLP\r\n\x1a\n\1\0\1\0", True), (b"\x89MLK\r\n\x1a\n\1", True), (b"iU1MUA0KGgoBAAEA", True),
    (b"iU1M\r\nSw0KGgoB", True), (b"", False), (b"\x89PNG\r\n\x1a\n", False), (b"iVBORw0KGgo", False), (b"\x89ML", False),
])
def test_attachments_are_known_by_their_first_bytes(prefix: bytes, sealed_part: bool) -> None:
    assert looks_sealed(prefix) is sealed_part


# --- limits and work

def with_blob_behind(mime: bytes) -> bytes:
    """The hostile tree as a first part, a key blob as the second."""
    blob = b"Content-Transfer-Encoding: base64\r\n\r\n" + base64.encodebytes(Envelope(b"").add(BOB).parts[0][1])
    return b"Content-Type: multipart/mixed; boundary=top\r\n\r\n--top\r\n" + blob + b"\r\n--top\r\n" + mime + b"\r\n--top--"


def nested(depth: int, kind: bytes = b"multipart/mixed; boundary=") -> bytes:
    return b"".join(b"Content-Type: " + kind + b"n%d\r\n\r\n--n%d\r\n" % (n, n) for n in range(depth))


HOSTILE = {
    "100,000 parts": b"Content-Type: multipart/mixed; boundary=b\r\n\r\n" + b"--b\r\n\r\n" * 100_000,
    "10,000 deep": nested(10_000),
    "10,000 messages deep": b"Content-Type: message/rfc822\r\n\r\n" * 10_000,
    "10 MB header": b"A: " + b"b" * 10_000_000 + b"\r\n\r\n",
    "10 MB of fields": b"Content-Type: x\r\n" * 600_000 + b"\r\n",
    "boundary of one character": b"Content-Type: multipart/mixed; boundary=-\r\n\r\n" + b"---x\r\n" * 400_000,
    "near boundaries": b"Content-Type: multipart/mixed; boundary=ab\r\n\r\n" + b"--abc\r\n" * 400_000,
    "boundary lines of spaces": b"Content-Type: multipart/mixed; boundary=ab\r\n\r\n--ab" + b" " * 5_000_000 + b"x",
    "parameters": b"Content-Type: multipart/mixed" + b'; a="' * 3000 + b"\r\n\r\n",
    "parameters without end": b"Content-Type: multipart/mixed" + b"; a=b" * 3000 + b"\r\n\r\n",
    "backslashes": b'Content-Type: multipart/mixed; boundary="' + b"\\a" * 7000 + b'"\r\n\r\n',
    "quoted-printable": b"Content-Transfer-Encoding: quoted-printable\r\n\r\n" + b"=\r\n" * 500_000,
    "same boundary all the way": b"Content-Type: multipart/mixed; boundary=b\r\n\r\n--b\r\n" * 3000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_mime_costs_bounded_work(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work is counted, not timed: parts looked at, and bytes handed to the search for boundaries."""
    visited = 0
    searched = 0
    entity, split = parts._Search.entity, parts._Search._split

    def counted(self: Any, source: bytes, start: int, end: int, *, depth: int, forwarded: bool) -> None:
        nonlocal visited
        visited += 1
        entity(self, source, start, end, depth=depth, forwarded=forwarded)

    def measured(self: Any, source: bytes, start: int, end: int, boundary: bytes) -> Any:
        nonlocal searched
        searched += end - start
        return split(self, source, start, end, boundary)

    monkeypatch.setattr(parts._Search, "entity", counted)
    monkeypatch.setattr(parts._Search, "_split", measured)
    raw = HOSTILE[name]
    with contextlib.suppress(Unreadable):
        assert find_parts(raw) is None
        find_parts(with_blob_behind(raw))
    assert visited <= 2 * (MAX_PARTS + 1)
    assert searched <= 2 * parts.MAX_DEPTH * (len(raw) + 10_000)


@pytest.mark.parametrize(("mime", "limit"), [
    (HOSTILE["100,000 parts"], "parts"), (nested(9), "depth"), (b"Content-Type: message/rfc822\r\n\r\n" * 9, "depth"),
    (b"A: " + b"b" * 20_000, "header size"), (HOSTILE["near boundaries"], "boundaries"),
])
def test_over_a_limit_with_something_sealed_is_unreadable(mime: bytes, limit: str) -> None:
    """A sealed message of which only a part was looked at must not pass for one without; an ordinary message stays one."""
    assert find_parts(mime) is None
    with pytest.raises(Unreadable) as caught:
        find_parts(with_blob_behind(mime))
    assert caught.value.reason == f"over limit: {limit}"


def test_a_hundred_recipients_and_wrappers_are_within_the_limits() -> None:
    people = [recipient(BOB, serial=n + 2, prev=n + 1) for n in range(99)] + [recipient(CAROL)]
    raw = seal_for(message(), people).raw
    assert open_as(footer(as_attachment(footer(raw.replace(b"list", b"tsil")))), CAROL).addressed
    with pytest.raises(ValueError, match="100"):
        seal_for(message(), [*people, recipient(CAROL)])


def test_false_boundaries_below_the_limit_are_text() -> None:
    mime = b"Content-Type: multipart/mixed; boundary=ab\r\n\r\n" + b"--abc\r\n" * (MAX_FALSE_BOUNDARIES // 2)
    assert find_parts(with_blob_behind(mime)) is not None


# --- nothing but Unreadable gets out

def survives(raw: bytes) -> None:
    try:
        found = find_parts(raw)
        if found is None:
            return
        opened = authenticate(unseal(found, [(BOB.address, BOB.decryption[0])]), ALICE.card)
    except Unreadable:
        return
    assert opened.original == message() or opened.signature != "valid"


FRAGMENTS = st.sampled_from([
    b"\r\n", b"\n", b"\r\n\r\n", b"--b", b"--b\r\n", b"--b--\r\n", b"--", b";", b'"', b"\\", b"=", b"boundary*0=b", b"kid=",
    b"Content-Type: multipart/mixed; boundary=b\r\n", b"Content-Type: message/rfc822\r\n", b"Content-Type: text/plain", b"AAAA",
    b"Content-Transfer-Encoding: base64\r\n", b"Content-Transfer-Encoding: quoted-printable\r\n", b"iU1MUA0KGgo", b"iU1MSw0KGgo",
    b"\x89MLP\r\n\x1a\n", b"\x89MLK\r\n\x1a\n\1\0\1",
])


@given(st.lists(st.one_of(FRAGMENTS, st.binary(max_size=8)), max_size=40).map(b"".join))
@settings(max_examples=500, deadline=None)
def test_any_text_is_found_refused_or_not_ours(raw: bytes) -> None:
    survives(raw)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_mutations_of_a_sealed_message(data: st.DataObject) -> None:
    mutate(data)


@pytest.mark.long
@pytest.mark.timeout(1200)
@given(st.data())
@settings(max_examples=30_000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_many_mutations_of_a_sealed_message(data: st.DataObject) -> None:
    mutate(data)


def mutate(data: st.DataObject) -> None:
    """Cut, repeated, swapped and overwritten pieces of a genuine message."""
    raw = sealed()
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(raw)))
        end = min(len(raw), start + data.draw(st.integers(0, 400)))
        target = data.draw(st.integers(0, len(raw)))
        piece = data.draw(st.one_of(st.just(raw[start:end]), FRAGMENTS, st.binary(max_size=5)))
        raw = data.draw(st.sampled_from([
            raw[:target] + piece + raw[target:], raw[:start] + raw[end:], raw[:start] + piece + raw[end:],
        ]))
    survives(raw)


@given(st.binary(max_size=5000))
@settings(max_examples=200, deadline=None)
def test_any_container_under_a_good_key_is_refused_or_opened(container: bytes) -> None:
    """Whoever knows Bob's public key can make this one: the parsers behind the decryption see any bytes."""
    envelope = Envelope(message()).add(BOB)
    survives(envelope.raw(envelope.encrypt(container)))
    survives(envelope.raw(envelope.encrypt(container.ljust(4096, b"\0"))))


NAMES = st.sampled_from(["v", "id", "from", "sent", "enc", "size", "sha512", "mid", "rcpt", "outer", "exp", "scope", "_x"])
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.just("fold+deflate")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=5,
)


@given(st.dictionaries(NAMES, JSON, max_size=4))
@settings(max_examples=200, deadline=None)
def test_any_manifest_under_a_good_signature_is_refused_or_opened(members: dict[str, Any]) -> None:
    envelope = Envelope(message()).add(BOB)
    envelope.members |= members
    try:
        raw = envelope.raw()
    except UnicodeEncodeError:      # half a surrogate pair: not a manifest that could be written
        return
    survives_signed(raw)


def survives_signed(raw: bytes) -> None:
    with contextlib.suppress(Unreadable):
        assert open_as(raw, BOB).original == message()
