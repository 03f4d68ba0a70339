"""A process that cannot reach the store any more lets go of its mailboxes before another may take them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from malote import membership
from malote.membership import Membership
from malote.store import Store, members

ONE, TWO = b"1" * 16, b"2" * 16


async def test_who_cannot_renew_lets_go_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Renewed, a lease outlasts its time. Not renewed, its holder is told to stop while nobody else can have it yet."""
    first, second = await Store.open(tmp_path / "store"), await Store.open(tmp_path / "store")
    await second.join(TWO)      # for 30 seconds
    monkeypatch.setattr(members, "MEMBER_MS", 3_000)
    monkeypatch.setattr(membership, "RENEW_SECONDS", 0.1)
    monkeypatch.setattr(membership, "STOP_BEFORE_SECONDS", 2.5)
    monkeypatch.setattr(membership, "CUT_BEFORE_SECONDS", 1.0)
    ours = Membership(first, ONE)
    told = asyncio.Event()
    seen: list[tuple[bool, float]] = []

    async def let_go(seconds: float) -> None:
        seen.append((await second.take_lease("box"), seconds))
        told.set()
    await ours.join()
    assert await ours.take("box")
    tasks = [asyncio.create_task(ours.keep()), asyncio.create_task(ours.guard(let_go))]
    try:
        await asyncio.sleep(3.5)
        assert not told.is_set(), "it was renewed all the time"
        assert not await second.take_lease("box")
        await first.close()     # from here on it cannot be renewed
        await told.wait()
        [(taken, seconds)] = seen
        assert not taken, "told only when another could already have it"
        assert 0 < seconds < 3
        assert not await ours.take("another"), "too late for more"
        while not await second.take_lease("box"):
            await asyncio.sleep(0.1)
        assert ours.seconds_left <= 0, "taken while it might still have been in use"
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await second.close()


async def test_who_was_away_for_long_lets_go_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that was suspended: its own clocks may say nothing of it, the database's does. What began before may not go on,
    whoever asks, also once the membership is renewed."""
    away, other = await Store.open(tmp_path / "store"), await Store.open(tmp_path / "store")
    monkeypatch.setattr(membership, "RENEW_SECONDS", 0.3)
    monkeypatch.setattr(members, "MEMBER_MS", 1_100)
    ours = Membership(away, ONE)
    await ours.join()
    assert await away.take_lease("box")
    before = ours.tenure
    monkeypatch.setattr(members, "MEMBER_MS", 30_000)
    before.renew(before.clock())            # a clock that stood still: as if nothing had happened
    await other.join(TWO)
    while not await other.take_lease("box"):
        await asyncio.sleep(0.05)
    told: list[float] = []
    done = asyncio.Event()

    async def let_go(seconds: float) -> None:
        told.append(seconds)
        done.set()
    assert before.seconds_left > 20
    tasks = [asyncio.create_task(ours.keep()), asyncio.create_task(ours.guard(let_go))]
    try:
        await done.wait()
        assert told == [0.0]
        assert before.seconds_left < 0
        assert ours.tenure.seconds_left > 20
        assert await ours.lost(["box"]) == ["box"]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await away.close()
        await other.close()
