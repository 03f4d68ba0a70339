"""`malote check`: each thing that can be wrong is named, with its cure, and none hides the others."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lab.daemon import Home, account, free_port, listener, rule, upstream
from lab.servers import HOST, PASSWORD, Dovecot, Lab, Postfix, make_certificate
from malote.audit import AuditLog, head_path
from malote.cli import probes
from malote.cli.findings import Findings, State
from malote.cli.keystore import describe, now_ms
from malote.cli.main import main
from malote.cli.oversight_probes import audit_probe
from malote.config import AuditConfig
from malote.core.identity import new_identity
from malote.core.keys import SignatureAlgorithm
from malote.errors import ExitCode
from malote.store import OutcomeEntry, Store

ANNA = "alice@test.example"


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


def checked(home: Home) -> tuple[int, dict[str, dict[str, str]]]:
    """Exit code, and the findings by what they are about (the worst of each)."""
    done = home.malote("check", "--json")
    findings: dict[str, dict[str, str]] = {}
    for line in done.stdout.decode().splitlines():
        finding = json.loads(line)
        if findings.get(finding["what"], {}).get("state") != "fault":
            findings[finding["what"]] = finding
    assert b"Traceback" not in done.stderr, done.stderr.decode()
    return done.returncode, findings


def faults(findings: dict[str, dict[str, str]]) -> dict[str, str]:
    assert all(finding["cure"] for finding in findings.values() if finding["state"] == "fault"), "a fault without a cure"
    return {what: finding["text"] for what, finding in findings.items() if finding["state"] == "fault"}


def good(home: Home, lab: Lab, postfix: Postfix, dovecot: Dovecot, port: int) -> str:
    return (listener(port) + upstream(postfix.submission_port, lab.certificate) + rule("require")
            + account(ANNA, dovecot.imaps_port, lab.certificate, home))


def test_all_is_well(home: Home, lab: Lab, postfix: Postfix, dovecot: Dovecot) -> None:
    """Exit code 0, also while the daemon runs; what matters is said: who can read, what the servers can do, the card's end."""
    port = free_port()
    home.configure(good(home, lab, postfix, dovecot, port))
    home.keys("new", ANNA)
    code, findings = checked(home)
    assert faults(findings) == {}
    assert code == 0
    assert findings[f"listener 127.0.0.1:{port}"]["text"] == "is free"
    assert "your mail provider can read it" in findings["account box: readers"]["text"]
    assert "MOVE, UIDPLUS and IDLE" in findings["account box: server"]["text"]
    assert "PIPELINING" in findings[f"sending through localhost:{postfix.submission_port}"]["text"]
    assert "PLAIN" in findings[f"sending through localhost:{postfix.submission_port}: login"]["text"]
    assert "good until" in findings[f"card of {ANNA}"]["text"]
    assert "unlocked" in findings["keys"]["text"]
    with home.daemon():
        code, findings = checked(home)
        assert findings[f"listener 127.0.0.1:{port}"]["text"] == "malote listens there now"
        assert code == 0


def test_nothing_is_well_and_all_of_it_is_said(home: Home, lab: Lab, postfix: Postfix, dovecot: Dovecot) -> None:
    """Every fault in one run: a newcomer mends them all at once instead of one after the other."""
    taken = socket.create_server((HOST, 0))
    port = taken.getsockname()[1]
    home.secret("open", PASSWORD, 0o644)
    home.secret("wrong", "not the password")
    home.configure(
        listener(port)
        + upstream(postfix.submission_port, lab.certificate, f'username = "{ANNA}"\npassword_file = "{home.root}/wrong"')
        + account(ANNA, dovecot.imaps_port, lab.certificate, home, name="wrong", password="wrong")
        + account(ANNA, dovecot.imaps_port, lab.certificate, home, name="open", password="open")
        + account(ANNA, free_port(), lab.certificate, home, name="away")
        + account(ANNA, dovecot.imaps_port, make_certificate(home.root, "other")[0], home, name="untrusted")
        + account("nokey@test.example", dovecot.imaps_port, lab.certificate, home, name="nokey",
                  more='deliver = "maildir"\nmaildir = "/dev/null/malote"'),
    )
    text = home.config.read_text().replace('auth = "pass-through"', f'auth = "local"\nusers_file = "{home.root}/nousers"')
    home.config.write_text(text)
    home.keys("new", ANNA, "--algorithm", "ed25519")
    home.secret("passphrase", "another")
    code, findings = checked(home)
    taken.close()
    found = faults(findings)
    assert code == ExitCode.CHECK
    sending = f"sending through localhost:{postfix.submission_port}"
    assert set(found) == {
        "keys", f"listener 127.0.0.1:{port}", f"listener 127.0.0.1:{port}: certificate or users_file", f"{sending}: login",
        "account wrong", "account open: password", "account away", "account untrusted", "account nokey: keys",
        "account nokey: maildir", "account nokey"}
    assert "another program" in found[f"listener 127.0.0.1:{port}"]
    assert "0644" in found["account open: password"]
    assert "certificate" in found["account untrusted"]
    assert "refused the login" in found["account wrong"]
    assert "you alone can read it" in findings["account nokey: readers"]["text"]


@pytest.mark.parametrize(("sections", "expected"), [
    ('[outgoing.upstream]\nhots = "x"\nport = 70000\n', ["outgoing.upstream.hots", "outgoing.upstream.port"]),
    ("[nonsense", ["is not TOML"]),
    ('[outgoing.upstream]\nhost = "a.example"\nsecurity = "none"\nusername = "x"\n',
     ["outgoing.upstream.security", "outgoing.upstream.password_file"]),
    (upstream(25, None) + rule("require", ["*@secret.example"]), ["outgoing.rules.1.recipients: '*@secret.example'"]),
])
def test_a_wrong_configuration(home: Home, sections: str, expected: list[str]) -> None:
    """Every fault at once with file and key, and exit code 2, as `malote run` would have."""
    home.configure(sections)
    done = home.malote("check")
    assert done.returncode == ExitCode.CONFIG
    for text in expected:
        assert f"{home.config}: {text}".encode() in done.stdout


def test_no_configuration(home: Home) -> None:
    done = home.malote("check")
    assert done.returncode == ExitCode.CONFIG
    assert b"there is no such file" in done.stdout


def test_secrets_stay_out_of_it(home: Home, lab: Lab, postfix: Postfix, dovecot: Dovecot) -> None:
    """People paste what `malote check` says into reports."""
    home.secret("wrong", "s3cr3t-pass")
    home.configure(listener(free_port()) + upstream(postfix.submission_port, lab.certificate)
                   + account(ANNA, dovecot.imaps_port, lab.certificate, home, password="wrong"))
    home.keys("new", ANNA, "--algorithm", "ed25519")
    done = home.malote("check")
    assert done.returncode == ExitCode.CHECK
    assert b"s3cr3t" not in done.stdout + done.stderr


def test_a_server_without_move_says_one_watcher_only(home: Home, lab: Lab) -> None:
    """Two watchers there would leave two copies of each mail."""
    dovecot = lab.dovecot([ANNA], extra="imap_capability = IMAP4rev1 SASL-IR IDLE LITERAL+\n")
    home.configure("[outgoing]\nenabled = false\n" + account(ANNA, dovecot.imaps_port, lab.certificate, home))
    home.keys("new", ANNA, "--algorithm", "ed25519")
    _, findings = checked(home)
    assert "one watcher only" in findings["account box: server"]["text"]
    assert findings["account box: server"]["state"] == "warning"


@pytest.mark.parametrize(("days_left", "state"), [(60, State.OK), (29, State.WARNING), (-1, State.FAULT)])
def test_cards_are_warned_of_before_they_end(days_left: int, state: State) -> None:
    """An expired card means that nobody can seal mail to its owner: it is said a month before."""
    now = now_ms()
    life_ms = describe(new_identity(ANNA, SignatureAlgorithm.ED25519, now).card, own=True)["usable_until_ms"] - now
    card = new_identity(ANNA, SignatureAlgorithm.ED25519, now - life_ms + days_left * 86_400_000).card
    finding = probes.card_lifetime(card)
    assert finding.state is state
    assert state is State.OK or "rotate" in finding.cure


@pytest.mark.parametrize(("days", "state"), [(60, State.OK), (10, State.WARNING), (40_000, State.OK)])
def test_certificates_are_warned_of_before_they_end(tmp_path: Path, days: int, state: State,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """Both forms of dates that certificates have: two digits for the year up to 2049, four after."""
    certificate, _ = make_certificate(tmp_path, days=days)
    assert probes.certificate_lifetime("certificate", certificate).state is state
    ended = time.time() + (days + 1) * 86_400
    monkeypatch.setattr("malote.cli.probes.time.time", lambda: ended)
    assert probes.certificate_lifetime("certificate", certificate).state is State.FAULT


async def test_a_clock_that_went_back(tmp_path: Path) -> None:
    """What the store has written down, and what lies in the mailbox, must not be from later than now."""
    store = await Store.open(tmp_path / "store")
    now = now_ms()
    assert [each.state async for each in probes.clock_probe(store, {})] == [State.WARNING]
    assert [each.state async for each in probes.clock_probe(store, {"box": now - 5_000})] == [State.OK]
    assert [each.state async for each in probes.clock_probe(store, {"box": now + 3_600_000})] == [State.FAULT]
    store.log_outcome(OutcomeEntry(at_ms=now + 3_600_000, direction="out", outcome="sealed"))
    await store.flush()
    assert [each.state async for each in probes.clock_probe(store, {"box": now})] == [State.FAULT]
    await store.close()


def overseen(home: Home, lab: Lab, postfix: Postfix, metrics: int, more: str = "") -> Path:
    path = home.root / "audit.jsonl"
    home.configure(f'[audit]\nfile = "{path}"\n{more}[metrics]\nport = {metrics}\n'
                   + listener(free_port(), 'auth = "none"') + upstream(postfix.submission_port, lab.certificate))
    return path


def test_metrics_and_audit_log_are_tried(home: Home, lab: Lab, postfix: Postfix) -> None:
    """Before the first start, while the daemon runs, and after it; nothing is made or written by asking."""
    port = free_port()
    path = overseen(home, lab, postfix, port)
    home.keys("new", ANNA, "--algorithm", "ed25519")
    _, findings = checked(home)
    assert faults(findings) == {}
    assert findings[f"metrics 127.0.0.1:{port}"]["text"] == "is free"
    assert "can be made" in findings["audit log"]["text"]
    assert not path.exists()
    with home.daemon() as daemon:
        _, findings = checked(home)
        assert findings[f"metrics 127.0.0.1:{port}"]["text"] == "malote answers there now"
        assert "no line yet" in findings["audit log"]["text"]
        assert daemon.stop() == 0
    asyncio.run(write_audit(path))
    before = path.read_bytes()
    _, findings = checked(home)
    assert faults(findings) == {}
    assert "last 30 lines are whole" in findings["audit log"]["text"]
    assert path.read_bytes() == before


async def write_audit(path: Path, count: int = 30, **more: int) -> None:
    log = AuditLog(AuditConfig(file=path, **more))
    await log.write([lambda number=number: {"i": number} for number in range(count)])
    await log.close()


@pytest.mark.parametrize(("harm", "text"), [
    (lambda path: path.write_bytes(path.read_bytes().replace(b'"i":7,', b'"i":8,')), "line 8 was changed"),
    (lambda path: path.write_bytes(path.read_bytes()[:200]), "the end is missing"),
    (lambda path: path.write_bytes(b""), "the end is missing"),
    (lambda path: head_path(path).unlink(), "its head is missing"),
    (lambda path: head_path(path).write_bytes(b"x"), "its head is damaged"),
    (lambda path: (path.rename(path.with_name("b")), path.symlink_to("b")), "cannot be opened for writing"),
    (lambda path: (path.unlink(), path.mkdir()), "cannot be opened for writing"),
])
async def test_an_audit_log_that_is_not_whole(tmp_path: Path, harm: Callable[[Path], object], text: str) -> None:
    path = tmp_path / "a"
    await write_audit(path)
    assert [each.state async for each in audit_probe(path, required=True)] == [State.OK]
    harm(path)
    [finding] = [each async for each in audit_probe(path, required=True)]
    assert finding.state is State.FAULT
    assert text in finding.text
    assert finding.cure


async def test_an_audit_log_that_was_just_rotated_and_a_long_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    await write_audit(path, rotate_bytes=1000)
    assert path.stat().st_size == 0
    [finding] = [each async for each in audit_probe(path, required=True)]
    assert (finding.state, "after line 30" in finding.text) == (State.OK, True)
    await write_audit(path, 50)
    monkeypatch.setattr("malote.cli.oversight_probes.END_BYTES", 2000)
    [finding] = [each async for each in audit_probe(path, required=True)]
    assert finding.state is State.OK
    assert 5 < int(finding.text.split("last ")[1].split()[0]) < 50


def test_metrics_ports_and_directories_that_are_not_ours(home: Home, lab: Lab, postfix: Postfix) -> None:
    """Also the second worker's port; and a directory of the audit log that is not there."""
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        overseen(home, lab, postfix, port - 1)
        home.config.write_text("[service]\nworkers = 2\n"
                               + home.config.read_text().replace("audit.jsonl", "missing/audit.jsonl"))
        home.keys("new", ANNA, "--algorithm", "ed25519")
        code, findings = checked(home)
    assert code == ExitCode.CHECK
    found = faults(findings)
    assert found[f"metrics 127.0.0.1:{port}"] == "another program listens there"
    assert "no directory" in found["audit log"]


def test_a_fault_of_a_probe_hides_neither_the_others_nor_itself(
    home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:
    """Everything is tried, whatever failed before; what an unexpected exception says may be private and stays unsaid."""
    async def broken(*_: object) -> Findings:
        raise RuntimeError("hunter2")
        yield

    monkeypatch.setattr("malote.cli.check.crypto_probe", broken)
    home.configure(listener(free_port()) + upstream(1, None))
    assert main(["--config", str(home.config), "check", "--json"]) == ExitCode.CHECK
    said = capsys.readouterr()
    findings = [json.loads(line) for line in said.out.splitlines()]
    assert [found["text"] for found in findings if found["what"] == "cryptography"] == ["could not be tried: RuntimeError"]
    assert "clock" in {found["what"] for found in findings}
    assert "hunter2" not in said.out + said.err
