"""`malote completion SHELL`: prints the completion script of a shell."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the completion script for SHELL.

    \b
    bash:  malote completion bash > ~/.local/share/bash-completion/completions/malote
    zsh:   malote completion zsh > ~/.zfunc/_malote      (a directory in $fpath)
    fish:  malote completion fish > ~/.config/fish/completions/malote.fish
    """
    kind = get_completion_class(shell)
    if kind is None:    # the three above are built into click
        raise click.UsageError(f"no completion for {shell}")
    root = context.find_root().command
    click.echo(kind(root, {}, "malote", "_MALOTE_COMPLETE").source())
