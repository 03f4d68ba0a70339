"""The cryptographic primitives of suite 1 (docs/format.md, Suite): the only module that imports `cryptography`.

Nothing here is negotiable and nothing takes a nonce or random source from a caller who could reuse it, but for the chunk
functions, whose key and nonce come from `derive` and belong to one session key.

Who holds the GIL (cryptography 50.0.2, measured as the longest stall of another thread): Ed25519 and ML-DSA sign and verify,
AES-GCM through `encrypt_into` and `decrypt_into`, Argon2id and SHA-2 release it, so signing in threads uses every core. HPKE
(70 to 140 us each) and the AES-GCM that returns new bytes hold it.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import threading
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from malote.errors import BadSignature, CryptoUnsupported, FormatError, Unreadable

_NO_POST_QUANTUM = "the `cryptography` library installed here has no post-quantum algorithms (ML-KEM-768, ML-DSA-65)"
_HINT = "install the wheel of cryptography 50 or newer from PyPI, or one built against OpenSSL 3.5 or newer"

try:
    from cryptography.exceptions import InvalidSignature, InvalidTag, UnsupportedAlgorithm
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ed25519, mldsa, mlkem, x25519
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, MLKEM768X25519PrivateKey, MLKEM768X25519PublicKey, Suite
    from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
    from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
except ImportError as error:    # older than 47: no such modules at all
    raise CryptoUnsupported(_NO_POST_QUANTUM, hint=_HINT) from error

Buffer = bytes | bytearray | memoryview

VERSION_SUITE = b"\x01\x00\x01"     # version 1, suite 0x0001: in every derivation, so no two suites share a key
CHUNK_BYTES = 16 * 1024             # C2SP chunked-encryption; bounds what a damaged chunk costs to notice
TAG_BYTES = 16
NONCE_BYTES = 12
KEY_BYTES = 32
SALT_BYTES = 24
COMMIT_BYTES = 32
ENCRYPTION_SEED_BYTES = 32          # X-Wing (draft-connolly-cfrg-xwing-kem 5.2): SHAKE-256 expands it to both private keys
ENCRYPTION_PUBLIC_BYTES = 1184 + 32
HPKE_OVERHEAD_BYTES = 1120 + TAG_BYTES
ED25519_PUBLIC_BYTES = 32
ED25519_SIGNATURE_BYTES = 64
MLDSA_PUBLIC_BYTES = 1952
MLDSA_SIGNATURE_BYTES = 3309
SIGNING_SEED_BYTES = 32             # of each half

_MLDSA_CONTEXT = b"MLT1"            # FIPS 204 5.2: separates our signatures from any other use of such a key
_SUITE = Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)

HpkePublic = MLKEM768X25519PublicKey
HpkePrivate = MLKEM768X25519PrivateKey
Ed25519Public = ed25519.Ed25519PublicKey
Ed25519Private = ed25519.Ed25519PrivateKey
MldsaPublic = mldsa.MLDSA65PublicKey
MldsaPrivate = mldsa.MLDSA65PrivateKey


def check_post_quantum() -> None:
    """Do one of each operation. Raises `CryptoUnsupported` where the library was built without them: malote must not start."""
    try:
        private, _ = load_hpke_private(random_bytes(ENCRYPTION_SEED_BYTES))
        opened = hpke_open(private, b"check", hpke_seal(private.public_key(), b"check", b"check"))
        signer = load_mldsa_private(random_bytes(SIGNING_SEED_BYTES))
        mldsa_verify(signer.public_key(), b"check", mldsa_sign(signer, b"check"))
    except UnsupportedAlgorithm as error:
        raise CryptoUnsupported(_NO_POST_QUANTUM, hint=_HINT) from error
    if opened != b"check":
        raise CryptoUnsupported("the `cryptography` library installed here does not decrypt what it encrypts", hint=_HINT)


# --- random, hashes, comparison


def random_bytes(size: int) -> bytes:
    return secrets.token_bytes(size)


def sha256(*pieces: Buffer) -> bytes:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.digest()


def sha512(*pieces: Buffer) -> bytes:
    digest = hashlib.sha512()
    for piece in pieces:
        digest.update(piece)
    return digest.digest()


def hmac_sha256(key: bytes, *pieces: Buffer) -> bytes:
    if len(pieces) == 1:
        return hmac.digest(key, pieces[0], "sha256")
    mac = hmac.new(key, digestmod="sha256")
    for piece in pieces:
        mac.update(piece)
    return mac.digest()


def equal(left: Buffer, right: Buffer) -> bool:
    """Compare in constant time (of the content; a different length shows)."""
    return hmac.compare_digest(left, right)


# --- session key: derivation, payload


class PayloadKeys(NamedTuple):
    key: bytes      # AES-256-GCM
    nonce: bytes    # of chunk 0
    commit: bytes   # published in H: AES-GCM alone does not commit to its key, so one ciphertext could show two mails


def derive(cek: bytes, salt: bytes) -> PayloadKeys:
    """HKDF-Expand-SHA-512(CEK, "MLT1 payload\\0AEAD_AES_256_GCM\\0" ‖ VS ‖ salt) -> key ‖ nonce ‖ commit (format.md, Payload)."""
    info = b"MLT1 payload\0AEAD_AES_256_GCM\0" + VERSION_SUITE + salt
    output = HKDFExpand(hashes.SHA512(), KEY_BYTES + NONCE_BYTES + COMMIT_BYTES, info).derive(cek)
    return PayloadKeys(output[:KEY_BYTES], output[KEY_BYTES:KEY_BYTES + NONCE_BYTES], output[KEY_BYTES + NONCE_BYTES:])


def encrypted_size(plain_size: int) -> int:
    """Bytes that `plain_size` bytes become: the last chunk is always shorter than the others, so 0 to CHUNK_BYTES - 1."""
    return plain_size + (plain_size // CHUNK_BYTES + 1) * TAG_BYTES


def encrypt_chunks(key: bytes, nonce: bytes, pieces: Iterable[Buffer], target: memoryview) -> None:
    """Encrypt the concatenation of `pieces` into `target`, whose size is `encrypted_size` of theirs. Copies no whole piece.

    The nonce may be used for one message only: `key` and `nonce` both come from `derive` of a fresh session key.
    """
    cipher = AESGCM(key)
    start = int.from_bytes(nonce, "big")
    position = 0
    for number, chunk in enumerate(_chunks(pieces)):
        end = position + len(chunk) + TAG_BYTES
        cipher.encrypt_into((start ^ number).to_bytes(NONCE_BYTES, "big"), chunk, None, target[position:end])
        position = end
    if position != len(target):
        raise ValueError("target has not the size of the result")


def _chunks(pieces: Iterable[Buffer]) -> Iterator[Buffer]:
    """Cut the concatenation into CHUNK_BYTES, then a shorter last one. Copies only chunks that span two pieces."""
    rest = bytearray()      # shorter than a chunk
    for piece in pieces:
        view = memoryview(piece)
        if rest:
            taken = CHUNK_BYTES - len(rest)
            rest += view[:taken]
            view = view[taken:]
            if len(rest) < CHUNK_BYTES:
                continue
            yield rest
        whole = len(view) - len(view) % CHUNK_BYTES
        for offset in range(0, whole, CHUNK_BYTES):
            yield view[offset:offset + CHUNK_BYTES]
        rest = bytearray(view[whole:])
    yield rest


def decrypt_chunks(key: bytes, nonce: bytes, ciphertext: Buffer) -> bytearray:
    """The plain text, once every chunk is authenticated. Raises `Unreadable`; nothing of a damaged message gets out."""
    step = CHUNK_BYTES + TAG_BYTES
    full, rest = divmod(len(ciphertext), step)
    if rest < TAG_BYTES:    # the last chunk is always shorter, so its absence shows
        raise Unreadable("payload is cut off")
    cipher = AESGCM(key)
    start = int.from_bytes(nonce, "big")
    source = memoryview(ciphertext)
    plain = bytearray(len(ciphertext) - (full + 1) * TAG_BYTES)
    target = memoryview(plain)
    try:
        for number in range(full + 1):
            cipher.decrypt_into(
                (start ^ number).to_bytes(NONCE_BYTES, "big"), source[number * step:(number + 1) * step], None,
                target[number * CHUNK_BYTES:(number + 1) * CHUNK_BYTES],
            )
    except InvalidTag:
        raise Unreadable("payload is not authentic") from None
    return plain


# --- HPKE base mode (RFC 9180), KEM 0x647A = ML-KEM-768 + X25519 (X-Wing), HKDF-SHA256, AES-256-GCM

_LOW_ORDER_PROBE = x25519.X25519PrivateKey.from_private_bytes(bytes(32))    # clamped to a multiple of 8: any such scalar would do


def load_hpke_public(raw: bytes) -> HpkePublic:
    """Raises `FormatError` for what no honest program makes: wrong size, ML-KEM coefficient too large, X25519 of low order."""
    if len(raw) != ENCRYPTION_PUBLIC_BYTES:
        raise FormatError("encryption key has the wrong size")
    try:
        curve = x25519.X25519PublicKey.from_public_bytes(raw[1184:])
        _LOW_ORDER_PROBE.exchange(curve)    # ValueError for the points whose shared secret is always zero
        return MLKEM768X25519PublicKey(mlkem.MLKEM768PublicKey.from_public_bytes(raw[:1184]), curve)
    except ValueError as error:
        raise FormatError("encryption key is not valid") from error


def load_hpke_private(seed: bytes) -> tuple[HpkePrivate, bytes]:
    """The private key made from 32 bytes, and its raw public key (X-Wing 5.2)."""
    if len(seed) != ENCRYPTION_SEED_BYTES:
        raise FormatError("decryption key has the wrong size")
    expanded = hashlib.shake_256(seed).digest(96)
    lattice = mlkem.MLKEM768PrivateKey.from_seed_bytes(expanded[:64])
    curve = x25519.X25519PrivateKey.from_private_bytes(expanded[64:])
    raw = lattice.public_key().public_bytes_raw() + curve.public_key().public_bytes_raw()
    return MLKEM768X25519PrivateKey(lattice, curve), raw


def hpke_seal(public: HpkePublic, info: bytes, plaintext: Buffer) -> bytes:
    """enc[1120] ‖ ciphertext, bound to `info`."""
    return _SUITE.encrypt(plaintext, public, info=info)


def hpke_open(private: HpkePrivate, info: bytes, ciphertext: Buffer) -> bytes:
    """Raises `Unreadable`: another key, other info, or damaged; which of them cannot be told."""
    try:
        return _SUITE.decrypt(ciphertext, private, info=info)
    except (InvalidTag, ValueError):    # ValueError: X25519 share of low order
        raise Unreadable("key blob does not open with this key") from None


# --- signatures


def load_ed25519_public(raw: bytes) -> Ed25519Public:
    try:
        return ed25519.Ed25519PublicKey.from_public_bytes(raw)
    except ValueError as error:
        raise FormatError("Ed25519 key is not valid") from error


def load_ed25519_private(seed: bytes) -> Ed25519Private:
    return ed25519.Ed25519PrivateKey.from_private_bytes(seed)


def ed25519_public_raw(key: Ed25519Private) -> bytes:
    return key.public_key().public_bytes_raw()


def ed25519_sign(key: Ed25519Private, message: bytes) -> bytes:
    return key.sign(message)


def ed25519_verify(key: Ed25519Public, message: bytes, signature: bytes) -> None:
    try:
        key.verify(signature, message)
    except InvalidSignature:
        raise BadSignature("the Ed25519 signature does not verify") from None


def load_mldsa_public(raw: bytes) -> MldsaPublic:
    try:
        return mldsa.MLDSA65PublicKey.from_public_bytes(raw)
    except ValueError as error:
        raise FormatError("ML-DSA-65 key is not valid") from error


def load_mldsa_private(seed: bytes) -> MldsaPrivate:
    return mldsa.MLDSA65PrivateKey.from_seed_bytes(seed)


def mldsa_public_raw(key: MldsaPrivate) -> bytes:
    return key.public_key().public_bytes_raw()


def mldsa_sign(key: MldsaPrivate, message: bytes) -> bytes:
    return key.sign(message, _MLDSA_CONTEXT)


def mldsa_verify(key: MldsaPublic, message: bytes, signature: bytes) -> None:
    try:
        key.verify(signature, message, _MLDSA_CONTEXT)
    except InvalidSignature:
        raise BadSignature("the ML-DSA-65 signature does not verify") from None


# --- passphrases and single blocks


# OpenSSL runs the lanes in threads of one pool; two derivations with several lanes wait there for each other, for ever
_ARGON2 = threading.Lock()


def argon2id(passphrase: bytes, salt: bytes, *, memory_kib: int, iterations: int, lanes: int) -> bytes:
    """32 bytes (RFC 9106). Takes `memory_kib` of memory and about 100 ms at 64 MiB, 3 iterations; releases the GIL.
    One at a time: a second one waits."""
    kdf = Argon2id(salt=salt, length=KEY_BYTES, iterations=iterations, lanes=lanes, memory_cost=memory_kib)
    with _ARGON2:
        return kdf.derive(passphrase)


def aead_encrypt(key: bytes, plaintext: Buffer, aad: bytes) -> bytes:
    """nonce[12] ‖ ciphertext ‖ tag: AES-256-GCM with a fresh random nonce, for keys that encrypt fewer than 2^32 times."""
    nonce = random_bytes(NONCE_BYTES)
    return nonce + AESGCM(key).encrypt(nonce, plaintext, aad)


def aead_decrypt(key: bytes, sealed: Buffer, aad: bytes) -> bytes:
    """Raises `Unreadable`: another key, other `aad`, or damaged."""
    if len(sealed) < NONCE_BYTES + TAG_BYTES:
        raise Unreadable("too short")
    try:
        return AESGCM(key).decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], aad)
    except InvalidTag:
        raise Unreadable("not authentic") from None
