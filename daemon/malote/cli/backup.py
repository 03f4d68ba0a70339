"""`malote keys backup` and `restore`: every private key and every card in one file under a passphrase of its own."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import click

from malote.cli.keystore import change_store, held_card, locked_record, now_ms, own_card, read_store, save_own_card
from malote.cli.settings import Settings
from malote.cli.unlock import ask_passphrase, open_keyring, open_or_create_keyring, read_key_file
from malote.core.card import Card, check_succession
from malote.core.identity import Identity, merge_decryption_keys
from malote.core.keyring import MAX_BACKUP_BYTES, Backup, BackupCard, KeyringKey, open_backup, seal_backup, unlock_identity
from malote.errors import KeyMissing, KeyRefused
from malote.private_files import write_private_file
from malote.store import Level, Store

PASSPHRASE_FILE = click.option("--passphrase-file", type=click.Path(path_type=Path), metavar="PATH",
                               help="Holds the passphrase of the backup (mode 0600 or 0400) instead of a prompt.")


@click.command(short_help="Write all your keys and all cards to FILE, under a passphrase.")
@click.argument("file", type=click.Path(path_type=Path, allow_dash=True))
@PASSPHRASE_FILE
@click.pass_obj
def backup(settings: Settings, file: Path, passphrase_file: Path | None) -> None:
    """Write all your keys, old ones too, and all cards to FILE ("-": standard output), sealed under a passphrase.

    With the file and that passphrase, and nothing else, another machine can open all your mail.
    """
    if str(file) != "-" and os.path.lexists(file):
        raise KeyRefused(f"{file}: is there already, not overwritten")

    async def gather(store: Store) -> bytes:
        records = await store.identities()
        if not records:
            raise KeyMissing("you have no keys yet, there is nothing to back up", hint="malote keys new ADDRESS")
        keyring = await open_keyring(store, settings.config_or_defaults.keys)
        identities = [unlock_identity(keyring, record.address, record.locked) for record in records]
        own = {identity.address for identity in identities}
        cards = [BackupCard(held_card(record), record.level.value, record.evidence)
                 for record in await store.list_cards() if record.address not in own]
        return seal_backup(identities, cards, _passphrase(passphrase_file, new=True), now_ms=now_ms())

    text = read_store(settings, gather)
    if str(file) == "-":
        click.echo(text, nl=False)
        return
    _write_private(file, text)
    click.echo(f"wrote {file}")


def _passphrase(path: Path | None, *, new: bool) -> bytes:
    return read_key_file(path) if path is not None else ask_passphrase("Passphrase of the backup", new=new)


def _write_private(path: Path, data: bytes) -> None:
    try:
        write_private_file(path, data)
    except OSError as error:
        raise click.ClickException(f"{path}: cannot be written ({error.strerror}), there is no backup") from error


@dataclass(frozen=True, slots=True)
class Restored:
    """What becomes of one address of the backup. `state`: new, updated, replaced, keys added, unchanged, kept."""

    address: str
    own: bool
    state: str


@click.command(short_help="Take in a backup.")
@click.argument("file", type=click.Path(path_type=Path, allow_dash=True))
@click.option("--replace", is_flag=True, help="Let the backup's keys take the place of other keys for the same address.")
@PASSPHRASE_FILE
@click.option("--json", "as_json", is_flag=True, help="For scripts.")
@click.pass_obj
def restore(settings: Settings, file: Path, replace: bool, passphrase_file: Path | None, as_json: bool) -> None:
    """Take in the backup FILE ("-": standard input).

    What is here and newer stays; keys that open old mail are added to it. All is checked before anything is written.
    """
    text = _read(file)
    saved = open_backup(text, _passphrase(passphrase_file, new=False))

    async def take(store: Store) -> list[Restored]:
        keyring, fresh = await open_or_create_keyring(store, settings.config_or_defaults.keys)
        merged = [await _merge(store, keyring, identity, replace=replace) for identity in saved.identities]
        changed = [identity for identity, state in merged if state != "unchanged"]
        if fresh or changed:
            header = keyring.header if fresh else await store.keyring_header()
            await store.set_keyring(header or keyring.header, [locked_record(keyring, identity) for identity in changed])
        for identity, _ in merged:
            await save_own_card(store, identity)
        own = [Restored(identity.address, True, state) for identity, state in merged]
        return own + await _restore_cards(store, saved)

    result = change_store(settings, take)
    if as_json:
        click.echo(json.dumps([{"address": entry.address, "own": entry.own, "state": entry.state} for entry in result], indent=2))
        return
    for entry in result:
        click.echo(f"{entry.state} {entry.address}" + ("  (your own keys)" if entry.own else ""))


async def _merge(store: Store, keyring: KeyringKey, saved: Identity, *, replace: bool) -> tuple[Identity, str]:
    """The identity to hold afterwards. Raises `KeyRefused` where two that know nothing of each other claim one address."""
    record = await own_card(store, saved.address)
    if record is None:
        await _check_held_card(store, saved, replace=replace)
        return saved, "new"
    held = unlock_identity(keyring, saved.address, record.locked)
    if _follows(saved.card, held.card):
        base, other, state = held, saved, "keys added"
    elif _follows(held.card, saved.card):
        base, other, state = saved, held, "updated"
    elif replace:
        base, other, state = saved, held, "replaced"
    else:
        raise KeyRefused(
            f"there are other keys for {saved.address} here than in the backup, nothing was restored\n"
            f"  here:   {held.card.fingerprint}, card number {held.card.sequence}\n"
            f"  backup: {saved.card.fingerprint}, card number {saved.card.sequence}",
            hint="--replace takes those of the backup; the keys here stay, to open the mail sealed to them",
        )
    result = merge_decryption_keys(base, other)
    return result, "unchanged" if result == held else state


async def _check_held_card(store: Store, saved: Identity, *, replace: bool) -> None:
    """A card for this address came from elsewhere: the backup's may take its place only as any other card may."""
    record = await store.card(saved.address)
    if record is None or replace or _follows(held := held_card(record), saved.card):
        return
    raise KeyRefused(
        f"a card for {saved.address} is held that is newer than the backup, or of other keys; nothing was restored\n"
        f"  held:   {held.fingerprint}, card number {held.sequence}\n"
        f"  backup: {saved.card.fingerprint}, card number {saved.card.sequence}",
        hint="--replace takes the keys of the backup all the same",
    )


def _follows(old: Card, new: Card) -> bool:
    try:
        check_succession(old, new)
    except KeyRefused:
        return False
    return True


async def _restore_cards(store: Store, saved: Backup) -> list[Restored]:
    """A card here that the backup's does not follow stays: it is newer, or somebody chose it."""
    done = []
    for entry in saved.cards:
        record = await store.card(entry.card.address)
        state = "new" if record is None else "kept"
        if record is not None:
            held = held_card(record)
            if held.raw == entry.card.raw:
                state = "unchanged"
            elif await own_card(store, held.address) is None and _follows(held, entry.card):
                state = "updated"
        if state in {"new", "updated"}:
            await store.put_card(entry.card.address, entry.card.raw, entry.card.verify.id, level=_level(entry.level),
                                 evidence=entry.evidence, now_ms=now_ms(), succession=state == "updated")
        done.append(Restored(entry.card.address, False, state))
    return done


def _level(text: str) -> Level:
    """A level that this version does not know is the weakest that is used."""
    return Level(text) if text in set(Level) else Level.TOFU


def _read(file: Path) -> bytes:
    try:
        if str(file) == "-":
            return sys.stdin.buffer.read(MAX_BACKUP_BYTES + 1)
        with file.open("rb") as handle:
            return handle.read(MAX_BACKUP_BYTES + 1)
    except OSError as error:
        raise click.ClickException(f"{file}: cannot be read ({error.strerror}), nothing was restored") from error
