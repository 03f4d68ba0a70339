"""`malote init`: asks for what has no default and writes the configuration of one person."""

from __future__ import annotations

import re
import sys
from importlib import resources
from pathlib import Path

import click

from malote.cli.settings import check_reachable, is_missing
from malote.config import load_config
from malote.core.address import canonical_address
from malote.errors import ConfigError
from malote.private_files import write_private_file

_SERVER = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[^\s:\[\]\"\\]+)(?::(?P<port>\d{1,5}))?")
_TLS_PORTS = (465, 993)         # RFC 8314: TLS from the first byte

DELIVER = """Where should opened mail go?
  replace   the same mailbox, in place of the sealed mail: you and your mail
            provider can read it
  folder    the folder Malote/Opened of that mailbox: you and your mail
            provider can read it
  maildir   a Maildir on this machine: you alone can read it"""

TEMPLATE = """# Written by `malote init`. Every key there is, with its default: malote init --example
# After a change: malote check

[keys]
unlock = "prompt"           # a service needs "file" or "credential" instead

[outgoing.upstream]         # your mail server for sending; your mail program's login is passed on to it
host = {smtp_host}
port = {smtp_port}
security = {smtp_security}
"""

ACCOUNT = """
[[accounts]]                # the mailbox that is watched
name = {name}
host = {imap_host}
port = {imap_port}
security = {imap_security}
username = {username}
password_file = {password_file}
addresses = [{address}]
deliver = {deliver}
"""


def _print_example(context: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        click.echo(resources.files("malote").joinpath("malote.example.toml").read_text("utf-8"), nl=False)
        context.exit()


@click.command(short_help="Write the configuration for ADDRESS; asks for what it needs.")
@click.argument("address")
@click.option("--example", is_flag=True, is_eager=True, expose_value=False, callback=_print_example,
              help="Print the example instead: every key, with its default and what it is for.")
@click.option("--smtp", metavar="HOST[:PORT]", help="Your mail server for sending (port 587 unless given).")
@click.option("--imap", metavar="HOST[:PORT]", help="Your mail server for reading (port 993 unless given); \"\" for none.")
@click.option("--username", help="The login at the IMAP server, if it is not the address.")
@click.option("--deliver", type=click.Choice(["replace", "folder", "maildir"]), help="Where opened mail goes.")
@click.option("--maildir", type=click.Path(path_type=Path), help="With --deliver maildir: the directory.")
@click.pass_context
def init(context: click.Context, address: str, smtp: str | None, imap: str | None, username: str | None, deliver: str | None,
         maildir: Path | None) -> None:
    """Write the configuration for ADDRESS.

    Asks for the servers that were not given. An existing configuration is not overwritten. The password of the mailbox goes
    into a file of its own, readable by you alone.
    """
    address = canonical_address(address)
    target = Path(context.obj.config_path)
    if not is_missing(target):
        check_reachable(target)
        raise ConfigError(f"{target}: is there already, nothing was written", hint="edit it, or name another file with --config")
    domain = address.rpartition("@")[2]
    smtp = smtp or click.prompt("Mail server for sending", default=f"smtp.{domain}:587", err=True)
    if imap is None:
        imap = click.prompt("Mail server for reading (IMAP)", default=f"imap.{domain}:993", err=True)
    smtp_host, smtp_port = _server(smtp, 587)
    text = TEMPLATE.format(smtp_host=_quoted(smtp_host), smtp_port=smtp_port, smtp_security=_quoted(_security(smtp_port)))
    password = ""
    name = _account_name(address)
    password_file = target.parent.absolute() / f"{name}.password"
    if imap:
        imap_host, imap_port = _server(imap, 993)
        username = username or click.prompt("Login at the IMAP server", default=address, err=True)
        if deliver is None:
            click.echo(DELIVER, err=True)
            deliver = click.prompt("deliver", type=click.Choice(["replace", "folder", "maildir"]), err=True)
        if deliver == "maildir" and maildir is None:
            maildir = Path(click.prompt("Maildir", default=str(Path.home() / "Maildir-malote"), err=True))
        # from a script the answers come on standard input, also where there is a terminal
        password = click.prompt("Password of the mailbox", hide_input=sys.stdin.isatty(), err=True)
        text += ACCOUNT.format(name=_quoted(name), imap_host=_quoted(imap_host), imap_port=imap_port,
                               imap_security=_quoted(_security(imap_port)), username=_quoted(username),
                               password_file=_quoted(str(password_file)), address=_quoted(address), deliver=_quoted(str(deliver)))
        if deliver == "maildir":
            text += f"maildir = {_quoted(str(maildir))}\n"
    try:
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise ConfigError(f"{target.parent}: cannot be made ({error.strerror})") from error
    if password:
        _write_private(password_file, password)
    try:
        _write_private(target, text)
    except ConfigError:
        if password:        # or the next attempt would find it in the way
            password_file.unlink(missing_ok=True)
        raise
    load_config(target)     # what was written can be read
    click.echo(f"malote: wrote {target}", err=True)
    click.echo(f"malote: next: malote keys new {address}, then malote check\n"
               "malote: then: malote run; and in your mail program, server for sending:\n"
               "malote:       localhost, port 2525, no TLS, the login as it was", err=True)


def _account_name(address: str) -> str:
    """It names a file, and stands in every line of the log, where no address should: the local part, without surprises."""
    return re.sub(r"[^\w+.-]+", "_", address.rpartition("@")[0]).strip("._") or "mailbox"


def _server(text: str, default_port: int) -> tuple[str, int]:
    match = _SERVER.fullmatch(text.strip())
    port = int(match["port"] or default_port) if match else 0
    if match is None or not 1 <= port <= 65535:
        raise ConfigError(f"{text!r} is not HOST or HOST:PORT, nothing was written")
    return match["host"].strip("[]"), port


def _security(port: int) -> str:
    return "tls" if port in _TLS_PORTS else "starttls"


def _quoted(text: str) -> str:
    """A TOML basic string. What would need more than these two escapes is refused."""
    if any(ord(character) < 0x20 or ord(character) == 0x7F for character in text):
        raise ConfigError("control characters have no place in a configuration, nothing was written")
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _write_private(path: Path, text: str) -> None:
    try:
        write_private_file(path, text.encode())
    except FileExistsError as error:
        raise ConfigError(f"{path}: is there already, nothing was written", hint="move it away and try again") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror})",
                          hint="make that possible, then malote init again") from error
