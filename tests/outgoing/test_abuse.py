"""Clients that mean harm, or are broken, do not keep others from being served: real sockets, the gateway in its own process."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from outgoing.harness import HOST, Upstream, gateway_process, person, submit, text

ALICE, BOB = person("alice@test.example"), person("bob@test.example")
HONEST_MESSAGES = 10
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
_numbers = itertools.count()


async def connect(port: int, addresses: int) -> Streams:
    """From one of that many addresses: abusers are not one client that a limit would catch."""
    address = f"127.0.0.{2 + next(_numbers) % addresses}"
    return await asyncio.open_connection(HOST, port, local_addr=(address, 0), limit=1 << 20)


async def silence(streams: Streams) -> None:
    """Says nothing, for ever."""
    await streams[0].read()


async def drip(streams: Streams) -> None:
    """One byte of a command now and then, which never ends."""
    while True:
        streams[1].write(b"E")
        await streams[1].drain()
        await asyncio.sleep(0.05)


async def slow_data(streams: Streams) -> None:
    """A message that never comes to its end, a line at a time."""
    streams[1].write(b"EHLO x\r\nMAIL FROM:<a@else.example>\r\nRCPT TO:<b@else.example>\r\nDATA\r\n")
    while True:
        streams[1].write(b"X-Slow: yes\r\n")
        await streams[1].drain()
        await asyncio.sleep(0.05)


async def flood(streams: Streams) -> None:
    """Commands as fast as they go, and no reply is read."""
    streams[1].transport.set_write_buffer_limits(1 << 16)
    while True:
        streams[1].write(b"NOOP\r\n" * 2000)
        await streams[1].drain()
        await asyncio.sleep(0)


async def garbage(streams: Streams) -> None:
    """Bytes that are no commands, in lines without end."""
    while True:
        streams[1].write(os.urandom(1 << 14).replace(b"\n", b"x"))
        await streams[1].drain()
        await asyncio.sleep(0)


async def begin_and_stop(streams: Streams) -> None:
    """Hundreds of transactions that are given up at once, pipelined."""
    streams[1].write(b"EHLO x\r\n")
    while True:
        streams[1].write(b"MAIL FROM:<a@else.example>\r\nRCPT TO:<b@else.example>\r\nRSET\r\n" * 50)
        await streams[1].drain()
        if not await streams[0].read(1 << 16):
            return


async def announce_much(streams: Streams) -> None:
    """BDAT with a size that would fill the memory."""
    streams[1].write(b"EHLO x\r\nMAIL FROM:<a@else.example>\r\nRCPT TO:<b@else.example>\r\nBDAT 999999999 LAST\r\n")
    while True:
        streams[1].write(bytes(1 << 14))
        await streams[1].drain()
        await asyncio.sleep(0.05)


ABUSES: tuple[Callable[[Streams], Awaitable[None]], ...] = (
    silence, drip, slow_data, flood, garbage, begin_and_stop, announce_much)


@contextlib.asynccontextmanager
async def abusers(port: int, count: int, abuses: tuple[Callable[[Streams], Awaitable[None]], ...] = ABUSES, *,
                  addresses: int = 30) -> AsyncIterator[Counter[str]]:
    """That many at once, each of which comes again when it is thrown out. How often each kind has connected."""
    connected: Counter[str] = Counter()

    async def one(abuse: Callable[[Streams], Awaitable[None]]) -> None:
        while True:
            writer = None
            try:
                reader, writer = await connect(port, addresses)
                connected[abuse.__name__] += 1      # type: ignore[attr-defined]
                await abuse((reader, writer))
            except OSError:
                pass
            finally:
                if writer is not None:
                    writer.transport.abort()
            await asyncio.sleep(0.2)
    tasks = [asyncio.create_task(one(abuse)) for abuse in itertools.islice(itertools.cycle(abuses), count)]
    try:
        while sum(connected.values()) < count:
            await asyncio.sleep(0.05)
        yield connected
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def serve_honest(port: int, wanted: int = HONEST_MESSAGES) -> list[str]:
    """The replies that an honest client gets, each message on a connection of its own."""
    messages = [text(message_id=f"<{number}@test.example>") for number in range(wanted)]
    return [(await asyncio.to_thread(submit, port, ALICE.address, [BOB.address], message)).data for message in messages]


async def test_150_abusers_and_one_honest_client(tmp_path: Path) -> None:
    async with Upstream() as upstream, gateway_process(
            tmp_path, upstream.port, identities=(ALICE,), cards=(BOB,)) as (child, port), abusers(port, 150) as connected:
        replies = await serve_honest(port)
        assert all(reply.startswith("250") for reply in replies), replies
        assert set(connected) == {abuse.__name__ for abuse in ABUSES}       # type: ignore[attr-defined]
        assert child.returncode is None
    assert sum(message.recipients == [BOB.address] for message in upstream.messages) == HONEST_MESSAGES


async def test_more_silent_clients_than_there_are_places(tmp_path: Path) -> None:
    """All places are taken by those who say nothing: an idle one of whoever has most of them makes room."""
    async with Upstream() as upstream, gateway_process(
            tmp_path, upstream.port, identities=(ALICE,), cards=(BOB,), limits={"connections": 20}) as (_, port), \
            abusers(port, 40, (silence,), addresses=3):
        assert all(reply.startswith("250") for reply in await serve_honest(port))


@pytest.mark.parametrize("abuse", [flood, begin_and_stop])
async def test_one_that_takes_all_it_can_gets_no_more_than_its_turn(
        tmp_path: Path, abuse: Callable[[Streams], Awaitable[None]]) -> None:
    async with Upstream() as upstream, gateway_process(
            tmp_path, upstream.port, identities=(ALICE,), cards=(BOB,)) as (_, port), abusers(port, 30, (abuse,)):
        assert all(reply.startswith("250") for reply in await serve_honest(port, 3))
