"""A gateway's word to the watchers behind it: who can say it, to whom, of what content, and what may stand around it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from malote.core import status
from malote.core.freshness import Judgement, Verdict
from malote.core.gateway_word import GatewayWord, export_key, make_word, parse_keys, read_word
from malote.errors import FormatError

MASTER, OTHER = bytes(range(32)), bytes(32)
ANNA, BEN = "anna@test.example", "ben@test.example"
MARK = "0123456789abcdef" * 2 + "-" + "ab" * 8
CONTENT = b"From: eve@sender.example\r\nSubject: hello\r\n\r\nGuten Tag\r\n"
BY = "malote-" + "1" * 32
TRACE = b"Return-Path: <eve@sender.example>\r\nReceived: from a by b;\r\n Tue, 24 Nov 2026 10:00:00 +0000\r\nX-Spam: no\r\n"


def delivered(address: str = ANNA, *, masters: tuple[bytes, ...] = (MASTER,), content: bytes = CONTENT,
              verdict: Verdict = Verdict.FRESH) -> bytes:
    headers = status.make_headers(b"k" * 32, BY, Judgement(verdict), "gw says: fine", MARK, content, ())
    return make_word(masters, "GW.test.example", address, 1_000, headers, content) + headers + content


def word(raw: bytes, *holders: str, master: bytes = MASTER, addresses: tuple[str, ...] = (ANNA,)) -> GatewayWord | None:
    return read_word(raw, [export_key(master, holder) for holder in holders or (ANNA,)], addresses, ("malote-" + "2" * 32,))


def is_proven(raw: bytes, *holders: str, master: bytes = MASTER, addresses: tuple[str, ...] = (ANNA,)) -> bool:
    found = word(raw, *holders, master=master, addresses=addresses)
    return found is not None and found.proven


def test_it_says_who_found_what_and_when() -> None:
    assert word(TRACE + delivered()) == GatewayWord("gw.test.example", Verdict.FRESH, MARK.partition("-")[0], 1_000, proven=True)


def test_only_who_has_the_key_of_the_address_can_say_it() -> None:
    """Of the address, or of its domain; and whoever watches one mailbox can speak for no other."""
    assert is_proven(delivered(), "@test.example")
    assert not is_proven(delivered(), master=OTHER)
    assert not is_proven(delivered(), BEN)
    assert not is_proven(delivered(), "@other.example")
    assert not is_proven(delivered(BEN), BEN, addresses=(ANNA,))          # said to somebody else
    assert not is_proven(delivered(BEN), "@test.example", addresses=(ANNA,))


def test_each_address_and_each_domain_has_a_key_of_its_own() -> None:
    """What one watcher holds is of no use against another: neither the same key, nor one from which the other follows."""
    holders = (ANNA, BEN, "@test.example", "anna@other.example", "@other.example")
    assert len({export_key(master, holder).key for holder in holders for master in (MASTER, OTHER)}) == 2 * len(holders)
    own = export_key(MASTER, ANNA)
    assert own.of(BEN) is None
    assert export_key(MASTER, "@test.example").of(ANNA) == own.key
    assert export_key(MASTER, "@test.example").of("anna@other.example") is None
    assert not is_proven(delivered(BEN, masters=(own.key,)), BEN, addresses=(BEN,))


def test_the_detail_of_an_address_is_the_same_mailbox() -> None:
    assert is_proven(delivered("anna+news@test.example"))


def test_a_new_key_beside_the_old_one_serves_both_until_that_is_retired() -> None:
    both = delivered(masters=(OTHER, MASTER))
    assert is_proven(both)
    assert is_proven(both, master=OTHER)
    assert not is_proven(delivered(masters=(OTHER,)))


@pytest.mark.parametrize("above", [
    b"From: boss@test.example\r\n", b"Subject: other\r\n", b"Content-Type: text/html\r\n", b"Malote-Verdict: FRESH\r\n",
    b"Malote-Mark: x\r\n", b"Malote-Gateway: gw\r\n", b"no field at all\r\n", b"\r\n", b"Received: a\rSubject: b\r\n",
    b"Received: a\0\r\n", b"X-Folded: a\r\n b\rSubject: c\r\n",
    b"Authentication-Results: malote-" + b"2" * 32 + b"; x-malote=pass\r\n",
    b"Authentication-Results: malote-" + b"1" * 32 + b"; x-malote=pass\r\n",
])
def test_nothing_but_trace_may_stand_above(above: bytes) -> None:
    """Else whoever gets hold of an opened message gives it another author or subject, and the verdict covers that."""
    assert word(above + delivered()) is None
    assert word(TRACE + above + delivered()) is None


def test_line_ends_may_change_and_nothing_else() -> None:
    raw = delivered()
    assert is_proven(raw.replace(b"\r\n", b"\n"))
    for at in range(0, len(raw), 3):
        changed = raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1:]
        if changed.lower() != raw.lower() and b"".join(changed.split()) != b"".join(raw.split()):
            assert not is_proven(changed), (at, raw[max(0, at - 20):at + 20])


def test_a_header_of_ours_in_the_content_is_never_covered() -> None:
    assert word(delivered(content=b"Malote-Verdict: FRESH\r\n" + CONTENT)) is None


@given(address=st.sampled_from([ANNA, '"a, b;c%"@test.example', "jürgen@test.example", "a" * 64 + "@" + "b" * 60 + ".example",
                                "anna@[192.0.2.1]"]))
def test_any_address(address: str) -> None:
    raw = delivered(address)
    assert is_proven(raw, address, addresses=(BEN, address))
    assert not is_proven(raw, address, addresses=(BEN,))
    assert max(map(len, raw.split(b"\r\n"))) < 998


@given(raw=st.binary(max_size=300) | st.text("Malote-Gateway: ;,\r\n").map(str.encode))
def test_no_input_sets_off_a_fault(raw: bytes) -> None:
    assert word(raw + delivered()) is None or raw == b"" or raw.lower().startswith((b"x-", b"received"))
    assert word(raw) is None


def test_a_long_header_without_a_colon_takes_linear_time() -> None:
    assert word(b"a" * 2_000_000 + b"\r\n" + delivered()) is None
    assert word(b"a\r\n" * 500_000 + delivered()) is None


def test_the_file() -> None:
    keys = [export_key(MASTER, holder) for holder in (ANNA, "@test.example")]
    text = "# a note\n\n" + "\n".join(key.line() for key in keys) + "\n"
    assert list(parse_keys(text)) == keys
    assert repr(keys[0]) == "GatewayKey(holder='anna@test.example')"        # never its key
    for bad in ("", "# nothing", keys[0].line() + "x", "malote-gateway-2 a@b.example " + "A" * 43, keys[0].line()[:-1], "x"):
        with pytest.raises(FormatError):
            parse_keys(bad)
