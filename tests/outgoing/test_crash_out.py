"""kill -9 of a real process at each step of a send, then a restart and the client's retry: the receiver gets the message once as
FRESH, and whatever comes again is DUPLICATE. Also: the upstream connection and the client die instead of the process."""

from __future__ import annotations

import asyncio
import signal
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest

from malote.store import Store
from outgoing.harness import Answer, Upstream, gateway_process, person, submit, text, verdict

ALICE, BOB, DAVE = (person(f"{name}@test.example") for name in ("alice", "bob", "dave"))


def process(directory: Path, upstream: Upstream, *, die: str = "") -> AbstractAsyncContextManager[
        tuple[asyncio.subprocess.Process, int]]:
    return gateway_process(directory, upstream.port, identities=[ALICE], cards=[BOB, DAVE], die=die)


def submit_or_lose(port: int, recipients: list[str], content: bytes) -> int:
    """The reply's code; 0 when the gateway died."""
    try:
        return submit(port, ALICE.address, recipients, content, polite=False).code
    except Exception:  # noqa: BLE001 - a lost connection comes as many exceptions
        return 0


async def verdicts(directory: Path, upstream: Upstream, reader: Any) -> list[str]:
    store = await Store.open(directory / reader.address)
    try:
        return [await verdict(store, message.content, reader, ALICE)
                for message in upstream.messages if reader.address in message.recipients]
    finally:
        await store.close()


def check(sent: list[str], certain: bool) -> None:
    assert sent[:1] == ["FRESH"], "lost, or not fresh"
    assert sent[1:] == ["DUPLICATE"] * (len(sent) - 1), "a repeat was shown as fresh"
    if certain:
        assert len(sent) == 1


KILLS = ["CONNECT 1", "EHLO 1", "MAIL 1", "RCPT 1", "RCPT 2", "RSET 1", "MAIL 2", "DATA 1", "DOT 1", "DOT! 1", "MAIL 3", "DATA 2",
         "DOT 2", "DOT! 2", "QUIT 1"]
QUICK = ("RCPT 2", "DATA 1", "DOT 1", "DOT! 1", "DOT! 2")       # each costs two or three starts of a process


@pytest.mark.parametrize("step", [each if each in QUICK else pytest.param(each, marks=pytest.mark.long) for each in KILLS])
async def test_killed_while_the_upstream_is_at_a_step(tmp_path: Path, step: str) -> None:
    """To bob openly and to dave as Bcc: two copies. The upstream server kills the gateway when it reaches the step."""
    name, number = step.split()
    victim: list[asyncio.subprocess.Process] = []

    def script(at: str, argument: str, count: int) -> Answer | bool:
        if victim and (at, count) == (name, int(number)):
            victim.pop().send_signal(signal.SIGKILL)
        return False
    content = text(message_id="")
    recipients = [BOB.address, DAVE.address]
    async with Upstream(script) as upstream:
        async with process(tmp_path, upstream) as (child, port):
            victim.append(child)
            code = await asyncio.to_thread(submit_or_lose, port, recipients, content)
        victim.clear()
        if code != 250:
            async with process(tmp_path, upstream) as (_, port):
                assert await asyncio.to_thread(submit_or_lose, port, recipients, content) == 250
        # with its connection gone before the dot's reply, the server may have taken the message: twice is possible, unseen is not
        certain = not name.startswith("DOT") and step != "QUIT 1" and step not in ("MAIL 3", "DATA 2")
        check(await verdicts(tmp_path, upstream, BOB), certain)
        check(await verdicts(tmp_path, upstream, DAVE), certain)
        assert b"the secret" not in upstream.wire


@pytest.mark.parametrize("step", [
    pytest.param("before begin_send", marks=pytest.mark.long), "after begin_send", "before finish_send", "after finish_send"])
async def test_killed_around_a_commit(tmp_path: Path, step: str) -> None:
    content = text(message_id="", date="")
    async with Upstream() as upstream:
        async with process(tmp_path, upstream, die=step) as (child, port):
            code = await asyncio.to_thread(submit_or_lose, port, [BOB.address], content)
            assert await asyncio.wait_for(child.wait(), 20) == -signal.SIGKILL
        if code != 250:
            async with process(tmp_path, upstream) as (_, port):
                assert await asyncio.to_thread(submit_or_lose, port, [BOB.address], content) == 250
        check(await verdicts(tmp_path, upstream, BOB), certain=step != "before finish_send")


async def test_serial_numbers_go_on_after_a_crash(tmp_path: Path) -> None:
    """The process killed after each commit of numbers: no number is ever used for two messages."""
    async with Upstream() as upstream:
        for number in range(2):
            async with process(tmp_path, upstream, die="after begin_send") as (_, port):
                await asyncio.to_thread(submit_or_lose, port, [BOB.address], text(body=f"lost {number}"))
            async with process(tmp_path, upstream) as (_, port):
                assert await asyncio.to_thread(submit_or_lose, port, [BOB.address], text(body=f"sent {number}")) == 250
        assert await verdicts(tmp_path, upstream, BOB) == ["FRESH"] * 2


@pytest.mark.parametrize("step", [
    "DATA 1", "DOT 1", "DOT! 1", pytest.param("QUIT 1", marks=pytest.mark.long), pytest.param("RCPT 1", marks=pytest.mark.long)])
async def test_killed_while_mail_leaves_unsealed(tmp_path: Path, step: str) -> None:
    """Not journaled beforehand. Nothing is lost; with the 250 under way it may come twice, the same bytes (RFC 1047)."""
    name, number = step.split()
    victim: list[asyncio.subprocess.Process] = []

    def script(at: str, argument: str, count: int) -> Answer | bool:
        if victim and (at, count) == (name, int(number)):
            victim.pop().send_signal(signal.SIGKILL)
        return False
    recipients = ["nobody@test.example", "none@test.example"]
    content = text(to=recipients[0])
    async with Upstream(script) as upstream:
        async with process(tmp_path, upstream) as (child, port):
            victim.append(child)
            code = await asyncio.to_thread(submit_or_lose, port, recipients, content)
        victim.clear()
        if code != 250:
            async with process(tmp_path, upstream) as (_, port):
                assert await asyncio.to_thread(submit_or_lose, port, recipients, content) == 250
        assert all(message.recipients == recipients for message in upstream.messages)
        bodies = {message.content.partition(b"+0000\r\n")[2] for message in upstream.messages}
        assert len(bodies) == 1
        assert len(upstream.messages) <= (1 if name in ("RCPT", "DATA") else 2)


async def test_killed_before_acceptance_of_unsealed_mail_is_written(tmp_path: Path) -> None:
    """Between the upstream's 250 and ours: the client comes again, and gets its 250."""
    async with Upstream() as upstream:
        async with process(tmp_path, upstream, die="before finish_send") as (child, port):
            assert await asyncio.to_thread(submit_or_lose, port, ["nobody@test.example"], text()) == 0
            assert await asyncio.wait_for(child.wait(), 20) == -signal.SIGKILL
        async with process(tmp_path, upstream) as (_, port):
            assert await asyncio.to_thread(submit_or_lose, port, ["nobody@test.example"], text()) == 250
        first, second = (message.content.partition(b"+0000\r\n")[2] for message in upstream.messages)
        assert first == second


async def test_acceptance_of_unsealed_mail_survives(tmp_path: Path) -> None:
    """Killed after it was written, before the client had its reply: sent once."""
    async with Upstream() as upstream:
        async with process(tmp_path, upstream, die="after finish_send") as (child, port):
            await asyncio.to_thread(submit_or_lose, port, ["nobody@test.example"], text())
            assert await asyncio.wait_for(child.wait(), 20) == -signal.SIGKILL
        async with process(tmp_path, upstream) as (_, port):
            assert await asyncio.to_thread(submit_or_lose, port, ["nobody@test.example"], text()) == 250
        assert len(upstream.messages) == 1
