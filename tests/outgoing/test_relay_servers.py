"""Server and upstream client with real peers: Postfix and Dovecot behind, the mail programs people use in front."""

from __future__ import annotations

import asyncio
import shutil
import smtplib
import ssl
import uuid
from collections.abc import Iterator
from email.message import EmailMessage
from pathlib import Path
from typing import Any

import pytest

from lab.servers import PASSWORD, Dovecot, Lab, Postfix, Sink
from lab.wire import HOST, Client, RecordingDesk, RelayDesk, connected, serving, until
from malote.config import Security, UpstreamConfig
from malote.errors import Reply, UpstreamError, UpstreamRefused
from malote.smtp.relay import Upstream
from malote.smtp.sasl import Credentials


async def run(*command: str, stdin: bytes = b"") -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT)
    async with asyncio.timeout(60):
        output, _ = await process.communicate(stdin)
    return process.returncode or 0, output.decode(errors="replace")


def message(subject: str = "hello", size: int = 0) -> bytes:
    filler = (b"y" * 70 + b"\r\n") * (size // 72)
    return f"From: a@a.example\r\nSubject: {subject}\r\n\r\n.dot\r\n..two\r\nend\r\n".encode() + filler


class TestClients:
    async def test_smtplib(self) -> None:
        def client(port: int) -> None:
            with smtplib.SMTP(HOST, port) as smtp:
                smtp.login("anna", "pw")
                smtp.sendmail("a@a.example", ["b@b.example", "c@c.example"], message())
                mail = EmailMessage()
                mail["From"], mail["To"], mail["Subject"] = "größe@a.example", "b@b.example", "Größe"
                mail.set_content("Grüße", cte="8bit")
                smtp.send_message(mail)

        async with serving(RecordingDesk()) as server:
            await asyncio.to_thread(client, server.port)
            assert server.desk.messages[0] == message()
            assert "Grüße".encode() in server.desk.messages[1]
            size = str(len(server.desk.messages[1]))
            assert ("mail", "größe@a.example", {"SIZE": size, "SMTPUTF8": True, "BODY": "8BITMIME"}) in server.desk.events
            assert server.desk.sessions[-1].login == "anna"

    async def test_swaks(self) -> None:
        async with serving(RecordingDesk()) as server:
            code, output = await run(
                "swaks", "--server", f"{HOST}:{server.port}", "--from", "a@a.example", "--to", "b@b.example,c@c.example",
                "--auth", "LOGIN", "--auth-user", "anna", "--auth-password", "pw", "--body", ".lonely dot", "--pipeline")
            assert code == 0, output
            assert b"\r\n.lonely dot\r\n" in server.desk.messages[0]
            assert server.desk.names.count("rcpt") == 2

    async def test_curl(self, tmp_path: Path) -> None:
        mail = tmp_path / "mail"
        mail.write_bytes(message("curl", 3_000_000))
        async with serving(RecordingDesk()) as server:
            code, output = await run(
                "curl", "-sS", f"smtp://{HOST}:{server.port}/client.test.example", "--mail-from", "a@a.example",
                "--mail-rcpt", "b@b.example", "--upload-file", str(mail), "--user", "anna:pw", "--login-options", "AUTH=PLAIN")
            assert code == 0, output
            assert server.desk.messages == [mail.read_bytes()]

    @pytest.mark.parametrize("tls", ["off", "starttls", "tls"])
    async def test_msmtp(self, lab: Lab, tls: str) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(lab.certificate, lab.key)
        options = {"off": ["--tls=off"], "starttls": ["--tls=on"], "tls": ["--tls=on", "--tls-starttls=off"]}[tls]
        async with serving(RecordingDesk(), tls_context=None if tls == "off" else context, implicit_tls=tls == "tls") as server:
            code, output = await run(
                "msmtp", "--host=localhost", f"--port={server.port}", "--from=a@a.example", "--auth=plain", "--user=anna",
                "--passwordeval=echo pw", f"--tls-trust-file={lab.certificate}", *options, "b@b.example", stdin=message("msmtp"))
            assert code == 0, output
            assert b"Subject: msmtp\r\n" in server.desk.messages[0]
            assert server.desk.sessions[-1].tls is (tls != "off")
            assert ("auth", "PLAIN", b"\0anna\0pw") in server.desk.events

    async def test_postfix_as_client_with_many_recipients(self, lab: Lab) -> None:
        """Pipelining, DSN and SIZE by a real MTA; its QUIT is pipelined behind the message and proves nothing."""
        desk = RecordingDesk()

        async def rcpt(_session: Any, address: str, _params: Any) -> Reply:
            return Reply(550, "5.1.1", "not here") if address.startswith("refused") else Reply(250, "2.1.5", "ok")

        desk.on_rcpt = rcpt
        async with serving(desk, max_recipients=200) as server:
            postfix = await asyncio.to_thread(lab.postfix, f"smtp:[{HOST}]:{server.port}",
                                              settings={"smtp_line_length_limit": "0"})     # else it cuts lines at 998
            recipients = [f"user{number}@b.example" for number in range(300)] + ["refused@b.example"]
            body = message("many") + b"z" * 2000 + b"\r\n\xe4\xf6\xfc\r\n"

            def hand_in() -> None:
                with smtplib.SMTP(HOST, postfix.port) as smtp:
                    smtp.sendmail("a@a.example", recipients, body, mail_options=["BODY=8BITMIME"])

            await asyncio.to_thread(hand_in)
            await until(lambda: {event[1] for event in desk.events if event[0] == "rcpt"} > set(recipients))
            await until(lambda: not postfix.queued())
            delivered = [each for each in desk.messages if b"multipart/report" not in each]    # a bounce tells of the refused one
            assert len(delivered) == 2      # 200 and the rest: the 452 was understood
            assert all(each.endswith(b"z" * 2000 + b"\r\n\xe4\xf6\xfc\r\n") for each in delivered)
            assert any(event[0] == "mail" and event[2].get("BODY") == "8BITMIME" for event in desk.events)
            await asyncio.to_thread(postfix.stop)


@pytest.fixture
def sink_dump(lab: Lab) -> Iterator[Path]:
    path = lab.root / f"dump{uuid.uuid4().hex}"     # the sink's own user can write there
    yield path
    shutil.rmtree(path, ignore_errors=True)


class TestPostfixBehind:
    async def test_login_over_starttls_and_delivery(self, lab: Lab, postfix: Postfix, dovecot: Dovecot) -> None:
        """STARTTLS with the certificate checked, AUTH through Dovecot, delivery: byte for byte below Postfix's own lines."""
        user = fresh_user(dovecot)
        config = UpstreamConfig(host="localhost", port=postfix.submission_port, ca_file=lab.certificate)

        async def credentials() -> Credentials:
            return Credentials(user, PASSWORD)

        upstream = Upstream(config, credentials=credentials)
        async with serving(RelayDesk(upstream)) as server, connected(server) as client:
            for number in range(3):
                await client.begin("alice@test.example", user)
                assert (await client.ask(message(f"number {number}").replace(b"\r\n.", b"\r\n..") + b".")).startswith("250")
            await until(lambda: len(dovecot.messages(user)) == 3)
        stored = dovecot.messages(user)
        assert all(b"ESMTPSA" in each for each in stored)
        await upstream.close()

    async def test_wrong_password_is_temporary_and_tried_once(self, lab: Lab, postfix: Postfix, dovecot: Dovecot) -> None:
        async def credentials() -> Credentials:
            return Credentials("alice@test.example", "wrong")

        upstream = Upstream(UpstreamConfig(host="localhost", port=postfix.submission_port, ca_file=lab.certificate),
                            credentials=credentials)
        with pytest.raises(UpstreamRefused) as refusal:
            await upstream.acquire()
        assert refusal.value.reply.code == 451

    async def test_pass_through_gives_the_servers_own_answer(self, lab: Lab, postfix: Postfix, dovecot: Dovecot) -> None:
        user = fresh_user(dovecot)
        upstream = Upstream(UpstreamConfig(host="localhost", port=postfix.submission_port, ca_file=lab.certificate))
        def client(port: int, password: str, mechanism: str) -> None:
            with smtplib.SMTP(HOST, port) as smtp:
                smtp.ehlo()
                smtp.user, smtp.password = user, password
                smtp.auth(mechanism.upper(), getattr(smtp, f"auth_{mechanism}"))
                smtp.sendmail("alice@test.example", [user], message("passed through"))

        async with serving(RelayDesk(upstream)) as server:
            for mechanism in ("plain", "login"):
                await asyncio.to_thread(client, server.port, PASSWORD, mechanism)
            with pytest.raises(smtplib.SMTPAuthenticationError) as refusal:
                await asyncio.to_thread(client, server.port, "wrong", "plain")
            assert refusal.value.smtp_code == 535
            await until(lambda: len(dovecot.messages(user)) == 2)
        await upstream.close()

    async def test_untrusted_certificate_and_starttls_missing(self, lab: Lab, postfix: Postfix) -> None:
        with pytest.raises(UpstreamError, match="certificate"):
            await Upstream(UpstreamConfig(host="localhost", port=postfix.port)).acquire()
        bare = await asyncio.to_thread(lab.postfix, "discard:", settings={"smtpd_tls_security_level": "none"})
        with pytest.raises(UpstreamError, match="STARTTLS"):
            await Upstream(UpstreamConfig(host="localhost", port=bare.port, ca_file=lab.certificate)).acquire()
        await asyncio.to_thread(bare.stop)

    async def test_8bit_and_40_megabytes(self, lab: Lab, postfix: Postfix, dovecot: Dovecot) -> None:
        user = fresh_user(dovecot)
        upstream = Upstream(UpstreamConfig(host="localhost", port=postfix.port, ca_file=lab.certificate))
        body = "Subject: big\r\n\r\nlänge\r\n".encode() + (b"x" * 996 + b"\r\n") * 40_000
        async with serving(RelayDesk(upstream)) as server, connected(server) as client:
            await client.ask("EHLO x")
            assert (await client.ask("MAIL FROM:<alice@test.example> BODY=8BITMIME")).startswith("250")
            assert (await client.ask(f"RCPT TO:<{user}>")).startswith("250")
            await client.ask("DATA")
            assert (await client.ask(body + b".")).startswith("250")
        await until(lambda: len(dovecot.messages(user)) == 1)
        assert dovecot.messages(user)[0].replace(b"\r\n", b"\n").endswith(body.replace(b"\r\n", b"\n"))
        await upstream.close()

    async def test_addresses_beyond_ascii(self, lab: Lab, postfix: Postfix) -> None:
        upstream = Upstream(UpstreamConfig(host="localhost", port=postfix.port, ca_file=lab.certificate))
        async with serving(RelayDesk(upstream)) as server, connected(server) as client:
            await client.ask("EHLO x")
            assert (await client.ask("MAIL FROM:<größe@test.example> SMTPUTF8")).startswith("250")
            assert (await client.ask("RCPT TO:<länge@test.example>")).startswith("250")
            await client.ask("DATA")
            assert (await client.ask("Subject: größe\r\n\r\nx\r\n.")).startswith("250")
        await until(lambda: "to=<länge@test.example>" in postfix.log.read_text())
        await upstream.close()

    async def test_lmtp_to_dovecot(self, dovecot: Dovecot) -> None:
        user = fresh_user(dovecot)
        upstream = Upstream(UpstreamConfig(host=HOST, port=dovecot.lmtp_port, protocol="lmtp", security=Security.NONE))
        connection, reply = await upstream.begin("a@a.example", {})
        assert reply.code == 250
        rcpts = [connection.rcpt(each, {}) for each in (user, "nobody@test.example", "alice@test.example")]
        replies = await connection.data(message("by lmtp"))
        assert [(await each).code for each in rcpts] == [250, 550, 250]
        assert [each.code for each in replies] == [250, 250]
        assert b"Subject: by lmtp" in dovecot.messages(user)[0]
        await upstream.release(connection)
        await upstream.close()


def fresh_user(dovecot: Dovecot) -> str:
    user = f"u{uuid.uuid4().hex[:10]}@test.example"
    dovecot.add_user(user)
    return user


class TestSink:
    """Postfix's own test server with its failure options."""

    async def relayed(self, lab: Lab, *options: str, commands: bytes) -> tuple[list[int], Sink]:
        sink = await asyncio.to_thread(lab.sink, *options)
        upstream = Upstream(UpstreamConfig(host=HOST, port=sink.port, security="none", data_done_seconds=5))
        async with serving(RelayDesk(upstream)) as server, connected(server) as client:
            await client.ask("EHLO x")
            client.send(commands)
            codes = []
            async with asyncio.timeout(30):
                while (reply := await client.reply()) and not reply.startswith("221"):
                    codes.append(int(reply[:3]))
        await upstream.close()
        await asyncio.to_thread(sink.stop)
        return codes, sink

    ENVELOPE = b"MAIL FROM:<a@a.example>\r\nRCPT TO:<b@b.example>\r\nDATA\r\n"

    @pytest.mark.parametrize(("options", "codes"), [
        ((), [250, 250, 354, 250]),
        (("-p",), [250, 250, 354, 250]),
        (("-r", "MAIL"), [450, 503, 503, 500, 500]), (("-f", "MAIL"), [500, 503, 503, 500, 500]),
        (("-q", "MAIL"), [451, 503, 503, 500, 500]),
        (("-r", "RCPT"), [250, 450, 503, 500, 500]), (("-f", "RCPT"), [250, 500, 503, 500, 500]),
        (("-q", "RCPT"), [250, 451, 503, 500, 500]),
        (("-r", "DATA"), [250, 250, 354, 450]), (("-f", "DATA"), [250, 250, 354, 500]), (("-q", "DATA"), [250, 250, 354, 451]),
        (("-r", "."), [250, 250, 354, 450]), (("-f", "."), [250, 250, 354, 500]), (("-q", "."), [250, 250, 354, 451]),
    ])
    async def test_each_failure_reaches_the_client(self, lab: Lab, options: tuple[str, ...], codes: list[int]) -> None:
        assert (await self.relayed(lab, *options, commands=self.ENVELOPE + b"x\r\n.\r\nQUIT\r\n"))[0] == codes

    async def test_smtp_source_with_many_connections_through_the_pool(self, lab: Lab, sink_dump: Path) -> None:
        sink = await asyncio.to_thread(lab.sink, dump=sink_dump)
        upstream = Upstream(UpstreamConfig(host=HOST, port=sink.port, security="none", connections=3))
        source = shutil.which("smtp-source", path="/usr/sbin:/usr/bin")
        assert source
        async with serving(RelayDesk(upstream)) as server:
            for options in ((), ("-d",)):
                code, output = await run(source, *options, "-s", "8", "-m", "60", "-l", "5000", f"inet:{HOST}:{server.port}")
                assert code == 0, output
        await upstream.close()
        assert len(list(sink_dump.iterdir())) == 120


async def test_a_raw_client_may_vanish_at_any_phase(lab: Lab) -> None:
    """After each, the connection is forgotten, the memory given back, the upstream connection clean or gone."""
    sink = await asyncio.to_thread(lab.sink)
    upstream = Upstream(UpstreamConfig(host=HOST, port=sink.port, security="none"))
    script = b"EHLO x\r\nMAIL FROM:<a@a.example>\r\nRCPT TO:<b@b.example>\r\nDATA\r\nline\r\n.dot\r\n.\r\nQUIT\r\n"
    async with serving(RelayDesk(upstream)) as server:
        for cut in range(0, len(script), 3):
            reader, writer = await asyncio.open_connection(HOST, server.port)
            writer.write(script[:cut])
            await writer.drain()
            if cut % 2:
                await Client(reader, writer).reply()
            writer.close()
        await until(lambda: len(server.connections) == 0)
        assert server.budget.used_bytes == 0
        await until(lambda: not upstream._pool._leased)
        async with connected(server) as client:
            await client.begin()
            assert (await client.ask(b"x\r\n.")).startswith("250")
    await upstream.close()


def test_programs_are_there() -> None:
    """A test that is skipped because a program is missing protects nothing."""
    assert all(shutil.which(name) for name in ("swaks", "curl", "msmtp"))
