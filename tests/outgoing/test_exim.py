"""A real Exim in front of the gateway as its client, and behind it as its upstream."""

from __future__ import annotations

import asyncio
import smtplib
from collections.abc import Callable
from pathlib import Path

import pytest

from lab.servers import Lab
from lab.unpacked import MISSING, Exim
from outgoing.harness import HOST, REQUIRE, Gateway, Upstream, opened, person, text, upstream_config

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)
ALICE, BOB = person("alice@test.example"), person("bob@test.example")


def exim(lab: Lab, name: str, port: int, **more: str) -> Exim:
    root = lab.root / name
    root.mkdir()
    return Exim(root, lab.certificate, lab.key, port, rcpt_acl=more.pop("rcpt_acl", ""), settings=more)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.05)


def hand_in(port: int, recipients: list[str], content: bytes) -> None:
    with smtplib.SMTP(HOST, port) as client:
        client.sendmail(ALICE.address, recipients, content)


async def test_as_client_with_many_recipients_and_a_retry(lab: Lab, tmp_path: Path) -> None:
    """Exim pipelines 60 recipients; the upstream's 451 comes back to it, it tries again, and everybody gets it once."""
    people = [person(f"exim{number}@test.example") for number in range(60)]

    def once(step: str, _argument: str, number: int) -> str | bool:
        return "451 4.3.0 later" if step == "DOT" and number == 1 else False

    async with (Upstream(once) as last,
                Gateway(tmp_path, upstream_config(last.port), config={"rules": REQUIRE}, cards=people) as gateway):
        with exim(lab, "exim-client", gateway.port).running() as client:
            sent = text(to=",\r\n ".join(each.address for each in people))
            await asyncio.to_thread(hand_in, client.port, [each.address for each in people], sent)
            await until(lambda: sum(len(each.recipients) for each in last.messages) >= 60)
            await until(lambda: not client.queued())
        assert sorted(each for message in last.messages for each in message.recipients) == sorted(
            each.address for each in people)
        for message in last.messages:
            reader = next(each for each in people if each.address == message.recipients[0])
            assert opened(message.content, reader, ALICE).original.endswith(sent)


async def test_as_upstream(lab: Lab, tmp_path: Path) -> None:
    """8-bit text and lines that Exim's transport would bounce (over 998) pass sealed; its refusal of a recipient is the
    client's, in its words; what is over its size limit is refused before anything is sent on."""
    acl = "  deny local_parts = nobody\n       message = no such person here\n"
    async with Upstream() as last:
        with exim(lab, "exim-upstream", last.port, rcpt_acl=acl).running() as server:
            async with Gateway(tmp_path, upstream_config(server.port), cards=[BOB]) as gateway:
                sent = text(to=BOB.address, body="Grüße " + "x" * 2000)
                done = await gateway.submit(ALICE.address, [BOB.address, "nobody@test.example"], sent, mail=["BODY=8BITMIME"])
                assert done.code == 250
                assert done.rcpts["nobody@test.example"].startswith("550")
                assert "no such person here" in done.rcpts["nobody@test.example"]
                await until(lambda: len(last.messages) == 1)
                assert opened(last.messages[0].content, BOB, ALICE).original == sent
                big = await gateway.submit(ALICE.address, [BOB.address], text(to=BOB.address, body="y" * 1_100_000))
                assert big.code == 552
                assert len(last.messages) == 1
