"""What is sealed comes back byte for byte, and nothing that was done to it on the way passes for what was sent."""

from __future__ import annotations

import base64
import json
import re
import zlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.envelope import (
    NOW_MS,
    STREAM,
    Envelope,
    message,
    open_as,
    outer,
    person,
    recipient,
    seal_for,
    unseal_as,
    wrap,
)
from malote.core import blob, payload, primitives
from malote.core.identity import rotate
from malote.core.keys import SignatureAlgorithm
from malote.core.manifest import belongs_to, parse_manifest, serialize_manifest
from malote.core.open import MAX_TRIALS, authenticate, unseal
from malote.core.outer import OuterHeaders
from malote.core.parts import FoundKeyBlob, FoundParts, FoundPayload, find_parts
from malote.core.seal import NOTE, SealRecipient
from malote.errors import FormatError, SenderRefused, Unreadable

ALICE, BOB, CAROL, MALLORY = map(person, ("alice", "bob", "carol", "mallory"))


def refused(raw: bytes, who: Any = BOB) -> str:
    with pytest.raises(Unreadable) as caught:
        unseal_as(raw, who)
    assert str(caught.value) == "cannot be opened (no matching key, or damaged)"
    return caught.value.reason


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


# --- attacks on addressing and signatures (reference: surreptitious forwarding, transplant, forged serial)

def test_blob_transplant_is_refused() -> None:
    """A blob of message 2 does not open message 1, also when its envelope id is rewritten."""
    one, two = Envelope(message()).add(BOB), Envelope(message()).add(BOB)
    assert refused(wrap(two.parts, one.payload())).startswith("no match")
    forged = one.header.eid + blob.parse_key_blob(two.parts[0][1]).blob
    moved = two.parts[0][1][:11] + forged
    assert refused(wrap([("", moved)], one.payload())).startswith("no match")


def test_surreptitious_forwarding_is_not_for_me() -> None:
    """Bob knows the session key of Alice's message and wraps it for Carol: she sees that it was not sent to her."""
    original = Envelope(message()).add(BOB)
    sealed = original.payload()
    forwarded = Envelope(b"", cek=original.cek)
    forwarded.header = original.header
    forwarded.add(CAROL)
    opened = open_as(wrap(forwarded.parts, sealed), CAROL)
    assert (opened.signature, opened.addressed) == ("valid", False)


def test_re_encryption_is_not_signed() -> None:
    """The signed content under another session key has another header, which the signature does not cover."""
    original = Envelope(message()).add(BOB)
    container = original.container()
    again = Envelope(b"").add(CAROL)
    opened = open_as(again.raw(again.encrypt(container)), CAROL)
    assert (opened.signature, opened.addressed) == ("bad", False)


def test_forged_serial_by_a_co_recipient_is_not_for_me() -> None:
    envelope = Envelope(message()).add(BOB).add(CAROL)
    sealed = envelope.payload()
    forger = Envelope(b"", cek=envelope.cek)
    forger.header = envelope.header
    forger.add(CAROL, serial=999, prev=0)
    assert not open_as(wrap(forger.parts, sealed), CAROL).addressed
    both = open_as(wrap(forger.parts + envelope.parts, sealed), CAROL)
    assert (both.addressed, both.unsealed.serial) == (True, 7), "a forged blob in front must not hide the genuine one"


def test_session_key_equivocation_is_refused() -> None:
    """Two recipients cannot be given two keys for one payload: the header commits to one."""
    envelope = Envelope(message())
    envelope.add(BOB).add(CAROL, cek=bytes(32))
    assert open_as(envelope.raw(), BOB).addressed
    assert refused(envelope.raw(), CAROL) == "header failure: session key is not the committed one"


def test_signature_must_be_by_the_card_and_by_nothing_less() -> None:
    hybrid = person("alice", SignatureAlgorithm.HYBRID)
    signed = Envelope(message(), hybrid).add(BOB)
    assert open_as(signed.raw(), BOB, hybrid.card).signature == "valid"
    assert open_as(signed.raw(), BOB, ALICE.card).signature == "bad"
    manifest = json.dumps(signed.members).encode()
    signed.manifest = manifest
    whole = hybrid.signing.sign(payload.signature_input(signed.header, manifest))
    for partly in (whole[:64], whole[:64] + bytes(3309), bytes(64) + whole[64:], b"", whole + b"\0"):
        signed.signature = partly
        assert open_as(signed.raw(), BOB, hybrid.card).signature == "bad"


def test_signature_covers_header_and_manifest() -> None:
    envelope = Envelope(message()).add(BOB)
    envelope.signed_header = Envelope(message()).header
    assert open_as(envelope.raw(), BOB).signature == "bad"
    other = Envelope(message()).add(BOB)
    manifest = json.dumps(other.members).encode()
    other.signature = ALICE.signing.sign(payload.signature_input(other.header, manifest))
    other.members["sent"] += 1
    assert open_as(other.raw(), BOB).signature == "bad"


def test_unknown_revoked_and_expired_senders() -> None:
    unsealed = unseal_as(seal_for(message(), [recipient(BOB)]).raw, BOB)
    assert authenticate(unsealed, None).signature == "unknown-sender"
    assert authenticate(unsealed, MALLORY.card).signature == "bad"
    assert authenticate(unsealed, ALICE.card, revoked_at_ms=NOW_MS).signature == "revoked"
    assert authenticate(unsealed, ALICE.card, revoked_at_ms=NOW_MS + 1).signature == "valid"
    late = unseal_as(seal_for(message(), [recipient(BOB)], sent_at_ms=ALICE.card.expires_at_ms + 1).raw, BOB)
    assert authenticate(late, ALICE.card).signature == "revoked"


@pytest.mark.parametrize("changed", [
    message(sender="mallory@m.example"),
    message(sender='"alice@a.example" <mallory@m.example>'),
    message(sender="alice@a.example, mallory@m.example"),
    message(sender="alice@a.example\r\nFrom: mallory@m.example"),
    message(sender="alice@a.example\r\nfrom : mallory@m.example"),
    message(sender="alice@a.example\r\nX: y\rFrom: mallory@m.example"),
    message(sender="mallory@m.example (alice@a.example)"),
    message(sender="alice@a.example\0"),
    message(sender="undisclosed: ;"),
    message(sender="=?utf-8?q?alice=40a.example?="),
    message().replace(b"From:", b"X-From:"),
])
def test_from_that_is_not_the_signer_is_never_alices(changed: bytes) -> None:
    opened = open_as(seal_for(changed, [recipient(BOB)]).raw, BOB)
    assert (opened.signature, opened.from_matches, opened.addressed) == ("valid", False, False)


@pytest.mark.parametrize("spelling", ["Alice <ALICE@A.Example>", "alice@a.example", '"Mallory <m@m.example>" <alice@a.example>'])
def test_from_is_compared_as_an_address(spelling: str) -> None:
    assert open_as(seal_for(message(sender=spelling), [recipient(BOB)]).raw, BOB).addressed


def test_gateway_speaks_for_its_domain_only() -> None:
    gateway = person("@a.example")
    opened = open_as(seal_for(message(), [recipient(BOB)], gateway).raw, BOB, gateway.card)
    assert (opened.signature, opened.addressed, opened.manifest.scope) == ("valid", True, "gateway")
    assert opened.manifest.sender == "alice@a.example"
    assert open_as(seal_for(message(), [recipient(BOB)], gateway).raw, BOB, ALICE.card).signature == "bad"
    with pytest.raises(SenderRefused):
        seal_for(message(sender="eve@other.example"), [recipient(BOB)], gateway)
    claims = Envelope(message(sender="eve@other.example"), gateway).add(BOB)
    claims.members |= {"from": "eve@other.example", "scope": "gateway"}
    assert open_as(claims.raw(), BOB, gateway.card).signature == "bad"
    personal = Envelope(message()).add(BOB)
    personal.members["scope"] = "gateway"
    assert open_as(personal.raw(), BOB).signature == "bad"


@pytest.mark.parametrize(("address", "card", "belongs"), [
    ("a@x.example", "a@x.example", True), ("b@x.example", "a@x.example", False), ("a@x.example", "@x.example", True),
    ("a@s.x.example", "@x.example", True), ("a@notx.example", "@x.example", False), ("a@example", "@x.example", False),
])
def test_whom_a_card_speaks_for(address: str, card: str, belongs: bool) -> None:
    assert belongs_to(address, card) is belongs


def test_gateway_key_opens_for_a_person_of_its_domain() -> None:
    gateway = person("@b.example")
    opened = open_as(seal_for(message(), [recipient(gateway, address="bob@b.example")]).raw, gateway)
    assert (opened.addressed, opened.unsealed.recipient) == (True, "bob@b.example")
    stranger = open_as(seal_for(message(), [recipient(gateway, address="bob@z.example")]).raw, gateway)
    assert not stranger.addressed


def test_one_key_under_two_addresses() -> None:
    found = find_parts(seal_for(message(), [recipient(BOB)]).raw)
    assert found is not None
    key = BOB.decryption[0]
    for addresses in (("alias@b.example", BOB.address), (BOB.address, "alias@b.example")):
        unsealed = unseal(found, [(address, key) for address in addresses])
        assert (unsealed.recipient, authenticate(unsealed, ALICE.card).addressed) == (BOB.address, True)
    assert not authenticate(unseal(found, [("alias@b.example", key)]), ALICE.card).addressed


# --- damage

def test_truncated_extended_and_reordered_payloads_are_refused() -> None:
    envelope = Envelope(bytes(range(256)) * 400)
    envelope.members["mid"] = ""
    envelope.add(BOB)
    sealed = envelope.payload()
    head, step = sealed[:68], 16 * 1024 + 16
    chunks = [sealed[at:at + step] for at in range(68, len(sealed), step)]
    assert len(chunks) == 7
    damaged = [head + b"".join(chunks[:n]) for n in range(7)]
    damaged += [head + b"".join(chunks[:n] + chunks[n + 1:]) for n in range(6)]
    damaged += [head + b"".join([chunks[1], chunks[0], *chunks[2:]]), head + b"".join([*chunks[:2], chunks[1], *chunks[2:]])]
    damaged += [sealed[:-1], sealed + b"\0", sealed + bytes(16), sealed[:40], sealed[:68], head + b"".join(chunks) + chunks[-1]]
    assert open_as(envelope.raw(sealed), BOB).original == bytes(range(256)) * 400
    for payload_bytes in damaged:
        assert refused(envelope.raw(payload_bytes)).partition(":")[0] in {"payload failure", "header failure"}


@pytest.mark.parametrize(
    ("position", "reason"), [(8, "version failure"), (9, "version failure"), (10, "version failure"), (11, "header failure")]
)
def test_versions_suites_and_flags_are_not_negotiable(position: int, reason: str) -> None:
    envelope = Envelope(message()).add(BOB)
    sealed = bytearray(envelope.payload())
    sealed[position] ^= 2
    assert refused(envelope.raw(bytes(sealed))).startswith(reason)


@pytest.mark.parametrize(("change", "reason"), [
    (lambda c: c[:-1] + b"\1", "container failure: padding is not zero"),
    (lambda c: c + bytes(1), "container failure: size is not the padded size"),
    (lambda c: c[:3], "container failure: cut off"),
    (lambda c: b"\xff\xff\xff\xff" + c[4:], "container failure: length out of range"),
    (lambda c: b"\0\0\0\0" + bytes(4092), "manifest failure"),
])
def test_containers_that_no_sealer_writes(change: Any, reason: str) -> None:
    envelope = Envelope(message()).add(BOB)
    assert refused(envelope.raw(envelope.encrypt(change(envelope.container())))).startswith(reason)


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"v": 2}, "unknown version"), ({"v": True}, "not of type"), ({"id": "00"}, "16 bytes"), ({"id": "AB" * 16}, "hexadecimal"),
    ({"from": "Alice@a.example"}, "canonical"), ({"from": "@a.example"}, "local part"), ({"from": 5}, "not of type"),
    ({"sent": -1}, "negative"), ({"sent": 1.5}, "integer"), ({"sent": 2**53 + 1}, "out of range"), ({"exp": None}, "not of type"),
    ({"enc": "gzip"}, "unknown encoding"), ({"size": 2**32}, "size out of range"), ({"size": True}, "not of type"),
    ({"sha512": "0" * 127}, "64 bytes"), ({"scope": "root"}, "unknown scope"), ({"rcpt": []}, "number of recipients"),
    ({"rcpt": [1]}, "not an object"), ({"rcpt": [{"a": "x@y"}]}, "missing"), ({"outer": [["a"]]}, "pair"),
    ({"outer": [["a", 1]]}, "pair"), ({"outer": [["a", "b"]] * 501}, "too many"), ({"surprise": 1}, "unknown member"),
    ({"mid": "<other@a.example>"}, "Message-ID"), ({"card": ""}, "32 bytes"),
]


@pytest.mark.parametrize(("members", "reason"), CHANGES)
def test_manifests_that_no_sealer_writes(members: dict[str, Any], reason: str) -> None:
    envelope = Envelope(message()).add(BOB)
    envelope.members |= members
    found = refused(envelope.raw())
    assert found.startswith("manifest failure")
    assert reason in found


def test_unknown_members_may_be_added_under_an_underscore() -> None:
    envelope = Envelope(message()).add(BOB)
    envelope.members["_note"] = {"x": [1]}
    assert open_as(envelope.raw(), BOB).addressed


@pytest.mark.parametrize(
    "name", ["v", "id", "from", "skid", "dev", "sent", "enc", "size", "sha512", "mid", "scope", "rcpt", "outer", "card"]
)
def test_every_member_is_required(name: str) -> None:
    envelope = Envelope(message()).add(BOB)
    del envelope.members[name]
    assert refused(envelope.raw()).startswith("manifest failure")


def test_manifest_with_two_readings_is_refused() -> None:
    envelope = Envelope(message()).add(BOB)
    envelope.manifest = json.dumps(envelope.members).encode()[:-1] + b',"from":"mallory@m.example"}'
    assert refused(envelope.raw()).startswith("manifest failure: JSON has a member twice")


def test_manifest_round_trip() -> None:
    manifest = open_as(seal_for(message(), [recipient(BOB), recipient(CAROL, "list")]).raw, BOB).manifest
    raw = serialize_manifest(manifest)
    assert parse_manifest(raw) == manifest
    assert serialize_manifest(parse_manifest(raw)) == raw


@pytest.mark.parametrize(("members", "reason"), [
    ({"size": 5}, "original failure: size"), ({"sha512": "00" * 64}, "original failure: hash"),
    ({"enc": "fold"}, "fold failure"), ({"enc": "deflate"}, "original failure: compressed"),
])
def test_originals_that_are_not_what_was_signed(members: dict[str, Any], reason: str) -> None:
    envelope = Envelope(message()).add(BOB)
    envelope.members |= members
    assert refused(envelope.raw()).startswith(reason)


def deflated(data: bytes) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return packer.compress(data) + packer.flush()


def test_deflated_bodies_are_read_and_bounded() -> None:
    """A policy may compress; the signed size bounds what is written out, whatever the stream promises."""
    original = message("a" * 50_000)
    envelope = Envelope(original).add(BOB)
    envelope.members["enc"] = "deflate"
    envelope.body = deflated(original)
    assert open_as(envelope.raw(), BOB).original == original
    for bad in (envelope.body + b"x", envelope.body[:-3], deflated(original + b"x"), deflated(bytes(50_000_000))):
        envelope.body = bad
        assert refused(envelope.raw()).startswith("original failure")


def test_a_limit_on_the_size_of_the_original() -> None:
    found = find_parts(seal_for(message(), [recipient(BOB)]).raw)
    assert found is not None
    with pytest.raises(Unreadable) as caught:
        unseal(found, [(BOB.address, BOB.decryption[0])], max_original_bytes=10)
    assert caught.value.reason.startswith("over limit")


@pytest.mark.parametrize(("serial", "prev"), [(0, 0), (2**63, 1), (5, 5), (5, 9)])
def test_serials_out_of_range_are_refused(serial: int, prev: int) -> None:
    assert refused(Envelope(message()).add(BOB, serial=serial, prev=prev).raw()).startswith("no match: header failure: serial")
    if serial < 2**63:
        with pytest.raises(ValueError, match="serial"):
            seal_for(message(), [SealRecipient(BOB.address, BOB.decryption[0].public, "to", STREAM, serial, prev)])


# --- bit flips

def flips_change_nothing(raw: bytes, positions: range, bit: int) -> int:
    """Flip a bit at each position: the message is refused, or is delivered exactly as before. Returns how many were refused."""
    before = open_as(raw, BOB)
    refusals = 0
    for position in positions:
        damaged = bytearray(raw)
        damaged[position] ^= 1 << bit
        try:
            found = find_parts(bytes(damaged))
            if found is None:
                refusals += 1
                continue
            opened = authenticate(unseal(found, [(BOB.address, BOB.decryption[0])]), ALICE.card)
        except Unreadable:
            refusals += 1
            continue
        assert (opened.original, opened.signature, opened.addressed) == (before.original, "valid", True), position
        assert opened.claim("box") == before.claim("box"), position
    return refusals


def test_bit_flips_in_the_text_are_refused_or_change_nothing() -> None:
    raw = seal_for(message(), [recipient(BOB)]).raw
    for bit in range(8):
        assert flips_change_nothing(raw, range(bit, len(raw), 61), bit) > len(raw) // 61 * 7 // 10


@pytest.mark.parametrize("position", [*range(68), 68, 69, 500, 4000, -17, -16, -1])
def test_bit_flips_in_the_sealed_part_are_refused(position: int) -> None:
    envelope = Envelope(message()).add(BOB)
    sealed = bytearray(envelope.payload())
    sealed[position] ^= 0x10
    found = FoundParts((FoundKeyBlob(envelope.parts[0][1], "", False),), (FoundPayload(bytes(sealed), False),), 0, ())
    with pytest.raises(Unreadable):
        unseal(found, [(BOB.address, BOB.decryption[0])])


def test_bit_flips_in_the_key_blob_are_refused() -> None:
    envelope = Envelope(message()).add(BOB)
    sealed, part = envelope.payload(), envelope.parts[0][1]
    for position in [*range(40), *range(40, len(part), 61)]:
        damaged = bytearray(part)
        damaged[position] ^= 1
        found = FoundParts((FoundKeyBlob(bytes(damaged), "", False),), (FoundPayload(sealed, False),), 0, ())
        with pytest.raises(Unreadable):
            unseal(found, [(BOB.address, BOB.decryption[0])])


@pytest.mark.long
def test_every_bit_flip_is_refused_or_changes_nothing() -> None:
    raw = seal_for(message(), [recipient(BOB)]).raw
    for bit in range(8):
        flips_change_nothing(raw, range(len(raw)), bit)


# --- work

def test_trials_are_counted_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Garbage blobs cost a bounded number of unwraps (also against partitioning oracles), then the message is unreadable."""
    calls = 0
    genuine = blob.unwrap_session_key

    def counted(*arguments: Any) -> blob.BlobContent:
        nonlocal calls
        calls += 1
        return genuine(*arguments)

    monkeypatch.setattr("malote.core.open.unwrap_session_key", counted)
    envelope = Envelope(message()).add(BOB)
    sealed = envelope.payload()
    eid = envelope.header.eid
    garbage = [
        FoundKeyBlob(blob.serialize_key_blob(eid, b"\1\4\xa8" + bytes([n]) * 1192), "", False) for n in range(150)
    ]
    keys = [(who.address, who.decryption[0]) for who in (CAROL, MALLORY, person("dave"), BOB)]
    found = FoundParts(tuple(garbage), (FoundPayload(sealed, False),) * 8, 0, ())
    with pytest.raises(Unreadable) as caught:
        unseal(found, keys)
    assert calls == MAX_TRIALS
    assert caught.value.reason.startswith("over limit")
    calls = 0
    ours = FoundKeyBlob(envelope.parts[0][1], envelope.parts[0][0], False)
    hinted = FoundParts((*garbage, ours), (FoundPayload(sealed, False),), 0, ())
    assert authenticate(unseal(hinted, keys), ALICE.card).addressed
    assert calls == 1, "the hint finds our blob at once"
    wrong = FoundParts((FoundKeyBlob(envelope.parts[0][1], "00" * 8, False),), (FoundPayload(sealed, False),), 0, ())
    assert authenticate(unseal(wrong, keys), ALICE.card).addressed, "a wrong hint only costs trials"


@pytest.mark.parametrize("length", [0, 1, 1191, 1193, 4000])
def test_blobs_of_another_size_are_never_tried(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Partitioning oracle: only blobs of exactly the one size reach a private key."""
    monkeypatch.setattr("malote.core.keys.DecryptionKey.unwrap", lambda *_: pytest.fail("tried"))
    envelope = Envelope(message()).add(BOB)
    raw = blob.serialize_key_blob(envelope.header.eid, b"\1" + length.to_bytes(2, "big") + bytes(length))
    found = FoundParts((FoundKeyBlob(raw, "", False),), (FoundPayload(envelope.payload(), False),), 0, ())
    with pytest.raises(Unreadable):
        unseal(found, [(BOB.address, BOB.decryption[0])])


def test_a_damaged_or_newer_blob_does_not_hide_ours() -> None:
    envelope = Envelope(message()).add(BOB)
    sealed = envelope.payload()
    newer = blob.serialize_key_blob(envelope.header.eid, b"\2\0\4abcd")
    raw = wrap([("", newer), ("", b"\x89MLK\r\n\x1a\nshort"), *envelope.parts], sealed)
    assert open_as(raw, BOB).addressed


def test_several_sealed_parts_the_first_that_opens_counts() -> None:
    mine, other = Envelope(message("mine")).add(BOB), Envelope(message("other")).add(CAROL)
    found = find_parts(mine.raw())
    foreign = find_parts(other.raw())
    assert found is not None
    assert foreign is not None
    both = FoundParts(foreign.blobs + found.blobs, foreign.payloads + found.payloads, 0, ())
    assert authenticate(unseal(both, [(BOB.address, BOB.decryption[0])]), ALICE.card).original == message("mine")


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
