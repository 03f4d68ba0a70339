"""A real haproxy in front of several nodes: TCP, with health checks, and the PROXY protocol towards them."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from lab.servers import HOST, LabError, free_port

HEALTH_EVERY = "200ms"


class Haproxy:
    """As a context manager: running, and gone afterwards. Clients connect to `port`."""

    def __init__(self, root: Path, nodes: Sequence[int]) -> None:
        self.port = free_port()
        self._log = root / "haproxy.log"
        self._config = root / "haproxy.cfg"
        servers = "\n".join(f"    server node{number} {HOST}:{port} check inter {HEALTH_EVERY} fall 1 rise 1 send-proxy-v2"
                            for number, port in enumerate(nodes, 1))
        self._config.write_text(f"""
global
    maxconn 500
defaults
    mode tcp
    timeout connect 2s
    timeout client 300s
    timeout server 300s
    option redispatch
    retries 3
listen smtp
    bind {HOST}:{self.port}
    balance roundrobin
    option tcp-check
    tcp-check send-binary 0d0a0d0a000d0a515549540a20000000
    tcp-check expect rstring ^220
{servers}
""")
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        program = shutil.which("haproxy", path="/usr/sbin:/usr/bin:/usr/local/sbin")
        if program is None:
            raise LabError("haproxy is not installed: tests/lab/debian-packages.sh does it")
        with self._log.open("ab") as log:
            self._process = subprocess.Popen([program, "-db", "-f", str(self._config)], stdout=log, stderr=log,
                                             stdin=subprocess.DEVNULL, start_new_session=True)
        time.sleep(0.1)
        if self._process.poll() is not None:
            raise LabError(f"haproxy did not start\n{self._log.read_text()}")
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
