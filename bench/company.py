"""The company's relay: against Postfix as a plain relay, the latency it adds, and PostgreSQL against SQLite.

Everything here goes over loopback TCP to smtp-sink, and what counts is when the sink has the last message, not when the relay
took it: Postfix answers before it delivers, malote after.
"""

from __future__ import annotations

import os
import smtplib
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from bench.harness import HOST, RECIPIENT, SENDER, BenchError, Lab, Malote, Result, load, part_of_core, servers, workplace
from bench.relay import RUNS, SMALL
from lab.postgres import Postgres
from lab.servers import Sink, free_port

MESSAGES = 3000
SESSIONS = 20                   # as many as Postfix delivers at once to one destination
DELIVERY_SECONDS = 120
LATENCY_MESSAGES, LATENCY_BYTES = 400, 10 * 1024
NODE_CORE = 0.25
DURABLE = {"fsync": "on", "full_page_writes": "on", "synchronous_commit": "on", "autovacuum": "on", "shared_buffers": "128MB"}


def _delivered(ports: Sequence[int], sink: Sink, *, keep: bool, messages: int) -> float:
    """Messages a second, evenly to all ports, from the first connection until the sink has the last of them."""
    count, sessions = messages // len(ports), SESSIONS // len(ports)
    before, start = sink.messages(), time.perf_counter()
    with ThreadPoolExecutor(len(ports)) as pool:
        for done in [pool.submit(load, port, count=count, size_bytes=SMALL, sessions=sessions, keep=keep) for port in ports]:
            done.result()
    while sink.messages() < before + messages:
        if time.perf_counter() > start + DELIVERY_SECONDS:
            raise BenchError(f"{sink.messages() - before} of {messages} messages were delivered within {DELIVERY_SECONDS} s")
        time.sleep(0.005)
    return messages / (time.perf_counter() - start)


def _compared(relays: Mapping[str, tuple[Sequence[int], Sink]], *, keep: bool, messages: int = MESSAGES) -> dict[str, float]:
    """Median rates of relays, each its ports and its sink, which take turns; the first turn only warms up."""
    rates: dict[str, list[float]] = {name: [] for name in relays}
    for run in range(RUNS + 1):
        for name, (ports, sink) in relays.items():
            rate = _delivered(ports, sink, keep=keep, messages=messages)
            if run:
                rates[name].append(rate)
    return {name: statistics.median(values) for name, values in rates.items()}


def _postfix(lab: Lab, sink_port: int) -> int:
    """As Debian sets it up, but for what the lab needs, and without waiting before a delivery is tried again."""
    return lab.postfix(f"smtp:[{HOST}]:{sink_port}", settings={"default_destination_concurrency_limit": str(SESSIONS),
                                                                "smtp_connection_cache_on_demand": "yes"}).port


def postfix_relay() -> Result:
    with workplace() as root, servers(root / "lab") as lab, ExitStack() as stack:
        sink = lab.sink(counter=root / "counter")
        ours = Malote(root / "sealed", sink.port, seal="require", port=free_port(), service="workers = 2")
        stack.enter_context(ours.running())
        relays = {"postfix": ([_postfix(lab, sink.port)], sink), "malote": ([ours.port], sink)}
        new, kept = _compared(relays, keep=False), _compared(relays, keep=True)
        return Result("postfix-relay", new["malote"] / new["postfix"], ">= 1.0, aim 1.5",
                      f"5 KB sealed by two workers, ed25519, SQLite, delivered: {new['malote']:.0f}/s; Postfix as a plain relay "
                      f"{new['postfix']:.0f}/s; kept connections: {kept['malote']:.0f}/s and {kept['postfix']:.0f}/s, ratio "
                      f"{kept['malote'] / kept['postfix']:.2f}")


def added_latency() -> Result:
    with workplace() as root, servers(root / "lab") as lab, ExitStack() as stack:
        sink = lab.sink()
        ours = Malote(root / "sealed", sink.port, seal="require", port=free_port())
        stack.enter_context(ours.running())
        ports = {"direct": sink.port, "malote": ours.port}
        text = _message(LATENCY_BYTES)
        seconds: dict[str, list[float]] = {name: [] for name in ports}
        for count in range(LATENCY_MESSAGES + 40):
            for name, port in ports.items():
                start = time.perf_counter()
                with smtplib.SMTP(HOST, port) as client:
                    client.sendmail(SENDER, [RECIPIENT], text)
                    elapsed = time.perf_counter() - start
                if count >= 40:
                    seconds[name].append(elapsed)
        median = {name: statistics.median(values) * 1000 for name, values in seconds.items()}
        worst = statistics.quantiles(seconds["malote"], n=100)[98] * 1000
        return Result("added-latency", median["malote"] - median["direct"], "<= 5 ms",
                      f"10 KB sealed, connection to last reply, one at a time: {median['malote']:.1f} ms (99th of 100: "
                      f"{worst:.1f}), straight to the sink {median['direct']:.1f} ms", unit="ms")


def _message(size_bytes: int) -> str:
    line = "The minutes of the meeting, which nobody else should read. " * 2
    return f"From: {SENDER}\r\nTo: {RECIPIENT}\r\nSubject: minutes\r\n\r\n" + f"{line}\r\n" * (size_bytes // len(line))


def postgres_store() -> Result:
    with workplace() as root, servers(root / "lab") as lab, ExitStack() as stack:
        sink = lab.sink(counter=root / "counter")
        sqlite = Malote(root / "sqlite", sink.port, seal="require", port=free_port())
        node = _node(root / "node", sink, _database(root, stack))
        for one in (sqlite, node):
            stack.enter_context(one.running())
        rates = _compared({"sqlite": ([sqlite.port], sink), "postgres": ([node.port], sink)}, keep=False)
        return Result("postgres-store", rates["postgres"] / rates["sqlite"], ">= 0.7",
                      f"5 KB sealed, one node, one worker: {rates['postgres']:.0f}/s on PostgreSQL (fsync on), "
                      f"{rates['sqlite']:.0f}/s on SQLite")


def postgres_nodes() -> Result:
    """Two nodes, the database, the load and the sink do not fit two cores. So each node is given a part of one, so small that the
    others have enough of the rest: what is then measured is whether the nodes wait for each other in the database."""
    with workplace() as root, servers(root / "lab") as lab, ExitStack() as stack:
        sink = lab.sink(counter=root / "counter")
        url = _database(root, stack)
        nodes = [_node(root / "node1", sink, url), _node(root / "node2", sink, url, keys=False)]
        pids = [stack.enter_context(node.running()).pid for node in nodes]
        relays = {"one": ([nodes[0].port], sink), "two": ([node.port for node in nodes], sink)}
        free = _compared(relays, keep=False)
        for pid in pids:
            stack.enter_context(part_of_core(pid, NODE_CORE))
        held = _compared(relays, keep=False, messages=MESSAGES // 5)
        return Result("postgres-nodes", held["two"] / held["one"], ">= 1.7 where cores allow",
                      f"5 KB sealed, nodes with {NODE_CORE:.0%} of a core each: two {held['two']:.0f}/s, one "
                      f"{held['one']:.0f}/s; all on the {os.cpu_count()} cores here without that limit: "
                      f"{free['two']:.0f}/s and {free['one']:.0f}/s, ratio {free['two'] / free['one']:.2f}")


def _database(root: Path, stack: ExitStack) -> str:
    database = Postgres(root / "database", settings=DURABLE)
    stack.callback(database.stop)
    database.start()
    return database.url(database.new_database())


def _node(root: Path, sink: Sink, url: str, *, keys: bool = True) -> Malote:
    return Malote(root, sink.port, seal="require", port=free_port(), store=f'url = "{url}"', keys=keys)
