"""`malote users`, as an administrator types it: the file of local logins."""

from __future__ import annotations

import asyncio
import io
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lab.daemon import Home
from malote.cli.main import main
from malote.errors import ExitCode
from malote.outgoing.users import load_users


@pytest.fixture
def users_file(home: Home) -> Path:
    path = home.root / "users"
    home.configure(f'[[outgoing.listeners]]\nauth = "local"\nusers_file = "{path}"\n[outgoing.upstream]\nhost = "localhost"\n')
    return path


def test_from_the_first_login_to_the_last(home: Home, users_file: Path) -> None:
    assert home.malote("users", "add", "anna", "anna@example.org", "@own.example", stdin=b"first password\n").returncode == 0
    assert home.malote("users", "add", "mx.example.org", "*", "--no-password").returncode == 0
    assert stat.S_IMODE(users_file.stat().st_mode) == 0o600
    users_file.write_text("# ours\n\n" + users_file.read_text())
    users_file.chmod(0o640)
    if os.geteuid() == 0:
        os.chown(users_file, 0, 65534)
    assert home.malote("users", "passwd", "anna", stdin=b"second password\n").returncode == 0

    users = load_users(users_file)
    assert asyncio.run(users.check_password("anna", "first password")) is None
    anna = asyncio.run(users.check_password("anna", "second password"))
    assert anna is not None
    assert anna.addresses == {"anna@example.org", "@own.example"}
    assert home.malote("users", "list").stdout.decode().splitlines() == [
        "anna  password  @own.example, anna@example.org", "mx.example.org  no password  *"]
    status = users_file.stat()
    assert stat.S_IMODE(status.st_mode) == 0o640, "who could read it still can"
    assert status.st_gid == 65534 or os.geteuid() != 0

    assert home.malote("users", "remove", "anna").returncode == 0
    assert users_file.read_text() == "# ours\n\nmx.example.org::*\n"
    assert list(home.root.glob(".users*")) == []


@pytest.mark.parametrize(("arguments", "stdin", "said"), [
    (("add", "anna", "x@example.org"), b"pw\n", "has the login anna already"),
    (("add", "a:b"), b"pw\n", "cannot be a login here"),
    (("add", "a\nb"), b"pw\n", "cannot be a login here"),
    (("add", "bert", "no address"), b"pw\n", "the third part has something that is no address"),
    (("add", "bert", "a@b.example:x"), b"pw\n", "expected login:argon2id hash:address,address"),
    (("add", "bert"), b"", "the password is empty"),
    (("passwd", "nobody"), b"pw\n", "has no login nobody"),
    (("remove", "# anna"), b"", "has no login # anna"),
], ids=lambda value: value[0] if isinstance(value, tuple) else None)
def test_what_cannot_be_leaves_the_file_as_it_was(
        home: Home, users_file: Path, arguments: tuple[str, ...], stdin: bytes, said: str, capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch) -> None:
    users_file.write_text("# anna::\nanna::anna@example.org\n")
    users_file.chmod(0o600)
    monkeypatch.setattr("sys.stdin", io.StringIO(stdin.decode()))
    assert main(["--config", str(home.config), "users", *arguments]) == ExitCode.CONFIG
    told = capsys.readouterr().err
    assert said in told
    assert "pw" not in told
    assert users_file.read_text() == "# anna::\nanna::anna@example.org\n"


def test_two_at_once_lose_nothing(home: Home, users_file: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(lambda name: home.malote("users", "add", name, "--no-password"), "abcd"))
    assert [each.returncode for each in done] == [0] * 4
    assert sorted(user.login for user in load_users(users_file).all()) == list("abcd")


def test_no_file_or_several(home: Home) -> None:
    home.configure('[outgoing.upstream]\nhost = "localhost"\n')
    done = home.malote("users", "list")
    assert done.returncode == ExitCode.CONFIG
    assert b"no users_file" in done.stderr
    assert home.malote("users", "add", "anna", "--no-password", "--file", str(home.root / "other")).returncode == 0
    assert load_users(home.root / "other").get("anna") is not None
