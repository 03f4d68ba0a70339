"""Whoever leaves malote keeps all mail readable: `malote open --mailbox`, and `malote log` of what happened."""

from __future__ import annotations

import json
import time
from pathlib import Path

from lab.daemon import Home, account
from lab.incoming import Client
from lab.servers import Dovecot, Lab
from malote.errors import ExitCode

ANNA = "alice@test.example"


def test_a_mailbox_is_read_and_nothing_changed(home: Home, lab: Lab, dovecot: Dovecot, tmp_path: Path) -> None:
    """Opened by the daemon or not: both folders open offline. Flags, folders and the seen state are as before; what the daemon
    has delivered is said with its verdict, and a repeat of it is not called fresh."""
    user = f"leaving{time.monotonic_ns()}@test.example"
    dovecot.add_user(user)
    anna = Home(tmp_path / "anna")
    anna.configure("")
    home.configure("[outgoing]\nenabled = false\n" + account(user, dovecot.imaps_port, lab.certificate, home))
    exchange_cards(anna, home, user, tmp_path)
    client = Client(dovecot.port, user)
    first = seal(anna, user, "opened by the daemon")
    client.put(first)
    with home.daemon() as daemon:
        daemon.wait_for_log('"outcome": "opened"')
        assert daemon.stop() == 0
    client.put(first)       # the repeat that somebody sends while the daemon is off
    client.put(seal(anna, user, "never seen by the daemon"))
    client.put(b"From: a@b.example\r\nSubject: plain\r\n\r\nhello\r\n")
    before = state(client)
    log = home.malote("log", "--json").stdout

    out = tmp_path / "out"
    done = home.malote("open", "--mailbox", "box", "INBOX", "--output", str(out))
    assert done.returncode == 0, done.stderr
    said = done.stderr.decode()
    assert ": delivered before, then FRESH: " in said
    assert ": UNVERIFIABLE: " in said
    assert ": FRESH: " not in said, "a repeat shown as fresh"
    done = home.malote("open", "--mailbox", "box", "Malote/Sealed", "--output", str(out), "--json")
    assert done.returncode == 0, done.stderr
    (entry,) = (json.loads(line) for line in done.stderr.splitlines())
    assert entry["verdict"] == "FRESH"
    assert entry["remembered"] is True
    texts = sorted(path.read_text().split("\n\n")[1].strip() for path in (out / "new").iterdir())
    assert texts == ["never seen by the daemon", "opened by the daemon"]
    assert state(client) == before
    assert home.malote("log", "--json").stdout == log

    with home.daemon() as daemon:       # and the daemon still judges as if nobody had looked
        daemon.until(lambda: len(home.malote("log", "--json").stdout.splitlines()) == 3, "both judged")
        assert daemon.stop() == 0
    verdicts = [json.loads(line)["verdict"] for line in home.malote("log", "--json").stdout.splitlines()]
    assert sorted(verdicts) == ["DUPLICATE", "FRESH", "FRESH"]
    shown = home.malote("log", "-n", "2").stdout.decode()
    assert "DUPLICATE" in shown
    assert shown.count("box") == 2
    client.close()


def test_a_folder_that_is_not_there(home: Home, lab: Lab, dovecot: Dovecot, tmp_path: Path) -> None:
    """A clear text, no traceback."""
    home.configure("[outgoing]\nenabled = false\n" + account(ANNA, dovecot.imaps_port, lab.certificate, home))
    home.keys("new", ANNA, "--algorithm", "ed25519")
    done = home.malote("open", "--mailbox", "box", "Nowhere", "--output", str(tmp_path / "out"))
    assert done.returncode == ExitCode.FAILED
    assert done.stderr == b"malote: there is no folder Nowhere\n"


def exchange_cards(anna: Home, ben: Home, user: str, directory: Path) -> None:
    for home, address, other in ((anna, ANNA, ben), (ben, user, anna)):
        home.keys("new", address, "--algorithm", "ed25519")
        home.keys("export", address, "-o", str(directory / address))
        other.keys("import", str(directory / address))


def seal(sender: Home, to: str, text: str) -> bytes:
    done = sender.malote("seal", stdin=f"From: {ANNA}\r\nTo: {to}\r\nSubject: secret\r\n\r\n{text}\r\n".encode())
    assert done.returncode == 0, done.stderr
    return done.stdout


def state(client: Client) -> dict[str, list[tuple[int, frozenset[str], str]]]:
    found = {}
    for folder in ("INBOX", "Malote/Sealed", "Malote/Quarantine"):
        uids = client.uids(folder)
        found[folder] = [(uid, frozenset(flags), date) for uid in uids for flags, date in [client.status_of(uid)]]
    return found
