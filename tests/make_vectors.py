"""Writes tests/vectors/*.txt: `python tests/make_vectors.py`. One message each, wrong in one way or in none.

The secrets are constants, so anybody can open the messages; sealing draws fresh randomness, so a new run gives other bytes with
the same meaning. A file is key-value lines, an empty line, and the message (format of the age and CCTV test vectors):

    expect      success, or which check must fail: the category is the first words of `Unreadable.reason`, or what
                `authenticate` says: "signature failure", "not addressed"
    comment     what is special about it
    address     whose key opens it; key: its 32-byte seed; key2: an older one, where given
    card        the sender's card, base64
    sha256      of the original; serial, prev, forwarded: what else must come out. Only with success and the last two
"""

from __future__ import annotations

import base64
import json
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent
sys.path[:0] = [str(ROOT), str(ROOT.parent / "daemon")]

from lab.envelope import NOW_MS, SUBMISSION, Envelope, message, outer, recipient, wrap  # noqa: E402
from malote.core import blob, payload, primitives, seal  # noqa: E402
from malote.core.card import CardKey, make_card  # noqa: E402
from malote.core.fold import fold  # noqa: E402
from malote.core.identity import Identity  # noqa: E402
from malote.core.keys import DecryptionKey, SignatureAlgorithm, SigningKey  # noqa: E402
from malote.core.seal import SealRecipient  # noqa: E402

ED25519, HYBRID = SignatureAlgorithm.ED25519, SignatureAlgorithm.HYBRID
YEARS_MS = 100 * 365 * 86_400_000


def person(address: str, seed: int, algorithm: SignatureAlgorithm = ED25519) -> Identity:
    """Keys from one byte. Never do this."""
    signing = SigningKey(algorithm, bytes([seed]) * algorithm.seed_bytes)
    key = DecryptionKey(bytes([seed + 1]) * 32)
    card = make_card(
        signing, address, [CardKey(key.public, NOW_MS - 1000, NOW_MS + YEARS_MS)], sequence=1, made_at_ms=NOW_MS - 1000,
        expires_at_ms=NOW_MS + YEARS_MS,
    )
    return Identity(address, signing, (key,), card)


ALICE = person("alice@a.example", 0x10)
ALICE_HYBRID = person("alice@a.example", 0x10, HYBRID)
GATEWAY = person("@a.example", 0x20)
BOB = person("bob@b.example", 0x30)
BOB_GATEWAY = person("@b.example", 0x40)
CAROL = person("carol@c.example", 0x50)
MALLORY = person("mallory@m.example", 0x60)

Vector = tuple[str, str, str, bytes, bytes, dict[str, Any]]


def sealed(original: bytes, *recipients: SealRecipient, sender: Identity = ALICE, **options: Any) -> bytes:
    who = recipients or (recipient(BOB),)
    return seal.seal(
        original, identity=sender, recipients=who, submission_id=SUBMISSION, sent_at_ms=NOW_MS, outer=outer(), **options
    ).raw


def lines(data: bytes, width: int, line_end: bytes) -> bytes:
    text = base64.b64encode(data)
    return line_end.join(text[at:at + width] for at in range(0, len(text), width)) + line_end


def with_attachment(line_end: bytes, width: int, size: int = 3000) -> bytes:
    head = message("").replace(b"\r\n\r\n", b"\r\nContent-Transfer-Encoding: base64\r\n\r\n").replace(b"\r\n", line_end)
    return head + lines(bytes(n * n % 251 for n in range(size)), width, line_end)


def success() -> Iterator[Vector]:
    plain = message()

    def opens(name: str, comment: str, raw: bytes, original: bytes = plain, **options: Any) -> Vector:
        return name, "success", comment, raw, original, options

    for name, comment, original in (
        ("plain", "one recipient, Ed25519, a short text", plain),
        ("chunks", "more than one chunk", message("0123456789abcdef" * 2500)),
        ("fold_crlf", "a base64 body in binary, 76 characters and CRLF", with_attachment(b"\r\n", 76)),
        ("fold_lf", "a base64 body in binary, 60 characters and LF", with_attachment(b"\n", 60)),
        ("fold_open_end", "a base64 body without final line end", with_attachment(b"\r\n", 76).rstrip(b"\r\n")),
    ):
        yield opens(name, comment, sealed(original), original)
    yield opens("hybrid", "signed with Ed25519 and ML-DSA-65", sealed(plain, sender=ALICE_HYBRID), card=ALICE_HYBRID)
    yield opens("second_recipient", "our blob is the second", sealed(plain, recipient(CAROL, "to", 90, 89), recipient(BOB, "cc")))
    yield opens("bcc", "a copy for a Bcc recipient: no kid", sealed(plain, recipient(BOB, "bcc")))
    members = recipient(CAROL, "list"), recipient(BOB, "list")
    yield opens("list", "members of a list: no kid, no addresses", sealed(plain, *members))
    for_gateway = recipient(BOB_GATEWAY, address="bob@b.example")
    yield opens("gateway_recipient", "wrapped for the gateway of Bob's domain", sealed(plain, for_gateway), who=BOB_GATEWAY)
    yield opens("gateway_sender", "signed by the gateway of Alice's domain", sealed(plain, sender=GATEWAY), card=GATEWAY)
    envelope = Envelope(plain, ALICE).add(BOB)
    envelope.parts = [("0123456789abcdef", envelope.parts[0][1])]
    yield opens("wrong_kid", "the kid parameter is another key's: a hint only", envelope.raw())
    envelope = Envelope(plain, ALICE).add(BOB)
    envelope.members |= {"_future": {"x": [1, "y"]}, "exp": NOW_MS + 1}
    yield opens("underscore_member", "an unknown member whose name begins with _, and an expiry", envelope.raw())
    envelope = Envelope(plain, ALICE).add(BOB)
    envelope.members["enc"], envelope.body = "deflate", deflated(plain)
    yield opens("deflate", "compressed", envelope.raw())
    original = with_attachment(b"\r\n", 76)
    envelope = Envelope(original, ALICE).add(BOB)
    envelope.members["enc"], envelope.body = "fold+deflate", deflated(fold(original) or b"")
    yield opens("fold_deflate", "folded, then compressed", envelope.raw(), original)
    envelope = Envelope(plain, ALICE).add(CAROL).add(BOB)
    raw = wrap(forged_for_bob(envelope, serial=999).parts + envelope.parts, envelope.payload())
    yield opens("forged_blob_in_front", "a co-recipient's forged blob stands before the genuine one", raw)
    yield from mangled(plain)


def forged_for_bob(envelope: Envelope, *, serial: int = 7) -> Envelope:
    """What somebody who can open `envelope` can make: its session key wrapped for Bob, not listed by the sender."""
    forger = Envelope(b"", ALICE, envelope.cek)
    forger.header = envelope.header
    return forger.add(BOB, serial=serial, prev=0 if serial != 7 else 6)


def mangled(plain: bytes) -> Iterator[Vector]:
    raw = sealed(plain)
    mark = raw[raw.index(b"--=_mlt_"):].split(b"\r\n")[0]
    note, key, last = (mark + piece for piece in raw.split(mark)[1:4])
    head = raw[:raw.index(mark)]
    octets = raw.replace(b"application/vnd.malote.sealed", b"application/octet-stream")
    forward = b"From: m@m.example\r\nContent-Type: multipart/mixed; boundary=f\r\n\r\n--f\r\nContent-Type: message/rfc822\r\n\r\n"
    yield "lf", "success", "line ends changed to LF", raw.replace(b"\r\n", b"\n"), plain, {}
    yield "swapped", "success", "parts in another order", head + last + key + note + mark + b"--\r\n", plain, {}
    yield "octet_stream", "success", "media type changed", octets, plain, {}
    yield "quoted_printable", "success", "base64 text carried as quoted-printable", raw.replace(
        b"Encoding: base64", b"Encoding: quoted-printable").replace(b"==\r\n--", b"=3D=3D\r\n--"), plain, {}
    yield "forwarded", "success", "below a message/rfc822", forward + raw + b"\r\n--f--\r\n", plain, {"forwarded": "yes"}


def deflated(data: bytes) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return packer.compress(data) + packer.flush()


def unreadable() -> Iterator[Vector]:
    plain = message()

    def fails(name: str, expect: str, comment: str, raw: bytes) -> Vector:
        return name, expect, comment, raw, b"", {}

    one, two = Envelope(plain, ALICE).add(BOB), Envelope(plain, ALICE).add(BOB)
    foreign = blob.serialize_key_blob(one.header.eid, blob.parse_key_blob(two.parts[0][1]).blob)
    yield fails("no_blob", "no match", "no key blob at all", wrap([], one.payload()))
    yield fails("other_recipient", "no match", "wrapped for somebody else", sealed(plain, recipient(CAROL)))
    yield fails("other_eid", "no match", "the key blob of another message", wrap(two.parts, one.payload()))
    yield fails("transplant", "no match", "another message's blob under this envelope id", wrap([("", foreign)], one.payload()))
    yield fails("serial_zero", "no match", "a serial number of 0", Envelope(plain, ALICE).add(BOB, serial=0, prev=0).raw())
    yield fails("prev_not_less", "no match", "prev equals serial", Envelope(plain, ALICE).add(BOB, serial=5, prev=5).raw())

    def blob_edit(position: int, value: int) -> bytes:
        part = bytearray(one.parts[0][1])
        part[position] = value
        return wrap([("", bytes(part))], one.payload())

    yield fails("blob_version", "version failure", "key blob of version 2", blob_edit(8, 2))
    yield fails("blob_type", "version failure", "key blob of type 2", blob_edit(27, 2))
    yield fails("blob_length", "header failure", "key blob says that it is one byte shorter", blob_edit(29, 0xA7))
    longer = one.parts[0][1] + b"\0"
    yield fails("blob_trailing", "header failure", "a byte after the key blob", wrap([("", longer)], one.payload()))
    yield from header_failures(one, fails)
    yield from payload_failures(fails)
    yield from container_failures(fails)


def header_failures(one: Envelope, fails: Callable[..., Vector]) -> Iterator[Vector]:
    def edit(position: int, value: int) -> bytes:
        sealed_part = bytearray(one.payload())
        sealed_part[position] = value
        return one.raw(bytes(sealed_part))

    yield fails("payload_version", "version failure", "sealed part of version 2", edit(8, 2))
    yield fails("payload_suite", "version failure", "sealed part of suite 2", edit(10, 2))
    yield fails("flags", "header failure", "a flag is set", edit(11, 1))
    yield fails("payload_short", "header failure", "sealed part of 40 bytes", one.raw(one.payload()[:40]))
    raw = one.raw()
    at = raw.rindex(b"iU1M") + 300
    yield fails("injected_text", "header failure", "text inside the base64 of the sealed part", raw[:at] + b"<b>" + raw[at:])
    yield fails("equivocation", "header failure", "our blob holds another session key than the header commits to",
                Envelope(message(), ALICE).add(CAROL).add(BOB, cek=bytes(32)).raw())
    many = b"--x\r\n\r\n" * 300
    top = b"Content-Type: multipart/mixed; boundary=x\r\n\r\n--x\r\n" + raw[raw.index(b"MIME-Version"):] + b"\r\n"
    yield fails("too_many_parts", "over limit", "a sealed message among 300 parts", top + many)


def payload_failures(fails: Callable[..., Vector]) -> Iterator[Vector]:
    original = message("x" * 16_500)
    envelope = Envelope(original, ALICE).add(BOB)
    whole = envelope.payload()
    head, step = whole[:68], 16 * 1024 + 16
    chunks = [whole[at:at + step] for at in range(68, len(whole), step)]
    for name, comment, damaged in (
        ("flip_first", "a bit flipped in the first chunk", head + bytes([chunks[0][0] ^ 1]) + whole[69:]),
        ("flip_tag", "a bit flipped in the last tag", whole[:-1] + bytes([whole[-1] ^ 1])),
        ("cut_chunk", "the last chunk is missing", head + b"".join(chunks[:-1])),
        ("cut_byte", "the last byte is missing", whole[:-1]),
        ("cut_all", "no chunk at all", head),
        ("extended", "a byte more", whole + b"\0"),
        ("swapped_chunks", "two chunks in the other order", head + chunks[1] + chunks[0] + b"".join(chunks[2:])),
        ("doubled_chunk", "a chunk twice", head + chunks[0] + b"".join(chunks)),
        ("dropped_chunk", "the first chunk is missing", head + b"".join(chunks[1:])),
    ):
        yield fails(name, "payload failure", comment, envelope.raw(damaged))


def container_failures(fails: Callable[..., Vector]) -> Iterator[Vector]:
    plain = message()
    envelope = Envelope(plain, ALICE).add(BOB)
    container = envelope.container()
    for name, comment, changed in (
        ("padding", "padding that is not zero", container[:-1] + b"\1"),
        ("unpadded", "no padding", container.rstrip(b"\0")),
        ("more_padding", "a byte of padding too much", container + b"\0"),
        ("manifest_length", "a manifest longer than the container", b"\0\1\0\0" + container[4:]),
    ):
        yield fails(name, "container failure", comment, envelope.raw(envelope.encrypt(changed)))
    yield from manifest_failures(plain, fails)
    yield from body_failures(plain, fails)
    bomb = Envelope(plain, ALICE).add(BOB)
    bomb.members |= {"enc": "deflate", "size": 64 * 1024**2 + 1}
    bomb.body = deflated(bytes(1000))
    yield fails("deflate_size", "over limit", "a compressed original that claims more than 64 MiB", bomb.raw())


def manifest_failures(plain: bytes, fails: Callable[..., Vector]) -> Iterator[Vector]:
    envelope = Envelope(plain, ALICE).add(BOB)
    listed = envelope.members["rcpt"][0]
    cases: tuple[tuple[str, str, dict[str, Any]], ...] = (
        ("member_missing", "no skid", {"skid": None}), ("member_unknown", "an unknown member", {"surprise": 1}),
        ("other_version", "manifest of version 2", {"v": 2}), ("float", "not an integer", {"sent": 1.5}),
        ("big_integer", "a time above 2^53", {"sent": 2**53 + 1}), ("boolean", "true for an integer", {"size": True}),
        ("from_not_canonical", "from with a capital letter", {"from": "Alice@a.example"}),
        ("from_not_composed", "from in lower case, but not in NFC: h and a macron below", {"from": "h\u0331@a.example"}),
        ("no_rcpt", "nobody listed", {"rcpt": []}),
        ("capital_hex", "hexadecimal in capitals", {"id": "AB" * 16}), ("unknown_enc", "an unknown encoding", {"enc": "gzip"}),
        ("unknown_role", "an unknown role", {"rcpt": [listed | {"r": "boss"}]}),
        ("blob_twice", "one key blob listed twice", {"rcpt": [listed, listed]}), ("size_limit", "size 2^32", {"size": 2**32}),
        ("mid", "mid is not the Message-ID of the original", {"mid": "<two@a.example>"}),
        ("deep", "nested deeper than a manifest", {"_x": [[[1]]]}),
    )
    for name, comment, members in cases:
        changed = Envelope(plain, ALICE).add(BOB)
        if members.get("rcpt"):     # the entry of this very blob, so that nothing else is wrong
            members["rcpt"] = [entry | {"b": changed.members["rcpt"][0]["b"]} for entry in members["rcpt"]]
        changed.members = {key: value for key, value in (changed.members | members).items() if value is not None}
        yield fails(name, "manifest failure", comment, changed.raw())
    raw_manifest = json.dumps(envelope.members).encode()
    for name, comment, manifest in (
        ("duplicate", "a member twice", raw_manifest[:-1] + b',"from":"mallory@m.example"}'),
        ("trailing", "text after the object", raw_manifest + b"{}"), ("utf8", "not UTF-8", raw_manifest[:-1] + b',"_x":"\xff"}'),
        ("surrogate", "half a surrogate pair", raw_manifest[:-1] + b',"_x":"\\ud800"}'), ("array", "an array", b"[]"),
    ):
        envelope.manifest = manifest
        yield fails(name, "manifest failure", comment, envelope.raw())


def body_failures(plain: bytes, fails: Callable[..., Vector]) -> Iterator[Vector]:
    for name, expect, comment, enc, body in (
        ("size", "original failure", "the body is shorter than size", "id", plain[:-1]),
        ("hash", "original failure", "the body is not what the hash says", "id", plain[:-1] + b"!"),
        ("deflate_trailing", "original failure", "a byte after the compressed stream", "deflate", deflated(plain) + b"x"),
        ("deflate_cut", "original failure", "a compressed stream without its end", "deflate", deflated(plain)[:-3]),
        ("deflate_bomb", "original failure", "ten megabytes where the size says less", "deflate", deflated(bytes(10_000_000))),
        ("rest", "fold failure", "spans that leave bytes over", "fold",
         b"\0\0\0\1\0\0" + len(plain).to_bytes(4, "big") + plain + b"x"),
        ("size", "fold failure", "spans that give more than size", "fold",
         b"\0\0\0\1\1\4" + len(plain).to_bytes(4, "big") + plain),
        ("kind", "fold failure", "an unknown kind of span", "fold", b"\0\0\0\1\2\0" + len(plain).to_bytes(4, "big") + plain),
        ("empty", "fold failure", "no spans", "fold", bytes(4)),
    ):
        wrong = Envelope(plain, ALICE).add(BOB)
        wrong.members["enc"], wrong.body = enc, body
        yield fails(name, expect, comment, wrong.raw())


def unproven() -> Iterator[Vector]:
    plain = message()

    def unsigned(name: str, comment: str, raw: bytes, original: bytes = plain, **options: Any) -> Vector:
        return name, "signature failure", comment, raw, original, options

    envelope = Envelope(plain, ALICE_HYBRID).add(BOB)
    manifest = json.dumps(envelope.members).encode()
    envelope.manifest = manifest
    whole = ALICE_HYBRID.signing.sign(payload.signature_input(envelope.header, manifest))
    for name, comment, signature in (
        ("none", "no signature", b""), ("ed25519_half", "only the Ed25519 half", whole[:64]),
        ("ed25519_bad", "ML-DSA-65 good, Ed25519 not", bytes(64) + whole[64:]), ("longer", "a byte more", whole + b"\0"),
        ("mldsa_bad", "Ed25519 good, ML-DSA-65 not", whole[:64] + bytes(3309)),
    ):
        envelope.signature = signature
        yield unsigned(name, comment, envelope.raw(), card=ALICE_HYBRID)
    yield unsigned("other_key", "signed with a key that is not the card's", sealed(plain, sender=ALICE_HYBRID))
    forged = Envelope(plain, ALICE).add(BOB)
    forged.signature = MALLORY.signing.sign(payload.signature_input(forged.header, b"{}"))
    yield unsigned("forged", "claims Alice's key, signed by Mallory", forged.raw())
    again = Envelope(b"", ALICE).add(BOB)
    raw = again.raw(again.encrypt(Envelope(plain, ALICE).add(BOB).container()))
    yield unsigned("re_encrypted", "a recipient sealed the signed content again", raw)
    scope = Envelope(plain, ALICE).add(BOB)
    scope.members["scope"] = "gateway"
    yield unsigned("scope", "a person's key that claims to be a gateway's", scope.raw())
    named = Envelope(plain, ALICE).add(BOB)
    named.members["skid"] = MALLORY.signing.public.id.hex()
    yield unsigned("named_key", "signed by the card's key, but skid names another", named.raw())
    expired = Envelope(plain, ALICE).add(BOB)
    expired.members["sent"] = ALICE.card.expires_at_ms + 1
    yield unsigned("expired_card", "sent after the card's exp: revoked", expired.raw())
    outside = Envelope(message(sender="eve@other.example"), GATEWAY).add(BOB)
    outside.members |= {"from": "eve@other.example", "scope": "gateway"}
    yield unsigned("gateway_outside", "a gateway signs for another domain", outside.raw(), outside.body, card=GATEWAY)
    yield from unaddressed(plain)


def unaddressed(plain: bytes) -> Iterator[Vector]:
    def lost(name: str, comment: str, raw: bytes, original: bytes = plain, **options: Any) -> Vector:
        return name, "not addressed", comment, raw, original, options

    for name, comment, entry in (
        ("other_address", "our blob is listed for another address", {"a": "carol@c.example"}),
        ("other_key_id", "our blob is listed for another key", {"k": "00" * 32}),
    ):
        changed = Envelope(plain, ALICE).add(BOB)
        changed.members["rcpt"][0] |= entry
        yield lost(name, comment, changed.raw())
    passed = Envelope(plain, ALICE).add(CAROL)
    yield lost("surreptitious", "Carol wrapped the session key for Bob", wrap(forged_for_bob(passed).parts, passed.payload()))
    shared = Envelope(plain, ALICE).add(CAROL).add(BOB)
    raw = wrap(forged_for_bob(shared, serial=999).parts, shared.payload())
    yield lost("forged_serial", "Carol replaced Bob's blob by one with another serial", raw, serial=999, prev=0)
    for name, comment, original in (
        ("empty", "an original of no bytes, so without From", b""),
        ("any_bytes", "no mail: NUL, bare CR, bare LF, 8-bit, no final line end, no From", b"\0\r\n\r\x80\n\xffx"),
        ("from_other", "From is not who signed", message(sender="mallory@m.example")),
        ("from_two", "two From fields", message(sender="alice@a.example\r\nFrom: m@m.example")),
        ("from_list", "two mailboxes in From", message(sender="alice@a.example, m@m.example")),
        ("from_display", "the signer only as display name", message(sender='"alice@a.example" <m@m.example>')),
        ("from_bare_cr", "another From behind a bare CR", message(sender="alice@a.example\r\nX: y\rFrom: m@m.example")),
    ):
        yield lost(name, comment, sealed(original), original)


def render(vector: Vector) -> bytes:
    _, expect, comment, raw, original, options = vector
    who, card = options.get("who", BOB), options.get("card", ALICE)
    fields = {"expect": expect, "comment": comment, "address": who.address, "key": who.decryption[0].seed.hex(),
              "card": base64.b64encode(card.card.raw).decode()}
    if expect in {"success", "signature failure", "not addressed"}:
        fields |= {"sha256": primitives.sha256(original).hex(), "serial": str(options.get("serial", 7)),
                   "prev": str(options.get("prev", 6)), "forwarded": options.get("forwarded", "no")}
    return "".join(f"{name}: {value}\n" for name, value in fields.items()).encode() + b"\n" + raw


def main() -> None:
    folder = ROOT / "vectors"
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.txt"):
        old.unlink()
    for vector in (*success(), *unreadable(), *unproven()):
        path = folder / f"{vector[1].removesuffix(' failure').replace(' ', '_')}_{vector[0]}.txt"
        if path.exists():
            raise SystemExit(f"two vectors are called {path.name}")
        path.write_bytes(render(vector))


if __name__ == "__main__":
    main()
