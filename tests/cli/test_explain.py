"""`malote explain` as somebody types it. That it tells the truth is shown in tests/outgoing/test_explain.py."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from lab.daemon import Home
from malote.errors import ExitCode

ANNA, BEN = "anna@a.example", "ben@b.example"


@pytest.fixture(scope="module")
def anna(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """Anna with the card of Ben, and a rule."""
    root: Path = tmp_path_factory.mktemp("people")
    anna, ben = Home(root / "anna"), Home(root / "ben")
    for home in (anna, ben):
        home.configure("""
[outgoing.upstream]
host = "mx.a.example"
[[outgoing.rules]]
recipients = ["@b.example"]
seal = "require"
""")
    anna.keys("new", ANNA, "--algorithm", "ed25519")
    ben.keys("new", BEN, "--algorithm", "ed25519")
    ben.keys("export", BEN, "-o", str(root / "ben.card"))
    anna.keys("import", str(root / "ben.card"))
    return anna


def test_for_people(anna: Home) -> None:
    done = anna.malote("explain", "--from", ANNA, "--to", f"{BEN},x@else.example", "--to", "y@b.example")
    assert done.returncode == 0, done.stderr
    text = done.stdout.decode()
    assert "ben@b.example: sealed" in text
    assert "rule 1 (@b.example): require; there is a card" in text
    fingerprint = re.search(r"\d{5}( \d{5}){5}", anna.keys("show", BEN))
    assert fingerprint is not None
    assert f"card of ben@b.example, fingerprint {fingerprint[0]}" in text
    assert "imported from" in text, "which source decided"
    assert "x@else.example: as it is, not sealed" in text
    assert "y@b.example: refused" in text
    assert "No key for y@b.example" in text
    assert "nothing would be sent: 550 5.7.1 Sealed for ben@b.example, but clear for x@else.example" in text
    assert b"without a message" in done.stderr


def test_of_a_file_for_scripts(anna: Home, tmp_path: Path) -> None:
    file = tmp_path / "mail"
    file.write_bytes(f"From: Anna <{ANNA}>\r\nTo: {BEN}\r\nSubject: the secret subject\r\n\r\nthe secret text\r\n".encode())
    done = anna.malote("explain", "--json", str(file))
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["sender"] == ANNA
    assert told["signer"]["address"] == ANNA
    assert told["refusal"] == ""
    assert told["copies"] == [{"kind": "visible", "sealed": True, "recipients": [BEN]}]
    [answer] = told["recipients"]
    assert (answer["recipient"], answer["action"], answer["rule"], answer["at"]) == (BEN, "seal", 1, "DATA")
    assert answer["asked_by"] == ["card"]
    assert answer["card"]["address"] == BEN
    assert b"secret" not in done.stdout + done.stderr
    assert anna.malote("explain", "--json", "--to", BEN, "-", stdin=file.read_bytes()).stdout == done.stdout


@pytest.mark.parametrize(("arguments", "words"), [
    ((), b"--from"), (("--from", ANNA), b"--to"), (("--from", "nobody", "--to", BEN), b""), (("-",), b"")])
def test_what_cannot_be_explained_is_said(anna: Home, arguments: tuple[str, ...], words: bytes) -> None:
    done = anna.malote("explain", *arguments, stdin=b"Subject: no author\r\n\r\n")
    assert done.returncode in (ExitCode.CONFIG, ExitCode.FAILED)
    assert done.stderr.startswith(b"malote: ")
    assert words in done.stderr
    assert b"Traceback" not in done.stderr
    assert done.stdout == b""
