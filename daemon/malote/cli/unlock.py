"""The passphrase of the private keys: from a prompt, a key file or a systemd credential; never from arguments or environment."""

from __future__ import annotations

import os
from getpass import getpass
from pathlib import Path

from malote.config import KeysConfig
from malote.core.keyring import KeyringKey
from malote.errors import KeysLocked
from malote.private_files import MAX_SECRET_BYTES, read_credential, read_private_file
from malote.store import Store

_NO_TERMINAL = 'set keys.unlock = "file" and keys.file, or keys.unlock = "credential", in the configuration'


async def open_keyring(store: Store, config: KeysConfig) -> KeyringKey:
    """Unlock the store's keyring. Raises `KeysLocked`, also when there is none yet."""
    header = await store.keyring_header()
    if header is None:
        raise KeysLocked("there are no private keys here yet", hint="malote keys new ADDRESS")
    return KeyringKey.from_header(header, read_passphrase(config))


async def open_or_create_keyring(store: Store, config: KeysConfig) -> tuple[KeyringKey, bool]:
    """As `open_keyring`; without one, ask for a passphrase and make it. True: made now, and not yet in the store."""
    if await store.keyring_header() is not None:
        return await open_keyring(store, config), False
    return KeyringKey.create(read_passphrase(config, new=True)), True


def read_passphrase(config: KeysConfig, *, new: bool = False) -> bytes:
    """Raises `KeysLocked` where it cannot be had. `new`: a prompt asks twice."""
    match config.unlock:
        case "file":
            if config.file is None:
                raise KeysLocked('keys.unlock is "file", but keys.file is not set')
            return read_key_file(config.file)
        case "credential":
            return read_credential(config.credential, error=KeysLocked)
        case "prompt":
            return ask_passphrase("New passphrase for your private keys" if new else "Passphrase of the private keys", new=new)


def ask_passphrase(prompt: str, *, new: bool) -> bytes:
    """Ask on the terminal itself: stdin may be a mail. Raises `KeysLocked` without a terminal."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError as error:
        raise KeysLocked("there is no terminal to ask for the passphrase on", hint=_NO_TERMINAL) from error
    try:
        passphrase = getpass(f"{prompt}: ")
        if new and passphrase and getpass("The same again: ") != passphrase:
            raise KeysLocked("the two passphrases differ, nothing was done")
    except EOFError as error:
        raise KeysLocked("no passphrase was given") from error
    secret = passphrase.encode("utf-8", "surrogateescape")
    if not secret:
        raise KeysLocked("the passphrase is empty, nothing was done")
    if len(secret) > MAX_SECRET_BYTES:
        raise KeysLocked(f"the passphrase is longer than {MAX_SECRET_BYTES} bytes")
    return secret


def read_key_file(path: Path) -> bytes:
    """A passphrase from a file that nobody else may read. Raises `KeysLocked`."""
    return read_private_file(path, error=KeysLocked)
