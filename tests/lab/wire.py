"""Both ends of an SMTP conversation for tests: a raw client, a desk that records, an upstream that misbehaves by script."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from malote.config import ListenerConfig, UpstreamConfig
from malote.errors import Reply
from malote.smtp.budget import MemoryBudget
from malote.smtp.connection import UpstreamConnection
from malote.smtp.desk import AuthOutcome, ClientSession, Offer
from malote.smtp.listener import Listener
from malote.smtp.open_connections import Connections
from malote.smtp.relay import Upstream
from malote.smtp.server import ServerSettings

HOST = "127.0.0.1"
EVERYTHING = Offer(frozenset({"8BITMIME", "SMTPUTF8", "DSN"}), 0, ("PLAIN", "LOGIN", "XOAUTH2"))
SETTINGS = ServerSettings("mx.test.example")


class RecordingDesk:
    """Accepts everything and writes down what it was told. Replace `on_*` with a coroutine function to do otherwise."""

    def __init__(self, offer: Offer = EVERYTHING) -> None:
        self.offered = offer
        self.events: list[tuple[Any, ...]] = []
        self.messages: list[bytes] = []
        self.sessions: list[ClientSession] = []
        self.on_mail: Callable[..., Awaitable[Reply]] | None = None
        self.on_rcpt: Callable[..., Awaitable[Reply]] | None = None
        self.on_data: Callable[..., Awaitable[Reply]] | None = None
        self.on_authenticate: Callable[..., Awaitable[AuthOutcome]] | None = None
        self.closed = asyncio.Event()

    async def offer(self, session: ClientSession) -> Offer:
        self.sessions.append(session)
        return self.offered

    async def authenticate(self, session: ClientSession, mechanism: str, initial: bytes | None) -> AuthOutcome:
        self.events.append(("auth", mechanism, initial))
        if self.on_authenticate is not None:
            return await self.on_authenticate(session, mechanism, initial)
        for prompt in (b"User Name", b"Password")[0 if mechanism == "LOGIN" else 1:] if initial is None else ():
            if await session.challenge(prompt) is None:
                return AuthOutcome(Reply(535, "5.7.8", "Given up"))
        return AuthOutcome(Reply(235, "2.7.0", "Welcome"), "anna")

    async def mail(self, session: ClientSession, address: str, params: Mapping[str, str | bool]) -> Reply:
        self.events.append(("mail", address, dict(params)))
        return await self.on_mail(session, address, params) if self.on_mail else Reply(250, "2.1.0", "Sender ok")

    async def rcpt(self, session: ClientSession, address: str, params: Mapping[str, str | bool]) -> Reply:
        self.events.append(("rcpt", address, dict(params)))
        return await self.on_rcpt(session, address, params) if self.on_rcpt else Reply(250, "2.1.5", "Recipient ok")

    async def data(self, session: ClientSession, content: bytearray) -> Reply:
        self.events.append(("data",))
        self.messages.append(bytes(content))
        return await self.on_data(session, content) if self.on_data else Reply(250, "2.0.0", f"Message {len(self.messages)}")

    async def reset(self, session: ClientSession) -> None:
        self.events.append(("reset",))

    async def close(self, session: ClientSession) -> None:
        self.events.append(("close",))
        self.closed.set()

    def reply_read(self, session: ClientSession) -> None:
        self.events.append(("read",))

    @property
    def names(self) -> list[str]:
        return [event[0] for event in self.events]


class RelayDesk(RecordingDesk):
    """Puts each message to an upstream unchanged: the shortest honest use of server and relay together."""

    def __init__(self, upstream: Upstream, offer: Offer = EVERYTHING) -> None:
        super().__init__(offer)
        self.upstream = upstream

    async def authenticate(self, session: ClientSession, mechanism: str, initial: bytes | None) -> AuthOutcome:
        connection = session.state = await self.upstream.connect()
        reply = await connection.authenticate(mechanism, initial, session.challenge)
        return AuthOutcome(reply, "relayed" if reply.code == 235 else "")

    async def mail(self, session: ClientSession, address: str, params: Mapping[str, str | bool]) -> Reply:
        if session.state is not None:
            own: UpstreamConnection = session.state
            return await own.mail(address, params)
        connection, reply = await self.upstream.begin(address, params)
        session.state = connection
        return reply

    async def rcpt(self, session: ClientSession, address: str, params: Mapping[str, str | bool]) -> Reply:
        connection: UpstreamConnection = session.state
        return await connection.rcpt(address, params)

    async def data(self, session: ClientSession, content: bytearray) -> Reply:
        connection: UpstreamConnection = session.state
        replies = await connection.data(content, on_final_dot=session.keep_going)
        if not session.login:
            await self.reset(session)
        return replies[0]

    async def reset(self, session: ClientSession) -> None:
        connection: UpstreamConnection | None = session.state
        if connection is not None and not session.login:
            session.state = None
            await self.upstream.release(connection)

    async def close(self, session: ClientSession) -> None:
        if session.state is not None:
            session.state.abort()
        await super().close(session)


@dataclass(slots=True)
class RunningServer:
    desk: Any
    listener: Listener
    connections: Connections
    budget: MemoryBudget
    port: int


@contextlib.asynccontextmanager
async def serving(
    desk: Any, settings: ServerSettings = SETTINGS, *, connections: int = 100, budget: int = 512 << 20,
    config: ListenerConfig | None = None, lmtp: bool = False, **changes: Any,
) -> AsyncIterator[RunningServer]:
    """A listener on a free port with that desk; `changes` are fields of ServerSettings."""
    registry, memory = Connections(connections), MemoryBudget(budget)
    listener = Listener(replace(settings, **changes), desk, registry, memory, lmtp)
    await listener.open(config or ListenerConfig.model_construct(host=HOST, port=0, socket=None))
    port = listener.addresses[0][1] if listener.addresses else 0
    try:
        yield RunningServer(desk, listener, registry, memory, port)
    finally:
        listener.close()
        await registry.drain(2)


class Client:
    """Bytes out, replies in. Times out rather than hangs."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def send(self, data: bytes) -> None:
        """Nothing once the server has hung up: uvloop would raise, asyncio would not."""
        if not self.writer.is_closing():
            self.writer.write(data)

    async def reply(self) -> str:
        """One whole reply, lines joined by LF; "" at the end of the connection."""
        lines = []
        async with asyncio.timeout(20):
            while True:
                line = (await self.reader.readline()).decode().rstrip("\r\n")
                lines.append(line)
                if line[3:4] != "-":
                    return "\n".join(lines)

    async def ask(self, command: str | bytes) -> str:
        self.send((command.encode() if isinstance(command, str) else command) + b"\r\n")
        return await self.reply()

    async def codes(self, count: int) -> list[int]:
        return [int((await self.reply())[:3]) for _ in range(count)]

    async def begin(self, sender: str = "a@a.example", *recipients: str) -> None:
        """EHLO to 354."""
        assert (await self.ask("EHLO client.test.example")).startswith("250")
        await self.to_354(sender, *recipients)

    async def to_354(self, sender: str = "a@a.example", *recipients: str) -> None:
        assert (await self.ask(f"MAIL FROM:<{sender}>")).startswith("250")
        for recipient in recipients or ("b@b.example",):
            assert (await self.ask(f"RCPT TO:<{recipient}>")).startswith("250")
        assert (await self.ask("DATA")).startswith("354")

    async def at_end(self) -> bool:
        """Whether the server has closed."""
        async with asyncio.timeout(20):
            try:
                return await self.reader.read(1) == b""
            except ConnectionError:
                return True


@contextlib.asynccontextmanager
async def connected(server: RunningServer, **options: Any) -> AsyncIterator[Client]:
    """A client past the greeting."""
    reader, writer = await asyncio.open_connection(HOST, server.port, limit=1 << 24, **options)
    client = Client(reader, writer)
    try:
        greeting = await client.reply()
        assert greeting.startswith("220"), greeting
        yield client
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError, TimeoutError):
            await writer.wait_closed()


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that another task does."""
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


DEFAULTS = {
    "": "220 upstream.test.example ESMTP", "EHLO": "250-upstream.test.example\r\n250-PIPELINING\r\n250-8BITMIME\r\n250 DSN",
    "LHLO": "250-upstream.test.example\r\n250-PIPELINING\r\n250 8BITMIME",
    "MAIL": "250 2.1.0 ok", "RCPT": "250 2.1.5 ok", "DATA": "354 go on", ".": "250 2.0.0 queued", "RSET": "250 2.0.0 ok",
    "QUIT": "221 2.0.0 bye", "NOOP": "250 2.0.0 ok", "AUTH": "235 2.7.0 ok",
}


@dataclass(slots=True)
class Scripted:
    """An upstream that says, per verb (four letters in capitals), what the script says.

    "hang": nothing; "close": closes; a list: one answer per use, the last for ever.
    "" is the greeting, "." the reply after the final dot. A reply that ends in "!" closes afterwards.
    """

    script: Mapping[str, str | Sequence[str]] = field(default_factory=dict)
    seen: list[str] = field(default_factory=list)
    messages: list[bytes] = field(default_factory=list)
    connections: int = 0
    port: int = 0
    writers: list[asyncio.StreamWriter] = field(default_factory=list)
    _used: dict[str, int] = field(default_factory=dict)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Scripted]:
        server = await asyncio.start_server(self._serve, HOST, 0, limit=1 << 24)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            for writer in self.writers:
                writer.transport.abort()
            await asyncio.sleep(0.01)

    def config(self, **changes: Any) -> UpstreamConfig:
        settings = {"host": HOST, "port": self.port, "security": "none", "helo_name": "malote.test.example", **changes}
        return UpstreamConfig(**settings)

    def _say(self, verb: str, writer: asyncio.StreamWriter) -> str:
        """Answers; returns the answer, "close" when the connection ends here."""
        answer = self.script.get(verb, DEFAULTS.get(verb, "500 what?"))
        if not isinstance(answer, str):
            used = self._used.get(verb, 0)
            self._used[verb] = used + 1
            answer = answer[min(used, len(answer) - 1)]
        if answer not in ("close", "hang"):
            writer.write(answer.removesuffix("!").encode() + b"\r\n")
        return "close" if answer.endswith("!") else answer

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.writers.append(writer)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            said = self._say("", writer)
            while said != "close":
                line = (await reader.readuntil(b"\n")).decode().rstrip("\r\n")
                self.seen.append(line)
                verb = line[:4].upper()
                said = self._say(verb, writer)
                if verb == "DATA" and said.startswith("354"):
                    self.messages.append(await self._body(reader))
                    self.seen.append(".")
                    said = self._say(".", writer)
                if verb == "QUIT":
                    break
        writer.close()

    async def _body(self, reader: asyncio.StreamReader) -> bytes:
        lines = []
        while (line := await reader.readuntil(b"\n")) != b".\r\n":
            lines.append(line.removeprefix(b"."))
        return b"".join(lines)
