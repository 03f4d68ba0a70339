"""Keys: ids and signatures are what the format says, both halves count, and secrets do not show."""

from __future__ import annotations

import hashlib

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519, mldsa
from hypothesis import given, settings
from hypothesis import strategies as st

from malote.core.keys import DecryptionKey, EncryptionKey, SignatureAlgorithm, SigningKey, VerifyKey
from malote.errors import BadSignature, FormatError, Unreadable

BOTH = pytest.mark.parametrize("algorithm", list(SignatureAlgorithm), ids=lambda a: a.name)
KEYS = {algorithm: SigningKey(algorithm, bytes(range(algorithm.seed_bytes))) for algorithm in SignatureAlgorithm}


def test_wrap_and_unwrap() -> None:
    key = DecryptionKey.generate()
    wrapped = EncryptionKey(key.public.raw).wrap(b"x" * 56, b"info")
    assert len(wrapped) == 1192
    assert DecryptionKey(key.seed).unwrap(wrapped, b"info") == b"x" * 56
    for other, info in ((DecryptionKey.generate(), b"info"), (key, b"other")):
        with pytest.raises(Unreadable):
            other.unwrap(wrapped, info)


def test_encryption_key_id() -> None:
    key = DecryptionKey(bytes(32)).public
    assert key.id == hashlib.sha256(b"MLT1 enc key" + key.raw).digest()


@BOTH
def test_signature_is_what_the_format_says(algorithm: SignatureAlgorithm) -> None:
    """Verified with the library alone, from the raw bytes."""
    key = KEYS[algorithm]
    signature = key.sign(b"message")
    raw = key.public.raw
    assert (len(raw), len(signature)) == (algorithm.public_bytes, algorithm.signature_bytes)
    assert key.public.id == hashlib.sha256(b"MLT1 sig key" + raw).digest()
    ed25519.Ed25519PublicKey.from_public_bytes(raw[:32]).verify(signature[:64], b"message")
    if algorithm is SignatureAlgorithm.HYBRID:
        mldsa.MLDSA65PublicKey.from_public_bytes(raw[32:]).verify(signature[64:], b"message", b"MLT1")


@BOTH
def test_damaged_signatures_are_refused(algorithm: SignatureAlgorithm) -> None:
    key = KEYS[algorithm]
    signature = key.sign(b"message")
    verify = VerifyKey(algorithm, key.public.raw)
    verify.verify(b"message", signature)
    places = [0, 31, 32, 63] + ([64, 65, 1000, 3372] if algorithm is SignatureAlgorithm.HYBRID else [])
    bad = [bytes([*signature[:at], signature[at] ^ 1, *signature[at + 1:]]) for at in places]
    bad += [b"", signature[:-1], signature + b"\0", bytes(len(signature))]
    for damaged in bad:
        with pytest.raises(BadSignature):
            verify.verify(b"message", damaged)
    with pytest.raises(BadSignature):
        verify.verify(b"Message", signature)


def test_each_half_of_a_hybrid_signature_must_verify() -> None:
    """One broken algorithm must not be enough: one good half beside one by another key is refused."""
    mine, other = KEYS[SignatureAlgorithm.HYBRID], SigningKey.generate()
    good, foreign = mine.sign(b"m"), other.sign(b"m")
    for mixed in (good[:64] + foreign[64:], foreign[:64] + good[64:], good[:64], good[64:]):
        with pytest.raises(BadSignature):
            mine.public.verify(b"m", mixed)


def test_a_hybrid_key_takes_no_plain_signature_and_the_reverse() -> None:
    hybrid = KEYS[SignatureAlgorithm.HYBRID]
    plain = SigningKey(SignatureAlgorithm.ED25519, hybrid.seeds[:32])
    assert plain.public.raw == hybrid.public.raw[:32]       # the same Ed25519 key, and yet
    assert plain.public.id != hybrid.public.id
    for verify, signature in ((hybrid.public, plain.sign(b"m")), (plain.public, hybrid.sign(b"m"))):
        with pytest.raises(BadSignature):
            verify.verify(b"m", signature)


@BOTH
def test_fingerprint_is_as_documented(algorithm: SignatureAlgorithm) -> None:
    public = KEYS[algorithm].public
    groups = public.fingerprint.split(" ")
    assert [len(group) for group in groups] == [5] * 6
    for i, group in enumerate(groups):
        assert int(group) == int.from_bytes(public.id[5 * i:5 * i + 5], "big") % 100_000


def test_fingerprints_are_pinned() -> None:
    """People wrote them down: another way to compute them is an incompatible change."""
    assert KEYS[SignatureAlgorithm.ED25519].public.fingerprint == "97737 98520 24078 49938 54184 07624"
    assert KEYS[SignatureAlgorithm.HYBRID].public.fingerprint == "72427 36762 48872 02971 30669 11057"
    assert DecryptionKey(bytes(range(32))).public.id.hex() == "fdf5e5f44626f29aeb2b48d38af17f66d7705187548cf9fd6708aa11578d00c7"


@pytest.mark.parametrize("size", [0, 31, 33, 64])
def test_sizes_are_exact(size: int) -> None:
    for make in (EncryptionKey, DecryptionKey, lambda raw: VerifyKey(SignatureAlgorithm.HYBRID, raw)):
        with pytest.raises(FormatError):
            make(bytes(size))
    with pytest.raises(FormatError):
        SigningKey(SignatureAlgorithm.HYBRID if size != 64 else SignatureAlgorithm.ED25519, bytes(size))


def test_equality_is_by_content() -> None:
    key, same = KEYS[SignatureAlgorithm.HYBRID], SigningKey(SignatureAlgorithm.HYBRID, KEYS[SignatureAlgorithm.HYBRID].seeds)
    assert key == same
    assert hash(key) == hash(same)
    assert key.public == same.public
    assert key != SigningKey.generate()
    assert DecryptionKey(bytes(32)) == DecryptionKey(bytes(32))
    assert len({DecryptionKey(bytes(32)), DecryptionKey(bytes(32)), DecryptionKey(b"1" * 32)}) == 2
    assert EncryptionKey(bytes(1216)) != object()


def test_secrets_do_not_show() -> None:
    """An exception text or a log line may hold a repr."""
    signing, decryption = SigningKey.generate(), DecryptionKey.generate()
    for shown in (repr(signing), str(signing), f"{signing}"):
        assert signing.seeds[:4].hex() not in shown
        assert repr(signing.seeds)[2:10] not in shown
    assert decryption.seed[:4].hex() not in repr(decryption)
    assert repr(decryption) == f"DecryptionKey({decryption.public.id[:8].hex()})"


@settings(max_examples=30)
@given(st.binary(max_size=300), st.sampled_from(list(SignatureAlgorithm)))
def test_any_message_can_be_signed(message: bytes, algorithm: SignatureAlgorithm) -> None:
    KEYS[algorithm].public.verify(message, KEYS[algorithm].sign(message))
