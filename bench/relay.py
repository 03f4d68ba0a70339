"""Sealing relay and pass-through against stock aiosmtpd + aiosmtplib: 5 KB and 5 MB messages, memory of a 25 MB one.

The runs of the things compared take turns (A B A B ...), so that a machine whose speed drifts does not favour one of them.
"""

from __future__ import annotations

import statistics
import time
from contextlib import ExitStack
from pathlib import Path

from bench.harness import Malote, Result, load, memory, process, servers, stock, workplace

SMALL, LARGE, HUGE = 5 * 1024, 5 * 1024 * 1024, 25 * 1024 * 1024
RUNS = 5
MESSAGES = 3000
LARGE_MESSAGES = 40


def _rates(sockets: dict[str, Path], *, count: int, size_bytes: int, runs: int = RUNS, sessions: int = 10,
           keep: bool = False) -> dict[str, float]:
    """Median messages per second for each socket, after one run each to warm up."""
    for socket in sockets.values():
        load(socket, count=max(sessions, count // 5), size_bytes=size_bytes, sessions=sessions, keep=keep)
    rates: dict[str, list[float]] = {name: [] for name in sockets}
    for _ in range(runs):
        for name, socket in sockets.items():
            rates[name].append(load(socket, count=count, size_bytes=size_bytes, sessions=sessions, keep=keep))
    return {name: statistics.median(values) for name, values in rates.items()}


def pass_through() -> Result:
    with workplace() as root, servers(root / "lab") as lab, ExitStack() as stack:
        sink = lab.sink()
        ours = Malote(root / "clear", sink.port, seal="never")
        stack.enter_context(ours.running())
        peer = root / "peer"
        stack.enter_context(process(stock(peer, sink.port), ready=peer, log=root / "peer.log"))
        sockets = {"malote": ours.socket, "stock": peer}
        new = _rates(sockets, count=MESSAGES, size_bytes=SMALL)
        kept = _rates(sockets, count=MESSAGES, size_bytes=SMALL, keep=True)
        ratio = new["malote"] / new["stock"]
        return Result("pass-through", ratio, ">= 1.5", f"unsealed 5 KB, new connections: malote {new['malote']:.0f}/s, "
                      f"aiosmtpd+aiosmtplib {new['stock']:.0f}/s; kept connections: {kept['malote']:.0f}/s and "
                      f"{kept['stock']:.0f}/s, ratio {kept['malote'] / kept['stock']:.2f}")


def relay_ed25519() -> Result:
    return _sealed("relay-ed25519", "ed25519", ">= 0.5")


def relay_hybrid() -> Result:
    return _sealed("relay-hybrid", "ed25519+ml-dsa-65", ">= 0.3")


def _sealed(name: str, algorithm: str, wanted: str) -> Result:
    with workplace() as root, servers(root / "lab") as lab, ExitStack() as stack:
        sink = lab.sink()
        clear = Malote(root / "clear", sink.port, seal="never")
        sealed = Malote(root / "sealed", sink.port, seal="require", algorithm=algorithm)
        for one in (clear, sealed):
            stack.enter_context(one.running())
        sockets = {"sealed": sealed.socket, "clear": clear.socket}
        new = _rates(sockets, count=MESSAGES, size_bytes=SMALL)
        kept = _rates(sockets, count=MESSAGES, size_bytes=SMALL, keep=True)
        return Result(name, new["sealed"] / new["clear"], wanted,
                      f"5 KB, {algorithm}, durable serial and journal, new connections: sealed {new['sealed']:.0f}/s, "
                      f"pass-through {new['clear']:.0f}/s; kept: {kept['sealed']:.0f}/s and {kept['clear']:.0f}/s")


def large_message() -> Result:
    with workplace() as root, servers(root / "lab") as lab, ExitStack() as stack:
        sink = lab.sink()
        ours = Malote(root / "sealed", sink.port, seal="require", limits="memory_budget = 1073741824")
        stack.enter_context(ours.running())
        peer = root / "peer"
        stack.enter_context(process(stock(peer), ready=peer, log=root / "peer.log"))
        rates = _rates({"malote": ours.socket, "stock": peer}, count=LARGE_MESSAGES, size_bytes=LARGE, sessions=4)
        megabytes = {name: rate * LARGE / 1e6 for name, rate in rates.items()}
        return Result("large-message", rates["malote"] / rates["stock"], ">= 1.0",
                      f"5 MB sealed and relayed: {megabytes['malote']:.0f} MB/s; stock aiosmtpd merely receiving: "
                      f"{megabytes['stock']:.0f} MB/s")


def memory_25mb() -> Result:
    with workplace() as root, servers(root / "lab") as lab:
        sink = lab.sink()
        ours = Malote(root / "sealed", sink.port, seal="require")
        with ours.running() as running:
            load(ours.socket, count=20, size_bytes=SMALL)
            time.sleep(0.5)
            idle = memory(running.pid, "VmRSS")
            Path(f"/proc/{running.pid}/clear_refs").write_text("5")       # proc(5): resets the peak to what is in use now
            load(ours.socket, count=1, size_bytes=HUGE, sessions=1)
            peak = memory(running.pid, "VmHWM")
        return Result("memory-25mb", (peak - idle) / HUGE, "<= 5",
                      f"one 25 MB message sealed: {(peak - idle) / 2**20:.0f} MiB above the idle {idle / 2**20:.0f} MiB")
