"""Bytes that no sealer writes, and sealed messages with a bit, a chunk or a promise changed, are refused."""

from __future__ import annotations

import json
import zlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.envelope import (
    ALICE,
    BOB,
    CAROL,
    STREAM,
    Envelope,
    keys_of,
    loose_parts,
    message,
    open_as,
    parts_of,
    recipient,
    refused,
    seal_for,
)
from malote.core import blob, payload
from malote.core import open as opening
from malote.core.manifest import parse_manifest, serialize_manifest
from malote.core.open import authenticate, unseal
from malote.core.parts import find_parts
from malote.core.seal import SealRecipient
from malote.errors import Unreadable


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


@pytest.mark.parametrize("encoding", ["deflate", "fold+deflate"])
def test_a_compressed_bomb_is_not_written_out(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """4 MB that anybody can send would be 4 GB of memory before the signature is looked at: its claim is enough to refuse it."""
    monkeypatch.setattr(opening, "_inflate", lambda *_: pytest.fail("was written out"))
    envelope = Envelope(message()).add(BOB)
    envelope.members |= {"enc": encoding, "size": opening.MAX_INFLATED_BYTES + 1}
    envelope.body = deflated(bytes(1000))
    assert refused(envelope.raw()).startswith("over limit")


def test_a_limit_on_the_size_of_the_original() -> None:
    found = parts_of(seal_for(message(), [recipient(BOB)]).raw)
    with pytest.raises(Unreadable) as caught:
        unseal(found, keys_of(BOB), max_original_bytes=10)
    assert caught.value.reason.startswith("over limit")


@pytest.mark.parametrize(("serial", "prev"), [(0, 0), (2**63, 1), (5, 5), (5, 9)])
def test_serials_out_of_range_are_refused(serial: int, prev: int) -> None:
    assert refused(Envelope(message()).add(BOB, serial=serial, prev=prev).raw()).startswith("no match: header failure: serial")
    if serial < 2**63:
        with pytest.raises(ValueError, match="serial"):
            seal_for(message(), [SealRecipient(BOB.address, BOB.decryption[0].public, "to", STREAM, serial, prev)])


# --- what is accepted has one form

@given(st.binary(max_size=300), st.binary(max_size=5000), st.binary(max_size=100), st.integers(0, 6000), st.integers(0, 255))
@settings(max_examples=300, deadline=None)
def test_containers_have_one_form(manifest: bytes, body: bytes, signature: bytes, position: int, value: int) -> None:
    whole = bytearray(b"".join(payload.serialize_container(manifest, body, signature)))
    whole[position % len(whole)] = value
    try:
        parsed = payload.parse_container(whole)
    except Unreadable:
        return
    assert b"".join(payload.serialize_container(parsed.manifest, parsed.body, parsed.signature)) == whole


@given(st.integers(0, 1221), st.integers(0, 255), st.integers(-2, 2))
@settings(deadline=None)
def test_key_blob_parts_have_one_form(position: int, value: int, length: int) -> None:
    part = bytearray(blob.serialize_key_blob(bytes(16), b"\1\4\xa8" + bytes(1192)))
    part[position] = value
    raw = bytes(part)[:length] if length < 0 else bytes(part) + bytes(length)
    try:
        parsed = blob.parse_key_blob(raw)
    except Unreadable:
        return
    assert blob.serialize_key_blob(parsed.eid, parsed.blob) == raw


@given(st.integers(0, 67), st.integers(0, 255))
@settings(deadline=None)
def test_headers_have_one_form(position: int, value: int) -> None:
    genuine = Envelope(b"").header.raw
    raw = genuine[:position] + bytes([value]) + genuine[position + 1:]
    try:
        parsed = payload.parse_header(raw)
    except Unreadable:
        assert position < 12
        return
    assert (parsed.raw, parsed.salt, parsed.commit) == (raw, raw[12:36], raw[36:])


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
            opened = authenticate(unseal(found, keys_of(BOB)), ALICE.card)
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
    with pytest.raises(Unreadable):
        unseal(loose_parts(bytes(sealed), envelope.parts[0][1]), keys_of(BOB))


def test_bit_flips_in_the_key_blob_are_refused() -> None:
    envelope = Envelope(message()).add(BOB)
    sealed, part = envelope.payload(), envelope.parts[0][1]
    for position in [*range(40), *range(40, len(part), 61)]:
        damaged = bytearray(part)
        damaged[position] ^= 1
        with pytest.raises(Unreadable):
            unseal(loose_parts(sealed, bytes(damaged)), keys_of(BOB))


@pytest.mark.long
def test_every_bit_flip_is_refused_or_changes_nothing() -> None:
    raw = seal_for(message(), [recipient(BOB)]).raw
    for bit in range(8):
        flips_change_nothing(raw, range(len(raw)), bit)
