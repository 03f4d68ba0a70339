"""The unlocked identities of a store, kept in memory and in step with what `malote keys` does meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from malote.core.identity import Identity
from malote.core.keyring import KeyringKey, unlock_identity
from malote.errors import KeysLocked
from malote.store import Store


class Keyring:
    """`identities` by address. `passphrase` gives the passphrase each time it is needed: once, unless it is changed.

    `ask_once`: it asks a person, which is possible only at the first `refresh`; afterwards the answer given then counts.
    """

    def __init__(self, store: Store, passphrase: Callable[[], bytes], *, ask_once: bool = False) -> None:
        self.identities: Mapping[str, Identity] = {}
        self._store = store
        self._passphrase = passphrase
        self._ask_once = ask_once
        self._key: KeyringKey | None = None
        self._header: bytes | None = None
        self._mark: bytes | None = None

    async def refresh(self) -> bool:
        """Unlock what was added or changed. True: something was. Raises `KeysLocked`, `StoreUnavailable`; then nothing changes.

        A store without identities is none: nothing is asked for, `identities` is empty.
        """
        mark = await self._store.change_mark()
        if mark == self._mark:
            return False
        header = await self._store.keyring_header()
        if header is None:
            self.identities, self._mark = {}, mark
            self._end_asking(None)
            return True
        if header != self._header or self._key is None:
            passphrase = self._passphrase()
            # 100 ms of Argon2id: not on the loop
            self._key = await asyncio.to_thread(KeyringKey.from_header, header, passphrase)
            self._header = header
            self._end_asking(passphrase)
        records = await self._store.identities()
        self.identities = {record.address: unlock_identity(self._key, record.address, record.locked) for record in records}
        self._mark = mark
        return True

    def again(self, store: Store) -> Keyring:
        """The same, unlocked already, over another process's connection to the store: nobody is asked, nothing stretched."""
        heir = Keyring(store, self._passphrase, ask_once=self._ask_once)
        heir._key, heir._header = self._key, self._header
        return heir

    def _end_asking(self, answer: bytes | None) -> None:
        """A prompt would hold up the whole service: from now on the answer is what it was."""
        if not self._ask_once:
            return

        def given() -> bytes:
            if answer is None:
                raise KeysLocked("private keys were made or changed, and their passphrase was not asked for at the start",
                                 hint="start malote again, or set keys.unlock in the configuration")
            return answer

        self._ask_once, self._passphrase = False, given


async def open_identities(store: Store, passphrase: Callable[[], bytes]) -> Mapping[str, Identity]:
    """All of them, once. Raises `KeysLocked`, also when there are none."""
    keyring = Keyring(store, passphrase)
    await keyring.refresh()
    if not keyring.identities:
        raise KeysLocked("there are no private keys here yet", hint="malote keys new ADDRESS")
    return keyring.identities
