"""Ports of the lab: tests that run side by side are never given the same one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lab import servers

ASK = """
import os, sys
from lab import servers
os.urandom = lambda count: (int(sys.argv[1]) - 10_000).to_bytes(count, "big")
try:
    print(servers.free_port())
except servers.LabError:
    print("none")
"""


def asked_elsewhere(port: int) -> str:
    """What another process is given, for which chance has only this port."""
    done = subprocess.run([sys.executable, "-c", ASK, str(port)], cwd=Path(servers.__file__).parents[1], capture_output=True,
                          text=True, check=True)
    return done.stdout.strip()


def test_a_port_given_out_is_nobody_elses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between choosing it and listening on it, nothing is bound to it that others could see."""
    port = servers.free_port()
    assert asked_elsewhere(port) == "none"
    monkeypatch.setattr(servers.os, "urandom", lambda count: (port - 10_000).to_bytes(count, "big"))
    with pytest.raises(servers.LabError):
        servers.free_port()


def test_it_is_free_again_when_the_process_has_ended() -> None:
    done = subprocess.run([sys.executable, "-c", "from lab.servers import free_port; print(free_port())"],
                          cwd=Path(servers.__file__).parents[1], capture_output=True, text=True, check=True)
    assert asked_elsewhere(int(done.stdout)) == done.stdout.strip()
