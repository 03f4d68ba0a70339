"""Secrets under a passphrase: the keyring that locks identities at rest, and the backup text (docs/format.md, Keyring).

The keyring header is stored once, in clear: cost, salt, and a check value that tells a wrong passphrase from a damaged store.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pybase64

from malote.core import primitives, strict_json
from malote.core.armor import armored, dearmor, find_blocks
from malote.core.card import Card
from malote.core.identity import (
    Identity,
    card_from_member,
    identity_from_members,
    identity_members,
    parse_identity,
    serialize_identity,
)
from malote.core.primitives import VERSION_SUITE
from malote.errors import FormatError, KeysLocked, Unreadable

SALT_BYTES = 16
MAX_HEADER_BYTES = 1024
MAX_MEMORY_KIB = 1024 * 1024    # 1 GiB: a header from elsewhere must not be able to take all memory or time
MAX_ITERATIONS = 64
MAX_LANES = 16
MAX_BACKUP_BYTES = 128 * 1024 * 1024    # 10,000 cards; in base64
_BACKUP_MAGIC = b"\x89MLB\r\n\x1a\n"
_BACKUP_KIND = "MALOTE BACKUP"
_WRONG = "wrong passphrase"


@dataclass(frozen=True, slots=True)
class Cost:
    """What Argon2id takes (RFC 9106)."""

    memory_kib: int
    iterations: int
    lanes: int


DEFAULT_COST = Cost(64 * 1024, 3, 4)    # RFC 9106 4, second recommended option; about 100 ms
CHEAPEST_COST = Cost(32, 1, 4)          # only for testing!


class KeyringKey:
    """The key made from a passphrase. Argon2id runs in `create` and `from_header` (about 100 ms), nowhere else."""

    def __init__(self, key: bytes, header: bytes) -> None:
        self._key = key
        self.header = header        # to be stored in clear; the same passphrase and header give the same key

    @classmethod
    def create(cls, passphrase: bytes, *, cost: Cost = DEFAULT_COST) -> KeyringKey:
        """A key with a fresh salt. Raises `KeysLocked` for an empty passphrase."""
        if not passphrase:
            raise KeysLocked("the passphrase is empty")
        salt = primitives.random_bytes(SALT_BYTES)
        key = _stretch(passphrase, salt, cost)
        members: dict[str, Any] = {
            "v": 1, "kdf": "argon2id", "m": cost.memory_kib, "t": cost.iterations, "p": cost.lanes, "salt": salt.hex(),
        }
        check = primitives.aead_encrypt(key, b"", _check_aad(cost, salt))
        return cls(key, strict_json.dumps(members | {"check": check.hex()}))

    @classmethod
    def from_header(cls, header: bytes, passphrase: bytes) -> KeyringKey:
        """Raises `KeysLocked` for a wrong passphrase, `FormatError` for a damaged header."""
        members = strict_json.loads(header, max_bytes=MAX_HEADER_BYTES, max_depth=1)
        strict_json.check_members(members, required=("v", "kdf", "m", "t", "p", "salt", "check"))
        if strict_json.natural(members, "v") != 1 or members["kdf"] != "argon2id":
            raise FormatError("keyring is of another version")
        cost = Cost(*(strict_json.natural(members, name) for name in ("m", "t", "p")))
        if not (8 * cost.lanes <= cost.memory_kib <= MAX_MEMORY_KIB and 1 <= cost.iterations <= MAX_ITERATIONS
                and 1 <= cost.lanes <= MAX_LANES):
            raise FormatError("keyring has a cost out of range")
        salt = strict_json.hex_bytes(members, "salt", SALT_BYTES)
        check = strict_json.hex_bytes(members, "check", primitives.NONCE_BYTES + primitives.TAG_BYTES)
        key = _stretch(passphrase, salt, cost)
        try:
            primitives.aead_decrypt(key, check, _check_aad(cost, salt))
        except Unreadable:
            raise KeysLocked(_WRONG, hint="try again; nothing was changed. Without the passphrase only a backup helps") from None
        return cls(key, header)

    def lock(self, secret: bytes, aad: bytes) -> bytes:
        """Encrypt. `aad` says what it is, and to whom it belongs: another `aad` does not unlock it."""
        return primitives.aead_encrypt(self._key, secret, b"MLT1 keyring\0" + aad)

    def unlock(self, locked: bytes, aad: bytes) -> bytes:
        """Raises `KeysLocked`: damaged, or locked under another key or `aad`."""
        try:
            return primitives.aead_decrypt(self._key, locked, b"MLT1 keyring\0" + aad)
        except Unreadable:
            raise KeysLocked("a private key in the store is damaged, or was locked under another passphrase") from None

    def __repr__(self) -> str:
        return "KeyringKey(...)"


def _stretch(passphrase: bytes, salt: bytes, cost: Cost) -> bytes:
    return primitives.argon2id(passphrase, salt, memory_kib=cost.memory_kib, iterations=cost.iterations, lanes=cost.lanes)


def _check_aad(cost: Cost, salt: bytes) -> bytes:
    return f"MLT1 keyring check\0{cost.memory_kib},{cost.iterations},{cost.lanes},".encode() + salt


# --- backup


@dataclass(frozen=True, slots=True)
class BackupCard:
    """A correspondent's card, with the level and evidence it was held at, as the store names them."""

    card: Card
    level: str
    evidence: str = ""


@dataclass(frozen=True, slots=True)
class Backup:
    identities: tuple[Identity, ...]
    cards: tuple[BackupCard, ...]
    made_at_ms: int


def seal_backup(
    identities: Sequence[Identity], cards: Sequence[BackupCard], passphrase: bytes, *, now_ms: int, cost: Cost = DEFAULT_COST,
) -> bytes:
    """The text of a backup file: magic8 ‖ VS ‖ u16 length ‖ keyring header ‖ locked JSON, armoured. Everything is in it."""
    content = strict_json.dumps({
        "v": 1,
        "made": now_ms,
        "identities": [identity_members(identity) for identity in identities],
        "cards": [
            {"card": pybase64.b64encode(entry.card.raw).decode(), "level": entry.level, "evidence": entry.evidence}
            for entry in cards
        ],
    })
    keyring = KeyringKey.create(passphrase, cost=cost)
    head = _BACKUP_MAGIC + VERSION_SUITE + len(keyring.header).to_bytes(2, "big") + keyring.header
    return armored(_BACKUP_KIND, head + keyring.lock(content, b"backup\0" + head), []).encode()


def open_backup(text: bytes, passphrase: bytes) -> Backup:
    """Raises `FormatError` if it is no backup or is damaged, `KeysLocked` for a wrong passphrase."""
    data = _backup_data(text)
    start = len(_BACKUP_MAGIC) + len(VERSION_SUITE)
    end = start + 2 + int.from_bytes(data[start:start + 2], "big")
    if end > len(data):
        raise FormatError("backup is cut off")
    keyring = KeyringKey.from_header(data[start + 2:end], passphrase)
    try:
        content = keyring.unlock(data[end:], b"backup\0" + data[:end])
    except KeysLocked:
        raise FormatError("backup is damaged") from None
    members = strict_json.loads(content, max_bytes=MAX_BACKUP_BYTES, max_depth=5)
    strict_json.check_members(members, required=("v", "made", "identities", "cards"))
    if strict_json.natural(members, "v") != 1:
        raise FormatError("backup is of another version")
    return Backup(
        tuple(identity_from_members(entry) for entry in _objects(members, "identities")),
        tuple(_backup_card(entry) for entry in _objects(members, "cards")),
        strict_json.natural(members, "made"),
    )


def _backup_data(text: bytes) -> bytes:
    if len(text) > MAX_BACKUP_BYTES:
        raise FormatError("file is too large to be a backup")
    blocks = list(find_blocks(_BACKUP_KIND, text.decode("utf-8", "surrogateescape")))
    if len(blocks) != 1:
        raise FormatError("not a backup file", hint="a backup is the text between BEGIN MALOTE BACKUP and END MALOTE BACKUP")
    try:
        data = dearmor("".join(blocks[0].split()))
    except FormatError:
        raise FormatError("backup is damaged: its text is not complete") from None
    start = len(_BACKUP_MAGIC)
    if data[:start] != _BACKUP_MAGIC or data[start:start + len(VERSION_SUITE)] != VERSION_SUITE:
        raise FormatError("backup is of a version that this malote does not know")
    return data


def _backup_card(members: dict[str, Any]) -> BackupCard:
    strict_json.check_members(members, required=("card", "level", "evidence"))
    level, evidence = (strict_json.member(members, name, str) for name in ("level", "evidence"))
    return BackupCard(card_from_member(members, "card"), level, evidence)


def _objects(members: dict[str, Any], name: str) -> list[dict[str, Any]]:
    entries = strict_json.member(members, name, list)
    if not all(isinstance(entry, dict) for entry in entries):
        raise FormatError(f"member {name} is not a list of objects")
    return entries


# --- one identity at rest


def lock_identity(keyring: KeyringKey, identity: Identity) -> bytes:
    return keyring.lock(serialize_identity(identity), _identity_aad(identity.address))


def unlock_identity(keyring: KeyringKey, address: str, locked: bytes) -> Identity:
    """Raises `KeysLocked`: damaged, under another passphrase, or of another address."""
    try:
        identity = parse_identity(keyring.unlock(locked, _identity_aad(address)))
    except FormatError as error:
        raise KeysLocked(f"the private keys of {address} in the store are damaged") from error
    if identity.address != address:
        raise KeysLocked(f"the private keys of {address} in the store belong to another address")
    return identity


def _identity_aad(address: str) -> bytes:
    return b"identity\0" + address.encode()
