"""What rules may ask of a message: its fields as a person reads them, its size, and what kind of mail it says it is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from malote.config import Kind
from malote.core.content import Wanted, decide_kinds, make_glob, make_header_glob, read_content
from malote.core.message import header_fields
from malote.core.words import decode_words
from malote.errors import FormatError


def kinds(header: str, body: str = "", *, null_sender: bool = False) -> set[Kind]:
    raw = f"From: a@a.example\r\n{header}\r\n{body}".encode()
    return set(decide_kinds(header_fields(raw), raw, null_sender=null_sender))


@pytest.mark.parametrize(("header", "body", "expected"), [
    ("Subject: lunch\r\n", "text/calendar is a media type\r\n", set()),
    ("Content-Type: text/calendar; method=REQUEST\r\n", "BEGIN:VCALENDAR\r\n", {Kind.CALENDAR}),
    ("Content-Type: multipart/alternative; boundary=b\r\n",
     "--b\r\nContent-Type: text/plain\r\n\r\nx\r\n--b\r\ncontent-type:\r\n text/Calendar; method=REPLY\r\n\r\ny\r\n--b--\r\n",
     {Kind.CALENDAR}),
    ("Content-Class: urn:content-classes:calendarmessage\r\n", "", {Kind.CALENDAR}),
    ("Content-Type: multipart/report; report-type=delivery-status; boundary=b\r\n", "", {Kind.BOUNCE}),
    ("Content-Type: multipart/report; report-type=disposition-notification; boundary=b\r\n", "", set()),
    ("Auto-Submitted: auto-replied (vacation)\r\n", "", {Kind.AUTO_REPLY}),
    ("Auto-Submitted: Auto-Replied; owner=x\r\n", "", {Kind.AUTO_REPLY}),
    ("X-Autoreply: yes\r\n", "", {Kind.AUTO_REPLY}),
    ("Precedence: auto_reply\r\n", "", {Kind.AUTO_REPLY}),
    ("Auto-Submitted: no\r\n", "", set()),
    ("Auto-Submitted: auto-generated\r\n", "", {Kind.AUTOMATIC}),
    ("Auto-Submitted: auto-notified\r\n", "", {Kind.AUTOMATIC}),
    ("List-Id: Friends <friends.a.example>\r\n", "", {Kind.LIST}),
    ("Precedence: List\r\n", "", {Kind.LIST}),
    ("List-Unsubscribe: <https://shop.example/u>\r\n", "", set()),
])
def test_kinds(header: str, body: str, expected: set[Kind]) -> None:
    assert kinds(header, body) == expected
    assert kinds(header, body, null_sender=True) == expected | {Kind.BOUNCE}


def test_only_what_is_asked_for_is_read() -> None:
    raw = (b"From: a@a.example\r\nSubject: =?utf-8?q?Gr=C3=BC=C3=9Fe?=\r\nX-Label: one\r\nX-Label: two\r\n"
           b"List-Id: <l>\r\n\r\nbody\r\n")
    fields = header_fields(raw)
    content = read_content(fields, raw, Wanted(frozenset({"subject", "x-label", "x-none"}), kinds=False), null_sender=True)
    assert content.fields == {"subject": ("Grüße",), "x-label": ("one", "two")}
    assert (content.size, content.kinds) == (len(raw), frozenset())
    assert read_content(fields, raw, Wanted(kinds=True), null_sender=False).kinds == {Kind.LIST}


@pytest.mark.parametrize(("value", "text"), [
    (b"plain", "plain"), (b"Gr\xc3\xbc\xc3\x9fe", "Grüße"), (b"\xff\xfe", "ÿþ"), (b"", ""),
    (b"=?utf-8?q?a_b=20c?=", "a b c"), (b"=?UTF-8?B?w7w?=", "ü"), (b"=?utf-8?b?!!!?=", ""),
    (b"=?utf-8?q?a?= =?utf-8?q?b?=", "ab"), (b"=?utf-8?q?a?=  x  =?utf-8?q?b?=", "a  x  b"), (b"x =?utf-8?q?a?=", "x a"),
    (b"=?utf-8?q?=C3?==?utf-8?q?=BC?=", "ü"), (b"=?utf-8?q?=C3?= =?iso-8859-1?q?=BC?=", "Ã¼"),
    (b"=?no-such-set?q?=FC?=", "ü"), (b"=?idna?q?xn--?=", "xn--"), (b"=?hex?q?41?=", "41"), (b"=?rot13?q?abc?=", "abc"),
    (b"=?utf-8?x?a?=", "=?utf-8?x?a?="), (b"=?utf-8?q?no end", "=?utf-8?q?no end"), (b"=?utf-8?q?a?b?=", "=?utf-8?q?a?b?="),
    (b"=?utf-7?q?+AFs-seal+AF0-?=", "[seal]"), (b"=?iso-2022-jp?b?GyRCRnxLXBsoQg==?=", "\u65e5\u672c"),
])
def test_encoded_words(value: bytes, text: str) -> None:
    """RFC 2047, and what programs write instead of it: what a person is shown is what rules and tags see."""
    assert decode_words(value) == text


@given(st.binary(max_size=300))
def test_no_value_is_too_odd(value: bytes) -> None:
    assert isinstance(decode_words(value), str)
    assert isinstance(decode_words(b"=?utf-8?q?" + value + b"?= =?" + value), str)


@pytest.mark.parametrize(("pattern", "text", "met"), [
    ("*[geheim]*", "Angebot [Geheim] 7", True), ("geheim*", "Geheim!", True), ("geheim*", "nicht geheim", False),
    ("*", "", True), ("", "", True), ("a*a", "a", False), ("a*a", "aa", True), ("*a*b*", "xbxaxb", True), ("*a*b*", "bxa", False),
    ("a*b*a", "aba", True), ("ab*ba", "aba", False), ("STRASSE", "Straße", True), ("x.y", "x-y", False), ("[ab]", "a", False),
])
def test_globs(pattern: str, text: str, met: bool) -> None:
    assert make_glob(pattern).met(text.casefold()) == met


@given(st.lists(st.text("ab", max_size=3), min_size=1, max_size=4), st.text("ab", max_size=8))
def test_globs_are_what_a_regular_expression_says(pieces: list[str], text: str) -> None:
    import re
    expected = re.fullmatch(".*".join(map(re.escape, pieces)), text, re.DOTALL) is not None
    assert make_glob("*".join(pieces)).met(text) == expected


def test_header_globs() -> None:
    there = make_header_glob("X-Secret")
    assert (there.name, there.met(("",)), there.met(())) == ("x-secret", True, False)
    assert make_header_glob("Sensitivity : company-*").met(("personal", "company-confidential"))
    assert not make_header_glob("X:").met(("y",))
    for text in ("", ": x", "two words: x", "M\u00fcller: x"):
        with pytest.raises(FormatError):
            make_header_glob(text)
