"""What one relayed message costs in the store: begin_send + finish_send + forget_send, CPU and wall, by tasks at once.

    python bench/store_ops.py [DIRECTORY ON THE DISK TO MEASURE]
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import time
from pathlib import Path

import uvloop

from malote.store import Outcome, SendIntent, SendRecipient, Store


async def _messages(store: Store, task: int, count: int) -> None:
    to = [SendRecipient(f"recipient{task}@example.org", sealed=True)]
    for _ in range(count):
        now_ms = time.time_ns() // 1_000_000
        plan = await store.begin_send(SendIntent("", "sender@example.org", b"k" * 32, os.urandom(32), to, now_ms))
        await store.finish_send(plan, {to[0].address: (Outcome.ACCEPTED, "250 2.0.0 Ok")}, now_ms)
        store.forget_send(plan)


async def _measure(directory: Path, tasks: int, count: int) -> None:
    store = await Store.open(directory)
    await _messages(store, 0, 20)
    wall, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(_messages(store, task, count // tasks) for task in range(tasks)))
    await store.flush()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(f"{tasks:4} at once: {cpu / count * 1e6:6.0f} us CPU, {wall / count * 1e6:6.0f} us wall a message")
    await store.close()


def main() -> None:
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as place:
        for tasks in (1, 10, 50, 200):
            uvloop.run(_measure(Path(place) / "store", tasks, 4_000))


if __name__ == "__main__":
    main()
