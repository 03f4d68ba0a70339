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
    for module in (members, membership):
        monkeypatch.setattr(module, "MEMBER_MS", 3_000)
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
