"""Key types: what they are made of, their ids, and what they do (docs/format.md, Keys).

Parsed key objects are kept: loading an ML-KEM or ML-DSA key costs as much as using it once. Private keys never show in `repr`.
"""

from __future__ import annotations

from enum import StrEnum
from functools import cached_property

from malote.core import primitives
from malote.core.primitives import (
    ED25519_PUBLIC_BYTES,
    ED25519_SIGNATURE_BYTES,
    ENCRYPTION_SEED_BYTES,
    MLDSA_PUBLIC_BYTES,
    MLDSA_SIGNATURE_BYTES,
    SIGNING_SEED_BYTES,
)
from malote.errors import BadSignature, FormatError

FINGERPRINT_GROUPS = 6


class SignatureAlgorithm(StrEnum):
    """How an identity signs. Its card says which; nothing is negotiated."""

    ED25519 = "ed25519"
    HYBRID = "ed25519+ml-dsa-65"    # both must verify: as strong as the stronger half

    @property
    def public_bytes(self) -> int:
        return ED25519_PUBLIC_BYTES + (MLDSA_PUBLIC_BYTES if self is SignatureAlgorithm.HYBRID else 0)

    @property
    def signature_bytes(self) -> int:
        return ED25519_SIGNATURE_BYTES + (MLDSA_SIGNATURE_BYTES if self is SignatureAlgorithm.HYBRID else 0)

    @property
    def seed_bytes(self) -> int:
        return SIGNING_SEED_BYTES * (2 if self is SignatureAlgorithm.HYBRID else 1)


class EncryptionKey:
    """The public key that session keys are wrapped for: ML-KEM-768[1184] ‖ X25519[32]."""

    def __init__(self, raw: bytes) -> None:
        """Raises `FormatError` for the wrong size; the rest is checked by `check` or at first use."""
        if len(raw) != primitives.ENCRYPTION_PUBLIC_BYTES:
            raise FormatError("encryption key has the wrong size")
        self.raw = bytes(raw)

    @cached_property
    def id(self) -> bytes:
        """SHA-256("MLT1 enc key" ‖ raw)."""
        return primitives.sha256(b"MLT1 enc key", self.raw)

    @cached_property
    def _loaded(self) -> primitives.HpkePublic:
        return primitives.load_hpke_public(self.raw)

    def check(self) -> None:
        """Raises `FormatError` for a key that no honest program makes."""
        self._loaded  # noqa: B018  loading it is the check

    def wrap(self, plaintext: bytes, info: bytes) -> bytes:
        """enc[1120] ‖ ciphertext. Raises `FormatError` if the key is not valid."""
        return primitives.hpke_seal(self._loaded, info, plaintext)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, EncryptionKey) and self.raw == other.raw

    def __hash__(self) -> int:
        return hash(self.raw)

    def __repr__(self) -> str:
        return f"EncryptionKey({self.id[:8].hex()})"


class DecryptionKey:
    """The private half, kept as its 32-byte seed (X-Wing)."""

    def __init__(self, seed: bytes) -> None:
        if len(seed) != ENCRYPTION_SEED_BYTES:
            raise FormatError("decryption key has the wrong size")
        self.seed = bytes(seed)

    @classmethod
    def generate(cls) -> DecryptionKey:
        return cls(primitives.random_bytes(ENCRYPTION_SEED_BYTES))

    @cached_property
    def _loaded(self) -> tuple[primitives.HpkePrivate, bytes]:
        return primitives.load_hpke_private(self.seed)

    @cached_property
    def public(self) -> EncryptionKey:
        return EncryptionKey(self._loaded[1])

    def unwrap(self, ciphertext: primitives.Buffer, info: bytes) -> bytes:
        """Raises `Unreadable`: wrapped for another key, other `info`, or damaged."""
        return primitives.hpke_open(self._loaded[0], info, ciphertext)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DecryptionKey) and primitives.equal(self.seed, other.seed)

    def __hash__(self) -> int:
        return hash(self.public)

    def __repr__(self) -> str:
        return f"DecryptionKey({self.public.id[:8].hex()})"


class VerifyKey:
    """The public half of a signing key: Ed25519[32], then with the hybrid ML-DSA-65[1952]. One key, never mixed and matched."""

    def __init__(self, algorithm: SignatureAlgorithm, raw: bytes) -> None:
        """Raises `FormatError` for the wrong size; the rest is checked by `check` or at first use."""
        if len(raw) != algorithm.public_bytes:
            raise FormatError("signature key has the wrong size")
        self.algorithm = algorithm
        self.raw = bytes(raw)

    @cached_property
    def id(self) -> bytes:
        """skid = SHA-256("MLT1 sig key" ‖ raw). The sizes of the algorithms differ, so it says the algorithm too."""
        return primitives.sha256(b"MLT1 sig key", self.raw)

    @cached_property
    def fingerprint(self) -> str:
        """Thirty decimal digits in six groups of five, to be compared by voice.

        Group i (0 to 5) = bytes 5i to 5i+4 of the skid, as a big-endian integer, modulo 100 000, with leading zeros. The bias
        of the modulo is 2^40 mod 10^5, at most one part in ten million per group; the whole is about 99.6 bits. Somebody
        who wants to pass for this key has to find a second preimage of those; a collision is of no use.
        """
        groups = (int.from_bytes(self.id[5 * i:5 * i + 5], "big") % 100_000 for i in range(FINGERPRINT_GROUPS))
        return " ".join(f"{group:05}" for group in groups)

    @cached_property
    def _ed25519(self) -> primitives.Ed25519Public:
        return primitives.load_ed25519_public(self.raw[:ED25519_PUBLIC_BYTES])

    @cached_property
    def _mldsa(self) -> primitives.MldsaPublic:
        return primitives.load_mldsa_public(self.raw[ED25519_PUBLIC_BYTES:])

    def check(self) -> None:
        """Raises `FormatError` for a key that cannot be loaded."""
        self._ed25519  # noqa: B018  loading it is the check
        if self.algorithm is SignatureAlgorithm.HYBRID:
            self._mldsa  # noqa: B018

    def verify(self, message: bytes, signature: bytes) -> None:
        """Raises `BadSignature` unless every half verifies, or the size is not the algorithm's."""
        if len(signature) != self.algorithm.signature_bytes:
            raise BadSignature("the signature has the wrong size")
        primitives.ed25519_verify(self._ed25519, message, signature[:ED25519_SIGNATURE_BYTES])
        if self.algorithm is SignatureAlgorithm.HYBRID:
            primitives.mldsa_verify(self._mldsa, message, signature[ED25519_SIGNATURE_BYTES:])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, VerifyKey) and self.raw == other.raw

    def __hash__(self) -> int:
        return hash(self.raw)

    def __repr__(self) -> str:
        return f"VerifyKey({self.algorithm.value}, {self.id[:8].hex()})"


class SigningKey:
    """The private half, kept as seeds: Ed25519[32], then with the hybrid ML-DSA-65[32]."""

    def __init__(self, algorithm: SignatureAlgorithm, seeds: bytes) -> None:
        if len(seeds) != algorithm.seed_bytes:
            raise FormatError("signing key has the wrong size")
        self.algorithm = algorithm
        self.seeds = bytes(seeds)

    @classmethod
    def generate(cls, algorithm: SignatureAlgorithm = SignatureAlgorithm.HYBRID) -> SigningKey:
        return cls(algorithm, primitives.random_bytes(algorithm.seed_bytes))

    @cached_property
    def _ed25519(self) -> primitives.Ed25519Private:
        return primitives.load_ed25519_private(self.seeds[:SIGNING_SEED_BYTES])

    @cached_property
    def _mldsa(self) -> primitives.MldsaPrivate:
        return primitives.load_mldsa_private(self.seeds[SIGNING_SEED_BYTES:])

    @cached_property
    def public(self) -> VerifyKey:
        raw = primitives.ed25519_public_raw(self._ed25519)
        if self.algorithm is SignatureAlgorithm.HYBRID:
            raw += primitives.mldsa_public_raw(self._mldsa)
        return VerifyKey(self.algorithm, raw)

    def sign(self, message: bytes) -> bytes:
        """Ed25519[64], then with the hybrid ML-DSA-65[3309] with the context "MLT1". The message begins with its own label."""
        signature = primitives.ed25519_sign(self._ed25519, message)
        if self.algorithm is SignatureAlgorithm.HYBRID:
            signature += primitives.mldsa_sign(self._mldsa, message)
        return signature

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SigningKey) and self.algorithm is other.algorithm and primitives.equal(self.seeds, other.seeds)

    def __hash__(self) -> int:
        return hash(self.public)

    def __repr__(self) -> str:
        return f"SigningKey({self.algorithm.value}, {self.public.id[:8].hex()})"
