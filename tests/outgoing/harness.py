"""The outgoing side put together as the service does it, and an upstream server that does what a test tells it.

`Gateway` runs in this process; `python -m outgoing.harness SETTINGS.json` runs the same in one of its own, to be killed.
`Upstream` is a real server on a real socket that keeps every byte it gets; what it does not script it does right.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import smtplib
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Self

from lab.servers import free_port
from malote.config import LimitsConfig, ListenerConfig, OutgoingConfig, RuleConfig, UpstreamConfig
from malote.core.freshness import Arrival, FreshnessLimits
from malote.core.identity import Identity, new_identity, parse_identity, serialize_identity
from malote.core.keys import SignatureAlgorithm
from malote.core.open import Opened, authenticate, unseal
from malote.core.parts import find_parts
from malote.outgoing.memory import return_large_blocks
from malote.outgoing.sender import Sender
from malote.outgoing.submission import Submissions
from malote.outgoing.users import Users, load_users
from malote.smtp.budget import MemoryBudget
from malote.smtp.listener import Listener, server_settings
from malote.smtp.open_connections import Connections
from malote.smtp.relay import Credentials
from malote.smtp.relay import Upstream as Relay
from malote.store import Store
from malote.store.records import Level, SendIntent, SendPlan

HOST = "127.0.0.1"
ROOT = Path(__file__).resolve().parents[2]
NOW_MS = time.time_ns() // 1_000_000
OPEN = ListenerConfig(host=HOST, auth="none")
DEFAULT_LIMITS = LimitsConfig()
LIMITS = FreshnessLimits(late_ms=7 * 86_400_000, skew_ms=600_000)


@cache
def person(address: str) -> Identity:
    """The same keys for the same address throughout one run."""
    return new_identity(address, SignatureAlgorithm.ED25519, NOW_MS - 86_400_000)


def text(sender: str = "alice@test.example", to: str = "bob@test.example", body: str = "the secret text", **fields: str) -> bytes:
    """A message as a client submits it. Keyword `message_id` becomes Message-ID, and so on; "" leaves a field out."""
    header = {"From": sender, "To": to, "Subject": "the secret subject", "Date": "Mon, 23 Nov 2026 10:00:00 +0000",
              "Message-ID": "<one@test.example>"}
    header |= {name.replace("_", "-").title().replace("-Id", "-ID"): value for name, value in fields.items()}
    lines = "".join(f"{name}: {value}\r\n" for name, value in header.items() if value)
    return f"{lines}\r\n{body}\r\n".encode()


def opened(raw: bytes, reader: Identity, sender: Identity) -> Opened:
    """A sealed message opened with the reader's keys and checked against the sender's card. Raises `Unreadable`."""
    found = find_parts(raw)
    assert found is not None, "nothing sealed in it"
    return authenticate(unseal(found, [(reader.address, key) for key in reader.decryption]), sender.card)


async def verdict(store: Store, raw: bytes, reader: Identity, sender: Identity) -> str:
    """What the receiver, whose store it is, says of this message on arrival; it is then delivered."""
    claim = opened(raw, reader, sender).claim(reader.address)
    arrival = Arrival(now_ms=time.time_ns() // 1_000_000, internal_date_ms=None, last_sync_ms=None)
    stored = await store.judge(claim, arrival, LIMITS)
    if stored.row_id is not None and not stored.delivered:
        await store.mark_delivered(stored.row_id)
    return str(stored.judgement.verdict)


# ---- the upstream server


@dataclass(slots=True)
class Received:
    """One message that the upstream server took."""

    sender: str
    recipients: list[str]
    content: bytes
    mail: str                       # the MAIL line
    rcpts: list[str]                # the RCPT lines
    connection: int


Answer = str | None                 # a reply line; None: close the connection without one; "": never answer
Script = Callable[[str, str, int], "Answer | bool"]


EXTENSIONS = ("PIPELINING", "8BITMIME", "SIZE 104857600", "DSN", "SMTPUTF8", "ENHANCEDSTATUSCODES",
              "AUTH PLAIN LOGIN XOAUTH2 OAUTHBEARER")


class Upstream:
    """`script(step, argument, number)` is asked at each step: CONNECT, EHLO, MAIL, RCPT, DATA, BODY, DOT, QUIT, RSET, AUTH.
    False: behave. The number counts the steps of that name, from 1. BODY is after its first line; DOT is after the final dot;
    `DOT!` decides after the message was taken: what it returns is the answer of a server that has accepted."""

    def __init__(self, script: Script | None = None, *, extensions: Sequence[str] = EXTENSIONS, lmtp: bool = False) -> None:
        self.script = script
        self.extensions = extensions
        self.lmtp = lmtp
        self.messages: list[Received] = []
        self.wire = bytearray()         # every byte that ever came, of all connections
        self.steps: list[str] = []
        self.connections = 0
        self.open = 0
        self.logins: dict[int, bytes] = {}
        self.port = 0
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, HOST, self.port, limit=2**26)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        await asyncio.sleep(0)

    def _decide(self, step: str, argument: str = "") -> Answer | bool:
        self.steps.append(step)
        return self.script(step, argument, self.steps.count(step)) if self.script is not None else False

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open += 1
        self._writers.add(writer)
        try:
            await _Conversation(self, reader, writer, self.connections).run()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self.open -= 1
            self._writers.discard(writer)
            writer.close()


class _Conversation:
    def __init__(self, server: Upstream, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        self.server, self.reader, self.writer, self.number = server, reader, writer, number
        self.mail = ""
        self.rcpts: list[str] = []

    async def run(self) -> None:
        if not await self._answer("CONNECT", "", "220 upstream ready"):
            return
        while line := await self.reader.readline():
            self.server.wire += line
            command = line.decode("utf-8", "surrogateescape").rstrip("\r\n")
            verb = command.split(" ")[0].upper().split(":")[0]
            if not await self._command(verb, command):
                return

    async def _command(self, verb: str, command: str) -> bool:
        match verb:
            case "EHLO" | "LHLO":
                lines = ["upstream", *self.server.extensions]
                return await self._answer("EHLO", command, "\r\n".join(
                    f"250{' ' if number == len(lines) else '-'}{line}" for number, line in enumerate(lines, 1)))
            case "MAIL":
                self.mail, self.rcpts = command, []
                return await self._answer("MAIL", command, "250 2.1.0 sender fine")
            case "RCPT":
                return await self._answer("RCPT", command, "250 2.1.5 recipient fine", lambda: self.rcpts.append(command))
            case "DATA":
                self.go_on = False
                if not await self._answer("DATA", command, "354 go on", lambda: setattr(self, "go_on", True)):
                    return False
                return not self.go_on or await self._take()
            case "AUTH":
                return await self._auth(command)
            case "QUIT":
                await self._answer("QUIT", command, "221 bye")
                return False
            case "RSET":
                self.mail, self.rcpts = "", []
                return await self._answer("RSET", command, "250 2.0.0 reset")
            case _:
                return await self._say("500 what")

    async def _auth(self, command: str) -> bool:
        parts = command.split(" ")
        answers = [parts[2]] if len(parts) > 2 else []
        wanted = 2 if parts[1].upper() == "LOGIN" else 1
        while len(answers) < wanted:
            await self._say("334 " + ("VXNlcm5hbWU6" if not answers and wanted == 2 else "UGFzc3dvcmQ6" if wanted == 2 else ""))
            answers.append((await self.reader.readline()).decode().strip())
        self.server.logins[self.number] = " ".join(answers).encode()
        return await self._answer("AUTH", " ".join(answers), "235 2.7.0 upstream says welcome")

    async def _take(self) -> bool:
        content = bytearray()
        while not (content.endswith(b"\r\n.\r\n") or content == b".\r\n"):
            line = await self.reader.readline()
            if not line:
                return False
            self.server.wire += line
            if not content:
                answer = self.server._decide("BODY", self.mail)
                if answer is not False:
                    if answer:
                        await self._say(str(answer))
                    elif answer == "":
                        while await self.reader.read(65536):
                            pass
                    self.writer.transport.abort()
                    return False
            content += line
        body = bytes(content[:-3]).replace(b"\r\n.", b"\r\n")
        message = Received(_path(self.mail), [_path(rcpt) for rcpt in self.rcpts], body, self.mail, list(self.rcpts), self.number)
        count = len(self.rcpts) if self.server.lmtp else 1
        for position in range(count):
            argument = self.rcpts[position] if self.server.lmtp else self.mail

            def keep(argument: str = argument) -> None:
                if not self.server.lmtp:
                    self.server.messages.append(message)
                else:
                    self.server.messages.append(Received(
                        message.sender, [_path(argument)], body, self.mail, [argument], self.number))
            if not await self._answer("DOT", argument, "250 2.0.0 queued as TEST", keep):
                return False
        return True

    async def _answer(self, step: str, argument: str, normal: str, then: Callable[[], object] | None = None) -> bool:
        """False: the connection ends here."""
        answer = self.server._decide(step, argument)
        if answer is False and then is not None:
            then()
        if answer is False and step == "DOT":
            answer = self.server._decide("DOT!", argument)
        if answer is False:
            answer = normal
        if answer is None:
            self.writer.transport.abort()
            return False
        if answer == "":
            await self.reader.read(1)       # until the other side gives up
            return False
        return await self._say(str(answer))

    async def _say(self, reply: str) -> bool:
        self.writer.write(reply.encode() + b"\r\n")
        await self.writer.drain()
        return True


def _path(command: str) -> str:
    return command[command.index("<") + 1:command.index(">")]


# ---- the gateway


@dataclass
class Gateway:
    """Listener, desk, store and relay in this process. People with keys: `identities`; people with cards only: `cards`."""

    directory: Path
    upstream: UpstreamConfig
    listener: ListenerConfig = OPEN
    config: Mapping[str, Any] = field(default_factory=dict)         # more of [outgoing]
    limits: LimitsConfig = DEFAULT_LIMITS
    identities: Mapping[str, Identity] = field(default_factory=lambda: {"alice@test.example": person("alice@test.example")})
    cards: Sequence[Identity] = ()
    credentials: Credentials | None = None
    tls_context: Any = None
    port: int = 0

    async def __aenter__(self) -> Self:
        self.store = await Store.open(self.directory)
        for identity in (*self.identities.values(), *self.cards):
            await self.give_card(identity)
        outgoing = OutgoingConfig(upstream=self.upstream, listeners=(self.listener,), **self.config)
        credentials = self.credentials

        async def login() -> Credentials:
            assert credentials is not None
            return credentials
        self.relay = Relay(self.upstream, credentials=login if credentials else None, tls_context=self.tls_context)
        self.submissions = Submissions(
            config=outgoing, limits=self.limits, store=self.store, host="gateway.test.example",
            identities=lambda: self.identities, clock_ms=lambda: time.time_ns() // 1_000_000)
        users = load_users(self.listener.users_file) if self.listener.users_file else Users()
        self.desk = Sender(listener=self.listener, config=outgoing, upstream=self.relay, submissions=self.submissions,
                           store=self.store, users=users)
        self.connections = Connections(self.limits.connections)
        self.connections.renew(self.limits)
        self.budget = MemoryBudget(self.limits.memory_budget)
        self.socket = Listener(server_settings(self.listener, self.limits, "gateway.test.example"), self.desk, self.connections,
                               self.budget)
        await self.socket.open(self.listener.model_copy(update={"port": self.port}))
        if self.listener.socket is None:
            self.port = self.socket.addresses[0][1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self.socket.close()
        await self.connections.drain(0.2)
        await self.relay.close()
        self.submissions.close()
        await self.store.close()

    async def give_card(self, identity: Identity) -> None:
        card = identity.card
        await self.store.put_card(card.address, card.raw, card.verify.id, level=Level.VERIFIED, evidence="test", now_ms=NOW_MS,
                                  succession=False)

    async def submit(self, sender: str, recipients: Sequence[str], content: bytes, **options: Any) -> Outcome:
        """As smtplib does it, in a thread; see `submit`."""
        return await asyncio.to_thread(submit, self.port, sender, recipients, content, **options)


@dataclass(frozen=True, slots=True)
class Outcome:
    """The replies that the client got, as text."""

    rcpts: dict[str, str]
    data: str

    @property
    def code(self) -> int:
        return int(self.data[:3])


def submit(port: int, sender: str, recipients: Sequence[str], content: bytes, *, mail: Sequence[str] = (),
           rcpt: Mapping[str, Sequence[str]] | None = None, login: tuple[str, str] | None = None, polite: bool = True) -> Outcome:
    """One message over one connection, every reply noted. `polite`: NOOP after the reply, which proves
    that it was read; else the client is gone without a word."""
    with smtplib.SMTP(HOST, port, "client.test.example", timeout=60) as client:
        code, answer = client.ehlo("client.test.example")
        if login is not None:
            client.login(*login)
        if code != 250:
            return Outcome({}, f"{code} {answer.decode()}")
        code, answer = client.mail(sender, list(mail))
        if code != 250:
            return Outcome({}, f"{code} {answer.decode()}")
        rcpts = {}
        for address in recipients:
            code, answer = client.rcpt(address, list((rcpt or {}).get(address, ())))
            rcpts[address] = f"{code} {answer.decode()}"
        if not any(reply.startswith("250") for reply in rcpts.values()):
            return Outcome(rcpts, next(iter(rcpts.values())))
        try:
            code, answer = client.data(content)
        except smtplib.SMTPDataError as error:
            code, answer = error.smtp_code, error.smtp_error if isinstance(error.smtp_error, bytes) else error.smtp_error.encode()
        if polite:
            with suppress(smtplib.SMTPServerDisconnected):
                client.noop()
        else:
            client.close()
        return Outcome(rcpts, f"{code} {answer.decode()}")


def upstream_config(port: int, **more: Any) -> UpstreamConfig:
    values: dict[str, Any] = {"host": HOST, "port": port, "security": "none", "helo_name": "gateway.test.example"}
    return UpstreamConfig(**(values | more))


REQUIRE = (RuleConfig(seal="require"),)


# ---- the same in a process of its own


def settings_for_process(path: Path, *, directory: Path, upstream_port: int, port: int, identities: Sequence[Identity],
                         cards: Sequence[Identity], limits: Mapping[str, Any] | None = None, die: str = "") -> None:
    path.write_text(json.dumps({
        "directory": str(directory), "upstream_port": upstream_port, "port": port, "die": die, "limits": dict(limits or {}),
        "identities": [serialize_identity(each).decode() for each in identities],
        "cards": [serialize_identity(each).decode() for each in cards],
    }))


@asynccontextmanager
async def gateway_process(directory: Path, upstream_port: int, *, identities: Sequence[Identity], cards: Sequence[Identity],
                          limits: Mapping[str, Any] | None = None, die: str = "",
                          ) -> AsyncIterator[tuple[asyncio.subprocess.Process, int]]:
    """A gateway in a process of its own, on the store below `directory`, and its port. Killed at the end."""
    port = free_port()
    settings = directory / "settings.json"
    settings_for_process(settings, directory=directory / "store", upstream_port=upstream_port, port=port, identities=identities,
                         cards=cards, limits=limits, die=die)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}/daemon:{ROOT}/tests"}
    child = await asyncio.create_subprocess_exec(sys.executable, "-m", "outgoing.harness", str(settings), env=environment,
                                                 stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL)
    try:
        assert child.stdout is not None
        assert await child.stdout.readline() == b"ready\n"
        yield child, port
    finally:
        if child.returncode is None:
            child.send_signal(signal.SIGKILL)
        await child.wait()


async def _run(settings: Mapping[str, Any]) -> None:
    identities = [parse_identity(each.encode()) for each in settings["identities"]]
    cards = [parse_identity(each.encode()) for each in settings["cards"]]
    _arrange_death(settings["die"])
    return_large_blocks()
    gateway = Gateway(
        Path(settings["directory"]), upstream_config(settings["upstream_port"]), limits=LimitsConfig(**settings["limits"]),
        identities={each.address: each for each in identities}, cards=cards, port=settings["port"])
    async with gateway:
        print("ready", flush=True)
        await asyncio.Event().wait()


def _arrange_death(step: str) -> None:
    """SIGKILL at a named step of a send: what no handler sees and nothing is flushed after."""
    begin, later = Store.begin_send, Store.finish_send_later

    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    async def begin_then_die(store: Store, intent: SendIntent) -> SendPlan:
        plan = await begin(store, intent)
        die()
        return plan

    async def flush_then_die(store: Store) -> None:
        await store.flush()
        die()

    def finish_then_die(store: Store, *outcome: Any) -> None:
        later(store, *outcome)
        asyncio.get_running_loop().create_task(flush_then_die(store))

    match step:
        case "before begin_send":
            setattr(Store, "begin_send", die)  # noqa: B010 - mypy wants no assignment to a method
        case "after begin_send":
            setattr(Store, "begin_send", begin_then_die)  # noqa: B010
        case "before finish_send":
            setattr(Store, "finish_send", die)  # noqa: B010
            setattr(Store, "finish_send_later", die)  # noqa: B010
        case "after finish_send":
            setattr(Store, "finish_send_later", finish_then_die)  # noqa: B010


if __name__ == "__main__":
    asyncio.run(_run(json.loads(Path(sys.argv[1]).read_text())))
