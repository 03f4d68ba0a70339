"""Bringing the schema up to date when a store is opened, after a copy of it was kept."""

from __future__ import annotations

import fcntl
import logging
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Connection, Engine, text

from malote.errors import StoreUnavailable
from malote.private_files import sync_directory
from malote.store.schema import CURRENT, REVISIONS

log = logging.getLogger("malote.store")
COPYING = "copying"             # in the place of a version: `copying` has begun and not ended
MADE_NAME = "store.made"        # beside the store file, since it was first made
RUN_LOCK = "run.lock"           # in the store's directory, held by a daemon for as long as it runs
_IN_USE = "the store must be brought up to date, and another malote has it open"
_ALEMBIC = threading.Lock()      # it keeps its state in module globals


def bring_up_to_date(engine: Engine, file: Path) -> None:
    """Nothing but one SELECT when there is nothing to do. Raises `StoreUnavailable` for a store of a newer version, or one that
    was there and is gone: a new one in its place would take repeats for fresh and forget who must be sealed to."""
    made = file.with_name(MADE_NAME)
    with engine.connect().execution_options(malote_read=True) as connection, connection.begin():
        current = schema_version(connection) == CURRENT
    if not current:
        _migrate(engine, file, made)
    if not made.exists():
        _mark_made(made, file.stat())


def _migrate(engine: Engine, file: Path, made: Path) -> None:
    with engine.connect() as connection, connection.begin():
        version = schema_version(connection)      # again, now that no other process can be at it
        if version == CURRENT:
            return
        if version is not None:
            _keep_copy(file, version)
        elif made.exists():
            raise StoreUnavailable("the store is gone or empty, and nothing was put in its place",
                                   hint="put a copy of it back and run malote store renew (docs/operating.md, Backup), "
                                        f"or begin anew: rm {made}")
        with _nobody_runs(file.parent):
            upgrade(connection)
        log.info("store schema is now version %s", CURRENT)


def _mark_made(made: Path, store: os.stat_result) -> None:
    if os.geteuid() != store.st_uid:
        return      # the administrator looks into the service's store, which then marks it at its own next start
    os.close(os.open(made, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
    sync_directory(made.parent)


def bring_up_to_date_postgres(connection: Connection, take_alone: Callable[[Connection], bool]) -> None:
    """The same in a database, whose copies are the administrator's; in the transaction of `connection`.

    `take_alone`: until its end nobody who writes has the store open, and none may open it; False if somebody has.
    """
    version = schema_version(connection)
    if version == CURRENT:
        return
    if not take_alone(connection):
        raise StoreUnavailable(_IN_USE, hint="stop malote on every node, then start the new version")
    upgrade(connection)
    log.info("store schema is now version %s", CURRENT)


def check_version(engine: Engine) -> None:
    """For a store that is only read. Raises `StoreUnavailable` unless its schema is the current one."""
    with engine.connect().execution_options(malote_read=True) as connection, connection.begin():
        check_current(schema_version(connection))


def check_current(version: str | None) -> None:
    """Raises `StoreUnavailable` unless this is the current schema."""
    check_known(version)
    if version is None:
        raise StoreUnavailable("the store is empty", hint="malote run says what to do")
    if version != CURRENT:
        raise StoreUnavailable("the store is of an older version", hint="start malote once so that it is brought up to date")


def upgrade(connection: Connection, target: str = "head") -> None:
    """Run the migrations inside the transaction of `connection`."""
    from alembic import command  # here, because it is slow to import and seldom needed
    from alembic.config import Config

    config = Config()       # no file
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    with _ALEMBIC:
        command.upgrade(config, target)


def schema_version(connection: Connection) -> str | None:
    """The schema version; None for an empty database."""
    version = stored_schema(connection)
    check_known(version)
    return version


def stored_schema(connection: Connection) -> str | None:
    """What the database says of itself, also if this version knows no such schema."""
    if connection.dialect.name == "sqlite":
        tables = {row[0] for row in connection.execute(text("SELECT name FROM sqlite_schema WHERE type = 'table'"))}
    else:
        tables = set(connection.dialect.get_table_names(connection))
    if not tables:
        return None
    if "alembic_version" not in tables:
        raise StoreUnavailable("the database holds something else than a store")
    version: str | None = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    return version


def check_known(version: str | None) -> None:
    """Raises `StoreUnavailable` for a schema that did not exist when this was written, and for half a copy."""
    if version == COPYING:
        raise StoreUnavailable("a copy to this place was begun and not finished, there is no store in it",
                               hint="run malote store migrate again, to the same place")
    if version is not None and version not in REVISIONS:
        raise StoreUnavailable(
            "the store was made by a newer version of malote",
            hint=f"install that version again (schema {version}; this one knows {CURRENT}), or restore a copy of the store")


def _keep_copy(file: Path, version: str) -> None:
    """The store as it is, beside it. The caller holds the write lock, so nothing changes meanwhile."""
    target = file.with_name(f"{file.name}.before-{version}")
    draft = file.with_name(f"{file.name}.copying")
    draft.unlink(missing_ok=True)
    os.close(os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600))
    source = sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True)
    copy = sqlite3.connect(draft)
    try:
        source.backup(copy)
    finally:
        copy.close()
        source.close()
    with draft.open("rb") as written:
        os.fsync(written.fileno())
    draft.replace(target)
    sync_directory(file.parent)


@contextmanager
def _nobody_runs(directory: Path) -> Iterator[None]:
    """No daemon has the store open, and none begins to. Raises `StoreUnavailable`."""
    try:
        lock = os.open(directory / RUN_LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:       # none ever ran; one that begins now waits for the transaction that we are in
        yield
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise StoreUnavailable(_IN_USE, hint="stop malote, then start the new version") from error
    finally:
        os.close(lock)
