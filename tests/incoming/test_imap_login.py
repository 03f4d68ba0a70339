"""Getting in: nothing leaves before TLS, every mechanism ends in a login or a clear refusal, no secret in any text."""

from __future__ import annotations

import asyncio
import base64
import ssl
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from lab.imap_peers import CAPABILITIES, Script, account, opened, scripted, secret
from lab.servers import Lab, make_certificate
from malote.errors import ConfigError, MailboxError, MailboxLost, SecretUnavailable
from malote.incoming import imap_login
from malote.incoming.mailbox import Mailbox
from malote.private_files import run_token_command

Play = Callable[[Script], Awaitable[None]]


async def refusal(play: Play, **changes: object) -> MailboxError:
    """What connecting to such a server raises."""
    async with scripted(play) as port:
        with pytest.raises(MailboxError) as caught:
            await Mailbox.connect(account(port, **changes), password=secret, command_seconds=0.5)
        await asyncio.sleep(0)
    return caught.value


@pytest.mark.parametrize("after", [b"", b"A1 OK injected\r\n", b"* CAPABILITY IMAP4rev1 AUTH=PLAIN\r\n"])
async def test_nothing_is_said_between_starttls_and_tls(lab: Lab, after: bytes) -> None:
    """CVE-2011-0411 and its kin: what an attacker adds before TLS would be read as if the server had said it inside."""
    said: list[bytes] = []

    async def play(script: Script) -> None:
        await script.send(b"* OK [CAPABILITY IMAP4rev1 STARTTLS] hi")
        tag = await script.until(b"STARTTLS")
        await script.send_raw(tag + b" OK go\r\n" + after)
        said.append(await script.gone())

    error = await refusal(play, security="starttls", host="localhost", ca_file=lab.certificate)
    assert isinstance(error, MailboxLost)
    if after:
        assert said == [b""] and "before the start of TLS" in str(error)         # noqa: PT018
    else:
        assert said[0][:1] == b"\x16"           # a TLS handshake, and nothing else, ever left


@pytest.mark.parametrize("answer", [b"NO not now", b"BAD what?"])
async def test_without_starttls_nothing_is_sent(lab: Lab, answer: bytes) -> None:
    """A stripped STARTTLS must not fall back to a login in clear."""
    heard: list[bytes] = []

    async def play(script: Script) -> None:
        await script.send(b"* OK hi")
        tag = await script.until(b"STARTTLS")
        await script.send(tag + b" " + answer)
        await script.gone()
        heard.extend(script.heard)

    error = await refusal(play, security="starttls", host="localhost", ca_file=lab.certificate)
    assert "start TLS" in str(error)
    assert len(heard) == 1


@pytest.mark.parametrize("security", ["starttls", "none"])
async def test_preauth_before_tls_is_refused(lab: Lab, security: str) -> None:
    """RFC 9051 7.1.4: PREAUTH would skip STARTTLS; mail would then be read and stored in clear."""
    heard: list[bytes] = []

    async def play(script: Script) -> None:
        await script.send(b"* PREAUTH welcome back")
        heard.append(await script.gone())

    error = await refusal(play, security=security, host="localhost", ca_file=lab.certificate)
    assert error.code == "PREAUTH"
    assert heard == [b""]


@pytest.mark.parametrize("greeting", [b"* BYE too many connections", b"220 smtp.example ESMTP", b"", b"* 1 EXISTS", b"+ OK",
                                      b"* OKAY PREAUTH"])
async def test_greetings_that_are_none(greeting: bytes) -> None:
    """Another protocol on the port, or a server that is full."""
    async def play(script: Script) -> None:
        await script.send(greeting)
        await script.gone()

    assert isinstance(await refusal(play), MailboxLost)


async def test_a_server_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A port that accepts and is silent is given up after a while."""
    monkeypatch.setattr(imap_login, "CONNECT_SECONDS", 0.2)

    async def play(script: Script) -> None:
        await script.gone()

    assert "did not answer" in str(await refusal(play))


async def test_nobody_listens() -> None:
    """A refused connection and a name that does not exist are MailboxLost with a reason."""
    async with scripted(Script.gone) as port:
        pass
    for host in ("127.0.0.1", "no-such-host.invalid", "." * 300):
        with pytest.raises(MailboxLost, match="cannot be reached"):
            await Mailbox.connect(account(port, host=host, security="tls"), password=secret)
        await asyncio.sleep(0)


async def test_a_certificate_for_another_name(lab: Lab) -> None:
    """The right authority is not enough: the name must be the one that was asked for."""
    certificate, key = make_certificate(lab.root, "elsewhere", ("elsewhere.example",))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)

    async def serve(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    async with server:
        cfg = account(server.sockets[0].getsockname()[1], security="tls", host="localhost", ca_file=certificate)
        with pytest.raises(MailboxLost) as caught:
            await Mailbox.connect(cfg, password=secret)
    assert caught.value.code == "CERTIFICATE"
    await asyncio.sleep(0.05)


async def test_clear_text_only_to_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """`security = "none"` to another machine is a mistake in the configuration, found before anything is sent."""
    class Elsewhere:
        def get_extra_info(self, _name: str) -> tuple[str, int]:
            return "192.0.2.7", 143

    with pytest.raises(ConfigError, match="loopback"):
        imap_login._check_loopback(Elsewhere(), account(143))       # type: ignore[arg-type]
    for address in ("127.0.0.1", "127.9.9.9", "::1"):
        monkeypatch.setattr(Elsewhere, "get_extra_info", lambda _self, _name, address=address: (address, 143))
        imap_login._check_loopback(Elsewhere(), account(143))       # type: ignore[arg-type]


# --- mechanisms ---

async def login_lines(auth: str, capabilities: str, **changes: Any) -> list[bytes]:
    """The lines that a login takes, against a server that accepts it."""
    lines: list[bytes] = []

    async def play(script: Script) -> None:
        await script.send(b"* OK hi")
        tag = await script.until(b"LOGIN" if auth == "login" else b"AUTHENTICATE", capabilities)
        lines.append(script.heard[-1].partition(b" ")[2])
        while lines[-1].endswith(b"}"):
            size = int(lines[-1][lines[-1].rindex(b"{") + 1:-1].rstrip(b"+"))
            await script.send_raw(b"+ go\r\n")
            lines.append(await script.read(size) + await script.line())
        if "SASL-IR" not in capabilities and auth != "login":
            await script.send(b"+ ")
            lines.append(await script.line())
        await script.send(tag + b" OK in")
        await script.until(b"nothing", CAPABILITIES + " AFTER")

    async with scripted(play) as port, opened(port, auth=auth, **changes) as box:
        assert "AFTER" in box.capabilities
    return lines


@pytest.mark.parametrize("user", ["anna", 'an "na\\', "änna@exämple.org", "anna smith", "anna)", "ann\r\nA LOGOUT"])
async def test_login_of_any_name(user: str) -> None:
    """Quoted where that is possible, a literal otherwise; never a second command."""
    lines = await login_lines("login", "IMAP4rev1", username=user)
    raw = user.encode()
    if raw.isascii() and b"\r" not in raw:
        quoted = raw.replace(b"\\", b"\\\\").replace(b'"', b'\\"')
        assert lines == [b'LOGIN "' + quoted + b'" "secret"']
    else:
        assert lines == [b"LOGIN {%d}" % len(raw), raw + b' "secret"']


@pytest.mark.parametrize("inline", [True, False])
async def test_plain(inline: bool) -> None:
    """RFC 4616, with and without an initial response."""
    lines = await login_lines("plain", "IMAP4rev1 AUTH=PLAIN" + " SASL-IR" * inline, username="änna")
    assert base64.b64decode(lines[-1].split(b" ")[-1]).decode() == "\0änna\0secret"


@pytest.mark.parametrize("inline", [True, False])
@pytest.mark.parametrize("auth", ["xoauth2", "oauthbearer"])
async def test_tokens_come_from_a_command(auth: str, inline: bool) -> None:
    """RFC 7628 and the older XOAUTH2; the command is run without a shell and its token used as it is."""
    command = (sys.executable, "-c", "print('tok.$HOME==')")
    capabilities = f"IMAP4rev1 AUTH={auth.upper()}" + " SASL-IR" * inline
    lines = await login_lines(auth, capabilities, username="a=n,na", token_command=command)
    said = base64.b64decode(lines[-1].split(b" ")[-1])
    if auth == "xoauth2":
        assert said == b"user=a=n,na\1auth=Bearer tok.$HOME==\1\1"
    else:
        assert said.startswith(b"n,a=a=3Dn=2Cna,\1host=127.0.0.1\1port=")
        assert said.endswith(b"\1auth=Bearer tok.$HOME==\1\1")


def is_running(pid: str) -> bool:
    """It may have ended and wait for its new parent to take notice."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def test_a_token_helper_that_hangs_is_ended_with_what_it_started(tmp_path: Path) -> None:
    """What it started holds its output open: the wait for the end of that would have no end."""
    started = tmp_path / "pid"
    with pytest.raises(SecretUnavailable, match="did not end"):
        async with asyncio.timeout(30):
            await run_token_command(("sh", "-c", f"sleep 600 & echo $! > {started}; sleep 600"), seconds=0.5)
    pid = started.read_text().strip() if started.exists() else ""       # "": it was ended before it could start anything
    while pid and is_running(pid):
        await asyncio.sleep(0.02)


@pytest.mark.parametrize("auth", ["xoauth2", "oauthbearer"])
async def test_a_rejected_token_is_answered_and_does_not_hang(auth: str) -> None:
    """The server explains itself in a challenge and waits for an answer to it; aioimaplib gave none and hung."""
    answers: list[bytes] = []

    async def play(script: Script) -> None:
        await script.send(b"* OK hi")
        tag = await script.until(b"AUTHENTICATE", f"IMAP4rev1 SASL-IR AUTH={auth.upper()}")
        await script.send(b"+ " + base64.b64encode(b'{"status":"401"}'))
        answers.append(await script.line())
        await script.send(tag + b" NO [AUTHENTICATIONFAILED] Bearer tok is bad")

    error = await refusal(play, auth=auth, token_command=(sys.executable, "-c", "print('tok')"))
    assert (error.code, answers) == ("AUTHENTICATIONFAILED", [b"AQ==" if auth == "oauthbearer" else b""])
    assert "tok is bad" not in str(error)


@pytest.mark.parametrize(("auth", "command", "capabilities", "expected"), [
    ("auto", (), "AUTH=PLAIN", "PLAIN"),
    ("auto", (), "", "LOGIN"),
    ("auto", (), "LOGINDISABLED AUTH=XOAUTH2", None),
    ("auto", ("x",), "AUTH=PLAIN AUTH=XOAUTH2", "XOAUTH2"),
    ("auto", ("x",), "AUTH=XOAUTH2 AUTH=OAUTHBEARER", "OAUTHBEARER"),
    ("auto", ("x",), "AUTH=PLAIN", None),
    ("login", (), "AUTH=PLAIN LOGINDISABLED", None),
    ("login", (), "AUTH=LOGIN", "LOGIN"),
    ("plain", (), "AUTH=LOGIN", None),
])
def test_the_mechanism_is_one_that_the_server_has(auth: str, command: tuple[str, ...], capabilities: str,
                                                  expected: str | None) -> None:
    """A token is never sent as a password, a password never as a token."""
    cfg = account(143, auth=auth, token_command=command)
    if expected is None:
        with pytest.raises(MailboxError) as caught:
            imap_login.choose_mechanism(set(capabilities.split()), cfg)
        assert caught.value.code == "NOAUTH"
    else:
        assert imap_login.choose_mechanism(set(capabilities.split()), cfg) == expected


@pytest.mark.parametrize(("program", "token"), [
    ("print('abc')", "abc"),
    ("print('{\"access_token\": \"abc\", \"expires_in\": 3600}')", "abc"),
    ("print('')", None),
    ("print('a b')", None),
    ("print('{}')", None),
    ("print('[1')", "[1"),
    ("print('{\"access_token\": 5}')", None),
    ("print('abc'); raise SystemExit(3)", None),
    ("print('x' * 100000)", None),
    ("import sys; sys.stdout.buffer.write(b'\\xff')", None),
    ("import time; print('abc', flush=True); time.sleep(60)", None),
])
async def test_token_commands(program: str, token: str | None) -> None:
    """Whatever the helper does, there is a token or a clear refusal, and no process is left behind."""
    command = (sys.executable, "-c", program)
    if token is None:
        with pytest.raises(SecretUnavailable) as caught:
            await run_token_command(command, seconds=0.7)
        assert "abc" not in str(caught.value)
    else:
        assert await run_token_command(command, seconds=20) == token


async def test_a_token_command_that_is_not_there() -> None:
    """Named, not a crash; and it is not handed to a shell."""
    for command in (("/no/such/program",), ("echo abc",)):
        with pytest.raises(SecretUnavailable, match="cannot be started"):
            await run_token_command(command)


@pytest.mark.parametrize(("mechanism", "secret_text"), [("PLAIN", "a\0b"), ("XOAUTH2", "a\1b"), ("OAUTHBEARER", "a\1b")])
def test_secrets_that_would_change_the_message(mechanism: str, secret_text: str) -> None:
    """A separator inside a secret would log in as somebody else."""
    with pytest.raises(MailboxError) as caught:
        imap_login.sasl_response(mechanism, account(143), secret_text)
    assert secret_text not in str(caught.value)
