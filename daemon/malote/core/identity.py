"""Identities: the private half of a card, how it changes, and how it is kept (docs/format.md, Identities).

At rest an identity is its seeds in strict JSON, encrypted under a `KeyringKey` that Argon2id makes from a passphrase once per
process. A backup is one self-contained text under a passphrase of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pybase64

from malote.core import strict_json
from malote.core.address import canonical_card_address
from malote.core.armor import dearmor
from malote.core.card import MAX_CARD_BYTES, Card, CardKey, make_card, parse_card
from malote.core.keys import DecryptionKey, SignatureAlgorithm, SigningKey
from malote.errors import FormatError

KEY_LIFETIME_MS = 730 * 24 * 3600 * 1000    # two years: of a card and its encryption key, renewed by every rotation
MAX_DECRYPTION_KEYS = 1000      # a rotation every month for 80 years; bounds what one serialized identity costs to load
MAX_IDENTITY_BYTES = 256 * 1024


@dataclass(frozen=True)
class Identity:
    """Everything that the owner of an address needs. `decryption` is newest first; old keys stay, to open old mail."""

    address: str
    signing: SigningKey
    decryption: tuple[DecryptionKey, ...]
    card: Card
    predecessor: SigningKey | None = None   # countersigns every later card: a correspondent may have missed the first


def new_identity(address: str, algorithm: SignatureAlgorithm, now_ms: int) -> Identity:
    """Fresh keys for an address, or for "@domain". Raises `FormatError` if it is neither."""
    address = canonical_card_address(address)
    return _with_card(address, SigningKey.generate(algorithm), (DecryptionKey.generate(),), None, sequence=1, now_ms=now_ms)


def rotate(identity: Identity, now_ms: int, *, signing: bool = False) -> Identity:
    """A new encryption key, and with `signing` a new signing key that the old one countersigns. The card's time starts again."""
    key, predecessor = identity.signing, identity.predecessor
    if signing:
        key, predecessor = SigningKey.generate(identity.signing.algorithm), identity.signing
    decryption = (DecryptionKey.generate(), *identity.decryption)
    if len(decryption) > MAX_DECRYPTION_KEYS:
        raise FormatError("identity has too many old decryption keys")
    return _with_card(identity.address, key, decryption, predecessor, sequence=identity.card.sequence + 1, now_ms=now_ms)


def _with_card(
    address: str, signing: SigningKey, decryption: tuple[DecryptionKey, ...], predecessor: SigningKey | None, *,
    sequence: int, now_ms: int,
) -> Identity:
    current = CardKey(decryption[0].public, now_ms, now_ms + KEY_LIFETIME_MS)
    card = make_card(
        signing, address, [current], sequence=sequence, made_at_ms=now_ms, expires_at_ms=now_ms + KEY_LIFETIME_MS,
        predecessor=predecessor,
    )
    return Identity(address, signing, decryption, card, predecessor)


def merge_decryption_keys(identity: Identity, other: Identity) -> Identity:
    """`identity` with the decryption keys of `other` that it lacks behind its own: no key that opens mail is ever dropped."""
    more = tuple(key for key in other.decryption if key not in identity.decryption)
    return replace(identity, decryption=identity.decryption + more)


def serialize_identity(identity: Identity) -> bytes:
    """Secret. Strict JSON, at most `MAX_IDENTITY_BYTES`."""
    return strict_json.dumps(identity_members(identity))


def parse_identity(data: bytes) -> Identity:
    """Raises `FormatError`; its text never holds a part of the data."""
    return identity_from_members(strict_json.loads(data, max_bytes=MAX_IDENTITY_BYTES, max_depth=3))


def identity_members(identity: Identity) -> dict[str, Any]:
    members = {
        "v": 1,
        "addr": identity.address,
        "sign": _signing_members(identity.signing),
        "dec": [key.seed.hex() for key in identity.decryption],
        "card": pybase64.b64encode(identity.card.raw).decode(),
    }
    if identity.predecessor is not None:
        members["prev"] = _signing_members(identity.predecessor)
    return members


def identity_from_members(members: Mapping[str, Any]) -> Identity:
    strict_json.check_members(members, required=("v", "addr", "sign", "dec", "card"), optional=("prev",))
    if strict_json.natural(members, "v") != 1:
        raise FormatError("identity is of another version")
    card = card_from_member(members, "card")
    address = strict_json.member(members, "addr", str)
    signing = _signing_key(strict_json.member(members, "sign", dict))
    predecessor = _signing_key(strict_json.member(members, "prev", dict)) if "prev" in members else None
    decryption = _decryption_keys(strict_json.member(members, "dec", list))
    if (card.address, card.verify, card.previous) != (address, signing.public, predecessor and predecessor.public.id):
        raise FormatError("identity does not belong to its card")
    if {entry.key for entry in card.encryption} - {key.public for key in decryption}:
        raise FormatError("identity lacks a decryption key of its card")
    return Identity(address, signing, decryption, card, predecessor)


def card_from_member(members: Mapping[str, Any], name: str) -> Card:
    text = strict_json.member(members, name, str)
    if len(text) > 2 * MAX_CARD_BYTES:
        raise FormatError("card is too large")
    return parse_card(dearmor(text))


def _signing_members(key: SigningKey) -> dict[str, str]:
    return {"alg": key.algorithm.value, "seed": key.seeds.hex()}


def _signing_key(members: Mapping[str, Any]) -> SigningKey:
    strict_json.check_members(members, required=("alg", "seed"))
    try:
        algorithm = SignatureAlgorithm(strict_json.member(members, "alg", str))
    except ValueError:
        raise FormatError("identity has a signature algorithm that this malote does not know") from None
    return SigningKey(algorithm, strict_json.hex_bytes(members, "seed", algorithm.seed_bytes))


def _decryption_keys(seeds: Sequence[Any]) -> tuple[DecryptionKey, ...]:
    if not 1 <= len(seeds) <= MAX_DECRYPTION_KEYS:
        raise FormatError("identity has no decryption key, or too many")
    return tuple(DecryptionKey(strict_json.hex_bytes({"dec": seed}, "dec", 32)) for seed in seeds)
