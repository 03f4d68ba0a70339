"""IMAP peers for tests: a server that says what a script tells it to, and a wire in front of a real server that can be cut."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from malote.config import AccountConfig
from malote.incoming.mailbox import Mailbox

HOST = "127.0.0.1"
CAPABILITIES = "IMAP4rev1 SASL-IR LITERAL+ IDLE UIDPLUS MOVE UNSELECT"


def account(port: int, **changes: object) -> AccountConfig:
    """An account on loopback in clear text, unless `changes` say otherwise."""
    values: dict[str, object] = {"name": "test", "host": HOST, "port": port, "security": "none",
                                 "username": "anna@test.example", "deliver": "replace"}
    return AccountConfig.model_validate(values | changes)


async def secret() -> str:
    """The password of every user of the tests."""
    return "secret"


class Script:
    """The server's end of one connection. `heard` is every line that the client sent."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.heard: list[bytes] = []

    async def send(self, *lines: bytes) -> None:
        """Each with CRLF, all in one segment."""
        await self.send_raw(b"".join(line + b"\r\n" for line in lines))

    async def send_raw(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def line(self) -> bytes:
        """The client's next line, without CRLF. Raises `EOFError` when it is gone."""
        line = await self._reader.readuntil(b"\r\n")
        self.heard.append(line[:-2])
        return line[:-2]

    async def read(self, size: int) -> bytes:
        return await self._reader.readexactly(size)

    async def until(self, word: bytes, capabilities: str = CAPABILITIES) -> bytes:
        """Behave as an ordinary server until a command holds `word`; its tag."""
        while True:
            line = await self.line()
            tag, _, rest = line.partition(b" ")
            if word in rest:
                return tag
            await self._ordinary(tag, rest, capabilities.encode())

    async def _ordinary(self, tag: bytes, rest: bytes, capabilities: bytes) -> None:
        name = rest.split(b" ")[0].upper()
        answers = {
            b"CAPABILITY": [b"* CAPABILITY " + capabilities],
            b"SELECT": [b"* 3 EXISTS", b"* OK [UIDVALIDITY 7] x", b"* OK [UIDNEXT 9] x", b"* OK [PERMANENTFLAGS (\\Seen \\*)] x"],
            b"LIST": [b'* LIST () "/" INBOX', b'* LIST () "/" Sealed'],
        }
        await self.send(*answers.get(name, []), tag + b" OK done")

    async def begin(self, word: bytes, capabilities: str = CAPABILITIES) -> bytes:
        """Greet, then `until`."""
        await self.send(b"* OK ready")
        return await self.until(word, capabilities)

    async def gone(self) -> bytes:
        """Whatever the client still sends until it closes."""
        said = b""
        with contextlib.suppress(ConnectionError):
            while data := await self._reader.read(65536):
                said += data
        return said


@contextlib.asynccontextmanager
async def scripted(play: Callable[[Script], Awaitable[object]]) -> AsyncIterator[int]:
    """A server whose connections follow `play`; yields its port. What goes wrong in the script fails the test."""
    failures: list[BaseException] = []
    running: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is not None:
            running.add(task)
        try:
            await play(Script(reader, writer))
        except (EOFError, ConnectionError, asyncio.CancelledError):
            pass        # the client is gone, which is what many scripts are about
        except BaseException as error:      # noqa: BLE001 - handed to the test
            failures.append(error)
        finally:
            writer.transport.abort()
            if task is not None:
                running.discard(task)

    server = await asyncio.start_server(serve, HOST, 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        if running:
            await asyncio.wait(running, timeout=2)      # the client has closed; let the scripts see it
        for task in list(running):
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await asyncio.sleep(0)
    if failures:
        raise failures[0]


@contextlib.asynccontextmanager
async def opened(port: int, *, folder: str | None = None, seconds: float = 20, max_message_bytes: int = 160 * 1024 * 1024,
                 **changes: Any) -> AsyncIterator[Mailbox]:
    """A logged-in mailbox, with `folder` selected."""
    box = await Mailbox.connect(account(port, **changes), password=secret, command_seconds=seconds, search_seconds=seconds,
                                max_message_bytes=max_message_bytes)
    try:
        if folder is not None:
            await box.select(folder)
        yield box
    finally:
        box.abort()
        await asyncio.sleep(0)


class Wire:
    """A TCP relay in front of a server; `cut` ends every connection without a word, `freeze` lets nothing pass any more."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._writers: list[asyncio.StreamWriter] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._open = asyncio.Event()
        self._open.set()
        self._cut_at: bytes | None = None
        self.port = 0
        self.seen = bytearray()         # from the client

    def cut_when(self, said: bytes) -> None:
        """Cut as soon as the client has sent `said`, before it reaches the server."""
        self._cut_at = said
        self.seen.clear()

    def cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    def freeze(self) -> None:
        self._open.clear()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(HOST, self._target)
        self._writers += [writer, far_writer]
        for source, sink, client in ((reader, far_writer, True), (far_reader, writer, False)):
            task = asyncio.create_task(self._pump(source, sink, client=client))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, client: bool) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await source.read(65536):
                await self._open.wait()
                if client:
                    self.seen += data
                    if self._cut_at is not None and self._cut_at in self.seen:
                        self.cut()
                        return
                sink.write(data)
                await sink.drain()
        sink.transport.abort()

    async def end(self) -> None:
        self.cut()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.asynccontextmanager
async def wired(port: int) -> AsyncIterator[Wire]:
    """A `Wire` to a local port."""
    wire = Wire(port)
    server = await asyncio.start_server(wire.serve, HOST, 0)
    wire.port = server.sockets[0].getsockname()[1]
    try:
        yield wire
    finally:
        server.close()
        await wire.end()
        await asyncio.sleep(0)
