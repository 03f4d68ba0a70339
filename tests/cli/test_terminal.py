"""Lines on a narrow terminal, and the same lines for a program."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess

import pytest

from lab.daemon import MALOTE, Home, listener
from lab.servers import free_port
from malote.terminal import fitted


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_line_is_broken_between_words_and_what_follows_is_indented(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    assert fitted("fault    one two three four", Terminal(), indent=9) == "fault    one two\n         three four"
    assert fitted("short", Terminal(), indent=9) == "short"
    assert fitted("first line that is long\n  second line that is", Terminal(), indent=2) == (
        "first line that is\n  long\n  second line that\n    is")


def test_a_path_is_never_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever copies it must get all of it."""
    monkeypatch.setenv("COLUMNS", "10")
    path = "/a/path/that/is/longer/than-the/terminal"
    assert fitted(f"see {path} now", Terminal(), indent=2) == f"see\n  {path}\n  now"


def test_colours_take_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "10")
    line = "\x1b[31mfault\x1b[0m word"
    assert fitted(line, Terminal(), indent=2) == line


def test_a_program_gets_each_line_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "10")
    assert fitted("one two three four five", io.StringIO(), indent=2) == "one two three four five"


def on_a_terminal(*arguments: str) -> list[str]:
    """What a person sees at 80 columns, colours taken out."""
    ours, theirs = pty.openpty()
    with subprocess.Popen([*MALOTE, *arguments], stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs,
                          env={**os.environ, "COLUMNS": "80"}) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                more = os.read(ours, 4096)
            except OSError:         # EIO: the other end is closed
                break
            if not more:
                break
            shown += more
        process.wait()
    os.close(ours)
    return re.sub(r"\x1b\[[0-9;]*m", "", shown.decode().replace("\r\n", "\n")).splitlines()


def test_check_fits_a_terminal_and_stays_whole_in_a_pipe(home: Home) -> None:
    """A fault of the configuration is longer than 80 columns."""
    home.configure(listener(free_port()))
    lines = on_a_terminal("--config", str(home.config), "check")
    piped = home.malote("check").stdout.decode().splitlines()
    assert max(map(len, piped)) > 80
    assert len(lines) > len(piped)
    assert " ".join(" ".join(lines).split()) == " ".join(" ".join(piped).split()), "the same words"
    # only a path, which is never broken, may be wider
    assert [line for line in lines if len(line) > 80 and len(line.split()) > 1] == []


def test_an_error_fits_a_terminal(home: Home) -> None:
    home.config.write_text("[outgoing]\nfild = 1\nenabled = 2\n")
    lines = on_a_terminal("--config", str(home.config), "run")
    assert "outgoing.fild: unknown key" in " ".join(" ".join(lines).split())
    assert [line for line in lines if len(line) > 80 and len(line.split()) > 1] == []
