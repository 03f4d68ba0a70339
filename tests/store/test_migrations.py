"""The schema: made and migrated by what is in the package, after a copy was kept; never touched when it is unknown."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateTable

from malote.errors import StoreUnavailable
from malote.store import Store, accounts, cards, migrate, outbox, schema, seen
from malote.store.database import FILE_NAME, make_engine


def _execute(directory: Path, *statements: str) -> None:
    raw = sqlite3.connect(directory / FILE_NAME)
    for statement in statements:
        raw.execute(statement)
    raw.commit()
    raw.close()


async def test_migrations_and_tables_agree(tmp_path: Path) -> None:
    """The migrations make exactly the tables that the statements are written for, all STRICT."""
    await (await Store.open(tmp_path / "store")).close()
    with make_engine(tmp_path / "store" / FILE_NAME).connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), schema.metadata) == []
        tables = connection.exec_driver_sql("SELECT name, strict FROM pragma_table_list WHERE schema = 'main'").fetchall()
    ours = {name: strict for name, strict in tables if name in schema.metadata.tables}
    assert set(ours) == set(schema.metadata.tables)
    assert set(ours.values()) == {1}


def test_revisions_are_those_in_the_package() -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(migrate.__file__).with_name("migrations")))
    config.set_main_option("path_separator", "os")
    script = ScriptDirectory.from_config(config)
    assert tuple(revision.revision for revision in script.walk_revisions())[::-1] == schema.REVISIONS
    assert script.get_current_head() == schema.CURRENT


async def test_opening_again_runs_no_migration(tmp_path: Path) -> None:
    """A start must be quick: Alembic is not even imported when there is nothing to do."""
    await (await Store.open(tmp_path / "store")).close()
    code = ("import asyncio, sys\nfrom malote.store import Store\n"
            "async def main():\n    await (await Store.open(sys.argv[1])).close()\n"
            "asyncio.run(main())\nprint('alembic' in sys.modules)\n")
    done = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", code, str(tmp_path / "store")], check=True, capture_output=True, text=True,
        env={"PYTHONPATH": ":".join(sys.path)})
    assert (done.stdout, done.stderr) == ("False\n", "")


async def test_logging_is_left_as_it_was(tmp_path: Path) -> None:
    before = (logging.root.level, list(logging.root.handlers), logging.getLogger("malote").disabled)
    await (await Store.open(tmp_path / "store")).close()
    assert (logging.root.level, list(logging.root.handlers), logging.getLogger("malote").disabled) == before


async def test_a_copy_is_kept_before_migrating(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "store"
    store = await Store.open(directory)
    key = await store.local_key("mine")
    await store.close()
    monkeypatch.setattr(migrate, "CURRENT", "0099")
    monkeypatch.setattr(migrate, "REVISIONS", (*schema.REVISIONS, "0099"))
    monkeypatch.setattr(migrate, "upgrade", lambda connection: connection.exec_driver_sql(
        "UPDATE alembic_version SET version_num = '0099'"))
    store = await Store.open(directory)
    assert await store.local_key("mine") == key
    await store.close()
    copy = directory / f"{FILE_NAME}.before-{schema.CURRENT}"
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    raw = sqlite3.connect(copy)
    assert raw.execute("SELECT version_num FROM alembic_version").fetchall() == [(schema.CURRENT,)]
    assert raw.execute("SELECT value FROM secret WHERE name = 'mine'").fetchone() == (key,)
    raw.close()
    assert not list(directory.glob("*.copying"))


async def test_no_migration_under_a_daemon_that_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command of the new version must not change the tables under a daemon of the old one, which goes on with what it knows."""
    directory = tmp_path / "store"
    await (await Store.open(directory)).close()
    with (directory / migrate.RUN_LOCK).open("w") as running, monkeypatch.context() as patch:
        fcntl.flock(running, fcntl.LOCK_EX)
        patch.setattr(migrate, "CURRENT", "0099")
        patch.setattr(migrate, "REVISIONS", (*schema.REVISIONS, "0099"))
        patch.setattr(migrate, "upgrade", lambda connection: connection.exec_driver_sql(
            "UPDATE alembic_version SET version_num = '0099'"))
        with pytest.raises(StoreUnavailable, match="another malote has it open"):
            await Store.open(directory)
        fcntl.flock(running, fcntl.LOCK_UN)
        await (await Store.open(directory)).close()


async def test_a_migration_that_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "store"
    await (await Store.open(directory)).close()

    def broken(connection: object) -> None:
        connection.exec_driver_sql("DROP TABLE journal")    # type: ignore[attr-defined]
        raise RuntimeError("half way")
    with monkeypatch.context() as patch:
        patch.setattr(migrate, "CURRENT", "0099")
        patch.setattr(migrate, "upgrade", broken)
        with pytest.raises(StoreUnavailable):
            await Store.open(directory)
    store = await Store.open(directory)
    assert await store.expire_journal(0) == 0
    await store.close()


async def test_a_newer_store_is_refused_and_left_alone(tmp_path: Path) -> None:
    directory = tmp_path / "store"
    await (await Store.open(directory)).close()
    _execute(directory, "UPDATE alembic_version SET version_num = '0999'")
    for readonly in (False, True):
        with pytest.raises(StoreUnavailable, match="newer version") as caught:
            await Store.open(directory, readonly=readonly)
        assert "0999" in caught.value.hint
    assert [path.name for path in directory.glob("*.before-*")] == []


@pytest.mark.parametrize("content", [b"not a database, but long enough to be read as a header " * 40, b"SQLite"])
async def test_another_file_in_its_place_is_refused(tmp_path: Path, content: bytes) -> None:
    directory = tmp_path / "store"
    directory.mkdir(mode=0o700)
    (directory / FILE_NAME).write_bytes(content)
    (directory / FILE_NAME).chmod(0o600)
    with pytest.raises(StoreUnavailable, match="not a store"):
        await Store.open(directory)
    assert (directory / FILE_NAME).read_bytes() == content


async def test_a_database_of_another_program_is_refused(tmp_path: Path) -> None:
    directory = tmp_path / "store"
    directory.mkdir(mode=0o700)
    _execute(directory, "CREATE TABLE moz_places (id INTEGER)")
    (directory / FILE_NAME).chmod(0o600)
    with pytest.raises(StoreUnavailable, match="something else"):
        await Store.open(directory)


async def test_many_open_a_new_store_at_once(tmp_path: Path) -> None:
    """Daemon and command line may both start first: one makes the tables, the others wait for it."""
    places = [tmp_path / "one", tmp_path / "two"] * 3
    stores = await asyncio.gather(*(Store.open(place) for place in places))
    keys = [await store.local_key("mine") for store in stores]
    assert len(set(keys)) == 2
    for store in stores:
        await store.close()


async def test_statements_find_their_rows_by_an_index(tmp_path: Path) -> None:
    """None that runs for a message may read a whole table: with a hundred thousand messages that is the difference."""
    await (await Store.open(tmp_path / "store")).close()
    whole_tables = {"cards._CARDS", "cards._IDENTITIES", "outbox._EXPIRE", "outbox._DROP_DEVICES", "accounts._EXPIRE_ATTEMPTS",
                    "accounts._RECENT"}
    scans = set()
    raw = sqlite3.connect(tmp_path / "store" / FILE_NAME)
    for module in (accounts, cards, outbox, seen):
        for name, statement in vars(module).items():
            if isinstance(statement, schema.Statement):
                values = dict.fromkeys(statement.core.compile(dialect=schema._NAMED).params, 1)  # type: ignore[attr-defined]
                plan = raw.execute(f"EXPLAIN QUERY PLAN {statement.text}", values).fetchall()
                if any(row[3].startswith("SCAN") for row in plan):
                    scans.add(f"{module.__name__.rpartition('.')[2]}.{name}")
    raw.close()
    assert "cards._CARDS" in scans, "the look at the plan finds a scan where there is one"
    assert scans <= whole_tables


def test_every_statement_and_table_compiles_for_postgresql() -> None:
    """One definition serves both databases."""
    dialect = postgresql.dialect()      # type: ignore[no-untyped-call]
    statements = [value for module in (accounts, cards, outbox, seen) for value in vars(module).values()
                  if isinstance(value, schema.Statement)]
    assert len(statements) > 40
    for statement in statements:
        assert str(statement.core.compile(dialect=dialect))     # type: ignore[attr-defined]
    for table in schema.metadata.tables.values():
        assert "STRICT" not in str(CreateTable(table).compile(dialect=dialect))
