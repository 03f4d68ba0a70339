"""`malote check`: tries everything that the daemon will need, and says of each thing that fails how to mend it."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click

from malote.cli.findings import Finding, Findings, State, fault, ok, warning
from malote.cli.oversight_probes import audit_probe, metrics_probe
from malote.cli.probes import clock_probe, crypto_probe, keys_probe, listener_probe, store_probe
from malote.cli.server_probes import account_probe, next_hop_probe, upstream_probe
from malote.cli.settings import Settings
from malote.config import Config
from malote.config_faults import config_faults
from malote.core.rules import rule_faults
from malote.errors import ConfigError, ExitCode, MaloteError
from malote.outgoing.shadow import shadow_warnings
from malote.store import PostgresPlace, Store
from malote.terminal import fitted

Say = Callable[[Finding], None]
COLOURS = {State.OK: "green", State.WARNING: "yellow", State.FAULT: "red"}


@click.command(short_help="Try everything that the daemon needs; say how to mend it.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line, for scripts.")
@click.pass_obj
def check(settings: Settings, as_json: bool) -> int:
    """Try everything that the daemon needs, and say how to mend what fails.

    First the configuration, every fault at once; then post-quantum support, store, keys, secrets, listeners, the server for
    sending, each watched mailbox, metrics, audit log, and the clock. Everything is tried, whatever failed before; nothing is
    sent and no mail is changed. Exit code 0, 2 if the configuration itself is wrong, or 7.
    """
    say = _say_json if as_json else _say
    config, faults = _configuration(settings)
    for found in faults:
        say(found)
    if config is None or faults:
        return int(ExitCode.CONFIG)
    say(ok("configuration", str(settings.config_path)))
    bad = asyncio.run(_check_all(config, settings.store_place, say))
    return int(ExitCode.CHECK if bad else ExitCode.OK)


def _configuration(settings: Settings) -> tuple[Config | None, list[Finding]]:
    try:
        config = settings.config
    except ConfigError as error:
        lines = [_split(line) for line in str(error).split("\n")]
        return None, [Finding("configuration", State.FAULT, text, cure or error.hint) for text, cure in lines]
    return config, [Finding("configuration", State.FAULT, f"{settings.config_path}: {text}", cure)
                    for text, cure in map(_split, config_faults(config) + rule_faults(config.outgoing))]


def _split(text: str) -> tuple[str, str]:
    """`key: what is wrong; the cure`"""
    what, _, cure = text.partition("; ")
    return what, cure


async def _check_all(config: Config, place: Path | PostgresPlace, say: Say) -> bool:
    """Whether there was a fault."""
    store, error = await _open(place)
    newest: dict[str, int] = {}
    bad = False
    try:
        for title, findings in _probes(config, store, error, place, newest):
            try:
                async for finding in _said_while_waiting(title, findings):
                    say(finding)
                    bad |= finding.state is State.FAULT
            except MaloteError as problem:      # of this thing; the others are tried all the same
                say(fault(title, problem, "malote log and the log of the service may say more"))
                bad = True
            except Exception as problem:    # noqa: BLE001 -- as above; its text may quote what it should not
                say(Finding(title, State.FAULT, f"could not be tried: {type(problem).__name__}", "please report it"))
                bad = True
    finally:
        if store is not None:
            await store.close()
    return bad


async def _said_while_waiting(title: str, findings: Findings) -> Findings:
    """Servers that do not answer take half a minute each; who sits at a terminal is told what is being waited for."""
    # both: what a pipe shows a moment later would land in the middle of it
    waiting = sys.stderr.isatty() and sys.stdout.isatty() and title.startswith(("sending", "delivery", "account "))
    while True:
        if waiting:
            click.echo(f"...      {title}: waiting for the server", err=True, nl=False)
        try:
            finding = await anext(findings, None)
        finally:
            if waiting:
                click.echo("\r\x1b[K", err=True, nl=False)
        if finding is None:
            return
        yield finding


async def _open(place: Path | PostgresPlace) -> tuple[Store | None, MaloteError | None]:
    try:
        return await Store.open(place, readonly=True), None
    except MaloteError as error:
        return None, error


def _probes(config: Config, store: Store | None, error: MaloteError | None, place: Path | PostgresPlace,
            newest: dict[str, int]) -> Iterator[tuple[str, Findings]]:
    yield "cryptography", crypto_probe()
    yield "store", store_probe(store, error, place)
    if store is not None:
        yield "keys", keys_probe(store, config)
    if config.outgoing.enabled:
        for listener in config.outgoing.listeners:
            yield "listener", listener_probe(listener)
        yield "shadow mode", shadow_probe(config)
        yield "sending", upstream_probe(config)
    for opening in config.incoming.listeners:
        yield "listener", listener_probe(opening.listener)
        yield "delivery", next_hop_probe(opening)
    for account in config.accounts:
        yield f"account {account.name}", account_probe(account, newest)
    if config.metrics.port:
        yield "metrics", metrics_probe(config)
    if config.audit.file is not None:
        yield "audit log", audit_probe(config.audit.file, required=config.audit.required)
    yield "clock", clock_probe(store, newest)


async def shadow_probe(config: Config) -> Findings:
    for text in shadow_warnings(config.outgoing):
        yield warning("shadow mode", text, "look at malote log --shadow, then set shadow = false")


def _say(finding: Finding) -> None:
    word = click.style(f"{finding.state:<7}", fg=COLOURS[finding.state])
    click.echo(fitted(f"{word}  {finding.what}: {finding.text}", sys.stdout, indent=9))
    if finding.cure:
        click.echo(fitted(f"           -> {finding.cure}", sys.stdout, indent=3))


def _say_json(finding: Finding) -> None:
    click.echo(json.dumps(dataclasses.asdict(finding)))
