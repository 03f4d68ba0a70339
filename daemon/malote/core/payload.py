"""The sealed part: header H and the encrypted container of manifest, body and signature (docs/format.md 6)."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from malote.core import primitives
from malote.core.parts import PAYLOAD_MAGIC
from malote.core.primitives import COMMIT_BYTES, KEY_BYTES, SALT_BYTES, VERSION_SUITE, Buffer, PayloadKeys
from malote.errors import Unreadable

HEADER_BYTES = 68
MIN_CONTAINER_BYTES = 4096          # a line of text, a yes and a no are all the same size
MAX_MANIFEST_BYTES = 256 * 1024     # 100 recipients take 25 KiB, outer fields of 2,000 addresses 80 KiB
MAX_SIGNATURE_BYTES = 8 * 1024      # 3,373 with suite 1; bounds what is read before anything is verified

_HEADER = struct.Struct(">8s3sB24s32s")     # magic ‖ VS ‖ flags ‖ salt ‖ commit
_U16, _U32, _U64 = struct.Struct(">H"), struct.Struct(">I"), struct.Struct(">Q")
_CONTAINER_OVERHEAD = _U32.size + _U64.size + _U16.size


@dataclass(frozen=True, slots=True)
class Header:
    """H, public and signed: the salt and the commitment to the session key."""

    raw: bytes
    salt: bytes
    commit: bytes

    @property
    def eid(self) -> bytes:
        """Envelope id: pairs key blobs with their payload."""
        return primitives.sha256(b"MLT1 eid", self.raw)[:16]


@dataclass(frozen=True, slots=True)
class Container:
    manifest: bytes
    body: memoryview = field(repr=False)
    signature: bytes


def new_header(cek: bytes) -> tuple[Header, PayloadKeys]:
    """A fresh header for a fresh session key, and the keys of its payload."""
    salt = primitives.random_bytes(SALT_BYTES)
    keys = primitives.derive(cek, salt)
    return Header(_HEADER.pack(PAYLOAD_MAGIC, VERSION_SUITE, 0, salt, keys.commit), salt, keys.commit), keys


def parse_header(payload: Buffer) -> Header:
    """Raises `Unreadable` for another version, flags, or a payload too short to hold anything."""
    if len(payload) < HEADER_BYTES:
        raise Unreadable("header failure: payload is too short")
    raw = bytes(memoryview(payload)[:HEADER_BYTES])
    magic, version_suite, flags, salt, commit = _HEADER.unpack(raw)
    if magic != PAYLOAD_MAGIC:
        raise Unreadable("header failure: not a sealed part")
    if version_suite != VERSION_SUITE:
        raise Unreadable("version failure: sealed by another version or suite")
    if flags:
        raise Unreadable("header failure: unknown flags")
    return Header(raw, salt, commit)


def check_commitment(header: Header, cek: bytes) -> PayloadKeys:
    """The payload's keys. Raises `Unreadable` unless H commits to this session key: one payload, one plain text."""
    if len(cek) != KEY_BYTES or len(header.commit) != COMMIT_BYTES:
        raise Unreadable("header failure: session key of the wrong size")
    keys = primitives.derive(cek, header.salt)
    if not primitives.equal(keys.commit, header.commit):
        raise Unreadable("header failure: session key is not the committed one")
    return keys


def signature_input(header: Header, manifest: bytes) -> bytes:
    """T. H ties the signature to this very ciphertext, the manifest to the original, the recipients and everything else."""
    return b"MLT1 signature\0" + primitives.sha512(header.raw) + primitives.sha512(manifest)


def container_bytes(size: int) -> int:
    """The size to which `size` bytes are padded: Padmé (at most 12 % more, few distinct sizes), at least 4 KiB."""
    if size <= MIN_CONTAINER_BYTES:
        return MIN_CONTAINER_BYTES
    exponent = size.bit_length() - 1
    mask = (1 << (exponent - exponent.bit_length())) - 1
    return (size + mask) & ~mask


def serialize_container(manifest: bytes, body: Buffer, signature: bytes) -> list[Buffer]:
    """The container as pieces, in order, with its padding. Raises `ValueError` for a manifest or signature over the limit."""
    if len(manifest) > MAX_MANIFEST_BYTES or len(signature) > MAX_SIGNATURE_BYTES:
        raise ValueError("manifest or signature over the limit")
    size = _CONTAINER_OVERHEAD + len(manifest) + len(body) + len(signature)
    return [_U32.pack(len(manifest)), manifest, _U64.pack(len(body)), body, _U16.pack(len(signature)), signature,
            bytes(container_bytes(size) - size)]


def parse_container(plain: Buffer) -> Container:
    """Raises `Unreadable` for anything that `serialize_container` does not write."""
    view = memoryview(plain).toreadonly()
    manifest, position = _take(view, 0, _U32, MAX_MANIFEST_BYTES)
    body, position = _take(view, position, _U64, len(view))
    signature, position = _take(view, position, _U16, MAX_SIGNATURE_BYTES)
    if len(view) != container_bytes(position):
        raise Unreadable("container failure: size is not the padded size")
    if plain.count(0, position) != len(view) - position if isinstance(plain, bytes | bytearray) else any(view[position:]):
        raise Unreadable("container failure: padding is not zero")
    return Container(bytes(manifest), body, bytes(signature))


def _take(view: memoryview, position: int, size: struct.Struct, limit: int) -> tuple[memoryview, int]:
    if position + size.size > len(view):
        raise Unreadable("container failure: cut off")
    (length,) = size.unpack_from(view, position)
    start = position + size.size
    if length > limit or length > len(view) - start:
        raise Unreadable("container failure: length out of range")
    return view[start:start + length], start + length


def encrypt_payload(header: Header, keys: PayloadKeys, container: list[Buffer]) -> bytearray:
    """H ‖ chunks. `keys` and `header` come from one `new_header` and are used once."""
    size = primitives.encrypted_size(sum(map(len, container)))
    payload = bytearray(HEADER_BYTES + size)
    payload[:HEADER_BYTES] = header.raw
    primitives.encrypt_chunks(keys.key, keys.nonce, container, memoryview(payload)[HEADER_BYTES:])
    return payload


def decrypt_payload(keys: PayloadKeys, payload: Buffer) -> bytearray:
    """The container, once its last chunk is authenticated. Raises `Unreadable`."""
    try:
        return primitives.decrypt_chunks(keys.key, keys.nonce, memoryview(payload)[HEADER_BYTES:])
    except Unreadable as error:
        raise Unreadable(f"payload failure: {error.reason}") from None
