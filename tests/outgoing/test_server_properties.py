"""Whatever bytes come: a value or a refusal, never another exception, and nothing changed on the way through."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lab.wire import Client, RecordingDesk, connected, serving
from malote.errors import FormatError, Reply
from malote.smtp.auth import AuthFault, parse_auth
from malote.smtp.data import END, clean_lines, find_end, stuff, unstuff
from malote.smtp.path import PathRefused, check_mail_parameters, check_rcpt_parameters, parse_path
from malote.smtp.replies import ReplyFault, ReplyParser
from malote.smtp.wire import encode_reply

EXTENSIONS = frozenset({"8BITMIME", "SMTPUTF8", "DSN", "REQUIRETLS"})
PIECES = [b".", b"\r\n", b"\r", b"\n", b"\0", b"x", b"\xff", b".\r\n", b"\r\n.\r\n"]
pieces = st.lists(st.sampled_from(PIECES), max_size=30).map(b"".join)


@given(pieces | st.binary(max_size=200))
def test_stuffing_round_trip(content: bytes) -> None:
    """What the client's dot-stuffing made, the server undoes; and the end is found at the end, nowhere before."""
    wire = bytearray(b"\r\n") + stuff(content) + b".\r\n"
    end = find_end(wire, 0)
    assert end == len(wire) - len(END)
    del wire[end + 2:]
    expected = content if not content or content.endswith(b"\r\n") else content + b"\r\n"
    assert unstuff(wire) == expected


@given(pieces)
def test_clean_lines_refuses_or_leaves_nothing_bare(content: bytes) -> None:
    normal = clean_lines(bytearray(content), normalise=True)
    rest = normal.replace(b"\r\n", b"")
    assert b"\r" not in rest
    assert b"\n" not in rest
    assert b"\0" not in rest
    if normal == content:
        assert clean_lines(bytearray(content), normalise=False) == content
    else:
        with pytest.raises(FormatError):
            clean_lines(bytearray(content), normalise=False)
    assert clean_lines(normal, normalise=False) == normal


@given(st.text(max_size=80) | st.from_regex(r"FROM:<[a@.\"\\<> ]{0,20}>( [A-Z]{1,4}=?[0-9=+;]{0,4}){0,3}", fullmatch=True))
@example("FROM:<" + '"' * 12_000)
@example("FROM:<" + "a." * 6_000 + "@a>")
@example("FROM:<" + '"\\' * 6_000)
@example("FROM:<a@" + "a-" * 6_000 + ">")
def test_paths(argument: str) -> None:
    for keyword in ("FROM:", "TO:"):
        try:
            address, parameters = parse_path(argument, keyword)
            assert not set(address) & set("\r\n\0 <>") or address.startswith('"')
            check_mail_parameters(address, parameters, EXTENSIONS)
            check_rcpt_parameters(address, parameters, EXTENSIONS, smtputf8=False)
            assert address.isascii()
        except PathRefused as refusal:
            code = refusal.reply.code
        else:
            code = 501
        assert code in (501, 553, 555)


@given(st.text(max_size=80))
def test_auth_arguments(argument: str) -> None:
    try:
        mechanism, _ = parse_auth(argument)
    except AuthFault as fault:
        mechanism, code = "", fault.reply.code
    else:
        code = 501
    assert code == 501
    assert " " not in mechanism


@given(st.binary(max_size=200), st.integers(0, 200))
def test_replies_do_not_depend_on_chunks(data: bytes, split: int) -> None:
    def parsed(*chunks: bytes) -> list[Reply] | None:
        parser = ReplyParser()
        try:
            return [reply for chunk in chunks for reply in parser.feed(chunk)]
        except ReplyFault:
            return None

    assert parsed(data) == parsed(data[:split], data[split:])


@given(st.integers(200, 599), st.text(max_size=80))
def test_a_reply_is_one_reply_on_the_wire(code: int, text: str) -> None:
    """A text from anywhere cannot bring a second reply with it."""
    assert [reply.code for reply in ReplyParser().feed(encode_reply(Reply(code, "", text)))] == [code]


@given(st.text(max_size=3000) | st.text("ab ä€𝄞", min_size=400, max_size=3000))
def test_no_line_of_a_reply_is_too_long(text: str) -> None:
    """smtplib raises on lines above 8192 octets, other programs above 512: a 550 that names many recipients has several."""
    wire = encode_reply(Reply(550, "5.7.1", text))
    assert max(len(line) + 2 for line in wire.split(b"\r\n")) <= 512
    challenge = encode_reply(Reply(334, "", "QUFB" * 2000))
    assert challenge == b"334 " + b"QUFB" * 2000 + b"\r\n"


COMMANDS = [
    b"EHLO x\r\n", b"HELO x\r\n", b"MAIL FROM:<a@a.example>\r\n", b"RCPT TO:<b@b.example>\r\n", b"DATA\r\n", b"x\r\n.\r\n",
    b".\r\n", b"BDAT 3 LAST\r\nx\r\n", b"BDAT 2\r\nab", b"RSET\r\n", b"NOOP\r\n", b"AUTH PLAIN AGEAYg==\r\n", b"AUTH LOGIN\r\n",
    b"*\r\n", b"\r\n", b"\n", b"\0\xff\r\n", b"VRFY\r\n", b"HELP\r\n", b"EXPN\r\n", b"STARTTLS\r\n", b"x" * 20_000 + b"\r\n",
]


@given(st.lists(st.sampled_from(COMMANDS), max_size=25))
def test_any_order_of_commands_is_answered(commands: list[bytes]) -> None:
    """Every conversation ends, no answer says 'local error', no memory stays charged."""
    async def talk() -> None:
        async with serving(RecordingDesk()) as server:
            async with connected(server) as client:
                await converse(client, b"".join(commands))
            await asyncio.wait_for(server.desk.closed.wait(), 10)
            assert server.budget.used_bytes == 0

    asyncio.run(talk())


async def converse(client: Client, stream: bytes) -> None:
    client.send(stream)
    client.writer.write_eof()
    async with asyncio.timeout(10):
        output = await client.reader.read()
    assert b"4.3.0" not in output
    for line in output.splitlines():
        assert line[:3].isdigit()
