"""`malote audit verify`: whether the audit log is what was written."""

from __future__ import annotations

import dataclasses
import fcntl
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import click

from malote.audit import head_path, rotated_files
from malote.cli.settings import Settings
from malote.core.audit import HEAD_BYTES, MAX_LINE_BYTES, Chain, Damage, Fault, Head, parse_hash, parse_head
from malote.errors import ConfigError, ExitCode, FormatError


@click.group(short_help="Check the record of what left.")
def audit() -> None:
    """The audit log: a chained record of what left, to which cards, by which rule."""


@audit.command(short_help="Find lines that were removed, changed, moved or cut off.")
@click.argument("files", nargs=-1, type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--head", "head_file", type=click.Path(path_type=Path, exists=True, dir_okay=False),
              help="The file with the last number and hash. Default: FILE.head beside the last file, where it exists.")
@click.option("--contains", multiple=True, metavar="N:HASH",
              help="A line that must be in it, as it was noted elsewhere: the log of the service names one now and then.")
@click.option("--after", metavar="N:HASH", help="The last line before these files, where the older ones were put elsewhere.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line, for scripts.")
@click.pass_obj
def verify(settings: Settings, files: tuple[Path, ...], head_file: Path | None, contains: tuple[str, ...], after: str | None,
           as_json: bool) -> int:
    """Read the audit log and find lines that were removed, changed, moved or cut off.

    FILES in their order; default: all of the configured audit.file, those rotated away first. Changes nothing and does not hold
    up the daemon. Exit code 0, or 7 if something is wrong.
    """
    anchors = {head.n: head.hash for head in map(_anchor, contains)}
    chain = Chain(after=_anchor(after) if after else Head(), anchors=anchors)
    with ExitStack() as stack:
        opened = _open(files or _configured(settings), head_file, stack, whole=not files)
        faults = 0
        for fault in _faults(chain, opened):
            faults += 1
            click.echo(json.dumps({"fault": fault.damage.value, "text": fault.text, "where": fault.where}) if as_json
                       else f"fault    {fault.text}" + (f" ({fault.where})" if fault.where else ""))
    _sum_up(chain, opened, faults, as_json=as_json)
    return int(ExitCode.CHECK if faults else ExitCode.OK)


@dataclass(slots=True)
class _Opened:
    """The files as they were at one moment, with the head of that moment."""

    files: list[tuple[str, BinaryIO, int]] = field(default_factory=list)
    kept: Head | None = None
    head_fault: str = ""    # why there is no such head, where there must be one
    cut_off: int = 0        # bytes after the last line end


def _configured(settings: Settings) -> Sequence[Path]:
    path = settings.config.audit.file
    if path is None:
        raise ConfigError("audit.file is not set: there is no audit log", hint="name the files, or set it in the configuration")
    try:
        return [*rotated_files(path), path]
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error


def _open(files: Sequence[Path], head_file: Path | None, stack: ExitStack, *, whole: bool) -> _Opened:
    """Under the writer's lock, which is let go of at once: lines that come later are not looked at. `whole`: these are all of
    the files where the daemon writes them, so the head must be beside them."""
    opened = _Opened()
    try:
        handles = [(path, stack.enter_context(path.open("rb"))) for path in files]
        last = handles[-1][1]
        fcntl.flock(last, fcntl.LOCK_SH)
        opened.files = [(str(path), handle, handle.seek(0, 2)) for path, handle in handles]
        place = head_file or head_path(files[-1])
        try:
            with place.open("rb") as file:
                opened.kept = parse_head(file.read(HEAD_BYTES + 1))
        except FileNotFoundError:
            opened.head_fault = f"{place} is missing" if whole else ""
        except FormatError:
            opened.head_fault = f"{place} is no head of an audit log"
        fcntl.flock(last, fcntl.LOCK_UN)
    except OSError as error:
        raise ConfigError(f"{error.filename or files[-1]}: cannot be read ({error.strerror})") from error
    return opened


def _faults(chain: Chain, opened: _Opened) -> Iterator[Fault]:
    for name, handle, size in opened.files:
        handle.seek(0)
        for number, line in enumerate(_lines(handle, size), 1):
            if not line.endswith(b"\n") and handle is opened.files[-1][1]:
                opened.cut_off = len(line)      # by a crash; if it was ever said to be written, the head knows of it
            else:
                yield from chain.take(line.removesuffix(b"\n"), f"{name}:{number}")
    yield from chain.finish(opened.kept)
    if opened.head_fault and chain.lines:
        yield Fault(Damage.HEAD, f"{opened.head_fault}: whether lines are missing at the end cannot be told")


def _lines(handle: BinaryIO, size: int) -> Iterator[bytes]:
    """Longer ones than there are come in pieces, which are no lines of an audit log."""
    left = size
    while left and (line := handle.readline(min(left, MAX_LINE_BYTES + 1))):
        left -= len(line)
        yield line


def _anchor(text: str) -> Head:
    number, _, digits = text.partition(":")
    try:
        return Head(int(number), parse_hash(digits))
    except (ValueError, FormatError):
        raise click.BadParameter(f"{text!r} is not NUMBER:HASH") from None


def _sum_up(chain: Chain, opened: _Opened, faults: int, *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({
            "lines": chain.lines, "files": len(opened.files), "faults": faults, "recovered": chain.recovered, "lost": chain.lost,
            "cut_off_bytes": opened.cut_off, "end_known": opened.kept is not None, **dataclasses.asdict(chain.head)}))
        return
    if opened.kept is None and not (opened.head_fault and chain.lines):
        click.echo("warning  there is no head beside it: whether lines are missing at the end cannot be told")
    if opened.cut_off:
        click.echo(f"note     {opened.cut_off} bytes at the end are part of a line; the next start of malote accounts for them")
    if chain.recovered:
        click.echo(f"note     {chain.recovered} line(s) were cut off by a crash or a full disk, as the line after each says")
    if chain.lost:
        click.echo(f"warning  {chain.lost} line(s) could not be written while the disk was full, as the log itself says")
    state = "ok     " if not faults else "fault  "
    click.echo(f"{state}  {chain.lines} lines in {len(opened.files)} file(s); the last is {chain.head.n}:{chain.head.hash}")
