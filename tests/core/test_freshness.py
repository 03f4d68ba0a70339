"""Verdicts: a repeat is never FRESH, nothing is lost for being judged, and a forgery blocks no genuine message."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import permutations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from malote.core.freshness import (
    AGAIN,
    DAY_MS,
    FIRST_SEEN,
    FROM_GATEWAY,
    FROM_MISMATCH,
    GAP,
    QUARANTINED,
    SERVER_CLOCK,
    TO_GATEWAY,
    UNPROVEN,
    UNREADABLE,
    Arrival,
    Claim,
    FreshnessLimits,
    Judgement,
    SeenRow,
    SeenState,
    Verdict,
    decide_verdict,
    may_be_same,
    sentence,
    show_span,
    show_time,
)

NOW = 1_795_000_000_000
HOUR = 3_600_000
LIMITS = FreshnessLimits(late_ms=7 * DAY_MS, skew_ms=600_000)
CLAIM = Claim(
    recipient="bob@b.example", sender="alice@a.example", manifest_id=b"i" * 16, skid=b"k" * 32, stream=b"s" * 8, serial=5,
    prev=4, sent_at_ms=NOW - HOUR, expires_at_ms=None, payload_digest=b"p" * 32, original_sha512=b"o" * 64,
    signature="valid", addressed=True,
)
ROW = SeenRow(
    row_id=7, manifest_id=CLAIM.manifest_id, payload_digest=CLAIM.payload_digest, original_sha512=CLAIM.original_sha512,
    verdict=Verdict.FRESH, notes=(), delivered=True, holds_id=True, first_ms=NOW - HOUR,
)
KNOWN = SeenState(prev_seen=True, stream_known=True)


def judge(claim: Claim = CLAIM, seen: SeenState = KNOWN, arrival: Arrival | None = None) -> Judgement:
    return decide_verdict(claim, arrival or Arrival(NOW), seen, LIMITS)


@pytest.mark.parametrize(("claim", "seen", "arrival", "verdict", "notes"), [
    # proven, new, in time
    ({}, {}, {}, Verdict.FRESH, ()),
    # a sender's clock a little ahead is usual
    ({"sent_at_ms": NOW + 600_000}, {}, {}, Verdict.FRESH, ()),
    ({"sent_at_ms": NOW + 600_001}, {}, {}, Verdict.FUTURE, ()),
    # at the listener, arrival is now: the delay is known exactly
    ({"sent_at_ms": NOW - 7 * DAY_MS}, {}, {}, Verdict.FRESH, ()),
    ({"sent_at_ms": NOW - 7 * DAY_MS - 1}, {}, {}, Verdict.LATE, ()),
    # found after a holiday: our own last look bounds nothing, the server says that it came in time
    ({"sent_at_ms": NOW - 20 * DAY_MS}, {}, {"internal_date_ms": NOW - 19 * DAY_MS, "last_sync_ms": NOW - 21 * DAY_MS},
     Verdict.FRESH, (SERVER_CLOCK,)),
    # the first look ever: only the server's word
    ({"sent_at_ms": NOW - 20 * DAY_MS}, {}, {"internal_date_ms": NOW - 20 * DAY_MS}, Verdict.FRESH, (SERVER_CLOCK,)),
    # the server itself says that it came late
    ({"sent_at_ms": NOW - 20 * DAY_MS}, {}, {"internal_date_ms": NOW - DAY_MS, "last_sync_ms": NOW - 21 * DAY_MS},
     Verdict.LATE, ()),
    # the server lies about its clock, but it was not there at our last look
    ({"sent_at_ms": NOW - 20 * DAY_MS}, {}, {"internal_date_ms": NOW - 20 * DAY_MS, "last_sync_ms": NOW - DAY_MS},
     Verdict.LATE, ()),
    # the delay is between 6 and 8 days by our own clock: the server decides within that
    ({"sent_at_ms": NOW - 8 * DAY_MS}, {}, {"internal_date_ms": NOW - 2 * DAY_MS, "last_sync_ms": NOW - 2 * DAY_MS},
     Verdict.FRESH, (SERVER_CLOCK,)),
    # the sender's own limit
    ({"expires_at_ms": NOW - 1}, {}, {}, Verdict.EXPIRED, ()),
    ({"expires_at_ms": NOW}, {}, {}, Verdict.FRESH, ()),
    # sent before we kept count: at the very moment too
    ({}, {"distrust_before_ms": CLAIM.sent_at_ms}, {}, Verdict.UNVERIFIABLE, ()),
    ({}, {"distrust_before_ms": CLAIM.sent_at_ms - 1}, {}, Verdict.FRESH, ()),
    # late says more than unverifiable
    ({"sent_at_ms": NOW - 8 * DAY_MS}, {"distrust_before_ms": NOW}, {}, Verdict.LATE, ()),
    # the number before is missing
    ({}, {"prev_seen": False}, {}, Verdict.FRESH, (GAP,)),
    ({"prev": 0}, {"prev_seen": False}, {}, Verdict.FRESH, ()),
    # a numbering never seen here, not from its start: no alarm, nothing says that we should have it
    ({}, {"prev_seen": False, "stream_known": False}, {}, Verdict.FRESH, (FIRST_SEEN,)),
    # same number under another id: the sender's program was restored or copied
    ({}, {"same_serial": replace(ROW, manifest_id=b"x" * 16, payload_digest=b"q" * 32)}, {}, Verdict.SERIAL_REUSED, ()),
    # and nothing makes that better
    ({}, {"same_serial": replace(ROW, manifest_id=b"x" * 16), "distrust_before_ms": NOW}, {}, Verdict.SERIAL_REUSED, ()),
    # same id, other content
    ({}, {"same_id": replace(ROW, original_sha512=b"x" * 64, payload_digest=b"q" * 32)}, {}, Verdict.CONFLICT, ()),
    # an unproven message under the same id holds nothing: a forgery must not push the genuine one aside
    ({}, {"same_id": replace(ROW, original_sha512=b"x" * 64, verdict=Verdict.UNSIGNED, holds_id=False)}, {}, Verdict.FRESH, ()),
    # the same sealed bytes
    ({}, {"same_payload": ROW, "same_id": ROW, "same_serial": ROW}, {}, Verdict.DUPLICATE, ()),
    # a sender in doubt sealed it again: same id and original, another ciphertext
    ({}, {"same_id": replace(ROW, payload_digest=b"q" * 32), "same_serial": ROW}, {}, Verdict.DUPLICATE, ()),
    # first contact, then the card is imported, then it is repeated
    ({}, {"same_payload": replace(ROW, verdict=Verdict.UNKNOWN_SENDER, holds_id=False)}, {}, Verdict.DUPLICATE, ()),
    ({}, {"same_id": replace(ROW, verdict=Verdict.UNKNOWN_SENDER, holds_id=False, payload_digest=b"q" * 32)}, {},
     Verdict.DUPLICATE, ()),
    # a repeat is a repeat, however late, expired or forged
    ({"sent_at_ms": NOW - 300 * DAY_MS}, {"same_payload": ROW}, {}, Verdict.DUPLICATE, ()),
    ({"sent_at_ms": NOW + 300 * DAY_MS}, {"same_payload": ROW}, {}, Verdict.DUPLICATE, ()),
    ({"signature": "bad"}, {"same_payload": ROW}, {}, Verdict.DUPLICATE, ()),
    # who it is from is not proven: time and numbers say nothing then
    ({"signature": "bad"}, {}, {}, Verdict.UNSIGNED, ()),
    ({"signature": "unknown-sender"}, {}, {}, Verdict.UNKNOWN_SENDER, ()),
    ({"signature": "revoked"}, {}, {}, Verdict.REVOKED, ()),
    ({"signature": "bad", "sent_at_ms": NOW + 300 * DAY_MS}, {}, {}, Verdict.UNSIGNED, ()),
    ({"signature": "bad"}, {"same_id": replace(ROW, original_sha512=b"x" * 64)}, {}, Verdict.UNSIGNED, ()),
    ({"signature": "unknown-sender", "addressed": False}, {}, {}, Verdict.UNKNOWN_SENDER, ()),
    # signed, but for somebody else; or with a From that is not the signer's
    ({"addressed": False}, {}, {}, Verdict.NOT_FOR_ME, ()),
    ({"addressed": False}, {"same_serial": ROW}, {}, Verdict.NOT_FOR_ME, ()),
    ({"from_matches": False}, {}, {}, Verdict.NOT_FOR_ME, (FROM_MISMATCH,)),
])
def test_each_verdict(
    claim: dict[str, Any], seen: dict[str, Any], arrival: dict[str, Any], verdict: Verdict, notes: tuple[str, ...],
) -> None:
    """The rule of the design, row by row."""
    judgement = judge(replace(CLAIM, **claim), replace(KNOWN, **seen), Arrival(NOW, **arrival))
    assert (judgement.verdict, judgement.notes) == (verdict, notes)


def test_only_proven_messages_hold_numbers() -> None:
    """What holds an id or serial decides about others, so only a proven sender may; and a reused serial stays with the first."""
    assert (judge().holds_id, judge().holds_serial) == (True, True)
    for signature in ("bad", "unknown-sender", "revoked"):
        judgement = judge(replace(CLAIM, signature=signature))
        assert (judgement.record, judgement.holds_id, judgement.holds_serial) == (True, False, False)
    reused = judge(seen=replace(KNOWN, same_serial=replace(ROW, manifest_id=b"x" * 16)))
    assert (reused.record, reused.holds_id, reused.holds_serial, reused.deliver) == (True, True, False, True)
    conflict = judge(seen=replace(KNOWN, same_id=replace(ROW, original_sha512=b"x" * 64)))
    assert (conflict.record, conflict.holds_id, conflict.quarantine, conflict.deliver) == (True, False, True, False)


@pytest.mark.parametrize("verdict", list(Verdict))
def test_crash_between_judgement_and_delivery(verdict: Verdict) -> None:
    """A message that was judged and not delivered is delivered with that judgement: neither lost nor judged anew."""
    row = replace(ROW, delivered=False, verdict=verdict, notes=(GAP,))
    for claim, seen in (
        (replace(CLAIM, signature="bad"), SeenState(same_payload=row)),
        (CLAIM, SeenState(same_id=replace(row, payload_digest=b"q" * 32))),     # the first ciphertext may never come again
    ):
        judgement = judge(claim, seen)
        assert (judgement.verdict, judgement.notes, judgement.record, judgement.row_id) == (verdict, (GAP,), False, 7)
        assert judgement.quarantine == (verdict in QUARANTINED)
        assert judgement.deliver != judgement.quarantine


def test_a_duplicate_under_another_ciphertext_is_recorded() -> None:
    """So that its own repeats are found by their bytes too; under the same bytes the row is there already."""
    other = judge(seen=SeenState(same_id=replace(ROW, payload_digest=b"q" * 32)))
    assert (other.record, other.holds_id, other.holds_serial) == (True, False, False)
    same = judge(seen=SeenState(same_payload=ROW))
    assert (same.record, same.row_id, same.first) == (False, 7, ROW)


def test_unreadable_leaves_the_original() -> None:
    """What cannot be opened is neither delivered nor moved away."""
    assert (UNREADABLE.record, UNREADABLE.deliver, UNREADABLE.quarantine) == (False, False, False)


# --- properties, with the smallest store that keeps the contract in the module's text


@dataclass
class Memory:
    rows: list[tuple[Claim, SeenRow, bool]] = field(default_factory=list)     # claim, row, holds the serial

    def state(self, claim: Claim) -> SeenState:
        mine = [entry for entry in self.rows if entry[0].recipient == claim.recipient]
        same_id = [row for old, row, _ in mine if (old.sender, old.manifest_id) == (claim.sender, claim.manifest_id)]
        same_id.sort(key=lambda row: (
            row.original_sha512 != claim.original_sha512 or not may_be_same(claim, row), not row.holds_id,
        ))
        held = {old.serial: row for old, row, held in mine if held and (old.skid, old.stream) == (claim.skid, claim.stream)}
        return SeenState(
            same_payload=next((row for old, row, _ in mine if old.payload_key == claim.payload_key), None),
            same_id=same_id[0] if same_id else None, same_serial=held.get(claim.serial),
            prev_seen=claim.prev in held, stream_known=bool(held),
        )

    def receive(self, claim: Claim, now_ms: int = NOW, *, crash: bool = False) -> Judgement:
        judgement = decide_verdict(claim, Arrival(now_ms), self.state(claim), LIMITS)
        if judgement.record:
            row = SeenRow(
                len(self.rows), claim.manifest_id, claim.payload_key, claim.original_sha512, judgement.verdict,
                judgement.notes, not crash, judgement.holds_id, now_ms,
            )
            self._check_unique(claim, judgement)
            self.rows.append((claim, row, judgement.holds_serial))
        elif not crash and judgement.row_id is not None:
            claim, row, held = self.rows[judgement.row_id]
            self.rows[judgement.row_id] = (claim, replace(row, delivered=True), held)
        return judgement

    def _check_unique(self, claim: Claim, judgement: Judgement) -> None:
        """The unique keys of the store: the rule must never ask for an insert that they refuse."""
        for old, row, held in self.rows:
            if old.recipient == claim.recipient:
                assert old.payload_key != claim.payload_key
                if judgement.holds_id and row.holds_id:
                    assert (old.sender, old.manifest_id) != (claim.sender, claim.manifest_id)
                if judgement.holds_serial and held:
                    assert (old.skid, old.stream, old.serial) != (claim.skid, claim.stream, claim.serial)


# One payload has one manifest, so its id and original follow from it: 0 and 1 are one message sealed twice, 2 has the same id and
# other content, 3 is another message.
_PAYLOADS = {0: (b"0", b"0"), 1: (b"0", b"0"), 2: (b"0", b"2"), 3: (b"3", b"3")}


def _claim(payload: int, **parts: Any) -> Claim:
    manifest_id, original = _PAYLOADS[payload]
    digest = bytes([payload]) * 32
    return replace(CLAIM, payload_digest=digest, manifest_id=manifest_id * 16, original_sha512=original * 64, **parts)


claims = st.builds(
    _claim, st.sampled_from(sorted(_PAYLOADS)), recipient=st.sampled_from(["bob@b.example", "carol@b.example"]),
    serial=st.integers(1, 3), prev=st.integers(0, 2), stream=st.sampled_from([b"s" * 8, b"t" * 8]),
    sent_at_ms=st.sampled_from([NOW - 20 * DAY_MS, NOW - HOUR, NOW + DAY_MS]),
    signature=st.sampled_from(["valid", "valid", "bad", "unknown-sender"]), addressed=st.sampled_from([True, True, False]),
)
arrivals = st.lists(st.tuples(claims, st.booleans()), max_size=12)


@given(arrivals)
def test_nothing_delivered_is_fresh_again(order: list[tuple[Claim, bool]]) -> None:
    """Whatever comes in whatever order, with crashes between: once delivered, the same bytes are only ever DUPLICATE, and the
    same id with the same original is never FRESH. What was delivered as not proven can be: anybody may seal again what he got."""
    memory = Memory()
    done: set[tuple[str, bytes]] = set()
    originals: set[tuple[str, bytes, bytes]] = set()
    for claim, crash in order:
        judgement = memory.receive(claim, crash=crash)
        key, original = (claim.recipient, claim.payload_key), (claim.recipient, claim.manifest_id, claim.original_sha512)
        if key in done:
            assert judgement.verdict is Verdict.DUPLICATE
        if original in originals:
            assert judgement.verdict is not Verdict.FRESH
        assert not (judgement.deliver and judgement.quarantine)
        assert judgement.deliver or judgement.quarantine
        assert judgement.record != (judgement.row_id is not None)
        if not crash:
            done.add(key)
            if judgement.verdict not in {Verdict.UNSIGNED, Verdict.NOT_FOR_ME, Verdict.DUPLICATE}:
                originals.add(original)


@given(arrivals)
def test_every_message_is_delivered_once(order: list[tuple[Claim, bool]]) -> None:
    """No content is held back that was not delivered before, except by CONFLICT; and none is delivered twice as the same row."""
    memory = Memory()
    delivered: set[tuple[str, bytes, bytes]] = set()
    payloads: set[tuple[str, bytes]] = set()
    for claim, crash in order:
        judgement = memory.receive(claim, crash=crash)
        content = (claim.recipient, claim.manifest_id, claim.original_sha512)
        if judgement.verdict is Verdict.DUPLICATE:
            assert content in delivered or (claim.recipient, claim.payload_key) in payloads
        if not crash:
            delivered.add(content)
            payloads.add((claim.recipient, claim.payload_key))


@pytest.mark.parametrize("order", list(permutations(range(4))))
def test_order_changes_no_verdict(order: tuple[int, ...]) -> None:
    """Mail overtakes mail: four honest messages are FRESH in every order, and each only once."""
    sent = [
        replace(CLAIM, serial=number + 1, prev=number, manifest_id=bytes([number]) * 16, payload_digest=bytes([number]) * 32,
                original_sha512=bytes([number]) * 64)
        for number in range(4)
    ]
    memory = Memory()
    for number in order:
        assert memory.receive(sent[number]).verdict is Verdict.FRESH
    for number in order:
        assert memory.receive(sent[number]).verdict is Verdict.DUPLICATE


def test_the_gap_names_what_was_withheld() -> None:
    """A withheld message is noticed at the next one, and no longer once it has come."""
    memory = Memory()
    numbers = [replace(CLAIM, serial=n, prev=n - 1, manifest_id=bytes([n]) * 16, payload_digest=bytes([n]) * 32,
                       original_sha512=bytes([n]) * 64) for n in range(1, 5)]
    assert memory.receive(numbers[0]).notes == ()
    assert memory.receive(numbers[2]).notes == (GAP,)
    assert memory.receive(numbers[1]).notes == ()
    assert memory.receive(numbers[3]).notes == ()


def test_future_is_final() -> None:
    """A message signed for tomorrow is not FRESH tomorrow: it was seen today."""
    memory = Memory()
    tomorrow = replace(CLAIM, sent_at_ms=NOW + DAY_MS)
    assert memory.receive(tomorrow).verdict is Verdict.FUTURE
    assert memory.receive(tomorrow, NOW + DAY_MS).verdict is Verdict.DUPLICATE
    assert memory.receive(replace(tomorrow, payload_digest=b"q" * 32), NOW + DAY_MS).verdict is Verdict.DUPLICATE


def test_two_local_recipients_are_two_messages() -> None:
    """The same bytes for two people at one listener are no repeat."""
    memory = Memory()
    assert memory.receive(CLAIM).verdict is Verdict.FRESH
    assert memory.receive(replace(CLAIM, recipient="carol@b.example")).verdict is Verdict.FRESH


def test_a_forged_copy_before_the_genuine_one() -> None:
    """Somebody who knows the id, and sends other content under it, changes nothing for the genuine message."""
    memory = Memory()
    forged = replace(CLAIM, signature="bad", payload_digest=b"f" * 32, original_sha512=b"f" * 64)
    assert memory.receive(forged).verdict is Verdict.UNSIGNED
    assert memory.receive(CLAIM).verdict is Verdict.FRESH
    assert memory.receive(forged).verdict is Verdict.DUPLICATE


@pytest.mark.parametrize("parts", [
    {"signature": "bad", "payload_digest": b"f" * 32},      # sealed again by a recipient, who cannot sign
    {"signature": "revoked", "payload_digest": b"f" * 32},
    {"addressed": False},                                   # the genuine bytes with a blob made by a co-recipient
])
def test_the_same_content_unproven_before_the_genuine_one(parts: dict[str, Any]) -> None:
    """A co-recipient who is faster does not make the genuine message a repeat; nor is his copy delivered with its verdict."""
    memory = Memory()
    copy = replace(CLAIM, **parts)
    assert memory.receive(copy).verdict in UNPROVEN
    assert memory.receive(CLAIM, crash=True).verdict is Verdict.FRESH
    other = replace(copy, payload_digest=b"g" * 32)
    assert memory.receive(other).verdict in UNPROVEN | {Verdict.DUPLICATE}
    assert memory.receive(CLAIM).verdict is Verdict.FRESH
    for again in (CLAIM, copy, other):
        assert memory.receive(again).verdict is Verdict.DUPLICATE


# --- words


def _notes() -> Iterable[tuple[str, ...]]:
    return ((), (GAP,), (SERVER_CLOCK,), (FROM_MISMATCH,), (FIRST_SEEN,), (GAP, SERVER_CLOCK), (AGAIN,),
            (FROM_GATEWAY, TO_GATEWAY))


@pytest.mark.parametrize("verdict", list(Verdict))
def test_every_verdict_has_a_sentence(verdict: Verdict) -> None:
    """One line that says what it is; who it is (said to be) from; and what is not proven never says Verified."""
    for notes in _notes():
        text = sentence(verdict, CLAIM, arrived_ms=NOW, notes=notes, first=ROW)
        assert "\n" not in text
        assert "{" not in text
        assert text.endswith(".")
        assert ("Verified" in text) == (verdict is Verdict.FRESH and FROM_MISMATCH not in notes)
        if verdict is not Verdict.UNREADABLE:
            assert "alice@a.example" in text
        if verdict in UNPROVEN - {Verdict.NOT_FOR_ME, Verdict.UNREADABLE} and FROM_MISMATCH not in notes:
            assert "not proven" in text


@pytest.mark.parametrize(("verdict", "asked"), [
    (Verdict.SERIAL_REUSED, "Ask alice@a.example whether"),
    (Verdict.LATE, "Ask alice@a.example before"),
    (Verdict.UNVERIFIABLE, "Ask alice@a.example before"),
    (Verdict.CONFLICT, "Ask alice@a.example by another way"),
    (Verdict.UNKNOWN_SENDER, "`malote keys import`"),
    (Verdict.NOT_FOR_ME, "not to bob@b.example"),
])
def test_sentences_say_what_to_do(verdict: Verdict, asked: str) -> None:
    assert asked in sentence(verdict, CLAIM, arrived_ms=NOW, first=ROW)


def test_the_sentence_says_which_end_was_a_gateway() -> None:
    """A gateway's key is no proof of the person, and no protection up to the person's own device (RFC 9787 9.7.3)."""
    plain = sentence(Verdict.FRESH, CLAIM, arrived_ms=NOW)
    assert "gateway" not in plain
    assert "gateway of a.example sealed" in sentence(Verdict.FRESH, CLAIM, arrived_ms=NOW, notes=(FROM_GATEWAY,))
    assert "gateway of b.example opened" in sentence(Verdict.FRESH, CLAIM, arrived_ms=NOW, notes=(TO_GATEWAY,))


def test_a_proven_duplicate_of_an_unproven_copy_says_so() -> None:
    """Somebody may have sent the same content unproven first; the proof lies in quarantine then, and the person is told."""
    unproven = replace(ROW, verdict=Verdict.UNSIGNED, holds_id=False)
    assert "is proven" in sentence(Verdict.DUPLICATE, CLAIM, arrived_ms=NOW, first=unproven)
    assert "is proven" not in sentence(Verdict.DUPLICATE, CLAIM, arrived_ms=NOW, first=ROW)


@given(st.integers(-(2**63), 2**64), st.integers(-(2**63), 2**64))
def test_any_time_can_be_shown(sent: int, expires: int) -> None:
    """A signed time may be any number; showing it must never fail."""
    for verdict in Verdict:
        assert sentence(verdict, replace(CLAIM, sent_at_ms=sent, expires_at_ms=expires), arrived_ms=NOW)


def test_times_and_spans() -> None:
    assert show_time(NOW) == "2026-11-18 11:06 UTC"
    assert [show_span(ms) for ms in (12 * DAY_MS, 36 * HOUR, 35 * HOUR, 90 * 60_000, 5 * 60_000, 89_999, 0, -5)] == [
        "12 days", "2 days", "35 hours", "2 hours", "5 minutes", "a moment", "a moment", "a moment",
    ]
