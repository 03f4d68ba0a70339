"""Processes that share a store: who is one, what each has to itself, and a message that two of them are to send at once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from malote.core.freshness import Arrival, Claim, FreshnessLimits
from malote.errors import LeaseLost, SentElsewhere
from malote.membership import decide_shares
from malote.store import SendIntent, Store, members, outbox
from malote.store.records import Outcome, SendState

OpenStore = Callable[[], Awaitable[Store]]
MakeIntent = Callable[..., SendIntent]
ONE, TWO, THREE = (bytes([number]) * 16 for number in (1, 2, 3))
BOB, CLEO = "bob@b.example", "cleo@c.example"
OK = (Outcome.ACCEPTED, "250 2.0.0 queued")


@pytest.fixture
async def first(open_store: OpenStore) -> Store:
    store = await open_store()
    await store.join(ONE)
    return store


@pytest.fixture
async def second(first: Store, open_store: OpenStore) -> Store:
    store = await open_store()
    await store.join(TWO)
    return store


async def test_what_one_sends_another_does_not_begin(first: Store, second: Store, intent: MakeIntent) -> None:
    """Not even for another recipient of it; a different message is no matter."""
    message = intent(BOB, plain=(BOB,))
    await first.begin_send(message)
    for same in (message, intent(CLEO), intent(BOB, CLEO)):
        with pytest.raises(SentElsewhere):
            await second.begin_send(same)
    assert (await second.begin_send(intent(BOB, content=b"two"))).row(BOB).state is SendState.NEW


async def test_what_one_has_sent_another_does_not_send_again(first: Store, second: Store, intent: MakeIntent) -> None:
    """It waits for a moment longer, in case the client's proof that it read the answer is about to be written down."""
    message = intent(BOB, CLEO)
    plan = await first.begin_send(message)
    await first.finish_send(plan, {BOB: OK, CLEO: OK}, message.now_ms)
    with pytest.raises(SentElsewhere):
        await second.begin_send(replace(message, now_ms=message.now_ms + outbox.PROOF_MS - 1))
    again = await second.begin_send(replace(message, now_ms=message.now_ms + outbox.PROOF_MS))
    assert again.pending == ()
    assert again.submission_id == plan.submission_id


async def test_what_was_read_may_be_sent_again_by_another(first: Store, second: Store, intent: MakeIntent) -> None:
    """The same bytes twice on purpose, over two workers: two messages."""
    message = intent(BOB)
    plan = await first.begin_send(message)
    first.finish_send_later(plan, {BOB: OK}, message.now_ms)
    first.forget_send(plan)
    await first.flush()
    again = await second.begin_send(message)
    assert again.row(BOB).state is SendState.NEW
    assert again.submission_id != plan.submission_id


async def test_a_part_left_in_doubt_may_be_tried_by_another_at_once(first: Store, second: Store, intent: MakeIntent) -> None:
    """Under the same id and number, so that the receiver sees one message; and what was not sent at all as well."""
    message = intent(BOB, CLEO)
    plan = await first.begin_send(message)
    await first.finish_send(plan, {BOB: (Outcome.IN_DOUBT, ""), CLEO: (Outcome.UNSENT, "")}, message.now_ms)
    again = await second.begin_send(message)
    assert again.submission_id == plan.submission_id
    assert (again.row(BOB).state, again.row(BOB).serial) == (SendState.IN_DOUBT, plan.row(BOB).serial)
    assert again.row(CLEO).state is SendState.NEW
    with pytest.raises(SentElsewhere):
        await first.begin_send(message)


async def test_a_message_that_came_to_nothing_is_let_go(first: Store, second: Store, intent: MakeIntent) -> None:
    first.let_go(await first.begin_send(intent(BOB)))
    await first.flush()
    assert (await second.begin_send(intent(BOB))).row(BOB).attempt == 2


async def test_of_two_at_the_same_moment_one_begins(first: Store, second: Store, intent: MakeIntent) -> None:
    """However they meet in the database."""
    for number in range(20):
        message = intent(BOB, CLEO, content=b"%d" % number)
        done = await asyncio.gather(first.begin_send(message), second.begin_send(message), return_exceptions=True)
        assert sorted(type(each).__name__ for each in done) == ["SendPlan", "SentElsewhere"]


async def test_the_dead_hold_up_nobody(first: Store, second: Store, open_store: OpenStore, intent: MakeIntent,
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither one whose membership ran out, nor one whose successor says that it is dead."""
    plan = await first.begin_send(intent(BOB))
    third = await open_store()
    await third.join(THREE, before=ONE)
    again = await second.begin_send(intent(BOB))
    assert again.row(BOB).serial == plan.row(BOB).serial
    monkeypatch.setattr(members, "MEMBER_MS", 50)
    await second.renew_membership(0)
    with pytest.raises(SentElsewhere):
        await third.begin_send(intent(BOB))
    await asyncio.sleep(0.1)
    assert (await third.begin_send(intent(BOB))).row(BOB).attempt == 3


async def test_nothing_is_in_flight_for_ever(first: Store, second: Store, intent: MakeIntent) -> None:
    """An outcome that could not be written down must not block the message for as long as its process lives."""
    message = intent(BOB)
    await first.begin_send(message)
    with pytest.raises(SentElsewhere):
        await second.begin_send(replace(message, now_ms=message.now_ms + outbox.IN_FLIGHT_MS - 1))
    await second.begin_send(replace(message, now_ms=message.now_ms + outbox.IN_FLIGHT_MS))


async def test_alone_a_store_knows_no_others(open_store: OpenStore, intent: MakeIntent) -> None:
    """Rows of an earlier time with several workers are in doubt, as after any crash."""
    earlier = await open_store()
    await earlier.join(ONE)
    await earlier.begin_send(intent(BOB))
    alone = await open_store()
    assert (await alone.begin_send(intent(BOB))).row(BOB).state is SendState.IN_DOUBT


async def test_a_member_journals_what_leaves_unsealed_too(first: Store, intent: MakeIntent) -> None:
    """Or another would not see that it is in flight."""
    assert first.begin_plain(intent(BOB, plain=(BOB,))) is None


async def test_a_lease_is_held_by_one(first: Store, second: Store) -> None:
    assert await first.take_lease("box")
    assert await first.take_lease("box")
    assert not await second.take_lease("box")
    assert await second.take_lease("other")
    assert await second.leases() == {"box": ONE, "other": TWO}
    await second.give_lease_back("box")     # which is not its own
    assert not await second.take_lease("box")
    await first.give_lease_back("box")
    assert await second.take_lease("box")


async def test_of_many_who_ask_at_once_one_gets_the_lease(first: Store, second: Store, open_store: OpenStore) -> None:
    third = await open_store()
    await third.join(THREE)
    for number in range(10):
        got = await asyncio.gather(*(store.take_lease(f"box {number}") for store in (first, second, third)))
        assert sum(got) == 1


async def test_leases_of_the_dead_are_free(first: Store, second: Store, open_store: OpenStore,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    """When the membership ran out, when it left, and when its successor says so; renewed in time they are not."""
    monkeypatch.setattr(members, "MEMBER_MS", 400)
    await first.renew_membership(1)
    assert await first.take_lease("box")
    for _ in range(4):
        await asyncio.sleep(0.15)
        await first.renew_membership(1)
        assert not await second.take_lease("box")
    await asyncio.sleep(0.5)
    assert ONE not in await second.members()
    await second.renew_membership(1)
    assert await second.take_lease("box")
    assert not await first.take_lease("box"), "who is no member takes nothing"
    third = await open_store()
    await third.join(THREE, before=TWO)
    assert await third.take_lease("box")
    await third.leave()
    await first.renew_membership(1)
    assert await first.take_lease("box")


async def test_a_renewal_says_whether_it_came_in_time(first: Store, second: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the clock of the database, which is the one that others go by; and what began before has no leave to go on."""
    before = first.tenure
    assert await first.renew_membership(1)
    assert first.tenure is before
    assert before.seconds_left > 20
    monkeypatch.setattr(members, "MEMBER_MS", members.EDGE_MS - 1)
    assert await first.renew_membership(1)
    monkeypatch.setattr(members, "MEMBER_MS", 30_000)
    assert not await first.renew_membership(1), "so late that another may have seen it as gone"
    assert before.seconds_left < 0
    assert first.tenure is not before
    assert await first.renew_membership(1)
    await first.leave()         # or a database that knows nothing of us, after a failover
    assert not await first.renew_membership(1)
    assert ONE in await second.members()


async def test_without_its_lease_nothing_is_judged(first: Store, second: Store, claim: Callable[..., Claim], now_ms: int) -> None:
    """The last fence, in the same transaction: a process that does not know yet that it was away for long."""
    await first.take_lease("box")
    limits = FreshnessLimits()
    assert (await first.judge(claim(1), Arrival(now_ms), limits, lease="box")).first
    await second.join(TWO, before=ONE)
    assert await second.take_lease("box")
    with pytest.raises(LeaseLost):
        await first.judge(claim(2), Arrival(now_ms), limits, lease="box")
    assert (await second.judge(claim(2), Arrival(now_ms), limits, lease="box")).first, "and nothing was written"


async def test_a_plan_lasts_as_long_as_the_tenure_that_it_was_made_in(first: Store, intent: MakeIntent) -> None:
    before = await first.begin_send(intent(BOB))
    assert before.tenure is first.tenure
    await first.leave()
    await first.renew_membership(0)
    after = await first.begin_send(intent(BOB, content=b"two"))
    assert before.tenure is not None
    assert before.tenure.seconds_left < 0
    assert after.tenure is not None
    assert after.tenure.seconds_left > 0


def shares(wanted: list[str], held: dict[bytes, set[str]], own: bytes, overdue: set[str] | None = None,
           kept: set[str] | None = None) -> tuple[list[str], list[str]]:
    leases = {name: owner for owner, names in held.items() for name in names}
    take, give = decide_shares(wanted, leases, dict.fromkeys(held, len(wanted)), own, held[own],
                               set() if overdue is None else overdue, kept or set())
    return sorted(take), sorted(give)


def test_shares_are_even() -> None:
    """A process takes what is free up to its share, and gives back what is more."""
    boxes = ["a", "b", "c", "d", "e"]
    assert len(shares(boxes, {ONE: set(), TWO: set()}, ONE)[0]) == 3
    assert shares(boxes, {ONE: set("abc"), TWO: set()}, TWO)[0] == ["d", "e"]
    take, give = shares(boxes, {ONE: set("abcde"), TWO: set()}, ONE)
    assert take == []
    assert len(give) == 2
    assert shares(boxes, {ONE: set("abc"), TWO: set("de")}, ONE) == ([], [])
    assert shares(boxes, {ONE: set("abc")}, ONE)[0] == ["d", "e"], "alone it takes all"


def test_what_nobody_takes_is_taken_and_kept() -> None:
    """An account that the others do not have in their configuration must not go unwatched, or to and fro."""
    boxes = ["a", "b"]
    overdue: set[str] = set()
    assert shares(boxes, {ONE: {"a"}, TWO: set()}, ONE, overdue)[0] == []
    assert overdue == {"b"}
    assert shares(boxes, {ONE: {"a"}, TWO: set()}, ONE, overdue)[0] == ["b"]
    assert shares(boxes, {ONE: {"a", "b"}, TWO: set()}, ONE, kept={"b"})[1] == ["a"]
    assert shares(boxes, {ONE: {"a", "b"}, TWO: set()}, ONE, kept={"a", "b"})[1] == []
