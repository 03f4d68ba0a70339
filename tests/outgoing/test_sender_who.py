"""Who may be signed for: the login that the upstream accepted, a local login, or the user at a UNIX socket; nobody else."""

from __future__ import annotations

import asyncio
import base64
import os
import pwd
import smtplib
import socket
from pathlib import Path
from typing import Any

import pytest
import structlog

from malote.config import ListenerConfig
from malote.errors import MaloteError
from malote.outgoing.users import hash_password
from malote.smtp.desk import ClientSession
from malote.smtp.relay import Credentials
from outgoing import harness
from outgoing.harness import HOST, Gateway, Outcome, Upstream, opened, person, text, upstream_config

ALICE, BOB = person("alice@test.example"), person("bob@test.example")
MALLORY = person("mallory@test.example")
IDENTITIES = {ALICE.address: ALICE, MALLORY.address: MALLORY}
PASS_THROUGH = ListenerConfig(host=HOST)
CHEAP = {"memory_kib": 64, "iterations": 1, "lanes": 1}     # only for testing!


def gateway(directory: Path, server: Upstream, listener: ListenerConfig = PASS_THROUGH, username: str = "",
            **more: Any) -> Gateway:
    config = upstream_config(server.port, username=username)
    return Gateway(directory, config, listener, **({"cards": (BOB,), "identities": IDENTITIES} | more))


async def send(gw: Gateway, sender: str, login: tuple[str, str] | None = None, recipient: str = BOB.address) -> Outcome:
    return await gw.submit(sender, [recipient], text(sender, recipient), login=login)


# ---- pass-through

async def test_the_login_that_the_upstream_accepted_may_sign_for_its_own_address(tmp_path: Path) -> None:
    async with Upstream() as upstream, gateway(tmp_path, upstream) as gw:
        assert (await send(gw, ALICE.address, ("alice@test.example", "pw"))).code == 250
    assert opened(upstream.messages[0].content, BOB, ALICE).signature == "valid"
    assert upstream.logins[upstream.messages[0].connection] == base64.b64encode(b"\0alice@test.example\0pw")


async def test_another_login_may_not(tmp_path: Path) -> None:
    async with Upstream() as upstream, gateway(tmp_path, upstream) as gw:
        for login in ("mallory@test.example", "alice", "alice@else.example", "alice@test.example.else.example"):
            done = await send(gw, ALICE.address, (login, "pw"))
            assert done.data.startswith("550 5.7.1 This login may not sign")
        assert (await send(gw, MALLORY.address, ("mallory@test.example", "pw"))).code == 250
    assert len(upstream.messages) == 1


async def test_without_login_nobody_signs_even_on_this_machine(tmp_path: Path) -> None:
    async with Upstream() as upstream, gateway(tmp_path, upstream) as gw:
        assert (await send(gw, ALICE.address)).data.startswith("550 5.7.1 This login may not sign")
        assert (await send(gw, "x@test.example", recipient="y@else.example")).code == 250, "mail that is not to be sealed passes"
    assert len(upstream.messages) == 1


@pytest.mark.parametrize("loopback", [True, False], ids=["loopback", "network"])
async def test_from_the_network_nobody_passes_through_without_a_login(tmp_path: Path, loopback: bool) -> None:
    """The upstream server sees our address, and may trust it: we would be an open relay, and tell strangers who has a card."""
    async with Upstream() as upstream, gateway(tmp_path, upstream) as gw:
        session = ClientSession("s1", "192.0.2.7", None, loopback, tls=True)
        await gw.desk.offer(session)
        if loopback:
            assert (await gw.desk.mail(session, "x@test.example", {})).code == 250
        else:
            with pytest.raises(MaloteError) as caught:
                await gw.desk.mail(session, "x@test.example", {})
            assert caught.value.reply.code == 530
            session.login = (await gw.desk.authenticate(session, "PLAIN", b"\0alice@test.example\0pw")).login
            assert (await gw.desk.mail(session, ALICE.address, {})).code == 250
        await gw.desk.close(session)
    assert "MAIL" not in upstream.steps


async def test_a_users_file_binds_a_login_of_the_upstream_to_addresses(tmp_path: Path) -> None:
    users = tmp_path / "users"
    users.write_text("u4711::alice@test.example\n")
    users.chmod(0o600)
    listener = ListenerConfig(host=HOST, users_file=users)
    async with Upstream() as upstream, gateway(tmp_path / "gw", upstream, listener) as gw:
        assert (await send(gw, ALICE.address, ("u4711", "pw"))).code == 250
        assert (await send(gw, MALLORY.address, ("u4711", "pw"))).code == 550


async def test_a_refused_login_gets_the_upstreams_own_words_and_signs_nothing(tmp_path: Path) -> None:
    async with Upstream(lambda step, argument, number: "535 5.7.8 upstream says no" if step == "AUTH" else False) as upstream, \
            gateway(tmp_path, upstream) as gw:
        def attempt() -> None:
            with smtplib.SMTP(HOST, gw.port, "client") as client:
                client.ehlo()
                reply = client.docmd("AUTH", "PLAIN " + base64.b64encode(b"\0alice@test.example\0pw").decode())
                assert reply == (535, b"5.7.8 upstream says no")
                with pytest.raises(smtplib.SMTPDataError) as caught:
                    client.sendmail(ALICE.address, [BOB.address], text())
                assert caught.value.smtp_code == 550
        await asyncio.to_thread(attempt)
    assert upstream.messages == []


@pytest.mark.parametrize("mechanism", ["PLAIN", "LOGIN", "XOAUTH2", "OAUTHBEARER"])
async def test_every_mechanism_is_passed_on_as_it_is(tmp_path: Path, mechanism: str) -> None:
    first = {"PLAIN": b"\0alice@test.example\0pw", "LOGIN": b"alice@test.example",
             "XOAUTH2": b"user=alice@test.example\x01auth=Bearer tok\x01\x01",
             "OAUTHBEARER": b"n,a=alice@test.example,\x01host=x\x01auth=Bearer tok\x01\x01"}[mechanism]
    async with Upstream() as upstream, gateway(tmp_path, upstream) as gw:
        def attempt() -> None:
            with smtplib.SMTP(HOST, gw.port, "client") as client:
                client.ehlo()
                code, answer = client.docmd("AUTH", f"{mechanism} {base64.b64encode(first).decode()}")
                if mechanism == "LOGIN":
                    assert code == 334
                    code, answer = client.docmd(base64.b64encode(b"pw").decode())
                assert (code, answer) == (235, b"2.7.0 upstream says welcome")
                client.sendmail(ALICE.address, [BOB.address], text())
        await asyncio.to_thread(attempt)
    assert len(upstream.messages) == 1
    assert upstream.logins[1].startswith(base64.b64encode(first))


@pytest.mark.parametrize(("mechanism", "first", "rest"), [
    ("LOGIN", b"alice@test.example", [b"mallory@test.example", b"pw"]),
    ("PLAIN", b"\0alice@test.example\0pw", [b"\0mallory@test.example\0pw"]),
    ("LOGIN", b"alice@test.example", []),
])
async def test_a_server_that_asks_again_is_told_who_it_is_and_we_believe_nobody(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mechanism: str, first: bytes, rest: list[bytes]) -> None:
    """Some servers pass over the initial response: the name in it is then not the one that they let in."""
    async def auth(conversation: Any, _command: str) -> bool:
        for _ in rest:
            await conversation._say("334 ")
            await conversation.reader.readline()
        return bool(await conversation._say("235 2.7.0 welcome, whoever you said last"))
    monkeypatch.setattr(harness._Conversation, "_auth", auth)
    async with Upstream() as upstream, gateway(tmp_path, upstream) as gw:
        def attempt() -> None:
            with smtplib.SMTP(HOST, gw.port, "client") as client:
                client.ehlo()
                code, _ = client.docmd("AUTH", f"{mechanism} {base64.b64encode(first).decode()}")
                for each in rest:
                    assert code == 334
                    code, _ = client.docmd(base64.b64encode(each).decode())
                assert code == 235
                for sender in (ALICE.address, MALLORY.address):
                    with pytest.raises(smtplib.SMTPDataError) as caught:
                        client.sendmail(sender, [BOB.address], text(sender))
                    assert "5.7.1 This login may not sign" in str(caught.value)
        await asyncio.to_thread(attempt)
    assert upstream.messages == []


async def test_a_session_has_its_own_connection_that_ends_with_it(tmp_path: Path) -> None:
    async with Upstream() as upstream, gateway(tmp_path, upstream) as gw:
        for address in (ALICE.address, MALLORY.address):
            assert (await send(gw, address, (address, "pw"))).code == 250
        assert [message.connection for message in upstream.messages] == [1, 2]
        for _ in range(100):
            if not upstream.open:
                break
            await asyncio.sleep(0.02)
        assert upstream.open == 0


async def test_credentials_are_in_no_log_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with structlog.testing.capture_logs() as lines:
        async with Upstream() as upstream, gateway(tmp_path, upstream) as gw:
            await send(gw, ALICE.address, (ALICE.address, "pa55word"))
            assert b"pa55word" not in b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    seen = repr(lines) + "".join(capsys.readouterr())
    assert len(lines) == 1
    assert "pa55word" not in seen
    assert base64.b64encode(b"pa55word").decode()[:8] not in seen
    assert "secret" not in seen


# ---- the listener's own authentication

async def test_a_local_login_signs_for_its_addresses_only(tmp_path: Path) -> None:
    users = tmp_path / "users"
    users.write_text(f"anna:{hash_password('pw', **CHEAP)}:alice@test.example\n")
    users.chmod(0o600)
    listener = ListenerConfig(host=HOST, auth="local", users_file=users, senders="any")
    credentials = Credentials("gateway", "gateway-password")
    async with Upstream() as upstream, gateway(
            tmp_path / "gw", upstream, listener, credentials=credentials, username="gateway") as gw:
        assert (await send(gw, ALICE.address, ("anna", "pw"))).code == 250
        assert (await send(gw, MALLORY.address, ("anna", "pw"))).data.startswith("550 5.7.1 This login may not sign")
        with pytest.raises(smtplib.SMTPAuthenticationError) as caught:
            await send(gw, ALICE.address, ("anna", "wrong"))
        assert caught.value.smtp_code == 535
        assert (await send(gw, ALICE.address)).data.startswith("530 5.7.0")
        assert set(upstream.logins.values()) == {base64.b64encode(b"\0gateway\0gateway-password")}
    assert len(upstream.messages) == 1
    assert upstream.messages[0].connection == 1


@pytest.mark.parametrize("auth", ["none", "pass-through"])
async def test_configured_credentials_are_not_for_whoever_connects(tmp_path: Path, auth: Any) -> None:
    listener = ListenerConfig(host=HOST, auth=auth)
    async with Upstream() as upstream, gateway(
            tmp_path, upstream, listener, credentials=Credentials("gateway", "pw"), username="gateway") as gw:
        assert (await send(gw, ALICE.address)).data.startswith("550 5.7.1")
        assert (await send(gw, "x@test.example", recipient="y@else.example")).data.startswith("550 5.7.1")
    assert upstream.messages == []


async def test_the_user_of_this_program_may_sign_over_its_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    listener = ListenerConfig(auth="peer", socket=path)
    async with Upstream() as upstream, gateway(tmp_path / "gw", upstream, listener) as gw:
        def attempt() -> int:
            with _UnixSMTP(path) as client:
                client.sendmail(ALICE.address, [BOB.address], text())
                return client.noop()[0]
        assert await asyncio.to_thread(attempt) == 250
        assert len(upstream.messages) == 1
        assert gw.port == 0


async def test_another_local_user_may_not(tmp_path: Path) -> None:
    """The uid comes from the kernel (SO_PEERCRED); a real process of the user `nobody` at the other end."""
    path = tmp_path / "socket"
    listener = ListenerConfig(auth="peer", socket=path)
    for directory in (tmp_path, *tmp_path.parents[:3]):
        directory.chmod(directory.stat().st_mode | 0o011)
    async with Upstream() as upstream, gateway(tmp_path / "gw", upstream, listener):
        process = await asyncio.create_subprocess_exec(
            "python3", "-c", OTHER_USER, str(path),
            stdout=asyncio.subprocess.PIPE, user="nobody")
        output, _ = await process.communicate()
        assert output.startswith(b"550 5.7.1 This user of the machine may not send here")
    assert upstream.messages == []


async def test_a_listed_local_user_signs_for_the_listed_addresses(tmp_path: Path) -> None:
    users = tmp_path / "users"
    users.write_text("nobody::mallory@test.example\n")
    users.chmod(0o600)
    listener = ListenerConfig(host=HOST, auth="peer", users_file=users, senders="any")
    uid = pwd.getpwnam("nobody").pw_uid
    async with Upstream() as upstream, gateway(tmp_path / "gw", upstream, listener) as gw:
        session = ClientSession("s1", "unix", uid, True)
        for sender, code in ((ALICE.address, 550), (MALLORY.address, 250)):
            await gw.desk.offer(session)
            assert (await gw.desk.mail(session, sender, {})).code == 250
            assert (await gw.desk.rcpt(session, BOB.address, {})).code == 250
            try:
                reply = await gw.desk.data(session, bytearray(text(sender)))
            except Exception as error:  # noqa: BLE001 - whatever it is, it must carry the reply
                reply = error.reply  # type: ignore[attr-defined]
            assert reply.code == code
        await gw.desk.close(session)
    assert len(upstream.messages) == 1
    assert os.geteuid() != uid


OTHER_USER = """
import socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.connect(sys.argv[1])
stream = connection.makefile("rwb")
def ask(line):
    stream.write(line + b"\\r\\n")
    stream.flush()
    while (reply := stream.readline())[3:4] == b"-":
        pass
    return reply
stream.readline()
ask(b"EHLO x")
print(ask(b"MAIL FROM:<alice@test.example>").decode())
"""


class _UnixSMTP(smtplib.SMTP):
    def __init__(self, path: Path) -> None:
        self._path = path
        super().__init__(HOST, 25, "client")

    def _get_socket(self, host: str, port: int, timeout: float) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(self._path))
        return connection
