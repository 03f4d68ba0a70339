"""What an IMAP command line is made of: folder names, strings, UID sets, flags and dates (RFC 3501, RFC 9051).

Everything that comes from the configuration, from a person or from another message passes through here before it goes on the
wire, so nothing can end a command line early and begin another one.
"""

from __future__ import annotations

import binascii
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone

from malote.errors import MailboxError

MAX_UID = 0xFFFFFFFF
MAX_SET_MEMBERS = 5_000_000         # UIDs that one answer may name: a hostile `1:4294967295` is not written out in memory
MAX_SET_BYTES = 7_000               # of one UID set in a command; RFC 7162 4 asks servers to take lines of 8192 octets

_QUOTABLE = re.compile(rb"[\x20-\x7e]*")
_FLAG = re.compile(r"\\?[A-Za-z0-9!#$&',\-./:;<=>?@^_`|~+\[]+")     # RFC 3501 9: flag = "\" atom / keyword
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_DATE = re.compile(r"([ 0-3]?\d)-([A-Za-z]{3})-(\d{4}) (\d\d):(\d\d):(\d\d) ([+-])(\d\d)(\d\d)")


@dataclass(frozen=True, slots=True)
class Literal:
    """A string sent as `{n}` and its bytes (RFC 3501 4.3). The connection decides whether it must wait before the bytes."""

    content: bytes


# --- folder names: modified UTF-7 (RFC 3501 5.1.3) ---

def encode_folder(name: str) -> bytes:
    """The folder name as it goes on the wire. Raises `MailboxError` for lone surrogates and control characters."""
    if any(character < " " or character == "\x7f" for character in name):
        raise MailboxError("a folder name with control characters is not accepted", code="CANNOT")
    return b"".join(_encode_runs(name))


def _encode_runs(name: str) -> Iterator[bytes]:
    run = ""
    for character in name:
        if " " <= character <= "~":
            if run:
                yield _encode_run(run)
                run = ""
            yield b"&-" if character == "&" else character.encode()
        else:
            run += character
    if run:
        yield _encode_run(run)


def _encode_run(run: str) -> bytes:
    try:
        utf16 = run.encode("utf-16-be")
    except UnicodeEncodeError:
        raise MailboxError("a folder name with half a character is not accepted", code="CANNOT") from None
    return b"&" + binascii.b2a_base64(utf16, newline=False).rstrip(b"=").replace(b"/", b",") + b"-"


def decode_folder(wire: bytes) -> str:
    """The name for people. Never raises: what is not modified UTF-7 is read as UTF-8, else byte by byte as Latin-1.

    The caller keeps `wire` beside it, since such a name cannot be made from the text again.
    """
    try:
        return _decode_strict(wire)
    except ValueError:
        pass
    try:
        return wire.decode()
    except UnicodeDecodeError:
        return wire.decode("latin-1")


def _decode_strict(wire: bytes) -> str:
    text = wire.decode("ascii")
    pieces = text.split("&")
    out = [pieces[0]]
    for piece in pieces[1:]:
        shifted, dash, plain = piece.partition("-")
        if not dash:
            raise ValueError("shift without end")
        out.append(_decode_run(shifted) if shifted else "&")
        out.append(plain)
    name = "".join(out)
    if encode_folder_or_none(name) != wire:
        raise ValueError("not the canonical form")      # two spellings of one name must not look alike
    return name


def _decode_run(shifted: str) -> str:
    padded = shifted.replace(",", "/") + "=" * (-len(shifted) % 4)
    return binascii.a2b_base64(padded, strict_mode=True).decode("utf-16-be")


def encode_folder_or_none(name: str) -> bytes | None:
    """As `encode_folder`, with None for a name that has no form on the wire."""
    try:
        return encode_folder(name)
    except MailboxError:
        return None


# --- strings ---

def astring(text: bytes | str) -> bytes | Literal:
    """A string argument: quoted where that is possible, else a literal (RFC 3501 4.3). Raises `MailboxError` for NUL."""
    raw = text.encode() if isinstance(text, str) else text
    if b"\0" in raw:
        raise MailboxError("a NUL cannot be sent in an IMAP string", code="CANNOT")
    if len(raw) <= 1000 and _QUOTABLE.fullmatch(raw):
        return b'"' + raw.replace(b"\\", b"\\\\").replace(b'"', b'\\"') + b'"'
    return Literal(raw)


def flag_list(flags: Iterable[str]) -> bytes:
    """`(\\Seen $Keyword)`. `\\Recent` belongs to the server and is left out. Raises `MailboxError` for what is no flag."""
    wanted = [flag for flag in flags if flag.lower() != "\\recent"]
    for flag in wanted:
        if not _FLAG.fullmatch(flag):
            raise MailboxError("a flag with characters that IMAP does not allow is not accepted", code="CANNOT")
    return b"(" + " ".join(wanted).encode() + b")"


# --- UID sets ---

def uid_sets(uids: Iterable[int]) -> Iterator[tuple[bytes, list[int]]]:
    """The UIDs as sets with ranges, each short enough for one command line; beside each set its members, ascending."""
    text: list[str] = []
    members: list[int] = []
    size = 0
    for first, last in _ranges(sorted(set(uids))):
        item = str(first) if first == last else f"{first}:{last}"
        if text and size + len(item) + 1 > MAX_SET_BYTES:
            yield ",".join(text).encode(), members
            text, members, size = [], [], 0
        text.append(item)
        members.extend(range(first, last + 1))
        size += len(item) + 1
    if text:
        yield ",".join(text).encode(), members


def _ranges(ordered: Sequence[int]) -> Iterator[tuple[int, int]]:
    if not ordered:
        return
    if not 1 <= ordered[0] <= ordered[-1] <= MAX_UID:
        raise MailboxError("a UID out of range was asked for", code="CANNOT")
    first = last = ordered[0]
    for uid in ordered[1:]:
        if uid != last + 1:
            yield first, last
            first = uid
        last = uid
    yield first, last


def parse_uid_set(text: bytes) -> list[int]:
    """The members in the order they are named (RFC 4315 3: COPYUID pairs them by position). Raises `ValueError`."""
    members: list[int] = []
    for item in text.split(b","):
        first, colon, last = item.partition(b":")
        low = parse_uid(first)
        high = parse_uid(last) if colon else low
        if high < low:
            low, high = high, low       # RFC 3501 9, seq-range: 4:2 and 2:4 are the same
        if len(members) + high - low >= MAX_SET_MEMBERS:
            raise ValueError("a set of too many UIDs")
        members.extend(range(low, high + 1))
    return members


def parse_uid(text: bytes) -> int:
    """A number from 1 to 2^32-1 (RFC 3501 9, nz-number). Raises `ValueError`."""
    if not text.isdigit() or len(text) > 10 or not 1 <= int(text) <= MAX_UID:
        raise ValueError("not a UID")
    return int(text)


# --- INTERNALDATE ---

def internal_date_ms(text: str) -> int:
    """`17-Jul-1996 02:44:25 -0700` as ms since the epoch, UTC. Raises `ValueError`."""
    match = _DATE.fullmatch(text)
    if match is None:
        raise ValueError("not an IMAP date")
    day, month, year, hour, minute, second, sign, zone_hours, zone_minutes = match.groups()
    months = [name.lower() for name in _MONTHS]
    offset = timedelta(hours=int(zone_hours), minutes=int(zone_minutes))
    zone = timezone(-offset if sign == "-" else offset)
    moment = datetime(int(year), months.index(month.lower()) + 1, int(day), int(hour), int(minute),
                      min(int(second), 59), tzinfo=zone)
    return int((moment - datetime(1970, 1, 1, tzinfo=UTC)) / timedelta(milliseconds=1))


def internal_date(text: str) -> bytes:
    """The quoted date-time argument of APPEND, from a date as FETCH gave it. Raises `MailboxError`."""
    try:
        internal_date_ms(text)
    except ValueError:
        raise MailboxError("a date that is not an IMAP date is not accepted", code="CANNOT") from None
    return b'"' + text.rjust(26).encode("ascii") + b'"'


def format_internal_date(at_ms: int) -> str:
    """ms since the epoch as an IMAP date in UTC."""
    moment = datetime.fromtimestamp(at_ms / 1000, UTC)
    return f"{moment.day:02d}-{_MONTHS[moment.month - 1]}-{moment:%Y %H:%M:%S} +0000"
