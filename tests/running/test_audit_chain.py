"""The audit log: what `malote audit verify` finds, and what the writer does with crashes, full disks and rotation."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from malote import audit as audit_module
from malote.audit import AuditLog, head_path, rotated_files
from malote.cli.audit import verify
from malote.cli.settings import Settings
from malote.config import AuditConfig
from malote.core.audit import START, Chain, Damage, Head, make_line, parse_head, parse_line, serialize_head
from malote.errors import AuditUnavailable, ConfigError, ExitCode

ROOT = Path(__file__).resolve().parents[2]


def chain(count: int) -> list[bytes]:
    lines, head = [], START
    for number in range(count):
        line, head = make_line(head, {"at_ms": number, "what": "sealed", "cards": ["12345"]})
        lines.append(line)
    return lines


def faults(lines: list[bytes], kept: Head | None = None, **more: Any) -> list[Damage]:
    found = Chain(**more)
    return [fault.damage for line in lines for fault in found.take(line, "f:1")] + [fault.damage for fault in found.finish(kept)]


def head_of(lines: list[bytes]) -> Head:
    found = Chain()
    for line in lines:
        assert list(found.take(line, "")) == []
    return found.head


def test_a_whole_chain_has_no_fault() -> None:
    lines = chain(20)
    assert faults(lines, head_of(lines)) == []
    assert faults([]) == []
    assert faults(lines[10:], head_of(lines), after=head_of(lines[:10])) == []


@given(st.integers(2, 12), st.data())
def test_every_single_damage_is_found(count: int, data: st.DataObject) -> None:
    """One line removed, changed, moved, doubled or cut: never silent, given the head that is kept beside the file."""
    lines = chain(count)
    kept = head_of(lines)
    at = data.draw(st.integers(0, count - 1))
    match data.draw(st.sampled_from(["remove", "change", "swap", "double", "cut", "truncate"])):
        case "remove":
            del lines[at]
        case "change":
            position = data.draw(st.integers(0, len(lines[at]) - 1))
            lines[at] = lines[at][:position] + bytes([lines[at][position] ^ 1]) + lines[at][position + 1:]
        case "swap":
            other = data.draw(st.integers(0, count - 1).filter(lambda each: each != at))
            lines[at], lines[other] = lines[other], lines[at]
        case "double":
            lines.insert(data.draw(st.integers(0, count)), lines[at])
        case "cut":
            lines[at] = lines[at][:data.draw(st.integers(0, len(lines[at]) - 1))]
        case _:
            del lines[at:]
    assert faults(lines, kept) != []


@pytest.mark.parametrize(("harm", "found"), [
    (lambda lines: lines.pop(3), {Damage.REMOVED}),
    (lambda lines: lines.pop(0), {Damage.BEGINNING}),
    (lambda lines: lines.pop(), {Damage.TRUNCATED}),
    (lambda lines: lines.insert(5, lines.pop(2)), {Damage.REORDERED}),
    (lambda lines: lines.insert(5, lines[2]), {Damage.DOUBLED}),
    (lambda lines: lines.__setitem__(3, lines[3].replace(b"sealed", b"plain")), {Damage.CHANGED}),
    (lambda lines: lines.__setitem__(-1, lines[-1].replace(b"sealed", b"plain")), {Damage.CHANGED}),
    (lambda lines: lines.__setitem__(3, lines[3][:20]), {Damage.UNKNOWN, Damage.REMOVED}),
    (lambda lines: lines.insert(3, b"hello"), {Damage.UNKNOWN}),
])
def test_each_damage_has_its_name(harm: Callable[[list[bytes]], object], found: set[Damage]) -> None:
    lines = chain(8)
    kept = head_of(lines)
    harm(lines)
    assert set(faults(lines, kept)) == found


def test_a_chain_written_anew_is_found_by_a_line_noted_elsewhere() -> None:
    """Whoever can write file and head can make a chain that is whole; not one that holds a hash that another place has."""
    lines = chain(8)
    noted = {5: head_of(lines[:5]).hash}
    forged, head = [], START
    for number in range(8):
        line, head = make_line(head, {"at_ms": number, "what": "plain"})
        forged.append(line)
    assert faults(forged, head) == []
    assert faults(forged, head, anchors=dict(noted)) == [Damage.ANCHOR]
    assert faults(lines[:4], None, anchors=dict(noted)) == [Damage.ANCHOR]
    assert faults(lines, head_of(lines), anchors=dict(noted)) == []


# --- the writer


def config(path: Path, **more: Any) -> AuditConfig:
    return AuditConfig(file=path, **more)


def line_of(**members: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {"at_ms": 1, **members}


def contents(path: Path) -> list[dict[str, Any]]:
    return [parse_line(line) for line in path.read_bytes().splitlines()]


def verified(path: Path, *options: str, files: bool = True) -> tuple[int, list[dict[str, Any]]]:
    """`files`: named on the command line, in place of those of the configuration."""
    configuration = path.with_name("malote.toml")
    configuration.write_text(f'[audit]\nfile = "{path}"\n')
    named = [str(each) for each in [*rotated_files(path), path]] if files else []
    done = CliRunner().invoke(verify, [*named, "--json", *options], obj=Settings(configuration, named=True),
                              standalone_mode=False)
    assert done.exception is None, done.output
    return int(done.return_value), [json.loads(text) for text in done.output.splitlines()]


async def wait_for(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


async def test_lines_are_on_the_disk_when_write_returns_and_the_chain_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    for start in range(3):
        log = AuditLog(config(path))
        log.note(line_of(what="note", start=start))
        await log.write([line_of(what="one"), line_of(what="two")])
        assert [each["n"] for each in contents(path)] == list(range(1, 3 * start + 4))
        assert log.waiting == 0
        await log.close()
    assert path.stat().st_mode & 0o777 == 0o600
    code, [summary] = verified(path)
    assert (code, summary["lines"], summary["n"], summary["end_known"]) == (ExitCode.OK, 9, 9, True)


async def test_many_lines_share_a_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Group commit: the thread that is busy with one batch takes all that came meanwhile as the next."""
    syncs = 0
    real = os.fdatasync

    def counted(handle: int) -> None:
        nonlocal syncs
        syncs += 1
        real(handle)
    monkeypatch.setattr(audit_module.os, "fdatasync", counted)
    log = AuditLog(config(tmp_path / "a"))
    await asyncio.gather(*(log.write([line_of(i=number)]) for number in range(500)))
    await log.close()
    assert [each["i"] for each in contents(tmp_path / "a")] == list(range(500))
    assert syncs < 100


@pytest.mark.parametrize("cut", [1, 20, 60])
async def test_a_torn_last_line_is_accounted_for(tmp_path: Path, cut: int) -> None:
    """A crash in the middle of a write: the fragment stays (the file is only appended to), the next line explains it."""
    path = tmp_path / "a"
    log = AuditLog(config(path))
    await log.write([line_of(i=1), line_of(i=2)])
    await log.close()
    line, _ = make_line(parse_head(head_path(path).read_bytes()), {"what": "never finished", "text": "x" * 100})
    with path.open("ab") as file:
        file.write(line[:cut])
    code, [summary] = verified(path)
    assert (code, summary["cut_off_bytes"]) == (ExitCode.OK, cut)
    log = AuditLog(config(path))
    await log.write([line_of(i=3)])
    await log.close()
    code, [summary] = verified(path)
    assert (code, summary["recovered"], summary["n"]) == (ExitCode.OK, 1, 4)
    # what looks like a torn line, but is explained by nobody, is damage
    path.write_bytes(path.read_bytes().replace(line[:cut] + b"\n", line[:cut] + b"x\n"))
    assert verified(path)[0] == ExitCode.CHECK


async def test_a_whole_line_without_its_end_counts(tmp_path: Path) -> None:
    path = tmp_path / "a"
    log = AuditLog(config(path))
    await log.write([line_of(i=1)])
    await log.close()
    line, _ = make_line(parse_head(head_path(path).read_bytes()), {"i": 2})
    with path.open("ab") as file:
        file.write(line)
    log = AuditLog(config(path))
    await log.write([line_of(i=3)])
    await log.close()
    assert [each["i"] for each in contents(path)] == [1, 2, 3]
    assert verified(path)[0] == ExitCode.OK


async def test_a_file_that_was_shortened_shows_the_gap_for_ever(tmp_path: Path) -> None:
    """Even if the daemon writes on: the chain continues from the head, not from what is left of the file."""
    path = tmp_path / "a"
    log = AuditLog(config(path))
    await log.write([line_of(i=number) for number in range(5)])
    path.write_bytes(b"\n".join(path.read_bytes().split(b"\n")[:3]) + b"\n")
    assert [each.get("fault") for each in verified(path)[1]] == ["truncated", None]
    await log.write([line_of(i=5)])
    await log.close()
    code, found = verified(path)
    assert (code, found[0]["fault"]) == (ExitCode.CHECK, "removed")
    assert "lines 4 to 5 are missing" in found[0]["text"]


async def test_shortened_together_with_its_head_while_the_daemon_writes(tmp_path: Path) -> None:
    """The daemon knows the head itself, and goes on from there."""
    path = tmp_path / "a"
    log = AuditLog(config(path))
    await log.write([line_of(i=number) for number in range(5)])
    path.write_bytes(b"\n".join(path.read_bytes().split(b"\n")[:3]) + b"\n")
    head_path(path).unlink()
    await log.write([line_of(i=5)])
    await log.close()
    code, found = verified(path)
    assert (code, found[0]["fault"]) == (ExitCode.CHECK, "removed")
    assert "lines 4 to 5 are missing" in found[0]["text"]


@pytest.mark.parametrize("harm", ["gone", "empty", "damaged"])
async def test_without_its_head_the_log_is_not_called_whole(tmp_path: Path, harm: str) -> None:
    """Else removing it would be all it takes to hide that the end is missing. Files put elsewhere have none."""
    path = tmp_path / "a"
    log = AuditLog(config(path))
    await log.write([line_of(i=number) for number in range(5)])
    await log.close()
    assert verified(path, files=False)[0] == ExitCode.OK
    path.write_bytes(b"\n".join(path.read_bytes().split(b"\n")[:3]) + b"\n")
    if harm == "gone":
        head_path(path).unlink()
        assert verified(path)[1][-1]["end_known"] is False
    else:
        head_path(path).write_bytes(b"" if harm == "empty" else b"0" * 86)
    code, found = verified(path, files=False)
    assert (code, found[0]["fault"], found[-1]["end_known"]) == (ExitCode.CHECK, "head", False)
    log = AuditLog(config(path))        # starts all the same: mail does not wait for a person
    await log.write([line_of(i=6)])
    await log.close()


async def test_a_log_without_lines_is_whole(tmp_path: Path) -> None:
    """`malote audit verify` on the first day."""
    path = tmp_path / "a"
    log = AuditLog(config(path))
    code, [summary] = verified(path, files=False)
    assert (code, summary["lines"], summary["end_known"]) == (ExitCode.OK, 0, True)
    await log.close()


async def test_a_head_that_cannot_be_written_costs_and_doubles_no_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    log = AuditLog(config(path))
    real = os.pwrite

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(audit_module.os, "pwrite", full)
    for number in range(3):
        await log.write([line_of(i=number)])
    assert not log.failing
    assert verified(path)[0] == ExitCode.OK
    monkeypatch.setattr(audit_module.os, "pwrite", real)
    await log.write([line_of(i=3)])
    await log.close()
    assert [each["i"] for each in contents(path)] == [0, 1, 2, 3]
    assert parse_head(head_path(path).read_bytes()).n == 4


async def test_rotation_carries_the_chain_over(tmp_path: Path) -> None:
    path = tmp_path / "a"
    log = AuditLog(config(path, rotate_bytes=2000))
    for number in range(60):
        await log.write([line_of(i=number)])
    await log.close()
    files = rotated_files(path)
    assert len(files) == 2
    assert files[0].name == f"a.{contents(files[0])[-1]['n']:012d}"
    code, [summary] = verified(path)
    assert (code, summary["lines"], summary["files"]) == (ExitCode.OK, 60, len(files) + 1)
    # whole files are missed, too
    first = files[0].read_bytes()
    last = first.splitlines()[-1]
    files[0].unlink()
    code, found = verified(path)
    assert (code, found[0]["fault"]) == (ExitCode.CHECK, "beginning")
    head = parse_line(last)["n"]
    anchor = f"{head}:{parse_line(files[1].read_bytes().splitlines()[0])['prev']}"
    assert verified(path, "--after", anchor)[0] == ExitCode.OK
    files[1].unlink()
    assert verified(path, "--after", anchor)[1][0]["fault"] == "removed"


async def test_a_file_renamed_by_others_is_left_to_them(tmp_path: Path) -> None:
    """logrotate renames and tells nobody: the chain goes on in a new file."""
    path = tmp_path / "a"
    log = AuditLog(config(path))
    await log.write([line_of(i=1)])
    path.rename(tmp_path / "a.1")
    await log.write([line_of(i=2)])
    await log.close()
    assert [each["i"] for each in contents(path)] == [2]
    assert verified(path)[0] == ExitCode.OK


async def test_a_crash_between_rotation_and_the_first_line(tmp_path: Path) -> None:
    """The head, or else the newest rotated file, says where the chain was."""
    path = tmp_path / "a"
    log = AuditLog(config(path))
    await log.write([line_of(i=1)])
    await log.close()
    path.rename(tmp_path / "a.000000000001")
    head_path(path).unlink()
    log = AuditLog(config(path))
    await log.write([line_of(i=2)])
    await log.close()
    assert verified(path)[0] == ExitCode.OK
    assert contents(path)[0]["n"] == 2


class Full:
    """Writes fail as on a full disk, after `room` bytes, until it is emptied."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int = 0) -> None:
        self.full = True
        real = os.write

        def write(handle: int, data: memoryview) -> int:
            nonlocal room
            if not self.full:
                return real(handle, data)
            if not room:
                raise OSError(errno.ENOSPC, "No space left on device")
            count = real(handle, data[:room])
            room = 0
            return count
        monkeypatch.setattr(audit_module.os, "write", write)


@pytest.mark.parametrize("room", [0, 30])
@pytest.mark.parametrize("cuttable", [True, False])
async def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int, cuttable: bool) -> None:
    """Who waits is told at once, and its lines count for nothing; the others come later, in order; the chain is whole, even
    where the half line that was written cannot be taken back (a file with the append-only attribute)."""
    path = tmp_path / "a"
    log = AuditLog(config(path))
    await log.write([line_of(i=1)])
    if not cuttable:
        def refuse(*_: object) -> None:
            raise PermissionError(errno.EPERM, "append only")
        monkeypatch.setattr(audit_module.os, "ftruncate", refuse)
    disk = Full(monkeypatch, room)
    log.note(line_of(i=2))
    for _ in range(3):
        with pytest.raises(AuditUnavailable) as caught:
            await log.write([line_of(i="refused")])
        assert caught.value.reply.code == 451
    assert log.failing
    log.note(line_of(i=3))
    assert log.waiting == 2
    disk.full = False
    await log.write([line_of(i=4)])
    assert not log.failing
    await log.close()
    lines = [json.loads(line) for line in path.read_bytes().splitlines() if line.endswith(b"}")]
    assert [each["i"] for each in lines if "i" in each] == [1, 2, 3, 4]
    assert verified(path)[0] == ExitCode.OK


async def test_lines_beyond_all_room_are_counted_in_the_log_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    monkeypatch.setattr(audit_module, "MAX_WAITING", 10)
    log = AuditLog(config(path))
    disk = Full(monkeypatch)
    for number in range(15):
        log.note(line_of(i=number))
    assert log.lost == 5
    disk.full = False
    await wait_for(lambda: log.waiting == 0)
    await log.close()
    code, [summary] = verified(path)
    assert (code, summary["lost"]) == (ExitCode.OK, 5)


async def test_the_end_of_the_service_does_not_wait_for_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_module, "END_SECONDS", 0.1)
    monkeypatch.setattr(audit_module, "RETRY_SECONDS", 0.05)
    log = AuditLog(config(tmp_path / "a"))
    Full(monkeypatch)
    log.note(line_of(i=1))
    async with asyncio.timeout(30):
        await log.close()
    with pytest.raises(AuditUnavailable):
        await log.write([line_of(i=2)])


async def test_one_line_that_cannot_be_made_holds_up_no_other(tmp_path: Path) -> None:
    def broken() -> dict[str, Any]:
        raise KeyError("a fault of ours")
    log = AuditLog(config(tmp_path / "a"))
    log.note(broken)
    await log.write([line_of(i=1)])
    await log.close()
    assert [each.get("i") for each in contents(tmp_path / "a")] == [None, 1]


def test_a_file_that_cannot_be_written_is_said_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"audit\.file"):
        AuditLog(config(tmp_path / "missing" / "a"))


SEVERAL = """
import asyncio, sys
from pathlib import Path
from malote.audit import AuditLog
from malote.config import AuditConfig

async def main():
    log = AuditLog(AuditConfig(file=Path(sys.argv[1]), rotate_bytes=5000))
    for number in range(100):
        await log.write([lambda number=number: {"who": sys.argv[2], "i": number}])
    await log.close()
asyncio.run(main())
"""


def test_several_processes_write_one_chain(tmp_path: Path) -> None:
    """Workers share the file, and rotate it under each other: no line is lost, and the chain is whole."""
    path = tmp_path / "a"
    running = [subprocess.Popen([sys.executable, "-c", SEVERAL, str(path), str(number)], cwd=ROOT / "daemon")
               for number in range(3)]
    assert [each.wait(60) for each in running] == [0, 0, 0]
    code, [summary] = verified(path)
    assert (code, summary["lines"]) == (ExitCode.OK, 300)
    lines = [each for file in [*rotated_files(path), path] for each in contents(file)]
    for number in range(3):
        assert [each["i"] for each in lines if each["who"] == str(number)] == list(range(100))


KILLED = """
import asyncio, sys
from pathlib import Path
from malote.audit import AuditLog
from malote.config import AuditConfig

async def main():
    log = AuditLog(AuditConfig(file=Path(sys.argv[1])))
    number = 0
    while True:
        await log.write([lambda number=number: {"i": number, "text": "x" * 500}])
        print(number, file=sys.stderr, flush=True)
        number += 1
asyncio.run(main())
"""


def test_kill_9_loses_no_line_that_was_waited_for(tmp_path: Path) -> None:
    """And each start tells the log of the service where the chain is: the end before it told nothing."""
    path = tmp_path / "a"
    anchors: list[str] = []
    for _ in range(3):
        with subprocess.Popen([sys.executable, "-c", KILLED, str(path)], cwd=ROOT / "daemon", stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            told = [int(process.stderr.readline()) for _ in range(20)]
            process.kill()
            told += [int(line) for line in process.stderr.read().split()]
            anchors += [f"{n}:{head}" for head, n in re.findall(r"hash=(\w+).*n=(\d+)", process.stdout.read().decode())]
        assert max(told) in [each["i"] for each in contents(path)]
    assert len(anchors) == 2
    code, [summary] = verified(path, *(text for anchor in anchors for text in ("--contains", anchor)))
    assert code == ExitCode.OK
    assert summary["lines"] >= 60


def test_head_survives_its_text_form() -> None:
    head = Head(17, "ab" * 32)
    assert parse_head(serialize_head(head)) == head
