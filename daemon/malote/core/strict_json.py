"""JSON with one meaning: what two parsers could read differently is refused (docs/format.md, JSON).

Signed JSON is verified as bytes; this parser makes sure that those bytes say one thing to everybody: no duplicate members, no
floats, no integers beyond 2^53, no lone surrogates, nothing after the value.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from typing import Any, NoReturn, TypeVar

from malote.errors import FormatError

MAX_INTEGER = 2**53         # RFC 8259 6: beyond it a double does not tell neighbours apart
# A string that does not end reaches to the end: tried again at each escaped quote, it would cost the square of its length.
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)|[\[\]{}]', re.DOTALL)
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_HEX = re.compile(r"[0-9a-f]*")

T = TypeVar("T")


def loads(data: bytes, *, max_bytes: int, max_depth: int) -> dict[str, Any]:
    """Parse one JSON object. Raises `FormatError` for anything else, and nothing but it."""
    if len(data) > max_bytes:
        raise FormatError(f"JSON is larger than {max_bytes} bytes")
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise FormatError("JSON is not UTF-8") from None
    _check_depth(text, max_depth)
    try:
        value = _DECODER.decode(text)
    except ValueError:      # its message may quote the text
        raise FormatError("not valid JSON") from None
    if not isinstance(value, dict):
        raise FormatError("JSON is not an object")
    if _SURROGATE.search(data):
        try:
            dumps(value)
        except UnicodeEncodeError:
            raise FormatError("JSON contains half a surrogate pair") from None
    return value


def dumps(value: Mapping[str, Any]) -> bytes:
    """Compact UTF-8, members in the order given."""
    return _ENCODER.encode(value).encode()


def _check_depth(text: str, max_depth: int) -> None:
    if text.count("[") + text.count("{") <= max_depth:
        return
    depth = 0
    for token in _TOKEN.finditer(text):
        if token[0] in "[{":
            depth += 1
            if depth > max_depth:
                raise FormatError(f"JSON is nested deeper than {max_depth}")
        elif token[0] in "]}":
            depth -= 1


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise FormatError("JSON has a member twice")
    return members


def _integer(digits: str) -> int:
    if digits == "-0" or len(digits) > 17 or abs(value := int(digits)) > MAX_INTEGER:
        raise FormatError("JSON has an integer out of range")
    return value


def _refuse_number(_: str) -> NoReturn:
    raise FormatError("JSON has a number that is not an integer")


_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))    # json.dumps makes one each time
_DECODER = json.JSONDecoder(
    object_pairs_hook=_members, parse_int=_integer, parse_float=_refuse_number, parse_constant=_refuse_number
)


# --- taking an object apart


def check_members(members: Mapping[str, Any], *, required: Collection[str], optional: Collection[str] = ()) -> None:
    """Raises `FormatError` unless all `required` are there and nothing unknown, but for names that begin with `_`."""
    for name in required:
        if name not in members:
            raise FormatError(f"member {name} is missing")
    for name in members:
        if name not in required and name not in optional and not name.startswith("_"):
            raise FormatError("unknown member")     # its name is not ours to repeat


def member(members: Mapping[str, Any], name: str, kind: type[T]) -> T:
    """The member of exactly this type (`True` is no integer). Raises `FormatError`."""
    value = members.get(name)
    if type(value) is not kind:
        raise FormatError(f"member {name} is not of type {kind.__name__}")
    return value


def natural(members: Mapping[str, Any], name: str) -> int:
    """An integer of at least 0."""
    value = member(members, name, int)
    if value < 0:
        raise FormatError(f"member {name} is negative")
    return value


def hex_bytes(members: Mapping[str, Any], name: str, size: int) -> bytes:
    """Exactly `size` bytes in lower-case hexadecimal."""
    text = member(members, name, str)
    if len(text) != 2 * size or not _HEX.fullmatch(text):
        raise FormatError(f"member {name} is not {size} bytes in hexadecimal")
    return bytes.fromhex(text)
