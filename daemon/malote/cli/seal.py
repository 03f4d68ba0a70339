"""`malote seal`: seal one message without a server."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import BinaryIO

import click

from malote.cli.settings import Settings
from malote.cli.unlock import read_passphrase
from malote.core.address import canonical_address
from malote.errors import ConfigError
from malote.identities import open_identities
from malote.outgoing.offline import SealedCopy, seal_offline
from malote.private_files import write_private_file
from malote.store import Store


@click.command(short_help="Seal one message without a server.")
@click.argument("file", type=click.File("rb"), default="-")
@click.option("--to", "recipients", multiple=True, metavar="ADDRESS",
              help="Seal for this address (may be repeated); without it for those in To and Cc.")
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), metavar="DIRECTORY",
              help="Write each copy into a file there: needed where some recipients must not see others (Bcc).")
@click.pass_obj
def seal(settings: Settings, file: BinaryIO, recipients: tuple[str, ...], output: Path | None) -> None:
    """Seal the message in FILE ("-" or nothing: standard input) and write the sealed one to standard output.

    The From address must be one of your identities. Who gets which copy is said on standard error. Recipients named with --to
    who are not in To or Cc get a copy each, in which the others do not appear.
    """
    copies = asyncio.run(_seal(settings, file.read(), [canonical_address(address) for address in recipients]))
    if output is not None:
        _write_all(copies, output)
        return
    if len(copies) > 1:
        raise ConfigError(f"there are {len(copies)} different copies, nothing was written", hint="name a directory with --output")
    click.echo(f"malote: sealed for {', '.join(copies[0].recipients)}", err=True)
    click.echo(copies[0].raw, nl=False)


async def _seal(settings: Settings, submitted: bytes, recipients: list[str]) -> list[SealedCopy]:
    config = settings.config_or_defaults
    store = await Store.open(settings.store_place)
    try:
        identities = await open_identities(store, lambda: read_passphrase(config.keys))
        return await seal_offline(submitted, recipients, identities=identities, store=store, config=config.outgoing,
                                  now_ms=time.time_ns() // 1_000_000)
    finally:
        await store.close()


def _write_all(copies: list[SealedCopy], directory: Path) -> None:
    path = directory
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        for number, copy in enumerate(copies, 1):
            path = directory / f"sealed-{number}.eml"
            write_private_file(path, copy.raw)
            click.echo(f"malote: {path}: sealed for {', '.join(copy.recipients)}", err=True)
    except FileExistsError as error:
        raise ConfigError(f"{error.filename}: is there already, not overwritten", hint="name an empty directory") from error
    except OSError as error:
        raise ConfigError(f"{error.filename or path}: cannot be written ({error.strerror})",
                          hint="the copies named above are written, no other is") from error
