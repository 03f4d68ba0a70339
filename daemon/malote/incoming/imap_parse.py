"""Reads IMAP responses: bytes in, values out, no connection (RFC 3501 7 and 9, RFC 4315, RFC 4731, RFC 9051).

A response arrives as parts: a line, then a literal and the line that goes on after it, and so on. Whatever the bytes, the answer
is a value or `ValueError`; the connection is given up on `ValueError`, since a server that cannot be read cannot be trusted with
the order of commands.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from malote.incoming.imap_names import parse_uid, parse_uid_set

MAX_DEPTH = 100         # of parentheses; a BODYSTRUCTURE has one level per MIME level and two per address list
MAX_TOKENS = 200_000    # of one response; a BODYSTRUCTURE has about 14 for each part, and reading this many takes 0.2 seconds

_STATUS = re.compile(rb"(OK|NO|BAD|BYE|PREAUTH)(?: +(.*))?", re.IGNORECASE | re.DOTALL)
_CODE = re.compile(rb"\[([A-Za-z0-9\-]+)(?: ((?:\"(?:[^\"\\]|\\.)*\"|[^\]\"])*))?\] ?(.*)", re.DOTALL)
_NUMBERED = re.compile(rb"(\d{1,10}) ([A-Za-z]+)(?: (.*))?", re.DOTALL)
_NAMED = re.compile(rb"([A-Za-z0-9\-]+)(?: (.*))?", re.DOTALL)
_LITERAL = re.compile(rb"~?\{(\d{1,10})\}$")
# A section in the name of a FETCH item holds spaces, parentheses and quoted words: BODY[HEADER.FIELDS ("A" B)]<0>. Its length is
# bounded, so that a line full of open brackets costs no more than its length times that bound.
_SECTION = rb'(?:BODY|BINARY)\[(?:"(?:[^"\\]|\\.){0,200}+"|[^\]"]){0,600}+\](?:<\d+>)?'
_TOKEN = re.compile(rb' *(?:(\()|(\))|"((?:[^"\\]|\\.)*)"|(' + _SECTION + rb'|[^\s()"{]+))', re.IGNORECASE | re.DOTALL)


class Atom(bytes):
    """A word that was not quoted: NIL and numbers mean something only here."""

    __slots__ = ()


Value = bytes | list["Value"] | None


@dataclass(frozen=True, slots=True)
class Status:
    """`OK [CODE arguments] text`: the end of a command, or untagged news (RFC 3501 7.1)."""

    result: str         # OK, NO, BAD, BYE or PREAUTH
    code: str           # upper case, "" without one
    arguments: bytes
    text: str           # printable, at most 200 characters; the server's own words


@dataclass(frozen=True, slots=True)
class Data:
    """An untagged response that is not a status. `number` is the sequence number or count in front of the name."""

    name: str           # upper case
    number: int | None
    rest: bytes         # of the first line, after the name
    parts: Sequence[bytes]      # literals and continued lines, alternating, as they followed the first line


def parse_untagged(parts: Sequence[bytes]) -> Status | Data:
    """One untagged response without its `* `. Raises `ValueError`."""
    line = parts[0]
    status = parse_status(line)
    if status is not None:
        return status
    if match := _NUMBERED.fullmatch(line):
        return Data(match[2].decode().upper(), int(match[1]), match[3] or b"", parts[1:])
    if match := _NAMED.fullmatch(line):
        return Data(match[1].decode().upper(), None, match[2] or b"", parts[1:])
    raise ValueError("not an IMAP response")


def parse_status(line: bytes) -> Status | None:
    """The status in a line without its tag; None if it is something else."""
    match = _STATUS.fullmatch(line)
    if match is None:
        return None
    text = match[2] or b""
    code, arguments = b"", b""
    if coded := _CODE.fullmatch(text):
        code, arguments, text = coded[1], coded[2] or b"", coded[3]
    return Status(match[1].decode().upper(), code.decode().upper(), arguments, _printable(text))


def _printable(text: bytes) -> str:
    shown = text[:200].decode("ascii", "replace")
    return "".join(character if character.isprintable() else "?" for character in shown)


# --- parenthesised values ---

def parse_values(first: bytes, rest: Sequence[bytes] = ()) -> list[Value]:
    """The values of a response: `bytes` for strings, `Atom` for words, None for NIL, lists for parentheses."""
    top: list[Value] = []
    stack = [top]
    tokens = 0
    pieces = [first, *rest]
    for index in range(0, len(pieces), 2):
        line, literal = pieces[index], pieces[index + 1] if index + 1 < len(pieces) else None
        if literal is not None:
            line = _LITERAL.sub(b"", line)
        for value in _tokens(line):
            tokens += 1
            if tokens > MAX_TOKENS:
                raise ValueError("a response of too many words")
            if value == b"(" and isinstance(value, _Paren):
                if len(stack) > MAX_DEPTH:
                    raise ValueError("a response nested too deep")
                inner: list[Value] = []
                stack[-1].append(inner)
                stack.append(inner)
            elif value == b")" and isinstance(value, _Paren):
                if len(stack) == 1:
                    raise ValueError("a parenthesis too many")
                stack.pop()
            else:
                stack[-1].append(value)
        if literal is not None:
            stack[-1].append(literal)
    if len(stack) != 1:
        raise ValueError("a parenthesis is not closed")
    return top


class _Paren(bytes):
    __slots__ = ()


_OPEN, _CLOSE = _Paren(b"("), _Paren(b")")


def _tokens(line: bytes) -> Iterator[bytes | None]:
    position, end = 0, len(line.rstrip(b" "))
    while position < end:
        match = _TOKEN.match(line, position, end)
        if match is None:
            raise ValueError("not an IMAP value")
        position = match.end()
        if match.lastindex == 1:
            yield _OPEN
        elif match.lastindex == 2:
            yield _CLOSE
        elif match.lastindex == 3:
            text = match[3]
            yield re.sub(rb"\\(.)", rb"\1", text, flags=re.DOTALL) if b"\\" in text else text
        else:
            word = match[4]
            yield None if word.upper() == b"NIL" else Atom(word)


# --- FETCH ---

def parse_fetch(data: Data) -> dict[str, Value]:
    """The items of one FETCH answer by their name in upper case: `UID`, `FLAGS`, `BODY[HEADER.FIELDS (A B)]<0>`."""
    values = parse_values(data.rest, data.parts)
    if len(values) != 1 or not isinstance(values[0], list) or len(values[0]) % 2:
        raise ValueError("not a FETCH answer")
    items = iter(values[0])
    answer: dict[str, Value] = {}
    for name, value in zip(items, items, strict=True):
        if not isinstance(name, Atom):
            raise ValueError("not a FETCH answer")      # noqa: TRY004 - one kind of failure for whatever the server sends
        answer[name.decode("latin-1").upper()] = value
    return answer


def fetch_uid(items: Mapping[str, Value]) -> int | None:
    """The UID of a FETCH answer; None for unasked news of flags, which carries none."""
    uid = items.get("UID")
    return None if uid is None else parse_uid(_word(uid))


def fetch_number(items: Mapping[str, Value], name: str) -> int:
    """A number, up to 2^63-1 (RFC 9051 9, number64)."""
    word = _word(items.get(name))
    if not word.isdigit() or len(word) > 19:
        raise ValueError("not a number")
    return int(word)


def fetch_flags(items: Mapping[str, Value]) -> tuple[str, ...]:
    """The flags as the server spells them."""
    flags = items.get("FLAGS")
    if not isinstance(flags, list):
        raise ValueError("no flags")        # noqa: TRY004
    return tuple(_word(flag).decode("latin-1") for flag in flags)


def fetch_text(items: Mapping[str, Value], name: str) -> str:
    """A short string, as INTERNALDATE."""
    value = items.get(name)
    if not isinstance(value, bytes):
        raise ValueError("a string is missing")     # noqa: TRY004
    return value.decode("latin-1")


def fetch_body(items: Mapping[str, Value]) -> bytes | None:
    """The one BODY[...] of the answer; None if the server sent NIL or none."""
    for name, value in items.items():
        if name.startswith("BODY["):
            if isinstance(value, list):
                raise ValueError("not a body")
            return value
    return None


def _word(value: Value) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a word is missing")       # noqa: TRY004
    return value


# --- BODYSTRUCTURE (RFC 3501 7.4.2) ---

@dataclass(frozen=True, slots=True)
class Part:
    """A leaf of the MIME tree as the server sees it."""

    section: str        # to be used in BODY[section], as 1.2
    media_type: str     # lower case, as text/plain
    encoding: str       # lower case, as base64
    size: int           # bytes as encoded
    name: str           # file name, "" without one


def parse_structure(value: Value) -> list[Part]:
    """The leaves of a BODYSTRUCTURE, also those below message/rfc822. Raises `ValueError`."""
    found: list[Part] = []
    waiting: list[tuple[str, Value]] = [("", value)]
    while waiting:
        section, body = waiting.pop()
        if not isinstance(body, list) or not body:
            raise ValueError("not a BODYSTRUCTURE")
        if isinstance(body[0], list):
            children = list(enumerate(_leading_lists(body), 1))
            waiting += [(f"{section}.{number}".lstrip("."), child) for number, child in reversed(children)]
            continue
        part = _leaf(section or "1", body)
        found.append(part)
        if part.media_type == "message/rfc822" and len(body) > 8 and isinstance(body[8], list) and body[8]:
            multipart = isinstance(body[8][0], list)
            waiting.append((part.section if multipart else f"{part.section}.1", body[8]))
    return found


def _leading_lists(body: list[Value]) -> Iterator[Value]:
    for child in body:
        if not isinstance(child, list):
            return
        yield child


def _leaf(section: str, body: list[Value]) -> Part:
    if len(body) < 7:
        raise ValueError("not a BODYSTRUCTURE")
    kind, subtype, parameters, encoding, size = body[0], body[1], body[2], body[5], body[6]
    return Part(section, f"{_lower(kind)}/{_lower(subtype)}", _lower(encoding), fetch_number({"": size}, ""),
                _name(parameters) or _disposition_name(body))


def _lower(value: Value) -> str:
    return value.decode("latin-1").lower() if isinstance(value, bytes) else ""


def _name(parameters: Value) -> str:
    if isinstance(parameters, list):
        pairs = zip(parameters[::2], parameters[1::2], strict=False)
        for key, value in pairs:
            if _lower(key) in ("name", "filename") and isinstance(value, bytes):
                return value.decode("latin-1")
    return ""


def _disposition_name(body: list[Value]) -> str:
    for extension in body[8:]:
        if isinstance(extension, list) and len(extension) == 2 and _lower(extension[0]) in ("attachment", "inline"):
            return _name(extension[1])
    return ""


# --- the others ---

@dataclass(frozen=True, slots=True)
class Listed:
    """One LIST answer (RFC 3501 7.2.2): `wire` is the name exactly as the server spells it."""

    flags: frozenset[str]       # with backslash, lower case
    delimiter: str              # "" in a flat name space
    wire: bytes


def parse_list(data: Data) -> Listed:
    """Raises `ValueError`."""
    values = parse_values(data.rest, data.parts)
    if len(values) < 3 or not isinstance(values[0], list) or not isinstance(values[2], bytes | None):
        raise ValueError("not a LIST answer")
    flags, delimiter, name = values[:3]
    if not isinstance(flags, list) or isinstance(delimiter, list) or (delimiter is not None and len(delimiter) != 1):
        raise ValueError("not a LIST answer")
    wire = b"NIL" if name is None else bytes(_word(name))       # a folder may well be called NIL
    return Listed(frozenset(_lower(flag) for flag in flags), (delimiter or b"").decode("latin-1"), wire)


def parse_search(data: Data) -> list[int]:
    """SEARCH or ESEARCH with ALL (RFC 4731), ascending. Raises `ValueError`."""
    if data.parts:
        raise ValueError("not a SEARCH answer")
    words = data.rest.partition(b"(MODSEQ")[0].split() if data.name == "SEARCH" else data.rest.split()
    if data.name == "SEARCH":
        return sorted({parse_uid(word) for word in words})
    upper = [word.upper() for word in words]
    return sorted(set(parse_uid_set(words[upper.index(b"ALL") + 1]))) if b"ALL" in upper[:-1] else []


def parse_namespace(data: Data) -> str:
    """The prefix of the first personal name space as the server spells it (RFC 2342). Raises `ValueError`."""
    values = parse_values(data.rest, data.parts)
    personal = values[0] if values else None
    if isinstance(personal, list) and personal and isinstance(personal[0], list) and personal[0]:
        prefix = personal[0][0]
        if isinstance(prefix, bytes):
            return prefix.decode("latin-1")
    return ""


def parse_copyuid(arguments: bytes) -> tuple[int, dict[int, int]]:
    """`validity sources destinations` as (validity, source -> destination) (RFC 4315 3). Raises `ValueError`."""
    words = arguments.split()
    if len(words) != 3:
        raise ValueError("not a COPYUID")
    sources, destinations = parse_uid_set(words[1]), parse_uid_set(words[2])
    if len(sources) != len(destinations) or len(set(sources)) != len(sources):
        raise ValueError("a COPYUID whose halves differ")
    return parse_uid(words[0]), dict(zip(sources, destinations, strict=True))


def parse_appenduid(arguments: bytes) -> tuple[int, list[int]]:
    """`validity uids` (RFC 4315 3; several after MULTIAPPEND). Raises `ValueError`."""
    words = arguments.split()
    if len(words) != 2:
        raise ValueError("not an APPENDUID")
    return parse_uid(words[0]), parse_uid_set(words[1])
