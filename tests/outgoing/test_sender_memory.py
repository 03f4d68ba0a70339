"""Many large messages at once: 452 above the memory budget, and the process stays below it."""

from __future__ import annotations

import asyncio
import smtplib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from lab.servers import Lab
from outgoing.harness import HOST, gateway_process, person, submit, text

ALICE, BOB = person("alice@test.example"), person("bob@test.example")
MB = 1024 * 1024


def attempt(port: int, number: int, content: bytes) -> int:
    """The code of the last reply. A client that is refused while it still sends may see the connection close."""
    sent = text(message_id=f"<{number}@test.example>").split(b"\r\n\r\n")[0] + b"\r\n\r\n" + content
    for _ in range(2):
        with suppress(smtplib.SMTPServerDisconnected, ConnectionError, TimeoutError):
            return submit(port, ALICE.address, [BOB.address], sent).code
    return 0


@pytest.mark.parametrize(("clients", "size", "budget"), [
    (16, 3 * MB, 64 * MB), pytest.param(100, 25 * MB, 512 * MB, marks=[pytest.mark.long, pytest.mark.timeout(600)])])
async def test_more_at_once_than_the_budget_holds(tmp_path: Path, lab: Lab, clients: int, size: int, budget: int) -> None:
    sink = await asyncio.to_thread(lab.sink, "-w", "1")     # answers each command after a second: messages meet
    content = (b"x" * 76 + b"\r\n") * (size // 78)
    try:
        limits = {"memory_budget": budget}
        async with gateway_process(tmp_path, sink.port, identities=[ALICE], cards=[BOB], limits=limits) as (child, port):
            assert await asyncio.to_thread(attempt, port, -1, b"small\r\n") == 250
            idle = resident(child.pid)
            with ThreadPoolExecutor(clients) as threads:
                loop = asyncio.get_running_loop()
                codes = Counter(await asyncio.gather(*(
                    loop.run_in_executor(threads, attempt, port, number, content) for number in range(clients))))
            peak = resident(child.pid, "VmHWM")
            assert codes[452], "nobody was sent away"
            assert codes[250], "nobody was served"
            assert codes[250] + codes[452] + codes[0] == clients
            assert peak - idle < budget
            assert resident(child.pid) - idle < size + 16 * MB, "what was used was given back"
            with smtplib.SMTP(HOST, port, "client") as client:
                assert client.ehlo()[0] == 250, "and it goes on"
    finally:
        await asyncio.to_thread(sink.stop)


def resident(pid: int, field: str = "VmRSS") -> int:
    """Bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(field)
