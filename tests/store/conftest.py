"""The contract tests take `store_url`, whose two parameters are the two databases."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from malote.core.freshness import Claim
from malote.store import SendIntent, SendRecipient, Store

NOW_MS = time.time_ns() // 1_000_000
SKID = b"k" * 32


@pytest.fixture(params=["sqlite", "postgresql"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/store"
    url: str = request.getfixturevalue("postgres_url")
    return url


@pytest.fixture
async def open_store(store_url: str) -> AsyncIterator[Callable[[], Awaitable[Store]]]:
    """Opens the one store, as often as it is called: each as another process would have it."""
    opened: list[Store] = []

    async def open_one() -> Store:
        store = await Store.open(store_url)
        opened.append(store)
        return store
    yield open_one
    for store in opened:
        await store.close()


@pytest.fixture
async def store(open_store: Callable[[], Awaitable[Store]]) -> Store:
    return await open_store()


@pytest.fixture
async def sqlite_store(tmp_path: Path) -> AsyncIterator[Store]:
    """For what is about SQLite itself: the file is `tmp_path / "store" / FILE_NAME`."""
    store = await Store.open(tmp_path / "store")
    yield store
    await store.close()


@pytest.fixture
def intent() -> Callable[..., SendIntent]:
    """An intent to send to the given addresses; `plain` names those that are not sealed."""
    def make(*addresses: str, content: bytes = b"one", now_ms: int = NOW_MS, plain: tuple[str, ...] = (),
             login: str = "anna", sender: str = "anna@a.example", skid: bytes = SKID) -> SendIntent:
        recipients = [SendRecipient(address, address not in plain) for address in addresses]
        return SendIntent(login, sender, skid, content.ljust(32, b"."), recipients, now_ms)
    return make


@pytest.fixture
def claim() -> Callable[..., Claim]:
    """A well signed message, serial 1 of its stream; its id, payload and original follow `number`."""
    def make(number: int = 1, **other: object) -> Claim:
        values: dict[str, object] = {
            "recipient": "bob@b.example", "sender": "anna@a.example", "manifest_id": number.to_bytes(16, "big"), "skid": SKID,
            "stream": b"s" * 8, "serial": number, "prev": number - 1, "sent_at_ms": NOW_MS - 1000, "expires_at_ms": None,
            "payload_digest": number.to_bytes(32, "big"), "original_sha512": number.to_bytes(64, "big"),
            "signature": "valid", "addressed": True,
        }
        return Claim(**(values | other))    # type: ignore[arg-type]
    return make


@pytest.fixture
def now_ms() -> int:
    return NOW_MS
