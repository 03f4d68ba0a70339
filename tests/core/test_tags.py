"""The subject tag: it counts wherever a person sees it, and what leaves does not hold it; all else stays byte for byte."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from malote.core.message import prepare
from malote.core.tags import make_tag, tag_fault, take_tag
from malote.core.words import decode_words
from malote.errors import FormatError

SEAL, CLEAR = make_tag("[seal]"), make_tag("#clear")
HEADER = b"From: a@a.example\r\nSubject:%b\r\nTo: b@b.example\r\n\r\nSubject: [seal] in the body stays\r\n"


@pytest.mark.parametrize(("before", "after"), [
    (b" [seal] Hello", b" Hello"),
    (b" Hello [SEAL] world", b" Hello world"),
    (b" Hello [seal]", b" Hello"),
    (b" Re: [Seal]  two  spaces", b" Re: two  spaces"),
    (b"[seal]", b""),
    (b" [seal] and [seal]", b" and"),
    (b" a[seal]b", b" ab"),
    # no line of white space alone is left (RFC 5322 3.2.2)
    (b" Hello\r\n [seal] world", b" Hello\r\n world"),
    (b" Hello\r\n [seal]\r\n world", b" Hello\r\n world"),
    (b" Hello\r\n [seal]", b" Hello"),
    (b" [seal]\r\n Hello", b"\r\n Hello"),
    # bytes that are no ASCII stay as they came
    (b" Gr\xc3\xbc\xc3\x9fe [seal] \xff", b" Gr\xc3\xbc\xc3\x9fe \xff"),
])
def test_a_subject_without_encoded_words_keeps_its_other_bytes(before: bytes, after: bytes) -> None:
    for end in (b"\r\n", b"\n"):
        raw = (HEADER % before).replace(b"\r\n", end)
        prepared = prepare(raw, SEAL, CLEAR)
        assert prepared.controls == "yes"
        assert prepared.stripped == (HEADER % after).replace(b"\r\n", end)
        assert prepare(prepared.stripped, SEAL, CLEAR).controls is None


@pytest.mark.parametrize("value", [
    b" Hello", b" seal", b" [seal", b" #clearance", b" x#clear1", b" [s e a l]", b" =?utf-8?q?Hello?=", b"",
])
def test_without_a_tag_nothing_changes(value: bytes) -> None:
    prepared = prepare(HEADER % value, SEAL, CLEAR)
    assert (prepared.controls, prepared.changed, prepared.stripped) == (None, False, HEADER % value)


@pytest.mark.parametrize(("before", "after"), [
    (b" =?utf-8?q?[seal]_Gr=C3=BC=C3=9Fe?=", "Grüße"),
    (b" =?UTF-8?B?W3NlYWxdIEdyw7zDn2U=?=", "Grüße"),
    (b" =?iso-8859-1*de?q?=5Bseal=5D_Gr=FC=DFe?= =?iso-8859-1?q?_an_alle?=", "Grüße an alle"),
    (b" Re: =?utf-8?q?Gr=C3=BC=C3=9Fe?= [seal]", "Re: Grüße"),
    (b" [seal] =?utf-8?q?Gr=C3=BC=C3=9Fe?=", "Grüße"),
    # the tag, and a letter, in the middle of two words
    (b" =?utf-8?q?Gr=C3=BC=C3=9Fe_[se?=\r\n =?utf-8?q?al]_=C3?= =?utf-8?q?=A4?=", "Grüße ä"),
    (b" =?koi8-r?q?[seal]_=F0=F2=E9=F7=E5=F4?=", "\u041f\u0420\u0418\u0412\u0415\u0422"),
    (b" =?utf-8?q?[seal]?=", ""),
])
def test_a_tag_in_an_encoded_word_counts_and_goes(before: bytes, after: str) -> None:
    """Mail programs encode the whole subject as soon as one letter is not ASCII."""
    prepared = prepare(HEADER % before, SEAL, CLEAR)
    assert prepared.controls == "yes"
    [subject] = [field for field in prepared.kept if field.name == "subject"]
    assert subject.raw.isascii()
    assert decode_words(subject.raw_value.replace(b"\r\n", b"").strip()) == after
    assert all(len(line) <= 78 for line in subject.raw.splitlines())
    assert prepared.stripped.replace(subject.raw, b"") == (HEADER % b"").replace(b"Subject:\r\n", b"", 1)


@given(st.text(max_size=200), st.text(max_size=200))
def test_any_text_around_the_tag_survives(left: str, right: str) -> None:
    """Whatever a subject says, after the tag was taken out it says the same without it, in lines that are lines."""
    import base64
    words = [base64.b64encode(chunk.encode("utf-8", "replace")).decode() for chunk in (left + "[seal]", right)]
    raw = ("Subject: " + "\r\n ".join(f"=?utf-8?b?{word}?=" for word in words) + "\r\n").encode()
    assert SEAL is not None
    cut = take_tag(raw, SEAL)
    assert cut is not None
    assert cut.startswith(b"Subject: ")
    assert cut.endswith(b"\r\n")
    assert all(line.startswith(b" ") and line.strip() for line in cut.splitlines()[1:])
    expected = (left + "[seal]" + right).encode("utf-8", "replace").decode()
    told = decode_words(cut[9:].replace(b"\r\n", b"").strip())
    assert "".join(told.split()) == "".join(SEAL.in_text.sub("", expected).split())
    assert take_tag(cut, SEAL) is None or "[seal]" in told.lower()


@pytest.mark.parametrize(("header", "control"), [
    (b"Subject: #clear offer\r\n", "no"),
    (b"Subject: [seal] offer\r\nMalote-Seal: yes\r\n", "yes"),
    (b"Subject: [seal] #clear\r\n", None),
    (b"Subject: [seal]\r\nMalote-Seal: no\r\n", None),
    (b"Subject: [seal]\r\nMalote-Seal: perhaps\r\n", None),
    (b"Subject: one\r\nSubject: [seal]\r\n", "yes"),
])
def test_tag_and_header_must_not_contradict(header: bytes, control: str | None) -> None:
    raw = b"From: a@a.example\r\n" + header + b"\r\n"
    if control is None:
        with pytest.raises(FormatError):
            prepare(raw, SEAL, CLEAR)
    else:
        assert prepare(raw, SEAL, CLEAR).controls == control
    assert b"seal" not in prepare(b"From: a@a.example\r\nSubject: [seal]\r\n\r\n", SEAL, None).stripped


def test_tags_are_off_unless_configured() -> None:
    raw = HEADER % b" [seal] #clear"
    assert prepare(raw).controls is None
    assert prepare(raw).stripped == raw
    assert make_tag("") is None
    assert [tag_fault(text) for text in ("", "[seal]", "#x!")] == ["", "", ""]
    assert all(tag_fault(text) for text in ("ab", "two words", "=?x?=", "x" * 41, "\u00fcber", "[...]"))
