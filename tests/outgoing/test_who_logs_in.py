"""Logins: by client certificate, checked at the upstream server over pooled connections; and what a login may send as."""

from __future__ import annotations

import asyncio
import base64
import smtplib
import ssl
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import structlog

from lab.authority import Authority
from lab.servers import Lab
from malote.config import ListenerConfig
from malote.errors import ConfigError
from malote.outgoing.users import PasswordHash, Users, hash_password, load_users
from malote.smtp.certificates import certificate_names
from malote.smtp.relay import Credentials
from outgoing.harness import HOST, Gateway, Outcome, Upstream, opened, person, text, upstream_config

ALICE, BOB = person("alice@test.example"), person("bob@test.example")
MALLORY = person("mallory@test.example")
PEOPLE = {ALICE.address: ALICE, MALLORY.address: MALLORY}
CHEAP = {"memory_kib": 64, "iterations": 1, "lanes": 1}     # only for testing!
CREDENTIALS = Credentials("gateway", "gateway-password")


def gateway(directory: Path, server: Upstream, listener: ListenerConfig, **more: Any) -> Gateway:
    values: dict[str, Any] = {"identities": PEOPLE, "cards": (BOB,), **more}
    username = "gateway" if values.get("credentials") else ""
    return Gateway(directory / "gw", upstream_config(server.port, username=username), listener, **values)


def users_file(directory: Path, lines: str) -> Path:
    path = directory / "users"
    path.write_text(lines)
    path.chmod(0o600)
    return path


# ---- client certificates

@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("pki") / "ours").make()


def certified(lab: Lab, authority: Authority, users: Path, tls: str = "starttls", auth: str = "certificate") -> ListenerConfig:
    return ListenerConfig.model_validate({
        "host": HOST, "tls": tls, "certificate": lab.certificate, "certificate_key": lab.key, "client_ca": authority.certificate,
        "auth": auth, "users_file": users})


def send(gw: Gateway, context: ssl.SSLContext, sender: str, *, implicit: bool = False, login: tuple[str, str] | None = None,
         external: bool = False) -> str:
    """The last reply, or the name of what ended the connection."""
    try:
        if implicit:
            client: smtplib.SMTP = smtplib.SMTP_SSL(HOST, gw.port, "client", timeout=20, context=context)
        else:
            client = smtplib.SMTP(HOST, gw.port, "client", timeout=20)
            client.starttls(context=context)
        with client:
            client.ehlo()
            if external:
                code, said = client.docmd("AUTH EXTERNAL", "=")
                if code != 235:
                    return f"{code} {said.decode()}"
            if login is not None:
                client.login(*login)
            for step in (lambda: client.mail(sender), lambda: client.rcpt(BOB.address), lambda: client.data(text(sender))):
                code, said = step()
                if code != 250:
                    break
            return f"{code} {said.decode()}"
    except (ssl.SSLError, smtplib.SMTPServerDisconnected, ConnectionError) as error:
        return type(error).__name__


def plain_context() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


@pytest.mark.parametrize("implicit", [False, True], ids=["starttls", "tls"])
async def test_a_certificate_is_a_login(tmp_path: Path, lab: Lab, authority: Authority, implicit: bool) -> None:
    """By any of its names that the users file lists; it signs and sends for its addresses only."""
    users = users_file(tmp_path, "alice@pki.example::alice@test.example\nmx.pki.example::@test.example\n"
                       "O=Test,CN=by subject::alice@test.example\nanna::alice@test.example\n")
    shown: dict[str, Callable[[], ssl.SSLContext]] = {
        "mail address": lambda: authority.client("mail", "/CN=x", "email:alice@pki.example"),
        "subject": lambda: authority.client("subject", "/O=Test/CN=by subject"),
        "common name": lambda: authority.client("common", "/O=Other/CN=anna", "DNS:unlisted.example"),
    }
    listener = certified(lab, authority, users, "tls" if implicit else "starttls")
    async with Upstream() as upstream, gateway(tmp_path, upstream, listener, credentials=CREDENTIALS) as gw:
        for name, make in shown.items():
            context = make()
            assert (await asyncio.to_thread(send, gw, context, ALICE.address, implicit=implicit)).startswith("250"), name
            said = await asyncio.to_thread(send, gw, context, MALLORY.address, implicit=implicit)
            assert "may not send from mallory@test.example" in said
        host = authority.client("host", "/CN=x", "DNS:mx.pki.example")
        for sender in PEOPLE:
            assert (await asyncio.to_thread(send, gw, host, sender, implicit=implicit)).startswith("250")
    assert [message.sender for message in upstream.messages] == [ALICE.address] * 4 + [MALLORY.address]
    assert opened(upstream.messages[0].content, BOB, ALICE).signature == "valid"


async def test_without_a_listed_certificate_nothing_is_sent(tmp_path: Path, lab: Lab, authority: Authority) -> None:
    """None, one that is not listed, one of another authority with the listed name, one that is for servers only."""
    users = users_file(tmp_path, "anna::alice@test.example\n")
    stranger = Authority(tmp_path / "stranger").make()
    async with Upstream() as upstream, gateway(tmp_path, upstream, certified(lab, authority, users)) as gw:
        assert (await asyncio.to_thread(send, gw, plain_context(), ALICE.address)).startswith(
            "530 5.7.0 A TLS client certificate is needed here")
        unlisted = authority.client("unlisted", "/CN=annb")
        assert (await asyncio.to_thread(send, gw, unlisted, ALICE.address)).startswith("550 5.7.1 Your TLS client certificate")
        for context in (stranger.client("anna", "/CN=anna"), authority.client("server", "/CN=anna", usage="serverAuth")):
            said = await asyncio.to_thread(send, gw, context, ALICE.address)
            assert not said[:1].isdigit(), "the handshake ends"
        assert (await asyncio.to_thread(send, gw, authority.client("last", "/CN=anna"), ALICE.address)).startswith("250")
    assert len(upstream.messages) == 1


async def test_auth_external_and_passwords_beside_certificates(tmp_path: Path, lab: Lab, authority: Authority) -> None:
    """Mail programs that have shown their certificate ask for AUTH EXTERNAL. It is offered only to those."""
    users = users_file(tmp_path, f"anna:{hash_password('pw', **CHEAP)}:alice@test.example\n")
    listener = certified(lab, authority, users, auth="local")
    async with Upstream() as upstream, gateway(tmp_path, upstream, listener) as gw:
        anna = authority.client("anna", "/CN=anna")
        assert (await asyncio.to_thread(send, gw, anna, ALICE.address, external=True)).startswith("250")
        assert (await asyncio.to_thread(send, gw, plain_context(), ALICE.address, external=True)).startswith("504")
        assert (await asyncio.to_thread(send, gw, plain_context(), ALICE.address, login=("anna", "pw"))).startswith("250")
        assert (await asyncio.to_thread(send, gw, anna, ALICE.address, login=("anna", "pw"))).startswith("250")
        assert (await asyncio.to_thread(send, gw, plain_context(), ALICE.address)).startswith("530 5.7.0 Log in first")

        def external_for_another() -> int:
            with smtplib.SMTP(HOST, gw.port, "client") as client:
                client.starttls(context=anna)
                client.ehlo()
                return client.docmd("AUTH EXTERNAL", base64.b64encode(b"ben").decode())[0]
        assert await asyncio.to_thread(external_for_another) == 535
    assert len(upstream.messages) == 3


async def test_openssl_as_a_client_with_its_certificate(tmp_path: Path, lab: Lab, authority: Authority) -> None:
    users = users_file(tmp_path, "anna::alice@test.example\n")
    authority.client("openssl", "/CN=anna")
    async with Upstream() as upstream, gateway(tmp_path, upstream, certified(lab, authority, users)) as gw:
        process = await asyncio.create_subprocess_exec(
            "openssl", "s_client", "-starttls", "smtp", "-connect", f"{HOST}:{gw.port}", "-quiet", "-crlf", "-ign_eof",
            "-cert", str(authority.directory / "openssl.pem"), "-key", str(authority.directory / "openssl.key"),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL)
        commands = f"EHLO x\nMAIL FROM:<{ALICE.address}>\nRCPT TO:<{BOB.address}>\nDATA\n"
        said, _ = await asyncio.wait_for(process.communicate(
            commands.encode() + text().replace(b"\r\n", b"\n") + b".\nQUIT\n"), 30)
        assert b"250-AUTH" not in said
        assert said.splitlines()[-1].startswith(b"221")
    assert len(upstream.messages) == 1


async def test_the_certificate_of_a_peer_is_not_that_of_the_client_it_speaks_for(
        tmp_path: Path, lab: Lab, authority: Authority) -> None:
    users = users_file(tmp_path, "mx.pki.example::@test.example\n")
    listener = certified(lab, authority, users).model_copy(update={"xclient": (HOST,)})
    shown = authority.client("peer", "/CN=x", "DNS:mx.pki.example")
    async with Upstream() as upstream, gateway(tmp_path, upstream, listener) as gw:
        def attempt(when: str) -> int:
            with smtplib.SMTP(HOST, gw.port, "client") as client:
                for step in ("xclient", "starttls") if when == "before" else ("starttls", "xclient"):
                    client.ehlo()
                    if step == "xclient":
                        assert client.docmd("XCLIENT", "ADDR=127.0.0.1")[0] == 220
                    else:
                        client.starttls(context=shown)
                client.ehlo()
                return client.mail(ALICE.address)[0]
        assert [await asyncio.to_thread(attempt, when) for when in ("before", "after")] == [530, 530]


def test_a_subject_cannot_look_like_another() -> None:
    """Whoever may choose a part of the name cannot write the separators of the others into it."""
    certificate = {"subject": ((("organizationName", "x,CN=anna"),), (("commonName", "mallory"),))}
    assert certificate_names(certificate) == ("O=x\\,CN\\=anna,CN=mallory", "mallory")
    assert certificate_names({"subject": ((("commonName", "a"),), (("commonName", "b"),))}) == ("CN=a,CN=b",), "which one is it?"
    assert certificate_names(None) == certificate_names({}) == ()


# ---- a login that only we know is held to its addresses

@pytest.mark.parametrize("senders", ["auto", "own", "any"])
async def test_a_local_login_sends_from_its_own_addresses_sealed_or_not(tmp_path: Path, senders: Any) -> None:
    users = users_file(tmp_path, f"anna:{hash_password('pw', **CHEAP)}:alice@test.example,@own.example\n")
    listener = ListenerConfig(host=HOST, auth="local", users_file=users, senders=senders)
    async with Upstream() as upstream, gateway(tmp_path, upstream, listener, credentials=CREDENTIALS) as gw:
        async def submit(envelope: str, header: str) -> Outcome:
            return await gw.submit(envelope, ["y@else.example"], text(header, "y@else.example"), login=("anna", "pw"))
        for envelope, header in ((ALICE.address, ALICE.address), ("x@own.example", ALICE.address), ("", "anybody@own.example")):
            assert (await submit(envelope, header)).code == 250
        for envelope, header in ((MALLORY.address, ALICE.address), (ALICE.address, MALLORY.address), ("", "boss@test.example"),
                                 ("x@sub.own.example", ALICE.address)):
            done = await submit(envelope, header)
            if senders == "any":
                assert done.code == 250
            else:
                wrong = header if header != ALICE.address else envelope
                assert done.data.startswith(f"550 5.7.1 Your login anna may not send from {wrong}")
    assert len(upstream.messages) == (7 if senders == "any" else 3)


async def test_a_refused_login_is_logged_with_where_it_came_from_and_no_more(tmp_path: Path) -> None:
    """For whoever counts guesses by address (fail2ban). The name is left out: people type their password there."""
    users = users_file(tmp_path, f"anna:{hash_password('pw', **CHEAP)}:alice@test.example\n")
    listener = ListenerConfig(host=HOST, auth="local", users_file=users)
    async with Upstream() as upstream, gateway(tmp_path, upstream, listener) as gw:
        with structlog.testing.capture_logs() as lines, pytest.raises(smtplib.SMTPAuthenticationError):
            await gw.submit(ALICE.address, [BOB.address], text(), login=("secret-name", "secret-word"))
    refused = [line for line in lines if line["event"] == "login refused"]
    assert refused
    assert all((line["client"], line["reply"]) == (HOST, 535) for line in refused)
    assert "secret" not in str(lines)


async def test_every_way_to_write_another_sender_is_refused(tmp_path: Path) -> None:
    """What a reader's program would show must be an address of the login, however it is written; what is unclear does not go."""
    users = users_file(tmp_path, f"anna:{hash_password('pw', **CHEAP)}:alice@test.example,@xn--bcher-kva.example\n")
    listener = ListenerConfig(host=HOST, auth="local", users_file=users)
    async with Upstream() as upstream, gateway(tmp_path, upstream, listener, credentials=CREDENTIALS) as gw:
        async def submit(envelope: str, header: str) -> int:
            message = f"{header}\r\nTo: y@else.example\r\nSubject: x\r\n\r\ntext\r\n".encode()
            done = await gw.submit(envelope, ["y@else.example"], message, login=("anna", "pw"))
            return done.code
        for header in ("From: Alice@TEST.Example", 'From: "alice"@test.example', "From: Boss <alice@test.example>",
                       "From: x@b\u00fccher.example", "From:\r\n (mallory@test.example)\r\n alice@test.example",
                       "Sender: mallory@test.example\r\nFrom: alice@test.example"):
            assert await submit(ALICE.address, header) == 250, header
        assert await submit("ALICE@test.example", "From: alice@test.example") == 250
        taken = len(upstream.messages)
        for header in ("From: mallory@test.example\r\nFrom: alice@test.example",
                       "From: alice@test.example\r\nFROM : mallory@test.example",
                       "From: alice@test.example, mallory@test.example", "From: team: mallory@test.example;", "From: team:;",
                       'From: "alice@test.example" <mallory@test.example>', "From: alice@test.example <mallory@test.example>",
                       "From: mallory@test.example (alice@test.example)",
                       "From: =?utf-8?q?alice=40test.example?= <mallory@test.example>",
                       "From: alice@test.example\0@else.example", "From: \u0430lice@test.example", "X-None: here", "From:"):
            assert 500 <= await submit(ALICE.address, header) < 600, header
        for envelope in ("mallory@test.example", '"mallory"@test.example', "MALLORY@TEST.EXAMPLE",
                         "alice@test.example.else.example"):
            assert await submit(envelope, "From: alice@test.example") == 550, envelope
        assert len(upstream.messages) == taken


async def test_pass_through_leaves_it_to_the_server_that_knows_the_login(tmp_path: Path) -> None:
    async with Upstream() as upstream:
        for senders, code in (("auto", 250), ("own", 550)):
            listener = ListenerConfig.model_validate({"host": HOST, "senders": senders})
            async with gateway(tmp_path / senders, upstream, listener) as gw:
                done = await gw.submit("x@test.example", ["y@else.example"], text("x@test.example", "y@else.example"),
                                       login=("alice@test.example", "pw"))
                assert done.code == code


# ---- logins checked at the upstream server, mail over pooled connections

async def test_the_upstream_checks_the_login_and_pooled_connections_carry_the_mail(tmp_path: Path) -> None:
    """Mail of all goes over connections with the gateway's own login; what a client says is only asked about, on a connection
    that carries no mail and ends at once."""
    listener = ListenerConfig(host=HOST, auth="upstream")
    wrong = [base64.b64encode(each).decode() for each in (b"\0alice@test.example\0wrong", b"wrong")]   # PLAIN, LOGIN

    def script(step: str, argument: str, _number: int) -> str | bool:
        return "535 5.7.8 upstream says no" if step == "AUTH" and argument.split(" ")[-1] in wrong else False
    async with Upstream(script) as upstream, gateway(tmp_path, upstream, listener, credentials=CREDENTIALS) as gw:
        for sender in PEOPLE:
            done = await gw.submit(sender, [BOB.address], text(sender), login=(sender, "pw"))
            assert done.code == 250
        done = await gw.submit(MALLORY.address, [BOB.address], text(MALLORY.address), login=(ALICE.address, "pw"))
        assert done.data.startswith("550 5.7.1 Your login alice@test.example may not send from mallory@test.example")
        assert (await gw.submit(ALICE.address, [BOB.address], text())).data.startswith("530 5.7.0 Log in first")
        with pytest.raises(smtplib.SMTPAuthenticationError) as caught:
            await gw.submit(ALICE.address, [BOB.address], text(), login=(ALICE.address, "wrong"))
        assert caught.value.smtp_error == b"5.7.8 upstream says no"
        carried = {message.connection for message in upstream.messages}
        assert len(carried) == 1
        assert upstream.logins[carried.pop()] == base64.b64encode(b"\0gateway\0gateway-password")
        assert upstream.open == 1, "the connections on which logins were checked are closed"
    assert len(upstream.messages) == 2


@pytest.mark.parametrize("mechanism", ["LOGIN", "XOAUTH2"])
async def test_other_mechanisms_go_to_the_upstream_too(tmp_path: Path, mechanism: str) -> None:
    listener = ListenerConfig(host=HOST, auth="upstream")
    first = b"alice@test.example" if mechanism == "LOGIN" else b"user=alice@test.example\x01auth=Bearer token\x01\x01"
    async with Upstream() as upstream, gateway(tmp_path, upstream, listener, credentials=CREDENTIALS) as gw:
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


@pytest.mark.parametrize("auth", ["pass-through", "upstream"])
async def test_a_server_that_cannot_be_asked_is_no_wrong_password(tmp_path: Path, auth: Any) -> None:
    """454, never 535: a mail program that is told that its password is wrong asks its owner for another, and forgets it."""
    cut = {"AUTH"}

    def script(step: str, _argument: str, _number: int) -> str | bool | None:
        return None if step in cut else False
    async with Upstream(script) as upstream, gateway(
            tmp_path, upstream, ListenerConfig(host=HOST, auth=auth), credentials=None) as gw:
        def attempt() -> tuple[int, bytes]:
            with smtplib.SMTP(HOST, gw.port, "client") as client:
                client.ehlo()
                if auth == "upstream":
                    cut.add("CONNECT")
                return client.docmd("AUTH", "PLAIN " + base64.b64encode(b"\0alice@test.example\0pw").decode())
        code, said = await asyncio.to_thread(attempt)
    assert (code, said[:5]) == (454, b"4.7.0")


# ---- passwords are dear to check

async def test_who_guesses_on_many_connections_waits_for_himself(monkeypatch: pytest.MonkeyPatch) -> None:
    """A guess takes a tenth of a second of a thread. Others wait for one of them, not for all."""
    order: list[str] = []
    begun, go_on = threading.Event(), threading.Event()

    def check(_hash: PasswordHash, password: bytes) -> bool:
        begun.set()
        assert go_on.wait(20)
        order.append(password.decode())
        return False
    monkeypatch.setattr(PasswordHash, "fits", check)
    users = Users()
    guesses = [asyncio.create_task(users.check_password("anna", f"guess {number}", "192.0.2.1")) for number in range(50)]
    assert await asyncio.to_thread(begun.wait, 20)
    honest = asyncio.create_task(users.check_password("anna", "honest", "192.0.2.2"))
    await asyncio.sleep(0)
    go_on.set()
    await honest
    assert order.index("honest") <= 2
    assert await asyncio.gather(*guesses) == [None] * 50


async def test_who_leaves_while_his_password_waits_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[bytes] = []
    begun, go_on = threading.Event(), threading.Event()

    def check(_hash: PasswordHash, password: bytes) -> bool:
        begun.set()
        assert go_on.wait(20)
        checked.append(password)
        return False
    monkeypatch.setattr(PasswordHash, "fits", check)
    users = Users()
    guesses = [asyncio.create_task(users.check_password("anna", "guess", f"192.0.2.{number}")) for number in range(50)]
    assert await asyncio.to_thread(begun.wait, 20)
    for guess in guesses:
        guess.cancel()
    await asyncio.gather(*guesses, return_exceptions=True)
    go_on.set()
    assert await users.check_password("anna", "last", "192.0.2.1") is None
    assert checked == [b"guess", b"last"]


def test_an_unknown_login_costs_what_the_others_cost(tmp_path: Path) -> None:
    """Else the time tells which logins there are."""
    users = load_users(users_file(tmp_path, f"anna:{hash_password('pw', **CHEAP)}:\nuwe::\n"))
    asked: list[PasswordHash] = []

    def check(hashed: PasswordHash, _password: bytes) -> bool:
        asked.append(hashed)
        return True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PasswordHash, "fits", check)
        assert asyncio.run(users.check_password("anna", "pw")) is not None
        assert asyncio.run(users.check_password("nobody", "pw")) is None
        assert asyncio.run(users.check_password("uwe", "pw")) is None
    assert {(each.memory_kib, each.iterations, each.lanes) for each in asked} == {(64, 1, 1)}
    assert len(asked) == 3


@pytest.mark.parametrize("mode", [0o644, 0o602, 0o606])
def test_a_users_file_that_others_read_or_change_is_not_used(tmp_path: Path, mode: int) -> None:
    path = users_file(tmp_path, "anna::alice@test.example\n")
    path.chmod(mode)
    with pytest.raises(ConfigError, match="others can read the password hashes in it, or change them"):
        load_users(path)
