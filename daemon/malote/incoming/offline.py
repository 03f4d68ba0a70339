"""Opening sealed mail without a watcher: one message, a Maildir, an mbox, or an IMAP folder. Nothing is changed anywhere.

Whoever leaves malote keeps all mail readable. What the store remembers of a message is shown as its verdict; of any other it
cannot be said whether it is a repeat, so the best verdict here is UNVERIFIABLE.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from malote.core.card import Card
from malote.core.freshness import Arrival, Claim, FreshnessLimits, SeenState, Verdict, decide_verdict, sentence
from malote.core.identity import Identity
from malote.core.open import OuterDifference, authenticate, unseal
from malote.core.parts import find_parts
from malote.errors import FormatError, Unreadable
from malote.incoming.mailbox import Fetched, Mailbox
from malote.incoming.opening import card_of, find_cards
from malote.incoming.scan import find_candidates
from malote.store import Store

_NEVER_KNOWN = SeenState(distrust_before_ms=2**63)


@dataclass(frozen=True, slots=True)
class OpenedOffline:
    """One sealed message. `original` is None if it could not be opened; `text` says for people what there is to say."""

    original: bytes | None = field(repr=False)
    verdict: Verdict
    text: str
    remembered: bool = False        # the verdict is the one of the store, from when the message was delivered
    reason: str = ""                # why it could not be opened, for the person at the terminal
    sender: str = ""
    message_id: str = ""            # manifest id, hex
    sent_at_ms: int = 0
    outer_differences: tuple[OuterDifference, ...] = ()     # outer fields that did not arrive as they were sent; no verdict

    def as_json(self) -> dict[str, Any]:
        return {"verdict": str(self.verdict), "text": self.text, "remembered": self.remembered, "reason": self.reason,
                "sender": self.sender, "id": self.message_id, "sent_at_ms": self.sent_at_ms,
                "outer_differences": [asdict(difference) for difference in self.outer_differences]}


async def open_offline(raw: bytes, identities: Sequence[Identity], store: Store | None, *, now_ms: int,
                       accounts: Iterable[str] = (), limits: FreshnessLimits | None = None) -> OpenedOffline:
    """Open one message with any of these identities. `accounts`: under which names the store may remember it.

    Raises `FormatError` if nothing sealed is in `raw`; what cannot be opened is a result with the verdict UNREADABLE.
    """
    keys = [(identity.address, key) for identity in identities for key in identity.decryption]
    try:
        found = find_parts(raw)
        if found is None:
            raise FormatError("there is nothing sealed in this message")
        unsealed = unseal(found, keys)
    except Unreadable as error:
        return OpenedOffline(None, Verdict.UNREADABLE, sentence(Verdict.UNREADABLE, None), reason=error.reason)
    cards: dict[str, Card] = await find_cards(store, {unsealed.sender}) if store is not None else {}
    cards |= {identity.address: identity.card for identity in identities}
    opened = authenticate(unsealed, card_of(unsealed.sender, cards))
    claim = opened.claim(unsealed.recipient)
    verdict, text, remembered = await _judge(claim, store, accounts, now_ms, limits or FreshnessLimits())
    return OpenedOffline(opened.original, verdict, text, remembered, sender=claim.sender, message_id=claim.manifest_id.hex(),
                         sent_at_ms=claim.sent_at_ms, outer_differences=() if unsealed.forwarded else opened.outer_differences)


async def _judge(claim: Claim, store: Store | None, accounts: Iterable[str], now_ms: int,
                 limits: FreshnessLimits) -> tuple[Verdict, str, bool]:
    for account in accounts if store is not None else ():
        row = await store.remembered(account, claim.payload_key)     # type: ignore[union-attr]
        if row is not None:
            return row.verdict, sentence(row.verdict, claim, arrived_ms=row.first_ms, notes=row.notes), True
    # when it arrived is not known here, so nothing is said of its delay; but it cannot be from after now
    arrival = Arrival(min(now_ms, claim.sent_at_ms) if claim.sent_at_ms <= now_ms + limits.skew_ms else now_ms)
    judgement = decide_verdict(claim, arrival, _NEVER_KNOWN, limits)
    return judgement.verdict, sentence(judgement.verdict, claim, arrived_ms=arrival.now_ms, notes=judgement.notes), False


# --- where messages come from: (name for people, bytes) ---

def maildir_messages(directory: Path) -> Iterator[tuple[str, bytes]]:
    """The messages of a Maildir and of the folders inside it (Maildir++). Raises `FormatError` if it is none."""
    if not (directory / "cur").is_dir() or not (directory / "new").is_dir():
        raise FormatError(f"{directory} is not a Maildir: it has no cur and new")
    folders = [directory, *sorted(path for path in directory.iterdir() if (path / "cur").is_dir() and path.name not in _PARTS)]
    for folder in folders:
        for part in ("cur", "new"):
            for path in sorted((folder / part).iterdir()):
                if path.is_file():
                    yield str(path.relative_to(directory)), path.read_bytes()


def mbox_messages(path: Path) -> Iterator[tuple[str, bytes]]:
    """The messages of an mbox file, one at a time (RFC 4155; lines quoted as `>From ` are given back as `From `)."""
    number = 0
    lines: list[bytes] = []
    empty = True
    with path.open("rb") as file:
        for line in file:
            if empty and line.startswith(b"From "):
                if number:
                    yield f"{path.name}:{number}", _mbox_message(lines)
                number += 1
                lines = []
            elif number == 0 and line.strip():
                raise FormatError(f"{path} is not an mbox file: it does not begin with a From line")
            else:
                lines.append(line[1:] if line.startswith(b">") and line.lstrip(b">").startswith(b"From ") else line)
            empty = not line.strip(b"\r\n")
    if number:
        yield f"{path.name}:{number}", _mbox_message(lines)


async def folder_messages(box: Mailbox, folder: str) -> AsyncIterator[tuple[str, Fetched]]:
    """The messages of an IMAP folder that can be sealed; the folder is opened for reading only."""
    await box.select(folder, read_only=True)
    candidates = await find_candidates(box, 0, skip=set(), authserv_ids=())
    if candidates.uids:
        async for fetched in box.fetch_many(candidates.uids):
            yield f"{folder}:{fetched.uid}", fetched


_PARTS = frozenset({"cur", "new", "tmp"})


def _mbox_message(lines: list[bytes]) -> bytes:
    if lines and not lines[-1].strip(b"\r\n"):      # the empty line belongs to the next From line
        lines = lines[:-1]
    return b"".join(lines)
