"""Who may connect, how often and how much: networks, and limits for each client and login, with replies that say what to do."""

from __future__ import annotations

import asyncio
import contextlib
import grp
import os
import stat
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.wire import HOST, Client, RecordingDesk, RunningServer, connected, serving, until
from malote.config import LimitsConfig, ListenerConfig, parse_config
from malote.config_faults import config_faults
from malote.errors import ConfigError
from malote.smtp import open_connections, rates
from malote.smtp.networks import Networks, client_key
from malote.smtp.rates import Rate
from malote.smtp.shared_table import SharedTable
from malote.smtp.siblings import Siblings
from malote.smtp.sockets import bind, close_all


@contextlib.asynccontextmanager
async def client_from(server: RunningServer, address: str) -> AsyncIterator[Client]:
    """A connection from another address of this machine, with whatever greeting."""
    reader, writer = await asyncio.open_connection(HOST, server.port, local_addr=(address, 0))
    try:
        yield Client(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


def limited(server: RunningServer, **limits: Any) -> None:
    server.connections.renew(LimitsConfig(**limits))


# ---- networks

@pytest.mark.parametrize(("peer", "inside"), [
    ("10.1.2.3", True), ("11.0.0.1", False), ("192.0.2.7", True), ("192.0.2.8", False), ("2001:db8::1", True),
    ("2001:db9::1", False), ("::ffff:10.1.2.3", True), ("fe80::1%eth0", False), ("unix", False), ("unknown", False), ("", False),
])
def test_networks(peer: str, inside: bool) -> None:
    assert (peer in Networks(["10.0.0.0/8", "192.0.2.7", "2001:db8::/32"])) is inside
    assert "unix" in Networks(["unix"])


def test_one_client_is_an_ipv4_address_or_an_ipv6_network() -> None:
    """Whoever has an IPv6 address has 2**64 of them."""
    assert client_key("192.0.2.1") == client_key("::ffff:192.0.2.1") == "192.0.2.1"
    assert client_key("2001:db8:0:1::1") == client_key("2001:db8:0:1:ffff::2") != client_key("2001:db8:0:2::1")
    assert client_key("unix") == client_key("unknown") == ""


async def test_who_is_in_no_network_is_told_so_at_once() -> None:
    desk = RecordingDesk()
    async with serving(desk, networks=Networks(["127.0.0.0/30"])) as server:
        async with client_from(server, "127.0.0.9") as client:
            assert await client.reply() == "554 5.7.1 Mail from 127.0.0.9 is not taken here, it is in no network of this server"
            assert await client.at_end()
        async with client_from(server, "127.0.0.2") as client:
            assert (await client.reply()).startswith("220")
        assert desk.events in ([], [("close",)])


@pytest.mark.parametrize(("listener", "fault"), [
    ({"host": "0.0.0.0", "auth": "none", "networks": ["0.0.0.0/0"]}, "open relay"),
    ({"host": "0.0.0.0", "auth": "none", "networks": ["10.0.0.0/8", "::/0"]}, "open relay"),
    ({"auth": "none", "proxies": ["127.0.0.1"]}, "open relay"),
    ({"auth": "none", "proxies": ["127.0.0.1"], "networks": ["0.0.0.0/1", "128.0.0.0/1"]}, "open relay"),
    ({"proxies": ["8.0.0.0/6"]}, "proxies: would believe everybody"),
    ({"xclient": ["::/0"]}, "xclient: would believe everybody"),
    ({"auth": "certificate", "users_file": "/u"}, "client_ca: must be set"),
    ({"auth": "certificate", "client_ca": "/c"}, "users_file: must be set"),
    ({"auth": "local", "users_file": "/u", "client_ca": "/c"}, "client_ca: needs tls"),
    ({"auth": "pass-through", "client_ca": "/c"}, "client_ca: has no effect"),
    ({"auth": "none", "senders": "own"}, 'senders: "own" needs a login'),
])
def test_arrangements_that_let_anybody_send_or_have_no_effect(listener: dict[str, Any], fault: str) -> None:
    config = parse_config({"outgoing": {"upstream": {"host": "h"}, "listeners": [listener]}}, source="x")
    assert any(f"outgoing.listeners.1.{fault}" in text or fault in text for text in config_faults(config))


def test_a_network_of_ones_own_may_send_without_a_login() -> None:
    listener = {"host": "0.0.0.0", "auth": "none", "networks": ["10.0.0.0/8"], "tls": "tls",
                "certificate": "/c", "certificate_key": "/k"}
    table = {"outgoing": {"upstream": {"host": "h"}, "listeners": [listener]}}
    assert config_faults(parse_config(table, source="x")) == []


@pytest.mark.parametrize("name", ["10.0.0.1/8", "example.org", "10.0.0.0/33", ""])
def test_a_network_that_is_none_is_a_fault_of_the_configuration(name: str) -> None:
    with pytest.raises(ConfigError, match="networks"):
        parse_config({"outgoing": {"listeners": [{"networks": [name]}]}}, source="x")


# ---- rates

def test_a_rate_gives_a_minutes_worth_at_once_and_then_as_time_passes() -> None:
    rate = Rate(6)
    assert [rate.take("a", 100.0) for _ in range(8)] == [True] * 6 + [False] * 2
    assert rate.take("b", 100.0), "each for itself"
    assert not rate.take("a", 109.0)
    assert rate.take("a", 110.0)
    assert not rate.take("a", 110.0)
    assert [rate.take("a", 1000.0) for _ in range(7)] == [True] * 6 + [False]
    assert Rate(0).take("a", 0)
    assert all(rate.take("", 0) for _ in range(20))


@given(st.integers(1, 50), st.lists(st.floats(0, 20), min_size=1, max_size=200))
def test_in_no_minute_more_than_twice_the_rate_and_never_less_than_it(per_minute: int, gaps: list[float]) -> None:
    rate, now, taken = Rate(per_minute), 0.0, []
    for gap in gaps:
        now += gap
        if rate.take("a", now):
            taken.append(now)
        else:
            assert sum(when > now - 60 for when in taken) >= per_minute, "refused though less was done"
    for when in taken:
        assert sum(when <= other < when + 60 for other in taken) <= 2 * per_minute


def test_what_is_remembered_is_bounded_and_the_newest_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "ROWS", 4)
    rate = Rate(1)
    for number in range(1000):
        assert rate.take(str(number), number * 0.01)
    assert sum(not rate.take(str(number), 10.0) for number in range(1000)) <= 4 * 8
    assert rate.take("another", 10.0)
    assert not rate.take("another", 10.0)


@given(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(0, 9))))
def test_a_table_of_eight_keys_is_a_table(changes: list[tuple[str, int]]) -> None:
    table, expected = SharedTable(1), dict[str, int]()
    for key, number in changes:
        table.set(key, number)
        expected[key] = number
    assert {key: table.get(key) for key in "abcdefgh"} == {key: expected.get(key, 0) for key in "abcdefgh"}
    table.clear()
    assert table.get("a") == 0


def in_a_child(work: Callable[[], bool]) -> bool:
    """What that says in a process forked here."""
    child = os.fork()
    if not child:
        os._exit(work())
    return bool(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def test_workers_count_together() -> None:
    """Or a client might do as much at each. What a worker held is free when it has died."""
    siblings = Siblings(3)
    siblings.rates.renew(LimitsConfig(login_messages_per_minute=2))
    assert in_a_child(lambda: siblings.rates.login_messages.take("anna", 1000.0))
    assert siblings.rates.login_messages.take("anna", 1000.0)
    assert not in_a_child(lambda: siblings.rates.login_messages.take("anna", 1000.0))
    assert in_a_child(lambda: siblings.rates.login_messages.take("uwe", 1000.0))

    one, other = siblings.clients(0), siblings.clients(1)
    one.set("192.0.2.1", 2)
    other.set("192.0.2.1", 1)
    assert (one.others("192.0.2.1"), other.others("192.0.2.1"), siblings.clients(2).others("192.0.2.1")) == (1, 2, 3)
    siblings.clear(0)
    assert other.others("192.0.2.1") == 0


async def test_connections_of_one_client_at_all_workers_together() -> None:
    siblings = Siblings(2)
    async with serving(RecordingDesk()) as first, serving(RecordingDesk()) as second:
        for slot, server in enumerate((first, second)):
            server.connections.share(siblings, slot)
            limited(server, client_connections=2)
        async with client_from(first, "127.0.0.5") as one, client_from(second, "127.0.0.5") as two:
            for client in (one, two):
                assert (await client.reply()).startswith("220")
            async with client_from(first, "127.0.0.5") as third, client_from(first, "127.0.0.6") as another:
                assert (await third.reply()).startswith("421 4.7.0 Too many connections from your address, at most 2")
                assert (await another.reply()).startswith("220")
        await until(lambda: not len(second.connections) and not len(first.connections))
        async with client_from(first, "127.0.0.5") as one, client_from(first, "127.0.0.5") as two:
            for client in (one, two):
                assert (await client.reply()).startswith("220")


async def test_messages_of_a_client_and_recipients_have_replies_that_say_when() -> None:
    async with serving(RecordingDesk()) as server, connected(server) as client:
        limited(server, client_messages_per_minute=2, client_recipients_per_minute=4)
        for _ in range(2):
            await client.begin("a@a.example", "b@b.example", "c@b.example")
            assert (await client.ask(b"x\r\n.")).startswith("250")
        assert await client.ask("MAIL FROM:<a@a.example>") == \
            "450 4.7.1 Too many messages from your address within a minute, try again later"
        async with client_from(server, "127.0.0.2") as other:
            await other.reply()
            await other.ask("EHLO x")
            assert (await other.ask("MAIL FROM:<a@a.example>")).startswith("250"), "others are not concerned"
            replies = [await other.ask(f"RCPT TO:<r{number}@b.example>") for number in range(5)]
            assert [reply[:3] for reply in replies] == ["250"] * 4 + ["450"]
            assert replies[4] == "450 4.7.1 Too many recipients from your address within a minute, try again later"
            assert (await other.ask("DATA")).startswith("354"), "those that were accepted get it"


async def test_messages_of_a_login_are_counted_wherever_it_comes_from() -> None:
    async with serving(RecordingDesk()) as server:
        limited(server, login_messages_per_minute=1, login_recipients_per_minute=1)
        for address, said in (("127.0.0.2", "250"), ("127.0.0.3", "450 4.7.1 Too many messages of this login")):
            async with client_from(server, address) as client:
                await client.reply()
                await client.ask("EHLO x")
                assert (await client.ask("AUTH PLAIN AGEAYg==")).startswith("235")
                assert (await client.ask("MAIL FROM:<a@a.example>")).startswith(said)
                if said == "250":
                    assert (await client.ask("RCPT TO:<b@b.example>")).startswith("250")
                    assert (await client.ask("RCPT TO:<c@b.example>")).startswith("450 4.7.1 Too many recipients of this login")


async def test_without_rates_nothing_is_counted() -> None:
    async with serving(RecordingDesk()) as server, connected(server) as client:
        await client.begin()
        for rate in vars(server.connections.rates).values():
            assert bytes(rate._paid_at._memory).strip(b"\0") == b""


# ---- connections

async def test_connections_of_one_client_at_once() -> None:
    async with serving(RecordingDesk()) as server, contextlib.AsyncExitStack() as stack:
        limited(server, client_connections=2)
        for _ in range(2):
            assert (await (await stack.enter_async_context(client_from(server, "127.0.0.2"))).reply()).startswith("220")
        async with client_from(server, "127.0.0.2") as client:
            assert await client.reply() == "421 4.7.0 Too many connections from your address, at most 2; close some"
            assert await client.at_end()
        async with client_from(server, "127.0.0.3") as client:
            assert (await client.reply()).startswith("220")
    assert server.connections._clients == {}


async def test_connections_of_one_client_in_a_minute() -> None:
    async with serving(RecordingDesk()) as server:
        limited(server, client_connections_per_minute=3)
        said = []
        for _ in range(4):
            async with client_from(server, "127.0.0.2") as client:
                said.append((await client.reply())[:9])
        assert [reply[:3] for reply in said] == ["220"] * 3 + ["421"]
        assert said[3] == "421 4.7.0"


async def test_who_has_been_idle_longest_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred silent connections do not keep the next client out; one with a message in hand is left alone, and one that has
    logged in goes only if there is no other."""
    monkeypatch.setattr(open_connections, "IDLE_SECONDS", 0.0)
    async with serving(RecordingDesk(), connections=3) as server, contextlib.AsyncExitStack() as stack:
        async def arrive() -> Client:
            client = await stack.enter_async_context(client_from(server, HOST))
            assert (await client.reply()).startswith("220")
            return client
        busy, member, silent = await arrive(), await arrive(), await arrive()
        await member.ask("EHLO x")
        assert (await member.ask("AUTH PLAIN AGEAYg==")).startswith("235")
        await busy.begin()
        await silent.ask("NOOP")
        await arrive()
        assert (await silent.reply()).startswith("421 4.3.2 Nothing was sent for a while")
        late = await arrive()       # of the two that are left the one without a login
        assert (await member.ask("NOOP")).startswith("250")
        await late.begin()
        await until(lambda: len(server.connections) == 3)
        await arrive()
        assert (await member.reply()).startswith("421 4.3.2")
        await until(lambda: len(server.connections) == 3)
        for client in (busy, late):
            assert (await client.ask(b"x\r\n.")).startswith("250")


async def test_an_idle_connection_of_whoever_has_most_makes_room_at_once() -> None:
    """Without waiting for it to be idle for long; and never for one that has as many itself."""
    async with serving(RecordingDesk(), connections=4) as server, contextlib.AsyncExitStack() as stack:
        async def arrive(address: str) -> Client:
            return await stack.enter_async_context(client_from(server, address))
        greedy = [await arrive("127.0.0.2") for _ in range(3)]
        modest = await arrive("127.0.0.3")
        for client in (*greedy, modest):
            assert (await client.reply()).startswith("220")
        newcomer = await arrive("127.0.0.4")
        assert (await newcomer.reply()).startswith("220")
        assert (await greedy[0].reply()).startswith("421 4.3.2 Nothing was sent for a while")
        await until(lambda: len(server.connections) == 4)
        assert (await (await arrive("127.0.0.2")).reply()).startswith("421 4.3.2 Too many connections"), "it has most itself"
        assert (await (await arrive("127.0.0.4")).reply()).startswith("421 4.3.2 Too many connections"), "then both had two"
        for client in (*greedy[1:], modest, newcomer):
            assert (await client.ask("NOOP")).startswith("250")


@pytest.mark.parametrize("piece", [b"x" * 65536, b"\0\r" * 32768], ids=["text", "binary"])
async def test_a_line_without_an_end_ends_the_connection(piece: bytes) -> None:
    async with serving(RecordingDesk()) as server, connected(server) as client:
        with contextlib.suppress(ConnectionError):
            for _ in range(40):
                client.send(piece)
                await client.writer.drain()
        await until(lambda: len(server.connections) == 0)


async def test_who_has_just_come_is_not_sent_away() -> None:
    async with serving(RecordingDesk(), connections=1) as server, connected(server), client_from(server, HOST) as second:
        assert await second.reply() == "421 4.3.2 Too many connections, try again later"


async def test_limits_on_size_and_recipients_name_themselves() -> None:
    async with serving(RecordingDesk(), max_message_bytes=100, max_recipients=1) as server, connected(server) as client:
        await client.ask("EHLO x")
        assert await client.ask("MAIL FROM:<a@a.example> SIZE=101") == "552 5.3.4 Message is too large, at most 100 bytes"
        await client.to_354()
        assert await client.ask(b"x" * 101 + b"\r\n.") == "552 5.3.4 Message is too large, at most 100 bytes"
        await client.ask("MAIL FROM:<a@a.example>")
        await client.ask("RCPT TO:<b@b.example>")
        assert await client.ask("RCPT TO:<c@b.example>") == \
            "452 4.5.3 Too many recipients, at most 1 in one message; send the others after this one"


# ---- the UNIX socket

def test_the_sockets_mode_and_group(tmp_path: Path) -> None:
    group = next(entry for entry in grp.getgrall() if entry.gr_gid != os.getegid())
    for name in (group.gr_name, str(group.gr_gid)):
        path = tmp_path / f"socket-{name}"
        close_all(bind(ListenerConfig(socket=path, socket_mode=0o660, socket_group=name)))
        assert (stat.S_IMODE(path.stat().st_mode), path.stat().st_gid) == (0o660, group.gr_gid)
    path = tmp_path / "open"
    close_all(bind(ListenerConfig(socket=path)))
    assert stat.S_IMODE(path.stat().st_mode) == 0o666


def test_a_group_that_there_is_not(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="socket_group: there is no group no-such-group"):
        bind(ListenerConfig(socket=tmp_path / "socket", socket_group="no-such-group"))
