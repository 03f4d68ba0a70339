"""Cards: the public keys of one address, signed by their owner, as bytes and as text that survives mail (docs/format.md, Cards).

    body  = magic8 ‖ VS ‖ u32 length ‖ JSON
    card  = body ‖ u16 length ‖ countersignature ‖ signature

The signature is by the signing key that the JSON names, over everything before it; so no bit of a card is outside what is
signed. The countersignature is empty, or the predecessor's over the body, where the signing key was replaced.
"""

from __future__ import annotations

import email
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import pybase64

from malote.core import strict_json
from malote.core.address import canonical_card_address, is_gateway
from malote.core.armor import armored, dearmor, find_blocks
from malote.core.keys import EncryptionKey, SignatureAlgorithm, SigningKey, VerifyKey
from malote.core.primitives import VERSION_SUITE, sha256
from malote.errors import BadSignature, FormatError, KeyMissing, KeyRefused

MAGIC = b"\x89MLC\r\n\x1a\n"
MAX_CARD_BYTES = 64 * 1024          # a card with one hybrid key of each kind has about 8 KiB, with a countersignature 11 KiB
MAX_CARD_KEYS = 8                   # present and announced encryption keys; bounds the work of checking a card
MAX_ARMORED_BYTES = 16 * 1024 * 1024    # a mail with cards in it
CLOCK_LAG_MS = 24 * 3600 * 1000     # a correspondent's clock may be this much behind the one that made the card
_LABEL = b"MLT1 card\0"
_SUCCESSION_LABEL = b"MLT1 card succession\0"
_MAX_TIME_MS = 253_402_300_799_000  # the year 9999
_KIND = "MALOTE CARD"
_START = len(MAGIC) + len(VERSION_SUITE)
_BASE64_START = pybase64.b64encode(MAGIC).decode()[:10]     # 60 bits that begin every card
_NO_MEANING = re.compile(r"<[^<>]*>|&nbsp;|[ \t\r\n\xa0]+")

Scope = Literal["user", "gateway"]


@dataclass(frozen=True, slots=True)
class CardKey:
    """An encryption key and when it is to be used: from `from_ms` until before `to_ms`."""

    key: EncryptionKey
    from_ms: int
    to_ms: int


@dataclass(frozen=True)
class Card:
    """A card whose own signature was verified. That its keys belong to the address is another question: see `store` levels."""

    address: str
    scope: Scope
    encryption: tuple[CardKey, ...]
    verify: VerifyKey
    sequence: int               # of this address's cards, growing
    made_at_ms: int
    expires_at_ms: int
    previous: bytes | None      # skid of the signing key that this one replaced, and that countersigned
    raw: bytes = field(repr=False)

    @property
    def fingerprint(self) -> str:
        """30 digits that people compare; of the signing key, so it stays the same when encryption keys rotate."""
        return self.verify.fingerprint

    @cached_property
    def hash(self) -> bytes:
        return sha256(self.raw)

    def encryption_key(self, at_ms: int) -> EncryptionKey:
        """The newest key that is valid. Raises `KeyMissing` if there is none: never encrypt to an expired key."""
        if at_ms >= self.expires_at_ms:
            raise KeyMissing(f"the card of {self.address} has expired", hint="ask for a new card and import it")
        valid = [entry for entry in self.encryption if entry.from_ms - CLOCK_LAG_MS <= at_ms < entry.to_ms]
        if not valid:
            raise KeyMissing(f"the card of {self.address} has no key for this day", hint="ask for a new card and import it")
        return max(valid, key=lambda entry: (entry.from_ms <= at_ms, entry.from_ms)).key


def usable_until_ms(card: Card) -> int:
    """When it ends, or its last key does: from then on nobody can seal to it."""
    return min(card.expires_at_ms, max(entry.to_ms for entry in card.encryption))


def make_card(
    signing: SigningKey, address: str, encryption: Sequence[CardKey], *, sequence: int, made_at_ms: int, expires_at_ms: int,
    predecessor: SigningKey | None = None,
) -> Card:
    """Sign a card. `predecessor` is the signing key that `signing` replaced; its countersignature lets others follow."""
    public = signing.public
    members: dict[str, Any] = {
        "v": 1,
        "addr": canonical_card_address(address),
        "scope": "gateway" if is_gateway(address) else "user",
        "enc": [{"pk": _base64(entry.key.raw), "from": entry.from_ms, "to": entry.to_ms} for entry in encryption],
        "sig": {"alg": public.algorithm.value, "pk": _base64(public.raw)},
        "seq": sequence,
        "made": made_at_ms,
        "exp": expires_at_ms,
    }
    if predecessor is not None:
        members["prev"] = predecessor.public.id.hex()
    content = strict_json.dumps(members)
    body = MAGIC + VERSION_SUITE + struct.pack(">I", len(content)) + content
    counter = predecessor.sign(_SUCCESSION_LABEL + body) if predecessor is not None else b""
    signed = body + struct.pack(">H", len(counter)) + counter
    return parse_card(signed + signing.sign(_LABEL + signed))


def parse_card(raw: bytes) -> Card:
    """Parse and verify. Raises `FormatError` for everything that is not exactly a card with a good signature of its own."""
    content, body_end = _frame(raw)
    members = strict_json.loads(content, max_bytes=MAX_CARD_BYTES, max_depth=4)
    required = ("v", "addr", "scope", "enc", "sig", "seq", "made", "exp")
    strict_json.check_members(members, required=required, optional=("prev",))
    if strict_json.natural(members, "v") != 1:
        raise FormatError("card is of another version")
    verify = _parse_verify_key(strict_json.member(members, "sig", dict))
    signed_end = body_end + 2 + struct.unpack_from(">H", raw, body_end)[0]
    previous = strict_json.hex_bytes(members, "prev", 32) if "prev" in members else None
    try:
        verify.verify(_LABEL + raw[:signed_end], raw[signed_end:])
    except BadSignature:
        raise FormatError("the signature of the card is not valid: it was damaged or changed") from None
    if (signed_end > body_end + 2) != (previous is not None):
        raise FormatError("card has a predecessor without its signature, or the reverse")
    address = strict_json.member(members, "addr", str)
    scope = strict_json.member(members, "scope", str)
    if canonical_card_address(address) != address:
        raise FormatError("the address on the card is not in its canonical form")
    if scope != ("gateway" if is_gateway(address) else "user"):
        raise FormatError("the scope of the card does not fit its address")
    return Card(
        address=address, scope="gateway" if scope == "gateway" else "user",
        encryption=tuple(_parse_encryption_keys(strict_json.member(members, "enc", list))), verify=verify,
        sequence=strict_json.natural(members, "seq"), made_at_ms=_time(members, "made"), expires_at_ms=_time(members, "exp"),
        previous=previous, raw=bytes(raw),
    )


def _frame(raw: bytes) -> tuple[bytes, int]:
    """The JSON, and where the body ends."""
    if not _START + 6 < len(raw) <= MAX_CARD_BYTES or raw[:len(MAGIC)] != MAGIC:
        raise FormatError("not a card")
    if raw[len(MAGIC):_START] != VERSION_SUITE:
        raise FormatError("card is of a version or suite that this malote does not know")
    end = _START + 4 + struct.unpack_from(">I", raw, _START)[0]
    if end + 2 > len(raw):
        raise FormatError("card is cut off")
    return raw[_START + 4:end], end


def _parse_verify_key(members: dict[str, Any]) -> VerifyKey:
    strict_json.check_members(members, required=("alg", "pk"))
    try:
        algorithm = SignatureAlgorithm(strict_json.member(members, "alg", str))
    except ValueError:
        raise FormatError("card has a signature algorithm that this malote does not know") from None
    key = VerifyKey(algorithm, _bytes(members, "pk"))
    key.check()
    return key


def _parse_encryption_keys(entries: list[Any]) -> Iterator[CardKey]:
    if not 1 <= len(entries) <= MAX_CARD_KEYS:
        raise FormatError("card has no encryption key, or too many")
    for members in entries:
        if not isinstance(members, dict):
            raise FormatError("encryption key on a card is not an object")
        strict_json.check_members(members, required=("pk", "from", "to"))
        key = EncryptionKey(_bytes(members, "pk"))
        key.check()
        yield CardKey(key, _time(members, "from"), _time(members, "to"))


def _time(members: dict[str, Any], name: str) -> int:
    value = strict_json.natural(members, name)
    if value > _MAX_TIME_MS:
        raise FormatError(f"member {name} is after the year 9999")
    return value


def _base64(data: bytes) -> str:
    return pybase64.b64encode(data).decode()


def _bytes(members: dict[str, Any], name: str) -> bytes:
    return dearmor(strict_json.member(members, name, str))


def check_succession(old: Card, new: Card) -> None:
    """Whether `new` may take the place of `old` without anybody being asked. Raises `KeyRefused` unless its owner signed it.

    That is: the same bytes; or a higher sequence under the same signing key; or a higher sequence under a signing key that
    the old one countersigned.
    """
    if new.raw == old.raw:
        return
    if new.address != old.address:
        raise KeyRefused("the two cards are for different addresses")
    if new.verify != old.verify and not _is_countersigned(new, old.verify):
        raise KeyRefused(
            f"the card for {new.address} is signed by another key than the card held\n"
            f"  held: {old.fingerprint}\n  new:  {new.fingerprint}",
            hint="ask the person, by another way than mail, to read the digits of the new card to you",
        )
    if new.sequence <= old.sequence:
        raise KeyRefused(f"the card for {new.address} is older than the card held")


def _is_countersigned(card: Card, predecessor: VerifyKey) -> bool:
    end = _frame(card.raw)[1]
    length = struct.unpack_from(">H", card.raw, end)[0]
    try:
        predecessor.verify(_SUCCESSION_LABEL + card.raw[:end], card.raw[end + 2:end + 2 + length])
    except BadSignature:
        return False
    return card.previous == predecessor.id


# --- text


def armor(card: Card) -> str:
    """The card as lines of at most 64 ASCII characters (but for a long address), ending with a line end."""
    return armored(_KIND, card.raw, [f"Address: {card.address}", f"Fingerprint: {card.fingerprint}"])


def parse_armored(text: bytes | str) -> list[Card]:
    """All cards in a text or a mail: quoted, rewrapped, with other line ends, as quoted-printable, or as an attachment.

    The lines above the base64 are for people; they must say what the card says. Raises `FormatError` with a clear message if
    there is no card, or if any of them is damaged: all or none.
    """
    if len(text) > MAX_ARMORED_BYTES:
        raise FormatError("file is too large to be a card")
    data = text.decode("utf-8", "surrogateescape") if isinstance(text, bytes) else text
    blocks = list(find_blocks(_KIND, data))
    if not blocks and isinstance(text, bytes):
        blocks = [block for part in _decoded_parts(text) for block in find_blocks(_KIND, part)]
    if not blocks:
        raise FormatError("there is no card in it", hint="a card is the text between BEGIN MALOTE CARD and END MALOTE CARD")
    cards = {card.raw: card for card in map(_parse_block, blocks)}      # a mail may hold one as text and as HTML
    return list(cards.values())


def _decoded_parts(raw: bytes) -> Iterator[str]:
    """The bodies of a mail whose transfer encoding hides the text, as base64 does."""
    try:
        for part in email.message_from_bytes(raw).walk():
            payload = part.get_payload(decode=True)
            if isinstance(payload, bytes):
                yield payload.decode("utf-8", "surrogateescape")
    except RecursionError:
        raise FormatError("mail is nested too deep") from None


def _parse_block(block: str) -> Card:
    """`block` is what stands between BEGIN and END, without quote marks. White space and HTML tags have no meaning in it."""
    unquoted = _unquote_printable(block)
    try:
        comment, raw = _split_block(_squeeze(block))
    except FormatError:
        comment, raw = _split_block(_squeeze(unquoted))
    card = parse_card(raw)
    expected = _squeeze(f"Address: {card.address} Fingerprint: {card.fingerprint}")
    if comment and expected not in {comment, _squeeze(unquoted).partition(_BASE64_START)[0]}:
        # the part that people read must not say anything else than the part that is signed
        raise FormatError(f"the lines above the card do not belong to it: it is signed for {card.address}")
    return card


def _split_block(squeezed: str) -> tuple[str, bytes]:
    comment, start, rest = squeezed.partition(_BASE64_START)
    if not start:
        raise FormatError("card is damaged: its text does not begin as a card does")
    try:
        return comment, dearmor(start + rest)
    except FormatError:
        raise FormatError("card is damaged: its text is not complete") from None


def _squeeze(text: str) -> str:
    return _NO_MEANING.sub("", text)


def _unquote_printable(text: str) -> str:
    """RFC 2045 6.7, as far as card text needs it."""
    unfolded = re.sub(r"=[ \t]*\r?\n", "", text).encode("utf-8", "surrogateescape")
    decoded = re.sub(rb"=([0-9A-Fa-f]{2})", lambda match: bytes.fromhex(match[1].decode()), unfolded)
    return decoded.decode("utf-8", "surrogateescape")
