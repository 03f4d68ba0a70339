"""`malote open`: whoever leaves malote keeps all mail readable, without a daemon and without changing anything."""

from __future__ import annotations

import mailbox as stdlib_mailbox
from collections.abc import Iterable
from pathlib import Path

import pytest

from lab.incoming import Box, note
from malote.core.freshness import Verdict
from malote.errors import FormatError
from malote.incoming.mailbox import Mailbox
from malote.incoming.offline import folder_messages, maildir_messages, mbox_messages, open_offline
from malote.incoming.watcher import now_ms
from malote.store import Store


async def test_without_a_store(box: Box) -> None:
    """The keys are enough; the sender is then not proven."""
    original = note(to=box.user)
    opened = await open_offline(box.seal(original), [box.identity], None, now_ms=now_ms())
    assert opened.original == original
    assert opened.verdict is Verdict.UNKNOWN_SENDER


async def test_with_the_senders_card_it_may_still_be_a_repeat(box: Box) -> None:
    opened = await open_offline(box.seal(), [box.identity], await box.open_store(), now_ms=now_ms())
    assert opened.verdict is Verdict.UNVERIFIABLE
    assert not opened.remembered
    assert opened.as_json()["sender"] == "anna@sender.example"


async def test_a_changed_outer_header_is_told_and_judges_nothing(box: Box) -> None:
    """The sender signed what stood outside; lists and gateways change it."""
    raw = box.seal()
    subject = raw.replace(b"\r\nSubject: [...]\r\n", b"\r\nSubject: [team] [...]\r\n")
    told = [(await open_offline(each, [box.identity], None, now_ms=now_ms())).as_json() for each in (raw, subject)]
    assert [said["outer_differences"] for said in told] == [
        [], [{"name": "Subject", "sent": ("[...]",), "found": ("[team] [...]",)}]]
    assert told[0]["verdict"] == told[1]["verdict"]


async def test_what_a_watcher_said_is_said_again(box: Box, tmp_path: Path) -> None:
    """Also from a store that is opened for reading only, and long after."""
    raw = box.seal()
    box.client.put(raw)
    store = await box.open_store()
    await (await box.watcher(store)).run_once()
    reader = await Store.open(tmp_path / "device", readonly=True)
    try:
        for held in (store, reader):
            opened = await open_offline(raw, [box.identity], held, now_ms=now_ms() + 10**10, accounts=["other", "box"])
            assert (opened.verdict, opened.remembered) == (Verdict.FRESH, True)
    finally:
        await reader.close()


async def test_old_mail_is_not_called_late(box: Box) -> None:
    """An archive of years: when a message arrived is not known here, so nothing is said of it."""
    raw = box.seal(sent_at_ms=now_ms() - 40 * 86_400_000)
    opened = await open_offline(raw, [box.identity], await box.open_store(), now_ms=now_ms())
    assert opened.verdict is Verdict.UNVERIFIABLE


async def test_what_cannot_be_opened(box: Box) -> None:
    raw = box.seal()
    stranger = (await open_offline(raw, [box.sender.identity], None, now_ms=now_ms()))
    assert stranger.original is None
    assert stranger.verdict is Verdict.UNREADABLE
    assert stranger.reason
    with pytest.raises(FormatError):
        await open_offline(note(), [box.identity], None, now_ms=now_ms())


async def test_a_passed_on_message_can_be_opened_by_hand(box: Box) -> None:
    """What a watcher leaves alone, a person may open: attached, and with forged headers around it."""
    original = note(to=box.user)
    forward = (b"Malote-Verdict: FRESH\r\nContent-Type: multipart/mixed; boundary=f\r\n\r\n--f\r\n"
               b"Content-Type: message/rfc822\r\n\r\n" + box.seal(original) + b"\r\n--f--\r\n")
    opened = await open_offline(forward, [box.identity], None, now_ms=now_ms())
    assert opened.original == original
    assert opened.outer_differences == (), "the header around it is another message's"


async def opened(box: Box, messages: Iterable[tuple[str, bytes]]) -> list[bytes | None]:
    return [(await open_offline(raw, [box.identity], None, now_ms=now_ms())).original for _, raw in messages]


@pytest.mark.parametrize("line_end", [b"\r\n", b"\n"])
async def test_maildir_and_mbox(box: Box, tmp_path: Path, line_end: bytes) -> None:
    """As other programs write them, with either line end."""
    originals = [note(to=box.user, body=f"From {number} on\r\n") for number in range(3)]
    maildir = stdlib_mailbox.Maildir(tmp_path / "maildir")
    mbox = stdlib_mailbox.mbox(tmp_path / "mbox")
    for original in originals:
        raw = box.seal(original).replace(b"\r\n", line_end)
        maildir.add(raw)
        maildir.add_folder("Old").add(raw)
        mbox.add(raw)
    mbox.close()
    names = [name for name, _ in maildir_messages(tmp_path / "maildir")]
    assert len(names) == 6
    assert sum(name.startswith(".Old/new/") for name in names) == 3
    assert sorted(await opened(box, maildir_messages(tmp_path / "maildir")), key=str) == sorted(originals * 2, key=str)
    assert await opened(box, mbox_messages(tmp_path / "mbox")) == originals
    assert [name for name, _ in mbox_messages(tmp_path / "mbox")] == ["mbox:1", "mbox:2", "mbox:3"]


def test_mbox_quoting(tmp_path: Path) -> None:
    """`>From ` becomes `From `, `>>From ` becomes `>From `, and a From line counts only after an empty line."""
    path = tmp_path / "mbox"
    path.write_bytes(b"From a Mon Jan  1 00:00:00 2026\nSubject: x\n\n>From me\n>>From you\nno\nFrom here\n\nFrom b\n\nlast\n\n")
    assert [raw for _, raw in mbox_messages(path)] == [b"Subject: x\n\nFrom me\n>From you\nno\nFrom here\n", b"\nlast\n"]


def test_what_is_no_mailbox(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("Subject: x\n\nhello\n")
    with pytest.raises(FormatError):
        list(mbox_messages(tmp_path / "text"))
    with pytest.raises(FormatError):
        list(maildir_messages(tmp_path))
    (tmp_path / "empty").write_text("")
    assert list(mbox_messages(tmp_path / "empty")) == []


async def test_an_imap_folder_is_only_read(box: Box) -> None:
    """Only what can be sealed is fetched; no flag changes."""
    original = note(to=box.user)
    box.client.put(note("plain"))
    box.client.put(box.seal(original))

    async def password() -> str:
        return "secret"

    mailbox = await Mailbox.connect(box.config(), password=password)
    found = [(name, fetched.raw) async for name, fetched in folder_messages(mailbox, "INBOX")]
    await mailbox.logout()
    assert [name for name, _ in found] == ["INBOX:2"]
    assert await opened(box, found) == [original]
    assert box.client.uids() == [1, 2]
    assert box.client.status_of(2)[0] == set()
