"""PostgreSQL as the store of several nodes: what only several at once, a server that goes away, or its failover can show."""

from __future__ import annotations

import asyncio
import signal
import ssl
import subprocess
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from lab.postgres import PASSWORD, Postgres
from lab.servers import Lab
from malote.core.freshness import Arrival, Claim, FreshnessLimits, Verdict
from malote.database_url import parse_url
from malote.errors import ConfigError, StoreUnavailable
from malote.store import Outcome, OutcomeEntry, PostgresPlace, SendIntent, SendState, Store, cards
from malote.store.database import Db
from malote.store.migrate import upgrade
from malote.store.postgres import LOCK_RUNNING, LOCKS
from malote.store.schema import CURRENT, REVISIONS, Statement

BOB, CAROL = "bob@b.example", "carol@c.example"
TAKEN = {BOB: (Outcome.ACCEPTED, "250 2.0.0 queued")}
LIMITS = FreshnessLimits()
Make = Callable[..., SendIntent]
Open = Callable[[], Awaitable[Store]]


@pytest.fixture
def store_url(postgres_url: str) -> str:
    return postgres_url


@pytest.fixture
def own_server(tmp_path: Path, lab: Lab) -> Iterator[Postgres]:
    """One that a test may end. Not below pytest's directory, which is closed to its user."""
    server = Postgres(lab.root / f"postgres-{tmp_path.name}")
    server.start()
    yield server
    server.stop(signal.SIGQUIT)


# ---- several at once ------------------------------------------------------------------------------------------------------


async def test_numbers_are_unique_across_nodes(open_store: Open, intent: Make) -> None:
    """Three nodes send as one identity at once; each has a numbering of its own, without gaps."""
    nodes = [await open_store() for _ in range(3)]
    plans = await asyncio.gather(*(node.begin_send(intent(BOB, CAROL, content=b"%d %d" % (number, at)))
                                   for number in range(60) for at, node in enumerate(nodes)))
    given = Counter((row.stream, row.address, row.serial) for plan in plans for row in plan.rows)
    assert set(given.values()) == {1}
    assert len({stream for stream, _, _ in given}) == 3
    for stream in {stream for stream, _, _ in given}:
        assert {serial for of, address, serial in given if (of, address) == (stream, BOB)} == set(range(1, 61))
    assert len({(row.stream, plan.sent_at_ms) for plan in plans for row in plan.rows}) == len(plans), "no time is signed twice"


async def test_a_numbering_goes_on_after_a_restart(open_store: Open, store_url: str, intent: Make) -> None:
    """Receivers would else see a new sender's device at each start."""
    store = await Store.open(store_url)
    first = (await store.begin_send(intent(BOB))).row(BOB)
    await store.close()
    again = (await (await open_store()).begin_send(intent(BOB, content=b"two"))).row(BOB)
    assert (again.stream, again.serial) == (first.stream, 2)


async def test_a_retry_at_another_node_has_the_same_numbers(open_store: Open, intent: Make, now_ms: int) -> None:
    one, two = await open_store(), await open_store()
    await two.begin_send(intent(CAROL, content=b"another"))
    plan = await one.begin_send(intent(BOB, CAROL))
    await one.finish_send(plan, {BOB: (Outcome.ACCEPTED, "250 ok")}, now_ms)
    retry = await two.begin_send(intent(BOB, CAROL))
    assert retry.submission_id == plan.submission_id
    assert retry.row(BOB).state is SendState.ACCEPTED
    assert retry.row(CAROL) == replace(plan.row(CAROL), state=SendState.IN_DOUBT, attempt=2)


async def test_the_same_message_at_all_nodes_at_once_is_one_message(open_store: Open, intent: Make) -> None:
    """A client that gave up on one node and comes to the next while the first still works: one id, one number."""
    nodes = [await open_store() for _ in range(4)]
    for number in range(15):
        content = b"message %d" % number
        plans = await asyncio.gather(*(node.begin_send(intent(BOB, CAROL, content=content)) for node in nodes))
        assert len({plan.submission_id for plan in plans}) == 1
        for address in (BOB, CAROL):
            rows = [plan.row(address) for plan in plans]
            assert len({(row.stream, row.serial, row.prev) for row in rows}) == 1
            assert sorted(row.attempt for row in rows) == [1, 2, 3, 4]


async def test_accepted_is_final_whatever_other_nodes_begin_meanwhile(open_store: Open, intent: Make, now_ms: int) -> None:
    one, two = await open_store(), await open_store()
    for number in range(30):
        send = intent(BOB, content=b"%d" % number)
        plan = await one.begin_send(send)
        await asyncio.gather(one.finish_send(plan, TAKEN, now_ms), two.begin_send(send))
        assert (await two.begin_send(send)).row(BOB).state is SendState.ACCEPTED


async def test_one_node_calls_a_message_fresh(open_store: Open, claim: Callable[..., Claim], now_ms: int) -> None:
    """The same hundred messages at three nodes, each in an order of its own: also what deadlocks is done in the end."""
    nodes = [await open_store() for _ in range(3)]
    for node in nodes:
        await node.flush()
    numbers = list(range(1, 101))
    orders = (numbers, numbers[::-1], numbers[50:] + numbers[:50])
    stored = await asyncio.gather(*(node.judge(claim(number), Arrival(now_ms), LIMITS)
                                    for node, order in zip(nodes, orders, strict=True) for number in order))
    assert sum(one.first for one in stored) == 100
    assert len({one.row_id for one in stored}) == 100
    assert {one.judgement.verdict for one in stored if one.first} == {Verdict.FRESH}
    await nodes[0].mark_delivered(stored[0].row_id or 0)
    again = await nodes[2].judge(claim(1), Arrival(now_ms), LIMITS)
    assert (again.judgement.verdict, again.delivered) == (Verdict.DUPLICATE, True)


async def test_a_deadlock_is_tried_again(open_store: Open) -> None:
    """Two nodes that write the same rows in opposite order: the server ends one of them, and both are done."""
    one, two = await open_store(), await open_store()

    def both(first: str, second: str) -> Callable[[Db], None]:
        def write(db: Db) -> None:
            cards.put_meta(db, first, b"value")
            db.lock("meet " + first)     # time for the other one to get as far
            cards.put_meta(db, second, b"value")
        return write
    for _ in range(5):
        await asyncio.gather(one._writer.write(both("x", "y")), two._writer.write(both("y", "x")))


async def test_what_a_message_costs_on_the_way_to_the_server(
    store: Store, intent: Make, now_ms: int, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each message to the server and back is paid by all mail that waits: one for the numbers of a message however many
    recipients it has, and a handful for the outcomes of all that were sent."""
    await store.begin_send(intent(BOB, content=b"makes the numbering"))
    sent: list[str] = []
    for name in ("execute", "executemany", "fetch", "fetchmany"):
        def counted(self: asyncpg.Connection, command: str, *values: object, _real: object = getattr(asyncpg.Connection, name),
                    **more: object) -> object:
            sent.append(command)
            return _real(self, command, *values, **more)    # type: ignore[operator]
        monkeypatch.setattr(asyncpg.Connection, name, counted)
    people = [f"{number}@b.example" for number in range(200)]
    await store.begin_send(intent(*people))
    assert len(sent) == 3, "BEGIN, the numbers, COMMIT"
    sent.clear()
    plans = await asyncio.gather(*(store.begin_send(intent(BOB, content=b"%d" % number)) for number in range(50)))
    assert len(sent) <= 50 + 4, "two commits at most"
    sent.clear()
    for plan in plans:
        store.finish_send_later(plan, TAKEN, now_ms)
        store.remember_outer_id("<a@a.example>", "<b@a.example>", now_ms)
        store.forget_send(plan)
    await store.flush()
    assert len(sent) <= 6
    assert (await store.begin_send(intent(BOB, content=b"7"))).row(BOB).state is SendState.NEW, "forgotten"
    sent.clear()
    await store.begin_send(intent(*people))     # a retry
    assert len(sent) <= 8


async def test_what_is_put_off_stays_in_its_order(store: Store, intent: Make, now_ms: int) -> None:
    """Of one message: taken, forgotten, and begun anew as another; and a fault of one operation is not another's."""
    send = intent(BOB)
    for number in range(3):
        plan = await store.begin_send(send)
        assert (plan.row(BOB).state, plan.row(BOB).serial) == (SendState.NEW, number + 1)
        store.forget_send(plan)         # in doubt: it stays
        store.finish_send_later(plan, TAKEN, now_ms)
        assert (await store.begin_send(send)).row(BOB).state is SendState.ACCEPTED
        store.forget_send(plan)

    plan = await store.begin_send(send)
    store.forget_send(plan)
    store.finish_send_later(plan, TAKEN, now_ms)
    store.forget_send(plan)             # all three in one transaction
    assert (await store.begin_send(send)).row(BOB).state is SendState.NEW

    def faulty(db: Db) -> None:
        db.many(Statement(text("INSERT INTO meta (name, value) VALUES (:name, :value)")), [{"name": "x", "value": "text"}] * 2)
    plan = await store.begin_send(send)
    results = await asyncio.gather(store._writer.write(faulty), store.finish_send(plan, TAKEN, now_ms),
                                   store.begin_send(intent(BOB, content=b"other")), return_exceptions=True)
    assert isinstance(results[0], Exception)
    assert not any(isinstance(result, Exception) for result in results[1:])
    assert (await store.begin_send(send)).row(BOB).state is SendState.ACCEPTED


async def test_no_update_is_lost_between_nodes(open_store: Open, intent: Make, now_ms: int) -> None:
    """READ COMMITTED: what one node has read may be old when it writes. Many messages to one person from three nodes that number
    alike: no number twice, none missing, the last one accepted is the one before the next."""
    nodes = [await open_store() for _ in range(3)]
    for node in nodes:
        await node.flush()
        node._writer._db.slot = 0       # type: ignore[attr-defined]    # as if all had the numbering of one
    plans = [plan for number in range(0, 90, 3) for plan in await asyncio.gather(*(
        node.begin_send(intent(BOB, CAROL, content=b"%d" % (number + at))) for at, node in enumerate(nodes)))]
    for address in (BOB, CAROL):
        assert sorted(plan.row(address).serial for plan in plans) == list(range(1, 91))
    assert len({plan.sent_at_ms for plan in plans}) == 90
    await asyncio.gather(*(nodes[at % 3].finish_send(plan, TAKEN, now_ms) for at, plan in enumerate(plans)))
    after = await nodes[0].begin_send(intent(BOB, CAROL, content=b"after"))
    assert (after.row(BOB).serial, after.row(BOB).prev) == (91, 90)
    assert (after.row(CAROL).serial, after.row(CAROL).prev) == (91, 0)


async def test_nodes_tell_their_watchers_apart(postgres_url: str) -> None:
    """What marks this node's copies in a mailbox is not another's; what recognises a retry is shared."""
    nodes = [await Store.open(PostgresPlace(postgres_url, node=name)) for name in (b"one", b"two", b"one")]
    devices = [await node.local_key("device") for node in nodes]
    journals = [await node.local_key("journal") for node in nodes]
    for node in nodes:
        await node.close()
    assert devices[0] == devices[2] != devices[1]
    assert len(set(journals)) == 1


async def test_machines_of_one_database_are_no_copies_of_each_other(store_url: str, intent: Make) -> None:
    """A file that comes to another machine is a copy; a database that another machine uses is not."""
    streams = set()
    for machine in (b"one", b"two", b"one"):
        store = await Store.open(store_url, machine_id=machine)
        streams.add((await store.begin_send(intent(BOB, content=machine))).row(BOB).stream)
        await store.close()
    assert len(streams) == 1


async def test_many_open_a_new_database_at_once(postgres_url: str) -> None:
    """All nodes may start first: one makes the tables, the others wait for it."""
    stores = await asyncio.gather(*(Store.open(postgres_url) for _ in range(5)))
    assert len({await store.local_key("mine") for store in stores}) == 1
    for store in stores:
        await store.close()


@pytest.mark.long
async def test_nodes_of_a_new_version_start_at_the_same_moment(store_url: str) -> None:
    """On tables of the version before: one brings them up to date, the others wait; none does while an older one is at work."""
    engine = create_async_engine(store_url.replace("postgresql://malote@/", "postgresql+asyncpg://malote@/"))
    async with engine.begin() as connection:
        await connection.run_sync(upgrade, REVISIONS[-2])
    await engine.dispose()
    older = await asyncpg.connect(store_url)
    await older.execute("SELECT pg_advisory_lock_shared($1::int, $2::int)", LOCKS, LOCK_RUNNING)
    with pytest.raises(StoreUnavailable, match="another malote has it open") as caught:
        await Store.open(store_url)
    assert "stop malote on every node" in caught.value.hint
    await older.close()
    opening = "import asyncio, sys; from malote.store import Store; asyncio.run(Store.open(sys.argv[1]))"
    nodes = [subprocess.Popen([sys.executable, "-c", opening, store_url], env={"PYTHONPATH": ":".join(sys.path)},
                              stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for node in nodes:
        _, told = await asyncio.to_thread(node.communicate)
        assert node.returncode == 0, told
    store = await Store.open(store_url, readonly=True)      # which refuses all but the current tables
    await store.close()


_NODE = """
import asyncio, os, sys, time
from malote.store import SendIntent, SendRecipient, Store
async def one(store):
    while True:
        plan = await store.begin_send(SendIntent("anna", "anna@a.example", b"k" * 32, os.urandom(32),
            [SendRecipient("bob@b.example", True)], time.time_ns() // 1_000_000))
        os.write(1, b"%s %d\\n" % (plan.rows[0].stream.hex().encode(), plan.rows[0].serial))
async def main():
    store = await Store.open(sys.argv[1])
    await asyncio.gather(*(one(store) for _ in range(4)))
asyncio.run(main())
"""


async def test_no_number_is_given_out_twice_when_nodes_are_killed(postgres_url: str) -> None:
    """Three processes send as one identity; each is killed in the middle, and another takes its numbering over."""
    await (await Store.open(postgres_url)).close()
    given: list[str] = []
    for _ in range(2):
        nodes = [subprocess.Popen([sys.executable, "-c", _NODE, postgres_url], stdout=subprocess.PIPE, text=True,
                                  env={"PYTHONPATH": ":".join(sys.path)}) for _ in range(3)]
        for node in nodes:
            assert node.stdout is not None
            given += [await asyncio.to_thread(node.stdout.readline) for _ in range(80)]
            node.kill()
        for node in nodes:
            given += (await asyncio.to_thread(node.communicate))[0].splitlines(keepends=True)
    whole = [line.split() for line in given if line.endswith("\n")]
    assert len({(stream, int(serial)) for stream, serial in whole}) == len(whole) >= 480
    assert len({stream for stream, _ in whole}) <= 6


# ---- a server that goes away ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGQUIT], ids=["restart", "crash"])
async def test_the_server_goes_and_comes_back(
    own_server: Postgres, intent: Make, claim: Callable[..., Claim], now_ms: int, how: signal.Signals,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Meanwhile 451, in order and not forever; then the same open store works again, and what nobody waits for is written."""
    store = await Store.open(own_server.url(own_server.new_database()))
    plan = await store.begin_send(intent(BOB))
    await asyncio.to_thread(own_server.stop, how)
    store.finish_send_later(plan, TAKEN, now_ms)
    store.log_outcome(OutcomeEntry(7, "out", "sealed"))
    for number in range(3):
        with pytest.raises(StoreUnavailable) as caught:
            await store.begin_send(intent(BOB, content=b"meanwhile %d" % number))
        assert caught.value.reply.code == 451
        assert str(own_server.root) not in f"{caught.value} {caught.value.reply}"
    with pytest.raises(StoreUnavailable):
        await store.judge(claim(), Arrival(now_ms), LIMITS)
    await asyncio.to_thread(own_server.start)
    assert (await store.begin_send(intent(BOB))).row(BOB).state is SendState.ACCEPTED
    assert (await store.begin_send(intent(BOB, content=b"after"))).row(BOB).serial == 2
    assert (await store.judge(claim(), Arrival(now_ms), LIMITS)).judgement.verdict is Verdict.FRESH
    assert [entry.at_ms for entry in await store.recent_outcomes()] == [7]
    await store.close()
    texts = [record.message for record in caplog.records if record.name == "malote.store"]
    assert [text.partition(":")[0] for text in texts] == ["the store cannot be written", "the store can be written again"]


async def test_a_restart_while_nothing_happens_is_not_noticed(own_server: Postgres, intent: Make) -> None:
    store = await Store.open(own_server.url(own_server.new_database()))
    await store.begin_send(intent(BOB))
    await asyncio.to_thread(own_server.stop)
    await asyncio.to_thread(own_server.start)
    assert (await store.begin_send(intent(BOB, content=b"two"))).row(BOB).serial == 2
    await store.close()


async def test_a_connection_that_is_cut_is_made_anew(postgres: Postgres, store: Store, intent: Make) -> None:
    """By an administrator, a firewall, a server short of memory: in the middle of work, and nothing is lost or doubled."""
    cut = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'malote'"

    async def send(number: int) -> int | None:
        try:
            return (await store.begin_send(intent(BOB, content=b"%d" % number))).row(BOB).serial
        except StoreUnavailable:
            return None
    done: list[int | None] = []
    for number in range(0, 200, 20):
        results = asyncio.gather(*(send(number + at) for at in range(20)))
        await asyncio.to_thread(postgres.execute, "postgres", cut)
        done += await results
    given = [serial for serial in done if serial is not None]
    assert len(set(given)) == len(given)
    last = (await store.begin_send(intent(BOB, content=b"in the end"))).row(BOB).serial
    assert last > max(given, default=0)


async def test_a_row_that_another_node_holds_is_not_waited_for_for_ever(
    open_store: Open, store_url: str, intent: Make, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A node that hangs in the middle of a transaction: 451, and work again once the server has ended it."""
    monkeypatch.setitem(sys.modules["malote.store.postgres"]._SETTINGS, "lock_timeout", "100ms")
    store = await open_store()
    await store.begin_send(intent(BOB))
    other = await asyncpg.connect(store_url)
    await other.execute("BEGIN; UPDATE device SET last_sent_ms = last_sent_ms")
    with pytest.raises(StoreUnavailable, match="locked"):
        await store.begin_send(intent(BOB, content=b"two"))
    assert await store.list_cards() == [], "reading goes on"
    await other.close()
    assert (await store.begin_send(intent(BOB, content=b"two"))).row(BOB).serial == 2


# ---- failover -------------------------------------------------------------------------------------------------------------


async def test_a_failover_counts_as_loss_of_state(
    own_server: Postgres, lab: Lab, intent: Make, claim: Callable[..., Claim], now_ms: int, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The replica may lack the last commits: numbers go on under a new stream, and what was sent before is not called fresh.
    Once, whichever node comes first, and not again at the next restart."""
    name = own_server.new_database()
    one, two = [await Store.open(own_server.url(name)) for _ in range(2)]
    before = (await one.begin_send(intent(BOB))).row(BOB)
    replica = Postgres(lab.root / f"replica-{tmp_path.name}", port=own_server.port)
    await asyncio.to_thread(own_server.copy_to, replica)
    await one.begin_send(intent(BOB, content=b"a commit that the replica lacks"))
    await asyncio.to_thread(own_server.stop, signal.SIGQUIT)
    await asyncio.to_thread(replica.start)
    with pytest.raises(StoreUnavailable, match="standby"):
        await Store.open(replica.url(name))
    await asyncio.to_thread(replica.promote)
    own_server.root, replica.root = replica.root, own_server.root      # the name of the service now leads there
    own_server.process, replica.process = replica.process, None
    for store in (one, two):
        await store.close()
    one, two = [await Store.open(own_server.url(name)) for _ in range(2)]
    after = (await one.begin_send(intent(BOB, content=b"after"))).row(BOB)
    assert after.stream != before.stream
    assert after.serial == 1
    old = claim(sent_at_ms=now_ms - 1000)
    assert (await two.judge(old, Arrival(now_ms), LIMITS)).judgement.verdict is Verdict.UNVERIFIABLE
    assert [record.message for record in caplog.records if "replaced or recovered" in record.message] != []
    caplog.clear()
    await two.close()
    again = await Store.open(own_server.url(name))
    assert (await again.begin_send(intent(BOB, content=b"again"))).row(BOB).stream in {after.stream} | {
        (await again.begin_send(intent(BOB, content=b"more"))).row(BOB).stream}
    assert not [record for record in caplog.records if "replaced or recovered" in record.message]
    for store in (one, again):
        await store.close()


@pytest.fixture
def standby(own_server: Postgres, lab: Lab, tmp_path: Path) -> Iterator[Postgres]:
    """It follows `own_server` by streaming replication, asynchronously."""
    server = Postgres(lab.root / f"standby-{tmp_path.name}")
    own_server.copy_to(server, follow=True)
    server.start()
    yield server
    server.stop(signal.SIGQUIT)


async def test_a_failover_under_open_stores(
    own_server: Postgres, standby: Postgres, intent: Make, claim: Callable[..., Claim], now_ms: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The same for nodes that go on running, with a replica that lacked the last commits when it was promoted: 451 meanwhile,
    then new numberings; no repeat is fresh; what they had to themselves is not taken for granted; no row of a message that was
    lost is mixed up with one of a new message."""
    name = own_server.new_database()
    hosts = ",".join(f"{quote(str(server.root), safe='')}:{server.port}" for server in (own_server, standby))
    nodes = [await Store.open(f"postgresql://malote@{hosts}/{name}") for _ in range(2)]
    owners = [b"1" * 16, b"2" * 16]
    for node, owner in zip(nodes, owners, strict=True):
        await node.join(owner)
    known = (await nodes[0].begin_send(intent(BOB))).row(BOB)
    assert (await nodes[1].judge(claim(1), Arrival(now_ms), LIMITS)).judgement.verdict is Verdict.FRESH
    await asyncio.to_thread(standby.catch_up, own_server)
    await asyncio.to_thread(standby.lag)
    tenure = nodes[0].tenure
    assert await nodes[0].take_lease("box")
    await nodes[1].leave()
    await nodes[1].join(b"3" * 16)
    lost = await nodes[0].begin_send(intent(BOB, content=b"lost"))
    lost_rows = [(await nodes[1].judge(claim(number), Arrival(now_ms), LIMITS)).row_id for number in range(2, 100)]
    await asyncio.to_thread(own_server.stop, signal.SIGQUIT)
    for node in nodes:
        with pytest.raises(StoreUnavailable) as caught:
            await node.begin_send(intent(BOB, content=b"meanwhile"))
        assert caught.value.reply.code == 451
    await asyncio.to_thread(standby.promote)
    async with asyncio.timeout(30):
        while await asyncio.to_thread(standby.execute, "postgres", "SELECT pg_is_in_recovery()") == "t":
            await asyncio.sleep(0.02)
    after = [(await node.begin_send(intent(BOB, content=b"%d" % at))).row(BOB) for at, node in enumerate(nodes)]
    assert known.stream not in {row.stream for row in after}
    assert lost.row(BOB).stream not in {row.stream for row in after}
    for number in (1, 50, 150):
        old = await nodes[1].judge(claim(number), Arrival(now_ms), LIMITS)
        assert old.judgement.verdict is (Verdict.FRESH if number == 1 else Verdict.UNVERIFIABLE)
        assert old.first == (number != 1)
        assert old.row_id not in lost_rows
    for row_id in lost_rows:        # deliveries that end only now
        await nodes[1].mark_delivered(row_id or 0)
    again = await nodes[1].judge(claim(150), Arrival(now_ms), LIMITS)
    assert not again.delivered, "another message's delivery was written down for it"
    assert await nodes[0].leases() == {}
    assert await nodes[0].renew_membership(1), "of before the replica lagged"
    assert nodes[0].tenure is tenure
    assert not await nodes[1].renew_membership(1), "the replica never knew it"
    await nodes[0].finish_send(lost, TAKEN, now_ms)
    texts = [record.message for record in caplog.records if "replaced or recovered" in record.message]
    assert len(texts) == 1, "once, whichever node comes first"
    for node in nodes:
        await node.close()


async def test_a_server_that_went_back_in_time_is_not_used(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old primary, back again beside the new one: its timeline is the older."""
    from malote.store import postgres
    server = postgres.Server(PostgresPlace(store_url))
    connection = await server.connect()
    await server.identify(connection)
    assert server._seen is not None
    monkeypatch.setattr(server, "_seen", (server._seen[0], server._seen[1] + 1))
    with pytest.raises(StoreUnavailable, match="not the primary any more"):
        await server.identify(connection)
    await connection.close()


# ---- what is checked ------------------------------------------------------------------------------------------------------


async def test_commits_are_durable_whatever_the_server_s_default(postgres: Postgres, store: Store) -> None:
    """Its postgresql.conf says synchronous_commit = off here: then the last commits are lost in a crash."""
    assert postgres.settings == {}
    connection = store._writer._connection      # type: ignore[attr-defined]
    assert await connection.fetchval("SHOW synchronous_commit") == "on"


async def test_reading_only_writes_nothing(open_store: Open, store_url: str) -> None:
    with pytest.raises(StoreUnavailable, match="is empty"):
        await Store.open(store_url, readonly=True)
    await open_store()
    reader = await Store.open(store_url, readonly=True)
    assert await reader.list_cards() == []
    with pytest.raises(StoreUnavailable, match="takes no writes"):
        await reader.distrust(1)
    await reader.close()


async def test_a_database_of_another_program_is_refused(postgres: Postgres) -> None:
    name = postgres.new_database()
    postgres.execute(name, "CREATE TABLE orders (id int)")
    with pytest.raises(StoreUnavailable, match="something else"):
        await Store.open(postgres.url(name))


async def test_a_newer_store_is_refused(postgres: Postgres, store: Store, store_url: str) -> None:
    await store.close()
    postgres.execute(parse_url(store_url).database, "UPDATE alembic_version SET version_num = '0999'")
    for readonly in (False, True):
        with pytest.raises(StoreUnavailable, match="newer version"):
            await Store.open(store_url, readonly=readonly)


@pytest.mark.parametrize(("version", "words"), [
    ("0999", "newer version"), ("0002", "older version"), ("copying", "not finished")])
async def test_tables_that_change_under_an_open_store(
    postgres: Postgres, store: Store, store_url: str, intent: Make, version: str, words: str,
) -> None:
    """A node that was cut off while the others were brought up to date, or went back: it writes nothing into tables that it does
    not know."""
    name = parse_url(store_url).database
    await store.begin_send(intent(BOB))
    connection = store._writer._connection      # type: ignore[attr-defined]
    postgres.execute(name, f"UPDATE alembic_version SET version_num = '{version}'",
                     f"SELECT pg_terminate_backend({connection.get_server_pid()})")
    for number in range(2):
        with pytest.raises(StoreUnavailable, match=words):
            await store.begin_send(intent(BOB, content=b"meanwhile %d" % number))
    postgres.execute(name, f"UPDATE alembic_version SET version_num = '{CURRENT}'")
    assert (await store.begin_send(intent(BOB, content=b"two"))).row(BOB).serial == 2


async def test_a_pooler_is_said(postgres: Postgres) -> None:
    """pgbouncer answers so to settings that it does not know, instead of making the connection."""
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(int.from_bytes(await reader.readexactly(4)) - 4)
        fields = b"SFATAL\0C08P01\0Munsupported startup parameter: lock_timeout\0\0"
        writer.write(b"E" + (len(fields) + 4).to_bytes(4) + fields)
        writer.close()
    server = await asyncio.start_server(refuse, "127.0.0.1", 0)
    async with server:
        with pytest.raises(StoreUnavailable, match="pooler"):
            await Store.open(f"postgresql://malote@127.0.0.1:{server.sockets[0].getsockname()[1]}/malote")


async def test_missing_rights_are_said(postgres: Postgres) -> None:
    """A database that belongs to somebody else, before and after there are tables in it."""
    name = postgres.new_database()
    postgres.execute("postgres", f"ALTER DATABASE {name} OWNER TO postgres")
    with pytest.raises(StoreUnavailable, match="may not do what is needed") as caught:
        await Store.open(postgres.url(name))
    assert "must own the database" in caught.value.hint
    await (await Store.open(postgres.url(name, user="postgres"))).close()
    with pytest.raises(StoreUnavailable, match="may not do what is needed"):
        await Store.open(postgres.url(name))


async def test_a_missing_database_is_said(postgres: Postgres) -> None:
    with pytest.raises(StoreUnavailable, match="no such database") as caught:
        await Store.open(postgres.url("nowhere"))
    assert "createdb" in caught.value.hint


async def test_a_wrong_password_is_said_and_not_shown(postgres: Postgres, tmp_path: Path) -> None:
    secret = tmp_path / "password"
    secret.write_text("not the right one\n")
    secret.chmod(0o600)
    url = f"postgresql://malote@127.0.0.1:{postgres.port}/{postgres.new_database()}"
    with pytest.raises(StoreUnavailable, match="does not accept our login") as caught:
        await Store.open(PostgresPlace(url, secret))
    assert "not the right one" not in f"{caught.value} {caught.value.hint} {caught.value.reply}"
    secret.write_text(PASSWORD)
    await (await Store.open(PostgresPlace(url, secret))).close()


async def test_tls_is_verified_in_full_over_the_network(
    postgres: Postgres, lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The lab's certificate is for 127.0.0.1: with its authority it is taken, without or for another name it is not."""
    from malote.store import postgres as module
    monkeypatch.setattr(module, "is_loopback", lambda _host: False)
    secret = tmp_path / "password"
    secret.write_text(PASSWORD)
    secret.chmod(0o600)
    name = postgres.new_database()
    place = f"postgresql://malote@{{}}:{postgres.port}/{name}"
    with pytest.raises(StoreUnavailable, match="certificate") as caught:
        await Store.open(PostgresPlace(place.format("127.0.0.1"), secret))
    assert isinstance(caught.value.__cause__, ssl.SSLCertVerificationError)
    with pytest.raises(StoreUnavailable, match="certificate"):
        await Store.open(PostgresPlace(place.format("127.0.0.2"), secret, lab.certificate))
    store = await Store.open(PostgresPlace(place.format("127.0.0.1"), secret, lab.certificate))
    connection = store._writer._connection      # type: ignore[attr-defined]
    assert await connection.fetchval("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()") is True
    await store.close()


async def test_the_first_of_several_hosts_that_takes_writes_is_used(postgres: Postgres, tmp_path: Path) -> None:
    name = postgres.new_database()
    place = quote(str(postgres.root), safe="")
    url = f"postgresql://malote@{place}:1,{place}:{postgres.port}/{name}"
    store = await Store.open(url)
    await store.distrust(1)
    await store.close()


@pytest.mark.parametrize("url", [
    "postgresql://anna:secret@host/db", "postgresql://host/db?password=secret", "postgresql://host/", "postgresql://host/a/b",
    "postgresql:///db", "postgresql://host:x/db", "postgresql://host:99999/db", "postgresql://host/db?sslmode=disable",
    "postgresql://host/db?host=/run", "postgresql://host/db#x", "postgresql://a,,b/db",
])
async def test_urls_that_are_refused(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        await Store.open(url)
    assert "secret" not in f"{caught.value} {caught.value.hint}"


async def test_text_that_postgresql_cannot_hold(store: Store, intent: Make, now_ms: int) -> None:
    """A reply with NUL or half of a surrogate pair is kept in a readable form, and faults nothing else."""
    plan = await store.begin_send(intent(BOB))
    await store.finish_send(plan, {BOB: (Outcome.REFUSED, "550 a\0b \udc80 ü")}, now_ms)
    assert (await store.begin_send(intent(BOB))).row(BOB).reply == "550 a\\x00b \\udc80 ü"


async def test_unsealed_mail_is_journaled(store: Store, intent: Make, now_ms: int) -> None:
    """`begin_plain` has no answer here, whose caller then uses the journal: a retry at any node finds what was accepted."""
    plain = intent(BOB, plain=(BOB,))
    assert store.begin_plain(plain) is None
    plan = await store.begin_send(plain)
    store.finish_send_later(plan, TAKEN, now_ms)
    assert (await store.begin_send(plain)).row(BOB).state is SendState.ACCEPTED
    store.forget_send(plan)
    assert (await store.begin_send(plain)).row(BOB).state is SendState.NEW


async def test_one_claims_a_name(open_store: Open) -> None:
    one, two = await open_store(), await open_store()
    assert [await one.claim("keys"), await two.claim("keys"), await two.claim("other")] == [True, False, True]
    await one.close()
    assert await two.claim("keys")


async def test_closing_writes_what_nobody_waits_for(store_url: str) -> None:
    store = await Store.open(store_url)
    for number in range(3000):
        store.log_outcome(OutcomeEntry(number, "out", "sealed"))
    await store.close()
    with pytest.raises(StoreUnavailable, match="closed"):
        await store.list_cards()
    store = await Store.open(store_url)
    assert len(await store.recent_outcomes(10_000)) == 3000
    await store.close()
