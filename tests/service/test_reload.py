"""What changes while the daemon runs: its configuration, its keys, its accounts; and what must not change with it."""

from __future__ import annotations

import asyncio
import smtplib
import ssl
import time
from contextlib import closing
from pathlib import Path

import pytest

from lab.authority import Authority
from lab.daemon import Home, account, free_port, listener, rule, upstream
from lab.incoming import Client
from lab.servers import HOST, PASSWORD, Dovecot, Lab, Postfix, make_certificate
from malote.config import Config
from malote.errors import ConfigError
from malote.identities import Keyring
from malote.incoming.watcher import Watcher
from malote.store import Store
from malote.watching import Accounts

ANNA, BEN, CLEO = "alice@test.example", "bob@test.example", "nobody@elsewhere.example"


def rcpt(port: int, recipient: str) -> int:
    """The answer to RCPT, on a connection of its own."""
    with closing(smtplib.SMTP(HOST, port)) as client:
        client.login(ANNA, PASSWORD)
        client.mail(ANNA)
        return client.rcpt(recipient)[0]


def listens(port: int) -> bool:
    try:
        with closing(smtplib.SMTP(HOST, port, timeout=5)) as client:
            return client.noop()[0] == 250
    except OSError:
        return False


def test_rules_and_listeners_change_under_open_connections(home: Home, lab: Lab, postfix: Postfix) -> None:
    """SIGHUP: a changed rule, a new and a removed listener, another way to log in at the same address; an open connection goes
    on, under the new rules, and a faulty file changes nothing at all."""
    first, second, third = free_port(), free_port(), free_port()
    up = upstream(postfix.submission_port, lab.certificate)
    home.configure(listener(first) + listener(second) + up + rule("never"))
    with home.daemon() as daemon, closing(smtplib.SMTP(HOST, first)) as old, closing(smtplib.SMTP(HOST, second)) as removed:
        old.login(ANNA, PASSWORD)
        removed.login(ANNA, PASSWORD)

        for faulty in ("[outgoing]\nenabled = nonsense\n", listener(first) + up + rule("require", ["secret.example"])):
            home.configure(faulty)
            daemon.reload()
            assert listens(first)
            assert listens(second)
            assert rcpt(first, CLEO) == 250
        assert sum("old configuration stays" in line["event"] for line in daemon.records()) == 2

        home.configure(listener(first) + listener(third) + up + rule("require"))
        daemon.reload()
        assert rcpt(first, CLEO) == 550, "new connections know the new rule"
        assert rcpt(third, CLEO) == 550
        assert not listens(second)
        for client in (old, removed):       # not dropped
            client.mail(ANNA)
            assert client.rcpt(CLEO)[0] == 550, "what must be sealed now, must be sealed on open connections too"
            client.rset()
        home.secret("users", "")
        home.configure(listener(first, f'auth = "local"\nusers_file = "{home.root}/users"') + up.replace(
            f'ca_file = "{lab.certificate}"', f'ca_file = "{lab.certificate}"\nusername = "{ANNA}"\n'
            f'password_file = "{home.root}/password"'))
        daemon.reload()
        with closing(smtplib.SMTP(HOST, first)) as client:
            client.ehlo()
            assert client.mail(ANNA)[0] == 530, "the same socket, another way to log in"
        old.mail(ANNA)
        assert old.rcpt(CLEO)[0] == 250
        assert daemon.stop() == 0


def test_a_rule_that_changes_between_rcpt_and_data(home: Home, lab: Lab, postfix: Postfix) -> None:
    """The recipients were accepted while their mail might go clear; it may not any more when the text comes."""
    port = free_port()
    up = upstream(postfix.submission_port, lab.certificate)
    home.configure(listener(port) + up + rule("prefer"))
    with home.daemon() as daemon, closing(smtplib.SMTP(HOST, port)) as client:
        client.login(ANNA, PASSWORD)
        client.mail(ANNA)
        assert client.rcpt(CLEO)[0] == 250
        assert client.docmd("DATA")[0] == 354
        home.configure(listener(port) + up + rule("require"))
        daemon.reload()
        client.send(f"From: {ANNA}\r\n\r\nsecret\r\n.\r\n".encode())
        assert client.getreply()[0] == 550
        client.mail(ANNA)
        assert client.rcpt(CLEO)[0] == 550
        home.configure(listener(port) + up + rule("prefer"))
        daemon.reload()
        assert client.rcpt(CLEO)[0] == 250
        assert client.data(f"From: {ANNA}\r\n\r\nopen\r\n".encode())[0] == 250


def test_a_port_that_is_taken_changes_nothing(home: Home, lab: Lab, postfix: Postfix) -> None:
    """A reload that cannot listen where it should leaves the old listeners, and says so."""
    first = free_port()
    up = upstream(postfix.submission_port, lab.certificate)
    home.configure(listener(first) + up + rule("never"))
    with home.daemon() as daemon:
        home.configure(listener(first) + listener(postfix.port) + up + rule("require"))
        daemon.reload()
        assert rcpt(first, CLEO) == 250
        assert f"cannot listen on 127.0.0.1 port {postfix.port}" in daemon.text()
        assert daemon.stop() == 0


def test_a_refused_reload_that_had_to_close_a_listener_opens_it_again(home: Home, lab: Lab, postfix: Postfix) -> None:
    """Who accepts changes with TLS, so the old listener goes before the new one comes; a later fault must not leave neither."""
    port, up = free_port(), upstream(postfix.submission_port, lab.certificate) + rule("never")
    place(home, *make_certificate(home.root, "first"))
    tls = f'tls = "tls"\ncertificate = "{home.root}/live.crt"\ncertificate_key = "{home.root}/live.key"'
    home.configure(listener(port) + up)
    with home.daemon() as daemon:
        home.configure(listener(port, tls) + listener(postfix.port) + up)
        daemon.reload()
        assert f"cannot listen on 127.0.0.1 port {postfix.port}" in daemon.text()
        assert listens(port)
        assert daemon.stop() == 0


def peer_certificate(port: int) -> bytes:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with closing(smtplib.SMTP_SSL(HOST, port, context=context)) as client:
        assert isinstance(client.sock, ssl.SSLSocket)
        return client.sock.getpeercert(binary_form=True) or b""


def test_a_renewed_certificate_and_tls_from_the_first_byte(home: Home, lab: Lab, postfix: Postfix) -> None:
    """Certificates are renewed every few weeks: SIGHUP is enough. A listener may also turn to TLS from the first byte."""
    port = free_port()
    up = upstream(postfix.submission_port, lab.certificate) + rule("never")
    certificate, key = make_certificate(home.root, "first")
    tls = f'tls = "tls"\ncertificate = "{home.root}/live.crt"\ncertificate_key = "{home.root}/live.key"'
    home.configure(listener(port) + up)
    with home.daemon() as daemon:
        assert listens(port)
        place(home, certificate, key)
        home.configure(listener(port, tls) + up)
        daemon.reload()
        before = peer_certificate(port)
        place(home, *make_certificate(home.root, "second"))
        daemon.reload()
        after = peer_certificate(port)
        assert before
        assert after
        assert before != after
        for more in ("", tls, ""):      # and back: who accepts changes, at the same address
            home.configure(listener(port, more or 'auth = "pass-through"') + up)
            daemon.reload()
            assert bool(more) or listens(port)
            assert not more or peer_certificate(port) == after
        assert daemon.stop() == 0


def test_a_client_certificate_that_is_listed_no_more(home: Home, lab: Lab, postfix: Postfix, tmp_path: Path) -> None:
    """Taking the line out of the users file, or the authority away, is how one is withdrawn; both count after SIGHUP."""
    port, ours, others = free_port(), Authority(tmp_path / "ours").make(), Authority(tmp_path / "others").make()
    shown = ours.client("anna", "/CN=anna")

    def listening(authority: Authority, users: str) -> str:
        home.secret("users", users)
        certificate, key = lab.certificate, lab.key
        return listener(port, f'tls = "tls"\ncertificate = "{certificate}"\ncertificate_key = "{key}"\nauth = "certificate"\n'
                              f'client_ca = "{authority.certificate}"\nusers_file = "{home.root}/users"') + up

    def code() -> int:
        with closing(smtplib.SMTP_SSL(HOST, port, context=shown)) as client:
            client.ehlo()
            return client.mail(ANNA)[0]
    up = upstream(postfix.port, None)
    home.configure(listening(ours, f"anna::{ANNA}\n"))
    with home.daemon() as daemon:
        assert code() == 250
        home.configure(listening(ours, ""))
        daemon.reload()
        assert code() == 550
        home.configure(listening(ours, f"anna::{ANNA}\n"))
        daemon.reload()
        assert code() == 250
        home.configure(listening(others, f"anna::{ANNA}\n"))
        daemon.reload()
        with pytest.raises((OSError, smtplib.SMTPException)):
            code()
        assert daemon.stop() == 0


def place(home: Home, certificate: Path, key: Path) -> None:
    (home.root / "live.crt").write_bytes(certificate.read_bytes())
    (home.root / "live.key").write_bytes(key.read_bytes())


def test_accounts_and_keys_come_and_go(home: Home, lab: Lab, dovecot: Dovecot, tmp_path: Path) -> None:
    """Keys made by `malote keys` while it runs open what waited for them, without a restart. An account whose password file is
    wrong does not stop the others. SIGHUP starts a new account and ends one that is gone."""
    users = [f"{name}{time.monotonic_ns()}@test.example" for name in ("first", "second")]
    dovecot.add_users(users)
    anna = Home(tmp_path / "anna")
    anna.configure("[outgoing]\nenabled = false\n")
    anna.keys("new", ANNA, "--algorithm", "ed25519")
    anna.keys("export", ANNA, "-o", str(tmp_path / "anna.card"))

    def sections(password: str, *, second: bool) -> str:
        text = "[outgoing]\nenabled = false\n" + account(users[0], dovecot.imaps_port, lab.certificate, home, name="first",
                                                         password=password)
        return text + (account(users[1], dovecot.imaps_port, lab.certificate, home, name="second") if second else "")

    home.secret("wrong", "not the password", 0o644)
    home.configure(sections("wrong", second=True))
    with home.daemon() as daemon:
        home.keys("new", users[1], "--algorithm", "ed25519")    # while it runs, for an account that waits for it
        home.keys("import", str(tmp_path / "anna.card"))
        daemon.wait_for_log('"account": "second".*"mailbox open"')
        home.keys("new", users[0], "--algorithm", "ed25519")
        anna.keys("import", str(export(home, users[0], tmp_path)), str(export(home, users[1], tmp_path)))
        put(dovecot, anna, users[1])
        daemon.until(lambda: verdicts(dovecot, users[1]) == ["FRESH"], "opened, although the other account cannot log in")
        assert not [line for line in daemon.records("mailbox open") if line["account"] == "first"]

        put(dovecot, anna, users[0])
        home.configure(sections("password", second=False))
        daemon.reload()
        daemon.until(lambda: verdicts(dovecot, users[0]) == ["FRESH"], "the mended account")
        put(dovecot, anna, users[1])
        assert daemon.records("reloaded")[-1]["accounts"] == ["first"]
        assert daemon.stop() == 0
    assert len(verdicts(dovecot, users[1])) == 2, "nobody watched it any more"


def export(home: Home, address: str, directory: Path) -> Path:
    path = directory / f"{address}.card"
    home.keys("export", address, "-o", str(path))
    return path


def put(dovecot: Dovecot, sender: Home, to: str) -> None:
    """A sealed message, made by `malote seal`, lies in the INBOX."""
    message = f"From: {ANNA}\r\nTo: {to}\r\nSubject: secret\r\n\r\nsealed\r\n".encode()
    sealed = sender.malote("seal", stdin=message)
    assert sealed.returncode == 0, sealed.stderr.decode()
    client = Client(dovecot.port, to)
    client.put(sealed.stdout)
    client.close()


def verdicts(dovecot: Dovecot, user: str) -> list[str]:
    client = Client(dovecot.port, user)
    found = [str(message["Malote-Verdict"]).split(";")[0] for message in client.messages()]
    client.close()
    return found


async def test_a_watcher_that_dies_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a watcher dies of, it is tried again; and the end does not wait for that."""
    runs: list[str] = []

    async def run(watcher: Watcher) -> None:
        runs.append(watcher.account.name)
        raise ConfigError("ca_file cannot be read") if len(runs) == 1 else ZeroDivisionError

    monkeypatch.setattr(Watcher, "run", run)
    monkeypatch.setattr("malote.watching.RESTART_SECONDS", 0.01)
    config = Config.model_validate({"accounts": ({
        "name": "box", "host": "localhost", "username": ANNA, "password_file": "/nonexistent", "deliver": "replace"},)})
    store = await Store.open(tmp_path / "store")
    accounts = Accounts(store, Keyring(store, lambda: b""), end_seconds=5)
    await accounts.apply(config)
    while len(runs) < 4:
        await asyncio.sleep(0.01)
    await accounts.stop()
    done = len(runs)
    await asyncio.sleep(0.05)
    assert len(runs) == done
    await store.close()
