"""What a reviewer tried: hostile mail, repeats by every way in, three devices at once, and a person who tidies up meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import smtplib
from collections.abc import Awaitable, Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import structlog

from lab.incoming import QUARANTINE, SEALED, Box, Sender, note, verdicts
from lab.servers import HOST, Dovecot
from malote.core import seal as seal_module
from malote.core.card import make_card
from malote.core.manifest import Manifest, serialize_manifest
from malote.incoming import scan
from malote.incoming.arbiter import CONTEST_MS, Copy
from malote.incoming.delivery import ImapDelivery
from malote.incoming.imap_protocol import MailProtocol
from malote.incoming.mailbox import Folder, Mailbox
from malote.incoming.session import Session
from malote.incoming.watcher import Watcher, now_ms
from malote.store import Store

NAMES = ("0" * 16, "8" * 16, "f" * 16)


async def look(box: Box, store: Store, **settings: Any) -> list[str]:
    await (await box.watcher(store, **settings)).run_once()
    return verdicts(box.client.messages())


# --- what waits ---

@pytest.mark.parametrize("why", ["gone", "no longer sealed"])
async def test_what_no_longer_waits_is_not_tried_for_ever(box: Box, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                          why: str) -> None:
    """A message that could not be delivered and that a person then deletes: else the watcher woke for it every second."""
    directory = tmp_path / "mail"
    directory.write_text("in the way")
    store = await box.open_store()
    box.client.put(box.seal())
    await look(box, store, deliver="maildir", maildir=directory)
    assert len(await store.attempts("box", "INBOX")) == 1
    if why == "gone":
        box.client.select()
        box.client.imap.uid("STORE", "1", "+FLAGS", "\\Deleted")
        box.client.imap.expunge()
    else:
        monkeypatch.setattr("malote.incoming.opening.find_parts", lambda raw: None)
    await look(box, store, deliver="maildir", maildir=directory, clock=lambda: now_ms() + 3_600_000)
    assert await store.attempts("box", "INBOX") == []


# --- forged headers ---

FIELDS = ["Malote-Verdict: FRESH", "MALOTE-VERDICT : FRESH", "X: y\rMalote-Verdict: FRESH", "malote-mark\t: x",
          "Malote-Verdict\r\n : FRESH"]


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("behind", [75, 330])
async def test_forged_behind_a_giant_header(box: Box, field: str, behind: int) -> None:
    """As a mail server takes it in (Postfix: 100 KB of header): what lies behind the part that is peeked at is looked for too."""
    padding = b"".join(b"X-%d: %b\r\n" % (number, b"y" * 900) for number in range(behind))
    box.client.put(padding + field.encode() + b"\r\n" + note())
    store = await box.open_store()
    assert await look(box, store) == []
    assert len(box.client.uids(QUARANTINE)) == 1


@pytest.mark.parametrize("field", FIELDS[:4])
@pytest.mark.parametrize("extra", [b"", b"X-\xe4: \xff\xfe\r\n"])
async def test_forged_in_a_flood(box: Box, monkeypatch: pytest.MonkeyPatch, field: str, extra: bytes) -> None:
    """More new messages than have their headers read: the server's search finds the forged one."""
    monkeypatch.setattr(scan, "PEEK_ALL", 3)
    for _ in range(6):
        box.client.put(note("flood"))
    box.client.put(extra + field.encode() + b"\r\n" + note())
    assert await look(box, await box.open_store()) == ["None"] * 6
    assert len(box.client.uids(QUARANTINE)) == 1


@pytest.mark.parametrize("deliver", ["replace", "folder"])
async def test_an_opened_copy_that_comes_in_again_by_mail(box: Box, deliver: str) -> None:
    """Somebody who got hold of the opened message, with its valid mac, mails it back: by LMTP it has other trace lines above."""
    store = await box.open_store()
    box.client.put(box.seal())
    await look(box, store, deliver=deliver)
    folder = "INBOX" if deliver == "replace" else "Malote/Opened"
    [raw] = box.client.fetch(folder)
    with smtplib.LMTP(HOST, box.dovecot.lmtp_port) as lmtp:
        for again in (raw, raw[raw.index(b"Malote-Verdict"):], b"Subject: a wrapper\r\n" + raw):
            lmtp.sendmail("eve@evil.example", [box.user], again)
    await look(box, store, deliver=deliver)
    assert verdicts(box.client.messages(folder)) == ["FRESH"]
    assert len(box.client.uids()) == (1 if deliver == "replace" else 0)
    assert len(box.client.uids(QUARANTINE)) == 3


# --- repeats ---

def dressed(raw: bytes, how: str) -> bytes:
    """The same sealed parts under another appearance."""
    head, body = raw.split(b"\r\n\r\n", 1)
    match how:
        case "other header":
            kept = head[head.lower().index(b"content-type"):]
            return b"From: boss@bank.example\r\nSubject: pay\r\n" + kept + b"\r\n\r\n" + body
        case "more parts":
            boundary = body[body.index(b"\r\n--") + 2:].split(b"\r\n", 1)[0]
            return head + b"\r\n\r\n" + boundary + b"\r\n\r\nPlease pay now.\r\n" + body
        case "lf":
            return raw.replace(b"\r\n", b"\n")
    return raw


@pytest.mark.parametrize("deliver", ["replace", "folder", "maildir"])
@pytest.mark.parametrize("how", ["same", "other header", "more parts", "lf"])
async def test_a_repeat_in_any_dress(box: Box, tmp_path: Path, deliver: str, how: str) -> None:
    """Into every watched folder, with any header and with parts around it: never opened a second time."""
    store, raw = await box.open_store(), box.seal()
    settings = {"deliver": deliver, "maildir": tmp_path / "mail", "folders": ("INBOX", "Work")}
    box.client.imap.create("Work")
    box.client.put(raw)
    await look(box, store, **settings)
    box.client.put(dressed(raw, how))
    box.client.put(dressed(raw, how), "Work")
    await look(box, store, **settings)
    opened = len(list((tmp_path / "mail" / "new").iterdir())) if deliver == "maildir" else sum(
        verdict == "FRESH" for folder in ("INBOX", "Work", "Malote/Opened") for verdict in verdicts(box.client.messages(folder)))
    assert opened == 1
    assert len(box.client.uids(QUARANTINE)) == 2


async def test_a_repeat_after_the_store_was_lost(box: Box) -> None:
    """A new store and the cards imported anew; the server shows the old message as new and hides that it was opened."""
    raw = box.seal(sent_at_ms=now_ms() - 60_000)
    box.client.put(raw)
    assert await look(box, await box.open_store()) == ["FRESH"]
    box.client.imap.delete(SEALED)
    box.client.put(raw)
    store = await box.open_store("new", card=False)
    await box.trust(store, box.sender.identity, since_ms=now_ms())
    assert await look(box, store) == ["FRESH", "UNVERIFIABLE"]


async def test_a_repeat_after_what_was_remembered_expired(box: Box) -> None:
    """Or after the clock went a long way ahead and came back: what was forgotten is never fresh again."""
    store, raw = await box.open_store(), box.seal()
    box.client.put(raw)
    assert await look(box, store) == ["FRESH"]
    await store.expire(now_ms() + 500 * 86_400_000, 400)
    box.client.imap.delete(SEALED)
    box.client.put(raw)
    assert await look(box, store) == ["FRESH", "UNVERIFIABLE"]


@pytest.mark.parametrize("deliver", ["replace", "folder"])
async def test_the_same_mail_in_two_folders_under_two_devices(box: Box, deliver: str) -> None:
    """A copy in each of two folders, a device at each: both win their MOVE. At rest one opened copy is left."""
    late = [0]
    box.client.imap.create("Work")
    watchers = [await box.watcher(await box.open_store(name), device=name, deliver=deliver, folders=folders,
                                  clock=lambda: now_ms() + late[0])
                for name, folders in ((NAMES[0], ("INBOX", "Work")), (NAMES[2], ("Work", "INBOX")))]
    for watcher in watchers:
        await watcher.run_once()
    raw = box.seal()
    for folder in ("INBOX", "Work"):
        box.client.put(raw, folder)
    await asyncio.gather(*(watcher.run_once() for watcher in watchers))
    for _ in range(4):
        for watcher in watchers:
            await watcher.run_once()
        late[0] += CONTEST_MS + 1000
    opened = [verdict for folder in ("INBOX", "Work", "Malote/Opened") for verdict in verdicts(box.client.messages(folder))]
    assert opened == ["FRESH"]
    # Dovecot may let both devices move the same copy, so a sealed original may lie there more than once: never none.
    assert box.client.uids(SEALED)
    assert 2 <= len(box.client.uids(SEALED)) + len(box.client.uids(QUARANTINE)) <= 4


# --- verdicts that need a card's or a message's own limit ---

async def test_expired(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sender's own "do not act on this after"; nothing of ours writes it yet."""
    def with_expiry(manifest: Manifest) -> bytes:
        return serialize_manifest(replace(manifest, expires_at_ms=now_ms() - 1000))

    monkeypatch.setattr(seal_module, "serialize_manifest", with_expiry)
    box.client.put(box.seal(sent_at_ms=now_ms() - 60_000))
    assert await look(box, await box.open_store()) == ["EXPIRED"]


async def test_revoked(box: Box) -> None:
    """A card that no longer held when the message was signed."""
    old, now = box.sender.identity, now_ms()
    card = make_card(old.signing, old.address, old.card.encryption, sequence=2, made_at_ms=now - 3_000_000,
                     expires_at_ms=now - 1_000_000)
    box.sender.identity = replace(old, card=card)
    box.client.put(box.seal())
    assert await look(box, await box.open_store()) == ["REVOKED"]
    assert "revoked" in str(box.client.messages()[0]["Malote-Verdict"])


# --- three devices ---

def held(monkeypatch: pytest.MonkeyPatch, method: str, watcher: Watcher, until: asyncio.Event) -> asyncio.Event:
    """The next call of this mailbox method by this watcher waits; set when it has come there."""
    original, here = getattr(Mailbox, method), asyncio.Event()

    async def waiting(box: Mailbox, *arguments: Any) -> Any:
        if box._account is watcher.account:
            here.set()
            await until.wait()
        return await original(box, *arguments)

    monkeypatch.setattr(Mailbox, method, waiting)
    return here


def together(monkeypatch: pytest.MonkeyPatch, method: str, count: int) -> None:
    """The first calls of this mailbox method happen at the same moment, if so many come within half a second."""
    original, here, all_here = getattr(Mailbox, method), [0], asyncio.Event()

    async def waiting(box: Mailbox, *arguments: Any, **options: Any) -> Any:
        here[0] += 1
        if here[0] >= count:
            all_here.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.5):
                await all_here.wait()
        return await original(box, *arguments, **options)

    monkeypatch.setattr(Mailbox, method, waiting)


class Trio:
    """Three devices that have seen the folders before, and whose clocks can be put forward together."""

    def __init__(self, box: Box) -> None:
        self.box = box
        self.late = 0
        self.watchers: list[Watcher] = []

    async def start(self, names: tuple[str, ...]) -> None:
        for name in names:
            store = await self.box.open_store(name)
            self.watchers.append(await self.box.watcher(store, device=name, clock=lambda: now_ms() + self.late))
        for watcher in self.watchers:
            await watcher.run_once()

    def subjects(self) -> list[str]:
        return [str(message["Subject"]) for message in self.box.client.messages()]

    async def settle(self) -> list[str]:
        """What is left when every contest is over. All devices look at once."""
        for _ in range(5):
            await asyncio.gather(*(watcher.run_once() for watcher in self.watchers))
            self.late += CONTEST_MS + 1000
        return self.subjects()


async def original_taken_away(box: Box, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]) -> Trio:
    """A person files the original when all devices have their copies there: as many copies are left, and a contest."""
    trio = Trio(box)
    await trio.start(names)
    box.client.put(box.seal(note("contested", to=box.user)))
    filed = asyncio.Event()
    together(monkeypatch, "append_many", len(names))
    arrived = [held(monkeypatch, "move", watcher, filed) for watcher in trio.watchers]
    running = [asyncio.create_task(watcher.run_once()) for watcher in trio.watchers]
    for event in arrived:
        await event.wait()
    assert box.client.move(box.client.uids("INBOX", "HEADER Malote 1")[0], "Drafts")
    filed.set()
    await asyncio.gather(*running)
    monkeypatch.undo()
    assert trio.subjects() == ["contested"] * len(names), "for the moment"
    return trio


async def lost_race(box: Box, monkeypatch: pytest.MonkeyPatch) -> tuple[Trio, Callable[[], Awaitable[None]]]:
    """The first of two devices is about to find its MOVE lost: both copies are there. What is returned lets it go on."""
    trio = Trio(box)
    await trio.start((NAMES[0], NAMES[2]))
    loser, winner = trio.watchers
    box.client.imap.create("Filed")
    box.client.put(box.seal(note("contested", to=box.user)))
    won = asyncio.Event()
    together(monkeypatch, "append_many", 2)
    at_move = held(monkeypatch, "move", loser, won)
    losing, winning = asyncio.create_task(loser.run_once()), asyncio.create_task(winner.run_once())
    await at_move.wait()
    await winning

    async def go_on() -> None:
        won.set()
        await losing
        monkeypatch.undo()

    return trio, go_on


ORDERS = [(0, 1, 2), (1, 2, 0), (2, 0, 1)]


@pytest.mark.parametrize("order", ORDERS)
async def test_two_losers_and_a_winner_who_saw_their_copies(box: Box, monkeypatch: pytest.MonkeyPatch,
                                                            order: tuple[int, ...]) -> None:
    """Each loser sees the other's copy and takes its own back. Had the winner relied on one of those, nothing would be left."""
    trio = Trio(box)
    await trio.start(tuple(NAMES[number] for number in order))
    winner, first, second = trio.watchers
    box.client.put(box.seal(note("three", to=box.user)))
    won = asyncio.Event()
    first_at_move = held(monkeypatch, "move", first, won)
    second_at_move = held(monkeypatch, "move", second, won)
    held(monkeypatch, "append_many", second, first_at_move)
    losers = [asyncio.create_task(watcher.run_once()) for watcher in (second, first)]
    await first_at_move.wait()
    await second_at_move.wait()
    together(monkeypatch, "expunge", 2)
    await winner.run_once()
    won.set()
    await asyncio.gather(*losers)
    monkeypatch.undo()
    assert "three" in trio.subjects()
    assert await trio.settle() == ["three"]
    assert len(box.client.uids(SEALED)) == 1


@pytest.mark.parametrize("order", ORDERS)
async def test_an_original_taken_from_under_three_devices(box: Box, monkeypatch: pytest.MonkeyPatch,
                                                          order: tuple[int, ...]) -> None:
    """A person files the sealed message when all three have their copies there: one after the other yields, and not the last."""
    trio = await original_taken_away(box, monkeypatch, tuple(NAMES[number] for number in order))
    together(monkeypatch, "expunge", 2)
    assert await trio.settle() == ["contested"]


@pytest.mark.parametrize("name", NAMES[::2])
@pytest.mark.parametrize("way", ["trash", "deleted"])
async def test_a_copy_that_a_person_throws_away_is_not_the_one_that_stays(box: Box, monkeypatch: pytest.MonkeyPatch, name: str,
                                                                          way: str) -> None:
    """Somebody sees a message twice and deletes one: the program must not take the other one back for it."""
    trio = await original_taken_away(box, monkeypatch, (NAMES[0], NAMES[2]))
    [uid] = box.client.uids("INBOX", f'HEADER Malote-Mark "-{name}"')
    if way == "trash":
        box.client.imap.create("Trash")
        box.client.select()
        assert box.client.move(uid, "Trash")
    else:
        box.client.imap.uid("STORE", str(uid), "+FLAGS", "\\Deleted")
    await trio.settle()
    if way == "deleted":
        box.client.select()
        box.client.imap.expunge()
    assert trio.subjects() == ["contested"]


async def test_a_copy_yields_only_to_the_same(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other device died before it could see that the server had changed what it stored."""
    trio = await original_taken_away(box, monkeypatch, (NAMES[0], NAMES[2]))
    [uid] = box.client.uids("INBOX", f'HEADER Malote-Mark "-{NAMES[0]}"')
    raw = box.client.fetch()[box.client.uids().index(uid)]
    box.client.imap.uid("STORE", str(uid), "+FLAGS", "\\Deleted")
    box.client.imap.expunge()
    box.client.put(raw.replace(b"Guten Tag", b"Guten ???"))
    trio.watchers.pop(0)
    await trio.settle()
    assert any(b"Guten Tag" in found for found in box.client.fetch())


async def test_a_losers_copy_that_a_person_files_while_it_looks(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loser has looked into the other folder already when its own copy goes there, and so does not find it: not for good."""
    trio, go_on = await lost_race(box, monkeypatch)

    def file(name: str) -> None:
        [uid] = box.client.uids("INBOX", f'HEADER Malote-Mark "-{name}"')
        assert box.client.move(uid, "Filed")

    file(NAMES[2])
    copies_in, looks = ImapDelivery._copies_in, []

    async def filed_meanwhile(self: ImapDelivery, session: Session, folder: Folder, messages: Collection[str]) -> list[Copy]:
        looks.append(folder.name)
        if looks.count("INBOX") == 2 and looks[-1] == "INBOX":
            assert "Filed" in looks
            file(NAMES[0])
        return await copies_in(self, session, folder, messages)

    monkeypatch.setattr(ImapDelivery, "_copies_in", filed_meanwhile)
    await go_on()
    assert len(box.client.uids("Filed")) == 2, "for the moment"
    assert await trio.settle() == []
    assert [message["Subject"] for message in box.client.messages("Filed")] == ["contested"]


async def test_a_losers_copy_that_a_person_files_as_it_is_taken_back(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the loser's look and its withdrawal: it finds nothing there to take back, and comes to it later."""
    trio, go_on = await lost_race(box, monkeypatch)
    withdraw = ImapDelivery.withdraw

    async def filed_first(self: ImapDelivery, session: Session, copy: Copy, other: Copy | None = None) -> bool:
        box.client.select()
        assert box.client.move(copy.uid, "Filed")
        return await withdraw(self, session, copy, other)

    monkeypatch.setattr(ImapDelivery, "withdraw", filed_first)
    await go_on()
    assert len(box.client.uids("Filed")) == 1, "for the moment"
    await trio.settle()
    left = [str(message["Subject"]) for folder in ("INBOX", "Filed") for message in box.client.messages(folder)]
    assert left == ["contested"]


# --- many ---

@pytest.mark.parametrize("place", ["Drafts", "Trash", "Junk", "Malote", "Malote/Sealed", "Malote/Quarantine", "Filed"])
async def test_a_copy_that_moves_while_a_contest_is_looked_at(box: Box, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """A person moves the other device's copy from a folder that is not searched yet to one that was: it is seen nowhere, and
    the contest must not end with that."""
    trio = await original_taken_away(box, monkeypatch, (NAMES[0], NAMES[2]))
    theirs = box.client.uids("INBOX", f'HEADER Malote-Mark "{NAMES[0]}"')
    box.client.imap.create(place)
    list_folders = Mailbox.list_folders

    async def that_one_first(self: Mailbox) -> list[Folder]:
        return sorted(await list_folders(self), key=lambda folder: (folder.name != place, folder.name == "INBOX"))

    monkeypatch.setattr(Mailbox, "list_folders", that_one_first)
    looked: list[str] = []
    copies_in = ImapDelivery._copies_in

    async def moved_meanwhile(self: ImapDelivery, session: Session, folder: Folder, messages: Any) -> list[Copy]:
        found = await copies_in(self, session, folder, messages)
        looked.append(folder.name)
        if len(looked) == 1:
            box.client.select("INBOX")
            assert box.client.move(theirs[0], folder.name)
        return found

    monkeypatch.setattr(ImapDelivery, "_copies_in", moved_meanwhile)
    trio.late += CONTEST_MS + 1000
    await trio.watchers[1].run_once()
    assert looked[0] == place
    assert len(looked) > 1
    monkeypatch.undo()
    await trio.settle()
    left = [str(message["Subject"]) for folder in ("INBOX", place) for message in box.client.messages(folder)
            if message["Malote-Verdict"]]
    assert left == ["contested"]


@pytest.mark.parametrize("method", ["store_flags", "noop", "search"])
async def test_two_devices_that_yield_at_the_same_moment(box: Box, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """One that was asleep comes to its contest just when the other has waited for it long enough: each would leave the message
    to the other, and nothing would be left. Whatever they do at the same time, one copy stays."""
    trio = await original_taken_away(box, monkeypatch, (NAMES[0], NAMES[2]))
    trio.late += CONTEST_MS + 1000
    await trio.watchers[0].run_once()
    assert trio.subjects() == ["contested"] * 2
    trio.late += CONTEST_MS + 1000
    together(monkeypatch, method, 2)
    await asyncio.gather(*(watcher.run_once() for watcher in trio.watchers))
    assert trio.subjects()
    assert await trio.settle() == ["contested"]
    assert "\\Deleted" not in str(box.client.imap.uid("FETCH", str(box.client.uids()[0]), "(FLAGS)"))


@pytest.mark.parametrize("deliver", ["replace", "maildir"])
async def test_a_flood_of_repeats_is_fetched_once(box: Box, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                  deliver: str) -> None:
    """Somebody sends the same bytes again and again: each is fetched and opened once, not again for every other one."""
    raw, other = box.seal(), box.seal(note("other", to=box.user))
    for message in (*[raw] * 40, other, *[raw] * 40):
        box.client.put(message)
    fetched: list[int] = []
    fetch_many = Mailbox.fetch_many

    def counting(self: Mailbox, uids: Any, **options: Any) -> Any:
        wanted = list(uids)
        fetched.extend(wanted)
        return fetch_many(self, wanted, **options)

    monkeypatch.setattr(Mailbox, "fetch_many", counting)
    opened = await look(box, await box.open_store(), deliver=deliver, maildir=tmp_path / "mail")
    assert len(fetched) <= 81 + 2, "all, and the two opened copies"
    assert opened == (["FRESH"] * 2 if deliver == "replace" else [])
    assert len(box.client.uids(SEALED)) == 2
    assert len(box.client.uids(QUARANTINE)) == 79


async def test_repeats_of_what_could_not_be_delivered(box: Box, tmp_path: Path) -> None:
    """While the first waits for room, its repeats wait too; in the end one is opened, whichever comes first."""
    directory, store, raw = tmp_path / "mail", await box.open_store(), box.seal()
    directory.write_text("in the way")
    for _ in range(4):
        box.client.put(raw)
    await look(box, store, deliver="maildir", maildir=directory)
    assert len(box.client.uids()) == 4
    assert sorted(attempt.reason for attempt in await store.attempts("box", "INBOX")) == ["DISK"] + ["REPEAT"] * 3
    directory.unlink()
    await look(box, store, deliver="maildir", maildir=directory, clock=lambda: now_ms() + 3_600_000)
    assert box.client.uids() == []
    assert len(list((directory / "new").iterdir())) == 1
    assert len(box.client.uids(SEALED)) == 1
    assert len(box.client.uids(QUARANTINE)) == 3
    assert await store.attempts("box", "INBOX") == []


async def test_several_accounts_at_once(dovecot: Dovecot, unused_users: Iterator[str], tmp_path: Path) -> None:
    """Accounts of one program, on one store: each has its own folders and keys, and none waits for another."""
    boxes = [Box(dovecot, tmp_path / str(number), next(unused_users)) for number in range(4)]
    store = await Store.open(tmp_path / "store")
    for number, box in enumerate(boxes):
        box.sender = Sender(f"anna{number}@sender.example")
        await box.trust(store, box.sender.identity)
        for subject in ("one", "two"):
            box.client.put(box.seal(note(subject, to=box.user, sender=box.sender.address)))
    watchers = [await box.watcher(store, name=f"account {number}") for number, box in enumerate(boxes)]
    await asyncio.gather(*(watcher.run_once() for watcher in watchers))
    for box in boxes:
        assert sorted(str(message["Subject"]) for message in box.client.messages()) == ["one", "two"]
        assert verdicts(box.client.messages()) == ["FRESH"] * 2
        await box.close()
    await store.close()


async def test_the_same_mail_in_two_accounts_with_one_key(box: Box, dovecot: Dovecot, unused_users: Iterator[str],
                                                          tmp_path: Path) -> None:
    """As docs/threat-model.md says: once in each, a repeat from then on in each."""
    other, store, raw = Box(dovecot, tmp_path / "other", next(unused_users)), await box.open_store(), box.seal()
    watchers = [await box.watcher(store), await other.watcher(store, name="other")]
    watchers[1]._keys = watchers[0]._keys
    for _ in range(2):
        for each, watcher in zip((box, other), watchers, strict=True):
            each.client.put(raw)
            await watcher.run_once()
    for each in (box, other):
        assert verdicts(each.client.messages()) == ["FRESH"]
        assert len(each.client.uids(QUARANTINE)) == 1
    await other.close()


@pytest.mark.parametrize("missing", [{"MOVE"}, {"UIDPLUS"}, {"MOVE", "UIDPLUS"}])
async def test_two_devices_where_move_is_missing(box: Box, monkeypatch: pytest.MonkeyPatch, missing: set[str]) -> None:
    """Not supported, and said so in the log; still each message is there, opened, when contests are over."""
    connect = Mailbox.connect

    async def connected(*arguments: Any, **options: Any) -> Mailbox:
        mailbox = await connect(*arguments, **options)
        mailbox._protocol.capabilities -= missing
        return mailbox

    monkeypatch.setattr(Mailbox, "connect", connected)
    trio = Trio(box)
    await trio.start((NAMES[0], NAMES[2]))
    for number in range(5):
        box.client.put(box.seal(note(f"number {number}", to=box.user)))
    with structlog.testing.capture_logs() as logs:
        await trio.settle()
    assert {f"number {number}" for number in range(5)} <= {str(message["Subject"]) for message in box.client.messages()
                                                           if message["Malote-Verdict"]}
    assert any("only one watcher" in line["event"] for line in logs)


@pytest.mark.long
@pytest.mark.timeout(600)
async def test_fifty_thousand_messages(box: Box, dovecot: Dovecot, monkeypatch: pytest.MonkeyPatch) -> None:
    """A first look at a large mailbox: what is fetched is a small part of it, and there is a progress line."""
    box.client.put(note("first"))
    maildir, raw = dovecot.maildir(box.user), note("plain", body="x" * 2000 + "\r\n")
    for number in range(50_000):
        path = maildir / "cur" / f"{1_700_000_000 + number}.M{number}P1.lab,S={len(raw)}:2,S"
        path.write_bytes(raw)
        shutil.chown(path, "mail", "mail")
    for _ in range(150):
        box.client.put(box.seal())
    received, taken = [0], MailProtocol.data_received

    def counting(self: MailProtocol, data: bytes) -> None:
        received[0] += len(data)
        taken(self, data)

    monkeypatch.setattr(MailProtocol, "data_received", counting)
    store = await box.open_store()
    with structlog.testing.capture_logs() as logs:
        await (await box.watcher(store)).run_once()
    assert len(box.client.uids("INBOX", "HEADER Malote-Verdict FRESH")) == 150
    assert [line["done"] for line in logs if line["event"] == "catching up"][-1] == 150
    assert received[0] < 10_000_000, "of more than 110 MB"
    received[0] = 0
    await (await box.watcher(store)).run_once()
    assert received[0] < 1_000_000, "the second look"


async def test_hostile_mail_leaves_nothing_in_the_log(box: Box) -> None:
    """At every level: no address, subject, text or header value of what came, whatever was wrong with it."""
    secret = b"s3cr3t"
    store = await box.open_store()
    frame = b"From: s3cr3t@s3cr3t.example\r\nTo: s3cr3t\r\nSubject: s3cr3t\r\nMessage-ID: <s3cr3t@s3cr3t>\r\n"
    good = box.seal(note("s3cr3t", body="s3cr3t\r\n", to=box.user))
    head, body = good.split(b"\r\n\r\n", 1)
    middle = len(body) // 2
    for raw in (good, good, frame + b"Malote-Verdict: FRESH; s3cr3t\r\n\r\ns3cr3t", head + b"\r\n\r\n" + body[:middle],
                frame + head[head.lower().index(b"content-type"):] + b"\r\n\r\n" + body[:middle] + b"s3cr3t" + body[middle:]):
        box.client.put(raw)
    with structlog.testing.capture_logs() as logs:
        await look(box, store)
        await look(box, store, folders=("INBOX", "Nowhere"))
    assert {line["verdict"] for line in logs if line["event"] == "message"} == {"FRESH", "DUPLICATE", "FORGED", "UNREADABLE"}
    assert secret.decode() not in repr(logs)
    assert box.sender.address not in repr(logs)
    assert box.user not in repr(logs)
