"""What the `malote keys` commands share: the opened store, one change at a time, and how a card is described."""

from __future__ import annotations

import asyncio
import fcntl
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from malote.cli.settings import Settings, is_missing
from malote.core.card import Card, parse_card, usable_until_ms
from malote.core.identity import Identity
from malote.core.keyring import KeyringKey, lock_identity
from malote.core.primitives import check_post_quantum
from malote.errors import KeyMissing, StoreUnavailable
from malote.store import CardRecord, Level, LockedIdentity, PostgresPlace, Store
from malote.store.database import FILE_NAME

OWN = "your own keys"       # the evidence of the card of an identity

T = TypeVar("T")


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def store_exists(settings: Settings) -> bool:
    return isinstance(settings.store_place, PostgresPlace) or not is_missing(settings.store_path / FILE_NAME)


def read_store(settings: Settings, operation: Callable[[Store], Awaitable[T]]) -> T:
    """Run `operation` on the store, which is opened for reading only. Raises `KeyMissing` where there is none yet."""
    if not store_exists(settings):
        raise KeyMissing("there are no keys and no cards yet",
                         hint="malote keys new ADDRESS makes your own; malote keys import FILE takes in a card")
    return asyncio.run(_with_store(settings, operation, readonly=True))


def change_store(settings: Settings, operation: Callable[[Store], Awaitable[T]]) -> T:
    """Run `operation` on the store, made if need be. No second `malote keys` command changes it meanwhile."""
    return asyncio.run(_with_store(settings, operation, readonly=False))


async def _with_store(settings: Settings, operation: Callable[[Store], Awaitable[T]], *, readonly: bool) -> T:
    check_post_quantum()
    store = await Store.open(settings.store_place, readonly=readonly)
    try:
        if readonly:
            return await operation(store)
        if not await store.claim("keys"):
            raise StoreUnavailable(_BUSY, hint=_AGAIN)
        with _one_at_a_time(settings.store_path):
            return await operation(store)
    finally:
        await store.close()


_BUSY, _AGAIN = "another malote keys command is at work on this store, nothing was done", "try again when it is done"


@contextmanager
def _one_at_a_time(directory: Path) -> Iterator[None]:
    """Commands read, ask and then write; two of them at once could each make a keyring, and lock the other's keys out."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)        # the store may be in a database
        handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise StoreUnavailable(f"{directory}: cannot be used ({error.strerror})",
                               hint="it holds the locks of this machine; store.path names it") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StoreUnavailable(_BUSY, hint=_AGAIN) from error
        yield
    finally:
        os.close(handle)


async def own_card(store: Store, address: str) -> LockedIdentity | None:
    """The locked identity of an address, whose card is readable."""
    return next((record for record in await store.identities() if record.address == address), None)


def locked_record(keyring: KeyringKey, identity: Identity) -> LockedIdentity:
    at_ms = now_ms()
    locked = lock_identity(keyring, identity)
    return LockedIdentity(identity.address, identity.signing.public.id, locked, identity.card.raw, at_ms, at_ms)


async def save_identity(store: Store, keyring: KeyringKey, identity: Identity, *, fresh_keyring: bool = False) -> None:
    """Hold the identity, then its card: never a card to seal to whose private half is not kept."""
    if fresh_keyring:
        await store.set_keyring(keyring.header, [locked_record(keyring, identity)])
    else:
        await store.put_identity(locked_record(keyring, identity))
    await save_own_card(store, identity)


async def save_own_card(store: Store, identity: Identity) -> None:
    """The card of an identity is held as others' are, so that mail to oneself or a colleague here is sealed too."""
    await store.put_card(identity.address, identity.card.raw, identity.card.verify.id, level=Level.VERIFIED, evidence=OWN,
                         now_ms=now_ms(), succession=True)


def describe(card: Card, record: CardRecord | None = None, *, own: bool = False) -> dict[str, Any]:
    """What `--json` prints of a card: times in milliseconds since the epoch."""
    until_ms = usable_until_ms(card)
    try:
        card.encryption_key(now_ms())
        expired = False
    except KeyMissing:
        expired = True
    return {
        "address": card.address, "own": own, "fingerprint": card.fingerprint, "signing_key": card.verify.id.hex(),
        "algorithm": card.verify.algorithm.value, "sequence": card.sequence, "made_at_ms": card.made_at_ms,
        "usable_until_ms": until_ms, "expired": expired, "level": record.level.value if record else Level.VERIFIED.value,
        "evidence": record.evidence if record else OWN,
    }


def held_card(record: CardRecord) -> Card:
    return parse_card(record.card_raw)


def show_date(at_ms: int) -> str:
    return datetime.fromtimestamp(at_ms / 1000, UTC).date().isoformat()
