"""Clients that name their recipients and then take their time: they do not keep the upstream connections from others, and their
own mail arrives once all the same."""

from __future__ import annotations

import asyncio
import smtplib
import socket
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from malote.smtp import pool
from outgoing.harness import HOST, Answer, Gateway, Upstream, opened, person, text, upstream_config

ALICE, BOB, CAROL = (person(f"{name}@test.example") for name in ("alice", "bob", "carol"))
NOBODY = "nobody@else.example"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "PARKED_SECONDS", 0.05)
    monkeypatch.setattr(pool, "LOOK_SECONDS", 0.02)


def gateway(directory: Path, server: Upstream, **more: Any) -> Gateway:
    return Gateway(directory / "gw", upstream_config(server.port, connections=2), cards=(BOB, CAROL), **more)


def named(stack: ExitStack, port: int, recipient: str) -> smtplib.SMTP:
    """A client whose recipient was accepted."""
    client = smtplib.SMTP(HOST, port, "slow.test.example", timeout=60)
    stack.callback(client.close)
    client.ehlo()
    assert client.mail(ALICE.address)[0] == 250
    assert client.rcpt(recipient)[0] == 250
    return client


@pytest.mark.parametrize("slow", [BOB.address, NOBODY], ids=["sealed", "plain"])
async def test_slow_clients_do_not_keep_the_connections_from_others(tmp_path: Path, slow: str) -> None:
    """Two connections, four clients that wait after RCPT or in the middle of their text, and others are served meanwhile. Then
    each slow one ends as it likes; another recipient first, or at once: everything arrives once, and sealed what must be."""
    async with Upstream() as upstream, gateway(tmp_path, upstream) as gw:
        with ExitStack() as stack:
            clients = [await asyncio.to_thread(named, stack, gw.port, slow) for _ in range(4)]
            assert (await asyncio.to_thread(clients[0].docmd, "DATA"))[0] == 354
            clients[0].send(text(message_id="<0@test.example>", to=slow)[:-20])
            for number in range(3):
                done = await gw.submit(ALICE.address, [CAROL.address], text(message_id=f"<other{number}@test.example>"))
                assert done.code == 250

            def finish() -> None:
                clients[0].send(text(message_id="<0@test.example>", to=slow)[-20:] + b".\r\n")
                assert clients[0].getreply()[0] == 250
                for number, client in enumerate(clients[1:], 1):
                    if number == 2:
                        client.rcpt("second@else.example" if slow == NOBODY else CAROL.address)
                    assert client.data(text(message_id=f"<{number}@test.example>", to=slow))[0] == 250
            await asyncio.to_thread(finish)
        assert Counter(address for message in upstream.messages for address in message.recipients) == {
            slow: 4, CAROL.address: 4 if slow == BOB.address else 3} | ({"second@else.example": 1} if slow == NOBODY else {})
        if slow == BOB.address:
            assert b"the secret" not in upstream.wire
            for message in upstream.messages:
                assert all(opened(message.content, {BOB.address: BOB, CAROL.address: CAROL}[each], ALICE).signature == "valid"
                           for each in message.recipients)


async def test_a_recipient_refused_the_second_time_is_named(tmp_path: Path) -> None:
    """The upstream server changes its mind between the transaction that was given up and the one that carries the message."""
    refuse = False

    def script(step: str, argument: str, number: int) -> Answer | bool:
        return "550 5.1.1 gone" if refuse and step == "RCPT" and "bob" in argument else False
    async with Upstream(script) as upstream, gateway(tmp_path, upstream) as gw:
        with ExitStack() as stack:
            clients = [await asyncio.to_thread(named, stack, gw.port, BOB.address) for _ in range(2)]
            assert (await gw.submit(ALICE.address, [CAROL.address], text())).code == 250
            refuse = True
            replies = await asyncio.to_thread(lambda: [client.data(text(message_id="<x@test.example>"))[0] for client in clients])
        assert 550 in replies
        assert sum(BOB.address in message.recipients for message in upstream.messages) == replies.count(250)


async def test_who_waits_and_is_cut_off_leaves_no_hole(tmp_path: Path) -> None:
    """Clients vanish while they wait for a connection and while one is given back: all connections stay in use afterwards."""
    async with Upstream() as upstream, gateway(tmp_path, upstream) as gw:
        for _ in range(3):
            with ExitStack() as stack:
                for _ in range(2):
                    await asyncio.to_thread(named, stack, gw.port, BOB.address)
                for _ in range(5):
                    client = stack.enter_context(socket.create_connection((HOST, gw.port)))
                    client.sendall(b"EHLO x\r\nMAIL FROM:<alice@test.example>\r\nRCPT TO:<bob@test.example>\r\n")
                await asyncio.sleep(0.03)
        done = await asyncio.gather(*(gw.submit(ALICE.address, [BOB.address], text(message_id=f"<{number}@test.example>"))
                                      for number in range(6)))
        assert [each.code for each in done] == [250] * 6
        assert len(gw.relay._pool._leased) == gw.relay._pool._opening == len(gw.relay._pool._parked) == 0
    assert len(upstream.messages) == 6
