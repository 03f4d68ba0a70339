"""Cards: every bit is signed, text survives mail, and only the owner can replace a card."""

from __future__ import annotations

import base64
import contextlib
import email.policy
import quopri
import struct
import textwrap
from dataclasses import replace
from email.message import EmailMessage
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from malote.core import strict_json
from malote.core.armor import armored
from malote.core.card import MAGIC, Card, CardKey, armor, check_succession, make_card, parse_armored, parse_card
from malote.core.identity import KEY_LIFETIME_MS, Identity, new_identity, rotate
from malote.core.keys import DecryptionKey, SignatureAlgorithm, SigningKey
from malote.core.primitives import VERSION_SUITE
from malote.errors import FormatError, KeyMissing, KeyRefused

NOW_MS = 1_790_000_000_000
DAY_MS = 24 * 3600 * 1000
ANNA = new_identity("anna@example.org", SignatureAlgorithm.HYBRID, NOW_MS)
BERT = new_identity("bert@example.org", SignatureAlgorithm.ED25519, NOW_MS)
LABEL = b"MLT1 card\0"
BOTH = pytest.mark.parametrize("card", [ANNA.card, BERT.card], ids=["hybrid", "ed25519"])


def sign(members: dict[str, Any] | bytes, key: SigningKey = BERT.signing, counter: bytes = b"") -> bytes:
    """A card with whatever content, correctly signed: what a hostile but able owner can make."""
    content = members if isinstance(members, bytes) else strict_json.dumps(members)
    body = MAGIC + VERSION_SUITE + struct.pack(">I", len(content)) + content
    signed = body + struct.pack(">H", len(counter)) + counter
    return signed + key.sign(LABEL + signed)


def members_of(card: Card) -> dict[str, Any]:
    length = struct.unpack_from(">I", card.raw, 11)[0]
    return strict_json.loads(card.raw[15:15 + length], max_bytes=100_000, max_depth=5)


# --- bytes


@BOTH
def test_a_card_says_what_was_put_in(card: Card) -> None:
    assert parse_card(card.raw) == card
    assert (card.scope, card.sequence, card.previous) == ("user", 1, None)
    assert (card.made_at_ms, card.expires_at_ms) == (NOW_MS, NOW_MS + KEY_LIFETIME_MS)
    assert len(card.hash) == 32


def test_gateway_card() -> None:
    card = new_identity("@Example.ORG", SignatureAlgorithm.ED25519, NOW_MS).card
    assert (card.address, card.scope) == ("@example.org", "gateway")
    assert parse_armored(armor(card)) == [card]


def test_every_single_bit_flip_is_refused() -> None:
    """Nothing on a card is outside its signature. All bits of the small card, all bytes of the hybrid one."""
    countersigned = rotate(BERT, NOW_MS + 1, signing=True).card
    for raw in (BERT.card.raw, countersigned.raw):
        for bit in range(8 * len(raw)):
            flipped = bytearray(raw)
            flipped[bit // 8] ^= 1 << bit % 8
            with pytest.raises(FormatError):
                parse_card(bytes(flipped))
    for at in range(len(ANNA.card.raw)):
        flipped = bytearray(ANNA.card.raw)
        flipped[at] ^= 1 << at % 8
        with pytest.raises(FormatError):
            parse_card(bytes(flipped))


@BOTH
def test_cut_or_extended_cards_are_refused(card: Card) -> None:
    for length in range(0, len(card.raw), 7):
        with pytest.raises(FormatError):
            parse_card(card.raw[:length])
    for extra in (b"\0", b"x" * 100, card.raw):
        with pytest.raises(FormatError):
            parse_card(card.raw + extra)
        with pytest.raises(FormatError):
            parse_card(extra + card.raw)


@settings(max_examples=300)
@given(st.binary(max_size=200) | st.builds(
    lambda cut, rest: BERT.card.raw[:cut] + rest, st.integers(0, len(BERT.card.raw)), st.binary(max_size=60)))
def test_any_bytes_give_a_card_or_format_error(raw: bytes) -> None:
    try:
        card = parse_card(raw)
    except FormatError:
        return
    assert card.raw == raw


CHANGES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "version": ({"v": 2}, ()),
    "unknown member": ({"policy": "never"}, ()),
    "unknown member of a key": ({"enc": [{"pk": "", "from": 0, "to": 1, "x": 1}]}, ()),
    "no address": ({}, ("addr",)),
    "address not canonical": ({"addr": "Bert@example.org"}, ()),
    "address not valid": ({"addr": "bert"}, ()),
    "two addresses": ({"addr": "bert@example.org,anna@example.org"}, ()),
    "scope of a gateway, address of a user": ({"scope": "gateway"}, ()),
    "scope of a user, address of a gateway": ({"addr": "@example.org"}, ()),
    "unknown scope": ({"scope": "list"}, ()),
    "no encryption key": ({"enc": []}, ()),
    "too many encryption keys": ({"enc": members_of(BERT.card)["enc"] * 9}, ()),
    "encryption key is no object": ({"enc": [1]}, ()),
    "encryption key not valid": ({"enc": [members_of(BERT.card)["enc"][0] | {"pk": "/" * 1624}]}, ()),
    "encryption key cut": ({"enc": [members_of(BERT.card)["enc"][0] | {"pk": "AAAA"}]}, ()),
    "encryption key not base64": ({"enc": [members_of(BERT.card)["enc"][0] | {"pk": "A A="}]}, ()),
    "no end of validity": ({"enc": [{"pk": members_of(BERT.card)["enc"][0]["pk"], "from": 0}]}, ()),
    "time before 1970": ({"made": -1}, ()),
    "time is text": ({"made": "0"}, ()),
    "time after 9999": ({"exp": 2**52}, ()),
    "sequence negative": ({"seq": -1}, ()),
    "unknown algorithm": ({"sig": members_of(BERT.card)["sig"] | {"alg": "none"}}, ()),
    "algorithm of another key": ({"sig": members_of(BERT.card)["sig"] | {"alg": "ed25519+ml-dsa-65"}}, ()),
    "key of somebody else": ({"sig": members_of(ANNA.card)["sig"]}, ()),
    "predecessor without its signature": ({"prev": "00" * 32}, ()),
}


@pytest.mark.parametrize("name", CHANGES)
def test_well_signed_nonsense_is_refused(name: str) -> None:
    """A good signature is no reason to accept content that two readers could understand differently."""
    changed, removed = CHANGES[name]
    members = {key: value for key, value in (members_of(BERT.card) | changed).items() if key not in removed}
    with pytest.raises(FormatError):
        parse_card(sign(members))


def test_members_for_later_are_ignored_but_signed() -> None:
    raw = sign(members_of(BERT.card) | {"_later": "x"})
    assert parse_card(raw).address == "bert@example.org"
    with pytest.raises(FormatError):
        parse_card(raw.replace(b'"_later":"x"', b'"_later":"y"'))


def test_duplicate_member_is_refused() -> None:
    content = strict_json.dumps(members_of(BERT.card))
    with pytest.raises(FormatError):
        parse_card(sign(content[:-1] + b',"addr":"anna@example.org"}'))


def test_countersignature_without_predecessor_is_refused() -> None:
    with pytest.raises(FormatError):
        parse_card(sign(members_of(BERT.card), counter=b"x" * 64))


def test_a_signature_for_something_else_is_no_card_signature() -> None:
    """Labels keep the signatures of cards, successions and messages apart."""
    raw = BERT.card.raw
    for label in (b"", b"MLT1 signature\0", b"MLT1 card succession\0"):
        with pytest.raises(FormatError):
            parse_card(raw[:-64] + BERT.signing.sign(label + raw[:-64]))


# --- which key


def test_encryption_key_by_time() -> None:
    old, new = DecryptionKey.generate().public, DecryptionKey.generate().public
    keys = [CardKey(old, NOW_MS, NOW_MS + 20 * DAY_MS), CardKey(new, NOW_MS + 10 * DAY_MS, NOW_MS + 30 * DAY_MS)]
    card = make_card(BERT.signing, "bert@example.org", keys, sequence=1, made_at_ms=NOW_MS, expires_at_ms=NOW_MS + 25 * DAY_MS)
    expected = [(0, old), (-DAY_MS, old), (10 * DAY_MS - 1, old), (10 * DAY_MS, new), (19 * DAY_MS, new), (24 * DAY_MS, new)]
    for after_ms, key in expected:
        assert card.encryption_key(NOW_MS + after_ms) == key
    for after_ms in (-DAY_MS - 1, 25 * DAY_MS, 40 * DAY_MS):
        with pytest.raises(KeyMissing, match=r"bert@example\.org") as caught:
            card.encryption_key(NOW_MS + after_ms)
        assert caught.value.hint


# --- succession


def test_succession() -> None:
    first = BERT
    rotated = rotate(first, NOW_MS + 1)
    check_succession(first.card, first.card)
    check_succession(first.card, rotated.card)
    assert rotated.card.fingerprint == first.card.fingerprint
    resigned = rotate(rotated, NOW_MS + 2, signing=True)
    assert resigned.card.fingerprint != first.card.fingerprint
    check_succession(first.card, resigned.card)
    check_succession(rotated.card, resigned.card)
    later = rotate(resigned, NOW_MS + 3)
    check_succession(resigned.card, later.card)
    check_succession(first.card, later.card)        # whoever missed the card between them can still follow


def test_refused_successions() -> None:
    rotated, stranger = rotate(BERT, NOW_MS + 1), new_identity("bert@example.org", SignatureAlgorithm.ED25519, NOW_MS + 1)
    forged = make_card(             # claims the predecessor, but cannot sign with it
        stranger.signing, "bert@example.org", stranger.card.encryption, sequence=9, made_at_ms=NOW_MS, expires_at_ms=NOW_MS + 9,
        predecessor=SigningKey.generate(SignatureAlgorithm.ED25519),
    )
    members = members_of(forged) | {"prev": BERT.signing.public.id.hex()}
    claimed = parse_card(sign(members, stranger.signing, counter=stranger.signing.sign(b"MLT1 card succession\0")))
    twice = rotate(rotate(BERT, NOW_MS + 1, signing=True), NOW_MS + 2, signing=True)
    for old, new in (
        (rotated.card, BERT.card),          # an older card, sent again
        (BERT.card, stranger.card), (BERT.card, forged), (BERT.card, claimed),
        (BERT.card, twice.card),            # signed by a predecessor that is not known here
        (BERT.card, ANNA.card),
        (rotated.card, rotate(BERT, NOW_MS + 2).card),      # same sequence, other content
    ):
        with pytest.raises(KeyRefused):
            check_succession(old, new)
    with pytest.raises(KeyRefused) as caught:
        check_succession(BERT.card, stranger.card)
    assert BERT.card.fingerprint in str(caught.value)
    assert stranger.card.fingerprint in str(caught.value)


@pytest.mark.parametrize(("named", "accepted"), [(BERT, True), (ANNA, False)])
def test_a_countersignature_is_by_the_key_that_the_card_names(named: Identity, accepted: bool) -> None:
    """Good by the key held, which must be the one that the card says came before it."""
    key = SigningKey.generate(SignatureAlgorithm.ED25519)
    members = members_of(rotate(BERT, NOW_MS + 1).card) | {
        "prev": named.signing.public.id.hex(), "sig": {"alg": "ed25519", "pk": base64.b64encode(key.public.raw).decode()},
    }
    content = strict_json.dumps(members)
    body = MAGIC + VERSION_SUITE + struct.pack(">I", len(content)) + content
    card = parse_card(sign(members, key, BERT.signing.sign(b"MLT1 card succession\0" + body)))
    with contextlib.nullcontext() if accepted else pytest.raises(KeyRefused):
        check_succession(BERT.card, card)


def test_an_old_card_of_the_new_key_does_not_come_back() -> None:
    """Succession to another signing key needs a higher sequence too."""
    low = make_card(
        ANNA.signing, "bert@example.org", BERT.card.encryption, sequence=1, made_at_ms=NOW_MS, expires_at_ms=NOW_MS + 9,
        predecessor=BERT.signing,
    )
    with pytest.raises(KeyRefused, match="older"):
        check_succession(BERT.card, low)


# --- text


@BOTH
def test_armour_is_plain_short_ascii_lines(card: Card) -> None:
    text = armor(card)
    assert text.isascii()
    assert max(map(len, text.splitlines())) <= 64
    assert text.startswith("-----BEGIN MALOTE CARD-----\nAddress: ")
    assert text.endswith("\n-----END MALOTE CARD-----\n")
    assert not any(line.startswith((".", "From ")) for line in text.splitlines())
    assert parse_armored(text) == [card]
    assert parse_armored(text.encode()) == [card]


def quoted(text: str, mark: str) -> str:
    return "".join(mark + line for line in text.splitlines(keepends=True))


MANGLINGS: dict[str, Any] = {
    "CRLF": lambda t: t.replace("\n", "\r\n"),
    "CR CR LF": lambda t: t.replace("\n", "\r\r\n"),
    "byte order mark": lambda t: "\ufeff" + t,
    "no final line end": lambda t: t.rstrip("\n"),
    "text around": lambda t: f"Dear Bert,\n\nhere is my card:\n{t}\nRegards\n--\nAnna\n",
    "list footer": lambda t: t + "_" * 47 + "\nlist mailing list\nlist@example.org\nhttps://example.org/list\n",
    "quoted": lambda t: quoted(t, "> "),
    "quoted twice": lambda t: quoted(t, "> > "),
    "quoted tightly": lambda t: quoted(t, ">>"),
    "quoted with stripped blanks": lambda t: "\n".join(line.rstrip() for line in quoted(t, "> ").split("\n")),
    "indented": lambda t: quoted(t, "    "),
    "trailing spaces": lambda t: t.replace("\n", "   \n"),
    "trailing tab and CRLF": lambda t: t.replace("\n", "\t\r\n"),
    "double spaced": lambda t: t.replace("\n", "\n\n"),
    "no empty line": lambda t: t.replace("\n\n", "\n"),
    "no comment": lambda t: "\n".join(line for line in t.split("\n") if ": " not in line),
    "format=flowed": lambda t: quoted(t, " ").replace("\n", " \n"),
    "quoted-printable": lambda t: quopri.encodestring(t.encode()).decode(),
    "quoted-printable, short lines": lambda t: "\n".join(
        "=\n".join(textwrap.wrap(line.replace("=", "=3D"), 40, break_on_hyphens=False, drop_whitespace=False))
        for line in t.split("\n")),
    "dash escaped": lambda t: t.replace("-----", "- -----", 1).replace("\n-----END", "\n- -----END"),
    "HTML": lambda t: "<div>" + t.replace("\n", "<br>\n") + "</div>",
    "HTML paragraphs": lambda t: "".join(f"<p>{line}&nbsp;</p>" for line in t.splitlines()),
    "no-break spaces": lambda t: t.replace("Address: ", "Address:\u00a0"),
    "twice": lambda t: t + "\n" + quoted(t, "> "),
}
for width in (30, 60, 72, 76, 1000):
    MANGLINGS[f"rewrapped at {width}"] = lambda t, width=width: "\n".join(
        piece for line in (t if width < 1000 else t.replace("\n", " ")).split("\n")
        for piece in ([line] if line.startswith("-----") else textwrap.wrap(line, width)))


@pytest.mark.parametrize("mangling", MANGLINGS)
@BOTH
def test_armoured_cards_survive_mail(card: Card, mangling: str) -> None:
    mangled = MANGLINGS[mangling](armor(card))
    assert parse_armored(mangled) == [card]
    assert parse_armored(mangled.encode()) == [card]


@pytest.mark.parametrize("encoding", ["7bit", "quoted-printable", "base64"])
@pytest.mark.parametrize("attached", [False, True])
def test_cards_in_whole_mails(encoding: str, attached: bool) -> None:
    message = EmailMessage(policy=email.policy.SMTP)
    message["Subject"] = "my card"
    if not attached:
        message.set_content("Dear Bert,\n\n" + armor(ANNA.card), cte=encoding)
    else:
        message.set_content("Voilà\n", cte="quoted-printable")
        message.add_attachment(armor(ANNA.card), filename="anna.malote", cte=encoding)
    assert parse_armored(message.as_bytes()) == [ANNA.card]


def test_several_cards_in_one_text() -> None:
    assert parse_armored(armor(ANNA.card) + "and\n" + armor(BERT.card)) == [ANNA.card, BERT.card]


@pytest.mark.parametrize("address", [
    '"anna maria <x> iu1mqw0kggo"@example.org', "anna=x=3D@example.org", "jürgen@xn--bcher-kva.example",
    "anna" * 40 + "@" + "example." * 20 + "org",
])
@pytest.mark.parametrize("mangling", ["CRLF", "quoted", "quoted-printable", "rewrapped at 60", "double spaced"])
def test_unusual_addresses_survive_too(address: str, mangling: str) -> None:
    card = new_identity(address, SignatureAlgorithm.ED25519, NOW_MS).card
    assert parse_armored(MANGLINGS[mangling](armor(card)).encode()) == [card]


@pytest.mark.parametrize("text", [
    armor(ANNA.card).replace("Address: anna@", "Address: bert@"),
    armor(ANNA.card).replace(ANNA.card.fingerprint, BERT.card.fingerprint),
    armor(ANNA.card).replace("Address:", "Name: Bert\nAddress:"),
    armor(ANNA.card).replace("Fingerprint:", "Address: bert@example.org\nFingerprint:"),
    armored("MALOTE CARD", ANNA.card.raw, ["Address: bert@example.org"]),
    armored("MALOTE CARD", ANNA.card.raw, ["This card has been verified by your administrator"]),
])
def test_lines_for_people_cannot_mislead(text: str) -> None:
    """Whoever reads the text must not see another address or digits than the machine (an unsigned field is an attack)."""
    with pytest.raises(FormatError, match="do not belong"):
        parse_armored(text)


@pytest.mark.parametrize(("text", "words"), [
    ("", "no card"),
    ("Hello", "no card"),
    ("-----BEGIN PGP PUBLIC KEY BLOCK-----\n-----END PGP PUBLIC KEY BLOCK-----\n", "no card"),
    ("-----BEGIN MALOTE CARD-----\n-----END MALOTE CARD-----\n", "damaged"),
    (armor(ANNA.card)[:2000], "cut off"),
    (armor(ANNA.card)[:2000] + armor(BERT.card), "cut off"),
    (armor(ANNA.card).replace("\n", "\nx", 6), "damaged"),
    (armor(BERT.card)[:-40] + "-----END MALOTE CARD-----", "damaged"),
    (armor(BERT.card) + armor(ANNA.card).replace("iU1MQw0KGgoBAAEA", "iU1MQw0KGgoBAAEB"), "cut off"),
    (armor(BERT.card).replace("iU1MQw0KGgoBAAEAAA", "iU1MQw0KGgoBAAEAA"), "not complete"),
    (armored("MALOTE CARD", BERT.card.raw[:-10] + bytes(10), []), "damaged"),
    (armored("MALOTE CARD", b"hello", []), "damaged"),
    (armored("MALOTE CARD", MAGIC + b"\x02\x00\x01" + BERT.card.raw[11:], []), "version"),
])
def test_bad_texts_say_what_is_wrong(text: str, words: str) -> None:
    with pytest.raises(FormatError, match=words):
        parse_armored(text)


@settings(max_examples=200)
@given(st.integers(0, len(armor(BERT.card)) * 8 - 1))
def test_bit_flips_in_the_text_never_give_another_card(bit: int) -> None:
    """A flip in white space may not matter; anything else is refused."""
    text = bytearray(armor(BERT.card).encode())
    text[bit // 8] ^= 1 << bit % 8
    try:
        cards = parse_armored(bytes(text))
    except FormatError:
        return
    assert cards == [BERT.card]


@given(st.binary(max_size=300) | st.text(alphabet="=<>-ABiU1MQw0KGgo \r\n\u00a0", max_size=80).map(
    lambda middle: f"-----BEGIN MALOTE CARD-----\n{middle}\n-----END MALOTE CARD-----".encode()))
def test_any_text_gives_cards_or_format_error(text: bytes) -> None:
    with pytest.raises(FormatError):
        parse_armored(text)


def test_deeply_nested_mail_is_format_error() -> None:
    nested = b"".join(b"Content-Type: multipart/mixed; boundary=b%d\n\n--b%d\n" % (n, n) for n in range(3000))
    with pytest.raises(FormatError):
        parse_armored(nested)


def test_raw_is_not_shown() -> None:
    assert "raw" not in repr(ANNA.card)
    assert replace(ANNA.card, raw=b"").raw == b""
