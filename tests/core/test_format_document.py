"""The example in docs/format.md is what the code reads and writes: a second implementation is built from that text."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

from malote.core import blob, parts, payload, primitives
from malote.core import open as opening
from malote.core.card import parse_card
from malote.core.fold import MAX_SPANS, MAX_TABLE_BYTES
from malote.core.keys import DecryptionKey
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
