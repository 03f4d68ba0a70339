"""`malote explain`: what would become of a message, and why."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
from datetime import UTC, datetime
from typing import BinaryIO

import click

from malote.cli.settings import Settings
from malote.core.message import prepare
from malote.core.policy import Policy, Why
from malote.errors import ConfigError, FormatError
from malote.outgoing.explain import Answer, CardShown, Explanation, explain
from malote.store import Store
from malote.terminal import fitted

COLOURS = {"seal": "green", "plain": "yellow", "refuse": "red"}
ASKED = {Why.CARD: "there is a card", Why.HISTORY: "there was a card", Why.REPLY: "it answers sealed mail",
         Why.USER: "the author asks for it"}
WORDS = {"seal": "sealed", "plain": "as it is, not sealed", "refuse": "refused"}


@click.command("explain", short_help="Tell what would become of a message, and why.")
@click.option("--from", "sender", metavar="ADDRESS", help="Who sends it; without it the From of FILE. \"\": the null sender.")
@click.option("--to", "recipients", multiple=True, metavar="ADDRESS,...",
              help="For whom (may be repeated); without it those in To and Cc of FILE.")
@click.option("--json", "as_json", is_flag=True, help="For scripts.")
@click.argument("file", type=click.File("rb"), required=False)
@click.pass_obj
def explain_(settings: Settings, sender: str | None, recipients: tuple[str, ...], as_json: bool, file: BinaryIO | None) -> None:
    """Tell what would become of the message in FILE ("-": standard input), and why: which rule, which card, what would leave.

    The daemon's own decision is asked; nothing is sent and nothing is written down. Without FILE it is that for an empty message
    to all of them openly: what rules ask of the content is not known then.
    """
    content = file.read() if file is not None else None
    wanted = [address.strip() for each in recipients for address in each.split(",") if address.strip()]
    if content is None and not (sender and wanted):
        raise click.UsageError("name the sender with --from and the recipients with --to, or give a FILE")
    if content is not None:
        prepared = prepare(content, *Policy(settings.config.outgoing).tags)
        sender = prepared.from_address if sender is None else sender
        wanted = wanted or sorted(prepared.to_cc)
        if not wanted:
            raise FormatError("the message names nobody in To or Cc", hint="name the recipients with --to")
    explanation = asyncio.run(_explain(settings, sender or "", wanted, content))
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(explanation), indent=2))
    else:
        _print(explanation, whole=content is not None)


async def _explain(settings: Settings, sender: str, recipients: list[str], content: bytes | None) -> Explanation:
    if not settings.config.outgoing.enabled:
        raise ConfigError("outgoing.enabled: is false, so nothing is sent through malote")
    store = await Store.open(settings.store_place, readonly=True)
    try:
        return await explain(store, settings.config, sender, recipients, content)
    finally:
        await store.close()


def _print(explanation: Explanation, *, whole: bool) -> None:
    for answer in explanation.recipients:
        colour = COLOURS[answer.action]
        word = "encrypted already, not sealed" if answer.covered else WORDS[answer.action]
        _say(f"{answer.recipient}: " + click.style(word, fg=colour))
        _say(f"    {answer.reason}")
        _say(f"    {_rule(answer)}{_asked(answer)}")
        _say(f"    {_card(answer.card) if answer.card else 'no card' + (', but there was one' if answer.had_card else '')}")
    for answer in explanation.trial:
        _say(f"with the rules on trial {answer.recipient}: {WORDS[answer.action]} ({answer.reason})")
    click.echo()
    if explanation.shadow:
        _say(click.style("shadow mode", fg="red") + ": this is not obeyed, the mail leaves as it came; if it were:")
    if explanation.refusal:
        for line in explanation.refusal.splitlines():
            _say(click.style("nothing would be sent: ", fg="red") + line)
    for number, copy in enumerate(explanation.copies, 1):
        hidden = {"bcc": " (Bcc, alone)", "list": " (of a list, unnamed)"}.get(copy.kind, "")
        _say(f"copy {number}, {'sealed' if copy.sealed else 'not sealed'}{hidden}: {', '.join(copy.recipients)}")
    if explanation.signer is not None:
        _say(f"signed as {explanation.signer.address}, fingerprint {explanation.signer.fingerprint}")
    if not whole:
        click.echo("malote: without a message: rules on its content, replies and headers are not in this", err=True)


def _rule(answer: Answer) -> str:
    if answer.rule is None:
        text = f"no rule, the default: {answer.level}"
    else:
        text = f"rule {answer.rule} ({', '.join(answer.patterns)}): {answer.level}"
    others = [str(number) for number in answer.rules if number != answer.rule]
    return text + (f"; rules {', '.join(others)} had a say too" if others else "")


def _asked(answer: Answer) -> str:
    return "".join(f"; {ASKED[each]}" for each in answer.asked_by)


def _card(card: CardShown) -> str:
    until = datetime.fromtimestamp(card.expires_at_ms / 1000, UTC).strftime("%Y-%m-%d")
    whose = "card of the gateway" if card.address.startswith("@") else "card of"
    return f"{whose} {card.address}, fingerprint {card.fingerprint}, {card.level} ({card.source}), until {until}"


def _say(text: str) -> None:
    click.echo(fitted(text, sys.stdout, indent=4))
