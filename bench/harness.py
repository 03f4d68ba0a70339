"""What the benchmarks share: malote and its peers as processes, Postfix's smtp-source as the load, a report line."""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from lab.servers import Lab, LabError

SENDER, RECIPIENT = "anna@north.example", "ben@south.example"
PROJECT = Path(__file__).parent.parent
OUT = PROJECT / "bench" / "out"
START_SECONDS = 30


class BenchError(Exception):
    """A benchmark could not be run; nothing is reported for it."""


@dataclass(frozen=True, slots=True)
class Result:
    name: str
    ratio: float
    wanted: str         # the claim the README makes, e.g. ">= 1.5"
    text: str

    def __str__(self) -> str:
        return f"bench {self.name} ratio={self.ratio:.2f}"


@contextmanager
def workplace() -> Iterator[Path]:
    """A directory on the file system of the project, which must be a real disk: durability is part of what is measured."""
    OUT.mkdir(exist_ok=True)
    kind = subprocess.run(["stat", "-f", "-c", "%T", str(OUT)], capture_output=True, text=True, check=True).stdout.strip()
    if kind in ("tmpfs", "ramfs"):
        raise BenchError(f"{OUT} is on {kind}: the benchmarks want a real disk")
    with tempfile.TemporaryDirectory(dir=OUT) as name:
        yield Path(name)


@contextmanager
def process(command: Sequence[str], *, ready: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Start, wait until the socket `ready` exists, end by SIGTERM."""
    with log.open("ab") as output:
        running = subprocess.Popen(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, cwd=PROJECT)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not ready.exists():
            if running.poll() is not None or time.monotonic() > deadline:
                raise BenchError(f"did not start: {' '.join(command)}\n{log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.02)
        yield running
    finally:
        running.send_signal(signal.SIGTERM)
        try:
            running.wait(30)
        except subprocess.TimeoutExpired:
            running.kill()
            running.wait()


def stock(socket: Path, *port: int) -> list[str]:
    return [sys.executable, "-m", "bench.stock", str(socket), *map(str, port)]


class Malote:
    """One malote process with a store of its own in `root`, listening on a UNIX socket where the peer's uid is the login."""

    def __init__(self, root: Path, upstream_port: int, *, seal: str, algorithm: str = "ed25519", limits: str = "") -> None:
        root.mkdir()
        self.root, self.socket, self.log = root, root / "socket", root / "log"
        self.config = root / "malote.toml"
        (root / "passphrase").write_text("benchmark")
        (root / "passphrase").chmod(0o600)
        self.config.write_text(f"""
[store]
path = "{root}/store"
[keys]
unlock = "file"
file = "{root}/passphrase"
[[outgoing.listeners]]
socket = "{self.socket}"
auth = "peer"
[outgoing.upstream]
host = "127.0.0.1"
port = {upstream_port}
security = "none"
[[outgoing.rules]]
recipients = ["*"]
seal = "{seal}"
[limits]
max_message_bytes = 67108864
{limits}
""")
        self.run("keys", "new", SENDER, "--algorithm", algorithm)
        self.run("keys", "new", RECIPIENT, "--algorithm", algorithm)

    def run(self, *arguments: str) -> None:
        done = subprocess.run([*self.command, *arguments], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise BenchError(f"malote {' '.join(arguments)}: {done.stderr}")

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-m", "malote", "--config", str(self.config)]

    @contextmanager
    def running(self) -> Iterator[subprocess.Popen[bytes]]:
        with process([*self.command, "run"], ready=self.socket, log=self.log) as running:
            yield running


def load(socket: Path, *, count: int, size_bytes: int, sessions: int = 10, keep: bool = False) -> float:
    """Messages per second that smtp-source gets accepted. Raises BenchError if one of them is refused."""
    command = ["smtp-source", "-s", str(sessions), "-m", str(count), "-l", str(size_bytes), "-f", SENDER, "-t", RECIPIENT,
               *(["-d"] if keep else []), f"unix:{socket}"]
    start = time.perf_counter()
    environment = {**os.environ, "PATH": f"/usr/sbin:{os.environ['PATH']}"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    elapsed = time.perf_counter() - start
    if done.returncode != 0 or "rejected" in done.stderr or "fatal" in done.stderr:
        raise BenchError(f"smtp-source: {done.stderr[-1000:]}")
    return count / elapsed


def median_of(runs: int, measure: Callable[[], float]) -> float:
    return statistics.median(measure() for _ in range(runs))


@contextmanager
def servers(root: Path) -> Iterator[Lab]:
    try:
        with Lab(root) as lab:
            yield lab
    except LabError as error:
        raise BenchError(str(error)) from error
