"""Load on several processes that are killed meanwhile, and what has to have come of it."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from malote.core.identity import Identity
from malote.store import Store
from outgoing.harness import Upstream, opened, submit, text, verdict

GIVE_UP = 400       # tries of one message


@dataclass
class Load:
    """Clients, each with a message after the other, which it brings again until it is taken: as a mail queue does."""

    port: int
    sender: str
    recipients: list[str]
    clients: int = 4
    taken: list[str] = field(default_factory=list)      # Message-IDs
    again: int = 0                                      # how often a client came again
    _stopping: bool = False
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    def start(self) -> asyncio.Task[None]:
        return asyncio.create_task(self._run())

    def stop(self) -> None:
        """Those under way are brought to their end."""
        self._stopping = True

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(self.clients):
                tasks.create_task(self._client())

    async def _client(self) -> None:
        while not self._stopping:
            message_id = f"<{next(self._numbers)}@test.example>"
            content = text(self.sender, message_id=message_id)
            for attempt in range(GIVE_UP):
                self.again += bool(attempt)
                if await asyncio.to_thread(self._try, content, polite=attempt % 2 == 0) == 250:
                    break
                await asyncio.sleep(0.1)
            else:
                raise AssertionError(f"{message_id} was never taken")
            self.taken.append(message_id)

    def _try(self, content: bytes, *, polite: bool) -> int:
        """The code of the reply; 0: the connection was lost."""
        try:
            return submit(self.port, self.sender, self.recipients, content, polite=polite).code
        except Exception:  # noqa: BLE001 - a lost connection comes as many exceptions
            return 0


async def check_arrivals(load: Load, upstream: Upstream, people: Mapping[str, Identity], root: Path,
                         secret: bytes) -> Counter[str]:
    """For each reader: every message that was taken is FRESH once, and what came again is DUPLICATE. Returns the verdicts."""
    total: Counter[str] = Counter()
    sender = people[load.sender]
    for reader in load.recipients:
        store = await Store.open(root / f"reader-{reader}")
        fresh: Counter[str] = Counter()
        try:
            for message in upstream.messages:
                if reader in message.recipients:
                    said = await verdict(store, message.content, people[reader], sender)
                    total[said] += 1
                    if said == "FRESH":
                        original = opened(message.content, people[reader], sender).original
                        fresh[original.split(b"Message-ID: ")[1].split(b"\r\n")[0].decode()] += 1
        finally:
            await store.close()
        assert set(total) <= {"FRESH", "DUPLICATE"}, total
        assert set(fresh.values()) == {1}, "a message was fresh twice"
        assert set(load.taken) <= set(fresh), "a message was lost"
        assert len(fresh) == len(load.taken), "a message arrived that nobody was told of"
    assert secret not in upstream.wire
    return total
