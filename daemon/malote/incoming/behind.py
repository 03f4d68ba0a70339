"""A mailbox behind a gateway: what the gateway has opened, and whether its word is to be taken for this copy.

That the gateway said it, for this mailbox, and of this content, its mac says (`core.gateway_word`). That this is not a repeat of
something it said once, only memory can: each of its messages is written down at the first look, with all bytes of the copy. The
same bytes again were moved here by the person, or renumbered by the server; other bytes under the same mark are a repeat. What
comes for the first time and may be older than our memory is believed only where the mail server's own date says that it came
when the gateway opened it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from malote.config import AccountConfig
from malote.core.freshness import QUARANTINED, Arrival, Claim, FreshnessLimits, Verdict
from malote.core.primitives import sha256, sha512
from malote.incoming.mailbox import Folder
from malote.incoming.opening import Kind, Letter
from malote.incoming.outcomes import Outcomes
from malote.incoming.session import Session
from malote.store import FolderState, Store

FIRST_LOOK = "\n(gateways)"     # in the place of a folder, which cannot have this name: when its mail was first asked about
_SENDER = "gateway"             # in the place of a sender's address


@dataclass(frozen=True, slots=True)
class Refused:
    """One that goes to quarantine, and as what."""

    letter: Letter
    verdict: str


class Behind:
    """For one account."""

    def __init__(self, account: AccountConfig, *, store: Store, outcomes: Outcomes, limits: FreshnessLimits,
                 clock: Callable[[], int]) -> None:
        self._account = account
        self._store = store
        self._outcomes = outcomes
        self._limits = limits
        self._clock = clock
        self._first_ms = 0

    async def decide(self, session: Session, folder: Folder, letters: Sequence[Letter], *, at_work: bool) -> list[Refused]:
        """Those of these that do not stay where they are. `at_work`: this is news, no look at all there is."""
        refused: list[Refused] = []
        known: set[bytes] = set()
        for letter in letters:
            verdict = ""
            if letter.kind is Kind.GATEWAY:
                verdict = await self._refusal(session, folder, letter, known, at_work=at_work)
            refused += [Refused(letter, verdict)] if verdict else []
        return refused

    async def _refusal(self, session: Session, folder: Folder, letter: Letter, known: set[bytes], *, at_work: bool) -> str:
        """As what it goes to quarantine; "": it stays."""
        word = letter.word
        assert word is not None     # noqa: S101 -- what such a letter is
        claim = claim_of(letter, self._account.name)
        if not word.proven:         # by a key that is trusted no more: what was proven once stays
            row = await self._store.remembered(self._account.name, claim.payload_key)
            kept = row is not None and row.verdict is not Verdict.CONFLICT and self._is_believed(letter, row.verdict, 0)
            return "" if kept else "FORGED"
        if word.verdict in QUARANTINED:
            return str(word.verdict)
        first_ms = await self.first_look()
        stored = await self._store.record_foreign(claim, Arrival(self._clock(), letter.fetched.internal_date_ms), self._limits)
        verdict = stored.judgement.verdict
        if verdict is Verdict.DUPLICATE and stored.judgement.first is not None:
            verdict = stored.judgement.first.verdict
            if claim.payload_key in known or (at_work and await self._is_beside(session, folder, letter)):
                return str(Verdict.DUPLICATE)
        if verdict is Verdict.CONFLICT:     # now, or when these bytes were here before: another copy came first
            return str(Verdict.DUPLICATE)
        known.add(claim.payload_key)
        if not self._is_believed(letter, verdict, first_ms):
            return str(verdict if verdict is not Verdict.FRESH else Verdict.UNVERIFIABLE)
        if stored.first:
            self._outcomes.note(letter, "opened by gateway", str(word.verdict), detail=word.gateway)
        return ""

    def _is_believed(self, letter: Letter, verdict: Verdict, first_ms: int) -> bool:
        word = letter.word
        assert word is not None     # noqa: S101 -- what such a letter is
        if verdict is Verdict.FRESH and word.opened_ms > first_ms:
            return True
        return abs(letter.fetched.internal_date_ms - word.opened_ms) <= self._limits.skew_ms

    async def first_look(self) -> int:
        """When this account was first asked about such mail: what was opened before may have been here, and deleted."""
        if not self._first_ms:
            known = await self._store.folder_state(self._account.name, FIRST_LOOK)
            if known is None:
                known = FolderState(1, 0, self._clock())
                await self._store.set_folder_state(self._account.name, FIRST_LOOK, known)
            self._first_ms = known.last_sync_ms
        return self._first_ms

    async def _is_beside(self, session: Session, folder: Folder, letter: Letter) -> bool:
        """Whether the very same copy lies in this folder twice: whoever put the later one there is no mail server."""
        assert letter.word is not None      # noqa: S101 -- what such a letter is
        await session.enter(folder)
        for uid in await session.box.search(f'UID 1:{letter.uid} HEADER Malote-Mark "{letter.word.mark}"'):
            other = await session.box.fetch(uid) if uid < letter.uid else None
            if other is not None and _plain(other.raw) == _plain(letter.fetched.raw):
                return True
        return False


def claim_of(letter: Letter, recipient: str) -> Claim:
    """What is remembered of a copy. All that are of the same message have its id, whoever put them there; what tells them apart
    is everything else in them, the trace on top above all."""
    word = letter.word
    assert word is not None     # noqa: S101 -- what such a letter is
    mark, whole = sha256(word.mark.encode()), sha512(_plain(letter.fetched.raw))
    return Claim(
        recipient=recipient, sender=_SENDER, manifest_id=mark[:16], skid=sha256(b"MLT1 gateway"), stream=mark[16:24],
        serial=int.from_bytes(mark[24:]), prev=0, sent_at_ms=word.opened_ms, expires_at_ms=None,
        payload_digest=sha256(b"MLT1 gateway copy\0", whole), original_sha512=whole, signature="valid", addressed=True)


def _plain(raw: bytes) -> bytes:
    return raw.replace(b"\r\n", b"\n")
