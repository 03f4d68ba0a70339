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

from lab.servers import HOST, Lab, LabError

SENDER, RECIPIENT = "anna@north.example", "ben@south.example"
PROJECT = Path(__file__).parent.parent
OUT = PROJECT / "bench" / "out"
START_SECONDS = 30


class BenchError(Exception):
    """A benchmark could not be run; nothing is reported for it."""


@dataclass(frozen=True, slots=True)
class Result:
    name: str
    value: float
    wanted: str         # the claim the README makes, e.g. ">= 1.5"
    text: str
    unit: str = "ratio"

    def __str__(self) -> str:
        return f"bench {self.name} {self.unit}={self.value:.2f}"


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
    """One malote with a store of its own in `root`, listening on a UNIX socket where the peer's uid is the login, and with a
    `port` on loopback too, where nobody need log in. `keys` False: they are in the store already."""

    def __init__(self, root: Path, upstream_port: int, *, seal: str, algorithm: str = "ed25519", port: int = 0, service: str = "",
                 store: str = "", limits: str = "", more: str = "", keys: bool = True) -> None:
        root.mkdir()
        self.root, self.socket, self.log, self.port = root, root / "socket", root / "log", port
        open_to_all = f'[[outgoing.listeners]]\nport = {port}\nauth = "none"' if port else ""
        self.config = root / "malote.toml"
        (root / "passphrase").write_text("benchmark")
        (root / "passphrase").chmod(0o600)
        self.config.write_text(f"""
[service]
{service}
[store]
path = "{root}/store"
{store}
[keys]
unlock = "file"
file = "{root}/passphrase"
[[outgoing.listeners]]
socket = "{self.socket}"
auth = "peer"
{open_to_all}
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
{more}
""")
        for address in (SENDER, RECIPIENT) if keys else ():
            self.run("keys", "new", address, "--algorithm", algorithm)

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


def load(at: Path | int, *, count: int, size_bytes: int, sessions: int = 10, keep: bool = False, many: bool = False) -> float:
    """Messages per second that smtp-source gets accepted at a UNIX socket or a port of loopback; with `many`, each to another
    address of the recipient's domain. Raises BenchError if one of them is refused."""
    address = f"unix:{at}" if isinstance(at, Path) else f"inet:{HOST}:{at}"
    command = ["smtp-source", "-s", str(sessions), "-m", str(count), "-l", str(size_bytes), "-f", SENDER, "-t", RECIPIENT,
               *(["-d"] if keep else []), *(["-N"] if many else []), address]
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


def memory(pid: int, field: str) -> int:
    """Bytes, from /proc/PID/status."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise BenchError(f"no {field} for process {pid}")


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@contextmanager
def part_of_core(pid: int, part: float) -> Iterator[None]:
    """A process, with all of its threads, has at most that part of one core: the kernel's cpu controller, either version."""
    period_us = 10_000
    name, old = f"malote-bench-{pid}", Path("/sys/fs/cgroup/cpu")
    try:
        group = (old if old.exists() else Path("/sys/fs/cgroup")) / name
        group.mkdir()
        if old.exists():
            (group / "cpu.cfs_period_us").write_text(str(period_us))
            (group / "cpu.cfs_quota_us").write_text(str(int(part * period_us)))
        else:
            (group / "cpu.max").write_text(f"{int(part * period_us)} {period_us}")
        (group / "cgroup.procs").write_text(str(pid))
    except OSError as error:
        raise BenchError(f"this system lets nobody here limit a process to a part of a core: {error.strerror}") from error
    try:
        yield
    finally:
        (group.parent / "cgroup.procs").write_text(str(pid))
        group.rmdir()
