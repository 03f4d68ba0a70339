"""Workers that share a store, and nodes that share PostgreSQL behind haproxy: killed at random under load, racing for one
message, and taking over each other's mailboxes."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import smtplib
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from lab.daemon import PASSPHRASE, Daemon, Home, account, free_port, rule, upstream
from lab.fleet import Load, check_arrivals
from lab.haproxy import Haproxy
from lab.servers import HOST, Dovecot, Lab
from malote.core.identity import Identity
from malote.identities import open_identities
from malote.store import Store
from outgoing.harness import Upstream, submit, text, verdict
from service.test_reload import export, put, verdicts
from service.test_workers import worker_that_serves

ALICE, BOB, DAVE = (f"{name}@test.example" for name in ("alice", "bob", "dave"))
SECRET = b"the secret"
KILLS = [3, pytest.param(30, marks=[pytest.mark.long, pytest.mark.timeout(900)])]
OPEN = 'auth = "none"'


def listens(port: int, more: str = OPEN) -> str:
    return f'[[outgoing.listeners]]\nhost = "{HOST}"\nport = {port}\n{more}\n'


def give_keys(home: Home) -> None:
    for address in (ALICE, BOB, DAVE):
        home.keys("new", address, "--algorithm", "ed25519")


@asynccontextmanager
async def running(home: Home) -> AsyncIterator[Daemon]:
    daemon = await asyncio.to_thread(lambda: home.daemon().__enter__())
    try:
        yield daemon
    finally:
        await asyncio.to_thread(daemon.__exit__)


async def people_of(place: Path | str) -> Mapping[str, Identity]:
    store = await Store.open(place)
    try:
        return await open_identities(store, PASSPHRASE.encode)
    finally:
        await store.close()


@pytest.mark.parametrize("kills", KILLS)
async def test_workers_killed_at_random_under_load(home: Home, tmp_path: Path, kills: int) -> None:
    """kill -9, again and again, while clients send: each message arrives fresh once, whatever else of it is told as a repeat."""
    dice = random.Random(kills)
    async with Upstream() as server:
        port = free_port()
        home.configure("[service]\nworkers = 2\n" + listens(port) + upstream(server.port, None) + rule("require"))
        give_keys(home)
        async with running(home) as daemon:
            load = Load(port, ALICE, [BOB, DAVE])
            clients = load.start()
            for number in range(kills):
                await asyncio.sleep(0.3 + dice.random())
                os.kill(dice.choice(daemon.workers), signal.SIGKILL)
                await asyncio.to_thread(daemon.until, lambda wanted=number + 4: len(daemon.records("ready")) >= wanted,
                                        "the worker is started again")
            load.stop()
            await clients
            assert len(daemon.records("worker ended")) == kills
            assert await asyncio.to_thread(daemon.stop) == 0
        total = await check_arrivals(load, server, await people_of(home.root / "store"), tmp_path, SECRET)
        assert total["FRESH"] == 2 * len(load.taken) > 0


@pytest.mark.long
@pytest.mark.parametrize("kills", KILLS)
async def test_nodes_killed_at_random_under_load(tmp_path: Path, postgres_url: str, kills: int) -> None:
    """Three nodes on one PostgreSQL behind haproxy: whichever dies, with kill -9, its clients' retries go to the others, and what
    arrives is the same as with one node that lives."""
    dice = random.Random(kills)
    async with Upstream() as server, AsyncExitStack() as stack:
        homes = [Home(tmp_path / f"node{number}") for number in range(3)]
        ports = [free_port() for _ in homes]
        for home, port in zip(homes, ports, strict=True):
            behind = OPEN + '\nproxies = ["127.0.0.1"]\nnetworks = ["127.0.0.0/8"]'
            home.configure(listens(port, behind) + upstream(server.port, None) + rule("require"), store=f'url = "{postgres_url}"')
        await asyncio.to_thread(give_keys, homes[0])
        nodes = [await stack.enter_async_context(running(home)) for home in homes]
        with Haproxy(tmp_path, ports) as balancer:
            load = Load(balancer.port, ALICE, [BOB, DAVE])
            clients = load.start()
            for _ in range(kills):
                await asyncio.sleep(1 + dice.random())
                number = dice.randrange(len(nodes))
                nodes[number].signal(signal.SIGKILL)
                await asyncio.to_thread(nodes[number].wait)
                nodes[number] = await stack.enter_async_context(running(homes[number]))
            load.stop()
            await clients
            assert [await asyncio.to_thread(node.stop) for node in nodes] == [0, 0, 0]
        served = [len(node.records("message")) for node in nodes]
        assert all(served), f"haproxy sent to some nodes only: {served}"
        total = await check_arrivals(load, server, await people_of(postgres_url), tmp_path, SECRET)
        assert total["FRESH"] == 2 * len(load.taken) > 0


@pytest.mark.parametrize("recipients", [[BOB, DAVE], ["nobody@test.example", "none@test.example"]], ids=["sealed", "plain"])
async def test_one_message_over_two_workers_at_once(home: Home, tmp_path: Path, recipients: list[str]) -> None:
    """A client that lost patience reaches the other worker while the first is at it: one copy for each recipient, and all are
    told that it was taken. Later, and read, the same bytes are a new message."""
    async with Upstream() as server:
        port = free_port()
        home.configure("[service]\nworkers = 2\n" + listens(port) + upstream(server.port, None))
        give_keys(home)
        async with running(home) as daemon:
            for number in range(4):
                content = text(message_id=f"<{number}@test.example>")
                before = len(server.messages)
                done = await asyncio.gather(*(asyncio.to_thread(submit, port, ALICE, order, content, polite=False)
                                              for order in (recipients, recipients[::-1], recipients[1:], recipients)))
                assert [each.code for each in done] == [250] * 4
                arrived = sorted(each for message in server.messages[before:] for each in message.recipients)
                assert arrived == sorted(recipients), "sent twice, or not at all"
            both = {line["worker"] for line in daemon.records("message")}
            assert both == {0, 1}, "the test did not reach both workers"
            again = text(message_id="<again@test.example>")
            before = len(server.messages)
            for _ in range(4):
                assert (await asyncio.to_thread(submit, port, ALICE, recipients, again)).code == 250
            arrived = [each for message in server.messages[before:] for each in message.recipients]
            assert len(arrived) == 4 * len(recipients), "a message was swallowed"
            assert await asyncio.to_thread(daemon.stop) == 0
        if recipients == [BOB, DAVE]:
            people = await people_of(home.root / "store")
            store = await Store.open(tmp_path / "bob")
            said = {await verdict(store, message.content, people[BOB], people[ALICE])
                    for message in server.messages if BOB in message.recipients}
            await store.close()
            assert said == {"FRESH"}


async def test_a_worker_killed_in_flight_holds_up_nobody(home: Home) -> None:
    """The retry goes to another worker, which must not wait for the dead one."""
    victims: list[int] = []

    def script(at: str, _argument: str, _count: int) -> str | bool | None:
        if at == "DOT!" and victims:
            os.kill(victims.pop(), signal.SIGKILL)
        return False
    async with Upstream(script) as server:
        port = free_port()
        home.configure("[service]\nworkers = 2\n" + listens(port) + upstream(server.port, None))
        give_keys(home)
        async with running(home) as daemon:
            with smtplib.SMTP(HOST, port, timeout=60) as client:
                await asyncio.to_thread(client.ehlo)
                victims.append(worker_that_serves(daemon, client))

                def lose() -> None:
                    with pytest.raises(smtplib.SMTPServerDisconnected):
                        client.sendmail(ALICE, [BOB], text())
                await asyncio.to_thread(lose)
            assert not victims
            assert (await asyncio.to_thread(submit, port, ALICE, [BOB], text())).code == 250
            assert await asyncio.to_thread(daemon.stop) == 0
            [message] = [line for line in daemon.records("message") if line["reply"] == 250]
            assert message["ms"] < 25_000, "it waited for the membership of the dead one to run out"


@pytest.mark.long
def test_mailboxes_are_shared_and_taken_over(home: Home, lab: Lab, dovecot: Dovecot, tmp_path: Path) -> None:
    """Each mailbox is watched by one worker, both have some, and those of a killed one are watched again; mail is opened once."""
    users = [f"{name}{time.monotonic_ns()}@test.example" for name in ("first", "second", "third", "fourth")]
    dovecot.add_users(users)
    anna = Home(tmp_path / "anna")
    anna.configure("[outgoing]\nenabled = false\n")
    anna.keys("new", ALICE, "--algorithm", "ed25519")
    anna.keys("export", ALICE, "-o", str(tmp_path / "anna.card"))
    home.configure("[service]\nworkers = 2\n[outgoing]\nenabled = false\n" + "".join(
        account(user, dovecot.imaps_port, lab.certificate, home, name=user.split("@")[0]) for user in users))
    for user in users:
        home.keys("new", user, "--algorithm", "ed25519")
        anna.keys("import", str(export(home, user, tmp_path)))
    home.keys("import", str(tmp_path / "anna.card"))
    with home.daemon() as daemon:
        def holders() -> dict[str, int]:
            held: dict[str, int] = {}
            for line in daemon.records():
                if line["event"] == "account taken":
                    held[line["account"]] = line["worker"]
                elif line["event"] == "account given back":
                    held.pop(line["account"], None)
                elif line["event"] == "worker ended":
                    held = {name: worker for name, worker in held.items() if worker != line["worker"]}
            return held
        daemon.until(lambda: sorted(holders().values()) == [0, 0, 1, 1], "each worker has its share")
        for user in users:
            put(dovecot, anna, user)
        daemon.until(lambda: all(verdicts(dovecot, user) == ["FRESH"] for user in users), "all is opened")
        before = len(daemon.records("account taken"))
        os.kill(daemon.workers[0], signal.SIGKILL)
        daemon.until(lambda: len(daemon.records("account taken")) >= before + 2 and len(holders()) == 4, "taken over")
        for user in users:
            put(dovecot, anna, user)
        daemon.until(lambda: all(verdicts(dovecot, user) == ["FRESH"] * 2 for user in users), "all is opened again")
        assert daemon.stop() == 0
    assert all(verdicts(dovecot, user) == ["FRESH"] * 2 for user in users)


@pytest.mark.long
async def test_a_node_that_was_frozen_finds_its_work_done_by_another(
    tmp_path: Path, lab: Lab, dovecot: Dovecot, postgres_url: str,
) -> None:
    """SIGSTOP, as a machine that is suspended: in the middle of a message, and while it watches a mailbox. Another node takes
    both over within a minute; when the first goes on, it sends and opens nothing once more, and lets go."""
    user = f"box{time.monotonic_ns()}@test.example"
    dovecot.add_users([user])
    homes, ports = [Home(tmp_path / f"node{number}") for number in range(2)], [free_port(), free_port()]
    frozen: list[Daemon] = []

    def script(at: str, _argument: str, _count: int) -> bool:
        if at == "DATA" and not frozen:
            frozen.append(nodes[0])
            nodes[0].signal(signal.SIGSTOP)
        return False
    async with Upstream(script) as server, AsyncExitStack() as stack:
        for home, port in zip(homes, ports, strict=True):
            home.configure(listens(port) + upstream(server.port, None) + account(user, dovecot.imaps_port, lab.certificate, home),
                           store=f'url = "{postgres_url}"')
        for address in (ALICE, BOB, user):
            await asyncio.to_thread(homes[0].keys, "new", address, "--algorithm", "ed25519")
        nodes = [await stack.enter_async_context(running(homes[0]))]
        await asyncio.to_thread(nodes[0].wait_for_log, "account taken")
        nodes.append(await stack.enter_async_context(running(homes[1])))
        content = text(ALICE)

        def lose() -> None:
            with pytest.raises(OSError), smtplib.SMTP(HOST, ports[0], timeout=2) as client:
                client.sendmail(ALICE, [BOB], content)
        await asyncio.to_thread(lose)
        assert frozen
        assert not server.messages
        while (await asyncio.to_thread(submit, ports[1], ALICE, [BOB], content, polite=False)).code != 250:
            await asyncio.sleep(1)
        await asyncio.to_thread(nodes[1].until, lambda: len(nodes[1].records("account taken")) == 1, "the mailbox is taken over")
        assert len(server.messages) == 1
        await asyncio.to_thread(put, dovecot, homes[1], user)
        await asyncio.to_thread(nodes[1].until, lambda: verdicts(dovecot, user) == ["FRESH"], "opened by the second")
        nodes[0].signal(signal.SIGCONT)
        await asyncio.to_thread(nodes[0].wait_for_log, "others may have taken over|may take over")
        await asyncio.sleep(8)      # more than a look at the shares
        assert len(server.messages) == 1, "sent twice"
        assert verdicts(dovecot, user) == ["FRESH"]
        assert len(nodes[0].records("account taken")) == 1, "the first has taken it back from a node that lives"
        assert (await asyncio.to_thread(submit, ports[0], ALICE, [BOB], text(ALICE, message_id="<new@test.example>"))).code == 250
        assert [await asyncio.to_thread(node.stop) for node in nodes] == [0, 0]
