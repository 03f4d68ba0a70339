"""Folding saves a quarter of the size and never changes a byte; a table that no sealer writes is refused."""

from __future__ import annotations

import base64
import contextlib
import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from malote.core import fold as module
from malote.core.fold import MAX_SPANS, base64_lines, fold, unfold
from malote.errors import Unreadable

HEADER = b"Content-Type: image/png\r\nContent-Transfer-Encoding: base64\r\n\r\n"
BLOCK = 57 * 1024       # bytes that the encoder takes at once with 76 characters a line


def lines(data: bytes, width: int, line_end: bytes) -> bytes:
    """The slow and obvious way, as the reference."""
    text = base64.b64encode(data)
    return line_end.join(text[at:at + width] for at in range(0, len(text), width))


@pytest.mark.parametrize("size", [0, 1, 2, 3, 56, 57, 58, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 56])
@pytest.mark.parametrize(("width", "line_end"), [(76, b"\r\n"), (60, b"\n"), (4, b"\n"), (252, b"\r\n")])
def test_lines_are_those_of_the_plain_encoder(size: int, width: int, line_end: bytes) -> None:
    data = bytes(n * 7 % 251 for n in range(size))
    assert b"".join(base64_lines(data, width, line_end)) == lines(data, width, line_end)


def test_what_does_not_unfold_to_the_same_is_not_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever finds the bodies may be wrong: the comparison at the end may not."""
    original = HEADER + lines(bytes(3000), 76, b"\r\n") + b"\r\n"
    genuine = module._fold_body
    assert fold(original) is not None

    def wrong(*arguments: Any) -> Any:
        span, binary = genuine(*arguments) or (b"", [])
        return span, [binary[0][:-1] + b"\1"]

    monkeypatch.setattr(module, "_fold_body", wrong)
    assert fold(original) is None


@pytest.mark.parametrize("width", [60, 64, 72, 76, 252])
@pytest.mark.parametrize("line_end", [b"\r\n", b"\n"])
@pytest.mark.parametrize("tail", [b"", b"E", b"EE", b"E--b--E", b"EEafter"])
@pytest.mark.parametrize("size", [1500, BLOCK, BLOCK + 1])
def test_bodies_of_real_mail_are_folded(width: int, line_end: bytes, tail: bytes, size: int) -> None:
    original = HEADER.replace(b"\r\n", line_end) + lines(bytes(size), width, line_end) + tail.replace(b"E", line_end)
    folded = fold(original)
    assert folded is not None
    assert len(folded) < size + 200
    assert unfold(folded, len(original)) == original


def test_several_bodies_between_text() -> None:
    part = b"--b\r\n" + HEADER + lines(bytes(range(256)) * 20, 76, b"\r\n") + b"\r\n"
    original = b"From: a\r\n\r\n" + part * 5 + b"--b--\r\n"
    folded = fold(original)
    assert folded is not None
    assert folded[:4] == struct.pack(">I", 11)
    assert len(folded) < 5 * (5120 + 120)
    assert unfold(folded, len(original)) == original


@pytest.mark.parametrize("body", [
    lines(bytes(3000), 76, b"\r\n").replace(b"\r\n", b"\n", 1),            # mixed line ends
    lines(bytes(3000), 75, b"\r\n"),                                       # a width that is no multiple of 4
    lines(bytes(3000), 76, b" \r\n"),                                      # trailing space
    lines(bytes(3000), 76, b"\r\n")[:-1] + b"B",                           # spare bits that are not zero
    lines(bytes(1000), 76, b"\r\n") + b"\r\n" + lines(bytes(1000), 76, b"\r\n"),   # two texts in a row
    lines(bytes(3000), 76, b"\r\n").replace(b"A", b"!", 1),
    base64.b64encode(bytes(3000)),                                         # one long line
    b"A" * 76 + b"\r\nabc",
    b"\r\n" * 3000,
])
def test_what_would_not_come_back_is_left_alone(body: bytes) -> None:
    """Any difference: no folding of this body. The message is sealed as it is."""
    original = HEADER + body
    folded = fold(original)
    assert folded is None or unfold(folded, len(original)) == original
    other = lines(bytes(6000), 76, b"\r\n")
    both = HEADER + body + b"\r\n--b\r\n" + HEADER + other
    folded = fold(both)
    assert folded is None or unfold(folded, len(both)) == both


@pytest.mark.parametrize("original", [b"", b"x", b"From: a\r\n\r\nabout base64 and content-transfer-encoding: base64\r\n" * 50])
def test_mail_without_base64_is_not_folded(original: bytes) -> None:
    assert fold(original) is None


PIECES = st.sampled_from([
    HEADER, HEADER.replace(b"\r\n", b"\n"), HEADER.upper(), b"\r\n", b"\n", b"-", b"--b", b"=", b"base64",
    lines(bytes(1200), 76, b"\r\n"), lines(bytes(1200), 64, b"\n"), lines(bytes(1201), 76, b"\r\n"), b"A" * 76, b"\r\nB",
])


@given(st.lists(st.one_of(PIECES, st.binary(max_size=6)), max_size=25).map(b"".join))
@settings(max_examples=300, deadline=None)
def test_whatever_is_folded_comes_back(original: bytes) -> None:
    folded = fold(original)
    if folded is not None:
        assert len(folded) < len(original)
        assert unfold(folded, len(original)) == original


def table(*spans: tuple[int, int, int], data: bytes = b"") -> bytes:
    return struct.pack(">I", len(spans)) + b"".join(struct.pack(">BBI", *span) for span in spans) + data


@pytest.mark.parametrize(("folded", "size"), [
    (b"", 0), (b"\0\0\0", 0), (table(), 0), (struct.pack(">I", MAX_SPANS + 1) + bytes(6 * MAX_SPANS + 6), 0),
    (struct.pack(">I", 2**32 - 1), 0), (struct.pack(">I", 2) + bytes(11), 0),
    (table((0, 0, 3), data=b"ab"), 3), (table((0, 0, 3), data=b"abcd"), 3), (table((0, 0, 3), data=b"abc"), 4),
    (table((0, 0, 0)), 0), (table((0, 76, 3), data=b"abc"), 3), (table((2, 76, 3), data=b"abc"), 4),
    (table((8, 0, 3), data=b"abc"), 4),
    (table((1, 0, 3), data=b"abc"), 4), (table((1, 75, 3), data=b"abc"), 4), (table((1, 255, 3), data=b"abc"), 4),
    (table((1, 76, 0)), 0),
    (table((1, 76, 3), data=b"abc"), 3), (table((9, 76, 3), data=b"abc"), 4), (table((1, 4, 6), data=b"abcdef"), 8),
])
def test_tables_that_no_sealer_writes_are_refused(folded: bytes, size: int) -> None:
    with pytest.raises(Unreadable, match="cannot be opened") as caught:
        unfold(folded, size)
    assert caught.value.reason.startswith("fold failure")


@pytest.mark.parametrize(("span", "original"), [
    ((0, 0, 3), b"abc"), ((1, 4, 3), b"YWJj"), ((5, 4, 3), b"YWJj\r\n"), ((7, 4, 3), b"YWJj\n"), ((3, 4, 6), b"YWJj\nYWJj"),
])
def test_spans_say_what_they_give(span: tuple[int, int, int], original: bytes) -> None:
    assert unfold(table(span, data=b"abcabc"[:span[2]]), len(original)) == original


@given(st.binary(max_size=60), st.integers(0, 200))
def test_any_table_is_unfolded_to_its_size_or_refused(folded: bytes, size: int) -> None:
    with contextlib.suppress(Unreadable):
        assert len(unfold(folded, size)) == size


def test_a_table_that_promises_more_than_the_size_writes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "base64_lines", lambda *_: pytest.fail("wrote before the table was checked"))
    with pytest.raises(Unreadable):
        unfold(table((1, 4, 3_000_000), data=bytes(3_000_000)), 100)


@pytest.mark.parametrize("hostile", [
    b"Content-Transfer-Encoding: base64\r\n", b"Content-Transfer-Encoding: base64\r\n\r\n", b"base64",
    b"Content-Transfer-Encoding: base64\r\n\r\nAAAA\r\n\r\n",
])
def test_work_on_hostile_mail_is_bounded(hostile: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the bytes cost at most a fixed number of looks, not a square of them."""
    calls = 0
    genuine = module._is_encoding_field

    def counted(original: bytes, position: int) -> bool:
        nonlocal calls
        calls += 1
        return genuine(original, position)

    monkeypatch.setattr(module, "_is_encoding_field", counted)
    assert fold(hostile * 40_000) is None
    assert calls <= 3 * module._MAX_LOOKS
