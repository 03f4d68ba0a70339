"""Tells systemd how the service is doing (sd_notify(3)): one datagram to the socket named in $NOTIFY_SOCKET."""

from __future__ import annotations

import os
import socket
import time
from typing import Protocol


def notify(*states: str) -> bool:
    """Send states such as `READY=1`. False where there is no service manager that listens; never raises."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path or path[0] not in "/@":
        return False
    address = "\0" + path[1:] if path[0] == "@" else path
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as manager:
            manager.sendto("\n".join(states).encode(), address)
    except OSError:
        return False
    return True


def notify_reloading() -> bool:
    return notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")


def watchdog_seconds() -> float | None:
    """How often `WATCHDOG=1` is due, half of what the manager waits; None where it does not watch us."""
    try:
        waits_us = int(os.environ.get("WATCHDOG_USEC", ""))
        ours = int(os.environ.get("WATCHDOG_PID", str(os.getpid()))) == os.getpid()
    except ValueError:
        return None
    return waits_us / 2e6 if ours and waits_us > 0 else None


class Manager(Protocol):
    """Whoever watches over this process: systemd, or a supervisor of ours."""

    alive_seconds: float | None     # how often `alive` is wanted; None: not at all

    def ready(self, status: str) -> None: ...
    def alive(self) -> None: ...
    def reloading(self) -> None: ...
    def reloaded(self, *, fault: str = "") -> None: ...
    def stopping(self) -> None: ...


class Systemd:
    """The service manager of the machine, if there is one."""

    def __init__(self) -> None:
        self.alive_seconds = watchdog_seconds()

    def ready(self, status: str) -> None:
        notify("READY=1", f"STATUS={status}")

    def alive(self) -> None:
        notify("WATCHDOG=1")

    def reloading(self) -> None:
        notify_reloading()

    def reloaded(self, *, fault: str = "") -> None:     # what it was is in the log
        notify("READY=1")

    def stopping(self) -> None:
        notify("STOPPING=1")
