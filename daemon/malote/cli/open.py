"""`malote open`: reads sealed mail without the daemon and without changing anything."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import click

from malote.cli.settings import Settings
from malote.cli.unlock import read_passphrase
from malote.config import AccountConfig
from malote.core.freshness import Verdict
from malote.core.primitives import sha256
from malote.core.status import strip_forged
from malote.credentials import account_password
from malote.errors import ConfigError, ExitCode, FormatError, MaloteError
from malote.identities import open_identities
from malote.incoming.mailbox import Mailbox
from malote.incoming.maildir import unix_lines
from malote.incoming.offline import OpenedOffline, folder_messages, maildir_messages, mbox_messages, open_offline
from malote.store import Store

MAX_MESSAGE_BYTES = 1 << 30     # of one file; a whole message is held in memory

Message = tuple[str, bytes]     # its name for people, and its bytes


@click.command(name="open", short_help="Open sealed mail without the daemon.")
@click.argument("file", type=click.File("rb"), required=False)
@click.option("--maildir", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Open all of this Maildir.")
@click.option("--mbox", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Open all of this mbox file.")
@click.option("--mailbox", nargs=2, metavar="ACCOUNT FOLDER", help="Open all of this folder at the mail server; reads only.")
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), metavar="DIRECTORY",
              help="A Maildir for the opened messages, made if need be. One that is there already is not written again.")
@click.option("--json", "as_json", is_flag=True, help="What is said of each message as one JSON object a line.")
@click.pass_obj
def open_(settings: Settings, file: BinaryIO | None, maildir: Path | None, mbox: Path | None, mailbox: tuple[str, str] | None,
          output: Path | None, as_json: bool) -> int:
    """Open the sealed message in FILE ("-" or nothing: standard input), or many at once.

    The message as it was written goes to standard output, or into the Maildir named with --output, which --maildir, --mbox and
    --mailbox need. What is to be said of it goes to standard error. Messages that are not sealed are passed over. Nothing else
    is changed: neither mail nor what malote remembers.

    So nothing is called FRESH here that the daemon did not: of a message that it has delivered, the verdict of that time is
    given, and the file may be that message or a repeat of it. A genuine message that the daemon never saw is UNVERIFIABLE.

    Exit code 0: opened, and FRESH when the daemon delivered it (with several messages: all could be opened); 3: not opened;
    4: opened, with any other verdict.
    """
    if sum(source is not None for source in (file, maildir, mbox, mailbox)) > 1:
        raise click.UsageError("name one of FILE, --maildir, --mbox and --mailbox")
    many = any((maildir, mbox, mailbox))
    if many and output is None:
        raise click.UsageError("--output DIRECTORY is needed: the opened messages are written there")
    if file is None and not many:
        file = sys.stdin.buffer
    report = Report(Maildir(output) if output is not None else None, as_json)
    asyncio.run(_open_all(settings, Source(file, maildir, mbox, mailbox), report))
    return report.exit_code(many=many)


@dataclass(frozen=True, slots=True)
class Source:
    """One of these is set."""

    file: BinaryIO | None
    maildir: Path | None
    mbox: Path | None
    mailbox: tuple[str, str] | None


async def _open_all(settings: Settings, source: Source, report: Report) -> None:
    config = settings.config_or_defaults
    account = _account(settings, source.mailbox[0]) if source.mailbox else None
    store = await Store.open(settings.store_place, readonly=True)
    try:
        identities = list((await open_identities(store, lambda: read_passphrase(config.keys))).values())
        # what the daemon remembers stands under the name of the account that the message came to
        names = [account.name] if account is not None else [each.name for each in config.accounts]
        async with _messages(source, account) as messages:
            async for name, raw in messages:
                try:
                    result = await open_offline(raw, identities, store, now_ms=time.time_ns() // 1_000_000, accounts=names)
                except FormatError:
                    if source.file is not None:
                        raise
                    report.passed_over += 1
                    continue
                except MaloteError:
                    raise
                except Exception as error:  # noqa: BLE001 -- one hostile message must not keep the others closed
                    result = OpenedOffline(None, Verdict.UNREADABLE, "It cannot be opened.", reason=type(error).__name__)
                report.add(name, result)
    finally:
        await store.close()
    report.end()


def _account(settings: Settings, name: str) -> AccountConfig:
    accounts = {account.name: account for account in settings.config.accounts}
    if name not in accounts:
        raise ConfigError(f"there is no account {name!r} in {settings.config_path}",
                          hint=f"there are: {', '.join(accounts) or 'none'}")
    return accounts[name]


@asynccontextmanager
async def _messages(source: Source, account: AccountConfig | None) -> AsyncIterator[AsyncIterator[Message]]:
    if account is not None and source.mailbox is not None:
        box = await Mailbox.connect(account, password=lambda: account_password(account))
        try:
            yield _of_folder(box, source.mailbox[1])
        finally:
            await box.logout()
    else:
        yield _of_files(source)


async def _of_folder(box: Mailbox, folder: str) -> AsyncIterator[Message]:
    async for name, fetched in folder_messages(box, folder):
        yield name, fetched.raw


async def _of_files(source: Source) -> AsyncIterator[Message]:
    try:
        for message in _read(source):
            yield message
    except OSError as error:
        raise ConfigError(f"{error.filename or 'input'}: cannot be read ({error.strerror})") from error


def _read(source: Source) -> Iterator[Message]:
    if source.maildir is not None:
        yield from maildir_messages(source.maildir)
    elif source.mbox is not None:
        yield from mbox_messages(source.mbox)
    elif source.file is not None:
        raw = source.file.read(MAX_MESSAGE_BYTES + 1)
        if len(raw) > MAX_MESSAGE_BYTES:
            raise ConfigError(f"the message is larger than {MAX_MESSAGE_BYTES} bytes")
        yield str(getattr(source.file, "name", "-")), raw


@dataclass(slots=True)
class Report:
    """Writes what was opened, says what is to be said, and counts."""

    output: Maildir | None
    as_json: bool
    opened: int = 0
    unreadable: int = 0
    passed_over: int = 0
    verdicts: list[Verdict] = field(default_factory=list)

    def add(self, name: str, result: OpenedOffline) -> None:
        self.verdicts.append(result.verdict)
        path = None
        if result.original is None:
            self.unreadable += 1
        else:
            self.opened += 1
            if self.output is not None:
                path = self.output.put(result.original, result.sent_at_ms)
            else:
                click.echo(result.original, nl=False)
        if self.as_json:
            written = {"file": str(path)} if path is not None else {}
            click.echo(json.dumps({"name": name, **result.as_json(), **written}), err=True)
        else:
            # this may be the copy that was delivered, or a repeat of it: the word alone would claim too much
            verdict = f"delivered before, then {result.verdict}" if result.remembered else str(result.verdict)
            click.echo(f"malote: {_printable(name)}: {verdict}: {_printable(result.text)}", err=True)

    def end(self) -> None:
        if self.output is not None and not self.as_json:
            click.echo(f"malote: {self.opened} opened, {self.unreadable} could not be opened, {self.passed_over} not sealed",
                       err=True)

    def exit_code(self, *, many: bool) -> int:
        if self.unreadable:
            return int(ExitCode.UNREADABLE)
        return int(ExitCode.OK if many or self.verdicts == [Verdict.FRESH] else ExitCode.NOT_FRESH)


def _printable(text: str) -> str:
    """Names of files and addresses come from strangers: control characters must not reach the terminal."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


class Maildir:
    """Where many opened messages go. The name comes from the content, so that a second run writes nothing twice."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        try:
            for name in ("tmp", "new", "cur"):
                (directory / name).mkdir(mode=0o700, parents=True, exist_ok=True)
            directory.chmod(0o700)
            self._there = {path.name.partition(":")[0] for part in ("new", "cur") for path in (directory / part).iterdir()}
        except OSError as error:
            raise ConfigError(f"{directory}: cannot be written ({error.strerror})") from error

    def put(self, original: bytes, sent_at_ms: int) -> Path:
        """Without headers that claim to be ours: whoever reads the Maildir later must not believe them."""
        name = f"{sent_at_ms // 1000}.{sha256(original).hex()[:32]}.malote"
        path = self._directory / "new" / name
        if name in self._there:
            return path
        temporary = self._directory / "tmp" / name
        try:
            temporary.unlink(missing_ok=True)
            with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
                file.write(unix_lines(strip_forged(original, "malote-")))
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(path)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be written ({error.strerror})") from error
        self._there.add(name)
        return path
