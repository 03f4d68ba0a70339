"""Message bytes through the server: nothing smuggled, nothing changed, never too much memory, and the proof of a read reply."""

from __future__ import annotations

import asyncio
import random
import socket
import ssl
from typing import Any

import pytest
from aiosmtpd.smtp import SMTP

from lab.servers import Lab
from lab.wire import EVERYTHING, HOST, Client, RecordingDesk, connected, serving, until
from malote.errors import Reply
from malote.outgoing.sizes import largest_original
from malote.smtp.budget import MEMORY_FACTOR, MemoryBudget
from malote.smtp.desk import ClientSession, Offer

# What another server may take for the end of data; followed by what the attacker wants it to read as commands.
NOT_THE_END = [b"\n.\n", b"\n.\r\n", b"\r\n.\n", b"\r.\r", b"\r\n.\r", b"\r.\r\n", b"\n.\r", b"\r\n\x00.\r\n", b"\r\x00\n.\r\n"]
ENVELOPE = b"MAIL FROM:<a@a.example>\r\nRCPT TO:<b@b.example>\r\n"
SMUGGLED = b"MAIL FROM:<evil@evil.example>\r\nRCPT TO:<b@b.example>\r\nDATA\r\nevil\r\n.\r\n"


class TestSmuggling:
    @pytest.mark.parametrize("sequence", NOT_THE_END)
    async def test_is_refused_whole_at_every_split(self, sequence: bytes) -> None:
        """One message was sent, one refusal comes; nothing behind the sequence is ever a command."""
        body = b"a" + sequence + b"MAIL FROM:<evil@evil.example>\r\n.\r\n"
        async with serving(RecordingDesk()) as server, connected(server) as client:
            await client.ask("EHLO x")
            for split in range(1, len(body)):
                await client.to_354()
                client.send(body[:split])
                await asyncio.sleep(0)
                client.send(body[split:])
                assert (await client.reply()).startswith("550 5.6.11")
            assert {event[1] for event in server.desk.events if event[0] == "mail"} == {"a@a.example"}
            assert server.desk.messages == []

    @pytest.mark.parametrize("sequence", NOT_THE_END)
    async def test_is_harmless_when_normalised(self, sequence: bytes) -> None:
        async with serving(RecordingDesk(), normalise=True) as server, connected(server) as client:
            await client.begin()
            assert (await client.ask(b"a" + sequence + SMUGGLED.removesuffix(b"\r\n"))).startswith("250")
            [message] = server.desk.messages
            assert message.replace(b"\r\n", b"").isascii()
            assert b"\r" not in message.replace(b"\r\n", b"")
            assert b"\n" not in message.replace(b"\r\n", b"")
            assert b"\0" not in message
            assert b"evil" in message       # as text of the one message

    async def test_commands_need_crlf(self) -> None:
        async with serving(RecordingDesk()) as server, connected(server) as client:
            await client.ask("EHLO x")
            client.send(b"MAIL FROM:<evil@evil.example>\n")
            assert (await client.reply()).startswith("500 5.5.2")
            assert server.desk.events == []


class StockHandler:
    def __init__(self) -> None:
        self.messages: list[bytes] = []

    async def handle_DATA(self, _server: Any, _session: Any, envelope: Any) -> str:  # noqa: N802 - aiosmtpd's name
        self.messages.append(envelope.content)
        return "250 ok"


async def test_data_equals_stock_aiosmtpd_in_random_chunks() -> None:
    """Dots, empty lines, ends of data in pieces, commands pipelined behind: the same messages as the line-by-line reader."""
    rng = random.Random(20261124)
    pieces = [b".", b"..", b"\r\n", b"\r\n.", b"\r\n..", b"text", b".\r\n", b"\xff\xe9", b"x" * 200, b"\r\n\r\n", b" . "]
    messages = []
    for _ in range(150):
        body = b"".join(rng.choices(pieces, k=rng.randrange(12)))
        stuffed = body.replace(b"\r\n.", b"\r\n..")
        end = b"" if not body or body.endswith(b"\r\n") else b"\r\n"
        messages.append((b"." if body.startswith(b".") else b"") + stuffed + end)
    stream = b"EHLO x\r\n" + b"".join(
        b"MAIL FROM:<a@a.example>\r\nRCPT TO:<b@b.example>\r\nDATA\r\n" + message + b".\r\nNOOP\r\n" for message in messages)
    handler, loop = StockHandler(), asyncio.get_running_loop()
    stock = await loop.create_server(lambda: SMTP(handler, loop=loop, hostname="stock", ident="x"), HOST, 0)
    async with serving(RecordingDesk()) as server:
        for port in (server.port, stock.sockets[0].getsockname()[1]):
            reader, writer = await asyncio.open_connection(HOST, port)
            writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            at = 0
            while at < len(stream):
                size = rng.choice((1, 2, 3, 5, 7, 50, 300, 4000))
                writer.write(stream[at:at + size])
                at += size
                await asyncio.sleep(0)
            writer.write(b"QUIT\r\n")
            async with asyncio.timeout(60):
                assert b"221" in await reader.read()
            writer.close()
        assert len(server.desk.messages) == len(messages)
        assert server.desk.messages == handler.messages
    stock.close()


async def test_40_megabytes_arrive_unchanged() -> None:
    message = random.Random(4).randbytes(1 << 16).replace(b"\n", b"").replace(b"\r", b"").replace(b"\0", b"") * 8
    message = b"\r\n".join([message] * 80) + b"\r\n"
    assert len(message) > 40_000_000
    async with serving(RecordingDesk()) as server, connected(server) as client:
        await client.begin()
        assert (await client.ask(message.replace(b"\r\n.", b"\r\n..") + b".")).startswith("250")
        assert server.desk.messages == [message]
        assert server.budget.used_bytes == 0


class TestSize:
    async def test_ehlo_offers_the_smaller_limit_and_keeps_to_it(self) -> None:
        desk = RecordingDesk(Offer(size=1000))
        async with serving(desk, max_message_bytes=5000) as server, connected(server) as client:
            assert "250-SIZE 1000" in await client.ask("EHLO x")
            assert (await client.ask("MAIL FROM:<a@a.example> SIZE=1001")).startswith("552 5.3.4")
            for length, code in ((1000, "250"), (1001, "552 5.3.4"), (1600, "552 5.3.4"), (4000, "552 5.3.4")):
                await client.to_354()
                assert (await client.ask(b"x" * (length - 2) + b"\r\n.")).startswith(code)
            await client.to_354()       # dots that are only there for the wire do not count
            assert (await client.ask(b"..\r\n" * 333 + b".")).startswith("250")
            assert [len(message) for message in desk.messages] == [1000, 999]

    async def test_who_sends_on_and_on_is_cut_off(self) -> None:
        async with serving(RecordingDesk(), max_message_bytes=100_000) as server, connected(server) as client:
            await client.begin()
            client.send(b"x\r\n" * 200_000)
            assert (await client.reply()).startswith("421")
            assert server.budget.used_bytes == 0

    def test_sealed_form_fits_the_upstream(self) -> None:
        """The formula against its own parts: base64 in lines, padding, one blob per recipient."""
        for upstream in (10_000_000, 35_882_577, 157_286_400):
            size = largest_original(upstream, 100)
            sealed = size * 1.03 * 78 / 57 + 64 * 1024 + 100 * 2400
            assert upstream * 0.99 < sealed <= upstream
        assert largest_original(0) == 0
        assert largest_original(1000) == 1


class TestBdat:
    async def test_chunks_make_one_message(self) -> None:
        async with serving(RecordingDesk()) as server, connected(server) as client:
            assert "250-CHUNKING" in await client.ask("EHLO x")
            assert "BINARYMIME" not in await client.ask("EHLO x")
            client.send(ENVELOPE + b"BDAT 7\r\n.hello\rBDAT 9\r\n\n\r\n.\r\nendBDAT 0 LAST\r\nNOOP\r\n")
            assert await client.codes(6) == [250, 250, 250, 250, 250, 250]
            assert server.desk.messages == [b".hello\r\n\r\n.\r\nend"]

    async def test_octets_of_a_refused_chunk_are_no_commands(self) -> None:
        async with serving(RecordingDesk()) as server, connected(server) as client:
            await client.ask("EHLO x")
            evil = b"MAIL FROM:<evil@evil.example>\r\n"
            client.send(b"BDAT %d LAST\r\n" % len(evil) + evil + b"NOOP\r\n")
            assert await client.codes(2) == [503, 250]
            assert server.desk.events == []

    async def test_too_big_and_bare_line_ends(self) -> None:
        async with serving(RecordingDesk(), max_message_bytes=1000) as server, connected(server) as client:
            await client.ask("EHLO x")
            client.send(b"MAIL FROM:<a@a.example>\r\nRCPT TO:<b@b.example>\r\n"
                        b"BDAT 600\r\n" + b"x" * 600 + b"BDAT 600\r\n" + b"x" * 600 + b"BDAT 3 LAST\r\nx\r\nNOOP\r\n")
            assert await client.codes(6) == [250, 250, 250, 552, 503, 250]
            client.send(b"MAIL FROM:<a@a.example>\r\nRCPT TO:<b@b.example>\r\nBDAT 4 LAST\r\nx\ny\r")
            assert await client.codes(3) == [250, 250, 550]
            assert server.budget.used_bytes == 0
            assert server.desk.messages == []

    async def test_data_and_bdat_do_not_mix_and_nonsense_ends_it(self) -> None:
        async with serving(RecordingDesk()) as server, connected(server) as client:
            await client.ask("EHLO x")
            client.send(ENVELOPE + b"BDAT 1\r\nxDATA\r\nRCPT TO:<c@c.example>\r\nBDAT x\r\n")
            assert await client.codes(6) == [250, 250, 250, 503, 503, 421]
            assert server.desk.messages == []


class TestMemoryBudget:
    async def test_above_it_452_and_all_is_given_back(self) -> None:
        """Of 20 clients that send 1 MB at once, those that fit are taken; the others are told to come back."""
        desk = RecordingDesk()
        release = asyncio.Event()

        async def hold(*_: Any) -> Reply:
            await release.wait()
            return Reply(250, "2.0.0", "ok")

        desk.on_data = hold
        fits = 4
        message = b"x" * 998 + b"\r\n"
        async with serving(desk, budget=fits * 1_000_000 * MEMORY_FACTOR + 100_000) as server:
            async def one() -> str:
                async with connected(server) as client:
                    await client.begin()
                    return await client.ask(message * 1000 + b".")

            tasks = [asyncio.create_task(one()) for _ in range(20)]
            await until(lambda: sum(task.done() for task in tasks) + len(desk.messages) == 20)
            assert server.budget.used_bytes <= server.budget.total_bytes
            refused = [task.result() for task in tasks if task.done()]
            assert set(refused) == {"452 4.3.1 Too much mail at once, try again later"}
            assert 1 <= len(desk.messages) <= fits
            release.set()
            assert [reply[:3] for reply in await asyncio.gather(*tasks)].count("250") == len(desk.messages)
            assert server.budget.used_bytes == 0

    async def test_announced_size_is_refused_early_but_reserves_nothing(self) -> None:
        async with serving(RecordingDesk(), budget=10_000 * MEMORY_FACTOR) as server, connected(server) as client:
            await client.ask("EHLO x")
            assert (await client.ask("MAIL FROM:<a@a.example> SIZE=10001")).startswith("452 4.3.1")
            assert (await client.ask("MAIL FROM:<a@a.example> SIZE=9999")).startswith("250")
            assert server.budget.used_bytes == 0

    async def test_a_vanished_client_gives_back(self) -> None:
        async with serving(RecordingDesk()) as server:
            async with connected(server) as client:
                await client.begin()
                client.send(b"x" * 100_000)
                await until(lambda: server.budget.used_bytes > 400_000)
            await until(lambda: server.budget.used_bytes == 0)
            assert server.desk.messages == []
            assert server.desk.names == ["mail", "rcpt", "reset", "close"]

    async def test_nothing_is_taken_from_a_client_that_reads_no_replies(self) -> None:
        """What came while its own replies were stuck was in memory without being counted."""
        async with serving(RecordingDesk()) as server, connected(server) as client:
            await client.begin()
            [connection] = server.connections._open
            connection.pause_writing()      # as the event loop does when the replies fill the socket
            client.send(b"x\r\n")
            await asyncio.sleep(0.1)
            client.writer.write(b"y" * (8 << 20))
            await asyncio.sleep(0.3)
            assert len(connection._buffer) < 1 << 20
            assert server.budget.used_bytes == 0
            connection.resume_writing()
            assert (await client.ask(b"\r\n.")).startswith("250")
            assert server.desk.messages == [b"x\r\n" + b"y" * (8 << 20) + b"\r\n"]

    def test_never_above_the_total(self) -> None:
        budget = MemoryBudget(100, factor=2)
        assert budget.charge(50)
        assert not budget.charge(1)
        budget.release(50)
        assert budget.used_bytes == 0


class TestProofOfARead:
    """Only a command sent after the 250 was written proves that it was read: then the journal may forget."""

    async def test_the_next_command_proves(self) -> None:
        async with serving(RecordingDesk()) as server, connected(server) as client:
            await client.begin()
            assert (await client.ask(b"x\r\n.")).startswith("250")
            assert "read" not in server.desk.names
            await client.ask("QUIT")
            await until(lambda: "close" in server.desk.names)
            assert server.desk.names[-2:] == ["read", "close"]

    @pytest.mark.parametrize("tail", [b"QUIT\r\n", b"QUI", b"MAIL FROM:<a@a.example>\r\nQUIT\r\n", b""])
    async def test_what_was_pipelined_proves_nothing_nor_does_fin(self, tail: bytes) -> None:
        async with serving(RecordingDesk()) as server:
            async with connected(server) as client:
                await client.begin()
                client.send(b"x\r\n.\r\n" + tail)
                assert (await client.reply()).startswith("250")
                if tail == b"QUI":
                    client.send(b"T\r\n")
                    await client.reply()
            await asyncio.wait_for(server.desk.closed.wait(), 10)
            assert "read" not in server.desk.names

    async def test_bytes_that_wait_in_the_kernel_prove_nothing(self) -> None:
        """The QUIT arrived while the desk kept the loop busy: it is read after our 250 and was sent before it."""
        desk = RecordingDesk()
        async with serving(desk) as server:
            sock = socket.create_connection((HOST, server.port))

            async def busy(*_: Any) -> Reply:
                sock.sendall(b"QUIT\r\n")       # arrives at once (loopback), and the loop cannot read it before this returns
                return Reply(250, "2.0.0", "ok")

            desk.on_data = busy
            sock.sendall(b"EHLO x\r\nMAIL FROM:<a@a.example>\r\nRCPT TO:<b@b.example>\r\nDATA\r\nx\r\n.\r\n")
            await asyncio.wait_for(desk.closed.wait(), 10)
            assert desk.messages == [b"x\r\n"]
            assert "read" not in desk.names
            sock.close()

    async def test_over_tls(self, lab: Lab) -> None:
        """Encrypted bytes in the kernel cannot be counted: the same rules hold."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(lab.certificate, lab.key)
        options = {"ssl": lab.client_tls(), "server_hostname": "localhost"}
        async with serving(RecordingDesk(), tls_context=context, implicit_tls=True) as server:
            async with connected(server, **options) as client:
                await client.begin()
                assert (await client.ask(b"x\r\n.")).startswith("250")
                await client.ask("QUIT")
            await until(lambda: "close" in server.desk.names)
            assert server.desk.names.count("read") == 1
            async with connected(server, **options) as client:
                await client.begin()
                client.send(b"x\r\n.\r\nQUIT\r\n")
                assert await client.codes(2) == [250, 221]
            await until(lambda: server.desk.names.count("close") == 2)
            assert server.desk.names.count("read") == 1

    async def test_a_later_command_proves_after_pipelined_ones(self) -> None:
        async with serving(RecordingDesk()) as server, connected(server) as client:
            await client.begin()
            client.send(b"x\r\n.\r\nNOOP\r\nNOOP\r\n")
            assert await client.codes(3) == [250, 250, 250]
            assert "read" not in server.desk.names
            await client.ask("NOOP")
            await client.ask("NOOP")
            assert server.desk.names.count("read") == 1


class TestExtensions:
    async def test_ehlo_reflects_what_the_upstream_offers(self) -> None:
        async with serving(RecordingDesk(Offer())) as server, connected(server) as client:
            lines = (await client.ask("EHLO x")).split("\n")
            assert [line[4:] for line in lines] == [
                "mx.test.example", "PIPELINING", f"SIZE {50 << 20}", "ENHANCEDSTATUSCODES", "CHUNKING"]
            for parameter in ("BODY=8BITMIME", "SMTPUTF8", "RET=HDRS", "ENVID=x", "REQUIRETLS", "BOGUS=1"):
                assert (await client.ask(f"MAIL FROM:<a@a.example> {parameter}")).startswith("555 5.5.4")
            server.desk.offered = EVERYTHING
            for word in ("8BITMIME", "SMTPUTF8", "DSN", "AUTH PLAIN LOGIN XOAUTH2"):
                assert word in await client.ask("EHLO x")

    async def test_dsn_parameters_arrive_verbatim_per_recipient(self) -> None:
        async with serving(RecordingDesk()) as server, connected(server) as client:
            await client.ask("EHLO x")
            await client.ask("mail from:<a@a.example> ret=HDRS envid=QQ314159+2B body=8bitmime size=100")
            await client.ask("rcpt to:<b@b.example> notify=SUCCESS,FAILURE orcpt=rfc822;B+2Bc@b.example")
            await client.ask("RCPT TO:<c@c.example> NOTIFY=never")
            assert server.desk.events == [
                ("mail", "a@a.example", {"RET": "HDRS", "ENVID": "QQ314159+2B", "BODY": "8bitmime", "SIZE": "100"}),
                ("rcpt", "b@b.example", {"NOTIFY": "SUCCESS,FAILURE", "ORCPT": "rfc822;B+2Bc@b.example"}),
                ("rcpt", "c@c.example", {"NOTIFY": "never"}),
            ]

    async def test_the_same_parameter_twice_is_harmless(self) -> None:
        """smtplib's send_message adds BODY=8BITMIME to that of its caller."""
        async with serving(RecordingDesk()) as server, connected(server) as client:
            await client.ask("EHLO x")
            assert (await client.ask("MAIL FROM:<a@a.example> BODY=8BITMIME SMTPUTF8 BODY=8BITMIME")).startswith("250")
            assert server.desk.events == [("mail", "a@a.example", {"BODY": "8BITMIME", "SMTPUTF8": True})]

    @pytest.mark.parametrize("parameters", [
        "SIZE=x", "SIZE", "SIZE=1 SIZE=2", "BODY=BINARYMIME", "RET=ALL",
        "ENVID=" + "x" * 101, "ENVID=+zz", "SMTPUTF8=1", "SIZE=1=2", "=",
    ])
    async def test_bad_parameters(self, parameters: str) -> None:
        async with serving(RecordingDesk()) as server, connected(server) as client:
            await client.ask("EHLO x")
            assert (await client.ask(f"MAIL FROM:<a@a.example> {parameters}")).startswith("501")
            assert server.desk.events == []

    async def test_pipelined_recipients_run_together_and_answer_in_order(self) -> None:
        """The first is the slowest: the upstream round trips overlap, the replies do not change places."""
        desk = RecordingDesk()
        running: list[str] = []
        together = asyncio.Event()

        async def rcpt(_session: ClientSession, address: str, _params: Any) -> Reply:
            running.append(address)
            if len(running) == 3:
                together.set()
            await together.wait()
            if address == "0@b.example":
                await asyncio.sleep(0.05)
            return Reply(550 if address == "1@b.example" else 250, "5.1.1" if address == "1@b.example" else "2.1.5", address)

        desk.on_rcpt = rcpt
        async with serving(desk) as server, connected(server) as client:
            await client.ask("EHLO x")
            recipients = b"".join(b"RCPT TO:<%d@b.example>\r\n" % number for number in range(3))
            client.send(b"MAIL FROM:<a@a.example>\r\n" + recipients + b"DATA\r\n")
            assert await client.codes(1) == [250]
            assert [await client.reply() for _ in range(3)] == [
                "250 2.1.5 0@b.example", "550 5.1.1 1@b.example", "250 2.1.5 2@b.example"]
            assert running == ["0@b.example", "1@b.example", "2@b.example"]
            assert (await client.reply()).startswith("354")

    @pytest.mark.parametrize("bad", [b"RCPT TO:<b@b.example>\n", b"RCPT TO:<" + b"b" * 13000 + b"@b.example>\r\n"])
    async def test_a_bad_line_between_pipelined_recipients_is_answered_in_its_place(self, bad: bytes) -> None:
        """Else the client takes the reply of one recipient for that of another."""
        desk = RecordingDesk()
        async with serving(desk) as server, connected(server) as client:
            await client.ask("EHLO x")
            client.send(b"MAIL FROM:<a@a.example>\r\nRCPT TO:<a@b.example>\r\n" + bad + b"RCPT TO:<c@b.example>\r\nDATA\r\n")
            assert await client.codes(5) == [250, 250, 500, 250, 354]
            assert (await client.ask(b"x\r\n.")).startswith("250")

    async def test_all_recipients_refused_means_no_data(self) -> None:
        desk = RecordingDesk()

        async def refuse(*_: Any) -> Reply:
            return Reply(550, "5.1.1", "no")

        desk.on_rcpt = refuse
        async with serving(desk) as server, connected(server) as client:
            await client.ask("EHLO x")
            client.send(b"MAIL FROM:<a@a.example>\r\nRCPT TO:<b@b.example>\r\nRCPT TO:<c@b.example>\r\nDATA\r\nRSET\r\n")
            assert await client.codes(5) == [250, 550, 550, 503, 250]

    async def test_reply_text_cannot_make_lines(self) -> None:
        desk = RecordingDesk()

        async def evil(*_: Any) -> Reply:
            return Reply(250, "2.1.0", "ok\r\n550 injected\x00")

        desk.on_mail = evil
        async with serving(desk) as server, connected(server) as client:
            await client.ask("EHLO x")
            assert await client.ask("MAIL FROM:<a@a.example>") == "250-2.1.0 ok \n250 2.1.0 550 injected "
            assert (await client.ask("NOOP")).startswith("250")

    async def test_order_of_commands(self) -> None:
        async with serving(RecordingDesk()) as server, connected(server) as client:
            assert (await client.ask("MAIL FROM:<a@a.example>")).startswith("503")
            assert (await client.ask("HELO x")).startswith("250 mx")
            assert (await client.ask("MAIL FROM:<a@a.example> SIZE=1")).startswith("501")
            assert (await client.ask("RCPT TO:<b@b.example>")).startswith("503")
            assert (await client.ask("DATA")).startswith("503")
            assert (await client.ask("MAIL FROM:<a@a.example>")).startswith("250")
            assert (await client.ask("MAIL FROM:<a@a.example>")).startswith("503")
            assert (await client.ask("EHLO (evil)")).startswith("501")
            assert (await client.ask("EHLO y")).startswith("250")
            assert (await client.ask("DATA")).startswith("503")
            for command, code in {"HELP": "214", "VRFY x": "252", "EXPN x": "502 5.0.0", "AUTH": "501", "AUTH X": "504"}.items():
                assert (await client.ask(command)).startswith(code)
            assert server.desk.names == ["mail", "reset"]


async def test_unix_socket_tells_the_peers_uid(tmp_path: Any) -> None:
    import os

    from malote.config import ListenerConfig
    path = tmp_path / "submit.sock"
    desk = RecordingDesk()
    async with serving(desk, config=ListenerConfig(socket=path)):
        reader, writer = await asyncio.open_unix_connection(str(path))
        client = Client(reader, writer)
        await client.reply()
        await client.ask("EHLO x")
        assert (desk.sessions[0].peer, desk.sessions[0].peer_uid, desk.sessions[0].loopback) == ("unix", os.getuid(), True)
        writer.close()
    assert not path.exists()
