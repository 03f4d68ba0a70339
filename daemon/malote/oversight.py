"""What lets an administrator see how this process is doing: metrics and health on a port, and the audit log.

Built from `[metrics]` and `[audit]` and rebuilt by a reload; where both are off it costs nothing. The counters live as long as
the process.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from malote.audit import AuditLog
from malote.config import Config
from malote.health import STORE_SECONDS, UPSTREAM_SECONDS, Check, Health
from malote.outgoing.inflight import InFlight
from malote.outgoing.recorder import Recorder
from malote.smtp.budget import MemoryBudget
from malote.smtp.open_connections import Connections
from malote.smtp.relay import Upstream
from malote.store import Store

if TYPE_CHECKING:       # loaded where metrics are on: they take 30 MB and a quarter of a second
    from malote.metrics import Metrics, Numbers
    from malote.monitor import Monitor


@dataclass(frozen=True, slots=True)
class State:
    """The service at one moment."""

    running: bool               # started, and not told to stop
    listening: bool             # on everything that is configured
    keys_open: bool             # the keys of the store are the ones in memory
    listeners: int
    connections: Connections
    budget: MemoryBudget
    inflight: InFlight
    upstreams: tuple[Upstream, ...]     # where mail is handed on to
    shadow: bool
    card_ends_ms: tuple[int, ...]
    accounts: Mapping[str, int]


@dataclass(slots=True)
class _Built:
    config: Config
    monitor: Monitor | None = None
    audit: AuditLog | None = None


class Oversight:
    """`state`: asked whenever somebody asks us. `offset` is added to the port, so that each worker has its own."""

    def __init__(self, store: Store, state: Callable[[], State], clock_ms: Callable[[], int], *, offset: int = 0) -> None:
        self.recorder: Recorder | None = None       # what submissions tell; None without an audit log
        self._store = store
        self._state = state
        self._clock_ms = clock_ms
        self._offset = offset
        self._built = _Built(Config())
        self._metrics: Metrics | None = None
        self._health = Health({check.name: check for check in (
            Check("running", "it is starting or stopping", self._is_running),
            Check("listeners", "it does not listen on everything that is configured", self._is_listening),
            Check("keys", "its keys cannot be unlocked", self._is_open),
            Check("store", "the store cannot be written", self._is_writable, STORE_SECONDS),
            Check("upstream", "the next mail server cannot be reached", self._is_reachable, UPSTREAM_SECONDS),
            Check("audit", "the audit log cannot be written, and nothing may leave without it", self._is_recording),
        )})

    @property
    def address(self) -> tuple[str, int] | None:
        """Where metrics and health are answered."""
        return self._built.monitor.address if self._built.monitor is not None else None

    @asynccontextmanager
    async def applying(self, config: Config) -> AsyncIterator[None]:
        """What differs is opened, and used within; afterwards the old is closed, or, after an exception, the new. Raises
        `ConfigError` before anything has changed."""
        before = self._built
        fresh = _Built(config, before.monitor, before.audit)
        try:
            if config.audit != before.config.audit:
                fresh.audit = AuditLog(config.audit) if config.audit.file is not None else None
            if config.metrics != before.config.metrics:
                fresh.monitor = await self._open_monitor(config) if config.metrics.port else None
            self._use(fresh)
            yield
        except BaseException:
            self._use(before)
            await _close(fresh, before)
            raise
        await _close(before, fresh)

    async def close(self) -> None:
        before = self._built
        self._use(_Built(Config()))
        await _close(before, self._built)

    def _use(self, built: _Built) -> None:
        self._built = built
        self.recorder = Recorder(built.audit, self._clock_ms) if built.audit is not None else None
        self._store.on_outcome = self._metrics.note if self._metrics is not None and built.monitor is not None else None

    async def _open_monitor(self, config: Config) -> Monitor:
        from malote.metrics import Metrics
        from malote.monitor import Monitor

        if self._metrics is None:
            self._metrics = Metrics(self)
        monitor = Monitor(self._metrics, self._health)
        await monitor.open(config.metrics, offset=self._offset)
        return monitor

    # --- health

    async def _is_running(self) -> bool:
        return self._state().running

    async def _is_listening(self) -> bool:
        return self._state().listening

    async def _is_open(self) -> bool:
        return self._state().keys_open

    async def _is_writable(self) -> bool:
        await self._store.check_writable(self._clock_ms())
        return True

    async def _is_reachable(self) -> bool:
        await asyncio.gather(*(_reach(upstream) for upstream in self._state().upstreams))
        return True

    async def _is_recording(self) -> bool:
        audit = self._built.audit
        return audit is None or not (audit.failing and audit.config.required)

    # --- metrics

    def numbers(self) -> Numbers:
        from malote.metrics import AuditNumbers, Numbers, UpstreamNumbers

        state, upstream, audit = self._state(), None, None
        if state.upstreams:
            kept: Counter[str] = Counter()
            for each in state.upstreams:
                kept.update(each.connections)
            upstream = UpstreamNumbers(
                sum(each.connects for each in state.upstreams), sum(each.failures for each in state.upstreams),
                max(each.last_connect_s for each in state.upstreams), kept)
        if self._built.audit is not None:
            log = self._built.audit
            audit = AuditNumbers(log.failing, log.waiting, log.written, log.lost)
        return Numbers(
            connections=len(state.connections), connections_limit=state.connections.limit,
            memory_used=state.budget.used_bytes, memory_limit=state.budget.total_bytes, in_flight=len(state.inflight),
            listeners=state.listeners, store_failing=self._store.failing, card_ends_ms=state.card_ends_ms,
            shadow=state.shadow, accounts=state.accounts, upstream=upstream, audit=audit, ready=self._health.known,
        )


async def _reach(upstream: Upstream) -> None:
    """Raises `UpstreamError`."""
    if not (upstream.reached and time.time() - upstream.last_connect_s < UPSTREAM_SECONDS):
        connection = await upstream.connect()
        await connection.quit()


async def _close(old: _Built, kept: _Built) -> None:
    """What `kept` does not go on with."""
    if old.monitor is not None and old.monitor is not kept.monitor:
        await old.monitor.close()
    if old.audit is not None and old.audit is not kept.audit:
        await old.audit.close()

