"""MAIL and the first RCPT leave together where the upstream server offers PIPELINING (RFC 2920), and replies stay with their
commands."""

from __future__ import annotations

import asyncio
import smtplib
from pathlib import Path

import pytest

from malote.core.policy import MessageFacts, Policy, RecipientFacts
from malote.errors import UpstreamError
from malote.outgoing.transaction import Recipient, Transaction
from malote.smtp import relay
from malote.smtp.lanes import PooledLane
from outgoing.harness import HOST, Answer, Gateway, Upstream, person, text, upstream_config

ALICE, BOB = (person(f"{name}@test.example") for name in ("alice", "bob"))
OFFERS = {"pipelining": ("PIPELINING", "8BITMIME"), "one by one": ("8BITMIME",)}


@pytest.mark.parametrize("offer", OFFERS)
async def test_one_packet_where_it_is_offered(tmp_path: Path, offer: str) -> None:
    packets: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 x\r\n")
        while packet := await reader.read(65536):
            packets.append(packet)
            for line in packet.splitlines():
                if line.startswith(b"EHLO"):
                    lines = ["x", *OFFERS[offer]]
                    writer.write("".join(f"250-{each}\r\n" for each in lines).encode() + b"250 HELP\r\n")
                elif line[:4] in (b"MAIL", b"RCPT", b"RSET", b"QUIT"):
                    writer.write(b"250 ok\r\n")
        writer.close()
    server = await asyncio.start_server(serve, HOST, 0)
    async with server, Gateway(tmp_path, upstream_config(server.sockets[0].getsockname()[1])) as gw:
        def ask() -> list[int]:
            with smtplib.SMTP(HOST, gw.port, "client") as client:
                client.ehlo()
                return [client.mail(ALICE.address)[0], client.rcpt(BOB.address)[0], client.rcpt("x@else.example")[0]]
        assert await asyncio.to_thread(ask) == [250, 250, 250]
    commands = [[line[:4] for line in packet.splitlines()] for packet in packets if packet[:4] in (b"MAIL", b"RCPT")]
    first = [[b"MAIL", b"RCPT"]] if offer == "pipelining" else [[b"MAIL"], [b"RCPT"]]
    assert commands == [*first, [b"RCPT"]]


async def test_a_refused_sender_leaves_the_connection_in_step(tmp_path: Path) -> None:
    """The reply to the RCPT behind it belongs to nobody, and answers no later command."""
    def script(step: str, argument: str, number: int) -> Answer | bool:
        if number == 1 and step in ("MAIL", "RCPT"):
            return "550 5.1.8 unknown sender" if step == "MAIL" else "503 5.5.1 MAIL first"
        return False
    async with Upstream(script) as upstream, Gateway(tmp_path, upstream_config(upstream.port)) as gw:
        assert (await gw.submit(ALICE.address, [BOB.address], text())).rcpts == {BOB.address: "550 5.1.8 unknown sender"}
        assert (await gw.submit(ALICE.address, [BOB.address], text())).code == 250
        assert upstream.connections == 1
    assert len(upstream.messages) == 1


async def test_a_server_that_refuses_and_hangs_up(tmp_path: Path) -> None:
    def script(step: str, argument: str, number: int) -> Answer | bool:
        if number == 1 and step in ("MAIL", "RCPT"):
            return "550 5.1.8 unknown sender" if step == "MAIL" else None
        return False
    async with Upstream(script) as upstream, Gateway(tmp_path, upstream_config(upstream.port)) as gw:
        assert (await gw.submit(ALICE.address, [BOB.address], text())).rcpts == {BOB.address: "550 5.1.8 unknown sender"}
        assert (await gw.submit(ALICE.address, [BOB.address], text())).code == 250
    assert len(upstream.messages) == 1


@pytest.mark.parametrize("end", [None, "421 4.4.2 idle for too long"])
async def test_a_kept_connection_that_the_server_closed(tmp_path: Path, end: Answer) -> None:
    """Both commands go again on a new one, and the first server's end is nobody's reply."""
    def script(step: str, argument: str, number: int) -> Answer | bool:
        return end if step == "MAIL" and number == 2 else False
    async with Upstream(script) as upstream, Gateway(tmp_path, upstream_config(upstream.port)) as gw:
        for _ in range(2):
            assert (await gw.submit(ALICE.address, [BOB.address], text())).code == 250
        assert upstream.connections == 2
    assert [message.recipients for message in upstream.messages] == [[BOB.address]] * 2


async def test_a_recipient_of_a_transaction_that_ended_gets_into_nobody_elses(tmp_path: Path) -> None:
    """Its connection may be under way with another client's message: one recipient more would get that."""
    def recipient(address: str) -> Recipient:
        decision = Policy().decide_recipient(MessageFacts(""), RecipientFacts(address, card=False, had_card=False))
        return Recipient(address, address, {}, None, False, decision)
    async with Upstream() as upstream:
        pool = relay.Upstream(upstream_config(upstream.port, connections=1))
        lane = PooledLane(pool, 1)
        gone, other = (Transaction(ALICE.address, {}, lane, fold=True) for _ in range(2))
        assert (await gone.rcpt(recipient("first@test.example"))).code == 250
        await gone.end()
        assert (await other.rcpt(recipient("other@test.example"))).code == 250
        with pytest.raises(UpstreamError):
            await gone.rcpt(recipient("late@test.example"))
        await other.end()
        await pool.close()
        assert b"late@" not in upstream.wire
