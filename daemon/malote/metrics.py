"""The numbers of this process, for Prometheus. No label ever holds an address, a login, an account name or a host.

What happens per message is counted as it is told to `malote log`, one line there is one here; everything else is looked up when
somebody asks. Where metrics are off, none of this is loaded.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from malote import __version__
from malote.core.freshness import Verdict
from malote.store.records import OutcomeEntry

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST
# seconds; sealing takes milliseconds, the server behind it takes what it takes, `reply_within_seconds` ends it
BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 240.0)
SOON_MS = 30 * 86_400_000       # as `malote check` warns
DIRECTIONS = frozenset({"in", "out"})
MAX_SERIES = 200                # of (direction, outcome, verdict): the words are ours, and few; this is the net below
# There from the start, at 0: Prometheus sees no increase where a series begins at 1, and the first message of its kind is what an
# alert waits for
BEGUN = (
    *(("out", outcome, "") for outcome in ("sealed", "plain", "split", "partial", "refused", "failed", "stopped", "shadow")),
    *(("in", "opened", verdict.value) for verdict in Verdict if verdict not in
      (Verdict.DUPLICATE, Verdict.CONFLICT, Verdict.UNREADABLE)),
    *(("in", "quarantined", verdict) for verdict in ("DUPLICATE", "CONFLICT", "FORGED")),
    *(("in", outcome, "") for outcome in ("passed", "refused", "failed", "unreadable")), ("in", "unreadable", "UNREADABLE"),
)


@dataclass(frozen=True, slots=True)
class UpstreamNumbers:
    connects: int
    failures: int
    last_connect_s: float           # Unix time, 0: never
    connections: Mapping[str, int]  # by state


@dataclass(frozen=True, slots=True)
class AuditNumbers:
    failing: bool
    waiting: int
    written: int
    lost: int


@dataclass(frozen=True, slots=True)
class Numbers:
    """What the service knows at one moment."""

    connections: int
    connections_limit: int
    memory_used: int
    memory_limit: int
    in_flight: int
    listeners: int
    store_failing: bool
    card_ends_ms: tuple[int, ...]       # of our own cards
    shadow: bool = False                # nothing is sealed
    accounts: Mapping[str, int] = field(default_factory=dict)   # by state of their watcher
    upstream: UpstreamNumbers | None = None
    audit: AuditNumbers | None = None
    ready: Mapping[str, bool] = field(default_factory=dict)     # by check


class Source(Protocol):
    def numbers(self) -> Numbers: ...


class Metrics:
    """`note` for each line of `malote log`, on the event loop: two microseconds."""

    def __init__(self, source: Source) -> None:
        # else there is a second series for each counter, which nobody asks for
        prometheus_client.disable_created_metrics()     # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self._messages = Counter(
            "malote_messages", "Messages, and recipients refused at RCPT, as malote log shows them.",
            ["direction", "outcome", "verdict"], registry=self.registry)
        self._seconds = Histogram(
            "malote_message_seconds", "From the last byte of a message to the reply (out), from reading it to delivery (in).",
            ["direction"], buckets=BUCKETS, registry=self.registry)
        self._counters: dict[tuple[str, str, str], Counter] = {key: self._messages.labels(*key) for key in BEGUN}
        self._histograms: dict[str, Histogram] = {each: self._seconds.labels(each) for each in sorted(DIRECTIONS)}
        ProcessCollector(registry=self.registry)
        self.registry.register(_Gauges(source))

    def note(self, entry: OutcomeEntry) -> None:
        if entry.direction not in DIRECTIONS:       # what rules on trial would have done is no message
            return
        key = (entry.direction, entry.outcome, entry.verdict)
        counter = self._counters.get(key)
        if counter is None:
            if len(self._counters) >= MAX_SERIES:
                key = (entry.direction, "other", "")
            counter = self._counters[key] = self._messages.labels(*key)
        counter.inc()
        if entry.took_ms or entry.message_id:       # a recipient refused at RCPT took none
            self._histograms[entry.direction].observe(entry.took_ms / 1000)

    def text(self) -> bytes:
        """All of them, as Prometheus reads them."""
        return generate_latest(self.registry)


class _Gauges:
    """Looked up when somebody asks."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def describe(self) -> list[Metric]:
        return []       # else the registry asks for all of it once at the start, before there is anything

    def collect(self) -> Iterator[Metric]:
        numbers = self._source.numbers()
        yield _labelled("malote_build_info", "The version that runs.", "version", {__version__: 1})
        yield _gauge("malote_connections", "Open client connections.", numbers.connections)
        yield _gauge("malote_connections_limit", "How many there may be (limits.connections).", numbers.connections_limit)
        yield _gauge("malote_memory_used_bytes", "What the messages in flight take of the memory budget.", numbers.memory_used)
        yield _gauge("malote_memory_budget_bytes", "The memory budget (limits.memory_budget).", numbers.memory_limit)
        yield _gauge("malote_messages_in_flight", "Messages between their last byte and the reply.", numbers.in_flight)
        yield _gauge("malote_listeners", "Listening sockets.", numbers.listeners)
        yield _gauge("malote_store_failing", "Whether the last write to the store failed.", numbers.store_failing)
        yield _gauge("malote_shadow", "Whether outgoing.shadow is true: nothing is sealed.", numbers.shadow)
        if numbers.ready:
            yield _labelled("malote_ready", "What /readyz says, by check.", "check", numbers.ready)
        yield _labelled("malote_accounts", "Watched mailboxes, by state of their watcher.", "state", numbers.accounts)
        yield from _cards(numbers.card_ends_ms)
        if numbers.upstream is not None:
            yield from _upstream(numbers.upstream)
        if numbers.audit is not None:
            yield from _audit(numbers.audit)


def _cards(ends_ms: tuple[int, ...]) -> Iterator[Metric]:
    """Not one series for each, which would have to say whose: `malote check` does."""
    now_ms = time.time_ns() // 1_000_000
    ended = sum(end <= now_ms for end in ends_ms)
    soon = sum(now_ms < end <= now_ms + SOON_MS for end in ends_ms)
    yield _labelled("malote_own_cards", "Our own cards: good, ending within 30 days, ended.", "state",
                    {"good": len(ends_ms) - ended - soon, "ending": soon, "ended": ended})
    if ends_ms:
        yield _gauge("malote_own_card_first_end_timestamp_seconds", "When the first of them ends.", min(ends_ms) / 1000)


def _upstream(numbers: UpstreamNumbers) -> Iterator[Metric]:
    yield _labelled("malote_upstream_connections", "Kept connections to the upstream server.", "state", numbers.connections)
    yield CounterMetricFamily("malote_upstream_connects", "Connections opened to the upstream server.", numbers.connects)
    yield CounterMetricFamily("malote_upstream_connect_failures", "Attempts that failed.", numbers.failures)
    yield _gauge("malote_upstream_last_connect_timestamp_seconds", "When one was opened last; 0: never.", numbers.last_connect_s)


def _audit(numbers: AuditNumbers) -> Iterator[Metric]:
    yield _gauge("malote_audit_failing", "Whether the audit log cannot be written.", numbers.failing)
    yield _gauge("malote_audit_waiting_lines", "Lines that are not on the disk yet.", numbers.waiting)
    yield CounterMetricFamily("malote_audit_written_lines", "Lines written.", numbers.written)
    yield CounterMetricFamily("malote_audit_lost_lines", "Lines dropped, as there was no room for them.", numbers.lost)


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value)


def _labelled(name: str, text: str, label: str, values: Mapping[str, float]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=[label])
    for value, number in values.items():
        family.add_metric([value], number)
    return family
