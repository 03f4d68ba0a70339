"""The connection to PostgreSQL is cut before and after each message of each operation: 451 or done, never half."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import asyncpg
import pytest

from lab.postgres import Postgres
from malote.core.freshness import Arrival, Claim, FreshnessLimits, Verdict
from malote.database_url import parse_url
from malote.errors import StoreUnavailable
from malote.store import Outcome, OutcomeEntry, SendIntent, SendState, Store, Stored

BOB = "bob@b.example"
TAKEN = {BOB: (Outcome.ACCEPTED, "250 2.0.0 queued")}
MOST = 40       # messages of one operation, with those that make a new connection
Make = Callable[..., SendIntent]


class Relay:
    """Between the store and the server. `arm`: the connection is cut at the message of that number from now, `asked` before the
    server gets it, `answered` before the store gets the answer."""

    def __init__(self, target: Path) -> None:
        self._target = target
        self._way, self._left = "", 0
        self.cuts = 0

    def arm(self, way: str, number: int) -> None:
        self._way, self._left = way, number

    def disarm(self) -> bool:
        """Whether it had still to come to that."""
        armed, self._way = bool(self._way), ""
        return armed

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_unix_connection(str(self._target))
        pumps = [asyncio.create_task(self._pump("asked", reader, server_writer)),
                 asyncio.create_task(self._pump("answered", server_reader, writer))]
        await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        for end in (writer, server_writer):
            end.transport.abort()
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)

    async def _pump(self, way: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 20):
            if way == self._way:
                if self._left == 0:
                    self._way = ""
                    self.cuts += 1
                    return
                self._left -= 1
            writer.write(data)
            await writer.drain()


@pytest.fixture
async def relay(postgres: Postgres, tmp_path: Path) -> AsyncIterator[Relay]:
    found = Relay(postgres.root / f".s.PGSQL.{postgres.port}")
    server = await asyncio.start_unix_server(found.serve, str(tmp_path / ".s.PGSQL.5432"))
    yield found
    server.close()


async def until_done(operation: Callable[[], Awaitable[object]]) -> object:
    """As a client that is told 451 and comes again; a cut is felt once."""
    with suppress(StoreUnavailable):
        return await operation()
    return await operation()


@pytest.mark.parametrize("way", ["answered", pytest.param("asked", marks=pytest.mark.long)])
async def test_cut_at_each_message(
    relay: Relay, postgres_url: str, tmp_path: Path, intent: Make, claim: Callable[..., Claim], now_ms: int,
    way: str,
) -> None:
    store = await Store.open(f"postgresql://malote@/{parse_url(postgres_url).database}?host={tmp_path}&port=5432")
    await store.join(b"1" * 16)
    number = 0
    steps: dict[str, int] = {}
    for step in range(MOST):
        number += 1
        send = intent(BOB, content=b"message %d" % number)
        told = claim(number, stream=b"t" * 8, serial=number, prev=number - 1)
        row_ids: list[int | None] = []

        async def judged(told: Claim = told, row_ids: list[int | None] = row_ids) -> Stored:
            stored = await store.judge(told, Arrival(now_ms), FreshnessLimits())
            assert (stored.judgement.verdict, stored.delivered) == (Verdict.FRESH, False)
            row_ids.append(stored.row_id)
            return stored
        operations: dict[str, Callable[[], Awaitable[object]]] = {
            "begin": lambda send=send: store.begin_send(send), "retry": lambda send=send: store.begin_send(send),      # type: ignore[misc]
            "judge": judged, "deliver": lambda ids=row_ids: store.mark_delivered(ids[-1] or 0),      # type: ignore[misc]
            "renew": lambda: store.renew_membership(1), "read": lambda: store.cards((BOB,)),
        }
        for what, operation in operations.items():
            store._checked_at = 0.0     # cards are asked for
            relay.arm(way, step)
            result = await until_done(operation)
            if not relay.disarm():
                steps[what] = step
            if what == "retry":
                plan = await store.begin_send(send)
                assert result.submission_id == plan.submission_id     # type: ignore[attr-defined]
                assert plan.row(BOB).state is SendState.IN_DOUBT
                assert plan.row(BOB).serial == number, "a number was burnt, or given twice"
        relay.arm(way, step)
        store.finish_send_later(plan, TAKEN, now_ms)        # what nobody waits for is not lost either
        store.log_outcome(OutcomeEntry(number, "out", "sealed"))
        await until_done(store.flush)
        if not relay.disarm():
            steps["finish"] = step
        assert (await store.begin_send(send)).row(BOB).state is SendState.ACCEPTED
        again = await store.judge(told, Arrival(now_ms), FreshnessLimits())
        assert (again.judgement.verdict, again.delivered) == (Verdict.DUPLICATE, True)
        if step > max(steps.values()) + 1:
            break
    assert step < MOST - 1, "an operation never came to its end"
    assert len(steps) == len(operations) + 1
    assert min(at for what, at in steps.items() if what != "read") >= 2, f"not all operations were cut: {steps}"
    assert relay.cuts >= 25
    await store.close()
    connection = await asyncpg.connect(postgres_url)
    assert await connection.fetchval("SELECT last FROM serial") == number
    assert await connection.fetchval("SELECT count(*) FROM journal") == number
    assert await connection.fetchval("SELECT accepted FROM serial") == number
    assert {at for (at,) in await connection.fetch("SELECT at_ms FROM outcome")} == set(range(1, number + 1))
    assert await connection.fetchval("SELECT count(*) FROM seen") == number
    await connection.close()
