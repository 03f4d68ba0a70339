"""The upstream client against servers that misbehave: nothing sent in clear, no reply mis-paired, doubt told from refusal."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path
from typing import Any

import pytest

from lab.wire import HOST, Scripted, until
from malote.config import UpstreamConfig
from malote.errors import ConfigError, MaloteError, Reply, UpstreamError, UpstreamRefused
from malote.smtp.connection import BLOCK_BYTES, IN_DOUBT, UpstreamConnection
from malote.smtp.relay import Upstream, check_reply
from malote.smtp.replies import MAX_REPLY_LINE, ReplyFault, ReplyParser
from malote.smtp.sasl import Credentials, choose_mechanism

MESSAGE = b"Subject: x\r\n\r\n.dot\r\nbody\r\n"


async def send(upstream: Upstream, content: bytes = MESSAGE, *recipients: str, **options: Any) -> tuple[Reply, ...]:
    connection, reply = await upstream.begin("a@a.example", {})
    try:
        assert reply.code == 250
        futures = [connection.rcpt(recipient, {}) for recipient in recipients or ("b@b.example",)]
        del futures
        return await connection.data(content, **options)
    finally:
        await upstream.release(connection)


class TestEachPhaseFails:
    """4xx, 5xx, silence and a closed connection wherever they can come. Before the final dot nothing is in doubt."""

    @pytest.mark.parametrize("verb", ["", "EHLO", "MAIL", "RCPT", "DATA", "."])
    @pytest.mark.parametrize("answer", ["451 4.3.2 later", "554 5.0.0 never"])
    async def test_refusal_is_passed_on_with_code_and_text(self, verb: str, answer: str) -> None:
        async with Scripted({verb: answer}).running() as server:
            upstream = Upstream(server.config())
            code, enhanced, text = answer.split(" ", 2)
            expected = Reply(int(code), enhanced, text)
            if verb in ("", "EHLO"):
                with pytest.raises(UpstreamRefused) as refusal:
                    await upstream.acquire()
                assert refusal.value.reply == expected
                return
            connection, reply = await upstream.begin("a@a.example", {})
            if verb == "MAIL":
                assert reply == expected
            else:
                recipient = connection.rcpt("b@b.example", {})
                replies = await connection.data(MESSAGE)
                if verb == "RCPT":
                    assert await recipient == expected
                    assert replies == (Reply(554, "5.5.1", "No valid recipients"),)
                    assert "DATA" not in server.seen
                else:
                    assert replies == (expected,)
            await upstream.release(connection)
            await upstream.close()

    @pytest.mark.parametrize("verb", ["", "EHLO", "MAIL", "RCPT", "DATA", "."])
    @pytest.mark.parametrize("answer", ["close", "hang", "9 nonsense", "250 ok\r\n250 stray"])
    async def test_lost_or_broken(self, verb: str, answer: str) -> None:
        if answer == "250 ok\r\n250 stray" and verb in ("", "DATA"):
            answer = "354 ok\r\n354 stray" if verb == "DATA" else "220 ok\r\n220 stray"
        async with Scripted({verb: answer}).running() as server:
            upstream = Upstream(server.config(command_seconds=0.2, data_done_seconds=0.2))
            dotted: list[bool] = []
            accepted = verb == "." and answer.startswith("250")     # the first reply is the right one, the rest is noise
            if accepted:
                assert (await send(upstream, on_final_dot=lambda: dotted.append(True)))[0].code == 250
            else:
                with pytest.raises(UpstreamError) as failure:
                    await send(upstream, on_final_dot=lambda: dotted.append(True))
                assert failure.value.in_doubt == (verb == ".")
                assert failure.value.reply.code == 451
            assert bool(dotted) == (verb == ".")
            await until(lambda: upstream._pool._in_use == 0 or accepted)
            await upstream.close()

    async def test_refusal_while_the_body_is_sent(self) -> None:
        """As a server that has enough: nothing was accepted, and its own words are kept."""
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            for answer in (b"220 x\r\n", b"250 x\r\n", b"250 ok\r\n", b"250 ok\r\n", b"354 go\r\n"):
                writer.write(answer)
                await reader.readline()
            writer.write(b"552 5.3.4 enough\r\n")     # the body does not fit the socket buffers and is never read
            await released.wait()
            writer.close()

        released = asyncio.Event()

        server = await asyncio.start_server(serve, HOST, 0)
        port = server.sockets[0].getsockname()[1]
        upstream = Upstream(UpstreamConfig(host=HOST, port=port, security="none"))
        dotted: list[bool] = []
        content = (b"x" * 998 + b"\r\n") * 30_000
        assert await send(upstream, content, on_final_dot=lambda: dotted.append(True)) == (Reply(552, "5.3.4", "enough"),)
        assert dotted == []
        released.set()
        await upstream.close()
        server.close()

    async def test_a_server_that_stops_reading(self) -> None:
        """The block timer ends it before the final dot: nothing is in doubt."""
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            for answer in (b"220 x\r\n", b"250 x\r\n", b"250 ok\r\n", b"250 ok\r\n", b"354 go\r\n"):
                writer.write(answer)
                await reader.readline()
            await released.wait()
            writer.close()

        released = asyncio.Event()
        server = await asyncio.start_server(serve, HOST, 0)
        port = server.sockets[0].getsockname()[1]
        upstream = Upstream(UpstreamConfig(host=HOST, port=port, security="none", data_block_seconds=0.2))
        dotted: list[bool] = []
        with pytest.raises(UpstreamError, match="in time") as failure:
            await send(upstream, (b"x" * 998 + b"\r\n") * 30_000, on_final_dot=lambda: dotted.append(True))
        assert not failure.value.in_doubt
        assert dotted == []
        released.set()
        await upstream.close()
        server.close()

    async def test_2xx_to_data_is_never_success(self) -> None:
        async with Scripted({"DATA": "250 2.0.0 queued"}).running() as server:
            with pytest.raises(UpstreamError) as failure:
                await send(Upstream(server.config()))
            assert not failure.value.in_doubt

    async def test_421_to_the_final_dot_is_a_refusal_and_ends_the_connection(self) -> None:
        async with Scripted({".": ["421 4.3.2 stopping!", "250 ok"]}).running() as server:
            upstream = Upstream(server.config())
            assert (await send(upstream))[0] == Reply(421, "4.3.2", "stopping")
            assert (await send(upstream))[0].code == 250
            assert server.connections == 2
            await upstream.close()

    async def test_nobody_listens(self) -> None:
        from lab.servers import free_port
        with pytest.raises(UpstreamError) as failure:
            await Upstream(UpstreamConfig(host=HOST, port=free_port(), security="none")).acquire()
        assert failure.value.reply == UpstreamError.default_reply


class TestCancellation:
    @pytest.mark.parametrize("verb", ["MAIL", "RCPT", "DATA", ".", "RSET"])
    async def test_never_leaves_a_connection_that_is_used_again(self, verb: str) -> None:
        """With aiosmtplib the reply of the old message answers the next command: a false 250."""
        async with Scripted({verb: ["hang", DEFAULT[verb]]}).running() as server:
            upstream = Upstream(server.config())

            async def cancelled() -> None:
                connection, _ = await upstream.begin("first@a.example", {})
                try:
                    connection.rcpt("b@b.example", {})
                    if verb == "RSET":
                        await connection.rset()
                    await connection.data(MESSAGE)
                finally:
                    await upstream.release(connection)

            task = asyncio.create_task(cancelled())
            await until(lambda: any(line.startswith(verb) for line in server.seen))
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            server.writers[0].write(b"250 2.0.0 late reply of the first message\r\n")
            assert (await send(upstream, b"second\r\n"))[0].text == "queued"
            assert server.connections == 2
            assert server.messages[-1] == b"second\r\n"
            await upstream.close()

    async def test_cancelled_while_connecting_frees_its_place(self) -> None:
        async with Scripted({"": ["hang", "220 ok"]}).running() as server:
            upstream = Upstream(server.config(connections=1))
            task = asyncio.create_task(upstream.acquire())
            await until(lambda: server.connections == 1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert (await send(upstream))[0].code == 250
            await upstream.close()


DEFAULT = {"MAIL": "250 2.1.0 ok", "RCPT": "250 2.1.5 ok", "DATA": "354 go", ".": "250 2.0.0 queued", "RSET": "250 2.0.0 ok"}


class TestPool:
    async def test_a_connection_serves_many_messages(self) -> None:
        async with Scripted().running() as server:
            upstream = Upstream(server.config())
            for _ in range(5):
                assert (await send(upstream))[0].code == 250
            assert server.connections == 1
            assert server.messages == [MESSAGE] * 5
            await upstream.close()
            await until(lambda: "QUIT" in server.seen)

    async def test_limit_and_queue(self) -> None:
        async with Scripted().running() as server:
            upstream = Upstream(server.config(connections=2))
            replies = await asyncio.gather(*(send(upstream) for _ in range(10)))
            assert [each[0].code for each in replies] == [250] * 10
            assert server.connections == 2
            await upstream.close()

    async def test_waiting_in_vain_is_temporary(self) -> None:
        async with Scripted().running() as server:
            upstream = Upstream(server.config(connections=1, command_seconds=0.1))
            held = await upstream.acquire()
            with pytest.raises(UpstreamError) as failure:
                await upstream.acquire()
            assert failure.value.reply.code == 451
            waiter = asyncio.create_task(upstream.acquire())
            await asyncio.sleep(0)
            await upstream.release(held)
            await upstream.release(await waiter)
            await upstream.close()

    @pytest.mark.parametrize("how", ["close", "421 4.4.2 idle too long!"])
    async def test_closed_meanwhile_is_tried_once_more_on_a_new_one(self, how: str) -> None:
        async with Scripted({"MAIL": ["250 ok", how, "250 ok"]}).running() as server:
            upstream = Upstream(server.config())
            assert (await send(upstream))[0].code == 250
            assert (await send(upstream))[0].code == 250
            assert server.connections == 2
            assert len(server.messages) == 2
            await upstream.close()

    async def test_a_new_connection_is_not_retried(self) -> None:
        async with Scripted({"MAIL": "close"}).running() as server:
            with pytest.raises(UpstreamError):
                await send(Upstream(server.config()))
            assert server.connections == 1

    async def test_a_goodbye_while_idle_is_noticed(self) -> None:
        async with Scripted().running() as server:
            upstream = Upstream(server.config())
            await send(upstream)
            server.writers[0].write(b"421 4.4.2 idle\r\n")
            await until(lambda: not any(each.usable for each in upstream._pool._idle))
            assert (await send(upstream))[0].code == 250
            assert server.connections == 2
            assert server.seen.count("MAIL FROM:<a@a.example>") == 2
            await upstream.close()

    async def test_after_close_what_comes_back_is_closed_and_nothing_is_given_out(self) -> None:
        async with Scripted().running() as server:
            upstream = Upstream(server.config())
            held = await upstream.acquire()
            await upstream.close()
            with pytest.raises(UpstreamError):
                await upstream.acquire()
            await upstream.release(held)
            await until(lambda: "QUIT" in server.seen)
            await until(lambda: not upstream._pool._farewells)

    async def test_old_ones_are_closed(self) -> None:
        async with Scripted().running() as server:
            upstream = Upstream(server.config())
            upstream._pool._max_idle_seconds = 0.05
            await send(upstream)
            await until(lambda: "QUIT" in server.seen)
            await send(upstream)
            assert server.connections == 2
            await upstream.close()

    async def test_an_open_transaction_is_reset_before_the_next(self) -> None:
        async with Scripted().running() as server:
            upstream = Upstream(server.config())
            connection, _ = await upstream.begin("a@a.example", {})
            assert (await connection.rcpt("b@b.example", {})).code == 250
            await upstream.release(connection)
            await send(upstream)
            assert server.connections == 1
            assert [line.split(" ")[0] for line in server.seen] == ["EHLO", "MAIL", "RCPT", "RSET", "MAIL", "RCPT", "DATA", "."]
            await upstream.close()


class TestTransaction:
    async def test_mail_and_rcpt_leave_in_one_write_and_data_waits(self) -> None:
        async with Scripted({"RCPT": ["250 ok", "550 5.1.1 no", "250 ok"]}).running() as server:
            upstream = Upstream(server.config())
            connection = await upstream.acquire()
            mail = connection.mail("a@a.example", {"ENVID": "x+2By"})
            rcpts = [connection.rcpt(f"{number}@b.example", {"NOTIFY": "NEVER"}) for number in range(3)]
            replies = await connection.data(MESSAGE)
            assert [(await each).code for each in (mail, *rcpts)] == [250, 250, 550, 250]
            assert replies == (Reply(250, "2.0.0", "queued"),) * 2
            assert server.seen[1:5] == [
                "MAIL FROM:<a@a.example> ENVID=x+2By", *(f"RCPT TO:<{number}@b.example> NOTIFY=NEVER" for number in range(3))]
            await upstream.release(connection)
            await upstream.close()

    @pytest.mark.parametrize("content", [
        b"", b".\r\n", b"..\r\n", b"\r\n.\r\n", b"no end", b"x\r\n.", b"\xff\r\n",
        b"x" * BLOCK_BYTES + b"\r\n.\r\n" + b"y" * BLOCK_BYTES, b".\r\n" * 200_000,
    ])
    async def test_content_arrives_unchanged(self, content: bytes) -> None:
        async with Scripted().running() as server:
            upstream = Upstream(server.config())
            assert (await send(upstream, content))[0].code == 250
            expected = content if not content or content.endswith(b"\r\n") else content + b"\r\n"
            assert server.messages == [expected]
            await upstream.close()

    @pytest.mark.parametrize(("address", "params", "code"), [
        ("a@a.example", {"SMTPUTF8": True}, "5.6.7"), ("größe@a.example", {}, "5.6.7"), ("a@a.example", {"RET": "HDRS"}, "4.3.5"),
        ("a@a.example", {"REQUIRETLS": True}, "5.7.30"), ("a@a.example", {"BODY": "8BITMIME"}, "5.6.3"),
        ("a@a.example", {"SIZE": "1001"}, "5.3.4"),
    ])
    async def test_a_missing_extension_is_refused_not_left_out(self, address: str, params: Any, code: str) -> None:
        async with Scripted({"EHLO": "250-x\r\n250 SIZE 1000"}).running() as server:
            upstream = Upstream(server.config())
            connection, reply = await upstream.begin(address, params)
            assert reply.enhanced == code
            assert reply.code in (451, 550, 552, 553, 554)
            assert len(server.seen) == 1
            await upstream.release(connection)
            await upstream.close()

    @pytest.mark.parametrize(("content", "code"), [(b"\xe9\r\n", "5.6.3"), (b"x" * 1001, "5.3.4")])
    async def test_content_the_server_cannot_take(self, content: bytes, code: str) -> None:
        async with Scripted({"EHLO": "250-x\r\n250 SIZE 1000"}).running() as server:
            upstream = Upstream(server.config())
            assert (await send(upstream, content))[0].enhanced == code
            assert "DATA" not in server.seen
            await upstream.close()

    async def test_no_line_end_gets_into_a_command(self) -> None:
        async with Scripted().running() as server:
            upstream = Upstream(server.config())
            connection = await upstream.acquire()
            with pytest.raises(ValueError, match="line end"):
                connection.mail("a@a.example>\r\nRCPT TO:<evil@evil.example", {})
            await upstream.release(connection)
            await upstream.close()

    async def test_lmtp_has_one_reply_per_recipient(self) -> None:
        script = {".": "250 2.0.0 one\r\n452 4.2.2 two\r\n250 2.0.0 three"}
        async with Scripted(script).running() as server:
            upstream = Upstream(server.config(protocol="lmtp"))
            replies = await send(upstream, MESSAGE, "1@b.example", "2@b.example", "3@b.example")
            assert [(each.code, each.text) for each in replies] == [(250, "one"), (452, "two"), (250, "three")]
            assert server.seen[0] == "LHLO malote.test.example"
            await upstream.close()

    async def test_lmtp_over_a_unix_socket(self, tmp_path: Path) -> None:
        scripted = Scripted()
        path = tmp_path / "lmtp"
        server = await asyncio.start_unix_server(scripted._serve, str(path))
        upstream = Upstream(UpstreamConfig(socket=path, protocol="lmtp", security="none"))
        assert [each.code for each in await send(upstream)] == [250]
        await upstream.close()
        server.close()

    async def test_lmtp_lost_between_replies_leaves_the_rest_in_doubt(self) -> None:
        async with Scripted({".": "250 2.0.0 one!"}).running() as server:
            upstream = Upstream(server.config(protocol="lmtp"))
            replies = await send(upstream, MESSAGE, "1@b.example", "2@b.example")
            assert replies[0].code == 250
            assert replies[1] is IN_DOUBT
            await upstream.close()


class TestTls:
    async def test_without_starttls_nothing_is_sent(self) -> None:
        """An attacker who strips the word STARTTLS gets neither the login nor the mail."""
        async with Scripted().running() as server:
            upstream = Upstream(server.config(security="starttls"), credentials=secret)
            with pytest.raises(UpstreamError, match="does not offer STARTTLS"):
                await upstream.acquire()
            assert server.seen == ["EHLO malote.test.example"]

    @pytest.mark.parametrize("answer", ["220 go\r\n250-evil\r\n250 AUTH PLAIN", "220 go\r\n250 par", "220 go\r\n250"])
    async def test_a_reply_injected_behind_starttls_is_an_attack(self, answer: str) -> None:
        async with Scripted({"EHLO": "250-x\r\n250 STARTTLS", "STAR": answer}).running() as server:
            upstream = Upstream(server.config(security="starttls"), credentials=secret)
            with pytest.raises(UpstreamError):
                await upstream.acquire()
            assert not any(line.startswith("AUTH") for line in server.seen)

    @pytest.mark.parametrize("security", ["starttls", "tls"])
    @pytest.mark.parametrize(("fault", "message"), [
        ("name", "not accepted: .*mismatch"), ("self-signed", "not accepted: self"), ("expired", "not accepted: .*expired"),
        ("", ""),
    ])
    async def test_certificate_and_name_are_verified(self, tmp_path: Path, security: str, fault: str, message: str) -> None:
        from lab.servers import make_certificate
        hosts = ("other.example",) if fault == "name" else ("localhost",)
        certificate, key = make_certificate(tmp_path, hosts=hosts)
        if fault == "expired":
            expire(certificate, key, tmp_path)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        async with tls_upstream(context, implicit=security == "tls") as port:
            ca = None if fault == "self-signed" else certificate
            upstream = Upstream(UpstreamConfig(host="localhost", port=port, security=security, ca_file=ca), credentials=secret)
            if fault:
                with pytest.raises(UpstreamError, match=message):
                    await upstream.acquire()
            else:
                connection = await upstream.acquire()
                assert connection.tls
                assert connection.authenticated
                assert "STARTTLS" not in connection.extensions      # EHLO was said again
                await upstream.release(connection)
            await upstream.close()

    def test_clear_text_only_to_this_machine(self) -> None:
        with pytest.raises(ConfigError, match="loopback"):
            Upstream(UpstreamConfig(host="192.0.2.1", security="none"))
        with pytest.raises(ConfigError, match="loopback"):
            Upstream(UpstreamConfig(host="mail.example", security="none"))
        with pytest.raises(ConfigError, match="host"):
            Upstream(UpstreamConfig())


async def secret() -> Credentials:
    return Credentials("anna", "topsecret")


class TestLogin:
    @pytest.mark.parametrize(("offered", "credentials", "sent"), [
        ("PLAIN LOGIN", Credentials("anna", "pw"), ["AUTH PLAIN AGFubmEAcHc="]),
        ("LOGIN XOAUTH2", Credentials("anna", "pw"), ["AUTH LOGIN", "YW5uYQ==", "cHc="]),
        ("XOAUTH2 PLAIN", Credentials("anna", token="tok"), ["AUTH XOAUTH2 dXNlcj1hbm5hAWF1dGg9QmVhcmVyIHRvawEB"]),
        ("OAUTHBEARER XOAUTH2", Credentials("anna", token="tok"), ["AUTH OAUTHBEARER bixhPWFubmEsAWF1dGg9QmVhcmVyIHRvawEB"]),
    ])
    async def test_mechanism_follows_the_offer(self, offered: str, credentials: Credentials, sent: list[str]) -> None:
        async def give() -> Credentials:
            return credentials

        script = {"EHLO": f"250-x\r\n250 AUTH {offered}", "AUTH": "334 VXNlcg==" if sent[0] == "AUTH LOGIN" else "235 2.7.0 ok",
                  "YW5U": "334 UGFzcw==", "CHC=": "235 2.7.0 ok"}
        async with Scripted(script).running() as server:
            upstream = Upstream(server.config(), credentials=give)
            await upstream.release(await upstream.acquire())
            assert server.seen[1:] == sent
            await upstream.close()

    @pytest.mark.parametrize(("mechanism", "answer"), [("XOAUTH2", ""), ("OAUTHBEARER", "AQ==")])
    async def test_a_refused_token_is_tried_once_and_the_mail_stays_queued(self, mechanism: str, answer: str) -> None:
        async def give() -> Credentials:
            return Credentials("anna", token="topsecret")

        script = {"EHLO": f"250-x\r\n250 AUTH {mechanism} PLAIN LOGIN", "AUTH": "334 eyJzdGF0dXMiOiI0MDEifQ==",
                  answer[:4].upper(): "535 5.7.8 no"}
        async with Scripted({**script, "": "220 hi"} if answer else Token(script, answer)).running() as server:
            with pytest.raises(UpstreamRefused) as refusal:
                await Upstream(server.config(), credentials=give).acquire()
            assert refusal.value.reply.code == 451
            assert "topsecret" not in f"{refusal.value!r} {refusal.value.reply}"
            assert sum(line.startswith("AUTH") for line in server.seen) == 1
            assert server.connections == 1

    async def test_one_try_only(self) -> None:
        async with Scripted({"EHLO": "250-x\r\n250 AUTH PLAIN LOGIN CRAM-MD5", "AUTH": "535 5.7.8 no"}).running() as server:
            with pytest.raises(UpstreamRefused):
                await Upstream(server.config(), credentials=secret).acquire()
            assert sum(line.startswith("AUTH") for line in server.seen) == 1

    def test_nothing_suitable(self) -> None:
        with pytest.raises(UpstreamError, match="CRAM-MD5"):
            choose_mechanism(("CRAM-MD5",), "auto", token=False)
        with pytest.raises(UpstreamError, match="OAUTHBEARER or XOAUTH2"):
            choose_mechanism(("PLAIN",), "auto", token=True)
        with pytest.raises(UpstreamError, match="LOGIN"):
            choose_mechanism(("PLAIN",), "login", token=False)

    def test_secrets_are_in_no_repr(self) -> None:
        assert "topsecret" not in repr(Credentials("anna", "topsecret", "topsecret"))

    async def test_pass_through_relays_the_exchange_and_the_reply(self) -> None:
        script = {"EHLO": "250-x\r\n250 AUTH LOGIN", "AUTH": "334 VXNlcg==", "YW5U": "334 UGFzcw==",
                  "CHC=": "535 5.7.8 own words"}
        challenges: list[bytes] = []

        async def answer(text: bytes) -> bytes | None:
            challenges.append(text)
            return b"anna" if text == b"User" else b"pw"

        async with Scripted(script).running() as server:
            connection = await Upstream(server.config()).connect()
            assert await connection.authenticate("LOGIN", None, answer) == Reply(535, "5.7.8", "own words")
            assert challenges == [b"User", b"Pass"]
            await connection.quit()


class TestReplies:
    @pytest.mark.parametrize(("data", "reply"), [
        (b"250 2.1.0 ok\r\n", Reply(250, "2.1.0", "ok")), (b"250\r\n", Reply(250, "", "")), (b"250 \n", Reply(250, "", "")),
        (b"250-2.1.0 a\r\n250 2.1.0 b\r\n", Reply(250, "2.1.0", "a\nb")),
        (b"250-a\r\n250-\r\n250 c\r\n", Reply(250, "", "a\n\nc")),
        (b"550 2.1.0 strange\r\n", Reply(550, "", "2.1.0 strange")), (b"250 a\x1bb\xff\r\n", Reply(250, "", "a?b?")),
    ])
    def test_parsed_whatever_the_chunks(self, data: bytes, reply: Reply) -> None:
        for split in range(len(data)):
            parser = ReplyParser()
            assert parser.feed(data[:split]) + parser.feed(data[split:]) == [reply]
            assert parser.empty

    @pytest.mark.parametrize("data", [
        b"hello\r\n", b"25 x\r\n", b"2500 x\r\n", b"150 x\r\n", b"600 x\r\n", b"250-a\r\n251 b\r\n", b"\r\n", b"250x\r\n",
        b"250 a\rb\r\n", b"250 " + b"x" * MAX_REPLY_LINE + b"\r\n", b"2" * (MAX_REPLY_LINE + 1), b"250-x\r\n" * 1000,
    ])
    def test_what_is_no_reply(self, data: bytes) -> None:
        with pytest.raises(ReplyFault):
            ReplyParser().feed(data)

    def test_check_reply(self) -> None:
        assert check_reply(Reply(250, "", "ok")).code == 250
        with pytest.raises(UpstreamRefused) as refusal:
            check_reply(Reply(550, "5.1.1", "no"))
        assert isinstance(refusal.value, MaloteError)


def Token(script: dict[str, str], answer: str) -> dict[str, str]:  # noqa: N802 - reads as a kind of script
    """An empty answer line has the verb "", which is the greeting's too: the first use is the greeting."""
    return {**script, "": ["220 hi", "535 5.7.8 no"]}  # type: ignore[dict-item]


def expire(certificate: Path, key: Path, directory: Path) -> None:
    """Sign the certificate again with a life that is over."""
    import subprocess
    (directory / "ca").mkdir()
    (directory / "ca" / "index").write_text("")
    (directory / "ca" / "serial").write_text("01\n")
    (directory / "ca.conf").write_text(f"""[ca]
default_ca = d
[d]
database = {directory}/ca/index
serial = {directory}/ca/serial
new_certs_dir = {directory}/ca
default_md = sha256
policy = p
x509_extensions = e
[p]
commonName = supplied
[e]
subjectAltName = DNS:localhost
""")
    request = directory / "request"
    for command in (f"req -new -key {key} -subj /CN=localhost -out {request}",
                    f"ca -batch -config {directory}/ca.conf -selfsign -keyfile {key} -in {request}"
                    f" -startdate 20200101000000Z -enddate 20200201000000Z -out {certificate}"):
        subprocess.run(["openssl", *command.split()], check=True, capture_output=True)


class tls_upstream:  # noqa: N801 - used as a function
    """A server with STARTTLS (or TLS from the start) and AUTH PLAIN, on a port of its own."""

    def __init__(self, context: ssl.SSLContext, *, implicit: bool) -> None:
        self.context, self.implicit = context, implicit

    async def __aenter__(self) -> int:
        self.server = await asyncio.start_server(self.serve, HOST, 0, ssl=self.context if self.implicit else None)
        port: int = self.server.sockets[0].getsockname()[1]
        return port

    async def __aexit__(self, *_: object) -> None:
        self.server.close()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tls = self.implicit
        try:
            writer.write(b"220 hi\r\n")
            while line := await reader.readline():
                if line.startswith(b"EHLO"):
                    writer.write(b"250-x\r\n250 AUTH PLAIN\r\n" if tls else b"250-x\r\n250 STARTTLS\r\n")
                elif line.startswith(b"STARTTLS"):
                    writer.write(b"220 go\r\n")
                    await writer.start_tls(self.context)
                    tls = True
                elif line.startswith(b"AUTH"):
                    writer.write(b"235 ok\r\n" if tls else b"538 no\r\n")
                else:
                    writer.write(b"221 bye\r\n")
        except (OSError, EOFError):
            pass
        writer.close()


def test_connection_is_a_protocol() -> None:
    assert issubclass(UpstreamConnection, asyncio.Protocol)
