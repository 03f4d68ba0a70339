"""The faults of aiosmtpd 1.4.6 that would lose, double or leak mail, each with the test that keeps it cured.

The numbers are those of the list in the library report that led to the subclass. Everything runs on asyncio and on uvloop.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from typing import Any

import pytest
from aiosmtpd.smtp import SMTP

from lab.servers import Lab
from lab.wire import HOST, Client, RecordingDesk, connected, serving, until
from malote.config import LimitsConfig, ListenerConfig
from malote.errors import MaloteError, Reply, StoreUnavailable
from malote.smtp import conversation
from malote.smtp.listener import server_settings
from malote.smtp.server import SubmissionServer


def server_tls(lab: Lab) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(lab.certificate, lab.key)
    return context


async def test_it_is_a_subclass_of_aiosmtpd() -> None:
    assert issubclass(SubmissionServer, SMTP)


class TestFault1RelayIsNotCancelled:
    async def test_a_slow_handler_outlives_the_command_timer(self) -> None:
        """aiosmtpd cuts the client off and cancels the handler when the command timer runs out."""
        desk = RecordingDesk()

        async def slow(*_: Any) -> Reply:
            await asyncio.sleep(0.5)
            return Reply(250, "2.0.0", "slow but done")

        desk.on_data = slow
        async with serving(desk, command_seconds=0.2, data_block_seconds=0.2) as server, connected(server) as client:
            await client.begin()
            assert await client.ask(b"x\r\n.") == "250 2.0.0 slow but done"

    async def test_a_slow_sender_that_sends_is_not_cut_off(self) -> None:
        async with serving(RecordingDesk(), command_seconds=0.3, data_block_seconds=0.3) as server, connected(server) as client:
            await client.begin()
            for _ in range(5):
                client.send(b"line\r\n")
                await asyncio.sleep(0.1)
            assert (await client.ask(b".")).startswith("250")
            assert server.desk.messages == [b"line\r\n" * 5]

    async def test_a_half_closed_client_gets_its_reply(self) -> None:
        desk = RecordingDesk()
        release = asyncio.Event()

        async def wait(*_: Any) -> Reply:
            await release.wait()
            return Reply(250, "2.0.0", "kept")

        desk.on_data = wait
        async with serving(desk) as server, connected(server) as client:
            await client.begin()
            client.send(b"x\r\n.\r\n")
            client.writer.write_eof()
            await until(lambda: "data" in desk.names)
            await asyncio.sleep(0.05)
            release.set()
            assert await client.reply() == "250 2.0.0 kept"
            assert await client.at_end()

    @pytest.mark.parametrize("kept", [False, True])
    async def test_a_vanished_client_cancels_before_the_final_dot_upstream_and_not_after(self, kept: bool) -> None:
        """Before it the client tries again and nothing was sent; after it a cancelled relay would be sent twice."""
        desk = RecordingDesk()
        release = asyncio.Event()
        outcome: list[str] = []

        async def relay(session: Any, _content: bytearray) -> Reply:
            if kept:
                session.keep_going()
            try:
                await release.wait()
            except asyncio.CancelledError:
                outcome.append("cancelled")
                raise
            outcome.append("completed")
            return Reply(250, "2.0.0", "ok")

        desk.on_data = relay
        async with serving(desk) as server:
            async with connected(server) as client:
                await client.begin()
                client.send(b"x\r\n.\r\n")
                await until(lambda: "data" in desk.names)
                reset_connection(client)
            if kept:
                await asyncio.sleep(0.1)
                assert outcome == []
                release.set()
            await asyncio.wait_for(desk.closed.wait(), 10)
            assert outcome == ["completed" if kept else "cancelled"]
            assert desk.names[-1] == "close"
            assert ("reset" in desk.names) is not kept


class TestFault2Exceptions:
    async def test_an_unknown_exception_is_temporary_and_says_nothing(self, capfd: pytest.CaptureFixture[str]) -> None:
        desk = RecordingDesk()

        async def broken(*_: Any) -> Reply:
            raise ValueError("secret internals anna@a.example")

        desk.on_data = broken
        async with serving(desk) as server, connected(server) as client:
            await client.begin()
            reply = await client.ask(b"x\r\n.")
            assert reply == f"451 4.3.0 {MaloteError.default_reply.text}"
            desk.on_data = None
            await client.to_354()       # the transaction was reset: MAIL is not nested
            assert (await client.ask(b"x\r\n.")).startswith("250")
        output = "".join(capfd.readouterr())
        assert "ValueError" in output
        assert "secret" not in output

    async def test_a_known_exception_is_its_reply(self) -> None:
        desk = RecordingDesk()

        async def broken(*_: Any) -> Reply:
            raise StoreUnavailable

        desk.on_mail = broken
        async with serving(desk) as server, connected(server) as client:
            await client.ask("EHLO x")
            assert await client.ask("MAIL FROM:<a@a.example>") == str(StoreUnavailable.default_reply)
            assert (await client.ask("RCPT TO:<b@b.example>")).startswith("503")
            assert desk.names == ["mail", "reset"]

    async def test_a_reset_upstream_connection_does_not_end_the_session(self) -> None:
        desk = RecordingDesk()

        async def broken(*_: Any) -> Reply:
            raise ConnectionResetError

        desk.on_rcpt = broken
        async with serving(desk) as server, connected(server) as client:
            await client.ask("EHLO x")
            await client.ask("MAIL FROM:<a@a.example>")
            assert (await client.ask("RCPT TO:<b@b.example>")).startswith("451")
            assert (await client.ask("NOOP")).startswith("250")

    async def test_a_cancelled_task_of_the_desk_is_temporary(self) -> None:
        """As when it waits for another session's work: this client did not vanish and must get a reply."""
        desk = RecordingDesk()

        async def broken(*_: Any) -> Reply:
            other = asyncio.get_running_loop().create_future()
            other.cancel()
            await other
            raise AssertionError

        desk.on_data = broken
        async with serving(desk) as server, connected(server) as client:
            await client.begin()
            assert (await client.ask(b"x\r\n.")).startswith("451 4.3.0")
            assert (await client.ask("NOOP")).startswith("250")
            assert desk.names[:4] == ["mail", "rcpt", "data", "reset"]

    async def test_pipelined_recipients_keep_their_replies(self) -> None:
        """One fails strangely: its own reply says so, the others have theirs."""
        desk = RecordingDesk()

        async def rcpt(_session: Any, address: str, _params: Any) -> Reply:
            if address.startswith("1"):
                other = asyncio.get_running_loop().create_future()
                other.cancel()
                await other
            if address.startswith("2"):
                raise ValueError
            return Reply(250, "2.1.5", address)

        desk.on_rcpt = rcpt
        async with serving(desk) as server, connected(server) as client:
            await client.ask("EHLO x")
            recipients = b"".join(b"RCPT TO:<%d@b.example>\r\n" % number for number in range(4))
            client.send(b"MAIL FROM:<a@a.example>\r\n" + recipients + b"DATA\r\n")
            assert await client.codes(6) == [250, 250, 451, 451, 250, 354]
            assert (await client.ask(b".")).startswith("250")

    async def test_overdue_pipelined_recipients_end_the_connection(self) -> None:
        desk = RecordingDesk()

        async def hang(*_: Any) -> Reply:
            await asyncio.Event().wait()
            raise AssertionError

        desk.on_rcpt = hang
        async with serving(desk, handler_seconds=0.1) as server, connected(server) as client:
            await client.ask("EHLO x")
            client.send(b"MAIL FROM:<a@a.example>\r\nRCPT TO:<b@b.example>\r\nRCPT TO:<c@b.example>\r\nDATA\r\n")
            assert await client.codes(2) == [250, 421]
            assert await client.at_end()
            await until(desk.closed.is_set)
            assert desk.names == ["mail", "rcpt", "rcpt", "reset", "close"]

    async def test_an_overdue_desk_is_cancelled_and_answered_451(self) -> None:
        desk = RecordingDesk()

        async def hang(*_: Any) -> Reply:
            await asyncio.Event().wait()
            raise AssertionError

        desk.on_data = hang
        async with serving(desk, handler_seconds=0.1) as server, connected(server) as client:
            await client.begin()
            assert (await client.ask(b"x\r\n.")).startswith("451 4.4.2")
            assert (await client.ask("NOOP")).startswith("250")
            assert desk.names[:4] == ["mail", "rcpt", "data", "reset"]

    async def test_an_overdue_desk_after_the_final_dot_goes_on(self) -> None:
        """451 to the client, whose retry the journal answers; cancelling it would leave the outcome unknown."""
        desk = RecordingDesk()
        release = asyncio.Event()
        done: list[bool] = []

        async def slow(session: Any, _content: bytearray) -> Reply:
            session.keep_going()
            await release.wait()
            done.append(True)
            return Reply(250, "2.0.0", "ok")

        desk.on_data = slow
        async with serving(desk, handler_seconds=0.1) as server, connected(server) as client:
            await client.begin()
            assert (await client.ask(b"x\r\n.")).startswith("451 4.4.2")
            assert await client.at_end()
            release.set()
            await asyncio.wait_for(desk.closed.wait(), 10)
            assert done == [True]


async def test_fault_3_lines_of_any_length() -> None:
    """aiosmtpd refuses a line of 1000 bytes; real programs send longer ones."""
    message = b"".join(b"%s\r\n" % (b"x" * length) for length in (998, 999, 1000, 2000, 70_000, 1_000_000))
    async with serving(RecordingDesk()) as server, connected(server) as client:
        await client.begin()
        assert (await client.ask(message + b".")).startswith("250")
        assert server.desk.messages == [message]


class TestFaults4And5Auth:
    async def test_implicit_tls_offers_and_accepts_login(self, lab: Lab) -> None:
        async with (
            serving(RecordingDesk(), tls_context=server_tls(lab), implicit_tls=True) as server,
            connected(server, ssl=lab.client_tls(), server_hostname="localhost") as client,
        ):
            greeting = await client.ask("EHLO x")
            assert "AUTH PLAIN LOGIN" in greeting
            assert "STARTTLS" not in greeting
            assert await client.ask("AUTH PLAIN AGFubmEAcHc=") == "235 2.7.0 Welcome"
            assert server.desk.sessions[0].tls
            assert server.desk.sessions[0].protocol == "ESMTPSA"

    @pytest.mark.parametrize("name", ["plain", "Plain", "PLAIN"])
    async def test_mechanism_in_any_case(self, name: str) -> None:
        async with serving(RecordingDesk()) as server, connected(server) as client:
            await client.ask("EHLO x")
            assert (await client.ask(f"AUTH {name} AGFubmEAcHc=")).startswith("235")
            assert server.desk.events == [("auth", "PLAIN", b"\0anna\0pw")]

    async def test_long_initial_response(self) -> None:
        """RFC 4954 section 4: 12288 octets. OAuth tokens are longer than aiosmtpd's 512."""
        token = "QUFB" * 3000
        async with serving(RecordingDesk()) as server, connected(server) as client:
            await client.ask("EHLO x")
            assert (await client.ask(f"AUTH XOAUTH2 {token}")).startswith("235")
            assert server.desk.events == [("auth", "XOAUTH2", b"AAA" * 3000)]

    async def test_challenges_of_any_length_and_empty_ones(self) -> None:
        desk = RecordingDesk()
        answers: list[bytes | None] = []

        async def dance(session: Any, _mechanism: str, _initial: bytes | None) -> Any:
            answers.append(await session.challenge(b""))
            answers.append(await session.challenge(b"more"))
            return outcome()

        desk.on_authenticate = dance
        async with serving(desk) as server, connected(server) as client:
            await client.ask("EHLO x")
            assert await client.ask("AUTH LOGIN") == "334 "
            assert await client.ask(b"QUFB" * 2500) == "334 bW9yZQ=="
            assert (await client.ask(b"")).startswith("235")
            assert answers == [b"AAA" * 2500, b""]
            assert (await client.ask("AUTH LOGIN")).startswith("503")

    @pytest.mark.parametrize(("answer", "code"), [(b"*", "501 5.7.0"), (b"%%%", "501 5.5.2")])
    async def test_given_up_or_garbled(self, answer: bytes, code: str) -> None:
        desk = RecordingDesk()

        async def dance(session: Any, _mechanism: str, _initial: bytes | None) -> Any:
            assert await session.challenge(b"") is None
            return outcome(refused=True)

        desk.on_authenticate = dance
        async with serving(desk) as server, connected(server) as client:
            await client.ask("EHLO x")
            await client.ask("AUTH LOGIN")
            assert (await client.ask(answer)).startswith(code)
            assert (await client.ask("NOOP")).startswith("250")

    async def test_three_failures_and_out(self) -> None:
        desk = RecordingDesk()

        async def refuse(*_: Any) -> Any:
            return outcome(refused=True)

        desk.on_authenticate = refuse
        async with serving(desk) as server, connected(server) as client:
            await client.ask("EHLO x")
            for _ in range(3):
                assert (await client.ask("AUTH PLAIN AGFubmEAcHc=")).startswith("535")
            assert (await client.reply()).startswith("421")
            assert await client.at_end()


def outcome(*, refused: bool = False) -> Any:
    from malote.smtp.desk import AuthOutcome
    return AuthOutcome(Reply(535, "5.7.8", "No")) if refused else AuthOutcome(Reply(235, "2.7.0", "Welcome"), "anna")


class TestFault6Paths:
    @pytest.mark.parametrize(("sent", "address"), [
        ("<>", ""), ("<a@a.example>", "a@a.example"), (" <a@a.example>", "a@a.example"),
        ("<@relay.example:a@a.example>", "a@a.example"), ('<"a b"@a.example>', '"a b"@a.example'),
        ('<"a\\"b>"@a.example>', '"a\\"b>"@a.example'), ("<a@[127.0.0.1]>", "a@[127.0.0.1]"),
        ("<A.B+c@A.Example>", "A.B+c@A.Example"), ("<a/b=c@[IPv6:::1]>", "a/b=c@[IPv6:::1]"),
    ])
    async def test_accepted_as_sent(self, sent: str, address: str) -> None:
        async with serving(RecordingDesk()) as server, connected(server) as client:
            await client.ask("EHLO x")
            assert (await client.ask(f"MAIL FROM:{sent}")).startswith("250")
            assert server.desk.events == [("mail", address, {})]

    @pytest.mark.parametrize("sent", [
        "FROM:<a..b@a.example>", "FROM:<.a@a.example>", "FROM:<a@>", "FROM:<@a.example>", "FROM:<a@a.example", "FROM:a@a.example",
        "FROM:<a(comment)@a.example>", "FROM:<a@a.example> <b@b.example>", "FROM:<a@a_.-example>", "FROM:<a b@a.example>",
        "FROM:<a@a.example>X=1", "FROM:<a@a..example>", "FROM:<a@\x01>", "TO:<a@a.example>", "",
        "FROM:<" + "a" * 600 + "@a.example>",
    ])
    async def test_refused(self, sent: str) -> None:
        async with serving(RecordingDesk()) as server, connected(server) as client:
            await client.ask("EHLO x")
            assert (await client.ask(f"MAIL {sent}")).startswith("501")
            assert server.desk.events == []

    async def test_null_recipient_and_missing_smtputf8(self) -> None:
        async with serving(RecordingDesk()) as server, connected(server) as client:
            await client.ask("EHLO x")
            assert (await client.ask("MAIL FROM:<größe@a.example>")).startswith("553 5.6.7")
            await client.ask("MAIL FROM:<>")
            assert (await client.ask("RCPT TO:<>")).startswith("501")
            assert (await client.ask("RCPT TO:<größe@a.example>")).startswith("553 5.6.7")
            assert (await client.ask("RCPT TO:<Postmaster>")).startswith("250")
            await client.ask("RSET")
            assert (await client.ask("MAIL FROM:<größe@a.example> SMTPUTF8")).startswith("250")
            assert (await client.ask("RCPT TO:<d@ü.example>")).startswith("250")


async def test_fault_7_limits_are_per_connection() -> None:
    """aiosmtpd's command size limits are one dict of the class, raised by each EHLO of anybody."""
    assert "command_size_limits" not in vars(SubmissionServer)
    async with serving(RecordingDesk()) as server, connected(server) as one, connected(server) as two:
        for _ in range(30):
            assert (await one.ask("EHLO x")).startswith("250")
        assert (await two.ask("NOOP " + "x" * 13_000)).startswith("500 5.5.6")
        assert (await one.ask("NOOP " + "x" * 13_000)).startswith("500 5.5.6")
        assert (await two.ask("NOOP")).startswith("250")


class TestFault8StartTls:
    async def test_a_second_one_is_refused(self, lab: Lab) -> None:
        async with serving(RecordingDesk(), tls_context=server_tls(lab)) as server, connected(server) as client:
            await start_tls(client, lab)
            assert "STARTTLS" not in await client.ask("EHLO x")
            assert (await client.ask("STARTTLS")).startswith("503")
            await client.to_354()
            assert (await client.ask(b"x\r\n.")).startswith("250")
            assert server.desk.sessions[-1].protocol == "ESMTPS"

    async def test_what_was_said_in_clear_does_not_count(self, lab: Lab) -> None:
        async with serving(RecordingDesk(), tls_context=server_tls(lab)) as server, connected(server) as client:
            await client.ask("MAIL FROM:<a@a.example>")
            await start_tls(client, lab)
            assert (await client.ask("MAIL FROM:<a@a.example>")).startswith("503")

    @pytest.mark.parametrize("loopback", [True, False], ids=["loopback", "network"])
    async def test_from_the_network_nothing_is_taken_in_clear(
            self, lab: Lab, monkeypatch: pytest.MonkeyPatch, loopback: bool) -> None:
        """No login, no address and no text: each command but the way to TLS is refused, and AUTH is not even offered. From this
        machine itself it is not needed."""
        config = ListenerConfig(host="192.0.2.1", port=25, tls="starttls", certificate=lab.certificate, certificate_key=lab.key)
        settings = server_settings(config, LimitsConfig(), "mx.test.example")
        assert settings.require_tls
        monkeypatch.setattr(conversation, "is_loopback", lambda host: loopback)
        desk = RecordingDesk()
        async with serving(desk, tls_context=settings.tls_context, require_tls=settings.require_tls) as server, \
                connected(server) as client:
            said = await client.ask("EHLO x")
            assert "STARTTLS" in said
            assert ("AUTH" in said) is loopback
            if loopback:
                await client.to_354()
                assert (await client.ask(b"x\r\n.")).startswith("250")
                return
            for command in ("AUTH PLAIN AGEAYg==", "MAIL FROM:<a@a.example>", "RCPT TO:<b@b.example>", "DATA", "VRFY b"):
                assert (await client.ask(command)).startswith("530 5.7.0"), command
            assert desk.events == []
            await start_tls(client, lab)
            assert "AUTH" in await client.ask("EHLO x")
            assert (await client.ask("AUTH PLAIN AGEAYg==")).startswith("235")
            await client.to_354()
            assert (await client.ask(b"x\r\n.")).startswith("250")

    async def test_commands_injected_behind_starttls_are_dropped(self, lab: Lab) -> None:
        """They were sent in clear by whoever sits on the path (CVE-2011-0411 and CVE-2024-34083)."""
        async with serving(RecordingDesk(), tls_context=server_tls(lab)) as server, connected(server) as client:
            await client.ask("EHLO x")
            client.send(b"STARTTLS\r\nEHLO evil\r\nMAIL FROM:<evil@evil.example>\r\n")
            assert (await client.reply()).startswith("220")
            await client.writer.start_tls(lab.client_tls(), server_hostname="localhost")
            assert (await client.ask("NOOP")).startswith("250")
            assert server.desk.events == []
            assert server.desk.sessions[-1].helo == ""

    async def test_a_failed_handshake_ends_only_this_connection(self, lab: Lab) -> None:
        async with serving(RecordingDesk(), tls_context=server_tls(lab)) as server:
            async with connected(server) as client:
                await client.ask("STARTTLS")
                client.send(b"this is no ClientHello\r\n")
                await client.reader.read()
            async with connected(server) as client:
                assert (await client.ask("NOOP")).startswith("250")
            await until(lambda: len(server.connections) == 0)


async def test_fault_9_message_text_is_in_no_log(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    """aiosmtpd writes each line of DATA to its log at DEBUG."""
    with caplog.at_level("DEBUG"):
        async with serving(RecordingDesk()) as server, connected(server) as client:
            await client.ask("EHLO x")
            await client.ask("AUTH PLAIN AGFubmEAc2VjcmV0")
            await client.to_354()
            await client.ask(b"Subject: very secret\r\n\r\nvery secret\r\n.")
    logged = caplog.text + "".join(capfd.readouterr())
    assert "secret" not in logged
    assert "AGFubmEAc2VjcmV0" not in logged


class TestFault10Limits:
    async def test_connections(self) -> None:
        async with serving(RecordingDesk(), connections=2) as server:
            async with connected(server), connected(server):
                reader, writer = await asyncio.open_connection(HOST, server.port)
                assert (await Client(reader, writer).reply()).startswith("421 4.3.2")
                assert await reader.read() == b""
                writer.close()
            await until(lambda: len(server.connections) == 0)
            async with connected(server) as client:
                assert (await client.ask("NOOP")).startswith("250")

    async def test_recipients(self) -> None:
        async with serving(RecordingDesk(), max_recipients=3) as server, connected(server) as client:
            await client.ask("EHLO x")
            client.send(b"MAIL FROM:<a@a.example>\r\n" + b"RCPT TO:<b@b.example>\r\n" * 5 + b"DATA\r\n")
            assert await client.codes(7) == [250, 250, 250, 250, 452, 452, 354]
            assert (await client.ask(b".")).startswith("250")
            assert server.desk.names.count("rcpt") == 3

    async def test_errors(self) -> None:
        async with serving(RecordingDesk()) as server, connected(server) as client:
            client.send(b"NONSENSE\r\n" * 30)
            assert await client.codes(21) == [500] * 20 + [421]
            assert await client.at_end()

    async def test_silence(self) -> None:
        async with serving(RecordingDesk(), command_seconds=0.1) as server, connected(server) as client:
            assert (await client.reply()).startswith("421 4.4.2")
            assert await client.at_end()

    async def test_slow_loris_in_a_command(self) -> None:
        """The timer is for the whole line: dripping bytes do not extend it."""
        async with serving(RecordingDesk(), command_seconds=0.3) as server, connected(server) as client:
            for _ in range(100):
                client.send(b"x")
                if server.desk.closed.is_set():
                    break
                await asyncio.sleep(0.02)
            assert server.desk.closed.is_set()

    async def test_slow_loris_in_data(self) -> None:
        """Each byte restarts the block timer, but the whole must keep up a rate."""
        async with serving(RecordingDesk(), data_block_seconds=0.2) as server, connected(server) as client:
            await client.begin()
            for _ in range(200):
                client.send(b"x")
                if server.desk.closed.is_set():
                    break
                await asyncio.sleep(0.02)
            assert server.desk.closed.is_set()
            assert server.desk.messages == []


class TestFault11Shutdown:
    async def test_idle_ones_hear_421_and_messages_in_flight_finish(self) -> None:
        desk = RecordingDesk()
        release = asyncio.Event()

        async def wait(*_: Any) -> Reply:
            await release.wait()
            return Reply(250, "2.0.0", "finished")

        desk.on_data = wait
        async with serving(desk) as server, connected(server) as idle, connected(server) as busy:
            await busy.begin()
            busy.send(b"x\r\n.\r\n")
            await until(lambda: "data" in desk.names)
            server.listener.close()
            draining = asyncio.create_task(server.connections.drain(20))
            assert (await idle.reply()).startswith("421 4.3.2")
            assert await idle.at_end()
            release.set()
            assert await busy.reply() == "250 2.0.0 finished"
            assert await draining == 0
            with pytest.raises(ConnectionError):
                await asyncio.open_connection(HOST, server.port)

    async def test_the_deadline_cuts_off_who_is_left(self) -> None:
        desk = RecordingDesk()

        async def hang(*_: Any) -> Reply:
            await asyncio.Event().wait()
            raise AssertionError

        desk.on_data = hang
        async with serving(desk) as server, connected(server) as busy:
            await busy.begin()
            busy.send(b"x\r\n.\r\n")
            await until(lambda: "data" in desk.names)
            server.listener.close()
            assert await server.connections.drain(0.05) == 1
            assert len(server.connections) == 0
            assert desk.names[-2:] == ["reset", "close"]

    async def test_who_is_still_in_the_tls_handshake_is_not_let_in(self, lab: Lab) -> None:
        """Such a connection is not counted yet: nobody would wait for a message that it hands in."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(lab.certificate, lab.key)
        async with serving(RecordingDesk(), tls_context=context, implicit_tls=True) as server:
            reader, writer = await asyncio.open_connection(HOST, server.port)
            await asyncio.sleep(0.05)
            server.listener.close()
            assert await server.connections.drain(20) == 0
            await writer.start_tls(lab.client_tls(), server_hostname="localhost")
            late = Client(reader, writer)
            assert (await late.reply()).startswith("421 4.3.2")
            assert len(server.connections) == 0
            writer.close()


async def start_tls(client: Client, lab: Lab) -> None:
    await client.ask("EHLO x")
    assert (await client.ask("STARTTLS")).startswith("220")
    await client.writer.start_tls(lab.client_tls(), server_hostname="localhost")


def reset_connection(client: Client) -> None:
    """Close with RST: the client is gone, not merely done sending."""
    sock = client.writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    client.writer.transport.abort()
