"""Sealing: one original and its recipients become one outer message (docs/format.md 4 to 6).

The steps are those of the classic session-key exchange: generate a session key, encrypt the message with it, export the key as
a blob for each recipient, send all of it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import BytesIO
from typing import Protocol

import pybase64

from malote.core import blob, payload, primitives
from malote.core.address import is_gateway
from malote.core.fold import MAX_SIZE, base64_lines
from malote.core.fold import fold as fold_original
from malote.core.identity import Identity
from malote.core.inner import read_inner
from malote.core.keys import EncryptionKey
from malote.core.manifest import (
    MAX_OUTER_FIELDS,
    MAX_RECIPIENTS,
    Encoding,
    Manifest,
    ManifestRecipient,
    Role,
    belongs_to,
    serialize_manifest,
)
from malote.core.parts import KEY_BLOB_TYPE, SEALED_TYPE
from malote.errors import FormatError, SenderRefused

KID_BYTES = 8               # of the key id, shown as a hint which blob is whose
LINE_WIDTH = 76             # RFC 2045 6.8
BOUNDARY_BYTES = 16         # random; 22 characters of base64url

NOTE = (
    b"This message is sealed. Its text, subject and attachments are in the parts\r\n"
    b"attached here, encrypted for its recipients by malote.\r\n"
    b"\r\n"
    b"If you read this, the message has not been opened yet: start malote on the\r\n"
    b"computer where your keys are, or save this message and use `malote open`.\r\n"
)

# RFC 5322 2.2 and 2.2.3: fields with CRLF and nothing that some program takes for a line end or an end of text
_OUTER = re.compile(rb"(?:[!-9;-~]+:[^\x00-\x1f\x7f]*\r\n(?:[ \t][^\x00-\x1f\x7f]*\r\n)*)*")
_NAMES = re.compile(rb"^([!-9;-~]+):", re.MULTILINE)
_HINT = b"Malote: 1\r\n"
_OURS = frozenset({"mime-version", "bcc", "resent-bcc"})        # written here, or never


class Outer(Protocol):
    """The outer header, already chosen and folded (`core.outer.OuterHeaders`)."""

    @property
    def fields(self) -> tuple[tuple[str, str], ...]: ...    # unfolded, as the manifest lists them

    @property
    def raw(self) -> bytes: ...                             # the same, folded, each line with CRLF


@dataclass(frozen=True, slots=True)
class SealRecipient:
    """Who can open a copy, and the number this message has in the sender's numbering towards him."""

    address: str            # canonical; the person's, also where `key` is his gateway's
    key: EncryptionKey
    role: str               # "to", "cc", "bcc", "self", "list"
    stream: bytes           # 8 bytes
    serial: int             # committed to the store before sealing
    prev: int


@dataclass(frozen=True, slots=True)
class SealedMessage:
    raw: bytes = field(repr=False)      # a complete RFC 5322 message, CRLF, 7bit but for an internationalised outer header
    payload: bytearray = field(repr=False)      # the sealed part in binary: what the last check holds `raw` against
    original_sha512: bytes

    @property
    def payload_digest(self) -> bytes:
        """SHA-256 of the sealed part (docs/format.md 6.1)."""
        return primitives.sha256(self.payload)


def seal(
    original: bytes, *, identity: Identity, recipients: Sequence[SealRecipient], submission_id: bytes, sent_at_ms: int,
    outer: Outer, fold: bool = True, show_key_ids: bool = True, name_recipients: bool = True,
) -> SealedMessage:
    """One copy of `original` for `recipients`, with a session key of its own.

    `sent_at_ms` and the serials come from the store, committed. Raises `SenderRefused` where a gateway's identity does not speak
    for the From address, `FormatError` for a message or key that cannot be sealed, `ValueError` for a call that must not be made
    (a Bcc recipient beside others, more than 100 recipients).
    """
    _check_recipients(recipients, submission_id)
    if len(original) > MAX_SIZE:
        raise FormatError("message is too large to be sealed")
    _check_outer(outer)
    cek = primitives.random_bytes(primitives.KEY_BYTES)
    header, keys = payload.new_header(cek)
    eid = header.eid
    blobs = [_wrap(recipient, cek, header.raw) for recipient in recipients]
    folded = fold_original(original) if fold else None
    digest = primitives.sha512(original)
    inner = read_inner(original)
    manifest = serialize_manifest(Manifest(
        id=submission_id,
        sender=_sender(identity, inner.from_address),
        skid=identity.signing.public.id,
        device=recipients[0].stream,
        sent_at_ms=sent_at_ms,
        expires_at_ms=None,
        encoding=Encoding.IDENTITY if folded is None else Encoding.FOLD,
        size=len(original),
        sha512=digest,
        message_id=inner.message_id,
        scope="gateway" if is_gateway(identity.address) else "user",
        recipients=tuple(_entry(*pair, name_recipients) for pair in zip(recipients, blobs, strict=True)),
        outer=outer.fields,
        card_hash=identity.card.hash,
    ))
    if len(manifest) > payload.MAX_MANIFEST_BYTES:
        raise FormatError("message has too long a header to be sealed")
    signature = identity.signing.sign(payload.signature_input(header, manifest))
    body = original if folded is None else folded
    sealed = payload.encrypt_payload(header, keys, payload.serialize_container(manifest, body, signature))
    del folded, body        # what is not needed any more makes room for the text form of the rest
    parts = [
        (_kid(recipient, show_key_ids), blob.serialize_key_blob(eid, wrapped))
        for recipient, wrapped in zip(recipients, blobs, strict=True)
    ]
    return SealedMessage(_outer_message(outer.raw, parts, sealed), sealed, digest)


def _check_recipients(recipients: Sequence[SealRecipient], submission_id: bytes) -> None:
    if not 1 <= len(recipients) <= MAX_RECIPIENTS:
        raise ValueError("a copy has 1 to 100 recipients")
    if len(submission_id) != 16:
        raise ValueError("a submission id has 16 bytes")
    others = [recipient for recipient in recipients if recipient.role != Role.SELF]
    if len(others) > 1 and any(recipient.role == Role.BCC for recipient in others):
        raise ValueError("a Bcc recipient gets a copy alone")


def _check_outer(outer: Outer) -> None:
    """The outer header is in clear and not ours to interpret, but it is what the manifest says, and ends where it ends."""
    if len(outer.fields) > MAX_OUTER_FIELDS:
        raise FormatError("outer header has too many fields")
    if not _OUTER.fullmatch(outer.raw):
        raise FormatError("outer header has a line break or a control character in a field")
    names = [name for name, _ in outer.fields]
    if [name.decode("ascii") for name in _NAMES.findall(outer.raw)] != names:
        raise ValueError("outer header and its fields differ")
    if any(name.lower() in _OURS or name.lower().startswith("content-") for name in names):
        raise ValueError("outer header has a field that must not be there")


def _sender(identity: Identity, from_address: str | None) -> str:
    """A person's key signs for the person; a gateway's for whom of its domain the original is from."""
    if not is_gateway(identity.address):
        return identity.address
    if from_address is None or not belongs_to(from_address, identity.address):
        raise SenderRefused("the From address does not belong to the domain of this key")
    return from_address


def _wrap(recipient: SealRecipient, cek: bytes, header: bytes) -> bytes:
    content = blob.BlobContent(cek, recipient.stream, recipient.serial, recipient.prev)
    blob.check_content(content)
    return blob.wrap_session_key(content, recipient.key, header)


def _entry(recipient: SealRecipient, wrapped: bytes, name_recipients: bool) -> ManifestRecipient:
    named = name_recipients and recipient.role != Role.LIST
    return ManifestRecipient(
        recipient.address if named else None, recipient.key.id, primitives.sha256(wrapped), Role(recipient.role)
    )


def _kid(recipient: SealRecipient, show_key_ids: bool) -> str:
    """The hint which blob is whose, in clear; never for those whom others may not know of."""
    hidden = not show_key_ids or recipient.role in (Role.BCC, Role.LIST)
    return "" if hidden else recipient.key.id[:KID_BYTES].hex()


def _outer_message(outer: bytes, blobs: list[tuple[str, bytes]], sealed: bytearray) -> bytes:
    """docs/format.md 4.2, exactly; `Malote` is the last field."""
    boundary = b"=_mlt_" + pybase64.urlsafe_b64encode(primitives.random_bytes(BOUNDARY_BYTES)).rstrip(b"=")
    message = BytesIO()         # grows in place: joining a list of pieces would hold everything twice
    message.write(outer.removesuffix(_HINT))
    message.write(b'MIME-Version: 1.0\r\nContent-Type: multipart/mixed; boundary="%b"\r\n%b\r\n' % (boundary, _HINT))
    message.write(b"--%b\r\nContent-Type: text/plain; charset=us-ascii\r\nContent-Transfer-Encoding: 7bit\r\n\r\n" % boundary)
    message.write(NOTE)
    for number, (kid, key_blob) in enumerate(blobs, 1):
        parameter = f"; kid={kid}" if kid else ""
        _write_part(message, boundary, KEY_BLOB_TYPE + parameter, f"key-{number}.mlk", key_blob)
    _write_part(message, boundary, SEALED_TYPE, "message.mlp", memoryview(sealed))
    message.write(b"--%b--\r\n" % boundary)
    return message.getvalue()


def _write_part(message: BytesIO, boundary: bytes, media_type: str, filename: str, content: bytes | memoryview) -> None:
    message.write(
        b"--%b\r\nContent-Type: %b\r\nContent-Transfer-Encoding: base64\r\n"
        b'Content-Disposition: attachment; filename="%b"\r\n\r\n' % (boundary, media_type.encode(), filename.encode())
    )
    message.writelines(base64_lines(content, LINE_WIDTH, b"\r\n"))
    message.write(b"\r\n")
