"""The last look at the bytes that are about to leave: are they a sealed message, and nothing else?

Written from docs/format.md 4.2 alone. It takes no value and no line of code from those who made the message (`core.seal`,
`core.outer`): it knows what was decided, works out by itself what the message must look like, and refuses every other byte. So
a fault anywhere before it, of whatever kind, ends as a refusal and not as text on the wire.

Where bytes are left that nobody can foresee (they are random), each is held to a form that holds no text; what remains is in
docs/threat-model.md 7.1.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import format_datetime
from functools import lru_cache
from hashlib import sha256

import pybase64

from malote.core.proof_trace import check_trace, folded
from malote.errors import NotProven

LINE, LINE_AND_END = 76, 78     # base64 characters of a line (RFC 2045 6.8); with CRLF
BLOCK = 1024 * LINE_AND_END     # bytes looked at at once: fits the cache, and a large message is never held twice
VERSION_SUITE = b"\x01\x00\x01"                                         # docs/format.md 3.1
SEALED_HEAD = b"\x89MLP\r\n\x1a\n" + VERSION_SUITE + b"\0"              # magic, VS, flags (6.1)
HEADER_BYTES, CHUNK_BYTES, TAG_BYTES = 68, 16384, 16                    # 6.1
BLOB_HEAD = b"\x89MLK\r\n\x1a\n" + VERSION_SUITE                        # 5.1
BLOB_BYTES, BLOB_TYPE_AND_LENGTH = 1222, b"\x01\x04\xa8"
MAX_RECIPIENTS = 100                                                    # 4.2
MIN_CONTAINER_BYTES = 4096                                              # 6.2

NOTE = (
    b"Content-Type: text/plain; charset=us-ascii\r\nContent-Transfer-Encoding: 7bit\r\n\r\n"
    b"This message is sealed. Its text, subject and attachments are in the parts\r\n"
    b"attached here, encrypted for its recipients by malote.\r\n"
    b"\r\n"
    b"If you read this, the message has not been opened yet: start malote on the\r\n"
    b"computer where your keys are, or save this message and use `malote open`.\r\n"
)
PART = (b"--%b\r\nContent-Type: application/vnd.malote.%b\r\nContent-Transfer-Encoding: base64\r\n"
         b'Content-Disposition: attachment; filename="%b"\r\n\r\n')
_FOLDED = rb"([^\r\n]+(?:\r\n [^\r\n]+)*)\r\n"
_HEAD = re.compile(
    rb"From: ([^\r\n]+)\r\n(?:To: " + _FOLDED + rb")?(?:Cc: " + _FOLDED + rb")?Subject: \[\.\.\.\]\r\nDate: ([^\r\n]+)\r\n"
    rb"Message-ID: <([0-9a-f]{32})@([^\r\n<>@ ]+)>\r\n"
    rb"(?:In-Reply-To: " + _FOLDED + rb")?(?:References: " + _FOLDED + rb")?"
    rb"(?:Auto-Submitted: (?:no|auto-generated|auto-replied|auto-notified)\r\n)?"
)
_MIME = re.compile(
    rb'MIME-Version: 1\.0\r\nContent-Type: multipart/mixed; boundary="(=_mlt_[A-Za-z0-9_-]{22})"\r\nMalote: 1\r\n\r\n'
)
# one address of a list: a quoted local part may hold anything, also a comma
_LISTED = re.compile(r'((?:"(?:[^"\\]|\\.)*"|[^", ])+)(?:, |\Z)')
# what the reader of addresses may give, whatever it was given: no text with blanks but in quotes
_ADDRESS = re.compile(r'(?:"(?:[^"\\\r\n]|\\.)*"|[^\s"<>(),;:@]+)@[^\s"<>(),;@]+')
_ID = re.compile(r"<[^\s<>]+>")
_PRINTABLE = bytes(range(32, 127))
# Of 512 random bytes, 322 are not printable ASCII, give or take 11; of 512 bytes of text or JSON, hardly one. Below 200 it is
# no ciphertext; that random bytes come that low is less likely than 2^-80.
_SAMPLE_BYTES, _SAMPLE_NOT_PRINTABLE = 512, 200
_STRIDE = 4096          # from one sample to the next: each chunk is looked at, not only the first


Buffer = bytes | bytearray


@dataclass(frozen=True, slots=True)
class Facts:
    """What was decided about one sealed copy, and what it was decided about."""

    sender: str                         # From, canonical
    shown: frozenset[str]               # canonical addresses that To and Cc may name
    sent_at_ms: int
    received: bytes                     # our own Received line; empty: none
    original: bytes = field(repr=False)
    message_id: str                     # the original's own, which must not be seen outside
    outer_ids: Collection[str]          # of the thread, that the outside has seen
    kids: tuple[str, ...]               # one for each blob, in order; "": not shown
    payload: bytes | bytearray = field(repr=False)      # the sealed part in binary, as the sealer has it: a second witness
    outer_id: str = ""                  # Message-ID of this copy, as its maker has it; "": not known


def check_sealed(raw: bytes, facts: Facts) -> None:
    """Raises `NotProven` unless `raw` is, from its first byte to its last, the sealed message that the facts describe.

    The text of the error says which piece is wrong, and nothing of what stands there.
    """
    if type(raw) is not bytes:      # nothing that may change after this look, or that only behaves like bytes
        raise NotProven("no bytes")
    position = check_header(raw, 0, facts)
    head = _MIME.match(raw, position)
    if head is None:
        raise NotProven("end of the outer header")
    check_body(raw, head.end(), head[1], facts.kids, facts.payload)


def check_header(raw: bytes, position: int, facts: Facts) -> int:
    """Where the outer header, which begins at `position`, ends: before MIME-Version. Raises `NotProven`."""
    head = _HEAD.match(raw, check_trace(raw, position, facts.received, facts.original))
    if head is None:
        raise NotProven("outer header")
    _check_header(head, facts)
    return head.end()


def _check_header(head: re.Match[bytes], facts: Facts) -> None:
    sender, to, cc, date, unique, domain, in_reply_to, references = head.groups()
    if sender != facts.sender.encode():
        raise NotProven("From")
    if to is not None:
        _check_addresses("To", to, facts.shown)
    if cc is not None:
        _check_addresses("Cc", cc, facts.shown)
    if date != _date(facts.sent_at_ms // 1000):
        raise NotProven("Date")
    outer_id = f"<{unique.decode()}@{domain.decode()}>"
    if (domain != facts.sender.rpartition("@")[2].encode() or outer_id == facts.message_id
            or (facts.outer_id and outer_id != facts.outer_id)):
        raise NotProven("Message-ID")
    if in_reply_to is not None:
        _check_ids("In-Reply-To", in_reply_to, facts.outer_ids)
    if references is not None:
        _check_ids("References", references, facts.outer_ids)


@lru_cache(maxsize=8)
def _date(second: int) -> bytes:
    return format_datetime(datetime.fromtimestamp(second, UTC)).encode()


def _check_addresses(name: str, value: bytes, shown: frozenset[str]) -> None:
    """Addresses that the original shows, each once, written in the one way in which they are written."""
    try:
        text = value.decode()
    except UnicodeDecodeError:
        raise NotProven(name) from None
    if text in shown and _ADDRESS.fullmatch(text):
        return
    found = _LISTED.findall(text.replace("\r\n ", " "))
    words = [f"{address}," for address in found[:-1]] + found[-1:]
    if (
        not shown.issuperset(found) or len(set(found)) != len(found) or folded(name, words) != value
        or not all(map(_ADDRESS.fullmatch, found))
    ):
        raise NotProven(name)


def _check_ids(name: str, value: bytes, known: Collection[str]) -> None:
    words = value.decode("ascii", "replace").replace("\r\n ", " ").split(" ")
    if not all(word in known and _ID.fullmatch(word) for word in words) or folded(name, words) != value:
        raise NotProven(name)


# --- the body


def check_body(raw: bytes, position: int, boundary: bytes, kids: Sequence[str], payload: Buffer | None) -> None:
    """From the first boundary to the last byte. `payload` None: somebody else sealed it, and only the form is known."""
    if not 1 <= len(kids) <= MAX_RECIPIENTS:
        raise NotProven("number of recipients")
    note = b"--%b\r\n%b" % (boundary, NOTE)
    if not raw.startswith(note, position):
        raise NotProven("note")
    position += len(note)
    eids: set[bytes] = set()
    for number, kid in enumerate(kids, 1):
        position = _check_blob(raw, position, boundary, number, kid, eids)
    head = PART % (boundary, b"sealed", b"message.mlp")
    end = b"--%b--\r\n" % boundary
    if not raw.startswith(head, position):
        raise NotProven("number of key blobs, or head of the sealed part")
    if not raw.endswith(end):
        raise NotProven("end")
    _check_payload(raw, position + len(head), len(raw) - len(end), eids, payload)


def _check_blob(raw: bytes, position: int, boundary: bytes, number: int, kid: str, eids: set[bytes]) -> int:
    head = PART % (boundary, b"key-blob; kid=%b" % kid.encode() if kid else b"key-blob", b"key-%d.mlk" % number)
    if not raw.startswith(head, position):
        raise NotProven("head of a key blob")
    position += len(head)
    blob = _binary(raw[position:position + BLOB_TEXT_BYTES], last=True)
    if len(blob) != BLOB_BYTES or not blob.startswith(BLOB_HEAD) or blob[27:30] != BLOB_TYPE_AND_LENGTH or _is_text(blob, 30) or (
            _is_text(blob, BLOB_BYTES - _SAMPLE_BYTES)):
        raise NotProven("key blob")
    eids.add(blob[11:27])
    return position + BLOB_TEXT_BYTES


BLOB_TEXT_BYTES = 1632 + 22 * 2        # 1222 bytes are 1632 characters, in 22 lines


def _check_payload(raw: bytes, start: int, end: int, eids: set[bytes], payload: Buffer | None) -> None:
    """The sealed part: header H, of the key blobs before it; ciphertext of a length that padding gives; the bytes that were
    sealed. A block at a time."""
    size = 0
    for at in range(start, end, BLOCK):
        stop = min(at + BLOCK, end)
        data = _binary(raw[at:stop], last=stop == end)
        if not size and (
            not data.startswith(SEALED_HEAD) or len(data) < HEADER_BYTES
            or eids != {sha256(b"MLT1 eid" + data[:HEADER_BYTES]).digest()[:16]}
        ):
            raise NotProven("header of the sealed part")
        if any(_is_text(data, where) for where in range(0 if size else len(SEALED_HEAD), len(data), _STRIDE)):
            raise NotProven("sealed part is no ciphertext")
        if payload is not None and not payload.startswith(data, size):
            raise NotProven("sealed part is not the one that was made")
        size += len(data)
    if not _is_padded(size) or (payload is not None and size != len(payload)):
        raise NotProven("length of the sealed part")


def _is_padded(size: int) -> bool:
    """Whether a sealed part of that many bytes holds a container of a length that Padmé gives (docs/format.md 6.1, 6.2)."""
    chunks, rest = divmod(size - HEADER_BYTES, CHUNK_BYTES + TAG_BYTES)
    if chunks < 0 or rest < TAG_BYTES:
        return False
    container = chunks * CHUNK_BYTES + rest - TAG_BYTES
    if container < MIN_CONTAINER_BYTES:
        return False
    exponent = container.bit_length() - 1
    return not container % (1 << (exponent - exponent.bit_length()))


def _binary(text: bytes, *, last: bool) -> bytes:
    """What these lines of base64 say. Raises `NotProven` for any other way to say the same: another width or line end, a byte
    beside the alphabet, padding inside, spare bits that are not zero."""
    lines, rest = divmod(len(text), LINE_AND_END)
    characters = lines * LINE + max(0, rest - 2)
    if (
        (rest and (rest < 6 or not last)) or characters % 4 or not text.endswith(b"\r\n")
        or text[LINE::LINE_AND_END] != b"\r" * lines or text[LINE + 1::LINE_AND_END] != b"\n" * lines
    ):
        raise NotProven("lines of base64")
    packed = text.translate(None, b"\r\n")
    try:
        data = pybase64.b64decode(packed, validate=True)
    except ValueError:
        raise NotProven("base64") from None
    if len(packed) != characters:
        raise NotProven("lines of base64")
    if packed.endswith(b"=") and (not last or pybase64.b64encode(data[len(data) // 3 * 3:]) != packed[-4:]):
        raise NotProven("end of base64")
    return data


def _is_text(data: bytes, where: int) -> bool:
    """Whether what is there cannot be ciphertext. Says yes to text, and to zeros; no to what is already compressed."""
    sample = data[where:where + _SAMPLE_BYTES]
    return len(sample) == _SAMPLE_BYTES and not (
        len(sample.translate(None, _PRINTABLE)) >= _SAMPLE_NOT_PRINTABLE and sample.count(0) < _SAMPLE_BYTES // 4)
