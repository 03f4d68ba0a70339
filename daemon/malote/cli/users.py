"""`malote users`: the file of local logins, changed line by line. What else stands in it, comments too, stays as it is."""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from getpass import getpass
from pathlib import Path

import click

from malote.cli.settings import Settings
from malote.errors import ConfigError
from malote.outgoing.users import hash_password, load_users, parse_users
from malote.private_files import sync_directory, write_private_file

_File = click.option("--file", "named", type=click.Path(path_type=Path), metavar="PATH",
                     help="The file, if the configuration names none, or several.")


@click.group(short_help="Logins of the listeners that have a users_file.")
def users() -> None:
    """Logins of the listeners that have a users_file (docs/operating.md, Who may send).

    The service knows of a change after its next reload.
    """


@users.command("list", short_help="List logins and their addresses.")
@_File
@click.pass_obj
def list_(settings: Settings, named: Path | None) -> None:
    """List logins, whether they have a password here, and the addresses that they may send from."""
    for user in load_users(_path(settings, named)).all():
        word = "no password" if user.password is None else "password"
        click.echo(f"{user.login}  {word}  {', '.join(sorted(user.addresses)) or 'no address'}")


@users.command(short_help="Add a login, and ask for its password.")
@click.argument("login")
@click.argument("addresses", nargs=-1, metavar="[ADDRESS...]")
@click.option("--no-password", is_flag=True,
              help="For a name in a certificate, a user of this machine, or a login of your mail server.")
@_File
@click.pass_obj
def add(settings: Settings, login: str, addresses: tuple[str, ...], no_password: bool, named: Path | None) -> None:
    """Add LOGIN, which may send from each ADDRESS; `@example.org` is the whole domain, `*` every address.

    The password is asked for twice, or read from a line of the standard input. The file is made if there is none.
    """
    if ":" in login or login.startswith("#") or login != login.strip() or not login.isprintable() or not login:
        raise ConfigError(f"{login!r} cannot be a login here: it has a colon, a space at an end, or a sign that is not printed")
    path = _path(settings, named)
    with _locked(path):
        if path.exists() and load_users(path).get(login) is not None:
            raise ConfigError(f"{path}: has the login {login} already", hint=f"malote users passwd {login}")
        line = f"{login}:{'' if no_password else hash_password(_new_password())}:{','.join(addresses)}"
        _write(path, [*(_lines(path) if path.exists() else ()), line])


@users.command(short_help="Give a login another password.")
@click.argument("login")
@_File
@click.pass_obj
def passwd(settings: Settings, login: str, named: Path | None) -> None:
    """Give LOGIN another password, asked for as `malote users add` does."""
    path = _path(settings, named)
    with _locked(path):
        hashed = hash_password(_new_password())
        _change(path, login, lambda line: f"{login}:{hashed}:{line.split(':')[2]}")


@users.command(short_help="Remove a login.")
@click.argument("login")
@_File
@click.pass_obj
def remove(settings: Settings, login: str, named: Path | None) -> None:
    """Remove LOGIN. Who is logged in with it stays so until the connection ends."""
    path = _path(settings, named)
    with _locked(path):
        _change(path, login, lambda _line: None)


def _path(settings: Settings, named: Path | None) -> Path:
    """Raises `ConfigError`."""
    if named is not None:
        return named
    found = list(dict.fromkeys(each.users_file for each in settings.config.outgoing.listeners if each.users_file is not None))
    if len(found) != 1:
        raise ConfigError("the listeners of the configuration have " + ("several users files" if found else "no users_file"),
                          hint="say which with --file")
    return found[0]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Against another of these commands; by its directory, since the file is replaced. Raises `ConfigError`."""
    try:
        handle = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(f"{path.parent}: cannot be used ({error.strerror})") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _new_password() -> str:
    if not sys.stdin.isatty():
        password = sys.stdin.readline().removesuffix("\n")
    else:
        password = getpass("New password: ")
        if password and getpass("The same again: ") != password:
            raise ConfigError("the two passwords differ, nothing was done")
    if not password:
        raise ConfigError("the password is empty, nothing was done")
    return password


def _lines(path: Path) -> list[str]:
    load_users(path)        # what is wrong with it is said, and not carried on
    return path.read_text("utf-8").splitlines()


def _change(path: Path, login: str, change: Callable[[str], str | None]) -> None:
    lines, found = [], False
    for line in _lines(path):
        if not line.startswith("#") and line.strip().split(":")[0] == login and line.strip():
            found = True
            changed = change(line.strip())
            if changed is not None:
                lines.append(changed)
        else:
            lines.append(line)
    if not found:
        raise ConfigError(f"{path}: has no login {login}", hint="malote users list")
    _write(path, lines)


def _write(path: Path, lines: list[str]) -> None:
    """In the place of the old file, with its owner and mode; a new one is its maker's alone. Raises `ConfigError`."""
    text = "".join(f"{line}\n" for line in lines)
    parse_users(text, path)
    target = path.resolve()     # a link stays a link
    new = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        write_private_file(new, text.encode())
        try:
            if target.exists():
                old = target.stat()
                os.chown(new, old.st_uid, old.st_gid)
                new.chmod(old.st_mode & 0o7777)
            new.replace(target)
        finally:
            new.unlink(missing_ok=True)
        sync_directory(target.parent)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}), nothing was changed") from error
    click.echo("next: systemctl reload malote, or send SIGHUP; the user that it runs as must be able to read the file", err=True)
