"""Real processes on one store: killed in the middle, and racing for the same message."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from malote.store import SendIntent, Store

BOB = "bob@b.example"

_SENDER = """
import asyncio, os, sys, time
from malote.store import SendIntent, SendRecipient, Store
async def one(store, task):
    while True:
        plan = await store.begin_send(SendIntent("anna", "anna@a.example", b"k" * 32, os.urandom(32),
            [SendRecipient("bob@b.example", True)], time.time_ns() // 1_000_000))
        os.write(1, b"%s %d\\n" % (plan.rows[0].stream.hex().encode(), plan.rows[0].serial))
async def main():
    store = await Store.open(sys.argv[1])
    await asyncio.gather(*(one(store, task) for task in range(8)))
asyncio.run(main())
"""

_JUDGE = """
import asyncio, json, sys
from malote.core.freshness import Arrival, Claim, FreshnessLimits
from malote.store import Store
now_ms = 1_800_000_000_000
async def main():
    store = await Store.open(sys.argv[1])
    sys.stdin.readline()
    first = []
    for number in range(1, 150):
        claim = Claim("bob@b.example", "anna@a.example", number.to_bytes(16, "big"), b"k" * 32, b"s" * 8, number, number - 1,
                      now_ms, None, number.to_bytes(32, "big"), number.to_bytes(64, "big"), "valid", True)
        if (await store.judge(claim, Arrival(now_ms), FreshnessLimits())).first:
            first.append(number)
    await store.close()
    print(json.dumps(first))
asyncio.run(main())
"""


def _start(code: str, place: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code, str(place)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                            env={"PYTHONPATH": ":".join(sys.path)})


async def test_no_number_is_given_out_twice_across_a_kill(tmp_path: Path, intent: Callable[..., SendIntent]) -> None:
    """kill -9 in the middle of group commits, several times: a number that reached its caller is never given out again."""
    await (await Store.open(tmp_path / "store")).close()
    given: list[str] = []
    for _ in range(4):
        process = _start(_SENDER, tmp_path / "store")
        assert process.stdout is not None
        given += [await asyncio.to_thread(process.stdout.readline) for _ in range(120)]
        process.kill()
        rest, _ = await asyncio.to_thread(process.communicate)
        given += rest.splitlines(keepends=True)
    whole = [line.split() for line in given if line.endswith("\n")]
    assert len(whole) >= 480
    assert len({(stream, int(serial)) for stream, serial in whole}) == len(whole)
    store = await Store.open(tmp_path / "store")
    last = await store.begin_send(intent(BOB))
    assert {stream for stream, _ in whole} == {last.row(BOB).stream.hex()}
    assert last.row(BOB).serial > max(int(serial) for _, serial in whole)
    await store.close()


async def test_exactly_one_process_is_first(tmp_path: Path) -> None:
    """Two watchers judge the same messages at once: each message is first for exactly one of them."""
    await (await Store.open(tmp_path / "store")).close()
    processes = [_start(_JUDGE, tmp_path / "store") for _ in range(2)]
    results = await asyncio.gather(*(asyncio.to_thread(process.communicate, "go\n") for process in processes))
    assert [process.returncode for process in processes] == [0, 0]
    one, two = (json.loads(output) for output, _ in results)
    assert sorted(one + two) == list(range(1, 150))
