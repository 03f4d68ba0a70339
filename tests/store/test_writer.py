"""Group commit: many share a transaction, one that fails is undone alone, order holds."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from pathlib import Path

import pytest
from sqlalchemy import select

from malote.errors import StoreUnavailable
from malote.store import Store, cards, database, schema
from malote.store.database import FILE_NAME, Db
from malote.store.schema import Statement
from malote.store.writer import MAX_BATCH, Operation


def _put(name: str, then: BaseException | None = None) -> Operation[None]:
    def operation(db: Db) -> None:
        cards.put_meta(db, name, b"value")
        if then is not None:
            raise then
    return operation


async def _names(store: Store) -> set[str]:
    rows = await store._writer.read(lambda db: db.rows(Statement(select(schema.meta.c.name)), {}))
    return {row[0] for row in rows if row[0].startswith("x")}


async def test_one_that_fails_is_undone_alone(store: Store) -> None:
    """What the failing operation wrote is gone, what the others of the same commit wrote is there."""
    jobs = [_put(f"x{n}", ValueError("mine") if n in (3, 50) else None) for n in range(100)]
    results = await asyncio.gather(*(store._writer.write(job) for job in jobs), return_exceptions=True)
    assert [n for n, result in enumerate(results) if isinstance(result, ValueError)] == [3, 50]
    assert await _names(store) == {f"x{n}" for n in range(100) if n not in (3, 50)}


async def test_a_faulty_statement_blames_nobody_else(store: Store) -> None:
    """A value that the driver refuses is the caller's fault, no outage."""
    bad = store._writer.write(lambda db: cards.put_meta(db, "x-bad", object()))     # type: ignore[arg-type]
    results = await asyncio.gather(store._writer.write(_put("x1")), bad, store._writer.write(_put("x2")), return_exceptions=True)
    assert [type(result) for result in results] == [type(None), StoreUnavailable, type(None)]
    assert await _names(store) == {"x1", "x2"}


async def test_many_share_a_commit_and_all_are_done(store: Store) -> None:
    count = 3 * MAX_BATCH + 7
    await asyncio.gather(*(store._writer.write(_put(f"x{n}")) for n in range(count)))
    assert len(await _names(store)) == count


async def test_a_result_comes_only_after_the_commit(sqlite_store: Store, tmp_path: Path) -> None:
    """Durable when it returns: another connection sees it."""
    raw = sqlite3.connect(tmp_path / "store" / FILE_NAME)
    for number in range(50):
        await sqlite_store._writer.write(_put(f"x{number}"))
        assert raw.execute("SELECT count(*) FROM meta WHERE name = ?", (f"x{number}",)).fetchone() == (1,)
    raw.close()


async def test_what_nobody_waits_for_comes_first(store: Store) -> None:
    """A row that was forgotten before the same message is sent again must be gone by then."""
    order: list[str] = []
    await store.flush()
    for _ in range(3000):
        store._writer.later(lambda _db: order.append("lazy"))
    await store._writer.write(lambda _db: order.append("write"))
    assert order == ["lazy"] * 3000 + ["write"]


async def test_what_nobody_waits_for_is_written_without_company(sqlite_store: Store, tmp_path: Path) -> None:
    await sqlite_store.flush()
    sqlite_store._writer.later(_put("x-lazy"))
    raw = sqlite3.connect(tmp_path / "store" / FILE_NAME)
    async with asyncio.timeout(30):
        while raw.execute("SELECT count(*) FROM meta WHERE name = 'x-lazy'").fetchone() == (0,):
            await asyncio.sleep(0.05)
    raw.close()


async def test_a_lazy_operation_that_fails_is_dropped(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    store._writer.later(_put("x1", ValueError("secret text")))
    await store._writer.write(_put("x2"))
    assert await _names(store) == {"x2"}
    assert "ValueError" in caplog.text
    assert "secret text" not in caplog.text


async def test_an_outage_is_logged_once(
    sqlite_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(database, "BUSY_MS", 20)
    await sqlite_store._writer.write(lambda _db: sqlite_store._writer._drop_connection())     # the next one has the short wait
    caplog.set_level(logging.INFO)
    other = sqlite3.connect(tmp_path / "store" / FILE_NAME, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    for number in range(5):
        with pytest.raises(StoreUnavailable, match="locked"):
            await sqlite_store._writer.write(_put(f"x{number}"))
    other.execute("ROLLBACK")
    other.close()
    await sqlite_store._writer.write(_put("x9"))
    texts = [record.message for record in caplog.records if record.name == "malote.store"]
    assert texts == ["the store cannot be written: the store is locked by another process", "the store can be written again"]
    assert str(tmp_path) not in caplog.text
