"""The `malote` command: its subcommands, and what a failure looks like.

Results go to stdout, everything else to stderr. An error is `malote: what happened` and, where there is one, a line that says
what to do next; the exit code says which kind it was (docs/operating.md). Subcommands are imported when they are used.
"""

from __future__ import annotations

import importlib
import logging
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import click

from malote import __version__
from malote.cli.settings import Settings
from malote.errors import ExitCode, MaloteError
from malote.terminal import fitted

COMMANDS = {       # in the order in which they are first needed
    "init": "malote.cli.init:init",
    "keys": "malote.cli.keys:keys",
    "check": "malote.cli.check:check",
    "run": "malote.cli.run:run",
    "log": "malote.cli.log:log",
    "open": "malote.cli.open:open_",
    "seal": "malote.cli.seal:seal",
    "explain": "malote.cli.explain:explain_",
    "inspect": "malote.cli.inspect:inspect",
    "store": "malote.cli.store:store",
    "audit": "malote.cli.audit:audit",
    "gateway": "malote.cli.gateway:gateway",
    "users": "malote.cli.users:users",
    "completion": "malote.cli.completion:completion",
}
INTERRUPTED = 130   # as a shell has it: 128 + SIGINT


class LazyGroup(click.Group):
    """A group whose commands are in modules that are imported when asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name].partition(":")
        command = getattr(importlib.import_module(module), name)
        if not isinstance(command, click.Command):
            raise TypeError(f"{COMMANDS[cmd_name]} is no command")
        return command


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "--version", message="%(prog)s %(version)s")
@click.option("--config", "config_path", type=click.Path(path_type=Path), envvar="MALOTE_CONFIG", metavar="PATH",
              help="The configuration. Default: /etc/malote/malote.toml for root, ~/.config/malote/malote.toml for a person.")
@click.pass_context
def cli(context: click.Context, config_path: Path | None) -> None:
    """Seal mail on its way out; open mail on its way in, checked for freshness."""
    context.obj = Settings.at(config_path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    logging.basicConfig(handlers=[_Warnings()])     # `malote run` puts the log of the daemon in its place
    try:
        code = cli.main(arguments, prog_name="malote", standalone_mode=False)
    except MaloteError as error:
        _say(str(error), error.hint)
        return int(error.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:     # `malote`, `malote keys`: the help, without a word of reproach
        click.echo(error.format_message(), err=True)
        return int(ExitCode.CONFIG)
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "malote"
        _say(error.format_message(), f"see {command} --help")
        return int(ExitCode.CONFIG)
    except click.ClickException as error:
        _say(error.format_message(), "")
        return int(ExitCode.CONFIG)
    except click.Abort:
        _say("interrupted, nothing more was done", "")
        return INTERRUPTED
    except BrokenPipeError:     # `malote ... | head`
        sys.stderr.close()
        return int(ExitCode.FAILED)
    except Exception as error:  # noqa: BLE001  the last stop: where it happened, never its text, which may quote mail or keys
        _say(f"internal error, please report it: {type(error).__name__}", "")
        click.echo("".join(traceback.format_tb(error.__traceback__)), err=True, nl=False)
        return int(ExitCode.FAILED)
    return code if isinstance(code, int) else int(ExitCode.OK)


class _Warnings(logging.Handler):
    """What the store warns of. Its errors end the command, which says them; libraries put mail into theirs, which nobody sees."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.startswith("malote.") and record.levelno == logging.WARNING:
            _say(record.getMessage(), "")


def _say(message: str, hint: str) -> None:
    click.echo(fitted(f"malote: {message}", sys.stderr, indent=8), err=True)
    if hint:
        click.echo(fitted(f"malote: hint: {hint}", sys.stderr, indent=8), err=True)
