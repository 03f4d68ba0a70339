"""The manifest: what the sender signs about a message (docs/format.md 6.3).

It is verified as the bytes that were received; the parser only makes sure that they say one thing to everybody. Everything in
it is known before the original is released, and everything else that arrived with the message counts for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal, TypeVar

from malote.core import strict_json
from malote.core.address import canonical_address, domain_of, is_gateway
from malote.core.fold import MAX_SIZE
from malote.core.payload import MAX_MANIFEST_BYTES
from malote.errors import FormatError, Unreadable

MAX_RECIPIENTS = 100        # key blobs in one copy; more recipients get further copies
MAX_OUTER_FIELDS = 500      # 50 Received fields and a few dozen others are usual
_MAX_DEPTH = 3              # the object, its lists, their items
_MEMBERS = ("v", "id", "from", "skid", "dev", "sent", "enc", "size", "sha512", "mid", "scope", "rcpt", "outer", "card")


class Encoding(StrEnum):
    """How the body of the container holds the original."""

    IDENTITY = "id"
    FOLD = "fold"
    DEFLATE = "deflate"
    FOLD_DEFLATE = "fold+deflate"

    @property
    def folded(self) -> bool:
        return self in (Encoding.FOLD, Encoding.FOLD_DEFLATE)

    @property
    def deflated(self) -> bool:
        return self in (Encoding.DEFLATE, Encoding.FOLD_DEFLATE)


class Role(StrEnum):
    TO = "to"
    CC = "cc"
    BCC = "bcc"         # alone in its copy
    SELF = "self"       # the sender's own blob
    LIST = "list"       # member of an expanded list: no address, no visible key id


Scope = Literal["user", "gateway"]
_E = TypeVar("_E", bound=StrEnum)


@dataclass(frozen=True, slots=True)
class ManifestRecipient:
    address: str | None
    key_id: bytes
    blob_hash: bytes
    role: Role


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    id: bytes               # one for all copies of a submission
    sender: str             # canonical address; the one From mailbox of the original
    skid: bytes             # id of the key that signed
    device: bytes           # stream of the sending device
    sent_at_ms: int
    expires_at_ms: int | None
    encoding: Encoding
    size: int               # bytes of the original
    sha512: bytes           # of the original
    message_id: str         # the original's Message-ID, "" without a usable one
    scope: Scope            # whether a person's key signed, or a domain's
    recipients: tuple[ManifestRecipient, ...]
    outer: tuple[tuple[str, str], ...]      # the outer header fields as sent
    card_hash: bytes        # of the sender's card when he signed

    def entry(self, blob_hash: bytes) -> ManifestRecipient | None:
        return next((recipient for recipient in self.recipients if recipient.blob_hash == blob_hash), None)


def belongs_to(address: str, card_address: str) -> bool:
    """Whether a card for `card_address` speaks for `address`: the same, or the gateway of its domain or of one above."""
    # RFC 3183 3.1: the domain of the authority is that of the user or an ascendant of it
    if not is_gateway(card_address):
        return address == card_address
    domain, gateway = domain_of(address), domain_of(card_address)
    return domain == gateway or domain.endswith("." + gateway)


def serialize_manifest(manifest: Manifest) -> bytes:
    members: dict[str, Any] = {
        "v": 1,
        "id": manifest.id.hex(),
        "from": manifest.sender,
        "skid": manifest.skid.hex(),
        "dev": manifest.device.hex(),
        "sent": manifest.sent_at_ms,
        "enc": manifest.encoding.value,
        "size": manifest.size,
        "sha512": manifest.sha512.hex(),
        "mid": manifest.message_id,
        "scope": manifest.scope,
        "rcpt": [_serialize_recipient(recipient) for recipient in manifest.recipients],
        "outer": [list(pair) for pair in manifest.outer],
        "card": manifest.card_hash.hex(),
    }
    if manifest.expires_at_ms is not None:
        members["exp"] = manifest.expires_at_ms
    return strict_json.dumps(members)


def _serialize_recipient(recipient: ManifestRecipient) -> dict[str, str]:
    named = {} if recipient.address is None else {"a": recipient.address}
    return named | {"k": recipient.key_id.hex(), "b": recipient.blob_hash.hex(), "r": recipient.role.value}


def parse_manifest(raw: bytes) -> Manifest:
    """Raises `Unreadable` for anything that docs/format.md 6.3 refuses."""
    try:
        return _parse(strict_json.loads(raw, max_bytes=MAX_MANIFEST_BYTES, max_depth=_MAX_DEPTH))
    except FormatError as error:
        raise Unreadable(f"manifest failure: {error}") from None


def _parse(members: dict[str, Any]) -> Manifest:
    version = strict_json.member(members, "v", int)
    if version != 1:
        raise FormatError("unknown version")
    strict_json.check_members(members, required=_MEMBERS, optional=("exp",))
    size = strict_json.natural(members, "size")
    if size > MAX_SIZE:
        raise FormatError("size out of range")
    scope = strict_json.member(members, "scope", str)
    if scope not in ("user", "gateway"):
        raise FormatError("unknown scope")
    return Manifest(
        id=strict_json.hex_bytes(members, "id", 16),
        sender=_address(members, "from"),
        skid=strict_json.hex_bytes(members, "skid", 32),
        device=strict_json.hex_bytes(members, "dev", 8),
        sent_at_ms=strict_json.natural(members, "sent"),
        expires_at_ms=strict_json.natural(members, "exp") if "exp" in members else None,
        encoding=_one_of(Encoding, strict_json.member(members, "enc", str)),
        size=size,
        sha512=strict_json.hex_bytes(members, "sha512", 64),
        message_id=strict_json.member(members, "mid", str),
        scope="user" if scope == "user" else "gateway",
        recipients=_recipients(strict_json.member(members, "rcpt", list)),
        outer=_outer(strict_json.member(members, "outer", list)),
        card_hash=strict_json.hex_bytes(members, "card", 32),
    )


def _recipients(entries: list[Any]) -> tuple[ManifestRecipient, ...]:
    if not 1 <= len(entries) <= MAX_RECIPIENTS:
        raise FormatError("number of recipients out of range")
    found: list[ManifestRecipient] = []
    for entry in entries:
        if not isinstance(entry, dict):
            raise FormatError("recipient is not an object")
        strict_json.check_members(entry, required=("k", "b", "r"), optional=("a",))
        found.append(ManifestRecipient(
            address=_address(entry, "a") if "a" in entry else None,
            key_id=strict_json.hex_bytes(entry, "k", 32),
            blob_hash=strict_json.hex_bytes(entry, "b", 32),
            role=_one_of(Role, strict_json.member(entry, "r", str)),
        ))
    if len({recipient.blob_hash for recipient in found}) != len(found):
        raise FormatError("key blob listed twice")
    return tuple(found)


def _outer(pairs: list[Any]) -> tuple[tuple[str, str], ...]:
    if len(pairs) > MAX_OUTER_FIELDS:
        raise FormatError("too many outer fields")
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise FormatError("outer field is not a pair of strings")
    return tuple((name, value) for name, value in pairs)


def _address(members: dict[str, Any], name: str) -> str:
    text = strict_json.member(members, name, str)
    if canonical_address(text) != text:
        raise FormatError("address is not canonical")
    return text


def _one_of(kind: type[_E], text: str) -> _E:
    try:
        return kind(text)
    except ValueError:
        raise FormatError(f"unknown {kind.__name__.lower()}") from None
