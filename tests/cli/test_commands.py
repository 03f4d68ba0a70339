"""The commands as somebody types them: `malote` in a process of its own."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from lab.daemon import MALOTE, Home
from malote import __version__
from malote.cli.main import COMMANDS, main
from malote.errors import ExitCode

ANNA, BEN, CLEO, DORA = "anna@a.example", "ben@b.example", "cleo@c.example", "dora@d.example"
DOCS = Path(__file__).parents[2] / "docs" / "operating.md"
SECRET = b"the secret text"


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> tuple[Home, Home]:
    """Anna, who holds the cards of Ben and Cleo; and Ben, who holds hers."""
    root = tmp_path_factory.mktemp("people")
    anna, ben = Home(root / "anna"), Home(root / "ben")
    for home in (anna, ben):
        home.configure("")
    anna.keys("new", ANNA, "--algorithm", "ed25519")
    for address in (BEN, CLEO):
        ben.keys("new", address, "--algorithm", "ed25519")
        ben.keys("export", address, "-o", str(root / f"{address}.card"))
        anna.keys("import", str(root / f"{address}.card"))
    anna.keys("export", ANNA, "-o", str(root / "anna.card"))
    ben.keys("import", str(root / "anna.card"))
    return anna, ben


def message(to: str = BEN, sender: str = ANNA, more: str = "") -> bytes:
    return f"From: {sender}\r\nTo: {to}\r\nSubject: the secret subject\r\n{more}\r\n".encode() + SECRET + b"\r\n"


# --- seal


def test_seal_from_standard_input(people: tuple[Home, Home]) -> None:
    """The sealed message alone on standard output, who can read it on standard error, and it opens."""
    anna, ben = people
    done = anna.malote("seal", stdin=message())
    assert done.returncode == 0, done.stderr
    assert b"secret" not in done.stdout
    assert done.stderr == f"malote: sealed for {BEN}\n".encode()
    opened = ben.malote("open", stdin=done.stdout)
    assert opened.stdout.endswith(SECRET + b"\r\n")


def test_seal_gives_hidden_recipients_copies_of_their_own(people: tuple[Home, Home], tmp_path: Path) -> None:
    """Bcc: nobody appears in anybody else's copy; and without --output nothing is written, rather than the wrong copy."""
    anna, _ = people
    done = anna.malote("seal", "--to", BEN, "--to", CLEO, stdin=message())
    assert done.returncode == ExitCode.CONFIG
    assert done.stdout == b""
    assert b"--output" in done.stderr
    done = anna.malote("seal", "--to", BEN, "--to", CLEO, "--output", str(tmp_path / "out"), stdin=message())
    assert done.returncode == 0, done.stderr
    copies = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert len(copies) == 2
    assert all(CLEO.encode() not in raw for raw in copies.values())
    assert all((tmp_path / "out" / name).stat().st_mode & 0o777 == 0o600 for name in copies)
    again = anna.malote("seal", "--to", BEN, "--to", CLEO, "--output", str(tmp_path / "out"), stdin=message())
    assert again.returncode == ExitCode.CONFIG
    assert b"not overwritten" in again.stderr


def test_seal_a_file_with_lf_line_ends(people: tuple[Home, Home], tmp_path: Path) -> None:
    """Files on Unix end lines in LF; the opened message has the same text."""
    anna, ben = people
    path = tmp_path / "message"
    path.write_bytes(message().replace(b"\r\n", b"\n"))
    done = anna.malote("seal", str(path))
    assert done.returncode == 0, done.stderr
    opened = ben.malote("open", stdin=done.stdout.replace(b"\r\n", b"\n"))
    assert SECRET in opened.stdout


@pytest.mark.parametrize(("arguments", "content", "code", "said"), [
    ((), message(DORA), ExitCode.KEY, DORA),                        # no card
    (("--to", DORA), message(), ExitCode.KEY, DORA),
    ((), message(sender=DORA), ExitCode.KEY, f"no identity for {DORA}"),
    ((), b"To: ben@b.example\r\n\r\nno From\r\n", ExitCode.FAILED, "From"),
    (("--to", "no address"), message(), ExitCode.FAILED, "address"),
    (("/nonexistent",), b"", ExitCode.CONFIG, "/nonexistent"),
])
def test_seal_refuses_with_a_reason(people: tuple[Home, Home], arguments: tuple[str, ...], content: bytes, code: int,
                                    said: str) -> None:
    """Nothing is written that could be taken for a sealed message, and nothing of the message is in the text."""
    done = people[0].malote("seal", *arguments, stdin=content)
    assert done.returncode == code, done.stderr
    assert said.encode() in done.stderr
    assert done.stdout == b""
    assert b"secret" not in done.stderr
    assert b"Traceback" not in done.stderr


# --- open


def test_open_says_what_can_be_said(people: tuple[Home, Home], tmp_path: Path) -> None:
    """Byte for byte on standard output, the verdict on standard error; never FRESH for what the daemon has not seen."""
    anna, ben = people
    sealed = anna.malote("seal", stdin=message(more="Date: Mon, 23 Nov 2026 10:00:00 +0000\r\nMessage-ID: <1@a.example>\r\n"))
    path = tmp_path / "sealed.eml"
    path.write_bytes(sealed.stdout)
    done = ben.malote("open", str(path), "--json")
    said = json.loads(done.stderr)
    assert done.returncode == ExitCode.NOT_FRESH
    assert said["verdict"] == "UNVERIFIABLE"
    assert said["sender"] == ANNA
    assert said["remembered"] is False
    assert done.stdout == message(more="Date: Mon, 23 Nov 2026 10:00:00 +0000\r\nMessage-ID: <1@a.example>\r\n")
    again = ben.malote("open", str(path))
    assert again.stdout == done.stdout
    assert b"UNVERIFIABLE" in again.stderr, "opening changes nothing: the second time is as the first"


def test_open_refuses_what_is_damaged_or_not_sealed(people: tuple[Home, Home]) -> None:
    """Exit code 3, and not a byte of plain text."""
    anna, ben = people
    sealed = anna.malote("seal", stdin=message()).stdout
    broken = bytearray(sealed)
    broken[sealed.rindex(b"AAAA") if b"AAAA" in sealed else -200] ^= 1
    for raw in (bytes(broken[:-100]), anna.malote("seal", "--to", CLEO, stdin=message(CLEO)).stdout[:3000]):
        done = ben.malote("open", stdin=raw)
        assert done.stdout == b""
        assert done.returncode in {ExitCode.UNREADABLE, ExitCode.FAILED}
    done = ben.malote("open", stdin=b"Subject: plain\r\n\r\nhello\r\n")
    assert done.returncode != 0
    assert b"nothing sealed" in done.stderr
    stranger = anna.malote("open", stdin=sealed)        # sealed to Ben, not to her
    assert stranger.returncode == ExitCode.UNREADABLE
    assert stranger.stdout == b""


def test_open_a_maildir_and_an_mbox(people: tuple[Home, Home], tmp_path: Path) -> None:
    """All that can be opened is, whatever lies between; plain mail is passed over; a second run writes nothing twice; a header
    that claims to be ours does not get out."""
    anna, ben = people
    forged = anna.malote("seal", stdin=message(more="Malote-Verdict: FRESH; x\r\n")).stdout
    sealed = [anna.malote("seal", stdin=message()).stdout for _ in range(2)]
    hostile = b"\xff\x00" * 100 + b"application/vnd.malote.sealed"
    damaged = sealed[0][:-3000]
    plain = b"From: x@y.example\r\nSubject: plain\r\n\r\nhello\r\n"
    everything = [plain, sealed[0], hostile, damaged, sealed[1], b"", forged]
    source = tmp_path / "Maildir"
    for part in ("cur", "new", "tmp", ".Folder/cur", ".Folder/new"):
        (source / part).mkdir(parents=True)
    for number, raw in enumerate(everything):
        (source / ("cur" if number % 2 else ".Folder/new") / f"{number}.host").write_bytes(raw)
    before = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    mbox = tmp_path / "mbox"
    line = b"From x@y Mon Nov 23 10:00:00 2026\n"
    mbox.write_bytes(b"".join(line + raw.replace(b"\r\n", b"\n") + b"\n\n" for raw in everything))
    for arguments in (("--maildir", str(source)), ("--mbox", str(mbox)), ("--maildir", str(source))):
        out = tmp_path / f"out{arguments[0]}"
        done = ben.malote("open", *arguments, "--output", str(out), "--json")
        assert done.returncode == ExitCode.UNREADABLE, done.stderr
        said = [json.loads(line) for line in done.stderr.splitlines()]
        assert sorted(entry["verdict"] for entry in said) == ["UNREADABLE"] + ["UNVERIFIABLE"] * 3
        files = list((out / "new").iterdir())
        assert len(files) == 3
        assert {Path(entry["file"]) for entry in said if "file" in entry} == set(files)
        assert all(SECRET in path.read_bytes() and path.stat().st_mode & 0o077 == 0 for path in files)
        assert not any(b"Malote-Verdict" in path.read_bytes() for path in files)
    assert before == {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}


@pytest.mark.parametrize("arguments", [
    ("--maildir", "."), ("--maildir", ".", "--mbox", "/dev/null", "--output", "x"),
    ("--mailbox", "nobody", "INBOX", "--output", "x"),
])
def test_open_says_how_to_use_it(people: tuple[Home, Home], arguments: tuple[str, ...], tmp_path: Path,
                                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = people[1].malote("open", *arguments)
    assert done.returncode == ExitCode.CONFIG
    assert done.stderr.startswith(b"malote: ")


# --- inspect


def test_inspect_needs_no_key_and_no_configuration(people: tuple[Home, Home]) -> None:
    """What anybody sees who holds the message; for people and for scripts."""
    sealed = people[0].malote("seal", stdin=message()).stdout
    stranger = (*MALOTE, "inspect")
    done = subprocess.run(stranger, input=sealed, capture_output=True, check=True, env=bare())
    assert b"sealed part 1:" in done.stdout
    assert b"key blobs: 1" in done.stdout
    done = subprocess.run((*stranger, "--json"), input=sealed, capture_output=True, check=True, env=bare())
    structure = json.loads(done.stdout)
    assert len(structure["sealed_parts"]) == 1
    assert structure["key_blobs"][0]["sealed_part"] == 1
    assert b"secret" not in done.stdout


def test_inspect_of_what_is_damaged_or_plain(people: tuple[Home, Home]) -> None:
    """What is left is described; what is not sealed is exit code 3."""
    anna, _ = people
    sealed = anna.malote("seal", stdin=message()).stdout
    assert anna.malote("inspect", stdin=sealed[: len(sealed) * 2 // 3]).returncode in {0, ExitCode.UNREADABLE}
    done = anna.malote("inspect", stdin=b"Subject: x\r\n\r\nplain\r\n")
    assert (done.returncode, done.stdout) == (ExitCode.UNREADABLE, b"")
    assert done.stderr == b"malote: there is nothing sealed in this message\n"


def test_inspect_shows_folded_fields_as_one_text(people: tuple[Home, Home]) -> None:
    sealed = b"Received: from a.example\r\n\tby b.example\r\n" + people[0].malote("seal", stdin=message()).stdout
    assert b"from a.example by b.example" in people[0].malote("inspect", stdin=sealed).stdout


def test_inspect_keeps_control_characters_from_the_terminal(people: tuple[Home, Home]) -> None:
    """A stranger's header must not move the cursor or set the title of the window."""
    sealed = people[0].malote("seal", stdin=message()).stdout
    hostile = b"From: a@b.example\x1b]0;owned\x07\x1b[2J\x9b\r\n" + sealed.replace(b"\nFrom:", b"\nX:", 1)
    done = people[0].malote("inspect", stdin=hostile)
    assert b"\x1b" not in done.stdout
    assert b"\x07" not in done.stdout
    assert b"\xc2\x9b" not in done.stdout


# --- log


def test_log_of_nothing_and_without_a_store(people: tuple[Home, Home], home: Home) -> None:
    done = people[1].malote("log")
    assert (done.returncode, done.stdout) == (0, b"")
    assert b"nothing has happened yet" in done.stderr
    home.configure("")
    done = home.malote("log")
    assert done.returncode == ExitCode.STORE
    assert b"malote keys new" in done.stderr


# --- init

ANSWERS = b"mail.example.org\nimap.example.org:143\n\nmaildir\n/home/anna/Mail \"x\"\nthe pass\\word\n"


def test_init_from_answers_on_standard_input(home: Home) -> None:
    """What it writes can be read; the password is in a file of its own for its owner alone; answers are quoted."""
    done = home.malote("init", "Anna.B@example.org", stdin=ANSWERS)
    assert done.returncode == 0, done.stderr
    written = tomllib.loads(home.config.read_text())
    assert written["outgoing"]["upstream"] == {"host": "mail.example.org", "port": 587, "security": "starttls"}
    (account,) = written["accounts"]
    assert (account["host"], account["port"], account["security"]) == ("imap.example.org", 143, "starttls")
    assert account["maildir"] == '/home/anna/Mail "x"'
    assert account["username"] == "anna.b@example.org"
    assert "@" not in account["name"], "it stands in every line of the log"
    password = Path(account["password_file"])
    assert password.read_text() == "the pass\\word"
    assert password.stat().st_mode & 0o777 == 0o600
    assert home.config.stat().st_mode & 0o777 == 0o600
    assert b"the pass" not in done.stdout + home.config.read_bytes()
    shown = done.stderr.decode()
    assert "malote keys new anna.b@example.org" in shown
    assert "localhost, port 2525" in shown, "nobody knows by themselves what to set in the mail program"


def test_init_says_who_can_read_on_an_ordinary_terminal(home: Home) -> None:
    """The one choice without a default: its text must not be broken in the middle of words."""
    shown = home.malote("init", "anna@example.org", stdin=ANSWERS).stderr.decode()
    choices = shown[shown.index("Where should opened mail go?"):shown.index("deliver (")].splitlines()
    assert " ".join(" ".join(choices).split()).count("you and your mail provider can read it") == 2
    assert max(map(len, choices)) <= 80


def test_init_overwrites_nothing(home: Home) -> None:
    home.config.write_text("# mine\n")
    done = home.malote("init", ANNA, stdin=ANSWERS)
    assert done.returncode == ExitCode.CONFIG
    assert home.config.read_text() == "# mine\n"


@pytest.mark.parametrize("address", ['"../../x"@example.org', '"a/b"@example.org', '".."@example.org', "ünal@example.org"])
def test_init_names_its_files_safely(home: Home, address: str) -> None:
    """The local part of an address may hold anything; the password file stays beside the configuration."""
    done = home.malote("init", address, "--smtp", "a.example", "--imap", "b.example", "--deliver", "replace", stdin=b"\nword\n")
    assert done.returncode == 0, done.stderr
    (account,) = tomllib.loads(home.config.read_text())["accounts"]
    assert Path(account["password_file"]).parent == home.root
    assert Path(account["password_file"]).read_text() == "word"


@pytest.mark.parametrize("server", ["a b", "x:0", "x:99999", 'x"y', "[::1", "x\ny"])
def test_init_refuses_what_is_no_server(home: Home, server: str) -> None:
    done = home.malote("init", ANNA, "--smtp", server, "--imap", "")
    assert done.returncode == ExitCode.CONFIG
    assert not home.config.exists()


# --- the command itself


def bare() -> dict[str, str]:
    """Somebody who has no configuration anywhere."""
    return {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "XDG_CONFIG_HOME": "/nonexistent", "LANG": "C.UTF-8"}


@pytest.mark.parametrize("command", [(), *[(name,) for name in COMMANDS],
                                     *[("keys", name) for name in ("new", "list", "show", "export", "import", "remove", "rotate",
                                                                   "backup", "restore")]])
def test_help_needs_no_configuration(command: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", "/nonexistent/malote.toml", *command, "--help"]) == 0
    assert capsys.readouterr().out.startswith(" ".join(("Usage: malote", *command)))


@pytest.mark.parametrize("command", [(), ("keys",)])
def test_a_group_alone_shows_its_help(command: tuple[str, ...]) -> None:
    """Every command with a whole sentence, and no error message around it; the code is that of wrong usage, for scripts."""
    done = subprocess.run((*MALOTE, *command), capture_output=True, check=False)
    shown = done.stderr.decode()
    assert (done.returncode, done.stdout) == (ExitCode.CONFIG, b"")
    assert shown.startswith(" ".join(("Usage: malote", *command)))
    assert "hint" not in shown
    listed = shown[shown.index("Commands:"):]
    assert "..." not in listed
    if not command:
        assert [line.split()[0] for line in listed.splitlines()[1:]] == list(COMMANDS)


def test_run_where_something_listens_already(home: Home) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        home.configure(f'[[outgoing.listeners]]\nport = {port}\n[outgoing.upstream]\nhost = "localhost"\n')
        done = home.malote("run")
    assert done.returncode == ExitCode.CONFIG
    assert f"cannot listen on 127.0.0.1 port {port} (Address already in use)".encode() in done.stderr
    assert b"is malote running already?" in done.stderr


@pytest.mark.skipif(os.getuid() != 0, reason="becomes another user")
def test_a_home_that_may_not_be_looked_into(tmp_path: Path) -> None:
    """Says so; no internal error."""
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    program = ("import os, sys; from malote.cli.main import main; os.chdir('/'); os.setgroups([]); os.setgid(65534);"
               "os.setuid(65534); sys.exit(main(sys.argv[1:]))")
    environment = os.environ | {"HOME": str(closed), "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    environment = {name: value for name, value in environment.items() if not name.startswith("XDG_")}
    for arguments in (("keys", "list"), ("keys", "new", ANNA), ("init", ANNA)):
        done = subprocess.run((sys.executable, "-c", "import malote.cli.keys, malote.cli.init; " + program, *arguments),
                              capture_output=True, env=environment, check=False)
        assert done.returncode in {ExitCode.CONFIG, ExitCode.STORE}, done.stderr
        assert b"ermission denied" in done.stderr, arguments


def test_version_and_unknown_commands() -> None:
    done = subprocess.run((*MALOTE, "--version"), capture_output=True, check=True)
    assert done.stdout.decode() == f"malote {__version__}\n"
    for wrong in (("nonsense",), ("--nonsense",), ("log", "--nonsense"), ("log", "-n", "x")):
        done = subprocess.run((*MALOTE, *wrong), capture_output=True, check=False)
        assert done.returncode == ExitCode.CONFIG
        assert done.stderr.startswith(b"malote: ")
        assert b"--help" in done.stderr


def test_the_documented_exit_codes_are_those_there_are() -> None:
    """docs/operating.md, Exit codes: scripts are written from it."""
    section = DOCS.read_text().split("## Exit codes")[1].split("\n## ")[0]
    documented = [int(number) for number in re.findall(r"^\| (\d+) \|", section, re.MULTILINE)]
    assert documented == [int(code) for code in ExitCode]


def test_bash_completes(tmp_path: Path) -> None:
    """The script that is printed, in a real bash."""
    binary = Path(sys.executable).with_name("malote")
    assert binary.exists()
    script = tmp_path / "completion"
    script.write_bytes(subprocess.run((binary, "completion", "bash"), capture_output=True, check=True).stdout)
    for words, expected in (("malote ke", ["keys"]), ("malote keys ex", ["export"]), ("malote completion f", ["fish"]),
                            ("malote check --js", ["--json"])):
        count = len(words.split()) - 1
        done = subprocess.run(
            ["bash", "-c", f'source {script}; COMP_WORDS=({words}); COMP_CWORD={count}; _malote_completion malote; '
                           'printf "%s\\n" "${COMPREPLY[@]}"'],
            capture_output=True, check=True, env=bare() | {"PATH": f"{binary.parent}:{os.environ['PATH']}"})
        assert done.stdout.decode().split() == expected, done.stderr


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_get_a_script(shell: str) -> None:
    done = subprocess.run((*MALOTE, "completion", shell), capture_output=True, check=True)
    assert b"_MALOTE_COMPLETE" in done.stdout


@pytest.mark.parametrize("arguments", [("inspect", "--json"), ("--help",), ("open",), ("seal",)])
def test_a_broken_pipe_is_quiet(people: tuple[Home, Home], arguments: tuple[str, ...]) -> None:
    """`malote ... | head` ends without a word about it."""
    anna, ben = people
    content = message() if arguments == ("seal",) else anna.malote("seal", stdin=message()).stdout
    home = ben if arguments == ("open",) else anna
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.Popen((*MALOTE, "--config", str(home.config), *arguments), stdin=subprocess.PIPE, stdout=writer,
                               stderr=subprocess.PIPE)
    os.close(writer)
    _, said = process.communicate(content)
    assert b"Traceback" not in said
    assert b"Error" not in said
    assert b"roken" not in said
