"""The example in docs/format.md is what the code reads and writes: a second implementation is built from that text."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

from malote.core import blob, manifest, parts, payload, primitives
from malote.core import open as opening
from malote.core.address import MAX_LOCAL_BYTES
from malote.core.card import MAX_CARD_BYTES, MAX_CARD_KEYS, parse_card
from malote.core.fold import MAX_SIZE, MAX_SPANS, MAX_TABLE_BYTES, MAX_WIDTH
from malote.core.freshness import DAY_MS, FreshnessLimits
from malote.core.keys import DecryptionKey
from malote.core.message import MAX_HEADER_BYTES, MAX_HEADER_FIELDS
from malote.core.parts import find_parts
from malote.core.seal import NOTE

DOCS = Path(__file__).parent.parent.parent / "docs"
TEXT = (DOCS / "format.md").read_text()


def test_every_value_of_the_example() -> None:
    head, _, raw = (DOCS / "format-example.txt").read_bytes().partition(b"\n\n")
    fields = dict(line.split(": ", 1) for line in head.decode().splitlines())
    key = DecryptionKey(bytes.fromhex(fields["key"]))
    found = find_parts(raw)
    assert found is not None
    sealed = found.payloads[0].raw
    header = payload.parse_header(sealed)
    part = blob.parse_key_blob(found.blobs[0].raw)
    content = blob.unwrap_session_key(part.blob, key, header.raw)
    keys = payload.check_commitment(header, content.cek)
    container = payload.parse_container(payload.decrypt_payload(keys, sealed))
    signed = payload.signature_input(header, container.manifest)
    parse_card(base64.b64decode(fields["card"])).verify.verify(signed, container.signature)
    info = b"MLT1 keyblob\1\0\1" + primitives.sha256(header.raw)
    for value in (
        f"SHA-256 of BLOB = {part.hash.hex()}", f"payload digest = {primitives.sha256(sealed).hex()}",
        f"key id = {key.public.id.hex()}", f"info   = {info.hex()}", f"CEK    = {content.cek.hex()}",
        f"stream = {content.stream.hex()}    serial = {content.serial}    prev = {content.prev}", f"key    = {keys.key.hex()}",
        f"nonce  = {keys.nonce.hex()}", f"T         = {signed.hex()}", f"signature = {container.signature.hex()}",
        f"{header.eid.hex(' ')}  eid", f"{header.salt.hex(' ')}      salt", f"{header.commit.hex(' ')}      commit",
        f"`{len(container.manifest).to_bytes(4, 'big').hex(' ')}`", f"`{len(container.body).to_bytes(8, 'big').hex(' ')}`",
        bytes(container.body).decode().replace("\r\n", "\n"),
    ):
        assert value in TEXT, value
    shown = re.search(r"```json\n(.*?)```", TEXT, re.DOTALL)
    assert shown is not None
    assert shown[1].replace("\n", "").encode() == container.manifest
    assert json.loads(container.manifest)["size"] == len(container.body)


def test_the_note_and_the_limits_are_those_of_the_code() -> None:
    for line in NOTE.decode().splitlines():
        assert line in TEXT
    for row in (
        f"| depth | {parts.MAX_DEPTH} |", f"counted | {parts.MAX_PARTS} |",
        f"| top-level header | {parts.MAX_TOP_HEADER_BYTES // 1024} KiB |",
        f"| header of a part | {parts.MAX_PART_HEADER_BYTES // 1024} KiB |", f"| boundary | {parts.MAX_BOUNDARY_BYTES} bytes |",
        f"are none | {parts.MAX_FALSE_BOUNDARIES:,} |", f"| sealed parts tried | {opening.MAX_PAYLOADS} |",
        f"the whole message | {opening.MAX_TRIALS} |", f"above {MAX_SPANS}, another kind", f"`size` + {MAX_TABLE_BYTES:,}",
        f"mlen > {payload.MAX_MANIFEST_BYTES // 1024} KiB, slen > {payload.MAX_SIGNATURE_BYTES // 1024} KiB",
    ):
        assert row in TEXT, row


def test_the_other_numbers_are_those_of_the_code() -> None:
    """Sizes, counts and times that stand in running text."""
    limits = FreshnessLimits()
    assert (MAX_SIZE, blob.MAX_SERIAL) == (2**32 - 1, 2**63 - 1)
    for phrase in (
        f"at most {MAX_HEADER_BYTES // 1024} KiB and {MAX_HEADER_FIELDS:,} fields",
        f"`size` above {opening.MAX_INFLATED_BYTES // 1024**2} MiB", f"at most {MAX_LOCAL_BYTES} bytes; written as a dot-atom",
        f"key-blob part, decoded | {parts.MAX_KEY_BLOB_BYTES // 1024} KiB", f"1 to {MAX_CARD_KEYS} of",
        f"A card has at most {MAX_CARD_BYTES // 1024} KiB", f"1 to {manifest.MAX_RECIPIENTS} of",
        f"at most {manifest.MAX_OUTER_FIELDS} of `[name, value]`",
        f"at most {payload.MAX_MANIFEST_BYTES // 1024} KiB and 3 levels",
        f"4, 8 ... {MAX_WIDTH}", f"{payload.HEADER_BYTES} bytes", f"{blob.BLOB_BYTES} bytes",
        f"the i-th {primitives.CHUNK_BYTES} bytes",
        f"length    = {payload.MIN_CONTAINER_BYTES} if n", f"by more than {limits.skew_ms // 60_000} minutes",
        f"longer than {limits.late_ms // DAY_MS} days", "`serial` ≥ 2^63", "above 2^32 - 1",
    ):
        assert phrase in TEXT, phrase
