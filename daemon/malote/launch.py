"""From the configuration to the running service: what the process is set to, the lock on the store, one process or several."""

from __future__ import annotations

import asyncio
import fcntl
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import uvloop

from malote.config import Config
from malote.core.primitives import check_post_quantum
from malote.errors import ConfigError, StoreUnavailable
from malote.identities import Keyring
from malote.logs import configure_logs, hook_uncaught
from malote.outgoing.memory import return_large_blocks
from malote.service import Service, check_config, listeners_of, load_checked
from malote.store import Store, configured_place
from malote.store.migrate import RUN_LOCK
from malote.supervisor import Post, Supervisor
from malote.watching import check_accounts

# How long a thread may keep the loop waiting for the interpreter; Python's 5 ms is three messages' work. Measured with sealing
# at full load: 5 % more messages.
SWITCH_SECONDS = 0.001


async def serve(config: Config, config_path: Path | None, store_path: Path, passphrase: Callable[[], bytes]) -> None:
    """The whole life of the daemon. Raises `MaloteError` if it cannot start."""
    store = await Store.open(configured_place(config.store, store_path))
    try:
        lock = _only_one(store_path / RUN_LOCK)
    except BaseException:
        await store.close()
        raise
    try:
        keyring = Keyring(store, passphrase, ask_once=config.keys.unlock == "prompt")
        await Service(config, config_path, store, keyring).run()
    finally:
        await store.close()
        os.close(lock)


def _only_one(path: Path) -> int:
    """Held until it is closed, or the process ends in whatever way. Two daemons on one store would watch its mailboxes under
    one device's name, and not know of each other's messages in flight. Raises `ConfigError`, `StoreUnavailable`."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)      # of a node whose store is in a database
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise StoreUnavailable(f"{path}: cannot be opened ({error.strerror})") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        raise ConfigError("another malote runs on this store", hint="stop it, or set another store.path") from error
    return lock


def run(config: Config, config_path: Path | None, store_path: Path, passphrase: Callable[[], bytes]) -> None:
    """Check, start, and return when told to stop. Raises `MaloteError` if it cannot start."""
    check_config(config, config_path)
    configure_logs(config.log, held=True)
    hook_uncaught()
    check_post_quantum()
    os.umask(0o077)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))    # private keys and plain text are in this memory: no core file
    return_large_blocks()
    sys.setswitchinterval(SWITCH_SECONDS)
    if config.service.workers == 1:
        uvloop.run(serve(config, config_path, store_path, passphrase))
    else:
        supervise(config, config_path, store_path, passphrase)


def supervise(config: Config, config_path: Path | None, store_path: Path, passphrase: Callable[[], bytes]) -> None:
    """The same with several workers. Raises `MaloteError` if they cannot start, or cannot be kept running."""
    async def begin() -> tuple[int, Keyring, Callable[[], bytes]]:
        store = await Store.open(configured_place(config.store, store_path))
        try:
            lock = _only_one(store_path / RUN_LOCK)
            await store.bury_node()
            keyring = Keyring(store, passphrase, ask_once=config.keys.unlock == "prompt")
            await keyring.refresh()
            return lock, keyring, store.new_owner
        finally:
            await store.close()

    async def work(post: Post) -> None:
        store = await Store.open(configured_place(config.store, store_path))
        try:
            await Service(post.config, config_path, store, keyring.again(store), post).run()
        finally:
            await store.close()

    def worker(post: Post) -> int:
        configure_logs(post.config.log, held=True)
        uvloop.run(work(post))
        return 0

    check_accounts(config)
    lock, keyring, new_owner = asyncio.run(begin())     # no uvloop before the fork: it leaves threads behind
    try:
        Supervisor(config, listeners=listeners_of, load=lambda: load_checked(config, config_path), work=worker,
                   new_owner=new_owner).run()
    finally:
        os.close(lock)
