"""LMTP as a server (RFC 2033): LHLO only, and one answer for each recipient, whatever goes wrong after DATA."""

from __future__ import annotations

from typing import Any

from lab.wire import RecordingDesk, connected, serving
from malote.errors import MaloteError, Reply
from malote.smtp.lmtp import Replies

MESSAGE = b"From: a@a.example\r\n\r\ntext\r\n.\r\n"


async def opened(client: Any, *recipients: str) -> None:
    assert (await client.ask("LHLO client.test.example")).startswith("250")
    assert (await client.ask("MAIL FROM:<a@a.example>")).startswith("250")
    for recipient in recipients:
        assert (await client.ask(f"RCPT TO:<{recipient}>")).startswith("250")


async def test_each_recipient_has_an_answer_of_its_own() -> None:
    """RFC 2033 4.2: in the order of RCPT."""
    desk = RecordingDesk()

    async def data(*_: object) -> Reply:
        return Replies(451, "4.0.0", "mixed", each=(Reply(250, "2.0.0", "one"), Reply(452, "4.2.2", "two")))
    desk.on_data = data
    async with serving(desk, lmtp=True) as server, connected(server) as client:
        await opened(client, "b@b.example", "c@b.example")
        assert (await client.ask("DATA")).startswith("354")
        client.send(MESSAGE)
        assert [await client.reply(), await client.reply()] == ["250 2.0.0 one", "452 4.2.2 two"]
        assert (await client.ask("NOOP")).startswith("250")


async def test_what_the_server_itself_refuses_is_said_to_each() -> None:
    """A client that waits for two answers and gets one would hang, or take the next reply for the second."""
    async with serving(RecordingDesk(), lmtp=True, max_message_bytes=64) as server, connected(server) as client:
        for body, code in ((b"bare\nline\r\n.\r\n", 550), (b"x" * 100 + b"\r\n.\r\n", 552)):
            await opened(client, "b@b.example", "c@b.example")
            assert (await client.ask("DATA")).startswith("354")
            client.send(body)
            assert await client.codes(2) == [code, code]
        assert (await client.ask("NOOP")).startswith("250")


async def test_a_fault_of_the_desk_is_said_to_each() -> None:
    for error, code in ((MaloteError(reply=Reply(554, "5.4.6", "loop")), 554), (ValueError("secret"), 451)):
        desk = RecordingDesk()

        async def data(*_: object, error: Exception = error) -> Reply:
            raise error
        desk.on_data = data
        async with serving(desk, lmtp=True) as server, connected(server) as client:
            await opened(client, "b@b.example", "c@b.example", "d@b.example")
            assert (await client.ask("DATA")).startswith("354")
            client.send(MESSAGE)
            assert await client.codes(3) == [code] * 3
            assert (await client.ask("NOOP")).startswith("250")


async def test_chunks_have_one_answer_each_and_the_last_one_for_each_recipient() -> None:
    async with serving(RecordingDesk(), lmtp=True) as server, connected(server) as client:
        await opened(client, "b@b.example", "c@b.example")
        client.send(b"BDAT 6\r\nFrom: ")
        assert await client.codes(1) == [250]
        client.send(b"BDAT 5 LAST\r\na@b\r\n")
        assert await client.codes(2) == [250, 250]


async def test_without_a_recipient_there_is_one_refusal() -> None:
    async with serving(RecordingDesk(), lmtp=True) as server, connected(server) as client:
        await opened(client)
        assert (await client.ask("DATA")).startswith("503")
        assert (await client.ask("NOOP")).startswith("250")


async def test_ehlo_and_helo_are_no_commands_of_lmtp_nor_lhlo_of_smtp() -> None:
    """RFC 2033 4.1: an SMTP client that ended up here would take one answer for all recipients."""
    async with serving(RecordingDesk(), lmtp=True) as server, connected(server) as client:
        assert (await client.ask("EHLO client.test.example")).startswith("500")
        assert (await client.ask("HELO client.test.example")).startswith("500")
        assert (await client.ask("MAIL FROM:<a@a.example>")).startswith("503")
    async with serving(RecordingDesk()) as server, connected(server) as client:
        assert (await client.ask("LHLO client.test.example")).startswith("500")
