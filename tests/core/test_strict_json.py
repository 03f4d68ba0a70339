"""Strict JSON: signed bytes must say one thing to every reader."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from malote.core import strict_json
from malote.errors import FormatError


def loads(data: bytes) -> dict[str, Any]:
    return strict_json.loads(data, max_bytes=2000, max_depth=5)


@pytest.mark.parametrize(("data", "value"), [
    (b"{}", {}),
    (b' {"a" : [1, -2, true, false, null, "\\u00e9\xc3\xa9"] } ', {"a": [1, -2, True, False, None, "éé"]}),
    (b'{"a":"\\ud83d\\ude00"}', {"a": "😀"}),               # a whole pair
    (b'{"a":9007199254740992}', {"a": 2**53}),
    (b'{"a":{"b":{"c":{"d":[]}}}}', {"a": {"b": {"c": {"d": []}}}}),
    (b'{"a":"[[[[[[{{{{{{\\"[[[[["}', {"a": '[[[[[[{{{{{{"[[[[['}),     # brackets in strings are no depth
])
def test_what_is_accepted(data: bytes, value: dict[str, Any]) -> None:
    assert loads(data) == value


@pytest.mark.parametrize("data", [
    b"", b"null", b"[]", b"1", b'"a"', b"{", b"{}{}", b"{} x", b"{,}", b'{"a":1,}', b"{'a':1}", b'{a:1}', b"\xef\xbb\xbf{}",
    b'{"a":1,"a":1}', b'{"a":1,"\\u0061":2}',               # twice, also by an escape
    b'{"b":{"a":1,"a":1}}',
    b'{"a":1.0}', b'{"a":1e3}', b'{"a":1E0}', b'{"a":-0}', b'{"a":NaN}', b'{"a":Infinity}', b'{"a":-Infinity}', b'{"a":01}',
    b'{"a":9007199254740993}', b'{"a":-9007199254740993}', b'{"a":' + b"9" * 1900 + b"}",
    b'{"a":"\\ud800"}', b'{"a":"\\uDFFF"}', b'{"\\udc00":1}', b'{"a":"\\ude00\\ud83d"}', b'{"a":"\xed\xa0\x80"}',
    b'{"a":"\xff"}', b'{"a":"\x01"}', b'{"a":"\n"}', b'{"a":"\\x41"}', "{}".encode("utf-16"),
    b'{"a":[[[[[1]]]]]}', b'{"a":' * 6 + b"1" + b"}" * 6, b"[" * 1999, b'{"a":' * 390, b'{"a":' + b"[" * 1900,
    b'{"a":"' + b"x" * 2000 + b'"}',
    b"{}\0", b"/**/{}",
])
def test_what_is_refused(data: bytes) -> None:
    with pytest.raises(FormatError):
        loads(data)


def test_errors_do_not_repeat_the_data() -> None:
    for data in (b'{"secret', b'{"secret":secret}', b'{"secret":1.5}', b'{"secret":"\\ud800"}', b'{"secret":1,"secret":1}'):
        with pytest.raises(FormatError) as caught:
            loads(data)
        assert "secret" not in str(caught.value)
        assert caught.value.__cause__ is None


def test_deep_nesting_within_the_size_is_no_recursion_error() -> None:
    with pytest.raises(FormatError, match="deeper"):
        strict_json.loads(b'{"a":' * 100_000 + b"1" + b"}" * 100_000, max_bytes=10_000_000, max_depth=8)


@given(st.binary(max_size=60) | st.text(alphabet='{}[]":,\\u0dD81.ea-', max_size=40).map(str.encode))
def test_any_bytes_give_an_object_or_format_error(data: bytes) -> None:
    try:
        value = loads(data)
    except FormatError:
        return
    assert json.loads(data) == value
    assert loads(strict_json.dumps(value)) == value


LEAVES = st.none() | st.booleans() | st.integers(-2**53, 2**53) | st.text(max_size=20)
OBJECTS = st.dictionaries(st.text(max_size=5), LEAVES | st.lists(LEAVES, max_size=4), max_size=5)


@given(OBJECTS)
def test_what_we_write_is_read_back(value: dict[str, Any]) -> None:
    assert strict_json.loads(strict_json.dumps(value), max_bytes=10_000, max_depth=3) == value


def test_members() -> None:
    members = {"a": 1, "b": "00ff", "_later": 1}
    strict_json.check_members(members, required=("a",), optional=("b",))
    assert strict_json.hex_bytes(members, "b", 2) == b"\x00\xff"
    assert strict_json.natural(members, "a") == 1
    with pytest.raises(FormatError, match="c is missing"):
        strict_json.check_members(members, required=("a", "b", "c"))
    with pytest.raises(FormatError, match="unknown"):
        strict_json.check_members(members, required=("a",))


@pytest.mark.parametrize(("value", "size"), [
    ("00FF", 2), ("00f", 2), ("00ff", 3), ("0 ff", 2), ("00\n", 2), (1, 2), ("００", 1), ("", 1),
])
def test_hexadecimal_has_one_form(value: object, size: int) -> None:
    with pytest.raises(FormatError):
        strict_json.hex_bytes({"a": value}, "a", size)


@pytest.mark.parametrize("value", [True, "1", None, -1, [1]])
def test_naturals_are_integers_of_at_least_zero(value: object) -> None:
    with pytest.raises(FormatError):
        strict_json.natural({"a": value}, "a")
    with pytest.raises(FormatError):
        strict_json.natural({}, "a")
