"""Addresses: one string per mailbox, and header values that cannot make a display name or a comment into an address."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from malote.core import address as address_module
from malote.core.address import (
    MAX_ROUTES,
    canonical_address,
    canonical_card_address,
    canonical_domain,
    domain_of,
    is_gateway,
    parse_mailboxes,
    routed_addresses,
)
from malote.errors import FormatError


@pytest.mark.parametrize(("text", "canonical"), [
    ("anna@example.org", "anna@example.org"),
    ("Anna.B+Tag@EXAMPLE.Org", "anna.b+tag@example.org"),
    ('"anna"@example.org', "anna@example.org"),                     # quoting that is not needed
    ('"an\\na"@example.org', "anna@example.org"),                   # neither is this escape
    ('"Anna B"@example.org', '"anna b"@example.org'),
    ('"a\\"b\\\\c"@example.org', '"a\\"b\\\\c"@example.org'),
    ('"a@b"@example.org', '"a@b"@example.org'),
    ('""@example.org', '""@example.org'),
    ("a@xn--bcher-kva.example", "a@xn--bcher-kva.example"),
    ("a@bücher.example", "a@xn--bcher-kva.example"),
    ("a@BÜCHER.example", "a@xn--bcher-kva.example"),
    ("a@bücher。example", "a@xn--bcher-kva.example"),               # ideographic full stop (UTS 46)
    ("a@bu\u0308cher.example", "a@xn--bcher-kva.example"),          # decomposed
    ("a@straße.example", "a@xn--strae-oqa.example"),                # IDNA 2008: not "strasse"
    ("jose\u0301@example.org", "josé@example.org"),                 # NFC
    ("用户@例子.广告", "用户@xn--fsqu00a.xn--4rr70v"),
    ("\u212a@example.org", "k@example.org"),                        # the Kelvin sign is K under NFC
    ("H\u0331@example.org", "\u1e96@example.org"),                   # composed in lower case only
    ("root@localhost", "root@localhost"),
    ("a@_x.example", "a@_x.example"),
    ("a@[192.0.2.1]", "a@[192.0.2.1]"),
    ("a@[IPV6:2001:DB8:0::1]", "a@[IPv6:2001:db8::1]"),
    ("x" * 200 + "@example.org", "x" * 200 + "@example.org"),       # bounce addresses are longer than 64
])
def test_spellings_of_one_mailbox_give_one_string(text: str, canonical: str) -> None:
    assert canonical_address(text) == canonical
    assert canonical_address(canonical) == canonical


@pytest.mark.parametrize("text", [
    "", "@", "anna", "anna@", "@example.org", " anna@example.org", "anna@example.org ", "anna @example.org",
    "anna@example.org\r\n", "anna@example.org\0", "anna\n@example.org", "an na@example.org", "<anna@example.org>",
    "Anna <anna@example.org>", "anna@example.org,bert@example.org", "a..b@example.org", ".a@example.org", "a.@example.org",
    "a@b@example.org", '"a"b@example.org', '"a@example.org', '"a\\"@example.org', '"a" @example.org', '"a".b@example.org',
    "a@example.org.", "a@.example.org", "a@exa mple.org", "a@-example.org", "a@example-.org", "a@example..org",
    "a@" + "x" * 64 + ".org", "a@" + "x." * 130 + "org", "x" * 256 + "@example.org",
    "a@[192.0.2]", "a@[IPv6:zz]", "a@[192.0.2.1", "a@[fe80::1%eth0]", "a@[IPv6:fe80::1%1]", "a@[x]",
    "@relay.example:anna@example.org", "a@exam\u200bple\ud800.org", "a\u200b@example.org", "a\u202e@example.org",
    "a\u00a0b@example.org", '"a\x01b"@example.org', '"a\u2028"@example.org', "a\ud800@example.org", "a@\u2024.org",
    "a\u037eb@example.org",                                         # NFC makes it a semicolon
    "anna(comment)@example.org", "anna@example.org(comment)", "a@ex:ample.org", "a@exämple\u2044.org",
])
def test_what_has_no_certain_meaning_is_refused(text: str) -> None:
    with pytest.raises(FormatError):
        canonical_address(text)


def test_error_does_not_repeat_the_address() -> None:
    """Errors reach logs and peers; addresses do not."""
    with pytest.raises(FormatError) as caught:
        canonical_address("secret person@example.org")
    assert "secret" not in str(caught.value)


def test_gateway_addresses() -> None:
    assert canonical_card_address("@EXAMPLE.org") == "@example.org"
    assert canonical_card_address("Anna@EXAMPLE.org") == "anna@example.org"
    assert is_gateway("@example.org")
    assert not is_gateway("anna@example.org")
    assert domain_of("@example.org") == domain_of('"a@b"@example.org') == "example.org"
    with pytest.raises(FormatError):
        canonical_card_address("@")


@pytest.mark.parametrize(("value", "addresses"), [
    ("", []),
    (" ", []),
    ("anna@example.org", ["anna@example.org"]),
    ("Anna <ANNA@example.org>", ["anna@example.org"]),
    ("<anna@example.org>", ["anna@example.org"]),
    ("< anna@example.org >", ["anna@example.org"]),
    ("Anna B. C. <anna@example.org>, bert@example.org", ["anna@example.org", "bert@example.org"]),
    ('"B, C" <anna@example.org>,,bert@example.org,', ["anna@example.org", "bert@example.org"]),
    ('"evil@example.net" <anna@example.org>', ["anna@example.org"]),
    ('"x\\" <evil@example.net>, \\"" <anna@example.org>', ["anna@example.org"]),
    ("anna@example.org (evil@example.net)", ["anna@example.org"]),
    ("(evil@example.net,) anna@example.org", ["anna@example.org"]),
    ("(a (nested <evil@example.net>) \\) comment) anna@example.org", ["anna@example.org"]),
    ("Anna (<evil@example.net>) <anna@example.org> (x)", ["anna@example.org"]),
    ("=?utf-8?q?evil=40example.net=2C?= <anna@example.org>", ["anna@example.org"]),
    ("=?utf-8?b?ZXZpbEBleGFtcGxlLm5ldA==?= <anna@example.org>", ["anna@example.org"]),
    ('"=?utf-8?q?evil=40example.net?=" <anna@example.org>', ["anna@example.org"]),
    ("Müller <anna@example.org>", ["anna@example.org"]),
    ("anna@bücher.example", ["anna@xn--bcher-kva.example"]),
    ("Friends: anna@example.org, Bert <bert@example.org>;", ["anna@example.org", "bert@example.org"]),
    ("undisclosed-recipients:;", []),
    ("Friends:;, carl@example.org", ["carl@example.org"]),
    ("A: a@example.org;, B: b@example.org;", ["a@example.org", "b@example.org"]),
    ("anna@example.org,\r\n bert@example.org", ["anna@example.org", "bert@example.org"]),
    ("anna@example.org,\n\tbert@example.org", ["anna@example.org", "bert@example.org"]),
    ('"a b"@example.org', ['"a b"@example.org']),
    ("a@[192.0.2.1]", ["a@[192.0.2.1]"]),
    ("anna@example.org, ANNA@example.org", ["anna@example.org", "anna@example.org"]),
])
def test_mailbox_lists(value: str, addresses: list[str]) -> None:
    assert parse_mailboxes(value) == addresses
    assert parse_mailboxes(value.encode()) == addresses


@pytest.mark.parametrize("value", [
    "anna", "Anna <anna>", "Anna anna@example.org", "anna@example.org bert@example.org",
    "anna@example.org <bert@example.org>", "evil@example.net <anna@example.org>",   # which one would another program take?
    "<anna@example.org> <bert@example.org>", "Anna <anna@example.org", "anna@example.org>", "<>", "Anna <>",
    "<<anna@example.org>>", "<@relay.example:anna@example.org>", "anna@example.org(", "(anna@example.org", '"anna@example.org',
    "anna @example.org", "anna@ example.org", "anna@example.org.", "anna(x)@example.org", "anna@(x)example.org",
    "<anna@example.org, bert@example.org>", "Friends: anna@example.org", "A: B: anna@example.org;;", ": a@example.org;", ";",
    "anna@example.org;", "anna@example.org; bert@example.org", "anna@example.org\r\nbert@example.org", "anna@example.org\0",
    "anna@example.org\r", "anna@exam\nple.org", "a\\b@example.org", "a@example.org\\", "(" * 50 + ")" * 50,
    "Friends: a@example.org; b@example.org", "a@b@example.org", "anna@example.org (x) bert@example.org",
])
def test_lists_that_two_programs_could_read_differently_are_refused(value: str) -> None:
    with pytest.raises(FormatError):
        parse_mailboxes(value)


def test_bytes_that_are_not_utf8_pass_in_names_and_are_refused_in_addresses() -> None:
    assert parse_mailboxes(b"M\xfcller <anna@example.org> (gr\xfc\xdfe)") == ["anna@example.org"]
    for value in (b"m\xfcller@example.org", b"anna@b\xfccher.example", b'"m\xfcller"@example.org'):
        with pytest.raises(FormatError):
            parse_mailboxes(value)


@given(st.text(max_size=60) | st.text(alphabet='ab@."\\<>(),;: []ü\r\n\t\u200b', max_size=30))
def test_any_text_gives_addresses_or_format_error(text: str) -> None:
    for function in (canonical_address, canonical_card_address):
        try:
            address = function(text)
        except FormatError:
            continue
        assert function(address) == address         # a canonical form is its own
        assert parse_mailboxes(f"x <{address}>") == [address] or is_gateway(address)
    try:
        addresses = parse_mailboxes(text)
    except FormatError:
        return
    for address in addresses:
        assert canonical_address(address) == address
    assert parse_mailboxes(", ".join(addresses)) == addresses


@given(st.binary(max_size=80))
def test_any_bytes_give_addresses_or_format_error(value: bytes) -> None:
    try:
        addresses = parse_mailboxes(value)
    except FormatError:
        return
    assert all(canonical_address(address) == address for address in addresses)


@given(st.text(max_size=40))
def test_any_domain_gives_a_domain_or_format_error(text: str) -> None:
    try:
        domain = canonical_domain(text)
    except FormatError:
        return
    assert domain.isascii()
    assert canonical_domain(domain) == domain


@pytest.mark.parametrize("value", ["(" * 500_000, '"' + "\\" * 900_000, "a," * 400_000 + "<", "a " * 500_000, "<" * 500_000,
                                   "x" * 1_048_577])
def test_large_values_end_quickly(value: str) -> None:
    """The timeout of the suite would notice quadratic work."""
    with pytest.raises(FormatError):
        parse_mailboxes(value)


@pytest.mark.parametrize(("address", "targets"), [
    ("bob@b.example", []), ("bob+tag@b.example", []), ("100%@b.example", []), ("!@b.example", []),
    ("bob%b.example@relay.example", ["bob@b.example"]), ("b.example!bob@relay.example", ["bob@b.example"]),
    ('"bob@b.example"@relay.example', ["bob@b.example"]), ('"bob@B.example."@relay.example', []),
    ("bob%b.example%c.example@relay.example", ["bob%b.example@c.example", "bob@b.example"]),
    ("c.example!b.example!bob@relay.example", ["b.example!bob@c.example", "bob@b.example"]),
    ('"two words%b.example"@relay.example', ['"two words"@b.example']),
    ('"bob%bücher.example"@relay.example', ["bob@xn--bcher-kva.example"]),
])
def test_routes_in_the_local_part(address: str, targets: list[str]) -> None:
    """Postfix and Sendmail follow them: what is written there is where the mail may go."""
    assert routed_addresses(canonical_address(address)) == targets


def test_too_many_routes_are_refused() -> None:
    routed_addresses("a" + "%b.example" * 10 + "@relay.example")
    with pytest.raises(FormatError):
        routed_addresses("a" + "%b.example" * 11 + "@relay.example")


def test_routes_that_lead_nowhere_cost_bounded_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each mark can be read in three ways, and what is left again: nothing but a count of all looks bounds that."""
    genuine, calls = canonical_address, 0

    def counted(text: str) -> str:
        nonlocal calls
        calls += 1
        return genuine(text)

    monkeypatch.setattr(address_module, "canonical_address", counted)
    with pytest.raises(FormatError):
        routed_addresses(genuine('"' + "@%!" * 6 + '"@relay.example'))
    assert calls <= MAX_ROUTES
