"""A file that could not be written whole is not there: neither taken for the whole, nor in the way of the next attempt."""

from __future__ import annotations

import os
import resource
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import pytest

from malote.cli import backup, init, keystore, seal
from malote.cli.main import main
from malote.cli.probes import check_maildir, listener_probe
from malote.config import ListenerConfig
from malote.errors import ConfigError, StoreUnavailable
from malote.outgoing.offline import SealedCopy
from malote.private_files import write_private_file


@contextmanager
def files_end_at(size: int) -> Iterator[None]:
    """The kernel refuses to write more, as on a full disk. Python ignores the signal that comes with it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_half_a_backup_is_no_backup(tmp_path: Path) -> None:
    file = tmp_path / "backup"
    with files_end_at(1000), pytest.raises(click.ClickException, match="there is no backup"):
        backup._write_private(file, bytes(5000))
    assert list(tmp_path.iterdir()) == []
    backup._write_private(file, b"whole")
    assert file.read_bytes() == b"whole"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_the_name_of_a_new_file_is_on_the_disk_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a power cut a file whose directory was not synced may be gone: "wrote backup" would not have been true."""
    synced: list[bool] = []
    fsync = os.fsync

    def note(handle: int) -> None:
        synced.append(stat.S_ISDIR(os.fstat(handle).st_mode))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", note)
    write_private_file(tmp_path / "backup", b"whole")
    assert synced == [False, True]


def test_locks_that_have_no_place(tmp_path: Path) -> None:
    """The directory of a node whose store is in a database may be missing, or somebody else's: no internal error."""
    (tmp_path / "file").touch()
    with pytest.raises(StoreUnavailable, match="cannot be used") as caught, keystore._one_at_a_time(tmp_path / "file"):
        pass
    assert "store.path" in caught.value.hint
    with keystore._one_at_a_time(tmp_path / "new"), \
            pytest.raises(StoreUnavailable, match="at work"), keystore._one_at_a_time(tmp_path / "new"):
        pass


def test_half_a_sealed_copy_is_named_and_removed(tmp_path: Path) -> None:
    copy = SealedCopy(raw=bytes(5000), recipients=("ben@example.org",))
    with files_end_at(1000), pytest.raises(ConfigError, match=r"sealed-1\.eml: cannot be written \(") as caught:
        seal._write_all([copy], tmp_path)
    assert caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_a_configuration_that_cannot_be_written_leaves_no_password_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the second attempt would be refused because of the first one's file."""
    written = init.write_private_file

    def full(path: Path, data: bytes) -> None:
        with files_end_at(100 if path.suffix == ".toml" else 4096):
            written(path, data)

    monkeypatch.setattr(init, "write_private_file", full)
    monkeypatch.setattr(init.click, "prompt", lambda *_, **__: "secret")
    arguments = ["--config", str(tmp_path / "malote.toml"), "init", "anna@example.org", "--smtp", "smtp.example.org",
                 "--imap", "imap.example.org", "--username", "anna", "--deliver", "replace"]
    assert main(arguments) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(init, "write_private_file", written)
    assert main(arguments) == 0


async def test_paths_that_cannot_be_looked_at_are_faults_of_the_configuration(tmp_path: Path) -> None:
    """`Path.is_dir` raises for them: `malote check` would end there as an internal error, and hide the rest."""
    name = tmp_path / ("x" * 300)
    with pytest.raises(ConfigError, match="no directory that this user can write"):
        check_maildir(name / "Maildir")
    [finding] = [found async for found in listener_probe(ListenerConfig(socket=name / "malote.sock", auth="peer"))]
    assert finding.state == "fault"
