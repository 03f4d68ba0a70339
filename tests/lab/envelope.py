"""People with real keys, sealing and opening for tests, and a workshop for messages that no honest program makes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import pytest

from malote.core import blob, payload, primitives
from malote.core.card import Card
from malote.core.identity import Identity, new_identity
from malote.core.keys import DecryptionKey, SignatureAlgorithm
from malote.core.open import Opened, Unsealed, authenticate, unseal
from malote.core.outer import OuterHeaders, outer_headers
from malote.core.parts import FoundKeyBlob, FoundParts, FoundPayload, find_parts
from malote.core.seal import SealedMessage, SealRecipient, _outer_message, seal
from malote.errors import Unreadable

NOW_MS = 1_790_000_000_000      # September 2026
STREAM = b"stream-1"
SUBMISSION = bytes(range(16))
FRAME = ("From: Alice <alice@a.example>\r\nTo: bob@b.example\r\nCc: carol@c.example\r\n"
         "Message-ID: <one@a.example>\r\nSubject: the secret subject\r\nDate: Mon, 21 Sep 2026 14:13:20 +0000\r\n")


@lru_cache
def person(name: str, algorithm: SignatureAlgorithm = SignatureAlgorithm.ED25519) -> Identity:
    """`alice` is alice@a.example, and so on; "@a.example" is that domain's gateway. The same keys throughout one run."""
    return new_identity(name if "@" in name else f"{name}@{name[0]}.example", algorithm, NOW_MS)


ALICE, BOB, CAROL, MALLORY = map(person, ("alice", "bob", "carol", "mallory"))


def message(text: str = "hello, this is the secret text\r\n", sender: str = "Alice <alice@a.example>") -> bytes:
    return (FRAME.replace("Alice <alice@a.example>", sender) + "\r\n" + text).encode()


def outer() -> OuterHeaders:
    return outer_headers(message(), sent_at_ms=NOW_MS, sender_domain="a.example", received=b"", known_outer_ids={})


def recipient(identity: Identity, role: str = "to", serial: int = 7, prev: int = 6, *, address: str = "") -> SealRecipient:
    return SealRecipient(address or identity.address, identity.decryption[0].public, role, STREAM, serial, prev)


def seal_for(
    original: bytes, recipients: Sequence[SealRecipient], sender: Identity | None = None, **options: Any
) -> SealedMessage:
    defaults: dict[str, Any] = {"submission_id": SUBMISSION, "sent_at_ms": NOW_MS, "outer": outer()}
    return seal(original, identity=sender or ALICE, recipients=recipients, **(defaults | options))


def unseal_as(raw: bytes, *identities: Identity) -> Unsealed:
    return unseal(parts_of(raw), keys_of(*identities))


def keys_of(*identities: Identity) -> list[tuple[str, DecryptionKey]]:
    """What `unseal` tries."""
    return [(identity.address, key) for identity in identities for key in identity.decryption]


def parts_of(raw: bytes) -> FoundParts:
    found = find_parts(raw)
    assert found is not None, "nothing sealed found"
    return found


def loose_parts(sealed: bytes, *blobs: bytes, kid: str = "") -> FoundParts:
    """A sealed part and key blobs as if they had been found, without the message around them."""
    return FoundParts(tuple(FoundKeyBlob(each, kid, False) for each in blobs), (FoundPayload(sealed, False),), 0, ())


def open_as(raw: bytes, identity: Identity, card: Card | None = None) -> Opened:
    """Open with the identity's keys and, unless another is given, Alice's card."""
    return authenticate(unseal_as(raw, identity), card or ALICE.card)


def refused(raw: bytes, who: Identity | None = None) -> str:
    """Why Bob (or `who`) cannot open it. Whatever the reason, the text for people is the same."""
    with pytest.raises(Unreadable, match=r"^cannot be opened \(no matching key, or damaged\)$") as caught:
        unseal_as(raw, who or BOB)
    return caught.value.reason


class Envelope:
    """One message put together by hand, so that every piece can be wrong in its own way.

    Change `members`, `body`, `header`, `signature` and so on before asking for `payload` or `raw`.
    """

    def __init__(self, original: bytes, sender: Identity | None = None, cek: bytes | None = None) -> None:
        self.sender = sender or ALICE
        self.cek = cek or primitives.random_bytes(32)
        self.header, self.keys = payload.new_header(self.cek)
        self.parts: list[tuple[str, bytes]] = []    # kid, key-blob part
        self.body = original
        self.signed_header = self.header
        self.manifest: bytes | None = None
        self.signature: bytes | None = None
        self.members: dict[str, Any] = {
            "v": 1, "id": SUBMISSION.hex(), "from": self.sender.address, "skid": self.sender.signing.public.id.hex(),
            "dev": STREAM.hex(), "sent": NOW_MS, "enc": "id", "size": len(original),
            "sha512": primitives.sha512(original).hex(), "mid": "<one@a.example>", "scope": "user", "rcpt": [],
            "outer": [list(pair) for pair in outer().fields], "card": self.sender.card.hash.hex(),
        }

    def add(self, who: Identity, *, serial: int = 7, prev: int = 6, cek: bytes | None = None) -> Envelope:
        """Attach a key blob, and list it in the manifest."""
        key = who.decryption[0].public
        wrapped = blob.wrap_session_key(blob.BlobContent(cek or self.cek, STREAM, serial, prev), key, self.header.raw)
        entry = {"a": who.address, "k": key.id.hex(), "b": primitives.sha256(wrapped).hex(), "r": "to"}
        self.members["rcpt"].append(entry)
        self.parts.append((key.id[:8].hex(), blob.serialize_key_blob(self.header.eid, wrapped)))
        return self

    def container(self) -> bytes:
        manifest = self.manifest or json.dumps(self.members, separators=(",", ":"), ensure_ascii=False).encode()
        signed = payload.signature_input(self.signed_header, manifest)
        signature = self.sender.signing.sign(signed) if self.signature is None else self.signature
        pieces = payload.serialize_container(manifest, self.body, signature)
        return b"".join(pieces)

    def encrypt(self, container: bytes) -> bytes:
        return bytes(payload.encrypt_payload(self.header, self.keys, [container]))

    def payload(self) -> bytes:
        return self.encrypt(self.container())

    def raw(self, sealed: bytes | None = None) -> bytes:
        return wrap(self.parts, self.payload() if sealed is None else sealed)


def wrap(parts: list[tuple[str, bytes]], sealed: bytes) -> bytes:
    """The outer message around any bytes."""
    return _outer_message(outer().raw, parts, bytearray(sealed))
