"""Builds everything from the configuration and runs it: listeners, watchers, upkeep, signals. Only this module names them all.

A reload (SIGHUP) builds what changed beside what runs: open connections keep the desk they began with, new ones get the new one;
watchers whose account did not change are left alone. A configuration with faults changes nothing.
"""

from __future__ import annotations

import asyncio
import hashlib
import resource
import signal
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import structlog
import uvloop

from malote.config import AccountConfig, Config, ListenerConfig, UpstreamConfig, config_faults, load_config
from malote.core.primitives import check_post_quantum
from malote.errors import ConfigError, KeysLocked, MaloteError, SecretUnavailable, StoreUnavailable
from malote.identities import Keyring
from malote.incoming.account import account_addresses, account_keys
from malote.incoming.watcher import Watcher
from malote.logs import configure_logs
from malote.notify import notify, watchdog_seconds
from malote.outgoing.budget import MemoryBudget
from malote.outgoing.listener import Connections, Listener, server_settings
from malote.outgoing.relay import Credentials, Upstream
from malote.outgoing.sender import Sender
from malote.outgoing.submission import Submissions
from malote.outgoing.users import Users, load_users
from malote.private_files import read_credential, read_private_file, run_token_command
from malote.store import Store

DRAIN_SECONDS = 240.0           # for mail in flight at the end; the unit's TimeoutStopSec is longer
REFRESH_SECONDS = 5.0           # how soon keys and cards made by another process are used
EXPIRE_EVERY_SECONDS = 3600.0
STORE_RETRY_SECONDS = 5.0

log = structlog.get_logger("malote.service")


def now_ms() -> int:
    return time.time_ns() // 1_000_000


async def upstream_credentials(config: UpstreamConfig) -> Credentials:
    """The configured login, read anew each time: a password file or token may have been renewed. Raises `SecretUnavailable`."""
    if config.token_command:
        return Credentials(config.username, token=await run_token_command(config.token_command))
    if config.password_file is None:
        raise SecretUnavailable("outgoing.upstream.password_file: must be set with username")
    return Credentials(config.username, password=_text(read_private_file(config.password_file)))


async def account_password(account: AccountConfig) -> str:
    """Raises `SecretUnavailable`."""
    if account.credential:
        return _text(read_credential(account.credential))
    if account.password_file is None:
        raise SecretUnavailable(f"account {account.name}: set exactly one of password_file, credential, token_command")
    return _text(read_private_file(account.password_file))


def _text(secret: bytes) -> str:
    try:
        return secret.decode()
    except UnicodeDecodeError:
        raise SecretUnavailable("a password file or credential is not UTF-8 text") from None


@dataclass(slots=True)
class Outgoing:
    """One build of the sending side. A reload makes another; the old one lives until its sessions are gone."""

    upstream: Upstream
    submissions: Submissions
    desks: Mapping[ListenerConfig, Sender]

    async def close(self) -> None:
        await self.upstream.close()
        self.submissions.close()


@dataclass(slots=True)
class Watched:
    """A watcher with its task."""

    account: AccountConfig
    watcher: Watcher
    task: asyncio.Task[None]


@dataclass(slots=True)
class Service:
    """`await run()` returns when told to stop. `keyring` is unlocked; `store` is open; both are closed by the caller."""

    config: Config
    config_path: Path | None
    store: Store
    keyring: Keyring
    host: str = field(default_factory=socket.getfqdn)
    _outgoing: Outgoing | None = None
    _retired: list[Outgoing] = field(default_factory=list)
    _listeners: dict[ListenerConfig, Listener] = field(default_factory=dict)
    _connections: Connections = field(default_factory=lambda: Connections(0))
    _budget: MemoryBudget = field(default_factory=lambda: MemoryBudget(0))
    _watched: dict[str, Watched] = field(default_factory=dict)
    _stop: asyncio.Event = field(default_factory=asyncio.Event)
    _reload: asyncio.Event = field(default_factory=asyncio.Event)

    # --- life ---

    async def run(self) -> None:
        """Raises `MaloteError` if it cannot start."""
        await self.keyring.refresh()
        self._budget = MemoryBudget(self.config.limits.memory_budget)
        self._connections = Connections(self.config.limits.connections)
        try:
            await self._apply(self.config)
            self._hear_signals()
            self._say_ready()
            async with asyncio.TaskGroup() as tasks:
                upkeep = [tasks.create_task(self._upkeep()), tasks.create_task(self._follow_keys()),
                          tasks.create_task(self._feed_watchdog()), tasks.create_task(self._hear_reloads())]
                await self._stop.wait()
                for task in upkeep:
                    task.cancel()
        finally:
            notify("STOPPING=1")
            await self._end()

    def stop(self) -> None:
        self._stop.set()

    def _hear_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for name in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(name, self._stop.set)
        loop.add_signal_handler(signal.SIGHUP, self._reload.set)

    def _say_ready(self) -> None:
        addresses = [f"{host}:{port}" for listener in self._listeners.values() for host, port in listener.addresses]
        log.info("ready", listening=addresses, accounts=list(self._watched), identities=len(self.keyring.identities))
        notify("READY=1", f"STATUS=listening on {len(self._listeners)}, watching {len(self._watched)}")

    async def _end(self) -> None:
        """No new work, then what is under way is finished, then everything is closed."""
        for listener in self._listeners.values():
            listener.close()
        for watched in self._watched.values():
            watched.watcher.stop()
        cut_off = await self._connections.drain(DRAIN_SECONDS)
        if cut_off:
            log.warning("connections cut off at the end", count=cut_off)
        await self._await_watchers(list(self._watched.values()))
        for build in (*self._retired, *([self._outgoing] if self._outgoing else [])):
            await build.close()
        log.info("stopped")

    async def _await_watchers(self, ended: list[Watched]) -> None:
        tasks = [watched.task for watched in ended]
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=DRAIN_SECONDS)
            for task in late:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    # --- building ---

    async def _apply(self, config: Config) -> None:
        """Build what differs from what runs. Raises `ConfigError`; what could not be built is then not replaced."""
        await self._apply_outgoing(config)
        await self._apply_accounts(config)
        self._connections.limit = config.limits.connections
        self._budget.total_bytes = config.limits.memory_budget
        self.config = config

    async def _apply_outgoing(self, config: Config) -> None:
        wanted = config.outgoing.listeners if config.outgoing.enabled else ()
        build = self._build_outgoing(config) if wanted else None
        opened: list[Listener] = []
        try:
            settings = {listener: server_settings(listener, config.limits, self.host) for listener in wanted}
            for listener in wanted:
                if listener not in self._listeners and build is not None:
                    fresh = Listener(settings[listener], build.desks[listener], self._connections, self._budget)
                    await fresh.open(listener)
                    opened.append(fresh)
                    self._listeners[listener] = fresh
        except BaseException:
            for fresh in opened:
                fresh.close()
            self._listeners = {key: value for key, value in self._listeners.items() if value not in opened}
            if build is not None:
                await build.close()
            raise
        for listener in [listener for listener in self._listeners if listener not in wanted]:
            self._listeners.pop(listener).close()
        for listener, running in self._listeners.items():
            if build is not None:
                running.desk, running.settings = build.desks[listener], settings[listener]
        if self._outgoing is not None:
            self._retired.append(self._outgoing)
        self._outgoing = build

    def _build_outgoing(self, config: Config) -> Outgoing:
        upstream_config = config.outgoing.upstream

        async def credentials() -> Credentials:
            return await upstream_credentials(upstream_config)

        upstream = Upstream(upstream_config, credentials=credentials if upstream_config.username else None)
        submissions = Submissions(config=config.outgoing, limits=config.limits, store=self.store, host=self.host,
                                  identities=lambda: self.keyring.identities, clock_ms=now_ms)
        desks = {
            listener: Sender(listener=listener, config=config.outgoing, upstream=upstream, submissions=submissions,
                             store=self.store, users=load_users(listener.users_file) if listener.users_file else Users())
            for listener in config.outgoing.listeners
        }
        return Outgoing(upstream, submissions, desks)

    async def _apply_accounts(self, config: Config) -> None:
        wanted = {account.name: account for account in config.accounts}
        ended = [watched for name, watched in self._watched.items() if wanted.get(name) != watched.account]
        for watched in ended:
            watched.watcher.stop()
            del self._watched[watched.account.name]
        await self._await_watchers(ended)
        device = hashlib.sha256(await self.store.local_key("device")).hexdigest()[:16]
        for name, account in wanted.items():
            if name not in self._watched:
                self._watched[name] = self._watch(account, device, log_addresses=config.log.addresses)

    def _watch(self, account: AccountConfig, device: str, *, log_addresses: bool) -> Watched:
        addresses = account_addresses(account)
        watcher = Watcher(account, store=self.store, device=device, password=lambda: account_password(account),
                          keys=lambda: account_keys(self.keyring.identities.values(), addresses), log_addresses=log_addresses)
        return Watched(account, watcher, asyncio.create_task(self._keep_watching(watcher), name=f"watch {account.name}"))

    async def _keep_watching(self, watcher: Watcher) -> None:
        """One account's trouble is that account's alone."""
        while not self._stop.is_set():
            try:
                await watcher.run()
                return
            except MaloteError as error:
                log.error("account not watched", account=watcher.account.name, fault=str(error), hint=error.hint)
            except Exception:
                log.exception("watcher failed", account=watcher.account.name)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), 60)

    # --- while it runs ---

    async def _hear_reloads(self) -> None:
        while True:
            await self._reload.wait()
            self._reload.clear()
            notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
            try:
                await self._reload_now()
            except MaloteError as error:
                log.error("not reloaded, the old configuration stays", fault=str(error), hint=error.hint)
            except Exception:
                log.exception("not reloaded, the old configuration stays")
            notify("READY=1")

    async def _reload_now(self) -> None:
        config = load_config(self.config_path) if self.config_path is not None else self.config
        if faults := config_faults(config):
            raise ConfigError("\n".join(faults))
        for section in ("store", "keys"):
            if getattr(config, section) != getattr(self.config, section):
                log.warning("a change of this section needs a restart", section=section)
        await self.keyring.refresh()
        await self._apply(config)
        configure_logs(config.log)
        log.info("reloaded", accounts=list(self._watched), listeners=len(self._listeners))

    async def _follow_keys(self) -> None:
        """Keys that `malote keys` made or changed while we run are used without a restart."""
        while True:
            await asyncio.sleep(REFRESH_SECONDS)
            try:
                await self.keyring.refresh()
            except KeysLocked as error:
                log.error("changed keys cannot be unlocked", fault=str(error), hint=error.hint)
                await asyncio.sleep(60)
            except StoreUnavailable:
                log.warning("store not available")

    async def _upkeep(self) -> None:
        while True:
            late_days = max((account.late_days for account in self.config.accounts), default=7)
            try:
                await self.store.expire_journal(now_ms(), self.config.limits.retry_memory_hours)
                await self.store.expire(now_ms(), self.config.store.remember_days, late_days=late_days)
            except StoreUnavailable:
                log.warning("store not available")
            await asyncio.sleep(EXPIRE_EVERY_SECONDS)

    async def _feed_watchdog(self) -> None:
        """A loop that hangs does not feed it, and is restarted."""
        seconds = watchdog_seconds()
        while seconds is not None:
            notify("WATCHDOG=1")
            await asyncio.sleep(seconds)


async def serve(config: Config, config_path: Path | None, store_path: Path, passphrase: Callable[[], bytes]) -> None:
    """The whole life of the daemon. Raises `MaloteError` if it cannot start."""
    store = await Store.open(store_path)
    try:
        await Service(config, config_path, store, Keyring(store, passphrase)).run()
    finally:
        await store.close()


def run(config: Config, config_path: Path | None, store_path: Path, passphrase: Callable[[], bytes]) -> None:
    """Check, start, and return when told to stop. Raises `MaloteError` if it cannot start."""
    if faults := config_faults(config):
        raise ConfigError("\n".join(faults), hint="malote check tells all that is wrong at once")
    configure_logs(config.log)
    check_post_quantum()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))    # private keys and plain text are in this memory: no core file
    uvloop.run(serve(config, config_path, store_path, passphrase))
