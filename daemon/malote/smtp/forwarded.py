"""The attributes of XCLIENT and XFORWARD: what a trusted peer says of the client that it speaks for. Pure.

Postfix's XCLIENT_README and XFORWARD_README are the specification; names are case-insensitive, values are xtext (RFC 3461 4).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from malote.errors import Reply
from malote.smtp.networks import parse_address
from malote.smtp.path import PathRefused

XCLIENT = ("NAME", "ADDR", "PORT", "PROTO", "HELO", "LOGIN", "DESTADDR", "DESTPORT")
XFORWARD = ("NAME", "ADDR", "PORT", "PROTO", "HELO", "IDENT", "SOURCE")
UNAVAILABLE = ("[UNAVAILABLE]", "[TEMPUNAVAIL]")

MAX_VALUE = 255         # XFORWARD_README, COMMAND SYNTAX
_HEX = re.compile(r"\+([0-9A-F]{2})")
_XTEXT = re.compile(r"(?:[!-*,-<>-~]|\+[0-9A-F]{2})+")


def parse_attributes(argument: str, names: tuple[str, ...]) -> Mapping[str, str]:
    """Names in capitals; "" for a value that the peer does not know. Raises `PathRefused`."""
    values: dict[str, str] = {}
    for part in argument.split():
        name, equals, text = part.partition("=")
        name = name.upper()
        if not equals or name not in names or name in values or not _XTEXT.fullmatch(text):
            raise PathRefused(Reply(501, "5.5.4", "Syntax: attribute=value, each known one once"))
        value = _decoded(text)
        values[name] = "" if value.upper() in UNAVAILABLE else value
    if not values:
        raise PathRefused(Reply(501, "5.5.4", "Syntax: attribute=value"))
    if values.get("ADDR"):
        values["ADDR"] = _address(values["ADDR"])
    return values


def _decoded(text: str) -> str:
    """Latin-1 bytes first: one `+XX` is one octet of UTF-8."""
    octets = _HEX.sub(lambda match: chr(int(match[1], 16)), text).encode("latin-1")
    try:
        value = octets.decode()
    except UnicodeDecodeError:
        value = ""
    if not value.isprintable() or not 0 < len(value) <= MAX_VALUE:
        raise PathRefused(Reply(501, "5.5.4", "Bad attribute value"))
    return value


def _address(value: str) -> str:
    text = value[5:] if value[:5].upper() == "IPV6:" else value
    address = parse_address(text)
    if address is None or "%" in text:
        raise PathRefused(Reply(501, "5.5.4", "ADDR is no address"))
    return str(address)
