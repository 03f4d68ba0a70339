"""Cards, identities and secrets, and that another process's change is seen."""

from __future__ import annotations

import asyncio
import hashlib
import subprocess
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from malote.store import Level, LockedIdentity, Store

Open = Callable[[], Awaitable[Store]]
BOB = "bob@b.example"


async def _put(store: Store, address: str = BOB, raw: bytes = b"card", skid: bytes = b"1" * 32, **other: Any) -> None:
    values: dict[str, Any] = {"level": Level.TOFU, "evidence": "file", "now_ms": 1000, "succession": False} | other
    await store.put_card(address, raw, skid, **values)


async def test_a_card_comes_back_as_it_was_put(store: Store) -> None:
    await _put(store, raw=b"\x00\xff card")
    record = await store.card(BOB)
    assert record is not None
    assert (record.card_raw, record.level) == (b"\x00\xff card", Level.TOFU)
    assert record.card_hash == hashlib.sha256(b"\x00\xff card").digest()
    assert await store.cards([BOB, "x@x.example"]) == {BOB: record}
    assert await store.list_cards() == [record]


async def test_who_had_a_card_is_never_forgotten(store: Store) -> None:
    """Removing a card must not make mail to that person leave in clear."""
    await _put(store)
    assert await store.remove_card(BOB)
    assert not await store.remove_card(BOB)
    assert await store.card(BOB) is None
    assert await store.had_card([BOB, "never@b.example"]) == {BOB}
    await store.expire(10**15)
    assert [past.card_raw for past in await store.past_cards(BOB)] == [b"card"]


async def test_a_weaker_level_does_not_replace_a_stronger_of_the_same_line(store: Store) -> None:
    await _put(store, level=Level.VERIFIED)
    await _put(store, raw=b"next", skid=b"2" * 32, succession=True, level=Level.SEEN, now_ms=2000)
    record = await store.card(BOB)
    assert record is not None
    assert (record.card_raw, record.level, record.pinned_at_ms, record.added_at_ms) == (b"next", Level.VERIFIED, 1000, 2000)
    await _put(store, raw=b"other", skid=b"3" * 32, level=Level.TOFU, now_ms=3000)
    record = await store.card(BOB)
    assert record is not None
    assert (record.level, record.pinned_at_ms) == (Level.TOFU, 3000)
    assert [past.card_raw for past in await store.past_cards(BOB)] == [b"card", b"next", b"other"]


async def test_another_connection_sees_a_change(open_store: Open) -> None:
    one, two = await open_store(), await open_store()
    assert await two.card(BOB) is None      # also what was not found is held in memory
    await _put(one)
    for raw in (b"card", None):
        async with asyncio.timeout(30):
            while (record := await two.card(BOB)) is None if raw else (record := await two.card(BOB)) is not None:
                await asyncio.sleep(0.05)
        assert (record and record.card_raw) == raw
        if raw:
            await one.remove_card(BOB)


async def test_another_process_changes_a_card(store: Store, store_url: str) -> None:
    code = ("import asyncio, sys\nfrom malote.store import Level, Store\n"
            "async def main():\n"
            "    store = await Store.open(sys.argv[1])\n"
            "    await store.put_card('bob@b.example', b'new', b'1' * 32, level=Level.TOFU, evidence='', now_ms=1,\n"
            "                         succession=False)\n"
            "    await store.close()\n"
            "asyncio.run(main())\n")
    await _put(store)
    assert (await store.card(BOB)) is not None
    command = [sys.executable, "-c", code, store_url]
    await asyncio.to_thread(subprocess.run, command, check=True, env={"PYTHONPATH": ":".join(sys.path)})
    async with asyncio.timeout(30):
        while (record := await store.card(BOB)) is None or record.card_raw != b"new":
            await asyncio.sleep(0.05)
    assert record.pinned_at_ms == 1000, "the same key: since when it is held does not change"


async def test_the_own_change_is_seen_at_once(store: Store) -> None:
    for number in range(20):
        await _put(store, raw=bytes([number]))
        record = await store.card(BOB)
        assert record is not None
        assert record.card_raw == bytes([number])


async def test_identities(store: Store) -> None:
    first = LockedIdentity("anna@a.example", b"1" * 32, b"locked", b"card", 1000, 1000)
    mark = await store.change_mark()
    await store.put_identity(first)
    assert await store.change_mark() != mark
    assert await store.identities() == [first]
    await store.put_identity(LockedIdentity("anna@a.example", b"2" * 32, b"new", b"card2", 2000, 2000))
    assert await store.identities() == [LockedIdentity("anna@a.example", b"2" * 32, b"new", b"card2", 1000, 2000)]
    assert await store.remove_identity("anna@a.example")
    assert not await store.remove_identity("anna@a.example")
    assert await store.identities() == []


async def test_a_new_passphrase_changes_header_and_identities_together(store: Store) -> None:
    assert await store.keyring_header() is None
    identity = LockedIdentity("anna@a.example", b"1" * 32, b"locked", b"card", 1, 1)
    await store.set_keyring(b"header", [identity])
    assert await store.keyring_header() == b"header"
    broken = LockedIdentity("bob@b.example", b"1" * 32, None, b"card", 1, 1)  # type: ignore[arg-type]
    with pytest.raises(Exception, match="store"):
        await store.set_keyring(b"other", [broken])
    assert await store.keyring_header() == b"header"
    assert await store.identities() == [identity]


async def test_local_keys_are_made_once(open_store: Open) -> None:
    one, two = await open_store(), await open_store()
    keys = await asyncio.gather(*(store.local_key(name) for store in (one, two) for name in ("journal", "mine", "other")))
    assert keys[:3] == keys[3:]
    assert len(set(keys)) == 3
    assert {len(key) for key in keys} == {32}
