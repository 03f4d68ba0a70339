"""Which messages of a folder can be sealed, or pretend to come from us; and what other devices have opened already.

A mailbox of 50,000 messages is searched by its server. What is looked at here are headers and the first bytes of attachments
of those that are left; whole messages are fetched only when something of ours was seen in them.
"""

from __future__ import annotations

import binascii
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from malote.core.parts import looks_sealed
from malote.core.status import carries_status
from malote.incoming.imap_fetch import HEADER_BYTES
from malote.incoming.imap_parse import Part
from malote.incoming.mailbox import Mailbox

PEEK_ALL = 200                  # new messages whose headers are all read here; for more, the server's search is trusted
MIN_SEALED_BYTES = 6_000        # one key blob and the smallest padded container (4 KiB) in base64 are about 7,300
MIN_PART_BYTES = 1_200          # a key blob is 1,222 bytes in binary, 1,670 in base64
PEEK_BYTES = 128                # of an attachment: 8 bytes of magic in any encoding, after a few blank lines
MAX_PEEKED_PARTS = 4            # of one message; ours has at least two that count, wherever a gateway has put them
STATUS_FIELDS = ("Malote-Verdict", "Malote-Mark", "Malote-Seal", "Malote-Gateway")

_UNLIKELY = ("text/", "image/", "audio/", "video/", "message/", "font/")


@dataclass(frozen=True, slots=True)
class Candidates:
    """UIDs that are worth fetching, ascending; `top`: everything up to there was looked at."""

    uids: tuple[int, ...]
    top: int


async def find_candidates(box: Mailbox, after: int, *, skip: set[int], authserv_ids: Sequence[str]) -> Candidates:
    """What is new in the selected folder above UID `after` and may concern us. `skip`: copies that we put there ourselves."""
    above = await box.search_after(after)
    top = above[-1] if above else after
    new = [uid for uid in above if uid not in skip]
    if not new:
        return Candidates((), top)
    if len(new) <= PEEK_ALL:
        named, mixed = await _peek(box, new, authserv_ids)
    else:
        span = f"UID {after + 1}:{new[-1]}"
        named = set(await box.search(f"{span} {_named(authserv_ids)}"))
        mixed = set(await box.search(f'{span} LARGER {MIN_SEALED_BYTES} HEADER Content-Type "multipart/"')) - named
    rewritten = await _find_rewritten(box, sorted(mixed - skip))
    return Candidates(tuple(sorted((named - skip) | rewritten)), top)


def _named(authserv_ids: Sequence[str]) -> str:
    """Criteria for a header of ours, true or forged."""
    keys = [f'HEADER {name} ""' for name in ("Malote", *STATUS_FIELDS)]
    keys += [f'HEADER Authentication-Results "{name}"' for name in authserv_ids]
    return "OR " * (len(keys) - 1) + " ".join(keys)


async def _peek(box: Mailbox, uids: Sequence[int], authserv_ids: Sequence[str]) -> tuple[set[int], set[int]]:
    """By the headers themselves, which also finds what a server's search reads differently from us."""
    named: set[int] = set()
    mixed: set[int] = set()
    for peeked in await box.peek_headers(uids):
        header = b"\n" + peeked.header.lower()
        # behind what is read of a header there may be anything: such a message is fetched whole
        cut_short = len(peeked.header) >= HEADER_BYTES
        if cut_short or b"\nmalote" in header or any(carries_status(peeked.header, name) for name in authserv_ids):
            named.add(peeked.uid)
        elif peeked.size >= MIN_SEALED_BYTES and b"multipart/" in header:
            mixed.add(peeked.uid)
    return named, mixed


async def _find_rewritten(box: Mailbox, uids: Sequence[int]) -> set[int]:
    """Those with an attachment that starts like a part of ours, whatever became of headers, names and types."""
    wanted: list[tuple[int, str]] = []
    encodings: dict[tuple[int, str], str] = {}
    for uid, parts in (await box.peek_structure(uids)).items() if uids else ():
        for part in likely_parts(parts):
            wanted.append((uid, part.section))
            encodings[uid, part.section] = part.encoding
    found = await box.peek_parts(wanted, PEEK_BYTES) if wanted else {}
    return {uid for (uid, section), head in found.items() if starts_like_ours(head, encodings[uid, section])}


def likely_parts(parts: Iterable[Part]) -> list[Part]:
    """The leaves to look into: at least two that can be a key blob and a sealed part, else none."""
    likely = [part for part in parts if part.size >= MIN_PART_BYTES and not part.media_type.startswith(_UNLIKELY)]
    return likely[:MAX_PEEKED_PARTS] if len(likely) >= 2 else []


def starts_like_ours(head: bytes, encoding: str) -> bool:
    return looks_sealed(binascii.a2b_qp(head) if encoding == "quoted-printable" else head)
