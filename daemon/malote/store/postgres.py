"""PostgreSQL: where it is, who may be trusted to be it, and what a connection is checked for before anything is asked of it.

A connection takes three things that last as long as it does, so that the server lets go of them when a node dies: a share of the
lock that `malote store migrate` takes whole, a slot (`schema.device`), and the certainty that the server is the one of before.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import asyncpg
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool
from sqlalchemy.util import await_only

from malote.config import is_loopback
from malote.database_url import parse_url
from malote.errors import ConfigError, Contended, MaloteError, StoreUnavailable
from malote.private_files import read_private_file
from malote.store.database import Db, Row
from malote.store.migrate import bring_up_to_date_postgres
from malote.store.places import PostgresPlace
from malote.store.schema import Statement

CONNECT_SECONDS = 10.0
STATEMENT_SECONDS = 20.0        # then the server is taken for hung; a client waits minutes for its reply
LOCK_WAIT = "5s"                # how long a row of another node is waited for, as BUSY_MS of SQLite
# Advisory locks are numbers that all users of a database share: these are ours.
LOCKS = 0x4D4C54                # "MLT", the first of two numbers; the second is one of these, or a hash
LOCK_RUNNING = 1                # shared by everybody who writes; `malote store migrate` takes it alone
LOCK_SCHEMA = 2
LOCK_SLOTS = 0x4D4C55           # the second number is the slot
MAX_SLOTS = 10_000

_SETTINGS = {
    "application_name": "malote",
    "timezone": "UTC",
    "lock_timeout": LOCK_WAIT,
    "idle_in_transaction_session_timeout": "60s",   # what a node that hangs holds is free then
    "tcp_keepalives_idle": "15", "tcp_keepalives_interval": "5", "tcp_keepalives_count": "3",   # and one without power
    "tcp_user_timeout": "30000",
    "jit": "off",
}
_FACTS = ("SELECT pg_is_in_recovery(), current_setting('transaction_read_only') = 'on', current_setting('synchronous_commit'), "
          "current_setting('server_encoding'), current_setting('server_version_num')::int")
_SERVER = ("SELECT (SELECT system_identifier FROM pg_control_system())::text, "
           "('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))::bit(32)::int")
_SLOT = "SELECT slot FROM generate_series(0, $2::int) AS slot WHERE pg_try_advisory_lock($1::int, slot) LIMIT 1"


class Server:
    """Makes connections to one database. Remembers which server it was, to notice one that went back in time."""

    def __init__(self, place: PostgresPlace, *, readonly: bool = False) -> None:
        self._place = place
        self._target = parse_url(place.url)
        self._local = all(host.startswith("/") or is_loopback(host) for host in self._target.hosts)
        self._readonly = readonly
        self._seen: tuple[str, int] | None = None

    async def connect(self) -> asyncpg.Connection:
        """Logged in, to a server that takes writes (or, `readonly`, any), with durable commits. No locks are taken yet."""
        target = self._target
        password = None
        if self._place.password_file is not None:
            password = read_private_file(self._place.password_file).decode()     # read anew: it may have been renewed
        settings = _SETTINGS | ({"default_transaction_read_only": "on"} if self._readonly else {})
        connection = await asyncpg.connect(
            host=list(target.hosts), port=list(target.ports), user=target.user, database=target.database, password=password,
            ssl=False if self._local and not self._place.ca_file else self._tls(),
            timeout=CONNECT_SECONDS, command_timeout=STATEMENT_SECONDS,
            statement_cache_size=400, max_cached_statement_lifetime=0, server_settings=settings,
            target_session_attrs=None if self._readonly or len(target.hosts) == 1 else "read-write")
        try:
            await self._check(connection)
        except BaseException:
            connection.terminate()
            raise
        return connection

    async def _check(self, connection: asyncpg.Connection) -> None:
        standby, read_only, durability, encoding, version = await connection.fetchrow(_FACTS)
        if encoding != "UTF8":
            raise StoreUnavailable("the database does not hold UTF-8",
                                   hint="createdb --encoding=UTF8 --template=template0 malote")
        if version < 130000:
            raise StoreUnavailable("the database server is older than PostgreSQL 13")
        if self._readonly:
            return
        if standby or read_only:
            raise StoreUnavailable("the database server is a standby, or takes no writes",
                                   hint="store.url must name the primary; it may name several hosts, host1,host2")
        if durability in ("off", "local", "remote_write"):      # what these lose in a crash would be given out again
            await connection.execute("SET synchronous_commit = on")

    async def identify(self, connection: asyncpg.Connection) -> bytes:
        """Names the server and its timeline, which changes with each failover and each recovery from a backup."""
        name, timeline = await connection.fetchrow(_SERVER)
        if self._seen is not None and self._seen[0] == name and timeline < self._seen[1]:
            raise StoreUnavailable("the database server lags behind the one that was used before: it is not the primary any more")
        self._seen = (name, timeline)
        return f"{name}/{timeline}".encode()

    def _tls(self) -> ssl.SSLContext:
        try:
            return ssl.create_default_context(cafile=self._place.ca_file)     # verifies chain and name
        except (OSError, ssl.SSLError) as error:
            raise ConfigError("store.ca_file: cannot be used", hint="a PEM file with the authority of the server") from error


async def take_slot(connection: asyncpg.Connection) -> int:
    """A share of the running lock, and the lowest slot that nobody has; both until the connection ends."""
    if not await connection.fetchval("SELECT pg_try_advisory_lock_shared($1::int, $2::int)", LOCKS, LOCK_RUNNING):
        raise StoreUnavailable("the store is being copied or brought up to date", hint="try again when that is done")
    slot = await connection.fetchval(_SLOT, LOCK_SLOTS, MAX_SLOTS)
    if slot is None:
        raise StoreUnavailable("too many processes use this store")
    return int(slot)


@dataclass(slots=True)
class PutOff:
    """One statement, with the values of all operations that wrote with it; and which rows of the journal it changes."""

    statement: Statement
    values: list[dict[str, Any]]
    changed: set[bytes]


class PostgresDb(Db):
    """A transaction on PostgreSQL, for functions that run in `sqlalchemy.util.greenlet_spawn`."""

    __slots__ = ("_connection", "_put_off", "slot")
    distant = True

    def __init__(self, connection: asyncpg.Connection, slot: int) -> None:
        self._connection = connection
        self.slot = slot
        self._put_off: list[PutOff] = []

    def rows(self, statement: Statement, values: dict[str, Any]) -> list[Row]:
        self.flush()
        command, names = statement.numbered
        return [tuple(row) for row in await_only(self._connection.fetch(command, *_arguments(names, values)))]

    def run(self, statement: Statement, values: dict[str, Any]) -> int:
        self.flush()
        command, names = statement.numbered
        # the server's answer is "UPDATE 1" or "INSERT 0 1"; fetch keeps the statement prepared, and execute with values as well
        status: str = await_only(self._connection.execute(command, *_arguments(names, values)))
        count = status.rpartition(" ")[2]
        return int(count) if count.isdigit() else 0

    def many(self, statement: Statement, values: Sequence[dict[str, Any]]) -> None:
        """Put off: what all operations of a transaction write with one statement goes to the server in one message. Two that
        change the same row (`at_key`) stay in their order."""
        if not values:
            return
        changed = {one["at_key"] for one in values if "at_key" in one}
        for group in reversed(self._put_off):
            if group.statement is statement:
                group.values += values
                group.changed |= changed
                return
            if not changed.isdisjoint(group.changed):
                break
        self._put_off.append(PutOff(statement, list(values), changed))

    def flush(self) -> None:
        """Do what was put off."""
        put_off, self._put_off = self._put_off, []
        for group in put_off:
            command, names = group.statement.numbered
            arguments = [_arguments(names, one) for one in group.values]
            if len(arguments) == 1:
                await_only(self._connection.execute(command, *arguments[0]))
            else:
                await_only(self._connection.executemany(command, arguments))

    def forget(self) -> None:
        """What was put off in a transaction that came to nothing."""
        self._put_off.clear()

    def each(self, statement: Statement, values: Sequence[dict[str, Any]]) -> list[Row | None]:
        if len(values) < 2:
            return [self.row(statement, one) for one in values]
        self.flush()
        command, names = statement.numbered
        found = await_only(self._connection.fetchmany(command, [_arguments(names, one) for one in values]))
        return [*(tuple(row) for row in found), *(None for _ in range(len(values) - len(found)))]

    def now_ms(self) -> int:
        self.flush()
        return int(await_only(self._connection.fetchval("SELECT (extract(epoch FROM clock_timestamp()) * 1000)::bigint")))

    def lock(self, name: str) -> None:
        self.flush()
        await_only(self._connection.fetchval("SELECT pg_advisory_xact_lock($1::int, hashtext($2))", LOCKS, name))

    def claim(self, name: str) -> bool:
        command = "SELECT pg_try_advisory_lock($1::int, hashtext($2))"
        return bool(await_only(self._connection.fetchval(command, LOCKS, name)))

    def command(self, command: str) -> str:
        """One without values, as SAVEPOINT; its status."""
        self.flush()
        status: str = await_only(self._connection.execute(command))
        return status


def _arguments(names: Sequence[tuple[str, Any]], values: dict[str, Any]) -> list[Any]:
    found = []
    for name, constant in names:
        value = values[name] if constant is None or name in values else constant
        if type(value) is str and ("\0" in value or not value.isascii()):
            value = storable(value)
        elif type(value) is list:
            value = [storable(one) for one in value]
        found.append(value)
    return found


def storable(value: str) -> str:
    """PostgreSQL holds neither half of a surrogate pair nor NUL, as a folder name or a reply of a server may have."""
    return value.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")


def is_contention(error: BaseException) -> bool:
    """Whether the same again may succeed at once."""
    return isinstance(error, Contended | asyncpg.SerializationError | asyncpg.DeadlockDetectedError)


def is_database_error(error: BaseException) -> bool:
    return isinstance(error, asyncpg.PostgresError | asyncpg.InterfaceError | OSError | TimeoutError | _CUT)


# the driver's own confusion (InternalClientError) is what comes of a cut between an answer and the next question
_CUT = asyncpg.PostgresConnectionError | asyncpg.InternalClientError


def is_disconnect(error: BaseException, connection: asyncpg.Connection | None) -> bool:
    """Whether this connection ended; another one may work."""
    return (connection is not None and connection.is_closed()) or isinstance(error, _CUT) \
        or str(getattr(error, "sqlstate", "")) in ("57P01", "57P02")


def is_outage(error: BaseException, connection: asyncpg.Connection | None) -> bool:
    """Whether the database failed, not the one operation."""
    if connection is not None and connection.is_closed():
        return True
    if isinstance(error, asyncpg.PostgresError):
        return str(error.sqlstate)[:2] in _OUTAGES or error.sqlstate in ("25006", "25P03", "55P03", "42501", "42P01")
    return isinstance(error, OSError | TimeoutError | _CUT)


_OUTAGES = ("08", "28", "3D", "53", "57", "58", "F0", "XX")


def unavailable(cause: BaseException) -> MaloteError:
    """What the caller gets for an error of the database. The cause stays for the log; its text goes nowhere else."""
    if isinstance(cause, MaloteError):
        return cause
    if isinstance(cause, DBAPIError) and cause.orig is not None:    # of the migrations
        cause = cause.orig.__cause__ or cause.orig
    state = getattr(cause, "sqlstate", None) or ("08" if isinstance(cause, _CUT) else "")
    words, hint = "the store cannot be used", ""
    if isinstance(cause, ssl.SSLCertVerificationError):
        words, hint = "the certificate of the database server is not trusted", "store.ca_file; its name must be that of store.url"
    elif isinstance(cause, OSError | TimeoutError):
        words, hint = "the database server cannot be reached", "see whether it runs, and store.url"
    known = next((found for start, found in _TEXTS.items() if state.startswith(start)), None)
    words, hint = known or (words, hint)
    error = StoreUnavailable(words, hint=hint)
    error.__cause__ = cause
    return error


_TEXTS = {
    "28": ("the database server does not accept our login", "store.url, store.password_file, and pg_hba.conf of the server"),
    "3D": ("there is no such database", "make it: createdb --owner=malote malote"),
    "42501": ("the database user may not do what is needed", "the user of store.url must own the database"),
    "42P01": ("the database holds no store any more", "put a backup of it back"),
    "53100": ("the disk of the database server is full", "make room on that disk, then try again"),
    "53300": ("the database server has too many connections", "raise max_connections there"),
    "53": ("the database server is short of resources", ""),
    "25006": ("the database takes no writes", "store.url must name the primary"),
    "25P03": ("the database server ended a transaction that took too long", ""),
    "55P03": ("the store is locked by another process", "try again in a moment"),
    "57P03": ("the database server is starting or stopping", "try again in a moment"),
    "57": ("the database server ended the connection", "try again in a moment"),
    "08P01": ("the database server, or a pooler in front of it, refuses the settings of malote's connections",
              "store.url must name the server itself"),
    "08": ("the connection to the database server was lost", "try again in a moment"),
    "58": ("the database server reports an error of its system", ""),
    "XX": ("the database is damaged", "see the log of the database server"),
}


async def disconnect(connection: asyncpg.Connection | None) -> None:
    if connection is not None:
        with suppress(Exception):       # it is gone either way
            await asyncio.wait_for(connection.close(timeout=2), 3)


def bring_up_to_date(server: Server) -> None:
    """Make or migrate the tables. With an event loop of its own, for a thread: Alembic keeps its state in module globals, and
    must not be entered by two tasks of one loop. Raises `StoreUnavailable`."""
    def work(connection: Connection) -> None:
        connection.execute(text("SELECT pg_advisory_xact_lock(:a, :b)"), {"a": LOCKS, "b": LOCK_SCHEMA})    # one node at a time
        bring_up_to_date_postgres(connection, take_alone)

    async def main() -> None:
        engine = create_async_engine("postgresql+asyncpg://", async_creator=server.connect, poolclass=NullPool)
        try:
            async with engine.begin() as connection:
                await connection.run_sync(work)
        finally:
            await engine.dispose()
    asyncio.run(main())


def take_alone(connection: Connection) -> bool:
    """The whole running lock, until the end of the transaction; False: somebody shares it."""
    taken = text("SELECT pg_try_advisory_xact_lock(:a, :b)")
    return bool(connection.execute(taken, {"a": LOCKS, "b": LOCK_RUNNING}).scalar())


async def stored_version(server: Server) -> str | None:
    """The schema version; None: there are no tables of ours."""
    connection = await server.connect()
    try:
        if await connection.fetchval("SELECT to_regclass('alembic_version')") is None:
            return None
        version: str | None = await connection.fetchval("SELECT version_num FROM alembic_version")
        return version
    finally:
        await disconnect(connection)
