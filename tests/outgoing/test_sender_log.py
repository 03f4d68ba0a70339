"""One log line per message, whatever became of it, and nothing private in it; `malote log` gets the same."""

from __future__ import annotations

import asyncio
import json
import logging
import smtplib
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from malote.config import ListenerConfig, LogConfig
from malote.logs import configure_logs
from outgoing.harness import HOST, REQUIRE, Answer, Gateway, Upstream, person, text, upstream_config

ALICE, BOB, DAVE = (person(f"{name}@test.example") for name in ("alice", "bob", "dave"))


@pytest.fixture(autouse=True)
def own_logs() -> Iterator[None]:
    """The log as it was before, for the tests that come after."""
    handlers, level = logging.root.handlers[:], logging.root.level
    yield
    structlog.reset_defaults()
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


@pytest.mark.parametrize("addresses", [False, True])
async def test_one_line_for_each_message(tmp_path: Path, capsys: pytest.CaptureFixture[str], addresses: bool) -> None:
    def script(step: str, argument: str, number: int) -> Answer | bool:
        return "451 4.0.0 not now" if step == "DOT" and number == 4 else False
    configure_logs(LogConfig(format="json", addresses=addresses))
    async with Upstream(script) as upstream, Gateway(tmp_path, upstream_config(upstream.port), cards=[BOB, DAVE]) as gw:
        await gw.submit(ALICE.address, [BOB.address, DAVE.address], text())                         # two copies
        await gw.submit(ALICE.address, ["x@else.example"], text(to="x@else.example"))               # plain
        await gw.submit(ALICE.address, [BOB.address], text(message_id="<2@test.example>"))          # temporary failure
        await gw.submit(ALICE.address, [BOB.address, "x@else.example"], text())                     # refused: mixed
        await gw.submit("", [BOB.address], b"From: a@x.example, b@x.example\r\n\r\nx\r\n")          # refused: two authors
        await gw.store.flush()
        outcomes = await gw.store.recent_outcomes()
    raw = capsys.readouterr().err
    lines = [line for line in map(json.loads, raw.splitlines()) if line["event"] == "message"]
    assert [(line["event"], line["outcome"], line["reply"], line["sealed"], line["plain"], line["copies"]) for line in lines] == [
        ("message", "sealed", 250, 2, 0, 2), ("message", "plain", 250, 0, 1, 1), ("message", "failed", 451, 1, 0, 1),
        ("message", "refused", 550, 0, 0, 0), ("message", "refused", 554, 0, 0, 0)]
    assert [outcome.outcome for outcome in reversed(outcomes)] == [line["outcome"] for line in lines]
    for private in ("secret", "one@test.example", "Subject", "2@test.example"):
        assert private not in raw
    assert (BOB.address in raw) is addresses
    assert (ALICE.address in raw) is addresses
    assert all(isinstance(line["ms"], int) and line["direction"] == "out" and line["session"] for line in lines)
    assert len({line["id"] for line in lines[:3]}) == 3


async def test_what_we_refuse_is_logged_with_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also at RCPT, after which no message comes; and never for whom it was."""
    configure_logs(LogConfig(format="json"))
    async with Upstream() as upstream, Gateway(tmp_path, upstream_config(upstream.port), cards=[BOB],
                                               config={"rules": REQUIRE}) as gw:
        await gw.submit(ALICE.address, ["x@else.example"], text(to="x@else.example"))
        await gw.submit("eve@test.example", [BOB.address], text(sender="eve@test.example"))
        await gw.store.flush()
        outcomes = await gw.store.recent_outcomes()
    assert [(each.outcome, each.detail) for each in reversed(outcomes)] == [
        ("refused", "550 no card"), ("refused", "550 no identity that may sign")]
    raw = capsys.readouterr().err
    lines = [json.loads(line) for line in raw.splitlines()]
    assert [line["reason"] for line in lines if line.get("reason")] == ["no card", "no identity that may sign"]
    assert "else.example" not in raw
    assert upstream.messages == []


async def test_a_fault_is_logged_by_its_class_and_place_without_its_text(
        tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ValueError("the secret text of bob@test.example")
    configure_logs(LogConfig(format="json"))
    monkeypatch.setattr("malote.outgoing.copies.seal", broken)
    async with Upstream() as upstream, Gateway(tmp_path, upstream_config(upstream.port), cards=[BOB],
                                               config={"rules": REQUIRE}) as gw:
        done = await gw.submit(ALICE.address, [BOB.address], text())
        assert done.code == 451
        assert "secret" not in done.data
    raw = capsys.readouterr().err
    assert "ValueError" in raw
    assert "secret" not in raw
    assert "bob@" not in raw
    assert upstream.messages == []


async def test_a_lost_login_at_the_upstream_ends_the_session_with_421(tmp_path: Path) -> None:
    """The client's own connection cannot be opened again: its password is not kept."""
    async with Upstream() as upstream:
        config = upstream_config(upstream.port)
        async with Gateway(tmp_path, config, ListenerConfig(host=HOST), cards=[BOB]) as gw:
            def attempt() -> tuple[int, bytes]:
                with smtplib.SMTP(HOST, gw.port, "client") as client:
                    client.login("alice@test.example", "pw")
                    client.sendmail(ALICE.address, [BOB.address], text())
                    for writer in list(upstream._writers):
                        gw_loop.call_soon_threadsafe(writer.transport.abort)
                    client.mail(ALICE.address)
                    while upstream.open:
                        pass
                    return client.rcpt(BOB.address)
            gw_loop = asyncio.get_running_loop()
            code, answer = await asyncio.to_thread(attempt)
    assert (code, answer[:5]) == (421, b"4.4.2")
    assert len(upstream.messages) == 1
