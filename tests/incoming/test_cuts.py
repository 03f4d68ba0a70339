"""The connection is cut after any number of bytes, in either direction: the next one finishes, and nothing is lost or doubled."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from lab.incoming import QUARANTINE, SEALED, Box, note, verdicts
from lab.servers import HOST
from malote.errors import MaloteError

COUNT = 3


class CuttingRelay:
    """A relay in front of the mail server that cuts the connection after `left` bytes of one direction."""

    def __init__(self, port: int) -> None:
        self.target = port
        self.counts = {"up": 0, "down": 0}
        self.limit: tuple[str, int] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.counts = {"up": 0, "down": 0}
        up_reader, up_writer = await asyncio.open_connection(HOST, self.target)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump("up", reader, up_writer))
                group.create_task(self._pump("down", up_reader, writer))
        except* (ConnectionError, _Cut):
            pass
        finally:
            for end in (writer, up_writer):
                end.transport.abort()

    async def _pump(self, way: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            if self.limit is not None and self.limit[0] == way:
                data = data[:self.limit[1] - self.counts[way]]
            self.counts[way] += len(data)
            writer.write(data)
            await writer.drain()
            if self.limit is not None and self.limit[0] == way and self.counts[way] >= self.limit[1]:
                raise _Cut
        raise _Cut


class _Cut(Exception):
    pass


@contextlib.asynccontextmanager
async def relay_to(port: int) -> AsyncIterator[tuple[CuttingRelay, int]]:
    relay = CuttingRelay(port)
    server = await asyncio.start_server(relay.serve, HOST, 0)
    try:
        yield relay, server.sockets[0].getsockname()[1]
    finally:
        server.close()


async def cut_once(box: Box, place: Path, way: str, at: int | None, deliver: str) -> dict[str, int]:
    """Three messages and a repeat of one; one look that is cut at `at`, and two that are not. Returns how much went each way."""
    for folder in ("INBOX", SEALED, QUARANTINE, "Malote/Opened"):
        if box.client.uids(folder):
            box.client.imap.uid("STORE", "1:*", "+FLAGS", "\\Deleted")
            box.client.imap.expunge()
    store = await box.open_store(place.name)
    maildir = box.directory / f"maildir-{place.name}"
    raws = [box.seal(note(f"number {number}", to=box.user)) for number in range(COUNT)]
    for raw in (*raws, raws[0]):
        box.client.put(raw)
    async with relay_to(box.dovecot.port) as (relay, port):
        relay.limit = (way, at) if at is not None else None
        watcher = await box.watcher(store, deliver=deliver, maildir=maildir, port=port)
        with contextlib.suppress(MaloteError):
            await watcher.run_once()
        counts = dict(relay.counts)
        relay.limit = None
        again = await box.watcher(store, deliver=deliver, maildir=maildir, port=port)
        for _ in range(2):
            await again.run_once()
    if deliver == "maildir":
        from email import message_from_bytes
        opened = [message_from_bytes(path.read_bytes()) for part in ("new", "cur") for path in (maildir / part).iterdir()]
    else:
        opened = box.client.messages("INBOX" if deliver == "replace" else "Malote/Opened")
    where = f"cut {way} at {at}"
    assert Counter(message["Subject"] for message in opened) == {f"number {number}": 1 for number in range(COUNT)}, where
    assert verdicts(opened) == ["FRESH"] * COUNT, where
    kept = Counter(box.client.fetch(SEALED) + box.client.fetch(QUARANTINE))
    assert all(kept[raw] >= 1 for raw in raws), where
    assert sum(kept.values()) <= COUNT + 3, where
    assert len(box.client.uids()) == (COUNT if deliver == "replace" else 0), where
    await store.close()
    box.stores.remove(store)
    return counts


@pytest.mark.long
@pytest.mark.parametrize("deliver", ["replace", "folder", "maildir"])
@pytest.mark.timeout(600)
async def test_cut_anywhere(box: Box, tmp_path: Path, deliver: str) -> None:
    whole = await cut_once(box, tmp_path / "whole", "up", None, deliver)
    for way in ("up", "down"):
        step = max(whole[way] // 60, 1)
        for number, at in enumerate(range(whole[way], 0, -step)):
            await cut_once(box, tmp_path / f"{way}{number}", way, at, deliver)
