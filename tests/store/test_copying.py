"""`malote store migrate`: all of a store in another database, or nothing that anybody would take for a store."""

from __future__ import annotations

import asyncio
import fcntl
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lab.daemon import Home
from lab.postgres import Postgres
from malote.core.freshness import Arrival, Claim, FreshnessLimits, Verdict
from malote.errors import StoreUnavailable
from malote.store import (
    Attempt,
    FolderState,
    Level,
    LockedIdentity,
    Outcome,
    OutcomeEntry,
    PostgresPlace,
    SendIntent,
    SendState,
    Store,
    copying,
)
from malote.store.copying import TABLES, copy_store
from malote.store.database import FILE_NAME

BOB, CAROL = "bob@b.example", "carol@c.example"
Make = Callable[..., SendIntent]


async def fill(store: Store, intent: Make, claim: Callable[..., Claim], now_ms: int) -> None:
    """Something in every table."""
    await store.put_card(BOB, b"card \0 \xff", b"k" * 32, level=Level.VERIFIED, evidence="ü", now_ms=5, succession=False)
    await store.set_keyring(b"header", [LockedIdentity("anna@a.example", b"s" * 32, b"locked", b"card", 1, 2)])
    plan = await store.begin_send(intent(BOB, CAROL))
    await store.finish_send(plan, {BOB: (Outcome.ACCEPTED, "250 a\0b \udc80 ü")}, now_ms)
    for number in range(1, 1203):
        if number < 30:
            await store.judge(claim(number), Arrival(now_ms), FreshnessLimits())
        else:
            store.log_outcome(OutcomeEntry(number, "out", "sealed"))
    await store.distrust(7, recipient=BOB)
    await store.set_folder_state("anna", "INBOX", FolderState(1, 2, 3))
    await store.put_attempt(Attempt("anna", "INBOX", 1, 2, 3, 4, "why"), now_ms)
    store.remember_outer_id("<inner@a.example>", "<outer@a.example>", now_ms)
    await store.flush()


async def check(store: Store, intent: Make, claim: Callable[..., Claim], now_ms: int) -> None:
    """What the copy knows, and that numbers go on where they were."""
    record = await store.card(BOB)
    assert record is not None
    assert (record.card_raw, record.pinned_at_ms, record.evidence) == (b"card \0 \xff", 5, "ü")
    retry = await store.begin_send(intent(BOB, CAROL))
    assert [row.state for row in retry.rows] == [SendState.ACCEPTED, SendState.IN_DOUBT]
    assert "ü" in retry.row(BOB).reply
    assert (await store.begin_send(intent(BOB, content=b"next"))).row(BOB).serial == 2
    again = await store.judge(claim(7), Arrival(now_ms), FreshnessLimits())
    assert (again.first, again.judgement.verdict) == (False, Verdict.FRESH)
    new = await store.judge(claim(5000, prev=0, stream=b"t" * 8), Arrival(now_ms), FreshnessLimits())
    assert new.first
    assert new.row_id is not None
    assert new.row_id > 29, "numbers of rows go on too"
    found = await store.known_messages(["<inner@a.example>"])
    assert "<outer@a.example>" in str(found)
    assert len(await store.recent_outcomes(10_000)) == 1173


async def test_there_and_back(
    tmp_path: Path, postgres_url: str, intent: Make, claim: Callable[..., Claim], now_ms: int,
) -> None:
    store = await Store.open(tmp_path / "store")
    await fill(store, intent, claim, now_ms)
    keys = [await store.local_key(name) for name in ("journal", "seen", "outer")]
    await store.close()
    before = (tmp_path / "store" / FILE_NAME).read_bytes()
    seen: list[tuple[str, int, int]] = []
    there = await copy_store(tmp_path / "store", PostgresPlace(postgres_url), lambda *step: seen.append(step))
    assert (tmp_path / "store" / FILE_NAME).read_bytes() == before, "the source is as it was"
    assert [each.table for each in there] == [table.name for table in TABLES]
    assert {name for name, done, total in seen if done == total} == {table.name for table in TABLES}
    counts = {each.table: each.rows for each in there}
    assert counts["outcome"] == 1173
    assert [name for name, count in counts.items() if count == 0] == []
    back = await copy_store(PostgresPlace(postgres_url), tmp_path / "back", lambda *_: None)
    assert back == there
    for place in (tmp_path / "back", postgres_url):
        store = await Store.open(place)
        assert [await store.local_key(name) for name in ("journal", "seen", "outer")] == keys
        await check(store, intent, claim, now_ms)
        await store.close()


async def test_only_into_what_is_empty(tmp_path: Path, postgres_url: str) -> None:
    await (await Store.open(tmp_path / "store")).close()
    await (await Store.open(tmp_path / "other")).close()
    await (await Store.open(postgres_url)).close()
    for target in (PostgresPlace(postgres_url), tmp_path / "other"):
        with pytest.raises(StoreUnavailable, match="holds a store already"):
            await copy_store(tmp_path / "store", target, lambda *_: None)
        store = await Store.open(target)
        await store.distrust(1)
        await store.close()
    with pytest.raises(StoreUnavailable, match="where the store is already"):
        await copy_store(tmp_path / "store", tmp_path / "store", lambda *_: None)


async def test_not_while_a_node_runs(tmp_path: Path, postgres: Postgres, postgres_url: str) -> None:
    """What it wrote meanwhile would be missing in the copy."""
    store = await Store.open(postgres_url)
    with pytest.raises(StoreUnavailable, match="has the store open"):
        await copy_store(PostgresPlace(postgres_url), tmp_path / "back", lambda *_: None)
    await store.close()
    await copy_store(PostgresPlace(postgres_url), tmp_path / "back", lambda *_: None)


async def test_nobody_opens_it_while_it_is_copied(tmp_path: Path, postgres_url: str) -> None:
    await (await Store.open(postgres_url)).close()
    refused: list[BaseException] = []

    def meanwhile(_table: str, _done: int, _total: int) -> None:
        if not refused:
            try:
                _in_another_process(postgres_url)
            except subprocess.CalledProcessError as error:
                refused.append(error)
    await copy_store(PostgresPlace(postgres_url), tmp_path / "back", meanwhile)
    assert refused
    assert "is being copied" in refused[0].stderr   # type: ignore[attr-defined]


def _in_another_process(url: str) -> None:
    subprocess.run([sys.executable, "-c", "import asyncio, sys\nfrom malote.store import Store\n"
                    "asyncio.run(Store.open(sys.argv[1]))\n", url], check=True, capture_output=True, text=True,
                   env={"PYTHONPATH": ":".join(sys.path)})


@pytest.mark.parametrize("to", ["postgresql", "sqlite"])
async def test_a_difference_is_found(tmp_path: Path, postgres_url: str, monkeypatch: pytest.MonkeyPatch, to: str) -> None:
    """Then the target is no store, and says so, until a copy succeeds."""
    store = await Store.open(tmp_path / "store")
    await store.distrust(7)
    await store.close()
    target = PostgresPlace(postgres_url) if to == "postgresql" else tmp_path / "other"
    with monkeypatch.context() as patch:
        batches, calls = copying._batches, []

        def less(table: object, connection: object) -> object:
            calls.append(table)
            found = list(batches(table, connection))    # type: ignore[arg-type]
            return [] if calls.count(table) == 2 else found
        patch.setattr(copying, "_batches", less)
        with pytest.raises(StoreUnavailable, match="differs from what was sent"):
            await copy_store(tmp_path / "store", target, lambda *_: None)
    for readonly in (False, True):
        with pytest.raises(StoreUnavailable, match="begun and not finished"):
            await Store.open(target, readonly=readonly)
    await copy_store(tmp_path / "store", target, lambda *_: None)
    await (await Store.open(target)).close()


_COPY = """
import asyncio, sys, time
from pathlib import Path
from malote.store import PostgresPlace
from malote.store.copying import copy_store
def slowly(table, done, total):
    if table == sys.argv[3]:
        print("there", flush=True)
        time.sleep(60)
place = lambda text: PostgresPlace(text) if text.startswith("postgresql:") else Path(text)
asyncio.run(copy_store(place(sys.argv[1]), place(sys.argv[2]), slowly))
"""


@pytest.mark.parametrize("to", ["postgresql", "sqlite"])
async def test_cut_short_there_is_no_store(
    tmp_path: Path, postgres_url: str, intent: Make, claim: Callable[..., Claim], now_ms: int, to: str,
) -> None:
    """kill -9 in the middle, and once more; then it is run to its end."""
    store = await Store.open(tmp_path / "store")
    await fill(store, intent, claim, now_ms)
    await store.close()
    target = postgres_url if to == "postgresql" else str(tmp_path / "other")
    for table in ("journal", TABLES[-1].name):
        process = subprocess.Popen([sys.executable, "-c", _COPY, str(tmp_path / "store"), target, table], stdout=subprocess.PIPE,
                                   text=True, env={"PYTHONPATH": ":".join(sys.path)})
        assert process.stdout is not None
        assert await asyncio.to_thread(process.stdout.readline) == "there\n"
        process.kill()
        await asyncio.to_thread(process.communicate)
        async with asyncio.timeout(30):
            while True:     # PostgreSQL notices that its client is gone a moment later
                with pytest.raises(StoreUnavailable) as caught:
                    await Store.open(target)
                if "being copied" not in str(caught.value):
                    break
        assert "begun and not finished" in str(caught.value)
    place = PostgresPlace(target) if to == "postgresql" else Path(target)
    await copy_store(tmp_path / "store", place, lambda *_: None)
    store = await Store.open(target)
    await check(store, intent, claim, now_ms)
    await store.close()


def test_the_command(tmp_path: Path, postgres: Postgres) -> None:
    """As an administrator moves a store: not while the daemon runs; then there, and malote works with it; and back."""
    home = Home(tmp_path / "home")
    upstream = '[outgoing.upstream]\nhost = "127.0.0.1"\nport = 9\nsecurity = "none"'
    home.configure(upstream)
    home.keys("new", "--algorithm", "ed25519", "anna@a.example")
    url = postgres.url(postgres.new_database())
    with (home.root / "store" / "run.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = home.malote("store", "migrate", "--to", url)
        assert done.returncode != 0
        assert b"malote runs on this store" in done.stderr
    done = home.malote("store", "migrate", "--to", url)
    assert done.returncode == 0, done.stderr
    assert b"every row is there and equal" in done.stderr
    assert [line.split()[:2] for line in done.stdout.decode().splitlines() if line.startswith("identity")] == [["identity", "1"]]
    home.configure(upstream, store=f'url = "{url}"')
    assert "anna@a.example" in home.keys("list")
    back = home.malote("store", "migrate", "--to", str(tmp_path / "back"))
    assert back.returncode == 0, back.stderr
    assert back.stdout == done.stdout
    secret = home.malote("store", "migrate", "--to", "postgresql://malote:sesame@127.0.0.1/x")
    assert secret.returncode != 0
    assert b"sesame" not in secret.stderr
