"""The daemon itself, `malote run`, killed at each step of a send and started again; and clients that vanish at every place of a
conversation with it. Whoever comes again gets the message to its recipients once: fresh once, and no plain text anywhere."""

from __future__ import annotations

import asyncio
import shutil
import signal
import socket
import struct
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from lab.daemon import PASSPHRASE, Daemon, Home, free_port, rule
from lab.daemon import upstream as upstream_section
from malote.core.identity import Identity
from malote.identities import open_identities
from malote.store import Store
from outgoing.harness import HOST, Answer, Upstream, submit, text, verdict

ALICE, BOB, DAVE = (f"{name}@test.example" for name in ("alice", "bob", "dave"))
SECRET = b"the secret"
PLAIN = ["nobody@test.example", "none@test.example"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """Keys of all three, made once."""
    home = Home(tmp_path_factory.mktemp("prepared") / "home")
    home.configure("")
    for address in (ALICE, BOB, DAVE):
        home.keys("new", address, "--algorithm", "ed25519")
    return home


class Place:
    """An installation of one test: a copy of the prepared store, and a port."""

    def __init__(self, prepared: Home, root: Path, upstream: Upstream, *, more: str = "") -> None:
        self.home = Home(root / "home")
        shutil.copytree(prepared.root / "store", self.home.root / "store")
        self.port = free_port()
        self.root = root
        self.home.configure(f'[[outgoing.listeners]]\nhost = "{HOST}"\nport = {self.port}\nauth = "none"\n'
                            + upstream_section(upstream.port, None) + more)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Daemon]:
        daemon = await asyncio.to_thread(lambda: self.home.daemon().__enter__())
        try:
            yield daemon
        finally:
            daemon.__exit__()

    async def submit(self, recipients: list[str], content: bytes) -> int:
        """The reply's code, of a client that then vanishes; 0 when the daemon died."""
        try:
            return (await asyncio.to_thread(submit, self.port, ALICE, recipients, content, polite=False)).code
        except Exception:  # noqa: BLE001 - a lost connection comes as many exceptions
            return 0

    async def verdicts(self, upstream: Upstream, reader: str) -> list[str]:
        people = await self._people()
        store = await Store.open(self.root / reader)
        try:
            return [await verdict(store, message.content, people[reader], people[ALICE])
                    for message in upstream.messages if reader in message.recipients]
        finally:
            await store.close()

    async def _people(self) -> Mapping[str, Identity]:
        store = await Store.open(self.home.root / "store", readonly=True)
        try:
            return await open_identities(store, PASSPHRASE.encode)
        finally:
            await store.close()


# to bob openly and to dave as Bcc: two copies, each with MAIL, RCPT, DATA; certain: the server had not taken the message yet
STEPS = {"CONNECT 1": True, "EHLO 1": True, "MAIL 1": True, "RCPT 1": True, "RCPT 2": True, "RSET 1": True, "MAIL 2": True,
         "RCPT 3": True, "DATA 1": True, "DOT 1": False, "DOT! 1": False, "MAIL 3": False, "DATA 2": False, "DOT 2": False,
         "DOT! 2": False}
QUICK = ("RCPT 2", "DATA 1", "DOT! 1", "DOT! 2")


@pytest.mark.parametrize("step", [each if each in QUICK else pytest.param(each, marks=pytest.mark.long) for each in STEPS])
async def test_killed_at_a_step_of_the_upstream(prepared: Home, tmp_path: Path, step: str) -> None:
    """The upstream server kills the daemon (SIGKILL) when it gets that far; then a restart, and the client's retry."""
    name, number = step.split()
    victim: list[Daemon] = []

    def script(at: str, argument: str, count: int) -> Answer | bool:
        if victim and (at, count) == (name, int(number)):
            victim.pop().signal(signal.SIGKILL)
        return False
    content = text(message_id="", date="")
    async with Upstream(script) as upstream:
        place = Place(prepared, tmp_path, upstream)
        async with place.running() as daemon:
            victim.append(daemon)
            code = await place.submit([BOB, DAVE], content)
        assert not victim, "the step was reached"
        if code != 250:
            async with place.running():
                assert await place.submit([BOB, DAVE], content) == 250
        for reader in (BOB, DAVE):
            seen = await place.verdicts(upstream, reader)
            assert seen[:1] == ["FRESH"], "lost, or not fresh"
            assert seen[1:] == ["DUPLICATE"] * (len(seen) - 1), "a repeat was shown as fresh"
            assert len(seen) == 1 or not STEPS[step], "sent twice"
        assert SECRET not in upstream.wire


@pytest.mark.parametrize("wait", [0, pytest.param(0.3, marks=pytest.mark.long), 1.2])
@pytest.mark.parametrize("recipients", [[BOB, DAVE], PLAIN], ids=["sealed", "plain"])
async def test_killed_after_a_250_that_nobody_read(prepared: Home, tmp_path: Path, recipients: list[str], wait: float) -> None:
    """At once, while the acceptance is held back, and when it is written: the retry is answered. Once written (within a second)
    without a second copy; before that, sealed mail comes again as DUPLICATE and plain mail with the same bytes."""
    content = text()
    async with Upstream() as upstream:
        place = Place(prepared, tmp_path, upstream)
        async with place.running() as daemon:
            assert await place.submit(recipients, content) == 250
            await asyncio.sleep(wait)
            daemon.signal(signal.SIGKILL)
        first = len(upstream.messages)
        async with place.running():
            assert await place.submit(recipients, content) == 250
        if wait > 1:
            assert len(upstream.messages) == first, "sent twice"
        if recipients is PLAIN:
            assert len({message.content.partition(b"+0000\r\n")[2] for message in upstream.messages}) == 1
        else:
            for reader in recipients:
                assert set((await place.verdicts(upstream, reader))[1:]) <= {"DUPLICATE"}


@pytest.mark.parametrize("recipients", [[BOB, DAVE], PLAIN], ids=["sealed", "plain"])
async def test_an_unread_250_is_remembered_however_soon_the_client_comes_back(
        prepared: Home, tmp_path: Path, recipients: list[str]) -> None:
    """At once, and at every moment until and after the acceptance is written. Who reads its replies may send it again."""
    async with Upstream() as upstream:
        place = Place(prepared, tmp_path, upstream)
        async with place.running():
            copies = 0
            for number in range(12):
                content = text(message_id=f"<{number}@test.example>")
                assert await place.submit(recipients, content) == 250
                copies = copies or len(upstream.messages)
                await asyncio.sleep(number * 0.08)
                assert await place.submit(recipients, content) == 250
                assert len(upstream.messages) == (number + 1) * copies, f"sent twice after {number * 80} ms"
            for _ in range(3):
                before = len(upstream.messages)
                done = await asyncio.to_thread(submit, place.port, ALICE, recipients, text(message_id="<again@test.example>"))
                assert done.code == 250
                assert len(upstream.messages) == before + copies, "a message was swallowed"


COMMANDS = [b"EHLO client.test.example\r\n", f"MAIL FROM:<{ALICE}>\r\n".encode(), f"RCPT TO:<{BOB}>\r\n".encode(),
            f"RCPT TO:<{DAVE}>\r\n".encode(), b"DATA\r\n"]


def _cut(port: int, content: bytes, at: int, *, waits: bool, reset: bool) -> None:
    """A client that sends `at` bytes of a whole conversation and is gone. `waits`: it reads each reply before it goes on;
    `reset`: it ends with RST instead of FIN."""
    with socket.create_connection((HOST, port), 20) as client:
        replies = client.makefile("rb")
        left = at
        for part in (*COMMANDS, content + b".\r\n"):
            client.sendall(part[:left])
            left -= len(part)
            if left < 0:
                break
            if waits and (part in COMMANDS or left):
                while (line := replies.readline())[3:4] == b"-" or line.startswith(b"220"):
                    pass
        if reset:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        replies.close()


@pytest.mark.parametrize("reset", [False, True], ids=["fin", "rst"])
async def test_a_client_that_vanishes_anywhere(prepared: Home, tmp_path: Path, reset: bool) -> None:
    """Cut in every command, in header, body, and in each byte of the end; pipelined or not. Its retry arrives once for all."""
    async with Upstream() as upstream:
        place = Place(prepared, tmp_path, upstream)
        head = sum(map(len, COMMANDS))
        number = 0
        async with place.running():
            for waits in (True, False):
                sample = text(message_id="<000@test.example>")
                whole = head + len(sample) + 3
                cuts = [0, 3, 30, 60, 95, 120, head - 2, head, head + 1, head + 40, whole - 40, *range(whole - 5, whole + 1)]
                for at in cuts:
                    number += 1
                    content = text(message_id=f"<{number:03}@test.example>")
                    before = len(upstream.messages)
                    with suppress(ConnectionError):
                        await asyncio.to_thread(_cut, place.port, content, at, waits=waits, reset=reset)
                    done = await asyncio.to_thread(submit, place.port, ALICE, [BOB, DAVE], content, polite=False)
                    assert done.code == 250
                    assert sorted(recipient for message in upstream.messages[before:] for recipient in message.recipients) == [
                        BOB, DAVE], f"cut after {at} of {whole} bytes, {waits=}"
        for reader in (BOB, DAVE):
            assert set(await place.verdicts(upstream, reader)) == {"FRESH"}
        assert SECRET not in upstream.wire


async def test_identical_messages_over_two_listeners_at_once(prepared: Home, tmp_path: Path) -> None:
    """A client that lost patience comes over the other door while the first is in flight: one copy for each recipient."""
    async with Upstream() as upstream:
        second = free_port()
        place = Place(prepared, tmp_path, upstream, more=f'[[outgoing.listeners]]\nhost = "{HOST}"\nport = {second}\n'
                                                         'auth = "none"\n' + rule("require", [BOB, DAVE]))
        async with place.running():
            for number in range(8):
                content = text(message_id=f"<{number}@test.example>")
                before = len(upstream.messages)
                ports = (place.port, second, place.port, second)
                orders = ([BOB, DAVE], [DAVE, BOB], [DAVE], [BOB, DAVE])
                done = await asyncio.gather(*(asyncio.to_thread(submit, port, ALICE, order, content, polite=False)
                                              for port, order in zip(ports, orders, strict=True)))
                assert [each.code for each in done] == [250] * 4
                assert sorted(each for message in upstream.messages[before:] for each in message.recipients) == [BOB, DAVE]
        assert SECRET not in upstream.wire
