"""A whole store copied into another database, verified there, and valid only when all of it is.

The target first says that a copy is under way, in a commit of its own; everything else is one transaction. Cut short at any
point it holds that word and nothing more, and no malote takes it for a store, empty or not.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Table, func, insert, select, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool
from sqlalchemy.util import greenlet_spawn

from malote.errors import MaloteError, StoreUnavailable
from malote.store.database import check_place, make_engine, unavailable
from malote.store.migrate import COPYING, check_current, stored_schema, upgrade
from malote.store.places import PostgresPlace
from malote.store.schema import lease, member, meta, metadata

ROWS = 500          # read and written at once
NOT_COPIED = (member, lease)        # of processes that run
OF_A_DATABASE = ("host", "server")  # in `meta`: which one it is
TABLES = tuple(table for table in metadata.sorted_tables if table not in NOT_COPIED)

Place = Path | PostgresPlace
Progress = Callable[[str, int, int], object]    # table, rows done, rows in all (each counts twice: copied, then verified)


@dataclass(frozen=True, slots=True)
class Copied:
    """What was found equal on both sides."""

    table: str
    rows: int
    digest: str


async def copy_store(source: Place, target: Place, progress: Progress) -> list[Copied]:
    """Raises `StoreUnavailable` when somebody has one of them open, the target is not empty, or what arrived there differs;
    `source` is never changed, and nobody writes to it meanwhile."""
    if source == target:
        raise StoreUnavailable("that is where the store is already, nothing was done")
    try:
        async with AsyncExitStack() as stack:
            old = await _open(source, stack, make=False)
            new = await _open(target, stack, make=True)
            return await greenlet_spawn(_copy, old, new, progress)
    except MaloteError:
        raise
    except SQLAlchemyError as error:
        raise _told(error) from error
    except (OSError, TimeoutError) as error:
        raise StoreUnavailable("the database cannot be reached, nothing was copied", hint="see --to and store.url") from error


def _told(error: SQLAlchemyError) -> MaloteError:
    original = getattr(error, "orig", None)
    if original is None or isinstance(original, sqlite3.Error):
        return unavailable(error)
    from malote.store import postgres  # here: who keeps the store in SQLite needs no driver
    return postgres.unavailable(original.__cause__ or original)


async def _open(place: Place, stack: AsyncExitStack, *, make: bool) -> Connection:
    if isinstance(place, PostgresPlace):
        from malote.store import postgres

        try:
            server = postgres.Server(place)
            (await server.connect()).terminate()        # its errors are ours to tell; those of the engine are wrapped
        except Exception as error:
            raise postgres.unavailable(error) from error
        engine = create_async_engine("postgresql+asyncpg://", async_creator=server.connect, poolclass=NullPool)
        stack.push_async_callback(engine.dispose)
        connection = await stack.enter_async_context(engine.connect())
        assert connection.sync_connection is not None       # noqa: S101 -- it is entered
        return connection.sync_connection
    file = check_place(place, make=make)
    return stack.enter_context(make_engine(file).connect())


def _copy(old: Connection, new: Connection, progress: Progress) -> list[Copied]:
    with old.begin() as reading:
        _alone(old, "the store")
        check_current(stored_schema(old))
        with new.begin():
            _alone(new, "the target")
            if stored_schema(new) not in (None, COPYING):
                raise StoreUnavailable("the target holds a store already, nothing was done",
                                       hint="make an empty database for it, or name an empty directory")
            new.execute(text("DROP TABLE IF EXISTS alembic_version"))
            new.execute(text("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL PRIMARY KEY)"))
            new.execute(text("INSERT INTO alembic_version VALUES (:version)"), {"version": COPYING})
        with new.begin():
            _alone(new, "the target")
            new.execute(text("DROP TABLE alembic_version"))
            upgrade(new)
            done = [_copy_table(table, old, new, progress) for table in TABLES]
        reading.rollback()
    return done


def _alone(connection: Connection, what: str) -> None:
    """SQLite's BEGIN IMMEDIATE has done it already."""
    if connection.dialect.name == "postgresql":
        from malote.store.postgres import take_alone
        if not take_alone(connection):
            raise StoreUnavailable(f"a malote has {what} open, nothing was done", hint="stop malote on every node first")


def _copy_table(table: Table, old: Connection, new: Connection, progress: Progress) -> Copied:
    total = old.execute(_counted(table)).scalar_one()
    fit = _storable if new.dialect.name == "postgresql" else _unchanged
    done, sent = 0, Digest()
    progress(table.name, 0, 2 * total)
    for rows in _batches(table, old):
        values = [{name: fit(value) for name, value in row.items()} for row in rows]
        sent.add(values)
        new.execute(insert(table), values)
        done += len(values)
        progress(table.name, done, 2 * total)
    if new.dialect.name == "postgresql" and "row_id" in table.c:
        new.execute(text(f"SELECT setval(pg_get_serial_sequence('{table.name}', 'row_id'), "     # noqa: S608 -- our own names
                         f"(SELECT coalesce(max(row_id), 0) + 1 FROM {table.name}), false)"))
    arrived = Digest()
    for rows in _batches(table, new):
        arrived.add(rows)
        progress(table.name, done + arrived.rows, 2 * total)
    if sent.rows != total or (sent.rows, sent.sum) != (arrived.rows, arrived.sum):
        raise StoreUnavailable(f"what arrived in table {table.name} differs from what was sent; the target is not usable")
    return Copied(table.name, sent.rows, sent.text)


def _counted(table: Table) -> Any:
    counted = select(func.count()).select_from(table)
    return counted if table is not meta else counted.where(meta.c.name.not_in(OF_A_DATABASE))


def _batches(table: Table, connection: Connection) -> Iterator[list[dict[str, Any]]]:
    """In pieces: the whole table may be larger than memory."""
    asked = select(table) if table is not meta else select(table).where(meta.c.name.not_in(OF_A_DATABASE))
    result = connection.execute(asked.execution_options(yield_per=ROWS))
    for part in result.mappings().partitions(ROWS):
        yield [dict(row) for row in part]


def _unchanged(value: Any) -> Any:
    return value


def _storable(value: Any) -> Any:
    if type(value) is not str or (value.isascii() and "\0" not in value):
        return value
    from malote.store.postgres import storable
    return storable(value)


class Digest:
    """Of a set of rows, whatever their order: the two databases sort text differently."""

    def __init__(self) -> None:
        self.rows = 0
        self.sum = 0

    def add(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            encoded = repr(sorted(row.items())).encode("utf-8", "surrogatepass")
            self.sum = (self.sum + int.from_bytes(hashlib.sha256(encoded).digest(), "big")) % 2**256
        self.rows += len(rows)

    @property
    def text(self) -> str:
        return f"{self.sum:064x}"
