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
from outgoing.harness import Answer, Script, Upstream, gateway_process, person, submit, text, verdict

ALICE, BOB, DAVE = (person(f"{name}@test.example") for name in ("alice", "bob", "dave"))
NOBODY = "nobody@test.example"      # who has no card: what goes there leaves unsealed


def process(directory: Path, upstream: Upstream, *, die: str = "") -> AbstractAsyncContextManager[
        tuple[asyncio.subprocess.Process, int]]:
    return gateway_process(directory, upstream.port, identities=[ALICE], cards=[BOB, DAVE], die=die)


def submit_or_lose(port: int, recipients: list[str], content: bytes) -> int:
    """The reply's code; 0 when the gateway died."""
    try:
        return submit(port, ALICE.address, recipients, content, polite=False).code
    except Exception:  # noqa: BLE001 - a lost connection comes as many exceptions
        return 0


Victim = list[asyncio.subprocess.Process]


def killer(step: str) -> tuple[Victim, Script]:
    """A script for the upstream server that kills the process in the list when it reaches the step."""
    name, number = step.split()
    victim: Victim = []

    def script(at: str, _argument: str, count: int) -> Answer | bool:
        if victim and (at, count) == (name, int(number)):
            victim.pop().send_signal(signal.SIGKILL)
        return False
    return victim, script


async def first_try(directory: Path, upstream: Upstream, recipients: list[str], content: bytes, *,
                    victim: Victim | None = None, die: str = "") -> int:
    """To a gateway that is killed on the way. The reply's code, 0 for none."""
    async with process(directory, upstream, die=die) as (child, port):
        if victim is not None:
            victim.append(child)
        code = await asyncio.to_thread(submit_or_lose, port, recipients, content)
        if die:
            assert await asyncio.wait_for(child.wait(), 20) == -signal.SIGKILL
    if victim is not None:
        victim.clear()
    return code


async def again(directory: Path, upstream: Upstream, recipients: list[str], content: bytes) -> None:
    """After a restart: it must be accepted now."""
    async with process(directory, upstream) as (_, port):
        assert await asyncio.to_thread(submit_or_lose, port, recipients, content) == 250


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
    name, victim, script = step.split()[0], *killer(step)
    content = text(message_id="")
    recipients = [BOB.address, DAVE.address]
    async with Upstream(script) as upstream:
        if await first_try(tmp_path, upstream, recipients, content, victim=victim) != 250:
            await again(tmp_path, upstream, recipients, content)
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
        if await first_try(tmp_path, upstream, [BOB.address], content, die=step) != 250:
            await again(tmp_path, upstream, [BOB.address], content)
        check(await verdicts(tmp_path, upstream, BOB), certain=step != "before finish_send")


async def test_serial_numbers_go_on_after_a_crash(tmp_path: Path) -> None:
    """The process killed after each commit of numbers: no number is ever used for two messages."""
    async with Upstream() as upstream:
        for number in range(2):
            await first_try(tmp_path, upstream, [BOB.address], text(body=f"lost {number}"), die="after begin_send")
            await again(tmp_path, upstream, [BOB.address], text(body=f"sent {number}"))
        assert await verdicts(tmp_path, upstream, BOB) == ["FRESH"] * 2


@pytest.mark.parametrize("step", [
    "DATA 1", "DOT 1", "DOT! 1", pytest.param("QUIT 1", marks=pytest.mark.long), pytest.param("RCPT 1", marks=pytest.mark.long)])
async def test_killed_while_mail_leaves_unsealed(tmp_path: Path, step: str) -> None:
    """Not journaled beforehand. Nothing is lost; with the 250 under way it may come twice, the same bytes (RFC 1047)."""
    name, victim, script = step.split()[0], *killer(step)
    recipients = [NOBODY, "none@test.example"]
    content = text(to=recipients[0])
    async with Upstream(script) as upstream:
        if await first_try(tmp_path, upstream, recipients, content, victim=victim) != 250:
            await again(tmp_path, upstream, recipients, content)
        assert all(message.recipients == recipients for message in upstream.messages)
        bodies = {message.content.partition(b"+0000\r\n")[2] for message in upstream.messages}
        assert len(bodies) == 1
        assert len(upstream.messages) <= (1 if name in ("RCPT", "DATA") else 2)


async def test_killed_before_acceptance_of_unsealed_mail_is_written(tmp_path: Path) -> None:
    """Between the upstream's 250 and ours: the client comes again, and gets its 250."""
    async with Upstream() as upstream:
        assert await first_try(tmp_path, upstream, [NOBODY], text(), die="before finish_send") == 0
        await again(tmp_path, upstream, [NOBODY], text())
        first, second = (message.content.partition(b"+0000\r\n")[2] for message in upstream.messages)
        assert first == second


async def test_acceptance_of_unsealed_mail_survives(tmp_path: Path) -> None:
    """Killed after it was written, before the client had its reply: sent once."""
    async with Upstream() as upstream:
        await first_try(tmp_path, upstream, [NOBODY], text(), die="after finish_send")
        await again(tmp_path, upstream, [NOBODY], text())
        assert len(upstream.messages) == 1
