"""A second implementation of the opener, written from docs/format.md alone: it shares no line with `malote`.

It is slow and short, uses the standard library's MIME and JSON parsers, and exists to be compared with the first one. Section
numbers are those of the document.
"""

from __future__ import annotations

import base64
import binascii
import email
import hashlib
import json
import quopri
import re
import struct
import zlib
from email.message import Message
from typing import Any, NoReturn

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ed25519, mldsa, mlkem, x25519
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, MLKEM768X25519PrivateKey, Suite
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

VS = b"\1\0\1"
BLOB_MAGIC, PAYLOAD_MAGIC, CARD_MAGIC = b"\x89MLK\r\n\x1a\n", b"\x89MLP\r\n\x1a\n", b"\x89MLC\r\n\x1a\n"
HPKE = Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
MEMBERS = {"v": int, "id": 16, "from": str, "skid": 32, "dev": 8, "sent": int, "enc": str, "size": int, "sha512": 64, "mid": str,
           "scope": str, "rcpt": list, "outer": list, "card": 32}
ROLES = {"to", "cc", "bcc", "self", "list"}


class Refused(Exception):
    pass


def check(condition: object) -> None:
    if not condition:
        raise Refused


# --- 4.4

def leaves(message: Message, depth: int = 1, count: list[int] | None = None) -> list[Message]:
    count = count if count is not None else [0]
    count[0] += 1
    check(count[0] <= 200 and depth <= 8)
    if not message.is_multipart():
        return [message]
    parts = message.get_payload()
    assert isinstance(parts, list)
    return [leaf for part in parts if isinstance(part, Message) for leaf in leaves(part, depth + 1, count)]


def binary(part: Message) -> bytes:
    text = str(part.get_payload()).encode("utf-8", "surrogateescape")
    if part.get("Content-Transfer-Encoding", "").strip().lower() == "quoted-printable":
        text = quopri.decodestring(text)
    if text.startswith((BLOB_MAGIC, PAYLOAD_MAGIC)):
        return text
    text = re.sub(rb"[ \t\r\n]", b"", text)
    if not text.startswith((b"iU1MSw0KGg", b"iU1MUA0KGg")):
        return b""
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error:
        return b""


# --- 5, 6.1

def private_key(seed: bytes) -> tuple[MLKEM768X25519PrivateKey, bytes]:
    expanded = hashlib.shake_256(seed).digest(96)
    lattice = mlkem.MLKEM768PrivateKey.from_seed_bytes(expanded[:64])
    curve = x25519.X25519PrivateKey.from_private_bytes(expanded[64:])
    public = lattice.public_key().public_bytes_raw() + curve.public_key().public_bytes_raw()
    return MLKEM768X25519PrivateKey(lattice, curve), hashlib.sha256(b"MLT1 enc key" + public).digest()


def keys(cek: bytes, salt: bytes) -> tuple[bytes, int, bytes]:
    output = HKDFExpand(hashes.SHA512(), 76, b"MLT1 payload\0AEAD_AES_256_GCM\0" + VS + salt).derive(cek)
    return output[:32], int.from_bytes(output[32:44], "big"), output[44:]


def import_blobs(parts: list[bytes], header: bytes, seed: bytes) -> list[tuple[bytes, bytes, int, int]]:
    """Hash of the blob, CEK, serial, prev, for each that opens and holds the committed key."""
    private, _ = private_key(seed)
    info = b"MLT1 keyblob" + VS + hashlib.sha256(header).digest()
    eid = hashlib.sha256(b"MLT1 eid" + header).digest()[:16]
    found = []
    for part in parts:
        if len(part) != 1222 or part[8:11] != VS or part[11:27] != eid or part[27:30] != b"\1\4\xa8":
            continue
        try:
            content = HPKE.decrypt(part[30:], private, info=info)
        except (InvalidTag, ValueError):
            continue
        serial, prev = struct.unpack(">QQ", content[40:])
        if len(content) == 56 and 0 < serial < 2**63 and prev < serial and keys(content[:32], header[12:36])[2] == header[36:]:
            found.append((hashlib.sha256(part[27:]).digest(), content[:32], serial, prev))
    return found


def decrypt(payload: bytes, cek: bytes) -> bytes:
    key, nonce, _ = keys(cek, payload[12:36])
    chunks, position, number = b"", 68, 0
    while True:
        chunk = payload[position:position + 16400]
        check(len(chunk) >= 16)
        try:
            chunks += AESGCM(key).decrypt((nonce ^ number).to_bytes(12, "big"), chunk, None)
        except InvalidTag:
            raise Refused from None
        position, number = position + 16400, number + 1
        if len(chunk) < 16400:
            return chunks


# --- 6.2, 6.3, 7

def container(plain: bytes) -> tuple[bytes, bytes, bytes]:
    pieces, position = [], 0
    for size in (4, 8, 2):
        check(position + size <= len(plain))
        length = int.from_bytes(plain[position:position + size], "big")
        position += size
        check(position + length <= len(plain))
        pieces.append(plain[position:position + length])
        position += length
    exponent = position.bit_length() - 1
    mask = 2 ** (exponent - exponent.bit_length()) - 1
    check(len(plain) == (4096 if position <= 4096 else (position + mask) & ~mask))
    check(not plain[position:].strip(b"\0"))
    return pieces[0], pieces[1], pieces[2]


def strict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    check(len({name for name, _ in pairs}) == len(pairs))
    return dict(pairs)


def number(text: str) -> int:
    check(text != "-0" and abs(int(text)) <= 2**53)
    return int(text)


def refuse(_: str) -> NoReturn:
    raise Refused


def depth(value: Any) -> int:
    if isinstance(value, dict | list):
        return 1 + max(map(depth, value.values() if isinstance(value, dict) else value), default=0)
    return 0


def is_hex(text: Any, size: int) -> bool:
    return isinstance(text, str) and re.fullmatch(f"[0-9a-f]{{{2 * size}}}", text) is not None


def manifest(raw: bytes) -> dict[str, Any]:
    try:
        decoder = json.JSONDecoder(object_pairs_hook=strict, parse_int=number, parse_float=refuse, parse_constant=refuse)
        members: dict[str, Any] = decoder.decode(raw.decode())
        json.dumps(members, ensure_ascii=False).encode()
    except ValueError:
        raise Refused from None
    check(isinstance(members, dict) and depth(members) <= 3)
    for name, kind in MEMBERS.items():
        check(is_hex(members.get(name), kind) if isinstance(kind, int) else type(members.get(name)) is kind)
    check(all(name in MEMBERS or name == "exp" or name.startswith("_") for name in members))
    check(members["v"] == 1 and members["sent"] >= 0 and 0 <= members["size"] < 2**32 and members["scope"] in {"user", "gateway"})
    check(members["from"] == members["from"].lower() and members["enc"] in {"id", "fold", "deflate", "fold+deflate"})
    check(1 <= len(members["rcpt"]) <= 100 and len({entry["b"] for entry in members["rcpt"]}) == len(members["rcpt"]))
    for entry in members["rcpt"]:
        check(is_hex(entry["k"], 32) and is_hex(entry["b"], 32) and entry["r"] in ROLES)
    return members


def unfold(data: bytes, size: int) -> bytes:
    check(len(data) >= 4)
    count = int.from_bytes(data[:4], "big")
    rest = data[4 + 6 * count:]
    check(1 <= count <= 2048 and len(data) >= 4 + 6 * count)
    out = b""
    for at in range(4, 4 + 6 * count, 6):
        kind, width, n = struct.unpack(">BBI", data[at:at + 6])
        piece, rest = rest[:n], rest[n:]
        check(n and len(piece) == n)
        if kind == 0:
            check(width == 0)
            out += piece
            continue
        check(kind in {1, 3, 5, 7} and width % 4 == 0 and 4 <= width <= 252)
        line_end = b"\n" if kind & 2 else b"\r\n"
        text = base64.b64encode(piece)
        out += line_end.join(text[start:start + width] for start in range(0, len(text), width)) + (line_end if kind & 4 else b"")
    check(not rest and len(out) == size)
    return out


def original(members: dict[str, Any], body: bytes) -> bytes:
    if members["enc"].endswith("deflate"):
        stream = zlib.decompressobj(-15)
        try:
            body = stream.decompress(body, members["size"] + 12_293)
        except zlib.error:
            raise Refused from None
        check(stream.eof and not stream.unused_data)
    if members["enc"].startswith("fold"):
        body = unfold(body, members["size"])
    check(len(body) == members["size"] and hashlib.sha512(body).hexdigest() == members["sha512"])
    return body


# --- 6.4, 6.5

def inner_field(text: bytes, name: bytes) -> list[bytes]:
    head = re.split(rb"(?<=\n)\r?\n", text, maxsplit=1)[0] if not re.match(rb"\r?\n", text) else b""
    lines = re.sub(rb"\r?\n(?=[ \t])", b"", head).split(b"\n")
    return [line.partition(b":")[2].strip() for line in lines if line.partition(b":")[0].strip().lower() == name]


def inner_from(text: bytes) -> str | None:
    """Enough for the vectors: one field, one address, by itself or in angle brackets behind a name."""
    found = inner_field(text, b"from")
    if len(found) != 1 or re.search(rb"\r(?!\n)|\0", text.partition(b"\r\n\r\n")[0]):
        return None
    match = re.fullmatch(rb'(?:(?:"[^"]*"|[A-Za-z ]*)\s*<([^<>, ]+)>|([^<>," ]+))', found[0])
    return (match[1] or match[2]).decode().lower() if match else None


def speaks_for(card_address: str, address: str) -> bool:
    if not card_address.startswith("@"):
        return card_address == address
    domain = address.rpartition("@")[2]
    return domain == card_address[1:] or domain.endswith("." + card_address[1:])


def signature_is_valid(card: bytes, members: dict[str, Any], header: bytes, raw: bytes, signature: bytes) -> bool:
    check(card[:11] == CARD_MAGIC + VS)
    facts = json.loads(card[15:15 + int.from_bytes(card[11:15], "big")])
    public = base64.b64decode(facts["sig"]["pk"])
    hybrid = facts["sig"]["alg"] == "ed25519+ml-dsa-65"
    signed = b"MLT1 signature\0" + hashlib.sha512(header).digest() + hashlib.sha512(raw).digest()
    if (hashlib.sha256(b"MLT1 sig key" + public).hexdigest() != members["skid"] or not speaks_for(facts["addr"], members["from"])
            or facts["scope"] != members["scope"] or len(signature) != 64 + 3309 * hybrid):
        return False
    try:
        ed25519.Ed25519PublicKey.from_public_bytes(public[:32]).verify(signature[:64], signed)
        if hybrid:
            mldsa.MLDSA65PublicKey.from_public_bytes(public[32:]).verify(signature[64:], signed, b"MLT1")
    except InvalidSignature:
        return False
    return True


# --- 8

def open_message(raw: bytes, seed: bytes, address: str, card: bytes) -> tuple[str, bytes, int]:
    """What became of it ("success", "signature failure", "not addressed"), the original, and the serial. Raises `Refused`."""
    parts = [binary(leaf) for leaf in leaves(email.message_from_bytes(raw))]
    payloads = [part for part in parts if part.startswith(PAYLOAD_MAGIC)]
    check(payloads)
    payload = payloads[0]
    check(len(payload) >= 68 and payload[8:11] == VS and payload[11] == 0)
    blobs = import_blobs([part for part in parts if part.startswith(BLOB_MAGIC)], payload[:68], seed)
    check(blobs)
    raw_manifest, body, signature = container(decrypt(payload, blobs[0][1]))
    members = manifest(raw_manifest)
    listed = {bytes.fromhex(entry["b"]): entry for entry in members["rcpt"]}
    digest, _, serial, _ = next((blob for blob in blobs if blob[0] in listed), blobs[0])
    text = original(members, body)
    ids = inner_field(text, b"message-id")
    check(members["mid"] == (ids[0].decode() if len(ids) == 1 else ""))
    if not signature_is_valid(card, members, payload[:68], raw_manifest, signature):
        return "signature failure", text, serial
    entry = listed.get(digest)
    addressed = (
        entry is not None and bytes.fromhex(entry["k"]) == private_key(seed)[1]
        and ("a" not in entry or speaks_for(address, entry["a"])) and inner_from(text) == members["from"]
    )
    return "success" if addressed else "not addressed", text, serial
