"""What `malote check` tries of metrics and audit log. Nothing is written, and no file is made."""

from __future__ import annotations

import errno
import fcntl
import http.client
import os
import shutil
import socket
from pathlib import Path

from malote.audit import WRITABLE, head_path, rotated_files
from malote.cli.findings import Finding, Findings, State, ok, warning
from malote.config import Config
from malote.core.audit import HEAD_BYTES, Chain, Head, parse_head, parse_line
from malote.errors import FormatError

END_BYTES = 16 * 1024 * 1024        # of the audit log that are read here; `malote audit verify` reads all
SMALL_DISK_BYTES = 100 * 1024 * 1024


async def metrics_probe(config: Config) -> Findings:
    """Each worker's port: free, or malote's."""
    for offset in range(config.service.workers):
        host, port = config.metrics.host, config.metrics.port + offset
        what = f"metrics {host}:{port}"
        try:
            with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
                yield ok(what, "is free")
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                yield Finding(what, State.FAULT, f"cannot be listened on ({error.strerror})", "set another metrics.port")
            elif _answers_as_ours(host, port):
                yield ok(what, "malote answers there now")
            else:
                yield Finding(what, State.FAULT, "another program listens there",
                              "set another metrics.port; each worker has its own, from that one on")


def _answers_as_ours(host: str, port: int) -> bool:
    connection = http.client.HTTPConnection(host, port, timeout=2)
    try:
        connection.request("GET", "/healthz")
        return connection.getresponse().read(64) == b"alive\n"
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


async def audit_probe(path: Path, *, required: bool) -> Findings:
    what, place = "audit log", path.parent
    if not os.access(place, os.R_OK | os.W_OK | os.X_OK):
        yield Finding(what, State.FAULT, f"{place}: no directory that this user can read and write", WRITABLE)
        return
    try:
        found = _end_of_it(path)
    except OSError as error:
        yield Finding(what, State.FAULT, f"{error.filename or path}: cannot be opened for writing ({error.strerror})", WRITABLE)
        return
    if found is None:
        yield ok(what, f"{path}: is not there yet, and can be made")
    else:
        yield found
    free = shutil.disk_usage(place).free
    if free < SMALL_DISK_BYTES:
        then = "without it nothing leaves (audit.required)" if required else "without it lines are lost in the end"
        yield warning(what, f"its disk has only {free // 1_000_000} MB left", f"make room: {then}")


def _end_of_it(path: Path) -> Finding | None:
    """Whether the last lines are a chain that ends as its head says. Raises `OSError` if the daemon could not write there."""
    kept: Head | None = None
    fault = ""
    try:
        handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    with os.fdopen(handle, "rb", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_SH)        # the daemon holds it for moments
        try:
            head = os.open(head_path(path), os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            with os.fdopen(head, "rb", buffering=0) as beside:
                kept = parse_head(os.pread(beside.fileno(), HEAD_BYTES + 1, 0))
        except FileNotFoundError:
            fault = "its head is missing"
        except FormatError:
            fault = "its head is damaged"
        size = os.fstat(file.fileno()).st_size
        start = max(0, size - END_BYTES)
        data = os.pread(file.fileno(), END_BYTES, start)
    lines = data.split(b"\n")[1 if start else 0:-1]      # whole ones; a fragment is accounted for by the next start
    if not lines and kept is not None and rotated_files(path):
        return ok("audit log", f"{path}: can be written; begins after line {kept.n}")
    chain = Chain(after=_before(lines))
    faults = [each.text for line in lines for each in chain.take(line, "")] + [each.text for each in chain.finish(kept)]
    if lines and fault:
        faults.append(fault)
    if faults:
        return Finding("audit log", State.FAULT, f"{path}: {faults[0]}", "malote audit verify finds all of it; keep the files")
    return ok("audit log", f"{path}: can be written; " + (f"its last {chain.lines} lines are whole" if lines else "no line yet"))


def _before(lines: list[bytes]) -> Head:
    """What comes before the first of them, as it says itself."""
    for line in lines[:1]:
        try:
            members = parse_line(line)
        except FormatError:
            continue
        return Head(members["n"] - 1, members["prev"])
    return Head()


__all__ = ["audit_probe", "metrics_probe"]
