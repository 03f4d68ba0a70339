"""Where the store lies: ours alone, no links, and what happens when it comes from another machine."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from malote.core.freshness import Arrival, Claim, FreshnessLimits, Verdict
from malote.errors import ExitCode, StoreUnavailable
from malote.store import SendIntent, Store
from malote.store.database import FILE_NAME
from malote.store.migrate import MADE_NAME

BOB = "bob@b.example"


async def test_directory_and_files_are_ours_alone(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        store = await Store.open(tmp_path / "deep" / "store")
        await store.distrust(1)
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "deep" / "store").iterdir()}
        await store.close()
    finally:
        os.umask(old)
    assert modes == dict.fromkeys((FILE_NAME, f"{FILE_NAME}-wal", f"{FILE_NAME}-shm", MADE_NAME), 0o600)
    assert stat.S_IMODE((tmp_path / "deep" / "store").stat().st_mode) == 0o700


@pytest.mark.parametrize("mode", [0o701, 0o750, 0o777])
async def test_a_directory_open_to_others_is_refused(tmp_path: Path, mode: int) -> None:
    place = tmp_path / "store"
    place.mkdir()
    place.chmod(mode)
    with pytest.raises(StoreUnavailable, match="other users") as caught:
        await Store.open(place)
    assert caught.value.hint == f"chmod 700 {place}"
    assert caught.value.exit_code is ExitCode.STORE
    assert str(tmp_path) not in str(caught.value.reply)


async def test_a_file_open_to_others_is_refused(tmp_path: Path) -> None:
    await (await Store.open(tmp_path / "store")).close()
    (tmp_path / "store" / FILE_NAME).chmod(0o644)
    with pytest.raises(StoreUnavailable, match="other users"):
        await Store.open(tmp_path / "store")


@pytest.mark.parametrize("loss", ["removed", "emptied"])
async def test_a_lost_store_is_not_replaced_by_a_new_one(tmp_path: Path, loss: str) -> None:
    """A new one would take every repeat for fresh, and forget to whom mail must be sealed."""
    place, file = tmp_path / "store", tmp_path / "store" / FILE_NAME
    await (await Store.open(place)).close()
    if loss == "removed":
        file.unlink()
    else:
        file.write_bytes(b"")
    for _ in range(2):
        with pytest.raises(StoreUnavailable, match="gone or empty") as caught:
            await Store.open(place)
    assert caught.value.hint.endswith(f"rm {place / MADE_NAME}")
    with pytest.raises(StoreUnavailable, match="is empty"):
        await Store.open(place, readonly=True)
    (place / MADE_NAME).unlink()
    await (await Store.open(place)).close()


async def test_an_empty_file_of_a_first_start_that_was_cut_short(tmp_path: Path) -> None:
    place = tmp_path / "store"
    place.mkdir(mode=0o700)
    (place / FILE_NAME).touch(mode=0o600)
    await (await Store.open(place)).close()
    assert (place / MADE_NAME).exists()


async def test_links_are_refused(tmp_path: Path) -> None:
    await (await Store.open(tmp_path / "real")).close()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(StoreUnavailable, match="link"):
        await Store.open(tmp_path / "link")
    (tmp_path / "store").mkdir(mode=0o700)
    (tmp_path / "store" / FILE_NAME).symlink_to(tmp_path / "real" / FILE_NAME)
    with pytest.raises(StoreUnavailable, match="link"):
        await Store.open(tmp_path / "store")


async def test_a_file_in_the_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "store").write_bytes(b"")
    with pytest.raises(StoreUnavailable):
        await Store.open(tmp_path / "store")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make files of another user")
async def test_files_of_different_owners_are_refused(tmp_path: Path) -> None:
    await (await Store.open(tmp_path / "store")).close()
    os.chown(tmp_path / "store" / FILE_NAME, 65534, 65534)
    with pytest.raises(StoreUnavailable, match="owners"):
        await Store.open(tmp_path / "store")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may look into the store of another user")
async def test_the_administrator_leaves_no_files_of_their_own(tmp_path: Path) -> None:
    """Else the service could not open its store again after root had looked into it."""
    await (await Store.open(tmp_path / "store")).close()
    for path in (tmp_path / "store", tmp_path / "store" / FILE_NAME):
        os.chown(path, 65534, 65534)
    (tmp_path / "store" / MADE_NAME).unlink()
    store = await Store.open(tmp_path / "store")
    await store.distrust(1)
    assert {path.stat().st_uid for path in (tmp_path / "store").iterdir()} == {65534}
    await store.close()


async def test_reading_only_makes_nothing(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable, match="no store"):
        await Store.open(tmp_path / "store", readonly=True)
    assert not (tmp_path / "store").exists()


async def test_reading_only_writes_nothing(tmp_path: Path) -> None:
    writer = await Store.open(tmp_path / "store")
    reader = await Store.open(tmp_path / "store", readonly=True)
    assert await reader.list_cards() == []
    with pytest.raises(StoreUnavailable, match="read-only"):
        await reader.distrust(1)
    await reader.close()
    await writer.close()
    reader = await Store.open(tmp_path / "store", readonly=True)    # also when nobody else has it open
    assert await reader.list_cards() == []
    await reader.close()
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "store").iterdir()} == {0o600}


@pytest.mark.parametrize("place", ["mysql://x/y", "sqlite://relative", "http://x/y"])
async def test_other_addresses_are_refused(place: str) -> None:
    with pytest.raises(StoreUnavailable, match="sqlite:///"):
        await Store.open(place)


async def test_a_store_on_another_machine_counts_anew(
    tmp_path: Path, intent: Callable[..., SendIntent], claim: Callable[..., Claim], now_ms: int,
) -> None:
    """A copied store would give out numbers that are in use, and does not know what came to the other one."""
    store = await Store.open(tmp_path / "store", machine_id=b"one")
    first = await store.begin_send(intent(BOB))
    keys = [await store.local_key(name) for name in ("device", "journal")]
    await store.close()
    store = await Store.open(tmp_path / "store", machine_id=b"one")
    assert await store.local_key("device") == keys[0]
    same = await store.begin_send(intent(BOB, content=b"two"))
    assert (same.row(BOB).stream, same.row(BOB).serial) == (first.row(BOB).stream, 2)
    await store.close()
    store = await Store.open(tmp_path / "store", machine_id=b"two")
    assert await store.local_key("device") != keys[0], "two watchers must be told apart"
    assert await store.local_key("journal") == keys[1], "a retry must still be recognised"
    moved = await store.begin_send(intent(BOB, content=b"three"))
    assert moved.row(BOB).stream != first.row(BOB).stream
    assert moved.row(BOB).serial == 1
    judged = await store.judge(claim(sent_at_ms=now_ms - 1), Arrival(now_ms), FreshnessLimits())
    assert judged.judgement.verdict is Verdict.UNVERIFIABLE
    retry = await store.begin_send(intent(BOB))
    assert (retry.row(BOB).stream, retry.row(BOB).serial) == (first.row(BOB).stream, 1), "in doubt: still the same message"
    await store.close()


async def test_without_a_machine_id_nothing_is_concluded(tmp_path: Path, intent: Callable[..., SendIntent]) -> None:
    store = await Store.open(tmp_path / "store", machine_id=b"one")
    first = await store.begin_send(intent(BOB))
    await store.close()
    store = await Store.open(tmp_path / "store", machine_id=b"")
    assert (await store.begin_send(intent(BOB, content=b"two"))).row(BOB).stream == first.row(BOB).stream
    await store.close()


async def test_a_closed_store_says_so(tmp_path: Path, intent: Callable[..., SendIntent]) -> None:
    store = await Store.open(tmp_path / "store")
    await store.close()
    await store.close()
    with pytest.raises(StoreUnavailable, match="closed"):
        await store.begin_send(intent(BOB))
