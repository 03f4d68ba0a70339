"""Seen state: exactly one first, the verdict that was written is the verdict that is delivered, a repeat is never fresh."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from malote.core.freshness import Arrival, Claim, FreshnessLimits, Verdict
from malote.store import Level, Store

DAY_MS = 86_400_000
LIMITS = FreshnessLimits()
Make = Callable[..., Claim]
Open = Callable[[], Awaitable[Store]]
SKID = b"k" * 32


async def test_first_then_stored_verdict_then_duplicate(store: Store, claim: Make, now_ms: int) -> None:
    """A crash between judging and delivering must give the same verdict again; only after delivery is it a repeat."""
    first = await store.judge(claim(), Arrival(now_ms), LIMITS)
    assert (first.judgement.verdict, first.first, first.delivered) == (Verdict.FRESH, True, False)
    again = await store.judge(claim(), Arrival(now_ms + 30 * DAY_MS), LIMITS)
    assert (again.judgement.verdict, again.first, again.delivered, again.row_id) == (Verdict.FRESH, False, False, first.row_id)
    assert first.row_id is not None
    await store.mark_delivered(first.row_id)
    repeat = await store.judge(claim(), Arrival(now_ms), LIMITS)
    assert (repeat.judgement.verdict, repeat.delivered) == (Verdict.DUPLICATE, True)
    assert repeat.judgement.quarantine
    assert not repeat.judgement.deliver


async def test_notes_survive(store: Store, claim: Make, now_ms: int) -> None:
    await store.judge(claim(1), Arrival(now_ms), LIMITS)
    first = await store.judge(claim(5), Arrival(now_ms), LIMITS)
    again = await store.judge(claim(5), Arrival(now_ms), LIMITS)
    assert first.judgement.notes == again.judgement.notes == ("GAP",)


async def test_sealed_again_by_a_sender_in_doubt(store: Store, claim: Make, now_ms: int) -> None:
    """Same id, serial and original in another ciphertext is the same message; and that ciphertext again is a repeat too."""
    first = await store.judge(claim(), Arrival(now_ms), LIMITS)
    assert first.row_id is not None
    before = await store.judge(claim(payload_digest=b"2" * 32), Arrival(now_ms), LIMITS)
    assert (before.judgement.verdict, before.row_id, before.first) == (Verdict.FRESH, first.row_id, False)
    await store.mark_delivered(first.row_id)
    after = await store.judge(claim(payload_digest=b"2" * 32), Arrival(now_ms), LIMITS)
    assert (after.judgement.verdict, after.first) == (Verdict.DUPLICATE, True)


async def test_same_id_other_content_is_a_conflict(store: Store, claim: Make, now_ms: int) -> None:
    await store.judge(claim(), Arrival(now_ms), LIMITS)
    other = claim(payload_digest=b"2" * 32, original_sha512=b"2" * 64)
    conflict = await store.judge(other, Arrival(now_ms), LIMITS)
    assert (conflict.judgement.verdict, conflict.judgement.quarantine) == (Verdict.CONFLICT, True)
    assert (await store.judge(other, Arrival(now_ms), LIMITS)).judgement.verdict is Verdict.CONFLICT


async def test_same_number_other_id_is_never_fresh(store: Store, claim: Make, now_ms: int) -> None:
    await store.judge(claim(1), Arrival(now_ms), LIMITS)
    reused = await store.judge(claim(2, serial=1, prev=0), Arrival(now_ms), LIMITS)
    assert (reused.judgement.verdict, reused.judgement.deliver) == (Verdict.SERIAL_REUSED, True)


async def test_unproven_mail_blocks_no_number(store: Store, claim: Make, now_ms: int) -> None:
    """Whoever copies the id and serial of a genuine message into a forged one must not keep the genuine one out."""
    forged = claim(1, signature="bad", payload_digest=b"f" * 32, original_sha512=b"f" * 64)
    assert (await store.judge(forged, Arrival(now_ms), LIMITS)).judgement.verdict is Verdict.UNSIGNED
    assert (await store.judge(claim(1), Arrival(now_ms), LIMITS)).judgement.verdict is Verdict.FRESH


async def test_first_contact_repeated_after_the_card_is_imported(store: Store, claim: Make, now_ms: int) -> None:
    first = await store.judge(claim(signature="unknown-sender"), Arrival(now_ms), LIMITS)
    assert first.judgement.verdict is Verdict.UNKNOWN_SENDER
    assert first.row_id is not None
    await store.mark_delivered(first.row_id)
    await store.put_card("anna@a.example", b"card", SKID, level=Level.TOFU, evidence="", now_ms=now_ms, succession=False)
    assert (await store.judge(claim(), Arrival(now_ms), LIMITS)).judgement.verdict is Verdict.DUPLICATE


async def test_mail_sent_before_the_card_was_held_is_unverifiable(store: Store, claim: Make, now_ms: int) -> None:
    await store.put_card("anna@a.example", b"card", SKID, level=Level.TOFU, evidence="", now_ms=now_ms - 5000, succession=False)
    before = await store.judge(claim(1, sent_at_ms=now_ms - 5000), Arrival(now_ms), LIMITS)
    after = await store.judge(claim(2, sent_at_ms=now_ms - 4999), Arrival(now_ms), LIMITS)
    assert [before.judgement.verdict, after.judgement.verdict] == [Verdict.UNVERIFIABLE, Verdict.FRESH]


async def test_a_successor_keeps_the_pin_time_and_a_replacement_does_not(store: Store, claim: Make, now_ms: int) -> None:
    """After `--replace` nothing is known about what the new key sent before."""
    put = {"level": Level.TOFU, "evidence": ""}
    await store.put_card("anna@a.example", b"1", b"1" * 32, now_ms=now_ms - 9000, succession=False, **put)  # type: ignore[arg-type]
    await store.put_card("anna@a.example", b"2", SKID, now_ms=now_ms - 500, succession=True, **put)     # type: ignore[arg-type]
    assert (await store.judge(claim(1), Arrival(now_ms), LIMITS)).judgement.verdict is Verdict.FRESH
    await store.put_card("anna@a.example", b"3", b"3" * 32, now_ms=now_ms - 500, succession=False, **put)   # type: ignore[arg-type]
    replaced = await store.judge(claim(2, skid=b"3" * 32), Arrival(now_ms), LIMITS)
    assert replaced.judgement.verdict is Verdict.UNVERIFIABLE


async def test_a_gateway_card_pins_its_domain(store: Store, claim: Make, now_ms: int) -> None:
    await store.put_card("@a.example", b"card", SKID, level=Level.TOFU, evidence="", now_ms=now_ms, succession=False)
    assert (await store.judge(claim(), Arrival(now_ms), LIMITS)).judgement.verdict is Verdict.UNVERIFIABLE


async def test_a_store_put_back_from_a_copy(store: Store, claim: Make, now_ms: int) -> None:
    """What it had seen since the copy was made may come again: nothing sent before it was put back is fresh."""
    await store.renew(now_ms)
    old = await store.judge(claim(sent_at_ms=now_ms), Arrival(now_ms + 1000), LIMITS)
    new = await store.judge(claim(2, sent_at_ms=now_ms + 1), Arrival(now_ms + 1000), LIMITS)
    assert (old.judgement.verdict, new.judgement.verdict) == (Verdict.UNVERIFIABLE, Verdict.FRESH)


@pytest.mark.parametrize("whom", [{}, {"recipient": "bob@b.example"}, {"sender": "anna@a.example"},
                                  {"recipient": "bob@b.example", "sender": "anna@a.example"}])
async def test_distrust(store: Store, claim: Make, now_ms: int, whom: dict[str, str]) -> None:
    await store.distrust(now_ms, **whom)
    await store.distrust(now_ms - DAY_MS, **whom)     # an earlier time does not weaken it
    assert (await store.judge(claim(), Arrival(now_ms), LIMITS)).judgement.verdict is Verdict.UNVERIFIABLE
    other = claim(2, recipient="x@x.example", sender="y@y.example")
    expected = Verdict.FRESH if whom else Verdict.UNVERIFIABLE
    assert (await store.judge(other, Arrival(now_ms), LIMITS)).judgement.verdict is expected


async def test_two_recipients_are_two_messages(store: Store, claim: Make, now_ms: int) -> None:
    verdicts = [(await store.judge(claim(recipient=to), Arrival(now_ms), LIMITS)).judgement.verdict
                for to in ("bob@b.example", "carol@b.example")]
    assert verdicts == [Verdict.FRESH, Verdict.FRESH]


async def test_opened_by_another_device(store: Store, claim: Make, now_ms: int) -> None:
    """Injected again while only this device runs: what the other one opened is a repeat here."""
    foreign = await store.record_foreign(claim(), Arrival(now_ms), LIMITS)
    assert foreign.delivered
    assert (await store.judge(claim(), Arrival(now_ms), LIMITS)).judgement.verdict is Verdict.DUPLICATE


async def test_judged_here_and_delivered_by_another_device(store: Store, claim: Make, now_ms: int) -> None:
    first = await store.judge(claim(), Arrival(now_ms), LIMITS)
    foreign = await store.record_foreign(claim(), Arrival(now_ms), LIMITS)
    assert (foreign.row_id, foreign.first, foreign.delivered) == (first.row_id, False, True)
    assert (await store.judge(claim(), Arrival(now_ms), LIMITS)).judgement.verdict is Verdict.DUPLICATE


async def test_any_number_a_sender_may_write(store: Store, claim: Make, now_ms: int) -> None:
    """Serials are u64 and signed times any JSON integer: a hostile message must not break the store."""
    for serial in (0, 1, 2**63 - 1, 2**63, 2**64 - 1):
        one = claim(serial % 1000 + 10, serial=serial, prev=2**64 - 1, sent_at_ms=2**53 - 1)
        assert (await store.judge(one, Arrival(now_ms), LIMITS)).judgement.verdict is Verdict.FUTURE
    reused = claim(5000, serial=2**64 - 1, prev=0)
    assert (await store.judge(reused, Arrival(now_ms), LIMITS)).judgement.verdict is Verdict.SERIAL_REUSED


async def test_forgotten_rows_are_late_by_their_time(store: Store, claim: Make, now_ms: int) -> None:
    """`remember` is never less than twice the lateness window, however little the configuration says."""
    await store.record_foreign(claim(), Arrival(now_ms), LIMITS)
    await store.expire(now_ms + 13 * DAY_MS, remember_days=1, late_days=7)
    assert (await store.judge(claim(), Arrival(now_ms), LIMITS)).judgement.verdict is Verdict.DUPLICATE
    later_ms = now_ms + 15 * DAY_MS
    await store.expire(later_ms, remember_days=1, late_days=7)
    assert (await store.judge(claim(), Arrival(later_ms), LIMITS)).judgement.verdict is Verdict.LATE


async def test_a_message_signed_for_the_future_is_remembered_until_then(store: Store, claim: Make, now_ms: int) -> None:
    """Else it could be sent again, as fresh, when its time has come and its row is gone."""
    future_ms = now_ms + 500 * DAY_MS
    first = await store.judge(claim(sent_at_ms=future_ms), Arrival(now_ms), LIMITS)
    assert first.judgement.verdict is Verdict.FUTURE
    assert first.row_id is not None
    await store.mark_delivered(first.row_id)
    await store.expire(future_ms, remember_days=400)
    assert (await store.judge(claim(sent_at_ms=future_ms), Arrival(future_ms), LIMITS)).judgement.verdict is Verdict.DUPLICATE


async def test_thousands_of_rows_expire_in_pieces(store: Store, claim: Make, now_ms: int) -> None:
    await asyncio.gather(*(store.judge(claim(number), Arrival(now_ms), LIMITS) for number in range(1, 2501)))
    await store.expire(now_ms + 800 * DAY_MS)
    assert (await store.judge(claim(7), Arrival(now_ms), LIMITS)).first


async def test_exactly_one_connection_is_first(open_store: Open, claim: Make, now_ms: int) -> None:
    stores = [await open_store() for _ in range(3)]
    for number in range(1, 30):
        results = await asyncio.gather(*(store.judge(claim(number), Arrival(now_ms), LIMITS) for store in stores))
        assert sum(result.first for result in results) == 1
        assert {result.judgement.verdict for result in results} == {Verdict.FRESH}
        assert len({result.row_id for result in results}) == 1


async def test_the_hash_of_a_message_is_not_stored_as_it_is(
    sqlite_store: Store, claim: Make, now_ms: int, tmp_path: Path,
) -> None:
    """Whoever reads the file must not be able to test whether a known text was received."""
    await sqlite_store.judge(claim(original_sha512=b"\x5a" * 64), Arrival(now_ms), LIMITS)
    await sqlite_store.close()
    with sqlite3.connect(tmp_path / "store" / "store.sqlite") as raw:
        dump = "\n".join(raw.iterdump())
    raw.close()
    assert "5A" * 32 not in dump.upper()
    assert "anna@a.example" in dump
