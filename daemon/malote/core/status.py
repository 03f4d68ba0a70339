"""The headers in which we say what was found, and their removal from everything that others wrote (docs/threat-model.md, 5).

`Malote-Verdict` carries an HMAC under the account's key over the verdict, all that is shown with it, the message below and the
trace fields above, so that what we delivered, sent in again, is not taken for ours: it has come another way;
`Authentication-Results` (RFC 8601) an authserv-id with 128 bits that nobody outside knows. A message that arrives with either, or
with Malote-Mark, Malote-Seal or Malote-Gateway (gateway_word.py), and is not one that we delivered unchanged, is a forgery.
Nested headers are data and stay.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from malote.core.freshness import UNPROVEN, Judgement, Verdict
from malote.core.message import Bytes, fold_field, unfold
from malote.core.primitives import equal, hmac_sha256, sha512
from malote.errors import FormatError

_MAC_LABEL = b"MLT1 verdict\0"
MAX_SENTENCE = 2000         # characters shown in the header; the longest sentence with two addresses of 320 is below 1,200
MAX_WORD = 900              # bytes of an escaped word of it: fits a line of LINE_LIMIT with what stands around it
_PIECE = 90                 # characters of a longer one that stay together: ten bytes each at most

# A field of ours at the start of a line of the header. As readers do, also with space or a fold before the colon (RFC 5322 4.5),
# in any case, and after a bare CR, which some readers take for a line end.
_STATUS = re.compile(
    rb"(?:\A|(?<=[\r\n]))(malote-(?:verdict|seal|mark|gateway)|authentication-results)(?:[ \t]|\r?\n[ \t])*:", re.IGNORECASE
)
_FIELD_END = re.compile(rb"\n(?![ \t])|\Z")
_HEADER_END = re.compile(rb"(?:\A|\n)(?=\r?\n)")
_NOISE = re.compile(rb'[\s"\\]')
_REST = rb"[^\n]*(?:\n[ \t][^\n]*)*"       # of a field: its value with its folds
_BLOCK = re.compile(
    rb"malote-verdict:(%b)\nmalote-mark:(%b)\nauthentication-results:(%b)\n" % (_REST, _REST, _REST), re.IGNORECASE
)
VALUE = re.compile(
    rb'([A-Z-]+); notes=([A-Z,-]*); text="(?:[ !#-\[\]-~]|\\u\{[0-9a-f]+\})*"; '
    rb"mark=([!-:<-~]+); by=([a-z0-9.-]+); mac=([0-9a-f]{64})"
)
_TOKEN = re.compile(r"[!-:<-~]+")
_AUTHSERV_ID = re.compile(r"[a-z0-9.-]+")
_BAD_TRACE = re.compile(rb"\r(?!\n)|\0")
_UNSAFE = re.compile(r'[^ -~]|["\\]')

# RFC 8601 2.7: what is not proven is a fail, what is proven but perhaps not new is neutral
_RESULTS = {Verdict.FRESH: "pass", Verdict.UNKNOWN_SENDER: "none", Verdict.UNREADABLE: "permerror"}


def message_hash(content: Bytes, received: Sequence[bytes] = ()) -> bytes:
    """SHA-512 of what stands above and below our headers, with every CRLF as LF: mail servers change line ends, nothing else."""
    return _hash(_trace(received), joint(content))


def _hash(above: bytes, below: bytes) -> bytes:
    return sha512(above.replace(b"\r\n", b"\n"), b"\0", below.replace(b"\r\n", b"\n"))     # no NUL in a trace field


def _trace(received: Sequence[bytes]) -> bytes:
    """The outer Received lines. One with a bare CR or NUL is left out: some reader would see another field in it."""
    return b"".join([raw if raw.endswith(b"\n") else raw + b"\r\n" for raw in received if not _BAD_TRACE.search(raw)])


def make_verdict_header(
    mac_key: bytes, judgement: Judgement, message_sha512: bytes, *, text: str, mark: str, authserv_id: str,
) -> bytes:
    """The Malote-Verdict field, folded, with its line end. `message_sha512` comes from `message_hash`; `text` is the sentence.

    Raises `ValueError` for a mark or authserv-id that is not a plain word.
    """
    if not _TOKEN.fullmatch(mark) or not _AUTHSERV_ID.fullmatch(authserv_id):
        raise ValueError("a mark and an authserv-id are single words")
    said = (
        f'{judgement.verdict}; notes={",".join(judgement.notes)}; text="{_escape(text)}"; mark={mark}; by={authserv_id}'
    ).encode("ascii")
    mac = _mac(mac_key, said, message_sha512)
    return fold_field("Malote-Verdict", (said + b"; mac=" + mac.hex().encode()).decode("ascii").split(" "))


def check_verdict_header(mac_key: bytes, value: bytes, message_sha512: bytes) -> bool:
    """Whether the value of a Malote-Verdict field was made with this key for this message."""
    value = unfold(value)
    if VALUE.fullmatch(value) is None:
        return False
    said, _, mac = value.rpartition(b"; mac=")
    return equal(_mac(mac_key, said, message_sha512), bytes.fromhex(mac.decode("ascii")))


def make_headers(
    mac_key: bytes, authserv_id: str, judgement: Judgement, text: str, mark: str, content: Bytes, received: Sequence[bytes],
) -> bytes:
    """All our headers for the opened `content` (already without forged ones) below these Received lines: Malote-Verdict,
    Malote-Mark, and Authentication-Results."""
    verdict = make_verdict_header(
        mac_key, judgement, message_hash(content, received), text=text, mark=mark, authserv_id=authserv_id,
    )
    results = fold_field("Authentication-Results", results_of(judgement.verdict, authserv_id))
    return verdict + fold_field("Malote-Mark", [mark]) + results


def results_of(verdict: Verdict, authserv_id: str) -> list[str]:
    result = _RESULTS.get(verdict, "fail" if verdict in UNPROVEN else "neutral")
    return [f"{authserv_id};", f"x-malote={result}", f"reason={verdict}"]


def deliverable(content: bytes, received: Sequence[bytes], headers: bytes) -> bytes:
    """What is delivered: the outer Received lines, our headers, and the content as it is."""
    return b"".join([_trace(received), headers, joint(content)])


def delivered_content(raw: bytes) -> bytes:
    """The content of a message that we delivered; any other message is its own content."""
    block = find_block(raw)
    return raw if block is None else raw[block.end():]


def check_delivered(mac_key: bytes, raw: bytes) -> bool:
    """Whether `raw` is a message as we delivered it: our three headers, which say the same, between the trace and the content
    that they were made for, and no other status field below. What was sent in again has more trace, and is not."""
    block = find_block(raw)
    if block is None:
        return False
    content = raw[block.end():]
    value = unfold(block[1])
    said = VALUE.fullmatch(value)
    if said is None or not check_verdict_header(mac_key, value, _hash(raw[:block.start()], content)):
        return False
    authserv_id = said[4].decode("ascii")
    if unfold(block[2]) != said[3] or carries_status(content, authserv_id):
        return False
    try:
        verdict = Verdict(said[1].decode("ascii"))
    except ValueError:
        return False
    return unfold(block[3]) == " ".join(results_of(verdict, authserv_id)).encode("ascii")


def strip_forged(raw: bytes, authserv_id: str) -> bytes:
    """`raw` without the fields at its top level that only we may write. The body and every other byte stay."""
    spans = list(_forged(raw, authserv_id))
    if not spans:
        return raw
    kept: list[memoryview] = []
    view, position = memoryview(raw), 0
    for start, end in spans:
        kept.append(view[position:start])
        position = end
    kept.append(view[position:])
    return b"".join(kept)


def carries_status(raw: bytes, authserv_id: str) -> bool:
    """Whether a message (or its header alone) has a field at its top level that only we may write."""
    return next(_forged(raw, authserv_id), None) is not None


def _forged(raw: bytes, authserv_id: str) -> Iterator[tuple[int, int]]:
    """Where such fields lie. Looks at the whole header, however long: a limit would be a place to hide behind."""
    found = _HEADER_END.search(raw)
    header_end = found.end() if found is not None else len(raw)
    name = authserv_id.lower().encode("ascii")
    position = harmless_until = 0
    while hit := _STATUS.search(raw, position, header_end):
        start, position = hit.span()
        results = hit[1].lower() == b"authentication-results"
        if results and start < harmless_until:      # within one that was looked at as a whole: linear time
            continue
        end = _field_end(raw, position, header_end)
        if results and name not in _NOISE.sub(b"", raw[position:end]).lower():
            harmless_until = end
            continue
        position = end
        if start and raw[start - 1:start] == b"\r":
            start -= 1
            if start and raw[start - 1:start] != b"\n":     # inside a field: its line end stays, or the next would join it
                end -= 2 if raw[end - 2:end] == b"\r\n" else int(raw[end - 1:end] == b"\n")
        yield start, end


def _field_end(raw: bytes, start: int, header_end: int) -> int:
    found = _FIELD_END.search(raw, start, header_end)
    return found.end() if found is not None else header_end


def find_block(raw: bytes) -> re.Match[bytes] | None:
    """Our headers: the first Malote-Verdict at the top level, and right below it the two others."""
    found = _HEADER_END.search(raw)
    header_end = found.end() if found is not None else len(raw)
    position = 0
    while hit := _STATUS.search(raw, position, header_end):
        if hit[1].lower() == b"malote-verdict":
            return _BLOCK.match(raw, hit.start(), header_end)
        position = hit.end()
    return None


def _mac(key: bytes, said: bytes, message_sha512: bytes) -> bytes:
    if len(message_sha512) != 64:
        raise FormatError("a message hash has 64 bytes")
    return hmac_sha256(key, _MAC_LABEL, message_sha512, said)


def joint(content: Bytes) -> bytes:
    """Content that begins in the middle of a field would continue our last header: an empty line makes it text instead."""
    data = content if isinstance(content, bytes) else bytes(content)
    return b"\r\n" + data if data[:1] in (b" ", b"\t") else data


def _escape(text: str) -> str:
    """One line of printable ASCII: what else there is, quotes and backslashes as `\\u{hex}`; words that fit no line in pieces."""
    words = " ".join(text.split())[:MAX_SENTENCE].split(" ")
    return " ".join(piece for word in words for piece in _escaped_word(word))


def _escaped_word(word: str) -> list[str]:
    escaped = _escaped(word)
    if len(escaped) <= MAX_WORD:
        return [escaped]
    return [_escaped(word[at:at + _PIECE]) for at in range(0, len(word), _PIECE)]


def _escaped(text: str) -> str:
    return _UNSAFE.sub(lambda hit: f"\\u{{{ord(hit.group()):x}}}", text)
