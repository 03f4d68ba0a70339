"""The original: exactly the submitted bytes after exactly the edits of the design, and one author."""

from __future__ import annotations

import re
from datetime import datetime
from email.utils import parsedate_to_datetime
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from malote.core.message import (
    MAX_HEADER_BYTES,
    MAX_HEADER_FIELDS,
    MAX_HOPS,
    complete,
    fold_field,
    format_date,
    header_fields,
    mask,
    prepare,
    quoted_spans,
    split_header,
    unfold,
)
from malote.errors import FormatError, MailLoop

BASE = (
    b"From: Alice <alice@a.example>\r\nTo: bob@b.example\r\nDate: Tue, 24 Nov 2026 10:00:00 +0100\r\n"
    b"Message-ID: <m@a.example>\r\n"
)
BODY = b"\r\nBcc: this is text\r\n\r\nSecond paragraph.\r\n"


def original(raw: bytes) -> bytes:
    return complete(prepare(raw), date_ms=0, message_id="<new@a.example>")


@pytest.mark.parametrize("field", [
    b"Bcc: secret@c.example\r\n",
    b"bCC :\r\n secret@c.example,\r\n\tother@c.example\r\n",             # folded, mixed case, space before the colon
    b"BCC\t: secret@c.example\r\n",
    b"Bcc\r\n : secret@c.example\r\n",                                    # folded before the colon
    b"Bcc:\r\n",
    b"Bcc: a@c.example\r\nBCC: b@c.example\r\n",
    b"Resent-Bcc: secret@c.example\r\n",
    b"Return-Path: <alice@a.example>\r\n",
    b"Malote-Seal: yes\r\n",
    b"Malote-Verdict: FRESH; forged\r\nMALOTE-MARK: 1\r\n",
])
@pytest.mark.parametrize("line_end", [b"\r\n", b"\n"])
def test_removed_wherever_it_stands(field: bytes, line_end: bytes) -> None:
    """Bcc and our control fields are gone from every place, and not a byte around them has changed."""
    lines = BASE.splitlines(keepends=True)
    for place in range(len(lines) + 1):
        raw = b"".join([*lines[:place], field, *lines[place:], BODY]).replace(b"\r\n", line_end)
        assert original(raw) == (BASE + BODY).replace(b"\r\n", line_end)


@pytest.mark.parametrize("field", [
    b"X-Bcc: a@c.example\r\n", b"Bcc-Self: no\r\n", b"Malote-Key: fp=1\r\n", b"Malote: 1\r\n", b"Subject: Bcc:\r\n Bcc: x\r\n",
    b"X-Odd: \xff\xfe 8 bit \r\n", b"x-lower:no space\r\n", b"Comments:  two  spaces \t\r\n",
])
def test_everything_else_stays(field: bytes) -> None:
    """What is not on the list is kept byte for byte, whatever it looks like."""
    raw = field + BASE + BODY
    assert original(raw) == raw
    assert original(raw) is raw, "an unchanged message is not copied"


@pytest.mark.parametrize(("raw", "date", "message_id"), [
    (b"From: alice@a.example\r\n\r\nx", True, True),
    (b"From: alice@a.example\r\ndate: x\r\n\r\nx", False, True),
    (b"From: alice@a.example\r\nMESSAGE-ID : <x@y>\r\n\r\nx", True, False),
    (b"From: alice@a.example\nBcc: x\n\nx", True, True),
    (b"From: alice@a.example\r\n", True, True),             # no empty line, no body
    (b"From: alice@a.example", True, True),                 # not even a line end
    (b"From: alice@a.example\r\nMessage-ID:\r\n\r\n", True, True),
])
def test_additions(raw: bytes, date: bool, message_id: bool) -> None:
    """Date and Message-ID come on top, only where missing, in the message's own line ends; the rest follows unchanged."""
    prepared = prepare(raw)
    assert (prepared.needs_date, prepared.needs_message_id) == (date, message_id)
    line_end = b"\r\n" if b"\r\n" in raw or b"\n" not in raw else b"\n"
    added = (b"Date: Thu, 01 Jan 1970 00:00:00 +0000" + line_end) * date
    added += (b"Message-ID: <new@a.example>" + line_end) * message_id
    assert original(raw) == added + prepared.stripped
    assert prepared.stripped == raw.replace(b"Bcc: x\n", b"")


def test_a_retry_rebuilds_the_same_original() -> None:
    """What the journal hashes is without the additions, which come from the journal: the same submission, the same bytes."""
    raw = b"From: alice@a.example\r\nBcc: x@c.example\r\n\r\nbody"
    first, again = prepare(raw), prepare(bytearray(raw))
    assert b"".join(first.stripped_parts) == first.stripped == again.stripped == b"From: alice@a.example\r\n\r\nbody"
    assert complete(first, date_ms=5, message_id="<i@a>") == complete(again, date_ms=5, message_id="<i@a>")


def test_the_body_is_copied_once() -> None:
    """A large body is a view until the original is put together."""
    raw = b"From: alice@a.example\r\nBcc: x@c.example\r\n\r\n" + b"x" * 1_000_000
    parts = prepare(raw).stripped_parts
    assert isinstance(parts[1], memoryview)
    assert parts[1].obj is raw


@pytest.mark.parametrize(("header", "text"), [
    (b"To: bob@b.example\r\n", "has no From"),
    (b"", "has no From"),
    (b"From: a@a.example\r\nfrom : b@a.example\r\n", "has 2 From fields"),
    (b"From: a@a.example, b@a.example\r\n", "names 2 mailboxes"),
    (b"From: a@a.example,\r\n", "is a list"),
    (b"From: Team: a@a.example;\r\n", "names a group"),
    (b"From: Team:;\r\n", "names a group"),
    (b"From:\r\n", "names 0 mailboxes"),
    (b"From: alice\r\n", "is not an address"),
    (b"From: alice@a.example <x\r\n", "is not an address"),
    (b"From: \"alice@a.example\" bob@b.example\r\n", "is not an address"),
    (b"From: a@a.example\r\nMalote-Seal: maybe\r\n", "yes or no"),
    (b"From: a@a.example\r\nMalote-Seal: yes\r\nMALOTE-SEAL: no\r\n", "yes or no"),
    (b"From: a@a.example\r\nSubject: x\ry\r\n", "bare CR"),
    (b"From: a@a.example\r\nSubject: x\0\r\n", "NUL"),
    (b" From: a@a.example\r\n", "middle of a field"),
    (b"From a@a.example Tue Nov 24 10:00:00 2026\r\nFrom: a@a.example\r\n", "Field 1"),
    (b"From: a@a.example\r\nHello there\r\nBcc: x@c.example\r\n", "Field 2"),
])
def test_refused_with_a_clear_text(header: bytes, text: str) -> None:
    """Who wrote it must be one person in every reader's eyes. The reply says what is wrong, and that nothing was sent."""
    with pytest.raises(FormatError, match=text) as caught:
        prepare(header + b"\r\nsecret body\r\n")
    assert caught.value.reply.code == 554
    assert "nothing was sent" in caught.value.reply.text
    assert "secret" not in caught.value.reply.text


@pytest.mark.parametrize(("header", "address"), [
    (b"From: Alice <ALICE@A.Example>\r\n", "alice@a.example"),
    (b"From:\r\n =?utf-8?q?bob=40b.example?= <alice@a.example> (bob@b.example; no)\r\n", "alice@a.example"),
    (b"From: \"bob@b.example; a group: no;\" <alice@a.example>\r\n", "alice@a.example"),
    (b"From: J\xf6rg <j@a.example>\r\n", "j@a.example"),
])
def test_one_author(header: bytes, address: str) -> None:
    assert prepare(header + b"\r\n").from_address == address


def test_who_is_visible() -> None:
    """To, Cc and their Resent forms, and nobody else; what cannot be read names nobody, so its recipients get copies alone."""
    raw = (
        b"From: a@a.example\r\nTo: Bob <BOB@b.example>,\r\n carol@c.example\r\nCC: Team: dave@d.example;\r\nTo: eve@e.example\r\n"
        b"Resent-To: frank@f.example\r\nResent-Cc: grace@g.example\r\nBcc: secret@c.example\r\nReply-To: no@r.example\r\n\r\n"
    )
    assert prepare(raw).to_cc == {f"{who}@{who[0]}.example" for who in ("bob", "carol", "dave", "eve", "frank", "grace")}
    assert prepare(b"From: a@a.example\r\nTo: broken, <\r\nCc: bob@b.example\r\n\r\n").to_cc == {"bob@b.example"}
    assert prepare(b"From: a@a.example\r\nTo: undisclosed-recipients:;\r\n\r\n").to_cc == frozenset()


@pytest.mark.parametrize(("value", "control"), [(b" yes", "yes"), (b"NO ", "no"), (b"\r\n\tYes", "yes")])
def test_control(value: bytes, control: str) -> None:
    assert prepare(b"From: a@a.example\r\nMalote-Seal:" + value + b"\r\n\r\n").controls == control
    assert prepare(b"From: a@a.example\r\n\r\nMalote-Seal: no\r\n").controls is None


def test_loops_end() -> None:
    """A loop through us is seen: Received lines stay and are counted."""
    raw = b"From: a@a.example\r\n\r\n"
    assert prepare(b"Received: x\r\n" * MAX_HOPS + raw).hops == MAX_HOPS
    with pytest.raises(MailLoop):
        prepare(b"received : x\r\n" * (MAX_HOPS + 1) + raw)


def test_limits() -> None:
    """A hostile header is refused before it costs anything."""
    with pytest.raises(FormatError, match="longer than"):
        header_fields(b"X: " + b"x" * MAX_HEADER_BYTES + b"\r\n\r\n")
    with pytest.raises(FormatError, match="more than"):
        header_fields(b"X:\r\n" * (MAX_HEADER_FIELDS + 1) + b"\r\n")
    assert len(header_fields(b"X:\r\n" * MAX_HEADER_FIELDS + b"\r\n")) == MAX_HEADER_FIELDS


@pytest.mark.parametrize(("raw", "header", "body"), [
    (b"A: b\r\n\r\nbody", b"A: b\r\n", b"body"),
    (b"A: b\n\nbody", b"A: b\n", b"body"),
    (b"A: b\n\r\nbody\r\n\r\n", b"A: b\n", b"body\r\n\r\n"),
    (b"A: b\r\n \r\n\r\nbody", b"A: b\r\n \r\n", b"body"),      # a line of white space continues the field
    (b"\r\nbody", b"", b"body"),
    (b"\nbody", b"", b"body"),
    (b"", b"", b""),
    (b"A: b", b"A: b", b""),
    (b"A: b\r\n", b"A: b\r\n", b""),
])
def test_where_the_header_ends(raw: bytes, header: bytes, body: bytes) -> None:
    found, offset = split_header(raw)
    assert (found, raw[offset:]) == (header, body)
    assert split_header(memoryview(raw)) == (found, offset)


@given(st.binary(max_size=300) | st.text("ABc: \t\r\n<@>\0", max_size=120).map(str.encode))
def test_fields_are_the_header(raw: bytes) -> None:
    """Any bytes: the fields in a row are the header, or there is a `FormatError`; no other exception."""
    header, _ = split_header(raw)
    assert b"".join(field.raw for field in header_fields(raw)) == header
    assert raw.startswith(header)
    try:
        prepared = prepare(raw)
    except FormatError:
        return
    assert not re.search(rb"(?im)^(resent-)?bcc[ \t]*:", split_header(original(raw))[0])
    assert prepared.stripped.endswith(raw[len(header):])


@given(st.lists(st.sampled_from([
    b"Bcc: x\r\n", b"To: bob@b.example\r\n", b"X: y\r\n z\r\n", b"Resent-Bcc:\r\n\tx\r\n", b"Malote-Mark: x\r\n",
    b"Cc: c@c.example\r\n",
]), max_size=8), st.binary(max_size=60))
def test_edits_are_idempotent(fields: list[bytes], body: bytes) -> None:
    """An original prepared again is itself: forwarding through two of us changes nothing."""
    once = original(b"From: a@a.example\r\n" + b"".join(fields) + b"\r\n" + body)
    assert original(once) == once


@pytest.mark.parametrize("at_ms", [0, 951_826_200_000, 1_795_000_000_999, 4_102_444_799_000])
def test_dates_are_those_of_the_standard_library(at_ms: int) -> None:
    parsed: datetime = parsedate_to_datetime(format_date(at_ms))
    assert int(parsed.timestamp()) == at_ms // 1000


def test_dates_that_no_calendar_holds() -> None:
    with pytest.raises(FormatError):
        format_date(2**62)


@pytest.mark.parametrize("message_id", [
    "", "x@y", "<x>", "<x@y>\r\nBcc: z", "<x@y>\n", "<x@y> ", "<x y@z>", "<" + "x" * 1000 + "@y>", "<ü@y>",
])
def test_only_a_message_id_is_added(message_id: str) -> None:
    with pytest.raises(FormatError):
        complete(prepare(b"From: a@a.example\r\n\r\n"), date_ms=0, message_id=message_id)


@pytest.mark.parametrize(("value", "masked"), [
    (b"a (b (c) \\) d) e", b"a              e"),
    (b'a "b (c" d', b"a ______ d"),
    (b'(a "b) c" d', b"       c___"),      # a quote in a comment quotes nothing
    (b'x "a\\"b" y', b"x ______ y"),
    (b"x (never closed", b"x              "),
    (b'x "never closed', b"x _____________"),
    (b"plain", b"plain"),
])
def test_mask(value: bytes, masked: bytes) -> None:
    """Structure without what comments and quoted strings say, at the same places."""
    assert mask(value) == masked
    assert len(mask(value)) == len(value)


@given(st.text('()"\\ ab;', max_size=40).map(str.encode))
def test_spans_are_in_order(value: bytes) -> None:
    spans = quoted_spans(value)
    assert all(start < end for start, end, _ in spans)
    assert all(first[1] <= second[0] for first, second in pairwise(spans))


@given(st.lists(st.text(st.characters(min_codepoint=33, max_codepoint=0x2FF), min_size=1, max_size=90).filter(str.isprintable),
                min_size=1, max_size=20))
def test_folding_is_undone_by_unfolding(words: list[str]) -> None:
    """Folded fields say what was put in, in lines of 78 where words allow, each beginning with a space."""
    raw = fold_field("Name", words)
    assert unfold(raw.removeprefix(b"Name:")) == " ".join(words).encode().strip(b" \t\r\n")
    for line in raw[:-2].split(b"\r\n"):
        assert len(line.decode()) <= max(78, 6 + max(map(len, words)))


@pytest.mark.parametrize("word", ["a\r\nBcc: x", "a\nb", "a\0", "a\u2028b", "a\x85b", "\ud800", "x" * 1000])
def test_nothing_unprintable_is_folded_in(word: str) -> None:
    """The last gate against header injection."""
    with pytest.raises(FormatError):
        fold_field("Name", ["fine", word])


@pytest.mark.parametrize("hostile", [
    b"(" * 200_000, b'"' * 200_000, b"\\" * 200_000, b"(\\" * 100_000, b" \r\n" * 100_000, b"\n " * 100_000, b":" * 200_000,
])
def test_hostile_headers_take_linear_time(hostile: bytes) -> None:
    """Quadratic time would run into the test's timeout; the limit on the header alone would not save us."""
    mask(hostile)
    for raw in (b"From: " + hostile + b"\r\n\r\n", b"X: " + hostile + b"\r\nFrom: a@a.example\r\n\r\n", hostile):
        try:
            prepare(raw)
        except FormatError:
            continue
