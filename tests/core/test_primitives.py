"""The primitives against published vectors and an independent implementation, and their refusals."""

from __future__ import annotations

import hashlib
import hmac
import json
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import mlkem, x25519
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from hypothesis import given
from hypothesis import strategies as st

from malote.core import primitives
from malote.core.primitives import CHUNK_BYTES, TAG_BYTES
from malote.errors import BadSignature, CryptoUnsupported, FormatError, Unreadable

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "hpke-0x647a.json").read_text())["vectors"]
AEADS: dict[int, tuple[Any, int]] = {1: (AESGCM, 16), 2: (AESGCM, 32), 3: (ChaCha20Poly1305, 32)}


# --- an independent HPKE: only hashes, ML-KEM and X25519 in common with the code under test


def xwing_decapsulate(seed: bytes, enc: bytes) -> tuple[bytes, bytes]:
    """draft-connolly-cfrg-xwing-kem 5.4: shared secret, raw public key."""
    expanded = hashlib.shake_256(seed).digest(96)
    lattice = mlkem.MLKEM768PrivateKey.from_seed_bytes(expanded[:64])
    curve = x25519.X25519PrivateKey.from_private_bytes(expanded[64:])
    curve_public = curve.public_key().public_bytes_raw()
    shared = lattice.decapsulate(enc[:1088]) + curve.exchange(x25519.X25519PublicKey.from_public_bytes(enc[1088:]))
    secret = hashlib.sha3_256(shared + enc[1088:] + curve_public + bytes.fromhex("5c2e2f2f5e5c")).digest()
    return secret, lattice.public_key().public_bytes_raw() + curve_public


def key_schedule(kdf_hash: str, suite: bytes, shared: bytes, info: bytes, key_bytes: int) -> tuple[bytes, bytes]:
    """RFC 9180 5.1 KeySchedule, base mode, with a two-step KDF."""
    size = hashlib.new(kdf_hash).digest_size

    def extract(salt: bytes, label: bytes, ikm: bytes) -> bytes:
        return hmac.digest(salt or bytes(size), b"HPKE-v1" + suite + label + ikm, kdf_hash)

    def expand(prk: bytes, label: bytes, context: bytes, length: int) -> bytes:
        output, block = b"", b""
        while len(output) < length:
            counter = bytes([len(output) // size + 1])
            block = hmac.digest(prk, block + length.to_bytes(2, "big") + b"HPKE-v1" + suite + label + context + counter, kdf_hash)
            output += block
        return output[:length]

    context = b"\0" + extract(b"", b"psk_id_hash", b"") + extract(b"", b"info_hash", info)
    secret = extract(shared, b"secret", b"")
    return expand(secret, b"key", context, key_bytes), expand(secret, b"base_nonce", context, 12)


def suite_id(kem: int, kdf: int, aead: int) -> bytes:
    return b"HPKE" + kem.to_bytes(2, "big") + kdf.to_bytes(2, "big") + aead.to_bytes(2, "big")


@pytest.mark.parametrize("vector", VECTORS, ids=lambda v: f"kdf{v['kdf_id']}-aead{v['aead_id']}")
def test_kem_and_key_schedule_against_the_working_groups_vectors(vector: dict[str, Any]) -> None:
    """Our key from a seed is the vector's, and the independent implementation below is right where it decides other tests."""
    seed, enc = bytes.fromhex(vector["skRm"]), bytes.fromhex(vector["enc"])
    assert primitives.load_hpke_private(seed)[1].hex() == vector["pkRm"]
    primitives.load_hpke_public(bytes.fromhex(vector["pkRm"]))
    shared, public = xwing_decapsulate(seed, enc)
    assert (shared.hex(), public.hex()) == (vector["shared_secret"], vector["pkRm"])
    if vector["kdf_id"] != 1:       # the others use a one-step KDF, which suite 1 does not
        return
    cipher, key_bytes = AEADS[vector["aead_id"]]
    suite = suite_id(0x647A, vector["kdf_id"], vector["aead_id"])
    key, nonce = key_schedule("sha256", suite, shared, bytes.fromhex(vector["info"]), key_bytes)
    assert (key.hex(), nonce.hex()) == (vector["key"], vector["base_nonce"])
    for number, entry in enumerate(vector["encryptions"]):
        step = (int.from_bytes(nonce, "big") ^ number).to_bytes(12, "big")
        assert step.hex() == entry["nonce"]
        plain = cipher(key).decrypt(step, bytes.fromhex(entry["ct"]), bytes.fromhex(entry["aad"]))
        assert plain.hex() == entry["pt"]


def test_there_are_vectors() -> None:
    assert any(vector["kdf_id"] == 1 for vector in VECTORS)
    assert {vector["kem_id"] for vector in VECTORS} == {0x647A}


@given(st.binary(max_size=100), st.binary(max_size=100))
def test_what_we_seal_an_independent_implementation_opens(plain: bytes, info: bytes) -> None:
    seed = bytes(range(32))
    private, raw = primitives.load_hpke_private(seed)
    sealed = primitives.hpke_seal(primitives.load_hpke_public(raw), info, plain)
    assert len(sealed) == len(plain) + primitives.HPKE_OVERHEAD_BYTES
    shared, _ = xwing_decapsulate(seed, sealed[:1120])
    key, nonce = key_schedule("sha256", suite_id(0x647A, 1, 2), shared, info, 32)
    assert AESGCM(key).decrypt(nonce, sealed[1120:], b"") == plain
    assert primitives.hpke_open(private, info, sealed) == plain


def test_hpke_refuses_other_keys_other_info_and_damage() -> None:
    private, raw = primitives.load_hpke_private(bytes(32))
    other, _ = primitives.load_hpke_private(bytes([1]) * 32)
    sealed = primitives.hpke_seal(primitives.load_hpke_public(raw), b"info", b"x" * 56)
    low_order = sealed[:1088] + bytes(32) + sealed[1120:]
    bad = [b"", sealed[:1119], sealed[:-1], sealed + b"\0", bytes(len(sealed)), low_order]
    bad += [bytes([*sealed[:at], sealed[at] ^ 1, *sealed[at + 1:]]) for at in (0, 1087, 1088, 1119, 1120, 1175, 1191)]
    for damaged in bad:
        with pytest.raises(Unreadable):
            primitives.hpke_open(private, b"info", damaged)
    for key, info in ((other, b"info"), (private, b"Info")):
        with pytest.raises(Unreadable):
            primitives.hpke_open(key, info, sealed)


@pytest.mark.parametrize("raw", [
    b"", bytes(1215), bytes(1217),
    primitives.load_hpke_private(bytes(32))[1][:1184] + bytes(32),                          # X25519: zero
    primitives.load_hpke_private(bytes(32))[1][:1184] + b"\1" + bytes(31),                  # X25519: order 1
    primitives.load_hpke_private(bytes(32))[1][:1184] + b"\xec" + b"\xff" * 30 + b"\x7f",   # X25519: order 2
    b"\xff" * 1152 + primitives.load_hpke_private(bytes(32))[1][1152:],                     # ML-KEM: FIPS 203 7.2 modulus check
])
def test_encryption_keys_that_no_honest_program_makes(raw: bytes) -> None:
    with pytest.raises(FormatError):
        primitives.load_hpke_public(raw)


def test_seed_of_the_wrong_size() -> None:
    with pytest.raises(FormatError):
        primitives.load_hpke_private(bytes(31))


# --- payload


def test_derivation_is_hkdf_expand_as_written() -> None:
    """The format's one-line definition, computed with nothing but HMAC."""
    cek, salt = bytes(range(32)), bytes(range(24))
    info = b"MLT1 payload\0AEAD_AES_256_GCM\0" + b"\x01\x00\x01" + salt
    first = hmac.digest(cek, info + b"\x01", "sha512")
    second = hmac.digest(cek, first + info + b"\x02", "sha512")
    keys = primitives.derive(cek, salt)
    assert keys.key + keys.nonce + keys.commit == (first + second)[:76]
    assert [len(part) for part in keys] == [32, 12, 32]


def encrypt(pieces: list[bytes]) -> bytes:
    target = bytearray(primitives.encrypted_size(sum(map(len, pieces))))
    primitives.encrypt_chunks(b"k" * 32, b"\xff" * 12, pieces, memoryview(target))
    return bytes(target)


@pytest.mark.parametrize("size", [0, 1, 100, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES, 3 * CHUNK_BYTES + 7])
def test_chunks_round_trip_and_are_what_the_format_says(size: int) -> None:
    plain = hashlib.shake_128(b"plain").digest(size)
    sealed = encrypt([plain])
    assert primitives.decrypt_chunks(b"k" * 32, b"\xff" * 12, sealed) == plain
    cipher, expected = AESGCM(b"k" * 32), b""
    for number in range(size // CHUNK_BYTES + 1):
        nonce = (int.from_bytes(b"\xff" * 12, "big") ^ number).to_bytes(12, "big")
        expected += cipher.encrypt(nonce, plain[number * CHUNK_BYTES:(number + 1) * CHUNK_BYTES], None)
    assert sealed == expected


@given(st.lists(st.integers(0, 2 * CHUNK_BYTES + 5), max_size=8))
def test_the_cut_between_pieces_does_not_matter(sizes: list[int]) -> None:
    plain = hashlib.shake_128(b"pieces").digest(sum(sizes))
    pieces, position = [], 0
    for size in sizes:
        pieces.append(plain[position:position + size])
        position += size
    assert encrypt(pieces) == encrypt([plain])


@given(st.data())
def test_a_damaged_payload_is_refused(data: st.DataObject) -> None:
    """Cut, extended, reordered, or one bit: never a part of the plain text."""
    sealed = bytearray(encrypt([bytes(2 * CHUNK_BYTES + 100)]))
    step = CHUNK_BYTES + TAG_BYTES
    match data.draw(st.sampled_from(["flip", "cut", "extend", "swap", "drop", "repeat"])):
        case "flip":
            sealed[data.draw(st.integers(0, len(sealed) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        case "cut":
            del sealed[data.draw(st.integers(0, len(sealed) - 1)):]
        case "extend":
            sealed += bytes(data.draw(st.integers(1, 2 * step)))
        case "swap":
            sealed[:2 * step] = sealed[step:2 * step] + sealed[:step]
        case "drop":
            del sealed[:step]
        case "repeat":
            sealed[:0] = sealed[:step]
    with pytest.raises(Unreadable):
        primitives.decrypt_chunks(b"k" * 32, b"\xff" * 12, sealed)


@pytest.mark.parametrize("whole_chunks", [1, 2])
def test_cut_at_a_chunk_boundary_is_noticed(whole_chunks: int) -> None:
    """A payload of whole chunks has an empty last chunk; without it, it is cut off."""
    sealed = encrypt([bytes(whole_chunks * CHUNK_BYTES)])
    assert len(sealed) == whole_chunks * (CHUNK_BYTES + TAG_BYTES) + TAG_BYTES
    with pytest.raises(Unreadable, match="cannot be opened"):
        primitives.decrypt_chunks(b"k" * 32, b"\xff" * 12, sealed[:-TAG_BYTES])


@pytest.mark.parametrize("size", [0, 15, 17, 200])
def test_a_target_of_the_wrong_size_is_a_bug_of_the_caller(size: int) -> None:
    with pytest.raises(ValueError):
        primitives.encrypt_chunks(b"k" * 32, bytes(12), [b""], memoryview(bytearray(size)))


def test_large_messages_are_not_copied() -> None:
    """Beside source and result, encrypting and decrypting need a chunk or two, whatever the size."""
    plain = bytes(8 * 1024 * 1024)
    target = bytearray(primitives.encrypted_size(len(plain) + 100))
    tracemalloc.start()
    try:
        primitives.encrypt_chunks(b"k" * 32, bytes(12), [b"x" * 100, plain], memoryview(target))
        _, peak = tracemalloc.get_traced_memory()
        assert peak < 20 * CHUNK_BYTES
        tracemalloc.reset_peak()
        opened = primitives.decrypt_chunks(b"k" * 32, bytes(12), target)
        _, peak = tracemalloc.get_traced_memory()
        assert peak < len(opened) + 20 * CHUNK_BYTES
    finally:
        tracemalloc.stop()


# --- the rest


def test_hashes_over_pieces_equal_those_over_the_whole() -> None:
    assert primitives.sha256(b"a", b"", b"bc") == hashlib.sha256(b"abc").digest()
    assert primitives.sha512(b"a", memoryview(b"bc")) == hashlib.sha512(b"abc").digest()
    assert primitives.hmac_sha256(b"k", b"a", b"bc") == hmac.digest(b"k", b"abc", "sha256")
    assert primitives.hmac_sha256(b"k", b"abc") == hmac.digest(b"k", b"abc", "sha256")
    assert primitives.equal(b"abc", bytearray(b"abc"))
    assert not primitives.equal(b"abc", b"abd")
    assert primitives.random_bytes(32) != primitives.random_bytes(32)


def test_aead_binds_its_context() -> None:
    sealed = primitives.aead_encrypt(b"k" * 32, b"secret", b"context")
    assert primitives.aead_decrypt(b"k" * 32, sealed, b"context") == b"secret"
    assert sealed != primitives.aead_encrypt(b"k" * 32, b"secret", b"context")
    damaged = [b"", sealed[:27], sealed[:-1], sealed + b"\0"]
    damaged += [bytes([*sealed[:at], sealed[at] ^ 1, *sealed[at + 1:]]) for at in range(len(sealed))]
    for bad in damaged:
        with pytest.raises(Unreadable):
            primitives.aead_decrypt(b"k" * 32, bad, b"context")
    for key, aad in ((b"K" * 32, b"context"), (b"k" * 32, b"Context")):
        with pytest.raises(Unreadable):
            primitives.aead_decrypt(key, sealed, aad)


def test_two_passwords_at_once_do_not_wait_for_each_other_for_ever() -> None:
    """OpenSSL's threads for the lanes did: two who logged in at the same moment, and nobody could log in any more."""
    keys: list[bytes] = []

    def derive() -> None:
        keys.append(primitives.argon2id(b"password", b"somesalt", memory_kib=8192, iterations=3, lanes=4))
    threads = [threading.Thread(target=derive, daemon=True) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(keys) == 12
    assert len(set(keys)) == 1


def test_argon2id_gives_the_reference_implementations_value() -> None:
    """From test.c of phc-winner-argon2: Argon2id, version 0x13, t = 2, m = 2^16 KiB, p = 1."""
    key = primitives.argon2id(b"password", b"somesalt", memory_kib=65536, iterations=2, lanes=1)
    assert key.hex() == "09316115d5cf24ed5a15a31a3ba326e5cf32edc24702987c02b6566f61913cf7"


def test_ml_dsa_signatures_are_bound_to_our_context() -> None:
    """A signature that the same key made elsewhere, with no or another context, is none of ours."""
    key = primitives.load_mldsa_private(bytes(32))
    primitives.mldsa_verify(key.public_key(), b"m", primitives.mldsa_sign(key, b"m"))
    for foreign in (key.sign(b"m"), key.sign(b"m", b"MLT2")):
        with pytest.raises(BadSignature):
            primitives.mldsa_verify(key.public_key(), b"m", foreign)


def test_a_good_library_passes_the_check() -> None:
    primitives.check_post_quantum()


@pytest.mark.parametrize("missing", ["load_hpke_private", "hpke_seal", "load_mldsa_private"])
def test_a_library_without_post_quantum_stops_the_start(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds against an old OpenSSL raise UnsupportedAlgorithm at first use: it must be at start, and say what to install."""
    def unsupported(*_: object) -> None:
        raise UnsupportedAlgorithm("not supported by this backend")

    monkeypatch.setattr(primitives, missing, unsupported)
    with pytest.raises(CryptoUnsupported, match="post-quantum") as caught:
        primitives.check_post_quantum()
    assert "cryptography 50" in caught.value.hint
    assert caught.value.exit_code == 2


def test_a_library_that_is_too_old_to_have_the_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the import itself fails; that must be the same clear error."""
    import importlib.util
    import sys

    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.asymmetric.mlkem", None)
    monkeypatch.delattr("cryptography.hazmat.primitives.asymmetric.mlkem")
    spec = importlib.util.find_spec("malote.core.primitives")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.raises(CryptoUnsupported, match="post-quantum"):
        spec.loader.exec_module(module)
