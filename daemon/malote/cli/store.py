"""`malote store`: moving it to another database, and going on with an old copy of it."""

from __future__ import annotations

import asyncio
import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from malote.cli.keystore import change_store, now_ms, store_exists
from malote.cli.settings import Settings, is_missing
from malote.database_url import parse_url
from malote.errors import StoreUnavailable
from malote.store import PostgresPlace
from malote.store.copying import Place, copy_store
from malote.store.migrate import RUN_LOCK

LOCKS = (RUN_LOCK, "")        # the daemon's, and that of `malote keys`, which is the directory itself


@click.group(short_help="Move the store to another database; go on with an old copy.")
def store() -> None:
    """What must survive: cards, locked keys, numbers, what has been seen."""


@store.command(short_help="Copy the whole store to PostgreSQL, or back into a directory.")
@click.option("--to", "target", required=True, metavar="URL|DIRECTORY", help="Where to; must be empty. No password in it.")
@click.option("--password-file", type=click.Path(path_type=Path), help="Holds the password of the database user; else ~/.pgpass.")
@click.option("--ca-file", type=click.Path(path_type=Path), help="The authority of the database server's certificate.")
@click.pass_obj
def migrate(settings: Settings, target: str, password_file: Path | None, ca_file: Path | None) -> None:
    """Copy the whole store to PostgreSQL, or back into a directory, and verify every row there.

    Stop malote first, on every node. The store is left as it is; the target can be used when this says so, and not before: cut
    short, it is refused until this was run again. Then set store.url, or store.path, and start malote; never start it with the
    old store again, which does not know what comes after.
    """
    place = _place(target, password_file, ca_file)
    with ExitStack() as held:
        for directory in {settings.store_path, *([place] if isinstance(place, Path) else [])}:
            if not is_missing(directory):
                held.enter_context(_held(directory))
        with _bar() as bar:
            tasks = {}

            def show(table: str, done: int, total: int) -> None:
                if table not in tasks:
                    tasks[table] = bar.add_task(table, total=total)
                bar.update(tasks[table], completed=done, total=total)
            copied = asyncio.run(copy_store(settings.store_place, place, show))
    for each in copied:
        click.echo(f"{each.table:<14}{each.rows:>10} rows  {each.digest[:16]}")
    key = "path" if isinstance(place, Path) else "url"
    click.echo(f"malote: every row is there and equal; now set store.{key} and start malote\n"
               "        never start it with the old store again", err=True)


@store.command(short_help="After an old copy was put back, or the clock was wrong by days.")
@click.pass_obj
def renew(settings: Settings) -> None:
    """Begin new numberings, and call nothing FRESH that was sent before now.

    Run this when the store was put back from a copy, before malote starts with it: it does not know what was sent and seen since
    then. Also when the clock was ahead by more than a day and malote has sealed mail meanwhile. Cards and keys stay as they are.
    """
    if not store_exists(settings):
        raise StoreUnavailable("there is no store yet, nothing was done", hint="see store.path, store.url and --config")
    change_store(settings, lambda store: store.renew(now_ms()))
    click.echo("malote: new numberings begin; mail sent before now is UNVERIFIABLE instead of FRESH", err=True)


def _place(target: str, password_file: Path | None, ca_file: Path | None) -> Place:
    if target.startswith("postgresql:"):
        parse_url(target)
        return PostgresPlace(target, password_file, ca_file)
    return Path(target.removeprefix("sqlite://")).absolute()


@contextmanager
def _held(directory: Path) -> Iterator[None]:
    """No daemon and no `malote keys` works in that directory meanwhile."""
    with ExitStack() as opened:
        for name in LOCKS:
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW if name else os.O_RDONLY | os.O_DIRECTORY
            try:
                handle = os.open(directory / name, flags | os.O_CLOEXEC, 0o600)
            except OSError as error:
                raise StoreUnavailable(f"{directory}: cannot be used ({error.strerror})") from error
            opened.callback(os.close, handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise StoreUnavailable("malote runs on this store, nothing was done", hint="stop it, then try again") from error
        yield


def _bar() -> Progress:
    """On a terminal; elsewhere nothing is drawn."""
    return Progress(TextColumn("{task.description:<14}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                    console=Console(stderr=True), disable=not sys.stderr.isatty())
