"""Private halves: complete, locked, never shown, and restored as they were."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from malote.core import strict_json
from malote.core.armor import armored, dearmor, find_blocks
from malote.core.card import parse_card
from malote.core.identity import (
    Identity,
    identity_members,
    merge_decryption_keys,
    new_identity,
    parse_identity,
    rotate,
    serialize_identity,
)
from malote.core.keyring import CHEAPEST_COST, DEFAULT_COST, BackupCard, Cost, KeyringKey, open_backup, seal_backup
from malote.core.keys import DecryptionKey, SignatureAlgorithm, SigningKey
from malote.errors import FormatError, KeysLocked

NOW_MS = 1_790_000_000_000
ANNA = new_identity("Anna@Example.org", SignatureAlgorithm.HYBRID, NOW_MS)
ROTATED = rotate(rotate(ANNA, NOW_MS + 1), NOW_MS + 2, signing=True)
BERT = new_identity("bert@example.org", SignatureAlgorithm.ED25519, NOW_MS)
BACKUP = seal_backup(
    [ROTATED, BERT], [BackupCard(ANNA.card, "VERIFIED", "compared by phone"), BackupCard(BERT.card, "TOFU")],
    b"backup passphrase", now_ms=NOW_MS, cost=CHEAPEST_COST,
)


@pytest.mark.parametrize("algorithm", list(SignatureAlgorithm))
def test_new_identity(algorithm: SignatureAlgorithm) -> None:
    identity = new_identity("Anna@Example.org", algorithm, NOW_MS)
    assert identity.address == identity.card.address == "anna@example.org"
    assert identity.card.verify == identity.signing.public
    assert identity.signing.algorithm is algorithm
    key = identity.card.encryption_key(NOW_MS)
    assert identity.decryption[0].unwrap(key.wrap(b"x", b"i"), b"i") == b"x"
    assert parse_card(identity.card.raw) == identity.card


def test_no_identity_for_nonsense() -> None:
    with pytest.raises(FormatError):
        new_identity("Anna <anna@example.org>", SignatureAlgorithm.HYBRID, NOW_MS)


def test_rotation_keeps_every_key_that_opens_mail() -> None:
    once = rotate(ANNA, NOW_MS + 1)
    twice = rotate(once, NOW_MS + 2)
    assert twice.decryption[1:] == once.decryption
    assert once.decryption[1:] == ANNA.decryption
    assert twice.card.encryption_key(NOW_MS + 2) == twice.decryption[0].public
    assert [identity.card.sequence for identity in (ANNA, once, twice)] == [1, 2, 3]
    assert twice.signing == ANNA.signing
    wrapped = ANNA.card.encryption_key(NOW_MS).wrap(b"old mail", b"i")
    assert twice.decryption[2].unwrap(wrapped, b"i") == b"old mail"


def test_rotating_the_signing_key() -> None:
    assert ROTATED.signing != ANNA.signing
    assert ROTATED.predecessor == ANNA.signing
    assert ROTATED.card.previous == ANNA.signing.public.id
    assert len(ROTATED.decryption) == 3


def test_merge_drops_no_key() -> None:
    merged = merge_decryption_keys(ANNA, ROTATED)
    assert merged.decryption[0] == ANNA.decryption[0]
    assert set(merged.decryption) == set(ROTATED.decryption)
    assert merge_decryption_keys(ROTATED, ANNA) == ROTATED


@pytest.mark.parametrize("identity", [ANNA, ROTATED, BERT, merge_decryption_keys(ANNA, ROTATED)])
def test_serialize_and_parse(identity: Identity) -> None:
    data = serialize_identity(identity)
    parsed = parse_identity(data)
    assert parsed == identity
    assert serialize_identity(parsed) == data


@pytest.mark.parametrize("change", [
    {"v": 2}, {"addr": "bert@example.org"}, {"dec": []}, {"dec": ["00" * 31]}, {"dec": [1]}, {"dec": ["00" * 32]},
    {"card": "AAAA"}, {"card": "A"}, {"card": 1}, {"extra": 1}, {"sign": {"alg": "none", "seed": ""}},
    {"sign": {"alg": "ed25519", "seed": "00" * 64}},
    {"sign": identity_members(BERT)["sign"]}, {"card": identity_members(BERT)["card"]}, {"card": identity_members(ANNA)["card"]},
    {"prev": identity_members(BERT)["sign"]}, {"dec": ["00" * 32] * 1001},
], ids=lambda change: next(iter(change)))
def test_parts_that_do_not_belong_together_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(FormatError) as caught:
        parse_identity(strict_json.dumps(identity_members(ROTATED) | change))
    assert ROTATED.signing.seeds.hex()[:8] not in str(caught.value)


@settings(max_examples=50)
@given(st.binary(max_size=100) | st.integers(0, 8 * len(serialize_identity(BERT)) - 1))
def test_any_bytes_give_format_error_or_the_identity(data: bytes | int) -> None:
    if isinstance(data, int):       # a flipped bit
        flipped = bytearray(serialize_identity(BERT))
        flipped[data // 8] ^= 1 << data % 8
        data = bytes(flipped)
    with pytest.raises(FormatError):
        parse_identity(data)


def test_secrets_do_not_show() -> None:
    shown = repr(ROTATED) + repr(KeyringKey.create(b"x", cost=CHEAPEST_COST))
    for secret in (ROTATED.signing.seeds, ANNA.signing.seeds, *(key.seed for key in ROTATED.decryption)):
        assert secret.hex()[:16] not in shown
        assert repr(secret)[2:20] not in shown


# --- keyring


def test_keyring_locks_and_unlocks() -> None:
    created = KeyringKey.create(b"passphrase", cost=CHEAPEST_COST)
    again = KeyringKey.from_header(created.header, b"passphrase")
    locked = created.lock(b"secret", b"anna@example.org")
    assert b"secret" not in locked
    assert again.unlock(locked, b"anna@example.org") == b"secret"
    assert locked != created.lock(b"secret", b"anna@example.org")
    assert KeyringKey.create(b"passphrase", cost=CHEAPEST_COST).header != created.header


def test_keyring_refusals() -> None:
    keyring = KeyringKey.create(b"passphrase", cost=CHEAPEST_COST)
    locked = keyring.lock(b"secret", b"anna@example.org")
    for wrong in (b"", b"Passphrase", b"passphrase\n"):
        with pytest.raises(KeysLocked, match="wrong passphrase"):
            KeyringKey.from_header(keyring.header, wrong)
    for damaged, aad in ((locked, b"bert@example.org"), (locked[:-1], b"anna@example.org"), (b"", b"anna@example.org")):
        with pytest.raises(KeysLocked, match="damaged"):
            keyring.unlock(damaged, aad)
    with pytest.raises(KeysLocked):
        KeyringKey.create(b"passphrase", cost=CHEAPEST_COST).unlock(locked, b"anna@example.org")
    with pytest.raises(KeysLocked, match="empty"):
        KeyringKey.create(b"", cost=CHEAPEST_COST)


@pytest.mark.parametrize("change", [
    {"v": 2}, {"kdf": "scrypt"}, {"m": 2**30}, {"m": 8}, {"t": 0}, {"t": 1000},
    {"p": 0}, {"p": 1000}, {"salt": ""}, {"check": "00"}, {"x": 1},
], ids=str)
def test_keyring_headers_out_of_range_are_refused_before_any_work(change: dict[str, object]) -> None:
    """A header with a huge cost would take all memory or all day."""
    header = strict_json.loads(KeyringKey.create(b"x", cost=CHEAPEST_COST).header, max_bytes=1000, max_depth=1)
    with pytest.raises(FormatError):
        KeyringKey.from_header(strict_json.dumps(header | change), b"x")


def test_cheaper_cost_in_the_header_is_noticed() -> None:
    """The check value is bound to the cost: a changed header is a wrong passphrase, not a weaker key."""
    header = strict_json.loads(KeyringKey.create(b"x", cost=Cost(64, 1, 4)).header, max_bytes=1000, max_depth=1)
    with pytest.raises(KeysLocked):
        KeyringKey.from_header(strict_json.dumps(header | {"m": 32}), b"x")


def test_default_cost_is_what_the_format_says() -> None:
    assert Cost(65536, 3, 4) == DEFAULT_COST
    assert b'"m":65536,"t":3,"p":4' in KeyringKey.create(b"x").header


# --- backup


def test_backup_restores_everything() -> None:
    backup = open_backup(BACKUP, b"backup passphrase")
    assert backup.identities == (ROTATED, BERT)
    assert [len(identity.decryption) for identity in backup.identities] == [3, 1]
    assert [(entry.card, entry.level, entry.evidence) for entry in backup.cards] == [
        (ANNA.card, "VERIFIED", "compared by phone"), (BERT.card, "TOFU", ""),
    ]
    assert backup.made_at_ms == NOW_MS


def test_empty_backup() -> None:
    assert open_backup(seal_backup([], [], b"x", now_ms=1, cost=CHEAPEST_COST), b"x").identities == ()


def test_backup_is_text_that_shows_nothing() -> None:
    assert BACKUP.isascii()
    assert max(map(len, BACKUP.splitlines())) <= 64
    data = dearmor("".join(next(find_blocks("MALOTE BACKUP", BACKUP.decode())).split()))
    for hint in (b"anna", b"example.org", ROTATED.signing.seeds[:8], ROTATED.signing.seeds[:8].hex().encode()):
        assert hint not in data


def test_backup_survives_mail() -> None:
    for mangled in (BACKUP.replace(b"\n", b"\r\n"), b"> " + BACKUP.replace(b"\n", b"\n> "), b"x\n" + BACKUP + b"\n--\nfooter"):
        assert open_backup(mangled, b"backup passphrase").identities == (ROTATED, BERT)


def test_backup_refusals() -> None:
    with pytest.raises(KeysLocked, match="wrong passphrase"):
        open_backup(BACKUP, b"other")
    for text, words in (
        (b"", "not a backup"), (BACKUP + BACKUP, "not a backup"), (BACKUP[:500], "cut off"),
        (BACKUP.replace(b"\n", b"x", 2), "not complete"), (armored("MALOTE BACKUP", b"hello", []).encode(), "version"),
        (armored("MALOTE CARD", b"hello", []).encode(), "not a backup"),
        (armored("MALOTE BACKUP", b"\x89MLB\r\n\x1a\n\x01\x00\x01\xff\xff", []).encode(), "cut off"),
    ):
        with pytest.raises(FormatError, match=words):
            open_backup(text, b"backup passphrase")


@settings(max_examples=60)
@given(st.data())
def test_damaged_backups_are_refused(data: st.DataObject) -> None:
    raw = bytearray(dearmor("".join(next(find_blocks("MALOTE BACKUP", BACKUP.decode())).split())))
    raw[data.draw(st.integers(0, len(raw) - 1) | st.integers(0, 250))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises((FormatError, KeysLocked)):
        open_backup(armored("MALOTE BACKUP", bytes(raw), []).encode(), b"backup passphrase")


def test_keys_of_the_classes_are_used() -> None:
    """`in` and sets compare secrets by content: a key restored is the key held."""
    key = ANNA.decryption[0]
    assert DecryptionKey(key.seed) in ANNA.decryption
    assert SigningKey(ANNA.signing.algorithm, ANNA.signing.seeds) == ANNA.signing
