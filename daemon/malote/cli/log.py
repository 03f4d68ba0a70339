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
from malote.outgoing.shadow import DIRECTION, Summary, summarise
from malote.store import Store
from malote.store.accounts import MAX_OUTCOMES
from malote.store.records import OutcomeEntry

MAX_DOMAINS = 30
WOULD = {"seal": "seal", "plain": "let pass", "refuse": "refuse"}
COLOURS = {"FRESH": "green", "sealed": "green", "refused": "red", "failed": "red", "quarantined": "yellow", "UNREADABLE": "red",
           "DUPLICATE": "yellow", "CONFLICT": "red"}


@click.command(short_help="Show what was sealed, opened and refused lately.")
@click.option("-n", "--lines", type=click.IntRange(1, 100_000), default=50, show_default=True, help="How many, newest first.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line, for scripts.")
@click.option("--shadow", is_flag=True, help="In place of that: what the rules would have done in shadow mode, summed up.")
@click.pass_obj
def log(settings: Settings, lines: int, as_json: bool, shadow: bool) -> None:
    """Show recent outcomes: what left sealed, what came in with which verdict, what was refused.

    The store never holds subjects or text, so neither can this.
    """
    found = asyncio.run(_read(settings, max(lines, MAX_OUTCOMES)))
    if shadow:
        _show_shadow(summarise(found), as_json=as_json)
        return
    entries = [entry for entry in found if entry.direction != DIRECTION][:lines]
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


def _show_shadow(summary: Summary, *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(summary)))
        return
    if not summary.messages:
        click.echo("malote: nothing was sent in shadow mode", err=True)
        return
    since = datetime.fromtimestamp(summary.since_ms / 1000, UTC).astimezone().strftime("%Y-%m-%d %H:%M")
    click.echo(f"Since {since}, in {summary.messages} messages. Numbers are of recipients.\n")
    console = Console(highlight=False)
    table = Table("rule", *(f"would {WOULD[action]}" for action in WOULD), box=None, pad_edge=False)
    for rule, counts in summary.rules.items():
        table.add_row(rule, *(str(counts.get(action, 0)) for action in WOULD))
    table.add_row("all", *(str(summary.actions.get(action, 0)) for action in WOULD))
    console.print(table)
    for action, reasons in summary.reasons.items():
        console.print(f"\nwould {WOULD[action]}:")
        for reason, count in sorted(reasons.items(), key=lambda item: -item[1]):
            console.print(Text(f"  {count:>7}  {reason}"))
    if summary.domains:
        console.print("\nno card for recipients at:")
        for domain, count in list(summary.domains.items())[:MAX_DOMAINS]:
            console.print(Text(f"  {count:>7}  {domain}"))
        if len(summary.domains) > MAX_DOMAINS:
            console.print(f"  and {len(summary.domains) - MAX_DOMAINS} more domains; --json has all")


async def _read(settings: Settings, lines: int) -> list[OutcomeEntry]:
    store = await Store.open(settings.store_place, readonly=True)
    try:
        return await store.recent_outcomes(lines)
    finally:
        await store.close()


def _word(word: str) -> Text:
    return Text(word, style=COLOURS.get(word, ""))
