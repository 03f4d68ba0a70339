"""Is a submitted message encrypted already? A test of its root, so strict that a yes cannot hide a line of clear text.

A wrong no costs a second layer; a wrong yes would let text leave that policy wants sealed. So whatever is not exactly as the
three formats are written is no: comments in Content-Type, text before, after or between the parts, a part too many.
What OpenPGP and S/MIME call encrypted is known by its first packet or its type; whether it is, nobody can tell without the key.
"""

from __future__ import annotations

import binascii
import re
from typing import Literal

import pybase64

from malote.core import parts
from malote.core.address import parse_mailboxes
from malote.core.blob import parse_key_blob
from malote.core.fold import base64_lines
from malote.core.message import Bytes, Field, parse_fields, split_header, unfold, values
from malote.core.payload import parse_header
from malote.core.seal import NOTE
from malote.core.tags import SUBJECT
from malote.errors import FormatError, Unreadable

Encrypted = Literal["no", "openpgp", "smime", "malote"]

_HINTS = (b"multipart/encrypted", b"pkcs7-mime", b"=_mlt_")     # without one of these in the header the answer is no
_MEDIA = re.compile(rb"([!#$&^_.+A-Za-z0-9-]+/[!#$&^_.+A-Za-z0-9-]+)")
_PARAMETER = re.compile(rb'[ \t]*;[ \t]*([!#$&^_.+*A-Za-z0-9-]+)=(?:"([^"\\\r\n]*)"|([^ \t;"()<>@,:\\/\[\]?=]+))')

# Fixed texts that Thunderbird and Enigmail write before the first part; a constant carries nothing.
_PREAMBLES = frozenset({
    b"", b"This is an OpenPGP/MIME encrypted message (RFC 4880 and 3156)",
    b"This is an OpenPGP/MIME encrypted message (RFC 2440 and 3156)",
})
_PGP_VERSION = re.compile(rb"\s*Version:[ \t]*1\s*\Z", re.IGNORECASE)
_ARMOR_START = re.compile(
    rb"\s*-----BEGIN PGP MESSAGE-----[ \t]*\r?\n(?:(?:Version|Hash|Charset): [ -~]*\r?\n)*[ \t]*\r?\n"
)
_ARMOR_END = re.compile(rb"\r?\n(?:=[A-Za-z0-9+/]{4}\r?\n)?-----END PGP MESSAGE-----\s*\Z")
_ARMOR_TAIL = 100           # bytes in which the end of the armour is looked for: checksum, last line, blank lines
# RFC 9580 5: packets that an encrypted message begins with; a signed or literal one (4, 8, 11) is armoured just the same
_PGP_ENCRYPTED_TAGS = frozenset({1, 3, 9, 18, 20})

_BASE64 = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
_WHITE = b" \t\r\n"
# RFC 5652 6.1 id-envelopedData 1.2.840.113549.1.7.3; RFC 5083 2.1 id-ct-authEnvelopedData 1.2.840.113549.1.9.16.1.23
_CMS_ENCRYPTED = (bytes.fromhex("06092a864886f70d010703"), bytes.fromhex("060b2a864886f70d0109100117"))
_CMS_HEAD = 48              # base64 characters that hold SEQUENCE, its length and either OID: 9 + 13 bytes

_ID = rb"<[!-;=?A-~]+@[!-;=?-~]+>"
# What the fields of an outer header say (docs/format.md 4.3). From, To, Cc are read as addresses, Received is the servers' text.
_OUTER_VALUES = {
    "subject": re.compile(re.escape(SUBJECT.encode("ascii"))), "malote": re.compile(rb"1"), "mime-version": re.compile(rb"1\.0"),
    "date": re.compile(rb"[A-Z][a-z]{2}, \d\d [A-Z][a-z]{2} \d{4} \d\d:\d\d:\d\d \+0000"), "message-id": re.compile(_ID),
    "in-reply-to": re.compile(rb"%b(?: %b)*" % (_ID, _ID)), "references": re.compile(rb"%b(?: %b)*" % (_ID, _ID)),
    "auto-submitted": re.compile(rb"no|auto-(?:generated|replied|notified)"), "content-type": re.compile(rb".*"),
}
_OUTER_ADDRESSES = ("from", "to", "cc")
_OUTER_REQUIRED = frozenset({"from", "subject", "date", "message-id", "mime-version", "content-type", "malote"})
_MLT_TYPE = re.compile(rb'multipart/mixed; boundary="(=_mlt_[A-Za-z0-9_-]{22})"')


def decide_encrypted(raw: Bytes) -> Encrypted:
    """What the root of the message is. Never raises: what cannot be read is no."""
    try:
        header, body = split_header(raw)
        if not any(hint in header.lower() for hint in _HINTS):
            return "no"
        fields = parse_fields(header)
    except FormatError:
        return "no"
    content_types = values(fields, "content-type")
    if len(content_types) != 1:
        return "no"
    if _MLT_TYPE.fullmatch(content_types[0]):
        return "malote" if _is_malote(bytes(raw), fields, body) else "no"
    media, parameters = _content_type(content_types[0])
    if media == b"multipart/encrypted":
        return "openpgp" if _is_openpgp(bytes(raw), body, parameters) else "no"
    if media in (b"application/pkcs7-mime", b"application/x-pkcs7-mime"):
        return "smime" if _is_smime(raw, body, fields) else "no"
    return "no"


def _content_type(value: bytes) -> tuple[bytes, dict[bytes, bytes]]:
    """Media type and parameters (RFC 2045 5.1) in their plain spelling only; (b"", {}) for everything else."""
    match = _MEDIA.match(value)
    if match is None:
        return b"", {}
    parameters: dict[bytes, bytes] = {}
    position = match.end()
    while found := _PARAMETER.match(value, position):
        name = found[1].lower()
        if name in parameters:
            return b"", {}
        parameters[name] = found[2] if found[2] is not None else found[3]
        position = found.end()
    if value[position:].strip(b" \t;"):
        return b"", {}
    return match[1].lower(), parameters


# --- OpenPGP/MIME (RFC 3156 4)


def _is_openpgp(raw: bytes, body: int, parameters: dict[bytes, bytes]) -> bool:
    boundary = parameters.get(b"boundary", b"")
    if parameters.get(b"protocol", b"").lower() != b"application/pgp-encrypted" or not 1 <= len(boundary) <= 70:
        return False
    split = _split(raw, body, boundary)
    if split is None:
        return False
    control, data = (_entity(part) for part in split)
    if control is None or data is None or control[0] != b"application/pgp-encrypted" or data[0] != b"application/octet-stream":
        return False
    return _PGP_VERSION.match(control[1]) is not None and _is_pgp_data(data[1])


def _split(raw: bytes, body: int, boundary: bytes) -> list[bytes] | None:
    """The two parts of the multipart at `body`. None: another number of them, or something before or after."""
    mark = b"\n--" + boundary
    cuts: list[tuple[int, int, bytes]] = []         # where a delimiter begins and ends, and what follows the boundary
    at = raw.find(mark, body - 1)
    while at >= 0:
        if len(cuts) == 3:
            return None
        end = raw.find(b"\n", at + len(mark))
        end = len(raw) if end < 0 else end
        cuts.append((at, end, raw[at + len(mark):end].strip(_WHITE)))
        at = raw.find(mark, end)
    if [kind for _, _, kind in cuts] != [b"", b"", b"--"]:
        return None
    (first, first_end, _), (second, second_end, _), (last, last_end, _) = cuts
    if raw[body:max(body, first)].strip(_WHITE) not in _PREAMBLES or raw[last_end:].strip(_WHITE):
        return None
    return [raw[first_end + 1:second + 1], raw[second_end + 1:last + 1]]


def _entity(part: bytes) -> tuple[bytes, bytes] | None:
    """Media type and decoded body of a part."""
    try:
        header, offset = split_header(part)
        fields = parse_fields(header)
    except FormatError:
        return None
    types, encodings = values(fields, "content-type"), values(fields, "content-transfer-encoding")
    if len(types) != 1 or len(encodings) > 1 or any(not field.name.startswith("content-") for field in fields):
        return None
    body = _decoded(part[offset:], encodings[0].lower() if encodings else b"7bit")
    return None if body is None else (_content_type(types[0])[0], body)


def _decoded(body: bytes, encoding: bytes) -> bytes | None:
    if encoding in (b"7bit", b"8bit", b"binary"):
        return body
    if encoding == b"quoted-printable":
        return binascii.a2b_qp(body)
    if encoding == b"base64":
        try:
            return pybase64.b64decode(body.translate(None, _WHITE), validate=True)
        except ValueError:
            return None
    return None


def _is_pgp_data(data: bytes) -> bool:
    """An armoured or binary OpenPGP message that begins with an encrypted packet, and nothing around it."""
    start = _ARMOR_START.match(data)
    if start is None:
        return _is_encrypted_packet(data)
    end = _ARMOR_END.search(data, max(start.end(), len(data) - _ARMOR_TAIL))
    if end is None:
        return False
    text = data[start.end():end.start()]
    if text.rstrip(b"=\r\n").translate(None, _BASE64 + b"\r\n"):
        return False
    try:
        return _is_encrypted_packet(pybase64.b64decode(text[:8].translate(None, _WHITE)[:4], validate=True))
    except ValueError:
        return False


def _is_encrypted_packet(data: bytes) -> bool:
    """RFC 9580 4.2: bit 7 is set; bit 6 tells the new format, with the tag in six bits, from the old, in four."""
    if not data or not data[0] & 0x80:
        return False
    return (data[0] & 0x3F if data[0] & 0x40 else (data[0] & 0x3C) >> 2) in _PGP_ENCRYPTED_TAGS


# --- S/MIME (RFC 8551 3.3, 3.4)


def _is_smime(raw: Bytes, body: int, fields: list[Field]) -> bool:
    encodings = [value.lower() for value in values(fields, "content-transfer-encoding")]
    content = memoryview(raw)[body:]
    if encodings == [b"binary"]:
        return _is_cms(bytes(content[:_CMS_HEAD]), len(content), bytes(content[-2:]))
    if encodings != [b"base64"]:
        return False
    text = bytes(content).translate(None, _WHITE)
    if len(text) % 4 or text.rstrip(b"=").translate(None, _BASE64):     # a footer after the base64 text is clear text
        return False
    try:
        head, tail = pybase64.b64decode(text[:_CMS_HEAD], validate=True), pybase64.b64decode(text[-4:], validate=True)
    except ValueError:
        return False
    if len(text) >= 8:
        tail = pybase64.b64decode(text[-8:-4], validate=True) + tail
    return _is_cms(head, len(text) // 4 * 3 - (len(text) - len(text.rstrip(b"="))), tail[-2:])


def _is_cms(head: bytes, size: int, tail: bytes) -> bool:
    """ContentInfo ::= SEQUENCE { contentType OID, content [0] }: the type by its OID, and the SEQUENCE is all there is."""
    if len(head) < 2 or head[0] != 0x30:
        return False
    if head[1] == 0x80:             # BER, indefinite length, as streaming writers do: ends with two zero bytes
        offset, complete = 2, tail == b"\0\0"
    elif head[1] < 0x80:
        offset, complete = 2, 2 + head[1] == size
    else:
        count = head[1] & 0x7F
        offset = 2 + count
        complete = count <= 8 and offset + int.from_bytes(head[2:offset], "big") == size
    return complete and head.startswith(_CMS_ENCRYPTED, offset)


# --- MLT1 (docs/format.md 4.2)


def _is_malote(raw: bytes, fields: list[Field], body: int) -> bool:
    """Byte for byte what `core.seal` writes: its own fields, the note, key blobs and one sealed part that belong together."""
    if not _is_outer(fields):
        return False
    try:
        found = parts.find_parts(raw)
    except Unreadable:
        return False
    if found is None or len(found.payloads) != 1 or not found.blobs:    # whatever else there is, `_is_written` sees
        return False
    payload = found.payloads[0].raw
    try:
        eid = parse_header(payload).eid
        if any(parse_key_blob(blob.raw).eid != eid for blob in found.blobs):
            return False
    except Unreadable:
        return False
    match = _MLT_TYPE.fullmatch(values(fields, "content-type")[0])
    return match is not None and _is_written(raw, body, match[1], [(blob.kid, blob.raw) for blob in found.blobs], payload)


def _is_outer(fields: list[Field]) -> bool:
    """Only fields that outer headers have, each once, with nothing more in them: no subject, no display name, no words."""
    names = [field.name for field in fields if field.name != "received"]
    if len(set(names)) != len(names) or not _OUTER_REQUIRED.issubset(names):
        return False
    return all(_is_outer_value(field.name, unfold(field.raw_value)) for field in fields if field.name != "received")


def _is_outer_value(name: str, value: bytes) -> bool:
    if name not in _OUTER_ADDRESSES:
        return name in _OUTER_VALUES and _OUTER_VALUES[name].fullmatch(value) is not None
    try:
        return ", ".join(parse_mailboxes(value)).encode() == value
    except FormatError:
        return False


def _is_written(raw: bytes, body: int, boundary: bytes, blobs: list[tuple[str, bytes]], payload: bytes) -> bool:
    """Whether the body, from its first byte to its last, is these parts in the one form in which they are written."""
    delimiter = b"--" + boundary + b"\r\n"
    pieces: list[bytes] = [
        delimiter, b"Content-Type: text/plain; charset=us-ascii\r\nContent-Transfer-Encoding: 7bit\r\n\r\n", NOTE,
    ]
    for number, (kid, blob) in enumerate(blobs, 1):
        parameter = f"; kid={kid}" if kid else ""
        pieces += [delimiter, _part_header(parts.KEY_BLOB_TYPE + parameter, f"key-{number}.mlk")]
        pieces += [*base64_lines(blob, 76, b"\r\n"), b"\r\n"]
    pieces += [delimiter, _part_header(parts.SEALED_TYPE, "message.mlp"), *base64_lines(payload, 76, b"\r\n")]
    pieces.append(b"\r\n--" + boundary + b"--\r\n")
    for piece in pieces:
        if not raw.startswith(piece, body):
            return False
        body += len(piece)
    return body == len(raw)


def _part_header(media_type: str, filename: str) -> bytes:
    return (
        f"Content-Type: {media_type}\r\nContent-Transfer-Encoding: base64\r\n"
        f'Content-Disposition: attachment; filename="{filename}"\r\n\r\n'
    ).encode("ascii")
