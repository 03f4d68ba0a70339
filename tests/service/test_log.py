"""What the log holds and what never gets into it."""

from __future__ import annotations

import imaplib
import json
import logging
import smtplib
import sys
import threading
from base64 import b64encode
from collections.abc import Iterator
from contextlib import closing, suppress
from datetime import UTC, datetime

import pytest
import structlog

from lab.daemon import PASSPHRASE, Home, account, free_port, listener, rule, upstream
from lab.incoming import Client
from lab.oauth import access_token, oauth_settings
from lab.servers import HOST, Dovecot, Lab
from malote.config import LogConfig
from malote.core.identity import serialize_identity
from malote.identities import open_identities
from malote.logs import configure_logs, hook_uncaught
from malote.store import Store


async def test_nothing_private_in_the_log_of_a_real_run(home: Home, lab: Lab) -> None:
    """Level debug, `addresses = false`: mail sealed, refused, opened, repeated, damaged, forged; logins right and wrong, by
    password and by token; reload and end. No address, subject, text, attachment name, password, passphrase or key is in it; no
    token is in it, nor in what `malote log` and `malote check` say."""
    ada, bea, cid = "ada-mk1@privmk2.example", "bea-mk3@privmk4.example", "cid-mk5@privmk6.example"
    password = "passwmk7"
    dovecot = lab.dovecot([ada, bea], passwords={ada: password, bea: password},
                          extra=oauth_settings(lab.root / "oauth-of-the-log"))
    postfix = lab.postfix(dovecot.lmtp_hop, auth_port=dovecot.auth_port)
    home.secret("password", password)
    home.secret("bad", "passwmk8")
    tokens = {"token": access_token(ada), "bad-token": access_token(ada, key=b"another")}
    for name, token in tokens.items():
        home.secret(name, token)
    port = free_port()
    home.configure(listener(port) + upstream(postfix.submission_port, lab.certificate) + rule("require")
                   + account(bea, dovecot.imaps_port, lab.certificate, home, name="work")
                   + account(ada, dovecot.imaps_port, lab.certificate, home, name="broken", password="bad")
                   + "".join(by_token(ada, dovecot, lab, home, name) for name in tokens))
    for address in (ada, bea):
        home.keys("new", address, "--algorithm", "ed25519")
    message = (f"From: Name-mk9 <{ada}>\r\nTo: {bea}\r\nSubject: subjmk10\r\nMessage-ID: <idmk11@privmk2.example>\r\n"
               f"X-Odd: headmk12\r\n\r\nbodymk13\r\n").encode()
    with home.daemon() as daemon:
        with closing(smtplib.SMTP(HOST, port)) as client:
            with suppress(smtplib.SMTPAuthenticationError):
                client.login(ada, "passwmk14")
            client.login(ada, password)
            client.mail(ada)
            assert client.rcpt(cid)[0] == 550
            client.docmd("RCPT", "TO:<broken-mk15")
            client.rset()
            client.sendmail(ada, [bea], message)
            client.mail(ada)
            client.rcpt(bea)
            assert client.data(b"From: mk16@privmk2.example\r\nFrom: mk17@privmk2.example\r\n\r\nbodymk13")[0] >= 500
        daemon.wait_for_log('"outcome": "opened"')
        reader = client_of(dovecot, bea, password)
        sealed = reader.fetch("Malote/Sealed")[0]
        reader.put(sealed)
        reader.put(sealed[: len(sealed) // 2] + b"\r\n")
        reader.put(b"From: mk18@privmk19.example\r\nMalote-Verdict: FRESH; forgedmk20\r\nSubject: subjmk10\r\n\r\nbodymk13\r\n")
        daemon.wait_for_log('"outcome": "quarantined", "verdict": "DUPLICATE"|DUPLICATE')
        daemon.wait_for_log("UNREADABLE")
        home.config.write_text(home.config.read_text() + "\n[nonsense]\nvalue = 1\n")
        daemon.reload()
        reader.close()
        daemon.wait_for_log('"account": "token".*"mailbox open"')
        daemon.wait_for_log('"account": "bad-token"')
        assert daemon.stop() == 0
    text = daemon.text()
    shown = [home.malote(*command) for command in (("log",), ("log", "--json"), ("check",), ("check", "--json"))]
    for output in (text, *(f"{done.stdout.decode()}{done.stderr.decode()}" for done in shown)):
        assert not [piece for token in tokens.values() for piece in token.split(".")[1:] if piece in output]
    events = {line["event"] for line in daemon.records()}
    assert events >= {"ready", "message", "mailbox open", "mailbox not available", "stopped"}
    assert "mk" not in text.replace("mkdir", ""), next(line for line in text.split("\n") if "mk" in line)
    assert PASSPHRASE not in text
    store = await Store.open(home.root / "store")
    identities = await open_identities(store, PASSPHRASE.encode)
    await store.close()
    for identity in identities.values():
        secrets = [key.seed for key in identity.decryption] + [serialize_identity(identity)]
        for secret in secrets:
            assert secret.hex() not in text
            assert b64encode(secret).decode()[:-4] not in text


def by_token(user: str, dovecot: Dovecot, lab: Lab, home: Home, name: str) -> str:
    """An account whose token lies in the file of that name."""
    by_password = account(user, dovecot.imaps_port, lab.certificate, home, name=name)
    return by_password.replace(f'password_file = "{home.root}/password"', f'token_command = ["cat", "{home.root}/{name}"]')


def client_of(dovecot: Dovecot, user: str, password: str) -> Client:
    client = Client.__new__(Client)
    client.imap = imaplib.IMAP4(HOST, dovecot.port)
    client.imap.login(user, password)
    return client


class Written:
    """The log of this process, as far as it was written since the test began."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self._text = ""

    @property
    def text(self) -> str:
        self._text += self._capsys.readouterr().err
        return self._text

    @property
    def lines(self) -> list[dict[str, str]]:
        return [json.loads(line) for line in self.text.splitlines()]


@pytest.fixture
def written(capsys: pytest.CaptureFixture[str]) -> Iterator[Written]:
    """The process's own settings are put back afterwards."""
    root, level = logging.getLogger(), logging.getLogger("malote").level
    handlers, root_level = root.handlers[:], root.level
    hooks = threading.excepthook, sys.unraisablehook
    yield Written(capsys)
    root.handlers[:] = handlers
    root.setLevel(root_level)
    logging.getLogger("malote").setLevel(level)
    threading.excepthook, sys.unraisablehook = hooks
    structlog.reset_defaults()


def test_all_loggers_write_one_format(written: Written) -> None:
    """The store logs through the standard library: its records come out as JSON too, at the level that is configured."""
    configure_logs(LogConfig(level="info", format="json"))
    logging.getLogger("malote.store").info("store schema is now version %s", "0001")
    logging.getLogger("malote.store").debug("not at this level")
    structlog.get_logger("malote.outgoing").info("message", id="1")
    assert [(line["level"], line["event"]) for line in written.lines] == [
        ("info", "store schema is now version 0001"), ("info", "message")]


def test_each_line_has_its_time_in_utc(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the microsecond, also where the second is the one before's and where it is another."""
    configure_logs(LogConfig(format="json"))
    moments = (1_795_392_000_000_000_000, 1_795_392_000_000_001_999, 1_795_392_061_999_999_999)
    for moment in moments:
        monkeypatch.setattr("malote.logs.time.time_ns", lambda moment=moment: moment)
        structlog.get_logger("malote").info("message")
    assert [datetime.fromisoformat(line["timestamp"]) for line in written.lines] == [
        datetime.fromtimestamp(moment // 10**9, UTC).replace(microsecond=moment // 1000 % 10**6) for moment in moments]


def test_what_libraries_say_is_cut(written: Written) -> None:
    """asyncio puts the arguments of a failed callback into its message: the bytes of a mail among them."""
    configure_logs(LogConfig(level="debug", format="json"))
    logging.getLogger("asyncio").error("Exception in callback Protocol.data_received(b'the secret text')")
    logging.getLogger("asyncio").error("Task exception was never retrieved\nfuture: <Task ValueError('the secret text')>")
    logging.getLogger("mail.log").info("DATA: the secret text")
    logging.getLogger("aioimaplib").debug("the secret text")
    logging.getLogger("another").error("%r", b"the secret text")
    try:
        int("the secret text")
    except ValueError:
        logging.getLogger("another").exception("failed")
        structlog.get_logger("malote").exception("failed")
    assert "secret" not in written.text
    assert [line["event"] for line in written.lines] == [
        "Exception in callback Protocol", "Task exception was never retrieved", "(message withheld)", "failed", "failed"]
    assert all("ValueError@" in line["cause"] for line in written.lines[-2:])


def test_a_thread_that_fails_is_logged_without_its_text(written: Written) -> None:
    """Python would print the exception's text, which may be a piece of a mail."""
    configure_logs(LogConfig(format="json"))
    hook_uncaught()

    def fail() -> None:
        raise ValueError("the secret text")

    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    (line,) = written.lines
    assert line["event"] == "thread failed"
    assert "ValueError@" in line["cause"]
    assert "secret" not in written.text


@pytest.mark.parametrize("addresses", [True, False])
def test_addresses_only_where_configured(written: Written, addresses: bool) -> None:
    """Whatever a module passes: the setting decides in one place."""
    configure_logs(LogConfig(format="json", addresses=addresses))
    structlog.get_logger("malote").info("message", sender="anna@example.org", recipients=["ben@example.org"], login="anna")
    assert ("anna" in written.text) is addresses
