"""The units: as tight as the operating guide says, without a fault in their syntax, and the daemon really works under them."""

from __future__ import annotations

import os
import re
import shutil
import smtplib
import subprocess
import sys
from pathlib import Path

import pytest

from lab.daemon import MALOTE, Home, free_port, listener, upstream
from lab.servers import HOST, PASSWORD, Lab, Postfix
from malote.cli.settings import SYSTEM_CONFIG, SYSTEM_STORE
from malote.config import KeysConfig, ListenerConfig
from malote.errors import ExitCode

ROOT = Path(__file__).parents[1]
SYSTEM, USER = ROOT / "systemd" / "malote.service", ROOT / "systemd" / "malote-user.service"
DOCS = (ROOT / "docs" / "operating.md").read_text()
SOCKET = ROOT / "systemd" / "malote.socket"
WORST = 2.0     # issue: rated "OK" 2.0 or better
PR_SET_MDWE, PR_GET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN = 65, 66, 1

needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """An installation of malote that nobody else uses."""
    return Home(tmp_path / "home")


def settings(unit: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in unit.read_text().splitlines():
        key, mark, value = line.partition("=")
        if mark and not line.startswith("#"):
            found.setdefault(key, []).append(value)
    return found


@needs_systemd
def test_the_sandbox_is_rated_as_promised() -> None:
    """And the guide says the number that is measured."""
    done = subprocess.run(["systemd-analyze", "security", "--offline=true", f"--threshold={int(WORST * 10)}", str(SYSTEM)],
                          capture_output=True, text=True, check=False, env={"SYSTEMD_COLORS": "0", "LANG": "C.UTF-8"})
    rated = re.search(r"Overall exposure level for \S+ (\d+\.\d+)", done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert rated
    assert float(rated[1]) <= WORST
    assert f"{rated[1]})" in DOCS.replace("`systemd-analyze security malote`: ", "")


@needs_systemd
@pytest.mark.parametrize(("unit", "manager"), [(SYSTEM, "--system"), (USER, "--user")])
def test_nothing_in_a_unit_is_misspelt(unit: Path, manager: str, tmp_path: Path) -> None:
    """systemd passes over what it does not know: a misspelt line of the sandbox would protect nothing."""
    copy = tmp_path / "malote.service"
    program = re.sub(r"(?m)^ExecStart=\S+", f"ExecStart={sys.executable}", unit.read_text())
    copy.write_text(program)
    done = subprocess.run(["systemd-analyze", "verify", manager, "--man=no", str(copy)], capture_output=True, text=True,
                          check=False, env={"XDG_RUNTIME_DIR": str(tmp_path), "HOME": str(tmp_path), "PATH": "/usr/bin:/bin"})
    complaints = [line for line in done.stderr.splitlines() if "malote.service" in line or "Unknown" in line]
    assert complaints == []


@needs_systemd
def test_nothing_in_the_socket_unit_is_misspelt(tmp_path: Path) -> None:
    """It is verified beside the service that it is for, which must be the one it starts."""
    (tmp_path / SOCKET.name).write_text(SOCKET.read_text())
    (tmp_path / SYSTEM.name).write_text(re.sub(r"(?m)^ExecStart=\S+", f"ExecStart={sys.executable}", SYSTEM.read_text()))
    done = subprocess.run(["systemd-analyze", "verify", "--system", "--man=no", str(tmp_path / SOCKET.name)], capture_output=True,
                          text=True, check=False, env={"XDG_RUNTIME_DIR": str(tmp_path), "PATH": "/usr/bin:/bin"})
    assert [line for line in done.stderr.splitlines() if "malote" in line or "Unknown" in line] == []
    listener = ListenerConfig()
    assert settings(SOCKET)["ListenStream"] == [f"{listener.host}:{listener.port}"], "it fits the default configuration"
    assert settings(SOCKET)["SocketUser"] == settings(SYSTEM)["User"]
    assert "systemd/malote.socket" in DOCS


@pytest.mark.skipif(shutil.which("systemd-socket-activate") is None, reason="systemd-socket-activate is not installed")
@pytest.mark.parametrize("workers", [1, 2])
def test_systemd_starts_it_for_the_first_client(home: Home, lab: Lab, postfix: Postfix, workers: int) -> None:
    """With systemd's own hand-over of its sockets. The client that came first is served; what is not systemd's is bound by us."""
    port, other = free_port(), free_port()
    home.configure(f"[service]\nworkers = {workers}\n" + listener(port) + listener(other)
                   + upstream(postfix.submission_port, lab.certificate))
    daemon = home.daemon()
    with daemon.log.open("wb") as log:
        daemon.process = subprocess.Popen(
            ("systemd-socket-activate", f"--listen={HOST}:{port}", "--setenv=NOTIFY_SOCKET", "--setenv=PATH",
             *(f"--setenv={name}" for name in ("PYTHONPATH", "HOME") if name in os.environ),
             *MALOTE, "--config", str(home.config), "run"),
            stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            env={**os.environ, "NOTIFY_SOCKET": str(home.root / "notify")})
    try:
        daemon.wait_for_log("Listening on")
        with smtplib.SMTP(HOST, port, timeout=60) as first:     # malote starts now
            first.login("alice@test.example", PASSWORD)
            with daemon:
                first.sendmail("alice@test.example", ["alice@test.example"], b"From: alice@test.example\r\n\r\ntext\r\n")
                for each in (port, other):
                    with smtplib.SMTP(HOST, each) as client:
                        assert client.noop()[0] == 250
                first.close()
                assert daemon.stop() == 0, daemon.text()
        assert "that no listener of the configuration has" not in daemon.text()
    finally:
        daemon.__exit__()


def test_the_units_fit_what_the_program_does() -> None:
    """Paths, exit codes and names that stand in two places."""
    system, user = settings(SYSTEM), settings(USER)
    assert system["ExecStart"] == [f"/usr/bin/malote --config {SYSTEM_CONFIG} run"]
    assert Path("/var/lib", system["StateDirectory"][0]) == SYSTEM_STORE
    assert system["StateDirectoryMode"] == ["0700"]     # the store refuses a directory that others can enter
    assert system["LoadCredential"][0].partition(":")[0] == KeysConfig().credential
    assert "LoadCredential" not in user     # a person's passphrase is in a file of their own
    for unit in (system, user):
        assert unit["RestartPreventExitStatus"] == [f"{int(ExitCode.CONFIG)} {int(ExitCode.KEY)}"]
        assert unit["Type"] == ["notify"]
        assert unit["UMask"] == ["0077"]
        assert unit["LimitCORE"] == ["0"]
        assert unit["MemoryDenyWriteExecute"] == ["yes"]
        assert int(unit["TimeoutStopSec"][0]) > 240     # DRAIN_SECONDS
    assert system["LoadCredential"][0].partition(":")[2] in DOCS
    assert str(SYSTEM_CONFIG) in DOCS


def test_state_and_credential_as_systemd_gives_them(home: Home, tmp_path: Path) -> None:
    """STATE_DIRECTORY of mode 0700, and a credential of mode 0400 below $CREDENTIALS_DIRECTORY: keys are made and unlocked."""
    credentials, state = tmp_path / "credentials", tmp_path / "state"
    credentials.mkdir(0o700)
    state.mkdir(0o700)
    secret = credentials / KeysConfig().credential
    secret.write_text("word\n")
    secret.chmod(0o400)
    home.config.write_text('[keys]\nunlock = "credential"\n')
    given = {"CREDENTIALS_DIRECTORY": str(credentials), "STATE_DIRECTORY": str(state)}
    done = home.malote("keys", "new", "anna@example.org", "--algorithm", "ed25519", environment=given)
    assert done.returncode == 0, done.stderr
    assert (state / "store.sqlite").exists()
    secret.chmod(0o440)         # with an access list for the service's user the group bits show its mask
    assert home.malote("keys", "rotate", "anna@example.org", environment=given).returncode == 0
    secret.chmod(0o444)
    assert home.malote("keys", "rotate", "anna@example.org", environment=given).returncode == ExitCode.KEY


MDWE = f"""
import ctypes, os, sys
if ctypes.CDLL(None).prctl({PR_SET_MDWE}, {PR_MDWE_REFUSE_EXEC_GAIN}, 0, 0, 0):
    sys.exit(99)
os.execv(sys.argv[1], sys.argv[1:])
"""
SECCOMP = """
import ctypes, os, sys
seccomp = ctypes.CDLL("libseccomp.so.2")
seccomp.seccomp_init.restype = ctypes.c_void_p
context = ctypes.c_void_p(seccomp.seccomp_init(0x00050001))     # SCMP_ACT_ERRNO(EPERM), SystemCallErrorNumber=EPERM
for name in os.environ.pop("ALLOWED").split():
    number = seccomp.seccomp_syscall_resolve_name(name.encode())
    if number >= 0 and seccomp.seccomp_rule_add(context, 0x7FFF0000, number, 0):
        sys.exit(98)
if seccomp.seccomp_load(context):
    sys.exit(99)
os.execv(sys.argv[1], sys.argv[1:])
"""


def works_when_started_by(home: Home, port: int, starter: tuple[str, ...], environment: dict[str, str]) -> None:
    """Makes keys, seals, and runs the daemon, through which a mail is sent."""
    command = (*starter, *MALOTE, "--config", str(home.config))
    for arguments, stdin in ((("keys", "new", "alice@test.example"), b""),
                             (("seal", "--to", "alice@test.example"), b"From: alice@test.example\r\n\r\ntext\r\n"),
                             (("log",), b"")):
        done = subprocess.run((*command, *arguments), input=stdin, capture_output=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr
    daemon = home.daemon()
    with daemon.log.open("wb") as log:
        daemon.process = subprocess.Popen((*command, "run"), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                          env=environment | {"NOTIFY_SOCKET": str(home.root / "notify")})
    with daemon:
        with smtplib.SMTP(HOST, port) as client:
            client.login("alice@test.example", PASSWORD)
            client.sendmail("alice@test.example", ["alice@test.example"], b"From: alice@test.example\r\n\r\ntext\r\n")
        daemon.reload()
        assert daemon.stop() == 0, daemon.text()
        assert [line["outcome"] for line in daemon.records("message")] == ["sealed"]


@pytest.fixture
def port(home: Home, lab: Lab, postfix: Postfix) -> int:
    port = free_port()
    home.configure(listener(port) + upstream(postfix.submission_port, lab.certificate))
    return port


def test_it_works_without_memory_that_is_written_and_executed(home: Home, port: int, tmp_path: Path) -> None:
    """MemoryDenyWriteExecute=yes: libraries that generate code, or callbacks by libffi, would fail only in production.

    The kernel's own switch where there is one (Linux 6.3), which is what systemd then uses too.
    """
    starter = tmp_path / "starter.py"
    starter.write_text(MDWE)
    asked = f"import ctypes, sys; sys.exit(ctypes.CDLL(None).prctl({PR_GET_MDWE}, 0, 0, 0, 0))"
    held = subprocess.run((sys.executable, str(starter), sys.executable, "-c", asked), check=False)
    if held.returncode == 99:
        pytest.skip("this kernel has no PR_SET_MDWE")
    assert held.returncode == PR_MDWE_REFUSE_EXEC_GAIN, "what is started does not have the restriction"
    works_when_started_by(home, port, (sys.executable, str(starter)), dict(os.environ))


@needs_systemd
@pytest.mark.parametrize("workers", [1, 2])
def test_it_works_with_the_system_calls_of_the_unit(home: Home, port: int, tmp_path: Path, workers: int) -> None:
    """SystemCallFilter= as systemd would compute it: a call that is missing would fail only in production. A supervisor makes
    others than a process alone: fork, memfd_create, descriptors handed over."""
    home.config.write_text(f"[service]\nworkers = {workers}\n" + home.config.read_text())
    allowed: set[str] = set()
    for value in settings(SYSTEM)["SystemCallFilter"]:
        names = {name for group in value.removeprefix("~").split() for name in system_calls(group)}
        allowed = allowed - names if value.startswith("~") else allowed | names
    allowed |= system_calls("@default")     # always allowed by systemd
    assert "mount" not in allowed
    starter = tmp_path / "starter.py"
    starter.write_text(SECCOMP)
    environment = {**os.environ, "ALLOWED": " ".join(sorted(allowed))}
    refused = subprocess.run((sys.executable, str(starter), sys.executable, "-c", "import os; os.nice(1)"), env=environment,
                             capture_output=True, check=False)
    if b"libseccomp" in refused.stderr:
        pytest.skip("libseccomp is not installed")
    assert b"PermissionError" in refused.stderr, "what is started does not have the filter"
    works_when_started_by(home, port, (sys.executable, str(starter)), environment)


def system_calls(group: str) -> set[str]:
    if not group.startswith("@"):
        return {group}
    listed = subprocess.run(["systemd-analyze", "syscall-filter", group], capture_output=True, text=True, check=True)
    names = [line.strip() for line in listed.stdout.splitlines()[1:] if not line.strip().startswith("#")]
    return {each for name in names if name for each in system_calls(name)}
