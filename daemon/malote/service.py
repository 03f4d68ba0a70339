"""Builds everything from the configuration and runs it: listeners, watchers, upkeep, signals. Started by launch.py.

With `service.workers` above 1 this runs in each of them, under a supervisor (supervisor.py) that has bound the sockets.

A reload (SIGHUP) builds what changed beside what runs: open connections keep the desk they began with, new ones get the new one
(but the rules, what must be sealed, are the new ones for both at once);
watchers whose account did not change are left alone. A configuration with faults changes nothing.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from malote.config import Config, ListenerConfig, load_config
from malote.config_faults import config_faults
from malote.core.card import usable_until_ms
from malote.core.policy import Policy
from malote.core.rules import rule_faults
from malote.credentials import upstream_credentials
from malote.errors import ConfigError, MaloteError, StoreUnavailable
from malote.gateways import Gateways
from malote.identities import Keyring
from malote.logs import configure_logs
from malote.membership import Membership
from malote.notify import Manager, Systemd
from malote.outgoing.inflight import InFlight
from malote.outgoing.sender import Sender
from malote.outgoing.shadow import shadow_warnings
from malote.outgoing.submission import Submissions
from malote.outgoing.users import Users, load_users
from malote.oversight import Oversight, State
from malote.smtp.budget import MemoryBudget
from malote.smtp.conversation import ServerSettings
from malote.smtp.listener import Listener, needs_gate, server_settings
from malote.smtp.open_connections import Connections
from malote.smtp.relay import Credentials, Upstream
from malote.smtp.sockets import Activated
from malote.store import Store
from malote.supervisor import Post
from malote.watching import Accounts, check_accounts

DRAIN_SECONDS = 240.0           # for mail in flight at the end; the unit's TimeoutStopSec is longer
LOCK_NAME = "run.lock"
REFRESH_SECONDS = 5.0           # how soon keys and cards made by another process are used
EXPIRE_EVERY_SECONDS = 3600.0
RETRY_KEYS_SECONDS = 60.0
NEED_RESTART = ("service", "store", "keys")     # sections that a reload leaves as they are

Place = tuple[str, int]     # what a listener listens on: ListenerConfig.place

# How long a thread may keep the loop waiting for the interpreter; Python's 5 ms is three messages' work. Measured with sealing
# at full load: 5 % more messages.
SWITCH_SECONDS = 0.001

log = structlog.get_logger("malote.service")


def now_ms() -> int:
    return time.time_ns() // 1_000_000


@dataclass(slots=True)
class Outgoing:
    """One build of the sending side. A reload makes another; the old one lives until its sessions are gone."""

    upstream: Upstream
    submissions: Submissions
    desks: Mapping[Place, Sender]

    async def close(self) -> None:
        await self.upstream.close()
        self.submissions.close()


@dataclass(slots=True)
class Service:
    """`await run()` returns when told to stop. `keyring` is unlocked; `store` is open; both are closed by the caller.
    `post`: what the supervisor gives to a worker; None: this is the only process."""

    config: Config
    config_path: Path | None
    store: Store
    keyring: Keyring
    post: Post | None = None
    host: str = field(default_factory=socket.getfqdn)
    _manager: Manager = field(init=False)
    _activated: Activated = field(init=False)
    _next: Config | None = None         # from the supervisor, for the reload that it has asked for
    _outgoing: Outgoing | None = None
    _retired: list[Outgoing] = field(default_factory=list)
    _listeners: dict[Place, Listener] = field(default_factory=dict)
    _connections: Connections = field(default_factory=lambda: Connections(0))
    _budget: MemoryBudget = field(default_factory=lambda: MemoryBudget(0))
    _inflight: InFlight = field(default_factory=InFlight)
    _accounts: Accounts = field(init=False)
    _gateways: Gateways = field(init=False)
    _oversight: Oversight = field(init=False)
    _running: bool = False
    _keys_open: bool = True
    _stop: asyncio.Event = field(default_factory=asyncio.Event)
    _reload: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self._manager = self.post if self.post is not None else Systemd()
        self._activated = Activated() if self.post is None else Activated({})
        self._accounts = Accounts(self.store, self.keyring, end_seconds=DRAIN_SECONDS)
        self._oversight = Oversight(self.store, self._state, now_ms, offset=self.slot or 0)

    # --- life ---

    async def run(self) -> None:
        """Raises `MaloteError` if it cannot start."""
        await self.keyring.refresh()
        self._budget = MemoryBudget(self.config.limits.memory_budget)
        self._connections = Connections(self.config.limits.connections)
        if self.post is not None:
            self._budget.shared = self.post.siblings.memory(self.post.slot)
            self._connections.share(self.post.siblings, self.post.slot)
        self._gateways = Gateways(self.store, self.keyring, connections=self._connections, budget=self._budget, host=self.host,
                                  clock=now_ms, sockets=self._given_sockets, slot=self.slot or 0)
        self._hear_signals()
        membership = await self._join()
        try:
            await self._apply(self.config)
            self._running = True
            self._say_ready()
            async with asyncio.TaskGroup() as tasks:
                upkeep = [tasks.create_task(self._upkeep()), tasks.create_task(self._follow_keys()),
                          tasks.create_task(self._feed_watchdog()), tasks.create_task(self._hear_reloads())]
                if membership is not None:
                    upkeep += [tasks.create_task(membership.keep()), tasks.create_task(self._accounts.share()),
                               tasks.create_task(membership.guard(self._accounts.let_go))]
                await self._stop.wait()
                self._running = False
                for task in upkeep:
                    task.cancel()
        finally:
            self._manager.stopping()
            await self._end(membership)

    @property
    def slot(self) -> int | None:
        """Which of the workers this is; None: the only process."""
        return self.post.slot if self.post is not None else None

    def stop(self) -> None:
        self._stop.set()

    def _hear_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for name in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(name, self._stop.set)
        if self.post is None:
            loop.add_signal_handler(signal.SIGHUP, self._reload.set)
        else:
            loop.add_reader(self.post.channel.socket, self._hear_supervisor, self.post)

    def _hear_supervisor(self, post: Post) -> None:
        for order in post.orders():
            if order is None:       # also when it is gone: a new one can begin only when we have ended
                asyncio.get_running_loop().remove_reader(post.channel.socket)
                self._stop.set()
                return
            self._next, sockets = order
            for sock in (each for bound in post.sockets.values() for each in bound):
                sock.close()        # what was not needed of the last ones
            post.sockets = sockets
            self._reload.set()

    def _say_ready(self) -> None:
        addresses = [f"{host}:{port}" for listener in self._listeners.values() for host, port in listener.addresses]
        addresses += [f"{host}:{port}" for host, port in self._gateways.addresses]
        log.info("ready", listening=addresses, accounts=self._accounts.names, identities=len(self.keyring.identities))
        self._manager.ready(f"listening on {len(self._listeners) + len(self._gateways)}, watching {len(self._accounts.names)}")

    async def _join(self) -> Membership | None:
        """None: nobody else can share the store."""
        if self.post is None and not self.store.networked:
            return None
        if self.post is not None:
            membership = Membership(self.store, self.post.owner, before=self.post.before)
        else:
            await self.store.bury_node()
            membership = Membership(self.store, self.store.new_owner())
        membership.accounts = len(self.config.accounts)
        await membership.join()
        self._accounts.share_with(membership, self.slot or 0)
        return membership

    async def _end(self, membership: Membership | None) -> None:
        """No new work, then what is under way is finished, then everything is closed."""
        for listener in self._listeners.values():
            listener.close()
        self._gateways.stop_listening()
        keeping = asyncio.create_task(membership.keep()) if membership is not None else None
        cut_off, _ = await asyncio.gather(self._connections.drain(DRAIN_SECONDS), self._accounts.stop())
        if membership is not None and keeping is not None:
            keeping.cancel()
            await membership.leave()
        if cut_off:
            log.warning("connections cut off at the end", count=cut_off)
        for build in (*self._retired, *([self._outgoing] if self._outgoing else [])):
            await build.close()
        await self._gateways.close()
        await self._oversight.close()
        log.info("stopped")

    # --- building ---

    async def _apply(self, config: Config) -> None:
        """Build what differs from what runs. Raises `ConfigError`; then nothing has changed."""
        check_accounts(config)
        gateways = await self._gateways.prepare(config)
        try:
            async with self._oversight.applying(config):
                await self._apply_outgoing(config)
                self._gateways.apply(gateways, config.limits)
                await self._accounts.apply(config)
        except BaseException:
            await self._gateways.drop(gateways)
            raise
        self._connections.renew(config.limits)
        self._budget.total_bytes = config.limits.memory_budget
        self.config = config

    async def _apply_outgoing(self, config: Config) -> None:
        wanted = {listener.place: listener for listener in config.outgoing.listeners} if config.outgoing.enabled else {}
        build = self._build_outgoing(config) if wanted else None
        try:
            settings = {place: server_settings(listener, config.limits, self.host) for place, listener in wanted.items()}
            opened = await self._open_listeners(wanted, settings, build) if build is not None else {}
        except BaseException:
            if build is not None:
                await build.close()
            raise
        for place in [place for place in self._listeners if place not in wanted]:
            self._listeners.pop(place).close()
        for place, running in self._listeners.items():
            if build is not None and place not in opened:
                running.renew(settings[place], build.desks[place])
        self._listeners |= opened
        if self._outgoing is not None:
            self._retired.append(self._outgoing)
        policy = Policy(config.outgoing)
        for old in self._retired:       # what must be sealed from now on, must be sealed on open connections too
            old.submissions.decider.policy = policy
        self._outgoing = build

    async def _open_listeners(self, wanted: Mapping[Place, ListenerConfig], settings: Mapping[Place, ServerSettings],
                              build: Outgoing) -> dict[Place, Listener]:
        """Those that are new, and those that have to be. After an exception all listen as before."""
        opened: dict[Place, Listener] = {}
        closed: dict[Place, Listener] = {}
        try:
            for place, listener in wanted.items():
                running = self._listeners.get(place)
                if running is not None and running.gated != needs_gate(settings[place]):    # a property of who accepts
                    running.close()
                    closed[place] = self._listeners.pop(place)
                if place not in self._listeners:
                    opened[place] = await self._open(listener, settings[place], build.desks[place])
        except BaseException:
            for fresh in opened.values():
                fresh.close()
            before = listeners_of(self.config)
            for place, old in closed.items():
                await old.open(before[place], self._given_sockets(before[place]))
                self._listeners[place] = old
            raise
        return opened

    async def _open(self, listener: ListenerConfig, settings: ServerSettings, desk: Sender) -> Listener:
        fresh = Listener(settings, desk, self._connections, self._budget)
        await fresh.open(listener, self._given_sockets(listener))
        return fresh

    def _given_sockets(self, listener: ListenerConfig) -> list[socket.socket]:
        """Those that the supervisor or systemd has bound; none: the listener binds its own."""
        if self.post is None:
            return self._activated.find(listener)
        return [sock.dup() for sock in self.post.sockets[listener.place]]

    def _build_outgoing(self, config: Config) -> Outgoing:
        upstream_config = config.outgoing.upstream
        for text in shadow_warnings(config.outgoing):
            log.warning("shadow mode", what=text)

        async def credentials() -> Credentials:
            return await upstream_credentials(upstream_config)

        upstream = Upstream(upstream_config, credentials=credentials if upstream_config.username else None)
        submissions = Submissions(config=config.outgoing, limits=config.limits, store=self.store, host=self.host,
                                  identities=lambda: self.keyring.identities, clock_ms=now_ms, inflight=self._inflight,
                                  recorder=lambda: self._oversight.recorder)
        desks = {
            listener.place: Sender(listener=listener, config=config.outgoing, upstream=upstream, submissions=submissions,
                             store=self.store, users=load_users(listener.users_file) if listener.users_file else Users())
            for listener in config.outgoing.listeners
        }
        return Outgoing(upstream, submissions, desks)

    def _state(self) -> State:
        outgoing = self.config.outgoing
        wanted = len(outgoing.listeners) if outgoing.enabled else 0
        own = (self._outgoing.upstream,) if self._outgoing is not None else ()
        return State(
            running=self._running, keys_open=self._keys_open, shadow=outgoing.enabled and outgoing.shadow,
            listening=len(self._listeners) == wanted and len(self._gateways) == len(self.config.incoming.listeners),
            listeners=len(self._listeners) + len(self._gateways), connections=self._connections, budget=self._budget,
            inflight=self._inflight,
            upstreams=(*own, *self._gateways.upstreams),
            card_ends_ms=tuple(usable_until_ms(identity.card) for identity in self.keyring.identities.values()),
            accounts=self._accounts.states,
        )

    # --- while it runs ---

    async def _hear_reloads(self) -> None:
        while True:
            await self._reload.wait()
            self._reload.clear()
            self._manager.reloading()
            fault = ""
            try:
                await self._reload_now()
            except MaloteError as error:
                fault = str(error)
                log.error("not reloaded, the old configuration stays", fault=fault, hint=error.hint)
            except Exception as error:
                fault = type(error).__name__
                log.exception("not reloaded, the old configuration stays")
            self._manager.reloaded(fault=fault)

    async def _reload_now(self) -> None:
        config = self._next or load_checked(self.config, self.config_path)
        await self.keyring.refresh()
        self._keys_open = True
        await self._apply(config)
        configure_logs(config.log, held=True)
        log.info("reloaded", accounts=self._accounts.names, listeners=len(self._listeners))

    async def _follow_keys(self) -> None:
        """Keys that `malote keys` made or changed while we run are used without a restart."""
        while True:
            await asyncio.sleep(REFRESH_SECONDS)
            try:
                await self._close_retired()
                if await self.keyring.refresh():
                    self._accounts.look_now()
                self._keys_open = True
            except StoreUnavailable:
                log.warning("store not available")
            except MaloteError as error:
                log.error("changed keys cannot be unlocked", fault=str(error), hint=error.hint)
                self._keys_open = False
                await asyncio.sleep(RETRY_KEYS_SECONDS)
            except Exception:       # mail goes on with the keys that are known
                log.exception("fault while looking for changed keys")

    async def _close_retired(self) -> None:
        """What an earlier configuration built, once no connection uses it any more."""
        used = self._connections.desks()
        for build in [build for build in self._retired if used.isdisjoint(build.desks.values())]:
            self._retired.remove(build)
            await build.close()
        await self._gateways.close_retired(used)

    async def _upkeep(self) -> None:
        while True:
            windows = [account.late_days for account in self.config.accounts]
            windows += [opening.late_days for opening in self.config.incoming.listeners]
            late_days = max(windows, default=7)
            try:
                await self.store.expire_journal(now_ms(), self.config.limits.retry_memory_hours)
                await self.store.expire(now_ms(), self.config.store.remember_days, late_days=late_days)
            except StoreUnavailable:
                log.warning("store not available")
            except Exception:       # nothing but space is lost
                log.exception("fault while removing what is old")
            await asyncio.sleep(EXPIRE_EVERY_SECONDS)

    async def _feed_watchdog(self) -> None:
        """A loop that hangs does not feed it, and is restarted."""
        while (seconds := self._manager.alive_seconds) is not None:
            self._manager.alive()
            await asyncio.sleep(seconds)


def listeners_of(config: Config) -> dict[Place, ListenerConfig]:
    """All that a service with this configuration listens on."""
    sealing = {listener.place: listener for listener in config.outgoing.listeners} if config.outgoing.enabled else {}
    return sealing | {opening.place: opening.listener for opening in config.incoming.listeners}


def load_checked(config: Config, path: Path | None) -> Config:
    """The configuration anew from its file, or the one there is; of what only a restart changes, what there is. Raises
    `ConfigError`."""
    fresh = load_config(path) if path is not None else config
    check_config(fresh, path)
    check_accounts(fresh)
    for section in NEED_RESTART:
        if getattr(fresh, section) != getattr(config, section):
            log.warning("a change of this section needs a restart", section=section)
    return fresh.model_copy(update={section: getattr(config, section) for section in NEED_RESTART})


def check_config(config: Config, path: Path | None) -> None:
    """Raises `ConfigError` with every fault that the schema cannot see."""
    if faults := config_faults(config) + rule_faults(config.outgoing):
        raise ConfigError("\n".join(f"{path}: {fault}" if path else fault for fault in faults),
                          hint="malote check tells all that is wrong at once")
