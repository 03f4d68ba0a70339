"""Several workers under one supervisor, as systemd, an administrator and the clients see them."""

from __future__ import annotations

import os
import pty
import signal
import smtplib
import socket
import subprocess
import time
from contextlib import closing, suppress
from pathlib import Path

import pytest

from lab.daemon import MALOTE, PASSPHRASE, Daemon, Home, free_port, listener, rule, upstream
from lab.servers import HOST, PASSWORD, Dovecot, Lab, Postfix
from malote.errors import ExitCode
from malote.smtp.budget import MemoryBudget
from malote.smtp.siblings import Siblings

ANNA, BEN = "alice@test.example", "bob@test.example"
TWO = "[service]\nworkers = 2\n"


def text(body: str = "nothing to hide") -> bytes:
    return (f"From: {ANNA}\r\nTo: {BEN}\r\nSubject: plain\r\nMessage-ID: <{time.monotonic_ns()}@test.example>\r\n"
            f"\r\n{body}\r\n").encode()


@pytest.fixture
def up(lab: Lab, postfix: Postfix) -> str:
    return upstream(postfix.submission_port, lab.certificate) + rule("never")


@pytest.fixture
def port(home: Home, up: str) -> int:
    port = free_port()
    home.configure(TWO + listener(port) + up)
    return port


def send(port: int, content: bytes | None = None) -> None:
    with smtplib.SMTP(HOST, port) as client:
        client.login(ANNA, PASSWORD)
        client.sendmail(ANNA, [BEN], content or text())


def answers(port: int) -> bool:
    try:
        with closing(smtplib.SMTP(HOST, port, timeout=5)) as client:
            return client.noop()[0] == 250
    except OSError:
        return False


def worker_that_serves(daemon: Daemon, client: smtplib.SMTP) -> int:
    """Its process id: the one that holds the other end of the client's connection."""
    assert client.sock is not None
    ours = "{:08X}:{:04X}".format(int.from_bytes(socket.inet_aton(HOST), "little"), client.sock.getsockname()[1])
    sockets = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    inode = next(fields[9] for fields in sockets if fields[2] == ours)
    for pid in daemon.workers:
        if any(str(fd.readlink()) == f"socket:[{inode}]" for fd in Path(f"/proc/{pid}/fd").iterdir()):
            return pid
    raise AssertionError("no worker has the connection")


def test_what_the_service_manager_is_told(home: Home, port: int) -> None:
    """READY when all are ready, the watchdog while all live, RELOADING and READY, STOPPING; only the supervisor speaks."""
    with home.daemon().start(WATCHDOG_USEC="800000") as daemon:
        assert len(daemon.workers) == 2
        assert len(daemon.records("ready")) == 3, "READY before all workers were"
        send(port)
        daemon.until(lambda: daemon.states.count("WATCHDOG=1") > 2, "the watchdog is fed")
        daemon.reload()
        assert daemon.stop() == 0
        daemon.hear()
        told = [state for state in daemon.states if state.startswith(("READY", "RELOAD", "STOP"))]
        assert told == ["READY=1", "RELOADING=1", "READY=1", "STOPPING=1"]


def test_the_keys_are_unlocked_once_and_shown_to_nobody(home: Home, port: int) -> None:
    """A worker that is started again needs no passphrase, and none is in what other processes can see."""
    home.keys("new", ANNA, "--algorithm", "ed25519")
    with home.daemon() as daemon:
        home.secret("passphrase", "another one meanwhile")
        first, _ = daemon.workers
        os.kill(first, signal.SIGKILL)
        daemon.until(lambda: len(daemon.records("ready")) == 4, "it is started again")
        assert daemon.records("ready")[-1]["identities"] == 1
        for pid in (daemon.pid, *daemon.workers):
            shown = Path(f"/proc/{pid}/cmdline").read_bytes() + Path(f"/proc/{pid}/environ").read_bytes()
            assert PASSPHRASE.encode() not in shown
        assert daemon.stop() == 0


def test_who_starts_it_by_hand_is_asked_once(home: Home, port: int) -> None:
    """keys.unlock = "prompt": one question on the terminal, however many workers there are and are started again."""
    home.keys("new", ANNA, "--algorithm", "ed25519")
    home.config.write_text(home.config.read_text().replace('unlock = "file"', 'unlock = "prompt"'))
    master, slave = pty.openpty()
    daemon = home.daemon()
    with daemon.log.open("wb") as log:      # setsid: the terminal becomes its own
        daemon.process = subprocess.Popen(("setsid", "-c", *MALOTE, "--config", str(home.config), "run"), stdin=slave, stdout=log,
                                          stderr=log, env={**os.environ, "NOTIFY_SOCKET": str(home.root / "notify")})
    os.close(slave)
    shown = b""
    try:
        while not shown.endswith(b": "):
            shown += os.read(master, 1000)
        os.write(master, PASSPHRASE.encode() + b"\n")
        with daemon:
            assert [line["identities"] for line in daemon.records("ready") if "worker" in line] == [1, 1]
            os.kill(daemon.workers[0], signal.SIGKILL)
            daemon.until(lambda: len(daemon.records("ready")) == 4, "it is started again")
            assert daemon.records("ready")[-1]["identities"] == 1
            os.set_blocking(master, False)
            with suppress(BlockingIOError):
                shown += os.read(master, 1000)
            assert daemon.stop() == 0
        assert shown.count(b"Passphrase") == 1
        assert PASSPHRASE.encode() not in shown
    finally:
        daemon.__exit__()
        os.close(master)


def test_one_worker_is_killed_and_the_others_go_on(home: Home, port: int) -> None:
    """kill -9: its client sees the connection cut, all others see nothing; it is started again."""
    with home.daemon() as daemon:
        clients = [smtplib.SMTP(HOST, port) for _ in range(6)]
        victim = worker_that_serves(daemon, clients[0])
        served = [worker_that_serves(daemon, client) for client in clients]
        for client in clients:
            client.login(ANNA, PASSWORD)
        os.kill(victim, signal.SIGKILL)
        for client, pid in zip(clients, served, strict=True):
            if pid == victim:
                with pytest.raises(smtplib.SMTPServerDisconnected):
                    client.sendmail(ANNA, [BEN], text())
            else:
                client.sendmail(ANNA, [BEN], text())
            client.close()
        daemon.until(lambda: len(daemon.records("ready")) == 4, "it is started again")
        assert victim not in daemon.workers
        assert len(daemon.workers) == 2
        [ended] = daemon.records("worker ended")
        assert ended["code"] == -signal.SIGKILL
        send(port)
        assert daemon.stop() == 0


def test_a_worker_that_hangs_is_seen_and_replaced(home: Home, port: int) -> None:
    """One that says nothing any more is not covered up by the others: no watchdog, then it is killed and all is well again."""
    with home.daemon().start(WATCHDOG_USEC="1600000") as daemon:
        hung = daemon.workers[0]
        os.kill(hung, signal.SIGSTOP)
        daemon.wait_for_log("worker does not answer")
        daemon.until(lambda: len(daemon.records("ready")) == 4, "it is started again")
        assert hung not in daemon.workers
        daemon.states.clear()
        daemon.wait_for_state("WATCHDOG=1")
        send(port)
        assert daemon.stop() == 0


def test_a_worker_that_ends_at_once_again_and_again_ends_the_service(home: Home, port: int) -> None:
    """Loudly, with an exit code that makes systemd try anew; not for ever in silence."""
    with home.daemon() as daemon:
        store = home.root / "store" / "store.sqlite"
        store.rename(store.with_name("elsewhere"))
        os.kill(daemon.workers[0], signal.SIGKILL)
        assert daemon.wait() == ExitCode.FAILED
        assert len([line for line in daemon.text().split("\n") if "worker ended" in line]) == 5
        assert "gives up" in daemon.text()
        assert "ended at once 5 times in a row" in daemon.text()


@pytest.mark.parametrize(("what", "code"), [("passphrase", ExitCode.KEY), ("port", ExitCode.CONFIG), ("users", ExitCode.CONFIG)])
def test_what_is_wrong_at_the_start_has_its_exit_code(home: Home, lab: Lab, up: str, port: int, what: str, code: int) -> None:
    """systemd must not try again what cannot mend itself, whoever of the processes found out."""
    home.keys("new", ANNA, "--algorithm", "ed25519")
    with socket.socket() as other:
        if what == "passphrase":
            home.secret("passphrase", "another")
        elif what == "port":
            other.bind((HOST, port))
            other.listen()
        else:
            home.configure(TWO + listener(port, f'auth = "local"\nusers_file = "{home.root}/nowhere"') + up)
        daemon = Daemon(home).start()
        try:
            assert daemon.wait() == code, daemon.text()
        finally:
            daemon.__exit__()


def test_sigterm_in_the_middle_of_a_message_drains(home: Home, port: int, dovecot: Dovecot) -> None:
    """Whichever worker has it: a message under way is taken and answered, the idle are told 421, nobody new comes in."""
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
        daemon.until(lambda: not answers(port), "nobody listens")
        client.send(b"\r\n.\r\n")
        assert client.getreply()[0] == 250
        assert daemon.wait() == 0
    deadline = time.monotonic() + 20
    while not any(marker.encode() in raw for raw in dovecot.messages(BEN)):
        assert time.monotonic() < deadline, "the drained message was lost"
        time.sleep(0.1)


def test_listeners_change_under_open_connections(home: Home, up: str) -> None:
    """A new place is heard by all workers, an old one by none, an open connection goes on; a UNIX socket is made and removed."""
    first, second, third = free_port(), free_port(), free_port()
    path = home.root / "submission"
    home.configure(TWO + listener(first) + listener(second) + up)
    with home.daemon() as daemon, closing(smtplib.SMTP(HOST, first)) as kept, closing(smtplib.SMTP(HOST, second)) as removed:
        kept.login(ANNA, PASSWORD)
        removed.login(ANNA, PASSWORD)
        local = f'[[outgoing.listeners]]\nsocket = "{path}"\nauth = "peer"\n'
        home.configure(TWO + listener(first) + listener(third) + local + up)
        daemon.reload()
        assert len(daemon.records("reloaded")) == 3
        assert [answers(port) for port in (first, second, third)] == [True, False, True]
        assert path.is_socket()
        for client in (kept, removed):
            client.sendmail(ANNA, [BEN], text())
        os.kill(daemon.workers[0], signal.SIGKILL)      # who is started later begins with what was changed
        daemon.until(lambda: len(daemon.records("ready")) == 4, "it is started again")
        os.kill(daemon.workers[0], signal.SIGKILL)
        daemon.until(lambda: len(daemon.records("ready")) == 5, "the other one too")
        assert [answers(port) for port in (first, second, third)] == [True, False, True]
        home.configure(TWO + listener(first) + up)
        daemon.reload()
        assert not path.exists()
        assert daemon.stop() == 0


def test_a_configuration_that_a_worker_refuses_is_refused_by_all(home: Home, up: str) -> None:
    """What only a worker can see to be wrong must not leave two of them with two configurations."""
    first, second = free_port(), free_port()
    home.configure(TWO + listener(first) + up)
    with home.daemon() as daemon:
        home.configure(TWO + listener(first) + listener(second, f'auth = "local"\nusers_file = "{home.root}/nowhere"') + up)
        daemon.reload()
        assert any("old configuration stays" in line["event"] for line in daemon.records() if "worker" not in line)
        daemon.until(lambda: not answers(second), "the place of the faulty configuration is closed")
        assert all(answers(first) for _ in range(8))
        os.kill(daemon.workers[0], signal.SIGKILL)
        daemon.until(lambda: len(daemon.records("ready")) == 4, "a new worker begins with the old configuration")
        send(first)
        assert daemon.stop() == 0


@pytest.mark.parametrize("workers", [1, 2])
def test_sockets_that_systemd_holds(home: Home, up: str, workers: int) -> None:
    """Socket activation: clients that come while nothing runs wait, and are served by the next start."""
    path = home.root / "submission"
    with socket.create_server((HOST, 0)) as inet, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(path))
        unix.listen()
        port = inet.getsockname()[1]
        home.configure(f"[service]\nworkers = {workers}\n" + listener(port)
                       + f'[[outgoing.listeners]]\nsocket = "{path}"\nauth = "peer"\n' + up)
        with home.daemon().start(sockets=[inet, unix]) as daemon:
            send(port)
            with closing(socket.socket(socket.AF_UNIX)) as local:
                local.connect(str(path))
                assert local.recv(3) == b"220"
            assert daemon.stop() == 0
        assert path.is_socket(), "it is systemd's"
        with (closing(socket.create_connection((HOST, port), 20)) as early,
              home.daemon().start(sockets=[inet, unix]) as daemon):
            assert early.recv(3) == b"220"
            daemon.reload()
            send(port)
            assert daemon.stop() == 0


def test_without_their_supervisor_the_workers_end(home: Home, port: int) -> None:
    """And only then a new one begins: two sets of workers on one store would not know of each other."""
    with home.daemon() as daemon:
        workers = daemon.workers
        daemon.signal(signal.SIGKILL)
        assert daemon.wait() == -signal.SIGKILL
        deadline = time.monotonic() + 30
        while any(Path(f"/proc/{pid}").exists() for pid in workers):
            assert time.monotonic() < deadline, "workers go on without a supervisor"
            time.sleep(0.05)
    with home.daemon() as daemon:
        send(port)
        assert daemon.stop() == 0


def test_a_second_service_on_the_same_store_is_exit_code_2(home: Home, port: int) -> None:
    with home.daemon() as daemon:
        other = Daemon(home)
        other.log = home.root / "other-log"
        try:
            assert other.start().wait() == ExitCode.CONFIG
            assert "another malote runs on this store" in other.text()
        finally:
            other.__exit__()
        assert daemon.stop() == 0


@pytest.mark.parametrize("limit", ["connections", "client_connections"])
def test_a_limit_on_connections_is_one_for_all_workers(home: Home, port: int, limit: str) -> None:
    """However they are spread; and what a killed worker had open does not count any more."""
    home.config.write_text(home.config.read_text() + f"[limits]\n{limit} = 5\n")
    with home.daemon() as daemon:
        clients = [smtplib.SMTP(HOST, port) for _ in range(5)]
        with pytest.raises(smtplib.SMTPConnectError) as refused:
            smtplib.SMTP(HOST, port)
        assert refused.value.smtp_code == 421
        victim = worker_that_serves(daemon, clients[0])
        os.kill(victim, signal.SIGKILL)
        daemon.until(lambda: len(daemon.records("ready")) == 4, "it is started again")
        assert answers(port)
        for client in clients:
            client.close()
        assert daemon.stop() == 0


def test_the_memory_budget_is_one_for_all_workers() -> None:
    """What one uses, another cannot; what a dead one held is free again."""
    siblings = Siblings(3)
    budgets = [MemoryBudget(100, factor=1) for _ in range(3)]
    for slot, budget in enumerate(budgets):
        budget.shared = siblings.memory(slot)
    assert budgets[0].charge(60)
    assert not budgets[1].charge(60)
    assert budgets[2].charge(30)
    budgets[2].release(30)
    assert budgets[1].charge(40)
    siblings.clear(0)
    assert budgets[1].charge(60)
    assert not budgets[1].charge(1)


