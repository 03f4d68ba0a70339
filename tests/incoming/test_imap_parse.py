"""Whatever a server sends, the reader of its answers gives a value or ValueError, and never a wrong UID."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from malote.incoming import imap_parse
from malote.incoming.imap_frame import Framer
from malote.incoming.imap_parse import Atom, Data, Status

# bytes that look like IMAP, so that the parser is reached in its corners
PIECES = [b"(", b")", b'"', b"\\", b" ", b"NIL", b"UID", b"1", b"BODY[", b"]", b"<0>", b"{3}", b"{", b"FETCH", b"COPYUID", b"1:3",
          b",", b"[", b"OK", b"* ", b"\r\n", b"\xff", b"FLAGS", b"\\Seen", b'"a"', b"ALL"]
WORDS = st.lists(st.sampled_from(PIECES), max_size=40).map(b"".join)


def data(line: bytes, *rest: bytes) -> Data:
    answer = imap_parse.parse_untagged([line, *rest])
    assert isinstance(answer, Data)
    return answer


@given(WORDS | st.binary(max_size=60), st.lists(WORDS, max_size=4))
def test_anything_is_a_value_or_a_value_error(line: bytes, rest: list[bytes]) -> None:
    """Another exception would end the task that watches the mailbox."""
    readers = [imap_parse.parse_fetch, imap_parse.parse_list, imap_parse.parse_search, imap_parse.parse_namespace]
    for prefix in (b"", b"1 FETCH ", b"LIST ", b"SEARCH ", b"ESEARCH "):
        try:
            answer = imap_parse.parse_untagged([prefix + line, *rest])
        except ValueError:
            continue
        if isinstance(answer, Status):
            continue
        for reader in readers:
            try:
                value = reader(answer)
            except ValueError:
                continue
            assert value is not None
    for parser in (imap_parse.parse_copyuid, imap_parse.parse_appenduid):
        try:
            validity, _ = parser(line)
        except ValueError:
            continue
        assert 1 <= validity <= 0xFFFFFFFF


@given(st.recursive(st.none() | st.binary(max_size=8), lambda inner: st.lists(inner, max_size=9), max_leaves=40))
def test_any_tree_is_a_body_structure_or_a_value_error(tree: object) -> None:
    """A stranger's message decides what BODYSTRUCTURE looks like."""
    try:
        parts = imap_parse.parse_structure(tree)        # type: ignore[arg-type]
    except ValueError:
        return
    assert all(part.section for part in parts)


def test_a_fetch_answer_with_all_that_hurts() -> None:
    """Quoted parentheses, escapes, literals and sections with spaces: aioimaplib counted brackets and lost the next answer."""
    items = imap_parse.parse_fetch(data(
        b'12 FETCH (UID 7 FLAGS (\\Seen a]b $X[1) X "a (b \\"c\\" \\\\" BODY[HEADER.FIELDS ("MALOTE" DATE)]<0> {5}', b"a)\r\n(",
        b' RFC822.SIZE 44 INTERNALDATE " 7-Jul-1996 02:44:25 -0700" X-Y NIL)'))
    assert imap_parse.fetch_uid(items) == 7
    assert imap_parse.fetch_flags(items) == ("\\Seen", "a]b", "$X[1")
    assert items["X"] == b'a (b "c" \\'
    assert imap_parse.fetch_body(items) == b"a)\r\n("
    assert imap_parse.fetch_number(items, "RFC822.SIZE") == 44


def test_news_of_flags_carries_no_uid() -> None:
    """Other clients' flag changes are mixed into answers; they must not be taken for one."""
    assert imap_parse.fetch_uid(imap_parse.parse_fetch(data(b"3 FETCH (FLAGS (\\Seen))"))) is None


def test_nesting_and_numbers_are_bounded() -> None:
    """No recursion, no number of a million digits."""
    with pytest.raises(ValueError, match="deep"):
        imap_parse.parse_values(b"(" * 5000 + b")" * 5000)
    with pytest.raises(ValueError, match="words"):
        imap_parse.parse_values(b"a " * (imap_parse.MAX_TOKENS + 1))
    with pytest.raises(ValueError, match="number"):
        imap_parse.fetch_number({"X": Atom(b"9" * 20)}, "X")


def test_open_brackets_cost_no_square() -> None:
    """A line of unclosed sections is read in linear time (this test would take minutes)."""
    assert len(imap_parse.parse_values(b"BODY[x " * 100_000)) == 100_000


@pytest.mark.parametrize(("line", "expected"), [
    (b"OK", Status("OK", "", b"", "")),
    (b"NO [OVERQUOTA] Quota exceeded", Status("NO", "OVERQUOTA", b"", "Quota exceeded")),
    (b"no [trycreate]", Status("NO", "TRYCREATE", b"", "")),
    (b"OK [COPYUID 38505 304,319:320 3956:3958] Done", Status("OK", "COPYUID", b"38505 304,319:320 3956:3958", "Done")),
    (b"OK [PERMANENTFLAGS (\\Seen \\*)] x", Status("OK", "PERMANENTFLAGS", b"(\\Seen \\*)", "x")),
    (b"NO [BADCHARSET (\"a]b\")] x", Status("NO", "BADCHARSET", b'("a]b")', "x")),
    (b"OK [unclosed text", Status("OK", "", b"", "[unclosed text")),
    (b"BAD \x1b[31m\xff", Status("BAD", "", b"", "?[31m\ufffd")),
])
def test_status_lines(line: bytes, expected: Status) -> None:
    """Codes decide what is done; the text goes to a terminal, so it cannot steer one."""
    assert imap_parse.parse_status(line) == expected


@pytest.mark.parametrize("arguments", [b"", b"1", b"1 2", b"1 2 3 4", b"0 1 1", b"1 1:2 5", b"1 1,1 5,6", b"1 1:9999999999 1",
                                       b"x 1 1", b"1 1 *"])
def test_a_copyuid_of_garbage_is_refused(arguments: bytes) -> None:
    """COPYUID says which copy is kept: a wrong pair would delete the right one."""
    with pytest.raises(ValueError):
        imap_parse.parse_copyuid(arguments)


def test_copyuid_pairs_by_position() -> None:
    """RFC 4315 3: sets are in the order of the copies."""
    assert imap_parse.parse_copyuid(b"38505 304,319:320 3956:3958") == (38505, {304: 3956, 319: 3957, 320: 3958})
    assert imap_parse.parse_appenduid(b"38505 3955") == (38505, [3955])


@pytest.mark.parametrize(("line", "rest", "wire", "delimiter"), [
    (b'LIST (\\HasNoChildren) "/" "A* B"', (), b"A* B", "/"),          # aioimaplib made "AB" of it
    (b'LIST (\\Junk) "\\\\" Spam', (), b"Spam", "\\"),
    (b"LIST () NIL INBOX", (), b"INBOX", ""),
    (b'LIST () "." {5}', (b'a"\\\r\n', b""), b'a"\\\r\n', "."),
    (b'LIST () "/" "NIL"', (), b"NIL", "/"),
    (b'LIST () "/" NIL', (), b"NIL", "/"),
    (b'LIST (\\Noselect) "/" ""', (), b"", "/"),
    (b'LIST () "/" ~x (("CHILDINFO" ("SUBSCRIBED")))', (), b"~x", "/"),
])
def test_list_answers(line: bytes, rest: tuple[bytes, ...], wire: bytes, delimiter: str) -> None:
    """A folder is addressed by exactly what the server calls it."""
    listed = imap_parse.parse_list(data(line, *rest))
    assert (listed.wire, listed.delimiter) == (wire, delimiter)


def test_search_answers() -> None:
    """Both forms; MODSEQ is no UID."""
    assert imap_parse.parse_search(data(b"SEARCH 5 3 3 (MODSEQ 917162500)")) == [3, 5]
    assert imap_parse.parse_search(data(b"SEARCH")) == []
    assert imap_parse.parse_search(data(b'ESEARCH (TAG "A282") UID ALL 4:6,2')) == [2, 4, 5, 6]
    assert imap_parse.parse_search(data(b'ESEARCH (TAG "A282") UID')) == []


def test_a_body_structure_names_sections_that_can_be_fetched() -> None:
    """The scan asks for the first bytes of each attachment by these names, also inside a forwarded message."""
    text = b'("TEXT" "PLAIN" ("CHARSET" "utf-8") NIL NIL "7BIT" 10 1 NIL NIL NIL NIL)'
    sealed = (b'("APPLICATION" "OCTET-STREAM" ("NAME" "a.bin") NIL NIL "BASE64" 5000 NIL ("ATTACHMENT" ("FILENAME" "b.bin"))'
              b" NIL NIL)")
    inner = b"(" + text + sealed + b' "MIXED" ("BOUNDARY" "y") NIL NIL NIL)'
    envelope = b'(NIL "s" NIL NIL NIL NIL NIL NIL NIL NIL)'
    forwarded = b'("MESSAGE" "RFC822" NIL NIL NIL "7BIT" 9000 ' + envelope + b" " + inner + b" 100 NIL NIL NIL NIL)"
    single = b'("MESSAGE" "RFC822" NIL NIL NIL "7BIT" 90 ' + envelope + b" " + text + b" 3 NIL NIL NIL NIL)"
    whole = b"(" + text + forwarded + single + b' "MIXED" ("BOUNDARY" "x") NIL NIL NIL)'
    (tree,) = imap_parse.parse_values(whole)
    parts = {part.section: part for part in imap_parse.parse_structure(tree)}
    assert {section: part.media_type for section, part in parts.items()} == {
        "1": "text/plain", "2": "message/rfc822", "2.1": "text/plain", "2.2": "application/octet-stream",
        "3": "message/rfc822", "3.1": "text/plain"}
    assert (parts["2.2"].size, parts["2.2"].encoding, parts["2.2"].name) == (5000, "base64", "a.bin")


# --- framing ---

def frames(stream: bytes, cuts: list[int], max_literal: int = 10_000) -> list[list[bytes]]:
    framer = Framer(max_literal)
    found: list[list[bytes]] = []
    edges = [0, *sorted(cut % (len(stream) + 1) for cut in cuts), len(stream)]
    for start, end in itertools.pairwise(edges):
        found += [parts for parts, _ in framer.feed(stream[start:end])]
    return found


STREAM = (b"* 1 FETCH (UID 1 BODY[] {12}\r\na\r\n{3}\r\nbc)\0 FLAGS ())\r\n"
          b"* OK text that ends in {5}\r\n"
          b"* 2 FETCH (BODY[] {0}\r\n BODY[1] ~{2}\r\n\r\n)\r\n"
          b"A1 OK {7}\r\n+ go {3}\r\n\r\n")
EXPECTED = [[b"* 1 FETCH (UID 1 BODY[] {12}", b"a\r\n{3}\r\nbc)\0", b" FLAGS ())"],
            [b"* OK text that ends in {5}"],
            [b"* 2 FETCH (BODY[] {0}", b"", b" BODY[1] ~{2}", b"\r\n", b")"],
            [b"A1 OK {7}"], [b"+ go {3}"], [b""]]


@given(st.lists(st.integers(0, 1000), max_size=30))
def test_responses_do_not_depend_on_how_they_were_cut(cuts: list[int]) -> None:
    """TCP cuts anywhere: in a CRLF, in a literal's size, in the literal."""
    assert frames(STREAM, cuts) == EXPECTED


def test_byte_by_byte() -> None:
    """The worst cut of all."""
    assert frames(STREAM, list(range(len(STREAM)))) == EXPECTED


@given(st.binary(max_size=200) | WORDS, st.lists(st.integers(0, 200), max_size=8))
def test_any_stream_is_responses_or_a_value_error(stream: bytes, cuts: list[int]) -> None:
    """Nothing is lost in between: what was not given out is still waiting."""
    try:
        found = frames(stream, cuts)
    except ValueError:
        return
    assert sum(len(part) for parts in found for part in parts) <= len(stream)


def test_a_literal_larger_than_allowed_is_not_waited_for() -> None:
    """`{4000000000}` must not fill the memory."""
    with pytest.raises(ValueError, match="large"):
        frames(b"* 1 FETCH (BODY[] {10001}\r\n", [])
    many = b"* 1 FETCH (X {10000}\r\n" + (b"y" * 10_000 + b" X {10000}\r\n") * 2000
    with pytest.raises(ValueError, match="response too large"):
        frames(many, [])


def test_an_endless_line_ends_the_connection_unless_a_stranger_could_have_written_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A BODYSTRUCTURE of megabytes is the work of a message; it is dropped, and the answers after it are read."""
    monkeypatch.setattr("malote.incoming.imap_frame.MAX_LINE", 1000)
    with pytest.raises(ValueError, match="line too long"):
        frames(b"* SEARCH " + b"1 " * 1000, [])
    long = b"* 5 FETCH (BODYSTRUCTURE (" + b"x " * 3000 + b"{4}\r\n\r\nOK y) UID 5)\r\n* 6 FETCH (UID 6)\r\n"
    assert frames(long, list(range(0, len(long), 7))) == [[b"* 6 FETCH (UID 6)"]]


def test_three_thousand_flags() -> None:
    """aioimaplib's parser called itself once per line and broke at about 900."""
    stream = b"".join(b"* %d FETCH (UID %d FLAGS (\\Seen))\r\n" % (number, number) for number in range(1, 3001))
    assert len(frames(stream, [])) == 3000
