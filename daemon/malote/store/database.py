"""The SQLite file: who may open it, how it is opened, and one transaction on it."""

from __future__ import annotations

import os
import sqlite3
import stat
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from malote.errors import MaloteError, StoreUnavailable
from malote.store.schema import Statement

FILE_NAME = "store.sqlite"
BUSY_MS = 5_000     # how long a lock of another process is waited for; a client waits minutes for its reply

Row = tuple[Any, ...]
T = TypeVar("T")


class Db(ABC):
    """A transaction: what every operation of the store is a function of. Values are int, str, bytes and None only."""

    __slots__ = ()

    slot = 0        # which numbering of an identity is used: of several processes on one database each has its own
    distant = False     # each statement is a message to a server and its answer: few large ones are better than many

    @abstractmethod
    def rows(self, statement: Statement, values: dict[str, Any]) -> list[Row]: ...

    @abstractmethod
    def run(self, statement: Statement, values: dict[str, Any]) -> int:
        """Execute; returns the number of rows changed."""

    @abstractmethod
    def many(self, statement: Statement, values: Sequence[dict[str, Any]]) -> None:
        """Execute once for each, at the latest when something else is asked, or at the end of the operations."""

    @abstractmethod
    def each(self, statement: Statement, values: Sequence[dict[str, Any]]) -> list[Row | None]:
        """Execute once for each; the one row that each gives back, or, anywhere in the list, None for each that gives none."""

    @abstractmethod
    def now_ms(self) -> int:
        """The time by which all who share the database go."""

    @abstractmethod
    def lock(self, name: str) -> None:
        """Until the end of the transaction no other one has the lock of that name."""

    def row(self, statement: Statement, values: dict[str, Any]) -> Row | None:
        rows = self.rows(statement, values)
        return rows[0] if rows else None


class SqliteDb(Db):
    """On SQLite, whose one writer at a time has all locks there are."""

    __slots__ = ("driver",)

    def __init__(self, connection: Connection) -> None:
        raw = connection.connection.driver_connection
        assert isinstance(raw, sqlite3.Connection)      # noqa: S101 -- as `make_engine` makes it
        self.driver = raw

    def rows(self, statement: Statement, values: dict[str, Any]) -> list[Row]:
        return self._execute(statement, values).fetchall()

    def run(self, statement: Statement, values: dict[str, Any]) -> int:
        return self._execute(statement, values).rowcount

    def many(self, statement: Statement, values: Sequence[dict[str, Any]]) -> None:
        for one in values:      # executemany of the driver would save a few us, and lose what `_execute` does
            self._execute(statement, one)

    def each(self, statement: Statement, values: Sequence[dict[str, Any]]) -> list[Row | None]:
        rows = [self._execute(statement, one).fetchall() for one in values]
        return [found[0] if found else None for found in rows]

    def now_ms(self) -> int:
        return time.time_ns() // 1_000_000      # all who use the file are on this machine

    def lock(self, name: str) -> None:
        """Nothing to do: BEGIN IMMEDIATE."""

    def _execute(self, statement: Statement, values: dict[str, Any]) -> sqlite3.Cursor:
        if statement.constants:
            values = statement.constants | values
        try:
            return self.driver.execute(statement.text, values)
        except UnicodeEncodeError:      # half of a surrogate pair, as a folder name or a reply of a server may hold
            return self.driver.execute(statement.text, {name: _encodable(value) for name, value in values.items()})


class Reader:
    """A connection of its own for a look that must cost next to nothing: 5 us, where a turn of the writer's thread costs 100.

    Never waits: with a lock, a fault or a file that is gone the answer is None, and whoever asked goes the long way.
    """

    def __init__(self, file: Path) -> None:
        self._engine = make_engine(file, readonly=True, busy_ms=0)
        self._connection: Connection | None = None
        self._db: Db | None = None

    def look(self, operation: Callable[[Db], T]) -> T | None:
        """What is committed now, by whatever process. One statement, outside of a transaction."""
        try:
            if self._db is None:
                self._connection = self._engine.connect()
                self._db = SqliteDb(self._connection)
            return operation(self._db)
        except (sqlite3.Error, SQLAlchemyError):
            self.close()
            return None

    def close(self) -> None:
        connection, self._connection, self._db = self._connection, None, None
        if connection is not None:
            with suppress(sqlite3.Error, SQLAlchemyError):      # it is gone either way
                connection.close()


def _encodable(value: Any) -> Any:
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


def unavailable(cause: BaseException) -> MaloteError:
    """What the caller gets for an error of the database. The cause stays for the log; its text goes nowhere else."""
    if isinstance(cause, MaloteError):
        return cause
    original = cause.orig if isinstance(cause, DBAPIError) else cause
    code = getattr(original, "sqlite_errorcode", None)
    kind = code & 0xFF if isinstance(code, int) else None
    error = StoreUnavailable(_TEXTS.get(kind, "the store cannot be used"), hint=_HINTS.get(kind, ""))
    error.__cause__ = cause
    return error


_TEXTS: dict[int | None, str] = {
    sqlite3.SQLITE_FULL: "the disk of the store is full",
    sqlite3.SQLITE_BUSY: "the store is locked by another process",
    sqlite3.SQLITE_LOCKED: "the store is locked by another process",
    sqlite3.SQLITE_READONLY: "the store is read-only",
    sqlite3.SQLITE_CANTOPEN: "the store cannot be opened",
    sqlite3.SQLITE_PERM: "the store cannot be opened: access denied",
    sqlite3.SQLITE_IOERR: "the disk of the store reports an error",
    sqlite3.SQLITE_CORRUPT: "the store is damaged",
    sqlite3.SQLITE_NOTADB: "the store file is not a store",
}


_AGAIN = "try again in a moment; malote run or another command is writing to it"
_RESTORE = ("put a copy of it in the place of store.path and run malote store renew, or begin anew with malote keys restore "
            "(docs/operating.md, Backup)")
_HINTS: dict[int | None, str] = {
    sqlite3.SQLITE_FULL: "make room on that disk, then try again",
    sqlite3.SQLITE_BUSY: _AGAIN,
    sqlite3.SQLITE_LOCKED: _AGAIN,
    sqlite3.SQLITE_READONLY: "the user that runs malote must be able to write store.path, also its disk",
    sqlite3.SQLITE_CANTOPEN: "malote check says what is wrong with its place",
    sqlite3.SQLITE_PERM: "it must belong to the user that runs malote",
    sqlite3.SQLITE_IOERR: "see whether that disk is full or failing, then try again",
    sqlite3.SQLITE_CORRUPT: _RESTORE,
    sqlite3.SQLITE_NOTADB: _RESTORE,
}


def check_place(directory: Path, *, make: bool) -> Path:
    """The store file below `directory`, both made if missing and both ours alone. Raises `StoreUnavailable`."""
    try:
        if make:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        place = directory.lstat()
        if not stat.S_ISDIR(place.st_mode):
            raise StoreUnavailable("the store's directory is a link or no directory", hint=f"see {directory}")
        _check_owner(place, directory, 0o700)
        file = directory / FILE_NAME
        if make:
            with suppress(FileExistsError):
                os.close(os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
        found = file.lstat()
        if not stat.S_ISREG(found.st_mode):
            raise StoreUnavailable("the store file is a link or no file", hint=f"see {file}")
        _check_owner(found, file, 0o600)
        if found.st_uid != place.st_uid:
            raise StoreUnavailable("the store file and its directory have different owners", hint=f"see {file}")
    except FileNotFoundError as error:
        raise StoreUnavailable(f"there is no store in {directory} yet",
                               hint="malote keys new ADDRESS or malote run makes it") from error
    except OSError as error:
        raise StoreUnavailable(f"the store's directory cannot be used ({error.strerror})", hint=f"see {directory}") from error
    return file


def _check_owner(found: os.stat_result, path: Path, mode: int) -> None:
    # the administrator may look into the store of the service: SQLite then gives the files it makes to the store's owner
    if os.geteuid() not in (0, found.st_uid):
        raise StoreUnavailable("the store belongs to another user", hint=f"see {path}")
    if stat.S_IMODE(found.st_mode) & ~mode & 0o077:
        raise StoreUnavailable("the store can be read by other users", hint=f"chmod {mode:o} {path}")


def make_engine(file: Path, *, readonly: bool = False, busy_ms: int | None = None) -> Engine:
    """An engine without a pool: its one user keeps one connection. `busy_ms` None: BUSY_MS, asked for at each connection.

    Never creates the file: an empty store in the place of a lost one would hand out serials again.
    """
    uri = f"{file.absolute().as_uri()}?mode={'ro' if readonly else 'rw'}"

    def wait_ms() -> int:
        return BUSY_MS if busy_ms is None else busy_ms

    def connect() -> sqlite3.Connection:
        # isolation_level None: the driver begins no transaction by itself, `begin` below does
        return sqlite3.connect(uri, uri=True, isolation_level=None, timeout=wait_ms() / 1000, cached_statements=200)

    engine = create_engine("sqlite://", creator=connect, poolclass=NullPool)

    @event.listens_for(engine, "connect")
    def _set_up(connection: sqlite3.Connection, _record: object) -> None:
        for pragma in (f"busy_timeout = {wait_ms()}", "foreign_keys = ON", "synchronous = FULL", "trusted_schema = OFF",
                       "secure_delete = FAST", "temp_store = MEMORY"):
            connection.execute(f"PRAGMA {pragma}")
        if not readonly and connection.execute("PRAGMA journal_mode").fetchone() != ("wal",):
            connection.execute("PRAGMA journal_mode = WAL")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        # IMMEDIATE: two processes never both read and then find that only one may write
        mode = "DEFERRED" if connection.get_execution_options().get("malote_read") else "IMMEDIATE"
        connection.exec_driver_sql(f"BEGIN {mode}")

    return engine
