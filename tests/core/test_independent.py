"""A reviewer's decoder, written from docs/format.md alone, and the daemon's read every message alike, also why they refuse it."""

from __future__ import annotations

import base64
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core import independent_decoder as other
from lab.envelope import message, person, recipient, seal_for
from malote.core import primitives
from malote.core.card import Card, parse_card
from malote.core.identity import Identity
from malote.core.inner import read_inner
from malote.core.keys import DecryptionKey, SignatureAlgorithm
from malote.core.open import authenticate, unseal
from malote.core.parts import find_parts
from malote.errors import Unreadable

VECTORS = sorted((Path(__file__).parent.parent / "vectors").glob("*.txt"))
EXAMPLE = Path(__file__).parent.parent.parent / "docs" / "format-example.txt"
ATTACHMENT = b"Content-Transfer-Encoding: base64\r\n\r\n" + base64.encodebytes(bytes(range(256)) * 40).replace(b"\n", b"\r\n")

Reading = tuple[str, bytes, str, int, int, bool] | tuple[str]


def ours(raw: bytes, keys: list[tuple[str, bytes]], card: Card) -> Reading:
    try:
        found = find_parts(raw)
        if found is None:
            return ("ordinary",)
        unsealed = unseal(found, [(address, DecryptionKey(seed)) for address, seed in keys])
    except Unreadable as error:
        return (error.reason.partition(":")[0],)
    opened = authenticate(unsealed, card)
    category = "signature failure" if opened.signature != "valid" else "success" if opened.addressed else "not addressed"
    return (category, opened.original, unsealed.sender, unsealed.serial, unsealed.prev, unsealed.forwarded)


def theirs(raw: bytes, keys: list[tuple[str, bytes]], card: Card) -> Reading:
    try:
        result = other.open_message(raw, keys, card.raw)
    except other.Refusal as refusal:
        return (refusal.category,)
    if result is None:
        return ("ordinary",)
    return (result.category, result.original, result.sender, result.serial, result.prev, result.forwarded)


@pytest.mark.parametrize("path", [*VECTORS, EXAMPLE], ids=lambda path: path.stem)
def test_vectors(path: Path) -> None:
    head, _, raw = path.read_bytes().partition(b"\n\n")
    fields = dict(line.split(": ", 1) for line in head.decode().splitlines())
    reading = theirs(raw, [(fields["address"], bytes.fromhex(fields["key"]))], parse_card(base64.b64decode(fields["card"])))
    assert reading[0] == fields["expect"]
    if len(reading) > 1:
        assert primitives.sha256(reading[1]).hex() == fields["sha256"]
        assert (str(reading[3]), str(reading[4]), reading[5]) == (fields["serial"], fields["prev"], fields["forwarded"] == "yes")


def keys_of(*identities: Identity) -> list[tuple[str, bytes]]:
    return [(identity.address, key.seed) for identity in identities for key in identity.decryption]


@pytest.mark.parametrize("algorithm", list(SignatureAlgorithm))
@pytest.mark.parametrize("original", [
    message(), message("") + ATTACHMENT, message().replace(b"\r\n", b"\n"), b"", b"\0", message("x" * 40_000),
    message(sender="=?utf-8?q?bob=40b.example?= <Alice@A.EXAMPLE>"), message(sender='"a\\"b" (c (d)) <alice@a.example>'),
], ids=["short", "attachment", "lf", "empty", "nul", "chunks", "encoded-word", "comments"])
def test_fresh_messages(algorithm: SignatureAlgorithm, original: bytes) -> None:
    alice, bob, carol = person("alice", algorithm), person("bob"), person("carol")
    raw = seal_for(original, [recipient(carol, serial=3, prev=1), recipient(bob)], alice).raw
    reading = theirs(raw, keys_of(bob), alice.card)
    assert reading == ours(raw, keys_of(bob), alice.card)
    assert reading[1:5] == (original, "alice@a.example", 7, 6)
    assert theirs(raw, keys_of(person("dave")), alice.card) == ("no match",)


def test_a_gateway_a_list_and_a_bcc() -> None:
    alice, bob, gateway = person("alice"), person("bob"), person("@b.example")
    for raw, keys in (
        (seal_for(message(), [recipient(gateway, address="bob@b.example")]).raw, keys_of(gateway)),
        (seal_for(message(), [recipient(bob, "list"), recipient(person("carol"), "list")]).raw, keys_of(bob)),
        (seal_for(message(), [recipient(bob, "bcc")]).raw, keys_of(gateway, bob)),
    ):
        assert theirs(raw, keys, alice.card)[0] == ours(raw, keys, alice.card)[0] == "success"


def damaged(raw: bytes, number: int) -> bytes:
    """One of a few kinds of damage, the same for the same number."""
    dice = random.Random(number)
    at = dice.randrange(len(raw))
    match dice.randrange(7):
        case 0:
            return raw[:at] + bytes([raw[at] ^ 1 << dice.randrange(8)]) + raw[at + 1:]
        case 1:
            return raw[:at]
        case 2:
            return raw[:at] + raw[min(len(raw), at + dice.randrange(1, 200)):]
        case 3:
            return raw[:at] + dice.choice([b"\r\n", b"\n", b"\r", b" ", b"=", b"--", b"\0", b"\r\n\r\n", b"A"]) + raw[at:]
        case 4:
            lines = raw.split(b"\r\n")
            first, second = dice.randrange(len(lines)), dice.randrange(len(lines))
            lines[first], lines[second] = lines[second], lines[first]
            return b"\r\n".join(lines)
        case 5:
            lines = raw.split(b"\r\n")
            del lines[dice.randrange(len(lines))]
            return b"\r\n".join(lines)
        case _:
            head, _, body = raw.partition(b"\r\n\r\n")
            kind = dice.choice([b"message/rfc822", b"multipart/mixed; boundary=q", b"message/global", b"text/plain"])
            return b"Content-Type: " + kind + b"\r\n\r\n" + dice.choice([b"", b"--q\r\n\r\n--q\r\n"]) + head + b"\r\n\r\n" + body


def test_damage_is_read_alike() -> None:
    """Neither opens, in a thousand kinds of damage, what the other refuses; and what both open is the same."""
    alice, bob = person("alice"), person("bob")
    raw = seal_for(message(), [recipient(person("carol"), serial=3, prev=1), recipient(bob)]).raw
    told_apart = 0
    for number in range(800):
        changed = damaged(raw, number)
        mine, his = ours(changed, keys_of(bob), alice.card), theirs(changed, keys_of(bob), alice.card)
        if len(mine) == len(his) == 1 and "ordinary" not in (*mine, *his):
            told_apart += mine != his       # of several reasons each may name another
        else:
            assert mine == his, number
    assert told_apart < 8


WORDS = st.sampled_from([
    "alice@a.example", "<alice@a.example>", "Alice", "\"Alice\"", ",", ";", ":", "(c)", "(", ")", " ",
    "\r\n ", "<", ">", "@", ".", "\\", "\"", "=?utf-8?q?x?=", "ALICE@A.EXAMPLE", "\"alice\"@a.example",
    "bob@b.example", "<bob@b.example>", "undisclosed:;", "\0", "\r", "\n\t", "a.example", "[192.0.2.1]",
    "@r.example:", "\u200b", "\u00e9", "alice@a.example.", "\x7f", "\x0b",
])


@pytest.mark.parametrize("value", [
    "undisclosed:;, alice@a.example", "x: alice@a.example;", "alice@a.example,", ", alice@a.example",
    "<@r.example:alice@a.example>", '"bob@b.example": alice@a.example;', '"a, b; c" <alice@a.example>', "(a, b) alice@a.example",
    "alice@a.example, <alice@a.example>", "bob@b.example <alice@a.example>", "alice@a.example <bob@b.example>",
    "alice @a.example", "alice@ a.example", "(alice@a.example) bob@b.example", "alice@a.example (bob@b.example",
])
def test_odd_from(value: str) -> None:
    original = f"From: {value}\r\n\r\nbody".encode()
    assert read_inner(original).from_address == other.from_of(original)


@given(st.lists(WORDS, max_size=6).map("".join), st.sampled_from(["From", "from", "FROM ", "From\t"]), st.booleans())
def test_from_is_read_alike(value: str, name: str, twice: bool) -> None:
    """Who a message is from: where two readers of the document could differ, there is nobody."""
    field = f"{name}: {value}\r\n".encode()
    original = b"Subject: x\r\n" + field + (b"From: alice@a.example\r\n" if twice else b"") + b"\r\nbody"
    mine, his = read_inner(original).from_address, other.from_of(original)
    assert mine == his or (mine is None and his is not None and not his.isascii()), (original, mine, his)
