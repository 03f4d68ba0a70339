"""XCLIENT and XFORWARD: peers that are listed say for whom they speak, and nobody else does."""

from __future__ import annotations

import asyncio
import smtplib
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.wire import HOST, RecordingDesk, connected, serving
from malote.config import LimitsConfig, ListenerConfig
from malote.smtp.forwarded import XCLIENT, XFORWARD, parse_attributes
from malote.smtp.networks import Networks
from malote.smtp.path import PathRefused
from outgoing.harness import Gateway, Upstream, person, text, upstream_config

ALICE, BOB = person("alice@test.example"), person("bob@test.example")
MALLORY = person("mallory@test.example")
PEOPLE = {ALICE.address: ALICE, MALLORY.address: MALLORY}
TRUSTED = Networks([HOST])


# ---- the attributes

@pytest.mark.parametrize(("argument", "values"), [
    ("ADDR=192.0.2.1 LOGIN=anna", {"ADDR": "192.0.2.1", "LOGIN": "anna"}),
    ("addr=IPV6:2001:db8::1 name=[UNAVAILABLE] helo=[TEMPUNAVAIL]", {"ADDR": "2001:db8::1", "NAME": "", "HELO": ""}),
    ("ADDR=::ffff:192.0.2.1", {"ADDR": "192.0.2.1"}), ("ADDR=[UNAVAILABLE]", {"ADDR": ""}),
    ("LOGIN=an+2Bna+40b.example", {"LOGIN": "an+na@b.example"}), ("LOGIN=+C3+A4nna", {"LOGIN": "änna"}),
])
def test_attributes(argument: str, values: dict[str, str]) -> None:
    assert parse_attributes(argument, XCLIENT) == values


@pytest.mark.parametrize("argument", [
    "", "ADDR", "ADDR=", "ADDR=host.example", "ADDR=192.0.2.1 ADDR=192.0.2.2", "IDENT=1", "LOGIN=a+0D+0Ab", "LOGIN=+ff",
    "LOGIN=+FF", "LOGIN=" + "x" * 300, "ADDR=fe80::1+25eth0", "ADDR=\udcff",
])
def test_attributes_that_are_wrong(argument: str) -> None:
    with pytest.raises(PathRefused):
        parse_attributes(argument, XCLIENT)


@given(st.text(max_size=100))
def test_any_argument_has_values_or_is_refused(argument: str) -> None:
    try:
        values = parse_attributes(argument, XFORWARD)
    except PathRefused:
        return
    assert values
    assert all(value.isprintable() for value in values.values())


# ---- the commands

async def test_they_are_no_commands_for_others() -> None:
    desk = RecordingDesk()
    async with serving(desk, xclient=Networks(["192.0.2.1"])) as server, connected(server) as client:
        said = await client.ask("EHLO x")
        assert "XCLIENT" not in said
        assert "XFORWARD" not in said
        for command in ("XCLIENT ADDR=203.0.113.9 LOGIN=alice", "XFORWARD ADDR=203.0.113.9"):
            assert await client.ask(command) == "500 5.5.2 Command not recognised"
        await client.begin()
        assert (desk.sessions[-1].peer, desk.sessions[-1].vouched, desk.sessions[-1].forwarded) == (HOST, "", "")


async def test_xclient_begins_anew_with_another_client() -> None:
    """What the peer was allowed by its address, its client is not: it is not this machine."""
    desk = RecordingDesk()
    async with serving(desk, xclient=TRUSTED) as server, connected(server) as client:
        said = await client.ask("EHLO proxy")
        assert "XCLIENT NAME ADDR PORT PROTO HELO LOGIN" in said
        assert "AUTH" in said
        assert (await client.ask("XCLIENT ADDR=203.0.113.9 PORT=1 PROTO=ESMTP HELO=x NAME=[UNAVAILABLE]")).startswith("220 ")
        assert (await client.ask("MAIL FROM:<a@a.example>")).startswith("503"), "a new session: EHLO first"
        assert "AUTH" not in await client.ask("EHLO client")
        assert (desk.sessions[-1].peer, desk.sessions[-1].loopback) == ("203.0.113.9", False)
        await client.to_354()
        assert (await client.ask(b"x\r\n.")).startswith("250")
        assert (await client.ask("XCLIENT ADDR=127.0.0.1")).startswith("220 "), "it still is the same peer"
        assert "AUTH" in await client.ask("EHLO client"), "a client on this machine behind a peer on this machine"
        assert desk.names.count("close") == 2


async def test_xclient_within_a_message_is_refused() -> None:
    async with serving(RecordingDesk(), xclient=TRUSTED) as server, connected(server) as client:
        await client.ask("EHLO x")
        await client.ask("MAIL FROM:<a@a.example>")
        for command in ("XCLIENT ADDR=203.0.113.9", "XFORWARD ADDR=203.0.113.9"):
            assert (await client.ask(command)).startswith("503")


async def test_networks_and_limits_are_those_of_the_client_that_is_named() -> None:
    settings: dict[str, Any] = {"xclient": TRUSTED, "networks": Networks(["203.0.113.0/24"])}
    async with serving(RecordingDesk(), **settings) as server:
        server.connections.renew(LimitsConfig(client_connections=1))
        async with connected(server) as first, connected(server) as second, connected(server) as third:
            assert (await first.ask("XCLIENT ADDR=203.0.113.9")).startswith("220")
            assert (await second.ask("XCLIENT ADDR=203.0.113.9")).startswith("421 4.7.0 Too many connections")
            assert await second.at_end()
            assert (await third.ask("XCLIENT ADDR=192.0.2.1")).startswith("554 5.7.1 Mail from 192.0.2.1 is not taken here")
            assert await third.at_end()


async def test_xforward_counts_for_the_client_and_allows_nothing() -> None:
    desk = RecordingDesk()
    async with serving(desk, xclient=TRUSTED) as server, connected(server) as client:
        server.connections.renew(LimitsConfig(client_messages_per_minute=1))
        await client.ask("EHLO x")
        for number, code in ((1, "250"), (2, "250"), (1, "450")):
            assert (await client.ask(f"XFORWARD ADDR=203.0.113.{number} NAME=[UNAVAILABLE] SOURCE=REMOTE")).startswith("250")
            assert (await client.ask("MAIL FROM:<a@a.example>"))[:3] == code
            assert (desk.sessions[0].peer, desk.sessions[0].loopback) == (HOST, True)
            await client.ask("RSET")


# ---- the login that a peer vouches for

@pytest.mark.parametrize(("login", "sender", "reply"), [
    ("alice+40test.example", ALICE.address, "250"),
    ("alice+40test.example", MALLORY.address, "550 5.7.1 Your login alice@test.example may not send from mallory@test.example"),
    ("u4711", ALICE.address, "250"), ("u4711", MALLORY.address, "550"), ("nobody", ALICE.address, "550"),
])
async def test_a_login_that_a_trusted_peer_has_let_in(tmp_path: Path, login: str, sender: str, reply: str) -> None:
    """As a mail proxy does it (nginx) that has checked the password itself. The login is held to its addresses."""
    users = tmp_path / "users"
    users.write_text("u4711::alice@test.example\n")
    users.chmod(0o600)
    listener = ListenerConfig(host=HOST, auth="none", xclient=(HOST,), users_file=users)
    async with Upstream() as upstream, Gateway(
            tmp_path / "gw", upstream_config(upstream.port), listener, identities=PEOPLE, cards=(BOB,)) as gw:
        def attempt() -> str:
            with smtplib.SMTP(HOST, gw.port, "proxy") as client:
                client.ehlo()
                assert client.docmd("XCLIENT", f"ADDR=203.0.113.9 LOGIN={login}")[0] == 220
                client.ehlo()
                for step in (lambda: client.mail(sender), lambda: client.rcpt(BOB.address), lambda: client.data(text(sender))):
                    code, said = step()
                    if code != 250:
                        break
                return f"{code} {said.decode()}"
        assert (await asyncio.to_thread(attempt)).startswith(reply)
    assert len(upstream.messages) == (reply == "250")


async def test_swaks_speaks_for_others(tmp_path: Path) -> None:
    """A real client for it. As itself it may not send: the listener asks for a login."""
    users = tmp_path / "users"
    users.write_text("anna::alice@test.example\n")
    users.chmod(0o600)
    listener = ListenerConfig(host=HOST, auth="local", xclient=(HOST,), users_file=users)
    async with Upstream() as upstream, Gateway(
            tmp_path / "gw", upstream_config(upstream.port), listener, identities=PEOPLE, cards=(BOB,)) as gw:
        def swaks(*more: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                ["swaks", "--server", f"{HOST}:{gw.port}", "--from", ALICE.address, "--to", BOB.address, *more],
                capture_output=True, text=True, check=False, timeout=60)
        done = await asyncio.to_thread(swaks)
        assert "530 5.7.0 Log in first" in done.stdout
        done = await asyncio.to_thread(swaks, "--xclient-addr", "203.0.113.9", "--xclient-login", "anna")
        assert done.returncode == 0, done.stdout
    assert [message.sender for message in upstream.messages] == [ALICE.address]
