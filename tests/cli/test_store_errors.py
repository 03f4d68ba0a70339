"""What a command says when the store is locked, damaged or no store: once, what happened, and what to do next."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from contextlib import closing

import pytest

from lab.daemon import Home, free_port, listener, upstream
from malote.errors import ExitCode
from malote.store.database import _HINTS, _TEXTS

FILE = "store/store.sqlite"
LIBRARY = """
import logging, sys
from malote.cli.main import main
from malote.cli import log
def told(*_):
    logging.getLogger("aioimaplib.aioimaplib").error("received: secret of the mail")
    logging.getLogger("malote.store").warning("the store comes from another machine")
log._read = told
main(["log"])
"""


@pytest.fixture
def kept(home: Home) -> Home:
    home.configure("")
    home.keys("new", "anna@example.org", "--algorithm", "ed25519")
    return home


def test_locked_by_another_process(kept: Home) -> None:
    with closing(sqlite3.connect(kept.root / FILE, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        done = kept.malote("keys", "rotate", "anna@example.org")
    assert done.returncode == ExitCode.STORE
    text, hint = done.stderr.decode().splitlines()
    assert text == "malote: the store is locked by another process"
    assert hint.startswith("malote: hint: try again")


@pytest.mark.parametrize(("content", "text"), [
    (lambda whole: whole[:5000], "the store is damaged"), (lambda whole: bytes(range(256)) * 40, "the store file is not a store"),
])
def test_damaged(kept: Home, content: object, text: str) -> None:
    """And the damaged file is left as it is."""
    file = kept.root / FILE
    assert callable(content)
    damaged = content(file.read_bytes())
    file.write_bytes(damaged)
    for command in (("keys", "list"), ("keys", "rotate", "anna@example.org")):
        done = kept.malote(*command)
        assert done.returncode == ExitCode.STORE
        assert done.stderr.decode().splitlines()[0] == f"malote: {text}"
        assert "malote keys restore" in done.stderr.decode()
    assert file.read_bytes() == damaged


def test_every_fault_of_the_database_has_its_cure() -> None:
    assert _HINTS.keys() == _TEXTS.keys()


def test_libraries_write_nothing_to_the_terminal(kept: Home) -> None:
    """Python prints the warnings of a library where no log is set up; that of the IMAP library quotes what it received."""
    done = subprocess.run([sys.executable, "-c", LIBRARY], capture_output=True, check=False, env={"HOME": str(kept.root),
                          "PYTHONPATH": ":".join(sys.path)})
    assert b"secret" not in done.stdout + done.stderr
    assert b"malote: the store comes from another machine" in done.stderr


def test_a_store_put_back_from_a_copy_is_renewed(home: Home) -> None:
    """Its numbers would be given out again, and what it saw since would be fresh: new numbers, nothing before now is trusted."""
    home.configure(listener(free_port()) + upstream(1, None))
    missing = home.malote("store", "renew")
    assert (missing.returncode, b"there is no store yet" in missing.stderr) == (ExitCode.STORE, True)
    assert not (home.root / "store").exists()
    home.keys("new", "--algorithm", "ed25519", "alice@test.example")
    mail = b"From: alice@test.example\r\nTo: alice@test.example\r\n\r\nnote\r\n"
    assert home.malote("seal", stdin=mail).returncode == 0
    with closing(sqlite3.connect(home.root / FILE)) as raw:
        assert raw.execute("SELECT count(*) FROM device").fetchone() == (1,)
        done = home.malote("store", "renew")
        assert (done.returncode, done.stdout, b"UNVERIFIABLE" in done.stderr) == (0, b"", True)
        assert raw.execute("SELECT count(*) FROM device").fetchone() == (0,)
        assert raw.execute("SELECT recipient, sender, before_ms > 1790000000000 FROM distrust").fetchall() == [("", "", 1)]
