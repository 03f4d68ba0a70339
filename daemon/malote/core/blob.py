"""The key blob: the session key of one message, exported for one recipient (docs/format.md 5).

It holds that recipient's own serial number as well, so co-recipients learn nothing of it; and its hash stands in the signed
manifest, so nobody but the sender can make one that counts.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from malote.core.keys import DecryptionKey, EncryptionKey
from malote.core.parts import KEY_BLOB_MAGIC
from malote.core.primitives import HPKE_OVERHEAD_BYTES, KEY_BYTES, VERSION_SUITE, sha256
from malote.errors import Unreadable

STREAM_BYTES = 8
MAX_SERIAL = 2**63 - 1              # a signed 64-bit integer of any database
_TYPE_HPKE = 1                      # HPKE base mode; the only type of version 1

_CONTENT = struct.Struct(">32s8sQQ")            # CEK ‖ stream ‖ serial ‖ prev: always 56 bytes, which closes length oracles
_CIPHERTEXT_BYTES = HPKE_OVERHEAD_BYTES + _CONTENT.size     # 1192
_BLOB_HEAD = struct.Struct(">BH")
_PART_HEAD = struct.Struct(">8s3s16s")
BLOB_BYTES = _BLOB_HEAD.size + _CIPHERTEXT_BYTES            # 1195


@dataclass(frozen=True, slots=True)
class BlobContent:
    cek: bytes = field(repr=False)
    stream: bytes       # numbering of one sending device, 8 random bytes
    serial: int         # 1, 2, 3 ... per stream and recipient
    prev: int           # the last serial before this one that is known to have been sent; 0: none


@dataclass(frozen=True, slots=True)
class KeyBlob:
    """One key-blob part, taken apart."""

    eid: bytes          # which payload it belongs to
    blob: bytes = field(repr=False)     # BLOB, the bytes whose SHA-256 the manifest lists

    @property
    def hash(self) -> bytes:
        return sha256(self.blob)


def serialize_key_blob(eid: bytes, blob: bytes) -> bytes:
    return _PART_HEAD.pack(KEY_BLOB_MAGIC, VERSION_SUITE, eid) + blob


def parse_key_blob(raw: bytes) -> KeyBlob:
    """Raises `Unreadable` for anything but one BLOB of type 1 behind its head (docs/format.md 5.1)."""
    if len(raw) < _PART_HEAD.size + _BLOB_HEAD.size:
        raise Unreadable("header failure: key blob is too short")
    magic, version_suite, eid = _PART_HEAD.unpack_from(raw)
    if magic != KEY_BLOB_MAGIC:
        raise Unreadable("header failure: not a key blob")
    if version_suite != VERSION_SUITE:
        raise Unreadable("version failure: key blob of another version or suite")
    kind, length = _BLOB_HEAD.unpack_from(raw, _PART_HEAD.size)
    if kind != _TYPE_HPKE:
        raise Unreadable("version failure: unknown type of key blob")
    if length != _CIPHERTEXT_BYTES or len(raw) != _PART_HEAD.size + BLOB_BYTES:
        raise Unreadable("header failure: key blob has the wrong size")
    return KeyBlob(eid, raw[_PART_HEAD.size:])


def wrap_session_key(content: BlobContent, key: EncryptionKey, header: bytes) -> bytes:
    """BLOB for the owner of `key`; `header` is H of the payload it belongs to. Raises `FormatError` for a bad key."""
    plaintext = _CONTENT.pack(content.cek, content.stream, content.serial, content.prev)
    ciphertext = key.wrap(plaintext, _info(header))
    return _BLOB_HEAD.pack(_TYPE_HPKE, len(ciphertext)) + ciphertext


def unwrap_session_key(blob: bytes, key: DecryptionKey, header: bytes) -> BlobContent:
    """Raises `Unreadable`: another key's, another payload's, damaged, or with content that no sender may write."""
    plaintext = key.unwrap(memoryview(blob)[_BLOB_HEAD.size:], _info(header))
    if len(plaintext) != _CONTENT.size:
        raise Unreadable("header failure: key blob holds something else")
    content = BlobContent(*_CONTENT.unpack(plaintext))
    if not 1 <= content.serial <= MAX_SERIAL or content.prev >= content.serial:
        raise Unreadable("header failure: serial out of range")
    return content


def check_content(content: BlobContent) -> None:
    """Raises `ValueError` for what a decoder would refuse: the caller's mistake."""
    if len(content.cek) != KEY_BYTES or len(content.stream) != STREAM_BYTES:
        raise ValueError("session key or stream of the wrong size")
    if not 1 <= content.serial <= MAX_SERIAL or not 0 <= content.prev < content.serial:
        raise ValueError("serial out of range")


def _info(header: bytes) -> bytes:
    """Binds a blob to one payload: H commits to the session key, so a blob opens with its own payload only."""
    return b"MLT1 keyblob" + VERSION_SUITE + sha256(header)
