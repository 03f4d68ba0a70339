"""`malote run` as a process of its own, with its configuration, keys, log and a service manager that listens."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from lab.servers import PASSWORD, free_port

MALOTE = (sys.executable, "-m", "malote")
PASSPHRASE = "a passphrase of the tests"
WAIT_SECONDS = 30


class Home:
    """One installation: directory, configuration, passphrase and password files, and what is run with them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(mode=0o700, exist_ok=True)
        self.config = root / "malote.toml"
        self.secret("passphrase", PASSPHRASE)
        self.secret("password", PASSWORD)

    def secret(self, name: str, text: str, mode: int = 0o600) -> Path:
        path = self.root / name
        path.touch(mode)
        path.chmod(mode)
        path.write_text(text)
        return path

    def configure(self, sections: str, *, log: str = 'level = "debug"', store: str = "") -> None:
        self.config.write_text(f"""
[store]
path = "{self.root}/store"
{store}
[keys]
unlock = "file"
file = "{self.root}/passphrase"
[log]
{log}
format = "json"
{sections}
""")

    def malote(self, *arguments: str, stdin: bytes = b"", environment: Mapping[str, str] | None = None,
               ) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run([*MALOTE, "--config", str(self.config), *arguments], input=stdin, capture_output=True, check=False,
                              env={**os.environ, **(environment or {})}, timeout=60)

    def keys(self, *arguments: str) -> str:
        done = self.malote("keys", *arguments)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode()

    def daemon(self) -> Daemon:
        return Daemon(self)


class Daemon:
    """The running daemon. As a context manager: started and ready, and gone afterwards."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self.log = home.root / "log"
        self.states: list[str] = []
        self.process: subprocess.Popen[bytes] | None = None
        self._manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify = home.root / "notify"
        self._notify.unlink(missing_ok=True)
        self._manager.bind(str(self._notify))
        self._manager.settimeout(0.1)

    def start(self, *, sockets: Sequence[socket.socket] = (), **environment: str) -> Self:
        """`sockets`: handed over as systemd does it (socket activation)."""
        command: list[str] = [*MALOTE, "--config", str(self.home.config), "run"]
        if sockets:
            moves = " ".join(f"{number}<&{sock.fileno()}" for number, sock in enumerate(sockets, 3))
            command = ["bash", "-c", f'export LISTEN_PID=$$ LISTEN_FDS={len(sockets)}; exec "$@" {moves}', "bash", *command]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, pass_fds=[sock.fileno() for sock in sockets],
                env={**os.environ, "NOTIFY_SOCKET": str(self._notify), **environment}, start_new_session=True)
        return self

    def __enter__(self) -> Self:
        if self.process is None:
            self.start()
        self.wait_for_state("READY=1")
        return self

    def __exit__(self, *_: object) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait(WAIT_SECONDS)
        self._manager.close()

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def workers(self) -> list[int]:
        """Process ids of the workers, in the order of their start."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children")
        return [int(pid) for pid in children.read_text().split()]

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def wait(self) -> int:
        """The exit code."""
        assert self.process is not None
        return self.process.wait(WAIT_SECONDS)

    def stop(self) -> int:
        self.signal(signal.SIGTERM)
        return self.wait()

    def reload(self) -> None:
        """SIGHUP, and wait until it says that it is done."""
        before = self.states.count("READY=1")
        self.signal(signal.SIGHUP)
        self.until(lambda: self.states.count("READY=1") > before, "READY=1 after a reload")

    def hear(self) -> None:
        """Take in what the daemon has told its service manager."""
        try:
            while True:
                self.states += self._manager.recv(4096).decode().split("\n")
        except TimeoutError:
            pass

    def wait_for_state(self, state: str) -> None:
        def happened() -> bool:
            self.hear()
            assert self.process is not None
            assert state in self.states or self.process.poll() is None, self.text()
            return state in self.states
        self.until(happened, state)

    def until(self, happened: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + WAIT_SECONDS
        while True:
            self.hear()
            if happened():
                return
            assert time.monotonic() < deadline, f"not within {WAIT_SECONDS} s: {what}\n{self.text()[-3000:]}"

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def records(self, event: str = "") -> list[dict[str, Any]]:
        """The lines of the log, as far as they are whole; each must be JSON."""
        lines = [json.loads(line) for line in self.text().split("\n")[:-1]]
        return [line for line in lines if not event or line["event"] == event]

    def wait_for_log(self, pattern: str) -> None:
        self.until(lambda: re.search(pattern, self.text()) is not None, f"in the log: {pattern}")


def listener(port: int, more: str = 'auth = "pass-through"') -> str:
    return f'[[outgoing.listeners]]\nport = {port}\n{more}\n'


def upstream(port: int, ca_file: Path | None, more: str = "") -> str:
    security = f'ca_file = "{ca_file}"' if ca_file is not None else 'security = "none"'
    return f'[outgoing.upstream]\nhost = "localhost"\nport = {port}\n{security}\n{more}\n'


def rule(seal: str, recipients: Sequence[str] = ("*",)) -> str:
    return f'[[outgoing.rules]]\nrecipients = {json.dumps(list(recipients))}\nseal = "{seal}"\n'


def account(user: str, imaps_port: int, ca_file: Path, home: Home, *, name: str = "box", password: str = "password",
            more: str = 'deliver = "replace"') -> str:
    return f"""[[accounts]]
name = "{name}"
host = "localhost"
port = {imaps_port}
ca_file = "{ca_file}"
username = "{user}"
password_file = "{home.root}/{password}"
folders = ["INBOX"]
{more}
"""


__all__ = ["Daemon", "Home", "account", "free_port", "listener", "rule", "upstream"]
