"""Retries: who has it does not get it again, what is in doubt keeps its number, what was sent twice on purpose arrives twice."""

from __future__ import annotations

import asyncio
import smtplib
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from malote.config import LimitsConfig, RuleConfig
from malote.store import Store, database
from outgoing.harness import HOST, Answer, Gateway, Upstream, opened, person, submit, text, upstream_config, verdict

ALICE, BOB, CAROL, DAVE = (person(f"{name}@test.example") for name in ("alice", "bob", "carol", "dave"))
PEOPLE = (BOB, CAROL, DAVE)


def gateway(directory: Path, server: Upstream, **more: Any) -> Gateway:
    return Gateway(directory / "gateway", upstream_config(server.port), **({"cards": PEOPLE} | more))


async def verdicts(directory: Path, upstream: Upstream) -> list[str]:
    """What Bob's malote says of each message, in the order of arrival."""
    store = await Store.open(directory / "bob")
    try:
        return [await verdict(store, message.content, BOB, ALICE) for message in upstream.messages]
    finally:
        await store.close()


async def test_a_retry_sends_only_what_was_not_accepted(tmp_path: Path) -> None:
    def script(step: str, argument: str, number: int) -> Answer | bool:
        return "451 4.3.0 not now" if step == "DOT" and number == 2 else False
    async with Upstream(script) as upstream, gateway(tmp_path, upstream) as gw:
        first = await gw.submit(ALICE.address, [BOB.address, DAVE.address], text())
        assert first.data.startswith("451 4.3.0 Accepted for 1 of 2")
        second = await gw.submit(ALICE.address, [BOB.address, DAVE.address], text())
        assert second.code == 250
    assert [message.recipients for message in upstream.messages] == [[BOB.address], [DAVE.address]]


async def test_what_was_accepted_before_a_lost_client_is_not_sent_again(tmp_path: Path) -> None:
    async with Upstream() as upstream, gateway(tmp_path, upstream) as gw:
        for _ in range(3):
            assert (await gw.submit(ALICE.address, [BOB.address], text(), polite=False)).code == 250
    assert len(upstream.messages) == 1


async def test_a_client_that_read_the_reply_and_sends_again_means_it(tmp_path: Path) -> None:
    async with Upstream() as upstream, gateway(tmp_path, upstream) as gw:
        for _ in range(3):
            assert (await gw.submit(ALICE.address, [BOB.address], text())).code == 250

        def twice() -> None:
            with smtplib.SMTP(HOST, gw.port, "client") as client:
                for _ in range(2):
                    assert client.sendmail(ALICE.address, [BOB.address], text()) == {}
        await asyncio.to_thread(twice)
    assert await verdicts(tmp_path, upstream) == ["FRESH"] * 5


async def test_a_waiting_client_that_read_the_reply_is_not_swallowed_later(tmp_path: Path) -> None:
    """The first client is lost after its message was accepted; a retry reads its 250; the same again is a new message."""
    async with Upstream() as upstream, gateway(tmp_path, upstream) as gw:
        await gw.submit(ALICE.address, [BOB.address], text(), polite=False)
        await gw.submit(ALICE.address, [BOB.address], text())
        assert len(upstream.messages) == 1
        await gw.submit(ALICE.address, [BOB.address], text())
    assert await verdicts(tmp_path, upstream) == ["FRESH", "FRESH"]


async def test_pipelined_quit_and_fin_prove_nothing(tmp_path: Path) -> None:
    async with Upstream() as upstream, gateway(tmp_path, upstream) as gw:
        async def pipelined() -> bytes:
            reader, writer = await asyncio.open_connection(HOST, gw.port)
            writer.write(b"EHLO x\r\n")
            while not (await reader.readline()).startswith(b"250 "):
                pass
            writer.write(b"MAIL FROM:<alice@test.example>\r\nRCPT TO:<bob@test.example>\r\nDATA\r\n")
            while not (await reader.readline()).startswith(b"354"):
                pass
            writer.write(text() + b".\r\nQUIT\r\n")
            writer.write_eof()
            rest = await reader.read()
            writer.close()
            return rest
        for _ in range(2):
            assert (await pipelined()).startswith(b"250 2.0.0")
    assert len(upstream.messages) == 1


@pytest.mark.parametrize("answer", [None, "451 4.3.0 a filter took too long"])
async def test_what_is_in_doubt_is_sealed_again_under_the_same_number(tmp_path: Path, answer: Answer) -> None:
    def script(step: str, argument: str, number: int) -> Answer | bool:
        return answer if step == "DOT!" and number == 1 else False
    submitted = text(message_id="", date="")
    async with Upstream(script) as upstream, gateway(tmp_path, upstream) as gw:
        assert (await gw.submit(ALICE.address, [BOB.address], submitted)).code == 451
    async with Upstream() as later, gateway(tmp_path, later) as gw:
        assert (await gw.submit(ALICE.address, [BOB.address], submitted)).code == 250, "after a restart too"
    upstream.messages += later.messages
    first, second = (opened(message.content, BOB, ALICE) for message in upstream.messages)
    assert first.manifest.id == second.manifest.id
    assert (first.unsealed.stream, first.unsealed.serial) == (second.unsealed.stream, second.unsealed.serial)
    assert first.original == second.original, "Date and Message-ID that we added are the same"
    assert first.unsealed.payload_digest != second.unsealed.payload_digest, "a new session key"
    assert await verdicts(tmp_path, upstream) == ["FRESH", "DUPLICATE"]


async def test_a_changed_message_is_another_one(tmp_path: Path) -> None:
    async with Upstream() as upstream, gateway(tmp_path, upstream) as gw:
        for body in ("one", "two"):
            await gw.submit(ALICE.address, [BOB.address], text(body=body), polite=False)
        await gw.submit(ALICE.address, [BOB.address], b"Bcc: dave@test.example\r\n" + text(body="two"), polite=False)
    assert await verdicts(tmp_path, upstream) == ["FRESH", "FRESH"]


async def test_an_identical_message_in_flight_is_waited_for(tmp_path: Path) -> None:
    hold = asyncio.Event()
    loop = asyncio.get_running_loop()

    async with Upstream() as upstream, gateway(tmp_path, upstream) as gw:
        real = gw.submissions._store.begin_send

        async def slow_begin(intent: Any) -> Any:
            plan = await real(intent)
            await hold.wait()
            return plan
        gw.store.begin_send = slow_begin  # type: ignore[method-assign]
        content = text(cc=CAROL.address)
        first = loop.run_in_executor(None, lambda: submit(gw.port, ALICE.address, [BOB.address, CAROL.address], content))
        while not len(gw.submissions._inflight):
            await asyncio.sleep(0.01)
        second = loop.run_in_executor(None, lambda: submit(gw.port, ALICE.address, [CAROL.address, DAVE.address], content))
        await asyncio.sleep(0.1)
        assert upstream.messages == []
        hold.set()
        assert (await first).code == 250
        assert (await second).code == 250
    assert [message.recipients for message in upstream.messages] == [[BOB.address, CAROL.address], [DAVE.address]]


async def test_one_that_waits_holds_no_connection_that_the_first_needs(tmp_path: Path) -> None:
    """One upstream connection in all, and the first message needs it again for its Bcc copies."""
    limits = LimitsConfig(reply_within_seconds=10)
    addresses = [each.address for each in PEOPLE]
    async with Upstream() as upstream:
        gw = Gateway(tmp_path / "gateway", upstream_config(upstream.port, connections=2), limits=limits, cards=PEOPLE)
        async with gw:
            done = await asyncio.gather(*(gw.submit(ALICE.address, addresses, text(), polite=False) for _ in range(2)))
    assert [each.code for each in done] == [250, 250]
    assert sorted(address for message in upstream.messages for address in message.recipients) == sorted(addresses)


async def test_a_plain_message_accepted_before_is_not_sent_again_either(tmp_path: Path) -> None:
    async with Upstream() as upstream, gateway(tmp_path, upstream, cards=()) as gw:
        for _ in range(2):
            assert (await gw.submit(ALICE.address, ["x@else.example"], text(to="x@else.example"), polite=False)).code == 250
    assert len(upstream.messages) == 1


async def test_logins_do_not_share_a_journal(tmp_path: Path) -> None:
    """The same bytes from another login are another message: nobody can make somebody else's mail be swallowed."""
    async with Upstream() as upstream, gateway(tmp_path, upstream) as gw:
        await gw.submit(ALICE.address, [BOB.address], text(), polite=False)
        state_of = gw.desk._first_submitter
        gw.desk._first_submitter = lambda session: type(state_of(session))(login="other", anyone=True)  # type: ignore[method-assign]
        await gw.submit(ALICE.address, [BOB.address], text(), polite=False)
    assert await verdicts(tmp_path, upstream) == ["FRESH", "FRESH"]


async def test_the_next_message_names_the_last_one_that_was_accepted(tmp_path: Path) -> None:
    def script(step: str, argument: str, number: int) -> Answer | bool:
        return "550 5.0.0 no" if step == "DOT" and number == 2 else False
    async with Upstream(script) as upstream, gateway(tmp_path, upstream) as gw:
        for number in range(3):
            await gw.submit(ALICE.address, [BOB.address], text(message_id=f"<{number}@test.example>"))
    one, three = (opened(message.content, BOB, ALICE).unsealed for message in upstream.messages)
    assert (one.serial, one.prev) == (1, 0)
    assert (three.serial, three.prev) == (3, 1), "the refused one is no gap"


async def test_a_store_that_fails_sends_nothing_and_recovers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "BUSY_MS", 50)        # the lock is waited for, but not for five seconds
    async with Upstream() as upstream, gateway(tmp_path, upstream, config={"rules": (RuleConfig(seal="require"),)}) as gw:
        done = await gw.submit(ALICE.address, [BOB.address], text())
        assert done.code == 250
        blocker = sqlite3.connect(tmp_path / "gateway" / "store.sqlite", isolation_level=None)
        blocker.execute("BEGIN EXCLUSIVE")
        done = await gw.submit(ALICE.address, [BOB.address], text(message_id="<2@test.example>"))
        assert done.code == 451
        assert len(upstream.messages) == 1
        blocker.execute("ROLLBACK")
        blocker.close()
        assert (await gw.submit(ALICE.address, [BOB.address], text(message_id="<2@test.example>"))).code == 250
    assert await verdicts(tmp_path, upstream) == ["FRESH", "FRESH"]
