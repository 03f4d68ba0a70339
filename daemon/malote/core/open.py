"""Opening: import the key blob, decrypt, check everything, and only then give the original out (docs/format.md 8).

Two steps. `unseal` needs our keys and gives the sender's name as claimed; with it the caller looks up the card. `authenticate`
needs that card and gives the original with what is proven about it. Whatever is wrong with the bytes is one `Unreadable`.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from malote.core import payload, primitives
from malote.core.address import is_gateway
from malote.core.blob import BlobContent, KeyBlob, parse_key_blob, unwrap_session_key
from malote.core.card import Card
from malote.core.fold import MAX_SIZE, MAX_TABLE_BYTES, unfold
from malote.core.freshness import Claim, SignatureState
from malote.core.inner import read_inner, read_participants
from malote.core.keys import DecryptionKey
from malote.core.manifest import Manifest, belongs_to, parse_manifest
from malote.core.parts import FoundParts, FoundPayload
from malote.core.seal import KID_BYTES
from malote.errors import BadSignature, FormatError, Unreadable

MAX_TRIALS = 400            # unwraps a message, 70 us each: 100 nameless blobs and 4 keys
MAX_PAYLOADS = 8            # sealed parts tried in one message
# Of an original that was compressed. It is written out before the signature is looked at, and a thousandth of it is enough to
# send: no more than an ordinary large message takes. Nothing here compresses; a policy that does is for text.
MAX_INFLATED_BYTES = 64 * 1024 * 1024

# Header fields that are compared with what the sender put outside; others come and go on the way.
_COMPARED = ("From", "To", "Cc", "Reply-To", "Subject", "Date", "Message-ID", "In-Reply-To", "References")


@dataclass(frozen=True, slots=True)
class OuterDifference:
    """A field that did not arrive as it was sent. Something to look at, never part of a verdict."""

    name: str
    sent: tuple[str, ...]
    found: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Unsealed:
    """A message that decrypts, with every tag, size and hash good, and its sender not yet proven."""

    manifest: Manifest
    payload_digest: bytes       # SHA-256 of the sealed part
    recipient: str              # whose key opened it: the address in the manifest, else the address given with the key
    kid: bytes                  # id of the key that opened it
    stream: bytes
    serial: int
    prev: int
    forwarded: bool             # lay below a message/rfc822: somebody passed it on, it did not arrive by itself
    _listed: bool               # our blob is the one that the sender listed, with our key and address
    _from_address: str | None = field(repr=False)
    _original: bytes = field(repr=False)
    _signed: bytes = field(repr=False)
    _signature: bytes = field(repr=False)
    _outer: tuple[tuple[str, str], ...] = field(repr=False)

    @property
    def sender(self) -> str:
        """Who the manifest says it is from: a claim until `authenticate`."""
        return self.manifest.sender

    @property
    def original_sha512(self) -> bytes:
        return self.manifest.sha512


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """The original, and what is proven about it."""

    unsealed: Unsealed
    signature: SignatureState   # "valid" only by the key of the card that was given, exactly as that card says
    from_matches: bool          # the original has one From mailbox, and it is who sealed it
    addressed: bool             # from_matches, and the sender listed our blob with our key and address
    original: bytes = field(repr=False)

    @property
    def manifest(self) -> Manifest:
        return self.unsealed.manifest

    def claim(self, recipient: str) -> Claim:
        """What freshness judges; `recipient` is the account, or the envelope recipient at the listener."""
        unsealed, manifest = self.unsealed, self.manifest
        return Claim(
            recipient=recipient, sender=manifest.sender, manifest_id=manifest.id, skid=manifest.skid, stream=unsealed.stream,
            serial=unsealed.serial, prev=unsealed.prev, sent_at_ms=manifest.sent_at_ms, expires_at_ms=manifest.expires_at_ms,
            payload_digest=unsealed.payload_digest, original_sha512=manifest.sha512, signature=self.signature,
            addressed=self.addressed, from_matches=self.from_matches,
        )

    @property
    def participants(self) -> frozenset[str]:
        """Whom it was from and for, by what is signed alone (RFC 9788 6.2: a reply goes to protected addresses only)."""
        named = {entry.address for entry in self.manifest.recipients if entry.address is not None}
        return read_participants(self.original) | named | {self.manifest.sender}

    @property
    def outer_differences(self) -> tuple[OuterDifference, ...]:
        return tuple(_differences(self.manifest.outer, self.unsealed._outer))


def unseal(
    found: FoundParts, keys: Sequence[tuple[str, DecryptionKey]], *, max_original_bytes: int = MAX_SIZE
) -> Unsealed:
    """Open with one of `keys` (address or "@domain", key), in the order in which they are to be tried: newest first.

    Raises `Unreadable`, and nothing else, whatever `found` holds.
    A part in an attached message counts only if there is nothing of ours outside (docs/format.md 4.4); of several, the first
    that opens.
    """
    trials = _Trials(found, keys)
    failure = Unreadable("header failure: damaged part" if found.damaged else "header failure: no sealed part")
    candidates = [candidate for candidate in found.payloads if candidate.forwarded == found.forwarded]
    for candidate in candidates[:MAX_PAYLOADS]:
        try:
            return _unseal_payload(candidate, trials, found.outer, max_original_bytes)
        except Unreadable as error:
            failure = error
    raise failure


def _unseal_payload(
    candidate: FoundPayload, trials: _Trials, outer: tuple[tuple[str, str], ...], max_original_bytes: int
) -> Unsealed:
    header = payload.parse_header(candidate.raw)
    blob, key, content, keys = trials.import_session_key(header)
    container = payload.parse_container(payload.decrypt_payload(keys, candidate.raw))
    manifest = parse_manifest(container.manifest)
    if not trials.is_listed(manifest, blob, key):
        # A blob that the sender did not make may stand before the one he did, and of those for the key of a gateway the first
        # may be for somebody else of its domain: neither must hide ours.
        blob, key, content = trials.listed(header, manifest, content.cek) or (blob, key, content)
    if manifest.size > (min(max_original_bytes, MAX_INFLATED_BYTES) if manifest.encoding.deflated else max_original_bytes):
        raise Unreadable("over limit: size of the original")
    original = _decode_body(manifest, container.body)
    if not primitives.equal(primitives.sha512(original), manifest.sha512):
        raise Unreadable("original failure: hash")
    inner = read_inner(original)
    if inner.message_id != manifest.message_id:
        raise Unreadable("manifest failure: mid is not the original's Message-ID")
    addresses = trials.addresses[key.public.id]
    entry = manifest.entry(blob.hash)
    listed = trials.is_listed(manifest, blob, key)
    return Unsealed(
        manifest=manifest,
        payload_digest=primitives.sha256(candidate.raw),
        recipient=entry.address if listed and entry is not None and entry.address is not None else addresses[0],
        kid=key.public.id,
        stream=content.stream,
        serial=content.serial,
        prev=content.prev,
        forwarded=candidate.forwarded,
        _listed=listed,
        _from_address=inner.from_address,
        _original=original,
        _signed=payload.signature_input(header, container.manifest),
        _signature=container.signature,
        _outer=outer,
    )


class _Trials:
    """Finds the key blob that one of our keys opens, within a bound on the work a hostile message can cause."""

    def __init__(self, found: FoundParts, keys: Sequence[tuple[str, DecryptionKey]]) -> None:
        self.addresses: dict[bytes, list[str]] = {}
        self._keys: list[DecryptionKey] = []
        for address, key in keys:
            if key.public.id not in self.addresses:
                self._keys.append(key)
            self.addresses.setdefault(key.public.id, []).append(address)
        self._blobs: list[tuple[str, KeyBlob]] = []
        self._refused: Unreadable | None = None
        for part in found.blobs:
            try:
                self._blobs.append((part.kid, parse_key_blob(part.raw)))
            except Unreadable as error:     # one damaged or newer blob says nothing about the others
                self._refused = error
        self._left = MAX_TRIALS

    def import_session_key(self, header: payload.Header) -> tuple[KeyBlob, DecryptionKey, BlobContent, primitives.PayloadKeys]:
        """The first blob that opens and holds the session key that H commits to. Raises `Unreadable`."""
        failure: Unreadable | None = None
        reason = "no key blob for this sealed part"
        for blob, key in self._pairs(header.eid):
            try:
                content = self._unwrap(blob, key, header)
            except _NoMatch as error:
                reason = str(error)
                continue
            try:
                return blob, key, content, payload.check_commitment(header, content.cek)
            except Unreadable as error:
                failure = error
        raise failure or self._refused or Unreadable(f"no match: {reason}")

    def listed(self, header: payload.Header, manifest: Manifest, cek: bytes) -> tuple[KeyBlob, DecryptionKey, BlobContent] | None:
        """The blob that the manifest lists for one of our keys and addresses, if it is here and holds the same session key."""
        ours = {key.public.id: key for key in self._keys}
        for _, blob in self._blobs:
            entry = manifest.entry(blob.hash) if blob.eid == header.eid else None
            key = ours.get(entry.key_id) if entry is not None else None
            if key is None or not self.is_listed(manifest, blob, key):
                continue
            try:
                content = self._unwrap(blob, key, header)
            except _NoMatch:
                continue
            if primitives.equal(content.cek, cek):
                return blob, key, content
        return None

    def is_listed(self, manifest: Manifest, blob: KeyBlob, key: DecryptionKey) -> bool:
        """Whether the sender made this blob for this key and one of the addresses given with it."""
        entry = manifest.entry(blob.hash)
        return entry is not None and entry.key_id == key.public.id and (
            entry.address is None or any(belongs_to(entry.address, address) for address in self.addresses[key.public.id])
        )

    def _pairs(self, eid: bytes) -> Iterator[tuple[KeyBlob, DecryptionKey]]:
        """Blobs and keys in the order to be tried: those whose hint fits, then the first key with all others, and so on."""
        blobs = [(kid, blob) for kid, blob in self._blobs if blob.eid == eid]
        hints = {kid for kid, _ in blobs if kid}
        keys = [(key.public.id[:KID_BYTES].hex(), key) for key in self._keys]
        for hint, key in keys:
            if hint in hints:
                yield from ((blob, key) for kid, blob in blobs if kid == hint)
        for hint, key in keys:
            yield from ((blob, key) for kid, blob in blobs if kid != hint)

    def _unwrap(self, blob: KeyBlob, key: DecryptionKey, header: payload.Header) -> BlobContent:
        if self._left == 0:
            raise Unreadable("over limit: key blobs tried")
        self._left -= 1
        try:
            return unwrap_session_key(blob.blob, key, header.raw)
        except Unreadable as error:
            raise _NoMatch(error.reason) from None


class _NoMatch(Exception):
    """This blob is not for this key."""


def _decode_body(manifest: Manifest, body: memoryview) -> bytes:
    """The original, of exactly `manifest.size` bytes."""
    encoded: memoryview | bytes = body
    if manifest.encoding.deflated:
        encoded = _inflate(body, manifest.size + (MAX_TABLE_BYTES if manifest.encoding.folded else 0))
    if manifest.encoding.folded:
        return unfold(encoded, manifest.size)
    if len(encoded) != manifest.size:
        raise Unreadable("original failure: size")
    return bytes(encoded)


def _inflate(data: memoryview, limit: int) -> bytes:
    """RFC 1951, one stream, nothing after it, at most `limit` bytes: reading stops there, whatever the stream promises."""
    stream = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        plain = stream.decompress(data, limit + 1)
    except zlib.error:
        raise Unreadable("original failure: compressed data") from None
    if len(plain) > limit or not stream.eof or stream.unused_data:
        raise Unreadable("original failure: compressed size")
    return plain


def authenticate(unsealed: Unsealed, card: Card | None, *, revoked_at_ms: int | None = None) -> Opened:
    """Give the original out, with what `card` (held for `unsealed.sender`, or for its domain) proves. Never raises.

    `revoked_at_ms`: since when the card's signing key counts as revoked.
    """
    from_matches = unsealed._from_address == unsealed.manifest.sender
    return Opened(
        unsealed=unsealed,
        signature=_decide_signature(unsealed, card, revoked_at_ms),
        from_matches=from_matches,
        addressed=unsealed._listed and from_matches,
        original=unsealed._original,
    )


def _decide_signature(unsealed: Unsealed, card: Card | None, revoked_at_ms: int | None) -> SignatureState:
    """docs/format.md 6.5: the signature is the card's, whole, and the card speaks for the sender."""
    manifest = unsealed.manifest
    if card is None:
        return "unknown-sender"
    if (
        card.verify.id != manifest.skid
        or not belongs_to(manifest.sender, card.address)
        or is_gateway(card.address) != (manifest.scope == "gateway")
    ):
        return "bad"
    try:
        card.verify.verify(unsealed._signed, unsealed._signature)
    except (BadSignature, FormatError):
        return "bad"
    revoked = revoked_at_ms is not None and manifest.sent_at_ms >= revoked_at_ms
    return "revoked" if revoked or manifest.sent_at_ms > card.expires_at_ms else "valid"


def _differences(sent: tuple[tuple[str, str], ...], found: tuple[tuple[str, str], ...]) -> Iterator[OuterDifference]:
    for name in _COMPARED:
        before, after = (
            tuple(" ".join(value.split()) for field_name, value in fields if field_name.lower() == name.lower())
            for fields in (sent, found)
        )
        if before != after:
            yield OuterDifference(name, before, after)
