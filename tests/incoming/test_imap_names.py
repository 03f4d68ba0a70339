"""Nothing from outside can end a command line early, and every folder name finds its way back."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from malote.errors import MailboxError
from malote.incoming import imap_names
from malote.incoming.imap_names import Literal

NAMES = st.text(st.characters(blacklist_categories=["Cs", "Cc"]))


@pytest.mark.parametrize(("name", "wire"), [
    ("INBOX", b"INBOX"),
    ("Entwürfe", b"Entw&APw-rfe"),                              # what German servers call Drafts
    ("台北", b"&U,BTFw-"),                                       # RFC 3501 5.1.3, with the comma that replaces the slash
    ("A & B", b"A &- B"),
    ("&", b"&-"),
    ("Mit Leer/[x] \"y\" \\", b'Mit Leer/[x] "y" \\'),          # quoting is not the encoding's business
    ("😀", b"&2D3eAA-"),                                        # outside the first plane: two halves in UTF-16
    ("~peter/mail/台北/日本語", b"~peter/mail/&U,BTFw-/&ZeVnLIqe-"),        # the example of RFC 3501
])
def test_folder_names_of_the_rfc_and_of_real_servers(name: str, wire: bytes) -> None:
    """A wrong byte here opens another folder, or none."""
    assert imap_names.encode_folder(name) == wire
    assert imap_names.decode_folder(wire) == name


@given(NAMES)
def test_every_name_comes_back(name: str) -> None:
    """Folder names people give survive the wire, and the wire is printable ASCII."""
    wire = imap_names.encode_folder(name)
    assert imap_names.decode_folder(wire) == name
    assert wire.isascii()
    assert wire.decode().isprintable() or not wire


@given(st.binary(max_size=40) | st.from_regex(rb"[a&\-A-Za-z0-9+,=]{0,20}", fullmatch=True))
def test_any_bytes_are_a_name_and_never_a_false_one(wire: bytes) -> None:
    """Two spellings must not become one name, else the wrong folder is opened."""
    name = imap_names.decode_folder(wire)
    if wire.isascii() and name != wire.decode():        # it was decoded, not just read
        assert imap_names.encode_folder(name) == wire


@pytest.mark.parametrize("name", ["a\r\nb", "a\0b", "x\x7f", "\ud800"])
def test_names_that_could_break_the_line_are_refused(name: str) -> None:
    """CR LF in a folder name would be a command of its own."""
    with pytest.raises(MailboxError):
        imap_names.encode_folder(name)


@given(st.text() | st.binary())
def test_a_string_argument_cannot_leave_its_quotes(text: str | bytes) -> None:
    """User names and passwords with quotes, spaces, 8-bit and line ends arrive as they are, or are refused."""
    raw = text.encode("utf-8", "ignore") if isinstance(text, str) else text
    if b"\0" in raw:
        with pytest.raises(MailboxError):
            imap_names.astring(raw)
        return
    argument = imap_names.astring(raw)
    if isinstance(argument, Literal):
        assert argument.content == raw
        return
    assert re.fullmatch(rb'"(?:[^"\\\r\n]|\\.)*"', argument)
    assert re.sub(rb"\\(.)", rb"\1", argument[1:-1]) == raw


@pytest.mark.parametrize("flag", ["\\Seen)", "a b", "a\r\n", "", "\\", "ü", 'x"y', "a{3}", "*"])
def test_a_flag_that_is_none_is_refused(flag: str) -> None:
    """Keywords come from other people's messages; one with a parenthesis would change the command."""
    with pytest.raises(MailboxError):
        imap_names.flag_list([flag])


def test_flags_are_kept_and_recent_is_left_to_the_server() -> None:
    """APPEND with \\Recent is refused by servers, so a copied flag list must lose it."""
    assert imap_names.flag_list(["\\Seen", "\\Recent", "$Forwarded", "NonJunk", "a[b"]) == b"(\\Seen $Forwarded NonJunk a[b)"


@given(st.sets(st.integers(1, imap_names.MAX_UID)) | st.sets(st.integers(1, 300)))
def test_uid_sets_name_exactly_what_was_asked(uids: set[int]) -> None:
    """A set that names one UID too many would move or delete somebody's message."""
    parts = list(imap_names.uid_sets(uids))
    assert [uid for _, members in parts for uid in members] == sorted(uids)
    assert [uid for text, _ in parts for uid in imap_names.parse_uid_set(text)] == sorted(uids)


def test_long_uid_sets_are_split() -> None:
    """RFC 7162 4: a line of more than 8192 octets may be refused."""
    parts = list(imap_names.uid_sets(range(1_000_000, 1_050_000, 2)))
    assert max(len(text) for text, _ in parts) <= imap_names.MAX_SET_BYTES
    assert sum(len(members) for _, members in parts) == 25_000


@pytest.mark.parametrize("text", [b"", b"0", b"1:", b"1,,2", b"a", b"1:4294967295", b"4294967296", b"-1", b"1:*", b"\xb2"])
def test_uid_sets_that_are_none_or_too_large(text: bytes) -> None:
    """A hostile answer must not be written out in memory: 1:4294967295 would be 100 GB."""
    with pytest.raises(ValueError):
        imap_names.parse_uid_set(text)


@pytest.mark.parametrize(("text", "at_ms"), [
    ("17-Jul-1996 02:44:25 -0700", 837596665000),
    (" 1-Jan-1970 00:00:00 +0000", 0),
    ("1-jan-1970 01:00:00 +0100", 0),
    ("30-Jun-2012 23:59:60 +0000", 1341100799000),      # a leap second has no place in our count
])
def test_internal_dates(text: str, at_ms: int) -> None:
    """INTERNALDATE decides what is late; it also goes back into APPEND."""
    assert imap_names.internal_date_ms(text) == at_ms
    assert len(imap_names.internal_date(text)) == 28        # with quotes: date-time is 26 characters, the day padded


@given(st.integers(0, 4_000_000_000))
def test_dates_come_back(at_s: int) -> None:
    """Ours are written as servers write theirs."""
    assert imap_names.internal_date_ms(imap_names.format_internal_date(at_s * 1000)) == at_s * 1000


@pytest.mark.parametrize("text", ["", "x", "31-Feb-2020 00:00:00 +0000", "01-Foo-2020 00:00:00 +0000",
                                  "01-Jan-2020 00:00:00 +9900", '01-Jan-2020 00:00:00 +0000" (x', "01-Jan-0000 00:00:00 +0000"])
def test_dates_that_are_none_never_reach_the_wire(text: str) -> None:
    """A date is copied from one command's answer into another command."""
    with pytest.raises(MailboxError):
        imap_names.internal_date(text)


@given(st.text(max_size=30) | st.from_regex(imap_names._DATE, fullmatch=True))
def test_any_text_is_a_date_or_a_value_error(text: str) -> None:
    """Servers send dates that no calendar has; another exception would end the watcher."""
    try:
        imap_names.internal_date_ms(text)
    except ValueError:
        return
    assert imap_names._DATE.fullmatch(text)
