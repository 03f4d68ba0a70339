"""What is sealed comes back byte for byte, and nothing that was done to it on the way passes for what was sent."""

from __future__ import annotations

import base64
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.envelope import (
    BOB,
    CAROL,
    MALLORY,
    NOW_MS,
    STREAM,
    Envelope,
    message,
    open_as,
    outer,
    person,
    recipient,
    refused,
    seal_for,
    unseal_as,
)
from malote.core import payload, primitives
from malote.core.identity import rotate
from malote.core.keys import SignatureAlgorithm
from malote.core.manifest import serialize_manifest
from malote.core.open import authenticate
from malote.core.outer import OuterHeaders
from malote.core.parts import find_parts
from malote.core.seal import NOTE
from malote.errors import FormatError

# --- round trip

LINES = base64.encodebytes(bytes(900))
PIECES = st.sampled_from([
    b"\r\n", b"\n", b"\r", b"\0", b"\xff\xfe", b"Content-Transfer-Encoding: base64\r\n\r\n", b"-", b"--b", b".", b" ",
    b"From: x\r\n", LINES, LINES.replace(b"\n", b"\r\n"),
])
ORIGINALS = st.one_of(st.binary(max_size=300), st.lists(st.one_of(PIECES, st.binary(max_size=20)), max_size=30).map(b"".join))


@given(ORIGINALS, st.booleans())
@settings(max_examples=150, deadline=None)
def test_any_bytes_come_back(original: bytes, fold: bool) -> None:
    opened = open_as(seal_for(original, [recipient(BOB)], fold=fold).raw, BOB)
    assert opened.original == original
    assert opened.signature == "valid"


@pytest.mark.parametrize("original", [
    b"", b"\0", b"no header", b"a: b\n\nunix", b"a: b\r\n\r\nno final newline", b"\r\n\r\n", b"8-bit \xe4\xf6 \x80",
    b"mixed\r\nends\nhere\r", message("x" * 2500), bytes(70_000), message() * 700,
])
def test_awkward_originals_come_back(original: bytes) -> None:
    opened = open_as(seal_for(original, [recipient(BOB)]).raw, BOB)
    assert opened.original == original
    assert opened.manifest.size == len(original)


@pytest.mark.parametrize("size", [0, 1, 16383, 16384, 16385, 32768, 100_000])
def test_every_chunk_boundary(size: int) -> None:
    """The last chunk is always shorter: sizes around a chunk are where an implementation gets it wrong."""
    envelope = Envelope(b"")
    assert payload.decrypt_payload(envelope.keys, envelope.encrypt(bytes(size))) == bytes(size)


@pytest.mark.parametrize("algorithm", list(SignatureAlgorithm))
def test_what_is_proven_about_a_message(algorithm: SignatureAlgorithm) -> None:
    alice = person("alice", algorithm)
    sealed = seal_for(message(), [recipient(BOB), recipient(CAROL, "cc", 3, 2)], alice)
    for who, serial, prev in ((BOB, 7, 6), (CAROL, 3, 2)):
        unsealed = unseal_as(sealed.raw, who)
        opened = authenticate(unsealed, alice.card)
        assert (opened.signature, opened.addressed, opened.from_matches, unsealed.forwarded) == ("valid", True, True, False)
        assert (unsealed.recipient, unsealed.stream, unsealed.serial, unsealed.prev) == (who.address, STREAM, serial, prev)
        assert (unsealed.sender, unsealed.kid) == ("alice@a.example", who.decryption[0].public.id)
        assert unsealed.payload_digest == sealed.payload_digest
        assert unsealed.original_sha512 == sealed.original_sha512 == primitives.sha512(message())
        assert opened.outer_differences == ()
        assert opened.manifest.message_id == "<one@a.example>"
        assert opened.claim("box").signature == "valid"


def test_the_original_is_not_reachable_before_it_is_authenticated() -> None:
    unsealed = unseal_as(seal_for(message(), [recipient(BOB)]).raw, BOB)
    assert not hasattr(unsealed, "original")
    assert "secret" not in repr(unsealed)
    assert "secret" not in repr(authenticate(unsealed, None))


def test_nobody_else_opens_it() -> None:
    assert refused(seal_for(message(), [recipient(BOB), recipient(CAROL)]).raw, MALLORY).startswith("no match")


def test_old_decryption_keys_still_open() -> None:
    """A key that was rotated away must not make old mail unreadable."""
    sealed = seal_for(message(), [recipient(BOB)])
    assert open_as(sealed.raw, rotate(BOB, NOW_MS + 1)).original == message()


def test_size_hides_in_classes() -> None:
    """A yes and a no have the same size on the wire; the container has the padded size and no other."""
    sizes = {len(seal_for(message("x" * n), [recipient(BOB)]).raw) for n in range(0, 600, 50)}
    assert len(sizes) == 1
    assert [payload.container_bytes(n) for n in (0, 4096, 4097, 10_000, 1_000_000)] == [4096, 4096, 4352, 10_240, 1_015_808]


def test_sealed_text_is_seven_bit_with_short_lines() -> None:
    raw = seal_for(bytes(range(256)) * 300, [recipient(BOB)]).raw
    assert raw.isascii()
    assert b"\0" not in raw
    assert raw.count(b"\n") == raw.count(b"\r\n") == raw.count(b"\r")
    assert max(map(len, raw.split(b"\r\n"))) <= 78
    assert b"secret" not in raw


# --- structure as docs/format.md 4.2 writes it

PART = (
    rb"--(?P=b)\r\nContent-Type: application/vnd\.malote\.%b\r\nContent-Transfer-Encoding: base64\r\n"
    rb'Content-Disposition: attachment; filename="%b"\r\n\r\n%b'
)
GRAMMAR = re.compile(b"".join([
    rb"(?:[!-9;-~]+:[ -~]*\r\n(?:[ \t][ -~]*\r\n)*)+?",
    rb'MIME-Version: 1\.0\r\nContent-Type: multipart/mixed; boundary="(?P<b>=_mlt_[A-Za-z0-9_-]{22})"\r\nMalote: 1\r\n\r\n',
    rb"--(?P=b)\r\nContent-Type: text/plain; charset=us-ascii\r\nContent-Transfer-Encoding: 7bit\r\n\r\n", re.escape(NOTE),
    rb"(?:", PART % (
        rb"key-blob(?:; kid=[0-9a-f]{16})?", rb"key-[0-9]{1,3}\.mlk", rb"(?:[A-Za-z0-9+/]{76}\r\n){21}[A-Za-z0-9+/]{34}==\r\n"
    ), rb"){1,100}",
    PART % (rb"sealed", rb"message\.mlp", rb"(?:[A-Za-z0-9+/]{76}\r\n)+(?:[A-Za-z0-9+/]{2,76}={0,2}\r\n)?"),
    rb"--(?P=b)--\r\n",
]))


def test_message_follows_the_grammar() -> None:
    for count in (1, 3, 12):
        raw = seal_for(message(), [recipient(person(f"p{n}"), serial=n + 7) for n in range(count)]).raw
        match = GRAMMAR.fullmatch(raw)
        assert match is not None
        assert raw.count(b"; kid=") == count


def test_each_message_has_its_own_randomness() -> None:
    first, second = (seal_for(message(), [recipient(BOB)]) for _ in range(2))
    assert first.payload_digest != second.payload_digest
    shared = set(re.findall(rb"boundary=\S+", first.raw)) & set(re.findall(rb"boundary=\S+", second.raw))
    assert not shared


# --- Bcc

def test_bcc_is_visible_to_nobody_else() -> None:
    """Neither address nor key id of a Bcc recipient, in text or binary or manifest, in anybody's copy but his own."""
    dave = person("dave")
    visible = seal_for(message(), [recipient(BOB), recipient(CAROL, "cc")])
    hidden = seal_for(message(), [recipient(dave, "bcc")])
    needles = [dave.address.encode(), dave.decryption[0].public.id[:8].hex().encode(), dave.decryption[0].public.id[:4]]
    opened = open_as(visible.raw, BOB)
    found = find_parts(visible.raw)
    assert found is not None
    places = [visible.raw, serialize_manifest(opened.manifest), *(part.raw for part in found.blobs), found.payloads[0].raw]
    assert not any(needle in place for needle in needles for place in places)
    assert b"kid=" not in hidden.raw
    assert dave.address.encode() not in hidden.raw
    assert [entry.address for entry in open_as(hidden.raw, dave).manifest.recipients] == [dave.address]
    assert open_as(hidden.raw, dave).addressed


def test_bcc_beside_others_is_not_sealed() -> None:
    with pytest.raises(ValueError, match="Bcc"):
        seal_for(message(), [recipient(BOB), recipient(CAROL, "bcc")])
    with pytest.raises(ValueError, match="Bcc"):
        seal_for(message(), [recipient(BOB, "bcc"), recipient(CAROL, "bcc")])


def test_members_of_a_list_are_not_named() -> None:
    raw = seal_for(message(), [recipient(BOB, "list"), recipient(CAROL, "list")]).raw
    opened = open_as(raw, CAROL)
    assert b"kid=" not in raw
    assert opened.addressed
    assert [entry.address for entry in opened.manifest.recipients] == [None, None]


def test_names_and_hints_can_be_left_out() -> None:
    raw = seal_for(message(), [recipient(BOB), recipient(CAROL)], show_key_ids=False, name_recipients=False).raw
    opened = open_as(raw, CAROL)
    assert b"kid=" not in raw
    assert opened.addressed
    assert {entry.address for entry in opened.manifest.recipients} == {None}


# --- outer header

def test_outer_header_is_signed_and_differences_are_seen() -> None:
    raw = seal_for(message(), [recipient(BOB)]).raw
    changed = raw.replace(b"Subject: [...]", b"Subject: [list] [...]").replace(b"Cc: carol@c.example\r\n", b"")
    changed = b"Received: from somewhere\r\nReply-To: mallory@m.example\r\n" + changed.replace(b"Date: ", b"Date:\r\n  ")
    opened = open_as(changed, BOB)
    assert opened.original == message()
    assert opened.addressed
    assert [(each.name, each.sent, each.found) for each in opened.outer_differences] == [
        ("Cc", ("carol@c.example",), ()), ("Reply-To", (), ("mallory@m.example",)), ("Subject", ("[...]",), ("[list] [...]",)),
    ]


@pytest.mark.parametrize("raw", [
    b"Subject: x\n", b"Subject: x\r\n\r\nbody", b"Subject: x\rBcc: y\r\n", b"Subject: x\0\r\n", b"Subject: x", b" Subject: x\r\n",
    b"no field\r\n",
])
def test_no_field_of_the_outer_header_ends_early(raw: bytes) -> None:
    with pytest.raises(FormatError):
        seal_for(message(), [recipient(BOB)], outer=OuterHeaders((("Subject", "x"),), raw, "", False))


@pytest.mark.parametrize("name", ["Bcc", "MIME-Version", "Content-Type", "Resent-Bcc", "content-disposition"])
def test_fields_that_must_never_be_outside(name: str) -> None:
    fields = OuterHeaders(((name, "x"),), f"{name}: x\r\n".encode(), "", False)
    with pytest.raises(ValueError, match="must not be there"):
        seal_for(message(), [recipient(BOB)], outer=fields)
    with pytest.raises(ValueError, match="differ"):
        seal_for(message(), [recipient(BOB)], outer=OuterHeaders(outer().fields, fields.raw, "", False))
