"""What leaves unsealed is not journaled beforehand, and a retry still finds what was accepted."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from malote.errors import ClockWrong, StoreUnavailable
from malote.store import Outcome, OutcomeEntry, SendIntent, SendState, Store, held, writer
from malote.store.database import FILE_NAME

Make = Callable[..., SendIntent]
Open = Callable[[], Awaitable[Store]]
BOB, CAROL = "bob@b.example", "carol@c.example"
TAKEN = {BOB: (Outcome.ACCEPTED, "250 2.0.0 queued")}


@pytest.fixture
def store_url(tmp_path: Path) -> str:
    """PostgreSQL journals everything beforehand: test_postgres."""
    return f"sqlite:///{tmp_path}/store"


def rows(place: Path) -> int:
    """Journal rows in the file, as another process sees them."""
    with sqlite3.connect(place / "store" / FILE_NAME) as other:
        count: int = other.execute("select count(*) from journal").fetchone()[0]
    other.close()
    return count


async def test_a_reply_that_was_read_leaves_nothing(tmp_path: Path, store: Store, intent: Make, now_ms: int) -> None:
    """The common case costs no row, and the same bytes again are a new message."""
    ids = set()
    for _ in range(3):
        plan = store.begin_plain(intent(BOB, plain=(BOB,)))
        assert plan is not None
        assert (plan.row(BOB).state, plan.row(BOB).sealed) == (SendState.NEW, False)
        ids.add(plan.submission_id)
        store.finish_send_later(plan, TAKEN, now_ms)
        store.forget_send(plan)
    await store.flush()
    assert len(ids) == 3
    assert rows(tmp_path) == 0


async def test_a_retry_finds_what_was_accepted(store: Store, intent: Make, now_ms: int) -> None:
    """At once, while nothing is written yet; and again; until a client has read the reply."""
    plan = store.begin_plain(intent(BOB, plain=(BOB,)))
    assert plan is not None
    store.finish_send_later(plan, TAKEN, now_ms)
    for _ in range(2):
        assert store.begin_plain(intent(BOB, plain=(BOB,))) is None
        again = await store.begin_send(intent(BOB, plain=(BOB,)))
        assert (again.row(BOB).state, again.row(BOB).reply) == (SendState.ACCEPTED, "250 2.0.0 queued")
        assert again.submission_id == plan.submission_id
    store.forget_send(again)
    await store.flush()
    assert store.begin_plain(intent(BOB, plain=(BOB,))) is not None


async def test_a_retry_that_is_sealed_now_finds_it_too(store: Store, intent: Make, now_ms: int) -> None:
    plan = store.begin_plain(intent(BOB, plain=(BOB,)))
    assert plan is not None
    store.finish_send_later(plan, TAKEN, now_ms)
    assert (await store.begin_send(intent(BOB))).row(BOB).state is SendState.ACCEPTED


async def test_another_process_finds_it_once_it_is_written(open_store: Open, intent: Make, now_ms: int,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody calls: the timer writes what no proof came for."""
    monkeypatch.setattr(held, "HOLD_SECONDS", 0.01)
    one, two = await open_store(), await open_store()
    plan = one.begin_plain(intent(BOB, plain=(BOB,)))
    assert plan is not None
    assert two.begin_plain(intent(BOB, plain=(BOB,))) is not None
    one.finish_send_later(plan, TAKEN, now_ms)
    while one._held._accepted:
        await two.flush()
    await one.flush()
    assert two.begin_plain(intent(BOB, plain=(BOB,))) is None
    assert (await two.begin_send(intent(BOB, plain=(BOB,)))).row(BOB).state is SendState.ACCEPTED


async def test_closing_writes_what_is_held(open_store: Open, intent: Make, now_ms: int) -> None:
    store = await open_store()
    plan = store.begin_plain(intent(BOB, plain=(BOB,)))
    assert plan is not None
    store.finish_send_later(plan, TAKEN, now_ms)
    await store.close()
    with pytest.raises(StoreUnavailable):
        store.finish_send_later(plan, TAKEN, now_ms)
    with pytest.raises(StoreUnavailable):
        store.log_outcome(OutcomeEntry(1, "out", "plain"))
    again = await open_store()
    assert again.begin_plain(intent(BOB, plain=(BOB,))) is None
    assert (await again.begin_send(intent(BOB, plain=(BOB,)))).row(BOB).state is SendState.ACCEPTED


async def test_a_part_of_it_accepted_is_durable_at_once(open_store: Open, intent: Make, now_ms: int) -> None:
    """The client is told 451: its retry may come to another process."""
    one, two = await open_store(), await open_store()
    both = intent(BOB, CAROL, plain=(BOB, CAROL))
    plan = one.begin_plain(both)
    assert plan is not None
    await one.finish_send(plan, TAKEN | {CAROL: (Outcome.UNSENT, "")}, now_ms)
    assert two.begin_plain(both) is None
    again = await two.begin_send(both)
    assert [row.address for row in again.pending] == [CAROL]
    one.forget_send(plan)
    await one.flush()
    assert (await two.begin_send(both)).row(BOB).state is SendState.NEW


@pytest.mark.parametrize("outcome", [Outcome.REFUSED, Outcome.UNSENT, Outcome.IN_DOUBT])
async def test_what_is_sent_again_anyway_is_not_written(
        tmp_path: Path, store: Store, intent: Make, now_ms: int, outcome: Outcome) -> None:
    plan = store.begin_plain(intent(BOB, plain=(BOB,)))
    assert plan is not None
    await store.finish_send(plan, {BOB: (outcome, "")}, now_ms)
    await store.flush()
    assert rows(tmp_path) == 0


async def test_numbers_of_an_earlier_attempt_are_not_passed_over(open_store: Open, intent: Make) -> None:
    """A part in doubt that was sealed, by whatever process: its retry goes by the journal, sealed or not."""
    one, two = await open_store(), await open_store()
    await one.begin_send(intent(BOB))
    for store in (one, two):
        assert store.begin_plain(intent(BOB, plain=(BOB,))) is None


async def test_acceptance_is_final_whatever_another_process_wrote_meanwhile(
        open_store: Open, intent: Make, now_ms: int) -> None:
    one, two = await open_store(), await open_store()
    plan = one.begin_plain(intent(BOB, plain=(BOB,)))
    assert plan is not None
    other = await two.begin_send(intent(BOB))
    one.finish_send_later(plan, TAKEN, now_ms)
    await one.flush()
    again = await two.begin_send(intent(BOB))
    assert again.row(BOB).state is SendState.ACCEPTED
    assert (again.submission_id, again.row(BOB).serial) == (other.submission_id, other.row(BOB).serial)


async def test_a_wrong_clock_is_found(store: Store, intent: Make) -> None:
    assert store.begin_plain(intent(BOB, plain=(BOB,), now_ms=1)) is None
    with pytest.raises(ClockWrong):
        await store.begin_send(intent(BOB, plain=(BOB,), now_ms=1))


async def test_a_store_that_cannot_be_written_or_read_is_found(
        sqlite_store: Store, tmp_path: Path, intent: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """No mail leaves whose acceptance could not be remembered."""
    plain = intent(BOB, plain=(BOB,))
    assert sqlite_store.begin_plain(plain) is not None
    monkeypatch.setattr(sqlite_store._writer, "_failing", True)
    assert sqlite_store.begin_plain(plain) is None
    monkeypatch.setattr(sqlite_store._writer, "_failing", False)
    sqlite_store._reader.close()
    (tmp_path / "store" / FILE_NAME).rename(tmp_path / "gone")
    assert sqlite_store.begin_plain(plain) is None
    (tmp_path / "gone").rename(tmp_path / "store" / FILE_NAME)
    assert sqlite_store.begin_plain(plain) is not None, "it recovers by itself"


async def test_between_held_and_written_it_is_still_found(store: Store, intent: Make, now_ms: int,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    """The moment after the timer, before the writer's next commit: a retry then must not get a second copy sent."""
    monkeypatch.setattr(held, "HOLD_SECONDS", 0.01)
    monkeypatch.setattr(writer, "LAZY_SECONDS", 60)
    plain = intent(BOB, plain=(BOB,))
    plan = store.begin_plain(plain)
    assert plan is not None
    store.finish_send_later(plan, TAKEN, now_ms)
    for _ in range(20):
        await asyncio.sleep(0.005)
        assert store.begin_plain(intent(BOB, plain=(BOB,), content=b"another")) is not None
    for _ in range(2):      # also when the first to come back gives up before it could ask
        assert store.begin_plain(plain) is None
    assert (await store.begin_send(plain)).row(BOB).state is SendState.ACCEPTED
    store.forget_send(plan)
    await store.flush()
    assert store.begin_plain(plain) is not None
