"""`malote keys`: one's own identities, and the cards of others."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import click
import segno

from malote.cli.backup import backup, restore
from malote.cli.importing import import_cards
from malote.cli.keystore import (
    change_store,
    describe,
    held_card,
    now_ms,
    own_card,
    read_store,
    save_identity,
    show_date,
    store_exists,
)
from malote.cli.settings import Settings
from malote.cli.unlock import open_keyring, open_or_create_keyring
from malote.core.address import canonical_card_address
from malote.core.card import armor, parse_card
from malote.core.identity import new_identity
from malote.core.identity import rotate as rotate_identity
from malote.core.keyring import unlock_identity
from malote.core.keys import SignatureAlgorithm
from malote.errors import KeyMissing, KeyRefused
from malote.store import Store

_FIRST = "malote keys new ADDRESS makes them"

JSON = click.option("--json", "as_json", is_flag=True, help="For scripts.")


@click.group()
def keys() -> None:
    """Your own keys, and the cards of the people you write to.

    A card is the public half: export yours, import theirs. ADDRESS is a mail address, or "@example.org" for the gateway of
    a whole domain.
    """


keys.add_command(import_cards)
keys.add_command(backup)
keys.add_command(restore)


@keys.command()
@click.argument("address")
@click.option("--algorithm", type=click.Choice([item.value for item in SignatureAlgorithm]), show_default=True,
              default=SignatureAlgorithm.HYBRID.value, help="How messages are signed; ed25519 alone is faster, for relays.")
@JSON
@click.pass_obj
def new(settings: Settings, address: str, algorithm: str, as_json: bool) -> None:
    """Make keys for ADDRESS.

    The first time, asks for the passphrase that protects all private keys from then on.
    """
    identity = new_identity(address, SignatureAlgorithm(algorithm), now_ms())

    async def make(store: Store) -> None:
        if await own_card(store, identity.address) is not None:
            raise KeyRefused(f"there are keys for {identity.address} already, nothing was done",
                             hint=f"malote keys rotate {identity.address} makes new ones that others can follow")
        if await store.card(identity.address) is not None:
            raise KeyRefused(f"a card for {identity.address} that belongs to other keys is held, nothing was done",
                             hint=f"restore those keys from a backup, or malote keys remove {identity.address} first")
        keyring, fresh = await open_or_create_keyring(store, settings.config_or_defaults.keys)
        await save_identity(store, keyring, identity, fresh_keyring=fresh)

    change_store(settings, make)
    _print([describe(identity.card, own=True)], as_json=as_json, single=True)
    _say("next: malote keys backup FILE, and keep it elsewhere: without your",
         "      keys, or without the passphrase, no sealed mail opens",
         f"next: malote keys export {identity.address} > my.card, for those you write to")


@keys.command(name="list")
@JSON
@click.pass_obj
def list_keys(settings: Settings, as_json: bool) -> None:
    """List your own keys, then the cards held.

    Behind each address: "own", or how the card came here (TOFU: you imported it); the digits to compare; its end.
    """
    _print(read_store(settings, _descriptions) if store_exists(settings) else [], as_json=as_json)


async def _descriptions(store: Store) -> list[dict[str, Any]]:
    own = [describe(parse_card(record.card_raw), own=True) for record in await store.identities()]
    addresses = {entry["address"] for entry in own}
    return own + [describe(held_card(record), record) for record in await store.list_cards() if record.address not in addresses]


@keys.command(short_help="Show a fingerprint, as digits and as a QR code.")
@click.argument("address", required=False)
@JSON
@click.pass_obj
def show(settings: Settings, address: str | None, as_json: bool) -> None:
    """Show the fingerprint of ADDRESS (or your own), as digits to read to each other and as a QR code."""
    wanted = None if address is None else canonical_card_address(address)

    async def find(store: Store) -> list[dict[str, Any]]:
        entries = await _descriptions(store)
        return [entry for entry in entries if (entry["own"] if wanted is None else entry["address"] == wanted)]

    entries = read_store(settings, find)
    if not entries:
        raise KeyMissing(f"there is no card for {wanted}" if wanted else "you have no keys yet",
                         hint="malote keys list shows what there is" if wanted else _FIRST)
    if as_json:
        click.echo(json.dumps(entries, indent=2))
        return
    for entry in entries:
        click.echo(_long(entry))
        click.echo(_qr_code(f"MALOTE:{entry['signing_key'].upper()}"))


@keys.command(short_help="Write a card (your own) as text that can be mailed.")
@click.argument("address", required=False)
@click.option("-o", "--output", type=click.Path(path_type=Path, allow_dash=True), help="Write to this file instead of stdout.")
@click.pass_obj
def export(settings: Settings, address: str | None, output: Path | None) -> None:
    """Write the card of ADDRESS (or your own) as text that can be mailed."""

    async def find(store: Store) -> bytes:
        wanted = await _only_own(store) if address is None else canonical_card_address(address)
        record = await own_card(store, wanted) or await store.card(wanted)
        if record is None:
            raise KeyMissing(f"there is no card for {wanted}", hint="malote keys list shows what there is")
        return record.card_raw

    text = armor(parse_card(read_store(settings, find)))
    if output is None or str(output) == "-":
        click.echo(text, nl=False)
        return
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise click.ClickException(f"{output}: cannot be written ({error.strerror})") from error


async def _only_own(store: Store) -> str:
    """The address of the one identity there is. Raises `KeyMissing`, and `click.UsageError` where there are several."""
    own = [record.address for record in await store.identities()]
    if not own:
        raise KeyMissing("you have no keys yet", hint=_FIRST)
    if len(own) > 1:
        raise click.UsageError(f"whose card? ADDRESS is one of: {', '.join(own)}", click.get_current_context())
    return own[0]


@keys.command()
@click.argument("address")
@click.option("--identity", is_flag=True, help="Needed for your own keys: mail sealed to them cannot be opened any more.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_obj
def remove(settings: Settings, address: str, identity: bool, yes: bool) -> None:
    """Remove the card of ADDRESS, or with --identity your own keys."""
    wanted = canonical_card_address(address)

    async def drop(store: Store) -> None:
        own = await own_card(store, wanted) is not None
        if own and not identity:
            raise KeyRefused(f"{wanted} is one of your own identities, nothing was removed",
                             hint="--identity removes its private keys; make a backup first: malote keys backup FILE")
        if identity and not own:
            raise KeyMissing(f"there are no keys of your own for {wanted}, nothing was removed")
        if own and not yes:
            _say(f"the private keys of {wanted} will be gone: without a backup, mail sealed to them cannot be opened")
            if click.prompt("Type the address to remove them", err=True).strip() != wanted:
                raise KeyRefused("that is not the address, nothing was removed")
        if own:
            await store.remove_identity(wanted)
        if not await store.remove_card(wanted) and not own:
            raise KeyMissing(f"there is no card for {wanted}", hint="malote keys list shows what there is")

    change_store(settings, drop)
    click.echo(f"removed {wanted}")
    _say(f"mail to {wanted} is refused, not sent in clear, until a card is imported or a rule says otherwise")


@keys.command(short_help="Make a new encryption key; the old ones stay here.")
@click.argument("address")
@click.option("--signing", is_flag=True, help="A new signing key too; the old one vouches for it, the fingerprint changes.")
@JSON
@click.pass_obj
def rotate(settings: Settings, address: str, signing: bool, as_json: bool) -> None:
    """Make a new encryption key for ADDRESS; the old ones stay here, to open what was sealed to them."""
    wanted = canonical_card_address(address)

    async def change(store: Store) -> dict[str, Any]:
        record = await own_card(store, wanted)
        if record is None:
            raise KeyMissing(f"there are no keys of your own for {wanted}", hint=f"malote keys new {wanted}")
        keyring = await open_keyring(store, settings.config_or_defaults.keys)
        old = unlock_identity(keyring, wanted, record.locked)
        # a clock that went back must not make a card that is older than the one it follows
        changed = rotate_identity(old, max(now_ms(), old.card.made_at_ms), signing=signing)
        await save_identity(store, keyring, changed)
        return describe(changed.card, own=True)

    _print([change_store(settings, change)], as_json=as_json, single=True)
    _say(f"next: malote keys export {wanted} > my.card, and send it to those you write to")


# --- output


def _print(entries: list[dict[str, Any]], *, as_json: bool, single: bool = False) -> None:
    if as_json:
        click.echo(json.dumps(entries[0] if single else entries, indent=2))
        return
    if single:
        click.echo(_long(entries[0]))
        return
    rows = [(entry["address"], "own" if entry["own"] else entry["level"], entry["fingerprint"],
             "expired" if entry["expired"] else f"until {show_date(entry['usable_until_ms'])}") for entry in entries]
    width, what_width = (max((len(row[column]) for row in rows), default=0) for column in (0, 1))
    for address, what, fingerprint, until in rows:
        click.echo(f"{address:<{width}}  {what:<{what_width}}  {fingerprint}  {until}")
    if not entries:
        _say("there are no keys and no cards yet", f"hint: {_FIRST}; malote keys import FILE takes in the card of somebody else")


def _say(*lines: str) -> None:
    for line in lines:
        click.echo(f"malote: {line}", err=True)


def _long(entry: dict[str, Any]) -> str:
    lines = [
        entry["address"],
        f"  fingerprint  {entry['fingerprint']}",
        f"  signs with   {entry['algorithm']}",
        f"  card         number {entry['sequence']}, made {show_date(entry['made_at_ms'])}, "
        + ("expired " if entry["expired"] else "good until ") + show_date(entry["usable_until_ms"]),
    ]
    lines.append("  yours" if entry["own"] else f"  level        {entry['level']} ({entry['evidence']})")
    return "\n".join(lines)


def _qr_code(text: str) -> str:
    """Half blocks: a code of 33 modules needs 17 lines. The whole key id, which a program can compare.

    The blocks are the light modules. A terminal that writes dark on light would show the code inverted, which many cameras do
    not read, so the colours are set (and left out by click where the output is no terminal).
    """
    out = io.StringIO()
    segno.make(text, error="m", micro=False).terminal(out, compact=True)
    return "\n".join(click.style(line, fg="bright_white", bg="black") for line in out.getvalue().rstrip("\n").split("\n"))
