"""What cannot be seen from outside: nothing is kept for ever, and nobody is asked at the wrong time."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from lab.daemon import PASSPHRASE, Home, free_port, listener, rule, upstream
from malote.config import load_config
from malote.core.identity import new_identity
from malote.core.keyring import KeyringKey, lock_identity
from malote.core.keys import SignatureAlgorithm
from malote.errors import KeysLocked
from malote.identities import Keyring
from malote.outgoing.submission import Submissions
from malote.service import Service, load_checked
from malote.store import LockedIdentity, Store


async def test_what_an_old_configuration_built_is_closed(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reload builds threads and connections anew: the old ones go when the last connection that uses them has gone."""
    closed: list[Submissions] = []
    close = Submissions.close

    def note(submissions: Submissions) -> None:
        closed.append(submissions)
        close(submissions)

    monkeypatch.setattr(Submissions, "close", note)
    monkeypatch.setattr("malote.service.REFRESH_SECONDS", 0.02)
    port = free_port()

    def configure(seal: str) -> None:
        home.configure(listener(port, 'auth = "none"') + upstream(1, None) + rule(seal))

    configure("never")
    store = await Store.open(home.root / "store")
    service = Service(load_config(home.config), home.config, store, Keyring(store, lambda: b""))
    running = asyncio.create_task(service.run())
    reader, writer = await connected(port)
    await reader.readline()
    for seal in ("require", "prefer", "never"):
        configure(seal)
        await service._reload_now()
    while len(closed) < 2:      # those in between were never used
        await asyncio.sleep(0.02)
    assert len(service._retired) == 1
    writer.close()
    await writer.wait_closed()
    while service._retired:
        await asyncio.sleep(0.02)
    assert len(closed) == 3
    service.stop()
    await running
    assert len(closed) == 4
    await store.close()


async def connected(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    while True:
        try:
            return await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            await asyncio.sleep(0.02)


async def put_identity(store: Store, key: KeyringKey, address: str) -> None:
    identity = new_identity(address, SignatureAlgorithm.ED25519, 1_790_000_000_000)
    await store.set_keyring(key.header, [LockedIdentity(address, identity.signing.public.id, lock_identity(key, identity),
                                                        identity.card.raw, 1, 1)])


async def test_a_prompt_is_only_at_the_start(tmp_path: Path) -> None:
    """A prompt later would hold up all mail, and nobody might be there: keys that come later are unlocked with the answer
    given, or not at all."""
    asked = 0

    def prompt() -> bytes:
        nonlocal asked
        asked += 1
        return PASSPHRASE.encode()

    key = KeyringKey.create(PASSPHRASE.encode())
    with_keys, without = await Store.open(tmp_path / "with"), await Store.open(tmp_path / "without")
    await put_identity(with_keys, key, "anna@a.example")
    keyring = Keyring(with_keys, prompt, ask_once=True)
    assert await keyring.refresh()
    await put_identity(with_keys, KeyringKey.create(PASSPHRASE.encode()), "anna@a.example")     # a new salt
    assert await keyring.refresh()
    assert asked == 1

    keyring = Keyring(without, prompt, ask_once=True)
    assert await keyring.refresh()
    await put_identity(without, key, "ben@b.example")
    with pytest.raises(KeysLocked, match="not asked for at the start"):
        await keyring.refresh()
    assert asked == 1
    await with_keys.close()
    await without.close()


async def test_a_fault_in_the_upkeep_does_not_end_the_service(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mail goes on, whatever the tasks beside it stumble over; and they are tried again."""
    tried = {"keys": 0, "expire": 0}

    async def fail_to_refresh(_keyring: Keyring) -> bool:
        tried["keys"] += 1
        if tried["keys"] > 1:       # the first is the start
            raise ZeroDivisionError
        return True

    async def fail_to_expire(*_: object, **__: object) -> None:
        tried["expire"] += 1
        raise ZeroDivisionError

    monkeypatch.setattr(Keyring, "refresh", fail_to_refresh)
    monkeypatch.setattr(Store, "expire", fail_to_expire)
    monkeypatch.setattr("malote.service.REFRESH_SECONDS", 0.01)
    monkeypatch.setattr("malote.service.EXPIRE_EVERY_SECONDS", 0.01)
    port = free_port()
    home.configure(listener(port, 'auth = "none"') + upstream(1, None) + rule("never"))
    store = await Store.open(home.root / "store")
    service = Service(load_config(home.config), home.config, store, Keyring(store, lambda: b""))
    running = asyncio.create_task(service.run())
    while min(tried.values()) < 4:
        await asyncio.sleep(0.01)
        assert not running.done()
    _, writer = await connected(port)
    writer.close()
    service.stop()
    await running
    await store.close()


def test_what_needs_a_restart_stays_as_it_is_in_a_reload(home: Home) -> None:
    """A store that is remembered for a shorter time from now on would forget, though the log said that nothing changed."""
    sections = listener(free_port()) + upstream(1, None)
    home.configure(sections)
    running = load_config(home.config)
    home.configure(sections, store="remember_days = 100", log='level = "info"')
    fresh = load_checked(running, home.config)
    assert load_config(home.config).store.remember_days == 100
    assert (fresh.store, fresh.log.level) == (running.store, "info")
