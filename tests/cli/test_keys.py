"""`malote keys`, as somebody types it: real store, real files, real terminal where a passphrase is asked for."""

from __future__ import annotations

import asyncio
import fcntl
import io
import json
import os
import pty
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from cryptography.exceptions import UnsupportedAlgorithm

from malote.cli.main import cli, main
from malote.core.card import armor, make_card, parse_armored
from malote.core.identity import Identity, new_identity, rotate
from malote.core.keyring import KeyringKey, open_backup, unlock_identity
from malote.core.keys import SignatureAlgorithm
from malote.store import Store

NOW_MS = 1_790_000_000_000
ANNA, BERT, CARL = "anna@example.org", "bert@example.org", "carl@example.org"
PASSPHRASE = b"correct horse"


@dataclass
class Done:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@dataclass
class Person:
    """Somebody with a configuration, a key file and a store of their own."""

    root: Path
    run: Callable[..., Done]

    def __post_init__(self) -> None:
        self.root.mkdir(mode=0o700)
        self.key_file = self.root / "passphrase"
        self.key_file.touch(0o600)
        self.key_file.write_bytes(PASSPHRASE + b"\n")
        self.config = self.root / "malote.toml"
        self.configure(f'unlock = "file"\nfile = "{self.key_file}"')

    def configure(self, keys: str) -> None:
        self.config.write_text(f'[store]\npath = "{self.root / "store"}"\n[keys]\n{keys}\n')

    def keys(self, *arguments: object, stdin: bytes = b"") -> Done:
        return self.run("--config", self.config, "keys", *arguments, stdin=stdin)

    def ok(self, *arguments: object, stdin: bytes = b"") -> Done:
        done = self.keys(*arguments, stdin=stdin)
        assert (done.code, "malote: hint" in done.err) == (0, False), done.err
        return done

    def identity(self, address: str) -> Identity:
        """The private half, read from the store with the passphrase alone."""
        async def read() -> Identity:
            store = await Store.open(self.root / "store", readonly=True)
            try:
                keyring = KeyringKey.from_header(await store.keyring_header() or b"", PASSPHRASE)
                record = next(record for record in await store.identities() if record.address == address)
                return unlock_identity(keyring, address, record.locked)
            finally:
                await store.close()
        return asyncio.run(read())

    def held(self) -> list[tuple[str, str, int, str]]:
        return [(e["address"], e["fingerprint"], e["sequence"], e["level"]) for e in self.ok("list", "--json").json]

    def secret(self, name: str, content: bytes) -> Path:
        path = self.root / name
        path.touch(0o600)
        path.write_bytes(content)
        return path


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """The real entry point, in this process."""
    def command(*arguments: object, stdin: bytes = b"") -> Done:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return Done(code, captured.out, captured.err)
    return command


@pytest.fixture
def anna(tmp_path: Path, run: Callable[..., Done]) -> Person:
    return Person(tmp_path / "anna", run)


@pytest.fixture
def other(tmp_path: Path, run: Callable[..., Done]) -> Person:
    return Person(tmp_path / "other", run)


def card_file(directory: Path, identity: Identity, name: str = "card.txt") -> Path:
    path = directory / name
    path.write_text(armor(identity.card))
    return path


def person(address: str = BERT) -> Identity:
    return new_identity(address, SignatureAlgorithm.ED25519, NOW_MS)


# --- own keys


def test_new_list_show_export(anna: Person) -> None:
    made = anna.ok("new", "Anna@Example.org")
    assert ANNA in made.out
    assert "backup" in made.err
    entry = anna.ok("show", "--json").json[0]
    assert (entry["address"], entry["own"], entry["algorithm"], entry["expired"]) == (ANNA, True, "ed25519+ml-dsa-65", False)
    listed = anna.ok("list")
    assert listed.out.split()[:2] == [ANNA, "own"]
    assert entry["fingerprint"] in listed.out
    [card] = parse_armored(anna.ok("export", ANNA).out)
    assert (card.address, card.fingerprint, card.verify.id.hex()) == (ANNA, entry["fingerprint"], entry["signing_key"])
    output = anna.root / "card.txt"
    exported = anna.ok("export", ANNA, "-o", output)
    assert (exported.out, parse_armored(output.read_bytes())) == ("", [card])


def test_export_without_an_address_means_the_only_identity(anna: Person) -> None:
    """With none, or with several, it says what to do instead of choosing."""
    done = anna.keys("export")
    assert (done.code, done.out, "malote keys new" in done.err) == (5, "", True)
    anna.ok("new", ANNA)
    [card] = parse_armored(anna.ok("export").out)
    assert card.address == ANNA
    anna.ok("new", BERT)
    done = anna.keys("export")
    assert (done.code, done.out) == (2, "")
    assert ANNA in done.err
    assert BERT in done.err


def test_the_code_is_dark_on_light_on_any_terminal(anna: Person) -> None:
    """Its blocks are the light modules: where the terminal writes dark on light, many cameras could not read it."""
    anna.ok("new", ANNA)
    arguments = ["--config", str(anna.config), "keys", "show"]
    coloured = CliRunner().invoke(cli, arguments, color=True).output
    rows = [line for line in coloured.splitlines() if "\N{FULL BLOCK}" in line]
    assert len(rows) >= 17
    assert all(line.startswith("\x1b[97m\x1b[40m") and line.endswith("\x1b[0m") for line in rows)
    assert "\x1b" not in anna.ok("show").out


def test_private_keys_are_locked_in_the_store(anna: Person) -> None:
    """What lies on the disk opens with the passphrase, and shows nothing without it."""
    anna.ok("new", ANNA, "--algorithm", "ed25519")
    identity = anna.identity(ANNA)
    data = b"".join(path.read_bytes() for path in (anna.root / "store").iterdir())
    assert ANNA.encode() in data
    for secret in (identity.signing.seeds, identity.decryption[0].seed):
        assert secret not in data
        assert secret.hex().encode() not in data
    assert PASSPHRASE not in data


def test_show_draws_the_whole_key_id(anna: Person) -> None:
    """30 digits for people, and a QR code of everything for a program."""
    anna.ok("new", ANNA)
    shown = anna.ok("show", ANNA)
    lines = shown.out.splitlines()
    assert any(len(word) == 5 and word.isdigit() for word in lines[1].split())
    assert sum(set(line) <= set(" ▀▄█") and len(line) > 30 for line in lines) >= 17


def test_gateway_and_second_identity(anna: Person) -> None:
    """The keyring is made once; the second identity is locked under the same passphrase."""
    anna.ok("new", "@Example.org", "--algorithm", "ed25519")
    anna.ok("new", ANNA)
    assert [entry[0] for entry in anna.held()] == ["@example.org", ANNA]
    assert anna.identity("@example.org").card.scope == "gateway"
    assert anna.identity(ANNA).card.scope == "user"


def test_new_does_not_replace(anna: Person, tmp_path: Path) -> None:
    anna.ok("new", ANNA)
    before = anna.held()
    again = anna.keys("new", ANNA)
    assert (again.code, "rotate" in again.err) == (5, True)
    anna.ok("import", card_file(tmp_path, person()))
    foreign = anna.keys("new", BERT)
    assert (foreign.code, "other keys" in foreign.err) == (5, True)
    assert anna.held() == before + [entry for entry in anna.held() if entry[0] == BERT]


@pytest.mark.parametrize("address", ["anna", "Anna <anna@example.org>", "anna@example.org ", "anna@@example.org"])
def test_new_refuses_what_is_no_address(anna: Person, address: str) -> None:
    done = anna.keys("new", address)
    assert (done.code, done.out) == (1, "")
    assert not (anna.root / "store").exists()


def test_rotate_keeps_old_keys(anna: Person) -> None:
    anna.ok("new", ANNA)
    old = anna.identity(ANNA)
    rotated = anna.ok("rotate", ANNA, "--json").json
    new = anna.identity(ANNA)
    assert (rotated["sequence"], rotated["fingerprint"]) == (2, old.card.fingerprint)
    assert new.decryption[1:] == old.decryption
    assert parse_armored(anna.ok("export", ANNA).out) == [new.card]
    changed = anna.ok("rotate", ANNA, "--signing", "--json").json
    assert changed["fingerprint"] != rotated["fingerprint"]
    assert len(anna.identity(ANNA).decryption) == 3
    missing = anna.keys("rotate", BERT)
    assert (missing.code, "no keys of your own" in missing.err) == (5, True)


def test_remove(anna: Person, tmp_path: Path) -> None:
    anna.ok("new", ANNA)
    anna.ok("import", card_file(tmp_path, person()))
    assert anna.keys("remove", BERT).code == 0
    assert anna.keys("remove", BERT).code == 5
    refused = anna.keys("remove", ANNA)
    assert (refused.code, "--identity" in refused.err) == (5, True)
    assert anna.keys("remove", CARL, "--identity", "--yes").code == 5
    for answer, code in ((b"yes\n", 5), (b"", 130), (b"anna@example.org\n", 0)):
        assert [entry[0] for entry in anna.held()] == [ANNA]
        assert anna.keys("remove", ANNA, "--identity", stdin=answer).code == code
    assert anna.held() == []
    anna.ok("new", ANNA)
    assert anna.keys("remove", ANNA, "--identity", "--yes").code == 0
    assert anna.held() == []


def test_things_that_are_not_there(anna: Person) -> None:
    assert (anna.keys("list").code, anna.keys("list", "--json").out.strip()) == (0, "[]")
    assert "malote keys new" in anna.keys("list").err
    for arguments in (("show",), ("show", ANNA), ("export", ANNA), ("backup", anna.root / "b")):
        done = anna.keys(*arguments)
        assert (done.code, done.out) == (5, ""), arguments
        assert done.err.startswith("malote: ")
    assert not (anna.root / "b").exists()


# --- import


def test_import_of_several_cards_and_mails(anna: Person, tmp_path: Path) -> None:
    bert, carl = person(BERT), person(CARL)
    mail = tmp_path / "mail.eml"
    mail.write_bytes(b"From: carl@example.org\r\n\r\nHello,\r\n" + armor(carl.card).replace("\n", "\r\n").encode())
    done = anna.ok("import", card_file(tmp_path, bert), mail)
    assert done.out.splitlines() == [f"new {BERT}  {bert.card.fingerprint}", f"new {CARL}  {carl.card.fingerprint}"]
    assert "compare the digits" in done.err
    assert anna.held() == [(BERT, bert.card.fingerprint, 1, "TOFU"), (CARL, carl.card.fingerprint, 1, "TOFU")]
    assert parse_armored(anna.ok("export", CARL).out) == [carl.card]


def test_import_from_standard_input(anna: Person) -> None:
    done = anna.ok("import", "-", "--json", stdin=b"> " + armor(person().card).replace("\n", "\n> ").encode())
    assert [(entry["state"], entry["address"]) for entry in done.json] == [("new", BERT)]
    assert [entry[0] for entry in anna.held()] == [BERT]


def test_import_again_and_updates(anna: Person, tmp_path: Path) -> None:
    """What the owner signed is taken without asking: a new encryption key, or a new signing key that the old one vouches for."""
    first = person()
    steps = [(first, "new"), (first, "unchanged")]
    steps += [(second := rotate(first, NOW_MS + 1), "updated"), (rotate(second, NOW_MS + 2, signing=True), "updated")]
    for identity, state in steps:
        done = anna.ok("import", card_file(tmp_path, identity), "--json")
        assert [entry["state"] for entry in done.json] == [state]
    assert anna.held()[0][2] == 3


def test_a_card_that_the_held_one_did_not_sign(anna: Person, tmp_path: Path) -> None:
    """The heart of it: both fingerprints are shown, nothing changes, and only --replace takes it."""
    held, impostor = person(), person()
    anna.ok("import", card_file(tmp_path, held))
    before = anna.held()
    attack = card_file(tmp_path, impostor, "attack.txt")
    done = anna.keys("import", attack)
    assert done.code == 5
    assert done.out == ""
    assert held.card.fingerprint in done.err
    assert impostor.card.fingerprint in done.err
    assert "--replace" in done.err
    assert str(attack) in done.err
    assert anna.held() == before
    replaced = anna.ok("import", attack, "--replace")
    assert replaced.out == f"replaced {BERT}  {impostor.card.fingerprint}\n"
    assert anna.held() == [(BERT, impostor.card.fingerprint, 1, "TOFU")]


def test_an_older_card_does_not_come_back(anna: Person, tmp_path: Path) -> None:
    old = person()
    anna.ok("import", card_file(tmp_path, rotate(old, NOW_MS + 1)))
    done = anna.keys("import", card_file(tmp_path, old))
    assert (done.code, "older" in done.err) == (5, True)
    assert anna.held()[0][2] == 2


BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "no card"),
    "prose": (b"hello", "no card"),
    "cut": (armor(person(CARL).card)[:700].encode(), "cut off"),
    "damaged": (armor(person(CARL).card).replace("ey", "eY").encode(), ""),
    "binary": (bytes(range(256)) * 100, "no card"),
    "misleading": (armor(person(CARL).card).replace("Address: carl", "Address: cora").encode(), "do not belong"),
}


@pytest.mark.parametrize("name", BAD)
def test_one_bad_file_and_nothing_changes(anna: Person, tmp_path: Path, name: str) -> None:
    """All files are checked before anything is written, whatever their order."""
    content, words = BAD[name]
    bad = tmp_path / "bad.txt"
    bad.write_bytes(content)
    good = card_file(tmp_path, person())
    for files in ((good, bad), (bad, good)):
        done = anna.keys("import", *files)
        assert (done.code, done.out) == (5, "")
        assert str(bad) in done.err
        assert words in done.err
        assert "nothing was imported" in done.err
    assert anna.held() == []


def test_a_refused_card_beside_good_ones_changes_nothing(anna: Person, tmp_path: Path) -> None:
    anna.ok("import", card_file(tmp_path, person()))
    before = anna.held()
    done = anna.keys("import", card_file(tmp_path, person(CARL), "c.txt"), card_file(tmp_path, person(), "b.txt"))
    assert done.code == 5
    assert anna.held() == before


def test_two_cards_for_one_address_in_one_import(anna: Person, tmp_path: Path) -> None:
    """The second is checked against the first."""
    done = anna.keys("import", card_file(tmp_path, person(), "1.txt"), card_file(tmp_path, person(), "2.txt"))
    assert (done.code, anna.held()) == (5, [])
    first = person()
    both = anna.ok("import", card_file(tmp_path, first, "1.txt"), card_file(tmp_path, rotate(first, NOW_MS), "2.txt"), "--json")
    assert [entry["state"] for entry in both.json] == ["new", "updated"]


def test_missing_file(anna: Person, tmp_path: Path) -> None:
    done = anna.keys("import", card_file(tmp_path, person()), tmp_path / "none.txt")
    assert done.code == 2
    assert "No such file" in done.err
    assert "Traceback" not in done.err
    assert anna.held() == []


def test_own_identity_is_not_replaced_by_a_card(anna: Person, tmp_path: Path) -> None:
    """Not even with --replace: mail to oneself would be sealed to somebody else."""
    anna.ok("new", ANNA)
    before = anna.held()
    for option in ([], ["--replace"]):
        done = anna.keys("import", card_file(tmp_path, person(ANNA)), *option)
        assert (done.code, "your own" in done.err) == (5, True)
    assert anna.ok("import", "-", "--json", stdin=anna.ok("export", ANNA).out.encode()).json[0]["state"] == "unchanged"
    assert anna.held() == before


def test_expired_card_says_so(anna: Person, tmp_path: Path) -> None:
    bert = person()
    card = make_card(bert.signing, BERT, bert.card.encryption, sequence=1, made_at_ms=1, expires_at_ms=2)
    path = tmp_path / "old.txt"
    path.write_text(armor(card))
    assert "has expired" in anna.ok("import", path).err
    assert "expired" in anna.ok("list").out


# --- backup and restore


def test_backup_restores_everything_elsewhere(anna: Person, other: Person, tmp_path: Path) -> None:
    anna.ok("new", ANNA)
    anna.ok("rotate", ANNA)
    anna.ok("rotate", ANNA, "--signing")
    anna.ok("new", "@example.org", "--algorithm", "ed25519")
    anna.ok("import", card_file(tmp_path, person()))
    backup, secret = tmp_path / "backup.txt", anna.secret("backup-passphrase", b"another passphrase")
    anna.ok("backup", backup, "--passphrase-file", secret)
    assert stat.S_IMODE(backup.stat().st_mode) == 0o600
    assert PASSPHRASE not in backup.read_bytes()
    assert len(open_backup(backup.read_bytes(), b"another passphrase").identities) == 2
    done = other.ok("restore", backup, "--passphrase-file", other.secret("s", b"another passphrase\n"), "--json")
    assert [(entry["address"], entry["own"], entry["state"]) for entry in done.json] == [
        ("@example.org", True, "new"), (ANNA, True, "new"), (BERT, False, "new"),
    ]
    for address in ("@example.org", ANNA):
        assert other.identity(address) == anna.identity(address)
    assert len(other.identity(ANNA).decryption) == 3
    assert other.held() == anna.held()


def test_backup_does_not_overwrite(anna: Person, tmp_path: Path) -> None:
    anna.ok("new", ANNA)
    target = tmp_path / "backup.txt"
    target.write_text("something of value")
    done = anna.keys("backup", target, "--passphrase-file", anna.key_file)
    assert (done.code, target.read_text()) == (5, "something of value")


def backup_of(who: Person) -> bytes:
    return who.ok("backup", "-", "--passphrase-file", who.key_file).out.encode()


def test_restore_keeps_what_is_newer(anna: Person) -> None:
    """An old backup adds nothing and takes nothing; it never brings an old card back."""
    anna.ok("new", ANNA)
    old = backup_of(anna)
    anna.ok("rotate", ANNA)
    before, cards = anna.identity(ANNA), anna.held()
    done = anna.ok("restore", "-", "--passphrase-file", anna.key_file, stdin=old)
    assert done.out == f"unchanged {ANNA}  (your own keys)\n"
    assert (anna.identity(ANNA), anna.held()) == (before, cards)


def test_restore_takes_what_is_newer_and_keeps_every_key(anna: Person, other: Person) -> None:
    """Two machines rotated apart: afterwards each key that somebody may have sealed to is there."""
    anna.ok("new", ANNA)
    other.ok("restore", "-", "--passphrase-file", other.key_file, stdin=backup_of(anna))
    other.ok("rotate", ANNA)
    lone = other.identity(ANNA)
    anna.ok("rotate", ANNA)
    anna.ok("rotate", ANNA)
    done = other.ok("restore", "-", "--passphrase-file", other.key_file, "--json", stdin=backup_of(anna))
    assert done.json[0]["state"] == "updated"
    merged = other.identity(ANNA)
    assert merged.card == anna.identity(ANNA).card
    assert set(merged.decryption) == set(anna.identity(ANNA).decryption) | set(lone.decryption)
    older = anna.ok("restore", "-", "--passphrase-file", anna.key_file, "--json", stdin=backup_of(other))
    assert older.json[0]["state"] == "keys added"
    assert set(anna.identity(ANNA).decryption) == set(merged.decryption)


def test_restore_of_unrelated_keys_needs_replace(anna: Person, other: Person, tmp_path: Path) -> None:
    anna.ok("new", ANNA)
    other.ok("new", ANNA)
    other.ok("import", card_file(tmp_path, person()))
    before, saved = anna.identity(ANNA), backup_of(other)
    done = anna.keys("restore", "-", "--passphrase-file", anna.key_file, stdin=saved)
    assert (done.code, done.out) == (5, "")
    assert before.card.fingerprint in done.err
    assert other.identity(ANNA).card.fingerprint in done.err
    assert anna.identity(ANNA) == before
    assert [entry[0] for entry in anna.held()] == [ANNA]        # the card of Bert was not taken either
    anna.ok("restore", "-", "--passphrase-file", anna.key_file, "--replace", stdin=saved)
    after = anna.identity(ANNA)
    assert after.card == other.identity(ANNA).card
    assert before.decryption[0] in after.decryption


def test_restore_where_a_card_of_the_address_is_held(anna: Person, other: Person, tmp_path: Path) -> None:
    anna.ok("new", ANNA)
    other.ok("import", card_file(tmp_path, person(ANNA)))
    before = other.held()
    done = other.keys("restore", "-", "--passphrase-file", other.key_file, stdin=backup_of(anna))
    assert (done.code, other.held()) == (5, before)
    other.ok("restore", "-", "--passphrase-file", other.key_file, "--replace", stdin=backup_of(anna))
    assert other.identity(ANNA) == anna.identity(ANNA)


def test_restore_leaves_newer_and_chosen_cards(anna: Person, other: Person, tmp_path: Path) -> None:
    bert, carl = person(BERT), person(CARL)
    anna.ok("new", ANNA)
    anna.ok("import", card_file(tmp_path, bert, "b"), card_file(tmp_path, carl, "c"))
    saved = backup_of(anna)
    other.ok("import", card_file(tmp_path, rotate(bert, NOW_MS + 1), "b"), card_file(tmp_path, person(CARL), "c"))
    before = other.held()
    done = other.ok("restore", "-", "--passphrase-file", other.key_file, "--json", stdin=saved).json
    assert [entry["state"] for entry in done] == ["new", "kept", "kept"]
    assert [entry for entry in other.held() if entry[0] != ANNA] == before


def test_bad_backups_change_nothing(anna: Person, other: Person) -> None:
    anna.ok("new", ANNA)
    saved = backup_of(anna)
    wrong = other.secret("wrong", b"wrong")
    for content, passphrase, code, words in (
        (saved, wrong, 5, "wrong passphrase"), (b"hello", other.key_file, 1, "not a backup"),
        (saved[:900], other.key_file, 1, "cut off"),
        (saved.replace(b"AAA", b"AAB", 1).replace(b"a", b"b", 40), other.key_file, 1, ""),
    ):
        done = other.keys("restore", "-", "--passphrase-file", passphrase, stdin=content)
        assert (done.code, done.out) == (code, ""), done.err
        assert words in done.err
        assert "Traceback" not in done.err
    assert not (other.root / "store").exists()


# --- the passphrase


def test_key_file_must_be_private(anna: Person) -> None:
    for mode in (0o644, 0o640, 0o660, 0o700, 0o606):
        anna.key_file.chmod(mode)
        done = anna.keys("new", ANNA)
        assert (done.code, f"{mode:04o}" in done.err, "chmod 600" in done.err) == (5, True, True)
    assert anna.held() == []
    anna.key_file.chmod(0o400)
    anna.ok("new", ANNA)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_key_file_must_be_ones_own(anna: Person) -> None:
    os.chown(anna.key_file, 65534, -1)
    done = anna.keys("new", ANNA)
    assert (done.code, "another user" in done.err) == (5, True)


def test_wrong_passphrase(anna: Person) -> None:
    anna.ok("new", ANNA)
    before = anna.held()
    anna.key_file.write_bytes(b"wrong")
    for arguments in (("new", BERT), ("rotate", ANNA), ("backup", anna.root / "b", "--passphrase-file", anna.key_file)):
        done = anna.keys(*arguments)
        assert (done.code, "wrong passphrase" in done.err) == (5, True)
    assert (anna.held(), (anna.root / "b").exists()) == (before, False)


@pytest.mark.parametrize(("content", "words"), [
    (b"", "empty"), (b"\n", "empty"), (b"x" * 5000, "longer"), (None, "No such file"),
])
def test_bad_key_files(anna: Person, content: bytes | None, words: str) -> None:
    if content is None:
        anna.key_file.unlink()
    else:
        anna.key_file.write_bytes(content)
    done = anna.keys("new", ANNA)
    assert (done.code, words in done.err, done.out) == (5, True, "")


def test_systemd_credential(anna: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    anna.configure('unlock = "credential"\ncredential = "mail-keys"')
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    assert "CREDENTIALS_DIRECTORY" in anna.keys("new", ANNA).err
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(anna.root))
    assert "No such file" in anna.keys("new", ANNA).err
    anna.secret("mail-keys", PASSPHRASE)
    anna.ok("new", ANNA)
    assert anna.identity(ANNA).address == ANNA
    (anna.root / "mail-keys").chmod(0o644)
    assert anna.keys("rotate", ANNA).code == 5
    anna.configure('unlock = "credential"\ncredential = "../anna/mail-keys"')
    assert "not the name" in anna.keys("rotate", ANNA).err


def on_terminal(anna: Person, arguments: list[str], answers: list[str]) -> Done:
    """The command as a process of its own on a terminal, on which each prompt gets the next answer."""
    master, slave = pty.openpty()
    command = ["setsid", "-c", sys.executable, "-m", "malote", "--config", str(anna.config), "keys", *arguments]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    process = subprocess.Popen(command, stdin=slave, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    os.close(slave)
    shown = b""
    try:
        for answer in answers:
            while not shown.endswith(b": "):
                shown += os.read(master, 1000)
            os.write(master, answer.encode() + b"\n")
            shown += b"|"
        out, err = process.communicate(timeout=60)
    finally:
        os.close(master)
        process.kill()
        process.wait()
    assert all(answer.encode() not in shown for answer in answers)      # nothing typed is shown
    return Done(process.returncode, out.decode(), err.decode())


def test_prompt_asks_twice_for_a_new_passphrase_and_once_later(anna: Person) -> None:
    anna.configure('unlock = "prompt"')
    differing = on_terminal(anna, ["new", ANNA], ["correct horse", "wrong horse"])
    assert (differing.code, "differ" in differing.err) == (5, True)
    made = on_terminal(anna, ["new", ANNA], ["correct horse", "correct horse"])
    assert made.code == 0, made.err
    assert anna.identity(ANNA).card.sequence == 1
    assert on_terminal(anna, ["rotate", ANNA], ["wrong horse"]).code == 5
    assert on_terminal(anna, ["rotate", ANNA], ["correct horse"]).code == 0
    assert anna.identity(ANNA).card.sequence == 2


def test_prompt_without_a_terminal(anna: Person) -> None:
    """A service, cron: says what to configure instead of waiting for ever. The passphrase is never taken from stdin."""
    anna.configure('unlock = "prompt"')
    command = ["setsid", "-w", sys.executable, "-m", "malote", "--config", str(anna.config), "keys", "new", ANNA]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "MALOTE_PASSPHRASE": "x"}
    done = subprocess.run(command, input=b"x\nx\n", capture_output=True, env=environment, check=False)
    assert done.returncode == 5
    assert b"no terminal" in done.stderr
    assert b"keys.unlock" in done.stderr


# --- the frame


def test_a_second_command_at_once_is_refused(anna: Person) -> None:
    """Two first `new` at once could each make a keyring and lock the other's keys out."""
    anna.ok("new", ANNA)
    handle = os.open(anna.root / "store", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    done = anna.keys("rotate", ANNA)
    assert (done.code, "another malote keys command" in done.err) == (6, True)
    assert anna.keys("list").code == 0
    os.close(handle)
    anna.ok("rotate", ANNA)


def test_missing_configuration_and_wrong_usage(run: Callable[..., Done], tmp_path: Path) -> None:
    missing = run("--config", tmp_path / "none.toml", "keys", "list")
    assert (missing.code, "there is no such file" in missing.err, missing.out) == (2, True, "")
    for arguments in (["keys", "bogus"], ["bogus"], ["keys", "new"], ["--bogus"]):
        done = run(*arguments)
        assert (done.code, done.out) == (2, "")
        assert done.err.startswith("malote: ")
        assert "--help" in done.err


def test_version_and_help(run: Callable[..., Done]) -> None:
    assert run("--version").out.startswith("malote ")
    shown = run("keys", "--help")
    assert shown.code == 0
    for command in ("new", "list", "show", "export", "import", "remove", "rotate", "backup", "restore"):
        assert f"  {command} " in shown.out


def test_internal_errors_show_no_text(run: Callable[..., Done], anna: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text of an unexpected exception may quote keys or mail."""
    def broken(*_: object) -> None:
        raise RuntimeError(" ".join(["secret", "text"]))

    monkeypatch.setattr("malote.cli.keys.new_identity", broken)
    done = anna.keys("new", ANNA)
    assert (done.code, "secret text" in done.err, "RuntimeError" in done.err) == (1, False, True)


def test_library_without_post_quantum(anna: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    """No command on keys does anything then; it says what to install."""
    def unsupported(*_: object) -> None:
        raise UnsupportedAlgorithm("not supported by this backend")

    anna.ok("new", ANNA)
    monkeypatch.setattr("malote.core.primitives.load_mldsa_private", unsupported)
    done = anna.keys("list")
    assert (done.code, "post-quantum" in done.err, "cryptography 50" in done.err) == (2, True, True)
