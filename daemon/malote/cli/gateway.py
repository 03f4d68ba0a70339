"""`malote gateway`: the keys by which watchers of mailboxes behind a gateway know its verdicts (docs/gateway.md)."""

from __future__ import annotations

from pathlib import Path

import click

from malote.cli.keystore import change_store
from malote.cli.settings import Settings
from malote.core.address import canonical_card_address
from malote.core.gateway_word import MAX_MACS, export_key
from malote.core.primitives import random_bytes
from malote.errors import ConfigError
from malote.private_files import write_private_file
from malote.store import Store

_FILE = """# Verdicts of a malote gateway for {holders}.
# Whoever has this file can write headers that watchers of those mailboxes believe: keep it as you keep a password.
"""


@click.group(short_help="Let watchers behind a gateway believe its verdicts.")
def gateway() -> None:
    """The keys by which watchers of mailboxes behind a gateway know its verdicts.

    Run these where the gateway runs. The gateway follows within seconds.
    """


@gateway.command(short_help="Write the key for the watchers of some mailboxes to a file.")
@click.argument("addresses", nargs=-1, required=True, metavar="ADDRESS...")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="A new file, made for its owner alone.")
@click.pass_obj
def export(settings: Settings, addresses: tuple[str, ...], output: Path) -> None:
    """Write the key for the watchers of ADDRESS to a file, for `trusted_gateways` of that account.

    Each address has a key of its own; "@example.org" gives that of all its addresses. The first time, makes the gateway's key.
    """
    holders = [canonical_card_address(address) for address in addresses]

    async def newest(store: Store) -> bytes:
        masters = await store.gateway_keys()
        if not masters:
            masters = (random_bytes(32),)
            await store.set_gateway_keys(masters)
        return masters[0]

    master = change_store(settings, newest)
    text = _FILE.format(holders=", ".join(holders)) + "".join(export_key(master, holder).line() + "\n" for holder in holders)
    try:
        write_private_file(output, text.encode())
    except OSError as error:
        raise ConfigError(f"{output}: cannot be written ({error.strerror})") from error
    click.echo(f"next: take {output} to the watcher by a way that nobody else reads, mode 0600,\n"
               "      and name it in trusted_gateways of the account", err=True)


@gateway.command(short_help="Make a new key; the older ones go on beside it.")
@click.pass_obj
def rotate(settings: Settings) -> None:
    """Make a new key. Verdicts are given under it and under those before, until `malote gateway retire`."""

    async def add(store: Store) -> int:
        masters = await store.gateway_keys()
        if len(masters) >= MAX_MACS:
            raise ConfigError(f"there are {len(masters)} keys already, nothing was done",
                              hint="malote gateway retire drops the old ones")
        await store.set_gateway_keys((random_bytes(32), *masters))
        return len(masters) + 1

    click.echo(f"{change_store(settings, add)} keys in use")
    click.echo("next: malote gateway export anew for each watcher, then malote gateway retire", err=True)


@gateway.command(short_help="Give no more verdicts under any key but the newest.")
@click.option("--all", "everything", is_flag=True, help="Under none at all: watchers believe nothing new from this gateway.")
@click.pass_obj
def retire(settings: Settings, everything: bool) -> None:
    """Give no more verdicts under any key but the newest.

    Take the old lines out of the files of the watchers too: a stolen key is of use as long as a watcher trusts it.
    """

    async def drop(store: Store) -> int:
        kept = () if everything else (await store.gateway_keys())[:1]
        await store.set_gateway_keys(kept)
        return len(kept)

    click.echo(f"{change_store(settings, drop)} keys in use")
