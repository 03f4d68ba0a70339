"""A verdict that we did not write is never believed, and never delivered as if we had."""

from __future__ import annotations

import email
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from malote.core.address import canonical_address
from malote.core.freshness import GAP, SERVER_CLOCK, Judgement, Verdict
from malote.core.message import LINE_LIMIT, header_fields, split_header, unfold
from malote.core.status import (
    MAX_SENTENCE,
    carries_status,
    check_delivered,
    check_verdict_header,
    deliverable,
    delivered_content,
    make_headers,
    make_verdict_header,
    message_hash,
    strip_forged,
)
from malote.errors import FormatError

KEY, OTHER = b"k" * 32, b"o" * 32
ID = "malote-" + "0123456789abcdef" * 2
MARK = "ab" * 16 + "-" + "cd" * 8
JUDGEMENT = Judgement(Verdict.FRESH, (GAP, SERVER_CLOCK))
TEXT = "Verified: from alice@a.example to bob@b.example; sent 2026-11-24 10:00 UTC, arrived 2026-11-24 10:01 UTC."
CONTENT = b"From: alice@a.example\r\nReceived: inner\r\nSubject: hello\r\n\r\nText\r\n.\r\n\r\nmore\r\n"
TRACE = [b"Received: from a\r\n\tby b; today\r\n", b"Received: from c by a; today\r\n"]


def delivered(content: bytes = CONTENT, judgement: Judgement = JUDGEMENT, text: str = TEXT) -> bytes:
    return deliverable(content, TRACE, make_headers(KEY, ID, judgement, text, MARK, content, TRACE))


def test_what_is_delivered() -> None:
    """The outer trace, our three headers, the original as it is; and it verifies, also with other line ends."""
    raw = delivered()
    assert raw.startswith(b"".join(TRACE) + b"Malote-Verdict: FRESH; notes=GAP,SERVER-CLOCK; text=")
    assert raw.endswith(CONTENT)
    assert delivered_content(raw) == CONTENT
    assert check_delivered(KEY, raw)
    assert check_delivered(KEY, raw.replace(b"\r\n", b"\n"))
    parsed = email.message_from_bytes(raw)
    assert parsed["Malote-Mark"] == MARK
    assert unfold(parsed["Authentication-Results"].encode()) == f"{ID}; x-malote=pass reason=FRESH".encode()
    assert max(map(len, raw.split(b"\r\n"))) <= 78 + len("mac=") + 64


@pytest.mark.parametrize("verdict", list(Verdict))
def test_every_verdict_verifies(verdict: Verdict) -> None:
    """And only FRESH says pass to programs that read Authentication-Results."""
    raw = delivered(judgement=replace(JUDGEMENT, verdict=verdict, notes=()))
    assert check_delivered(KEY, raw)
    assert (b"x-malote=pass" in raw) == (verdict is Verdict.FRESH)


def test_another_key_is_not_ours() -> None:
    assert not check_delivered(OTHER, delivered())


def test_any_change_fails() -> None:
    """Every byte of our headers and of the message, changed in turn, unless the change is only a line end or case of a name."""
    raw = delivered()
    for at in range(len(raw)):
        for change in (1, 0x20):
            changed = raw[:at] + bytes([raw[at] ^ change]) + raw[at + 1:]
            if _same_fields(changed, raw):
                continue
            assert not check_delivered(KEY, changed), changed[at - 20:at + 20]


def _same_fields(changed: bytes, raw: bytes) -> bool:
    """The case of a field name says nothing."""
    one, other = (
        ([(field.name, unfold(field.raw_value)) for field in header_fields(data)], data[split_header(data)[1]:])
        for data in (changed, raw)
    )
    return one == other


@pytest.mark.parametrize("change", [
    lambda raw: b"From: mallory@m.example\r\n" + raw,                       # a field above that people would see
    # sent in again, perhaps by somebody to whom it was forwarded whole: mail servers put their trace on top
    lambda raw: b"Return-Path: <mallory@m.example>\r\n" + raw,
    lambda raw: b"Received: from m by b; today\r\n" + raw,
    lambda raw: raw.removeprefix(TRACE[0]),
    lambda raw: b"\r\n" + raw,
    lambda raw: b"Malote-Verdict: LATE\r\n" + raw,                          # a second verdict, above
    lambda raw: raw.replace(b"\r\n\r\n", b"\r\nMalote-Verdict: FRESH\r\n\r\n", 1),    # and below
    lambda raw: raw.replace(b"\r\n\r\n", f"\r\nAuthentication-Results: {ID}; x-malote=pass\r\n\r\n".encode(), 1),
    lambda raw: raw.replace(b"Malote-Mark: ", b"X-Other: x\r\nMalote-Mark: "),
    lambda raw: raw.replace(b"Malote-Mark: ab", b"Malote-Mark: ac"),
    lambda raw: raw.replace(b"x-malote=pass", b"x-malote=fail"),
    lambda raw: raw.replace(b"FRESH; notes", b"LATE; notes"),
    lambda raw: raw.replace(b"hello", b"hullo"),
    lambda raw: raw + b"\r\n",
    lambda raw: raw[:-1],
    lambda raw: raw.replace(b"Malote-Mark", b"X-Mark"),
    lambda raw: CONTENT,
    lambda raw: b"Malote-Verdict: FRESH\r\n\r\n",
    lambda raw: b"",
])
def test_whole_changes_fail(change: object) -> None:
    assert callable(change)
    assert not check_delivered(KEY, change(delivered()))


def test_no_second_status_below_ours() -> None:
    """Not even under our own mac: what we deliver was stripped, so we never wrote such a message."""
    for field in (b"Malote-Verdict: FRESH\r\n", b"Malote-Seal: no\r\n", f"Authentication-Results: {ID}; x=pass\r\n".encode()):
        assert not check_delivered(KEY, delivered(field + CONTENT))
    assert check_delivered(KEY, delivered(b"Authentication-Results: elsewhere; x=pass\r\n" + CONTENT))


def test_a_verdict_belongs_to_its_message() -> None:
    """The headers of one message do not make another one look good."""
    headers = make_headers(KEY, ID, JUDGEMENT, TEXT, MARK, CONTENT, TRACE)
    assert not check_delivered(KEY, deliverable(CONTENT.replace(b"hello", b"other"), TRACE, headers))


@given(st.text(max_size=300), st.binary(max_size=200).map(lambda body: b"X: y\r\n\r\n" + body))
def test_any_sentence(text: str, content: bytes) -> None:
    """Whatever a sender's name puts into the sentence: printable ASCII in the header, no field more, and it verifies."""
    header = make_verdict_header(KEY, JUDGEMENT, message_hash(content), text=text, mark=MARK, authserv_id=ID)
    assert all(32 <= byte < 127 for byte in header.replace(b"\r\n", b""))
    [field] = header_fields(header + b"\r\n")
    assert check_verdict_header(KEY, field.raw_value, message_hash(content))
    assert not check_verdict_header(OTHER, field.raw_value, message_hash(content))
    assert not check_verdict_header(KEY, field.raw_value, message_hash(content + b"x"))
    assert check_delivered(KEY, delivered(content, text=text))


@pytest.mark.parametrize("local", ["a" * 255, "\u0101" * 127, "\u4e00" * 85, "\U0001f600" * 63, '"' + '\\"' * 255 + '"'])
def test_the_longest_words_fit(local: str) -> None:
    """A stranger may have any address: one too long for a line once it is escaped must not keep mail from being delivered."""
    address = canonical_address(local + "@" + ".".join(["x" * 61] * 4))
    raw = delivered(text=f"From {address}, who says {address * 3}.")
    assert max(map(len, raw.split(b"\r\n"))) <= LINE_LIMIT
    assert check_delivered(KEY, raw)
    assert raw.count(b"Malote-Verdict: ") == 1


def test_controls_are_escaped() -> None:
    """Terminal sequences, line ends, quotes and invisible characters come out as text."""
    raw = make_verdict_header(
        KEY, JUDGEMENT, message_hash(b""), text='a"\\\x1b[31m\r\nBcc: x\u2028\u202eü', mark=MARK, authserv_id=ID,
    )
    assert unfold(raw).startswith(
        b'Malote-Verdict: FRESH; notes=GAP,SERVER-CLOCK; text="a\\u{22}\\u{5c}\\u{1b}[31m Bcc: x \\u{202e}\\u{fc}"; mark='
    )
    long = make_verdict_header(KEY, JUDGEMENT, message_hash(b""), text="x " * 5000, mark=MARK, authserv_id=ID)
    assert len(long) < MAX_SENTENCE + 600


@pytest.mark.parametrize(("mark", "authserv_id"), [("a b", ID), ("a;b", ID), ("", ID), ("a", "x y"), ("a", "X;"), ("a\r\n", ID)])
def test_words_stay_words(mark: str, authserv_id: str) -> None:
    with pytest.raises(ValueError):
        make_verdict_header(KEY, JUDGEMENT, message_hash(b""), text="", mark=mark, authserv_id=authserv_id)
    with pytest.raises(FormatError):
        check_verdict_header(KEY, unfold(make_verdict_header(
            KEY, JUDGEMENT, message_hash(b""), text="", mark=MARK, authserv_id=ID).partition(b":")[2]), b"short")


FORGED = [
    b"Malote-Verdict: FRESH; mac=00\r\n",
    b"MALOTE-VERDICT : FRESH\r\n",
    b"malote-verdict\t:\r\n FRESH\r\n\tmore\r\n",
    b"Malote-Verdict\r\n : FRESH\r\n",                      # folded before the colon
    b"Malote-Seal: yes\r\n",
    b"Malote-Mark: x\r\n",
    b"Malote-Verdict: \xff\xfe\r\n",
    b"Authentication-Results: " + ID.encode() + b"; x-malote=pass\r\n",
    b"AUTHENTICATION-results :\r\n (comment) " + ID.upper().encode() + b" 1; x-malote=pass\r\n",
    b'Authentication-Results: "' + ID.encode() + b'"; x-malote=pass\r\n',
    b'Authentication-Results: "' + ID[:9].encode() + b"\\" + ID[9:].encode() + b'"; x-malote=pass\r\n',
]
KEPT = [
    b"Authentication-Results: mx.example; dkim=pass\r\n",
    b"Malote-Key: fp=1\r\n",
    b"Malote: 1\r\n",
    b"X-Malote-Verdict: FRESH\r\n",
    b"Subject: Malote-Verdict: FRESH\r\n",
    b"Comments:\r\n Malote-Verdict: FRESH\r\n",
    b"From: x@y.example\r\n",
]
NESTED = (
    b"\r\nMalote-Verdict: FRESH\r\n\r\n--b\r\nContent-Type: message/rfc822\r\n\r\nMalote-Verdict: FRESH\r\n"
    b"Authentication-Results: " + ID.encode() + b"; x-malote=pass\r\n\r\ntext\r\n"
)


@pytest.mark.parametrize("field", FORGED)
@pytest.mark.parametrize("line_end", [b"\r\n", b"\n"])
def test_forged_fields_go(field: bytes, line_end: bytes) -> None:
    """In every spelling and place at the top level; nested ones are data and stay."""
    for place in range(len(KEPT) + 1):
        raw = b"".join([*KEPT[:place], field, *KEPT[place:], NESTED]).replace(b"\r\n", line_end)
        clean = b"".join([*KEPT, NESTED]).replace(b"\r\n", line_end)
        assert carries_status(raw, ID)
        assert carries_status(split_header(raw)[0], ID)
        assert strip_forged(raw, ID) == clean
        assert not carries_status(clean, ID)
        assert strip_forged(clean, ID) is clean


def test_hidden_after_a_bare_cr() -> None:
    """Some readers end a line at a bare CR; what they would take for a field of ours goes, the field around it stays one."""
    raw = b"Subject: x\rMalote-Verdict: FRESH\r\n more\r\nTo: b@b.example\r\n\r\nbody"
    assert carries_status(raw, ID)
    assert strip_forged(raw, ID) == b"Subject: x\r\nTo: b@b.example\r\n\r\nbody"
    for before in (b"", b"To: b@b.example\r\n"):
        assert strip_forged(before + b"\rMalote-Verdict: FRESH\r\n\r\nbody", ID) == before + b"\r\nbody"


def test_no_limit_to_hide_behind() -> None:
    """A forged field at the end of a header of megabytes is found all the same."""
    raw = b"X: " + b"y" * 3_000_000 + b"\r\nMalote-Verdict: FRESH\r\n\r\nbody"
    assert carries_status(raw, ID)
    assert strip_forged(raw, ID) == raw.replace(b"Malote-Verdict: FRESH\r\n", b"")


@pytest.mark.parametrize("hostile", [
    b"\rAuthentication-Results:" * 40_000, b"Authentication-Results:\r\n " * 40_000, b"Malote-Seal:\r\n" * 60_000,
    b"Malote-Seal" + b" " * 1_000_000, b"\n " * 500_000, b"Authentication-Results" * 40_000,
])
def test_hostile_headers_take_linear_time(hostile: bytes) -> None:
    """Quadratic time would run into the test's timeout."""
    raw = b"X: y" + hostile + b"\r\n\r\nbody"
    assert not carries_status(strip_forged(raw, ID), ID)
    assert not check_delivered(KEY, raw)


lines = st.sampled_from([*FORGED, *KEPT, b"\rMalote-Mark: x\r\n", b"x\r", b"\r\r"])
fields = st.lists(lines | st.binary(max_size=30), max_size=8).map(b"".join)


@given(fields, st.binary(max_size=80))
def test_stripping_is_idempotent_and_keeps_the_body(header: bytes, body: bytes) -> None:
    """Any header: after one pass there is nothing left, and body and all other fields are untouched."""
    raw = header + b"\r\n" + body
    once = strip_forged(raw, ID)
    assert not carries_status(once, ID)
    assert strip_forged(once, ID) == once
    try:
        offset = split_header(raw)[1]
    except FormatError:
        return
    assert once.endswith(raw[offset:])


@given(fields, st.binary(max_size=80))
def test_what_is_delivered_after_stripping_verifies(header: bytes, body: bytes) -> None:
    """Whatever the original is, what we deliver of it carries one verdict, ours."""
    content = strip_forged(header + b"\r\n" + body, ID)
    raw = delivered(content)
    assert check_delivered(KEY, raw)
    assert carries_status(raw, ID)
    assert sum(field.name == "malote-verdict" for field in header_fields(raw)) == 1


def test_an_original_that_begins_in_the_middle_of_a_field() -> None:
    """It must not become part of our last header; all of it is text then."""
    raw = delivered(b" folded: x\r\nSubject: y\r\n\r\nbody")
    assert check_delivered(KEY, raw)
    assert raw.endswith(b"reason=FRESH\r\n\r\n folded: x\r\nSubject: y\r\n\r\nbody")


def test_received_lines_cannot_smuggle() -> None:
    """The outer trace is anybody's text: a line that some reader would read as two is left out."""
    trace = [b"Received: x\rMalote-Verdict: FRESH\r\n", b"Received: \0\r\n", b"Received: last"]
    headers = make_headers(KEY, ID, JUDGEMENT, TEXT, MARK, CONTENT, trace)
    raw = deliverable(CONTENT, trace, headers)
    assert raw == b"Received: last\r\n" + headers + CONTENT
    assert check_delivered(KEY, raw)
