"""`malote run`: the daemon, in the foreground."""

from __future__ import annotations

import click

from malote.cli.settings import Settings
from malote.cli.unlock import read_passphrase
from malote.launch import run as run_service


@click.command(short_help="Run the daemon in the foreground.")
@click.pass_obj
def run(settings: Settings) -> None:
    """Run the daemon in the foreground: seal what leaves, watch and open what comes in.

    SIGTERM ends it after the mail in flight; SIGHUP reads the configuration again. With keys.unlock = "prompt" it asks for the
    passphrase first. The log goes to standard error.
    """
    config = settings.config
    run_service(config, settings.config_path, settings.store_path, lambda: read_passphrase(config.keys))
