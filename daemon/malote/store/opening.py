"""How a store is opened: its file or database made and brought up to date, and a look at whether it is where it was before."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import column, select, table

from malote.core.primitives import hmac_sha256
from malote.errors import StoreUnavailable
from malote.store import cards, outbox, seen
from malote.store.database import Db, Reader, check_place, make_engine, unavailable
from malote.store.migrate import bring_up_to_date, check_current, check_version
from malote.store.places import PostgresPlace, database_place
from malote.store.postgres_statements import skip_rows
from malote.store.schema import CURRENT, Statement
from malote.store.writer import Commits, Writer

MACHINE_KEYS = ("device",)      # local keys that tell one machine's watcher from another's: a copied store must not keep them
_VERSION = Statement(select(column("version_num")).select_from(table("alembic_version")))

log = logging.getLogger("malote.store")


@dataclass(frozen=True, slots=True)
class Opened:
    """`keys`: the local keys that every store has; none where it is only read. `node`: this one of several, else b""."""

    writer: Commits
    reader: Reader | None
    keys: Mapping[str, bytes]
    node: bytes = b""


async def open_place(place: str | Path | PostgresPlace, machine_id: bytes, *, readonly: bool) -> Opened:
    """See `Store.open`. Raises `StoreUnavailable`."""
    if (database := database_place(place)) is not None:
        return await _open_postgres(database, machine_id, readonly=readonly)
    directory = _directory(place)
    try:
        file = await asyncio.to_thread(check_place, directory, make=not readonly)
        engine = make_engine(file, readonly=readonly)
        await (asyncio.to_thread(check_version, engine) if readonly else asyncio.to_thread(bring_up_to_date, engine, file))
        writer = Writer(engine, name="malote-store")
    except StoreUnavailable:
        raise
    except Exception as error:
        raise unavailable(error) from error
    try:
        if readonly:
            return Opened(writer, Reader(file), {})
        now_ms = time.time_ns() // 1_000_000
        keys = await writer.write(lambda db: _prepare(db, machine_id, now_ms))
    except BaseException:
        await writer.close()
        raise
    return Opened(writer, Reader(file), keys)


async def _open_postgres(place: PostgresPlace, machine_id: bytes, *, readonly: bool) -> Opened:
    from malote.store import postgres  # here: who keeps the store in SQLite needs no driver
    from malote.store.postgres_writer import PostgresWriter

    try:
        server = postgres.Server(place, readonly=readonly)
        if (version := await postgres.stored_version(server)) != CURRENT:
            if readonly:
                check_current(version)
            await asyncio.to_thread(postgres.bring_up_to_date, server)
        writer = PostgresWriter(server, readonly=readonly, greet=None if readonly else _greet)
    except Exception as error:
        raise postgres.unavailable(error) from error
    node = place.node or machine_id
    try:
        keys = {} if readonly else await writer.write(lambda db: _prepare_shared(db, node))
    except BaseException:
        await writer.close()
        raise
    return Opened(writer, None, keys, b"" if readonly else node)


def after_loss(db: Db, now_ms: int) -> None:
    """After a loss of state: what was given out or seen since the state that there is may come again."""
    outbox.renew_streams(db)
    seen.add_distrust(db, now_ms, "", "")


def _prepare(db: Db, machine_id: bytes, now_ms: int) -> dict[str, bytes]:
    """The keys every store has, and the check that this is the machine that it was on."""
    keys = {name: cards.local_key(db, name) for name in ("journal", "seen", "outer", "host")}
    if machine_id:
        host = hmac_sha256(keys["host"], machine_id)
        known = cards.find_meta(db, "host")
        if known != host:
            cards.put_meta(db, "host", host)
        if known is not None and known != host:
            log.warning("the store comes from another machine: new numberings begin, mail sent before now is not called fresh")
            after_loss(db, now_ms)
            for name in MACHINE_KEYS:
                cards.drop_local_key(db, name)
    return keys


def _prepare_shared(db: Db, node: bytes) -> dict[str, bytes]:
    """The keys of a store that several nodes have open: those that tell watchers apart are each node's own."""
    keys = {name: cards.local_key(db, name) for name in ("journal", "seen", "outer", "host")}
    mark = hmac_sha256(keys["host"], node).hex()[:32]
    return keys | {name: cards.local_key(db, f"{name}@{mark}") for name in MACHINE_KEYS}


def _greet(db: Db, server: bytes) -> None:
    """First on each connection to PostgreSQL: whether the tables are those that this version knows, since another may have been
    started while we had no connection; and whether the server is still the one that has every commit we were told of."""
    versions = [version for (version,) in db.rows(_VERSION, {})]
    check_current(versions[0] if versions else None)
    if cards.find_meta(db, "server") == server:
        return
    db.lock("server")
    known = cards.find_meta(db, "server")       # again: another node may have come first
    if known == server:
        return
    cards.put_meta(db, "server", server)
    if known is not None:
        log.warning("the database server was replaced or recovered: new numberings begin, "
                    "mail sent before now is not called fresh")
        after_loss(db, time.time_ns() // 1_000_000)
        skip_rows(db)


def _directory(place: str | Path | PostgresPlace) -> Path:
    assert not isinstance(place, PostgresPlace)     # noqa: S101 -- `database_place` took it
    if isinstance(place, Path):
        return place
    scheme, mark, rest = place.partition("://")
    if not mark:
        return Path(place)
    if scheme != "sqlite" or not rest.startswith("/"):
        raise StoreUnavailable("the store is a directory, sqlite:///DIRECTORY, or postgresql://...")
    return Path(rest[1:])
