"""What time brings: memory over 100,000 messages, and a store that a million messages have left their rows in."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import statistics
import time
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path

import uvloop

from bench.harness import Malote, Result, children, load, memory, servers, workplace
from bench.relay import SMALL
from lab.servers import free_port
from malote.core.freshness import Arrival, Claim, FreshnessLimits
from malote.store import Outcome, SendIntent, SendRecipient, Store
from malote.store.database import FILE_NAME

SOAK_MESSAGES, SOAK_STEPS = 100_000, 10
FEW, MANY = 10_000, 1_000_000
ROUNDS, AT_ONCE = 9, 50
LIMITS = FreshnessLimits(late_ms=7 * 86_400_000, skew_ms=300_000)
SENDER = "anna@north.example"
PEOPLE, STREAMS = 10_000, 100

Operation = Callable[[Store, int], Awaitable[object]]


def soak_memory() -> Result:
    """Each message to an address that was not seen before: whatever is kept for each address, or message, adds up."""
    with workplace() as root, servers(root / "lab") as lab:
        ours = Malote(root / "sealed", lab.sink().port, seal="require", port=free_port(), service="workers = 2")
        ours.run("keys", "new", "@south.example", "--algorithm", "ed25519")     # a gateway's card stands for all of its domain
        used: list[int] = []
        with ours.running() as running:
            for _ in range(SOAK_STEPS):
                load(ours.port, count=SOAK_MESSAGES // SOAK_STEPS, size_bytes=SMALL, sessions=20, many=True)
                used.append(sum(memory(pid, "VmRSS") for pid in (running.pid, *children(running.pid))))
        return Result("soak-memory", used[-1] / used[0], "<= 1.05",
                      f"two workers and their supervisor after each {SOAK_MESSAGES // SOAK_STEPS:,} sealed messages to as many "
                      f"addresses: {', '.join(f'{value / 2**20:.0f}' for value in used)} MiB")


def store_growth() -> Result:
    with workplace() as root:
        alone, together = uvloop.run(_store_growth(root))
        text = "; ".join(f"{name} {few * 1e6:.0f} and {many * 1e6:.0f} us" for name, (few, many, _) in alone.items())
        return Result("store-growth", max(ratio for _, _, ratio in alone.values()), "<= 1.2",
                      f"durable, with {FEW:,} and with {MANY:,} messages in the store: {text}; {AT_ONCE} at once, whose "
                      f"commits fill the disk's queue: {', '.join(f'{ratio:.2f}' for _, _, ratio in together.values())}")


Times = dict[str, tuple[float, float, float]]      # seconds with few, with many, and the ratio


async def _store_growth(root: Path) -> tuple[Times, Times]:
    stores = {}
    for rows in (FEW, MANY):
        directory = root / str(rows)
        await (await Store.open(directory)).close()
        _fill(directory / FILE_NAME, rows)
        stores[rows] = await Store.open(directory)
    alone = await _compared(stores, first=0, operations=300, at_once=1)
    together = await _compared(stores, first=1_000_000, operations=2_000, at_once=AT_ONCE)
    for store in stores.values():
        await store.close()
    return alone, together


async def _compared(stores: dict[int, Store], *, first: int, operations: int, at_once: int) -> Times:
    """Medians; the ratio is of neighbours in time, since a disk that slows down for a while slows both."""
    taken: dict[str, dict[int, list[float]]] = {name: {FEW: [], MANY: []} for name in KINDS}
    for turn in range(ROUNDS + 1):
        for name, operation in KINDS.items():
            for rows in (FEW, MANY) if turn % 2 else (MANY, FEW):
                seconds = await _timed(stores[rows], operation, first + turn * operations, operations, at_once)
                if turn:        # the first only warms up
                    taken[name][rows].append(seconds)
    return {name: (statistics.median(of[FEW]), statistics.median(of[MANY]),
                   statistics.median(many / few for few, many in zip(of[FEW], of[MANY], strict=True)))
            for name, of in taken.items()}


async def _timed(store: Store, operation: Operation, first: int, operations: int, at_once: int) -> float:
    """Seconds for each of them."""
    async def some(task: int) -> None:
        for number in range(task, operations, at_once):
            await operation(store, first + number)

    start = time.perf_counter()
    await asyncio.gather(*(some(task) for task in range(at_once)))
    await store.flush()
    return (time.perf_counter() - start) / operations


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _claim(payload: bytes, manifest_id: bytes, row: int) -> Claim:
    return Claim(_person(row), SENDER, manifest_id, b"k" * 32, _stream(row), row, 0, _now_ms(), None, payload, os.urandom(64),
                 "valid", True)


async def _judge_new(store: Store, number: int) -> None:
    claim = _claim(os.urandom(32), os.urandom(16), MANY + 1 + number)
    stored = await store.judge(claim, Arrival(_now_ms()), LIMITS)
    assert stored.first
    assert stored.row_id is not None
    await store.mark_delivered(stored.row_id)


async def _find_repeat(store: Store, number: int) -> None:
    row = number * 31 % FEW + 1       # there in both stores
    stored = await store.judge(_claim(_mark(row, 32), _mark(row, 16), row), Arrival(_now_ms()), LIMITS)
    assert not stored.first


async def _send(store: Store, number: int) -> None:
    to = SendRecipient(_person(number), sealed=True)
    plan = await store.begin_send(SendIntent("", SENDER, b"k" * 32, os.urandom(32), [to], _now_ms()))
    store.finish_send_later(plan, {to.address: (Outcome.ACCEPTED, "250 2.0.0 Ok")}, _now_ms())
    store.remember_outer_id(f"<{number}.{os.urandom(8).hex()}@a.example>", f"<{os.urandom(16).hex()}@a.example>", _now_ms())


async def _look_up(store: Store, number: int) -> None:
    await store.known_messages([f"<{number}.{os.urandom(8).hex()}@north.example>"])


KINDS: dict[str, Operation] = {
    "judging a new message": _judge_new, "finding a repeat": _find_repeat, "sending": _send, "looking up a reply": _look_up}


def _person(row: int) -> str:
    """In no order: who gets mail one after the other are not neighbours in an index."""
    return f"p{row * 7919 % PEOPLE}@south.example"


def _stream(row: int) -> bytes:
    """One of so many senders' devices. With each person it writes to, each has a numbering of its own."""
    return _mark(row // PEOPLE % STREAMS, 8)


def _mark(row: int, size: int) -> bytes:
    """The same as `_fill` writes: bytes in no order of the rows."""
    return (row * 0x9E3779B97F4A7C15 % 2**64).to_bytes(8, "big").ljust(size, b"m")


def _fill(file: Path, rows: int) -> None:
    """The rows that so many messages received, and as many sent, leave behind: every table that grows with them."""
    now_ms = _now_ms()
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("PRAGMA cache_size = -1000000")
        connection.executemany(
            "INSERT INTO seen (recipient, sender, manifest_id, id_held, skid, stream, serial_held, payload_digest, "
            "original_mark, verdict, notes, delivered, judged_at_ms, keep_from_ms) "
            "VALUES (?, ?, ?, 1, ?, ?, ?, ?, ?, 'FRESH', '', 1, ?, ?)",
            ((_person(row), SENDER, _mark(row, 16), b"k" * 32, _stream(row), row, _mark(row, 32), _mark(row, 32), now_ms, now_ms)
             for row in range(1, rows + 1)))
        connection.executemany("INSERT INTO outer_id (inner_mark, outer_id, at_ms) VALUES (?, ?, ?)",
                               ((_mark(row, 32), f"<{row:032x}@north.example>", now_ms) for row in range(rows)))
        connection.executemany("INSERT INTO serial (stream, recipient, last, accepted) VALUES (?, ?, 1, 1)",
                               ((_stream(row), _person(row)) for row in range(rows)))
        connection.executemany(
            "INSERT INTO journal (key, recipient, state, attempt, submission_id, first_at_ms, changed_at_ms, stream, serial, "
            "prev, reply) VALUES (?, ?, 1, 1, ?, ?, ?, ?, 1, 0, '250 2.0.0 Ok')",
            ((_mark(row, 32), _person(row), _mark(row, 16), now_ms, now_ms, _stream(row)) for row in range(rows)))
        connection.executemany(
            "INSERT INTO outcome (at_ms, direction, account, message_id, sender, recipients, outcome, verdict, detail, took_ms) "
            "VALUES (?, 'out', '', ?, ?, 1, 'sealed', '', '', 3)",
            ((now_ms, f"<{row:032x}@north.example>", SENDER) for row in range(rows)))
        connection.commit()
