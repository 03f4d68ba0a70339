"""A decoder of MLT1 written by a reviewer from docs/format.md alone, before reading a line of `malote`.

It imports nothing of the project, walks MIME by itself, does HPKE by hand (RFC 9180 5.1, draft-connolly-cfrg-xwing-kem) and names
the category of §9 for every refusal, so that it can be held against the daemon on vectors, fresh messages and damaged ones.
Slow, short, and no example of style: one function for each section of the document.
"""

# ruff: noqa: C901, TRY301 -- it follows the order of the document, check after check

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import math
import quopri
import re
import struct
import unicodedata
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric import ed25519, mldsa, mlkem, x25519
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

VS = b"\x01\x00\x01"
KEY_BLOB, SEALED, CARD = (b"\x89ML" + letter + b"\r\n\x1a\n" for letter in (b"K", b"P", b"C"))
MAX_DEPTH, MAX_ENTITIES, MAX_TOP_HEADER, MAX_PART_HEADER, MAX_BOUNDARY = 8, 200, 256 * 1024, 16 * 1024, 200
MAX_FALSE_BOUNDARIES, MAX_BLOB_PART, MAX_SEALED_TRIED, MAX_UNWRAPS = 10_000, 4096, 8, 400


class Refusal(Exception):
    """`category` is a line of the table in §9."""

    def __init__(self, category: str) -> None:
        super().__init__(category)
        self.category = category


class OverLimit(Exception):
    pass


@dataclass
class Result:
    category: str  # "success", "signature failure", "not addressed"
    original: bytes
    sender: str
    recipient: str
    stream: bytes
    serial: int
    prev: int
    forwarded: bool
    payload_digest: bytes
    manifest: dict[str, Any]


def sha256(*parts: bytes) -> bytes:
    return hashlib.sha256(b"".join(parts)).digest()


def sha512(*parts: bytes) -> bytes:
    return hashlib.sha512(b"".join(parts)).digest()


# 4.4 finding the parts --------------------------------------------------------------------------------------------------------

def header_and_body(entity: bytes) -> tuple[bytes, bytes]:
    if entity[:1] == b"\n":
        return b"", entity[1:]
    if entity[:2] == b"\r\n":
        return b"", entity[2:]
    end = re.search(rb"\n\r?\n", entity)
    return (entity, b"") if end is None else (entity[: end.start() + 1], entity[end.end() :])


def unfolded(header: bytes) -> Iterator[tuple[str, bytes]]:
    for field in re.split(rb"\r?\n(?![ \t])", header):
        name, colon, value = field.partition(b":")
        if colon:
            yield name.rstrip(b" \t").decode("latin-1").lower(), re.sub(rb"\r?\n", b"", value).strip(b" \t\r\n")


def boundary_of(header: bytes) -> tuple[str, bytes | None]:
    kinds = [value for name, value in unfolded(header) if name == "content-type"]
    if not kinds:
        return "text/plain", None
    kind = kinds[0].partition(b";")[0].strip().lower().decode("latin-1")
    found = re.search(rb';\s*boundary\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s;]+))', kinds[0], re.IGNORECASE | re.DOTALL)
    if found is None:
        return kind, None
    return kind, re.sub(rb"\\(.)", rb"\1", found[1]) if found[1] is not None else found[2]


def children(body: bytes, boundary: bytes) -> Iterator[bytes]:
    start, false = None, 0
    for match in re.finditer(rb"(?:^|\r?\n)--" + re.escape(boundary) + rb"([^\n]*)(?=\n|\Z)", body):
        rest = match[1].strip(b" \t\r")
        if rest not in (b"", b"--"):
            false += 1
            if false > MAX_FALSE_BOUNDARIES:
                raise OverLimit
            continue
        if start is not None:
            yield body[start : match.start()] if match.start() >= start else b""
        if rest:
            return
        start = match.end() + 1
    if start is not None:
        yield body[start:]


def encoding_of(header: bytes) -> bytes:
    return next((value.lower() for name, value in unfolded(header) if name == "content-transfer-encoding"), b"")


def leaves(message: bytes) -> Iterator[tuple[bytes, bool]]:
    """(body of a leaf without quoted-printable, below an attached message?)"""
    count = 0

    def walk(entity: bytes, depth: int, forwarded: bool) -> Iterator[tuple[bytes, bool]]:
        nonlocal count
        count += 1
        if depth > MAX_DEPTH or count > MAX_ENTITIES:
            raise OverLimit
        header, body = header_and_body(entity)
        if len(header) > (MAX_TOP_HEADER if depth == 1 else MAX_PART_HEADER):
            raise OverLimit
        kind, boundary = boundary_of(header)
        if kind in ("message/rfc822", "message/global"):
            encoding = encoding_of(header)
            if encoding == b"base64":
                try:
                    body = base64.b64decode(re.sub(rb"[ \t\r\n]", b"", body), validate=True)
                except ValueError:
                    return
            yield from walk(quopri.decodestring(body) if encoding == b"quoted-printable" else body, depth + 1, True)
        elif kind.startswith("multipart/") and boundary:
            if len(boundary) > MAX_BOUNDARY:
                raise OverLimit
            for child in children(body, boundary):
                yield from walk(child, depth + 1, forwarded)
        else:
            yield quopri.decodestring(body) if encoding_of(header) == b"quoted-printable" else body, forwarded

    yield from walk(message, 1, False)


def binary(body: bytes) -> tuple[bytes, bytes | None] | None:
    """(magic, bytes or None if damaged) of one of our parts; None: no part of ours."""
    for magic in (KEY_BLOB, SEALED):
        if body.startswith(magic):
            return magic, body
    text = re.sub(rb"[ \t\r\n]", b"", body)
    for magic in (KEY_BLOB, SEALED):
        if text.startswith(base64.b64encode(magic)[:-1]):
            whole = re.fullmatch(rb"(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?", text)
            return magic, base64.b64decode(text) if whole else None
    return None


# 5 the key blob ---------------------------------------------------------------------------------------------------------------

class Key:
    """3.2: X-Wing key of a seed, and RFC 9180 base mode by hand."""

    def __init__(self, address: str, seed: bytes) -> None:
        self.address = address
        expanded = hashlib.shake_256(seed).digest(96)
        self.kem = mlkem.MLKEM768PrivateKey.from_seed_bytes(expanded[:64])
        self.dh = x25519.X25519PrivateKey.from_private_bytes(expanded[64:])
        self.dh_public = self.dh.public_key().public_bytes_raw()
        self.id = sha256(b"MLT1 enc key", self.kem.public_key().public_bytes_raw(), self.dh_public)

    def open(self, enc: bytes, info: bytes, ct: bytes) -> bytes:
        shared = self.dh.exchange(x25519.X25519PublicKey.from_public_bytes(enc[1088:]))
        secret = hashlib.sha3_256(
            self.kem.decapsulate(enc[:1088]) + shared + enc[1088:] + self.dh_public + rb"\.//^\ "[:6]
        ).digest()
        suite = b"HPKE" + struct.pack(">HHH", 0x647A, 0x0001, 0x0002)

        def extract(salt: bytes, label: bytes, ikm: bytes) -> bytes:
            return hmac.digest(salt or bytes(32), b"HPKE-v1" + suite + label + ikm, "sha256")

        def expand(prk: bytes, label: bytes, context: bytes, length: int) -> bytes:
            labelled = struct.pack(">H", length) + b"HPKE-v1" + suite + label + context
            return hmac.digest(prk, labelled + b"\x01", "sha256")[:length]

        context = b"\0" + extract(b"", b"psk_id_hash", b"") + extract(b"", b"info_hash", info)
        prk = extract(secret, b"secret", b"")
        return AESGCM(expand(prk, b"key", context, 32)).decrypt(expand(prk, b"base_nonce", context, 12), ct, None)


def payload_keys(cek: bytes, head: bytes) -> tuple[bytes, bytes, bytes]:
    info = b"MLT1 payload\0AEAD_AES_256_GCM\0" + VS + head[12:36]
    t1 = hmac.digest(cek, info + b"\x01", "sha512")
    t = t1 + hmac.digest(cek, t1 + info + b"\x02", "sha512")
    return t[:32], t[32:44], t[44:76]


def check_blob_part(part: bytes) -> tuple[bytes, bytes] | str:
    """(eid, BLOB), or the category under which it is skipped."""
    if len(part) > MAX_BLOB_PART:
        return "header failure"
    if part[8:11] != VS:
        return "version failure" if len(part) >= 11 else "header failure"
    if len(part) > 27 and part[27] != 1:
        return "version failure"
    if len(part) != 1222 or part[28:30] != struct.pack(">H", 1192):
        return "header failure"
    return part[11:27], part[27:]


def unwrap(
    head: bytes, blobs: Sequence[bytes], keys: Sequence[Key], budget: list[int], best: str
) -> Iterator[tuple[bytes, bytes, Key]]:
    """(BLOB, 56 bytes, key) for each that opens; raises the category of the best failure if none does."""
    info, any_good = b"MLT1 keyblob" + VS + sha256(head), False
    for blob in blobs:
        for key in keys:
            if budget[0] == 0:
                raise Refusal("over limit")
            budget[0] -= 1
            try:
                plain = key.open(blob[3:1123], info, blob[1123:])
            except (InvalidTag, ValueError):
                continue
            if len(plain) != 56:
                continue
            serial, prev = struct.unpack(">QQ", plain[40:])
            if not 0 < serial < 1 << 63 or prev >= serial:
                continue
            if not hmac.compare_digest(payload_keys(plain[:32], head)[2], head[36:68]):
                best = "header failure"
                continue
            any_good = True
            yield blob, plain, key
    if not any_good:
        raise Refusal(best)


# 6 the sealed part ------------------------------------------------------------------------------------------------------------

def decrypt(payload: bytes, cek: bytes) -> bytes:
    key, nonce, _ = payload_keys(cek, payload)
    out, place, i = [], 68, 0
    while True:
        chunk = payload[place : place + 16384 + 16]
        number = (int.from_bytes(nonce) ^ i).to_bytes(12)
        try:
            out.append(AESGCM(key).decrypt(number, chunk, None))
        except (InvalidTag, ValueError) as error:
            raise Refusal("payload failure") from error
        place, i = place + len(chunk), i + 1
        if len(out[-1]) < 16384:
            break
    if place != len(payload):
        raise Refusal("payload failure")
    return b"".join(out)


def padme(n: int) -> int:
    if n <= 4096:
        return 4096
    e = math.frexp(n)[1] - 1
    s = math.frexp(e)[1]
    mask = (1 << (e - s)) - 1
    return (n + mask) & ~mask


def container(plain: bytes) -> tuple[bytes, bytes, bytes]:
    try:
        (mlen,) = struct.unpack_from(">I", plain, 0)
        (blen,) = struct.unpack_from(">Q", plain, 4 + mlen)
        (slen,) = struct.unpack_from(">H", plain, 12 + mlen + blen)
    except struct.error as error:
        raise Refusal("container failure") from error
    n = 14 + mlen + blen + slen
    if mlen > 256 * 1024 or slen > 8 * 1024 or n > len(plain) or padme(n) != len(plain) or any(plain[n:]):
        raise Refusal("container failure")
    return plain[4 : 4 + mlen], plain[12 + mlen : 12 + mlen + blen], plain[14 + mlen + blen : n]


# 1.1, 6.3 ---------------------------------------------------------------------------------------------------------------------

def strict_object(data: bytes) -> dict[str, Any]:
    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({name for name, _ in items}) != len(items):
            raise ValueError("twice")
        return dict(items)

    def integer(digits: str) -> int:
        if digits == "-0" or len(digits) > 17 or abs(int(digits)) > 1 << 53:
            raise ValueError("integer")
        return int(digits)

    def refuse(_: str) -> Any:
        raise ValueError("number")

    def depth(value: Any) -> int:
        if not isinstance(value, dict | list):
            return 0
        return 1 + max((depth(v) for v in (value.values() if isinstance(value, dict) else value)), default=0)

    text = data.decode("utf-8")
    value = json.loads(text, object_pairs_hook=pairs, parse_int=integer, parse_float=refuse, parse_constant=refuse)
    if not isinstance(value, dict) or depth(value) > 3:
        raise ValueError("no object, or too deep")
    json.dumps(value, ensure_ascii=False).encode("utf-8")  # half surrogates do not encode
    return value


HEX = {"id": 16, "skid": 32, "dev": 8, "sha512": 64, "card": 32}


def members(value: dict[str, Any], kinds: dict[str, type], optional: Sequence[str] = ()) -> None:
    named = {name: v for name, v in value.items() if not name.startswith("_")}
    if not set(kinds) - set(optional) <= set(named) <= set(kinds):
        raise ValueError("members")
    for name, v in named.items():
        if type(v) is not kinds[name]:
            raise ValueError(name)


def hexadecimal(value: str, size: int) -> None:
    if re.fullmatch(f"[0-9a-f]{{{2 * size}}}", value) is None:
        raise ValueError("hex")


def manifest_of(data: bytes) -> dict[str, Any]:
    try:
        m = strict_object(data)
        members(m, {"v": int, "id": str, "from": str, "skid": str, "dev": str, "sent": int, "exp": int, "enc": str, "size": int,
                    "sha512": str, "mid": str, "scope": str, "rcpt": list, "outer": list, "card": str}, ["exp"])
        for name, size in HEX.items():
            hexadecimal(m[name], size)
        blobs = []
        for entry in m["rcpt"]:
            members(entry, {"a": str, "k": str, "b": str, "r": str}, ["a"])
            hexadecimal(entry["k"], 32)
            hexadecimal(entry["b"], 32)
            blobs.append(entry["b"])
            if entry["r"] not in ("to", "cc", "bcc", "self", "list") or canonical(entry.get("a", "x@x")) != entry.get("a", "x@x"):
                raise ValueError("rcpt")
        for field in m["outer"]:
            if not isinstance(field, list) or len(field) != 2 or not all(isinstance(text, str) for text in field):
                raise ValueError("outer")
        if (
            m["v"] != 1 or m["from"].startswith("@") or canonical(m["from"]) != m["from"] or m["sent"] < 0 or m.get("exp", 0) < 0
            or m["enc"] not in ("id", "fold", "deflate", "fold+deflate") or not 0 <= m["size"] <= 0xFFFFFFFF
            or m["scope"] not in ("user", "gateway") or not 1 <= len(blobs) <= 100 or len(set(blobs)) != len(blobs)
            or len(m["outer"]) > 500
        ):
            raise ValueError("values")
    except (ValueError, AttributeError, RecursionError) as error:
        raise Refusal("manifest failure") from error
    return m


# 7 body -----------------------------------------------------------------------------------------------------------------------

def inflate(data: bytes, limit: int) -> bytes:
    stream = zlib.decompressobj(-15)
    try:
        out = stream.decompress(data, limit + 1)
    except zlib.error as error:
        raise Refusal("original failure") from error
    if len(out) > limit or not stream.eof or stream.unused_data or stream.unconsumed_tail:
        raise Refusal("original failure")
    return out


def unfold(folded: bytes, size: int) -> bytes:
    if len(folded) < 4:
        raise Refusal("fold failure")
    (count,) = struct.unpack_from(">I", folded)
    if not 0 < count <= 2048 or len(folded) < 4 + 6 * count:
        raise Refusal("fold failure")
    spans = [struct.unpack_from(">BBI", folded, 4 + 6 * i) for i in range(count)]
    if sum(n for _, _, n in spans) != len(folded) - 4 - 6 * count:
        raise Refusal("fold failure")
    out, place = [], 4 + 6 * count
    for kind, width, n in spans:
        base = kind in (1, 3, 5, 7) and width % 4 == 0 and width != 0
        if n == 0 or not (base or (kind, width) == (0, 0)):
            raise Refusal("fold failure")
        data, place = folded[place : place + n], place + n
        if base:
            text, end = base64.b64encode(data), b"\n" if kind in (3, 7) else b"\r\n"
            lines = [text[i : i + width] for i in range(0, len(text), width)]
            data = end.join(lines) + (end if kind >= 5 else b"")
        out.append(data)
    original = b"".join(out)
    if len(original) != size:
        raise Refusal("fold failure")
    return original


def original_of(m: dict[str, Any], body: bytes) -> bytes:
    size = m["size"]
    if "deflate" in m["enc"]:
        if size > 64 * 1024 * 1024:
            raise Refusal("over limit")
        body = inflate(body, size + 12_292 if m["enc"] == "fold+deflate" else size)
    if m["enc"].startswith("fold"):
        body = unfold(body, size)
    if len(body) != size or sha512(body).hex() != m["sha512"]:
        raise Refusal("original failure")
    return body


# 6.4 the original -------------------------------------------------------------------------------------------------------------

def fields_of(original: bytes) -> list[tuple[str, bytes]] | None:
    if original.startswith((b"\n", b"\r\n")):
        return []
    end = re.search(rb"\n\r?\n", original)
    header = original if end is None else original[: end.start() + 1]
    if len(header) > 512 * 1024:
        return None
    fields: list[list[bytes]] = []
    for line in header.split(b"\n"):
        if line[:1] in (b" ", b"\t") and fields:
            fields[-1].append(line)
        elif line.strip(b"\r"):
            fields.append([line])
    if len(fields) > 2000:
        return None
    named = []
    for lines in fields:
        name, _, value = b"\n".join(lines).partition(b":")
        named.append((name.rstrip(b" \t\r\n").lower().decode("latin-1"), value))
    return named


def message_id_of(original: bytes) -> str:
    values = [v for name, v in fields_of(original) or [] if name == "message-id"]
    if len(values) != 1:
        return ""
    value = re.sub(rb"\r?\n", b"", values[0]).strip(b" \t\r\n")
    return value.decode() if re.fullmatch(rb"[\x21-\x7e][\x20-\x7e]{0,997}", value) else ""


def canonical(text: str) -> str:
    """1.2, for addresses whose domain is ASCII: enough to compare with, not an IDNA library."""
    local, at, domain = text.rpartition("@")
    if not at or not domain or any(unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") for c in text):
        raise ValueError("address")
    if any(unicodedata.category(c) == "Zs" and c != " " for c in local):
        raise ValueError("space")
    if local[:1] == '"':
        if not re.fullmatch(r'"(?:[^"\\]|\\.)*"', local):
            raise ValueError("quoted")
        local = re.sub(r"\\(.)", r"\1", local[1:-1])
    elif not re.fullmatch(r"[^\x00-\x20()<>\[\]:;@\\,.\"]+(\.[^\x00-\x20()<>\[\]:;@\\,.\"]+)*", local):
        raise ValueError("dot-atom")
    local = re.sub("[A-Z]", lambda c: c[0].lower(), unicodedata.normalize("NFC", local))
    local = unicodedata.normalize("NFC", local)
    if not re.fullmatch(r"[^\x00-\x20()<>\[\]:;@\\,.\"]+(\.[^\x00-\x20()<>\[\]:;@\\,.\"]+)*", local):
        local = '"' + re.sub(r'(["\\])', r"\\\1", local) + '"'
    domain = domain.lower().removesuffix(".")
    if not re.fullmatch(r"\[[0-9a-z.:]+\]|[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?)*", domain):
        raise ValueError("domain")
    return f"{local}@{domain}"


TOKEN = re.compile(r"[ \t\r\n]+|\"(?:[^\"\\]|\\.)*\"|\[[^\[\]\\]*\]|[^\x00-\x20()<>\[\]:;@\\,.\"\x7f]+|[().<>:;@,]", re.DOTALL)


def tokens_of(text: str) -> list[str]:
    out, place = [], 0
    while place < len(text):
        if text[place] == "(":
            depth = 0
            while True:
                if place >= len(text):
                    raise ValueError("comment")
                c = text[place]
                place += 2 if c == "\\" else 1
                depth += (c == "(") - (c == ")")
                if depth == 0:
                    break
            out.append(" ")
            continue
        match = TOKEN.match(text, place)
        if match is None or match[0] == ")":
            raise ValueError("token")
        out.append(" " if match[0].isspace() else match[0])
        place = match.end()
    return out


def from_of(original: bytes) -> str | None:
    """6.4: exactly one mailbox, or nobody."""
    fields = fields_of(original)
    if fields is None or any(re.search(rb"\0|\r(?!\n|\Z)", v) for _, v in fields):
        return None
    values = [v for name, v in fields if name == "from"]
    if len(values) != 1:
        return None
    try:
        text = re.sub(r"\r?\n", "", values[0].decode("utf-8"))
        tokens = tokens_of(text)
        if "<" in tokens:
            start = tokens.index("<")
            while tokens[-1] == " ":
                tokens.pop()
            if tokens[-1] != ">" or any(t in "<>,;:@" for t in tokens[:start]):
                return None
            tokens = tokens[start + 1 : -1]
        if any(t in "<>,;:" for t in tokens):
            return None
        return canonical("".join(tokens).strip(" "))
    except (ValueError, UnicodeError):
        return None


# 3.3, 6.5 ---------------------------------------------------------------------------------------------------------------------

def check_signature(public: bytes, algorithm: str, message: bytes, signature: bytes) -> None:
    hybrid = algorithm == "ed25519+ml-dsa-65"
    if not hybrid and algorithm != "ed25519":
        raise ValueError("algorithm")
    if len(public) != (1984 if hybrid else 32) or len(signature) != (3373 if hybrid else 64):
        raise InvalidSignature
    ed25519.Ed25519PublicKey.from_public_bytes(public[:32]).verify(signature[:64], message)
    if hybrid:
        mldsa.MLDSA65PublicKey.from_public_bytes(public[32:]).verify(signature[64:], message, b"MLT1")


def card_of(card: bytes) -> dict[str, Any]:
    if card[:11] != CARD + VS:
        raise ValueError("card")
    (length,) = struct.unpack_from(">I", card, 11)
    body, rest = card[: 15 + length], card[15 + length :]
    value = strict_object(body[15:])
    (counter,) = struct.unpack_from(">H", rest)
    public = base64.b64decode(value["sig"]["pk"], validate=True)
    check_signature(public, value["sig"]["alg"], b"MLT1 card\0" + body + rest[: 2 + counter], rest[2 + counter :])
    value["public"] = public
    return value


def within(address: str, card_address: str) -> bool:
    if not card_address.startswith("@"):
        return address == card_address
    domain = address.rpartition("@")[2]
    return domain == card_address[1:] or domain.endswith("." + card_address[1:])


def signature_valid(m: dict[str, Any], manifest: bytes, head: bytes, signature: bytes, card: dict[str, Any]) -> bool:
    if not within(m["from"], card["addr"]) or m["scope"] != card["scope"]:
        return False
    if m["skid"] != sha256(b"MLT1 sig key", card["public"]).hex():
        return False
    try:
        check_signature(card["public"], card["sig"]["alg"], b"MLT1 signature\0" + sha512(head) + sha512(manifest), signature)
    except InvalidSignature:
        return False
    return bool(m["sent"] <= card["exp"])


# 8 opening --------------------------------------------------------------------------------------------------------------------

def open_payload(
    payload: bytes, blobs: list[bytes], keys: list[Key], card: dict[str, Any], forwarded: bool, budget: list[int], skipped: str
) -> Result:
    head = payload[:68]
    first: tuple[bytes, bytes, Key] | None = None
    m: dict[str, Any] = {}
    chosen = None
    for candidate in unwrap(head, blobs, keys, budget, skipped):
        if first is None:
            first = candidate
            manifest, body, signature = container(decrypt(payload, candidate[1][:32]))
            m = manifest_of(manifest)
        if chosen is None and sha256(candidate[0]).hex() in [e["b"] for e in m["rcpt"]] and candidate[1][:32] == first[1][:32]:
            chosen = candidate
            break
    assert first is not None
    blob, plain, key = chosen or first
    original = original_of(m, body)
    if m["mid"] != message_id_of(original):
        raise Refusal("manifest failure")
    valid = signature_valid(m, manifest, head, signature, card)
    addressed = from_of(original) == m["from"] and any(
        e["b"] == sha256(blob).hex() and e["k"] == key.id.hex() and ("a" not in e or within(e["a"], key.address))
        for e in m["rcpt"]
    )
    serial, prev = struct.unpack(">QQ", plain[40:])
    category = "signature failure" if not valid else "success" if addressed else "not addressed"
    return Result(category, original, m["from"], key.address, plain[32:40], serial, prev, forwarded, sha256(payload), m)


def open_message(message: bytes, keys: Sequence[tuple[str, bytes]], card: bytes) -> Result | None:
    """None: an ordinary message. Raises Refusal with a category of §9."""
    ours, over = [], False
    try:
        for body, forwarded in leaves(message):
            part = binary(body)
            if part is not None:
                ours.append((*part, forwarded))
    except OverLimit:
        over = True
    if not ours:
        return None
    if over:
        raise Refusal("over limit")
    outside = [part for part in ours if not part[2]]
    sealed = [(data, forwarded) for magic, data, forwarded in (outside or ours) if magic == SEALED and data is not None]
    blobs, skipped = [], "no match"
    for magic, data, _ in ours:
        if magic == KEY_BLOB and data is not None:
            checked = check_blob_part(data)
            if isinstance(checked, str):
                skipped = checked
            else:
                blobs.append(checked)
    if not sealed:
        raise Refusal("header failure")
    opened_keys, budget, refusal = [Key(*key) for key in keys], [MAX_UNWRAPS], None
    for payload, forwarded in sealed[:MAX_SEALED_TRIED]:
        try:
            if len(payload) < 68:
                raise Refusal("header failure")
            if payload[8:11] != VS:
                raise Refusal("version failure")
            if payload[11] != 0:
                raise Refusal("header failure")
            eid = sha256(b"MLT1 eid", payload[:68])[:16]
            own = [blob for e, blob in blobs if e == eid]
            return open_payload(payload, own, opened_keys, card_of(card), forwarded, budget, skipped)
        except Refusal as error:
            refusal = error
    assert refusal is not None
    raise refusal
