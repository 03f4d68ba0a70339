"""Writing the audit log: an append-only file whose lines form a chain (core/audit.py), kept on the disk by one thread.

**Group commit**: whatever waits is written and fdatasync'ed together; who waits for a line goes on when it is on the disk. The
event loop only puts the line's values on a queue. **Several processes** may write one file: each batch is written under a lock on
it, after a look at where the chain is now. **Rotation** renames the file (its last number becomes part of the name) and goes on
in a new one, whose first line carries the hash of the last; whoever else renames it, as logrotate does, is followed the same way.

**After a crash** the last line may be cut off. It is left as it is, as the file is only ever appended to, and the line after it
accounts for it. Beside the file lies its *head*: the number and hash of the last line, written after the line is on the disk. A
file that ends before its head was shortened; the chain then goes on from the head, so that the gap stays visible.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import structlog

from malote.config import AuditConfig
from malote.core.audit import (
    HEAD_BYTES,
    LOST,
    MAX_LINE_BYTES,
    START,
    Head,
    line_hash,
    make_line,
    parse_head,
    parse_line,
    serialize_head,
    torn_members,
)
from malote.errors import AuditUnavailable, ConfigError, FormatError
from malote.private_files import sync_directory

MAX_WAITING = 100_000       # lines kept while the file cannot be written; then they are counted and dropped
RETRY_SECONDS = 1.0         # until the next attempt after one that failed
MAX_BATCH = 2_000           # lines in one write
TELL_SECONDS = 3600.0       # how often the head goes to the log of the service
WRITABLE = "it must be a file, no link, in a directory that the user of malote may write"
END_SECONDS = 5.0           # for the last attempt, when the service ends while the disk is full
_NUMBER_DIGITS = 12         # in the name of a rotated file: they sort by name up to there

log = structlog.get_logger("malote.audit")

Members = Mapping[str, Any]
Line = Callable[[], Members]        # made in the thread: fingerprints and JSON are not the loop's work


@dataclass(slots=True)
class _Job:
    lines: Sequence[Line]
    future: asyncio.Future[None] | None     # None: nobody waits
    loop: asyncio.AbstractEventLoop | None


class AuditLog:
    """One audit log. `note` and `write` from the event loop; `close` writes what waits."""

    def __init__(self, config: AuditConfig) -> None:
        """Raises `ConfigError` if the file cannot be written now."""
        if config.file is None:
            raise ValueError("no audit.file")
        self.config = config
        self.failing = False
        self.lost = 0               # lines dropped since the start
        self.written = 0            # lines on the disk since the start
        self._dropped = 0           # lines dropped and not yet told of in the log
        self._file = _File(config.file, config.rotate_bytes)
        self._jobs: deque[_Job] = deque()
        self._waiting = 0
        self._wake = threading.Condition()
        self._closing = False
        self._told_at = time.monotonic()
        self._head_told = ""
        try:
            self._file.append([])
        except OSError as error:
            raise ConfigError(f"audit.file: {config.file} cannot be written ({error.strerror})", hint=WRITABLE) from error
        self._thread = threading.Thread(target=self._main, name="malote-audit", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Lines that are not on the disk yet."""
        return self._waiting

    def note(self, line: Line) -> None:
        """Written soon, not waited for. Kept while the file cannot be written."""
        self._put(_Job([line], None, None))

    async def write(self, lines: Sequence[Line]) -> None:
        """On the disk when this returns. Raises `AuditUnavailable`; then the lines count for nothing."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        self._put(_Job(lines, future, loop))
        await future

    async def close(self) -> None:
        with self._wake:
            self._closing = True
            self._wake.notify()
        await asyncio.to_thread(self._thread.join)

    def _put(self, job: _Job) -> None:
        with self._wake:
            if self._closing and job.future is not None:
                raise AuditUnavailable("the audit log is closed")
            if self._waiting >= MAX_WAITING and job.future is None:
                self.lost += 1
                self._dropped += 1
                return
            self._jobs.append(job)
            self._waiting += len(job.lines)
            self._wake.notify()

    # ---- everything below runs in the thread -----------------------------------------------------------------------------

    def _main(self) -> None:
        closing_since = 0.0
        self._tell_head()       # also of what an earlier start has written, if that was killed
        while True:
            jobs, closing = self._take()
            if not jobs and closing:
                break
            closing_since = closing_since or (time.monotonic() if closing else 0.0)
            try:
                self._write(jobs)
            except Exception as error:      # noqa: BLE001 -- full, read-only, gone, or a fault of ours: the mail must know
                self._failed(jobs, error)
                if closing and time.monotonic() - closing_since > END_SECONDS:
                    log.error("lines of the audit log are lost", count=self._waiting)
                    break
                with self._wake:
                    self._wake.wait_for(self._urgent, RETRY_SECONDS)
        self._tell_head()
        self._file.close()

    def _take(self) -> tuple[list[_Job], bool]:
        with self._wake:
            self._wake.wait_for(lambda: self._jobs or self._closing)
            jobs, count = [], 0
            while self._jobs and count < MAX_BATCH:
                count += len(self._jobs[0].lines)
                jobs.append(self._jobs.popleft())
            return jobs, self._closing

    def _urgent(self) -> bool:
        return any(job.future is not None for job in self._jobs)

    def _write(self, jobs: Sequence[_Job]) -> None:
        lines = [_made(line) for job in jobs for line in job.lines]
        dropped = self._dropped
        if dropped:
            lines.insert(0, {"at_ms": time.time_ns() // 1_000_000, "event": LOST, "count": dropped})
        rotated = self._file.append(lines)
        with self._wake:
            self._dropped -= dropped
            self._waiting -= sum(len(job.lines) for job in jobs)
        self.written += len(lines)
        if self.failing:
            self.failing = False
            log.warning("the audit log can be written again")
        if self._file.head_fault != self._head_told:
            self._head_told = self._file.head_fault
            if self._head_told:
                log.error("the head of the audit log cannot be written", reason=self._head_told)
        if rotated is not None:
            log.info("audit log rotated", n=rotated.n, hash=rotated.hash)
        elif time.monotonic() - self._told_at > TELL_SECONDS:
            self._tell_head()
        _resolve(jobs, failed=False)

    def _tell_head(self) -> None:
        """To the log of the service, which may be kept by another machine: `malote audit verify --contains` asks for it."""
        self._told_at = time.monotonic()
        if self._file.head.n:
            log.info("audit log", n=self._file.head.n, hash=self._file.head.hash)

    def _failed(self, jobs: Sequence[_Job], error: Exception) -> None:
        """Who waits is told; the other lines are kept, in their order."""
        if not self.failing:        # once, not for every message of an outage
            self.failing = True
            log.error("the audit log cannot be written", error=type(error).__name__,
                      reason=error.strerror if isinstance(error, OSError) else "")
        with self._wake:
            waited_for = [job for job in (*jobs, *self._jobs) if job.future is not None]
            kept = [job for job in (*jobs, *self._jobs) if job.future is None]
            self._jobs = deque(kept)
            self._waiting = sum(len(job.lines) for job in kept)
        _resolve(waited_for, failed=True)


def _made(line: Line) -> Members:
    try:
        return line()
    except Exception as error:      # one line that cannot be made must not hold up all others for ever
        log.error("a line of the audit log cannot be made", exc_info=error)
        return {"at_ms": time.time_ns() // 1_000_000, "event": "fault"}


def _resolve(jobs: Sequence[_Job], *, failed: bool) -> None:
    def resolve(future: asyncio.Future[None]) -> None:
        if not future.done():       # its caller was cancelled
            if failed:
                future.set_exception(AuditUnavailable("the audit log cannot be written"))
            else:
                future.set_result(None)
    for job in jobs:
        if job.future is not None and job.loop is not None:
            with suppress(RuntimeError):        # the loop is closed: nobody waits any more
                job.loop.call_soon_threadsafe(resolve, job.future)


class _File:
    """The file and its head. Every method raises `OSError`."""

    def __init__(self, path: Path, rotate_bytes: int) -> None:
        self._path = path
        self._head_path = head_path(path)
        self._rotate_bytes = rotate_bytes
        self._file: BinaryIO | None = None
        self._head_file: BinaryIO | None = None
        self.head = START
        self.head_fault = ""        # why it could not be written
        self._size = -1             # of the file when `head` was its last line; -1: look

    def append(self, lines: Sequence[Members]) -> Head | None:
        """Append these lines and sync them. The head at which the file was rotated, if it was."""
        file = self._locked()
        try:
            size = os.fstat(file.fileno()).st_size
            head, torn = self._end_of_chain(file, size)
            data = bytearray(torn)
            for members in lines:
                line, head = make_line(head, members)
                data += line + b"\n"
            if data:
                self._put(file, size, data)
            self.head, self._size = head, size + len(data)
            if data:
                self._write_head(head)
            return self._rotate(file, head)
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)
            if file is not self._file:
                file.close()

    def close(self) -> None:
        for file in (self._file, self._head_file):
            if file is not None:
                file.close()
        self._file = self._head_file = None

    def _locked(self) -> BinaryIO:
        """The file of that name, locked; made if there is none."""
        while True:
            if self._file is None:
                self._file = _open(self._path)
                self._size = -1
            fcntl.flock(self._file, fcntl.LOCK_EX)
            with suppress(FileNotFoundError):
                ours = os.fstat(self._file.fileno())
                if os.path.samestat(ours, self._path.stat()):
                    if self._size < 0 and not ours.st_size:
                        sync_directory(self._path.parent)       # it may be new: its name must outlive a power cut, too
                    return self._file
            self._file.close()      # renamed, by us in another process or by somebody else
            self._file = None

    def _put(self, file: BinaryIO, size: int, data: bytearray) -> None:
        """All of it or nothing, as far as the file lets itself be cut (one that may only be appended to does not)."""
        try:
            left = memoryview(data)
            while left:
                left = left[os.write(file.fileno(), left):]
            os.fdatasync(file.fileno())
        except OSError:
            self._size = -1
            with suppress(OSError):
                os.ftruncate(file.fileno(), size)
            raise

    def _end_of_chain(self, file: BinaryIO, size: int) -> tuple[Head, bytes]:
        """The head, and what must be written to account for a fragment at the end."""
        if size == self._size:
            return self.head, b""
        last, fragment = _tail(file, size)
        known = (_head_of(last), self._read_head(), self._newest_rotated() if last is None else START, self.head)
        head = max(known, key=lambda each: each.n)      # ours, too: both files may have been shortened under us
        if not fragment:
            return head, b""
        with suppress(FormatError):     # whole but for its line end
            if parse_line(fragment)["n"] == head.n + 1:
                return Head(head.n + 1, line_hash(fragment)), b"\n"
        line, head = make_line(head, {"at_ms": time.time_ns() // 1_000_000, **torn_members(fragment)})
        return head, b"\n" + line + b"\n"

    def _newest_rotated(self) -> Head:
        files = rotated_files(self._path)
        if not files:
            return START
        with files[-1].open("rb") as file:
            return _head_of(_tail(file, os.fstat(file.fileno()).st_size)[0])

    def _rotate(self, file: BinaryIO, head: Head) -> Head | None:
        if not self._rotate_bytes or self._size < self._rotate_bytes:
            return None
        self._path.rename(self._path.with_name(f"{self._path.name}.{head.n:0{_NUMBER_DIGITS}d}"))
        self._file = _open(self._path)
        sync_directory(self._path.parent)
        self._size = 0              # of the new one, whose chain goes on from `head`
        return head

    def _head_handle(self) -> BinaryIO:
        if self._head_file is not None and not self._head_path.exists():
            self._head_file.close()
            self._head_file = None
        if self._head_file is None:
            handle = os.open(self._head_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            self._head_file = os.fdopen(handle, "rb+", buffering=0)
            if not os.fstat(handle).st_size:
                os.pwrite(handle, serialize_head(START), 0)
        return self._head_file

    def _read_head(self) -> Head:
        try:
            return parse_head(os.pread(self._head_handle().fileno(), HEAD_BYTES + 1, 0))
        except FormatError:     # new, or damaged: then the file itself counts
            return START

    def _write_head(self, head: Head) -> None:
        """Raises nothing: the lines are on the disk. A head that is behind them is no fault, only worth less."""
        try:
            os.pwrite(self._head_handle().fileno(), serialize_head(head), 0)
            self.head_fault = ""
        except OSError as error:
            self.head_fault = error.strerror or type(error).__name__


def _open(path: Path) -> BinaryIO:
    handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    return os.fdopen(handle, "rb+", buffering=0)


def _head_of(line: bytes | None) -> Head:
    if line is None:
        return START
    try:
        return Head(parse_line(line)["n"], line_hash(line))
    except FormatError:     # the verification says so; the chain goes on from the head beside it
        return START


def _tail(file: BinaryIO, size: int) -> tuple[bytes | None, bytes]:
    """The last line that is one of a chain (None: there is none), and what stands after the last line end."""
    start = max(0, size - 2 * MAX_LINE_BYTES)
    data = os.pread(file.fileno(), size - start, start)
    *whole, fragment = data.split(b"\n")
    for line in reversed(whole[1:] if start else whole):
        with suppress(FormatError):
            parse_line(line)
            return line, fragment
    return None, fragment


def head_path(path: Path) -> Path:
    return path.with_name(path.name + ".head")


def rotated_files(path: Path) -> list[Path]:
    """Oldest first."""
    pattern = re.compile(re.escape(path.name) + r"\.(\d+)")
    found = [(int(match[1]), each) for each in path.parent.iterdir() if (match := pattern.fullmatch(each.name))]
    return [each for _, each in sorted(found)]
