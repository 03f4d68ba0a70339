"""The copy that its reader gets: the original, below the trace and our headers. Watcher and gateway share it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from malote.core import status
from malote.core.freshness import Judgement, sentence
from malote.core.gateway_word import make_word
from malote.core.message import header_fields
from malote.core.open import Opened
from malote.errors import FormatError
from malote.incoming.account import AccountKeys, Mark
from malote.incoming.opening import gateway_notes


@dataclass(frozen=True, slots=True)
class Frame:
    """What stands above the content besides the judgement."""

    keys: AccountKeys
    mark: Mark
    recipient: str              # as the sentence calls him
    trace: Sequence[bytes]      # Received lines, newest first
    arrived_ms: int
    gateway: str = ""           # whose word it is, where it is a gateway's
    masters: tuple[bytes, ...] = ()     # its keys for the watchers behind it


def opened_copy(opened: Opened, judgement: Judgement, frame: Frame, form: Callable[[bytes], bytes]) -> bytes:
    """`form` gives the original the form that its way to the reader can carry."""
    original = opened.original
    for name in frame.keys.authserv_ids:
        original = status.strip_forged(original, name)
    return framed(form(original), opened, judgement, frame)


def framed(content: bytes, opened: Opened, judgement: Judgement, frame: Frame) -> bytes:
    """The content, which bears no header of ours, below the trace and our headers."""
    keys = frame.keys
    notes = (*judgement.notes, *gateway_notes(opened, keys))
    text = sentence(judgement.verdict, opened.claim(frame.recipient), arrived_ms=frame.arrived_ms, notes=notes,
                    first=judgement.first)
    if frame.gateway:
        text = f"{frame.gateway} says: {text}"
    headers = status.make_headers(keys.mac_key, keys.authserv_id, replace(judgement, notes=notes), text, str(frame.mark), content,
                                  frame.trace)
    if frame.masters:
        headers = make_word(frame.masters, frame.gateway, frame.recipient, frame.arrived_ms, headers, content) + headers
    return status.deliverable(content, frame.trace, headers)


def received_lines(raw: bytes) -> list[bytes]:
    """The Received fields at the top level of the sealed message: how it came here."""
    try:
        return [field.raw for field in header_fields(raw) if field.name == "received"]
    except FormatError:
        return []
