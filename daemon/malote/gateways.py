"""The opening listeners of a configuration: built, renewed by a reload, and closed."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from malote.config import Config, LimitsConfig, ListenerConfig, OpeningConfig
from malote.credentials import upstream_credentials
from malote.identities import Keyring
from malote.incoming.account import device_name
from malote.incoming.gateway import Gateway
from malote.incoming.passage import Passage
from malote.incoming.turns import Memory, Turns
from malote.smtp.budget import MemoryBudget
from malote.smtp.conversation import ServerSettings
from malote.smtp.desk import Desk
from malote.smtp.listener import Listener, needs_gate, server_settings
from malote.smtp.open_connections import Connections
from malote.smtp.relay import Credentials, Upstream
from malote.store import Store

Place = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Build:
    """One gateway with what its configuration says, and the listener that hands its connections to it."""

    config: OpeningConfig
    limits: LimitsConfig
    log_addresses: bool
    gateway: Gateway
    upstream: Upstream
    listener: Listener

    def fits(self, config: OpeningConfig, limits: LimitsConfig, log_addresses: bool) -> bool:
        return (self.config, self.limits, self.log_addresses) == (config, limits, log_addresses)


@dataclass(slots=True)
class Prepared:
    """What `apply` will put in the place of what runs. `opened` listen already."""

    builds: dict[Place, Build] = field(default_factory=dict)
    settings: dict[Place, ServerSettings] = field(default_factory=dict)
    opened: list[Listener] = field(default_factory=list)
    closed: list[Build] = field(default_factory=list)       # had to make room for one of these


class Gateways:
    """`sockets`: those that listen on a place already, as for `Listener.open`. `slot`: which of the workers this is."""

    def __init__(self, store: Store, keyring: Keyring, *, connections: Connections, budget: MemoryBudget, host: str,
                 clock: Callable[[], int], sockets: Callable[[ListenerConfig], list[socket.socket]], slot: int = 0) -> None:
        self._store = store
        self._keyring = keyring
        self._connections = connections
        self._budget = budget
        self._host = host
        self._clock = clock
        self._sockets = sockets
        self._slot = slot
        self._turns = Turns(store, clock=clock, at_most_ms=0)
        self._passed = Memory()
        self._builds: dict[Place, Build] = {}
        self._retired: list[Build] = []

    @property
    def addresses(self) -> list[tuple[str, int]]:
        return [address for build in self._builds.values() for address in build.listener.addresses]

    def __len__(self) -> int:
        return len(self._builds)

    @property
    def upstreams(self) -> list[Upstream]:
        return [build.upstream for build in self._builds.values()]

    async def prepare(self, config: Config) -> Prepared:
        """Build what differs from what runs. Raises `ConfigError`; then nothing has changed."""
        prepared = Prepared()
        device = device_name(await self._store.local_key("device"), self._slot) if config.incoming.listeners else ""
        try:
            for opening in config.incoming.listeners:
                await self._prepare(prepared, config, opening, device)
        except BaseException:
            await self.drop(prepared)
            raise
        return prepared

    async def _prepare(self, prepared: Prepared, config: Config, opening: OpeningConfig, device: str) -> None:
        place, running = opening.place, self._builds.get(opening.place)
        settings = prepared.settings[place] = server_settings(opening.listener, config.limits, self._host)
        if running is not None and running.fits(opening, config.limits, config.log.addresses):
            prepared.builds[place] = running        # with the certificate as it is on the disk now
            return
        upstream = self._upstream(opening)
        passage = Passage(opening, store=self._store, identities=lambda: self._keyring.identities, turns=self._turns,
                          passed=self._passed, device=device, host=self._host, seconds=config.limits.reply_within_seconds,
                          log_addresses=config.log.addresses, clock=self._clock)
        gateway = Gateway(opening, upstream=upstream, passage=passage, host=self._host, clock=self._clock)
        lmtp = opening.protocol == "lmtp"
        same = running is not None and running.listener.lmtp == lmtp and running.listener.gated == needs_gate(settings)
        if running is not None and same:
            listener = running.listener
        else:
            if running is not None:     # what comes first on a connection is a property of who accepts it
                running.listener.close()
                prepared.closed.append(running)
            listener = Listener(settings, gateway, self._connections, self._budget, lmtp)
            await listener.open(opening.listener, self._sockets(opening.listener))
            prepared.opened.append(listener)
        prepared.builds[place] = Build(opening, config.limits, config.log.addresses, gateway, upstream, listener)

    def _upstream(self, opening: OpeningConfig) -> Upstream:
        async def credentials() -> Credentials:
            return await upstream_credentials(opening.upstream)
        return Upstream(opening.upstream, credentials=credentials if opening.upstream.username else None)

    async def drop(self, prepared: Prepared) -> None:
        """It is not wanted after all. Raises `ConfigError` if what ran before cannot go on."""
        running = list(self._builds.values())
        for listener in prepared.opened:
            if all(build.listener is not listener for build in running):
                listener.close()
        for build in prepared.closed:
            if build in running:
                await build.listener.open(build.config.listener, self._sockets(build.config.listener))
        for build in prepared.builds.values():
            if all(build is not other for other in running):
                await build.upstream.close()

    def apply(self, prepared: Prepared, limits: LimitsConfig) -> None:
        self._turns.at_most_ms = round(limits.reply_within_seconds * 1000)
        for place, build in self._builds.items():
            kept = prepared.builds.get(place)
            if kept is None or kept.listener is not build.listener:
                build.listener.close()
            if kept is not build:
                self._retired.append(build)
        for place, build in prepared.builds.items():
            build.listener.renew(prepared.settings[place], build.gateway)
        self._builds = prepared.builds

    def stop_listening(self) -> None:
        for build in self._builds.values():
            build.listener.close()

    async def close_retired(self, used: Iterable[Desk]) -> None:
        """What an earlier configuration built, once no connection uses it any more."""
        desks = set(used)
        for build in [build for build in self._retired if build.gateway not in desks]:
            self._retired.remove(build)
            await build.upstream.close()

    async def close(self) -> None:
        for build in (*self._retired, *self._builds.values()):
            await build.upstream.close()

