"""The daemon's life as systemd and an administrator see it: starting, refusing to start, draining, ending."""

from __future__ import annotations

import signal
import smtplib
import socket
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest

from lab.daemon import Daemon, Home, account, free_port, listener, rule, upstream
from lab.servers import HOST, PASSWORD, Dovecot, Lab, Postfix
from malote.errors import ExitCode

ANNA, BEN = "alice@test.example", "bob@test.example"


def text(body: str = "nothing to hide", subject: str = "plain") -> bytes:
    return (f"From: {ANNA}\r\nTo: {BEN}\r\nSubject: {subject}\r\nMessage-ID: <{time.monotonic_ns()}@test.example>\r\n"
            f"\r\n{body}\r\n").encode()


@pytest.fixture
def port(home: Home, lab: Lab, postfix: Postfix) -> int:
    """A proxy in front of Postfix's submission that seals nothing, so that tests about connections need no keys."""
    port = free_port()
    home.configure(listener(port) + upstream(postfix.submission_port, lab.certificate) + rule("never"))
    return port


def send(port: int, content: bytes | None = None) -> None:
    with smtplib.SMTP(HOST, port) as client:
        client.login(ANNA, PASSWORD)
        client.sendmail(ANNA, [BEN], content or text())


def test_what_the_service_manager_is_told(home: Home, port: int) -> None:
    """READY only when mail is taken, WATCHDOG while it lives, RELOADING and READY again, STOPPING at the end; exit code 0."""
    with home.daemon().start(WATCHDOG_USEC="400000") as daemon:
        send(port)
        daemon.until(lambda: daemon.states.count("WATCHDOG=1") > 2, "the watchdog is fed")
        daemon.reload()
        told = [state for state in daemon.states if state.startswith(("READY", "RELOAD"))]
        assert told == ["READY=1", "RELOADING=1", "READY=1"]
        assert any(state.startswith("MONOTONIC_USEC=") for state in daemon.states)
        assert any(state.startswith("STATUS=listening on 1") for state in daemon.states)
        assert daemon.stop() == 0
        daemon.hear()
        assert daemon.states[-1] == "STOPPING=1" or "STOPPING=1" in daemon.states


def test_a_hung_loop_does_not_feed_the_watchdog(home: Home, port: int) -> None:
    """The watchdog must see a hang: a stopped process says nothing."""
    with home.daemon().start(WATCHDOG_USEC="200000") as daemon:
        daemon.signal(signal.SIGSTOP)
        daemon.hear()
        daemon.states.clear()
        time.sleep(0.5)
        daemon.hear()
        assert daemon.states == []
        daemon.signal(signal.SIGCONT)
        daemon.wait_for_state("WATCHDOG=1")


def test_sigterm_in_the_middle_of_a_message_drains(home: Home, port: int, dovecot: Dovecot) -> None:
    """A message under way is taken and answered; new connections are not; the idle are told 421."""
    marker = f"drained-{time.monotonic_ns()}"
    with home.daemon() as daemon, closing(smtplib.SMTP(HOST, port)) as client, closing(smtplib.SMTP(HOST, port)) as idle:
        idle.ehlo()
        client.login(ANNA, PASSWORD)
        client.mail(ANNA)
        client.rcpt(BEN)
        assert client.docmd("DATA")[0] == 354
        client.send(b"From: " + ANNA.encode() + b"\r\nSubject: half\r\n\r\n" + marker.encode())
        daemon.signal(signal.SIGTERM)
        assert idle.getreply()[0] == 421
        daemon.wait_for_state("STOPPING=1")
        with pytest.raises(OSError):
            socket.create_connection((HOST, port), 5)
        client.send(b"\r\n.\r\n")
        assert client.getreply()[0] == 250
        assert daemon.wait() == 0
    deadline = time.monotonic() + 20
    while not any(marker.encode() in raw for raw in dovecot.messages(BEN)):
        assert time.monotonic() < deadline, "the drained message was lost"
        time.sleep(0.1)


def test_killed_and_started_again(home: Home, lab: Lab, port: int, postfix: Postfix) -> None:
    """After kill -9 the next start finds its store and a stale UNIX socket, and works."""
    path = home.root / "submission"
    home.configure(f'[[outgoing.listeners]]\nsocket = "{path}"\nauth = "peer"\n' + listener(port)
                   + upstream(postfix.submission_port, lab.certificate) + rule("never"))
    with home.daemon() as daemon:
        daemon.signal(signal.SIGKILL)
        assert daemon.wait() == -signal.SIGKILL
    assert path.is_socket()
    with home.daemon() as daemon:
        send(port)
        assert daemon.stop() == 0
    assert not path.exists()


def end_of(home: Home) -> tuple[int, str]:
    """Exit code and what was said, of a daemon that cannot start."""
    daemon = Daemon(home).start()
    try:
        return daemon.wait(), daemon.text()
    finally:
        daemon.__exit__()


def test_a_wrong_passphrase_is_exit_code_5(home: Home, port: int) -> None:
    """Not tried again by guessing, not started without keys."""
    home.keys("new", ANNA, "--algorithm", "ed25519")
    home.secret("passphrase", "another")
    code, said = end_of(home)
    assert code == ExitCode.KEY
    assert "passphrase" in said


def test_an_open_passphrase_file_is_exit_code_5(home: Home, port: int) -> None:
    home.keys("new", ANNA, "--algorithm", "ed25519")
    home.secret("passphrase", "another", 0o644)
    code, said = end_of(home)
    assert code == ExitCode.KEY
    assert "chmod 600" in said


def test_a_faulty_configuration_is_exit_code_2(home: Home) -> None:
    """All faults are named at once, with file and key."""
    home.configure('[outgoing.upstream]\nhots = "x"\nport = 70000\n')
    code, said = end_of(home)
    assert code == ExitCode.CONFIG
    assert f"{home.config}: outgoing.upstream.hots" in said
    assert f"{home.config}: outgoing.upstream.port" in said


def test_a_configuration_that_would_send_in_clear_is_exit_code_2(home: Home) -> None:
    home.configure('[outgoing.upstream]\nhost = "mail.example.org"\nsecurity = "none"\n')
    code, said = end_of(home)
    assert code == ExitCode.CONFIG
    assert f"{home.config}: outgoing.upstream.security" in said


def test_a_rule_that_names_nobody_is_exit_code_2(home: Home) -> None:
    """Missed because of its spelling, a rule that requires sealing would let everything out."""
    home.configure(upstream(25, None) + rule("require", ["*@secret.example"])
                   + rule("require", ["@fine.example", "secret.example"]))
    code, said = end_of(home)
    assert code == ExitCode.CONFIG
    assert f"{home.config}: outgoing.rules.1.recipients: '*@secret.example'" in said
    assert f"{home.config}: outgoing.rules.2.recipients: 'secret.example'" in said


def test_a_port_that_is_taken_is_exit_code_2(home: Home, port: int) -> None:
    """And the text says which."""
    with socket.create_server((HOST, port)):
        code, said = end_of(home)
    assert code == ExitCode.CONFIG
    assert f"cannot listen on {HOST} port {port}" in said


def test_a_store_that_cannot_be_written_is_exit_code_6(home: Home, port: int) -> None:
    (home.root / "store").write_text("a file, where the directory should be")
    code, said = end_of(home)
    assert code == ExitCode.STORE
    assert "store" in said


def test_addresses_of_an_account_that_are_none_are_exit_code_2(home: Home, lab: Lab, dovecot: Dovecot) -> None:
    """systemd would otherwise start it again for ever."""
    more = 'deliver = "replace"\naddresses = ["no address"]'
    home.configure("[outgoing]\nenabled = false\n" + account(ANNA, dovecot.imaps_port, lab.certificate, home, more=more))
    code, said = end_of(home)
    assert code == ExitCode.CONFIG
    assert "accounts.1.addresses" in said


class Silent:
    """A server that accepts and then says nothing: what a watcher hangs on."""

    def __init__(self) -> None:
        self._server = socket.create_server((HOST, 0))
        self.port = int(self._server.getsockname()[1])
        self.connected = threading.Event()
        self._held: list[socket.socket] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            self._held.append(connection)
            self.connected.set()

    def close(self) -> None:
        self._server.close()
        for connection in self._held:
            connection.close()


def test_sigterm_while_a_watcher_connects(home: Home, lab: Lab) -> None:
    """A mail server that hangs must not hold up the end: seconds, not the minutes that its timers take."""
    silent = Silent()
    home.configure("[outgoing]\nenabled = false\n" + account(ANNA, silent.port, lab.certificate, home))
    home.keys("new", ANNA, "--algorithm", "ed25519")
    with home.daemon() as daemon:
        daemon.until(silent.connected.is_set, "the watcher connects")
        daemon.signal(signal.SIGTERM)
        assert daemon.process is not None
        assert daemon.process.wait(15) == 0     # CONNECT_SECONDS alone is 30
    silent.close()


def test_sigterm_while_a_watcher_waits_for_news(home: Home, lab: Lab, dovecot: Dovecot) -> None:
    """IDLE lasts 25 minutes; its end does not."""
    home.configure("[outgoing]\nenabled = false\n" + account(ANNA, dovecot.imaps_port, lab.certificate, home))
    home.keys("new", ANNA, "--algorithm", "ed25519")
    with home.daemon() as daemon:
        daemon.wait_for_log('"mailbox open"')
        time.sleep(0.3)
        daemon.signal(signal.SIGTERM)
        assert daemon.process is not None
        assert daemon.process.wait(15) == 0


def test_no_core_files_and_nobody_elses_files(home: Home, port: int) -> None:
    """Private keys and plain text are in this memory: no core file, no secret in arguments or environment, files for us alone."""
    home.keys("new", ANNA, "--algorithm", "ed25519")
    with home.daemon() as daemon:
        proc = Path("/proc", str(daemon.pid))
        core = next(line for line in (proc / "limits").read_text().splitlines() if line.startswith("Max core file size"))
        assert core.split()[4:6] == ["0", "0"]
        assert "Umask:\t0077" in (proc / "status").read_text()
        shown = (proc / "cmdline").read_bytes() + (proc / "environ").read_bytes()
        assert b"a passphrase of the tests" not in shown
        for path in (home.root / "store").rglob("*"):
            assert path.stat().st_mode & 0o077 == 0, path
        assert daemon.stop() == 0


def test_a_second_daemon_on_the_same_store_is_exit_code_2(home: Home, lab: Lab, port: int, postfix: Postfix) -> None:
    """Both would watch the same mailboxes as one device. `malote keys`, `seal` and the others go on beside it."""
    with home.daemon() as daemon:
        other = Home(home.root / "other")
        other.configure(listener(free_port()) + upstream(postfix.submission_port, lab.certificate))
        other.config.write_text(other.config.read_text().replace(f"{other.root}/store", f"{home.root}/store"))
        code, said = end_of(other)
        assert code == ExitCode.CONFIG
        assert "another malote runs on this store" in said
        home.keys("new", ANNA, "--algorithm", "ed25519")
        assert daemon.stop() == 0
