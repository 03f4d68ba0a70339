"""An opening listener in this process, in front of a real mail server: what the tests of the gateway stand on."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from lab.incoming import Sender
from lab.servers import HOST
from malote.config import LimitsConfig, ListenerConfig, OpeningConfig, UpstreamConfig
from malote.core.identity import Identity, new_identity
from malote.core.keys import SignatureAlgorithm
from malote.core.outer import outer_headers
from malote.core.seal import SealRecipient, seal
from malote.incoming.account import device_name
from malote.incoming.gateway import Gateway
from malote.incoming.passage import Passage
from malote.incoming.turns import Memory, Turns
from malote.incoming.watcher import now_ms
from malote.smtp.budget import MemoryBudget
from malote.smtp.listener import Listener, server_settings
from malote.smtp.open_connections import Connections
from malote.smtp.relay import Upstream
from malote.store import Level, PostgresPlace, Store

NAME = "gw.test.example"


def person(address: str) -> Identity:
    return new_identity(address, SignatureAlgorithm.ED25519, now_ms() - 3_600_000)


@dataclass
class House:
    """A gateway with its store, its keys and its listener. `seal` is mail of `sender` to somebody here."""

    directory: Path
    next_hop: int                                   # port
    protocol: str = "lmtp"
    next_protocol: str = "lmtp"
    quarantine: str = "quarantine@test.example"
    name: str = NAME
    clock: Callable[[], int] = now_ms
    seconds: float = 60
    sender: Sender = field(default_factory=Sender)
    identities: Mapping[str, Identity] = field(default_factory=dict)
    port: int = 0
    place: str = ""                                 # of the store, where it is a database
    store: Store = field(init=False)
    connections: Connections = field(init=False)
    turns: Turns = field(init=False)
    passage: Passage = field(init=False)

    def config(self) -> OpeningConfig:
        upstream = UpstreamConfig(host=HOST, port=self.next_hop, protocol=self.next_protocol,     # type: ignore[arg-type]
                                  security="none", helo_name=self.name)     # type: ignore[arg-type]
        return OpeningConfig(protocol=self.protocol, quarantine=self.quarantine, upstream=upstream)     # type: ignore[arg-type]

    @contextlib.asynccontextmanager
    async def running(self, *, card: bool = True) -> AsyncIterator[House]:
        """May be entered again after it was left: then it is a restart."""
        self.store = await Store.open(PostgresPlace(self.place) if self.place else self.directory)
        if card:
            await self.trust(self.sender.identity)
        config = self.config()
        upstream = Upstream(config.upstream)
        self.turns = Turns(self.store, clock=self.clock, at_most_ms=round(self.seconds * 1000))
        self.passage = Passage(config, store=self.store, identities=lambda: self.identities, turns=self.turns, passed=Memory(),
                               device=device_name(await self.store.local_key("device")), host=self.name, seconds=self.seconds,
                               log_addresses=False, clock=self.clock)
        gateway = Gateway(config, upstream=upstream, passage=self.passage, host=self.name, clock=self.clock)
        self.connections = Connections(100)
        listener = Listener(server_settings(config.listener, LimitsConfig(), self.name), gateway, self.connections,
                            MemoryBudget(512 << 20), self.protocol == "lmtp")
        await listener.open(ListenerConfig.model_construct(host=HOST, port=self.port, socket=None))
        self.port = listener.addresses[0][1]
        try:
            yield self
        finally:
            listener.close()
            await self.connections.drain(5)
            await upstream.close()
            await self.store.close()

    async def trust(self, identity: Identity) -> None:
        await self.store.put_card(identity.address, identity.card.raw, identity.signing.public.id, level=Level.VERIFIED,
                                  evidence="a test", now_ms=now_ms() - 1_800_000, succession=False)


def sealed_for(house: House, addresses: list[str], original: bytes, *, serial: int = 1, **options: object) -> bytes:
    """One message with a key blob for each of these, as an organisation's relay seals it."""
    key_of = {name: (house.identities.get(name) or house.identities["@" + name.partition("@")[2]]).decryption[0].public
              for name in addresses}
    recipients = [SealRecipient(name, key_of[name], "to", house.sender.stream[:7] + bytes([number]), serial, serial - 1)
                  for number, name in enumerate(addresses)]
    sent = now_ms()
    outer = outer_headers(original, sent_at_ms=sent, sender_domain="sender.example", received=b"", known_outer_ids={})
    return seal(original, identity=house.sender.identity, recipients=recipients, submission_id=os.urandom(16), sent_at_ms=sent,
                outer=outer).raw


class Lmtp:
    """A client: what it says, and the answers for each recipient."""

    def __init__(self, port: int, *, smtp: bool = False) -> None:
        self._port = port
        self._smtp = smtp

    def _send(self, sender: str, recipients: tuple[str, ...], raw: bytes, mail: str, quit_first: bool) -> list[str]:
        with socket.create_connection((HOST, self._port), timeout=60) as sock:
            file = sock.makefile("rb")

            def reply() -> str:
                text = ""
                while True:
                    line = file.readline().decode()
                    text += line
                    if line[3:4] != "-":
                        return text.strip()

            def ask(line: str) -> str:
                sock.sendall(line.encode() + b"\r\n")
                return reply()

            reply()
            greeted = ask(f"{'EHLO' if self._smtp else 'LHLO'} client.test.example")
            assert greeted.startswith("250"), greeted
            said = ask(f"MAIL FROM:<{sender}> {mail}".strip())
            if not said.startswith("250"):
                return [said]
            answers = [ask(f"RCPT TO:<{recipient}>") for recipient in recipients]
            accepted = sum(answer.startswith("250") for answer in answers)
            if accepted:
                assert ask("DATA").startswith("354")
                sock.sendall(raw.replace(b"\r\n.", b"\r\n..") + (b"" if raw.endswith(b"\r\n") else b"\r\n") + b".\r\n")
                if quit_first:      # gone without reading the answer
                    return []
                answered = [reply() for _ in range(1 if self._smtp else accepted)]
                answers = [answer for answer in answers if not answer.startswith("250")] + answered
            with contextlib.suppress(OSError):
                ask("QUIT")
            return answers

    async def send(self, raw: bytes, *recipients: str, sender: str = "anna@sender.example", mail: str = "",
                   quit_first: bool = False) -> list[str]:
        """Refusals at RCPT first, then the answers after DATA."""
        return await asyncio.to_thread(self._send, sender, recipients, raw, mail, quit_first)


def codes(answers: list[str]) -> list[int]:
    return [int(answer[:3]) for answer in answers]


class ScriptedLmtp:
    """An LMTP server that keeps what it takes. `after_data(user)`: None takes it; a reply refuses it; "drop" takes it and cuts
    the line without an answer. `slow`: seconds before it answers."""

    def __init__(self, after_data: Callable[[str], str | None] = lambda _user: None, *, slow: float = 0) -> None:
        self.messages: dict[str, list[bytes]] = defaultdict(list)
        self.port = 0
        self._after_data = after_data
        self._slow = slow
        self._writers: set[asyncio.StreamWriter] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, HOST, 0, limit=1 << 26)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        """Ends what clients keep open too: left to the garbage collector, it would warn in some later test."""
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        await asyncio.sleep(0.01)

    async def arrived(self, user: str, count: int) -> None:
        async with asyncio.timeout(20):
            while len(self.messages[user]) < count:
                await asyncio.sleep(0.02)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        recipients: list[str] = []
        self._writers.add(writer)
        writer.write(b"220 lmtp.test.example LMTP\r\n")
        while line := (await reader.readline()).decode().strip():
            verb = line.partition(" ")[0].upper()
            if verb == "LHLO":
                writer.write(b"250-lmtp.test.example\r\n250-PIPELINING\r\n250-8BITMIME\r\n250 ENHANCEDSTATUSCODES\r\n")
            elif verb == "DATA":
                writer.write(b"354 go on\r\n")
                content = await reader.readuntil(b"\r\n.\r\n")
                await asyncio.sleep(self._slow)
                if not self._answer(writer, recipients, content[:-3].replace(b"\r\n..", b"\r\n.")):
                    break
                recipients = []
            else:
                recipients = [*recipients, line.partition("<")[2].partition(">")[0]] if verb == "RCPT" else []
                writer.write(b"221 2.0.0 bye\r\n" if verb == "QUIT" else b"250 2.0.0 ok\r\n")
        writer.close()

    def _answer(self, writer: asyncio.StreamWriter, recipients: list[str], content: bytes) -> bool:
        for user in recipients:
            said = self._after_data(user)
            if said in (None, "drop"):
                self.messages[user].append(content)
            if said == "drop":
                writer.transport.abort()
                return False
            writer.write(f"{said or '250 2.0.0 taken'}\r\n".encode())
        return True
