"""`malote keys import`: takes cards in, all or none, and never lets one push out another that did not sign it."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import click

from malote.cli.keystore import change_store, describe, held_card, now_ms, own_card
from malote.cli.settings import Settings
from malote.core.card import MAX_ARMORED_BYTES, Card, check_succession, parse_armored
from malote.errors import FormatError, KeyRefused
from malote.store import Level, Store


@dataclass(frozen=True, slots=True)
class Incoming:
    """A card to be taken in. `state`: new, updated, replaced, unchanged."""

    card: Card
    source: str
    state: str


@click.command(name="import", short_help="Take in the cards of other people.")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path, allow_dash=True))
@click.option("--replace", is_flag=True, help="Take a card although the one held did not sign it. Compare the digits first!")
@click.option("--json", "as_json", is_flag=True, help="For scripts.")
@click.pass_obj
def import_cards(settings: Settings, files: tuple[Path, ...], replace: bool, as_json: bool) -> None:
    """Take in the cards in FILES: card files, or whole mails with cards in them ("-": standard input).

    All are checked before any is taken. A card that differs from the one held is taken only if that one signed it.
    """
    found = [(card, str(file)) for file in files for card in _read(file)]

    async def take(store: Store) -> list[Incoming]:
        plan = await _plan(store, found, replace=replace)
        for incoming in plan:
            if incoming.state != "unchanged":
                await store.put_card(incoming.card.address, incoming.card.raw, incoming.card.verify.id, level=Level.TOFU,
                                     evidence="imported from a file", now_ms=now_ms(), succession=incoming.state == "updated")
        return plan

    plan = change_store(settings, take)
    entries = [{"state": incoming.state, **describe(incoming.card)} for incoming in plan]
    if as_json:
        click.echo(json.dumps([{key: entry[key] for key in _SHOWN} for entry in entries], indent=2))
        return
    for entry in entries:
        click.echo(f"{entry['state']} {entry['address']}  {entry['fingerprint']}")
        if entry["expired"]:
            click.echo(f"malote: the card of {entry['address']} has expired; ask for a new one", err=True)
    if any(incoming.state in {"new", "replaced"} for incoming in plan):
        click.echo("malote: compare the digits with their owners, by another way than mail", err=True)


_SHOWN = ("state", "address", "fingerprint", "signing_key", "algorithm", "sequence", "made_at_ms", "usable_until_ms", "expired")


async def _plan(store: Store, found: list[tuple[Card, str]], *, replace: bool) -> list[Incoming]:
    """What will be done with each card, in order, each checked against the ones before it. Raises `KeyRefused`."""
    held: dict[str, Card] = {}
    plan = []
    for card, source in found:
        if card.address not in held and (record := await store.card(card.address)) is not None:
            held[card.address] = held_card(record)
        old = held.get(card.address)
        if old is not None and old.raw != card.raw and await own_card(store, card.address) is not None:
            raise KeyRefused(f"{source}: {card.address} is one of your own identities, nothing was imported",
                             hint="keys of your own come from malote keys restore")
        plan.append(Incoming(card, source, _state(old, card, source, replace=replace)))
        held[card.address] = card
    return plan


def _state(old: Card | None, card: Card, source: str, *, replace: bool) -> str:
    if old is None:
        return "new"
    if old.raw == card.raw:
        return "unchanged"
    try:
        check_succession(old, card)
    except KeyRefused as error:
        if replace:
            return "replaced"
        raise KeyRefused(f"{source}: {error}\nnothing was imported", hint=_ASK) from error
    return "updated"


_ASK = "ask the person, by another way than mail, and compare the digits; if the new ones are theirs, import with --replace"


def _read(file: Path) -> list[Card]:
    """Raises `FormatError` that names the file."""
    try:
        if str(file) == "-":
            data = sys.stdin.buffer.read(MAX_ARMORED_BYTES + 1)
        else:
            with file.open("rb") as handle:
                data = handle.read(MAX_ARMORED_BYTES + 1)
    except OSError as error:
        raise click.ClickException(f"{file}: cannot be read ({error.strerror}), nothing was imported") from error
    try:
        return parse_armored(data)
    except FormatError as error:
        raise KeyRefused(f"{file}: {error}, nothing was imported", hint=error.hint) from error
