"""Disk full, locked, read-only, damaged: 451, nothing half done, and the same open store works again by itself afterwards."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from malote.core.freshness import Arrival, Claim, FreshnessLimits, Verdict
from malote.errors import StoreUnavailable
from malote.store import Level, Outcome, OutcomeEntry, SendIntent, SendState, Store, database
from malote.store.database import FILE_NAME

BOB = "bob@b.example"
Make = Callable[..., SendIntent]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of three megabytes."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a file system")
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m,mode=700", "tmpfs", str(place)], check=False).returncode != 0:
        pytest.skip("this machine does not allow to mount a file system")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks are waited for briefly, so that the tests are quick."""
    monkeypatch.setattr(database, "BUSY_MS", 50)


async def test_full_disk(small_disk: Path, intent: Make, claim: Callable[..., Claim], now_ms: int) -> None:
    store = await Store.open(small_disk / "store")
    first = await store.begin_send(intent(BOB))
    filler = small_disk / "filler"
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)
    results = [await asyncio.gather(store.begin_send(intent(BOB, content=b"full%d" % number)), return_exceptions=True)
               for number in range(200)]        # the pages that SQLite already has may hold some more
    given = [result.row(BOB).serial for result, in results if not isinstance(result, BaseException)]
    refused = [result for result, in results if isinstance(result, BaseException)]
    assert len(refused) > 50
    assert {type(error) for error in refused} == {StoreUnavailable}
    assert not any(str(small_disk) in str(error) for error in refused)
    with pytest.raises(StoreUnavailable, match="full"):
        await store.put_card(BOB, b"x" * 100_000, b"1" * 32, level=Level.TOFU, evidence="", now_ms=1, succession=False)
    assert await store.card(BOB) is None, "reading goes on"
    filler.unlink()
    after = await store.begin_send(intent(BOB, content=b"after"))
    assert after.row(BOB).serial > max([first.row(BOB).serial, *given])
    assert (await store.begin_send(intent(BOB))).row(BOB).state is SendState.IN_DOUBT
    assert (await store.judge(claim(), Arrival(now_ms), FreshnessLimits())).judgement.verdict is Verdict.FRESH
    await store.close()


async def test_read_only_disk(small_disk: Path, intent: Make) -> None:
    store = await Store.open(small_disk / "store")
    await store.begin_send(intent(BOB))
    await store.close()
    # an open file for writing keeps the kernel from remounting; so does it for an administrator, until the daemon restarts
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(StoreUnavailable):
        await Store.open(small_disk / "store")
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    store = await Store.open(small_disk / "store")
    assert (await store.begin_send(intent(BOB))).row(BOB).state is SendState.IN_DOUBT
    await store.close()


@pytest.mark.usefixtures("impatient")
async def test_locked_by_another_process(tmp_path: Path, intent: Make, now_ms: int) -> None:
    store = await Store.open(tmp_path / "store")
    plan = await store.begin_send(intent(BOB))
    other = sqlite3.connect(tmp_path / "store" / FILE_NAME, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    results = await asyncio.gather(
        store.begin_send(intent(BOB, content=b"two")), store.finish_send(plan, {BOB: (Outcome.ACCEPTED, "250 ok")}, now_ms),
        return_exceptions=True)
    assert [type(result) for result in results] == [StoreUnavailable, StoreUnavailable]
    assert "locked" in str(results[0])
    assert await store.list_cards() == [], "reading goes on"
    other.execute("ROLLBACK")
    other.close()
    await store.finish_send(plan, {BOB: (Outcome.ACCEPTED, "250 ok")}, now_ms)
    assert (await store.begin_send(intent(BOB, content=b"two"))).row(BOB).serial == 2
    await store.close()


@pytest.mark.usefixtures("impatient")
async def test_what_nobody_waits_for_is_written_after_the_outage(tmp_path: Path, intent: Make, now_ms: int) -> None:
    """A program that sends the same bytes twice on purpose is not swallowed because the store was locked in between."""
    store = await Store.open(tmp_path / "store")
    plan = await store.begin_send(intent(BOB))
    await store.finish_send(plan, {BOB: (Outcome.ACCEPTED, "250 ok")}, now_ms)
    other = sqlite3.connect(tmp_path / "store" / FILE_NAME, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    store.forget_send(plan)
    for number in range(10):
        store.log_outcome(OutcomeEntry(number, "out", "sealed"))
    with pytest.raises(StoreUnavailable):
        await store.flush()
    with pytest.raises(StoreUnavailable):
        await store.begin_send(intent(BOB))
    other.execute("ROLLBACK")
    other.close()
    again = await store.begin_send(intent(BOB))
    assert (again.row(BOB).state, again.submission_id == plan.submission_id) == (SendState.NEW, False)
    assert [entry.at_ms for entry in await store.recent_outcomes()] == list(range(10))[::-1]
    await store.close()


async def test_closing_writes_what_nobody_waits_for(tmp_path: Path) -> None:
    store = await Store.open(tmp_path / "store")
    for number in range(3000):
        store.log_outcome(OutcomeEntry(number, "out", "sealed"))
    await store.close()
    store = await Store.open(tmp_path / "store")
    assert len(await store.recent_outcomes(10_000)) == 3000
    await store.close()


async def test_a_store_that_vanished_is_not_made_anew(tmp_path: Path, intent: Make) -> None:
    """An empty store in the place of a lost one would give out the same numbers again."""
    store = await Store.open(tmp_path / "store")
    await store.begin_send(intent(BOB))
    other = sqlite3.connect(tmp_path / "store" / FILE_NAME, isolation_level=None)
    (tmp_path / "store").rename(tmp_path / "gone")
    store._writer._engine.dispose()
    await store._writer.write(lambda _db: store._writer._drop_connection())     # as after an I/O error
    with pytest.raises(StoreUnavailable):
        await store.begin_send(intent(BOB))
    assert not (tmp_path / "store").exists()
    (tmp_path / "gone").rename(tmp_path / "store")
    assert (await store.begin_send(intent(BOB))).row(BOB).state is SendState.IN_DOUBT
    other.close()
    await store.close()


async def test_a_damaged_file_is_reported_and_nothing_goes_out(tmp_path: Path, intent: Make) -> None:
    store = await Store.open(tmp_path / "store")
    for number in range(200):
        await store.begin_send(intent(BOB, content=b"%d" % number))
    await store.close()
    file = tmp_path / "store" / FILE_NAME
    size = file.stat().st_size
    with file.open("r+b") as damaged:
        damaged.seek(4096)
        damaged.write(os.urandom(size - 4096))

    async def use() -> None:
        store = await Store.open(tmp_path / "store")
        try:
            await store.begin_send(intent(BOB))
        finally:
            await store.close()
    with pytest.raises(StoreUnavailable):
        await use()
