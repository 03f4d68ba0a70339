"""Judges one opened message against what is remembered: is it new, a repeat, late, out of order?

Pure: `decide_verdict` gets the claim (what the message says, with how far it is proven), its arrival, and the rows that the
store found; it returns what to show, what to write down and where the message goes. docs/format.md 10 is the rule.

What the store does, in one transaction:

1. look up, for `claim.recipient`: the row with the same `claim.payload_key`; the row of the same (sender, id), first one whose
   `original_sha512` is equal and that `may_be_same`, else the one that *holds* the id; the row that holds (skid, stream, serial);
2. call `decide_verdict`; 3. when `judgement.record`, insert a row with `delivered = no`, filled from the claim. It *holds* the id
   and the serial (takes part in the two unique keys, as non-NULL columns) only as `holds_id` and `holds_serial` say: a message
   whose sender is not proven must never block the number of a genuine one. The payload key is unique per recipient;
4. when not, `judgement.row_id` is the row that counts, and delivery marks that one.
A clash on insert means that another writer was first: look up again and decide again.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Literal

from malote.core.primitives import sha256

SignatureState = Literal["valid", "unknown-sender", "bad", "revoked"]

DAY_MS = 86_400_000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Verdict(StrEnum):
    FRESH = "FRESH"                     # proven, new, in time
    DUPLICATE = "DUPLICATE"             # the same message was delivered before
    LATE = "LATE"                       # too long under way: held back, or a repeat from before our memory
    UNVERIFIABLE = "UNVERIFIABLE"       # sent before we could know: state lost, new installation, first contact
    CONFLICT = "CONFLICT"               # same id, other content
    SERIAL_REUSED = "SERIAL-REUSED"     # same number, other id: the sender's program was restored or copied
    FUTURE = "FUTURE"                   # signed time after arrival by more than the clocks may differ
    EXPIRED = "EXPIRED"                 # the sender's own "do not act on this after" has passed
    UNSIGNED = "UNSIGNED"               # the signature is not that of the card we hold
    UNKNOWN_SENDER = "UNKNOWN-SENDER"   # we hold no card for the sender
    REVOKED = "REVOKED"                 # signed with a key that was revoked
    NOT_FOR_ME = "NOT-FOR-ME"           # signed, but not for this recipient: passed on by somebody
    UNREADABLE = "UNREADABLE"           # cannot be opened


GAP = "GAP"                         # note: the message that the sender numbered just before has not arrived
FIRST_SEEN = "FIRST-SEEN"           # note: first message of this numbering, but not number one of it
SERVER_CLOCK = "SERVER-CLOCK"       # note: in time only by the mail server's own clock
FROM_MISMATCH = "FROM-MISMATCH"     # note: signed by somebody else than the From header names
FROM_GATEWAY = "FROM-GATEWAY"       # note: the gateway of the sender's domain signed it, not the sender
TO_GATEWAY = "TO-GATEWAY"           # note: opened with the key of the recipient's gateway, not his own
AGAIN = "AGAIN"                     # note: an earlier delivery was interrupted, and may have been completed

# What says that the sender is who the card says, and addressed this recipient. Rows of other verdicts hold no number.
UNPROVEN = frozenset({Verdict.UNSIGNED, Verdict.UNKNOWN_SENDER, Verdict.REVOKED, Verdict.NOT_FOR_ME, Verdict.UNREADABLE})
QUARANTINED = frozenset({Verdict.DUPLICATE, Verdict.CONFLICT})
_SIGNATURE_VERDICTS: dict[SignatureState, Verdict] = {
    "unknown-sender": Verdict.UNKNOWN_SENDER, "bad": Verdict.UNSIGNED, "revoked": Verdict.REVOKED,
}


@dataclass(frozen=True, slots=True)
class Claim:
    """What one opened message says of itself. Only with `signature == "valid"` is it the sender who says so."""

    recipient: str                  # canonical address: the account, or the envelope recipient at the listener
    sender: str                     # manifest `from`
    manifest_id: bytes              # 16 bytes
    skid: bytes                     # 32 bytes, key id of the signature
    stream: bytes                   # 8 bytes, from our own blob
    serial: int
    prev: int                       # serial that the upstream accepted before this one, 0: none
    sent_at_ms: int
    expires_at_ms: int | None
    payload_digest: bytes           # SHA-256 of the sealed part
    original_sha512: bytes
    signature: SignatureState
    addressed: bool                 # our blob is in the signed list of recipients, with one of our addresses
    from_matches: bool = True       # the From header of the original is the signer

    @property
    def proven(self) -> bool:
        """The sender is who the card says, and wrote to this recipient."""
        return self.signature == "valid" and self.addressed and self.from_matches

    @property
    def payload_key(self) -> bytes:
        """Under which the sealed bytes are remembered. With a blob that the sender did not make they are another message: whoever
        shares the session key can put such a blob on the genuine bytes, and must not make the genuine message a repeat."""
        return self.payload_digest if self.addressed else sha256(b"not addressed\0", self.payload_digest)


@dataclass(frozen=True, slots=True)
class Arrival:
    """When it came. At the listener arrival is now: both others None."""

    now_ms: int
    internal_date_ms: int | None = None     # the mail server's word
    last_sync_ms: int | None = None         # our own: the message was not there then


@dataclass(frozen=True, slots=True)
class SeenRow:
    """One remembered message."""

    row_id: int
    manifest_id: bytes
    payload_digest: bytes           # the `payload_key` of its claim
    original_sha512: bytes
    verdict: Verdict
    notes: tuple[str, ...]
    delivered: bool
    holds_id: bool
    first_ms: int                   # when it was judged


@dataclass(frozen=True, slots=True)
class SeenState:
    """What the store found for one claim; see the module's text for which rows."""

    same_payload: SeenRow | None = None
    same_id: SeenRow | None = None
    same_serial: SeenRow | None = None
    prev_seen: bool = False             # the serial `claim.prev` of this stream is held by a row
    stream_known: bool = False          # any serial of this (recipient, skid, stream) is held by a row
    distrust_before_ms: int = 0         # sent at or before this: we cannot know whether it is a repeat


@dataclass(frozen=True, slots=True)
class FreshnessLimits:
    late_ms: int = 7 * DAY_MS       # RFC 5321 4.5.4.1: senders give up after 4-5 days, so 7 is late for honest mail
    skew_ms: int = 600_000          # ten minutes between two clocks


@dataclass(frozen=True, slots=True)
class Judgement:
    verdict: Verdict
    notes: tuple[str, ...] = ()
    record: bool = True             # a new row is to be inserted
    deliver: bool = True            # the opened copy goes where the account says
    quarantine: bool = False        # it goes to the quarantine instead; never both
    holds_id: bool = False
    holds_serial: bool = False
    row_id: int | None = None       # not recorded: the row that stands for it
    first: SeenRow | None = None    # DUPLICATE, CONFLICT, SERIAL-REUSED: the message that was there before


UNREADABLE = Judgement(Verdict.UNREADABLE, record=False, deliver=False)     # the original stays where it is, marked


def decide_verdict(claim: Claim, arrival: Arrival, seen: SeenState, limits: FreshnessLimits) -> Judgement:
    """The judgement of a message that was opened. Same content as a row: that row decides, whatever is proven now."""
    same = _same_content(claim, seen)
    if same is not None:
        return _repeat(claim, same)
    if claim.signature != "valid":
        return Judgement(_SIGNATURE_VERDICTS[claim.signature])
    if not claim.addressed or not claim.from_matches:
        return Judgement(Verdict.NOT_FOR_ME, () if claim.from_matches else (FROM_MISMATCH,))
    if seen.same_id is not None and seen.same_id.holds_id:
        return Judgement(Verdict.CONFLICT, deliver=False, quarantine=True, first=seen.same_id)
    notes = _gap(claim, seen)
    if seen.same_serial is not None:
        return Judgement(Verdict.SERIAL_REUSED, notes, holds_id=True, first=seen.same_serial)
    verdict, clock_notes = _time(claim, arrival, limits)
    if verdict is Verdict.FRESH and claim.sent_at_ms <= seen.distrust_before_ms:
        verdict = Verdict.UNVERIFIABLE
    return Judgement(verdict, notes + clock_notes, holds_id=True, holds_serial=True)


def _same_content(claim: Claim, seen: SeenState) -> SeenRow | None:
    """The row of this very message: the same sealed bytes, or the same id and original whatever the ciphertext.

    A sender that was in doubt seals the same original again under the same id (design 4), so the ciphertext decides nothing.
    """
    if seen.same_payload is not None:
        return seen.same_payload
    row = seen.same_id
    if row is not None and row.original_sha512 == claim.original_sha512 and may_be_same(claim, row):
        return row
    return None


def may_be_same(claim: Claim, row: SeenRow) -> bool:
    """Whether a row of other sealed bytes, with the id and original of this claim, may stand for it.

    Any recipient can seal what he got once more, without a signature. That must neither make the genuine message a repeat, nor
    be delivered with its verdict while it waits. First contact is the exception: without a card nothing was proven of the genuine
    one either.
    """
    if claim.proven:
        return row.holds_id or row.verdict is Verdict.UNKNOWN_SENDER
    return row.delivered or not row.holds_id


def _repeat(claim: Claim, row: SeenRow) -> Judgement:
    """Only `delivered` makes a later copy a duplicate: after a crash in between, the stored verdict is delivered."""
    if not row.delivered:
        quarantine = row.verdict in QUARANTINED
        return Judgement(row.verdict, row.notes, record=False, deliver=not quarantine, quarantine=quarantine, row_id=row.row_id)
    if row.payload_digest == claim.payload_key:
        return Judgement(Verdict.DUPLICATE, record=False, deliver=False, quarantine=True, row_id=row.row_id, first=row)
    return Judgement(Verdict.DUPLICATE, deliver=False, quarantine=True, first=row)


def _time(claim: Claim, arrival: Arrival, limits: FreshnessLimits) -> tuple[Verdict, tuple[str, ...]]:
    """FUTURE, LATE, EXPIRED or FRESH. The delay lies between what our own last look and what our own clock say."""
    longest = arrival.now_ms - claim.sent_at_ms
    if longest < -limits.skew_ms:
        return Verdict.FUTURE, ()
    shortest = max(0, arrival.last_sync_ms - claim.sent_at_ms) if arrival.last_sync_ms is not None else 0
    notes: tuple[str, ...] = ()
    if shortest > limits.late_ms:
        return Verdict.LATE, ()
    if longest > limits.late_ms:
        if arrival.internal_date_ms is None or arrival.internal_date_ms - claim.sent_at_ms > limits.late_ms:
            return Verdict.LATE, ()
        notes = (SERVER_CLOCK,)
    if claim.expires_at_ms is not None and arrival.now_ms > claim.expires_at_ms:
        return Verdict.EXPIRED, notes
    return Verdict.FRESH, notes


def _gap(claim: Claim, seen: SeenState) -> tuple[str, ...]:
    if claim.prev == 0 or seen.prev_seen:
        return ()
    return (GAP,) if seen.stream_known else (FIRST_SEEN,)


def sentence(
    verdict: Verdict, claim: Claim | None, *, arrived_ms: int = 0, notes: tuple[str, ...] = (), first: SeenRow | None = None,
) -> str:
    """What the person reads, in one or two sentences, with what to do. `claim` may be None only for UNREADABLE."""
    if claim is None:
        return "This message cannot be opened: there is no matching key here, or it was damaged. The original is kept as it is."
    words = {
        "sender": claim.sender, "recipient": claim.recipient, "sent": show_time(claim.sent_at_ms),
        "arrived": show_time(arrived_ms), "delay": show_span(arrived_ms - claim.sent_at_ms),
        "ahead": show_span(claim.sent_at_ms - arrived_ms),
        "first": show_time(first.first_ms) if first is not None else "an earlier time",
        "expires": show_time(claim.expires_at_ms if claim.expires_at_ms is not None else claim.sent_at_ms),
        "sender_domain": claim.sender.rpartition("@")[2], "recipient_domain": claim.recipient.rpartition("@")[2],
    }
    text = (_FROM_MISMATCH if FROM_MISMATCH in notes else _SENTENCES[verdict]).format_map(words)
    if verdict is Verdict.DUPLICATE and first is not None and first.verdict in UNPROVEN and claim.signature == "valid":
        text += " The first copy was shown as not proven; the sender of this one is proven."
    for note in notes:
        if note in _NOTES:
            text += " " + _NOTES[note].format_map(words)
    return text


_SENTENCES = {
    Verdict.FRESH: "Verified: from {sender} to {recipient}; sent {sent}, arrived {arrived}.",
    Verdict.DUPLICATE:
        "Second copy of a message from {sender} that was first seen {first}: it was delivered again. Do not act on it twice.",
    Verdict.LATE:
        "From {sender}, but written {delay} before it arrived ({sent}): it may have been held back, or be a repeat. "
        "Ask {sender} before acting on it.",
    Verdict.UNVERIFIABLE:
        "From {sender}, sent {sent}: that is before this program began to keep count, so it cannot tell whether it is a repeat. "
        "Ask {sender} before acting on it.",
    Verdict.CONFLICT:
        "Two different messages from {sender} carry the same id; the first was seen {first}. This one is kept in quarantine. "
        "Ask {sender} by another way which one is meant.",
    Verdict.SERIAL_REUSED:
        "From {sender}, but with a number that was used before ({first}): the sender's program was restored from a backup or "
        "copied. Ask {sender} whether it was, and whether this message, sent {sent}, is meant.",
    Verdict.FUTURE:
        "From {sender}, but its signed time ({sent}) lies {ahead} after its arrival ({arrived}): one of the two clocks is wrong. "
        "Check yours, and ask {sender} to check theirs.",
    Verdict.EXPIRED: "From {sender}, sent {sent}: {sender} asked not to act on it after {expires}, which has passed.",
    Verdict.UNSIGNED:
        "Encrypted, but the sender is not proven: the signature is not that of the card held for {sender}. "
        "Treat it as plain mail. If {sender} has a new card, ask for it and import it.",
    Verdict.UNKNOWN_SENDER:
        "Encrypted, but the sender is not proven: there is no card for {sender} here. Treat it as plain mail. "
        "Ask {sender} for the card and `malote keys import` it.",
    Verdict.REVOKED:
        "Encrypted, but the sender is not proven: {sender} has revoked the key that signed this. Treat it as plain mail.",
    Verdict.NOT_FOR_ME:
        "{sender} wrote this, but not to {recipient}: somebody else passed it on. It says nothing to you on behalf of {sender}.",
    Verdict.UNREADABLE: "This message cannot be opened: there is no matching key here, or it was damaged.",
}
_FROM_MISMATCH = "Signed by {sender}, but the message says that it is from somebody else. Treat its From as not proven."
_NOTES = {
    GAP: "The message that {sender} sent to you before this one has not arrived; ask for it.",
    SERVER_CLOCK: "That it came in time is the word of your mail server.",
    FROM_GATEWAY: "The mail gateway of {sender_domain} sealed it, and answers for who the sender is.",
    TO_GATEWAY: "The mail gateway of {recipient_domain} opened it: it was not sealed up to your own device.",
    AGAIN: "Its delivery was interrupted before and may have succeeded: if you have it already, this is no second message.",
}


def show_time(at_ms: int) -> str:
    """`2026-11-24 10:02 UTC`; a signed time may be any number, so what no calendar holds is said in words."""
    try:
        return (_EPOCH + timedelta(milliseconds=at_ms)).strftime("%Y-%m-%d %H:%M UTC")
    except OverflowError:
        return "at an impossible time"


def show_span(span_ms: int) -> str:
    """`12 days`, `3 hours`, `5 minutes`: the largest unit of which there is at least one and a half."""
    for unit_ms, name in ((DAY_MS, "days"), (3_600_000, "hours"), (60_000, "minutes")):
        if span_ms >= unit_ms * 3 // 2:
            return f"{round(span_ms / unit_ms)} {name}"
    return "a moment"
