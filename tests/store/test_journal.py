"""Serial numbers and the journal: nothing lost, nothing doubled, no number given out twice."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from malote.errors import ClockWrong
from malote.store import Outcome, SendIntent, SendState, Store

DAY_MS = 86_400_000
Make = Callable[..., SendIntent]
Open = Callable[[], Awaitable[Store]]
BOB, CAROL = "bob@b.example", "carol@c.example"


async def test_a_retry_keeps_id_date_and_numbers(store: Store, intent: Make, now_ms: int) -> None:
    """The receiver recognises the second copy only if id, stream and serial are those of the first."""
    first = await store.begin_send(intent(BOB))
    again = await store.begin_send(intent(BOB, now_ms=now_ms + 60_000))
    assert (again.submission_id, again.first_at_ms) == (first.submission_id, now_ms)
    assert again.row(BOB).state is SendState.IN_DOUBT
    assert (again.row(BOB).stream, again.row(BOB).serial, again.row(BOB).prev) == (first.row(BOB).stream, 1, 0)
    assert again.sent_at_ms > first.sent_at_ms


async def test_only_what_was_not_accepted_is_pending(store: Store, intent: Make, now_ms: int) -> None:
    plan = await store.begin_send(intent(BOB, CAROL))
    await store.finish_send(plan, {BOB: (Outcome.ACCEPTED, "250 2.0.0 queued"), CAROL: (Outcome.REFUSED, "452 full")}, now_ms)
    again = await store.begin_send(intent(BOB, CAROL))
    assert [row.address for row in again.pending] == [CAROL]
    assert (again.row(BOB).state, again.row(BOB).reply) == (SendState.ACCEPTED, "250 2.0.0 queued")
    assert (again.row(CAROL).state, again.row(CAROL).reply) == (SendState.REFUSED, "452 full")


async def test_prev_is_the_last_accepted_number(store: Store, intent: Make, now_ms: int) -> None:
    """A refused message burns its number; the next must not make the receiver miss it."""
    for content, outcome in ((b"1", Outcome.ACCEPTED), (b"2", Outcome.REFUSED), (b"3", Outcome.UNSENT), (b"4", Outcome.IN_DOUBT)):
        plan = await store.begin_send(intent(BOB, content=content))
        await store.finish_send(plan, {BOB: (outcome, "")}, now_ms)
    last = await store.begin_send(intent(BOB, content=b"5"))
    assert (last.row(BOB).serial, last.row(BOB).prev) == (5, 1)


async def test_late_acceptance_does_not_turn_prev_back(store: Store, intent: Make, now_ms: int) -> None:
    one = await store.begin_send(intent(BOB, content=b"1"))
    two = await store.begin_send(intent(BOB, content=b"2"))
    await store.finish_send(two, {BOB: (Outcome.ACCEPTED, "")}, now_ms)
    await store.finish_send(one, {BOB: (Outcome.ACCEPTED, "")}, now_ms)
    assert (await store.begin_send(intent(BOB, content=b"3"))).row(BOB).prev == 2


async def test_unsent_does_not_undo_an_earlier_doubt(store: Store, intent: Make, now_ms: int) -> None:
    """A retry that failed before its final dot says nothing about the first attempt."""
    first = await store.begin_send(intent(BOB))
    again = await store.begin_send(intent(BOB))
    await store.finish_send(again, {BOB: (Outcome.UNSENT, "")}, now_ms)
    third = await store.begin_send(intent(BOB))
    assert third.row(BOB).state is SendState.IN_DOUBT
    assert third.submission_id == first.submission_id


async def test_unsent_leaves_nothing_of_a_first_attempt(store: Store, intent: Make, now_ms: int) -> None:
    first = await store.begin_send(intent(BOB))
    await store.finish_send(first, {BOB: (Outcome.UNSENT, "")}, now_ms)
    again = await store.begin_send(intent(BOB))
    assert again.row(BOB).state is SendState.NEW
    assert again.submission_id != first.submission_id
    assert again.row(BOB).serial == 2, "a number given out once is never given out again"


async def test_an_attempt_that_sent_nothing_does_not_undo_another(open_store: Open, intent: Make, now_ms: int) -> None:
    """Two processes, one message: what one of them may have sent must not be forgotten because the other sent nothing."""
    one, two = await open_store(), await open_store()
    first, second = await one.begin_send(intent(BOB, CAROL)), await two.begin_send(intent(BOB, CAROL))
    await two.finish_send(second, {BOB: (Outcome.ACCEPTED, "250 ok")}, now_ms)
    await one.finish_send(first, {BOB: (Outcome.UNSENT, ""), CAROL: (Outcome.UNSENT, "")}, now_ms)
    await one.finish_send(first, {BOB: (Outcome.REFUSED, "550 no")}, now_ms)
    again = await one.begin_send(intent(BOB, CAROL))
    assert (again.row(BOB).state, again.row(BOB).reply) == (SendState.ACCEPTED, "250 ok")
    assert again.row(CAROL).state is SendState.IN_DOUBT


async def test_same_bytes_sent_twice_on_purpose(store: Store, intent: Make, now_ms: int) -> None:
    """Who read our 250 and sends the same again means a second message: it must not be swallowed."""
    plan = await store.begin_send(intent(BOB))
    await store.finish_send(plan, {BOB: (Outcome.ACCEPTED, "250 ok")}, now_ms)
    store.forget_send(plan)
    again = await store.begin_send(intent(BOB))
    assert again.row(BOB).state is SendState.NEW
    assert again.submission_id != plan.submission_id


async def test_forgetting_leaves_what_is_in_doubt(store: Store, intent: Make, now_ms: int) -> None:
    plan = await store.begin_send(intent(BOB, CAROL))
    await store.finish_send(plan, {BOB: (Outcome.ACCEPTED, "250 ok")}, now_ms)
    store.forget_send(plan)
    again = await store.begin_send(intent(BOB, CAROL))
    assert again.row(CAROL).state is SendState.IN_DOUBT
    assert again.row(BOB).state is SendState.NEW


@pytest.mark.parametrize("other", [{"login": "eve"}, {"sender": "eve@a.example"}, {"content": b"other"}])
async def test_another_login_sender_or_content_is_another_message(store: Store, intent: Make, other: dict[str, str]) -> None:
    first = await store.begin_send(intent(BOB))
    second = await store.begin_send(intent(BOB, **other))
    assert second.row(BOB).state is SendState.NEW
    assert second.submission_id != first.submission_id


async def test_parts_of_the_key_are_kept_apart(store: Store, intent: Make) -> None:
    first = await store.begin_send(intent(BOB, login="a", sender="bc@x.example"))
    second = await store.begin_send(intent(BOB, login="ab", sender="c@x.example"))
    assert first.key != second.key


async def test_a_recipient_added_later_joins_the_submission(store: Store, intent: Make) -> None:
    first = await store.begin_send(intent(BOB))
    both = await store.begin_send(intent(BOB, CAROL))
    assert both.submission_id == first.submission_id
    assert both.row(CAROL).state is SendState.NEW
    assert both.row(CAROL).serial == 1


async def test_unsealed_parts_take_no_number(store: Store, intent: Make, now_ms: int) -> None:
    plan = await store.begin_send(intent(BOB, CAROL, plain=(CAROL,)))
    assert (plan.row(CAROL).sealed, plan.row(CAROL).stream, plan.row(CAROL).serial) == (False, b"", 0)
    await store.finish_send(plan, {BOB: (Outcome.ACCEPTED, ""), CAROL: (Outcome.ACCEPTED, "")}, now_ms)
    sealed = await store.begin_send(intent(CAROL, content=b"two"))
    assert (sealed.row(CAROL).serial, sealed.row(CAROL).prev) == (1, 0)


async def test_a_part_first_tried_in_clear_is_sealed_on_retry(store: Store, intent: Make) -> None:
    """A card came in between: the retry must have numbers."""
    await store.begin_send(intent(BOB, plain=(BOB,)))
    row = (await store.begin_send(intent(BOB))).row(BOB)
    assert (row.state, row.sealed, row.serial) == (SendState.IN_DOUBT, True, 1)


async def test_an_address_given_twice_is_one_part(store: Store, intent: Make) -> None:
    plan = await store.begin_send(intent(BOB, BOB))
    assert [(row.address, row.serial) for row in plan.rows] == [(BOB, 1)]


async def test_numbers_are_counted_for_each_recipient_and_key(store: Store, intent: Make) -> None:
    one = await store.begin_send(intent(BOB, CAROL, content=b"1"))
    two = await store.begin_send(intent(BOB, content=b"2"))
    assert (two.row(BOB).serial, two.row(BOB).stream) == (2, one.row(CAROL).stream)
    assert one.row(CAROL).serial == 1
    new_key = await store.begin_send(intent(BOB, content=b"3", skid=b"n" * 32))
    assert new_key.row(BOB).stream != one.row(BOB).stream
    assert (new_key.row(BOB).serial, new_key.row(BOB).prev) == (1, 0)


async def test_signed_times_never_stand_still(store: Store, intent: Make, now_ms: int) -> None:
    times = [(await store.begin_send(intent(BOB, content=bytes([n]), now_ms=now_ms - n))).sent_at_ms for n in range(5)]
    assert times == sorted(set(times))


async def test_a_wrong_clock_stops_sending(store: Store, intent: Make, now_ms: int) -> None:
    """Signed times that go back, or lie before this program was made, would be called repeats by every receiver."""
    await store.begin_send(intent(BOB, content=b"1"))
    await store.begin_send(intent(BOB, content=b"2", now_ms=now_ms - DAY_MS + 1000))
    with pytest.raises(ClockWrong):
        await store.begin_send(intent(BOB, content=b"3", now_ms=now_ms - DAY_MS - 1000))
    with pytest.raises(ClockWrong):
        await store.begin_send(intent(BOB, content=b"4", now_ms=1_700_000_000_000))
    await store.renew(now_ms)
    after = await store.begin_send(intent(BOB, content=b"5", now_ms=now_ms + 1))
    assert after.row(BOB).serial == 1


async def test_one_refused_operation_leaves_the_others_of_its_commit(store: Store, intent: Make, now_ms: int) -> None:
    """Operations share a transaction; the one with the wrong clock must not undo, nor leave anything in, the others."""
    results = await asyncio.gather(
        *(store.begin_send(intent(BOB, content=bytes([n]), now_ms=1 if n == 7 else now_ms)) for n in range(20)),
        return_exceptions=True)
    plans = [result for result in results if not isinstance(result, BaseException)]
    assert [type(result) for result in results if isinstance(result, BaseException)] == [ClockWrong]
    assert sorted(plan.row(BOB).serial for plan in plans) == list(range(1, 20))


async def test_a_cancelled_caller_leaves_a_whole_row(store: Store, intent: Make) -> None:
    task = asyncio.ensure_future(store.begin_send(intent(BOB)))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await store.flush()
    assert (await store.begin_send(intent(BOB))).row(BOB).state is SendState.IN_DOUBT


async def test_two_processes_have_one_row_for_a_message(open_store: Open, intent: Make) -> None:
    """Both may be handed the same message; both must seal it under one id and number."""
    one, two = await open_store(), await open_store()
    plans = await asyncio.gather(*(store.begin_send(intent(BOB, CAROL)) for store in (one, two) * 4))
    assert len({plan.submission_id for plan in plans}) == 1
    assert {(row.address, row.serial) for plan in plans for row in plan.rows} == {(BOB, 1), (CAROL, 1)}
    assert sorted(plan.row(BOB).state for plan in plans) == [SendState.NEW] + [SendState.IN_DOUBT] * 7


async def test_retry_memory_ends(store: Store, intent: Make, now_ms: int) -> None:
    plan = await store.begin_send(intent(BOB))
    assert await store.expire_journal(now_ms + 23 * 3_600_000, retry_memory_hours=24) == 0
    assert await store.expire_journal(now_ms + 25 * 3_600_000, retry_memory_hours=24) == 1
    again = await store.begin_send(intent(BOB))
    assert again.submission_id != plan.submission_id
    assert again.row(BOB).serial == 2


async def test_everything_survives_a_restart(open_store: Open, intent: Make) -> None:
    store = await open_store()
    first = await store.begin_send(intent(BOB))
    await store.close()
    again = await (await open_store()).begin_send(intent(BOB))
    assert again.submission_id == first.submission_id
    assert again.row(BOB).state is SendState.IN_DOUBT


async def test_who_is_served_is_remembered_as_long_as_the_client_comes_back(store: Store, intent: Make, now_ms: int) -> None:
    """A queue tries for five days to reach the one who is missing: the other must not get it again after one."""
    hour = 3_600_000
    both = intent(BOB, CAROL)
    plan = await store.begin_send(both)
    await store.finish_send(plan, {BOB: (Outcome.ACCEPTED, "250 ok"), CAROL: (Outcome.UNSENT, "")}, now_ms)
    for hours in (20, 40, 60):
        at_ms = now_ms + hours * hour
        again = await store.begin_send(intent(BOB, CAROL, now_ms=at_ms))
        assert again.row(BOB).state is SendState.ACCEPTED, f"forgotten after {hours} hours"
        assert again.submission_id == plan.submission_id
        await store.finish_send(again, {CAROL: (Outcome.UNSENT, "")}, at_ms)
        await store.expire_journal(at_ms + hour, retry_memory_hours=24)
    await store.expire_journal(now_ms + 85 * hour, retry_memory_hours=24)
    assert (await store.begin_send(intent(BOB, CAROL, now_ms=now_ms + 85 * hour))).row(BOB).state is SendState.NEW
