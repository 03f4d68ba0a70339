"""The PROXY protocol: who the client is comes from proxies that are listed, before TLS, and from nobody else."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import struct
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.servers import Lab
from lab.wire import HOST, Client, RecordingDesk, RunningServer, serving, until
from malote.config import LimitsConfig, ListenerConfig
from malote.smtp import gate
from malote.smtp.listener import server_settings
from malote.smtp.networks import Networks
from malote.smtp.proxy_header import SIGNATURE, Origin, ProxyFault, crc32c, parse_v1, parse_v2

CLIENT = "203.0.113.9"
V1 = f"PROXY TCP4 {CLIENT} 198.51.100.1 40000 25\r\n".encode()
TRUSTED = Networks([HOST])


def v2(address: str = CLIENT, *, command: int = 0x21, family: int = 0, more: bytes = b"", cut: int = 0) -> bytes:
    source = ipaddress.ip_address(address)
    rest = source.packed + ipaddress.ip_address("198.51.100.1" if source.version == 4 else "2001:db8::1").packed
    rest += struct.pack("!HH", 40000, 25) + more
    rest = rest[:len(rest) - cut]
    return SIGNATURE + struct.pack("!BBH", command, family or (0x11 if source.version == 4 else 0x21), len(rest)) + rest


def tls_field(flags: int) -> bytes:
    return struct.pack("!BHBL", 0x20, 5, flags, 0)


def summed(header: bytes, change: int = 0) -> bytes:
    """A version 2 header with a PP2_TYPE_CRC32C field in front of its others."""
    fields_at = 16 + 12
    length = struct.unpack_from("!H", header, 14)[0] + 7
    header = header[:14] + struct.pack("!H", length) + header[16:fields_at] + b"\x03\0\4" + bytes(4) + header[fields_at:]
    return header[:fields_at + 3] + struct.pack("!L", crc32c(header) ^ change) + header[fields_at + 7:]


# ---- the bytes

@pytest.mark.parametrize(("line", "origin"), [
    (V1, Origin(CLIENT)),
    (b"PROXY TCP6 2001:db8::7 2001:db8::1 1 25\r\n", Origin("2001:db8::7")),
    (b"PROXY TCP6 ::ffff:192.0.2.1 ::1 1 25\r\n", Origin("192.0.2.1")),
    (b"PROXY UNKNOWN\r\n", Origin()),
    (b"PROXY UNKNOWN ffff::1 ffff::2 1 2\r\n", Origin()),
])
def test_version_1(line: bytes, origin: Origin) -> None:
    assert parse_v1(line) == origin


@pytest.mark.parametrize("line", [
    b"PROXY TCP4 203.0.113.9 198.51.100.1 40000\r\n", b"PROXY TCP4 203.0.113.999 198.51.100.1 1 2\r\n",
    b"PROXY TCP4 ::1 ::1 1 2\r\n", b"PROXY TCP4 203.0.113.9 198.51.100.1 70000 25\r\n", b"PROXY UDP4 1.2.3.4 1.2.3.4 1 2\r\n",
    b"proxy TCP4 203.0.113.9 198.51.100.1 1 2\r\n", b"PROXY TCP4  203.0.113.9 198.51.100.1 1 2\r\n", b"PROXY \r\n",
    b"PROXY TCP4 203.0.113.9 198.51.100.1 1 2\n", b"PROXY TCP6 203.0.113.9 198.51.100.1 1 2\r\n",
])
def test_version_1_that_is_wrong(line: bytes) -> None:
    with pytest.raises(ProxyFault):
        parse_v1(line)


@given(st.binary(max_size=120))
def test_any_bytes_are_a_value_or_a_fault(data: bytes) -> None:
    """No other exception: it would end the task that lets connections in."""
    for attempt in (lambda: parse_v1(b"PROXY " + data + b"\r\n"), lambda: parse_v2(data[0], data[1], data[2:]),
                    lambda: parse_v2(0x21, 0x11, data), lambda: parse_v2(0x21, 0x21, data)):
        with contextlib.suppress(ProxyFault, IndexError):
            assert isinstance(attempt(), Origin)


def test_version_2_says_whether_the_client_speaks_tls() -> None:
    rest = v2(more=b"\x04\0\3abc" + tls_field(1))[16:]
    assert parse_v2(0x21, 0x11, rest) == Origin(CLIENT, tls=True)
    assert parse_v2(0x21, 0x11, v2(more=tls_field(0))[16:]) == Origin(CLIENT)
    assert parse_v2(0x20, 0x00, b"") == Origin(local=True)
    assert parse_v2(0x21, 0x31, bytes(216)) == Origin(), "a UNIX socket at the proxy: a client without an address"


def test_crc32c() -> None:
    """RFC 3720 appendix B.4; the check value of the polynomial."""
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)).to_bytes(4, "little").hex() == "aa36918a"


# ---- over the wire

@contextlib.asynccontextmanager
async def raw(server: RunningServer, header: bytes) -> AsyncIterator[Client]:
    reader, writer = await asyncio.open_connection(HOST, server.port)
    client = Client(reader, writer)
    try:
        client.send(header)
        yield client
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError, TimeoutError):
            await writer.wait_closed()


@pytest.mark.parametrize(("header", "peer", "loopback"), [
    (V1, CLIENT, False), (v2(), CLIENT, False), (v2("2001:db8::7"), "2001:db8::7", False),
    (v2("127.0.0.1"), "127.0.0.1", True),           # a program here, through a proxy here
    (v2(command=0x20), HOST, False),                # LOCAL: the proxy looks whether we are there; it is no client of this machine
    (b"PROXY UNKNOWN\r\n", "unknown", False), (summed(v2(more=tls_field(0))), CLIENT, False),
], ids=["v1", "v2", "v2-ipv6", "loopback", "local", "unknown", "sum"])
async def test_the_client_is_whom_the_proxy_names(header: bytes, peer: str, loopback: bool) -> None:
    """`loopback` opens doors: without a login, without TLS. It must be the client's, not the proxy's."""
    desk = RecordingDesk()
    async with serving(desk, proxies=TRUSTED) as server, raw(server, header + b"EHLO x\r\n") as client:
        assert (await client.reply()).startswith("220")
        assert ("AUTH" in await client.reply()) is loopback
        assert (desk.sessions[0].peer, desk.sessions[0].loopback) == (peer, loopback)


async def test_a_header_in_pieces_with_the_greeting_and_commands_behind_it() -> None:
    """Not a byte of what follows is lost."""
    desk = RecordingDesk()
    for header in (V1, v2(more=tls_field(1))):
        async with serving(desk, proxies=TRUSTED) as server, raw(server, b"") as client:
            data = header + b"EHLO x\r\nMAIL FROM:<a@a.example>\r\n"
            for at in range(0, len(data), 7):
                client.send(data[at:at + 7])
                await asyncio.sleep(0.001)
            assert [(await client.reply())[:3] for _ in range(3)] == ["220", "250", "250"]


@pytest.mark.parametrize("header", [
    b"EHLO mail.client.example\r\n", b"PROXY TCP4 nonsense\r\n", b"PROXY " + b"x" * 200, v2(cut=5), v2(command=0x31),
    v2(command=0x2f), v2(family=0x12), v2(more=b"\x20\0\xff"), SIGNATURE + b"\x21\x11\xff\xff" + bytes(3000),
    b"\r\n\r\n\0\r\nQUIX\n" + bytes(20), summed(v2(), change=1), v2(more=b"\x03\0\3abc"),
], ids=["none", "words", "long", "short", "version", "command", "datagram", "field", "oversized", "signature",
        "sum", "short-sum"])
async def test_a_listed_proxy_without_a_right_header_gets_nothing(header: bytes) -> None:
    """Not even a greeting: the client behind it would be taken for the proxy."""
    desk = RecordingDesk()
    async with serving(desk, proxies=TRUSTED) as server, raw(server, header) as client:
        assert await client.at_end()
        assert desk.sessions == []
        assert len(server.connections) == 0


@pytest.mark.parametrize("header", [b"", V1[:20], v2()[:14], v2()[:20]], ids=["none", "v1", "head", "addresses"])
async def test_a_header_that_does_not_come(monkeypatch: pytest.MonkeyPatch, header: bytes) -> None:
    monkeypatch.setattr(gate, "PROXY_SECONDS", 0.1)
    async with serving(RecordingDesk(), proxies=TRUSTED) as server, raw(server, header) as client:
        assert await client.at_end()


@pytest.mark.parametrize("header", [V1, v2()], ids=["v1", "v2"])
async def test_a_header_from_anybody_else_is_not_believed(header: bytes) -> None:
    """A client that names another address for itself: to be loopback, or in the right network."""
    desk = RecordingDesk()
    async with serving(desk, proxies=Networks(["192.0.2.77"])) as server, raw(server, header) as client:
        assert (await client.reply()).startswith("220")
        assert (await client.reply()).startswith("500")
        await until(lambda: len(server.connections) == 1)
        assert desk.sessions == []
        [connection] = server.connections._open
        assert connection.client.peer == HOST   # type: ignore[attr-defined]


@pytest.mark.parametrize("header", [V1, v2()], ids=["v1", "v2"])
async def test_in_front_of_tls_from_the_first_byte(lab: Lab, header: bytes) -> None:
    desk = RecordingDesk()
    config = ListenerConfig(host=HOST, tls="tls", certificate=lab.certificate, certificate_key=lab.key, proxies=(HOST,))
    settings = server_settings(config, LimitsConfig(), "mx.test.example")
    async with serving(desk, settings) as server:
        async with raw(server, header) as client:
            await client.writer.start_tls(lab.client_tls(), server_hostname="localhost")
            assert (await client.reply()).startswith("220")
            assert "AUTH" in await client.ask("EHLO x")
            assert (desk.sessions[0].peer, desk.sessions[0].tls) == (CLIENT, True)
        with pytest.raises((OSError, EOFError)):    # TLS at once: a listed proxy must say for whom
            await asyncio.open_connection(HOST, server.port, ssl=lab.client_tls(), server_hostname="localhost")


async def test_in_front_of_starttls(lab: Lab) -> None:
    desk = RecordingDesk()
    config = ListenerConfig(host=HOST, tls="starttls", certificate=lab.certificate, certificate_key=lab.key, proxies=(HOST,))
    async with serving(desk, server_settings(config, LimitsConfig(), "mx")) as server, raw(server, v2()) as client:
        assert (await client.reply()).startswith("220")
        assert "STARTTLS" in await client.ask("EHLO x")
        assert (await client.ask("MAIL FROM:<a@a.example>")).startswith("530"), "the client is not on this machine, its proxy is"
        assert (await client.ask("STARTTLS")).startswith("220")
        await client.writer.start_tls(lab.client_tls(), server_hostname="localhost")
        await client.begin()
        assert (desk.sessions[-1].peer, desk.sessions[-1].tls) == (CLIENT, True)


@pytest.mark.parametrize("flags", [1, 0])
async def test_tls_that_ends_at_a_proxy_on_this_machine(flags: int) -> None:
    """Then a password may be sent: the way to the proxy was encrypted, and the rest is this machine. Not without it."""
    async with serving(RecordingDesk(), proxies=TRUSTED) as server, raw(server, v2(more=tls_field(flags))) as client:
        await client.reply()
        assert ("AUTH" in await client.ask("EHLO x")) is bool(flags)


async def test_networks_are_those_of_the_client_behind_the_proxy() -> None:
    settings: dict[str, Any] = {"proxies": TRUSTED, "networks": Networks(["203.0.113.0/24"])}
    async with serving(RecordingDesk(), **settings) as server:
        for header, code in ((v2(), "220"), (v2("192.0.2.1"), "554"), (b"PROXY UNKNOWN\r\n", "554"), (v2(command=0x20), "220")):
            async with raw(server, header) as client:
                said = await client.reply()
                assert said.startswith(code)
                assert said == "" or code == "220" or await client.at_end()


async def test_connections_that_are_on_their_way_in_are_bounded(lab: Lab) -> None:
    """Who opens sockets and says nothing takes no more places than there are; others come in as soon as one is free."""
    config = ListenerConfig(host=HOST, tls="tls", certificate=lab.certificate, certificate_key=lab.key)
    async with serving(RecordingDesk(), server_settings(config, LimitsConfig(), "mx"), connections=5) as server:
        silent = [await asyncio.open_connection(HOST, server.port) for _ in range(5)]
        await until(lambda: server.listener._server.entering == 5)    # type: ignore[union-attr]
        reader, writer = await asyncio.open_connection(HOST, server.port)
        assert await reader.read() == b"", "one too many: closed"
        writer.close()
        for _, held in silent[:2]:
            held.transport.abort()
        await until(lambda: server.listener._server.entering == 3)    # type: ignore[union-attr]
        reader, writer = await asyncio.open_connection(HOST, server.port, ssl=lab.client_tls(), server_hostname="localhost")
        assert (await reader.readline()).startswith(b"220")
        writer.close()
        for _, held in silent:
            held.transport.abort()


@pytest.mark.parametrize("tls", ["tls", "starttls"])
async def test_a_handshake_that_never_ends_makes_room(lab: Lab, tls: Any) -> None:
    """All places are taken by clients of one address that begin TLS and say no more: one from another address has its place."""
    config = ListenerConfig(host=HOST, tls=tls, certificate=lab.certificate, certificate_key=lab.key)
    async with serving(RecordingDesk(), server_settings(config, LimitsConfig(), "mx"), connections=5) as server:
        silent = [await asyncio.open_connection(HOST, server.port, local_addr=("127.0.0.7", 0)) for _ in range(5)]
        if tls == "tls":
            await until(lambda: server.listener._server.entering == 5)    # type: ignore[union-attr]
        for reader, held in silent if tls == "starttls" else ():
            held.write(b"EHLO x\r\nSTARTTLS\r\n")
            await reader.readuntil(b"220 2.0.0 Ready to start TLS\r\n")
        encrypted: dict[str, Any] = {"ssl": lab.client_tls(), "server_hostname": "localhost"} if tls == "tls" else {}
        for _ in range(3):
            async with asyncio.timeout(20):
                reader, writer = await asyncio.open_connection(HOST, server.port, **encrypted)
                assert (await reader.readline()).startswith(b"220")
                writer.transport.abort()
        gone = [reader for reader, _ in silent if reader.at_eof() or reader.exception() is not None]
        assert 1 <= len(gone) <= 3
        for _, held in silent:
            held.transport.abort()


async def test_a_client_behind_a_proxy_cannot_take_all_places_with_handshakes(lab: Lab) -> None:
    config = ListenerConfig(host=HOST, tls="tls", certificate=lab.certificate, certificate_key=lab.key, proxies=(HOST,))
    async with serving(RecordingDesk(), server_settings(config, LimitsConfig(), "mx"), connections=10) as server:
        server.connections.per_client = 3
        async with raw(server, V1), raw(server, V1), raw(server, V1):
            await until(lambda: server.listener._server.entering == 3)    # type: ignore[union-attr]
            async with raw(server, V1) as client:
                assert await client.at_end(), "a fourth of the same client"


async def test_a_client_that_leaves_during_the_header_ends_nothing() -> None:
    desk = RecordingDesk()
    async with serving(desk, proxies=TRUSTED) as server:
        for header in (b"", b"PROXY", V1[:-1], SIGNATURE):
            async with raw(server, header):
                pass
        async with raw(server, V1) as client:
            assert (await client.reply()).startswith("220")
