"""The last look at the bytes that are about to leave: are they a sealed message, and nothing else?

Written from docs/format.md 4.2 alone. It takes no value and no line of code from those who made the message (`core.seal`,
`core.outer`): it knows what was decided, works out by itself what the message must look like, and refuses every other byte. So
a fault anywhere before it, of whatever kind, ends as a refusal and not as text on the wire.

Where bytes are left that nobody can foresee (they are random), each is held to a form that holds no text: SECURITY is in
docs/threat-model.md, "The last check".
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import format_datetime
from functools import lru_cache
from hashlib import sha256

import pybase64

from malote.errors import NotProven

WIDTH = 78                      # RFC 5322 2.1.1: where outer fields are folded
LINE, LINE_AND_END = 76, 78     # base64 characters of a line (RFC 2045 6.8); with CRLF
BLOCK = 1024 * LINE_AND_END     # bytes looked at at once: fits the cache, and a large message is never held twice
VERSION_SUITE = b"\x01\x00\x01"                                         # docs/format.md 3.1
SEALED_HEAD = b"\x89MLP\r\n\x1a\n" + VERSION_SUITE + b"\0"              # magic, VS, flags (6.1)
HEADER_BYTES, CHUNK_BYTES, TAG_BYTES = 68, 16384, 16                    # 6.1
BLOB_HEAD = b"\x89MLK\r\n\x1a\n" + VERSION_SUITE                        # 5.1
BLOB_BYTES, BLOB_TYPE_AND_LENGTH = 1222, b"\x01\x04\xa8"
MAX_RECIPIENTS = 100                                                    # 4.2
MIN_CONTAINER_BYTES = 4096                                              # 6.2
MAX_TRACE_BYTES, MAX_TRACE_WORD = 4000, 900                             # 4.3

NOTE = (
    b"Content-Type: text/plain; charset=us-ascii\r\nContent-Transfer-Encoding: 7bit\r\n\r\n"
    b"This message is sealed. Its text, subject and attachments are in the parts\r\n"
    b"attached here, encrypted for its recipients by malote.\r\n"
    b"\r\n"
    b"If you read this, the message has not been opened yet: start malote on the\r\n"
    b"computer where your keys are, or save this message and use `malote open`.\r\n"
)
_PART = (b"--%b\r\nContent-Type: application/vnd.malote.%b\r\nContent-Transfer-Encoding: base64\r\n"
         b'Content-Disposition: attachment; filename="%b"\r\n\r\n')
_FOLDED = rb"([^\r\n]+(?:\r\n [^\r\n]+)*)\r\n"
_HEAD = re.compile(
    rb"From: ([^\r\n]+)\r\n(?:To: " + _FOLDED + rb")?(?:Cc: " + _FOLDED + rb")?Subject: \[\.\.\.\]\r\nDate: ([^\r\n]+)\r\n"
    rb"Message-ID: <([0-9a-f]{32})@([^\r\n<>@ ]+)>\r\n"
    rb"(?:In-Reply-To: " + _FOLDED + rb")?(?:References: " + _FOLDED + rb")?"
    rb"(?:Auto-Submitted: (?:no|auto-generated|auto-replied|auto-notified)\r\n)?"
    rb'MIME-Version: 1\.0\r\nContent-Type: multipart/mixed; boundary="(=_mlt_[A-Za-z0-9_-]{22})"\r\nMalote: 1\r\n\r\n'
)
# one address of a list: a quoted local part may hold anything, also a comma
_LISTED = re.compile(r'((?:"(?:[^"\\]|\\.)*"|[^", ])+)(?:, |\Z)')
_OWN_TRACE = re.compile(
    rb"Received: by [!-'*-:<-~]{1,255} \(malote\) with [A-Z0-9]{1,12};\r\n "
    rb"[A-Z][a-z]{2}, \d\d [A-Z][a-z]{2} \d{4} \d\d:\d\d:\d\d \+0000\r\n"
)
_TRACE = re.compile(rb"received[ \t\r\v\f]*:([^\n]*(?:\n[ \t][^\n]*)*)", re.IGNORECASE)
_UNFOLD = re.compile(rb"\r?\n(?=[ \t])")
_MARKS = re.compile(rb'\\.|["()]', re.DOTALL)
# RFC 5321 4.4, in lower case: the clause begins with the word and ends before the date or the next clause
_FOR = re.compile(rb"for(?<![a-z0-9.@+-]for)(?![a-z0-9.@+-])")
_CLAUSE = re.compile(rb";|(?<=[ \t\r\n])(?:from|by|via|with|id)[ \t\r\n]")
_WORD_FOR = re.compile(rb"\bfor\b")
_NOT_PRINTABLE = re.compile("[^ -~]")
_PRINTABLE = bytes(range(32, 127))
# Of 512 random bytes, 322 are not printable ASCII, give or take 11; of 512 bytes of text or JSON, hardly one. Below 200 it is
# no ciphertext; that random bytes come that low is less likely than 2^-80.
_SAMPLE_BYTES, _SAMPLE_NOT_PRINTABLE = 512, 200


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


def check_sealed(raw: bytes, facts: Facts) -> None:
    """Raises `NotProven` unless `raw` is, from its first byte to its last, the sealed message that the facts describe.

    The text of the error says which piece is wrong, and nothing of what stands there.
    """
    if type(raw) is not bytes:      # nothing that may change after this look, or that only behaves like bytes
        raise NotProven("no bytes")
    position = _check_trace(raw, facts)
    head = _HEAD.match(raw, position)
    if head is None:
        raise NotProven("outer header")
    _check_header(head, facts)
    _check_body(raw, head.end(), head[9], facts.kids, facts.payload)


def _check_header(head: re.Match[bytes], facts: Facts) -> None:
    sender, to, cc, date, unique, domain, in_reply_to, references, _ = head.groups()
    if sender != facts.sender.encode():
        raise NotProven("From")
    if to is not None:
        _check_addresses("To", to, facts.shown)
    if cc is not None:
        _check_addresses("Cc", cc, facts.shown)
    if date != _date(facts.sent_at_ms // 1000):
        raise NotProven("Date")
    if domain != facts.sender.rpartition("@")[2].encode() or f"<{unique.decode()}@{domain.decode()}>" == facts.message_id:
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
    if text in shown:
        return
    found = _LISTED.findall(text.replace("\r\n ", " "))
    words = [f"{address}," for address in found[:-1]] + found[-1:]
    if not shown.issuperset(found) or len(set(found)) != len(found) or _folded(name, words) != value:
        raise NotProven(name)


def _check_ids(name: str, value: bytes, known: Collection[str]) -> None:
    words = value.decode("ascii", "replace").replace("\r\n ", " ").split(" ")
    if not all(word in known for word in words) or _folded(name, words) != value:
        raise NotProven(name)


def _folded(name: str, words: Sequence[str]) -> bytes:
    """The value of a field, folded before the word that would end beyond `WIDTH`."""
    out: list[str] = []
    column = len(name) + 1
    for word in words:
        if out and column + 1 + len(word) > WIDTH:
            out.append("\r\n ")
            column = 0
        elif out:
            out.append(" ")
        column += 1 + len(word)
        out.append(word)
    return "".join(out).encode("utf-8", "surrogatepass")


# --- Received: ours, and those of the original without whoever they were for


def _check_trace(raw: bytes, facts: Facts) -> int:
    """Where the fields after Received begin."""
    position = 0
    if facts.received:
        position = _check_line(raw, 0, _own_trace(facts.received))
    for value in _traces(facts.original):
        position = _check_line(raw, position, _trace(value))
    return position


def _check_line(raw: bytes, position: int, line: bytes) -> int:
    if not raw.startswith(line, position):
        raise NotProven("Received")
    return position + len(line)


@lru_cache(maxsize=8)       # of this second
def _own_trace(received: bytes) -> bytes:
    if not _OWN_TRACE.fullmatch(received):
        raise NotProven("our Received")
    return _trace(received.partition(b":")[2])


def _traces(original: bytes) -> Iterator[bytes]:
    """The values of the top-level Received fields, as they stand."""
    header = original[:_header_end(original)]
    lower = b"\n" + header.lower()
    at = lower.find(b"\nreceived")
    while at >= 0:
        found = _TRACE.match(header, at)
        if found is not None:
            yield found[1]
        at = lower.find(b"\nreceived", at + 1)


def _header_end(original: bytes) -> int:
    if original.startswith((b"\r\n", b"\n")):
        return 0
    end = original.find(b"\n\r\n")
    other = original.find(b"\n\n", 0, end if end >= 0 else len(original))
    ends = [at + 1 for at in (end, other) if at >= 0]
    return min(ends, default=len(original))


def _trace(value: bytes) -> bytes:
    """The whole line for the value of a Received field: without its `for` clause, without comments that name somebody."""
    value = _UNFOLD.sub(b"", value).strip(b" \t\r\n")[:MAX_TRACE_BYTES]
    kept, shadow = _without_comments(value)
    clause = _FOR.search(shadow)
    if clause is not None:
        pieces: list[bytes] = []
        position = 0
        while clause is not None:
            pieces.append(kept[position:clause.start()])
            end = _CLAUSE.search(shadow, clause.end())
            position = end.start() if end is not None else len(shadow)
            clause = _FOR.search(shadow, position)
        kept = b"".join([*pieces, kept[position:]])
    text = kept.replace(b"\t", b" ").decode("latin-1")
    if not (text.isascii() and text.isprintable()):
        text = _NOT_PRINTABLE.sub("?", text)
    words = [word[:MAX_TRACE_WORD] for word in text.split(" ") if word]
    return b"Received: " + _folded("Received", words or ["(removed)"]) + b"\r\n"


def _without_comments(value: bytes) -> tuple[bytes, bytes]:
    """The value without comments that hold an address or the word "for"; and the same in lower case, with other comments and what
    is in quotes blotted out, for nothing in them is a clause (RFC 5322 3.2.2, 3.2.4). What is not closed reaches to the end."""
    lower = value.lower()
    kept: list[bytes] = []
    shadow: list[bytes] = []
    depth = position = 0
    quoted = False
    for mark in _MARKS.finditer(value):
        sign = mark[0]
        if depth:
            depth += (sign == b"(") - (sign == b")")
            if depth:
                continue
            end, piece = mark.end(), lower[position:mark.end()]
            if b"@" not in piece and not (b"for" in piece and _WORD_FOR.search(piece)):
                kept.append(value[position:end])
                shadow.append(b" " * len(piece))
        elif quoted and sign == b'"':
            quoted, end = False, mark.end()
            kept.append(value[position:end])
            shadow.append(b"_" * (end - position))
        elif not quoted and sign in b'("':
            depth, quoted, end = int(sign == b"("), sign == b'"', mark.start()
            kept.append(value[position:end])
            shadow.append(lower[position:end])
        else:
            continue
        position = end
    rest = lower[position:]
    if not (depth and (b"@" in rest or _WORD_FOR.search(rest))):
        kept.append(value[position:])
        shadow.append(b" " * len(rest) if depth else b"_" * len(rest) if quoted else rest)
    return b"".join(kept), b"".join(shadow)


# --- the body


def _check_body(raw: bytes, position: int, boundary: bytes, kids: Sequence[str], payload: Buffer | None) -> None:
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
    head = _PART % (boundary, b"sealed", b"message.mlp")
    end = b"--%b--\r\n" % boundary
    if not raw.startswith(head, position):
        raise NotProven("number of key blobs, or head of the sealed part")
    if not raw.endswith(end):
        raise NotProven("end")
    _check_payload(raw, position + len(head), len(raw) - len(end), eids, payload)


def _check_blob(raw: bytes, position: int, boundary: bytes, number: int, kid: str, eids: set[bytes]) -> int:
    head = _PART % (boundary, b"key-blob; kid=%b" % kid.encode() if kid else b"key-blob", b"key-%d.mlk" % number)
    if not raw.startswith(head, position):
        raise NotProven("head of a key blob")
    position += len(head)
    blob = _binary(raw[position:position + _BLOB_TEXT_BYTES], last=True)
    if len(blob) != BLOB_BYTES or not blob.startswith(BLOB_HEAD) or blob[27:30] != BLOB_TYPE_AND_LENGTH or _is_text(blob[30:]):
        raise NotProven("key blob")
    eids.add(blob[11:27])
    return position + _BLOB_TEXT_BYTES


_BLOB_TEXT_BYTES = 1632 + 22 * 2        # 1222 bytes are 1632 characters, in 22 lines


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
        if _is_text(data[len(SEALED_HEAD):]):
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


def _is_text(data: bytes) -> bool:
    """Whether this cannot be ciphertext. Says yes to text, and to zeros; no to what is already compressed."""
    sample = data[:_SAMPLE_BYTES]
    return len(sample) == _SAMPLE_BYTES and not (
        len(sample.translate(None, _PRINTABLE)) >= _SAMPLE_NOT_PRINTABLE and sample.count(0) < _SAMPLE_BYTES // 4)


# --- what is said to be encrypted already

_ADDRESS = rb'(?:"(?:[^"\\\r\n]|\\.)*"|[^\s"<>(),;:@]+)@[^\s"<>(),;@]+'
_IDS = rb"<[^\s<>]+>(?: <[^\s<>]+>)*"
_OUTER_FIELD = re.compile(
    rb"received[ \t]*:.*|(?:from|to|cc)[ \t]*:[ \t]*%b(?:, %b)*|subject[ \t]*:[ \t]*\[\.\.\.\]|"
    rb"date[ \t]*:[ \t]*[a-z]{3}, \d\d [a-z]{3} \d{4} \d\d:\d\d:\d\d \+0000|"
    rb"(?:message-id|in-reply-to|references)[ \t]*:[ \t]*%b|auto-submitted[ \t]*:[ \t]*[a-z-]+|"
    rb"mime-version[ \t]*:[ \t]*1\.0|malote[ \t]*:[ \t]*1|"
    rb'content-type[ \t]*:[ \t]*multipart/mixed; boundary="=_mlt_[a-z0-9_-]{22}"' % (_ADDRESS, _ADDRESS, _IDS),
    re.IGNORECASE | re.DOTALL)
_BOUNDARY = re.compile(rb'multipart/mixed; boundary="(=_mlt_[A-Za-z0-9_-]{22})"[ \t]*\Z')
_ENCRYPTED = re.compile(rb"(?:multipart/encrypted|application/(?:x-)?pkcs7-mime)[ \t]*;", re.IGNORECASE)
_BLOB_KID = re.compile(
    rb"--=_mlt_[A-Za-z0-9_-]{22}\r\nContent-Type: application/vnd\.malote\.key-blob(?:; kid=([0-9a-f]{16}))?\r\n")


def check_covered(original: bytes) -> None:
    """Raises `NotProven` unless `original`, which leaves as it is, is of a kind that is encrypted: sealed by malote, and then
    nothing but the parts of that; or OpenPGP or S/MIME by its type (what is in those, `core.encrypted` has looked at)."""
    end = _header_end(original)
    lines = [_UNFOLD.sub(b"", line).strip(b" \t\r\n") for line in re.split(rb"\n(?![ \t])", original[:end])]
    fields = [line for line in lines if line]
    types = [line.partition(b":")[2].strip() for line in fields if line.lower().startswith(b"content-type")]
    if len(types) != 1:
        raise NotProven("type of what is said to be encrypted")
    boundary = _BOUNDARY.match(types[0])
    if boundary is None:
        if _ENCRYPTED.match(types[0]) is None:
            raise NotProven("type of what is said to be encrypted")
        return
    if not all(map(_OUTER_FIELD.fullmatch, fields)):
        raise NotProven("header of what is said to be sealed")
    start = end + 2         # the empty line
    position = start + len(boundary[1]) + 4 + len(NOTE)
    kids: list[str] = []
    while (blob := _BLOB_KID.match(original, position)) is not None and len(kids) <= MAX_RECIPIENTS:
        kid = (blob[1] or b"").decode()
        head = _PART % (boundary[1], b"key-blob; kid=%b" % blob[1] if kid else b"key-blob", b"key-%d.mlk" % (len(kids) + 1))
        kids.append(kid)
        position += len(head) + _BLOB_TEXT_BYTES
    _check_body(original, start, boundary[1], kids, None)
