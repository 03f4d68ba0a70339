"""One message: opened, delivered and verified before its original goes, whatever it holds and wherever it is to go."""

from __future__ import annotations

import os
import re
import stat
import uuid
from email import message_from_bytes
from email.header import decode_header, make_header
from pathlib import Path

import pytest
import structlog

from lab.incoming import QUARANTINE, SEALED, Box, Client, limited, note, verdict, verdicts
from lab.servers import Lab
from malote.incoming import scan
from malote.incoming.delivery import carriable, same_message
from malote.incoming.mailbox import Mailbox
from malote.incoming.watcher import now_ms
from malote.store import OutcomeEntry, Store


async def outcomes(store: Store) -> list[OutcomeEntry]:
    await store.flush()
    return await store.recent_outcomes()


async def test_a_sealed_message_is_replaced_by_its_original(box: Box) -> None:
    """The opened copy is the outer Received lines, our headers and the original, byte for byte; the sealed one is kept."""
    original = note(to=box.user, more="In-Reply-To: <first@sender.example>\r\nReferences: <first@sender.example>\r\n")
    sealed = box.seal(original)
    box.client.put(sealed)
    await (await box.watcher(await box.open_store())).run_once()
    [raw] = box.client.fetch()
    [message] = box.client.messages()
    assert raw.startswith(sealed.split(b"\r\n")[0] + b"\r\nMalote-Verdict: FRESH;")
    assert raw.endswith(original)
    assert verdict(message) == "FRESH"
    assert str(make_header(decode_header(message["Subject"]))) == "Grüße"
    assert message["References"] == "<first@sender.example>"
    assert box.client.fetch(SEALED) == [sealed]
    assert box.client.uids(QUARANTINE) == []


async def test_flags_and_date_are_those_of_the_original(box: Box) -> None:
    box.client.put(box.seal(), flags="(\\Seen \\Flagged $Work)", date="05-Nov-2026 08:09:10 +0100")
    box.client.put(box.seal())
    await (await box.watcher(await box.open_store())).run_once()
    first, second = box.client.uids()
    assert box.client.status_of(first) == ({"\\Seen", "\\Flagged", "$Work"}, "05-Nov-2026 07:09:10 +0000")
    assert box.client.status_of(second)[0] == set()


async def test_plain_mail_stays_untouched(box: Box) -> None:
    box.client.put(note("plain"))
    uids = box.client.uids()
    await (await box.watcher(await box.open_store())).run_once()
    assert box.client.uids() == uids
    assert verdicts(box.client.messages()) == ["None"]


ODD = {
    "nul": b"From: anna@sender.example\r\nSubject: odd\r\n\r\na\0b\r\n",
    "bare cr": b"From: anna@sender.example\r\nSubject: odd\r\n\r\na\rb\r\n",
    "bare cr in header": b"From: anna@sender.example\r\nSubject: odd\rbad\r\n\r\nab\r\n",
}


@pytest.mark.parametrize("kind", ODD)
async def test_what_imap_cannot_carry_is_attached(box: Box, kind: str) -> None:
    """A NUL or a lone CR: a small message with the original, every byte of it, as a file."""
    box.client.put(box.seal(ODD[kind]))
    await (await box.watcher(await box.open_store())).run_once()
    [message] = box.client.messages()
    text, attached = message.get_payload()
    assert "exactly as it was written" in text.get_payload()
    assert attached.get_payload(decode=True) == ODD[kind]
    assert message["From"] == "anna@sender.example"
    assert len(box.client.uids(SEALED)) == 1


PLAIN_ENDINGS = {
    "bare lf": b"From: anna@sender.example\nSubject: odd\n\nline\nline\n",
    "no final newline": b"From: anna@sender.example\r\nSubject: odd\r\n\r\nline",
    "8 bit and long": b"From: anna@sender.example\r\nSubject: odd\r\n\r\n" + bytes(range(128, 256)) * 40 + b"\r\n",
    "no header": b"\r\nonly a body\r\n",
    "no header at all": b"nothing that is a header\r\n",
    "begins in a field": b" folded\r\nFrom: anna@sender.example\r\n\r\nx\r\n",
    "empty": b"",
}


@pytest.mark.parametrize("kind", PLAIN_ENDINGS)
async def test_odd_originals_are_delivered_as_they_are(box: Box, kind: str) -> None:
    """Equal but for line ends, which IMAP servers normalise."""
    original = PLAIN_ENDINGS[kind]
    assert carriable(original) is original
    box.client.put(box.sender.seal_odd(original, box.identity))
    await (await box.watcher(await box.open_store())).run_once()
    [raw] = box.client.fetch()
    assert verdict(message_from_bytes(raw)) in {"FRESH", "NOT-FOR-ME"}
    assert raw.replace(b"\r\n", b"\n").endswith(original.replace(b"\r\n", b"\n"))
    assert len(box.client.uids(SEALED)) == 1


async def test_a_large_message(box: Box) -> None:
    """Opened in a thread; the bytes are the same."""
    original = note(to=box.user) + os.urandom(3_000_000).hex().encode() + b"\r\n"
    box.client.put(box.seal(original))
    await (await box.watcher(await box.open_store())).run_once()
    assert box.client.fetch()[0].endswith(original)


def rewritten(raw: bytes, how: str) -> bytes:
    """What gateways and lists make of a sealed message; none leaves our header."""
    raw = re.sub(rb"\r\nMalote: 1(?=\r\n)", b"", raw)
    match how:
        case "types":
            return re.sub(rb"application/vnd\.malote\.[a-z-]+(; kid=[0-9a-f]+)?", b"application/octet-stream", raw)
        case "footer":
            boundary = re.search(rb'boundary="([^"]+)"', raw)[1]        # type: ignore[index]
            inner = raw[raw.index(b"MIME-Version"):]
            return (b"From: list@y.example\r\nSubject: [list] [...]\r\nMIME-Version: 1.0\r\n"
                    b"Content-Type: multipart/mixed; boundary=list\r\n\r\n--list\r\n" + inner
                    + b"\r\n--list\r\nContent-Type: text/plain\r\n\r\nfooter about " + boundary + b"\r\n--list--\r\n")
        case "quoted-printable":
            raw = re.sub(rb"=+(?=\r\n--)", lambda found: b"=3D" * len(found[0]), raw)
            return raw.replace(b"Content-Transfer-Encoding: base64", b"Content-Transfer-Encoding: quoted-printable")
        case _:
            return raw


@pytest.mark.parametrize("how", ["header only", "types", "footer", "quoted-printable"])
async def test_rewritten_messages_are_found(box: Box, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """The header that makes the search easy is gone; the first bytes of the attachments say what it is."""
    raw = rewritten(box.seal(), how)
    assert b"\nMalote:" not in raw
    box.client.put(raw)
    monkeypatch.setattr(scan, "PEEK_ALL", 20)
    for _ in range(25):         # more than are looked at header by header: the server's search has to find it
        box.client.put(b"Subject: plain\r\n\r\nx\r\n")
    await (await box.watcher(await box.open_store())).run_once()
    assert verdicts(box.client.messages()).count("FRESH") == 1
    assert box.client.fetch(SEALED) == [raw]


async def test_one_hostile_message_never_stops_the_mailbox(box: Box) -> None:
    """Broken in every way that comes to mind, between two good ones."""
    good = box.seal()
    at = good.rindex(b"\r\n\r\n") + 4
    hostile = [
        b"Malote: 1\r\n\r\n", b"Malote: 1", b"Malote: 1\r\nContent-Type: multipart/mixed; boundary=\"\"\r\n\r\n--\r\n",
        good[:at] + b"iU1MUA0KGgo=\r\n", good[:at] + b"=" * 5000, good.replace(b"boundary=", b"boundary*0*=utf-8''", 1),
        b"Malote: 1\r\n" + b"X: y\r\n" * 5000 + b"\r\n", b"Malote: 1\r\n" + b"Subject: " + b"z" * 300_000 + b"\r\n\r\n",
        b"Malote: 1\r\nContent-Type: multipart/mixed; boundary=b\r\n\r\n" + b"--b\r\n\r\niU1MSw0KGgoAAA==\r\n" * 1000,
        good.replace(b"From:", b"From: x@y.example\r\nFrom:", 1).replace(b"Subject:", b"Subject: \xff\xfe\x80", 1),
    ]
    box.client.put(good)
    for raw in hostile:
        box.client.put(raw)
    box.client.put(box.seal())
    store = await box.open_store()
    await (await box.watcher(store)).run_once()
    assert verdicts(box.client.messages()).count("FRESH") == 2
    assert {entry.verdict for entry in await outcomes(store)} >= {"FRESH", "UNREADABLE"}
    await (await box.watcher(store)).run_once()
    assert verdicts(box.client.messages()).count("FRESH") == 2


async def test_a_fault_of_ours_is_one_unreadable_message(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    """Should a message set off a bug, it stays where it is and the others go on. The log has its class, never its text."""
    def faulty(raw: bytes) -> None:
        if b"X-Fault" in raw:
            raise RuntimeError(raw.decode(errors="replace"))
        return find_parts(raw)
    from malote.incoming import opening
    find_parts = opening.find_parts
    monkeypatch.setattr(opening, "find_parts", faulty)
    box.client.put(b"X-Fault: secret words\r\n" + box.seal())
    box.client.put(box.seal())
    with structlog.testing.capture_logs() as logs:
        await (await box.watcher(await box.open_store())).run_once()
    assert verdicts(box.client.messages()) == ["None", "FRESH"]
    assert "secret words" not in str(logs)
    assert "RuntimeError" in str(logs)


async def test_the_log_line_of_a_message(box: Box) -> None:
    """id, direction, outcome, verdict, time; no address unless the configuration says so, never content."""
    store = await box.open_store()
    box.client.put(box.seal(note("private subject", to=box.user)))
    with structlog.testing.capture_logs() as logs:
        await (await box.watcher(store)).run_once()
    [line] = [entry for entry in logs if entry["event"] == "message"]
    assert line["direction"] == "in"
    assert line["outcome"] == "opened"
    assert line["verdict"] == "FRESH"
    assert len(bytes.fromhex(line["id"])) == 16
    assert isinstance(line["ms"], int)
    assert "@" not in str(logs)
    assert "private subject" not in str(logs)
    [entry] = await outcomes(store)
    assert entry.message_id == line["id"]


async def test_folder_delivery(box: Box) -> None:
    """Opened mail goes to a folder that remote mail cannot enter, with flags and date; nothing of it is in the INBOX."""
    box.client.put(box.seal(), flags="(\\Flagged)", date="05-Nov-2026 08:09:10 +0000")
    box.client.put(note("plain"))
    await (await box.watcher(await box.open_store(), deliver="folder", deliver_folder="Verified/Mail")).run_once()
    assert verdicts(box.client.messages("Verified/Mail")) == ["FRESH"]
    assert box.client.status_of(box.client.uids("Verified/Mail")[0]) == ({"\\Flagged"}, "05-Nov-2026 08:09:10 +0000")
    assert verdicts(box.client.messages()) == ["None"]
    assert len(box.client.uids(SEALED)) == 1


async def test_maildir_delivery(box: Box, tmp_path: Path) -> None:
    """Files 0600 in directories 0700, LF line ends, flags and time kept; a read message is in cur, a new one in new."""
    directory = tmp_path / "private" / "mail"
    original = note(to=box.user)
    box.client.put(box.seal(original), flags="(\\Seen \\Answered)", date="05-Nov-2026 08:09:10 +0000")
    box.client.put(box.seal(ODD["nul"]))
    await (await box.watcher(await box.open_store(), deliver="maildir", maildir=directory)).run_once()
    [read], [new] = list((directory / "cur").iterdir()), list((directory / "new").iterdir())
    assert read.name.endswith(":2,RS")
    assert read.read_bytes().endswith(original.replace(b"\r\n", b"\n"))
    assert int(read.stat().st_mtime) == 1793866150
    assert new.read_bytes().endswith(b"Subject: odd\n\na\0b\n")
    for path in (directory, directory / "new", directory / "cur", directory / "tmp"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in (read, new)} == {0o600}
    assert box.client.uids() == []
    assert len(box.client.uids(SEALED)) == 2


async def test_full_disk_under_a_maildir_keeps_the_original(box: Box, tmp_path: Path) -> None:
    """What cannot be written stays sealed on the server and is tried again later."""
    directory = tmp_path / "mail"
    directory.write_text("in the way")
    store = await box.open_store()
    box.client.put(box.seal())
    await (await box.watcher(store, deliver="maildir", maildir=directory)).run_once()
    assert len(box.client.uids()) == 1
    assert [(entry.outcome, entry.detail) for entry in await outcomes(store)] == [("failed", "DISK")]
    directory.unlink()
    await (await box.watcher(store, deliver="maildir", maildir=directory)).run_once()
    assert len(box.client.uids()) == 1, "not before its time"
    await (await box.watcher(store, deliver="maildir", maildir=directory, clock=lambda: now_ms() + 61_000)).run_once()
    assert box.client.uids() == []
    [file] = (directory / "new").iterdir()
    assert verdict(message_from_bytes(file.read_bytes())) == "FRESH"


async def test_over_quota_keeps_the_original(lab: Lab, tmp_path: Path) -> None:
    """NO [OVERQUOTA] to APPEND: the original stays, shows in the log, and is opened once there is room."""
    user = f"{uuid.uuid4().hex}@test.example"
    box = Box(lab.dovecot([user], extra=limited("messages=3")), tmp_path, user)
    store = await box.open_store()
    for _ in range(2):
        box.client.put(note("filler"))
    box.client.put(box.seal())
    await (await box.watcher(store)).run_once()
    assert verdicts(box.client.messages()) == ["None"] * 3
    assert [(entry.outcome, entry.verdict, entry.detail) for entry in await outcomes(store)] == [("failed", "FRESH", "OVERQUOTA")]
    box.client.select()
    box.client.imap.uid("STORE", "1", "+FLAGS", "\\Deleted")
    box.client.imap.expunge()
    await (await box.watcher(store, clock=lambda: now_ms() + 3_600_000)).run_once()
    assert verdicts(box.client.messages()) == ["None", "FRESH"]
    assert len(box.client.uids(SEALED)) == 1
    await box.close()


async def test_a_copy_that_the_server_alters_is_not_trusted(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Cyrus does with 8-bit headers: the copy is compared, taken back, and delivered in a form that survives."""
    append_many = Mailbox.append_many

    async def altering(self: Mailbox, folder: object, items: object) -> object:
        changed = [(raw.replace("grün".encode(), b"grXXn"), flags, date) for raw, flags, date in items]     # type: ignore[attr-defined]
        return await append_many(self, folder, changed)     # type: ignore[arg-type]

    monkeypatch.setattr(Mailbox, "append_many", altering)
    original = note(to=box.user, body="grün\r\n")
    box.client.put(box.seal(original))
    await (await box.watcher(await box.open_store())).run_once()
    [message] = box.client.messages()
    assert verdict(message) == "FRESH"
    assert message.get_payload()[1].get_payload(decode=True) == original
    assert len(box.client.uids(SEALED)) == 1


async def test_flags_set_while_the_message_is_opened_are_kept(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    """A person reads or flags the sealed message in the moment between: the opened copy has it."""
    append_many = Mailbox.append_many

    async def meanwhile(self: Mailbox, folder: object, items: object) -> object:
        answer = await append_many(self, folder, items)     # type: ignore[arg-type]
        box.client.select()
        box.client.imap.uid("STORE", "1", "+FLAGS", "(\\Seen \\Flagged)")
        box.client.imap.uid("STORE", "1", "-FLAGS", "\\Answered")
        return answer

    monkeypatch.setattr(Mailbox, "append_many", meanwhile)
    box.client.put(box.seal(), flags="(\\Answered)")
    await (await box.watcher(await box.open_store())).run_once()
    [uid] = box.client.uids()
    assert box.client.status_of(uid)[0] == {"\\Seen", "\\Flagged"}


@pytest.mark.parametrize("action", ["move", "delete"])
async def test_an_original_that_a_person_takes_away_meanwhile(box: Box, monkeypatch: pytest.MonkeyPatch, action: str) -> None:
    """Moved or deleted between APPEND and MOVE: our verified copy stays, and nothing comes a second time."""
    append_many = Mailbox.append_many

    async def meanwhile(self: Mailbox, folder: object, items: object) -> object:
        answer = await append_many(self, folder, items)     # type: ignore[arg-type]
        other = Client(box.dovecot.port, box.user)
        other.select()
        if action == "move":
            assert other.move(1, "Drafts")
        else:
            other.imap.uid("STORE", "1", "+FLAGS", "\\Deleted")
            other.imap.uid("EXPUNGE", "1")
        other.close()
        return answer

    monkeypatch.setattr(Mailbox, "append_many", meanwhile)
    store = await box.open_store()
    box.client.put(box.seal())
    await (await box.watcher(store)).run_once()
    assert verdicts(box.client.messages()) == ["FRESH"]
    monkeypatch.undo()
    await (await box.watcher(store)).run_once()
    assert verdicts(box.client.messages()) == ["FRESH"]
    assert box.client.uids(SEALED) == []


async def test_a_copy_that_a_person_files_at_once_is_found(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client's filter moves the new message before we have looked at it again: it counts, and is not delivered twice."""
    append_many = Mailbox.append_many

    async def meanwhile(self: Mailbox, folder: object, items: object) -> object:
        answer = await append_many(self, folder, items)     # type: ignore[arg-type]
        other = Client(box.dovecot.port, box.user)
        other.select()
        assert other.move(2, "Drafts")
        other.close()
        return answer

    monkeypatch.setattr(Mailbox, "append_many", meanwhile)
    store = await box.open_store()
    box.client.put(box.seal())
    await (await box.watcher(store)).run_once()
    assert box.client.uids() == []
    assert verdicts(box.client.messages("Drafts")) == ["FRESH"]
    assert len(box.client.uids(SEALED)) == 1


@pytest.mark.parametrize("missing", [{"MOVE"}, {"UIDPLUS"}, {"MOVE", "UIDPLUS"}])
async def test_servers_without_move_or_uidplus(box: Box, monkeypatch: pytest.MonkeyPatch, missing: set[str]) -> None:
    """COPY and expunge instead of MOVE; the mark instead of APPENDUID."""
    connect = Mailbox.connect

    async def connected(*arguments: object, **options: object) -> Mailbox:
        mailbox = await connect(*arguments, **options)      # type: ignore[arg-type]
        mailbox._protocol.capabilities -= missing
        return mailbox

    monkeypatch.setattr(Mailbox, "connect", connected)
    store = await box.open_store()
    for _ in range(3):
        box.client.put(box.seal())
    with structlog.testing.capture_logs() as logs:
        await (await box.watcher(store)).run_once()
    assert verdicts(box.client.messages()) == ["FRESH"] * 3
    assert len(box.client.uids(SEALED)) == 3
    assert any("only one watcher" in line["event"] for line in logs)
    await (await box.watcher(store)).run_once()
    assert verdicts(box.client.messages()) == ["FRESH"] * 3
    assert box.client.uids(QUARANTINE) == []


def test_equal_but_for_line_ends() -> None:
    assert same_message(b"a\r\nb\r\n", b"a\nb\n")
    assert not same_message(b"a\r\nb\r\n", b"a\nb")
    assert not same_message(b"a\r\nX\r\n", b"a\r\nx\r\n")
