"""Carrying base64 bodies in binary, so that a sealed message is about as large as the plain one (docs/format.md 7).

The folded body is a table of spans and the spans' bytes: literal bytes, or binary that is written out again as base64 lines
of one width and one line end. The opener needs no MIME for it: the table alone says what the original was. The sealer looks
for base64 bodies by a plain scan; what it found is checked by unfolding the whole and comparing, so a wrong guess can only
cost the saving, never a byte.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import lru_cache
from io import BytesIO

import pybase64

from malote.errors import Unreadable

MAX_SPANS = 2048            # 1,023 attachments: far above real mail; bounds the table before anything is authenticated
MAX_SIZE = 2**32 - 1        # bytes of an original; spans count in u32, and no mail system carries more
MIN_FOLDED_TEXT = 1024      # base64 text shorter than this saves less than it costs to look at
MAX_WIDTH = 252             # characters a line; a multiple of 4 that fits u8. Mail programs write 60, 64, 72 or 76

_HEADER_REACH = 2 * 1024    # a part's header ends within this many bytes of its `base64`, else the body is not looked at
_MAX_LOOKS = 10_000         # occurrences of the word looked at: more is no mail that folding is for
_BLOCK_LINES = 1024         # lines encoded at once: about 80 KiB, stays in the cache, bounds temporary memory

_COUNT = struct.Struct(">I")
_SPAN = struct.Struct(">BBI")       # kind, width, n (docs/format.md 7.1)
MAX_TABLE_BYTES = _COUNT.size + MAX_SPANS * _SPAN.size
_BASE64, _LF, _FINAL = 1, 2, 4      # bits of `kind`; 0 is a literal span
_BASE64_KINDS = frozenset({1, 3, 5, 7})


_MIME_WIDTH = 76        # of the lines that `pybase64.encodebytes` makes (RFC 2045 6.8)


@lru_cache(maxsize=64)
def _line_splitter(width: int) -> struct.Struct:
    return struct.Struct(f"{width}s" * _BLOCK_LINES)


def base64_lines(data: bytes | memoryview, width: int, line_end: bytes) -> Iterator[bytes]:
    """Base64 text of `data` in lines of `width` characters, as pieces to be joined; no line end after the last line."""
    view = memoryview(data)
    block = width // 4 * 3 * _BLOCK_LINES
    splitter = _line_splitter(width)
    position = 0
    while position + block <= len(view):
        yield line_end.join(splitter.unpack(pybase64.b64encode(view[position:position + block])))
        position += block
        if position < len(view):
            yield line_end
    if width == _MIME_WIDTH:
        yield pybase64.encodebytes(view[position:]).removesuffix(b"\n").replace(b"\n", line_end)
        return
    rest = pybase64.b64encode(view[position:])
    yield line_end.join([rest[at:at + width] for at in range(0, len(rest), width)])


def fold(original: bytes) -> bytes | None:
    """The folded form of `original`, or None where folding saves nothing. `unfold` of it is known to give `original` back."""
    if len(original) > MAX_SIZE:
        return None
    table: list[bytes] = []
    content: list[bytes | memoryview] = []
    view = memoryview(original)
    done = 0                    # bytes of the original that the table covers
    for start, end in _base64_bodies(original):
        span = _fold_body(original, start, end)
        if span is None:
            continue
        header, binary = span
        if start > done:
            table.append(_SPAN.pack(0, 0, start - done))
            content.append(view[done:start])
        table.append(header)
        content.extend(binary)
        done = end
        if len(table) > MAX_SPANS - 3:
            break
    if not table:
        return None
    if done < len(original):
        table.append(_SPAN.pack(0, 0, len(original) - done))
        content.append(view[done:])
    folded = b"".join([_COUNT.pack(len(table)), *table, *content])
    del content
    return folded if len(folded) < len(original) and _unfolds_to(folded, view) else None


def _unfolds_to(folded: bytes, original: memoryview) -> bool:
    position = 0
    for piece in _unfold(folded, len(original)):
        end = position + len(piece)
        if original[position:end] != piece:
            return False
        position = end
    return position == len(original)


def _base64_bodies(original: bytes) -> list[tuple[int, int]]:
    """Where base64 bodies may be, as (start, end), in order, not overlapping. One pass: each byte is looked at a few times."""
    found: list[tuple[int, int]] = []
    for word in (b"base64", b"BASE64", b"Base64"):
        position = original.find(word)
        for _ in range(_MAX_LOOKS):
            if position < 0:
                break
            following = position + len(word)
            if _is_encoding_field(original, position):
                start, following = _body_after(original, position)
                if following - start >= MIN_FOLDED_TEXT:
                    found.append((start, following))
            position = original.find(word, following)
    found.sort()
    last = 0
    apart: list[tuple[int, int]] = []
    for start, end in found:
        if start >= last:
            apart.append((start, end))
            last = end
    return apart


def _is_encoding_field(original: bytes, position: int) -> bool:
    before = original[max(0, position - 64):position]
    return before.lower().rstrip(b" \t").endswith(b"content-transfer-encoding:")


def _body_after(original: bytes, position: int) -> tuple[int, int]:
    """The body whose header holds `position`: after the empty line, up to the next empty line, `-` or the end.

    Without an empty line in reach: an empty range at the reach, so that no byte is looked at again and again.
    """
    reach = position + _HEADER_REACH
    ends = [at + len(mark) for mark in (b"\r\n\r\n", b"\n\n") if (at := original.find(mark, position, reach)) >= 0]
    if not ends:
        return reach, reach
    start = min(ends)
    dash = original.find(b"-", start)       # not in the base64 alphabet, and in front of every boundary
    end = len(original) if dash < 0 else dash
    for line_end in (b"\r\n", b"\n"):
        empty = original.find(line_end * 2, start, end)
        if empty >= 0:
            end = empty + len(line_end)
    return start, end


def _fold_body(original: bytes, start: int, end: int) -> tuple[bytes, list[bytes]] | None:
    """The span of one body, or None where its lines are not exactly what `base64_lines` writes."""
    newline = original.find(b"\n", start, min(end, start + MAX_WIDTH + 2))
    if newline < 0:
        return None
    line_end = b"\r\n" if original[newline - 1:newline] == b"\r" else b"\n"
    width = newline + 1 - len(line_end) - start
    if width % 4 or not 4 <= width <= MAX_WIDTH:
        return None
    kind = _BASE64 | (_LF if line_end == b"\n" else 0)
    if original.startswith(line_end, end - len(line_end)):
        kind |= _FINAL
        end -= len(line_end)
    binary: list[bytes] = []
    step = (width + len(line_end)) * _BLOCK_LINES
    for at in range(start, end, step):
        stop = min(at + step, end)
        text = original[at:stop]
        try:
            data = pybase64.b64decode(text.translate(None, b"\r\n"), validate=True)
        except ValueError:
            return None
        if b"".join(base64_lines(data, width, line_end)) + (line_end if stop < end else b"") != text:
            return None
        if stop < end and len(data) % 3:        # padding inside a body: several texts in a row
            return None
        binary.append(data)
    return _SPAN.pack(kind, width, sum(map(len, binary))), binary


def unfold(folded: bytes | memoryview, size: int) -> bytes:
    """The original of `size` bytes. Raises `Unreadable` for a table that does not follow docs/format.md 7 exactly."""
    original = BytesIO()        # grows in place: joining a list of pieces would hold everything twice
    for piece in _unfold(folded, size):
        original.write(piece)
    return original.getvalue()


def _unfold(folded: bytes | memoryview, size: int) -> Iterator[bytes | memoryview]:
    """The original in pieces, after the whole table was checked: nothing is written out that does not end at `size`."""
    view = memoryview(folded)
    if len(view) < _COUNT.size:
        raise Unreadable("fold failure: no table")
    (count,) = _COUNT.unpack_from(view)
    position = _COUNT.size + count * _SPAN.size
    if not 1 <= count <= MAX_SPANS or position > len(view):
        raise Unreadable("fold failure: number of spans")
    spans = list(_SPAN.iter_unpack(view[_COUNT.size:position]))
    if sum(n for _, _, n in spans) != len(view) - position:
        raise Unreadable("fold failure: spans do not consume their input")
    if sum(_span_size(kind, width, n) for kind, width, n in spans) != size:
        raise Unreadable("fold failure: spans do not give the size")
    for kind, width, n in spans:
        data = view[position:position + n]
        position += n
        if kind == 0:
            yield data
            continue
        line_end = b"\n" if kind & _LF else b"\r\n"
        yield from base64_lines(data, width, line_end)
        if kind & _FINAL:
            yield line_end


def _span_size(kind: int, width: int, n: int) -> int:
    """Bytes that a span gives. Raises `Unreadable` for a span that no sealer may write."""
    if n == 0:
        raise Unreadable("fold failure: empty span")
    if kind == 0:
        if width:
            raise Unreadable("fold failure: literal span with a width")
        return n
    if kind not in _BASE64_KINDS or width % 4 or not 4 <= width <= MAX_WIDTH:
        raise Unreadable("fold failure: unknown span")
    text = (n + 2) // 3 * 4
    line_ends = (text + width - 1) // width - (0 if kind & _FINAL else 1)
    return text + line_ends * (1 if kind & _LF else 2)
