"""`malote log`: what happened lately."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from datetime import UTC, datetime

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from malote.cli.settings import Settings
from malote.store import Store
from malote.store.records import OutcomeEntry

COLOURS = {"FRESH": "green", "sealed": "green", "refused": "red", "failed": "red", "quarantined": "yellow", "UNREADABLE": "red",
           "DUPLICATE": "yellow", "CONFLICT": "red"}


@click.command(short_help="Show what was sealed, opened and refused lately.")
@click.option("-n", "--lines", type=click.IntRange(1, 100_000), default=50, show_default=True, help="How many, newest first.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line, for scripts.")
@click.pass_obj
def log(settings: Settings, lines: int, as_json: bool) -> None:
    """Show recent outcomes: what left sealed, what came in with which verdict, what was refused.

    The store never holds subjects or text, so neither can this.
    """
    entries = asyncio.run(_read(settings, lines))
    if as_json:
        for entry in entries:
            click.echo(json.dumps(dataclasses.asdict(entry)))
        return
    if not entries:
        click.echo("malote: nothing has happened yet", err=True)
        return
    console = Console(highlight=False)
    table = Table("when", "", "outcome", "verdict", "account", "to", "ms", "detail", box=None, pad_edge=False)
    for entry in entries:
        table.add_row(
            datetime.fromtimestamp(entry.at_ms / 1000, UTC).astimezone().strftime("%m-%d %H:%M:%S"),
            "→" if entry.direction == "out" else "←", _word(entry.outcome), _word(entry.verdict), Text(entry.account),
            str(entry.recipients or ""), str(entry.took_ms), Text(entry.detail))
    console.print(table)


async def _read(settings: Settings, lines: int) -> list[OutcomeEntry]:
    store = await Store.open(settings.store_place, readonly=True)
    try:
        return await store.recent_outcomes(lines)
    finally:
        await store.close()


def _word(word: str) -> Text:
    return Text(word, style=COLOURS.get(word, ""))
