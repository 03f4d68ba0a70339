"""Tells systemd how the service is doing (sd_notify(3)): one datagram to the socket named in $NOTIFY_SOCKET."""

from __future__ import annotations

import os
import socket


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


def watchdog_seconds() -> float | None:
    """How often `WATCHDOG=1` is due, half of what the manager waits; None where it does not watch us."""
    try:
        waits_us = int(os.environ.get("WATCHDOG_USEC", ""))
        ours = int(os.environ.get("WATCHDOG_PID", str(os.getpid()))) == os.getpid()
    except ValueError:
        return None
    return waits_us / 2e6 if ours and waits_us > 0 else None
