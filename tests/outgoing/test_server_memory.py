"""The memory budget holds for the real process: its peak is measured while far more is sent to it than it may keep."""

from __future__ import annotations

import asyncio
import re
import sys
from pathlib import Path

import pytest

from lab.servers import Lab, free_port, wait_for_port
from lab.wire import HOST, Client
from malote.smtp.budget import MEMORY_FACTOR

SERVER = """
import asyncio, sys
from malote.config import ListenerConfig, UpstreamConfig
from malote.smtp.relay import Upstream
from lab.wire import RelayDesk, serving
async def main(port, sink, budget):
    upstream = Upstream(UpstreamConfig(host="127.0.0.1", port=sink, security="none"))
    async with serving(RelayDesk(upstream), connections=200, budget=budget, config=ListenerConfig(port=port)):
        await asyncio.Event().wait()
asyncio.run(main(*map(int, sys.argv[1:])))
"""


@pytest.mark.parametrize(("clients", "size", "fit"), [
    (20, 5_000_000, 3), pytest.param(100, 25_000_000, 3, marks=pytest.mark.long),
])
async def test_peak_stays_below_the_budget(lab: Lab, clients: int, size: int, fit: int) -> None:
    """Who does not fit is answered 452 4.3.1; at least one message gets through; the process never grows past the budget."""
    sink = await asyncio.to_thread(lab.sink)
    budget = fit * size * MEMORY_FACTOR
    port = free_port()
    tests = Path(__file__).parents[1]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SERVER, str(port), str(sink.port), str(budget),
        env={"PYTHONPATH": f"{tests.parent / 'daemon'}:{tests}", "PATH": "/usr/bin:/bin"})
    try:
        await asyncio.to_thread(wait_for_port, port)
        idle = peak_bytes(process.pid)
        line = b"x" * 998 + b"\r\n"
        block = line * 100

        async def one() -> str:
            reader, writer = await asyncio.open_connection(HOST, port)
            client = Client(reader, writer)
            await client.reply()
            await client.begin()
            for _ in range(size // len(block)):
                client.send(block)
                await writer.drain()
            client.send(b".\r\n")
            async with asyncio.timeout(100):
                answer = (await reader.readline()).decode().strip()
            writer.close()
            return answer

        replies = await asyncio.gather(*(one() for _ in range(clients)))
        codes = {reply[:3] for reply in replies}
        assert codes == {"250", "452"}
        assert all(reply.startswith("452 4.3.1") for reply in replies if reply.startswith("452"))
        assert peak_bytes(process.pid) - idle < budget
    finally:
        process.terminate()
        await process.wait()
        await asyncio.to_thread(sink.stop)


def peak_bytes(pid: int) -> int:
    match = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert match
    return int(match[1]) * 1024
